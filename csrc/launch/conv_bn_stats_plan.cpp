// The table of conv_bn_stats' configurations, and the pure function that picks one and its splits.
//
// The choice is the least predicted time, as for conv_bn_act.
#include <algorithm>
#include <array>
#include <string>

#include "conv_bn_stats_arguments.h"
#include "conv_bn_stats_sm90.h"
#include "conv_bn_stats_tiles.h"
#include "conv_halo.h"
#include "conv_image.h"
#include "conv_plan.h"
#include "conv_stats_rates.h"
#include "tma_request.h"

namespace resnet_fused {
namespace {

constexpr int kTiles = kStatsConfigurations;

struct Entry {
  std::string name;
  RfConvConfiguration configuration;
};

template <class Shape>
Entry entry(const char* kind, bool wide) {
  return {kind + std::to_string(Shape::kM) + "x" + std::to_string(Shape::kN) + "_" +
              std::to_string(Shape::kThreads / 32) + "w" + std::to_string(Shape::kStages) + "s",
          {nullptr, wide, Shape::kM, Shape::kN, Shape::kWarpsM, Shape::kWarpsN, Shape::kStages,
           Shape::kBlocks, Shape::kStepBytes, kStatsSharedBytes<Shape>, kOutputFits<float, Shape>,
           0, kWindowsOf<Shape>}};
}

// shared_bytes: without pixels.
template <class Shape>
Entry image_entry() {
  Entry made = entry<Shape>("image_", false);
  made.configuration.shared_bytes += Shape::kFiltersBytes;
  made.configuration.image = 1;
  return made;
}

Entry sm90_entry(int index) {
  const StatsSm90Kernel& kernel = stats_sm90_kernel(index);
  return {kernel.name(index - kernel.first), kernel.configuration(index - kernel.first)};
}

const std::array<Entry, kTiles>& table() {
  static const std::array<Entry, kTiles> made = [] {
    std::array<Entry, kTiles> entries;
    for (int i = kFirstStatsSm90; i < kTiles; ++i) entries[i] = sm90_entry(i);
    for (int i = 0; i < kFirstStatsSm90; ++i) {
      if (i < kFirstNarrowStats) {
        entries[i] = StatsWideTiles::with(i, []<class Shape>() { return entry<Shape>("", true); });
      } else if (i < kFirstHaloStats) {
        entries[i] = StatsNarrowTiles::with(
            i - kFirstNarrowStats, []<class Shape>() { return entry<Shape>("narrow_", false); });
      } else if (i >= kFirstImageStats) {
        entries[i] = StatsImageTiles::with(i - kFirstImageStats,
                                           []<class Shape>() { return image_entry<Shape>(); });
      } else {
        entries[i] = StatsHaloTiles::with(
            i - kFirstHaloStats, []<class Shape>() { return entry<Shape>("halo_", true); });
      }
    }
    return entries;
  }();
  return made;
}

// The matrix product that a problem is.
struct Product {
  int64_t pixels;  // of one launch
  int64_t channels;
  int64_t groups;
  int64_t depth;
  int64_t bytes;  // of an element
  bool wide;
  bool normed;
  bool windows;        // its pixels' taps are one run of pixels
  int64_t width;       // of a row of pixels
  int64_t rows;        // of taps
  int64_t row_pixels;  // of the output
};

// Where a tile's pixels lie in windows a step is a slice of channels with all taps; of an image by
// its rows it is a row of taps.
int64_t steps_of(const Product& product, const RfConvConfiguration& tile) {
  if (tile.image != 0) return product.rows;
  const int64_t depth = tile.window != 0 ? product.depth / kHaloTaps : product.depth;
  return divide_up(depth * product.bytes, tile.step_bytes);
}
// Of a block: with its windows.
int64_t shared_bytes(const Product& product, const RfConvConfiguration& tile) {
  if (tile.image != 0) {
    const int64_t filters = int64_t{kImageTapRows} * tile.n * tile.step_bytes;
    return image_block_bytes(filters, tile.shared_bytes - filters, product.rows,
                             image_window_chunks(tile.m, product.row_pixels));
  }
  if (tile.window == 0) return tile.shared_bytes;
  return tile.shared_bytes + halo_bytes(tile.m, product.width, tile.window);
}
int64_t tiles_of(const Product& product, const RfConvConfiguration& tile) {
  return divide_up(product.pixels, tile.m) * divide_up(product.channels, tile.n) * product.groups;
}

// Instructions that an element of an image takes: its address, its load, its place in a word.
constexpr double kWindowInstructions = 7;

// Cycles of one launch by an image's rows. Its blocks stay for many tiles: filters come once, and
// all that a tile reads of the image is there before its products begin.
double image_cost(const Product& product, const RfConvConfiguration& tile, const RfGpu& gpu) {
  const double busy = static_cast<double>(divide_up(tiles_of(product, tile), gpu.multiprocessors));
  const double resident = resident_blocks(tile, shared_bytes(product, tile), busy, gpu);
  const double row = static_cast<double>(image_window_chunks(tile.m, product.row_pixels));
  const double loading = row * (kChunkBytes / 2) * kWindowInstructions / kInstructions;
  // A block multiplies at one time and loads at another.
  const double step =
      step_cycles(tile, {row * kChunkBytes}, product.bytes, resident) + loading / resident;
  const double filters = resident * kImageTapRows * tile.n * (tile.step_bytes / 2) *
                         kNarrowInstructions / kInstructions;
  const double steps = static_cast<double>(product.rows) * step;
  return filters + ended_cycles(tile, product.bytes, 1, busy, resident, steps);
}

// Cycles of one launch, predicted: the blocks of the busiest multiprocessor, each step of each at
// its limit. See conv_bn_act_plan.cpp; here what is read through a BatchNorm is turned in shared
// memory, and every tile is measured.
double cost(const Product& product, const RfConvConfiguration& tile, int64_t splits,
            const RfGpu& gpu) {
  if (tile.image != 0) return image_cost(product, tile, gpu);
  const int64_t tiles = tiles_of(product, tile);
  const double busy = static_cast<double>(divide_up(tiles * splits, gpu.multiprocessors));
  const int taps = tile.window != 0 ? kHaloTaps : 1;
  const double steps = taps * static_cast<double>(divide_up(steps_of(product, tile), splits));
  const double resident = resident_blocks(tile, shared_bytes(product, tile), busy, gpu);
  const double bytes = static_cast<double>(product.bytes);
  // Of pixels, that a step brings; a window is there for all of its taps.
  const int64_t rows = tile.window != 0 ? halo_rows(tile.m, product.width) : tile.m;
  const double left = static_cast<double>(rows) * tile.step_bytes / taps;
  StepWork step_work{left + static_cast<double>(tile.n) * tile.step_bytes};
  double pause = 0;
  if (product.normed) {
    step_work.turned = 2 * left;
    step_work.turning = left / bytes * kTurnInstructions / kInstructions;
    // While a block turns what has landed, only its neighbours multiply.
    pause = (step_work.turning + kTurnLatency / taps) / resident;
  }
  const double step = step_cycles(tile, step_work, product.bytes, resident) + pause;
  return ended_cycles(tile, product.bytes, splits, busy, resident, steps * step);
}

// So many images that neither pixels nor blocks need more than 31 bits, nor wide offsets; 0: one is
// too much.
int64_t images_together(const RfConvBnAct& conv, const Product& product,
                        const RfConvConfiguration& tile) {
  const OutputSize size = output_size(conv);
  const int64_t columns = divide_up(product.channels, tile.n) * product.groups;
  const int64_t rows = std::min(kMost, kMost / columns * tile.m);
  const int64_t reach = tile.wide != 0 ? images_in_reach(conv) : conv.x_size[0];
  return std::max<int64_t>(0, std::min({conv.x_size[0], reach, rows / (size.p * size.q)}));
}

// What keeps a configuration from a problem, in so many splits; empty if nothing.
std::string unfit(int index, const RfConvBnStats& problem, const Product& product, const RfGpu& gpu,
                  int32_t splits) {
  const RfConvConfiguration& tile = *rf_conv_bn_stats_configuration(index);
  if (tile.tma != 0) {
    if (gpu.capability != 90) return "TMA and wgmma are for GPUs of capability 9.0";
    if (!kBuiltForSm90a) return "this build holds no machine code for sm_90a";
    const StatsSm90Kernel& kernel = stats_sm90_kernel(index);
    const std::string fault = kernel.fault(problem, index - kernel.first);
    return fault.empty() && splits > 1 ? "splits: only 1 is served by TMA" : fault;
  }
  if (tile.window != 0 && !product.windows) return kNoWindows;
  if (tile.image != 0) {
    const char* fault = image_fault(problem.conv, problem.normed != 0);
    if (fault != nullptr) return fault;
    if (splits > 1) return "splits: only 1 is served by an image's rows";
  }
  if (shared_bytes(product, tile) > gpu.shared_per_block) {
    return "too much shared memory for this GPU";
  }
  if (product.bytes == 4 && tile.float32 == 0) return "its output tile in float32 does not fit";
  if (tile.wide != 0 && !product.wide) return "x, weight or norm cannot be read 16 bytes at a time";
  return "";
}

// Blocks of a launch: of an image by its rows as many as run at one time, each for many tiles.
int64_t blocks_of(const Product& product, const RfConvConfiguration& tile, int64_t splits,
                  const RfGpu& gpu) {
  const int64_t tiles = tiles_of(product, tile);
  if (tile.image == 0) return tiles * splits;
  const int64_t columns = divide_up(product.channels, tile.n);
  const auto most = static_cast<double>(tile.blocks);
  const auto resident =
      static_cast<int64_t>(resident_blocks(tile, shared_bytes(product, tile), most, gpu));
  return std::min(divide_up(gpu.multiprocessors * resident, columns), tiles / columns) * columns;
}

// A plan of one launch, by a kernel for sm_90a.
RfConvPlan sm90_plan(int index, const RfConvBnStats& problem, const RfGpu& gpu) {
  const StatsSm90Kernel& kernel = stats_sm90_kernel(index);
  RfConvPlan made = kernel.plan(problem, index - kernel.first, gpu);
  made.configuration = index;
  return made;
}

// Takes a configuration's splits into `plan` where they are predicted to take less time; what keeps
// it from the problem, or empty.
std::string consider(int index, const RfConvBnStats& problem, Product product, const RfGpu& gpu,
                     int32_t splits, RfConvPlan* plan) {
  const RfConvConfiguration& tile = *rf_conv_bn_stats_configuration(index);
  const int64_t images = problem.conv.x_size[0];
  const int64_t together = images_together(problem.conv, product, tile);
  if (together < 1) return "one image is more than a launch can take";
  const OutputSize size = output_size(problem.conv);
  product.pixels = together * size.p * size.q;
  const int64_t steps = steps_of(product, tile);
  const int64_t tiles = tiles_of(product, tile);
  const int64_t most = tile.image != 0 ? 1 : std::max<int64_t>(kMostStatsSplits, splits);
  std::string against;
  for (int64_t parts = 1; parts <= most; ++parts) {
    if (splits > 0 && parts != splits) continue;
    if (!has_work(steps, parts) || tiles * parts > kMost) {
      if (splits > 0) against = "its reduction has no such parts with work for each";
      continue;
    }
    const double cycles = cost(product, tile, parts, gpu);
    if (plan->launches > 0 && cycles >= plan->cycles) continue;
    const auto cut = static_cast<int32_t>(parts);
    *plan = RfConvPlan{index,
                       cut,
                       stats_layout(problem, tile, cut, together).bytes,
                       divide_up(images, together),
                       together,
                       blocks_of(product, tile, parts, gpu),
                       cycles};
  }
  return against;
}

Product product_of(const RfConvBnStats& problem) {
  const RfConvBnAct& conv = problem.conv;
  Product product{};
  product.channels = conv.weight_size[0] / conv.groups;
  product.groups = conv.groups;
  product.depth = conv.weight_size[1] * conv.weight_size[2] * conv.weight_size[3];
  product.bytes = bytes_of(conv.dtype);
  product.wide = stats_read_wide(problem);
  product.normed = problem.normed != 0;
  product.windows = taps_are_one_run(conv);
  product.width = conv.x_size[3];
  product.rows = conv.weight_size[2];
  product.row_pixels = output_size(conv).q;
  return product;
}

}  // namespace
}  // namespace resnet_fused

