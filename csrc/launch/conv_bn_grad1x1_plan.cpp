// The table of conv_bn_grad1x1's configurations, and the pure function that picks one and its
// parts.
#include <algorithm>
#include <array>
#include <string>

#include "conv_bn_grad1x1_arguments.h"
#include "conv_bn_grad1x1_mma.h"
#include "conv_bn_grad1x1_tma.h"
#include "conv_bn_grad1x1_tma_tiles.h"
#include "conv_gradient_choice.h"
#include "tma_request.h"

namespace resnet_fused {
namespace {

constexpr int32_t kBytes = 2;  // of an element

using Entry = Grad1x1MmaEntry;

constexpr int32_t kCount = kFirstGrad1x1Tma + Grad1x1TmaTiles::kSize;

// By mma.sync, and behind those by wgmma, whose costs are told elsewhere.
const std::array<Entry, kCount>& table() {
  static const std::array<Entry, kCount> made = [] {
    std::array<Entry, kCount> entries{};
    for (int i = 0; i < kFirstGrad1x1Tma; ++i) {
      Grad1x1Tiles::with(i, [&]<class Shape>() { entries[i] = grad1x1_mma_entry<Shape>(); });
    }
    for (int i = 0; i < Grad1x1TmaTiles::kSize; ++i) {
      Entry& made_by_tma = entries[kFirstGrad1x1Tma + i];
      made_by_tma.name = grad1x1_tma_name(i);
      made_by_tma.configuration = grad1x1_tma_configuration(i);
    }
    return entries;
  }();
  return made;
}

struct Size {
  int64_t pixels;
  int64_t filters;
  int64_t channels;

  int64_t steps(const RfConvConfiguration& tile) const {
    return divide_up(pixels * kBytes, tile.step_bytes);
  }
  int64_t columns(const RfConvConfiguration& tile) const { return divide_up(channels, tile.n); }
};

Size size_of(const RfConvGradient& conv) {
  return {conv.x_size[0] * conv.x_size[2] * conv.x_size[3], conv.weight_size[0],
          conv.weight_size[1]};
}

// h and x for mask and sums, dx put together; h beside x.
double cycles_of(const RfConvBnDgrad& image, const Entry& entry, int64_t parts, const RfGpu& gpu) {
  const bool normed = image.reduced != 0;
  const Grad1x1MmaWork work{2, normed ? kNormInstructions : 0, 0, 4,
                            normed ? kReduceInstructions : 0};
  return grad1x1_mma_cycles(image, entry, work, parts, gpu);
}

// What keeps a configuration from a problem; empty if nothing does.
std::string unfit(int32_t index, const RfConvBnGrad1x1& problem, const Size& size,
                  const RfGpu& gpu) {
  const RfConvConfiguration& tile = table()[index].configuration;
  if (size.filters > tile.m) return "more filters than a block keeps";
  if (tile.shared_bytes > gpu.shared_per_block) return "too much shared memory for this GPU";
  if (tile.tma == 0) return "";
  if (gpu.capability != 90) return "TMA and wgmma are for GPUs of capability 9.0";
  if (!kBuiltForSm90a) return "this build holds no machine code for sm_90a";
  return grad1x1_tma_fault(problem, index - kFirstGrad1x1Tma);
}

}  // namespace

int32_t check_grad1x1(const RfConvBnGrad1x1& problem, const Refusal& refuse) {
  const RfConvBnDgrad& image = problem.image;
  const RfConvGradient& conv = image.conv;
  if (check_dtype(conv, refuse) != 0 || check_sizes(conv, refuse) != 0) return 1;
  const auto wanted = static_cast<DataType>(problem.dweight_dtype);
  if (static_cast<DataType>(conv.dtype) == DataType::kFloat32) {
    return refuse("float32; bfloat16 and float16 are served");
  }
  if (wanted != DataType::kFloat32 && problem.dweight_dtype != conv.dtype) {
    return refuse("dtype %d of the weights' gradient; that of dz, %d, and float32 are served",
                  problem.dweight_dtype, conv.dtype);
  }
  const bool plain = conv.weight_size[2] == 1 && conv.weight_size[3] == 1 && conv.stride[0] == 1 &&
                     conv.stride[1] == 1 && conv.padding[0] == 0 && conv.padding[1] == 0;
  if (!plain || conv.groups != 1) {
    return refuse("a 1x1 convolution of stride 1 in one group is served, without padding");
  }
  constexpr int64_t kMostStep = int64_t{1} << 30;
  if (image.added != 0 && (image.addend_step < 1 || image.addend_step > kMostStep)) {
    return refuse("an addend at every %lld-th pixel", static_cast<Long>(image.addend_step));
  }
  return 0;
}

}  // namespace resnet_fused

