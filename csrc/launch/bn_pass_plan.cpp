// How a pass of training is cut into blocks on the GPU.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <iterator>
#include <limits>

#include "bn_pass.h"
#include "bn_pass_walk.h"

namespace resnet_fused {
namespace {

constexpr int64_t kVectorBytes = 16;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t bytes_of(DataType dtype) { return dtype == DataType::kFloat32 ? 4 : 2; }

bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % kVectorBytes == 0;
}

// Whether every operand's channels can be moved 16 bytes at a time.
bool is_wide(const BnTrainingCall& call, const ChannelWalk& walk) {
  const int64_t length = kVectorBytes / bytes_of(call.dtype);
  const auto whole = [length](int64_t value) { return value % length == 0; };
  if (!whole(walk.channels) || !is_aligned(call.norm) || !is_aligned(call.residual_norm) ||
      !is_aligned(call.sums)) {
    return false;
  }
  const auto in_lanes = [&](const WalkOperand& operand) {
    return operand.data == nullptr ||
           (operand.channel == 1 && whole(operand.first) && whole(operand.channels) &&
            std::all_of(std::begin(operand.pixel), std::end(operand.pixel), whole));
  };
  if (is_pooling(call)) {
    const WalkOperand taps = pool_windows(call).taps;
    const auto address = reinterpret_cast<uintptr_t>(taps.data);
    if (!in_lanes(taps) || !whole(static_cast<int64_t>(address % kVectorBytes))) return false;
  }
  return std::all_of(std::begin(walk.operand), std::end(walk.operand), [&](const auto& operand) {
    return in_lanes(operand) && is_aligned(operand.data);
  });
}

// Of a pooling, beyond what its binding checks: what the kernels count in 32 bits.
bool counts_in_32_bits(const BnTrainingPool& pool, const int64_t (&size)[4]) {
  constexpr int64_t kFar = int64_t{1} << 30;
  for (int d = 0; d < 2; ++d) {
    if (size[2 + d] >= kFar || pool.windows[d] >= kFar || pool.step[d] >= kFar) return false;
    if (pool.windows[d] * pool.step[d] >= kFar || pool.padding[d] >= kFar) return false;
  }
  return true;
}

// The next power of two, at most kWalkColumns.
int32_t columns_for(int64_t columns) {
  int32_t found = 1;
  while (found < columns && found < kWalkColumns) found *= 2;
  return found;
}

}  // namespace

// The pixels' loops: neighbours are one where all operands step through both as through one.
ChannelWalk channel_walk(const BnTrainingCall& call) {
  ChannelWalk walk{};
  walk.channels = call.size[1];
  int64_t size[3] = {call.size[0], call.size[2], call.size[3]};
  if (call.op == BnTrainingOp::kPool)
    size[1] = call.pool.windows[0], size[2] = call.pool.windows[1];
  walk.pixels = size[0] * size[1] * size[2];
  for (int i = 0; i < kBnTrainingOperands; ++i) {
    const BnTrainingOperand& from = call.operand[i];
    if (from.data == nullptr) continue;
    const bool part = i == kResidual && is_partial(call);
    walk.operand[i] = WalkOperand{from.data,
                                  {from.stride[0], from.stride[2], from.stride[3]},
                                  from.stride[1],
                                  part ? call.residual_first : 0,
                                  part ? call.residual_channels : walk.channels};
  }
  // From the inside out; a merged loop takes the place of its outer one, and what is left in the
  // inner one's has size 1.
  const auto merge = [&](int outer, int inner) {
    const auto joined = [&](const WalkOperand& operand) {
      return operand.data == nullptr || operand.pixel[outer] == operand.pixel[inner] * size[inner];
    };
    if (size[inner] != 1 && size[outer] != 1 &&
        !std::all_of(std::begin(walk.operand), std::end(walk.operand), joined)) {
      return;
    }
    for (WalkOperand& operand : walk.operand) {
      if (size[inner] != 1) operand.pixel[outer] = operand.pixel[inner];
      operand.pixel[inner] = 0;
    }
    size[outer] *= size[inner];
    size[inner] = 1;
  };
  // A pooling asks for rows and columns.
  if (!is_pooling(call)) {
    merge(1, 2);
    merge(0, 1);
  }
  // Where rows and columns could not be merged, images and rows may have been.
  walk.inner[0] = size[1], walk.inner[1] = size[2];
  return walk;
}