extern "C" int32_t rf_conv_bn_stats_configurations(void) { return resnet_fused::kTiles; }

extern "C" const RfConvConfiguration* rf_conv_bn_stats_configuration(int32_t index) {
  return resnet_fused::configuration_at<resnet_fused::table>(index);
}

extern "C" int32_t rf_conv_bn_stats_plan(const RfConvBnStats* problem, const RfGpu* gpu,
                                         int32_t configuration, int32_t splits, RfConvPlan* plan,
                                         char* why, size_t why_bytes) {
  using namespace resnet_fused;
  const Refusal refuse{why, why_bytes};
  const RfConvBnAct& conv = problem->conv;
  if (check_dtype(conv, refuse) != 0 || check_sizes(conv, refuse) != 0 ||
      check_depth(conv, refuse) != 0 || check_wish(*gpu, configuration, kTiles, refuse) != 0) {
    return 1;
  }
  const OutputSize size = output_size(conv);
  const int64_t images = conv.x_size[0];
  *plan = RfConvPlan{std::max(configuration, 0), 1, 0, 0, std::max<int64_t>(images, 1), 0, 0};
  if (images * conv.weight_size[0] * size.p * size.q == 0) {
    refuse("an empty output: nothing is launched");
    return 0;
  }
  const Product product = product_of(*problem);
  std::string against, against_tma, against_windows, against_rows;
  bool in_windows = !product.windows;  // or nothing is missed
  bool by_tma = false;
  bool by_rows = !is_image(conv);
  for (int i = 0; i < kTiles; ++i) {
    const RfConvConfiguration& tile = *rf_conv_bn_stats_configuration(i);
    if (configuration >= 0 && i != configuration) continue;
    const std::string refusal = unfit(i, *problem, product, *gpu, splits);
    if (refusal.empty()) {
      in_windows = in_windows || tile.window != 0;
      by_tma = by_tma || tile.tma != 0;
      by_rows = by_rows || tile.image != 0;
    } else if (configuration >= 0) {
      against = refusal;
    } else if (tile.tma == 0 || stats_sm90_kernel(i).general) {
      // What is for some layers alone says nothing of others.
      (tile.tma != 0      ? against_tma
       : tile.window != 0 ? against_windows
       : tile.image != 0  ? against_rows
                          : against) = refusal;
    }
    // Narrow loads are for what is not wide, unless they are asked for.
    if (!refusal.empty() || (configuration < 0 && product.wide && tile.wide == 0)) continue;
    if (tile.tma != 0) {
      const RfConvPlan made = sm90_plan(i, *problem, *gpu);
      if (plan->launches == 0 || made.cycles < plan->cycles) *plan = made;
      continue;
    }
    const std::string found = consider(i, *problem, product, *gpu, splits, plan);
    if (!found.empty()) against = found;
  }
  if (plan->launches == 0) {
    if (configuration < 0) return refuse("no configuration serves it: %s", against.c_str());
    return refuse("configuration %d (%s), %d splits: %s", configuration,
                  rf_conv_bn_stats_configuration(configuration)->name, splits, against.c_str());
  }
  std::string missed;
  if (!in_windows && !against_windows.empty()) missed += "; no windows: " + against_windows;
  if (!by_rows && !against_rows.empty()) missed += "; not by rows: " + against_rows;
  // Of a GPU that has no TMA nothing is said.
  if (gpu->capability == 90 && !by_tma && !against_tma.empty())
    missed += "; no TMA: " + against_tma;
  refuse("%s, %d splits: %s, %lld blocks on %d multiprocessors%s",
         rf_conv_bn_stats_configuration(plan->configuration)->name, plan->splits,
         configuration < 0 ? "least predicted time" : "as asked for",
         static_cast<Long>(plan->blocks), gpu->multiprocessors, missed.c_str());
  return 0;
}
