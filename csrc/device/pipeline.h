// A ring of stages in shared memory between a thread that asks TMA for steps and warpgroups that
// multiply them.
//
// Each stage has two mbarriers. `full`: one arrival, which says how many bytes come, and the bytes.
// `empty`: an arrival of each warp that has read the stage. (Of a warpgroup's products each warp
// waits for itself: PTX says of wgmma.wait_group what the executing threads may rely on.)
//
// A parity tells a phase from the next one alone. So a reader that skips steps which others read
// must not wait before they have waited for those: Turns sees to it.
#pragma once

#include <cstdint>

#include "../ptx/cluster.h"
#include "../ptx/mbarrier.h"
#include "warpgroup_shape.h"

namespace resnet_fused {

// A place in the sequence of steps: the stage, and the parity of how often the ring has been
// passed.
template <int kStages>
struct RingPlace {
  int stage = 0;
  uint32_t parity = 0;

  RF_DEVICE void next() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
  // `steps` that somebody else takes.
  RF_DEVICE void skip(int steps) {
    const auto reached = static_cast<uint32_t>(stage + steps);
    const uint32_t rounds = reached / kStages;
    parity ^= rounds & 1;
    stage = static_cast<int>(reached - rounds * kStages);
  }
};

// kSharing: blocks of a cluster, each with a ring like this one, whose producers copy into all of
// them: a stage is free when the readers of all have read theirs. Bytes may come before they are
// expected: the phase ends with both.
template <int kStages, int kSharing = 1>
struct Ring {
  using Place = RingPlace<kStages>;

  ptx::SharedAddress barriers;  // ring_bytes(kStages), at a multiple of 8

  RF_DEVICE ptx::SharedAddress full(const Place& at) const {
    return barriers + at.stage * kBarrierBytes;
  }
  RF_DEVICE ptx::SharedAddress empty(const Place& at) const {
    return barriers + (kStages + at.stage) * kBarrierBytes;
  }

  // By one thread, which publishes it by fence_mbarrier_init and a barrier. `readers`: warps that
  // release each stage.
  RF_DEVICE void init(uint32_t readers) const {
    for (Place at; at.parity == 0; at.next()) {
      ptx::mbarrier_init(full(at), 1);
      ptx::mbarrier_init(empty(at), readers * kSharing);
    }
  }

  // The producer's: waits until the stage has been read, and expects `bytes` on full(at).
  RF_DEVICE void acquire(const Place& at, uint32_t bytes) const {
    if constexpr (kSharing > 1) {
      ptx::mbarrier_wait_parity_relaxed(empty(at), at.parity ^ 1);
    } else {
      ptx::mbarrier_wait_parity(empty(at), at.parity ^ 1);
    }
    ptx::mbarrier_arrive_expect_tx(full(at), bytes);
  }
  // A reader's: waits until the stage has come.
  RF_DEVICE void wait(const Place& at) const { ptx::mbarrier_wait_parity(full(at), at.parity); }
  // The first kSharing lanes of each warp of the readers: it has read the stage, and not only asked
  // for products.
  RF_DEVICE void release(const Place& at) const {
    if constexpr (kSharing > 1) {
      ptx::mbarrier_arrive_relaxed_cluster(ptx::cluster_address(empty(at), threadIdx.x % 32));
    } else {
      ptx::mbarrier_arrive(empty(at));
    }
  }
};

// Two warpgroups that read steps in turns: each comes when the other one has waited for all of its
// steps, which leaves the tensor cores to one at a time.
class Turns {
 public:
  // barriers: one for each of the two.
  RF_DEVICE Turns(ptx::SharedAddress barriers, uint32_t mine)
      : mine_(barriers + mine * kBarrierBytes),
        other_(barriers + (mine ^ 1) * kBarrierBytes),
        parity_(mine ^ 1) {}  // the first one's first turn has come

  static RF_DEVICE void init(ptx::SharedAddress barriers) {
    for (int i = 0; i < kConsumers; ++i) {
      ptx::mbarrier_init(barriers + i * kBarrierBytes, kWarpgroupWarps);
    }
  }

  RF_DEVICE void wait() {
    ptx::mbarrier_wait_parity(mine_, parity_);
    parity_ ^= 1;
  }
  // One lane of each warp.
  RF_DEVICE void pass() const { ptx::mbarrier_arrive(other_); }

 private:
  ptx::SharedAddress mine_;
  ptx::SharedAddress other_;
  uint32_t parity_;
};

// A ring of stages into which the others' producers copy what products alone read, and this block's
// own what its threads read or write as well: that is ordered ahead of its next copy.
template <int kStages, int kSharing>
struct MixedRing : Ring<kStages, kSharing> {
  using Base = Ring<kStages, kSharing>;
  using Place = typename Base::Place;

  RF_DEVICE void acquire(const Place& at, uint32_t bytes) const {
    ptx::mbarrier_wait_parity(this->empty(at), at.parity ^ 1);
    ptx::mbarrier_arrive_expect_tx(this->full(at), bytes);
  }
  RF_DEVICE void release(const Place& at) const {
    if (kSharing > 1 && threadIdx.x % 32 != ptx::cluster_rank()) {
      Base::release(at);
    } else {
      ptx::mbarrier_arrive(this->empty(at));
    }
  }
};

}  // namespace resnet_fused
