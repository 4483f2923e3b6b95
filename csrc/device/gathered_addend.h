// What is added to every so many-th pixel of a warpgroup's tile, brought to its staging tile by the
// warpgroup's threads: to the others' places come zeros.
#pragma once

#include <cstdint>

#include "../ptx/ptx.h"
#include "addend_pixel.h"
#include "bn_dgrad_tma.h"
#include "phase_place.h"
#include "tile_shape.h"

namespace resnet_fused {

#if defined(RF_HAS_WGMMA)

// Asks for 16 bytes at a time, rows of the tile thread by thread as they are measured. The staging
// has been read by whoever read it last. Staged: with pixels on the left; thread: of the warpgroup.
template <class T, int kColumns, class Staged>
RF_DEVICE void gather_addend(const GatheredAddend& addend, const ConvTmaArguments& conv,
                             const PhasePlace& place, const Staged& staged, uint32_t thread) {
  constexpr int kUnit = kChunkBytes / static_cast<int>(sizeof(T));
  constexpr uint32_t kUnits = kColumns / kUnit;
  constexpr uint32_t kLanes = kWarpgroupThreads / kUnits;
  const uint32_t unit = thread % kUnits;
  const auto channel = static_cast<int32_t>(unit * kUnit);
  const bool known = place.channel + channel < conv.channels;
  const T* const from = static_cast<const T*>(addend.first) + place.in_all + channel;
#pragma unroll 2
  for (uint32_t row = thread / kUnits; row < kWarpgroupRows; row += kLanes) {
    const int32_t m = place.pixel + static_cast<int32_t>(row);
    Pixel at = pixel_of(m, conv.grid);
    const bool there = to_addend(at, addend.step) && known && m < conv.grid.pixels;
    const ptx::SharedAddress to =
        staged.box(unit / 8) + row * kStepRowBytes + (unit % 8 ^ row % 8) * kChunkBytes;
    ptx::cp_async<kChunkBytes>(to, there ? from + offset_of(at, addend.strides) : addend.first,
                               there);
  }
  ptx::cp_async_commit_group();
}

#endif

}  // namespace resnet_fused
