// conv_bn_act's window kernel for sm_90a: from a problem to its tensor maps and arguments, its
// prediction, and its launch. None of the rates has been measured by this project on a GPU; only
// their proportions matter.
#include "conv_bn_act_window.h"

#include <algorithm>
#include <cstddef>
#include <limits>

#include "conv_halo.h"
#include "conv_plan.h"
#include "conv_strides.h"
#include "tensor_map.h"
#include "tma_request.h"
#include "window_rates.h"
#include "window_request.h"

namespace resnet_fused {

// tools/_cuda_early.py knows what a kernel's parameters point to by these places.
static_assert(offsetof(ConvWindowArguments, x) == 0);
static_assert(offsetof(ConvWindowArguments, weight) == 128);
static_assert(offsetof(ConvWindowArguments, residual) == 256);
static_assert(offsetof(ConvWindowArguments, out) == 384);
static_assert(offsetof(ConvWindowArguments, scale) == 392);
static_assert(offsetof(ConvWindowArguments, shift) == 400);

namespace {

constexpr int64_t kUnitBytes = 16;  // of what threads store at a time

TensorMapRequest x_request(const RfConvBnAct& problem, const WindowTileFacts& tile, const void* at,
                           int64_t images) {
  const int64_t size[4] = {images, problem.x_size[1], problem.x_size[2], problem.x_size[3]};
  return input_walk_request(element_of(problem.dtype), at, size, problem.x_stride,
                            window_parts(tile.pixels, size[3]));
}

TensorMapRequest weight_request(const RfConvBnAct& problem) {
  return taps_request(element_of(problem.dtype), problem.weight, problem.weight_size,
                      problem.weight_stride, kWarpgroupRows, kWindowChannels);
}

TensorMapRequest residual_request(const RfConvBnAct& problem, const WindowTileFacts& tile,
                                  const void* at, int64_t images) {
  const int64_t size[4] = {images, problem.weight_size[0], problem.x_size[2], problem.x_size[3]};
  return output_walk_request(element_of(problem.dtype), at, size, problem.residual_stride,
                             tile.pixels);
}

}  // namespace

std::string window_shape_fault(const RfConvBnAct& problem, bool slices) {
  if (static_cast<DataType>(problem.dtype) == DataType::kFloat32) return kNoTf32;
  const int64_t (&filters)[4] = problem.weight_size;
  if (!taps_are_one_run(problem)) return kNoWindows;
  const bool fit = slices ? filters[1] > kWindowChannels && filters[1] % kWindowChannels == 0
                          : filters[1] == kWindowChannels;
  if (problem.groups != 1 || !fit) {
    const std::string each = std::to_string(kWindowChannels);
    return "channels: " +
           (slices ? "windows in slices are for 2, 3, .. times " + each
                   : "windows are for " + each) +
           " in one group";
  }
  if (filters[0] % kWarpgroupRows != 0) {
    return "channels: " + std::to_string(filters[0]) + " of the output; a multiple of " +
           std::to_string(kWarpgroupRows) + " is accepted";
  }
  return "";
}

std::string window_out_fault(const RfConvBnAct& problem, TensorElement out) {
  if (problem.out_stride[1] != 1) return "out: its channels are not adjacent";
  if (reinterpret_cast<uintptr_t>(problem.out) % kUnitBytes != 0) {
    return "out: address is not a multiple of 16";
  }
  const int64_t size[4] = {problem.x_size[0], problem.weight_size[0], problem.x_size[2],
                           problem.x_size[3]};
  for (const int d : {0, 2, 3}) {
    const int64_t bytes = size[d] > 1 ? problem.out_stride[d] * element_bytes(out) : 0;
    if (bytes % kUnitBytes != 0 || bytes / kUnitBytes > kMost) {
      return "out: strides of " + std::to_string(bytes) + " bytes; multiples of 16 are accepted";
    }
  }
  return "";
}

WindowTileFacts window_tile(int index) {
  return ConvWindowTiles::with(index, []<class Shape>() { return window_facts<Shape>(); });
}

std::string window_name(const WindowTileFacts& tile) {
  return "tma_win" + std::to_string(tile.pixels) + "x" + std::to_string(kWarpgroupRows) + "_" +
         std::to_string(kConsumers) + "w" +
         (tile.filter_stages > 0 ? "_" + std::to_string(tile.filter_stages) + "s" : "");
}

RfConvConfiguration window_configuration(const WindowTileFacts& tile) {
  return {nullptr,    1, tile.pixels,    kWarpgroupRows,   1, 8,
          kConsumers, 1, tile.row_bytes, kMostSharedBytes, 0, 1,
          1};
}

int64_t window_shared_bytes(const WindowTileFacts& tile, int64_t width) {
  const WindowParts parts = window_parts(tile.pixels, width);
  return tile.windows_at + kConsumers * parts.count * parts.rows * tile.row_bytes;
}

int64_t window_positions(const RfConvBnAct& problem, int64_t images) {
  return walk_positions(images, problem.x_size[2], problem.x_size[3]);
}

std::string window_fault(const RfConvBnAct& problem, TensorElement out, const WindowTileFacts& tile,
                         int64_t images) {
  std::string found = window_shape_fault(problem, tile.filter_stages > 0);
  if (found.empty()) {
    found =
        window_width_fault("x", problem.x_size[3], window_shared_bytes(tile, problem.x_size[3]));
  }
  if (!found.empty()) return found;
  if (problem.x_stride[1] != 1) return "x: its channels are not adjacent";
  if (problem.weight_stride[1] != 1) return "weight: its channels are not adjacent";
  found = named("x", tensor_map_fault(x_request(problem, tile, problem.x, images)));
  if (found.empty()) found = named("weight", tensor_map_fault(weight_request(problem)));
  if (found.empty()) found = window_out_fault(problem, out);
  if (!found.empty() || problem.residual == nullptr) return found;
  if (problem.residual_stride[1] != 1) return "residual: its channels are not adjacent";
  return named("residual",
               tensor_map_fault(residual_request(problem, tile, problem.residual, images)));
}

int64_t window_blocks(const RfConvBnAct& problem, const WindowTileFacts& tile, int64_t positions,
                      const RfGpu& gpu) {
  const int64_t columns = problem.weight_size[0] / kWarpgroupRows;
  const int64_t of_column = std::max<int64_t>(1, gpu.multiprocessors / columns);
  return columns * std::min(of_column, divide_up(positions, tile.pixels));
}

// The busiest multiprocessor's tiles. Windows come, and results go out, beside the products of
// other tiles; what threads add of a pass beside those of the other one. Channels in slices have a
// window each, and bring their filters. Of memory every position counts as a pixel.
double window_cost(const RfConvBnAct& problem, TensorElement out, const WindowTileFacts& tile,
                   int64_t positions, const RfGpu& gpu, const WindowWork& work) {
  const double row = tile.row_bytes;  // of x and the shortcut
  const auto made = static_cast<double>(kWarpgroupRows * element_bytes(out));  // of the result
  const double shortcut = problem.residual != nullptr ? row : 0;
  const int64_t columns = problem.weight_size[0] / kWarpgroupRows;
  const int64_t blocks = window_blocks(problem, tile, positions, gpu);
  const int64_t of_block = divide_up(divide_up(positions, tile.pixels), blocks / columns);
  const auto each = static_cast<double>(of_block * divide_up(blocks, gpu.multiprocessors));
  const WindowParts parts = window_parts(tile.pixels, problem.x_size[3]);
  const auto loaded = static_cast<double>(parts.rows * parts.count) * row;
  const double pixels = tile.pixels;
  const double area = pixels * kWarpgroupRows;
  const bool streams = tile.filter_stages > 0;
  const double slices = streams ? static_cast<double>(problem.x_size[1]) / kWindowChannels : 1;
  const double filters = kWindowTaps * kWarpgroupRows * row;  // of a slice
  const double brought = loaded + (streams ? filters : 0);    // with each of them
  // The same bytes take the same time in every type.
  const double matrix = kWindowTaps * area * row / kTmaElementBytes / kWarpgroupUnit;
  const double read = kWindowTaps * (kWarpgroupRows * tile.passes + pixels) * row;
  const double staged = pixels * (row + 2 * made);
  const double multiply =
      std::max(matrix, (read + brought + staged / slices + work.transformed) / kSharedBytes);
  const double moved = pixels * (slices * row + shortcut + made);
  const double results = area / kResults + pixels * made / kStoredBytes + work.results;
  const double ready = kLatency + loaded / kCacheBytes + work.transforming;
  double slice = std::max(multiply, brought / kCacheBytes);
  if (work.transforming > 0) {
    // A window comes anew and is transformed while the other one is multiplied.
    slice = std::max({slice, work.transforming, (multiply + ready) / kConsumers});
  }
  const double longest = std::max({slices * slice, results, moved / kMemoryBytes});
  const double begun = streams ? ready : filters / kSameLines;
  return each * (longest + kTurn) + results + begun + 2 * kLatency;
}

ConvWindowArguments window_arguments_but_maps(const RfConvBnAct& problem, TensorElement element,
                                              int32_t pixels, const WindowParts& parts,
                                              int64_t first, int64_t images) {
  const int64_t size[4] = {problem.x_size[0], problem.weight_size[0], problem.x_size[2],
                           problem.x_size[3]};
  const Strides out = used(size, problem.out_stride);
  const int64_t bytes = element_bytes(element);
  const auto units = [&](int64_t elements) { return narrowed(elements * bytes / kUnitBytes); };
  const int64_t positions = window_positions(problem, images);
  ConvWindowArguments made{};
  made.out = moved(problem.out, first * out.n * bytes);
  made.scale = static_cast<const float*>(problem.scale);
  made.shift = static_cast<const float*>(problem.shift);
  made.out_strides = {units(out.n), units(out.h), units(out.w)};
  made.walk = {narrowed(positions), make_divisor(narrowed(size[3] + 1)),
               make_divisor(narrowed(size[2] + 1))};
  made.part_rows = narrowed(parts.rows);
  made.parts = narrowed(parts.count);
  made.tiles = narrowed(divide_up(positions, pixels));
  made.columns = narrowed(size[1] / kWarpgroupRows);
  made.floor = problem.relu != 0 ? 0.0f : -std::numeric_limits<float>::infinity();
  made.residual_factor = 1.0f;
  made.out_factor = 1.0f;
  made.has_residual = problem.residual != nullptr;
  made.reverse = problem.reverse != 0;
  made.dependent = problem.flow.dependent != 0;
  made.follows = problem.flow.follows != 0;
  return made;
}

int window_arguments(const RfConvBnAct& problem, TensorElement out, const WindowTileFacts& tile,
                     int64_t first, int64_t images, ConvWindowArguments* made) {
  ConvWindowArguments& arguments = *made;
  arguments = window_arguments_but_maps(
      problem, out, tile.pixels, window_parts(tile.pixels, problem.x_size[3]), first, images);
  const auto from = [&](const void* tensor, int64_t stride) {
    return image_at(element_of(problem.dtype), tensor, problem.x_size[0], stride, first);
  };
  int error = encode_tensor_map(
      x_request(problem, tile, from(problem.x, problem.x_stride[0]), images), &arguments.x);
  if (error == 0) error = encode_tensor_map(weight_request(problem), &arguments.weight);
  if (error == 0 && arguments.has_residual) {
    const void* at = from(problem.residual, problem.residual_stride[0]);
    error = encode_tensor_map(residual_request(problem, tile, at, images), &arguments.residual);
  }
  return error;
}

WindowGrid window_grid(const ConvWindowArguments& arguments, const WindowTileFacts& tile,
                       const RfConvPlan& plan) {
  const int64_t tiles = int64_t{arguments.tiles} * arguments.columns;
  const int64_t width = arguments.walk.columns.value - 1;
  return {narrowed(std::min(plan.blocks, tiles)), narrowed(window_shared_bytes(tile, width))};
}

int run_conv_bn_act_window(const RfConvBnAct& problem, const RfConvPlan& plan, int64_t first,
                           int64_t images, void* stream) {
  const int index = plan.configuration - kFirstWindow;
  const WindowTileFacts tile = window_tile(index);
  const TensorElement element = element_of(problem.dtype);
  ConvWindowArguments arguments;
  const int error = window_arguments(problem, element, tile, first, images, &arguments);
  if (error != 0) return error;
  const WindowGrid grid = window_grid(arguments, tile, plan);
#if defined(RF_EMULATED) || defined(RF_WITH_SM90A)
  const bool half = element == TensorElement::kFloat16;
  const auto launch = half ? launch_conv_bn_act_window_float16 : launch_conv_bn_act_window_bfloat16;
  return launch(arguments, index, grid, stream);
#else
  constexpr int kNoKernelImage = 209;  // cudaErrorNoKernelImageForDevice; the plan comes first
  return static_cast<void>(grid), static_cast<void>(stream), kNoKernelImage;
#endif
}

}  // namespace resnet_fused
