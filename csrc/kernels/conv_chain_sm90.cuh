// conv_chain on the GPU, for sm_90a: a block's last 1x1 convolution, its shortcut, and the next
// block's first one, on wgmma, fed by TMA; conv_chain_sm80.cuh has the formulas.
//
// A block stays for many tiles of 128 pixels. One thread asks for what a tile reads, and for each
// step of 64 channels of `out` for the filters that make it, the shortcut and the filters that read
// it. Two warpgroups have 64 pixels each: they make a step of `out` in fp32, put it where its
// shortcut was, from where TMA stores it, and multiply it on as it lies in registers: as PTX lays
// out wgmma's fragments, the sums of 16 columns, rounded to 16 bits, are the left operand of an
// instruction of the next product; quantised_chain.h has it of e4m3. One's products run beside the
// other's epilogue.
//
// Where two blocks of a cluster share filters, which they need at the same time, each asks for one
// half, and TMA brings it to both. Pixels and the shortcut are each block's own. A step comes as
// the stage of one ring, or in parts, each through a ring of its own; and a warpgroup asks for its
// pixels itself where there is room for one tile's: chain_steps.h.
#pragma once

#include <cstdint>

#include "../device/chain_box.h"
#include "../device/chain_steps.h"
#include "../device/chain_tma.h"
#include "../device/pipeline.h"
#include "../device/warpgroup_roles.h"
#include "../ptx/cluster.h"
#include "../ptx/proxy.h"
#include "../ptx/tma.h"

namespace resnet_fused {

#if defined(RF_HAS_WGMMA)

// A warpgroup's way through the tiles of its block.
template <class T, class Shape>
class ChainConsumer {
  using Types = ChainTypes<T>;
  using Operand = typename Types::Operand;
  using Box = typename Types::Box;
  static constexpr bool kInParts = Types::kStepsOfPart > 0;
  static constexpr int kNextSums = Shape::kNext / 2;

 public:
  RF_DEVICE ChainConsumer(const ChainTmaArguments& arguments, ptx::SharedAddress shared,
                          uint32_t consumer, uint32_t thread)
      : arguments_(arguments),
        shared_(shared),
        barrier_(static_cast<int>(1 + consumer)),
        part_(consumer, thread, Shape::kPartBytes) {}

