// The choice of a weight's gradient, for the plans of conv_wgrad and conv_bn_wgrad. Inside of this
// room.
#pragma once

#include "conv_gradient_choice.h"
#include "tma_request.h"
#include "wgrad_tma.h"

namespace resnet_fused {

// Table: of an op's configurations by mma.sync, behind which those by wgmma come.
template <class Table>
struct WgradChooser : GradientChooser {
  // A result of one tile still fills the largest GPUs twice.
  static constexpr int kMostSplits = 512;
  static constexpr bool kSplitsByTma = true;

  static const RfConvConfiguration* tile(int32_t index) {
    return index < Table::kSize ? Table::at(index) : wgrad_tma_configuration(index - Table::kSize);
  }
  static int32_t tiles() { return Table::kSize + wgrad_tma_configurations(); }

  // The sums run over all images, so a launch cannot leave any out.
  GradientProduct product(const RfConvConfiguration& tile, int64_t* images) const {
    const OutputSize size = output_size(problem);
    GradientProduct product = common();
    product.columns = wgrad_columns(problem, tile);
    product.copies = problem.groups;
    product.over_pixels = true;
    product.wide = wgrad_reads_wide(problem, reads_y);
    product.depth = static_cast<double>(*images * size.p * size.q);
    product.rows = problem.weight_size[0] / problem.groups;
    if (*images > kMost / (size.p * size.q) || tiles_of(product, tile) > kMost) *images = 0;
    return product;
  }
  int64_t steps(const GradientProduct& product, const RfConvConfiguration& tile) const {
    return divide_up(static_cast<int64_t>(product.depth) * product.bytes, tile.step_bytes);
  }
  std::string unfit(const RfConvConfiguration& tile, const GradientProduct& product, int32_t index,
                    int64_t images) const {
    if (tile.tma == 0) return GradientChooser::unfit(tile, product, index, images);
    return unfit_for_tma("dy");
  }
  double cycles(const RfConvConfiguration& tile, const GradientProduct& product, int64_t splits,
                int32_t index, int64_t images) const {
    if (tile.tma == 0) return GradientChooser::cycles(tile, product, splits, index, images);
    return wgrad_tma_cost(product, tile, sharing(index), splits, gpu);
  }
  int64_t blocks(const RfConvConfiguration& tile, const GradientProduct& product, int64_t splits,
                 int32_t index, int64_t images) const {
    if (!shares(index)) return GradientChooser::blocks(tile, product, splits, index, images);
    return wgrad_tma_blocks(product, tile, sharing(index), splits);
  }
  // By wgmma every block leaves its sums.
  bool merges(const RfConvConfiguration& tile, int64_t splits) const {
    return tile.tma != 0 || splits > 1;
  }
  double merging(const RfConvConfiguration& tile, const GradientProduct& product,
                 int64_t splits) const {
    return left_and_merged(tile, static_cast<double>(tiles_of(product, tile) * splits), gpu);
  }
  // Of the parts' sums, where they meet in memory.
  int64_t workspace(const RfConvConfiguration& tile, int64_t tiles, int64_t splits,
                    int64_t /*images*/) const {
    return merges(tile, splits) ? parts_bytes(tile, tiles * splits) : 0;
  }

 protected:
  // Of a configuration by TMA.
  static WgradSharing sharing(int32_t index) { return wgrad_tma_sharing(index - Table::kSize); }
  // Whether it is one of clusters.
  static bool shares(int32_t index) {
    const int32_t by_tma = index - Table::kSize;
    return by_tma >= 0 && by_tma < wgrad_tma_configurations() && sharing(index).blocks() > 1;
  }
  // What keeps the problem from all configurations by TMA. gradient: dy's name.
  std::string unfit_for_tma(const char* gradient) const {
    const std::string found = no_tma();
    return found.empty() ? wgrad_tma_fault(problem, reads_y, gradient) : found;
  }
  // What keeps a GPU or a build from them.
  std::string no_tma() const {
    if (gpu.capability != 90) return "TMA and wgmma are for GPUs of capability 9.0";
    return kBuiltForSm90a ? "" : "this build holds no machine code for sm_90a";
  }
  static int64_t parts_bytes(const RfConvConfiguration& tile, int64_t parts) {
    return parts * tile.m * tile.n * 4;
  }
};

}  // namespace resnet_fused
