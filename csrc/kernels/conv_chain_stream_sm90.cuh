// conv_chain on the GPU, for sm_90a and with a 3x3 convolution of 128 channels in front;
// conv_chain_sm80.cuh has the formulas.
//
// As conv_chain_window_sm90.cuh: all nine taps are parts of one window, and sums are multiplied on
// as they lie in registers. But filters don't stay: they come through a ring, for two blocks of a
// cluster at once, which have neighbouring tiles. Each of the blocks asks for one half of every
// unit of filters, and TMA brings it to both.
//
// One thread asks for everything. Two warpgroups have 64 positions each. The sums of the front
// are rounded before those of `next` begin, and have the same registers.
#pragma once

#include <cstdint>

#include "../device/chain_box.h"
#include "../device/chain_stream.h"
#include "../device/pipeline.h"
#include "../device/warpgroup_roles.h"
#include "../device/window_load.h"
#include "../ptx/cluster.h"
#include "../ptx/proxy.h"
#include "../ptx/tma.h"

namespace resnet_fused {

#if defined(RF_HAS_WGMMA)

// Units of filters, for both blocks.
template <class Shape>
using UnitRing = Ring<Shape::kStages, Shape::kSharing>;

// A warpgroup's way through the tiles of its block.
template <class T, class Shape>
class ChainStreamConsumer {
  static constexpr int kWideSums = Shape::kNext / 2;

 public:
  RF_DEVICE ChainStreamConsumer(const ChainWindowArguments& arguments, ptx::SharedAddress shared,
                                uint32_t consumer, uint32_t thread)
      : arguments_(arguments), shared_(shared), part_(consumer, thread) {}

  RF_DEVICE void run() {
    const Ring<1> windows{shared_ + Shape::kWindowRingAt};
    RingPlace<1> window_at;
    const int last = arguments_.steps - 1;
    uint32_t front[Shape::kFrontBoxes][kProducts][4];  // what the 3x3 has made
    uint32_t made[kProducts][4];                       // a step of `out`
    float sums[kBoxSums];
    float wide[kWideSums];  // of the 3x3, then of `next`
    clear(sums);
    clear(wide);
    for (SharedWalk<Shape> walk(arguments_); !walk.done(); walk.next()) {
      const int32_t position = walk.position() + part_.pixels;
      windows.wait(window_at);
      multiply_window(wide);
      const StoredPixels<T> out(arguments_.out, arguments_.walk, position, 1, arguments_.thinned,
                                part_.thread);
      ptx::wgmma_wait_group<0>();
      ptx::wgmma_pin(wide);
      release_unit();
      if (part_.lane() == 0) windows.release(window_at);
      window_at.next();
      make_front<0>(front, wide);
      pin(front);
      ptx::wgmma_pin(sums);
      multiply_out(sums, front);
      for (int step = 0; step < last; ++step) {
        make(made, sums, step);
        ptx::wgmma_pin(wide);
        pin_words(made);
        multiply_next(wide, made, step);
        pin(front);
        ptx::wgmma_pin(sums);
        multiply_out(sums, front);
        out.store(box(), step);
        release_box();
        ptx::wgmma_wait_group<1>();
        release_unit();  // the step behind is multiplied on
      }
      make(made, sums, last);
      ptx::wgmma_pin(wide);
      pin_words(made);
      multiply_next(wide, made, last);
      out.store(box(), last);
      const StoredPixels<T> next(arguments_.following, arguments_.walk, position, 1, false,
                                 part_.thread);
      ptx::wgmma_wait_group<0>();
      ptx::wgmma_pin(wide);
      release_unit();
      put_boxes(made, wide, next, box(), shared_ + Shape::kNextVectorsAt, part_.thread);
      release_box();
    }
  }

 private:
  RF_DEVICE UnitRing<Shape> units() const { return {shared_ + Shape::kRingAt}; }
  RF_DEVICE Ring<Shape::kBoxStages> boxes() const { return {shared_ + Shape::kBoxRingAt}; }
  RF_DEVICE ptx::SharedAddress unit() const { return shared_ + at_.stage * Shape::kUnitBytes; }
  RF_DEVICE ptx::SharedAddress box() const {
    return shared_ + Shape::kBoxesAt + box_at_.stage * Shape::kBoxBytes + part_.bytes;
  }

  static RF_DEVICE void pin(uint32_t (&front)[Shape::kFrontBoxes][kProducts][4]) {
#pragma unroll
    for (int i = 0; i < Shape::kFrontBoxes; ++i) pin_words(front[i]);
  }

