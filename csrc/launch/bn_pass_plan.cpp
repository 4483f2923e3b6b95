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
  return std::all_of(std::begin(walk.operand), std::end(walk.operand), [&](const auto& operand) {
    return operand.data == nullptr ||
           (operand.channel == 1 && is_aligned(operand.data) && whole(operand.first) &&
            whole(operand.channels) &&
            std::all_of(std::begin(operand.pixel), std::end(operand.pixel), whole));
  });
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
  merge(1, 2);
  merge(0, 1);
  // Where rows and columns could not be merged, images and rows may have been.
  walk.inner[0] = size[1], walk.inner[1] = size[2];
  return walk;
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
  const ChannelWalk walk = channel_walk(*call);
  const int32_t reads = reads_of(*call);
  plan->wide = is_wide(*call, walk);
  plan->dense = walk.inner[0] == 1 && walk.inner[1] == 1;
  plan->ahead = walk_ahead(reads, call->rows > 0 || is_partial(*call) || plan->dense == 0);
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
