// conv_bn_wgrad's window kernel for sm_90a: its configurations, from a problem to its tensor maps
// and arguments, its prediction, and its launch. None of the rates has been measured by this
// project on a GPU; only their proportions matter.
#include "conv_bn_wgrad_window.h"

#include <algorithm>
#include <vector>

#include "conv_gradient_arguments.h"
#include "conv_halo.h"
#include "conv_strides.h"
#include "step_transform.h"
#include "tensor_map.h"
#include "tma_request.h"
#include "wgrad_tma.h"
#include "window_request.h"

namespace resnet_fused {
namespace {

// Instructions that two elements of dy take until they are an operand: to be loaded with y's,
// widened, multiplied, added, packed, and cut off where there is no pixel.
constexpr double kTurnInstructions = 11;
// Likewise to find the place of 16 bytes of a window, beside their transformation.
constexpr double kPlaceInstructions = 4;

// Windows' bytes hang on the width of an image; at most they fill a block's shared memory.
const std::vector<WgradEntry>& table() {
  static const std::vector<WgradEntry> made = [] {
    std::vector<WgradEntry> entries;
    for (int i = 0; i < WgradWindowTiles::kSize; ++i) {
      WgradWindowTiles::with(i, [&]<class Shape>() {
        entries.push_back(wgrad_entry<Shape>("tma_win", kMostSharedBytes));
        entries.back().configuration.window = 1;
      });
    }
    return entries;
  }();
  return made;
}

int64_t positions_of(const RfConvConfiguration& tile) { return tile.step_bytes / kTmaElementBytes; }

// Of a block, for images so wide.
int64_t shared_bytes(const RfConvConfiguration& tile, int64_t width) {
  const WindowParts parts = window_parts(positions_of(tile), width);
  const int64_t rows = 2 * positions_of(tile) + parts.rows * parts.count;
  return kTileAlignment + tile.stages * rows * kStepRowBytes;
}

TensorMapRequest x_request(const RfConvGradient& problem, const RfConvConfiguration& tile) {
  return input_walk_request(element_of(problem.dtype), problem.x, problem.x_size, problem.x_stride,
                            window_parts(positions_of(tile), problem.x_size[3]));
}

// Of dz, or of y.
TensorMapRequest output_request(const RfConvGradient& problem, const RfConvConfiguration& tile,
                                const void* from, const int64_t (&stride)[4]) {
  const int64_t size[4] = {problem.x_size[0], problem.weight_size[0], problem.x_size[2],
                           problem.x_size[3]};
  return output_walk_request(element_of(problem.dtype), from, size, stride,
                             narrowed(positions_of(tile)));
}

// What is made for 3x3 filters that lie on every pixel.
std::string shape_fault(const RfConvGradient& problem, const RfConvConfiguration& tile) {
  if (static_cast<DataType>(problem.dtype) == DataType::kFloat32) return kNoTf32;
  const int64_t (&filters)[4] = problem.weight_size;
  if (!taps_are_one_run(problem)) return kNoWindows;
  if (problem.groups != 1 || filters[0] % kWarpgroupRows != 0 ||
      filters[1] % kWindowChannels != 0) {
    return "channels: windows are for multiples of " + std::to_string(kWindowChannels) +
           " in one group";
  }
  const Strides weight = used(filters, problem.weight_stride);
  if (weight.h != 3 * weight.w) return "weight: its rows of taps do not follow one another";
  const int64_t width = problem.x_size[3];
  const std::string found = window_width_fault("x", width, shared_bytes(tile, width));
  if (!found.empty()) return found;
  // Up to the end of the last window.
  if (wgrad_window_positions(problem) > kMost - 2 * positions_of(tile) - 2 * (width + 2)) {
    return "batch: more positions than a launch counts";
  }
  return "";
}

}  // namespace

const RfConvConfiguration* wgrad_window_configuration(int32_t index) {
  return configuration_at<table>(index);
}

int64_t wgrad_window_positions(const RfConvGradient& problem) {
  return walk_positions(problem.x_size[0], problem.x_size[2], problem.x_size[3]);
}

std::string wgrad_window_fault(const RfConvBnWgrad& problem, const RfConvConfiguration& tile) {
  const RfConvGradient& product = problem.product;
  std::string found = shape_fault(product, tile);
  if (found.empty() && problem.normed != 0 && !is_aligned(problem.norm)) {
    found = "norm: address is not a multiple of 16";
  }
  const auto check = [&](const char* name, const int64_t (&stride)[4],
                         const TensorMapRequest& request) {
    if (!found.empty()) return;
    found = stride[1] != 1 ? std::string(name) + ": its channels are not adjacent"
                           : named(name, tensor_map_fault(request));
  };
  if (!found.empty()) return found;
  check("x", product.x_stride, x_request(product, tile));
  check("dz", product.dy_stride, output_request(product, tile, product.dy, product.dy_stride));
  if (problem.affine == 0) return found;
  check("y", product.y_stride, output_request(product, tile, product.y, product.y_stride));
  return found;
}

// What a step brings comes beside the products of others. Both warpgroups make all of dy, and share
// the window's rows of nine taps.
double wgrad_window_cost(const RfConvBnWgrad& problem, const RfConvConfiguration& tile,
                         int64_t splits, const RfGpu& gpu) {
  const RfConvGradient& product = problem.product;
  const auto positions = static_cast<double>(positions_of(tile));
  const int64_t steps = divide_up(wgrad_window_positions(product), positions_of(tile));
  const int64_t tiles =
      product.weight_size[0] / tile.m * (product.weight_size[1] / kWindowChannels);
  const auto busy = static_cast<double>(divide_up(tiles * splits, gpu.multiprocessors));
  const WindowParts parts = window_parts(positions_of(tile), product.x_size[3]);
  const auto rows = static_cast<double>(parts.rows * parts.count);
  const double left = (problem.affine != 0 ? 2 : 1) * positions * kStepRowBytes;
  const double window = rows * kStepRowBytes;
  const double matrix = tile.m * tile.n * positions / kWarpgroupUnit;
  double turning = kConsumers * positions * tile.m / 2 *
                   (problem.affine != 0 ? kTurnInstructions : 1) / kInstructions;
  double shared = kConsumers * left + tile.n * positions * kTmaElementBytes + left + window;
  double transform = 0;
  if (problem.normed != 0) {
    const double units = window / kChunkBytes;
    const double instructions =
        units * (kChunkBytes / kTmaElementBytes * kTransformInstructions + kPlaceInstructions);
    turning += instructions / kInstructions;
    transform = instructions / kTransformInstructionsACycle;
    shared += 2 * window;
  }
  const double step = std::max({matrix, shared / kSharedBytes, turning, transform,
                                (left + window) / kCacheBytes, kLatency / (tile.stages - 1)});
  return busy * (static_cast<double>(divide_up(steps, splits)) * step + 2 * kLatency);
}

namespace {

// Everything but the maps.
BnWgradWindowArguments arguments_of(const RfConvBnWgrad& problem, const RfConvPlan& plan,
                                    const RfConvConfiguration& tile, void* workspace) {
  const RfConvGradient& gradient = problem.product;
  const int64_t (&size)[4] = gradient.x_size;
  const int64_t positions = wgrad_window_positions(gradient);
  const WindowParts parts = window_parts(positions_of(tile), size[3]);
  BnWgradWindowArguments made{};
  made.product = wgrad_product(gradient, plan, tile, workspace);
  WgradProduct& product = made.product;
  // A tile's columns: nine taps, which lie one behind the other, of 64 channels.
  const ColumnStrides weight = product.dweight_columns;
  product.columns = {kWindowChannels, kWindowTaps,
                     narrowed(gradient.weight_size[1] / kWindowChannels)};
  product.dweight_columns = {weight.c, weight.s, kWindowChannels * weight.c};
  product.channels_in = kWindowChannels;
  product.taps_s = kWindowTaps;
  product.steps = narrowed(divide_up(positions, positions_of(tile)));
  product.steps_each = narrowed(divide_up(product.steps, plan.splits));
  if (problem.affine != 0) made.coefficients = static_cast<const float*>(problem.coefficients);
  if (problem.normed != 0) {
    made.scale = static_cast<const float*>(problem.norm);
    made.shift = made.scale + size[1];
  }
  made.walk = {narrowed(positions), make_divisor(narrowed(size[3] + 1)),
               make_divisor(narrowed(size[2] + 1))};
  made.part_rows = narrowed(parts.rows);
  made.parts = narrowed(parts.count);
  made.filters = narrowed(gradient.weight_size[0]);
  made.float_dweight = static_cast<DataType>(problem.weight_dtype) == DataType::kFloat32;
  return made;
}

}  // namespace

int run_conv_bn_wgrad_window(const RfConvBnWgrad& problem, const RfConvPlan& plan,
                             const RfConvConfiguration& tile, int index, void* workspace,
                             void* stream) {
  const RfConvGradient& product = problem.product;
  BnWgradWindowArguments arguments = arguments_of(problem, plan, tile, workspace);
  int error = encode_tensor_map(x_request(product, tile), &arguments.x);
  const auto encode = [&](const void* from, const int64_t (&stride)[4], ptx::TensorMap* map) {
    if (error == 0) error = encode_tensor_map(output_request(product, tile, from, stride), map);
  };
  encode(product.dy, product.dy_stride, &arguments.dz);
  if (problem.affine != 0) encode(product.y, product.y_stride, &arguments.y);
  if (error != 0) return error;
  const int32_t bytes = narrowed(shared_bytes(tile, product.x_size[3]));
#if defined(RF_EMULATED) || defined(RF_WITH_SM90A)
  const bool half = static_cast<DataType>(product.dtype) == DataType::kFloat16;
  const auto launch =
      half ? launch_conv_bn_wgrad_window_float16 : launch_conv_bn_wgrad_window_bfloat16;
  return launch(arguments, index, bytes, stream);
#else
  return static_cast<void>(index), static_cast<void>(bytes), static_cast<void>(stream),
         kNoKernelImage;
#endif
}

}  // namespace resnet_fused
