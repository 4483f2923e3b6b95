// What the gradients of an input for sm_90a are told, and the shape of a block's tile. Numbers
// alone: the launches know it as well.
#pragma once

#include "../ptx/tensor_map.h"
#include "tma_conv.h"
#include "warpgroup_shape.h"

namespace resnet_fused {

// By strides of up to 2 x 2.
constexpr int kMostPhases = 4;

// The taps of the filter that a phase meets along one axis, from the last one backwards.
struct PhaseTaps {
  int32_t last;
  int32_t step;
};

// The gradient of an input's pixels of one phase of the stride (gradient_geometry.h) is a
// convolution of dy by a stride of 1 with the phase's taps, walked backwards, of filters whose
// channels have changed sides.
struct DgradPhase {
  // x is dy; weight {C / groups, S, R, K}, as it lies; out is dx; scale is of dy's channels, the
  // reduction; no shift. Without taps there are no steps, and neither x nor y is mapped.
  ConvTmaArguments conv;
  ptx::TensorMap y;  // mapped as dy is
  PhaseTaps taps_h;
  PhaseTaps taps_w;
};

// Tiles of all phases: runs of so many of each phase, which share dy in L2, one phase behind the
// other, the one with most taps first. A run's tiles of a phase are one for each block.
struct PhasedTiles {
  int32_t count;
  int32_t whole_runs;
  Divisor of_run;         // tiles of a whole run
  Divisor of_phase;       // of one phase in it
  Divisor of_last_phase;  // in a last run that is not whole
};

struct ConvDgradTmaArguments {
  DgradPhase phases[kMostPhases];
  int32_t count;  // of phases
  PhasedTiles tiles;
  bool masked;  // y is read
  // A phase's pixels of dx do not lie one behind the other: what is mapped as dx is comes and goes
  // by im2col maps {C, W, H, N} of the phase's pixels.
  bool apart;
};

// The tiles of one block, one after the other.
class PhasedWalk : public BlockWalk {
 public:
  RF_HOST_DEVICE PhasedWalk(const ConvDgradTmaArguments& arguments, int32_t first, int32_t step)
      : BlockWalk(arguments.tiles.count, arguments.phases[0].conv.reverse, first, step),
        arguments_(arguments) {
    find();
  }

  RF_HOST_DEVICE void next() {
    BlockWalk::next();
    find();
  }
  RF_HOST_DEVICE int32_t phase() const { return phase_; }
  RF_HOST_DEVICE const DgradPhase& told() const { return arguments_.phases[phase_]; }
  RF_HOST_DEVICE const ConvTmaArguments& convolution() const { return told().conv; }
  RF_HOST_DEVICE TmaTile tile() const { return tile_of(of_phase_, convolution().tiles); }

 private:
  RF_HOST_DEVICE void find() {
    if (done()) return;
    const PhasedTiles& tiles = arguments_.tiles;
    const auto at = static_cast<uint32_t>(index());
    const uint32_t run = quotient(at, tiles.of_run);
    const uint32_t rest = at - run * tiles.of_run.value;
    const bool whole = run < static_cast<uint32_t>(tiles.whole_runs);
    const Divisor& each = whole ? tiles.of_phase : tiles.of_last_phase;
    const uint32_t phase = quotient(rest, each);
    phase_ = static_cast<int32_t>(phase);
    of_phase_ = static_cast<int32_t>(run * tiles.of_phase.value + rest - phase * each.value);
  }

  const ConvDgradTmaArguments& arguments_;
  int32_t phase_ = 0;
  int32_t of_phase_ = 0;  // the tile's index among the phase's
};

// Pixels on the left, which threads turn in registers on their way into the products; of the right
// side, filters as they lie, boxes of 64 input channels. Blocks of a cluster share what they read
// as those of WarpgroupShape do: filters in whole boxes, pixels in whole patterns of the swizzle;
// their ring is turned_ring.h's.
template <int kChannels_, int kStages_, int kFilterSharing_ = 1, int kPixelSharing_ = 1>
struct DgradTmaShape {
  static constexpr bool kPixelsLeft = true;
  static constexpr bool kTogether = true;
  static constexpr bool kTurned = true;
  static constexpr int kFilterSharing = kFilterSharing_;
  static constexpr int kPixelSharing = kPixelSharing_;
  static constexpr int kSharing = kFilterSharing * kPixelSharing;  // blocks of a cluster
  static constexpr int kPixels = kConsumers * kWarpgroupRows;
  static constexpr int kChannels = kChannels_;
  static constexpr int kStages = kStages_;
  static constexpr int kColumns = kChannels;
  static constexpr int kReaders = kConsumers * kWarpgroupWarps;
  static constexpr int kStoredPixels = kWarpgroupRows;
  static_assert(kColumns % kStepElements == 0 && kColumns <= 256);
  static_assert(kStages >= 2, "one step in use, one arriving");

  // What a block asks for of a step: boxes of filters, rows of pixels.
  static constexpr int kBoxes = kChannels / kStepElements;
  static constexpr int kFilterBoxes = kBoxes / kFilterSharing;
  static constexpr int kPixelPart = kPixels / kPixelSharing;
  static_assert(kFilterBoxes * kFilterSharing == kBoxes);
  static_assert(kPixelPart * kStepRowBytes % kTileAlignment == 0);

  // From a multiple of 1024: the stages, each dy, y and the filters; a staging tile for each
  // consumer; the ring's barriers.
  static constexpr int kPixelBytes = kPixels * kStepRowBytes;
  static constexpr int kPixelsAt = 0;
  static constexpr int kMaskAt = kPixelBytes;
  static constexpr int kFiltersAt = 2 * kPixelBytes;
  static constexpr int kFilterBytes = kChannels * kStepRowBytes;
  static constexpr int kStageBytes = kFiltersAt + kFilterBytes;
  static constexpr int kStagingAt = kStages * kStageBytes;
  static constexpr int kStagingBytes = kColumns * kStepRowBytes;
  static constexpr int kRingAt = kStagingAt + kConsumers * kStagingBytes;
  static constexpr int kRingBytes = (kSharing > 1 ? 2 : 1) * ring_bytes(kStages);
  static constexpr int kSharedBytes = kRingAt + kRingBytes;
  static_assert(kStageBytes % kTileAlignment == 0);
  static_assert(kSharedBytes <= kMostSharedBytes);
};

}  // namespace resnet_fused
