// How the steps of a chain on sm_90a come. A step is 64 channels of `out`: the filters that make
// it, the shortcut, of which it takes the place, where that is a tensor, and the filters that read
// it.
//
// A reader's way through them:
//
//   steps.wait();                // the filters that make `out`, or a part, are at steps.weight()
//   ...                          // products
//   steps.passed();              // they have been asked for; then the next part
//   steps.release_weight(lane);  // those over the first part in use have ended
//   steps.wait_box();            // steps.box() is where `out` is made
//   ...
//   steps.wait_next();           // the filters that read it are at steps.next_weight()
//   ...                          // products, and beside them
//   steps.release_box(lane);     // what the warp has stored has been read
//   steps.release(lane);         // the products have ended: the next step
#pragma once

#include <cstdint>
#include <type_traits>

#include "../ptx/tma.h"
#include "chain_rings.h"
#include "chain_tma.h"
#include "chain_types.h"
#include "pipeline.h"

namespace resnet_fused {

#if defined(RF_HAS_WGMMA)

// Asks for filters that make a step of `out`: so many boxes of a map's, from box `first` on.
template <class T, class Shape>
RF_DEVICE void load_making(ptx::SharedAddress to, const ptx::TensorMap* map, int first, int boxes,
                           int step, ptx::SharedAddress barrier RF_SITE_PARAMETER) {
  for (int i = 0; i < boxes; ++i) {
    ChainTypes<T>::template load_filters<kStepElements, Shape::kSharing>(
        to + i * Shape::kWeightBytes, map, (first + i) * kStepElements, step * kStepElements,
        barrier RF_SITE);
  }
}

// Asks for those that read it.
template <class T, class Shape>
RF_DEVICE void load_reading(const ChainTmaArguments& arguments, ptx::SharedAddress to, int step,
                            ptx::SharedAddress barrier) {
  ChainTypes<T>::template load_filters<Shape::kNext, Shape::kSharing>(
      to, &arguments.next, step * kStepElements, 0, barrier);
}

// A step lies in one stage. A cluster's blocks share the filters, and the box is the block's own.
template <class T, class Shape>
class WholeSteps {
  using Stages = MixedRing<Shape::kStages, Shape::kSharing>;

 public:
  RF_DEVICE explicit WholeSteps(ptx::SharedAddress shared) : shared_(shared) {}

  RF_DEVICE void init() const { ring().init(Shape::kReaders); }

  RF_DEVICE void wait() const { ring().wait(at_); }
  RF_DEVICE ptx::SharedAddress weight() const { return stage(at_) + Shape::kWeightAt; }
  RF_DEVICE void passed() const {}
  RF_DEVICE void release_weight(uint32_t /*lane*/) const {}
  RF_DEVICE void wait_box() const {}
  RF_DEVICE ptx::SharedAddress box() const { return stage(at_); }
  RF_DEVICE void wait_next() const {}
  RF_DEVICE ptx::SharedAddress next_weight() const { return stage(at_) + Shape::kNextWeightAt; }
  RF_DEVICE void release_box(uint32_t /*lane*/) const {}
  RF_DEVICE void release(uint32_t lane) {
    if (lane < Shape::kSharing) ring().release(at_);
    at_.next();
  }

  // The producer's: asks for the filters of the next step.
  RF_DEVICE void load_filters(const ChainTmaArguments& arguments, int step) {
    ring().acquire(at_, Shape::kArrivingBytes);
    load_making<T, Shape>(weight(), &arguments.weight, 0, Shape::kInnerBoxes, step,
                          ring().full(at_));
    if constexpr (Shape::kProjected > 0) {
      load_making<T, Shape>(weight() + Shape::kInnerBoxes * Shape::kWeightBytes,
                            &arguments.projection, 0, Shape::kProjectedBoxes, step,
                            ring().full(at_));
    }
    load_reading<T, Shape>(arguments, stage(at_) + Shape::kNextWeightAt, step, ring().full(at_));
    at_.next();
  }
  // Asks for a step of the tile from a pixel on. asked: its filters have been.
  RF_DEVICE void load(const ChainTmaArguments& arguments, int step, int32_t pixel, bool asked) {
    if (!asked) load_filters(arguments, step);
    if constexpr (Shape::kProjected == 0) {
      ptx::tma_load(stage(box_at_), &arguments.shortcut, {step * kStepElements, pixel},
                    ring().full(box_at_));
    }
    box_at_.next();
  }

