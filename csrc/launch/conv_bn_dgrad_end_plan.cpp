// The table of conv_bn_dgrad_end's configurations, and the pure function that picks one and its
// splits.
#include "conv_bn_dgrad_choice.h"
#include "conv_bn_dgrad_end_arguments.h"
#include "conv_bn_dgrad_end_tiles.h"

namespace resnet_fused {
namespace {

using BnDgradEndTable =
    GradientTable<BnDgradEndWideTiles, BnDgradEndNarrowTiles, true, kBnDgradFloatColumns>;

// Instructions that an element takes at its tile's end beside kEndInstructions: to be masked by the
// block's output, and summed; a projection's sum.
constexpr double kMaskAndSumInstructions = 6;
constexpr double kThirdSumInstructions = 3;

// By mma.sync.
struct BnDgradEndChooser : BnDgradProducts<BnDgradEndTable> {
  const RfConvBnDgradEnd& ended;

  static const RfConvConfiguration* tile(int32_t index) {
    return rf_conv_bn_dgrad_end_configuration(index);
  }
  static int32_t tiles() { return rf_conv_bn_dgrad_end_configurations(); }

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
  return resnet_fused::kFirstBnDgradEndTma;
}

extern "C" const RfConvConfiguration* rf_conv_bn_dgrad_end_configuration(int32_t index) {
  return resnet_fused::BnDgradEndTable::at(index);
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
