// Between TMA and the products: threads that put something else in the place of what has landed.
//
// Right operands of wgmma lie in shared memory, and left ones of 256 columns leave no registers to
// be made in. What is read through a BatchNorm is transformed where it lies, each element once a
// step, by the warps of the producer's warpgroup that have nothing to do (warpgroup_roles.h). A
// third mbarrier of each stage, `ready`, tells the readers. A stage is copied into again as ever,
// when its products, which came behind `ready`, have been waited for.
#pragma once

#include <cstdint>

#include "../ptx/mbarrier.h"
#include "../ptx/proxy.h"
#include "../ptx/ptx.h"
#include "../ptx/warp.h"
#include "gradient_mask.h"
#include "pipeline.h"
#include "warpgroup_shape.h"

namespace resnet_fused {

constexpr int kTransformWarps = kWarpgroupWarps - 1;
constexpr int kTransformThreads = 32 * kTransformWarps;

// Of a ring whose stages are transformed: full, empty and ready for each.
constexpr int transform_ring_bytes(int stages) { return 3 * stages * kBarrierBytes; }

// A WarpgroupShape whose pixels are transformed: its ring lies behind all else.
template <class Shape>
struct TransformShape : Shape {
  static constexpr bool kTransforms = true;
  static constexpr int kRingAt = Shape::kSharedBytes;
  static constexpr int kSharedBytes = kRingAt + transform_ring_bytes(Shape::kStages);
  static_assert(kSharedBytes <= kMostSharedBytes);
  // Those release a stage without any order, which serves copies alone.
  static_assert(Shape::kSharing == 1, "not in clusters that share filters");
};

// Of a warp that transforms, each of its threads behind its stores: products read through another
// proxy what these have stored.
RF_DEVICE void tell_transformed(ptx::SharedAddress ready) {
  ptx::fence_proxy_async_shared();
  ptx::sync_warp();
  if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(ready);
}

// A ring in which `wait` is for what others have transformed.
template <int kStages>
struct TransformRing : Ring<kStages> {
  using Base = Ring<kStages>;
  using typename Base::Place;

  RF_DEVICE ptx::SharedAddress ready(const Place& at) const {
    return this->barriers + (2 * kStages + at.stage) * kBarrierBytes;
  }

  // As Ring's.
  RF_DEVICE void init(uint32_t readers) const {
    Base::init(readers);
    for (Place at; at.parity == 0; at.next()) ptx::mbarrier_init(ready(at), kTransformWarps);
  }

  // Of those who transform, and of readers of what is not: waits until the stage has come.
  RF_DEVICE void wait_raw(const Place& at) const { Base::wait(at); }
  // All of them, each behind its stores.
  RF_DEVICE void transformed(const Place& at) const { tell_transformed(ready(at)); }
  // A reader's: of the rest of the stage, too, which has come before `ready`.
  RF_DEVICE void wait(const Place& at) const { ptx::mbarrier_wait_parity(ready(at), at.parity); }
};

template <class Shape>
struct RingType<TransformShape<Shape>> {
  using type = TransformRing<Shape::kStages>;
};

// A transforming thread's life: steps.prepare() while a step may still be on its way, and
// steps.transform(stage) when it has come.
template <class Shape, class Steps>
RF_DEVICE void transform_stages(const RingOf<Shape>& ring, ptx::SharedAddress shared,
                                Steps&& steps) {
  RingPlace<Shape::kStages> at;
  for (; !steps.done(); steps.next(), at.next()) {
    steps.prepare();
    ring.wait_raw(at);
    steps.transform(shared + at.stage * Shape::kStageBytes);
    ring.transformed(at);
  }
}

// What a thread transforms at a time: channels of 16 bits in pairs, which stay words in registers.
using RowUnit = Unit<uint32_t, 4>;
constexpr int kUnitChannels = sizeof(RowUnit) / 2;

// One thread's part of rows of 128 bytes with TMA's swizzle: units of 16 bytes, always of the same
// channels. Eight lanes have a row, so that no two meet in a bank.
class TransformUnits {
 protected:
  static constexpr int kLanes = kStepRowBytes / static_cast<int>(sizeof(RowUnit));
  static constexpr int kRowStep = kTransformThreads / kLanes;
  static constexpr int kTogether = 2;  // of a thread's rows; then the swizzle is the same again
  static constexpr int kTogetherRows = kTogether * kRowStep;
  static_assert(kTogetherRows % 8 == 0 && kRowStep % 8 == 4);

