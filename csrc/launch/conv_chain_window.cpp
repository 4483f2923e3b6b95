// conv_chain for sm_90a with a 3x3 convolution in front: from a problem to its tensor maps and
// arguments, its prediction, and its launch. None of the rates has been measured by this project on
// a GPU; only their proportions matter.
#include "conv_chain_window.h"

#include <algorithm>
#include <cstddef>
#include <utility>

#include "conv_chain_rates.h"
#include "conv_chain_tma.h"
#include "conv_plan.h"
#include "tma_request.h"
#include "window_request.h"

namespace resnet_fused {

// tools/_cuda_early.py knows what a kernel's parameters point to by these places.
static_assert(offsetof(ChainWindowArguments, x) == 0);
static_assert(offsetof(ChainWindowArguments, shortcut) == 128);
static_assert(offsetof(ChainWindowArguments, front) == 256);
static_assert(offsetof(ChainWindowArguments, weight) == 384);
static_assert(offsetof(ChainWindowArguments, projection) == 512);
static_assert(offsetof(ChainWindowArguments, next) == 640);
static_assert(offsetof(ChainWindowArguments, front_scale) == 768);
static_assert(offsetof(ChainWindowArguments, next_shift) == 824);
static_assert(offsetof(ChainWindowArguments, out.data) == 832);
static_assert(offsetof(ChainWindowArguments, following.data) == 856);

namespace {

bool projects(const RfConvChain& p) { return p.projects != 0; }

// What the shortcut is, or is made of.
TensorMapRequest shortcut_request(const RfConvChain& p, int64_t first, int64_t images) {
  const TensorElement element = element_of(p.dtype);
  const int64_t channels = projects(p) ? p.projected_channels : p.channels;
  const int64_t size[4] = {images, channels, p.x_size[2], p.x_size[3]};
  const int64_t (&stride)[4] = projects(p) ? p.projected_stride : p.residual_stride;
  const void* from =
      image_at(element, projects(p) ? p.projected : p.residual, p.x_size[0], stride[0], first);
  return output_walk_request(element, from, size, stride, kChainTmaPixels);
}

// The tensor maps of images [first, first + images).
struct Maps {
  TensorMapRequest x;
  TensorMapRequest shortcut;
  TensorMapRequest front;
  TensorMapRequest weight;
  TensorMapRequest next;
};

Maps maps_of(const RfConvChain& p, const ChainWindowFacts& tile, int64_t first, int64_t images) {
  const int64_t height = p.x_size[2];
  const int64_t width = p.x_size[3];
  const int64_t x_size[4] = {images, p.x_size[1], height, width};
  const int64_t front_size[4] = {p.front_channels, p.x_size[1], kFrontTaps, kFrontTaps};
  const TensorElement element = element_of(p.dtype);
  const auto from = [&](const void* tensor, int64_t stride) {
    return image_at(element, tensor, p.x_size[0], stride, first);
  };
  return {input_walk_request(element, from(p.x, p.x_stride[0]), x_size, p.x_stride,
                             window_parts(kChainTmaPixels, width)),
          shortcut_request(p, first, images),
          taps_request(element, p.front_weight, front_size, p.front_weight_stride, kWarpgroupRows),
          rows_request(element, p.weight, p.front_channels, p.channels, p.weight_stride[0],
                       kStepElements),
          rows_request(element, p.next_weight, p.channels, p.next_channels, p.next_weight_stride[0],
                       tile.next / tile.sharing)};
}

// What a tile can't do; the kernel for sm_80 serves it.
std::string shape_fault(const RfConvChain& problem, const ChainWindowFacts& tile) {
  if (problem.front_channels == 0) return "it is made for a 3x3 convolution in front";
  if (problem.x_size[1] != tile.front || problem.front_channels != tile.front) {
    return "a convolution in front of " + std::to_string(problem.x_size[1]) + " to " +
           std::to_string(problem.front_channels) + " channels; it takes " +
           std::to_string(tile.front) + " to as many";
  }
  std::string found = projection_fault(problem, tile.projected);
  if (!found.empty()) return found;
  if (problem.next_channels < 1) return "no next convolution; it takes chains of two";
  if (problem.next_channels > tile.next) return too_many("next", problem.next_channels, tile.next);
  const int64_t most = int64_t{tile.steps} * kStepElements;
  if (problem.channels % kStepElements != 0 || problem.channels > most) {
    return std::to_string(problem.channels) + " channels of out; multiples of " +
           std::to_string(kStepElements) + " up to " + std::to_string(most) + " fit";
  }
  const int64_t width = problem.x_size[3];
  if (const int64_t bytes = chain_window_shared_bytes(tile, width); bytes > kMostSharedBytes) {
    return "x: rows of " + std::to_string(width) + " pixels take " + std::to_string(bytes) +
           " bytes of shared memory, " + std::to_string(kMostSharedBytes) + " are there";
  }
  return "";
}

}  // namespace

ChainWindowFacts chain_window_tile(int index) {
  return ConvChainWindowTiles::with(index, []<class Shape>() {
    return ChainWindowFacts{Shape::kFront,   Shape::kNext,      Shape::kSteps,
                            Shape::kStages,  Shape::kProjected, Shape::kSharing,
                            Shape::kStaying, Shape::kStreamed,  Shape::kWindowAt};
  });
}

std::string chain_window_name(const ChainWindowFacts& tile) {
  return "tma_win" + std::to_string(kChainTmaPixels) + "x" + std::to_string(tile.next) + "_" +
         std::to_string(tile.stages) + "s_front" + std::to_string(tile.front) +
         (tile.projected > 0 ? "_d" + std::to_string(tile.projected) : "") +
         (tile.sharing > 1 ? std::string("_") + std::to_string(tile.sharing) + "c" : "");
}

int64_t chain_window_shared_bytes(const ChainWindowFacts& tile, int64_t width) {
  const WindowParts parts = window_parts(kChainTmaPixels, width);
  return tile.window_at + tile.front / kStepElements * parts.count * parts.rows * kStepRowBytes;
}

std::string chain_window_fault(const RfConvChain& problem, const ChainWindowFacts& tile,
                               int64_t images, const RfGpu& gpu) {
  if (gpu.capability != 90) return "TMA and wgmma are for GPUs of capability 9.0";
  if (!kBuiltForSm90a) return "this build holds no machine code for sm_90a";
  std::string found = shape_fault(problem, tile);
  if (!found.empty()) return found;
  if (walk_positions(images, problem.x_size[2], problem.x_size[3]) > kMost) {
    return "x: more positions than a launch can take";
  }
  const Maps maps = maps_of(problem, tile, 0, images);
  const std::pair<const char*, TensorMapRequest> all[] = {
      {"x", maps.x},
      {projects(problem) ? "projected" : "residual", maps.shortcut},
      {"front_weight", maps.front},
      {"weight", maps.weight},
      {"next_weight", maps.next}};
  for (const auto& [name, request] : all) {
    if (found = tensor_map_fault(request); !found.empty()) return named(name, found);
  }
  if (!projects(problem)) return "";
  return named("projection_weight", tensor_map_fault(projection_request(problem)));
}

int64_t chain_window_tiles(const RfConvChain& problem, const ChainWindowFacts& tile,
                           int64_t images) {
  const int64_t positions = walk_positions(images, problem.x_size[2], problem.x_size[3]);
  return divide_up(positions, tile.sharing * kChainTmaPixels) * tile.sharing;
}

int64_t chain_window_blocks(const RfConvChain& problem, const ChainWindowFacts& tile,
                            int64_t images, const RfGpu& gpu) {
  const int64_t clusters = std::max(1, gpu.multiprocessors / tile.sharing);
  return std::min(chain_window_tiles(problem, tile, images), clusters * tile.sharing);
}

// The busiest block's tiles, each as long as its products, what passes through shared memory,
// through L2 or to and from memory, or as one of its warpgroups by itself, whichever is longest. Of
// memory every position counts as a pixel.
double chain_window_cost(const RfConvChain& problem, const ChainWindowFacts& tile, int64_t images,
                         const RfGpu& gpu) {
  constexpr double m = kChainTmaPixels;
  constexpr double kRow = kStepRowBytes;
  constexpr double kArea = m * kStepElements;
  constexpr double kTaps = kWindowTaps;
  const int64_t tiles = chain_window_tiles(problem, tile, images);
  const int64_t blocks = chain_window_blocks(problem, tile, images, gpu);
  const auto each = static_cast<double>(divide_up(tiles, blocks));
  const auto steps = static_cast<double>(divide_up(problem.channels, kStepElements));
  const WindowParts parts = window_parts(kChainTmaPixels, problem.x_size[3]);
  const double fronts = tile.front / kStepElements;
  const auto window = fronts * static_cast<double>(parts.rows * parts.count) * kRow;
  const double matrix =
      kArea * (fronts * kTaps * tile.front + steps * (tile.front + tile.projected + tile.next)) /
      kChainUnit;
  // The 3x3 reads both sides of its products, and so does a projection; the others their filters
  // alone. Of a step threads write what they make and read it; TMA writes a shortcut that is a
  // tensor, and they read it. Filters that come by steps are written as well.
  const double boxes = tile.next / kStepElements;
  const double shortcut = tile.projected > 0 ? 0 : 1;
  const double pixels = 1 - shortcut;
  const double streamed = tile.streamed.front + steps * tile.streamed.step;
  const double read = fronts * kTaps * (m + kConsumers * tile.front) * kRow;
  const double of_step = kConsumers * (tile.front + tile.next) * kRow +
                         2 * (1 + shortcut) * m * kRow +
                         pixels * (m + kConsumers * kStepElements) * kRow;
  const double shared =
      (read + window + steps * of_step + streamed + pixels * m * kRow + 2 * boxes * m * kRow) /
      kSharedBytes;
  const double stored = 1.0 / static_cast<double>(problem.out_stride * problem.out_stride);
  const double beside = (steps * (shortcut + stored) + pixels + boxes) * m * kRow;
  const double results = (fronts + steps + boxes) * kArea / kResults;
  const double alone = matrix / kConsumers + results + (1 + steps) * kStepWaits;
  const double longest =
      std::max({matrix, shared, alone,
                (window + beside) / kCacheBytes + streamed / tile.sharing / kSameLines,
                (fronts * m * kRow + beside) / kMemoryBytes});
  const double once = tile.staying.front + steps * tile.staying.step;
  const double meetings = tile.sharing > 1 ? 2 * kClusterMeeting : 0;
  return each * longest + once / kSameLines + meetings + 2 * kLatency;
}

int run_conv_chain_window(const RfConvChain& problem, const RfConvPlan& plan, int64_t first,
                          int64_t images, void* stream) {
  const int index = plan.configuration - kFirstChainWindow;
  const ChainWindowFacts tile = chain_window_tile(index);
  const int64_t height = problem.x_size[2];
  const int64_t width = problem.x_size[3];
  const Maps maps = maps_of(problem, tile, first, images);
  ChainWindowArguments made{};
  int error = encode_tensor_map(maps.x, &made.x);
  if (error == 0) error = encode_tensor_map(maps.shortcut, &made.shortcut);
  if (error == 0) error = encode_tensor_map(maps.front, &made.front);
  if (error == 0) error = encode_tensor_map(maps.weight, &made.weight);
  if (error == 0) error = encode_tensor_map(maps.next, &made.next);
  if (error == 0 && projects(problem)) {
    error = encode_tensor_map(projection_request(problem), &made.projection);
  }
  if (error != 0) return error;
  made.front_scale = static_cast<const float*>(problem.front_scale);
  made.front_shift = static_cast<const float*>(problem.front_shift);
  made.scale = static_cast<const float*>(problem.scale);
  made.shift = static_cast<const float*>(problem.shift);
  made.projection_scale = static_cast<const float*>(problem.projection_scale);
  made.projection_shift = static_cast<const float*>(problem.projection_shift);
  made.next_scale = static_cast<const float*>(problem.next_scale);
  made.next_shift = static_cast<const float*>(problem.next_shift);
  made.out = chain_out(problem, first);
  const int64_t next_size[4] = {problem.x_size[0], problem.next_channels, height, width};
  made.following = chain_result(problem.following, next_size, problem.following_stride, first);
  made.walk = {narrowed(walk_positions(images, height, width)), make_divisor(narrowed(width + 1)),
               make_divisor(narrowed(height + 1))};
  const WindowParts parts = window_parts(kChainTmaPixels, width);
  made.part_rows = narrowed(parts.rows);
  made.parts = narrowed(parts.count);
  made.channels = narrowed(problem.channels);
  made.next_channels = narrowed(problem.next_channels);
  made.steps = narrowed(problem.channels / kStepElements);
  made.tiles = narrowed(chain_window_tiles(problem, tile, images));
  made.thinned = problem.out_stride != 1;
  made.reverse = problem.reverse != 0;
  made.dependent = problem.flow.dependent != 0;
  made.follows = problem.flow.follows != 0;
  const auto blocks = static_cast<int32_t>(std::min<int64_t>(made.tiles, plan.blocks));
  const auto shared = narrowed(chain_window_shared_bytes(tile, width));
#if defined(RF_EMULATED) || defined(RF_WITH_SM90A)
  const bool half = static_cast<DataType>(problem.dtype) == DataType::kFloat16;
  const auto launch = half ? launch_conv_chain_window_float16 : launch_conv_chain_window_bfloat16;
  return launch(made, index, blocks, shared, stream);
#else
  constexpr int kNoKernelImage = 209;  // cudaErrorNoKernelImageForDevice; the plan comes first
  return static_cast<void>(blocks), static_cast<void>(shared), static_cast<void>(stream),
         kNoKernelImage;
#endif
}

}  // namespace resnet_fused
