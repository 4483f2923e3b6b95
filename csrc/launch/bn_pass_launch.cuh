// The launch that training's passes share: from what is known when it is called to a kernel's
// template. Inside of this room.
#pragma once

#include <type_traits>

#include "../device/channel_sums.h"
#include "bn_pass_walk.h"
#include "launch.h"

namespace resnet_fused {

template <bool kValue>
using Flag = std::bool_constant<kValue>;

// Calls take(T{}, width, dense): the width is 16 bytes of T, or one.
template <class T, class Take>
int with_width(const RfBnPassPlan& plan, const Take& take) {
  const auto with_dense = [&](auto width) {
    return plan.dense != 0 ? take(T{}, width, Flag<true>{}) : take(T{}, width, Flag<false>{});
  };
  return plan.wide != 0 ? with_dense(std::integral_constant<int, kVectorBytes / sizeof(T)>{})
                        : with_dense(std::integral_constant<int, 1>{});
}

template <class Take>
int with_pass_type(const BnTrainingCall& call, const RfBnPassPlan& plan, const Take& take) {
  switch (call.dtype) {
    case DataType::kFloat32:
      return with_width<float>(plan, take);
    case DataType::kFloat16:
      return with_width<Float16>(plan, take);
    case DataType::kBFloat16:
      return with_width<BFloat16>(plan, take);
    default:
      return cudaErrorInvalidValue;
  }
}

// Launches a kernel over the plan's blocks.
template <class Kernel, class Arguments>
int launch_pass(const BnTrainingCall& call, const RfBnPassPlan& plan, Kernel kernel,
                const Arguments& arguments, uint32_t shared_bytes, void* stream) {
  ChannelWalk walk = channel_walk(call);
  walk.groups = static_cast<uint32_t>(plan.groups);
  walk.parts = static_cast<uint32_t>(plan.parts);
  const dim3 block(static_cast<unsigned>(plan.columns), static_cast<unsigned>(plan.rows));
  const dim3 grid(walk.groups * walk.parts);
  return RF_LAUNCH(kernel, grid, block, shared_bytes, static_cast<cudaStream_t>(stream), walk,
                   arguments);
}

// Where a summing pass leaves its sums. Clears the arrivals ahead of the kernel; 0, or a
// cudaError_t.
inline int sums_of(const BnTrainingCall& call, const RfBnPassPlan& plan, void* workspace,
                   void* stream, ChannelSums* sums) {
  auto* memory = static_cast<unsigned char*>(workspace);
  *sums = {static_cast<float*>(call.sums), reinterpret_cast<float*>(memory + plan.arrivals_bytes),
           reinterpret_cast<uint32_t*>(memory)};
  return clear_async(memory, static_cast<size_t>(plan.arrivals_bytes),
                     static_cast<cudaStream_t>(stream));
}

// Of a pass over nothing: the sums are zeros.
inline int clear_sums(const BnTrainingCall& call, void* stream) {
  return clear_async(call.sums, static_cast<size_t>(call.rows * call.size[1]) * 4,
                     static_cast<cudaStream_t>(stream));
}

inline const float* values(const void* rows) { return static_cast<const float*>(rows); }

}  // namespace resnet_fused
