// conv_bn_grad1x1_end on the GPU: its configurations, the pure function that picks one and its
// parts, and the way from a problem to a launch. None of the rates has been measured by this
// project on a GPU; only their proportions matter.
#include "conv_bn_grad1x1_end.h"

#include <algorithm>
#include <array>
#include <string>

#include "conv_bn_grad1x1_end_mma.h"
#include "conv_bn_grad1x1_end_tiles.h"
#include "conv_bn_grad1x1_end_tma.h"
#include "conv_bn_grad1x1_mma.h"
#include "conv_bn_grad1x1_requests.h"
#include "conv_gradient_choice.h"

namespace resnet_fused {
namespace {

constexpr int64_t kBytes = 2;  // of an element
// Those by mma.sync stand behind those by wgmma.
constexpr int32_t kFirstMma = Grad1x1EndTmaTiles::kSize;
constexpr int32_t kCount = kFirstMma + Grad1x1EndTiles::kSize;
// Of an element that is summed against a projection's raw output as well.
constexpr double kThirdInstructions = 3;

using Entry = Grad1x1MmaEntry;

const std::array<Entry, kCount>& table() {
  static const std::array<Entry, kCount> made = [] {
    std::array<Entry, kCount> entries{};
    for (int i = 0; i < kFirstMma; ++i) {
      Grad1x1EndTmaTiles::with(i, [&]<class Shape>() {
        entries[i].name = grad1x1_name_of<Shape>();
        entries[i].configuration = grad1x1_configuration_of<Shape>();
      });
    }
    for (int i = kFirstMma; i < kCount; ++i) {
      Grad1x1EndTiles::with(i - kFirstMma,
                            [&]<class Shape>() { entries[i] = grad1x1_mma_entry<Shape>(); });
    }
    return entries;
  }();
  return made;
}

// The convolution alone: `out` is its input, between which and the products nothing stands.
RfConvBnGrad1x1 convolution_of(const RfConvBnGrad1x1End& problem) {
  RfConvBnGrad1x1 plain{problem.end.image, problem.dweight, problem.dweight_dtype, {}};
  std::copy_n(problem.dweight_stride, 4, plain.dweight_stride);
  plain.image.raw = problem.end.out;
  std::copy_n(problem.end.out_stride, 4, plain.image.raw_stride);
  plain.image.norm = nullptr;
  plain.image.reduced = 0;
  return plain;
}

struct EndRequests {
  Grad1x1Requests image;
  TensorMapRequest raw, residual;
  bool projected;
};

EndRequests requests_of(const RfConvBnGrad1x1End& problem, const RfConvConfiguration& tile) {
  const RfConvBnDgradEnd& end = problem.end;
  const auto pixels = static_cast<int32_t>(tile.step_bytes / kTmaElementBytes);
  const int64_t channels = end.image.conv.weight_size[1];
  EndRequests made{grad1x1_requests(convolution_of(problem), tile), {}, {}, end.projected != 0};
  made.raw =
      grad1x1_pixels_request(end.image, end.image.raw, channels, end.image.raw_stride, pixels);
  if (made.projected) {
    made.residual =
        grad1x1_pixels_request(end.image, end.residual, channels, end.residual_stride, pixels);
  }
  return made;
}

// The name of an operand that the kernel cannot read or write; null: there is none.
const char* askew_end(const RfConvBnGrad1x1End& problem, const RfConvBnGrad1x1& plain) {
  if (const char* name = askew(plain)) return std::string(name) == "x" ? "out" : name;
  const RfConvBnDgradEnd& end = problem.end;
  const int64_t (&size)[4] = end.image.conv.x_size;
  if (!in_pixel_rows(end.image.raw, size, end.image.raw_stride)) return "raw";
  if (end.projected == 0) return nullptr;
  return in_pixel_rows(end.residual, size, end.residual_stride) ? nullptr : "residual";
}

// What keeps a configuration from a problem; empty if nothing does.
std::string unfit(const RfConvConfiguration& tile, const RfConvBnGrad1x1End& problem,
                  const RfGpu& gpu) {
  if (problem.end.image.conv.weight_size[0] > tile.m) return "more filters than a block keeps";
  if (tile.shared_bytes > gpu.shared_per_block) return "too much shared memory for this GPU";
  if (tile.tma == 0) return "";
  if (gpu.capability != 90) return "TMA and wgmma are for GPUs of capability 9.0";
  if (!kBuiltForSm90a) return "this build holds no machine code for sm_90a";
  const EndRequests made = requests_of(problem, tile);
  if (std::string found = grad1x1_requests_fault(made.image, "out"); !found.empty()) return found;
  if (const std::string found = tensor_map_fault(made.raw); !found.empty()) {
    return named("raw", found);
  }
  const std::string found = made.projected ? tensor_map_fault(made.residual) : "";
  return found.empty() ? "" : named("residual", found);
}

double cycles_of(const RfConvBnGrad1x1End& problem, const Entry& entry, int64_t parts,
                 const RfGpu& gpu) {
  const double projected = problem.end.projected;
  const double finishing = kReduceInstructions + kThirdInstructions * projected;
  const RfConvConfiguration& tile = entry.configuration;
  if (tile.tma == 0) {
    // `out` for the mask, dx put together; raw comes past shared memory.
    const Grad1x1MmaWork work{0, 0, 1 + projected, 3, finishing};
    return grad1x1_mma_cycles(problem.end.image, entry, work, parts, gpu);
  }
  // `out` for the product and for the mask, raw, and dx into the staging and out of it.
  const Grad1x1EndWork end{1 + projected, 5 + projected, finishing};
  return grad1x1_tma_cycles(problem.end.image, tile, end, parts, gpu);
}

int64_t workspace_of(const RfConvBnGrad1x1End& problem, int64_t parts) {
  const RfConvGradient& conv = problem.end.image.conv;
  const int64_t rows = conv.weight_size[0] + 2 + problem.end.projected;
  return parts * rows * conv.weight_size[1] * int64_t{sizeof(float)};
}

const float* means_of(const void* norm, int64_t channels) {
  constexpr int kMeanRow = 2;
  return norm != nullptr ? static_cast<const float*>(norm) + kMeanRow * channels : nullptr;
}

// What both kernels are told.
Grad1x1Arguments arguments_of(const RfConvBnGrad1x1End& problem, const RfConvPlan& plan,
                              void* workspace) {
  const RfConvBnDgradEnd& end = problem.end;
  const RfConvConfiguration& tile = table()[plan.configuration].configuration;
  Grad1x1Arguments made = conv_bn_grad1x1_arguments(convolution_of(problem), plan, tile, workspace);
  made.sum_rows = 2 + end.projected;
  made.sums = static_cast<float*>(end.image.sums);
  made.partial_sums = made.partial + int64_t{plan.splits} * made.filters * made.channels;
  return made;
}

bool is_half(const RfConvBnGrad1x1End& problem) {
  return static_cast<DataType>(problem.end.image.conv.dtype) == DataType::kFloat16;
}

int run_tma(const RfConvBnGrad1x1End& problem, const RfConvPlan& plan, void* workspace,
            void* stream) {
  const RfConvBnDgradEnd& end = problem.end;
  const EndRequests made = requests_of(problem, table()[plan.configuration].configuration);
  Grad1x1EndTmaArguments arguments{};
  Grad1x1Arguments& shared = arguments.image.shared;
  shared = arguments_of(problem, plan, workspace);
  arguments.mean = means_of(end.image.norm, shared.channels);
  arguments.projected = made.projected;
  int error = encode_grad1x1(made.image, &arguments.image);
  if (error == 0) error = encode_tensor_map(made.raw, &arguments.raw);
  if (error == 0 && made.projected) {
    arguments.residual_mean = means_of(end.residual_norm, shared.channels);
    error = encode_tensor_map(made.residual, &arguments.residual);
  }
  if (error != 0) return error;
#if defined(RF_EMULATED) || defined(RF_WITH_SM90A)
  const auto launch = is_half(problem) ? launch_conv_bn_grad1x1_end_tma_float16
                                       : launch_conv_bn_grad1x1_end_tma_bfloat16;
  return launch(arguments, plan.configuration, stream);
#else
  constexpr int kNoKernelImage = 209;  // cudaErrorNoKernelImageForDevice; the plan comes first
  return static_cast<void>(stream), kNoKernelImage;
#endif
}

int run_mma(const RfConvBnGrad1x1End& problem, const RfConvPlan& plan, void* workspace,
            void* stream) {
  const RfConvBnDgradEnd& end = problem.end;
  const int64_t (&size)[4] = end.image.conv.x_size;
  Grad1x1EndArguments arguments{};
  arguments.shared = arguments_of(problem, plan, workspace);
  const int64_t channels = arguments.shared.channels;
  arguments.raw = end.image.raw;
  arguments.raw_pixel = pixel_step(size, end.image.raw_stride).value_or(0);
  arguments.mean = means_of(end.image.norm, channels);
  if (end.projected != 0) {
    arguments.residual = end.residual;
    arguments.residual_pixel = pixel_step(size, end.residual_stride).value_or(0);
    arguments.residual_mean = means_of(end.residual_norm, channels);
  }
  const auto launch =
      is_half(problem) ? launch_conv_bn_grad1x1_end_float16 : launch_conv_bn_grad1x1_end_bfloat16;
  return launch(arguments, plan.configuration - kFirstMma, stream);
}

}  // namespace
}  // namespace resnet_fused