 private:
  RF_DEVICE Stages ring() const { return {{shared_ + Shape::kRingAt}}; }
  RF_DEVICE ptx::SharedAddress stage(const RingPlace<Shape::kStages>& at) const {
    return shared_ + Shape::kStagesAt + at.stage * Shape::kStageBytes;
  }

  ptx::SharedAddress shared_;
  RingPlace<Shape::kStages> at_;
  RingPlace<Shape::kStages> box_at_;  // the producer's, behind at_
};

// Each part of a step comes through a ring of its own: filters for all blocks of a cluster, read by
// products alone, and the block's own boxes. With a projection nothing comes into the one box.
template <class T, class Shape>
class StepsInRings {
  using Making = Ring<Shape::kMakingStages, Shape::kSharing>;
  using Reading = Ring<Shape::kStages, Shape::kSharing>;
  using Boxes = Ring<Shape::kBoxStages>;
  static constexpr bool kArrives = Shape::kProjected == 0;  // the shortcut

 public:
  RF_DEVICE explicit StepsInRings(ptx::SharedAddress shared) : shared_(shared) {}

  RF_DEVICE void init() const {
    making().init(Shape::kReaders);
    reading().init(Shape::kReaders);
    if constexpr (kArrives) boxes().init(Shape::kReaders);
  }

  RF_DEVICE void wait() const { making().wait(making_at_); }
  RF_DEVICE ptx::SharedAddress weight() const {
    return shared_ + Shape::kMakingAt + making_at_.stage * Shape::kMakingBytes;
  }
  RF_DEVICE void passed() { making_at_.next(); }
  RF_DEVICE void release_weight(uint32_t lane) {
    if (lane < Shape::kSharing) making().release(in_use_);
    in_use_.next();
  }
  RF_DEVICE void wait_box() const {
    if constexpr (kArrives) boxes().wait(box_at_);
  }
  RF_DEVICE ptx::SharedAddress box() const {
    return shared_ + Shape::kBoxesAt + box_at_.stage * Shape::kBoxBytes;
  }
  RF_DEVICE void wait_next() const { reading().wait(at_); }
  RF_DEVICE ptx::SharedAddress next_weight() const {
    return shared_ + Shape::kReadingAt + at_.stage * Shape::kReadingBytes;
  }
  RF_DEVICE void release_box(uint32_t lane) {
    if constexpr (kArrives) {
      if (lane == 0) boxes().release(box_at_);
      box_at_.next();
    }
  }
  RF_DEVICE void release(uint32_t lane) {
    if (lane < Shape::kSharing) reading().release(at_);
    at_.next();
  }

  // The producer's, as above.
  RF_DEVICE void load_filters(const ChainTmaArguments& arguments, int step) {
    making().acquire(making_at_, Shape::kMakingBytes);
    load_making<T, Shape>(weight(), &arguments.weight, 0, Shape::kInnerBoxes, step,
                          making().full(making_at_));
    making_at_.next();
#pragma unroll
    for (int part = 1; part < Shape::kParts; ++part) {
      making().acquire(making_at_, Shape::kMakingBytes);
      load_making<T, Shape>(weight(), &arguments.projection, (part - 1) * Shape::kInnerBoxes,
                            Shape::kInnerBoxes, step, making().full(making_at_));
      making_at_.next();
    }
    reading().acquire(at_, Shape::kReadingBytes);
    load_reading<T, Shape>(arguments, next_weight(), step, reading().full(at_));
    at_.next();
  }
  // The shortcut comes from memory, and is asked for first.
  RF_DEVICE void load(const ChainTmaArguments& arguments, int step, int32_t pixel, bool asked) {
    if constexpr (kArrives) {
      boxes().acquire(box_at_, Shape::kBoxBytes);
      ptx::tma_load(box(), &arguments.shortcut, {step * kStepElements, pixel},
                    boxes().full(box_at_));
      box_at_.next();
    }
    if (!asked) load_filters(arguments, step);
  }

