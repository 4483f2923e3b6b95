// The table of conv_bn_act_fp8's configurations, the pure function that picks one, and the launch.
#include "conv_bn_act_fp8.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <string>

#include "conv_bn_act_fp8_tiles.h"
#include "conv_bn_act_tma.h"
#include "conv_bn_act_window.h"
#include "conv_plan.h"
#include "tma_request.h"

namespace resnet_fused {
namespace {

constexpr int kTiles = kFirstFp8Window + ConvFp8WindowTiles::kSize;

struct Entry {
  std::string name;
  RfConvConfiguration configuration;
};

TmaTileFacts fp8_tile(int index) {
  return ConvFp8Tiles::with(index, []<class Shape>() { return facts_of<Shape>(); });
}
WindowTileFacts fp8_window(int index) {
  return ConvFp8WindowTiles::with(index - kFirstFp8Window,
                                  []<class Shape>() { return window_facts<Shape>(); });
}

const std::array<Entry, kTiles>& table() {
  static const std::array<Entry, kTiles> made = [] {
    std::array<Entry, kTiles> entries;
    for (int i = 0; i < kFirstFp8Window; ++i) {
      const TmaTileFacts tile = fp8_tile(i);
      entries[i] = {tma_name(tile), tma_configuration(tile)};
    }
    for (int i = kFirstFp8Window; i < kTiles; ++i) {
      const WindowTileFacts tile = fp8_window(i);
      entries[i] = {window_name(tile), window_configuration(tile)};
    }
    return entries;
  }();
  return made;
}

TmaTypes types_of(const RfConvBnActFp8& problem) {
  return {TensorElement::kUint8, TensorElement::kUint8, element_of(problem.out_dtype)};
}

const char* name_of(int32_t dtype) {
  switch (dtype) {
    case kFloat8E4M3:
      return "float8_e4m3fn";
    case static_cast<int32_t>(DataType::kFloat32):
      return "float32";
    case static_cast<int32_t>(DataType::kFloat16):
      return "float16";
    case static_cast<int32_t>(DataType::kBFloat16):
      return "bfloat16";
    default:
      return "another dtype";
  }
}

int32_t check_types(const RfConvBnActFp8& problem, const Refusal& refuse) {
  if (problem.conv.dtype != kFloat8E4M3) {
    return refuse("dtype: %s; float8_e4m3fn is served", name_of(problem.conv.dtype));
  }
  if (problem.conv.residual != nullptr && problem.residual_dtype != kFloat8E4M3) {
    return refuse("residual: %s; float8_e4m3fn is served", name_of(problem.residual_dtype));
  }
  const auto is = [&](DataType type) { return problem.out_dtype == static_cast<int32_t>(type); };
  if (problem.out_dtype != kFloat8E4M3 && !is(DataType::kBFloat16) && !is(DataType::kFloat16)) {
    return refuse("out: %s; float8_e4m3fn, bfloat16 and float16 are served",
                  name_of(problem.out_dtype));
  }
  return 0;
}

bool by_window(int index) { return index >= kFirstFp8Window; }

// What a configuration counts of so many images: pixels, or positions of a walk.
int64_t pixels_of(const RfConvBnAct& conv, int index, int64_t images) {
  const OutputSize size = output_size(conv);
  return by_window(index) ? window_positions(conv, images) : images * size.p * size.q;
}

// So many images that pixels, tiles and steps need no more than 31 bits; 0: one is too much.
int64_t images_together(const RfConvBnAct& conv, int index) {
  const RfConvConfiguration& tile = table()[index].configuration;
  const OutputSize size = output_size(conv);
  const int64_t columns = divide_up(conv.weight_size[0] / conv.groups, tile.n) * conv.groups;
  const int64_t rows = std::min(kMost, kMost / columns * tile.m);
  const int64_t beside = by_window(index) ? 1 : 0;  // of each row and image
  return std::min(conv.x_size[0], rows / ((size.p + beside) * (size.q + beside)));
}

// What keeps a configuration from so many images together; empty if nothing.
std::string fault_of(const RfConvBnAct& conv, const TmaTypes& types, int index, int64_t images) {
  if (images < 1) return "one image is more than a launch can take";
  return by_window(index) ? window_fault(conv, types.out, fp8_window(index), images)
                          : tma_fault(conv, types, fp8_tile(index), images);
}

double cycles_of(const RfConvBnAct& conv, const TmaTypes& types, int index, int64_t pixels,
                 const RfGpu& gpu) {
  return by_window(index) ? window_cost(conv, types.out, fp8_window(index), pixels, gpu)
                          : tma_cost(conv, types, fp8_tile(index), pixels, gpu);
}

int64_t blocks_of(const RfConvBnAct& conv, int index, int64_t pixels, const RfGpu& gpu) {
  return by_window(index) ? window_blocks(conv, fp8_window(index), pixels, gpu)
                          : tma_blocks(conv, fp8_tile(index), pixels, gpu);
}

#if defined(RF_EMULATED) || defined(RF_WITH_SM90A)

// The launches of one type of the output.
struct Launches {
  decltype(&launch_conv_bn_act_fp8_e4m3) by_step;
  decltype(&launch_conv_bn_act_fp8_window_e4m3) by_window;
};
Launches launches_of(TensorElement out) {
  switch (out) {
    case TensorElement::kUint8:
      return {launch_conv_bn_act_fp8_e4m3, launch_conv_bn_act_fp8_window_e4m3};
    case TensorElement::kFloat16:
      return {launch_conv_bn_act_fp8_float16, launch_conv_bn_act_fp8_window_float16};
    default:
      return {launch_conv_bn_act_fp8_bfloat16, launch_conv_bn_act_fp8_window_bfloat16};
  }
}

// Launches images [first, first + images) of a problem whose `conv` is `part`.
int run_images(const RfConvBnActFp8& problem, const RfConvBnAct& part, const RfConvPlan& plan,
               int64_t first, int64_t images, void* stream) {
  const TmaTypes types = types_of(problem);
  const Launches launches = launches_of(types.out);
  const int index = plan.configuration;
  const auto with_factors = [&](auto& arguments) {
    arguments.residual_factor = problem.residual_factor;
    arguments.out_factor = problem.out_factor;
  };
  if (by_window(index)) {
    const WindowTileFacts tile = fp8_window(index);
    ConvWindowArguments arguments;
    const int error = window_arguments(part, types.out, tile, first, images, &arguments);
    if (error != 0) return error;
    with_factors(arguments);
    const WindowGrid grid = window_grid(arguments, tile, plan);
    return launches.by_window(arguments, index - kFirstFp8Window, grid, stream);
  }
  const TmaTileFacts tile = fp8_tile(index);
  ConvTmaArguments arguments;
  const int error = tma_arguments(part, types, tile, first, images, &arguments);
  if (error != 0) return error;
  with_factors(arguments);
  return launches.by_step(arguments, index, tma_blocks(arguments, tile, plan), stream);
}

#endif

}  // namespace
}  // namespace resnet_fused

