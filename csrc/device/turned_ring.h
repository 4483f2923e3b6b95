// The ring of blocks of a cluster that share the operands of a gradient's steps: the one that
// threads turn in registers on its way into the products, and the one that products read.
//
// What products read nobody else does: as in conv_bn_act, relaxed arrivals of the readers of all
// blocks tell each producer that its part of a stage is free. What is turned is read by threads,
// behind which another block's copy has to be ordered. So a block's own producer waits until its
// readers have taken it, and passes that on to the others by a release of the cluster's scope: a
// fence of the whole GPU, of a thread that computes nothing, and early, for the operand lies in
// registers before the step's products begin.
#pragma once

#include <cstdint>

#include "../ptx/cluster.h"
#include "../ptx/mbarrier.h"
#include "pipeline.h"

namespace resnet_fused {

#if defined(RF_HAS_WGMMA)

// kTurned blocks of neighbouring ranks share what is turned, kRead of them, so many ranks apart,
// what is read. Of `full`, all bytes of a step; of `empty`, the readers in all blocks that share
// what is read. `taken`: this block's readers have what is turned in registers; `passed`: so have
// those of the others that share it.
template <int kStages, int kTurned, int kRead>
struct TurnedRing : Ring<kStages, kRead> {
  using Base = Ring<kStages, kRead>;
  using typename Base::Place;
  static constexpr int kOthers = kTurned - 1;

  RF_DEVICE void init(uint32_t readers) const {
    Base::init(readers);
    for (Place at; at.parity == 0; at.next()) {
      ptx::mbarrier_init(taken_at(at), readers);
      if constexpr (kOthers > 0) ptx::mbarrier_init(passed_at(at), kOthers);
    }
  }

  // Of a warp that reads, behind its loads of what it turns.
  RF_DEVICE void taken(const Place& at) const {
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(taken_at(at));
  }
  // The first kRead lanes of such a warp, behind its products.
  RF_DEVICE void release(const Place& at) const {
    if constexpr (kRead > 1) {
      const uint32_t rank = own() + threadIdx.x % 32 * kTurned;
      ptx::mbarrier_arrive_relaxed_cluster(ptx::cluster_address(this->empty(at), rank));
    } else {
      ptx::mbarrier_arrive(this->empty(at));
    }
  }

  // The producer's, of a stage that has been filled before: waits until its block has taken what is
  // turned, and tells the others.
  RF_DEVICE void pass(const Place& at) const {
    ptx::mbarrier_wait_parity(taken_at(at), at.parity ^ 1);
    if constexpr (kOthers > 0) {
      const uint32_t first = ptx::cluster_rank() - own();
#pragma unroll
      for (uint32_t i = 1; i < kTurned; ++i) {
        const uint32_t rank = first + (own() + i) % kTurned;
        ptx::mbarrier_arrive_cluster(ptx::cluster_address(passed_at(at), rank));
      }
    }
  }
  // ... until the others have told, too, and expects `bytes` of the whole step.
  RF_DEVICE void acquire_turned(const Place& at, uint32_t bytes) const {
    if constexpr (kOthers > 0) ptx::mbarrier_wait_parity_cluster(passed_at(at), at.parity ^ 1);
    ptx::mbarrier_arrive_expect_tx(this->full(at), bytes);
  }
  // ... until the rest of the stage has been read in all blocks that share it.
  RF_DEVICE void acquire_read(const Place& at) const {
    if constexpr (kRead > 1) {
      ptx::mbarrier_wait_parity_relaxed(this->empty(at), at.parity ^ 1);
    } else {
      ptx::mbarrier_wait_parity(this->empty(at), at.parity ^ 1);
    }
  }

 private:
  // This block's place among those that share what is turned.
  static RF_DEVICE uint32_t own() { return ptx::cluster_rank() % kTurned; }

  RF_DEVICE ptx::SharedAddress taken_at(const Place& at) const {
    return this->barriers + (2 * kStages + at.stage) * kBarrierBytes;
  }
  RF_DEVICE ptx::SharedAddress passed_at(const Place& at) const {
    return this->barriers + (3 * kStages + at.stage) * kBarrierBytes;
  }
};

#endif

}  // namespace resnet_fused
