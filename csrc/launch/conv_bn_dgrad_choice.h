// What the plans of conv_bn_dgrad and conv_bn_dgrad_end share. Inside of this room.
#pragma once

#include "conv_bn_dgrad_arguments.h"
#include "conv_gradient_choice.h"

namespace resnet_fused {

// By wgmma, of two elements of dz, with what loads them and a step's coefficients, and asks for its
// products (counted in what ptxas 13.0 makes: 290 of a warp, that has 16 pairs a thread). Those
// coefficients are 24 loads.
constexpr double kTurnPairInstructions = 18;
constexpr double kCoefficientLoads = 24;

// Their part of the choice among configurations by mma.sync.
template <class Table>
struct BnDgradProducts : DgradChooser<Table> {
  const RfConvBnDgrad& whole;

  GradientProduct product(const RfConvConfiguration& tile, int64_t* images) const {
    GradientProduct product = DgradChooser<Table>::product(tile, images);
    const auto step = static_cast<double>(whole.addend_step);
    product.turning = this->reads_y ? kBackwardInstructions : 0;
    product.finishing = kEndInstructions + (whole.reduced != 0 ? kReduceInstructions : 0);
    product.ends += whole.reduced != 0 ? 1 : 0;
    product.ends += whole.added != 0 ? 1 / (step * step) : 0;
    return product;
  }
};

inline int32_t check_addend(const RfConvBnDgrad& problem, const Refusal& refuse) {
  constexpr int64_t kMostStep = int64_t{1} << 30;
  if (problem.added == 0 || (problem.addend_step >= 1 && problem.addend_step <= kMostStep)) {
    return 0;
  }
  return refuse("an addend at every %lld-th pixel", static_cast<Long>(problem.addend_step));
}

}  // namespace resnet_fused