extern "C" int32_t rf_conv_bn_act_fp8_configurations(void) { return resnet_fused::kTiles; }

extern "C" const RfConvConfiguration* rf_conv_bn_act_fp8_configuration(int32_t index) {
  return resnet_fused::configuration_at<resnet_fused::table>(index);
}

extern "C" int32_t rf_conv_bn_act_fp8_plan(const RfConvBnActFp8* problem, const RfGpu* gpu,
                                           int32_t configuration, int32_t splits, RfConvPlan* plan,
                                           char* why, size_t why_bytes) {
  using namespace resnet_fused;
  const Refusal refuse{why, why_bytes};
  const RfConvBnAct& conv = problem->conv;
  if (check_types(*problem, refuse) != 0 || check_sizes(conv, refuse) != 0 ||
      check_depth(conv, refuse) != 0 || check_wish(*gpu, configuration, kTiles, refuse) != 0) {
    return 1;
  }
  const OutputSize size = output_size(conv);
  const int64_t images = conv.x_size[0];
  *plan = RfConvPlan{std::max(configuration, 0), 1, 0, 0, std::max<int64_t>(images, 1), 0, 0};
  if (images * conv.weight_size[0] * size.p * size.q == 0) {
    std::snprintf(why, why_bytes, "an empty output: nothing is launched");
    return 0;
  }
  if (gpu->capability != 90) return refuse("TMA and wgmma are for GPUs of capability 9.0");
  if (!kBuiltForSm90a) return refuse("this build holds no machine code for sm_90a");
  if (splits > 1) return refuse("splits: only 1 is served by TMA");

  std::string against;
  bool found = false;
  const TmaTypes types = types_of(*problem);
  for (int i = 0; i < kTiles; ++i) {
    if (configuration >= 0 && i != configuration) continue;
    const int64_t together = images_together(conv, i);
    const std::string fault = fault_of(conv, types, i, together);
    // Of what windows are not for nothing is said, unless one is asked for.
    if (configuration >= 0 || !by_window(i)) against = fault;
    if (!fault.empty()) continue;
    const int64_t pixels = pixels_of(conv, i, together);
    const double cycles = cycles_of(conv, types, i, pixels, *gpu);
    if (found && cycles >= plan->cycles) continue;
    found = true;
    const int64_t blocks = blocks_of(conv, i, pixels, *gpu);
    *plan = RfConvPlan{i, 1, 0, divide_up(images, together), together, blocks, cycles};
  }
  if (!found) {
    if (configuration < 0) return refuse("no configuration serves it: %s", against.c_str());
    return refuse("configuration %d (%s): %s", configuration,
                  rf_conv_bn_act_fp8_configuration(configuration)->name, against.c_str());
  }
  plan->at_once = 1;  // blocks stay for many tiles
  std::snprintf(why, why_bytes, "%s: %s, %lld blocks on %d multiprocessors",
                rf_conv_bn_act_fp8_configuration(plan->configuration)->name,
                configuration < 0 ? "least predicted time" : "as asked for",
                static_cast<Long>(plan->blocks), gpu->multiprocessors);
  return 0;
}

extern "C" int rf_conv_bn_act_fp8_cuda(const RfConvBnActFp8* problem, const RfConvPlan* plan,
                                       void* /*workspace*/, void* stream) {
  using namespace resnet_fused;
#if defined(RF_EMULATED) || defined(RF_WITH_SM90A)
  const int64_t images = problem->conv.x_size[0];
  RfConvBnAct part = problem->conv;
  for (int64_t i = 0; i < plan->launches; ++i) {
    const int64_t place = part.reverse != 0 ? plan->launches - 1 - i : i;
    const int64_t first = place * plan->images_a_launch;
    const int64_t count = std::min(plan->images_a_launch, images - first);
    const int error = run_images(*problem, part, *plan, first, count, stream);
    if (error != 0) return error;
    part.flow.follows = part.flow.dependent;
  }
  return 0;
#else
  constexpr int kNoKernelImage = 209;  // cudaErrorNoKernelImageForDevice; the plan comes first
  return static_cast<void>(problem), static_cast<void>(plan), static_cast<void>(stream),
         kNoKernelImage;
#endif
}
