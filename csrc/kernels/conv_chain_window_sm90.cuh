// conv_chain on the GPU, for sm_90a and with a 3x3 convolution in front: a block's 3x3, its last
// 1x1, its shortcut, and the next block's first 1x1, for 64 channels in front; conv_chain_sm80.cuh
// has the formulas.
//
// Two mechanisms together: windows, of which all nine taps are parts, as conv_window.h says, and
// sums that are multiplied on as they lie in registers, as in conv_chain_sm90.cuh. The sums of the
// 3x3 are the left operand of every product into `out`, those of `out` of a product into `next`;
// none of them is read from shared memory. A projected shortcut has sums of its own, in fp32. The
// filters come once, before the kernel ahead has ended, and stay; those into `next` come with each
// step where they find no room.
//
// One thread asks for a tile's window, and for its shortcut by steps of 64 channels. Two
// warpgroups have 64 positions each. The products into `next` of one step and into `out` of the one
// behind run while threads store the step.
#pragma once

#include <cstdint>

#include "../device/chain_box.h"
#include "../device/chain_window.h"
#include "../device/pipeline.h"
#include "../device/warpgroup_roles.h"
#include "../device/window_load.h"
#include "../ptx/mbarrier.h"
#include "../ptx/tma.h"

namespace resnet_fused {

#if defined(RF_HAS_WGMMA)

// A warpgroup's way through the tiles of its block.
template <class T, class Shape>
class ChainWindowConsumer {
 public:
  RF_DEVICE ChainWindowConsumer(const ChainWindowArguments& arguments, ptx::SharedAddress shared,
                                uint32_t consumer, uint32_t thread)
      : arguments_(arguments), shared_(shared), part_(consumer, thread) {}

  RF_DEVICE void run() {
    const Ring<1> windows{shared_ + Shape::kWindowRingAt};
    RingPlace<1> window_at;
    RingPlace<1> pixels_at;
    const int last = arguments_.steps - 1;
    uint32_t front[kProducts][4];  // what the 3x3 has made
    uint32_t made[kProducts][4];   // a step of `out`
    float sums[kBoxSums];
    float projected[kBoxSums];  // not in use without a projection
    float following[Shape::kNext / 2];
    clear(sums);
    clear(projected);
    clear(following);
    ptx::mbarrier_wait_parity(shared_ + Shape::kFiltersFullAt, 0);
    for (BlockWalk walk = tiles_of(arguments_); !walk.done(); walk.next()) {
      const int32_t position = walk.index() * kChainTmaPixels + part_.pixels;
      windows.wait(window_at);
      multiply_window(sums);
      const StoredPixels<T> out(arguments_.out, arguments_.walk, position, 1, arguments_.thinned,
                                part_.thread);
      ptx::wgmma_wait_group<0>();
      ptx::wgmma_pin(sums);
      if (releases()) windows.release(window_at);
      window_at.next();
      put_box<T, Added::kNothing, 0>(front, sums, nullptr, Unstored{},
                                     shared_ + Shape::kFrontVectorsAt, part_.lane());
      if constexpr (Shape::kProjected > 0) pixels_ring().wait(pixels_at);
      pin_words(front);
      pin_sums(sums, projected);
      ptx::wgmma_fence();
      multiply_out(sums, projected, front, 0);
      ptx::wgmma_commit_group();
      for (int step = 0; step < last; ++step) {
        make(made, sums, projected, step);
        ptx::wgmma_pin(following);
        pin_words(made);
        pin_words(front);
        pin_sums(sums, projected);
        ptx::wgmma_fence();
        multiply_step<T>(following, made, next_weight(step), step > 0);
        if constexpr (Shape::kStreams) ptx::wgmma_commit_group();
        multiply_out(sums, projected, front, step + 1);
        ptx::wgmma_commit_group();
        out.store(box(), step);
        // The stage's filters have been read by then; the step behind is multiplied on.
        if constexpr (Shape::kStreams) ptx::wgmma_wait_group<1>();
        release();
      }
      make(made, sums, projected, last);
      if constexpr (Shape::kProjected > 0) {
        if (releases()) pixels_ring().release(pixels_at);
        pixels_at.next();
      }
      ptx::wgmma_pin(following);
      pin_words(made);
      ptx::wgmma_fence();
      multiply_step<T>(following, made, next_weight(last), last > 0);
      ptx::wgmma_commit_group();
      out.store(box(), last);
      const StoredPixels<T> next(arguments_.following, arguments_.walk, position, 1, false,
                                 part_.thread);
      ptx::wgmma_wait_group<0>();
      ptx::wgmma_pin(following);
      put_boxes(made, following, next, box(), shared_ + Shape::kNextVectorsAt, part_.thread);
      release();
    }
  }

