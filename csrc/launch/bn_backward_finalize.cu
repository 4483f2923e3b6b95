// The launch of bn_backward_finalize.
#include "../kernels/bn_backward_finalize_sm80.cuh"
#include "bn_finalize_cuda.h"
#include "launch.h"

extern "C" int rf_bn_backward_finalize_cuda(
    const resnet_fused::ChannelVector* sums, const resnet_fused::ChannelVector* all_sums,
    const resnet_fused::ChannelVector* norm, int64_t channels,
    const resnet_fused::ChannelCount* elements, int64_t row, bool frozen,
    const resnet_fused::ChannelVector (*results)[3], void* stream) {
  using namespace resnet_fused;
  if (channels == 0) return cudaSuccess;
  const auto& [coefficients, dgamma, dbeta] = *results;
  const BnBackwardFinalizeArguments arguments{
      *sums,           *all_sums, *norm,           coefficients, dgamma, dbeta,
      elements->total, channels,  elements->count, row,          frozen};
  const auto blocks = static_cast<unsigned>((channels + kVectorThreads - 1) / kVectorThreads);
  return RF_LAUNCH(bn_backward_finalize_kernel, dim3(blocks), dim3(kVectorThreads), 0,
                   static_cast<cudaStream_t>(stream), arguments);
}
