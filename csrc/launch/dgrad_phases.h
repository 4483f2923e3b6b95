// The phases of a stride (gradient_geometry.h) as TMA is told of them: of each, the pixels of an
// input and the walk of dy that makes their gradient. Inside of this room.
#pragma once

#include <cstdint>
#include <vector>

#include "../device/dgrad_tma.h"
#include "conv_bn_act_tma.h"
#include "conv_gradients.h"

namespace resnet_fused {

// Along one axis.
struct PhaseSide {
  int64_t size;      // pixels of the input
  int32_t index;     // the remainder
  int32_t taps;      // that it meets
  PhaseTaps filter;  // which of the filter's they are, against the walk
  int32_t origin;    // row of dy that the first pixel's first step reads
  int32_t step;      // rows of dy from one tap to the next
};
struct DgradPhaseFacts {
  PhaseSide h;
  PhaseSide w;

  int64_t taps() const { return int64_t{h.taps} * w.taps; }
  OutputSize size() const { return {h.size, w.size}; }
};

// Those that have pixels, the one with most taps first.
std::vector<DgradPhaseFacts> phases_of(const RfConvGradient& problem);

// Whether a phase's pixels of dx do not lie one behind the other.
inline bool lies_apart(const RfConvGradient& problem) {
  return problem.stride[0] != 1 || problem.stride[1] != 1;
}

// A tensor of four sizes, or of which there is no memory yet.
struct Placed {
  const void* at;
  const int64_t (&stride)[4];
};

// Whether a phase reads dy, or y, as a matrix of pixels.
bool phase_is_dense(const RfConvGradient& problem, const DgradPhaseFacts& phase,
                    const Placed& tensor);
// How it reads them, of so many images.
TensorMapRequest phase_walk_request(const RfConvGradient& problem, const DgradPhaseFacts& phase,
                                    const TmaTileFacts& tile, const Placed& tensor, int64_t images);
// Its pixels of what lies apart as dx does; `step`: there is but every so many-th of them.
TensorMapRequest phase_pixels_request(const RfConvGradient& problem, const DgradPhaseFacts& phase,
                                      const TmaTileFacts& tile, const Placed& tensor,
                                      int64_t images, int64_t step);

}  // namespace resnet_fused
