// Which layers of a network may run side by side, into how many parts each is cut, and the
// launches.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "conv_bn_act_arguments.h"
#include "conv_plan.h"
#include "network.h"
#include "network_arguments.h"

namespace resnet_fused {
namespace {

// A part of a reduction has so many steps at least: fewer are all latency.
constexpr int64_t kLeastSteps = 4;
constexpr int64_t kMostParts = 32;

// Memory from the first to behind the last byte of a tensor.
struct Span {
  const char* begin;
  const char* end;

  bool meets(const Span& other) const { return begin < other.end && other.begin < end; }
};

Span span_of(const void* data, const int64_t (&size)[4], const int64_t (&stride)[4],
             int64_t bytes) {
  int64_t reach = 1;
  for (int d = 0; d < 4; ++d) reach += (size[d] - 1) * (size[d] > 1 ? stride[d] : 0);
  const auto* begin = static_cast<const char*>(data);
  return {begin, begin + reach * bytes};
}

struct Touched {
  std::vector<Span> reads;
  Span writes;
};

Touched touched_by(const RfConvBnAct& layer) {
  const OutputSize size = output_size(layer);
  const int64_t shape[4] = {layer.x_size[0], layer.weight_size[0], size.p, size.q};
  const int64_t bytes = bytes_of(layer.dtype);
  Touched made{{span_of(layer.x, layer.x_size, layer.x_stride, bytes)},
               span_of(layer.out, shape, layer.out_stride, bytes)};
  if (layer.residual != nullptr) {
    made.reads.push_back(span_of(layer.residual, shape, layer.residual_stride, bytes));
  }
  return made;
}

// Whether the two, in whatever order, give what they give one behind the other.
bool independent(const Touched& a, const Touched& b) {
  const auto reads = [](const Touched& one, const Span& span) {
    return std::any_of(one.reads.begin(), one.reads.end(),
                       [&](const Span& read) { return read.meets(span); });
  };
  return !a.writes.meets(b.writes) && !reads(a, b.writes) && !reads(b, a.writes);
}

// The first layer that writes what blocks read before they meet, since nobody may; -1: none.
int32_t writer_of_constants(const RfNetwork& network) {
  std::vector<Span> constants;
  for (int32_t i = 0; i < network.count; ++i) {
    const RfConvBnAct& layer = network.layers[i];
    constants.push_back(
        span_of(layer.weight, layer.weight_size, layer.weight_stride, bytes_of(layer.dtype)));
    for (const void* of_filters : {layer.scale, layer.shift}) {
      const auto* begin = static_cast<const char*>(of_filters);
      constants.push_back({begin, begin + layer.weight_size[0] * 4});
    }
  }
  for (int32_t i = 0; i < network.count; ++i) {
    const Span writes = touched_by(network.layers[i]).writes;
    if (std::any_of(constants.begin(), constants.end(),
                    [&](const Span& read) { return read.meets(writes); })) {
      return i;
    }
  }
  return -1;
}

// What becomes of a layer.
struct Step {
  int32_t splits;
  bool meets;       // all blocks before it
  bool launches;    // it is the first of a launch
  int64_t tiles;    // without their splits
  int64_t parts;    // with them
  int64_t ahead;    // parts of the layers ahead of it in its phase
  int64_t counter;  // first of its tiles' counters, of which a launch uses none twice
  int64_t partial;  // likewise of its partial sums, in tiles' parts
};

int64_t steps_of(const RfConvBnAct& layer) {
  const int64_t depth = layer.weight_size[1] * layer.weight_size[2] * layer.weight_size[3];
  return divide_up(depth * bytes_of(layer.dtype), NetworkShape::kStepBytes);
}

int64_t tiles_of(const RfConvBnAct& layer) {
  const OutputSize size = output_size(layer);
  return divide_up(layer.x_size[0] * size.p * size.q, NetworkShape::kM) *
         divide_up(layer.weight_size[0] / layer.groups, NetworkShape::kN) * layer.groups;
}

// Cycles of a layer, predicted: the rounds of the busiest multiprocessor, each step at the rate of
// L2 or at its latency, and the merge. There each block writes a tile's sums and reads as many. It
// waits until its own have arrived, until the others' are counted, and for them, a vector a thread
// at a time.
double cycles_of(int64_t tiles, int64_t steps, int64_t parts, int64_t multiprocessors) {
  constexpr double kArea = NetworkShape::kM * NetworkShape::kN;
  constexpr int64_t kVectors = NetworkShape::kM * NetworkShape::kN / 4 / NetworkShape::kThreads;
  const auto rounds = static_cast<double>(divide_up(tiles * parts, multiprocessors));
  const double beside = std::min(rounds, static_cast<double>(kResident));
  const double step = std::max({kArea * NetworkShape::kStepBytes / 2 / kMatrixUnit,
                                NetworkShape::kStageBytes / kCacheBytes,
                                kLatency / ((NetworkShape::kStages - 1) * beside)});
  const double loop = rounds * static_cast<double>(divide_up(steps, parts)) * step;
  const double moved = 2 * rounds * kArea * 4 / kCacheBytes;
  const auto reads = static_cast<double>(divide_up(kVectors, parts));
  return parts == 1 ? loop : loop + (2 + reads) * kLatency + moved;
}

// The parts that take the least predicted time.
int32_t parts_for(int64_t tiles, int64_t steps, int64_t blocks) {
  const int64_t multiprocessors = std::max<int64_t>(1, blocks / kResident);
  int64_t best = 1;
  for (int64_t parts = 2; parts <= std::min(kMostParts, steps / kLeastSteps); ++parts) {
    if (tiles * parts > blocks || !has_work(steps, parts)) continue;
    const double cycles = cycles_of(tiles, steps, parts, multiprocessors);
    if (cycles < cycles_of(tiles, steps, best, multiprocessors)) best = parts;
  }
  return static_cast<int32_t>(best);
}

std::vector<Step> steps_of(const RfNetwork& network, int32_t blocks) {
  std::vector<Step> steps;
  std::vector<Touched> phase;
  for (int32_t i = 0; i < network.count; ++i) {
    const RfConvBnAct& layer = network.layers[i];
    const Touched touched = touched_by(layer);
    Step step{};
    step.tiles = tiles_of(layer);
    const int32_t wish = network.splits == nullptr ? 0 : network.splits[i];
    step.splits = wish > 0 ? wish : parts_for(step.tiles, steps_of(layer), blocks);
    step.parts = step.tiles * step.splits;
    step.launches = i % kMostLayers == 0;
    const bool beside = !step.launches && std::all_of(phase.begin(), phase.end(), [&](auto& other) {
      return independent(touched, other);
    });
    // The end of a launch orders as a meeting does.
    step.meets = !beside && !step.launches;
    if (!step.launches) {
      const Step& last = steps.back();
      const bool split = last.splits > 1;
      step.counter = last.counter + (split ? last.tiles : 0);
      if (beside) step.ahead = last.ahead + last.parts;
      if (beside) step.partial = last.partial + (split ? last.parts : 0);
    }
    if (!beside) phase.clear();
    phase.push_back(touched);
    steps.push_back(step);
  }
  return steps;
}

constexpr int64_t kBarrierBytes = kWorkspaceAlignment;  // its counter, alone in its lines
constexpr int64_t kPartBytes = int64_t{NetworkShape::kM} * NetworkShape::kN * 4;

int64_t counter_bytes(const std::vector<Step>& steps) {
  int64_t most = 0;
  for (const Step& step : steps) {
    if (step.splits > 1) most = std::max(most, step.counter + step.tiles);
  }
  return kBarrierBytes + arrival_bytes(most);
}

int64_t partial_bytes(const std::vector<Step>& steps) {
  int64_t most = 0;
  for (const Step& step : steps) {
    if (step.splits > 1) most = std::max(most, step.partial + step.parts);
  }
  return most * kPartBytes;
}

// What keeps a layer from this kernel; empty if nothing.
std::string unfit(const RfNetwork& network, int32_t index, const RfGpu& gpu) {
  const RfConvBnAct& layer = network.layers[index];
  if (bytes_of(layer.dtype) != 2 || layer.dtype != network.layers[0].dtype) {
    return "its dtype; all layers share one of 16 bits";
  }
  char why[256] = "";
  RfConvPlan plan;
  const int32_t splits = network.splits == nullptr ? 0 : network.splits[index];
  if (rf_conv_bn_act_plan(&layer, &gpu, kNetworkTile, splits, &plan, why, sizeof why) != 0) {
    return why;
  }
  if (plan.launches != 1) return "no output, or more than one launch can count";
  return "";
}

NetworkLayer network_layer(const RfConvBnAct& layer, const Step& step, int32_t blocks,
                           void* counters, void* partial) {
  NetworkLayer made{};
  RfConvPlan plan{};
  plan.configuration = kNetworkTile;
  plan.splits = step.splits;
  plan.images_a_launch = layer.x_size[0];
  made.conv = conv_bn_act_arguments(layer, plan, nullptr, 0, layer.x_size[0]);
  made.conv.workspace = {static_cast<float*>(moved(partial, step.partial * kPartBytes)),
                         static_cast<uint32_t*>(moved(counters, step.counter * 4)), true};
  made.conv.prefetch_bytes =
      dense_bytes(layer.weight_size, layer.weight_stride, bytes_of(layer.dtype));
  made.parts = static_cast<uint32_t>(step.parts);
  made.first = static_cast<uint32_t>(step.ahead % blocks);
  made.meets = step.meets;
  return made;
}

}  // namespace
}  // namespace resnet_fused

