// What the kernels of a forward convolution read: strides, origins and divisors.
#include "conv_bn_act_arguments.h"
#include "conv_strides.h"

namespace resnet_fused {

int64_t images_in_reach(const RfConvBnAct& problem) {
  constexpr int64_t kReach = (int64_t{1} << 31) - 1;
  const int64_t unit = kChunkBytes / bytes_of(problem.dtype);
  const Strides x = used(problem.x_size, problem.x_stride);
  const Strides weight = used(problem.weight_size, problem.weight_stride);
  // Offsets are worked out for taps that do not exist, too: a step beyond a filter's end.
  const int64_t taps_r = problem.weight_size[2] + 32;
  const int64_t taps_s = problem.weight_size[3];
  if ((problem.weight_size[0] * weight.n + taps_r * weight.h + taps_s * weight.w) / unit > kReach) {
    return 0;
  }
  const int64_t beyond =
      (problem.x_size[2] + problem.padding[0] + taps_r * problem.dilation[0]) * x.h +
      (problem.x_size[3] + problem.padding[1] + taps_s * problem.dilation[1]) * x.w;
  const int64_t left = kReach * unit - beyond;
  if (left < 0) return 0;
  return x.n == 0 ? problem.x_size[0] : 1 + left / x.n;
}

bool reads_wide(const RfConvBnAct& problem) {
  const int64_t bytes = bytes_of(problem.dtype);
  const int64_t channels = problem.weight_size[1];
  return is_wide(problem.x, used(problem.x_size, problem.x_stride), channels, bytes) &&
         is_wide(problem.weight, used(problem.weight_size, problem.weight_stride), channels, bytes);
}

namespace {

// unit: elements that a stride counts.
ImageGather image_gather(const RfConvBnAct& problem, const Strides& x, int64_t unit) {
  ImageGather image{};
  image.height = narrowed(problem.x_size[2]);
  image.width = narrowed(problem.x_size[3]);
  image.stride_h = narrowed(problem.stride[0]);
  image.stride_w = narrowed(problem.stride[1]);
  image.origin_h = narrowed(-problem.padding[0]);
  image.origin_w = narrowed(-problem.padding[1]);
  image.step_h = narrowed(problem.dilation[0]);
  image.step_w = narrowed(problem.dilation[1]);
  image.group_stride = problem.weight_size[1] * x.c;
  image.image_stride = x.n / unit;
  image.row_stride = x.h / unit;
  image.pixel_stride = x.w / unit;
  image.columns = {x.c, problem.dilation[1] * x.w / unit, problem.dilation[0] * x.h / unit};
  return image;
}

}  // namespace

ConvOperands conv_operands(const RfConvBnAct& problem, bool wide, int64_t first, int64_t images) {
  const int64_t bytes = bytes_of(problem.dtype);
  const OutputSize size = output_size(problem);
  const Strides x = used(problem.x_size, problem.x_stride);
  const Strides weight = used(problem.weight_size, problem.weight_stride);
  const int64_t stride_unit = wide ? kChunkBytes / bytes : 1;
  ConvOperands operands{};
  operands.x = moved(problem.x, first * x.n * bytes);
  operands.weight = problem.weight;
  operands.image = image_gather(problem, x, stride_unit);
  operands.filter_columns = {weight.c, weight.w / stride_unit, weight.h / stride_unit};
  operands.filter_stride = weight.n / stride_unit;
  operands.filters = narrowed(problem.weight_size[0] / problem.groups);
  operands.grid = {narrowed(images * size.p * size.q), make_divisor(narrowed(size.q)),
                   make_divisor(narrowed(size.p))};
  operands.reduction = {narrowed(problem.weight_size[1]), narrowed(problem.weight_size[3]),
                        narrowed(problem.weight_size[2])};
  const int32_t unit = narrowed((wide ? kChunkBytes : kNarrowBytes) / bytes);
  operands.advance = column_of(kLoadLanes * unit, operands.reduction);
  operands.next = column_of(1, operands.reduction);
  return operands;
}

}  // namespace resnet_fused