  // Asks for the products of the 3x3. Their last unit is in use when it returns.
  RF_DEVICE void multiply_window(float (&sums)[kWideSums]) {
    const uint32_t pitch = arguments_.walk.columns.value * kStepRowBytes;
    const auto bytes = static_cast<uint32_t>(arguments_.parts * arguments_.part_rows) *
                       static_cast<uint32_t>(kStepRowBytes);
    ptx::SharedAddress window = shared_ + Shape::kWindowAt + part_.bytes;
    bool more = false;
    ptx::wgmma_pin(sums);
    for (int i = 0; i < Shape::kFrontBoxes; ++i) {
      for (int tap = 0; tap < kWindowTaps; ++tap) {
        // Wherever a product enters the window: as in conv_chain_window_sm90.cuh.
        const ptx::SharedAddress rows = window + tap / 3 * pitch + tap % 3 * kStepRowBytes;
        units().wait(at_);
        ptx::wgmma_fence();
        multiply_step<T>(sums, rows, unit(), more);
        ptx::wgmma_commit_group();
        at_.next();
        if (more) {
          ptx::wgmma_wait_group<1>();
          release_unit();
        }
        more = true;
      }
      window += bytes;
    }
  }

  // Asks for the products into a step of `out`, of which a unit holds both halves of the reduction.
  RF_DEVICE void multiply_out(float (&sums)[kBoxSums],
                              const uint32_t (&front)[Shape::kFrontBoxes][kProducts][4]) {
    units().wait(at_);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < Shape::kFrontBoxes; ++i) {
      multiply_step<T>(sums, front[i], unit() + i * Shape::kUnitPart, i > 0);
    }
    ptx::wgmma_commit_group();
    at_.next();
  }

  // Asks for the products of a step of `out` into `next`.
  RF_DEVICE void multiply_next(float (&following)[kWideSums], const uint32_t (&made)[kProducts][4],
                               int step) {
    units().wait(at_);
    ptx::wgmma_fence();
    multiply_step<T>(following, made, unit(), step > 0);
    ptx::wgmma_commit_group();
    at_.next();
  }

  // What the 3x3 makes of its sums.
  template <int kBox>
  RF_DEVICE void make_front(uint32_t (&front)[Shape::kFrontBoxes][kProducts][4],
                            const float (&sums)[kWideSums]) const {
    if constexpr (kBox < Shape::kFrontBoxes) {
      put_box<T, Added::kNothing, kBox>(front[kBox], sums, nullptr, Unstored{},
                                        shared_ + Shape::kFrontVectorsAt + kBox * kBoxVectors,
                                        part_.lane());
      make_front<kBox + 1>(front, sums);
    }
  }

  // A step of `out` from its sums and the shortcut: into the box, and into `made`.
  RF_DEVICE void make(uint32_t (&made)[kProducts][4], float (&sums)[kBoxSums], int step) {
    boxes().wait(box_at_);
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_pin(sums);
    release_unit();
    put_box<T, Added::kStored, 0>(made, sums, nullptr, ChainBox(box(), part_.thread),
                                  shared_ + Shape::kVectorsAt + step * kBoxVectors, part_.lane());
    publish_rows();
  }

  // Products over the first unit that is in use have ended.
  RF_DEVICE void release_unit() {
    if (part_.lane() < Shape::kSharing) units().release(in_use_);
    in_use_.next();
  }

  // The warp has read its part of the box.
  RF_DEVICE void release_box() {
    ptx::sync_warp();
    if (part_.lane() == 0) boxes().release(box_at_);
    box_at_.next();
  }

  const ChainWindowArguments& arguments_;
  ptx::SharedAddress shared_;
  ChainPart part_;
  RingPlace<Shape::kStages> at_;      // the next unit
  RingPlace<Shape::kStages> in_use_;  // the first one that has not been released
  RingPlace<Shape::kBoxStages> box_at_;
};

// The thread that asks for everything.
template <class Shape>
class ChainStreamProducer {
 public:
  RF_DEVICE ChainStreamProducer(const ChainWindowArguments& arguments, ptx::SharedAddress shared)
      : arguments_(arguments),
        shared_(shared),
        windows_(arguments),
        part_(static_cast<int32_t>(ptx::cluster_rank())) {}

  RF_DEVICE void init() const {
    units().init(Shape::kReaders);
    boxes().init(Shape::kReaders);
    window_ring().init(Shape::kReaders);
    ptx::fence_mbarrier_init();
    ptx::tma_prefetch(&arguments_.front);
    ptx::tma_prefetch(&arguments_.weight);
    ptx::tma_prefetch(&arguments_.next);
    ptx::tma_prefetch(&arguments_.x);
    ptx::tma_prefetch(&arguments_.shortcut);
  }

  // The first units, before the kernel ahead has ended.
  RF_DEVICE void begin() {
    for (; early_ < Shape::kStages; ++early_) load_front(early_);
  }