 private:
  RF_DEVICE Making making() const { return {shared_ + Shape::kMakingRingAt}; }
  RF_DEVICE Reading reading() const { return {shared_ + Shape::kReadingRingAt}; }
  RF_DEVICE Boxes boxes() const { return {shared_ + Shape::kBoxRingAt}; }

  ptx::SharedAddress shared_;
  RingPlace<Shape::kMakingStages> making_at_;  // the next part
  RingPlace<Shape::kMakingStages> in_use_;     // the first one that a reader has not released
  RingPlace<Shape::kStages> at_;
  RingPlace<Shape::kBoxStages> box_at_;
};

// The rows of a warpgroup's pixels, of one tile at a time, that one thread of it asks for: what the
// first convolution reads, and the projection's pixels, which may be strided.
template <class Shape>
class OwnRows {
 public:
  // consumer: which warpgroup; bytes: in front of its half of a box.
  RF_DEVICE OwnRows(ptx::SharedAddress shared, uint32_t consumer, uint32_t bytes)
      : rows_(shared + bytes),
        full_(shared + Shape::kRowsRingAt + consumer * Shape::kParts * kBarrierBytes) {}

  static RF_DEVICE void init(ptx::SharedAddress shared) {
    for (int i = 0; i < kConsumers * Shape::kParts; ++i) {
      ptx::mbarrier_init(shared + Shape::kRowsRingAt + i * kBarrierBytes, 1);
    }
  }

  RF_DEVICE ptx::SharedAddress rows() const { return rows_; }
  RF_DEVICE void wait(int part) const { ptx::mbarrier_wait_parity(full(part), parity_); }
  RF_DEVICE void next() { parity_ ^= 1; }

  // Of the tile whose first of the warpgroup's pixels is `pixel`.
  RF_DEVICE void load(const ChainTmaArguments& arguments, int32_t pixel) const {
    ptx::mbarrier_arrive_expect_tx(full(0), kPartBytes);
    for (int i = 0; i < Shape::kInnerBoxes; ++i) {
      ptx::tma_load(rows_ + i * Shape::kBoxBytes, &arguments.x, {i * kStepElements, pixel},
                    full(0));
    }
    const Pixel first = pixel_of(pixel, arguments.grid);
    for (int part = 1; part < Shape::kParts; ++part) {
      ptx::mbarrier_arrive_expect_tx(full(part), kPartBytes);
      for (int i = 0; i < Shape::kInnerBoxes; ++i) {
        const int box = part * Shape::kInnerBoxes + i;
        ptx::tma_load_im2col(rows_ + box * Shape::kBoxBytes, &arguments.shortcut,
                             {(box - Shape::kInnerBoxes) * kStepElements,
                              first.q * arguments.stride, first.p * arguments.stride, first.n},
                             {uint16_t{0}, uint16_t{0}}, full(part));
      }
    }
  }

 private:
  static constexpr uint32_t kPartBytes = Shape::kInnerBoxes * Shape::kPartBytes;

  RF_DEVICE ptx::SharedAddress full(int part) const { return full_ + part * kBarrierBytes; }

  ptx::SharedAddress rows_;
  ptx::SharedAddress full_;
  uint32_t parity_ = 0;
};

template <class T, class Shape>
using ChainSteps =
    std::conditional_t<Shape::kInRings, StepsInRings<T, Shape>, WholeSteps<T, Shape>>;

#endif

}  // namespace resnet_fused
