// bn_act_out(x, scale, shift, residual, relu, out): checks, then the CPU or the CUDA launch.
#include "../launch/bn_act.h"

#include <optional>
#include <vector>

#include "arguments.h"

namespace resnet_fused {
namespace {

// Below this many elements a second thread costs more than it saves (ATen's own grain size).
constexpr int64_t kGrain = 32768;

BnActLoop checked_loop(const Tensor& x, const Tensor& scale, const Tensor& shift,
                       const std::optional<Tensor>& residual, bool relu, const Tensor& out) {
  const DataType dtype = data_type("x", x);
  check_four_dimensions("x", x, "[N, C, H, W]");
  check_per_channel("scale", scale, "x", x, x.size(1));
  check_per_channel("shift", shift, "x", x, x.size(1));
  const std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  if (residual) {
    check_device("residual", *residual, "x", x);
    check_dtype("residual", *residual, "x", x);
    check_shape("residual", *residual, "x's shape", shape);
  }
  check_device("out", out, "x", x);
  check_dtype("out", out, "x", x);
  check_shape("out", out, "x's shape", shape);
  const OutputMemory memory(out);
  memory.apart_from("x", x);
  memory.apart_from("residual", residual);
  memory.apart_from("scale", scale);
  memory.apart_from("shift", shift);

  RfBnActTensors tensors{};
  tensors.x = x.const_data_ptr();
  tensors.residual = residual ? residual->const_data_ptr() : nullptr;
  tensors.out = out.mutable_data_ptr();
  tensors.scale = scale.const_data_ptr();
  tensors.shift = shift.const_data_ptr();
  tensors.dtype = static_cast<int32_t>(dtype);
  tensors.relu = relu;
  copy_sizes(x, tensors.size);
  copy_strides(x, tensors.x_stride);
  if (residual) copy_strides(*residual, tensors.residual_stride);
  copy_strides(out, tensors.out_stride);
  BnActLoop loop;
  rf_bn_act_plan(&tensors, &loop);
  return loop;
}

void bn_act_out_cpu(Tensor x, Tensor scale, Tensor shift, std::optional<Tensor> residual, bool relu,
                    Tensor out) {
  const BnActLoop loop = checked_loop(x, scale, shift, residual, relu, out);
  if (loop.elements == 0) return;
  torch::stable::parallel_for(0, loop.elements, kGrain, [&loop](int64_t begin, int64_t end) {
    rf_bn_act_cpu(&loop, begin, end);
  });
}

#if defined(RF_WITH_CUDA)
void bn_act_out_cuda(Tensor x, Tensor scale, Tensor shift, std::optional<Tensor> residual,
                     bool relu, Tensor out) {
  const BnActLoop loop = checked_loop(x, scale, shift, residual, relu, out);
  if (loop.elements == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const RfFlow alone{};
  const int error = rf_bn_act_cuda(&loop, &alone, current_cuda_stream(x.get_device_index()));
  if (error != 0) fail("bn_act_out: the CUDA launch failed: ", rf_cuda_error(error));
}
#endif

}  // namespace

void define_bn_act(torch::stable::detail::StableLibrary& library) {
  library.def(
      "bn_act_out(Tensor x, Tensor scale, Tensor shift, Tensor? residual, bool relu, "
      "Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, library) {
  library.impl("bn_act_out", TORCH_BOX(&bn_act_out_cpu));
}

#if defined(RF_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CUDA, library) {
  library.impl("bn_act_out", TORCH_BOX(&bn_act_out_cuda));
}
#endif

}  // namespace resnet_fused
