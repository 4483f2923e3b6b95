// The table of conv_bn_dgrad's configurations, and the pure function that picks one and its splits.
#include "conv_bn_dgrad_arguments.h"
#include "conv_bn_dgrad_tiles.h"
#include "conv_gradient_choice.h"

namespace resnet_fused {
namespace {

using BnDgradTable =
    GradientTable<BnDgradWideTiles, BnDgradNarrowTiles, true, kBnDgradFloatColumns>;

struct BnDgradChooser : DgradChooser<BnDgradTable> {
  const RfConvBnDgrad& whole;

  GradientProduct product(const RfConvConfiguration& tile, int64_t* images) const {
    GradientProduct product = DgradChooser::product(tile, images);
    const auto step = static_cast<double>(whole.addend_step);
    product.turning = reads_y ? kBackwardInstructions : 0;
    product.finishing = kEndInstructions + (whole.reduced != 0 ? kReduceInstructions : 0);
    product.ends += whole.reduced != 0 ? 1 : 0;
    product.ends += whole.added != 0 ? 1 / (step * step) : 0;
    return product;
  }
  int64_t workspace(const RfConvConfiguration& tile, int64_t /*tiles*/, int64_t splits,
                    int64_t images) const {
    return bn_dgrad_layout(whole, tile, static_cast<int32_t>(splits), images).bytes;
  }
};

}  // namespace
}  // namespace resnet_fused

extern "C" int32_t rf_conv_bn_dgrad_configurations(void) {
  return resnet_fused::BnDgradTable::kSize;
}

extern "C" const RfConvConfiguration* rf_conv_bn_dgrad_configuration(int32_t index) {
  return resnet_fused::BnDgradTable::at(index);
}

extern "C" int32_t rf_conv_bn_dgrad_plan(const RfConvBnDgrad* problem, const RfGpu* gpu,
                                         int32_t configuration, int32_t splits, RfConvPlan* plan,
                                         char* why, size_t why_bytes) {
  using namespace resnet_fused;
  const Refusal refuse{why, why_bytes};
  constexpr int64_t kMostStep = int64_t{1} << 30;
  if (problem->added != 0 && (problem->addend_step < 1 || problem->addend_step > kMostStep)) {
    return refuse("an addend at every %lld-th pixel", static_cast<Long>(problem->addend_step));
  }
  const BnDgradChooser chooser{{{problem->conv, *gpu, problem->affine != 0}}, *problem};
  return choose(chooser, configuration, splits, plan, refuse);
}
