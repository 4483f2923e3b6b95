// The table of conv_bn_act's configurations, and the pure function that picks one and its splits.
//
// The choice is the least predicted time. None of the rates below has been measured by this project
// on a GPU; only their proportions matter.
#include <algorithm>
#include <array>
#include <cstdio>
#include <string>

#include "conv_bn_act_arguments.h"
#include "conv_bn_act_cluster.h"
#include "conv_bn_act_tf32.h"
#include "conv_bn_act_tma.h"
#include "conv_bn_act_window.h"
#include "conv_plan.h"
#include "conv_tiles.h"
#include "tma_request.h"

namespace resnet_fused {
namespace {

// Beyond, the parts of these networks' reductions are a step or two long.
constexpr int kMostSplits = 32;

constexpr int kTiles = kFirstTf32 + ConvTf32Tiles::kSize;

struct Entry {
  std::string name;
  RfConvConfiguration configuration;
};

template <class Shape>
Entry entry(bool wide) {
  Entry made;
  made.name = std::string(wide ? "" : "narrow_") + std::to_string(Shape::kM) + "x" +
              std::to_string(Shape::kN) + "_" + std::to_string(Shape::kThreads / 32) + "w" +
              std::to_string(Shape::kStages) + "s";
  made.configuration = {nullptr,
                        wide,
                        Shape::kM,
                        Shape::kN,
                        Shape::kWarpsM,
                        Shape::kWarpsN,
                        Shape::kStages,
                        Shape::kBlocks,
                        Shape::kStepBytes,
                        Shape::kRingBytes,
                        kOutputFits<float, Shape>};
  return made;
}

Entry tma_entry(int index) {
  const TmaTileFacts tile = tma_tile(index);
  Entry made;
  made.name = tma_name(tile);
  made.configuration = tma_configuration(tile);
  return made;
}

Entry window_entry(int index) {
  const WindowTileFacts tile = window_tile(index);
  Entry made;
  made.name = window_name(tile);
  made.configuration = window_configuration(tile);
  return made;
}

Entry cluster_entry(int index) {
  const TmaTileFacts tile = cluster_tile(index);
  Entry made;
  made.name = cluster_name(tile);
  made.configuration = tma_configuration(tile);
  made.configuration.warps_n = kWarpgroupWarps;
  made.configuration.blocks = kClusterResident;
  made.configuration.cluster = kMostClusterBlocks;
  return made;
}

Entry tf32_entry(int index) {
  const TmaTileFacts tile = tf32_tile(index);
  Entry made;
  made.name = tf32_name(tile);
  made.configuration = tf32_configuration(tile);
  return made;
}

const std::array<Entry, kTiles>& table() {
  static const std::array<Entry, kTiles> made = [] {
    std::array<Entry, kTiles> entries;
    for (int i = kFirstTma; i < kFirstWindow; ++i) entries[i] = tma_entry(i - kFirstTma);
    for (int i = kFirstWindow; i < kFirstCluster; ++i) entries[i] = window_entry(i - kFirstWindow);
    for (int i = kFirstCluster; i < kFirstTf32; ++i) entries[i] = cluster_entry(i - kFirstCluster);
    for (int i = kFirstTf32; i < kTiles; ++i) entries[i] = tf32_entry(i - kFirstTf32);
    for (int i = 0; i < kFirstTma; ++i) {
      const bool wide = i < ConvWideTiles::kSize;
      const auto of = [wide]<class Shape>() { return entry<Shape>(wide); };
      entries[i] =
          wide ? ConvWideTiles::with(i, of) : ConvNarrowTiles::with(i - ConvWideTiles::kSize, of);
    }
    return entries;
  }();
  return made;
}

bool by_tf32(int index) { return index >= kFirstTf32; }

// The matrix product that a problem is.
struct Product {
  int64_t pixels;  // of one launch
  int64_t channels;
  int64_t groups;
  int64_t depth;
  int64_t bytes;  // of an element
  bool wide;
  bool residual;
};

// All but the pixels, which are those of a launch.
Product product_of(const RfConvBnAct& problem) {
  Product made{};
  made.channels = problem.weight_size[0] / problem.groups;
  made.groups = problem.groups;
  made.depth = problem.weight_size[1] * problem.weight_size[2] * problem.weight_size[3];
  made.bytes = bytes_of(problem.dtype);
  made.wide = reads_wide(problem);
  made.residual = problem.residual != nullptr;
  return made;
}

int64_t steps_of(const Product& product, const RfConvConfiguration& tile) {
  return divide_up(product.depth * product.bytes, tile.step_bytes);
}
int64_t tiles_of(const Product& product, const RfConvConfiguration& tile) {
  return divide_up(product.pixels, tile.m) * divide_up(product.channels, tile.n) * product.groups;
}

// Cycles of one launch, predicted: the blocks of the busiest multiprocessor, each step of each at
// its limit.
double cost(const Product& product, const RfConvConfiguration& tile, int64_t splits,
            const RfGpu& gpu) {
  const int64_t tiles = tiles_of(product, tile);
  const double busy = static_cast<double>(divide_up(tiles * splits, gpu.multiprocessors));
  const double steps = static_cast<double>(divide_up(steps_of(product, tile), splits));
  const double resident = resident_blocks(tile, tile.shared_bytes, busy, gpu);
  const double area = static_cast<double>(tile.m) * tile.n;
  const double both = static_cast<double>(tile.m) + tile.n;
  const double step = step_cycles(tile, {both * tile.step_bytes}, product.bytes, resident);
  const double moved = area * static_cast<double>(product.bytes) * (product.residual ? 2 : 1);
  double total = blocks_cycles(busy, resident, steps * step, moved / kMemoryBytes);
  if (splits > 1) {
    const double part = area * 4 / kCacheBytes;
    total += kMeeting + busy * part + static_cast<double>(splits) * part;
  }
  return total;
}

// What a tile counts of so many images: pixels, or positions of the walk that windows are cut from.
int64_t pixels_of(const RfConvBnAct& problem, const RfConvConfiguration& tile, int64_t images) {
  const OutputSize size = output_size(problem);
  return tile.window != 0 ? window_positions(problem, images) : images * size.p * size.q;
}

// So many images that neither pixels nor blocks need more than 31 bits, nor wide offsets; 0: one is
// too much.
int64_t images_together(const RfConvBnAct& problem, const Product& product,
                        const RfConvConfiguration& tile) {
  const OutputSize size = output_size(problem);
  const int64_t images = problem.x_size[0];
  const int64_t of_image = tile.window != 0 ? (size.p + 1) * (size.q + 1) : size.p * size.q;
  const int64_t columns = divide_up(product.channels, tile.n) * product.groups;
  const int64_t rows = std::min(kMost, kMost / columns * tile.m);
  const int64_t reach = tile.wide != 0 && tile.tma == 0 ? images_in_reach(problem) : images;
  return std::max<int64_t>(0, std::min({images, reach, rows / of_image}));
}

// Predicted cycles of a launch with so many splits.
double cost_of(int index, const RfConvBnAct& problem, const Product& product, int64_t splits,
               const RfGpu& gpu) {
  const RfConvConfiguration& tile = *rf_conv_bn_act_configuration(index);
  if (tile.window != 0) {
    return window_cost(problem, element_of(problem.dtype), window_tile(index - kFirstWindow),
                       product.pixels, gpu);
  }
  if (tile.cluster != 0) {
    return cluster_cost(problem, cluster_tile(index - kFirstCluster), product.pixels, splits, gpu);
  }
  if (by_tf32(index)) {
    return tma_cost(problem, kTf32Types, tf32_tile(index - kFirstTf32), product.pixels, gpu);
  }
  if (tile.tma != 0) {
    return tma_cost(problem, tma_types(problem), tma_tile(index - kFirstTma), product.pixels, gpu);
  }
  return cost(product, tile, splits, gpu);
}

// Of all launches, of so many images each and of those that are left. product: all but the pixels.
double cost_of_all(int index, const RfConvBnAct& problem, Product product, int64_t together,
                   int64_t splits, const RfGpu& gpu) {
  const RfConvConfiguration& tile = *rf_conv_bn_act_configuration(index);
  const int64_t images = problem.x_size[0];
  product.pixels = pixels_of(problem, tile, together);
  double cycles =
      static_cast<double>(images / together) * cost_of(index, problem, product, splits, gpu);
  if (const int64_t left = images % together; left > 0) {
    product.pixels = pixels_of(problem, tile, left);
    cycles += cost_of(index, problem, product, splits, gpu);
  }
  return cycles;
}

// Of a launch. By TMA blocks stay for many tiles, one on a multiprocessor.
int64_t blocks_of(int index, const RfConvBnAct& problem, const Product& product, int64_t splits,
                  const RfGpu& gpu) {
  const RfConvConfiguration& tile = *rf_conv_bn_act_configuration(index);
  if (tile.window != 0) {
    return window_blocks(problem, window_tile(index - kFirstWindow), product.pixels, gpu);
  }
  if (by_tf32(index)) {
    return tma_blocks(problem, tf32_tile(index - kFirstTf32), product.pixels, gpu);
  }
  if (tile.tma != 0 && tile.cluster == 0) {
    return tma_blocks(problem, tma_tile(index - kFirstTma), product.pixels, gpu);
  }
  return tiles_of(product, tile) * splits;
}

// What keeps a configuration from a product; empty if nothing.
std::string unfit(int index, const RfConvBnAct& problem, const Product& product, const RfGpu& gpu) {
  const RfConvConfiguration& tile = *rf_conv_bn_act_configuration(index);
  if (tile.tma != 0) {
    if (gpu.capability != 90) return "TMA and wgmma are for GPUs of capability 9.0";
    if (!kBuiltForSm90a) return "this build holds no machine code for sm_90a";
    const int64_t images = std::max<int64_t>(1, images_together(problem, product, tile));
    if (tile.window != 0) {
      return window_fault(problem, element_of(problem.dtype), window_tile(index - kFirstWindow),
                          images);
    }
    if (tile.cluster != 0) {
      return cluster_fault(problem, cluster_tile(index - kFirstCluster), images);
    }
    if (by_tf32(index)) return tf32_fault(problem, tf32_tile(index - kFirstTf32), images);
    return tma_fault(problem, tma_types(problem), tma_tile(index - kFirstTma), images);
  }
  if (tile.shared_bytes > gpu.shared_per_block) return "too much shared memory for this GPU";
  if (product.bytes == 4 && tile.float32 == 0) return "its output tile in float32 does not fit";
  if (tile.wide != 0 && !product.wide) return "x or weight cannot be read 16 bytes at a time";
  return "";
}

// What keeps a configuration from so many parts; empty if nothing.
std::string unfit_parts(const RfConvConfiguration& tile, const RfConvBnAct& problem,
                        const Product& product, int64_t parts) {
  if (tile.cluster != 0) return cluster_blocks_fault(problem, parts);
  if (tile.tma != 0 && parts > 1) return "splits: only 1 is served by TMA";
  if (!has_work(steps_of(product, tile), parts) || tiles_of(product, tile) * parts > kMost) {
    return "its reduction has no such parts with work for each";
  }
  return "";
}

}  // namespace
}  // namespace resnet_fused

