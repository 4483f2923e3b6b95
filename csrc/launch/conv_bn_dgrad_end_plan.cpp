// The table of conv_bn_dgrad_end's configurations, and the pure function that picks one and its
// splits.
#include "conv_bn_dgrad_choice.h"
#include "conv_bn_dgrad_end_arguments.h"
#include "conv_bn_dgrad_end_tiles.h"
#include "conv_bn_dgrad_end_tma.h"
#include "conv_bn_dgrad_end_tma_tiles.h"
#include "tma_request.h"

namespace resnet_fused {
namespace {

using BnDgradEndTable =
    GradientTable<BnDgradEndWideTiles, BnDgradEndNarrowTiles, true, kBnDgradFloatColumns>;

// Instructions that an element takes at its tile's end beside kEndInstructions: to be masked by the
// block's output, and summed; a projection's sum.
constexpr double kMaskAndSumInstructions = 6;
constexpr double kThirdSumInstructions = 3;
// By wgmma all of them beside the four of kResults (counted in what ptxas 13.0 makes: a thread of
// 64 elements has 80 for the mask's bits, 310 to add, round, mask and store, 630 to sum, 250 to
// meet); and 520 of the third sum.
constexpr double kTmaEndInstructions = 16;
constexpr double kTmaThirdSumInstructions = 8;
// A warpgroup's own way through a tile's end waits so often: while the sums meet (a fence and an
// atomic) `out` comes, then raw; and for what the projection made.
constexpr double kTmaWaits = 3;

const std::vector<DgradTmaEntry>& tma_table() { return dgrad_tma_table<BnDgradEndTmaTiles>(); }
TmaTileFacts tma_tile_at(int32_t index) {
  return dgrad_tma_tile<BnDgradEndTmaTiles>(index - kFirstBnDgradEndTma);
}

// By mma.sync, behind those by wgmma.
struct BnDgradEndChooser : BnDgradProducts<BnDgradEndTable> {
  const RfConvBnDgradEnd& ended;

  static const RfConvConfiguration* tile(int32_t index) {
    return rf_conv_bn_dgrad_end_configuration(index);
  }
  static int32_t tiles() { return rf_conv_bn_dgrad_end_configurations(); }

  std::string unfit(const RfConvConfiguration& tile, const GradientProduct& product, int32_t index,
                    int64_t images) const {
    if (tile.tma == 0) return DgradChooser::unfit(tile, product, index, images);
    if (gpu.capability != 90) return "TMA and wgmma are for GPUs of capability 9.0";
    if (!kBuiltForSm90a) return "this build holds no machine code for sm_90a";
    return bn_dgrad_end_tma_fault(ended, tma_tile_at(index), images);
  }
  double cycles(const RfConvConfiguration& tile, const GradientProduct& product, int64_t splits,
                int32_t index, int64_t images) const {
    if (tile.tma == 0) return DgradChooser::cycles(tile, product, splits, index, images);
    const bool projected = ended.projected != 0;
    DgradWork work{reads_y, 0, kTmaEndInstructions, product.ends};
    if (reads_y) {
      work.turning = kTurnPairInstructions;
      work.loads = kCoefficientLoads;
    }
    if (projected) work.finishing += kTmaThirdSumInstructions;
    work.waits = (kTmaWaits + (projected ? 1 : 0)) * kLatency;
    work.asked = product.ends - 1;  // all but dx
    return dgrad_tma_cost(problem, tma_tile_at(index), work, images, gpu);
  }
  int64_t blocks(const RfConvConfiguration& tile, const GradientProduct& product, int64_t splits,
                 int32_t index, int64_t images) const {
    if (tile.tma == 0) return DgradChooser::blocks(tile, product, splits, index, images);
    return dgrad_tma_blocks(problem, tma_tile_at(index), images, gpu);
  }

  GradientProduct product(const RfConvConfiguration& tile, int64_t* images) const {
    const bool projected = ended.projected != 0;
    GradientProduct product = BnDgradProducts::product(tile, images);
    product.finishing =
        kEndInstructions + kMaskAndSumInstructions + (projected ? kThirdSumInstructions : 0);
    product.ends += projected ? 2 : 1;  // out, residual
    return product;
  }
  int64_t workspace(const RfConvConfiguration& tile, int64_t /*tiles*/, int64_t splits,
                    int64_t images) const {
    return bn_dgrad_end_layout(ended, tile, static_cast<int32_t>(splits), images).bytes;
  }
};

}  // namespace
}  // namespace resnet_fused

extern "C" int32_t rf_conv_bn_dgrad_end_configurations(void) {
  return resnet_fused::kFirstBnDgradEndTma + resnet_fused::BnDgradEndTmaTiles::kSize;
}

extern "C" const RfConvConfiguration* rf_conv_bn_dgrad_end_configuration(int32_t index) {
  using namespace resnet_fused;
  if (index < kFirstBnDgradEndTma) return BnDgradEndTable::at(index);
  return configuration_at<tma_table>(index - kFirstBnDgradEndTma);
}

extern "C" int32_t rf_conv_bn_dgrad_end_plan(const RfConvBnDgradEnd* problem, const RfGpu* gpu,
                                             int32_t configuration, int32_t splits,
                                             RfConvPlan* plan, char* why, size_t why_bytes) {
  using namespace resnet_fused;
  const Refusal refuse{why, why_bytes};
  const RfConvBnDgrad& image = problem->image;
  if (check_addend(image, refuse) != 0) return 1;
  const BnDgradEndChooser chooser{{{{image.conv, *gpu, image.affine != 0}}, image}, *problem};
  return choose(chooser, configuration, splits, plan, refuse);
}
