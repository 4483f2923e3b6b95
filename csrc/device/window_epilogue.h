// The epilogue of the window kernel: a warpgroup's results as its type's own epilogue makes them,
// of a tile of which some positions are no pixels.
//
// TMA brings the shortcut by the output's walk, zeros where there is no pixel. Threads store, 16
// bytes each and rows of 128 bytes by eight of them, of 64 by four: no manual says what a store by
// im2col does with positions outside of the tensor.
#pragma once

#include <cstdint>

#include "../ptx/mbarrier.h"
#include "../ptx/proxy.h"
#include "../ptx/ptx.h"
#include "conv_types.h"
#include "conv_window.h"
#include "vector.h"
#include "warpgroup_epilogue.h"
#include "window_load.h"

namespace resnet_fused {

#if defined(RF_HAS_WGMMA)

// By all threads of a warpgroup: stores those of a tile's kPixels positions from `position` on that
// are pixels, 64 channels from `channel` on. staging: as the epilogues leave results.
template <class Result, int kPixels>
RF_DEVICE void store_window(const ConvWindowArguments& arguments, ptx::SharedAddress staging,
                            int32_t position, int32_t channel, uint32_t thread) {
  constexpr int kRowBytes = kWarpgroupRows * sizeof(Result);
  constexpr int kUnits = kRowBytes / kVectorBytes;   // of a row
  constexpr int kRows = kWarpgroupThreads / kUnits;  // that all threads store at a time
  static_assert(kPixels % kRows == 0 && kRows % 8 == 0);
  const uint32_t unit = thread % kUnits;
  const uint32_t row = thread / kUnits;
  // Units change places by the number of their line of 128 bytes; eight rows further it is the
  // same one.
  const ptx::SharedAddress from =
      staging + row * kRowBytes + (unit ^ row * kRowBytes / 128 % kUnits) * kVectorBytes;
  unsigned char* const to =
      static_cast<unsigned char*>(arguments.out) +
      (static_cast<int64_t>(sizeof(Result)) * channel + static_cast<int32_t>(unit) * kVectorBytes);
  const PixelGrid& walk = arguments.walk;
#pragma unroll
  for (int i = 0; i < kPixels / kRows; ++i) {
    const int32_t m = position + static_cast<int32_t>(row) + i * kRows;
    const Pixel at = pixel_of(m, walk);
    if (!is_pixel(at, m, walk)) continue;
    const auto made = ptx::load_shared<Vector<Result>>(from + i * kRows * kRowBytes);
    ptx::store_global(
        reinterpret_cast<Vector<Result>*>(to + offset_of(at, arguments.out_strides) * kVectorBytes),
        made);
  }
}

template <class T, int kPixels>
using WindowEpilogueOf =
    typename ConvTypes<T>::template Epilogue<Orientation::kChannelsLeft, kPixels>;

// T: as of ConvTypes. kPixels: positions of a tile.
template <class T, int kPixels>
class WindowEpilogue : WindowEpilogueOf<T, kPixels> {
  using Base = WindowEpilogueOf<T, kPixels>;
  using Result = typename ConvTypes<T>::Result;

 public:
  using Base::kStagingBytes;
  using typename Base::Own;

  // thread: of the warpgroup. channel: the tile's first one.
  RF_DEVICE WindowEpilogue(const ConvWindowArguments& arguments, const Own& own, uint32_t thread,
                           int32_t channel)
      : Base(own, thread), arguments_(arguments), channel_(channel) {
    // Whole tiles of channels: none is beyond the last one.
    Base::fetch({arguments.scale, arguments.shift, channel + kWarpgroupRows}, channel);
  }

  // While the products run: once all threads have read what they stored last, asks for the shortcut
  // from `position` on.
  RF_DEVICE void begin(int32_t position) {
    Base::meet();
    if (arguments_.has_residual && Base::thread_ == 0) {
      ptx::mbarrier_arrive_expect_tx(Base::own_.residual, Base::kShortcutBytes);
      load_walk(Base::own_.staging, &arguments_.residual, channel_,
                pixel_of(position, arguments_.walk), Base::own_.residual);
    }
    ptx::sync_warp();
  }

  // Stores act(scale d + shift [+ shortcut]) of the positions that are pixels. d: pinned behind its
  // wait.
  RF_DEVICE void finish(const float (&d)[kPixels / 2], int32_t position) {
    const auto act = ConvTypes<T>::act(arguments_);
    if (arguments_.has_residual) {
      Base::wait_for_residual();
      Base::template put_results<true>(d, act);
      ptx::fence_proxy_async_shared();  // TMA writes here again, behind the next `begin`
    } else {
      Base::template put_results<false>(d, act);
    }
    Base::meet();
    store_window<Result, kPixels>(arguments_, Base::own_.staging, position, channel_,
                                  Base::thread_);
  }

 private:
  const ConvWindowArguments& arguments_;
  int32_t channel_;
};

#endif

}  // namespace resnet_fused