extern "C" int32_t rf_network_plan(const RfNetwork* network, const RfGpu* gpu, int32_t blocks,
                                   RfNetworkPlan* plan, char* why, size_t why_bytes) {
  using namespace resnet_fused;
  const Refusal refuse{why, why_bytes};
  if (gpu->multiprocessors < 1) return refuse("a GPU of %d multiprocessors", gpu->multiprocessors);
  if (network->count < 1) return refuse("a network of %d layers", network->count);
  const int64_t beside = std::min<int64_t>(
      NetworkShape::kBlocks, gpu->shared_per_multiprocessor / (NetworkShape::kRingBytes + 1024));
  const int64_t most = beside * gpu->multiprocessors;
  if (most < 1 || NetworkShape::kRingBytes > gpu->shared_per_block) {
    return refuse("a block takes %d bytes of shared memory, more than this GPU gives it",
                  NetworkShape::kRingBytes);
  }
  if (blocks < 0 || blocks > most) {
    return refuse("%d blocks; from 1 to %lld are on this GPU at once", blocks,
                  static_cast<Long>(most));
  }
  for (int32_t i = 0; i < network->count; ++i) {
    const std::string against = unfit(*network, i, *gpu);
    if (!against.empty()) return refuse("layer %d: %s", i, against.c_str());
  }
  const int32_t writer = writer_of_constants(*network);
  if (writer >= 0) {
    return refuse("layer %d: it writes where weights, scales or shifts of a layer lie", writer);
  }
  const int64_t chosen = std::min(kResident * gpu->multiprocessors, most);
  plan->blocks = blocks > 0 ? blocks : narrowed(chosen);
  const std::vector<Step> steps = steps_of(*network, plan->blocks);
  const auto count = [&](bool Step::* which) {
    return static_cast<int32_t>(
        std::count_if(steps.begin(), steps.end(), [&](const Step& step) { return step.*which; }));
  };
  plan->launches = count(&Step::launches);
  plan->meetings = count(&Step::meets);
  plan->counter_bytes = counter_bytes(steps);
  plan->workspace_bytes = plan->counter_bytes + partial_bytes(steps);
  std::snprintf(why, why_bytes, "%d layers, %d meetings of %d blocks in %d launches",
                network->count, plan->meetings, plan->blocks, plan->launches);
  return 0;
}

