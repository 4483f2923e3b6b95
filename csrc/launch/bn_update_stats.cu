// The launch of bn_update_stats.
#include "../kernels/bn_update_stats_sm80.cuh"
#include "bn_finalize_cuda.h"
#include "launch.h"

extern "C" int rf_bn_update_stats_cuda(const resnet_fused::ChannelVector* stats, int64_t channels,
                                       const resnet_fused::ChannelCount* elements,
                                       const double* factor,
                                       const resnet_fused::ChannelVector* running_mean,
                                       const resnet_fused::ChannelVector* running_var,
                                       void* tracked, bool tracked_is_long, void* stream) {
  using namespace resnet_fused;
  const BnUpdateStatsArguments arguments{*stats,
                                         *running_mean,
                                         *running_var,
                                         elements->total,
                                         tracked,
                                         tracked_is_long,
                                         factor == nullptr,
                                         channels,
                                         elements->count,
                                         factor != nullptr ? *factor : 0.0};
  return RF_LAUNCH(bn_update_stats_kernel, dim3(1), dim3(kUpdateThreads), sizeof(double),
                   static_cast<cudaStream_t>(stream), arguments);
}
