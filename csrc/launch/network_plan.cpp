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
#include "network_ways.h"

namespace resnet_fused {
namespace {

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
  NetworkCut cut;
  bool meets;       // all blocks before it
  bool launches;    // it is the first of a launch
  int64_t parts;    // tiles with their splits
  int64_t ahead;    // parts of the layers ahead of it in its phase, in whole clusters
  int64_t counter;  // first of its tiles' counters, of which a launch uses none twice
  int64_t partial;  // likewise of its partial sums, in tiles' parts

  // Whether it needs them.
  bool leaves_sums(const NetworkWay& way) const { return cut.splits > 1 && way.cluster == 1; }
};

std::vector<Step> steps_of(const RfNetwork& network, const NetworkWay& way, int32_t blocks) {
  std::vector<Step> steps;
  std::vector<Touched> phase;
  for (int32_t i = 0; i < network.count; ++i) {
    const Touched touched = touched_by(network.layers[i]);
    Step step{};
    step.cut = cut_of(way, network, i, blocks);
    step.parts = step.cut.tiles * step.cut.splits;
    step.launches = i % kMostLayers == 0;
    const bool beside = !step.launches && std::all_of(phase.begin(), phase.end(), [&](auto& other) {
      return independent(touched, other);
    });
    // The end of a launch orders as a meeting does.
    step.meets = !beside && !step.launches;
    if (!step.launches) {
      const Step& last = steps.back();
      const bool split = last.leaves_sums(way);
      step.counter = last.counter + (split ? last.cut.tiles : 0);
      if (beside) step.ahead = divide_up(last.ahead + last.parts, way.cluster) * way.cluster;
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

int64_t counter_bytes(const std::vector<Step>& steps, const NetworkWay& way) {
  int64_t most = 0;
  for (const Step& step : steps) {
    if (step.leaves_sums(way)) most = std::max(most, step.counter + step.cut.tiles);
  }
  return kBarrierBytes + arrival_bytes(most);
}

int64_t partial_bytes(const std::vector<Step>& steps, const NetworkWay& way) {
  int64_t most = 0;
  for (const Step& step : steps) {
    if (step.leaves_sums(way)) most = std::max(most, step.partial + step.parts);
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

NetworkLayer network_layer(const RfConvBnAct& layer, const Step& step, const NetworkWay& way,
                           int32_t blocks, void* counters, void* partial) {
  NetworkLayer made{};
  RfConvPlan plan{};
  plan.configuration = kNetworkTile;
  plan.splits = step.cut.splits;
  plan.images_a_launch = layer.x_size[0];
  made.conv = conv_bn_act_arguments(layer, plan, nullptr, 0, layer.x_size[0]);
  const int64_t pixels = made.conv.operands.grid.pixels;
  made.conv.tiles.tiles_m = narrowed(divide_up(pixels, way.tiles[step.cut.tile].pixels));
  made.conv.workspace = {static_cast<float*>(moved(partial, step.partial * kPartBytes)),
                         static_cast<uint32_t*>(moved(counters, step.counter * 4)), true};
  made.conv.prefetch_bytes =
      dense_bytes(layer.weight_size, layer.weight_stride, bytes_of(layer.dtype));
  made.parts = static_cast<uint32_t>(step.parts);
  made.first = static_cast<uint32_t>(step.ahead % blocks);
  made.tile = step.cut.tile;
  made.meets = step.meets;
  return made;
}

const NetworkWay& way_of(int32_t cluster) {
  const auto& ways = network_ways();
  return *std::find_if(ways.begin(), ways.end(),
                       [&](const NetworkWay& way) { return way.cluster == cluster; });
}

// The way that takes the least predicted time, of those that can serve; null, and in `why` what
// stands against the first of those that were allowed.
const NetworkWay* choose_way(const RfNetwork& network, const RfGpu& gpu, int32_t blocks,
                             std::string& why) {
  const NetworkWay* best = nullptr;
  double least = 0;
  for (const NetworkWay& way : network_ways()) {
    if (network.cluster != 0 && network.cluster != way.cluster) continue;
    const std::string against = way_fault(way, network, gpu, blocks);
    if (!against.empty()) {
      if (why.empty()) why = against;
      continue;
    }
    const auto all = blocks > 0 ? blocks : narrowed(most_blocks(way, gpu));
    double cycles = 0;
    for (int32_t i = 0; i < network.count; ++i) cycles += cut_of(way, network, i, all).cycles;
    if (best != nullptr && cycles >= least) continue;
    best = &way;
    least = cycles;
  }
  if (why.empty())
    why = "clusters of " + std::to_string(network.cluster) +
          " blocks; 4 and 8 are built, 1 is without";
  return best;
}

int launch(const NetworkArguments& arguments, const RfNetworkPlan& plan, bool bfloat16,
           void* stream) {
  if (plan.cluster == 1) {
    return bfloat16 ? launch_network_bfloat16(arguments, plan.blocks, stream)
                    : launch_network_float16(arguments, plan.blocks, stream);
  }
#if defined(RF_EMULATED) || defined(RF_WITH_SM90A)
  return bfloat16 ? launch_network_cluster_bfloat16(arguments, plan.blocks, plan.cluster, stream)
                  : launch_network_cluster_float16(arguments, plan.blocks, plan.cluster, stream);
#else
  constexpr int kNoKernelImage = 209;  // cudaErrorNoKernelImageForDevice; the plan comes first
  return kNoKernelImage;
#endif
}

}  // namespace
}  // namespace resnet_fused

extern "C" int32_t rf_network_plan(const RfNetwork* network, const RfGpu* gpu, int32_t blocks,
                                   RfNetworkPlan* plan, char* why, size_t why_bytes) {
  using namespace resnet_fused;
  const Refusal refuse{why, why_bytes};
  if (gpu->multiprocessors < 1) return refuse("a GPU of %d multiprocessors", gpu->multiprocessors);
  if (network->count < 1) return refuse("a network of %d layers", network->count);
  for (int32_t i = 0; i < network->count; ++i) {
    const std::string against = unfit(*network, i, *gpu);
    if (!against.empty()) return refuse("layer %d: %s", i, against.c_str());
  }
  const int32_t writer = writer_of_constants(*network);
  if (writer >= 0) {
    return refuse("layer %d: it writes where weights, scales or shifts of a layer lie", writer);
  }
  std::string against;
  const NetworkWay* way = choose_way(*network, *gpu, blocks, against);
  if (way == nullptr) return refuse("%s", against.c_str());
  plan->cluster = way->cluster;
  plan->blocks = blocks > 0 ? blocks : narrowed(most_blocks(*way, *gpu));
  const std::vector<Step> steps = steps_of(*network, *way, plan->blocks);
  const auto count = [&](bool Step::* which) {
    return static_cast<int32_t>(
        std::count_if(steps.begin(), steps.end(), [&](const Step& step) { return step.*which; }));
  };
  plan->launches = count(&Step::launches);
  plan->meetings = count(&Step::meets);
  plan->counter_bytes = counter_bytes(steps, *way);
  plan->workspace_bytes = plan->counter_bytes + partial_bytes(steps, *way);
  const std::string clusters =
      way->cluster > 1 ? " in clusters of " + std::to_string(way->cluster) : "";
  std::snprintf(why, why_bytes, "%d layers, %d meetings of %d blocks%s in %d launches",
                network->count, plan->meetings, plan->blocks, clusters.c_str(), plan->launches);
  return 0;
}

extern "C" void rf_network_layer(const RfNetwork* network, const RfNetworkPlan* plan, int32_t index,
                                 RfNetworkLayer* layer) {
  using namespace resnet_fused;
  const NetworkWay& way = way_of(plan->cluster);
  const Step step = steps_of(*network, way, plan->blocks).at(index);
  layer->splits = step.cut.splits;
  layer->pixels = narrowed(way.tiles[step.cut.tile].pixels);
  layer->meets = step.meets;
}

extern "C" double rf_network_cycles(const RfNetwork* network, const RfNetworkPlan* plan) {
  using namespace resnet_fused;
  const NetworkWay& way = way_of(plan->cluster);
  double cycles = (plan->meetings + plan->launches) * phase_cycles();
  for (int32_t i = 0; i < network->count; ++i) {
    cycles += cut_of(way, *network, i, plan->blocks).cycles;
  }
  return cycles;
}

#if !defined(RF_EMULATED) && !defined(RF_WITH_SM90A)
extern "C" int rf_network_clusters(int32_t /*cluster*/, int32_t* clusters) {
  *clusters = 0;
  return 0;
}
extern "C" int rf_gpu_clusters(int32_t /*cluster*/, int32_t /*shared_bytes*/, int32_t* clusters) {
  *clusters = 0;
  return 0;
}
#endif

extern "C" int32_t rf_network_configuration() { return resnet_fused::kNetworkTile; }

extern "C" int rf_network_cuda(const RfNetwork* network, const RfNetworkPlan* plan, void* workspace,
                               void* stream) {
  using namespace resnet_fused;
  const NetworkWay& way = way_of(plan->cluster);
  const std::vector<Step> steps = steps_of(*network, way, plan->blocks);
  const bool bfloat16 = static_cast<DataType>(network->layers[0].dtype) == DataType::kBFloat16;
  const int64_t counters = counter_bytes(steps, way);
  void* partial = moved(workspace, counters);
  for (int32_t first = 0; first < network->count; first += kMostLayers) {
    NetworkArguments arguments{};
    arguments.counters = static_cast<uint32_t*>(workspace);
    arguments.counter_bytes = narrowed(counters);
    arguments.count = std::min(kMostLayers, network->count - first);
    for (int32_t i = 0; i < arguments.count; ++i) {
      arguments.layer[i] = network_layer(network->layers[first + i], steps[first + i], way,
                                         plan->blocks, moved(workspace, kBarrierBytes), partial);
    }
    const int error = launch(arguments, *plan, bfloat16, stream);
    if (error != 0) return error;
  }
  return 0;
}
