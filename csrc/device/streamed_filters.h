// Windows of slices of channels, and the filters that come with them tap by tap: who asks for them,
// and a warpgroup that multiplies them. stream_window.h says what lies where.
//
// Two warpgroups take tiles in turns and read the same two rings, each the steps of its own tiles.
#pragma once

#include <cstdint>

#include "../ptx/ptx.h"
#include "../ptx/wgmma.h"
#include "pipeline.h"
#include "stream_window.h"
#include "warpgroup_tile.h"
#include "window_load.h"

namespace resnet_fused {

#if defined(RF_HAS_WGMMA)

// Where a block's windows and filters lie, and who waits for them.
template <class Shape>
struct StreamedRings {
  static constexpr int kFilterStages = Shape::kFilterStages;
  using Filter = RingPlace<kFilterStages>;

  ptx::SharedAddress shared;
  int32_t window_bytes;

  RF_DEVICE RingOf<Shape> windows() const { return {shared + Shape::kRingAt}; }
  RF_DEVICE Ring<kFilterStages> filters() const { return {shared + Shape::kFilterRingAt}; }
  RF_DEVICE ptx::SharedAddress window(const RingPlace<kConsumers>& at) const {
    return shared + Shape::kWindowsAt + at.stage * window_bytes;
  }
  RF_DEVICE ptx::SharedAddress filter(const Filter& at) const {
    return shared + at.stage * kWindowFilterBytes;
  }

  RF_DEVICE void init() const {
    windows().init(kWarpgroupWarps);
    filters().init(kWarpgroupWarps);
    Turns::init(shared + Shape::kTurnsAt);
  }
};

// A slice of a tile after the other. Walk: tiles of the block.
template <class Walk>
class SliceWalk {
 public:
  RF_DEVICE SliceWalk(const Walk& walk, int32_t slices) : walk_(walk), slices_(slices) {}

  RF_DEVICE bool done() const { return walk_.done(); }
  RF_DEVICE void next() {
    if (++slice_ < slices_) return;
    slice_ = 0;
    walk_.next();
  }
  RF_DEVICE int32_t tile() const { return walk_.index(); }
  // The slice's first channel.
  RF_DEVICE int32_t channel() const { return slice_ * kWindowChannels; }

 private:
  Walk walk_;
  int32_t slices_;
  int32_t slice_ = 0;
};

// Asks for windows, each as a whole.
template <class Shape, class Walk>
class WholeWindows {
 public:
  RF_DEVICE WholeWindows(const ConvWindowArguments& arguments, const StreamedRings<Shape>& rings,
                         const Walk& walk, int32_t slices)
      : arguments_(arguments), rings_(rings), walk_(walk, slices) {}

  // The next slice's, of this tile or the next one, if there is one.
  RF_DEVICE void next() {
    if (walk_.done()) return;
    const auto windows = rings_.windows();
    windows.acquire(at_, static_cast<uint32_t>(rings_.window_bytes));
    load_window(rings_.window(at_), arguments_, walk_.tile() * Shape::kPixels, windows.full(at_),
                walk_.channel());
    at_.next();
    walk_.next();
  }
  RF_DEVICE void more() const {}

 private:
  const ConvWindowArguments& arguments_;
  const StreamedRings<Shape>& rings_;
  SliceWalk<Walk> walk_;
  RingPlace<kConsumers> at_;
};

// The thread that asks for filters, and between them for windows: windows.next() for the next one,
// and windows.more() where some of it may be left. load(to, channel, tap, full) asks for the
// filters of a tap and of the slice from a channel on.
template <class Rings, class Walk, class Windows, class Load>
class StreamProducer {
 public:
  RF_DEVICE StreamProducer(const Rings& rings, const Walk& walk, int32_t slices,
                           const Windows& windows, const Load& load)
      : rings_(rings), walk_(walk, slices), windows_(windows), load_(load) {}

  // The first taps' filters, before the kernel ahead has ended.
  RF_DEVICE void begin() {
#pragma unroll 1
    for (; tap_ < Rings::kFilterStages - 1; ++tap_) load_filter();
  }

