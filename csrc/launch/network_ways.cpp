// What a layer of a network takes, by the way in which the parts of its tiles meet. None of the
// rates has been measured by this project on a GPU; only their proportions matter.
#include "network_ways.h"

#include <algorithm>

#include "conv_bn_act_arguments.h"
#include "conv_bn_act_cluster.h"
#include "conv_plan.h"
#include "network_arguments.h"

namespace resnet_fused {
namespace {

// A part of a reduction has so many steps at least: fewer are all latency.
constexpr int64_t kLeastSteps = 4;
constexpr int64_t kMostParts = 32;
// Cycles from the last block's arrival to the next phase, in which filters come.
constexpr double kGridMeeting = 1776;

template <class... Shapes>
std::vector<NetworkTile> facts_of(NetworkTiles<Shapes...> /*list*/) {
  return {NetworkTile{Shapes::kM, Shapes::kN, Shapes::kStages, Shapes::kStageBytes}...};
}

struct LayerWork {
  int64_t pixels;
  int64_t channels;  // of a group
  int64_t groups;
  int64_t steps;
  bool residual;

  explicit LayerWork(const RfConvBnAct& layer)
      : channels(layer.weight_size[0] / layer.groups),
        groups(layer.groups),
        residual(layer.residual != nullptr) {
    const OutputSize size = output_size(layer);
    pixels = layer.x_size[0] * size.p * size.q;
    const int64_t depth = layer.weight_size[1] * layer.weight_size[2] * layer.weight_size[3];
    steps = divide_up(depth * bytes_of(layer.dtype), NetworkShape::kStepBytes);
  }

