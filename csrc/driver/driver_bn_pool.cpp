#include "bn_pass.h"

namespace resnet_fused::driver {
namespace {

constexpr PassInterface kPool = {"bn_act_pool", BnTrainingOp::kPool, rf_bn_act_pool_cuda};
constexpr PassInterface kPoolBackward = {"bn_act_pool_backward", BnTrainingOp::kPoolBackward,
                                         rf_bn_act_pool_backward_cuda};
constexpr int64_t kMostTaps = 255;

// Which tap won, of each window.
struct Taps {
  std::vector<uint8_t> host;
  Buffer device;

  // No tap: one that is not written shows.
  explicit Taps(int64_t count) : host(static_cast<size_t>(count), 0xFF), device(host.size()) {
    device.copy_from(host.data());
  }
  void choose(Random& random, int64_t taps) {
    for (uint8_t& tap : host) {
      tap = static_cast<uint8_t>(random.bits() % static_cast<uint64_t>(taps));
    }
    device.copy_from(host.data());
  }
  void fetch() { device.copy_to(host.data()); }
  int64_t at(int64_t place) const { return host[static_cast<size_t>(place)]; }
};

// The windows of a pooling over images.
struct Windows {
  Images of;  // the windows themselves, as images
  int64_t kernel[2], stride, padding;

  Windows(const char* op, const Images& images, const Arguments& arguments)
      : of(images),
        kernel{arguments.integer("r", 1), arguments.integer("s", 1)},
        stride(arguments.integer("stride", 1)),
        padding(arguments.integer("padding", 0)) {
    refuse_residual(op, arguments);
    for (int d = 0; d < 2; ++d) {
      const int64_t room = images.size[2 + d] + 2 * padding - kernel[d];
      if (room < 0) throw UsageError("the window is larger than the image");
      if (2 * padding > kernel[d]) throw UsageError("--padding: more than half of the window");
      of.size[2 + d] = room / stride + 1;
    }
    if (taps() > kMostTaps) throw UsageError("--r and --s: at most 255 taps");
  }

  int64_t taps() const { return kernel[0] * kernel[1]; }

  // Calls body(window, tap, pixel) with the places of each window's taps that lie in the image.
  template <class F>
  void for_each_tap(const Images& images, const F& body) const {
    const Layout from = images.at(), at = of.at();
    const auto in_window = [&](int64_t n, int64_t c, int64_t p, int64_t q) {
      for (int64_t tap = 0; tap < taps(); ++tap) {
        const int64_t row = p * stride - padding + tap / kernel[1];
        const int64_t column = q * stride - padding + tap % kernel[1];
        if (row < 0 || row >= images.size[2] || column < 0 || column >= images.size[3]) continue;
        body(at.at(n, c, p, q), tap, from.at(n, c, row, column));
      }
    };
    const auto& [images_count, channels, rows, columns] = of.size;
    for (int64_t i = 0; i < of.elements(); ++i) {
      in_window(i / (channels * rows * columns), i / (rows * columns) % channels,
                i / columns % rows, i % columns);
    }
  }

  void describe(BnTrainingCall& call, const Taps& chosen) const {
    BnTrainingPool& pool = call.pool;
    copy_to(pool.kernel, std::to_array(kernel));
    std::fill_n(pool.step, 2, stride);
    std::fill_n(pool.padding, 2, padding);
    std::copy_n(of.size.begin() + 2, 2, pool.windows);
    pool.taps = static_cast<uint8_t*>(chosen.device.data());
    copy_to(pool.taps_stride, of.at().stride);
    call.relu = true;
  }
};

// out = the largest of a window's relu(scale y + shift), each rounded, and which tap that was.
template <class T>
class ActPool {
 public:
  ActPool(const Arguments& arguments, Common& common)
      : arguments_(arguments),
        common_(common),
        of_(arguments),
        windows_(kPool.name, of_, arguments) {}

  BnTrainingCall call() const {
    BnTrainingCall call = pass_call(kPool, of_, common_, arguments_);
    place(call, kRaw, y_, of_.at());
    place(call, kResult, out_, windows_.of.at());
    call.norm = norm_.device.data();
    windows_.describe(call, taps_);
    return call;
  }

  void fetch() {
    out_.fetch();
    taps_.fetch();
  }

