// What every binding needs from PyTorch's stable ABI.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <sstream>
#include <stdexcept>

namespace resnet_fused {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Raises RuntimeError in Python with the message alone; STD_TORCH_CHECK would put a path before it.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// PyTorch's current stream on a device. The symbol is looked up when the first CUDA tensor arrives,
// so that a PyTorch without CUDA loads this extension too.
void* current_cuda_stream(int device);

// Bytes on a CUDA device from PyTorch's allocator, in the order of the current stream: it may be
// captured into a graph, and is free again when the call has been enqueued.
Tensor workspace_on(int device, int64_t bytes);

// They declare the ops; module.cpp calls them. The convolutions have CUDA kernels alone: without
// those their ops do not exist.
void define_bn_act(torch::stable::detail::StableLibrary& library);
void define_bn_finalize(torch::stable::detail::StableLibrary& library);
void define_bn_training(torch::stable::detail::StableLibrary& library);
void define_bn_add_act_conv_stats(torch::stable::detail::StableLibrary& library);
void define_conv_bn_act(torch::stable::detail::StableLibrary& library);
void define_conv_bn_act_fp8(torch::stable::detail::StableLibrary& library);
void define_conv_bn_dgrad(torch::stable::detail::StableLibrary& library);
void define_conv_bn_dgrad_end(torch::stable::detail::StableLibrary& library);
void define_conv_bn_grad1x1(torch::stable::detail::StableLibrary& library);
void define_conv_bn_grad1x1_end(torch::stable::detail::StableLibrary& library);
void define_conv_bn_stats(torch::stable::detail::StableLibrary& library);
void define_conv_bn_stats_finalize(torch::stable::detail::StableLibrary& library);
void define_conv_bn_wgrad(torch::stable::detail::StableLibrary& library);
void define_conv_gradients(torch::stable::detail::StableLibrary& library);
void define_conv_chain(torch::stable::detail::StableLibrary& library);
void define_conv_chain_fp8(torch::stable::detail::StableLibrary& library);
void define_network(torch::stable::detail::StableLibrary& library);
void define_stem(torch::stable::detail::StableLibrary& library);
void define_head(torch::stable::detail::StableLibrary& library);

}  // namespace resnet_fused
