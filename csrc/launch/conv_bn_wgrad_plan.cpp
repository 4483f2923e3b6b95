// The table of conv_bn_wgrad's configurations, and the pure function that picks one and its splits.
//
// The choice is the least predicted time, as for conv_wgrad.
#include "conv_bn_wgrad_arguments.h"
#include "conv_bn_wgrad_tiles.h"
#include "conv_bn_wgrad_window.h"
#include "conv_image.h"
#include "conv_wgrad_choice.h"

namespace resnet_fused {
namespace {

using BnWgradTable =
    GradientTable<BnWgradWideTiles, BnWgradNarrowTiles, false, 256, BnWgradImageTiles>;

// Instructions that an element of an image takes: it is loaded once a step, and a pixel's bounds
// and address serve all of its channels.
constexpr double kImageInstructions = 5;

constexpr const char* kNoSlices =
    "windows are for input channels in sixteens, and filters whose rows follow each other";
constexpr const char* kNoNormForSeveral = "norm: blocks that share x read it as it is";

struct BnWgradChooser : WgradChooser<BnWgradTable> {
  const RfConvBnWgrad& read;

  // Behind the others, those by windows.
  static const RfConvConfiguration* tile(int32_t index) {
    const int32_t others = WgradChooser::tiles();
    return index < others ? WgradChooser::tile(index) : wgrad_window_configuration(index - others);
  }
  static int32_t tiles() { return WgradChooser::tiles() + wgrad_window_configurations(); }

  static bool by_windows(const RfConvConfiguration& tile) {
    return tile.tma != 0 && tile.window != 0;
  }

  std::string unfit(const RfConvConfiguration& tile, const GradientProduct& product, int32_t index,
                    int64_t images) const {
    if (by_windows(tile)) {
      const std::string found = no_tma();
      return found.empty() ? wgrad_window_fault(read, tile) : found;
    }
    if (tile.tma != 0) {
      const std::string found = unfit_for_tma("dz");
      if (!found.empty() || read.normed == 0) return found;
      const std::string fault = norm_fault(problem.weight_size[1], read.norm);
      return fault.empty() && shares(index) ? kNoNormForSeveral : fault;
    }
    if (tile.image == 0) {
      const std::string found = GradientChooser::unfit(tile, product, index, images);
      return found.empty() && tile.window != 0 && !bn_wgrad_goes_by_slices(problem) ? kNoSlices
                                                                                    : found;
    }
    const char* fault = wgrad_image_fault(read);
    if (fault != nullptr) return fault;
    return tile.shared_bytes > gpu.shared_per_block ? "too much shared memory for this GPU" : "";
  }
  // Every block leaves its sums.
  bool merges(const RfConvConfiguration& /*tile*/, int64_t /*splits*/) const { return true; }
  int64_t workspace(const RfConvConfiguration& tile, int64_t tiles, int64_t splits,
                    int64_t /*images*/) const {
    return parts_bytes(tile, tiles * splits);
  }

  GradientProduct product(const RfConvConfiguration& tile, int64_t* images) const {
    GradientProduct product = WgradChooser::product(tile, images);
    if (tile.image != 0) {
      const OutputSize size = output_size(problem);
      const int64_t pixels = image_pixels(size.q) * size.p;
      product.columns = tile.n;
      product.depth = static_cast<double>(*images * pixels);
      if (*images > kMost / std::max<int64_t>(pixels, 1)) *images = 0;
    }
    if (by_windows(tile)) product.depth = static_cast<double>(wgrad_window_positions(problem));
    product.wide = bn_wgrad_reads_wide(read);
    product.turning = reads_y ? kBackwardInstructions : 0;
    product.turning_right = read.normed != 0 ? kNormInstructions : 0;
    return product;
  }
  double cycles(const RfConvConfiguration& tile, const GradientProduct& product, int64_t splits,
                int32_t of, int64_t images) const {
    if (by_windows(tile)) return wgrad_window_cost(read, tile, splits, gpu);
    if (tile.tma != 0) {
      return wgrad_tma_cost(product, tile, sharing(of), splits, gpu, transform_of(tile));
    }
    if (tile.image == 0) return WgradChooser::cycles(tile, product, splits, of, images);
    const auto busy =
        static_cast<double>(divide_up(tiles_of(product, tile) * splits, gpu.multiprocessors));
    const double resident = resident_blocks(tile, tile.shared_bytes, busy, gpu);
    const double gradients = static_cast<double>(tile.m) * tile.step_bytes;
    const double rows = kImageChunks * kChunkBytes;
    const double turning = gradients / 2 * product.turning / kInstructions;
    const StepWork work{gradients * product.operands + rows,
                        product.turning > 0 ? gradients * (product.operands + 1) : 0,
                        turning + rows / 2 * kImageInstructions / kInstructions};
    const double pause = turning > 0 ? (turning + kTurnLatency) / resident : 0;
    const double steps = product.depth / kImagePixels / static_cast<double>(splits);
    const double step = step_cycles(tile, work, product.bytes, resident) + pause;
    return blocks_cycles(busy, resident, steps * step, 0);
  }

 private:
  // Of a step's columns by TMA, which have taps of their own.
  StepTransform transform_of(const RfConvConfiguration& tile) const {
    if (read.normed == 0) return {};
    const int64_t taps = problem.weight_size[2] * problem.weight_size[3];
    const int64_t each = wgrad_columns(problem, tile) / taps;
    const bool padded = problem.padding[0] > 0 || problem.padding[1] > 0;
    return step_transform(tile.n / kStepElements, kStepElements,
                          padded ? std::min(taps, divide_up(tile.n, each)) : 0);
  }
};

}  // namespace
}  // namespace resnet_fused

extern "C" {

int32_t rf_conv_bn_wgrad_configurations(void) { return resnet_fused::BnWgradChooser::tiles(); }

const RfConvConfiguration* rf_conv_bn_wgrad_configuration(int32_t index) {
  return resnet_fused::BnWgradChooser::tile(index);
}

int32_t rf_conv_bn_wgrad_plan(const RfConvBnWgrad* problem, const RfGpu* gpu, int32_t configuration,
                              int32_t splits, RfConvPlan* plan, char* why, size_t why_bytes) {
  using namespace resnet_fused;
  const Refusal refuse{why, why_bytes};
  const auto wanted = static_cast<DataType>(problem->weight_dtype);
  if (wanted != DataType::kFloat32 && problem->weight_dtype != problem->product.dtype) {
    return refuse("dtype %d of the gradient; that of dz, %d, and float32 are served",
                  problem->weight_dtype, problem->product.dtype);
  }
  return choose(BnWgradChooser{{{problem->product, *gpu, problem->affine != 0}}, *problem},
                configuration, splits, plan, refuse);
}

}  // extern "C"
