// Windows of slices of channels, and the filters that come with them tap by tap: who asks for them,
// and a warpgroup that multiplies them. stream_window.h says what lies where.
//
// Two warpgroups take tiles in turns and read the same two rings, each the steps of its own tiles.
#pragma once

#include <cstdint>

#include "../ptx/ptx.h"
#include "../ptx/tma.h"
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
  using Filter = RingPlace<Shape::kFilterStages>;

  ptx::SharedAddress shared;
  int32_t window_bytes;

  RF_DEVICE RingOf<Shape> windows() const { return {shared + Shape::kRingAt}; }
  RF_DEVICE Ring<Shape::kFilterStages> filters() const { return {shared + Shape::kFilterRingAt}; }
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

// The thread that asks for windows and filters. Walk: tiles of the block.
template <class Shape, class Walk>
class StreamProducer {
 public:
  // channel: the first of the block's 64 filters.
  RF_DEVICE StreamProducer(const ConvWindowArguments& arguments, const StreamedRings<Shape>& rings,
                           const Walk& walk, int32_t slices, int32_t channel)
      : arguments_(arguments),
        rings_(rings),
        walk_(walk),
        windows_(walk),
        slices_(slices),
        channel_(channel) {}

  // The first taps' filters, before the kernel ahead has ended.
  RF_DEVICE void begin() {
#pragma unroll 1
    for (; early_ < Shape::kFilterStages - 1; ++early_) load_filter(0, early_);
  }

  RF_DEVICE void run() {
    next_window();
    int tap = early_;
    for (; !walk_.done(); walk_.next()) {
      for (int32_t slice = 0; slice < slices_; ++slice) {
        for (; tap < kWindowTaps; ++tap) {
          // What frees this tap's stage are the products of the slice ahead's last tap, which frees
          // a window as well.
          if (tap == Shape::kFilterStages - 1) next_window();
          load_filter(slice, tap);
        }
        if (Shape::kFilterStages > kWindowTaps) next_window();
        tap = 0;
      }
    }
  }

 private:
  RF_DEVICE void load_filter(int32_t slice, int tap) {
    const auto filters = rings_.filters();
    filters.acquire(filter_at_, kWindowFilterBytes);
    ptx::tma_load(rings_.filter(filter_at_), &arguments_.weight,
                  {slice * kWindowChannels, tap % 3, tap / 3, channel_}, filters.full(filter_at_));
    filter_at_.next();
  }

  // The next slice's, of this tile or the next one, if there is one.
  RF_DEVICE void next_window() {
    if (windows_.done()) return;
    const auto windows = rings_.windows();
    windows.acquire(window_at_, static_cast<uint32_t>(rings_.window_bytes));
    load_window(rings_.window(window_at_), arguments_, windows_.index() * Shape::kPixels,
                windows.full(window_at_), slice_ * kWindowChannels);
    window_at_.next();
    if (++slice_ < slices_) return;
    slice_ = 0;
    windows_.next();
  }

  const ConvWindowArguments& arguments_;
  const StreamedRings<Shape>& rings_;
  Walk walk_;
  Walk windows_;  // of tiles some of whose windows have not been asked for
  typename StreamedRings<Shape>::Filter filter_at_;
  RingPlace<kConsumers> window_at_;
  int32_t slices_;
  int32_t slice_ = 0;  // of the next window
  int32_t channel_;
  int early_ = 0;  // taps of the first slice that have been asked for
};

// One of two consumers: every other tile of the walk.
template <class Shape, class Walk>
class StreamConsumer {
  static constexpr int kSums = Shape::kPixels / 2;

 public:
  RF_DEVICE StreamConsumer(const ConvWindowArguments& arguments, const StreamedRings<Shape>& rings,
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
  // from its first position's row on. begin(position) is called while the other one's products run,
  // finish(d, position) when this one's have ended.
  template <class Multiply, class Begin, class Finish>
  RF_DEVICE void run(const Multiply& multiply, const Begin& begin, const Finish& finish) {
    float d[kSums];
    clear(d);
    while (!walk_.done()) {
      const int32_t position = walk_.index() * Shape::kPixels;
      begin(position);
      turns_.wait();
      sum_slices(d, multiply);
      finish(d, position);
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

  const StreamedRings<Shape>& rings_;
  Walk walk_;
  Turns turns_;
  typename StreamedRings<Shape>::Filter filter_at_;
  RingPlace<kConsumers> window_at_;
  uint32_t pitch_;
  int32_t slices_;
  bool releases_;
};

#endif

}  // namespace resnet_fused
