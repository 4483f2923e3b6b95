// What the bindings of conv_bn_dgrad and conv_bn_dgrad_end share: operands and their checked
// problem.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "../launch/conv_bn_dgrad.h"
#include "conv.h"
#include "conv_gradients.h"

namespace resnet_fused {

constexpr int64_t kNormRows = 4;  // scale, shift, mean, invstd

// What is read, in the order of conv_bn_dgrad's schema.
struct BnDgradOperands {
  const Tensor& dz;
  const std::optional<Tensor>& y;
  const std::optional<Tensor>& coefficients;
  const Tensor& weight;
  const std::optional<Tensor>& addend;
  const std::optional<Tensor>& raw;
  const std::optional<Tensor>& norm;

  // visit(name, tensor) for each that there is, but dz.
  template <class Visit>
  void others(const Visit& visit) const {
    if (y) visit("y", *y);
    if (coefficients) visit("coefficients", *coefficients);
    visit("weight", weight);
    if (addend) visit("addend", *addend);
    if (raw) visit("raw", *raw);
    if (norm) visit("norm", *norm);
  }
};

// Everything but the sums and the devices, which no plan depends on. result: what is written, in
// whose shape raw and the addend are.
RfConvBnDgrad bn_dgrad_problem(const BnDgradOperands& given, int64_t addend_stride,
                               const std::vector<int64_t>& stride,
                               const std::vector<int64_t>& padding,
                               const std::vector<int64_t>& dilation, int64_t groups,
                               bool allow_tf32, const NamedTensor& result);

// Checks devices and memory of what is read and written but for the sums' shape, and puts these
// into the problem. Of an empty result they become zeros. others: visit(name, tensor) for each
// operand but dz.
template <class Others>
void add_sums(RfConvBnDgrad& problem, const Tensor& dz, const Others& others,
              const NamedTensor& result, Tensor& sums) {
  const Tensor& dx = result.tensor;
  const OutputMemory memory(dx, result.name);
  const OutputMemory summed(sums, "sums");
  memory.apart_from("dz", dz);
  memory.apart_from("sums", sums);
  summed.apart_from("dz", dz);
  check_device(result.name, dx, "dz", dz);
  check_device("sums", sums, "dz", dz);
  others([&](const char* name, const Tensor& tensor) {
    check_device(name, tensor, "dz", dz);
    memory.apart_from(name, tensor);
    summed.apart_from(name, tensor);
  });
  if (dx.is_cuda() && dz.numel() == 0 && dx.numel() > 0) {
    fail("dz: it is empty, and there is no product to add up");
  }
  problem.sums = sums.mutable_data_ptr();
  if (dx.is_cuda() && dx.numel() == 0) torch::stable::zero_(sums);
}

}  // namespace resnet_fused
