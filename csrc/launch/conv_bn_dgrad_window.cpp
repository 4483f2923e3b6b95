// conv_bn_dgrad's window kernel for sm_90a: what keeps a problem from it, its prediction, its
// tensor maps and its launch. None of the rates has been measured by this project on a GPU; only
// their proportions matter.
#include "conv_bn_dgrad_window.h"

#include <algorithm>

#include "conv_bn_dgrad_arguments.h"
#include "conv_bn_dgrad_stream_tiles.h"
#include "conv_halo.h"
#include "conv_plan.h"
#include "step_transform.h"
#include "tma_request.h"
#include "window_rates.h"
#include "window_request.h"

namespace resnet_fused {
namespace {

constexpr int64_t kCoefficientBytes = 16;  // that a thread loads at a time

struct Facts {
  int32_t pixels;             // positions
  int32_t stages;             // parts of y
  int32_t fixed_bytes;        // of shared memory, in front of what a launch knows the size of
  int32_t filter_stages = 0;  // as of WindowTileFacts
};
Facts facts_at(int index) {
  const auto facts = []<class Shape>() {
    Facts made{Shape::kPixels, Shape::kStages, Shape::kStagingAt};
    if constexpr (requires { Shape::kFilterStages; }) made.filter_stages = Shape::kFilterStages;
    return made;
  };
  return index < BnDgradWindowTiles::kSize
             ? BnDgradWindowTiles::with(index, facts)
             : BnDgradStreamTiles::with(index - BnDgradWindowTiles::kSize, facts);
}

WindowParts parts_of(const RfConvBnDgrad& problem, const Facts& tile) {
  return window_parts(tile.pixels, problem.conv.x_size[3], kMostGradientRows);
}

// Tensors that a tile reads at its end; each has a staging tile of its own.
int32_t ends_of(const RfConvBnDgrad& problem) {
  return std::max((problem.added != 0 ? 1 : 0) + (problem.reduced != 0 ? 1 : 0), 1);
}

// Of a block.
int64_t shared_bytes(const RfConvBnDgrad& problem, const Facts& tile) {
  const WindowParts parts = parts_of(problem, tile);
  const int64_t of_y = problem.affine != 0 ? tile.stages : 0;
  const int64_t rows =
      kConsumers * ends_of(problem) * tile.pixels + (kConsumers * parts.count + of_y) * parts.rows;
  return tile.fixed_bytes + rows * kStepRowBytes;
}

// A tensor of so many images from `first` on.
struct Part {
  const void* at;
  int64_t size[4];
  const int64_t (&stride)[4];
};
Part part_of(const RfConvGradient& conv, int64_t channels, const Placed& tensor, int64_t first,
             int64_t images) {
  return {image_at(element_of(conv.dtype), tensor.at, conv.x_size[0], tensor.stride[0], first),
          {images, channels, conv.x_size[2], conv.x_size[3]},
          tensor.stride};
}

// Of dz and y: the walk that taps read.
TensorMapRequest read_request(const RfConvBnDgrad& problem, const Facts& tile, const Placed& tensor,
                              int64_t first, int64_t images) {
  const RfConvGradient& conv = problem.conv;
  const Part part = part_of(conv, conv.weight_size[0], tensor, first, images);
  return input_walk_request(element_of(conv.dtype), part.at, part.size, part.stride,
                            parts_of(problem, tile));
}
// Of what lies as dx does: the walk of its positions.
TensorMapRequest end_request(const RfConvBnDgrad& problem, const Facts& tile, const Placed& tensor,
                             int64_t first, int64_t images) {
  const RfConvGradient& conv = problem.conv;
  const Part part = part_of(conv, conv.x_size[1], tensor, first, images);
  return output_walk_request(element_of(conv.dtype), part.at, part.size, part.stride, tile.pixels);
}
TensorMapRequest filters_request(const RfConvGradient& conv) {
  return taps_request(element_of(conv.dtype), conv.weight, conv.weight_size, conv.weight_stride,
                      kWindowChannels, kWarpgroupRows);
}

std::string map_fault(const char* name, const int64_t (&stride)[4],
                      const TensorMapRequest& request) {
  return named(name, stride[1] != 1 ? "its channels are not adjacent" : tensor_map_fault(request));
}

}  // namespace

const std::vector<BnDgradWindowEntry>& bn_dgrad_window_table() {
  static const std::vector<BnDgradWindowEntry> made = [] {
    std::vector<BnDgradWindowEntry> entries;
    for (int i = 0; i < BnDgradWindowTiles::kSize + BnDgradStreamTiles::kSize; ++i) {
      const Facts facts = facts_at(i);
      const WindowTileFacts tile{facts.pixels, kStepRowBytes, 1, facts.fixed_bytes,
                                 facts.filter_stages};
      entries.push_back({window_name(tile), window_configuration(tile)});
    }
    return entries;
  }();
  return made;
}

std::string bn_dgrad_window_fault(const RfConvBnDgrad& problem, int index, int64_t images) {
  const Facts tile = facts_at(index);
  const RfConvGradient& conv = problem.conv;
  const RfConvBnAct made = convolution_of(conv);
  const bool slices = tile.filter_stages > 0;
  std::string found = window_shape_fault(made, slices);
  if (slices && conv.groups == 1 && conv.weight_size[0] == kWindowChannels) {
    // What is said last is what a plan's reader is told: why windows of 64 filters are not taken.
    const std::string instead =
        bn_dgrad_window_fault(problem, BnDgradWindowTiles::kSize - 1, images);
    if (!instead.empty()) return instead;
  }
  if (found.empty() && !taps_are_one_run(conv)) found = kNoWindows;
  if (found.empty()) {
    found = window_width_fault(ends_of(problem) > 1 ? "addend and raw" : "dz", conv.x_size[3],
                               shared_bytes(problem, tile));
  }
  if (!found.empty()) return found;
  const auto check = [&](bool there, const char* name, const Placed& tensor, const auto& request) {
    if (!there || !found.empty()) return;
    found = map_fault(name, tensor.stride, request(problem, tile, tensor, 0, images));
  };
  check(true, "dz", {conv.dy, conv.dy_stride}, read_request);
  if (found.empty()) found = map_fault("weight", conv.weight_stride, filters_request(conv));
  if (found.empty()) found = window_out_fault(made, element_of(conv.dtype));
  check(problem.affine != 0, "y", {conv.y, conv.y_stride}, read_request);
  check(problem.added != 0, "addend", {problem.addend, problem.addend_stride}, end_request);
  check(problem.reduced != 0, "raw", {problem.raw, problem.raw_stride}, end_request);
  if (!found.empty()) return found;
  if (problem.added != 0 && problem.addend_step != 1) {
    return "addend: every " + std::to_string(problem.addend_step) +
           "-th pixel; windows are for every one";
  }
  if (problem.affine != 0 && reinterpret_cast<uintptr_t>(conv.scale) % kCoefficientBytes != 0) {
    return "coefficients: address is not a multiple of 16";
  }
  return "";
}

int64_t bn_dgrad_window_blocks(const RfConvBnDgrad& problem, int index, int64_t images,
                               const RfGpu& gpu) {
  const int64_t* size = problem.conv.x_size;
  const int64_t columns = size[1] / kWarpgroupRows;
  const int64_t of_column = std::max<int64_t>(1, gpu.multiprocessors / columns);
  const int64_t tiles = divide_up(walk_positions(images, size[2], size[3]), facts_at(index).pixels);
  return columns * std::min(of_column, tiles);
}

// The busiest multiprocessor's tiles. Of each: what memory, L2, shared memory, the tensor cores and
// the threads of either role have to do, which runs beside that of other tiles; or a window's own
// way, of which there are two at a time: it comes, its last part is turned, and it is multiplied.
// Filters in slices have a window each, and come with it.
double bn_dgrad_window_cost(const RfConvBnDgrad& problem, int index, const DgradWork& work,
                            int64_t images, const RfGpu& gpu) {
  const Facts tile = facts_at(index);
  const int64_t* size = problem.conv.x_size;
  const int64_t columns = size[1] / kWarpgroupRows;
  const int64_t blocks = bn_dgrad_window_blocks(problem, index, images, gpu);
  const int64_t tiles = divide_up(walk_positions(images, size[2], size[3]), tile.pixels);
  const auto each = static_cast<double>(divide_up(tiles, blocks / columns) *
                                        divide_up(blocks, gpu.multiprocessors));
  const WindowParts parts = parts_of(problem, tile);
  const auto rows = static_cast<double>(parts.rows * parts.count);
  const double row = kStepRowBytes;
  const double pixels = tile.pixels;
  const double area = pixels * kWarpgroupRows;
  const bool streams = tile.filter_stages > 0;
  const double slices =
      streams ? static_cast<double>(problem.conv.weight_size[0]) / kWindowChannels : 1;
  const double filters = streams ? kWindowFilters : 0;  // of a slice, that come with it
  const double operands = work.reads_y ? 2 : 1;
  const double ended = work.ends - 1;  // tensors that a tile reads at its end
  const double matrix = kWindowTaps * area * kStepElements / kWarpgroupUnit;
  const double read = kWindowTaps * (kWarpgroupRows + pixels) * row;
  const double loaded = operands * rows * row;
  const double turned = work.reads_y ? 3 * rows * row : 0;
  const double staged = pixels * row * (2 + 2 * ended);
  const double shared = (read + loaded + filters + turned + staged / slices) / kSharedBytes;
  const double turning = rows * kStepElements / 2 * work.turning / kTransformInstructionsACycle;
  const double results =
      area / kResults + area * work.finishing / kInstructions + pixels * row / kStoredBytes;
  const double cache = (loaded + filters + pixels * row * ended / slices) / kCacheBytes;
  const double memory = pixels * row * (slices * operands + work.ends) / kMemoryBytes;
  const double ready =
      kLatency + std::max(cache, turning) + turning / static_cast<double>(parts.count);
  const double slice = std::max({matrix, shared, turning, cache, (ready + matrix) / kConsumers});
  const double longest = std::max({slices * slice, results, memory});
  const double begun = streams ? ready : kWindowFilters / kSameLines;
  return each * (longest + kTurn) + results + begun + 2 * kLatency;
}

int run_conv_bn_dgrad_window(const RfConvBnDgrad& problem, const RfConvPlan& plan, void* workspace,
                             int64_t first, int64_t images, void* stream) {
  const int index = plan.configuration - kFirstBnDgradWindow;
  const Facts tile = facts_at(index);
  const RfConvGradient& conv = problem.conv;
  const RfConvConfiguration& entry = *rf_conv_bn_dgrad_configuration(plan.configuration);
  const BnDgradLayout layout = bn_dgrad_layout(problem, entry, plan.splits, plan.images_a_launch);
  BnDgradWindowArguments arguments{};
  ConvWindowArguments& window = arguments.window;
  window = window_arguments_but_maps(convolution_of(conv), element_of(conv.dtype), tile.pixels,
                                     parts_of(problem, tile), first, images);
  window.has_residual = problem.added != 0;
  int error = encode_tensor_map(filters_request(conv), &window.weight);
  const auto encode = [&](bool there, const Placed& tensor, const auto& request,
                          ptx::TensorMap* map) {
    if (!there || error != 0) return;
    error = encode_tensor_map(request(problem, tile, tensor, first, images), map);
  };
  encode(true, {conv.dy, conv.dy_stride}, read_request, &window.x);
  encode(problem.affine != 0, {conv.y, conv.y_stride}, read_request, &arguments.y);
  encode(problem.added != 0, {problem.addend, problem.addend_stride}, end_request,
         &window.residual);
  encode(problem.reduced != 0, {problem.raw, problem.raw_stride}, end_request, &arguments.raw);
  if (error != 0) return error;
  if (problem.affine != 0) arguments.coefficients = static_cast<const float*>(conv.scale);
  arguments.ends = ends_of(problem);
  arguments.slices = narrowed(conv.weight_size[0] / kWindowChannels);
  arguments.reduced = problem.reduced != 0;
  if (arguments.reduced) {
    window.scale = static_cast<const float*>(problem.norm);
    window.shift = window.scale + conv.x_size[1];
    arguments.mean = window.shift + conv.x_size[1];
  }
  arguments.reduction = gradient_reduction(problem, layout, plan, workspace, first);
  const ClearedCounters counters{workspace, first == 0 ? layout.counted : 0};
  const WindowGrid grid{narrowed(std::min(plan.blocks, int64_t{window.tiles} * window.columns)),
                        narrowed(shared_bytes(problem, tile))};
#if defined(RF_EMULATED) || defined(RF_WITH_SM90A)
  const bool half = static_cast<DataType>(conv.dtype) == DataType::kFloat16;
  if (tile.filter_stages > 0) {
    const auto launch =
        half ? launch_conv_bn_dgrad_stream_float16 : launch_conv_bn_dgrad_stream_bfloat16;
    return launch(arguments, counters, index - BnDgradWindowTiles::kSize, grid, stream);
  }
  const auto launch =
      half ? launch_conv_bn_dgrad_window_float16 : launch_conv_bn_dgrad_window_bfloat16;
  return launch(arguments, counters, index, grid, stream);
#else
  constexpr int kNoKernelImage = 209;  // cudaErrorNoKernelImageForDevice; the plan comes first
  return static_cast<void>(grid), static_cast<void>(stream), static_cast<void>(counters),
         kNoKernelImage;
#endif
}

}  // namespace resnet_fused
