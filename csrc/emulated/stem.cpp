#include "../launch/stem.h"

#include "../device/stem_tile.h"
#include "convolution.h"

namespace resnet_fused::emulated {
namespace {

// image: the dtype of x, "uint8" or one that `data_type` knows.
StemImage image_of(const std::string& image, const std::string& dtype) {
  if (image == "uint8") return StemImage::kBytes;
  return image == dtype ? StemImage::kWeights : StemImage::kFloat;
}

RfStem problem(const std::string& dtype, const std::string& image, uintptr_t x, uintptr_t weight,
               uintptr_t scale, uintptr_t shift, uintptr_t input_norm, uintptr_t out,
               const Sizes& x_size, const Sizes& weight_size, const Sizes& x_stride,
               const Sizes& weight_stride, const Sizes& out_stride, const Pair& stride,
               const Pair& padding, const Pair& pool_kernel, const Pair& pool_stride,
               const Pair& pool_padding, bool dependent, bool follows, bool quantised,
               float out_factor) {
  RfStem made{};
  made.x = pointer<const void>(x);
  made.weight = pointer<const void>(weight);
  made.scale = pointer<const void>(scale);
  made.shift = pointer<const void>(shift);
  made.input_norm = pointer<const void>(input_norm);
  made.out = pointer<void>(out);
  made.dtype = static_cast<int32_t>(data_type(dtype));
  made.out_dtype = quantised ? kFloat8E4M3 : made.dtype;
  made.out_factor = out_factor;
  made.image = static_cast<int32_t>(image_of(image, dtype));
  fill(made.x_size, x_size);
  fill(made.weight_size, weight_size);
  fill(made.x_stride, x_stride);
  fill(made.weight_stride, weight_stride);
  fill(made.out_stride, out_stride);
  fill(made.stride, stride);
  fill(made.padding, padding);
  fill(made.pool_kernel, pool_kernel);
  fill(made.pool_stride, pool_stride);
  fill(made.pool_padding, pool_padding);
  made.flow = {dependent, follows};
  return made;
}

}  // namespace

void define_stem(py::module_& module) {
  py::class_<RfStem>(module, "Stem")
      .def(py::init(&problem), py::kw_only(), py::arg("dtype"), py::arg("image"), py::arg("x"),
           py::arg("weight"), py::arg("scale"), py::arg("shift"), py::arg("input_norm"),
           py::arg("out"), py::arg("x_size"), py::arg("weight_size"), py::arg("x_stride"),
           py::arg("weight_stride"), py::arg("out_stride"), py::arg("stride"), py::arg("padding"),
           py::arg("pool_kernel"), py::arg("pool_stride"), py::arg("pool_padding"),
           py::arg("dependent"), py::arg("follows"), py::arg("quantised") = false,
           py::arg("out_factor") = 1.0f);
  define(module, Convolution<RfStem>{
                     "stem",
                     "out = maxpool(relu(scale conv(a x + b, weight) + shift)) out_factor; see "
                     "csrc/launch/stem.h.",
                     rf_stem_configurations, rf_stem_configuration, rf_stem_plan, rf_stem_cuda});
}

}  // namespace resnet_fused::emulated