PoolWindows pool_windows(const BnTrainingCall& call) {
  const BnTrainingPool& pool = call.pool;
  PoolWindows made{};
  for (int d = 0; d < 2; ++d) {
    made.kernel[d] = static_cast<int32_t>(pool.kernel[d]);
    made.step[d] = static_cast<int32_t>(pool.step[d]);
    made.padding[d] = static_cast<int32_t>(pool.padding[d]);
    made.size[d] = static_cast<int32_t>(call.size[2 + d]);
    made.windows[d] = static_cast<int32_t>(pool.windows[d]);
  }
  made.taps = WalkOperand{pool.taps,
                          {pool.taps_stride[0], pool.taps_stride[2], pool.taps_stride[3]},
                          pool.taps_stride[1],
                          0,
                          call.size[1]};
  return made;
}

}  // namespace resnet_fused

extern "C" int32_t rf_bn_pass_plan(const resnet_fused::BnTrainingCall* call, RfBnPassPlan* plan,
                                   char* why, size_t why_bytes) {
  using namespace resnet_fused;
  *plan = RfBnPassPlan{};
  if (call->dtype == DataType::kFloat64) {
    std::snprintf(why, why_bytes, "float64; the kernels compute in float32");
    return 1;
  }
  const bool projected = call->operand[kResidual].data != nullptr;
  if (call->op == BnTrainingOp::kBackward && projected && call->operand[kPassed].data == nullptr) {
    std::snprintf(why, why_bytes, "a projection without the result; its mask is read from that");
    return 1;
  }
  if (is_pooling(*call) && !counts_in_32_bits(call->pool, call->size)) {
    std::snprintf(why, why_bytes, "an image or windows of 2^30 places and more");
    return 1;
  }
  const ChannelWalk walk = channel_walk(*call);
  const int32_t reads = reads_of(*call);
  plan->wide = is_wide(*call, walk);
  plan->dense = walk.inner[0] == 1 && walk.inner[1] == 1;
  const bool more = call->rows > 0 || is_partial(*call) || plan->dense == 0;
  plan->ahead = is_pooling(*call) ? kPoolAhead : walk_ahead(reads, more);
  const int64_t length = plan->wide ? kVectorBytes / bytes_of(call->dtype) : 1;
  const int64_t columns = divide_up(walk.channels, length);
  // Where pixels lie together, and not channels, a warp's threads take neighbouring pixels.
  plan->columns = call->operand[kResult].stride[1] == 1 ? columns_for(columns) : 1;
  plan->rows = kWalkThreads / plan->columns;
  if (walk.pixels * walk.channels == 0) return 0;
  plan->groups = divide_up(columns, plan->columns);
  const int64_t tiles = divide_up(walk.pixels, int64_t{plan->rows} * plan->ahead);
  const int64_t most = call->rows > 0 ? kSummingBlocks : std::numeric_limits<int32_t>::max();
  if (plan->groups > std::numeric_limits<int32_t>::max()) {
    std::snprintf(why, why_bytes, "%lld channels are more than a launch can take",
                  static_cast<long long>(walk.channels));
    return 1;
  }
  plan->parts = std::min(tiles, std::max<int64_t>(1, most / plan->groups));
  if (call->rows > 0) {
    plan->arrivals_bytes = divide_up(plan->groups * 4, kVectorBytes) * kVectorBytes;
    plan->workspace_bytes = plan->arrivals_bytes + plan->parts * call->rows * walk.channels * 4;
  }
  return 0;
}
