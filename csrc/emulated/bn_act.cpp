#include "../launch/bn_act.h"

#include <algorithm>

#include "emulated.h"

namespace resnet_fused::emulated {
namespace {

py::dict bn_act(const Settings& settings, const std::string& dtype, bool relu, uintptr_t x,
                uintptr_t residual, uintptr_t scale, uintptr_t shift, uintptr_t out,
                const Sizes& size, const Sizes& x_stride, const Sizes& residual_stride,
                const Sizes& out_stride, bool dependent, bool follows) {
  RfBnActTensors tensors{};
  tensors.x = pointer<const void>(x);
  tensors.residual = pointer<const void>(residual);
  tensors.out = pointer<void>(out);
  tensors.scale = pointer<const void>(scale);
  tensors.shift = pointer<const void>(shift);
  tensors.dtype = static_cast<int32_t>(data_type(dtype));
  tensors.relu = relu;
  std::copy(size.begin(), size.end(), tensors.size);
  std::copy(x_stride.begin(), x_stride.end(), tensors.x_stride);
  std::copy(residual_stride.begin(), residual_stride.end(), tensors.residual_stride);
  std::copy(out_stride.begin(), out_stride.end(), tensors.out_stride);
  BnActLoop loop;
  rf_bn_act_plan(&tensors, &loop);
  const RfFlow flow{dependent, follows};
  return run(settings, [&] { return rf_bn_act_cuda(&loop, &flow, nullptr); });
}

}  // namespace

void define_bn_act(py::module_& module) {
  module.def("bn_act", &bn_act,
             "y = act(scale x + shift [+ residual]); addresses (residual 0: none), sizes and "
             "strides in elements as [N, C, H, W].",
             py::arg("settings"), py::arg("dtype"), py::arg("relu"), py::arg("x"),
             py::arg("residual"), py::arg("scale"), py::arg("shift"), py::arg("out"),
             py::arg("size"), py::arg("x_stride"), py::arg("residual_stride"),
             py::arg("out_stride"), py::arg("dependent"), py::arg("follows"));
}

}  // namespace resnet_fused::emulated