extern "C" {

int32_t rf_conv_bn_grad1x1_end_configurations(void) { return resnet_fused::kCount; }

const RfConvConfiguration* rf_conv_bn_grad1x1_end_configuration(int32_t index) {
  return resnet_fused::configuration_at<resnet_fused::table>(index);
}

int32_t rf_conv_bn_grad1x1_end_plan(const RfConvBnGrad1x1End* problem, const RfGpu* gpu,
                                    int32_t configuration, int32_t splits, RfConvPlan* plan,
                                    char* why, size_t why_bytes) {
  using namespace resnet_fused;
  const Refusal refuse{why, why_bytes};
  const RfConvBnGrad1x1 plain = convolution_of(*problem);
  if (check_grad1x1(plain, refuse) != 0 || check_wish(*gpu, configuration, kCount, refuse) != 0) {
    return 1;
  }
  const RfConvGradient& conv = plain.image.conv;
  const int64_t filters = conv.weight_size[0], channels = conv.weight_size[1];
  const int64_t pixels = conv.x_size[0] * conv.x_size[2] * conv.x_size[3];
  *plan = RfConvPlan{std::max(configuration, 0), 1, 0, 0, conv.x_size[0], 0, 0};
  if (pixels == 0 || filters == 0 || channels == 0) {
    refuse("an empty problem: nothing is launched");
    return 0;
  }
  if (const char* name = askew_end(*problem, plain)) {
    return refuse(
        "%s: its channels do not lie side by side in units of 16 bytes, or its pixels not one "
        "behind the other",
        name);
  }
  if (pixels > kMost || channels > kMost / (filters + 3)) {
    return refuse("more pixels or weights than a launch can have");
  }
  std::string against, against_tma;
  for (int32_t i = 0; i < kCount; ++i) {
    if (configuration >= 0 && i != configuration) continue;
    const Entry& entry = table()[i];
    const RfConvConfiguration& tile = entry.configuration;
    // Of TMA, what keeps the problem from those that could hold it.
    const bool other = tile.tma != 0 && configuration < 0;
    if (other && filters > tile.m) continue;
    std::string& said = other ? against_tma : against;
    if (const std::string refusal = unfit(tile, *problem, *gpu); !refusal.empty()) {
      said = refusal;
      continue;
    }
    const int64_t steps = divide_up(pixels * kBytes, tile.step_bytes);
    const int64_t columns = divide_up(channels, tile.n);
    // As many blocks as run at one time: more would keep more sums.
    const int64_t most =
        std::max<int64_t>(1, gpu->multiprocessors * grad1x1_resident(tile, *gpu) / columns);
    for (int64_t parts = 1; parts <= std::max<int64_t>(most, splits); ++parts) {
      if (splits > 0 && parts != splits) continue;
      if (!has_work(steps, parts) || parts * columns > kMost) {
        if (splits > 0) said = "its pixels have no such parts with work for each";
        continue;
      }
      const double cycles = cycles_of(*problem, entry, parts, *gpu);
      if (plan->launches > 0 && cycles >= plan->cycles) continue;
      *plan = RfConvPlan{i,
                         static_cast<int32_t>(parts),
                         workspace_of(*problem, parts),
                         1,
                         conv.x_size[0],
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
  const bool missed =
      gpu->capability == 90 && plan->configuration >= kFirstMma && !against_tma.empty();
  refuse("%s, %d parts: %s, %lld blocks on %d multiprocessors%s%s",
         table()[plan->configuration].name.c_str(), plan->splits,
         configuration < 0 ? "least predicted time" : "as asked for",
         static_cast<Long>(plan->blocks), gpu->multiprocessors, missed ? "; no TMA: " : "",
         missed ? against_tma.c_str() : "");
  return 0;
}

int rf_conv_bn_grad1x1_end_cuda(const RfConvBnGrad1x1End* problem, const RfConvPlan* plan,
                                void* workspace, void* stream) {
  using namespace resnet_fused;
  if (plan->launches == 0) return 0;
  const auto run = plan->configuration < kFirstMma ? run_tma : run_mma;
  return run(*problem, *plan, workspace, stream);
}

}  // extern "C"