  int64_t tiles(const NetworkTile& tile) const {
    return divide_up(pixels, tile.pixels) * divide_up(channels, tile.channels) * groups;
  }
};

// Cycles in which `rounds` parts on a multiprocessor become results. Through memory each block
// writes a tile's sums and reads as many. It waits until its own have arrived, until the others'
// are counted, and for them, a vector a thread at a time. In a cluster it puts them down, and reads
// the others' behind a barrier; a second one's time is taken for the way to them.
double merge_cycles(const NetworkWay& way, const NetworkTile& tile, double rounds, int64_t parts) {
  if (parts == 1) return 0;
  const auto area = static_cast<double>(tile.pixels * tile.channels);
  if (way.cluster == 1) {
    const int64_t vectors = tile.pixels * tile.channels / 4 / NetworkShape::kThreads;
    const auto reads = static_cast<double>(divide_up(vectors, parts));
    return (2 + reads) * kLatency + 2 * rounds * area * 4 / kCacheBytes;
  }
  const auto others = static_cast<double>(parts - 1) / static_cast<double>(parts);
  return 2 * kClusterMeeting +
         rounds * (area * 4 / kSharedBytes + others * area * 4 / kClusterBytes);
}

// Cycles of a layer, predicted: the rounds of the busiest multiprocessor, each step at the rate of
// L2 or at its latency, less the filters that come while the blocks meet; the merge; and the
// results' way to memory, with the shortcut's from there.
double cycles_of(const NetworkWay& way, const NetworkTile& tile, const LayerWork& work,
                 int64_t parts, int64_t multiprocessors) {
  const auto area = static_cast<double>(tile.pixels * tile.channels);
  const auto rounds = static_cast<double>(divide_up(work.tiles(tile) * parts, multiprocessors));
  const double beside = std::min(rounds, static_cast<double>(way.beside));
  const double step = std::max({area * NetworkShape::kStepBytes / 2 / kMatrixUnit,
                                static_cast<double>(tile.stage_bytes) / kCacheBytes,
                                kLatency / (static_cast<double>(tile.stages - 1) * beside)});
  const int64_t steps = divide_up(work.steps, parts);
  const auto early = static_cast<double>(std::min(tile.stages - 1, steps));
  const double filters =
      beside * early * static_cast<double>(tile.channels * NetworkShape::kStepBytes);
  const double ahead = std::min(filters / kCacheBytes, kGridMeeting);
  const double moved = rounds * area * 2 * (work.residual ? 2 : 1) / static_cast<double>(parts);
  return rounds * static_cast<double>(steps) * step - ahead +
         merge_cycles(way, tile, rounds, parts) + moved / kMemoryBytes;
}

// Whether a way has work for so many parts, and room for them.
bool may_cut(const NetworkWay& way, int64_t tiles, int64_t steps, int64_t parts, int64_t blocks) {
  if (parts == 1) return true;
  const bool apart = way.cluster == 1 || (parts & (parts - 1)) == 0;  // or a tile in two clusters
  return apart && parts * kLeastSteps <= steps && tiles * parts <= blocks && has_work(steps, parts);
}

int64_t most_parts(const NetworkWay& way) { return way.cluster == 1 ? kMostParts : way.cluster; }

}  // namespace

const std::vector<NetworkWay>& network_ways() {
  static const std::vector<NetworkWay> ways = [] {
    std::vector<NetworkWay> made{
        {1, MemoryTiles::kRingBytes, MemoryTiles::kBlocks, facts_of(MemoryTiles{})}};
    for (const int32_t cluster : {8, 4}) {
      made.push_back(
          {cluster, kClusterSharedBytes, ClusterTiles::kBlocks, facts_of(ClusterTiles{})});
    }
    return made;
  }();
  return ways;
}

double phase_cycles() { return kGridMeeting + kLatency; }

int64_t most_blocks(const NetworkWay& way, const RfGpu& gpu) {
  const int64_t beside =
      std::min<int64_t>(way.beside, gpu.shared_per_multiprocessor / (way.shared_bytes + 1024));
  if (way.cluster == 1) return beside * gpu.multiprocessors;
  // Blocks of one cluster may share a multiprocessor: what there is room for one by one says less
  // than rf_network_clusters.
  RfGpu unasked = gpu;
  unasked.clusters_of_4 = unasked.clusters_of_8 = 0;
  return beside * cluster_multiprocessors(way.cluster, unasked) / way.cluster * way.cluster;
}

std::string way_fault(const NetworkWay& way, const RfNetwork& network, const RfGpu& gpu,
                      int32_t blocks) {
  const auto said = [](int64_t number) { return std::to_string(number); };
  if (way.cluster > 1 && gpu.capability != 90) return "clusters are for GPUs of capability 9.0";
  const int64_t most = most_blocks(way, gpu);
  if (most < way.cluster || way.shared_bytes > gpu.shared_per_block) {
    return "a block takes " + said(way.shared_bytes) +
           " bytes of shared memory, more than this GPU gives it";
  }
  if (blocks < 0 || blocks > most) {
    return said(blocks) + " blocks; from " + said(way.cluster) + " to " + said(most) +
           " are on this GPU at once";
  }
  if (blocks % way.cluster != 0) {
    return said(blocks) + " blocks; in clusters of " + said(way.cluster) +
           " a multiple of that is accepted";
  }
  for (int32_t i = 0; i < network.count; ++i) {
    const int32_t splits = network.splits == nullptr ? 0 : network.splits[i];
    if (way.cluster > 1 && splits > 0 && way.cluster % splits != 0) {
      return "layer " + said(i) + ": splits: " + said(splits) + " in a cluster of " +
             said(way.cluster) + "; what divides that is accepted";
    }
    const int32_t pixels = network.pixels == nullptr ? 0 : network.pixels[i];
    const auto has = [&](const NetworkTile& tile) { return pixels == 0 || tile.pixels == pixels; };
    if (std::none_of(way.tiles.begin(), way.tiles.end(), has)) {
      return "layer " + said(i) + ": pixels: no tiles of " + said(pixels);
    }
  }
  return "";
}

NetworkCut cut_of(const NetworkWay& way, const RfNetwork& network, int32_t index, int32_t blocks) {
  const LayerWork work(network.layers[index]);
  const int32_t splits = network.splits == nullptr ? 0 : network.splits[index];
  const int32_t pixels = network.pixels == nullptr ? 0 : network.pixels[index];
  const int64_t multiprocessors = std::max<int64_t>(1, blocks / way.beside);
  NetworkCut best{-1, 0, 0, 0};
  for (size_t i = 0; i < way.tiles.size(); ++i) {
    const NetworkTile& tile = way.tiles[i];
    if (pixels > 0 && tile.pixels != pixels) continue;
    const int64_t tiles = work.tiles(tile);
    for (int64_t parts = 1; parts <= std::max<int64_t>(splits, most_parts(way)); ++parts) {
      if (splits > 0 ? parts != splits : !may_cut(way, tiles, work.steps, parts, blocks)) continue;
      const double cycles = cycles_of(way, tile, work, parts, multiprocessors);
      if (best.tile >= 0 && cycles >= best.cycles) continue;
      best = {static_cast<int32_t>(i), static_cast<int32_t>(parts), tiles, cycles};
    }
  }
  return best;
}

}  // namespace resnet_fused
