// The choice of a weight's gradient, for the plans of conv_wgrad and conv_bn_wgrad. Inside of this
// room.
#pragma once

#include "conv_gradient_choice.h"

namespace resnet_fused {

template <class Table>
struct WgradChooser : GradientChooser {
  // A result of one tile still fills the largest GPUs twice.
  static constexpr int kMostSplits = 512;

  static const RfConvConfiguration* tile(int32_t index) { return Table::at(index); }
  static int32_t tiles() { return Table::kSize; }

  // The sums run over all images, so a launch cannot leave any out.
  GradientProduct product(const RfConvConfiguration& tile, int64_t* images) const {
    const OutputSize size = output_size(problem);
    GradientProduct product = common();
    product.columns = wgrad_columns(problem, tile);
    product.copies = problem.groups;
    product.wide = wgrad_reads_wide(problem, reads_y);
    product.depth = static_cast<double>(*images * size.p * size.q);
    product.rows = problem.weight_size[0] / problem.groups;
    if (*images > kMost / (size.p * size.q) || tiles_of(product, tile) > kMost) *images = 0;
    return product;
  }
  int64_t steps(const GradientProduct& product, const RfConvConfiguration& tile) const {
    return divide_up(static_cast<int64_t>(product.depth) * product.bytes, tile.step_bytes);
  }
  double merging(const RfConvConfiguration& tile, const GradientProduct& product,
                 int64_t splits) const {
    return left_and_merged(tile, static_cast<double>(tiles_of(product, tile) * splits), gpu);
  }
  // Of the parts' sums, where they meet in memory.
  int64_t workspace(const RfConvConfiguration& tile, int64_t tiles, int64_t splits,
                    int64_t /*images*/) const {
    return tiles * splits * tile.m * tile.n * 4;
  }
};

}  // namespace resnet_fused
