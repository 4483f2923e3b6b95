// What the window kernels ask TMA for in four dimensions; conv_window.h has the walks.
#pragma once

#include <cstdint>

#include "../ptx/tma.h"
#include "conv_window.h"

namespace resnet_fused {

// The filters of all nine taps, of the 64 from `filter` on those 64 channels from `channel` on.
// kRowBytes: of 64 channels, here and below.
template <int kRowBytes = kStepRowBytes>
RF_DEVICE void load_taps(ptx::SharedAddress to, const ptx::TensorMap* filters, int32_t filter,
                         ptx::SharedAddress full, int32_t channel = 0 RF_SITE_PARAMETER) {
  for (int tap = 0; tap < kWindowTaps; ++tap) {
    ptx::tma_load(to + tap * kWarpgroupRows * kRowBytes, filters,
                  {channel, tap % 3, tap / 3, filter}, full RF_SITE);
  }
}

// 64 channels of as many positions of a walk as its map has, from a pixel on. Beside the images and
// beyond the last one TMA brings zeros, as for any place outside of the tensor.
RF_DEVICE void load_walk(ptx::SharedAddress to, const ptx::TensorMap* map, int32_t channel,
                         const Pixel& first, ptx::SharedAddress full RF_SITE_PARAMETER) {
  ptx::tma_load_im2col(to, map, {channel, first.q, first.p, first.n}, {uint16_t{0}, uint16_t{0}},
                       full RF_SITE);
}

// As many rows of a window as its map has, from the one on that the first tap at `position` reads.
RF_DEVICE void load_part(ptx::SharedAddress to, const ptx::TensorMap* map, const PixelGrid& walk,
                         int32_t position, ptx::SharedAddress full,
                         int32_t channel = 0 RF_SITE_PARAMETER) {
  Pixel first = pixel_of(position, walk);
  --first.q;
  --first.p;
  load_walk(to, map, channel, first, full RF_SITE);
}

// The window of the tile from `position` on, 64 channels from `channel` on, part by part, behind
// `ring.acquire`. Arguments: ConvWindowArguments or ChainWindowArguments.
template <int kRowBytes = kStepRowBytes, class Arguments>
RF_DEVICE void load_window(ptx::SharedAddress to, const Arguments& arguments, int32_t position,
                           ptx::SharedAddress full, int32_t channel = 0 RF_SITE_PARAMETER) {
  for (int32_t part = 0; part < arguments.parts; ++part) {
    const int32_t row = part * arguments.part_rows;
    load_part(to + row * kRowBytes, &arguments.x, arguments.walk, position + row, full,
              channel RF_SITE);
  }
}

}  // namespace resnet_fused
