#include "../launch/conv_bn_act.h"
#include "op.h"

#if !defined(RF_EMULATED)
#include <cuda_runtime.h>
#endif

namespace resnet_fused::driver {
namespace {

struct Problem {
  int64_t n, c, h, w, k, r, s, stride, padding, dilation, groups;
  bool residual;
  bool relu;
  bool channels_last;

  int64_t extent(int64_t size, int64_t taps) const {
    return (size + 2 * padding - dilation * (taps - 1) - 1) / stride + 1;
  }
  int64_t p() const { return extent(h, r); }
  int64_t q() const { return extent(w, s); }
  int64_t depth() const { return c / groups * r * s; }
};

// Strides of [a, b, c, d], dense: b last (NHWC) or d last (NCHW).
struct Layout {
  int64_t stride[4];

  Layout(const int64_t (&size)[4], bool channels_last) {
    const int order[2][4] = {{0, 1, 2, 3}, {0, 2, 3, 1}};
    int64_t step = 1;
    for (int i = 3; i >= 0; --i) {
      const int d = order[channels_last][i];
      stride[d] = step;
      step *= size[d];
    }
  }
  int64_t at(int64_t a, int64_t b, int64_t c, int64_t d) const {
    return a * stride[0] + b * stride[1] + c * stride[2] + d * stride[3];
  }
};

// What the plan depends on: the GPU at hand, or an H200 for the emulator.
RfGpu this_gpu() {
#if defined(RF_EMULATED)
  return {132, 227 * 1024, 228 * 1024};
#else
  int device = 0;
  RfGpu gpu;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(rf_gpu(device, &gpu), "cudaDeviceGetAttribute");
  return gpu;
#endif
}

int32_t configuration_named(const std::string& name) {
  if (name == "auto") return -1;
  std::string accepted = "auto";
  for (int32_t i = 0; i < rf_conv_bn_act_configurations(); ++i) {
    const char* known = rf_conv_bn_act_configuration(i)->name;
    if (name == known) return i;
    accepted += std::string(", ") + known;
  }
  throw UsageError("--configuration is '" + name + "'; accepted are " + accepted);
}

// The convolution and the sum of its terms' magnitudes, in float64, at one output.
struct Sum {
  double value = 0;
  double magnitude = 0;
};

template <class T>
Sum convolve(const Problem& problem, const Operand<T>& x, const Layout& x_at,
             const Operand<T>& weight, const Layout& weight_at, int64_t n, int64_t k, int64_t p,
             int64_t q) {
  const int64_t channels = problem.c / problem.groups;
  const int64_t first = k / (problem.k / problem.groups) * channels;
  Sum sum;
  for (int64_t r = 0; r < problem.r; ++r) {
    const int64_t row = p * problem.stride - problem.padding + r * problem.dilation;
    if (row < 0 || row >= problem.h) continue;
    for (int64_t s = 0; s < problem.s; ++s) {
      const int64_t column = q * problem.stride - problem.padding + s * problem.dilation;
      if (column < 0 || column >= problem.w) continue;
      for (int64_t c = 0; c < channels; ++c) {
        const double term =
            x.at(x_at.at(n, first + c, row, column)) * weight.at(weight_at.at(k, c, r, s));
        sum.value += term;
        sum.magnitude += std::fabs(term);
      }
    }
  }
  return sum;
}

// |y - R| <= u |R| + (terms + 8) 2^-23 S, and for TF32's operands 2 * 2^-11 S more. Sums that are
// rounded err like a random walk; units that cut them err once a step of theirs.
template <class T>
double bound(const Problem& problem, const Common& common, double expected, double magnitude) {
  constexpr bool kTf32 = sizeof(T) == 4;
  const double depth = static_cast<double>(problem.depth());
  const double terms = common.toward_zero ? depth / (kTf32 ? 8 : 16) : std::sqrt(depth);
  const double each = (terms + 8) * 0x1p-23 + (kTf32 ? 0x1p-10 : 0);
  return kUnitRoundoff<T> * std::fabs(expected) + each * magnitude;
}

template <class T>
bool run(const Problem& problem, const Arguments& arguments, Common& common, Json& json) {
  const int64_t x_size[4] = {problem.n, problem.c, problem.h, problem.w};
  const int64_t weight_size[4] = {problem.k, problem.c / problem.groups, problem.r, problem.s};
  const int64_t out_size[4] = {problem.n, problem.k, problem.p(), problem.q()};
  const auto count = [](const int64_t (&size)[4]) { return size[0] * size[1] * size[2] * size[3]; };
  const Layout x_at(x_size, problem.channels_last);
  const Layout weight_at(weight_size, problem.channels_last);
  const Layout out_at(out_size, problem.channels_last);
  const Operand<T> x(count(x_size), common.random, common.values);
  const Operand<T> weight(count(weight_size), common.random, common.values);
  const Operand<T> residual(problem.residual ? count(out_size) : 0, common.random, common.values);
  const Operand<float> scale(problem.k, common.random, common.values);
  const Operand<float> shift(problem.k, common.random, common.values);
  Operand<T> out(count(out_size));

  RfConvBnAct call{};
  call.x = x.device.data();
  call.weight = weight.device.data();
  call.residual = problem.residual ? residual.device.data() : nullptr;
  call.out = out.device.data();
  call.scale = scale.device.data();
  call.shift = shift.device.data();
  call.dtype = static_cast<int32_t>(common.dtype);
  call.relu = problem.relu;
  call.allow_tf32 = 1;
  call.groups = static_cast<int32_t>(problem.groups);
  for (int d = 0; d < 4; ++d) {
    call.x_size[d] = x_size[d];
    call.weight_size[d] = weight_size[d];
    call.x_stride[d] = x_at.stride[d];
    call.weight_stride[d] = weight_at.stride[d];
    call.residual_stride[d] = call.out_stride[d] = out_at.stride[d];
  }
  for (int d = 0; d < 2; ++d) {
    call.stride[d] = problem.stride;
    call.padding[d] = problem.padding;
    call.dilation[d] = problem.dilation;
  }
  const RfGpu gpu = this_gpu();
  RfConvPlan plan;
  char why[512] = "";
  const int32_t configuration = configuration_named(arguments.text("configuration"));
  const auto splits = static_cast<int32_t>(arguments.integer("splits", 0));
  if (rf_conv_bn_act_plan(&call, &gpu, configuration, splits, &plan, why, sizeof why) != 0) {
    throw UsageError(std::string("no plan: ") + why);
  }
  json.add("plan", why);
  const Buffer workspace(static_cast<size_t>(plan.workspace_bytes));
  const auto launch = [&] {
    check(rf_conv_bn_act_cuda(&call, &plan, workspace.data(), nullptr), "conv_bn_act");
  };
  launch();
  out.fetch();

  Verdict verdict;
  for (int64_t n = 0; n < problem.n; ++n) {
    for (int64_t k = 0; k < problem.k; ++k) {
      for (int64_t p = 0; p < problem.p(); ++p) {
        for (int64_t q = 0; q < problem.q(); ++q) {
          const Sum sum = convolve(problem, x, x_at, weight, weight_at, n, k, p, q);
          const int64_t place = out_at.at(n, k, p, q);
          const double shortcut = problem.residual ? residual.at(place) : 0;
          double expected = scale.at(k) * sum.value + shift.at(k) + shortcut;
          const double magnitude =
              std::fabs(scale.at(k)) * sum.magnitude + std::fabs(shift.at(k)) + std::fabs(shortcut);
          if (problem.relu && expected < 0) expected = 0;
          if (common.values == Values::kIntegers) {
            verdict.equal(out.at(place), to_double(round_to<T>(expected)));
          } else {
            verdict.within(out.at(place), expected, bound<T>(problem, common, expected, magnitude));
          }
        }
      }
    }
  }
  const bool right = report(verdict, json);
  report_times(time_calls(common.repeats, launch), json);
  return right;
}

}  // namespace

bool run_conv_bn_act(const Arguments& arguments, Common& common, Json& json) {
  const Problem problem{arguments.integer("n", 0),
                        arguments.integer("c", 1),
                        arguments.integer("h", 1),
                        arguments.integer("w", 1),
                        arguments.integer("k", 1),
                        arguments.integer("r", 1),
                        arguments.integer("s", 1),
                        arguments.integer("stride", 1),
                        arguments.integer("padding", 0),
                        arguments.integer("dilation", 1),
                        arguments.integer("groups", 1),
                        arguments.flag("residual"),
                        arguments.choice("act", {"none", "relu"}) == 1,
                        arguments.choice("layout", {"nchw", "nhwc"}) == 1};
  if (problem.p() < 1 || problem.q() < 1) throw UsageError("the filter is larger than the image");
  if (problem.c % problem.groups != 0 || problem.k % problem.groups != 0) {
    throw UsageError("--groups divides neither --c nor --k, or not both");
  }
  switch (common.dtype) {
    case DataType::kFloat32:
      return run<float>(problem, arguments, common, json);
    case DataType::kFloat16:
      return run<Float16>(problem, arguments, common, json);
    case DataType::kBFloat16:
      return run<BFloat16>(problem, arguments, common, json);
    case DataType::kFloat64:
      break;
  }
  throw UsageError("--dtype is 'float64'; conv_bn_act serves float32, float16 and bfloat16");
}

}  // namespace resnet_fused::driver
