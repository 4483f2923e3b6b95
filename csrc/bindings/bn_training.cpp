// Training's passes: statistics, forward, backward, the affine, the pooling. Each writes into
// tensors that the caller made; checks first, then tasks on PyTorch's threads and the merge, or the
// launch.
#include "../launch/bn_training.h"

#include <memory>
#include <optional>
#include <vector>

#include "../launch/bn_act.h"
#include "../launch/bn_pass.h"
#include "arguments.h"

namespace resnet_fused {
namespace {

using Pair = std::vector<int64_t>;

// The launch of an op on a GPU, where there are such.
#if defined(RF_WITH_CUDA)
#define RF_ON_GPU(launch) launch
#else
#define RF_ON_GPU(launch) nullptr
#endif

constexpr int64_t kGrain = 32768;  // elements, as ATen's

std::vector<int64_t> shape(const Tensor& tensor) {
  return {tensor.sizes().begin(), tensor.sizes().end()};
}

// [rows, channels] in the dtype of the arithmetic, dense.
void check_rows(const char* name, const Tensor& rows, const Tensor& y,
                const std::vector<int64_t>& expected) {
  check_device(name, rows, "y", y);
  const ScalarType wanted =
      y.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  if (rows.scalar_type() != wanted) {
    fail(name, ": expected ", name_of(wanted), " (y is ", name_of(y.scalar_type()), "), got ",
         name_of(rows.scalar_type()));
  }
  check_shape(name, rows, "shape", expected);
  if (!rows.is_contiguous()) fail(name, ": expected a contiguous tensor");
}

// One call: its tensors are checked as they are given, all of them before anything is written.
class Call {
 public:
  Call(BnTrainingOp op, const char* name, const Tensor& y) : y_(y), name_(name) {
    call_.op = op;
    call_.dtype = data_type(name, y);
    check_four_dimensions(name, y, "[N, K, P, Q]");
    copy_sizes(y, call_.size);
    call_.relu = true;
    place(kRaw, y);
    inputs_.push_back({name, y});
  }

  void input(BnTrainingOperandIndex index, const char* name, const Tensor& t) {
    like_y(name, t, shape(y_));
    place(index, t);
    inputs_.push_back({name, t});
  }

  // The shortcut, with all channels of y or fewer.
  void residual(const Tensor& t, int64_t offset) {
    check_four_dimensions("residual", t, "[N, K, P, Q]");
    std::vector<int64_t> fewer = shape(y_);
    fewer[1] = t.size(1);
    like_y("residual", t, fewer);
    if (offset < 0 || offset + t.size(1) > y_.size(1)) {
      fail("offset: expected 0 to ", y_.size(1) - t.size(1), ", got ", offset);
    }
    place(kResidual, t);
    inputs_.push_back({"residual", t});
    call_.residual_first = offset;
    call_.residual_channels = t.size(1);
  }

  const void* rows(const char* name, const Tensor& t, int64_t count) {
    check_rows(name, t, y_, {count, y_.size(1)});
    inputs_.push_back({name, t});
    return t.const_data_ptr();
  }

  // The result. It may be the input called `instead`, element for element; nothing else of an
  // input.
  void result(const char* name, const Tensor& out, const std::vector<int64_t>& sizes,
              const char* instead = nullptr) {
    like_y(name, out, sizes);
    apart(out, instead);
    place(kResult, out);
    results_.push_back({name, out});
  }

  void sums(const char* name, const Tensor& t, int32_t count) {
    check_rows(name, t, y_, {count, y_.size(1)});
    apart(t, nullptr);
    call_.sums = t.mutable_data_ptr();
    call_.rows = count;
  }

  // Gradient and winners of a pooling's windows, or where they go.
  void windows(const char* name, const Tensor& values, const Tensor& taps, const Pair& kernel,
               const Pair& step, const Pair& padding) {
    BnTrainingPool& pool = call_.pool;
    copy_pair("kernel", kernel, pool.kernel);
    copy_pair("stride", step, pool.step);
    copy_pair("padding", padding, pool.padding);
    for (int d = 0; d < 2; ++d) check_window(d);
    const std::vector<int64_t> sizes{call_.size[0], call_.size[1], pool.windows[0],
                                     pool.windows[1]};
    like_y(name, values, sizes);
    check_device("taps", taps, "y", y_);
    if (taps.scalar_type() != ScalarType::Byte) fail("taps: expected uint8, got another dtype");
    check_shape("taps", taps, "the windows' shape", sizes);
    copy_strides(taps, pool.taps_stride);
    if (call_.op == BnTrainingOp::kPool) {
      result(name, values, sizes);
      apart(taps, nullptr);
      OutputMemory(values).apart_from("taps", taps);
    } else {
      place(kGradient, values);
      inputs_.push_back({name, values});
      inputs_.push_back({"taps", taps});
    }
    pool.taps = static_cast<uint8_t*>(const_cast<void*>(taps.const_data_ptr()));
  }

  BnTrainingCall& call() { return call_; }

  using Launch = int (*)(const BnTrainingCall*, const RfBnPassPlan*, void*, void*);

