#include "../launch/conv_chain.h"

#include "convolution.h"

namespace resnet_fused::emulated {
namespace {

RfConvChain problem(const std::string& dtype, uintptr_t x, uintptr_t weight, uintptr_t scale,
                    uintptr_t shift, uintptr_t residual, uintptr_t projected,
                    uintptr_t projection_weight, uintptr_t projection_scale,
                    uintptr_t projection_shift, uintptr_t next_weight, uintptr_t next_scale,
                    uintptr_t next_shift, uintptr_t front_weight, uintptr_t front_scale,
                    uintptr_t front_shift, uintptr_t out, uintptr_t following, const Sizes& x_size,
                    const std::array<int64_t, 4>& channels, bool projects, const Sizes& x_stride,
                    const Sizes& residual_stride, const Sizes& projected_stride,
                    const Sizes& out_strides, const Sizes& following_stride,
                    const Sizes& weight_stride, const Sizes& projection_weight_stride,
                    const Sizes& next_weight_stride, const Sizes& front_weight_stride,
                    int64_t projection_stride, int64_t out_stride, bool reverse, bool dependent,
                    bool follows) {
  RfConvChain made{};
  made.dtype = static_cast<int32_t>(data_type(dtype));
  made.reverse = reverse;
  made.flow = {dependent, follows};
  made.projects = projects;
  made.out_stride = out_stride;
  made.projection_stride = projection_stride;
  made.x = pointer<const void>(x);
  made.weight = pointer<const void>(weight);
  made.residual = pointer<const void>(residual);
  made.projected = pointer<const void>(projected);
  made.projection_weight = pointer<const void>(projection_weight);
  made.next_weight = pointer<const void>(next_weight);
  made.out = pointer<void>(out);
  made.following = pointer<void>(following);
  made.scale = pointer<const void>(scale);
  made.shift = pointer<const void>(shift);
  made.projection_scale = pointer<const void>(projection_scale);
  made.projection_shift = pointer<const void>(projection_shift);
  made.next_scale = pointer<const void>(next_scale);
  made.next_shift = pointer<const void>(next_shift);
  made.front_weight = pointer<const void>(front_weight);
  made.front_scale = pointer<const void>(front_scale);
  made.front_shift = pointer<const void>(front_shift);
  fill(made.x_size, x_size);
  made.channels = channels[0];
  made.projected_channels = channels[1];
  made.next_channels = channels[2];
  made.front_channels = channels[3];
  fill(made.x_stride, x_stride);
  fill(made.residual_stride, residual_stride);
  fill(made.projected_stride, projected_stride);
  fill(made.out_strides, out_strides);
  fill(made.following_stride, following_stride);
  fill(made.weight_stride, weight_stride);
  fill(made.projection_weight_stride, projection_weight_stride);
  fill(made.next_weight_stride, next_weight_stride);
  fill(made.front_weight_stride, front_weight_stride);
  return made;
}

}  // namespace

void define_conv_chain(py::module_& module) {
  py::class_<RfConvChain>(module, "ConvChain")
      .def(py::init(&problem), py::kw_only(), py::arg("dtype"), py::arg("x"), py::arg("weight"),
           py::arg("scale"), py::arg("shift"), py::arg("residual"), py::arg("projected"),
           py::arg("projection_weight"), py::arg("projection_scale"), py::arg("projection_shift"),
           py::arg("next_weight"), py::arg("next_scale"), py::arg("next_shift"),
           py::arg("front_weight"), py::arg("front_scale"), py::arg("front_shift"), py::arg("out"),
           py::arg("following"), py::arg("x_size"), py::arg("channels"), py::arg("projects"),
           py::arg("x_stride"), py::arg("residual_stride"), py::arg("projected_stride"),
           py::arg("out_strides"), py::arg("following_stride"), py::arg("weight_stride"),
           py::arg("projection_weight_stride"), py::arg("next_weight_stride"),
           py::arg("front_weight_stride"), py::arg("projection_stride"), py::arg("out_stride"),
           py::arg("reverse"), py::arg("dependent"), py::arg("follows"));
  define(module, Convolution<RfConvChain>{"conv_chain",
                                          "out and next of a chain of convolutions; see "
                                          "csrc/launch/conv_chain.h.",
                                          rf_conv_chain_configurations, rf_conv_chain_configuration,
                                          rf_conv_chain_plan, rf_conv_chain_cuda});
}

}  // namespace resnet_fused::emulated
