// The table of bn_add_act_conv_stats' configurations, and the pure function that picks one and its
// splits: the least predicted time.
#include <algorithm>
#include <array>
#include <string>

#include "bn_add_act_conv_stats_arguments.h"
#include "bn_add_act_conv_stats_tma.h"
#include "conv_plan.h"
#include "conv_stats_rates.h"
#include "tma_request.h"

namespace resnet_fused {
namespace {

// Instructions beside a turned element's: the shortcut is widened and added; behind a BatchNorm of
// its own it is multiplied, too.
constexpr double kShortcutInstructions = 2;
constexpr double kProjectedInstructions = 1;

struct Entry {
  std::string name;
  RfConvConfiguration configuration;
};

template <class Shape>
Entry entry() {
  return {std::to_string(Shape::kM) + "x" + std::to_string(Shape::kN) + "_" +
              std::to_string(Shape::kThreads / 32) + "w" + std::to_string(Shape::kStages) + "s",
          {nullptr, true, Shape::kM, Shape::kN, Shape::kWarpsM, Shape::kWarpsN, Shape::kStages,
           Shape::kBlocks, Shape::kStepBytes, kStatsSharedBytes<Shape>, kOutputFits<float, Shape>}};
}

constexpr int32_t kCount = kFirstBlockEndTma + BlockEndTmaTiles::kSize;

const std::array<Entry, kCount>& table() {
  static const std::array<Entry, kCount> made = [] {
    std::array<Entry, kCount> entries;
    for (int i = 0; i < kFirstBlockEndTma; ++i) {
      BlockEndTiles::with(i, [&]<class Shape>() { entries[i] = entry<Shape>(); });
    }
    for (int i = kFirstBlockEndTma; i < kCount; ++i) {
      const TmaTileFacts tile = block_end_tma_tile(i - kFirstBlockEndTma);
      entries[i] = {tma_name(tile), tma_configuration(tile)};
    }
    return entries;
  }();
  return made;
}

struct Size {
  int64_t pixels;  // of one launch
  int64_t channels;
  int64_t filters;
  int64_t bytes;  // of an element
  bool projected;

  int64_t steps(const RfConvConfiguration& tile) const {
    return divide_up(channels * bytes, tile.step_bytes);
  }
  int64_t columns(const RfConvConfiguration& tile) const { return divide_up(filters, tile.n); }
  int64_t tiles(const RfConvConfiguration& tile) const {
    return divide_up(pixels, tile.m) * columns(tile);
  }
};

// Cycles of one launch, predicted as conv_bn_stats' are: beside its own work a step brings the
// shortcut and stores a column's share of what is made of it. Of all columns' reading memory sees
// one: what other columns read, L2 has.
double cost(const Size& size, const RfConvConfiguration& tile, int64_t splits, const RfGpu& gpu) {
  const double busy =
      static_cast<double>(divide_up(size.tiles(tile) * splits, int64_t{gpu.multiprocessors}));
  const double resident = resident_blocks(tile, tile.shared_bytes, busy, gpu);
  const double columns = static_cast<double>(size.columns(tile));
  const double bytes = static_cast<double>(size.bytes);
  const double pixels = static_cast<double>(tile.m) * tile.step_bytes;
  const double stored = pixels / columns;
  StepWork work{2 * pixels + static_cast<double>(tile.n) * tile.step_bytes + stored};
  work.turned = 3 * pixels;
  work.turning =
      pixels / bytes *
      (kTurnInstructions + kShortcutInstructions + (size.projected ? kProjectedInstructions : 0)) /
      kInstructions;
  const double memory = (2 * pixels / columns + stored) / kMemoryBytes;
  const double step = std::max(step_cycles(tile, work, size.bytes, resident), memory) +
                      (work.turning + kTurnLatency) / resident;
  const double steps = static_cast<double>(divide_up(size.steps(tile), splits));
  return ended_cycles(tile, size.bytes, splits, busy, resident, steps * step);
}

// So many images that neither pixels nor blocks need more than 31 bits; 0: one is too much.
int64_t images_together(const RfConvBnAct& conv, const Size& size,
                        const RfConvConfiguration& tile) {
  const int64_t rows = std::min(kMost, kMost / size.columns(tile) * tile.m);
  return std::min(conv.x_size[0], rows / (conv.x_size[2] * conv.x_size[3]));
}

// What no configuration takes.
int32_t check(const RfBnAddActConvStats& problem, const Refusal& refuse) {
  const RfConvBnAct& conv = problem.stats.conv;
  if (check_dtype(conv, refuse) != 0 || check_sizes(conv, refuse) != 0 ||
      check_depth(conv, refuse) != 0) {
    return 1;
  }
  const bool plain = conv.weight_size[2] == 1 && conv.weight_size[3] == 1 && conv.stride[0] == 1 &&
                     conv.stride[1] == 1 && conv.padding[0] == 0 && conv.padding[1] == 0;
  if (!plain || conv.groups != 1) {
    return refuse("a 1x1 convolution of stride 1 in one group is served, without padding");
  }
  if (problem.stats.normed == 0) return refuse("a block's end is read through a BatchNorm");
  return 0;
}

// What keeps a configuration from a problem, in so many splits; empty if nothing.
std::string unfit(int index, const RfBnAddActConvStats& problem, const Size& size, const RfGpu& gpu,
                  int32_t splits) {
  const RfConvConfiguration& tile = *rf_bn_add_act_conv_stats_configuration(index);
  if (tile.tma != 0) {
    if (gpu.capability != 90) return "TMA and wgmma are for GPUs of capability 9.0";
    if (!kBuiltForSm90a) return "this build holds no machine code for sm_90a";
    const std::string fault =
        block_end_tma_fault(problem, block_end_tma_tile(index - kFirstBlockEndTma));
    return fault.empty() && splits > 1 ? "splits: only 1 is served by TMA" : fault;
  }
  if (tile.shared_bytes > gpu.shared_per_block) return "too much shared memory for this GPU";
  if (size.projected && tile.n > kBlockEndProjectedColumns) {
    return "too many columns for a projection's values";
  }
  if (size.bytes == 4 && tile.float32 == 0) return "its output tile in float32 does not fit";
  return "";
}

// Takes a configuration's splits into `plan` where they are predicted to take less time; what keeps
// it from the problem, or empty.
std::string consider(int index, const RfBnAddActConvStats& problem, Size size, const RfGpu& gpu,
                     int32_t splits, RfConvPlan* plan) {
  const RfConvBnAct& conv = problem.stats.conv;
  const RfConvConfiguration& tile = *rf_bn_add_act_conv_stats_configuration(index);
  const int64_t images = conv.x_size[0];
  const int64_t together = images_together(conv, size, tile);
  if (together < 1) return "one image is more than a launch can take";
  size.pixels = together * conv.x_size[2] * conv.x_size[3];
  std::string against;
  for (int64_t parts = 1; parts <= std::max<int64_t>(kMostStatsSplits, splits); ++parts) {
    if (splits > 0 && parts != splits) continue;
    if (!has_work(size.steps(tile), parts) || size.tiles(tile) * parts > kMost) {
      if (splits > 0) against = "its reduction has no such parts with work for each";
      continue;
    }
    const double cycles = cost(size, tile, parts, gpu);
    if (plan->launches > 0 && cycles >= plan->cycles) continue;
    const auto cut = static_cast<int32_t>(parts);
    *plan = RfConvPlan{index,
                       cut,
                       stats_layout(problem.stats, tile, cut, together).bytes,
                       divide_up(images, together),
                       together,
                       size.tiles(tile) * parts,
                       cycles};
  }
  return against;
}

}  // namespace
}  // namespace resnet_fused