  // `launch`: of the op on a GPU.
  void run([[maybe_unused]] Launch launch = nullptr) {
#if defined(RF_WITH_CUDA)
    if (y_.is_cuda()) return run_on_gpu(launch);
#endif
    rf_bn_training_plan(&call_);
    std::unique_ptr<double[]> workspace;
    if (call_.rows > 0) workspace.reset(new double[rf_bn_training_workspace(&call_)]);
    call_.workspace = workspace.get();
    const int64_t tasks = rf_bn_training_tasks(&call_);
    if (tasks > 0 && y_.size(1) > 0) {
      torch::stable::parallel_for(0, tasks, grain(), [this](int64_t begin, int64_t end) {
        rf_bn_training_cpu(&call_, begin, end);
      });
    }
    if (call_.rows > 0) rf_bn_training_merge(&call_);
  }

 private:
  struct Named {
    const char* name;
    Tensor tensor;
  };

#if defined(RF_WITH_CUDA)
  void run_on_gpu(Launch launch) {
    char why[256] = "";
    RfBnPassPlan plan;
    if (rf_bn_pass_plan(&call_, &plan, why, sizeof why) != 0) fail(name_, ": ", why);
    const int device = y_.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    const Tensor workspace = workspace_on(device, plan.workspace_bytes);
    void* memory = plan.workspace_bytes > 0 ? workspace.mutable_data_ptr() : nullptr;
    const int error = launch(&call_, &plan, memory, current_cuda_stream(device));
    if (error != 0) fail(name_, ": the CUDA launch failed: ", rf_cuda_error(error));
  }
#endif

  // The rows of windows are small; every other task is large enough for a thread.
  int64_t grain() const {
    if (call_.op != BnTrainingOp::kPool) return 1;
    const int64_t channels = call_.tiles.channels_inside ? call_.size[1] : 1;
    return 1 + kGrain / (1 + channels * call_.pool.windows[1]);
  }

  void like_y(const char* name, const Tensor& t, const std::vector<int64_t>& sizes) const {
    check_device(name, t, name_, y_);
    check_dtype(name, t, name_, y_);
    check_shape(name, t, "shape", sizes);
  }

  void place(int index, const Tensor& t) {
    call_.operand[index].data = const_cast<void*>(t.const_data_ptr());
    copy_strides(t, call_.operand[index].stride);
  }

  void check_window(int d) {
    BnTrainingPool& pool = call_.pool;
    const int64_t size = call_.size[2 + d];
    if (pool.kernel[d] < 1 || pool.kernel[0] * pool.kernel[1] > 255) {
      fail("kernel: expected 1 to 255 taps, got ", pool.kernel[0], " x ", pool.kernel[1]);
    }
    if (pool.step[d] < 1) fail("stride: expected at least 1, got ", pool.step[d]);
    if (pool.padding[d] < 0 || 2 * pool.padding[d] > pool.kernel[d]) {
      fail("padding: expected 0 to half of the kernel's ", pool.kernel[d], ", got ",
           pool.padding[d]);
    }
    if (size + 2 * pool.padding[d] < pool.kernel[d]) {
      fail("kernel: ", pool.kernel[d], " is larger than the padded ", size + 2 * pool.padding[d]);
    }
    pool.windows[d] = (size + 2 * pool.padding[d] - pool.kernel[d]) / pool.step[d] + 1;
  }

  // A tensor that is written shares no memory with others, but for the input called `instead`,
  // where both are the same tensor.
  void apart(const Tensor& out, const char* instead) const {
    const OutputMemory memory = out.dim() == 4 ? OutputMemory(out) : OutputMemory(as_row(out));
    for (const Named& input : inputs_) {
      const bool same = instead != nullptr && input.name == std::string(instead) &&
                        input.tensor.const_data_ptr() == out.const_data_ptr() &&
                        std::equal(out.strides().begin(), out.strides().end(),
                                   input.tensor.strides().begin(), input.tensor.strides().end());
      if (!same) memory.apart_from(input.name, input.tensor);
    }
    for (const Named& other : results_) memory.apart_from(other.name, other.tensor);
  }

  // Dense values as a tensor of four dimensions.
  static Tensor as_row(const Tensor& dense) {
    const std::vector<int64_t> sizes{1, 1, 1, dense.numel()};
    return torch::stable::view(dense, sizes);
  }

