// How the operands of conv_bn_grad1x1 lie, what its blocks leave, and the launch.
#include "conv_bn_grad1x1_arguments.h"

#include "conv_bn_grad1x1_tma.h"
#include "conv_strides.h"
#include "pixel_rows.h"

namespace resnet_fused {
namespace {

constexpr int64_t kBytes = 2;  // of an element

// Of dz and y.
void output_shape(const RfConvGradient& conv, int64_t (&size)[4]) {
  size[0] = conv.x_size[0];
  size[1] = conv.weight_size[0];
  size[2] = conv.x_size[2];
  size[3] = conv.x_size[3];
}

void addend_shape(const RfConvBnDgrad& image, int64_t (&size)[4]) {
  size[0] = image.conv.x_size[0];
  size[1] = image.conv.x_size[1];
  size[2] = divide_up(image.conv.x_size[2], image.addend_step);
  size[3] = divide_up(image.conv.x_size[3], image.addend_step);
}

}  // namespace

const char* askew(const RfConvBnGrad1x1& problem) {
  const RfConvBnDgrad& image = problem.image;
  const RfConvGradient& conv = image.conv;
  int64_t above[4];
  output_shape(conv, above);
  const PixelRows always[] = {{"dz", conv.dy, above, conv.dy_stride},
                              {"x", image.raw, conv.x_size, image.raw_stride},
                              {"the result", conv.x, conv.x_size, conv.x_stride}};
  for (const PixelRows& rows : always) {
    if (!rows.readable(kBytes)) return rows.name;
  }
  if (image.affine != 0 && !PixelRows{"y", conv.y, above, conv.y_stride}.readable(kBytes))
    return "y";
  const Strides weight = used(conv.weight_size, conv.weight_stride);
  if (!is_wide(conv.weight, weight, conv.weight_size[1], kBytes)) return "weight";
  if (image.added != 0) {
    int64_t size[4];
    addend_shape(image, size);
    if (!is_wide(image.addend, used(size, image.addend_stride), size[1], kBytes)) return "addend";
  }
  if (image.affine != 0 && !is_aligned(conv.scale)) return "coefficients";
  if (image.reduced != 0 && !is_aligned(image.norm)) return "norm";
  return nullptr;
}

bool in_pixel_rows(const void* at, const int64_t (&size)[4], const int64_t (&stride)[4]) {
  return PixelRows{"", at, size, stride}.readable(kBytes);
}

int64_t grad1x1_workspace(const RfConvBnGrad1x1& problem, int64_t parts) {
  const RfConvGradient& conv = problem.image.conv;
  const int64_t rows = conv.weight_size[0] + (problem.image.reduced != 0 ? 2 : 0);
  return parts * rows * conv.weight_size[1] * int64_t{sizeof(float)};
}

Grad1x1Arguments conv_bn_grad1x1_arguments(const RfConvBnGrad1x1& problem, const RfConvPlan& plan,
                                           const RfConvConfiguration& tile, void* workspace) {
  const RfConvBnDgrad& image = problem.image;
  const RfConvGradient& conv = image.conv;
  const int64_t filters = conv.weight_size[0];
  const int64_t channels = conv.weight_size[1];
  const int64_t pixels = conv.x_size[0] * conv.x_size[2] * conv.x_size[3];
  const int64_t steps = divide_up(pixels * kBytes, tile.step_bytes);
  int64_t above[4];
  output_shape(conv, above);

  Grad1x1Arguments arguments{};
  arguments.dz = conv.dy;
  arguments.x = image.raw;
  arguments.weight = conv.weight;
  arguments.dx = conv.x;
  arguments.dweight = problem.dweight;
  arguments.grid = {narrowed(pixels), make_divisor(narrowed(conv.x_size[3])),
                    make_divisor(narrowed(conv.x_size[2]))};
  arguments.dz_pixel = pixel_step(above, conv.dy_stride);
  arguments.x_pixel = pixel_step(conv.x_size, image.raw_stride);
  arguments.dx_pixel = pixel_step(conv.x_size, conv.x_stride);
  arguments.weight_k = used(conv.weight_size, conv.weight_stride).n;
  const Strides dweight = used(conv.weight_size, problem.dweight_stride);
  arguments.dweight_k = dweight.n;
  arguments.dweight_c = dweight.c;
  arguments.filters = narrowed(filters);
  arguments.channels = narrowed(channels);
  arguments.columns = narrowed(divide_up(channels, tile.n));
  arguments.parts = plan.splits;
  arguments.steps_each = narrowed(divide_up(steps, plan.splits));
  arguments.float_dweight = static_cast<DataType>(problem.dweight_dtype) == DataType::kFloat32;
  arguments.partial = static_cast<float*>(workspace);
  if (image.affine != 0) {
    arguments.y = conv.y;
    arguments.y_pixel = pixel_step(above, conv.y_stride);
    arguments.coefficients = static_cast<const float*>(conv.scale);
  }
  if (image.reduced != 0) {
    arguments.sum_rows = 2;
    arguments.norm = static_cast<const float*>(image.norm);
    arguments.sums = static_cast<float*>(image.sums);
    arguments.partial_sums = arguments.partial + plan.splits * filters * channels;
  }
  if (image.added != 0) {
    int64_t size[4];
    addend_shape(image, size);
    arguments.addend = image.addend;
    arguments.addend_strides = used(size, image.addend_stride).of_pixels();
    arguments.addend_step = make_divisor(narrowed(image.addend_step));
  }
  return arguments;
}

}  // namespace resnet_fused

extern "C" int rf_conv_bn_grad1x1_cuda(const RfConvBnGrad1x1* problem, const RfConvPlan* plan,
                                       void* workspace, void* stream) {
  using namespace resnet_fused;
  if (plan->launches == 0) return 0;
  if (rf_conv_bn_grad1x1_configuration(plan->configuration)->tma != 0) {
    return run_conv_bn_grad1x1_tma(*problem, *plan, workspace, stream);
  }
  const auto launch = static_cast<DataType>(problem->image.conv.dtype) == DataType::kFloat16
                          ? launch_conv_bn_grad1x1_float16
                          : launch_conv_bn_grad1x1_bfloat16;
  const RfConvConfiguration& tile = *rf_conv_bn_grad1x1_configuration(plan->configuration);
  return launch(conv_bn_grad1x1_arguments(*problem, *plan, tile, workspace), plan->configuration,
                stream);
}
