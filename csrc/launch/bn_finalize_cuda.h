// The C interface of BatchNorm's arithmetic on per-channel values on the GPU: what the bindings or
// the tests call. As bn_finalize.h has it for the CPU; knows no framework. Each runs on the current
// device and the given cudaStream_t, and gives 0 or a cudaError_t. Vectors are dense.
#pragma once

#include <cstdint>

#include "../device/channel_vector.h"

namespace resnet_fused {

// Elements a channel: `total` [1] on the device, over all ranks, where it is not null.
struct ChannelCount {
  const double* total;
  double count;
};

}  // namespace resnet_fused

extern "C" {

int rf_bn_finalize_cuda(const resnet_fused::ChannelVector* stats,
                        const resnet_fused::ChannelVector* gamma,
                        const resnet_fused::ChannelVector* beta, int64_t channels,
                        const resnet_fused::ChannelCount* elements, double eps,
                        const resnet_fused::ChannelVector* norm, void* stream);

// `tracked`: [1] int64 or int32, counted up by one first, or null; `factor` null: 1 / tracked.
int rf_bn_update_stats_cuda(const resnet_fused::ChannelVector* stats, int64_t channels,
                            const resnet_fused::ChannelCount* elements, const double* factor,
                            const resnet_fused::ChannelVector* running_mean,
                            const resnet_fused::ChannelVector* running_var, void* tracked,
                            bool tracked_is_long, void* stream);

// results: [3, K] A, B, C; gamma's gradient [K]; beta's [K].
int rf_bn_backward_finalize_cuda(const resnet_fused::ChannelVector* sums,
                                 const resnet_fused::ChannelVector* all_sums,
                                 const resnet_fused::ChannelVector* norm, int64_t channels,
                                 const resnet_fused::ChannelCount* elements, int64_t row,
                                 bool frozen, const resnet_fused::ChannelVector (*results)[3],
                                 void* stream);

}  // extern "C"
