#include "conv.h"

#if !defined(RF_EMULATED)
#include <cuda_runtime.h>
#endif

namespace resnet_fused::driver {

Layout::Layout(const Size& size, bool channels_last) {
  const int order[2][4] = {{0, 1, 2, 3}, {0, 2, 3, 1}};
  int64_t step = 1;
  for (int i = 3; i >= 0; --i) {
    const int d = order[channels_last][i];
    stride[d] = step;
    step *= size[d];
  }
}

Convolution::Convolution(const Arguments& arguments)
    : n(arguments.integer("n", 0)),
      c(arguments.integer("c", 1)),
      h(arguments.integer("h", 1)),
      w(arguments.integer("w", 1)),
      k(arguments.integer("k", 1)),
      r(arguments.integer("r", 1)),
      s(arguments.integer("s", 1)),
      stride(arguments.integer("stride", 1)),
      padding(arguments.integer("padding", 0)),
      dilation(arguments.integer("dilation", 1)),
      groups(arguments.integer("groups", 1)),
      channels_last(arguments.choice("layout", {"nchw", "nhwc"}) == 1) {
  if (p() < 1 || q() < 1) throw UsageError("the filter is larger than the image");
  if (c % groups != 0 || k % groups != 0) {
    throw UsageError("--groups divides neither --c nor --k, or not both");
  }
}

RfGpu this_gpu() {
#if defined(RF_EMULATED)
  return {132, 227 * 1024, 228 * 1024, 90};
#else
  int device = 0;
  RfGpu gpu;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(rf_gpu(device, &gpu), "cudaDeviceGetAttribute");
  return gpu;
#endif
}

int32_t configuration_of(const Arguments& arguments, int32_t count,
                         const RfConvConfiguration* (*configuration)(int32_t)) {
  const std::string& name = arguments.text("configuration");
  if (name == "auto") return -1;
  std::string accepted = "auto";
  for (int32_t i = 0; i < count; ++i) {
    const char* known = configuration(i)->name;
    if (name == known) return i;
    accepted += std::string(", ") + known;
  }
  throw UsageError("--configuration is '" + name + "'; accepted are " + accepted);
}

}  // namespace resnet_fused::driver
