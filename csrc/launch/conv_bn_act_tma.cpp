// From a problem to the tensor maps and the arguments of conv_bn_act for sm_90a, and its launch.
#include "conv_bn_act_tma.h"

#include <algorithm>
#include <cstddef>
#include <limits>

#include "conv_strides.h"
#include "tensor_map.h"
#include "tma_request.h"

namespace resnet_fused {

// tools/_cuda_early.py knows what a kernel's parameters point to by these places.
static_assert(offsetof(ConvTmaArguments, x) == 0);
static_assert(offsetof(ConvTmaArguments, weight) == 128);
static_assert(offsetof(ConvTmaArguments, residual) == 256);
static_assert(offsetof(ConvTmaArguments, out) == 384);
static_assert(offsetof(ConvTmaArguments, scale) == 512);
static_assert(offsetof(ConvTmaArguments, shift) == 520);

bool tma_is_dense(const RfConvBnAct& problem) {
  const bool single = problem.weight_size[2] == 1 && problem.weight_size[3] == 1 &&
                      problem.stride[0] == 1 && problem.stride[1] == 1 && problem.padding[0] == 0 &&
                      problem.padding[1] == 0;
  return single && pixel_step(problem.x_size, problem.x_stride).has_value();
}

namespace {

TensorMapRequest x_request(const RfConvBnAct& problem, TensorElement element,
                           const TmaTileFacts& tile, const void* from, int64_t images) {
  const int64_t (&all)[4] = problem.x_size;
  if (tma_is_dense(problem)) {
    const int64_t pixel = *pixel_step(all, problem.x_stride, element_bytes(element));
    return rows_request(element, from, all[1], images * all[2] * all[3], pixel,
                        tile.pixels_asked());
  }
  const int64_t size[4] = {images, all[1], all[2], all[3]};
  TensorMapRequest request = images_request(element, from, size, problem.x_stride);
  request.pixels = tile.pixels_asked();
  for (int d = 0; d < 2; ++d) {  // W first
    const int64_t padding = problem.padding[1 - d];
    const int64_t reach = (problem.weight_size[3 - d] - 1) * problem.dilation[1 - d];
    request.steps[1 + d] = narrowed(problem.stride[1 - d]);
    request.lower[d] = narrowed(-padding);
    request.upper[d] = narrowed(padding - reach);
  }
  return request;
}

TensorMapRequest weight_request(const RfConvBnAct& problem, TensorElement element,
                                const TmaTileFacts& tile) {
  const int64_t (&size)[4] = problem.weight_size;
  const int64_t (&stride)[4] = problem.weight_stride;
  if (!tile.across) {
    return taps_request(element, problem.weight, size, stride, tile.filters_asked());
  }
  const int64_t lies[4] = {size[1] * problem.groups, size[0] / problem.groups, size[2], size[3]};
  const int64_t steps[4] = {stride[1], stride[0], stride[2], stride[3]};
  return taps_request(element, problem.weight, lies, steps, step_elements(element));
}

// Of out or the residual: groups are a dimension of their own, so that a box ends where its group
// does.
TensorMapRequest output_request(const RfConvBnAct& problem, TensorElement element,
                                const TmaTileFacts& tile, const void* at, int64_t pixel,
                                int64_t pixels) {
  TensorMapRequest request = boxes_request(element, at, tile.stored_channels);
  const int64_t channels = problem.weight_size[0] / problem.groups;
  request.rank = 3;
  request.sizes = {channels, problem.groups, pixels};
  request.strides = {stride_bytes(element, problem.groups, channels),
                     pixel * element_bytes(element)};
  request.box[1] = 1;
  request.box[2] = tile.stored_pixels;
  return request;
}

struct OutputShape {
  int64_t size[4];  // [N, K, P, Q]
};
OutputShape output_shape(const RfConvBnAct& problem) {
  const OutputSize size = output_size(problem);
  return {{problem.x_size[0], problem.weight_size[0], size.p, size.q}};
}

int64_t pixels_of(const RfConvBnAct& problem, int64_t images) {
  const OutputSize size = output_size(problem);
  return images * size.p * size.q;
}

}  // namespace

// What the tensor maps' rules do not cover.
std::string tma_shape_fault(const RfConvBnAct& problem, const TmaTypes& types) {
  if (types.operands == TensorElement::kFloat32) return kNoTf32;
  const int64_t channels = problem.weight_size[1];
  const int32_t step = step_elements(types.operands);
  if (problem.groups > 1 && channels % step != 0) {
    return "groups: " + std::to_string(channels) + " channels of each; a multiple of " +
           std::to_string(step) + " is accepted";
  }
  return tma_taps_fault(problem);
}

std::string tma_weight_fault(const RfConvBnAct& problem, TensorElement element,
                             const TmaTileFacts& tile) {
  const TensorMapRequest request = weight_request(problem, element, tile);
  if (request.sizes[0] > 1 && problem.weight_stride[tile.across ? 0 : 1] != 1) {
    return "weight: its channels are not adjacent";
  }
  return named("weight", tensor_map_fault(request));
}

TmaTypes tma_types(const RfConvBnAct& problem) {
  const TensorElement element = element_of(problem.dtype);
  return {element, element, element};
}

std::string tma_output_fault(const char* name, const RfConvBnAct& problem, TensorElement element,
                             const TmaTileFacts& tile, const void* at, const int64_t (&stride)[4],
                             int64_t images) {
  const OutputShape shape = output_shape(problem);
  if (shape.size[1] > 1 && stride[1] != 1) return named(name, "its channels are not adjacent");
  const auto pixel = pixel_step(shape.size, stride, element_bytes(element));
  if (!pixel) return named(name, "its pixels do not lie one behind the other");
  return named(name, tensor_map_fault(output_request(problem, element, tile, at, *pixel,
                                                     pixels_of(problem, images))));
}

std::string tma_taps_fault(const RfConvBnAct& problem) {
  for (int d = 0; d < 2; ++d) {
    // Corners of im2col have 8 bits, offsets too; before they are narrowed.
    const int64_t reach = (problem.weight_size[2 + d] - 1) * problem.dilation[d];
    if (reach > 255) return "dilation: taps " + std::to_string(reach) + " pixels apart; up to 255";
    if (problem.padding[d] > 128) {
      return "padding: " + std::to_string(problem.padding[d]) + "; up to 128 is accepted";
    }
    if (problem.stride[d] > 8) {
      return "stride: " + std::to_string(problem.stride[d]) + "; up to 8 is accepted";
    }
  }
  return "";
}

std::string tma_pixels_fault(const RfConvBnAct& problem, TensorElement element,
                             const TmaTileFacts& tile, int64_t images, const char* pixels) {
  if (problem.x_size[1] > 1 && problem.x_stride[1] != 1) {
    return named(pixels, "its channels are not adjacent");
  }
  return named(pixels, tensor_map_fault(x_request(problem, element, tile, problem.x, images)));
}

std::string tma_fault(const RfConvBnAct& problem, const TmaTypes& types, const TmaTileFacts& tile,
                      int64_t images) {
  std::string found = tma_shape_fault(problem, types);
  if (!found.empty()) return found;
  found = tma_pixels_fault(problem, types.operands, tile, images, "x");
  if (!found.empty()) return found;
  found = tma_weight_fault(problem, types.operands, tile);
  if (!found.empty()) return found;
  found =
      tma_output_fault("out", problem, types.out, tile, problem.out, problem.out_stride, images);
  if (!found.empty() || problem.residual == nullptr) return found;
  return tma_output_fault("residual", problem, types.residual, tile, problem.residual,
                          problem.residual_stride, images);
}

namespace {

// Everything but the maps and what depends on the number of pixels.
ConvTmaArguments arguments_of(const RfConvBnAct& problem, const TmaTypes& types) {
  ConvTmaArguments made{};
  made.scale = static_cast<const float*>(problem.scale);
  made.shift = static_cast<const float*>(problem.shift);
  made.reduction = {narrowed(problem.weight_size[1]), narrowed(problem.weight_size[3]),
                    narrowed(problem.weight_size[2])};
  made.steps = narrowed(divide_up(problem.weight_size[1], step_elements(types.operands)) *
                        problem.weight_size[2] * problem.weight_size[3]);
  made.channels = narrowed(problem.weight_size[0] / problem.groups);
  made.stride_h = narrowed(problem.stride[0]);
  made.stride_w = narrowed(problem.stride[1]);
  made.origin_h = narrowed(-problem.padding[0]);
  made.origin_w = narrowed(-problem.padding[1]);
  made.step_h = narrowed(problem.dilation[0]);
  made.step_w = narrowed(problem.dilation[1]);
  made.floor = problem.relu != 0 ? 0.0f : -std::numeric_limits<float>::infinity();
  made.residual_factor = 1.0f;
  made.out_factor = 1.0f;
  made.dense = tma_is_dense(problem);
  made.has_residual = problem.residual != nullptr;
  made.reverse = problem.reverse != 0;
  made.dependent = problem.flow.dependent != 0;
  made.follows = problem.flow.follows != 0;
  return made;
}

}  // namespace

int encode_tma_pixels(const RfConvBnAct& problem, TensorElement element, const TmaTileFacts& tile,
                      int64_t first, int64_t images, ptx::TensorMap* map) {
  const void* x = image_at(element, problem.x, problem.x_size[0], problem.x_stride[0], first);
  return encode_tensor_map(x_request(problem, element, tile, x, images), map);
}

int encode_tma_output(const RfConvBnAct& problem, TensorElement element, const TmaTileFacts& tile,
                      const void* at, const int64_t (&stride)[4], int64_t first, int64_t images,
                      ptx::TensorMap* map) {
  const OutputShape shape = output_shape(problem);
  const void* from = image_at(element, at, problem.x_size[0], stride[0], first);
  const int64_t pixel = *pixel_step(shape.size, stride, element_bytes(element));
  return encode_tensor_map(
      output_request(problem, element, tile, from, pixel, pixels_of(problem, images)), map);
}

int tma_common_arguments(const RfConvBnAct& problem, const TmaTypes& types,
                         const TmaTileFacts& tile, ConvTmaArguments* made) {
  *made = arguments_of(problem, types);
  return encode_tensor_map(weight_request(problem, types.operands, tile), &made->weight);
}

void tma_set_pixels(const RfConvBnAct& problem, const TmaTileFacts& tile, int64_t images,
                    const OutputSize& size, ConvTmaArguments* made) {
  const int64_t pixels = images * size.p * size.q;
  const int64_t of_group =
      divide_up(problem.weight_size[0] / problem.groups, tile.channels * tile.pixel_sharing);
  made->grid = {narrowed(pixels), make_divisor(narrowed(size.q)), make_divisor(narrowed(size.p))};
  made->tiles = {narrowed(tma_tiles(problem, tile, pixels)),
                 make_divisor(narrowed(of_group * problem.groups)),
                 make_divisor(narrowed(of_group))};
}

int tma_arguments(const RfConvBnAct& problem, const TmaTypes& types, const TmaTileFacts& tile,
                  int64_t first, int64_t images, ConvTmaArguments* made) {
  ConvTmaArguments& arguments = *made;
  int error = tma_common_arguments(problem, types, tile, made);
  tma_set_pixels(problem, tile, images, output_size(problem), made);
  if (error == 0) {
    error = encode_tma_pixels(problem, types.operands, tile, first, images, &arguments.x);
  }
  if (error == 0) {
    error = encode_tma_output(problem, types.out, tile, problem.out, problem.out_stride, first,
                              images, &arguments.out);
  }
  if (error == 0 && arguments.has_residual) {
    error = encode_tma_output(problem, types.residual, tile, problem.residual,
                              problem.residual_stride, first, images, &arguments.residual);
  }
  return error;
}

int32_t tma_blocks(const ConvTmaArguments& arguments, const TmaTileFacts& tile,
                   const RfConvPlan& plan) {
  return narrowed(std::min(int64_t{arguments.tiles.count} * tile.sharing, plan.blocks));
}

int run_conv_bn_act_tma(const RfConvBnAct& problem, const RfConvPlan& plan, int64_t first,
                        int64_t images, void* stream) {
  const int index = plan.configuration - kFirstTma;
  ConvTmaArguments arguments;
  const TmaTileFacts tile = tma_tile(index);
  const int error = tma_arguments(problem, tma_types(problem), tile, first, images, &arguments);
  if (error != 0) return error;
  const int32_t blocks = tma_blocks(arguments, tile, plan);
#if defined(RF_EMULATED) || defined(RF_WITH_SM90A)
  const bool half = static_cast<DataType>(problem.dtype) == DataType::kFloat16;
  const auto launch = half ? launch_conv_bn_act_tma_float16 : launch_conv_bn_act_tma_bfloat16;
  return launch(arguments, index, blocks, stream);
#else
  constexpr int kNoKernelImage = 209;  // cudaErrorNoKernelImageForDevice; the plan comes first
  return static_cast<void>(blocks), static_cast<void>(stream), kNoKernelImage;
#endif
}

}  // namespace resnet_fused