extern "C" {

int32_t rf_bn_add_act_conv_stats_configurations(void) { return resnet_fused::kCount; }

const RfConvConfiguration* rf_bn_add_act_conv_stats_configuration(int32_t index) {
  return resnet_fused::configuration_at<resnet_fused::table>(index);
}

int32_t rf_bn_add_act_conv_stats_plan(const RfBnAddActConvStats* problem, const RfGpu* gpu,
                                      int32_t configuration, int32_t splits, RfConvPlan* plan,
                                      char* why, size_t why_bytes) {
  using namespace resnet_fused;
  const Refusal refuse{why, why_bytes};
  if (check(*problem, refuse) != 0 || check_wish(*gpu, configuration, kCount, refuse) != 0) {
    return 1;
  }
  const RfConvBnAct& conv = problem->stats.conv;
  const int64_t images = conv.x_size[0];
  const int64_t of_image = conv.x_size[2] * conv.x_size[3];
  Size size{0, conv.x_size[1], conv.weight_size[0], bytes_of(conv.dtype), problem->projected != 0};
  *plan = RfConvPlan{std::max(configuration, 0), 1, 0, 0, std::max<int64_t>(images, 1), 0, 0};
  if (images * of_image == 0 || size.filters == 0) {
    refuse("an empty problem: nothing is launched");
    return 0;
  }
  if (const char* name = askew(*problem)) {
    return refuse(
        "%s: its channels do not lie side by side in units of 16 bytes, or its pixels not one "
        "behind the other",
        name);
  }
  std::string against, against_tma;
  bool by_tma = false;
  for (int32_t i = 0; i < kCount; ++i) {
    if (configuration >= 0 && i != configuration) continue;
    const bool tma = i >= kFirstBlockEndTma;
    const std::string refusal = unfit(i, *problem, size, *gpu, splits);
    if (!refusal.empty()) {
      (tma && configuration < 0 ? against_tma : against) = refusal;
      continue;
    }
    if (tma) {
      by_tma = true;
      RfConvPlan made =
          block_end_tma_plan(*problem, block_end_tma_tile(i - kFirstBlockEndTma), *gpu);
      made.configuration = i;
      if (plan->launches == 0 || made.cycles < plan->cycles) *plan = made;
      continue;
    }
    const std::string found = consider(i, *problem, size, *gpu, splits, plan);
    if (!found.empty()) against = found;
  }
  if (plan->launches == 0) {
    if (configuration < 0) return refuse("no configuration serves it: %s", against.c_str());
    return refuse("configuration %d (%s), %d splits: %s", configuration,
                  table()[configuration].name.c_str(), splits, against.c_str());
  }
  const bool missed = configuration < 0 && !by_tma && gpu->capability == 90;
  refuse("%s, %d splits: %s, %lld blocks on %d multiprocessors%s%s",
         table()[plan->configuration].name.c_str(), plan->splits,
         configuration < 0 ? "least predicted time" : "as asked for",
         static_cast<Long>(plan->blocks), gpu->multiprocessors, missed ? "; no TMA: " : "",
         missed ? against_tma.c_str() : "");
  return 0;
}

}  // extern "C"