  BnTrainingCall call_{};
  Tensor y_;
  const char* name_;
  std::vector<Named> inputs_;
  std::vector<Named> results_;
};

void bn_stats_out(Tensor y, Tensor stats) {
  Call call(BnTrainingOp::kStatistics, "y", y);
  call.sums("stats", stats, 2);
  call.run();
}

void bn_add_act_out(Tensor y, Tensor norm, std::optional<Tensor> residual,
                    std::optional<Tensor> residual_norm, int64_t offset, bool relu, Tensor out) {
  Call call(BnTrainingOp::kForward, "y", y);
  call.call().norm = call.rows("norm", norm, 4);
  call.call().relu = relu;
  if (residual) call.residual(*residual, offset);
  if (residual_norm) {
    if (!residual || residual->size(1) != y.size(1)) {
      fail("residual_norm: expected a residual of y's shape beside it, got none");
    }
    call.call().residual_norm = call.rows("residual_norm", *residual_norm, 4);
  }
  call.result("out", out, shape(y));
  call.run(RF_ON_GPU(rf_bn_add_act_cuda));
}

void bn_add_act_backward_out(Tensor dout, std::optional<Tensor> out, Tensor y, Tensor norm,
                             std::optional<Tensor> residual, std::optional<Tensor> residual_norm,
                             bool relu, Tensor dz, Tensor sums) {
  Call call(BnTrainingOp::kBackward, "y", y);
  call.input(kGradient, "dout", dout);
  if (out) call.input(kPassed, "out", *out);
  call.call().norm = call.rows("norm", norm, 4);
  call.call().relu = relu;
  if (residual.has_value() != residual_norm.has_value()) {
    fail("residual: expected together with residual_norm, or neither; got one");
  }
  if (residual) {
    call.input(kResidual, "residual", *residual);
    call.call().residual_norm = call.rows("residual_norm", *residual_norm, 4);
  }
  call.result("dz", dz, shape(y), "dout");
  call.sums("sums", sums, residual ? 3 : 2);
  call.run(RF_ON_GPU(rf_bn_add_act_backward_cuda));
}

void bn_backward_apply_out(Tensor dz, Tensor y, Tensor coefficients, Tensor dy) {
  Call call(BnTrainingOp::kApply, "y", y);
  call.input(kGradient, "dz", dz);
  call.call().norm = call.rows("coefficients", coefficients, 3);
  call.result("dy", dy, shape(y), "dz");
  call.run(RF_ON_GPU(rf_bn_backward_apply_cuda));
}

void bn_act_pool_out(Tensor y, Tensor norm, Pair kernel, Pair stride, Pair padding, Tensor out,
                     Tensor taps) {
  Call call(BnTrainingOp::kPool, "y", y);
  call.call().norm = call.rows("norm", norm, 4);
  call.windows("out", out, taps, kernel, stride, padding);
  call.run(RF_ON_GPU(rf_bn_act_pool_cuda));
}

void bn_act_pool_backward_out(Tensor dout, Tensor taps, Tensor y, Tensor norm, Pair kernel,
                              Pair stride, Pair padding, Tensor dz, Tensor sums) {
  Call call(BnTrainingOp::kPoolBackward, "y", y);
  call.call().norm = call.rows("norm", norm, 4);
  call.windows("dout", dout, taps, kernel, stride, padding);
  call.result("dz", dz, shape(y));
  call.sums("sums", sums, 2);
  call.run(RF_ON_GPU(rf_bn_act_pool_backward_cuda));
}

}  // namespace

void define_bn_training(torch::stable::detail::StableLibrary& library) {
  library.def("bn_stats_out(Tensor y, Tensor(a!) stats) -> ()");
  library.def(
      "bn_add_act_out(Tensor y, Tensor norm, Tensor? residual, Tensor? residual_norm, int offset, "
      "bool relu, Tensor(a!) out) -> ()");
  library.def(
      "bn_add_act_backward_out(Tensor dout, Tensor? out, Tensor y, Tensor norm, Tensor? residual, "
      "Tensor? residual_norm, bool relu, Tensor(a!) dz, Tensor(b!) sums) -> ()");
  library.def(
      "bn_backward_apply_out(Tensor dz, Tensor y, Tensor coefficients, Tensor(a!) dy) -> ()");
  library.def(
      "bn_act_pool_out(Tensor y, Tensor norm, int[2] kernel, int[2] stride, int[2] padding, "
      "Tensor(a!) out, Tensor(b!) taps) -> ()");
  library.def(
      "bn_act_pool_backward_out(Tensor dout, Tensor taps, Tensor y, Tensor norm, int[2] kernel, "
      "int[2] stride, int[2] padding, Tensor(a!) dz, Tensor(b!) sums) -> ()");
}

#if defined(RF_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CUDA, library) {
  library.impl("bn_add_act_out", TORCH_BOX(&bn_add_act_out));
  library.impl("bn_add_act_backward_out", TORCH_BOX(&bn_add_act_backward_out));
  library.impl("bn_backward_apply_out", TORCH_BOX(&bn_backward_apply_out));
  library.impl("bn_act_pool_out", TORCH_BOX(&bn_act_pool_out));
  library.impl("bn_act_pool_backward_out", TORCH_BOX(&bn_act_pool_backward_out));
}
#endif

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, library) {
  library.impl("bn_stats_out", TORCH_BOX(&bn_stats_out));
  library.impl("bn_add_act_out", TORCH_BOX(&bn_add_act_out));
  library.impl("bn_add_act_backward_out", TORCH_BOX(&bn_add_act_backward_out));
  library.impl("bn_backward_apply_out", TORCH_BOX(&bn_backward_apply_out));
  library.impl("bn_act_pool_out", TORCH_BOX(&bn_act_pool_out));
  library.impl("bn_act_pool_backward_out", TORCH_BOX(&bn_act_pool_backward_out));
}

}  // namespace resnet_fused
