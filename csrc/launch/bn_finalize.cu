// The launch of bn_finalize.
#include "../kernels/bn_finalize_sm80.cuh"
#include "bn_finalize_cuda.h"
#include "launch.h"

extern "C" int rf_bn_finalize_cuda(const resnet_fused::ChannelVector* stats,
                                   const resnet_fused::ChannelVector* gamma,
                                   const resnet_fused::ChannelVector* beta, int64_t channels,
                                   const resnet_fused::ChannelCount* elements, double eps,
                                   const resnet_fused::ChannelVector* norm, void* stream) {
  using namespace resnet_fused;
  if (channels == 0) return cudaSuccess;
  const BnFinalizeArguments arguments{*stats,          *gamma,   *beta,           *norm,
                                      elements->total, channels, elements->count, eps};
  const auto blocks = static_cast<unsigned>((channels + kVectorThreads - 1) / kVectorThreads);
  return RF_LAUNCH(bn_finalize_kernel, dim3(blocks), dim3(kVectorThreads), 0,
                   static_cast<cudaStream_t>(stream), arguments);
}