  RF_DEVICE void run() {
    const Ring<2> rows_ring{shared_ + Shape::kRowsRingAt};
    ChainSteps<T, Shape> steps(shared_);
    RingPlace<2> rows_at;
    OwnRows<Shape> own(shared_, static_cast<uint32_t>(barrier_ - 1), part_.bytes);
    float sums[kBoxSums];
    float projected[kBoxSums];  // not in use without a projection
    float following[kNextSums];
    float part[kInParts ? kNextSums : 1];  // of what is `following`'s
    clear(sums);
    clear(projected);
    clear(following);
    clear(part);
    const ChainFactors& factors = arguments_.factors;
    const auto out_act = Types::act(0.0f, factors.residual, factors.out);
    bool held = false;  // the rows of the tile before, from where `next` goes out
    if constexpr (Shape::kOwnRows) load_rows(own, SharedWalk<Shape>(arguments_));
    for (SharedWalk<Shape> walk(arguments_); !walk.done(); walk.next()) {
      const int32_t pixel = walk.position() + part_.pixels;
      const ptx::SharedAddress rows =
          Shape::kOwnRows ? own.rows() : shared_ + rows_at.stage * Shape::kRowsBytes + part_.bytes;
      const StoredPixels<T> even(arguments_.even, arguments_.grid, pixel, 0, true, part_.thread);
      if constexpr (!Shape::kOwnRows) rows_ring.wait(rows_at);
      if constexpr (kInParts) clear(following);
      for (int step = 0; step < arguments_.steps; ++step) {
        multiply_out(sums, projected, rows, own, steps);
        steps.wait_box();
        if constexpr (Shape::kOwnRows) free_box();
        ptx::wgmma_wait_group<0>();
        ptx::wgmma_pin(sums);
        steps.release_weight(part_.lane());
        Operand made;
        const ptx::SharedAddress made_at = steps.box() + part_.bytes;
        const Box box(made_at, part_.thread);
        const ptx::SharedAddress vectors = shared_ + Shape::kVectorsAt + step * kBoxVectors;
        if constexpr (Shape::kProjected > 0) {
          ptx::wgmma_pin(projected);
          scale_sums<T>(projected, vectors + (Shape::kProjectionVectorsAt - Shape::kVectorsAt),
                        part_.lane(), Types::act(-__builtin_huge_valf(), 0.0f, factors.projection));
          put_box<T, Added::kSums, 0>(made, sums, projected, box, vectors, part_.lane(), out_act);
        } else {
          put_box<T, Added::kStored, 0>(made, sums, nullptr, box, vectors, part_.lane(), out_act);
        }
        publish();
        if constexpr (Shape::kOwnRows) {
          // All of the warpgroup's products over the rows have ended.
          if (step + 1 == arguments_.steps) next_rows(own, walk);
        }
        if (arguments_.thinned) {
          even.store(made_at, step);
        } else if (part_.thread == 0) {
          ptx::tma_store(&arguments_.out, {step * kStepElements, pixel}, made_at);
          ptx::bulk_commit_group();
        }
        ptx::sync_warp();
        steps.wait_next();
#pragma unroll
        for (auto& words : made) ptx::wgmma_pin(words);
        const ptx::SharedAddress filters = steps.next_weight();
        if constexpr (kInParts) {
          ptx::wgmma_pin(part);
          ptx::wgmma_fence();
          multiply_step<T>(part, made, filters, step % Types::kStepsOfPart > 0);
        } else {
          ptx::wgmma_pin(following);
          ptx::wgmma_fence();
          multiply_step<T>(following, made, filters, step > 0);
        }
        ptx::wgmma_commit_group();
        if (part_.thread == 0) {
          // Beside the products: `out` has left its box, and `next` the rows before.
          ptx::bulk_wait_group_read<0>();
          if (!Shape::kOwnRows && step == 0 && held) rows_ring.release(other(rows_at));
        }
        ptx::sync_warp();
        steps.release_box(part_.lane());
        ptx::wgmma_wait_group<0>();
        steps.release(part_.lane());
        if constexpr (kInParts) {
          ptx::wgmma_pin(part);
          if ((step + 1) % Types::kStepsOfPart == 0 || step + 1 == arguments_.steps) {
            add(following, part);
          }
        } else {
          ptx::wgmma_pin(following);
        }
      }
      finish<0>(following, Shape::kOwnRows ? steps.box() + part_.bytes : rows, pixel);
      held = true;
      rows_at.next();
      own.next();
    }
    // Its shared memory has been read.
    if (part_.thread == 0) ptx::bulk_wait_group_read<0>();
  }

 private:
  // The place of the tile before, of two.
  static RF_DEVICE RingPlace<2> other(RingPlace<2> at) {
    at.stage ^= 1;
    return at;
  }

  // What this thread has written may be stored, and so may that of the warpgroup's others.
  RF_DEVICE void publish() const {
    ptx::fence_proxy_async_shared();
    ptx::barrier_sync(barrier_, kWarpgroupThreads);
  }

  static RF_DEVICE void add(float (&sums)[kNextSums], const float (&part)[kNextSums]) {
#pragma unroll
    for (int i = 0; i < kNextSums; ++i) sums[i] += part[i];
  }

  // Asks for the products of a step into `out`. Over all parts of its filters but the last they
  // have ended when it returns.
  RF_DEVICE void multiply_out(float (&sums)[kBoxSums], float (&projected)[kBoxSums],
                              ptx::SharedAddress rows, const OwnRows<Shape>& own,
                              ChainSteps<T, Shape>& steps) const {
    if constexpr (Shape::kOwnRows) own.wait(0);
    steps.wait();
    ptx::wgmma_pin(sums);
    if constexpr (Shape::kProjected > 0 && Shape::kParts == 1) ptx::wgmma_pin(projected);
    ptx::wgmma_fence();
    multiply_boxes<Shape::kInnerBoxes>(sums, rows, steps.weight(), false);
    constexpr int kRowsOfPart = Shape::kInnerBoxes * Shape::kBoxBytes;
    if constexpr (Shape::kProjected > 0 && Shape::kParts == 1) {
      multiply_boxes<Shape::kProjectedBoxes>(
          projected, rows + kRowsOfPart, steps.weight() + Shape::kInnerBoxes * Shape::kWeightBytes,
          false);
    }
    ptx::wgmma_commit_group();
    steps.passed();
#pragma unroll
    for (int i = 1; i < Shape::kParts; ++i) {
      own.wait(i);
      steps.wait();
      if (i == 1) ptx::wgmma_pin(projected);
      ptx::wgmma_fence();
      multiply_boxes<Shape::kInnerBoxes>(projected, rows + i * kRowsOfPart, steps.weight(), i > 1);
      ptx::wgmma_commit_group();
      steps.passed();
      ptx::wgmma_wait_group<1>();
      steps.release_weight(part_.lane());
    }
  }

