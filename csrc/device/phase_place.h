// Where a warpgroup's tile of a phase of the stride lies in a convolution's input, and TMA's way
// there.
#pragma once

#include <cstdint>

#include "../ptx/ptx.h"
#include "../ptx/tma.h"
#include "dgrad_tma.h"
#include "warpgroup_epilogue.h"

namespace resnet_fused {

#if defined(RF_HAS_WGMMA)

struct PhasePlace : OutputPlace {
  bool apart;
  int32_t in_all;  // the channel, over all groups
  Pixel at;        // the first one, of the phase
};

RF_DEVICE PhasePlace phase_place(const OutputPlace& place, const ConvTmaArguments& conv,
                                 bool apart) {
  return {place, apart, place.group * conv.channels + place.channel,
          pixel_of(place.pixel, conv.grid)};
}

RF_DEVICE void load_box(ptx::SharedAddress to, const ptx::TensorMap* from, const PhasePlace& place,
                        int32_t channel, ptx::SharedAddress barrier) {
  const Pixel& at = place.at;
  if (place.apart) {
    ptx::tma_load_im2col(to, from, {place.in_all + channel, at.q, at.p, at.n},
                         {uint16_t{0}, uint16_t{0}}, barrier);
  } else {
    load_box(to, from, static_cast<const OutputPlace&>(place), channel, barrier);
  }
}
RF_DEVICE void store_box(const ptx::TensorMap* to, const PhasePlace& place, int32_t channel,
                         ptx::SharedAddress from) {
  const Pixel& at = place.at;
  if (place.apart) {
    ptx::tma_store_im2col(to, {place.in_all + channel, at.q, at.p, at.n}, from);
  } else {
    store_box(to, static_cast<const OutputPlace&>(place), channel, from);
  }
}

#endif

}  // namespace resnet_fused
