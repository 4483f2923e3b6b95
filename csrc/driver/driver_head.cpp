#include "../launch/head.h"

#include "conv.h"

namespace resnet_fused::driver {
namespace {

constexpr Interface<RfHead> kOp = {"head", rf_head_configurations, rf_head_configuration,
                                   rf_head_plan, rf_head_cuda};

template <class T>
bool run(const Arguments& arguments, Common& common, Json& json) {
  const Size size{arguments.integer("n", 0), arguments.integer("c", 0), arguments.integer("h", 1),
                  arguments.integer("w", 1)};
  const int64_t classes = arguments.integer("k", 0);
  const Layout at(size, arguments.choice("layout", {"nchw", "nhwc"}) == 1);
  const int64_t channels = size[1];
  const int64_t pixels = size[2] * size[3];
  Operand<T> x(elements_of(size), common.random, common.values);
  if (common.values == Values::kIntegers) {
    // Every pixel of a channel the same: the mean is that, whatever their number.
    for (int64_t i = 0; i < elements_of(size); ++i) {
      const int64_t n = i / (channels * pixels), c = i / pixels % channels;
      x.host[static_cast<size_t>(at.at(n, c, i / size[3] % size[2], i % size[3]))] =
          x.host[static_cast<size_t>(at.at(n, c, 0, 0))];
    }
    x.device.copy_from(x.host.data());
  }
  const Operand<T> weight(classes * channels, common.random, common.values);
  const Operand<T> bias(classes, common.random, common.values);
  Operand<T> out(size[0] * classes);

  RfHead problem{};
  problem.dtype = static_cast<int32_t>(common.dtype);
  problem.x = x.device.data();
  problem.weight = weight.device.data();
  problem.bias = bias.device.data();
  problem.out = out.device.data();
  problem.classes = classes;
  problem.flow = common.flow;
  weight.device.mark_constant("weight");
  bias.device.mark_constant("bias");
  copy_to(problem.x_size, size);
  copy_to(problem.x_stride, at.stride);
  problem.weight_stride[0] = channels;
  problem.weight_stride[1] = 1;
  const Planned<RfHead> planned(kOp, problem, arguments, json);
  common.run([&] { planned.launch(); });
  out.fetch();

  // The mean's sum, its rounding and the product's sum, each by the magnitudes that it adds.
  const double error = sum_error<T>(common, channels) + sum_error<T>(common, pixels);
  Verdict verdict;
  for (int64_t i = 0; i < size[0] * classes; ++i) {
    Sum sum;
    double rounding = 0;
    for (int64_t c = 0; c < channels; ++c) {
      Sum image;
      for (int64_t j = 0; j < pixels; ++j) {
        image.add(x.at(at.at(i / classes, c, j / size[3], j % size[3])));
      }
      const double factor = weight.at(i % classes * channels + c);
      const double count = static_cast<double>(pixels);
      sum.value += factor * image.value / count;
      sum.magnitude += std::fabs(factor) * image.magnitude / count;
      rounding += std::fabs(factor) * (kUnitRoundoff<T> * std::fabs(image.value) / count);
    }
    sum.add(bias.at(i % classes));
    if (common.values == Values::kIntegers) {
      verdict.equal(out.at(i), to_double(round_to<T>(sum.value)));
    } else {
      verdict.within(out.at(i), sum.value,
                     kUnitRoundoff<T> * std::fabs(sum.value) + 2 * error * sum.magnitude +
                         (1 + kUnitRoundoff<T>)*rounding);
    }
  }
  const bool right = report(verdict, json);
  report_times(time_calls(common.repeats, [&] { planned.launch(); }), json);
  return right;
}

}  // namespace

bool run_head(const Arguments& arguments, Common& common, Json& json) {
  return with_conv_type(kOp.name, common.dtype,
                        [&]<class T>() { return run<T>(arguments, common, json); });
}

}  // namespace resnet_fused::driver