extern "C" int32_t rf_conv_bn_act_configurations(void) { return resnet_fused::kTiles; }

extern "C" const RfConvConfiguration* rf_conv_bn_act_configuration(int32_t index) {
  return resnet_fused::configuration_at<resnet_fused::table>(index);
}

extern "C" int32_t rf_conv_bn_act_plan(const RfConvBnAct* problem, const RfGpu* gpu,
                                       int32_t configuration, int32_t splits, RfConvPlan* plan,
                                       char* why, size_t why_bytes) {
  using namespace resnet_fused;
  const Refusal refuse{why, why_bytes};
  if (check_dtype(*problem, refuse) != 0 || check_sizes(*problem, refuse) != 0 ||
      check_depth(*problem, refuse) != 0) {
    return 1;
  }
  if (check_wish(*gpu, configuration, kTiles, refuse) != 0) return 1;
  const OutputSize size = output_size(*problem);
  const int64_t images = problem->x_size[0];
  *plan = RfConvPlan{std::max(configuration, 0), 1, 0, 0, std::max<int64_t>(images, 1), 0, 0};
  if (images * problem->weight_size[0] * size.p * size.q == 0) {
    std::snprintf(why, why_bytes, "an empty output: nothing is launched");
    return 0;
  }
  Product product = product_of(*problem);
  std::string against, against_tma;
  bool found = false;
  for (int i = 0; i < kTiles; ++i) {
    const RfConvConfiguration& tile = *rf_conv_bn_act_configuration(i);
    if (configuration >= 0 && i != configuration) continue;
    const std::string refusal = unfit(i, *problem, product, *gpu);
    // What is for some layers alone says nothing of others, unless it is asked for.
    const bool special = tile.window != 0 || tile.cluster != 0 ||
                         by_tf32(i) != (product.bytes == 4 && tile.tma != 0);
    if (!refusal.empty() && (!special || configuration >= 0)) {
      (tile.tma != 0 && configuration < 0 ? against_tma : against) = refusal;
    }
    // Narrow loads are for what is not wide, unless they are asked for.
    if (!refusal.empty() || (configuration < 0 && product.wide && tile.wide == 0)) continue;
    const int64_t together = images_together(*problem, product, tile);
    if (together < 1) {
      against = "one image is more than a launch can take";
      continue;
    }
    product.pixels = pixels_of(*problem, tile, together);
    const int64_t tiles = tiles_of(product, tile);
    for (int64_t parts = 1; parts <= std::max<int64_t>(kMostSplits, splits); ++parts) {
      if (splits > 0 && parts != splits) continue;
      const std::string unable = unfit_parts(tile, *problem, product, parts);
      if (!unable.empty()) {
        if (splits > 0 || (configuration >= 0 && parts == 2)) {
          (tile.tma != 0 && configuration < 0 ? against_tma : against) = unable;
        }
        continue;
      }
      const double cycles = cost_of_all(i, *problem, product, together, parts, *gpu);
      if (found && cycles >= plan->cycles) continue;
      found = true;
      const bool meet = parts > 1 && tile.cluster == 0;  // in a workspace
      const int64_t partial = tiles * parts * tile.m * tile.n * 4;
      *plan = RfConvPlan{i,
                         static_cast<int32_t>(parts),
                         meet ? arrival_bytes(tiles) + partial : 0,
                         divide_up(images, together),
                         together,
                         blocks_of(i, *problem, product, parts, *gpu),
                         cycles};
    }
  }
  if (!found) {
    if (configuration < 0) return refuse("no configuration serves it: %s", against.c_str());
    return refuse("configuration %d (%s), %d splits: %s", configuration,
                  rf_conv_bn_act_configuration(configuration)->name, splits, against.c_str());
  }
  plan->at_once = plan->blocks <= kResident * gpu->multiprocessors;
  // Of a GPU that has no TMA nothing is said.
  const bool missed = gpu->capability == 90 && !against_tma.empty();
  std::snprintf(why, why_bytes, "%s, %d splits: %s, %lld blocks on %d multiprocessors%s%s",
                rf_conv_bn_act_configuration(plan->configuration)->name, plan->splits,
                configuration < 0 ? "least predicted time" : "as asked for",
                static_cast<Long>(plan->blocks), gpu->multiprocessors, missed ? "; no TMA: " : "",
                missed ? against_tma.c_str() : "");
  return 0;
}
