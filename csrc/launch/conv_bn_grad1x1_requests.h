// What conv_bn_grad1x1 and conv_bn_grad1x1_end for sm_90a share: tiles as a table has them, maps,
// predicted cycles. Inside of this room.
#pragma once

#include <cstdint>
#include <string>

#include "../device/grad1x1_tma.h"
#include "conv_bn_grad1x1_arguments.h"
#include "tma_request.h"

namespace resnet_fused {

template <class Shape>
std::string grad1x1_name_of() {
  return "tma_" + std::to_string(Shape::kFilters) + "x" + std::to_string(Shape::kChannels) + "_" +
         std::to_string(Shape::kStages) + "s";
}
template <class Shape>
RfConvConfiguration grad1x1_configuration_of() {
  return {nullptr,
          1,
          Shape::kFilters,
          Shape::kChannels,
          1,
          kWarpgroupWarps,
          Shape::kStages,
          1,
          Shape::kPixels * static_cast<int32_t>(kTmaElementBytes),
          Shape::kSharedBytes,
          0,
          1};
}

// The maps that a launch is given, in steps of a tile's pixels.
struct Grad1x1Requests {
  TensorMapRequest dz, y, x, addend, dx, weight;
  bool affine;
  bool maps_addend;  // one for each pixel, behind one another
};
TensorMapRequest grad1x1_pixels_request(const RfConvBnDgrad& image, const void* at,
                                        int64_t channels, const int64_t (&stride)[4], int32_t box);
Grad1x1Requests grad1x1_requests(const RfConvBnGrad1x1& problem, const RfConvConfiguration& tile);
// With the argument's name, x's being `input`; empty if nothing keeps them from TMA.
std::string grad1x1_requests_fault(const Grad1x1Requests& requests, const char* input);
int encode_grad1x1(const Grad1x1Requests& requests, Grad1x1TmaArguments* arguments);

// What becomes of a step beside its products.
struct Grad1x1EndWork {
  double tensors;       // of the input's size, read beside x and the addend
  double moved;         // of that size, through shared memory, beside how they come and the addend
  double instructions;  // of an element, beside those of its rounding
};
// Predicted cycles of so many parts.
double grad1x1_tma_cycles(const RfConvBnDgrad& image, const RfConvConfiguration& tile,
                          const Grad1x1EndWork& end, int64_t parts, const RfGpu& gpu);

}  // namespace resnet_fused