  // Asks for the products of so many boxes of rows and their filters.
  template <int kBoxes>
  RF_DEVICE void multiply_boxes(float (&sums)[kBoxSums], ptx::SharedAddress rows,
                                ptx::SharedAddress weight, bool more) const {
#pragma unroll
    for (int i = 0; i < kBoxes; ++i) {
      multiply_step<T, Shape::kRowBytes>(sums, rows + i * Shape::kBoxBytes,
                                         weight + i * Shape::kWeightBytes, more || i > 0);
    }
  }

  // One thread asks for the rows of the tile that a walk has come to.
  RF_DEVICE void load_rows(const OwnRows<Shape>& own, const SharedWalk<Shape>& walk) const {
    if (part_.thread == 0 && !walk.done()) {
      own.load(arguments_, walk.position() + part_.pixels);
    }
    ptx::sync_warp();
  }

  // Likewise of the tile behind.
  RF_DEVICE void next_rows(const OwnRows<Shape>& own, SharedWalk<Shape> walk) const {
    walk.next();
    load_rows(own, walk);
  }

  // What TMA stores by way of a place that is made again has been read.
  RF_DEVICE void free_box() const {
    if (part_.thread == 0) ptx::bulk_wait_group_read<0>();
    ptx::barrier_sync(barrier_, kWarpgroupThreads);
  }

  // `next` goes out by way of the rows that its tile has read, where all products over them have
  // ended by the last step's barrier, or by way of `out`'s box. As many boxes at a time as have
  // room, from box kFirst on.
  template <int kFirst>
  RF_DEVICE void finish(const float (&following)[kNextSums], ptx::SharedAddress rows,
                        int32_t pixel) const {
    constexpr int kEnd = kFirst + Shape::kNextAtOnce < Shape::kNextBoxes
                             ? kFirst + Shape::kNextAtOnce
                             : Shape::kNextBoxes;
    if constexpr (kFirst > 0 || Shape::kOwnRows) {
      free_box();
    } else if constexpr (Shape::kNextAtOnce > Shape::kInnerBoxes) {
      // Boxes beside the rows have the tile before's `next`: with one step no barrier stands behind
      // the wait for its store.
      if (arguments_.steps == 1) free_box();
    }
    put_next<kFirst, kEnd>(following, rows);
    publish();
    if (part_.thread == 0) {
#pragma unroll
      for (int i = kFirst; i < kEnd; ++i) {
        const int32_t channel = i * kStepElements;
        if (channel < arguments_.next_channels) {
          ptx::tma_store(&arguments_.following, {channel, pixel}, next_box(i - kFirst, rows));
        }
      }
      ptx::bulk_commit_group();
    }
    ptx::sync_warp();
    if constexpr (kEnd < Shape::kNextBoxes) finish<kEnd>(following, rows, pixel);
  }

  template <int kFirst, int kEnd, int kBox = kFirst>
  RF_DEVICE void put_next(const float (&following)[kNextSums], ptx::SharedAddress rows) const {
    if constexpr (kBox < kEnd) {
      Operand words;
      put_box<T, Added::kNothing, kBox>(
          words, following, nullptr, Box(next_box(kBox - kFirst, rows), part_.thread),
          shared_ + Shape::kNextVectorsAt + kBox * kBoxVectors, part_.lane(),
          Types::act(0.0f, 0.0f, arguments_.factors.next));
      put_next<kFirst, kEnd, kBox + 1>(following, rows);
    }
  }

  // The i-th of those that go out at a time.
  RF_DEVICE ptx::SharedAddress next_box(int i, ptx::SharedAddress rows) const {
    if constexpr (Shape::kNextAtOnce > Shape::kInnerBoxes) {
      if (i >= Shape::kInnerBoxes) {
        return shared_ + Shape::kMoreAt + (i - Shape::kInnerBoxes) * Shape::kBoxBytes + part_.bytes;
      }
    }
    return rows + i * Shape::kBoxBytes;
  }

