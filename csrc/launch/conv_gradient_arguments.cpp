// Strides, phases and divisors of the gradients' launches.
#include "conv_gradient_arguments.h"

#include <algorithm>
#include <numeric>

#include "conv_strides.h"

namespace resnet_fused {
namespace {

struct GradientStrides {
  Strides dy;
  Strides y;
  Strides x;
  Strides weight;
};
GradientStrides strides_of(const RfConvGradient& problem) {
  const OutputSize size = output_size(problem);
  const int64_t shape[4] = {problem.x_size[0], problem.weight_size[0], size.p, size.q};
  return GradientStrides{used(shape, problem.dy_stride), used(shape, problem.y_stride),
                         used(problem.x_size, problem.x_stride),
                         used(problem.weight_size, problem.weight_stride)};
}

// Wide operands' offsets count 16 bytes in 31 bits; those of rows behind a reduction's end, at most
// kBeyond of its slowest digit further, are worked out too. Larger ones are read narrow.
constexpr int64_t kBeyond = 64;
bool in_reach(int64_t elements, int64_t bytes) {
  return elements < kChunkBytes / bytes * ((int64_t{1} << 31) - 1);
}

}  // namespace

bool dgrad_reads_wide(const RfConvGradient& problem, bool reads_y) {
  const int64_t bytes = bytes_of(problem.dtype);
  const int64_t filters = problem.weight_size[0] / problem.groups;
  const GradientStrides strides = strides_of(problem);
  const PhasedAxis axes[2] = {phased_axis(problem, 0), phased_axis(problem, 1)};
  const auto positions = [&](const PhasedAxis& axis) {
    return int64_t{axis.size} + axis.padding + (axis.taps + kBeyond) * axis.dilation;
  };
  const auto read = [&](const Strides& of) {
    return problem.x_size[0] * of.n + positions(axes[0]) * of.h + positions(axes[1]) * of.w;
  };
  const Strides& weight = strides.weight;
  const int64_t weights = filters * weight.n + weight.w * axes[1].taps * axes[1].tap_step +
                          weight.h * (axes[0].taps + kBeyond) * axes[0].tap_step;
  // The scales of a chunk are read 16 bytes at a time, too.
  return is_wide(problem.dy, strides.dy, filters, bytes) &&
         (!reads_y || is_wide(problem.y, strides.y, filters, bytes)) && is_aligned(problem.scale) &&
         is_wide(problem.weight, weight, problem.weight_size[1], bytes) &&
         in_reach(std::max({read(strides.dy), read(strides.y), weights}), bytes);
}

bool wgrad_reads_gradients_wide(const RfConvGradient& problem, bool reads_y) {
  const int64_t bytes = bytes_of(problem.dtype);
  const int64_t filters = problem.weight_size[0] / problem.groups;
  const GradientStrides strides = strides_of(problem);
  const OutputSize size = output_size(problem);
  const auto wide = [&](const void* data, const Strides& of) {
    const int64_t read = (problem.x_size[0] + kBeyond) * of.n + size.p * of.h + size.q * of.w;
    return is_wide(data, of, filters, bytes) && in_reach(read, bytes);
  };
  return wide(problem.dy, strides.dy) && (!reads_y || wide(problem.y, strides.y));
}

bool wgrad_reads_wide(const RfConvGradient& problem, bool reads_y) {
  const int64_t bytes = bytes_of(problem.dtype);
  const Strides x = strides_of(problem).x;
  const OutputSize size = output_size(problem);
  const int64_t read = (problem.x_size[0] + kBeyond) * x.n + size.p * problem.stride[0] * x.h +
                       size.q * problem.stride[1] * x.w;
  return wgrad_reads_gradients_wide(problem, reads_y) &&
         is_wide(problem.x, x, problem.weight_size[1], bytes) && in_reach(read, bytes);
}

PhaseSize phase_size(const RfConvGradient& problem) {
  return PhaseSize{divide_up(problem.x_size[2], problem.stride[0]),
                   divide_up(problem.x_size[3], problem.stride[1])};
}

PhasedAxis phased_axis(const RfConvGradient& problem, int dimension) {
  const int64_t stride = problem.stride[dimension];
  const int64_t dilation = problem.dilation[dimension];
  const int64_t common = std::gcd(stride, dilation);
  const OutputSize size = output_size(problem);
  return PhasedAxis{narrowed(problem.x_size[2 + dimension]),
                    narrowed(dimension == 0 ? size.p : size.q),
                    narrowed(stride),
                    narrowed(problem.padding[dimension]),
                    narrowed(dilation),
                    narrowed(problem.weight_size[2 + dimension]),
                    narrowed(stride / common),
                    narrowed(dilation / common)};
}

ConvDgradArguments conv_dgrad_arguments(const RfConvGradient& problem, const RfConvPlan& plan,
                                        const RfConvConfiguration& tile, void* workspace,
                                        int64_t first, int64_t images) {
  const int64_t bytes = bytes_of(problem.dtype);
  const GradientStrides strides = strides_of(problem);
  const PhaseSize phase = phase_size(problem);
  const int64_t pixels = images * phase.rows * phase.columns;
  const int64_t phases = problem.stride[0] * problem.stride[1];

  ConvDgradArguments arguments{};
  arguments.dy = moved(problem.dy, first * strides.dy.n * bytes);
  arguments.y = moved(problem.y, first * strides.y.n * bytes);
  arguments.weight = problem.weight;
  arguments.scale = static_cast<const float*>(problem.scale);
  arguments.dx = moved(problem.x, first * strides.x.n * bytes);
  arguments.h = phased_axis(problem, 0);
  arguments.w = phased_axis(problem, 1);
  const int64_t unit = tile.wide != 0 ? kChunkBytes / bytes : 1;
  const auto pixels_of = [&](const Strides& of) {
    return PixelStrides{of.n / unit, of.c, of.h / unit, of.w / unit};
  };
  const auto columns_of = [&](const Strides& of) {
    return ColumnStrides{of.c, -arguments.w.out_step * of.w / unit,
                         -arguments.h.out_step * of.h / unit};
  };
  arguments.dy_strides = pixels_of(strides.dy);
  arguments.y_strides = pixels_of(strides.y);
  arguments.dy_columns = columns_of(strides.dy);
  arguments.y_columns = columns_of(strides.y);
  arguments.dx_strides = strides.x.of_pixels();
  const Strides& filters = strides.weight;
  arguments.filter_taps = {filters.n, filters.w, filters.h};
  arguments.filter_columns = {filters.n / unit, arguments.w.tap_step * filters.w / unit,
                              arguments.h.tap_step * filters.h / unit};
  arguments.weight_c = filters.c;
  arguments.grid = {narrowed(pixels), make_divisor(narrowed(phase.columns)),
                    make_divisor(narrowed(phase.rows))};
  arguments.channels_in = narrowed(problem.weight_size[1]);
  arguments.channels_out = narrowed(problem.weight_size[0] / problem.groups);
  arguments.phases = narrowed(phases);
  arguments.tiles = {narrowed(divide_up(pixels, tile.m) * phases),
                     narrowed(divide_up(problem.weight_size[1], tile.n)), problem.groups,
                     plan.splits};
  const int64_t tiles = int64_t{arguments.tiles.tiles_m} * arguments.tiles.tiles_n * problem.groups;
  if (plan.splits > 1) {
    arguments.workspace.arrivals = static_cast<uint32_t*>(workspace);
    arguments.workspace.partial = static_cast<float*>(moved(workspace, arrival_bytes(tiles)));
  }
  arguments.wide_dx = is_wide(problem.x, strides.x, problem.weight_size[1], bytes);
  arguments.pixels_lie_together = strides.x.c > strides.x.w;
  return arguments;
}

int64_t wgrad_columns(const RfConvGradient& problem, const RfConvConfiguration& tile) {
  const bool boxes = tile.tma != 0 && tile.window == 0;
  const int64_t box = boxes ? tile.step_bytes / bytes_of(problem.dtype) : 1;
  return divide_up(problem.weight_size[1], box) * box * problem.weight_size[2] *
         problem.weight_size[3];
}

WgradProduct wgrad_product(const RfConvGradient& problem, const RfConvPlan& plan,
                           const RfConvConfiguration& tile, void* workspace) {
  const Strides weight = strides_of(problem).weight;
  const OutputSize size = output_size(problem);
  const int64_t pixels = problem.x_size[0] * size.p * size.q;
  const int64_t columns = wgrad_columns(problem, tile);
  const int64_t taps = problem.weight_size[2] * problem.weight_size[3];

  WgradProduct product{};
  product.scale = static_cast<const float*>(problem.scale);
  product.dweight = problem.weight;
  product.columns = {narrowed(columns / taps), narrowed(problem.weight_size[3]),
                     narrowed(problem.weight_size[2])};
  product.dweight_columns = {weight.c, weight.w, weight.h};
  product.dweight_k = weight.n;
  product.channels_in = narrowed(problem.weight_size[1]);
  product.taps_s = narrowed(problem.weight_size[3]);
  product.channels_out = narrowed(problem.weight_size[0] / problem.groups);
  product.columns_each = narrowed(columns);
  product.steps = narrowed(divide_up(pixels * bytes_of(problem.dtype), tile.step_bytes));
  product.steps_each = narrowed(divide_up(product.steps, plan.splits));
  product.tiles = {narrowed(divide_up(product.channels_out, tile.m)),
                   narrowed(divide_up(columns, tile.n)), problem.groups, plan.splits};
  product.partial = static_cast<float*>(workspace);
  return product;
}

ConvWgradArguments conv_wgrad_arguments(const RfConvGradient& problem, const RfConvPlan& plan,
                                        const RfConvConfiguration& tile, void* workspace) {
  const int64_t bytes = bytes_of(problem.dtype);
  const GradientStrides strides = strides_of(problem);
  const OutputSize size = output_size(problem);

  ConvWgradArguments arguments{};
  static_cast<WgradProduct&>(arguments) = wgrad_product(problem, plan, tile, workspace);
  arguments.dy = problem.dy;
  arguments.y = problem.y;
  arguments.x = problem.x;
  const int64_t unit = tile.wide != 0 ? kChunkBytes / bytes : 1;
  const auto pixels_of = [&](const Strides& of) {
    return ColumnStrides{of.w / unit, of.h / unit, of.n / unit};
  };
  arguments.dy_pixels = pixels_of(strides.dy);
  arguments.y_pixels = pixels_of(strides.y);
  arguments.dy_k = strides.dy.c;
  arguments.y_k = strides.y.c;
  arguments.x_pixels = {problem.stride[1] * strides.x.w / unit,
                        problem.stride[0] * strides.x.h / unit, strides.x.n / unit};
  arguments.x_taps = {strides.x.c, strides.x.w, strides.x.h};
  arguments.pixels = {narrowed(size.q), narrowed(size.p), narrowed(problem.x_size[0])};
  arguments.height = narrowed(problem.x_size[2]);
  arguments.width = narrowed(problem.x_size[3]);
  arguments.stride_h = narrowed(problem.stride[0]);
  arguments.stride_w = narrowed(problem.stride[1]);
  arguments.padding_h = narrowed(problem.padding[0]);
  arguments.padding_w = narrowed(problem.padding[1]);
  arguments.dilation_h = narrowed(problem.dilation[0]);
  arguments.dilation_w = narrowed(problem.dilation[1]);
  arguments.wide_dweight = is_wide(problem.weight, strides.weight, problem.weight_size[1], bytes);
  return arguments;
}

}  // namespace resnet_fused
