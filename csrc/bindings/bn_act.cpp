// bn_act_out(x, scale, shift, residual, relu, out): checks, then the CPU or the CUDA launch.
#include "../launch/bn_act.h"

#include <algorithm>
#include <optional>
#include <string>

#include "layout.h"
#include "stable.h"

namespace resnet_fused {
namespace {

// Below this many elements a second thread costs more than it saves (ATen's own grain size).
constexpr int64_t kGrain = 32768;

std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << '[';
  const auto sizes = tensor.sizes();
  for (size_t d = 0; d < sizes.size(); ++d) text << (d ? ", " : "") << sizes[d];
  text << ']';
  return text.str();
}

const char* name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    default:
      return "another dtype";
  }
}

DataType data_type(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return DataType::kFloat32;
    case ScalarType::Double:
      return DataType::kFloat64;
    case ScalarType::Half:
      return DataType::kFloat16;
    case ScalarType::BFloat16:
      return DataType::kBFloat16;
    default:
      fail("x: expected float32, float64, float16 or bfloat16, got dtype number ",
           static_cast<int>(x.scalar_type()));
  }
}

Layout layout_of(const Tensor& tensor) {
  Layout layout{static_cast<const char*>(tensor.const_data_ptr()),
                static_cast<int64_t>(tensor.element_size()),
                {},
                {}};
  std::copy_n(tensor.sizes().begin(), 4, layout.size.begin());
  std::copy_n(tensor.strides().begin(), 4, layout.stride.begin());
  return layout;
}

void check_device(const char* name, const Tensor& tensor, const Tensor& x) {
  if (tensor.is_cuda() != x.is_cuda() || tensor.is_cpu() != x.is_cpu() ||
      tensor.get_device_index() != x.get_device_index()) {
    fail(name, ": expected x's device, got another one");
  }
}

// residual and out: x's dtype, shape and device.
void check_like_x(const char* name, const Tensor& tensor, const Tensor& x) {
  check_device(name, tensor, x);
  if (tensor.scalar_type() != x.scalar_type()) {
    fail(name, ": expected x's dtype ", name_of(x.scalar_type()), ", got ",
         name_of(tensor.scalar_type()));
  }
  if (shape_of(tensor) != shape_of(x)) {
    fail(name, ": expected x's shape ", shape_of(x), ", got ", shape_of(tensor));
  }
}

// scale and shift: one contiguous value a channel, float64 for a float64 x and float32 otherwise.
void check_per_channel(const char* name, const Tensor& tensor, const Tensor& x) {
  check_device(name, tensor, x);
  const ScalarType expected =
      x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  if (tensor.scalar_type() != expected) {
    fail(name, ": expected ", name_of(expected), " (x is ", name_of(x.scalar_type()), "), got ",
         name_of(tensor.scalar_type()));
  }
  if (tensor.dim() != 1 || tensor.size(0) != x.size(1)) {
    fail(name, ": expected shape [", x.size(1), "], one value a channel of x, got ",
         shape_of(tensor));
  }
  if (!tensor.is_contiguous()) fail(name, ": expected a contiguous tensor");
}

// A per-channel vector as a layout, to compare it with out.
Layout channel_layout(const Tensor& tensor) {
  return Layout{static_cast<const char*>(tensor.const_data_ptr()),
                static_cast<int64_t>(tensor.element_size()),
                {1, 1, 1, tensor.numel()},
                {1, 1, 1, 1}};
}

void check_out_memory(const Tensor& x, const Tensor& scale, const Tensor& shift,
                      const std::optional<Tensor>& residual, const Tensor& out) {
  const Layout target = layout_of(out);
  if (overlaps_itself(target)) {
    fail("out: its elements share memory (an expanded tensor?); give one with memory of its own");
  }
  const auto refuse = [&](const char* name, const Layout& other) {
    if (overlap(target, other)) {
      fail("out: it shares memory with ", name, "; give a tensor with memory of its own");
    }
  };
  refuse("x", layout_of(x));
  if (residual) refuse("residual", layout_of(*residual));
  refuse("scale", channel_layout(scale));
  refuse("shift", channel_layout(shift));
}

BnActLoop checked_loop(const Tensor& x, const Tensor& scale, const Tensor& shift,
                       const std::optional<Tensor>& residual, bool relu, const Tensor& out) {
  const DataType dtype = data_type(x);
  if (x.dim() != 4) fail("x: expected 4 dimensions [N, C, H, W], got shape ", shape_of(x));
  check_per_channel("scale", scale, x);
  check_per_channel("shift", shift, x);
  if (residual) check_like_x("residual", *residual, x);
  check_like_x("out", out, x);
  check_out_memory(x, scale, shift, residual, out);

  RfBnActTensors tensors{};
  tensors.x = x.const_data_ptr();
  tensors.residual = residual ? residual->const_data_ptr() : nullptr;
  tensors.out = out.mutable_data_ptr();
  tensors.scale = scale.const_data_ptr();
  tensors.shift = shift.const_data_ptr();
  tensors.dtype = static_cast<int32_t>(dtype);
  tensors.relu = relu;
  std::copy_n(x.sizes().begin(), 4, tensors.size);
  std::copy_n(x.strides().begin(), 4, tensors.x_stride);
  if (residual) std::copy_n(residual->strides().begin(), 4, tensors.residual_stride);
  std::copy_n(out.strides().begin(), 4, tensors.out_stride);
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
  const int error = rf_bn_act_cuda(&loop, current_cuda_stream(x.get_device_index()));
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