  const ChainTmaArguments& arguments_;
  ptx::SharedAddress shared_;
  int barrier_;
  ChainPart part_;
};

// The thread that asks for everything.
template <class T, class Shape>
class ChainProducer {
 public:
  RF_DEVICE ChainProducer(const ChainTmaArguments& arguments, ptx::SharedAddress shared)
      : arguments_(arguments), shared_(shared), steps_(shared) {}

  RF_DEVICE void init() const {
    steps_.init();
    if constexpr (Shape::kOwnRows) {
      OwnRows<Shape>::init(shared_);
    } else {
      rows_ring().init(kConsumers);
    }
    ptx::fence_mbarrier_init();
    ptx::tma_prefetch(&arguments_.weight);
    if constexpr (Shape::kProjected > 0) ptx::tma_prefetch(&arguments_.projection);
    ptx::tma_prefetch(&arguments_.next);
    ptx::tma_prefetch(&arguments_.x);
    ptx::tma_prefetch(&arguments_.shortcut);
    if (!arguments_.thinned) ptx::tma_prefetch(&arguments_.out);
    ptx::tma_prefetch(&arguments_.following);
  }

  // The filters of the first steps, before the kernel ahead has ended.
  RF_DEVICE void begin() {
    const int steps = of_block();
    for (; early_ < Shape::kEarlySteps && early_ < steps; ++early_) {
      steps_.load_filters(arguments_, early_ % arguments_.steps);
    }
  }

  RF_DEVICE void run() {
    RingPlace<2> rows_at;
    for (SharedWalk<Shape> walk(arguments_); !walk.done(); walk.next()) {
      const int32_t pixel = walk.position();
      if constexpr (!Shape::kOwnRows) {
        rows_ring().acquire(rows_at, Shape::kRowsBytes);
        for (int i = 0; i < Shape::kInnerBoxes; ++i) {
          load_rows(rows_at, i, &arguments_.x, i, pixel);
        }
        for (int i = 0; i < Shape::kProjectedBoxes; ++i) {
          load_rows(rows_at, Shape::kInnerBoxes + i, &arguments_.shortcut, i, pixel);
        }
        rows_at.next();
      }
      for (int step = 0; step < arguments_.steps; ++step) {
        steps_.load(arguments_, step, pixel, early_ > 0);
        if (early_ > 0) --early_;
      }
    }
  }

 private:
  RF_DEVICE Ring<2> rows_ring() const { return {shared_ + Shape::kRowsRingAt}; }
  // Steps of the block, as far as those that may be early need to know.
  RF_DEVICE int of_block() const {
    int steps = 0;
    for (SharedWalk<Shape> walk(arguments_); !walk.done() && steps < Shape::kEarlySteps;
         walk.next()) {
      steps += arguments_.steps;
    }
    return steps;
  }
  // Into a tile's box, 64 channels from step `step` on.
  RF_DEVICE void load_rows(const RingPlace<2>& at, int box, const ptx::TensorMap* map, int step,
                           int32_t pixel) const {
    ptx::tma_load(shared_ + at.stage * Shape::kRowsBytes + box * Shape::kBoxBytes, map,
                  {step * kStepElements, pixel}, rows_ring().full(at));
  }

  const ChainTmaArguments& arguments_;
  ptx::SharedAddress shared_;
  ChainSteps<T, Shape> steps_;
  int early_ = 0;  // steps whose filters have been asked for
};

#endif

// For any other architecture it is empty, and no plan chooses it.
template <class T, class Shape>
__global__ void __launch_bounds__(kWarpgroupBlockThreads, 1)
    conv_chain_tma_kernel(const __grid_constant__ ChainTmaArguments arguments) {
#if defined(RF_HAS_WGMMA)
  const ptx::SharedAddress shared = ptx::shared_address(ptx::dynamic_shared());
  ChainProducer<T, Shape> producer(arguments, shared);
  if (threadIdx.x == 0) producer.init();
  // Nothing is copied to the other before its barriers are there.
  if constexpr (Shape::kSharing > 1) ptx::cluster_sync();
  if (threadIdx.x == 0) producer.begin();
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
        ChainConsumer<T, Shape>(arguments, shared, consumer, thread).run();
      });
  // None ends while the other tells it what it has read.
  if constexpr (Shape::kSharing > 1) ptx::cluster_sync();
#endif
}

}  // namespace resnet_fused
