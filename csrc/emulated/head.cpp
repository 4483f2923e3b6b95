#include "../launch/head.h"

#include "convolution.h"

namespace resnet_fused::emulated {
namespace {

RfHead problem(const std::string& dtype, uintptr_t x, uintptr_t weight, uintptr_t bias,
               uintptr_t out, int64_t classes, const Sizes& x_size, const Sizes& x_stride,
               const Pair& weight_stride, bool dependent, bool follows) {
  RfHead made{};
  made.x = pointer<const void>(x);
  made.weight = pointer<const void>(weight);
  made.bias = pointer<const void>(bias);
  made.out = pointer<void>(out);
  made.dtype = static_cast<int32_t>(data_type(dtype));
  made.classes = classes;
  fill(made.x_size, x_size);
  fill(made.x_stride, x_stride);
  fill(made.weight_stride, weight_stride);
  made.flow = {dependent, follows};
  return made;
}

}  // namespace

void define_head(py::module_& module) {
  py::class_<RfHead>(module, "Head")
      .def(py::init(&problem), py::kw_only(), py::arg("dtype"), py::arg("x"), py::arg("weight"),
           py::arg("bias"), py::arg("out"), py::arg("classes"), py::arg("x_size"),
           py::arg("x_stride"), py::arg("weight_stride"), py::arg("dependent"), py::arg("follows"));
  define(module, Convolution<RfHead>{"head",
                                     "out = mean(x) weight^T [+ bias]; see "
                                     "csrc/launch/head.h.",
                                     rf_head_configurations, rf_head_configuration, rf_head_plan,
                                     rf_head_cuda});
}

}  // namespace resnet_fused::emulated