  // Rounding makes ties: on integers the tap must be the first of them, else one that is no
  // further from the largest than errors allow.
  void judge(Verdict& verdict) const {
    struct Window {
      double largest = -1, error = 0, chosen = std::numeric_limits<double>::quiet_NaN();
      int64_t first = -1;
    };
    std::vector<Window> found(static_cast<size_t>(windows_.of.elements()));
    windows_.for_each_tap(of_, [&](int64_t place, int64_t tap, int64_t pixel) {
      Window& window = found[static_cast<size_t>(place)];
      const int64_t c = of_.channel(pixel);
      Sum sum;
      sum.add(norm_.scale(c) * y_.at(pixel));
      sum.add(norm_.shift(c));
      const double value = std::fmax(sum.value, 0);
      window.error = std::fmax(window.error, kAffineError * sum.magnitude);
      if (tap == taps_.at(place)) window.chosen = value;
      if (value > window.largest) window.largest = value, window.first = tap;
    });
    for (int64_t i = 0; i < windows_.of.elements(); ++i) {
      const Window& window = found[static_cast<size_t>(i)];
      verdict.rounded<T>(out_.at(i), window.largest, window.error, common_.values);
      if (common_.values == Values::kIntegers) {
        verdict.equal(static_cast<double>(taps_.at(i)), static_cast<double>(window.first));
      } else {
        verdict.within(window.chosen, window.largest,
                       2 * (kUnitRoundoff<T> * window.largest + window.error));
      }
    }
  }

 private:
  const Arguments& arguments_;
  Common& common_;
  Images of_;
  Windows windows_;
  Operand<T> y_{of_.elements(), common_.random, common_.values};
  Norm norm_{of_.channels(), common_};
  Operand<T> out_{windows_.of.elements()};
  Taps taps_{windows_.of.elements()};
};

// dz = what a pixel gets of the windows that it won, where its ReLU passed; and its sums.
template <class T>
class ActPoolBackward {
 public:
  ActPoolBackward(const Arguments& arguments, Common& common)
      : arguments_(arguments),
        common_(common),
        of_(arguments),
        windows_(kPoolBackward.name, of_, arguments) {
    taps_.choose(common.random, windows_.taps());
  }

  BnTrainingCall call() const {
    BnTrainingCall call = pass_call(kPoolBackward, of_, common_, arguments_);
    place(call, kRaw, y_, of_.at());
    place(call, kGradient, dout_, windows_.of.at());
    place(call, kResult, dz_, of_.at());
    call.norm = norm_.device.data();
    call.sums = sums_.device.data();
    call.rows = 2;
    windows_.describe(call, taps_);
    return call;
  }

  void fetch() {
    dz_.fetch();
    sums_.fetch();
  }

  void judge(Verdict& verdict) const {
    std::vector<Sum> dh(static_cast<size_t>(of_.elements()));
    windows_.for_each_tap(of_, [&](int64_t window, int64_t tap, int64_t pixel) {
      if (tap == taps_.at(window)) dh[static_cast<size_t>(pixel)].add(dout_.at(window));
    });
    const double error = walk_error(std::sqrt(static_cast<double>(windows_.taps())));
    for (int64_t i = 0; i < of_.elements(); ++i) {
      const Sum& sum = dh[static_cast<size_t>(i)];
      const bool passes = !(normalised<T>(norm_, of_.channel(i), y_.at(i)) <= 0);
      verdict.rounded<T>(dz_.at(i), passes ? sum.value : 0, passes ? error * sum.magnitude : 0,
                         common_.values);
    }
    judge_sums(of_, dz_, {Branch<T>{y_, norm_}}, sums_, common_.values, verdict);
  }

 private:
  const Arguments& arguments_;
  Common& common_;
  Images of_;
  Windows windows_;
  Operand<T> y_{of_.elements(), common_.random, common_.values};
  Operand<T> dout_{windows_.of.elements(), common_.random, common_.values};
  Norm norm_{of_.channels(), common_};
  Taps taps_{windows_.of.elements()};
  Operand<T> dz_{of_.elements()};
  Operand<float> sums_{2 * of_.channels()};
};

}  // namespace

bool run_bn_act_pool(const Arguments& arguments, Common& common, Json& json) {
  return run_pass<ActPool>(kPool, arguments, common, json);
}

bool run_bn_act_pool_backward(const Arguments& arguments, Common& common, Json& json) {
  return run_pass<ActPoolBackward>(kPoolBackward, arguments, common, json);
}

}  // namespace resnet_fused::driver
