// conv_bn_grad1x1's configurations for sm_90a, what they do not take, how long they are predicted
// to take, and the way from a problem to a launch. None of the rates has been measured by this
// project on a GPU; only their proportions matter.
#include "conv_bn_grad1x1_tma.h"

#include <algorithm>

#include "conv_bn_grad1x1_requests.h"
#include "conv_bn_grad1x1_tma_tiles.h"
#include "conv_gradient_choice.h"

namespace resnet_fused {
namespace {

// Of one warpgroup: each of its warps has a scheduler, which it cannot use in every cycle.
constexpr double kOwnInstructions = kInstructions / 2;
// What a consumer waits for in a step, each about as long as a load from shared memory and a
// barrier: the step, dy, and the last store; of each 64 channels both products.
constexpr double kStepWaits = 3;
constexpr double kBlockWaits = 2;

template <class Get>
auto of_shape(int index, const Get& get) {
  return Grad1x1TmaTiles::with(index, get);
}

}  // namespace

TensorMapRequest grad1x1_pixels_request(const RfConvBnDgrad& image, const void* at,
                                        int64_t channels, const int64_t (&stride)[4], int32_t box) {
  const int64_t (&x)[4] = image.conv.x_size;
  const int64_t size[4] = {x[0], channels, x[2], x[3]};
  return rows_request(element_of(image.conv.dtype), at, channels, x[0] * x[2] * x[3],
                      pixel_step(size, stride).value_or(0), box);
}

Grad1x1Requests grad1x1_requests(const RfConvBnGrad1x1& problem, const RfConvConfiguration& tile) {
  const RfConvBnDgrad& image = problem.image;
  const RfConvGradient& conv = image.conv;
  const auto pixels = static_cast<int32_t>(tile.step_bytes / kTmaElementBytes);
  const int64_t filters = conv.weight_size[0], channels = conv.weight_size[1];
  const auto request = [&](const void* at, int64_t of, const int64_t (&stride)[4]) {
    return grad1x1_pixels_request(image, at, of, stride, pixels);
  };
  Grad1x1Requests made{};
  made.dz = request(conv.dy, filters, conv.dy_stride);
  made.x = request(image.raw, channels, image.raw_stride);
  made.dx = request(conv.x, channels, conv.x_stride);
  made.weight = rows_request(element_of(conv.dtype), conv.weight, channels, filters,
                             filters > 1 ? conv.weight_stride[0] : channels, tile.m);
  made.affine = image.affine != 0;
  if (made.affine) made.y = request(conv.y, filters, conv.y_stride);
  if (image.added != 0 && image.addend_step == 1) {
    made.addend = request(image.addend, channels, image.addend_stride);
    made.maps_addend = tensor_map_fault(made.addend).empty();
  }
  return made;
}

std::string grad1x1_tma_name(int index) {
  return of_shape(index, []<class Shape>() { return grad1x1_name_of<Shape>(); });
}

RfConvConfiguration grad1x1_tma_configuration(int index) {
  return of_shape(index, []<class Shape>() { return grad1x1_configuration_of<Shape>(); });
}

std::string grad1x1_requests_fault(const Grad1x1Requests& made, const char* input) {
  const struct {
    const char* name;
    const TensorMapRequest& request;
    bool read;
  } all[] = {{"dz", made.dz, true},
             {"y", made.y, made.affine},
             {input, made.x, true},
             {"the result", made.dx, true},
             {"weight", made.weight, true}};
  for (const auto& one : all) {
    const std::string found = one.read ? tensor_map_fault(one.request) : "";
    if (!found.empty()) return named(one.name, found);
  }
  return "";
}

std::string grad1x1_tma_fault(const RfConvBnGrad1x1& problem, int index) {
  return grad1x1_requests_fault(grad1x1_requests(problem, grad1x1_tma_configuration(index)), "x");
}

double grad1x1_tma_cost(const RfConvBnGrad1x1& problem, int index, int64_t parts,
                        const RfGpu& gpu) {
  const bool normed = problem.image.reduced != 0;
  // h and raw, and dx into the staging and out of it.
  const Grad1x1EndWork end{0, normed ? 4.0 : 3.0,
                           normed ? kNormInstructions + kReduceInstructions : 0.0};
  return grad1x1_tma_cycles(problem.image, grad1x1_tma_configuration(index), end, parts, gpu);
}

double grad1x1_tma_cycles(const RfConvBnDgrad& image, const RfConvConfiguration& tile,
                          const Grad1x1EndWork& end, int64_t parts, const RfGpu& gpu) {
  const auto pixels = static_cast<double>(tile.step_bytes / kTmaElementBytes);
  const int64_t all = image.conv.x_size[0] * image.conv.x_size[2] * image.conv.x_size[3];
  const int64_t columns = divide_up(image.conv.weight_size[1], int64_t{tile.n});
  const int64_t blocks = parts * columns;
  const auto busy = static_cast<double>(divide_up(blocks, int64_t{gpu.multiprocessors}));
  const auto steps = static_cast<double>(
      divide_up(divide_up(all * kTmaElementBytes, int64_t{tile.step_bytes}), parts));
  const bool affine = image.affine != 0;

  // Bytes of a step: of each operand above and below, as it lies in memory; of tiles.
  const double operand =
      static_cast<double>(image.conv.weight_size[0]) * tile.step_bytes * (affine ? 2 : 1);
  const double below = static_cast<double>(image.conv.weight_size[1]) * tile.step_bytes /
                       static_cast<double>(columns);
  const double thinned = static_cast<double>(image.addend_step) * image.addend_step;
  const double added = image.added != 0 ? below / thinned : 0;
  const double gradient = static_cast<double>(tile.m) * tile.step_bytes;
  const double input = static_cast<double>(tile.n) * tile.step_bytes;

  const double ends = end.tensors * below;
  const double memory =
      (operand / static_cast<double>(columns) + 2 * below + added + ends) / kMemoryBytes;
  const double cache = (operand + below + added + ends) / kCacheBytes;
  const double matrix = 2 * pixels * tile.m * tile.n / kWarpgroupUnit;
  // Of every 64 channels: the weights' rows and dy for dx, dy once more for the weights' gradient.
  const double channels = tile.n / static_cast<double>(kWarpgroupRows);
  const double multiplied = channels * (tile.m * kStepRowBytes + 2 * gradient);
  const double turned = affine ? 3 * gradient : 0;
  const double finished = input * end.moved + (image.added != 0 ? input : 0);
  const double products = multiplied / kSharedBytes;
  const double shared =
      (operand + below + added + ends + turned + finished) / kSharedBytes + products;

  const double instructions = pixels * (tile.m * (affine ? kBackwardInstructions : 0) +
                                        tile.n * (kEndInstructions + end.instructions));
  const double waits = (kStepWaits + kBlockWaits * channels) * kTurnLatency;
  const double own = instructions / kOwnInstructions + std::max(products, matrix) + waits;
  const double step = std::max({memory, cache, matrix, shared, instructions / kInstructions,
                                own / kConsumers, kLatency / tile.stages});
  const double filled = tile.m * tile.n * kTmaElementBytes / kCacheBytes + own + 2 * kLatency;
  return busy * (steps * step + filled) + left_and_merged(tile, static_cast<double>(blocks), gpu);
}

int encode_grad1x1(const Grad1x1Requests& made, Grad1x1TmaArguments* arguments) {
  const struct {
    const TensorMapRequest& request;
    ptx::TensorMap& map;
    bool read;
  } all[] = {{made.dz, arguments->dz, true}, {made.y, arguments->y, made.affine},
             {made.x, arguments->x, true},   {made.addend, arguments->addend, made.maps_addend},
             {made.dx, arguments->dx, true}, {made.weight, arguments->weight, true}};
  for (const auto& one : all) {
    const int error = one.read ? encode_tensor_map(one.request, &one.map) : 0;
    if (error != 0) return error;
  }
  arguments->maps_addend = made.maps_addend;
  return 0;
}

int run_conv_bn_grad1x1_tma(const RfConvBnGrad1x1& problem, const RfConvPlan& plan, void* workspace,
                            void* stream) {
  const int index = plan.configuration - kFirstGrad1x1Tma;
  const RfConvConfiguration tile = grad1x1_tma_configuration(index);
  Grad1x1TmaArguments arguments{};
  arguments.shared = conv_bn_grad1x1_arguments(problem, plan, tile, workspace);
  const int error = encode_grad1x1(grad1x1_requests(problem, tile), &arguments);
  if (error != 0) return error;
#if defined(RF_EMULATED) || defined(RF_WITH_SM90A)
  const bool half = static_cast<DataType>(problem.image.conv.dtype) == DataType::kFloat16;
  const auto launch =
      half ? launch_conv_bn_grad1x1_tma_float16 : launch_conv_bn_grad1x1_tma_bfloat16;
  return launch(arguments, index, stream);
#else
  constexpr int kNoKernelImage = 209;  // cudaErrorNoKernelImageForDevice; the plan comes first
  return static_cast<void>(stream), kNoKernelImage;
#endif
}

}  // namespace resnet_fused
