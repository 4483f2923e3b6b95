// What the bindings of a chain's ops share: its tensors, and their checks. Inside of this room.
#pragma once

#include <cstdint>
#include <optional>

#include "../launch/conv_chain.h"
#include "conv.h"

namespace resnet_fused {

using Maybe = std::optional<Tensor>;

// What a plan depends on.
struct ChainTensors {
  const Tensor& x;
  const Tensor& weight;
  const Maybe& residual;
  const Maybe& projected;
  const Maybe& projection_weight;
  const Maybe& next_weight;
  const Maybe& front_weight;
  const Tensor& following;
  const Tensor& out;
};

struct ChainVectors {
  const Tensor& scale;
  const Tensor& shift;
  const Maybe& projection_scale;
  const Maybe& projection_shift;
  const Maybe& next_scale;
  const Maybe& next_shift;
  const Maybe& front_scale;
  const Maybe& front_shift;
};

// Checks shapes and that all are of x's dtype, which the caller checks and fills in; everything but
// the per-channel vectors, the devices and `reverse`.
RfConvChain chain_problem(const ChainTensors& tensors, int64_t projection_stride,
                          int64_t out_stride);

// Checks the vectors, devices and overlaps, and fills in the vectors and the flow.
void add_vectors(RfConvChain& problem, const ChainTensors& tensors, const ChainVectors& vectors,
                 const RfFlow& flow);

}  // namespace resnet_fused
