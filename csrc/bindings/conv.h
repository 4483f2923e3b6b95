// What the bindings of the convolutions share: each op is a ConvKernel, the C interface of its
// launch, and a function that turns checked tensors into its problem.
#pragma once

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../launch/bn_act.h"
#include "../launch/conv_bn_act.h"
#include "arguments.h"
#include "stable.h"

namespace resnet_fused {

// The functions of one op in csrc/launch.
template <class Problem>
struct ConvKernel {
  const char* name;  // of the op, for messages
  int32_t (*configurations)();
  const RfConvConfiguration* (*configuration)(int32_t);
  int32_t (*plan)(const Problem*, const RfGpu*, int32_t, int32_t, RfConvPlan*, char*, size_t);
  int (*run)(const Problem*, const RfConvPlan*, void*, void*);
};

// Configuration, splits, bytes of the workspace, predicted cycles, and why. A configuration of -1:
// nothing serves the problem, or not what was asked for, and `why` says so.
using PlanResult = std::tuple<int64_t, int64_t, int64_t, double, std::string>;

// The dtype of the tensor called `name`, one of those that the convolutions multiply.
DataType conv_type(const char* name, const Tensor& tensor);

// Multiprocessors, bytes of shared memory of a block and of a multiprocessor; 10 times the
// capability, where that is known: without it no kernel for one of them is planned; and how many
// clusters of 4 and of 8 blocks run at once.
RfGpu gpu_of(const std::vector<int64_t>& numbers);

// What the driver says of a device; asked once.
RfGpu gpu_of(int device);

// [P, Q] of a convolution over [.., H, W] by [.., R, S].
std::vector<int64_t> conv_output(const std::vector<int64_t>& image, const Tensor& weight,
                                 const int64_t (&stride)[2], const int64_t (&padding)[2],
                                 const int64_t (&dilation)[2]);

// Sizes, strides, pointers and geometry of a convolution with its shortcut, checked but for dtypes
// and devices; what else there is in the problem is left at zero.
RfConvBnAct conv_problem(const Tensor& x, const Tensor& weight,
                         const std::optional<Tensor>& residual, const std::vector<int64_t>& stride,
                         const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                         int64_t groups, const Tensor& out);

// Checks what no plan depends on, devices, per-channel vectors and memory, and puts it into the
// problem. The output's memory, of which further operands have to be apart.
OutputMemory add_epilogue(RfConvBnAct& problem, const Tensor& x, const Tensor& weight,
                          const Tensor& scale, const Tensor& shift,
                          const std::optional<Tensor>& residual, bool relu, const RfFlow& flow,
                          const Tensor& out);

// Strides, dilations and groups start at 1, padding at 0, and nothing is beyond 2^30.
void check_geometry(const int64_t (&stride)[2], const int64_t (&padding)[2],
                    const int64_t (&dilation)[2], int64_t groups);

constexpr size_t kWhyBytes = 256;

template <class Problem>
PlanResult plan_conv(const ConvKernel<Problem>& kernel, const Problem& problem, const RfGpu& gpu,
                     int64_t configuration, int64_t splits) {
  RfConvPlan plan{};
  char why[kWhyBytes] = "";
  const int32_t refused = kernel.plan(&problem, &gpu, static_cast<int32_t>(configuration),
                                      static_cast<int32_t>(splits), &plan, why, sizeof why);
  if (refused != 0) return {-1, 0, 0, 0.0, why};
  return {plan.configuration, plan.splits, plan.workspace_bytes, plan.cycles, why};
}

template <class Problem>
std::vector<std::string> configuration_names(const ConvKernel<Problem>& kernel) {
  std::vector<std::string> names;
  for (int32_t i = 0; i < kernel.configurations(); ++i) {
    names.emplace_back(kernel.configuration(i)->name);
  }
  return names;
}

// Plans and launches on the device of `out`, on its current stream. Nothing is launched for an
// empty one; a result that nothing is added up in is filled with zeros.
template <class Problem>
void run_conv(const ConvKernel<Problem>& kernel, const Problem& problem, int64_t configuration,
              int64_t splits, const Tensor& out) {
  if (!out.is_cuda()) fail(kernel.name, "_out: expected CUDA tensors, got others");
  if (out.numel() == 0) return;
  const int device = out.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const RfGpu gpu = gpu_of(device);
  RfConvPlan plan{};
  char why[kWhyBytes] = "";
  const int32_t refused = kernel.plan(&problem, &gpu, static_cast<int32_t>(configuration),
                                      static_cast<int32_t>(splits), &plan, why, sizeof why);
  if (refused != 0) fail(kernel.name, "_out: ", why);
  if (plan.launches == 0) {
    Tensor zeros = out;
    torch::stable::zero_(zeros);
    return;
  }
  const Tensor workspace = workspace_on(device, plan.workspace_bytes);
  void* memory = plan.workspace_bytes > 0 ? workspace.mutable_data_ptr() : nullptr;
  const int error = kernel.run(&problem, &plan, memory, current_cuda_stream(device));
  if (error != 0) fail(kernel.name, "_out: the CUDA launch failed: ", rf_cuda_error(error));
}

}  // namespace resnet_fused
