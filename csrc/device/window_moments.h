// The epilogue of conv_bn_stats by windows: as walk_moments.h's, of tiles of which some positions
// are no pixels. Those are neither stored nor measured.
#pragma once

#include <cstdint>

#include "../ptx/keep.h"
#include "../ptx/warp.h"
#include "walk_moments.h"
#include "window_epilogue.h"
#include "window_stats.h"

namespace resnet_fused {

#if defined(RF_HAS_WGMMA)

// Those of a tile's positions that are pixels; as FirstColumns are asked for.
template <int kPositions>
class PixelColumns {
  static constexpr int kWords = (kPositions + 31) / 32;

 public:
  // By all lanes of a warp, of the tile from `position` on.
  RF_DEVICE void find(int32_t position, const PixelGrid& walk, uint32_t thread) {
    count_ = 0;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const int32_t column = 32 * i + static_cast<int32_t>(thread % 32);
      const int32_t m = position + column;
      const bool pixel = is_pixel(pixel_of(m, walk), m, walk) && column < kPositions;
      const uint32_t all = ptx::ballot(ptx::kWholeWarp, pixel);
      count_ += __builtin_popcount(all);
      words_[i] = all >> (2 * (thread % 4));
    }
  }

  RF_DEVICE int32_t count() const { return count_; }
  RF_DEVICE bool has(int column) const { return (words_[column / 32] >> column % 32 & 1) != 0; }
  RF_DEVICE void keep() {
#pragma unroll
    for (uint32_t& word : words_) ptx::keep(word);
  }

 private:
  uint32_t words_[kWords];
  int32_t count_;
};

// T: BFloat16 or Float16. kPositions: of a tile, each of which has a pixel.
template <class T, int kPositions>
class WindowMoments : public WalkMoments<T, kPositions> {
  using Base = WalkMoments<T, kPositions>;

 public:
  // thread: of the warpgroup. channel: the tile's first one.
  RF_DEVICE WindowMoments(const ConvWindowArguments& arguments, const typename Base::Own& own,
                          uint32_t thread, int32_t channel)
      : Base(own, thread), arguments_(arguments), channel_(channel) {}

  // While the products of the tile from `position` on run.
  RF_DEVICE void begin(int32_t position) { pixels_.find(position, arguments_.walk, this->thread_); }

  // Stores d, rounded, and measures it. d: pinned behind its wait; afterwards it is rounded.
  RF_DEVICE void finish(float (&d)[kPositions / 2], int32_t position) {
    Base::measure(d, pixels_, pixels_.count(), [&] {
      this->meet();
      store_window<T, kPositions>(arguments_, this->own_.staging, position, channel_,
                                  this->thread_);
    });
  }

 private:
  const ConvWindowArguments& arguments_;
  int32_t channel_;
  PixelColumns<kPositions> pixels_;
};

#endif

}  // namespace resnet_fused
