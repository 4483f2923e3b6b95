#include "conv.h"

#include <array>
#include <atomic>
#include <limits>
#include <mutex>

namespace resnet_fused {
namespace {

constexpr int kDevices = 64;
// The launches accept less; here it keeps the arithmetic of shapes inside of 64 bits.
constexpr int64_t kFar = int64_t{1} << 30;

int32_t narrowed(const char* name, int64_t value) {
  if (value < 1 || value > std::numeric_limits<int32_t>::max()) {
    fail("gpu: ", name, ": expected a positive 32-bit integer, got ", value);
  }
  return static_cast<int32_t>(value);
}

}  // namespace

DataType conv_type(const char* name, const Tensor& tensor) {
  const DataType type = data_type(name, tensor);
  if (type == DataType::kFloat64) {
    fail(name, ": expected bfloat16, float16 or float32, got float64");
  }
  return type;
}

RfGpu gpu_of(const std::vector<int64_t>& numbers) {
  if (numbers.size() != 3 && numbers.size() != 4 && numbers.size() != 6) {
    fail(
        "gpu: expected 3, 4 or 6 integers (multiprocessors, bytes of shared memory of a block and ",
        "of a multiprocessor, 10 times the capability, clusters of 4 and of 8 blocks that run at ",
        "once), got ", shape_of(numbers));
  }
  RfGpu gpu{narrowed("multiprocessors", numbers[0]), narrowed("shared memory", numbers[1]),
            narrowed("shared memory", numbers[2])};
  if (numbers.size() > 3) gpu.capability = narrowed("capability", numbers[3]);
  if (numbers.size() > 4) {
    // 0: nobody has asked the driver, or it does not say.
    if (numbers[4] != 0) gpu.clusters_of_4 = narrowed("clusters of 4", numbers[4]);
    if (numbers[5] != 0) gpu.clusters_of_8 = narrowed("clusters of 8", numbers[5]);
  }
  return gpu;
}

RfGpu gpu_of(int device) {
  static std::array<RfGpu, kDevices> known{};
  static std::array<std::once_flag, kDevices> asked;
  if (device < 0 || device >= kDevices) fail("device ", device, ": expected 0 to ", kDevices - 1);
  std::call_once(asked[device], [device] {
    const int error = rf_gpu(device, &known[device]);
    if (error != 0) fail("cannot ask the driver about device ", device, ": ", rf_cuda_error(error));
  });
  return known[device];
}

void check_geometry(const int64_t (&stride)[2], const int64_t (&padding)[2],
                    const int64_t (&dilation)[2], int64_t groups) {
  const auto within = [](const char* name, int64_t value, int64_t least) {
    if (value < least || value > kFar) {
      fail(name, ": expected ", least, " to ", kFar, ", got ", value);
    }
  };
  for (int d = 0; d < 2; ++d) {
    within("stride", stride[d], 1);
    within("padding", padding[d], 0);
    within("dilation", dilation[d], 1);
  }
  within("groups", groups, 1);
}

std::vector<int64_t> conv_output(const std::vector<int64_t>& image, const Tensor& weight,
                                 const int64_t (&stride)[2], const int64_t (&padding)[2],
                                 const int64_t (&dilation)[2]) {
  std::vector<int64_t> size(2);
  for (int d = 0; d < 2; ++d) {
    const int64_t reach = dilation[d] * (weight.size(2 + d) - 1) + 1;
    const int64_t room = image[d] + 2 * padding[d] - reach;
    if (room < 0) {
      fail("weight: it spans ", reach, " pixels along dimension ", 2 + d, ", the padded image has ",
           image[d] + 2 * padding[d]);
    }
    size[d] = room / stride[d] + 1;
  }
  return size;
}

namespace {

// Of a tensor with no memory, which is planned and not launched, an address all the same: a plan
// counts the shortcut's bytes where there is one.
const void* address_of(const Tensor& tensor) {
  alignas(256) static const char nowhere{};
  const void* const data = tensor.const_data_ptr();
  return data != nullptr ? data : &nowhere;
}

}  // namespace

RfConvBnAct conv_problem(const Tensor& x, const Tensor& weight,
                         const std::optional<Tensor>& residual, const std::vector<int64_t>& stride,
                         const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                         int64_t groups, const Tensor& out) {
  RfConvBnAct problem{};
  check_four_dimensions("x", x, "[N, C, H, W]");
  check_four_dimensions("weight", weight, "[K, C/groups, R, S]");
  check_four_dimensions("out", out, "[N, K, P, Q]");
  copy_pair("stride", stride, problem.stride);
  copy_pair("padding", padding, problem.padding);
  copy_pair("dilation", dilation, problem.dilation);
  check_geometry(problem.stride, problem.padding, problem.dilation, groups);
  if (x.size(1) % groups != 0 || weight.size(1) != x.size(1) / groups ||
      weight.size(0) % groups != 0) {
    fail("weight: expected [K, ", x.size(1),
         "/groups, R, S] with K a multiple of groups = ", groups, ", got ", shape_of(weight));
  }
  const std::vector<int64_t> pixels = conv_output({x.size(2), x.size(3)}, weight, problem.stride,
                                                  problem.padding, problem.dilation);
  const std::vector<int64_t> shape{x.size(0), weight.size(0), pixels[0], pixels[1]};
  check_shape("out", out, "the convolution's shape", shape);
  if (residual) {
    check_shape("residual", *residual, "out's shape", shape);
    copy_strides(*residual, problem.residual_stride);
  }
  problem.x = x.const_data_ptr();
  problem.weight = weight.const_data_ptr();
  problem.residual = residual ? address_of(*residual) : nullptr;
  problem.out = out.mutable_data_ptr();
  problem.groups = static_cast<int32_t>(groups);
  copy_sizes(x, problem.x_size);
  copy_sizes(weight, problem.weight_size);
  copy_strides(x, problem.x_stride);
  copy_strides(weight, problem.weight_stride);
  copy_strides(out, problem.out_stride);
  return problem;
}

OutputMemory add_epilogue(RfConvBnAct& problem, const Tensor& x, const Tensor& weight,
                          const Tensor& scale, const Tensor& shift,
                          const std::optional<Tensor>& residual, bool relu, const RfFlow& flow,
                          const Tensor& out) {
  check_device("weight", weight, "x", x);
  check_device("out", out, "x", x);
  if (residual) check_device("residual", *residual, "x", x);
  check_per_channel("scale", scale, "x", x, weight.size(0));
  check_per_channel("shift", shift, "x", x, weight.size(0));
  OutputMemory memory(out);
  memory.apart_from("x", x);
  memory.apart_from("weight", weight);
  memory.apart_from("scale", scale);
  memory.apart_from("shift", shift);
  memory.apart_from("residual", residual);
  problem.scale = scale.const_data_ptr();
  problem.shift = shift.const_data_ptr();
  problem.relu = relu;
  problem.flow = flow;
  return memory;
}

}  // namespace resnet_fused