 private:
  RF_DEVICE Ring<Shape::kStages> ring() const { return {shared_ + Shape::kRingAt}; }
  RF_DEVICE Ring<1> pixels_ring() const { return {shared_ + Shape::kPixelsRingAt}; }
  RF_DEVICE ptx::SharedAddress stage() const {
    return shared_ + Shape::kStagesAt + at_.stage * Shape::kStageBytes;
  }
  // Where `out` is made.
  RF_DEVICE ptx::SharedAddress box() const {
    return (Shape::kProjected > 0 ? shared_ + Shape::kOutAt : stage()) + part_.bytes;
  }
  RF_DEVICE ptx::SharedAddress next_weight(int step) const {
    if constexpr (Shape::kStreams) return stage() + Shape::kShortcutBytes;
    return shared_ + Shape::kNextWeightAt + step * Shape::kNextWeightBytes;
  }
  RF_DEVICE bool releases() const { return part_.lane() == 0; }

  static RF_DEVICE void pin_sums(float (&sums)[kBoxSums], float (&projected)[kBoxSums]) {
    ptx::wgmma_pin(sums);
    if constexpr (Shape::kProjected > 0) ptx::wgmma_pin(projected);
  }

  // Asks for the products into a step of `out`.
  RF_DEVICE void multiply_out(float (&sums)[kBoxSums], float (&projected)[kBoxSums],
                              const uint32_t (&front)[kProducts][4], int step) const {
    multiply_step<T>(sums, front, shared_ + Shape::kWeightAt + step * Shape::kWeightBytes, false);
    if constexpr (Shape::kProjected > 0) {
      multiply_step<T>(projected, shared_ + Shape::kPixelsAt + part_.bytes,
                       shared_ + Shape::kProjectionAt + step * Shape::kWeightBytes, false);
    }
  }

  // Asks for the products of the 3x3, nine taps in a row.
  RF_DEVICE void multiply_window(float (&sums)[kBoxSums]) const {
    const ptx::SharedAddress window = shared_ + Shape::kWindowAt + part_.bytes;
    const uint32_t pitch = arguments_.walk.columns.value * kStepRowBytes;
    ptx::wgmma_pin(sums);
    ptx::wgmma_fence();
#pragma unroll
    for (int tap = 0; tap < kWindowTaps; ++tap) {
      // Rows are swizzled by the bits of their own addresses, wherever a product enters the window:
      // of that no manual speaks, and the conformance program asks ("rows of 128 bytes, shifted").
      multiply_step<T>(sums, window + tap / 3 * pitch + tap % 3 * kStepRowBytes,
                       shared_ + tap * kWindowFilterBytes, tap > 0);
    }
    ptx::wgmma_commit_group();
  }

  // A step of `out` from its sums and the shortcut: into the box, and into `made`.
  RF_DEVICE void make(uint32_t (&made)[kProducts][4], float (&sums)[kBoxSums],
                      float (&projected)[kBoxSums], int step) const {
    ring().wait(at_);
    ptx::wgmma_wait_group<0>();
    pin_sums(sums, projected);
    const ChainBox box(this->box(), part_.thread);
    const ptx::SharedAddress vectors = shared_ + Shape::kVectorsAt + step * kBoxVectors;
    if constexpr (Shape::kProjected > 0) {
      scale_sums(projected, vectors + (Shape::kProjectionVectorsAt - Shape::kVectorsAt),
                 part_.lane());
      put_box<T, Added::kSums, 0>(made, sums, projected, box, vectors, part_.lane());
    } else {
      put_box<T, Added::kStored, 0>(made, sums, nullptr, box, vectors, part_.lane());
    }
    publish_rows();
  }

  // The warp has read its part of the box.
  RF_DEVICE void release() {
    ptx::sync_warp();
    if (releases()) ring().release(at_);
    at_.next();
  }

  const ChainWindowArguments& arguments_;
  ptx::SharedAddress shared_;
  ChainPart part_;
  RingPlace<Shape::kStages> at_;
};

// The thread that asks for everything.
template <class Shape>
class ChainWindowProducer {
 public:
  RF_DEVICE ChainWindowProducer(const ChainWindowArguments& arguments, ptx::SharedAddress shared)
      : arguments_(arguments), shared_(shared), windows_(tiles_of(arguments)) {}

  RF_DEVICE void init() const {
    ring().init(Shape::kReaders);
    window_ring().init(Shape::kReaders);
    if constexpr (Shape::kProjected > 0) pixels_ring().init(Shape::kReaders);
    ptx::mbarrier_init(shared_ + Shape::kFiltersFullAt, 1);
    ptx::fence_mbarrier_init();
    ptx::tma_prefetch(&arguments_.front);
    ptx::tma_prefetch(&arguments_.weight);
    if constexpr (Shape::kProjected > 0) ptx::tma_prefetch(&arguments_.projection);
    ptx::tma_prefetch(&arguments_.next);
    ptx::tma_prefetch(&arguments_.x);
    ptx::tma_prefetch(&arguments_.shortcut);
  }

