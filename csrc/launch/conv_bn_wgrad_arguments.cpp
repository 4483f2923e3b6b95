// What conv_bn_wgrad's kernels are told beside conv_wgrad's operands, and their launch.
#include "conv_bn_wgrad_arguments.h"

#include "conv_bn_wgrad_tiles.h"
#include "conv_bn_wgrad_window.h"
#include "conv_image.h"
#include "conv_strides.h"

namespace resnet_fused {
namespace {

// Rows of steps, and columns of the taps that the image's rows have in shared memory.
void count_by_rows(ConvBnWgradArguments& arguments, const RfConvGradient& problem, int64_t splits) {
  ConvWgradArguments& product = arguments.product;
  arguments.out_width = product.pixels.channels;
  const int64_t row = image_pixels(product.pixels.channels);
  product.pixels.channels = narrowed(row);
  const int64_t steps = problem.x_size[0] * product.pixels.taps_s * (row / kImagePixels);
  product.steps = narrowed(steps);
  product.steps_each = narrowed(divide_up(steps, splits));
  product.columns = {kImageChannels, kImageTaps, product.columns.taps_r};
  product.columns_each = kImageChannels * kImageTaps * product.columns.taps_r;
  product.tiles.tiles_n = 1;
  product.x_pixels.r = problem.x_stride[0];  // elements
}

// Columns of 16 channels, all nine taps of them, and the next 16.
void count_by_slices(WgradProduct& product) {
  const int64_t c = product.dweight_columns.c;
  product.columns = {kHaloSlice, kHaloTaps, product.columns.channels / kHaloSlice};
  product.dweight_columns = {c, product.dweight_columns.s, kHaloSlice * c};
  product.taps_s = kHaloTaps;
}

}  // namespace

const char* wgrad_image_fault(const RfConvBnWgrad& problem) {
  const RfConvGradient& product = problem.product;
  const char* fault = image_fault(product, problem.normed != 0);
  if (fault != nullptr) return fault;
  if (!wgrad_reads_gradients_wide(product, problem.affine != 0) ||
      !is_aligned(problem.coefficients)) {
    return "its gradients cannot be read 16 bytes at a time";
  }
  return nullptr;
}

bool bn_wgrad_reads_wide(const RfConvBnWgrad& problem) {
  return wgrad_reads_wide(problem.product, problem.affine != 0) &&
         is_aligned(problem.coefficients) && is_aligned(problem.norm);
}

bool bn_wgrad_goes_by_slices(const RfConvGradient& problem) {
  const Strides weight = used(problem.weight_size, problem.weight_stride);
  return problem.weight_size[1] % kHaloSlice == 0 && weight.h == kHaloSide * weight.w;
}

ConvBnWgradArguments conv_bn_wgrad_arguments(const RfConvBnWgrad& problem, const RfConvPlan& plan,
                                             void* workspace) {
  const RfConvGradient& product = problem.product;
  const RfConvConfiguration& tile = *rf_conv_bn_wgrad_configuration(plan.configuration);
  ConvBnWgradArguments arguments{};
  arguments.product = conv_wgrad_arguments(product, plan, tile, workspace);
  if (problem.affine != 0) arguments.coefficients = static_cast<const float*>(problem.coefficients);
  if (problem.normed != 0) arguments.norm = static_cast<const float*>(problem.norm);
  arguments.filters = narrowed(product.weight_size[0]);
  arguments.channels = narrowed(product.x_size[1]);
  if (tile.image != 0) count_by_rows(arguments, product, plan.splits);
  if (tile.window != 0) count_by_slices(arguments.product);
  arguments.float_dweight = static_cast<DataType>(problem.weight_dtype) == DataType::kFloat32;
  return arguments;
}

namespace {

constexpr int kFirstWgradTma =
    BnWgradWideTiles::kSize + BnWgradNarrowTiles::kSize + BnWgradImageTiles::kSize;

int run_by_tma(const RfConvBnWgrad& problem, const RfConvPlan& plan,
               const RfConvConfiguration& tile, void* workspace, void* stream) {
  const RfConvGradient& product = problem.product;
  ConvBnWgradTmaArguments arguments{};
  const int error =
      wgrad_tma_arguments(product, problem.affine != 0, plan, tile, workspace, &arguments.wgrad);
  if (error != 0) return error;
  if (problem.affine != 0) arguments.coefficients = static_cast<const float*>(problem.coefficients);
  arguments.filters = narrowed(product.weight_size[0]);
  if (problem.normed != 0) {
    const auto* scale = static_cast<const float*>(problem.norm);
    arguments.norm = {scale, scale + product.x_size[1], narrowed(product.x_size[2]),
                      narrowed(product.x_size[3])};
  }
  arguments.float_dweight = static_cast<DataType>(problem.weight_dtype) == DataType::kFloat32;
#if defined(RF_EMULATED) || defined(RF_WITH_SM90A)
  const bool half = static_cast<DataType>(product.dtype) == DataType::kFloat16;
  const auto launch = half ? launch_conv_bn_wgrad_tma_float16 : launch_conv_bn_wgrad_tma_bfloat16;
  return launch(arguments, plan.configuration - kFirstWgradTma, stream);
#else
  return static_cast<void>(stream), kNoKernelImage;
#endif
}

}  // namespace
}  // namespace resnet_fused

extern "C" int rf_conv_bn_wgrad_cuda(const RfConvBnWgrad* problem, const RfConvPlan* plan,
                                     void* workspace, void* stream) {
  using namespace resnet_fused;
  if (plan->launches == 0) return 0;
  const RfConvConfiguration& tile = *rf_conv_bn_wgrad_configuration(plan->configuration);
  if (tile.tma != 0 && tile.window != 0) {
    const int index = plan->configuration - kFirstWgradTma - wgrad_tma_configurations();
    return run_conv_bn_wgrad_window(*problem, *plan, tile, index, workspace, stream);
  }
  if (tile.tma != 0) return run_by_tma(*problem, *plan, tile, workspace, stream);
  constexpr Launches<ConvBnWgradArguments> kLaunches{
      launch_conv_bn_wgrad_bfloat16, launch_conv_bn_wgrad_float16, launch_conv_bn_wgrad_float32};
  return kLaunches(problem->product.dtype, conv_bn_wgrad_arguments(*problem, *plan, workspace),
                   plan->configuration, stream);
}
