// The ring of blocks of a cluster that share the pixels of a gradient's steps, or their filters
// too, where threads turn the pixels in registers on their way into the products.
//
// Filters are read by products alone: as in conv_bn_act, relaxed arrivals of the readers of all
// blocks tell each producer that their part of a stage is free. dy and y are read by threads,
// behind which another block's copy has to be ordered. So a block's own producer waits until its
// readers have taken them, and passes that on to the others by a release of the cluster's scope: a
// fence of the whole GPU, of a thread that computes nothing, and early, for pixels lie in registers
// before the step's products begin.
#pragma once

#include <cstdint>

#include "../ptx/cluster.h"
#include "../ptx/mbarrier.h"
#include "dgrad_tma.h"
#include "pipeline.h"
#include "tap_steps.h"

namespace resnet_fused {

#if defined(RF_HAS_WGMMA)

// Of `full`, all bytes of a step; of `empty`, the filters' readers in all blocks that share them.
// `taken`: this block's readers have dy and y in registers; `passed`: so have those of the others
// that share them.
template <class Shape>
struct TurnedRing : Ring<Shape::kStages, Shape::kFilterSharing> {
  using Base = Ring<Shape::kStages, Shape::kFilterSharing>;
  using typename Base::Place;
  static constexpr int kOthers = Shape::kPixelSharing - 1;

  RF_DEVICE void init(uint32_t readers) const {
    Base::init(readers);
    for (Place at; at.parity == 0; at.next()) {
      ptx::mbarrier_init(taken_at(at), readers);
      if constexpr (kOthers > 0) ptx::mbarrier_init(passed_at(at), kOthers);
    }
  }

  // Of a warp that reads, behind its loads of dy and y.
  RF_DEVICE void taken(const Place& at) const {
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(taken_at(at));
  }
  // The first kFilterSharing lanes of such a warp, behind its products.
  RF_DEVICE void release(const Place& at) const {
    if constexpr (Shape::kFilterSharing > 1) {
      const ClusterPlace<Shape> place;
      const uint32_t rank =
          static_cast<uint32_t>(place.channels) + threadIdx.x % 32 * Shape::kPixelSharing;
      ptx::mbarrier_arrive_relaxed_cluster(ptx::cluster_address(this->empty(at), rank));
    } else {
      ptx::mbarrier_arrive(this->empty(at));
    }
  }

  // The producer's, of a stage that has been filled before: waits until its block has taken dy and
  // y of it, and tells the others.
  RF_DEVICE void pass(const Place& at) const {
    ptx::mbarrier_wait_parity(taken_at(at), at.parity ^ 1);
    if constexpr (kOthers > 0) {
      const auto own = static_cast<uint32_t>(ClusterPlace<Shape>().channels);
      const uint32_t first = ptx::cluster_rank() - own;
#pragma unroll
      for (uint32_t i = 1; i < Shape::kPixelSharing; ++i) {
        const uint32_t rank = first + (own + i) % Shape::kPixelSharing;
        ptx::mbarrier_arrive_cluster(ptx::cluster_address(passed_at(at), rank));
      }
    }
  }
  // ... until the others have told, too, and expects `bytes` of the whole step.
  RF_DEVICE void acquire_pixels(const Place& at, uint32_t bytes) const {
    if constexpr (kOthers > 0) ptx::mbarrier_wait_parity_cluster(passed_at(at), at.parity ^ 1);
    ptx::mbarrier_arrive_expect_tx(this->full(at), bytes);
  }
  // ... until the filters' part of the stage has been read in all blocks that share it.
  RF_DEVICE void acquire_filters(const Place& at) const {
    if constexpr (Shape::kFilterSharing > 1) {
      ptx::mbarrier_wait_parity_relaxed(this->empty(at), at.parity ^ 1);
    } else {
      ptx::mbarrier_wait_parity(this->empty(at), at.parity ^ 1);
    }
  }

 private:
  RF_DEVICE ptx::SharedAddress taken_at(const Place& at) const {
    return this->barriers + (2 * Shape::kStages + at.stage) * kBarrierBytes;
  }
  RF_DEVICE ptx::SharedAddress passed_at(const Place& at) const {
    return this->barriers + (3 * Shape::kStages + at.stage) * kBarrierBytes;
  }
};

template <class Shape>
  requires(Shape::kTurned && Shape::kSharing > 1)
struct RingType<Shape> {
  using type = TurnedRing<Shape>;
};

#endif

}  // namespace resnet_fused