  RF_DEVICE void run() {
    next_window();
    const int steps = arguments_.steps;
    for (SharedWalk<Shape> walk(arguments_); !walk.done(); walk.next()) {
      const Pixel first = pixel_of(walk.position(), arguments_.walk);
      int box = 0;
      for (int i = early_; i < Shape::kFrontUnits; ++i) {
        load_front(i);
        // A unit of this tile has been read: the tile before has left its boxes.
        if (i != Shape::kStages) continue;
        for (; box < Shape::kBoxStages && box < steps; ++box) load_box(box, first);
      }
      early_ = 0;
      load_unit(&arguments_.weight, {part_ * kStepElements, 0});
      for (int step = 0; step < steps; ++step) {
        // The window is free sooner than the first of this tile's boxes.
        if (step == Shape::kBoxStages) next_window();
        if (step == box) load_box(box++, first);
        const int32_t channel = step * kStepElements;
        load_unit(&arguments_.next, {channel, part_ * Shape::kPartRows});
        if (step + 1 < steps) {
          load_unit(&arguments_.weight, {part_ * kStepElements, channel + kStepElements});
        }
      }
      if (steps <= Shape::kBoxStages) next_window();
    }
  }

 private:
  RF_DEVICE UnitRing<Shape> units() const { return {shared_ + Shape::kRingAt}; }
  RF_DEVICE Ring<Shape::kBoxStages> boxes() const { return {shared_ + Shape::kBoxRingAt}; }
  RF_DEVICE Ring<1> window_ring() const { return {shared_ + Shape::kWindowRingAt}; }

  // This block's part of the next unit, to all blocks.
  template <int kRank>
  RF_DEVICE void load_unit(const ptx::TensorMap* map,
                           const int32_t (&from)[kRank] RF_SITE_PARAMETER) {
    units().acquire(at_, Shape::kUnitBytes);
    ptx::tma_load_multicast(shared_ + at_.stage * Shape::kUnitBytes + part_ * Shape::kUnitPart, map,
                            from, units().full(at_),
                            static_cast<uint16_t>((1 << Shape::kSharing) - 1) RF_SITE);
    at_.next();
  }

  // The front's unit i: channels outside, taps inside.
  RF_DEVICE void load_front(int i) {
    const int tap = i % kWindowTaps;
    load_unit(&arguments_.front,
              {i / kWindowTaps * kStepElements, tap % 3, tap / 3, part_ * Shape::kPartRows});
  }

  // The shortcut of a step of the tile from a pixel on.
  RF_DEVICE void load_box(int step, const Pixel& first) {
    boxes().acquire(box_at_, Shape::kBoxBytes);
    load_walk(shared_ + Shape::kBoxesAt + box_at_.stage * Shape::kBoxBytes, &arguments_.shortcut,
              step * kStepElements, first, boxes().full(box_at_));
    box_at_.next();
  }

  // Of the next tile, if there is one.
  RF_DEVICE void next_window() {
    if (windows_.done()) return;
    const int32_t bytes = arguments_.parts * arguments_.part_rows * kStepRowBytes;
    window_ring().acquire(window_at_, static_cast<uint32_t>(Shape::kFrontBoxes * bytes));
    for (int i = 0; i < Shape::kFrontBoxes; ++i) {
      load_window(shared_ + Shape::kWindowAt + i * bytes, arguments_, windows_.position(),
                  window_ring().full(window_at_), i * kStepElements);
    }
    windows_.next();
    window_at_.next();
  }

  const ChainWindowArguments& arguments_;
  ptx::SharedAddress shared_;
  RingPlace<Shape::kStages> at_;
  RingPlace<Shape::kBoxStages> box_at_;
  RingPlace<1> window_at_;
  SharedWalk<Shape> windows_;  // of tiles whose windows have not been asked for
  int32_t part_;               // of each unit, that this block asks for
  int early_ = 0;              // units of the first tile that have been asked for
};

#endif

// For any other architecture it is empty, and no plan chooses it.
template <class T, class Shape>
__global__ void __launch_bounds__(kWarpgroupBlockThreads, 1)
    conv_chain_stream_kernel(const __grid_constant__ ChainWindowArguments arguments) {
#if defined(RF_HAS_WGMMA)
  const ptx::SharedAddress shared = ptx::shared_address(ptx::dynamic_shared());
  ChainStreamProducer<Shape> producer(arguments, shared);
  if (threadIdx.x == 0) producer.init();
  ptx::cluster_sync();  // nothing is copied to the other before its barriers are there
  if (threadIdx.x == 0) producer.begin();
  fetch_vectors(shared + Shape::kFrontVectorsAt,
                {arguments.front_scale, arguments.front_shift, Shape::kFront}, Shape::kFrontBoxes);
  fetch_vectors(shared + Shape::kVectorsAt, {arguments.scale, arguments.shift, arguments.channels},
                arguments.steps);
  fetch_vectors(shared + Shape::kNextVectorsAt,
                {arguments.next_scale, arguments.next_shift, arguments.next_channels},
                Shape::kNext / kStepElements);
  run_roles(
      arguments.dependent, [&] { producer.run(); },
      [&](uint32_t consumer, uint32_t thread) {
        ChainStreamConsumer<T, Shape>(arguments, shared, consumer, thread).run();
      });
  ptx::cluster_sync();  // none ends while the other tells it what it has read
#endif
}

}  // namespace resnet_fused