extern "C" {

int32_t rf_conv_bn_grad1x1_configurations(void) { return resnet_fused::kCount; }

const RfConvConfiguration* rf_conv_bn_grad1x1_configuration(int32_t index) {
  return resnet_fused::configuration_at<resnet_fused::table>(index);
}

int32_t rf_conv_bn_grad1x1_plan(const RfConvBnGrad1x1* problem, const RfGpu* gpu,
                                int32_t configuration, int32_t splits, RfConvPlan* plan, char* why,
                                size_t why_bytes) {
  using namespace resnet_fused;
  const Refusal refuse{why, why_bytes};
  if (check_grad1x1(*problem, refuse) != 0 ||
      check_wish(*gpu, configuration, kCount, refuse) != 0) {
    return 1;
  }
  const RfConvBnDgrad& image = problem->image;
  const Size size = size_of(image.conv);
  const int64_t images = image.conv.x_size[0];
  *plan = RfConvPlan{std::max(configuration, 0), 1, 0, 0, images, 0, 0};
  if (size.pixels == 0 || size.filters == 0 || size.channels == 0) {
    refuse("an empty problem: nothing is launched");
    return 0;
  }
  if (const char* name = askew(*problem)) {
    return refuse(
        "%s: its channels do not lie side by side in units of 16 bytes, or its pixels not one "
        "behind the other",
        name);
  }
  if (size.pixels > kMost || size.channels > kMost / (size.filters + 2)) {
    return refuse("more pixels or weights than a launch can have");
  }
  std::string against, against_tma;
  for (int32_t i = 0; i < kCount; ++i) {
    if (configuration >= 0 && i != configuration) continue;
    const Entry& entry = table()[i];
    const RfConvConfiguration& tile = entry.configuration;
    // Of TMA, what keeps the problem from those that could hold it.
    const bool other = tile.tma != 0 && configuration < 0;
    if (other && size.filters > tile.m) continue;
    std::string& said = other ? against_tma : against;
    if (const std::string refusal = unfit(i, *problem, size, *gpu); !refusal.empty()) {
      said = refusal;
      continue;
    }
    const int64_t steps = size.steps(tile);
    const int64_t columns = size.columns(tile);
    // As many blocks as run at one time: more would keep more sums.
    const int64_t most =
        std::max<int64_t>(1, gpu->multiprocessors * grad1x1_resident(tile, *gpu) / columns);
    for (int64_t parts = 1; parts <= std::max<int64_t>(most, splits); ++parts) {
      if (splits > 0 && parts != splits) continue;
      if (!has_work(steps, parts) || parts * columns > kMost) {
        if (splits > 0) said = "its pixels have no such parts with work for each";
        continue;
      }
      const double cycles = tile.tma != 0
                                ? grad1x1_tma_cost(*problem, i - kFirstGrad1x1Tma, parts, *gpu)
                                : cycles_of(image, entry, parts, *gpu);
      if (plan->launches > 0 && cycles >= plan->cycles) continue;
      *plan = RfConvPlan{i,
                         static_cast<int32_t>(parts),
                         grad1x1_workspace(*problem, parts),
                         1,
                         images,
                         parts * columns,
                         cycles};
    }
  }
  if (plan->launches == 0) {
    if (configuration < 0) return refuse("no configuration serves it: %s", against.c_str());
    return refuse("configuration %d (%s), %d parts: %s", configuration,
                  table()[configuration].name.c_str(), splits, against.c_str());
  }
  // Of a GPU that has no TMA nothing is said.
  const bool missed = gpu->capability == 90 &&
                      table()[plan->configuration].configuration.tma == 0 && !against_tma.empty();
  refuse("%s, %d parts: %s, %lld blocks on %d multiprocessors%s%s",
         table()[plan->configuration].name.c_str(), plan->splits,
         configuration < 0 ? "least predicted time" : "as asked for",
         static_cast<Long>(plan->blocks), gpu->multiprocessors, missed ? "; no TMA: " : "",
         missed ? against_tma.c_str() : "");
  return 0;
}

}  // extern "C"