extern "C" void rf_network_layer(const RfNetwork* network, const RfNetworkPlan* plan, int32_t index,
                                 int32_t* splits, int32_t* meets) {
  const auto step = resnet_fused::steps_of(*network, plan->blocks).at(index);
  *splits = step.splits;
  *meets = step.meets;
}

extern "C" int32_t rf_network_configuration() { return resnet_fused::kNetworkTile; }

extern "C" int rf_network_cuda(const RfNetwork* network, const RfNetworkPlan* plan, void* workspace,
                               void* stream) {
  using namespace resnet_fused;
  const std::vector<Step> steps = steps_of(*network, plan->blocks);
  const bool bfloat16 = static_cast<DataType>(network->layers[0].dtype) == DataType::kBFloat16;
  const int64_t counters = counter_bytes(steps);
  void* partial = moved(workspace, counters);
  for (int32_t first = 0; first < network->count; first += kMostLayers) {
    NetworkArguments arguments{};
    arguments.counters = static_cast<uint32_t*>(workspace);
    arguments.counter_bytes = narrowed(counters);
    arguments.count = std::min(kMostLayers, network->count - first);
    for (int32_t i = 0; i < arguments.count; ++i) {
      arguments.layer[i] = network_layer(network->layers[first + i], steps[first + i], plan->blocks,
                                         moved(workspace, kBarrierBytes), partial);
    }
    const int error = bfloat16 ? launch_network_bfloat16(arguments, plan->blocks, stream)
                               : launch_network_float16(arguments, plan->blocks, stream);
    if (error != 0) return error;
  }
  return 0;
}
