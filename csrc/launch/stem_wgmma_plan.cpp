// The configurations of the stem for sm_90a, and how long they are predicted to take. None of the
// rates has been measured by this project on a GPU; only their proportions matter.
#include <algorithm>

#include "conv_plan.h"
#include "stem_wgmma.h"

namespace resnet_fused {
namespace {

// Cycles until the filters lie in shared memory, and until a strip's first rows do.
constexpr double kFilters = 4000;
constexpr double kStrip = 3 * kLatency;
constexpr int kRowProducts = 2 * kStemTaps;  // instructions of a row of the convolution
constexpr int kProductDepth = 16;

}  // namespace

std::string stem_wgmma_name(int index) {
  return StemWgmmaShapes::with(index, []<class Shape>() {
    return "tma_" + std::to_string(Shape::kPooled) + "x" + std::to_string(kStemFilters) + "_" +
           std::to_string(Shape::kPairs) + "s";
  });
}

RfConvConfiguration stem_wgmma_configuration(int index) {
  return StemWgmmaShapes::with(index, []<class Shape>() {
    // Two warpgroups multiply.
    return RfConvConfiguration{nullptr,       1, Shape::kColumns,  kStemFilters,        1, 8,
                               Shape::kPairs, 1, Shape::kRowBytes, Shape::kSharedBytes, 0, 1};
  });
}

int64_t stem_wgmma_tiles(int index, int64_t out_width) {
  return StemWgmmaShapes::with(index,
                               [out_width]<class Shape>() { return Shape::tiles(out_width); });
}

// The busiest block's strips, two at a time. Their rows share the tensor cores and shared memory;
// the epilogue of one runs beside the products of the next, loads beside both.
double stem_wgmma_cost(int index, int64_t items, int64_t rows, const RfGpu& gpu) {
  return StemWgmmaShapes::with(index, [&]<class Shape>() {
    const int64_t each = divide_up(items, gpu.multiprocessors);
    const int64_t together = std::min<int64_t>(each, kConsumers);
    const double results = static_cast<double>(Shape::kColumns) * kStemFilters;
    const double matrix = results * kRowProducts * kProductDepth / kWarpgroupUnit;
    const double read = kRowProducts * 2.0 * kProductDepth * (kStemFilters + Shape::kColumns);
    const double shared = (read + Shape::kPairBytes) / kSharedBytes;
    const double row = std::max(
        {static_cast<double>(together) * std::max(matrix, shared), results / kResults, kLatency});
    const auto strips = static_cast<double>(divide_up(each, together));
    return kFilters + strips * (kStrip + (2.0 * static_cast<double>(rows) + 1) * row);
  });
}

}  // namespace resnet_fused