  RF_DEVICE void run() {
    windows_.next();
    for (; !walk_.done(); walk_.next()) {
      for (; tap_ < kWindowTaps; ++tap_) {
        // What frees this tap's stage are the products of the slice ahead's last tap, which free a
        // window as well.
        if (tap_ == Rings::kFilterStages - 1) {
          windows_.next();
        } else {
          windows_.more();
        }
        load_filter();
      }
      if (Rings::kFilterStages > kWindowTaps) windows_.next();
      tap_ = 0;
    }
  }

 private:
  RF_DEVICE void load_filter() {
    const auto filters = rings_.filters();
    filters.acquire(at_, kWindowFilterBytes);
    load_(rings_.filter(at_), walk_.channel(), tap_, filters.full(at_));
    at_.next();
  }

  const Rings& rings_;
  SliceWalk<Walk> walk_;
  Windows windows_;
  Load load_;
  typename Rings::Filter at_;
  int tap_ = 0;
};

// One of two consumers: every other tile of the walk.
template <class Shape, class Rings, class Walk>
class StreamConsumer {
  static constexpr int kSums = Shape::kPixels / 2;

 public:
  RF_DEVICE StreamConsumer(const ConvWindowArguments& arguments, const Rings& rings,
                           const Walk& walk, int32_t slices, uint32_t consumer, uint32_t thread)
      : rings_(rings),
        walk_(walk),
        turns_(rings.shared + Shape::kTurnsAt, consumer),
        pitch_(arguments.walk.columns.value * kStepRowBytes),
        slices_(slices),
        releases_(thread % 32 == 0) {
    if (consumer == 1) skip_tile();
  }

  // multiply(d, filters, window, accumulate) asks for a tap's products: `filters` its own, `window`
  // from its first position's row on. begin(tile) is called while the other one's products run,
  // finish(d, tile) when this one's have ended.
  template <class Multiply, class Begin, class Finish>
  RF_DEVICE void run(const Multiply& multiply, const Begin& begin, const Finish& finish) {
    float d[kSums];
    clear(d);
    while (!walk_.done()) {
      begin(walk_.index());
      turns_.wait();
      sum_slices(d, multiply);
      finish(d, walk_.index());
      walk_.next();
      skip_tile();
    }
  }

 private:
  // A tile that the other one takes.
  RF_DEVICE void skip_tile() {
    walk_.next();
    window_at_.skip(slices_);
    filter_at_.skip(slices_ * kWindowTaps);
  }

  template <class Multiply>
  RF_DEVICE void sum_slices(float (&d)[kSums], const Multiply& multiply) {
    const auto filters = rings_.filters();
    const auto windows = rings_.windows();
    auto read = filter_at_;
    auto left = window_at_;
    bool more = false;
    ptx::wgmma_pin(d);
    for (int32_t slice = 0; slice < slices_; ++slice, window_at_.next()) {
      windows.wait(window_at_);
      ptx::SharedAddress window = rings_.window(window_at_);
      for (int tap = 0; tap < kWindowTaps; ++tap, filter_at_.next()) {
        filters.wait(filter_at_);
        ptx::wgmma_fence();
        // Wherever a product enters the window: as in conv_bn_act_window_sm90.cuh.
        multiply(d, rings_.filter(filter_at_), window + tap / 3 * pitch_ + tap % 3 * kStepRowBytes,
                 more);
        ptx::wgmma_commit_group();
        if (!more) {
          more = true;
          continue;
        }
        ptx::wgmma_wait_group<1>();
        if (releases_) filters.release(read);
        read.next();
        if (tap > 0) continue;
        if (releases_) windows.release(left);
        left.next();
      }
    }
    // All but the last products have ended.
    if (releases_) turns_.pass();
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_pin(d);
    if (releases_) {
      filters.release(read);
      windows.release(left);
    }
  }

  const Rings& rings_;
  Walk walk_;
  Turns turns_;
  typename Rings::Filter filter_at_;
  RingPlace<kConsumers> window_at_;
  uint32_t pitch_;
  int32_t slices_;
  bool releases_;
};

#endif

}  // namespace resnet_fused