 public:
  // thread: of those who transform.
  explicit RF_DEVICE TransformUnits(uint32_t thread)
      : row_(static_cast<int32_t>(thread / kLanes)), lane_(thread % kLanes) {}

  // The first of the thread's channels, of a row's.
  RF_DEVICE int32_t channel() const { return static_cast<int32_t>(lane_) * kUnitChannels; }
  // The thread's i-th row.
  RF_DEVICE int32_t row(int i) const { return row_ + i * kRowStep; }

  // Which of kLanes of the thread's rows, from the `first` one on, are known(row), bit by bit. Each
  // of the lanes that have the same ones asks for another one of them; by all lanes of a warp.
  template <class Known>
  RF_DEVICE uint32_t which(int first, const Known& known) const {
    const bool mine = known(row(first + static_cast<int>(threadIdx.x % kLanes)));
    const uint32_t all = ptx::ballot(ptx::kWholeWarp, mine) >> (threadIdx.x & (32 - kLanes));
    return all & ((1u << kLanes) - 1);
  }

  // make(load(at), at) takes the place of each unit, row after row, in `rows` of them from `tile`
  // on, a multiple of 1024; rows: a multiple of 8. at: the unit's address.
  template <class Load, class Make>
  RF_DEVICE void replace(ptx::SharedAddress tile, int32_t rows, const Load& load,
                         const Make& make) const {
    const auto place = static_cast<uint32_t>(row_);
    ptx::SharedAddress at =
        tile + place * kStepRowBytes + (lane_ ^ place % 8) * static_cast<uint32_t>(sizeof(RowUnit));
#pragma unroll 1
    for (int pass = 0; pass < rows / kTogetherRows; ++pass) {
      replace_of(at, kTogetherRows, load, make);
      at += kTogetherRows * kStepRowBytes;
    }
    if (rows % kTogetherRows != 0) replace_of(at, rows % kTogetherRows, load, make);
  }

  // transform(unit) of each.
  template <class Transform>
  RF_DEVICE void each(ptx::SharedAddress tile, int32_t rows, const Transform& transform) const {
    replace(
        tile, rows, [](ptx::SharedAddress at) { return ptx::load_shared<RowUnit>(at); },
        [&](RowUnit unit, ptx::SharedAddress) {
          transform(unit);
          return unit;
        });
  }

 private:
  // The thread's among the next `left` rows of all, from its own `at` on: all loads come first.
  template <class Load, class Make>
  RF_DEVICE void replace_of(ptx::SharedAddress at, int left, const Load& load,
                            const Make& make) const {
    decltype(load(at)) loaded[kTogether] = {};
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      if (is_among(k, left)) loaded[k] = load(further(at, k));
    }
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      if (!is_among(k, left)) break;
      ptx::store_shared(further(at, k), make(loaded[k], further(at, k)));
    }
  }

  RF_DEVICE bool is_among(int k, int left) const {
    return (k + 1) * kRowStep <= left || row(k) < left;
  }

  // k rows of the thread further: each second one has the swizzle of four rows further.
  static RF_DEVICE ptx::SharedAddress further(ptx::SharedAddress at, int k) {
    return (at ^ (k % kTogether * 4 * sizeof(RowUnit))) + k * kRowStep * kStepRowBytes;
  }

  int32_t row_;
  uint32_t lane_;
};

// The same of kRows rows.
template <int kRows>
class TransformRows : public TransformUnits {
 public:
  static constexpr int kPasses = (kRows + kRowStep - 1) / kRowStep;  // a thread's rows, at most
  static_assert(kPasses <= 32, "a bit for each of them");
  using TransformUnits::TransformUnits;

  // Which of all the thread's rows are known(row), bit by bit; by all lanes of a warp.
  template <class Known>
  RF_DEVICE uint32_t which(const Known& known) const {
    uint32_t found = 0;
#pragma unroll 1
    for (int first = 0; first < kPasses; first += kLanes) {
      found |= TransformUnits::which(first, known) << first;
    }
    return found;
  }

  template <class Transform>
  RF_DEVICE void each(ptx::SharedAddress tile, const Transform& transform) const {
    TransformUnits::each(tile, kRows, transform);
  }
};

}  // namespace resnet_fused