  // The filters that stay, before the kernel ahead has ended.
  RF_DEVICE void load_filters() const {
    const ptx::SharedAddress full = shared_ + Shape::kFiltersFullAt;
    const int steps = arguments_.steps;
    ptx::mbarrier_arrive_expect_tx(full, Shape::kStaying.front + steps * Shape::kStaying.step);
    load_taps(shared_, &arguments_.front, 0, full);
    for (int step = 0; step < steps; ++step) {
      const int32_t channel = step * kStepElements;
      const int32_t further = step * Shape::kWeightBytes;
      ptx::tma_load(shared_ + Shape::kWeightAt + further, &arguments_.weight, {0, channel}, full);
      if constexpr (Shape::kProjected > 0) {
        ptx::tma_load(shared_ + Shape::kProjectionAt + further, &arguments_.projection,
                      {0, channel}, full);
      }
      if constexpr (!Shape::kStreams) {
        ptx::tma_load(shared_ + Shape::kNextWeightAt + step * Shape::kNextWeightBytes,
                      &arguments_.next, {channel, 0}, full);
      }
    }
  }

  RF_DEVICE void run() {
    next_window();
    for (BlockWalk walk = tiles_of(arguments_); !walk.done(); walk.next()) {
      const Pixel first = pixel_of(walk.index() * kChainTmaPixels, arguments_.walk);
      if constexpr (Shape::kProjected > 0) {
        pixels_ring().acquire(pixels_at_, Shape::kBoxBytes);
        load_walk(shared_ + Shape::kPixelsAt, &arguments_.shortcut, 0, first,
                  pixels_ring().full(pixels_at_));
        pixels_at_.next();
      }
      for (int step = 0; step < arguments_.steps; ++step) {
        // The window is free sooner than the first of this tile's boxes, so it is asked for before
        // one waits for that.
        if (step == Shape::kStages) next_window();
        ring().acquire(at_, Shape::kStageBytes);
        load_stage(step, first);
        at_.next();
      }
      if (arguments_.steps <= Shape::kStages) next_window();
    }
  }

 private:
  RF_DEVICE Ring<Shape::kStages> ring() const { return {shared_ + Shape::kRingAt}; }
  RF_DEVICE Ring<1> window_ring() const { return {shared_ + Shape::kWindowRingAt}; }

  RF_DEVICE Ring<1> pixels_ring() const { return {shared_ + Shape::kPixelsRingAt}; }

  // What comes with a step of the tile from a pixel on.
  RF_DEVICE void load_stage(int step, const Pixel& first) const {
    const ptx::SharedAddress stage = shared_ + Shape::kStagesAt + at_.stage * Shape::kStageBytes;
    const int32_t channel = step * kStepElements;
    if constexpr (Shape::kProjected == 0) {
      load_walk(stage, &arguments_.shortcut, channel, first, ring().full(at_));
    }
    if constexpr (Shape::kStreams) {
      ptx::tma_load(stage + Shape::kShortcutBytes, &arguments_.next, {channel, 0},
                    ring().full(at_));
    }
  }

  // Of the next tile, if there is one.
  RF_DEVICE void next_window() {
    if (windows_.done()) return;
    window_ring().acquire(
        window_at_, static_cast<uint32_t>(arguments_.parts * arguments_.part_rows * kStepRowBytes));
    load_window(shared_ + Shape::kWindowAt, arguments_, windows_.index() * kChainTmaPixels,
                window_ring().full(window_at_));
    windows_.next();
    window_at_.next();
  }

  const ChainWindowArguments& arguments_;
  ptx::SharedAddress shared_;
  RingPlace<Shape::kStages> at_;
  RingPlace<1> window_at_;
  RingPlace<1> pixels_at_;
  BlockWalk windows_;  // of tiles whose windows have not been asked for
};

#endif

// For any other architecture it is empty, and no plan chooses it.
template <class T, class Shape>
__global__ void __launch_bounds__(kWarpgroupBlockThreads, 1)
    conv_chain_window_kernel(const __grid_constant__ ChainWindowArguments arguments) {
#if defined(RF_HAS_WGMMA)
  const ptx::SharedAddress shared = ptx::shared_address(ptx::dynamic_shared());
  ChainWindowProducer<Shape> producer(arguments, shared);
  if (threadIdx.x == 0) {
    producer.init();
    producer.load_filters();
  }
  fetch_vectors(shared + Shape::kFrontVectorsAt,
                {arguments.front_scale, arguments.front_shift, kChainFront}, 1);
  fetch_vectors(shared + Shape::kVectorsAt, {arguments.scale, arguments.shift, arguments.channels},
                arguments.steps);
  if constexpr (Shape::kProjected > 0) {
    fetch_vectors(shared + Shape::kProjectionVectorsAt,
                  {arguments.projection_scale, arguments.projection_shift, arguments.channels},
                  arguments.steps);
  }
  fetch_vectors(shared + Shape::kNextVectorsAt,
                {arguments.next_scale, arguments.next_shift, arguments.next_channels},
                Shape::kNextBoxes);
  run_roles(
      arguments.dependent, [&] { producer.run(); },
      [&](uint32_t consumer, uint32_t thread) {
        ChainWindowConsumer<T, Shape>(arguments, shared, consumer, thread).run();
      });
#endif
}

}  // namespace resnet_fused
