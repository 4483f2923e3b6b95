// The table of configurations of a weight's gradient for sm_90a, what they do not take, how long
// they are predicted to take, and the way from a problem to a launch. None of the rates has been
// measured by this project on a GPU; only their proportions matter.
#include "wgrad_tma.h"

#include <algorithm>
#include <vector>

#include "conv_bn_act_tma.h"
#include "tma_request.h"
#include "wgrad_tma_tiles.h"

namespace resnet_fused {

namespace {

// Instructions that two elements of dy take until they are an operand: to be loaded with y's and
// widened, and to be compared and cut off, or multiplied, added and packed.
constexpr double kTurnInstructions = 10;
// Cycles from dy's last reader in a block until the others know: a fence of the whole GPU, of the
// one thread that passes it on, which is a way to L2 and back, and the arrival.
constexpr double kPassing = kLatency + kClusterMeeting;

const std::vector<WgradEntry>& table() {
  static const std::vector<WgradEntry> made = [] {
    std::vector<WgradEntry> entries;
    for (int i = 0; i < WgradTmaTiles::kSize; ++i) {
      WgradTmaTiles::with(i, [&]<class Shape>() {
        entries.push_back(wgrad_entry<Shape>("tma_", Shape::kSharedBytes));
        const auto share = [&](int32_t blocks, const char* what) {
          if (blocks > 1) entries.back().name += "_" + std::to_string(blocks) + what;
        };
        share(Shape::kLeftSharing, "d");
        share(Shape::kRightSharing, "x");
      });
    }
    return entries;
  }();
  return made;
}

// What is asked of TMA: 64 pixels a request, of one tap of x.
constexpr TmaTileFacts kBoxes = [] {
  TmaTileFacts facts{};
  facts.pixels = kStepElements;
  return facts;
}();

// The convolution that reads x; and one of a single tap, that reads `from` as it lies, of the
// output's shape.
RfConvBnAct reading_x(const RfConvGradient& problem) {
  RfConvBnAct made{};
  made.x = problem.x;
  made.dtype = problem.dtype;
  made.groups = problem.groups;
  std::copy_n(problem.x_size, 4, made.x_size);
  std::copy_n(problem.weight_size, 4, made.weight_size);
  std::copy_n(problem.x_stride, 4, made.x_stride);
  std::copy_n(problem.stride, 2, made.stride);
  std::copy_n(problem.padding, 2, made.padding);
  std::copy_n(problem.dilation, 2, made.dilation);
  return made;
}
RfConvBnAct reading_output(const RfConvGradient& problem, const void* from,
                           const int64_t (&strides)[4]) {
  const OutputSize size = output_size(problem);
  const int64_t sizes[2][4] = {{problem.x_size[0], problem.weight_size[0], size.p, size.q},
                               {1, problem.weight_size[0], 1, 1}};
  RfConvBnAct made{};
  made.x = from;
  made.dtype = problem.dtype;
  made.groups = 1;
  std::copy_n(sizes[0], 4, made.x_size);
  std::copy_n(sizes[1], 4, made.weight_size);
  std::copy_n(strides, 4, made.x_stride);
  for (int d = 0; d < 2; ++d) made.stride[d] = made.dilation[d] = 1;
  return made;
}

}  // namespace

int32_t wgrad_tma_configurations() { return WgradTmaTiles::kSize; }
const RfConvConfiguration* wgrad_tma_configuration(int32_t index) {
  return configuration_at<table>(index);
}
WgradSharing wgrad_tma_sharing(int32_t index) {
  return WgradTmaTiles::with(
      index, []<class Shape>() { return WgradSharing{Shape::kLeftSharing, Shape::kRightSharing}; });
}

int64_t wgrad_tma_blocks(const GradientProduct& product, const RfConvConfiguration& tile,
                         const WgradSharing& sharing, int64_t splits) {
  return divide_up(product.rows, tile.m * sharing.right) *
         divide_up(product.columns, tile.n * sharing.left) * product.copies * splits *
         sharing.blocks();
}

std::string wgrad_tma_fault(const RfConvGradient& problem, bool reads_y, const char* gradient) {
  const RfConvBnAct x = reading_x(problem);
  const TensorElement element = element_of(problem.dtype);
  if (element == TensorElement::kFloat32) return kNoTf32;
  std::string found = tma_taps_fault(x);
  const auto check = [&](const RfConvBnAct& read, const char* name) {
    if (found.empty()) found = tma_pixels_fault(read, element, kBoxes, read.x_size[0], name);
  };
  check(x, "x");
  const RfConvBnAct dy = reading_output(problem, problem.dy, problem.dy_stride);
  check(dy, gradient);
  if (!reads_y) return found;
  const RfConvBnAct y = reading_output(problem, problem.y, problem.y_stride);
  check(y, "y");
  if (found.empty() && tma_is_dense(dy) != tma_is_dense(y)) {
    return std::string("y: its pixels do not lie as ") + gradient + "'s do";
  }
  return found;
}

double wgrad_tma_cost(const GradientProduct& product, const RfConvConfiguration& tile,
                      const WgradSharing& sharing, int64_t splits, const RfGpu& gpu,
                      const StepTransform& transform) {
  const int64_t blocks = sharing.blocks();
  const int64_t at_once = std::max<int64_t>(1, cluster_multiprocessors(blocks, gpu) / blocks);
  const auto busy = static_cast<double>(
      divide_up(wgrad_tma_blocks(product, tile, sharing, splits) / blocks, at_once));
  const double steps = std::max(1.0, product.depth / kStepElements) / static_cast<double>(splits);
  // The tiles' columns behind the last tap come from nowhere.
  const double filled = static_cast<double>(product.columns) /
                        static_cast<double>(divide_up(product.columns, tile.n) * tile.n);
  const double left = static_cast<double>(product.operands) * tile.m * kStepRowBytes;
  const double right = static_cast<double>(tile.n) * kStepRowBytes;
  // Both warpgroups read all of x's boxes where they lie along M, all of dy's where along N.
  const double halves = tile.m == kWarpgroupRows ? kConsumers : 1;
  const double matrix = static_cast<double>(tile.m) * tile.n * kStepElements / kWarpgroupUnit;
  const double read = left * halves + right * kConsumers / halves;
  const double shared = (left + right + read + transform.bytes) / kSharedBytes;
  const double turned = halves * tile.m * kStepElements / 2;
  const double turning = turned * (product.operands > 1 ? kTurnInstructions : 1) / kInstructions;
  // What a block asks for itself and the others.
  const double load = (left / sharing.left + right * filled / sharing.right) / kCacheBytes;
  // A stage is free when the next one's products have begun; one that is transformed when its own
  // have ended, behind its way there. Its left side is free when it has been taken, but other
  // blocks have to be told.
  double latency = transform.cycles > 0
                       ? (kLatency + load + transform.cycles + matrix) / tile.stages
                       : kLatency / (tile.stages - 1);
  if (sharing.left > 1) {
    latency = std::max(latency, (kLatency + load + turning + kPassing) / tile.stages);
  }
  const double meetings = blocks > 1 ? 2 * kClusterMeeting : 0;
  const double step = std::max({matrix, shared, turning, load, transform.cycles, latency});
  return busy * (steps * step + 2 * kLatency + meetings);
}

int wgrad_tma_arguments(const RfConvGradient& problem, bool reads_y, const RfConvPlan& plan,
                        const RfConvConfiguration& tile, void* workspace,
                        ConvWgradTmaArguments* made) {
  const RfConvBnAct x = reading_x(problem);
  const RfConvBnAct dy = reading_output(problem, problem.dy, problem.dy_stride);
  const OutputSize size = output_size(problem);
  ConvWgradTmaArguments& arguments = *made;
  arguments.product = wgrad_product(problem, plan, tile, workspace);
  arguments.grid = {narrowed(problem.x_size[0] * size.p * size.q), make_divisor(narrowed(size.q)),
                    make_divisor(narrowed(size.p))};
  arguments.channels = narrowed(problem.x_size[1]);
  arguments.stride_h = narrowed(problem.stride[0]);
  arguments.stride_w = narrowed(problem.stride[1]);
  arguments.origin_h = narrowed(-problem.padding[0]);
  arguments.origin_w = narrowed(-problem.padding[1]);
  arguments.step_h = narrowed(problem.dilation[0]);
  arguments.step_w = narrowed(problem.dilation[1]);
  arguments.dense_x = tma_is_dense(x);
  arguments.dense_dy = tma_is_dense(dy);
  arguments.masked = reads_y;
  const auto encode = [&](const RfConvBnAct& read, ptx::TensorMap* map) {
    return encode_tma_pixels(read, element_of(problem.dtype), kBoxes, 0, read.x_size[0], map);
  };
  int error = encode(x, &arguments.x);
  if (error == 0) error = encode(dy, &arguments.dy);
  if (error != 0 || !reads_y) return error;
  return encode(reading_output(problem, problem.y, problem.y_stride), &arguments.y);
}

}  // namespace resnet_fused
