// How the steps of a chain on sm_90a come. A step is 64 channels of `out`: the filters that make
// it, the shortcut, of which it takes the place, where that is a tensor, and the filters that read
// it.
//
// A reader's way through them:
//
//   steps.wait();                // the filters that make `out` are at steps.weight()
//   ...                          // products
//   steps.release_weight(lane);  // they have ended
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

// Asks for the filters that make a step of `out`, of all that a tile reads.
template <class T, class Shape>
RF_DEVICE void load_making(const ChainTmaArguments& arguments, ptx::SharedAddress to, int step,
                           ptx::SharedAddress barrier) {
  using Types = ChainTypes<T>;
  const int32_t channel = step * kStepElements;
  for (int i = 0; i < Shape::kInnerBoxes; ++i) {
    Types::template load_filters<kStepElements, Shape::kSharing>(
        to + i * Shape::kWeightBytes, &arguments.weight, i * kStepElements, channel, barrier);
  }
  to += Shape::kInnerBoxes * Shape::kWeightBytes;
  for (int i = 0; i < Shape::kProjectedBoxes; ++i) {
    Types::template load_filters<kStepElements, Shape::kSharing>(
        to + i * Shape::kWeightBytes, &arguments.projection, i * kStepElements, channel, barrier);
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
    load_making<T, Shape>(arguments, stage(at_) + Shape::kWeightAt, step, ring().full(at_));
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
// products alone, and the block's own boxes.
template <class T, class Shape>
class StepsInRings {
  using Filters = Ring<Shape::kStages, Shape::kSharing>;
  using Boxes = Ring<Shape::kBoxStages>;

 public:
  RF_DEVICE explicit StepsInRings(ptx::SharedAddress shared) : shared_(shared) {}

  RF_DEVICE void init() const {
    making().init(Shape::kReaders);
    reading().init(Shape::kReaders);
    boxes().init(Shape::kReaders);
  }

  RF_DEVICE void wait() const { making().wait(at_); }
  RF_DEVICE ptx::SharedAddress weight() const {
    return shared_ + Shape::kMakingAt + at_.stage * Shape::kMakingBytes;
  }
  RF_DEVICE void release_weight(uint32_t lane) const {
    if (lane < Shape::kSharing) making().release(at_);
  }
  RF_DEVICE void wait_box() const { boxes().wait(box_at_); }
  RF_DEVICE ptx::SharedAddress box() const {
    return shared_ + Shape::kBoxesAt + box_at_.stage * Shape::kBoxBytes;
  }
  RF_DEVICE void wait_next() const { reading().wait(at_); }
  RF_DEVICE ptx::SharedAddress next_weight() const {
    return shared_ + Shape::kReadingAt + at_.stage * Shape::kReadingBytes;
  }
  RF_DEVICE void release_box(uint32_t lane) {
    if (lane == 0) boxes().release(box_at_);
    box_at_.next();
  }
  RF_DEVICE void release(uint32_t lane) {
    if (lane < Shape::kSharing) reading().release(at_);
    at_.next();
  }

  // The producer's, as above.
  RF_DEVICE void load_filters(const ChainTmaArguments& arguments, int step) {
    making().acquire(at_, Shape::kMakingBytes);
    load_making<T, Shape>(arguments, weight(), step, making().full(at_));
    reading().acquire(at_, Shape::kReadingBytes);
    load_reading<T, Shape>(arguments, next_weight(), step, reading().full(at_));
    at_.next();
  }
  // The shortcut comes from memory, and is asked for first.
  RF_DEVICE void load(const ChainTmaArguments& arguments, int step, int32_t pixel, bool asked) {
    boxes().acquire(box_at_, Shape::kBoxBytes);
    ptx::tma_load(box(), &arguments.shortcut, {step * kStepElements, pixel}, boxes().full(box_at_));
    box_at_.next();
    if (!asked) load_filters(arguments, step);
  }

 private:
  RF_DEVICE Filters making() const { return {shared_ + Shape::kMakingRingAt}; }
  RF_DEVICE Filters reading() const { return {shared_ + Shape::kReadingRingAt}; }
  RF_DEVICE Boxes boxes() const { return {shared_ + Shape::kBoxRingAt}; }

  ptx::SharedAddress shared_;
  RingPlace<Shape::kStages> at_;
  RingPlace<Shape::kBoxStages> box_at_;
};

template <class T, class Shape>
using ChainSteps =
    std::conditional_t<Shape::kInRings, StepsInRings<T, Shape>, WholeSteps<T, Shape>>;

#endif

}  // namespace resnet_fused
