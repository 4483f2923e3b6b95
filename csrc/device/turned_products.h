// Sums of products whose left side threads turn in registers on its way from shared memory.
#pragma once

#include <cstdint>

#include "../ptx/wgmma.h"
#include "pipeline.h"
#include "tap_steps.h"
#include "warpgroup_tile.h"

namespace resnet_fused {

#if defined(RF_HAS_WGMMA)

// Where a warpgroup's parts of a stage begin: of the left side's two operands, and of the right
// one.
struct StagePlaces {
  uint32_t left;
  uint32_t mask;
  uint32_t right;
};

// One tile's sums. `left` makes the left operand of each step; of two steps' the one lies in
// registers that the products still read. `begin` is called while the first step's products run.
// Where the right side is transformed, the left one, which is not, is made meanwhile; and a stage
// is free when its products are done, and not when the next one's have begun. A ring whose left
// side is free on its own is told when that has been taken.
template <class T, class Shape, class Operand, class Begin>
RF_DEVICE void sum_products(float (&d)[Shape::kColumns / 2], const RingOf<Shape>& ring,
                            RingPlace<Shape::kStages>& at, ptx::SharedAddress shared,
                            const StagePlaces& places, int steps, bool releases, Operand& left,
                            const Begin& begin) {
  constexpr bool kTransforms = requires { ring.transformed(at); };
  constexpr bool kTakes = requires { ring.taken(at); };
  uint32_t a[2][kProducts][4];
  RingPlace<Shape::kStages> before = at;
  ptx::wgmma_pin(d);
#pragma unroll 1
  for (int pair = 0; pair < steps; pair += 2) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (pair + half == steps) break;
      left.prepare();
      if constexpr (kTransforms) {
        ring.wait_raw(at);
      } else {
        ring.wait(at);
      }
      const ptx::SharedAddress stage = shared + at.stage * Shape::kStageBytes;
      left.make(a[half], stage + places.left, stage + places.mask);
      if constexpr (kTakes) ring.taken(at);
#pragma unroll
      for (int i = 0; i < kProducts; ++i) ptx::wgmma_pin(a[half][i]);
      if constexpr (kTransforms) {
        ptx::wgmma_wait_group<0>();  // on every way here, or ptxas puts in more of them
        ptx::wgmma_pin(d);
        if (releases && pair + half > 0) ring.release(before);
        ring.wait(at);
      }
      ptx::wgmma_fence();
      multiply_across<T>(d, a[half], stage + places.right, pair + half > 0);
      ptx::wgmma_commit_group();
      if (pair + half == 0) {
        begin();
      } else if constexpr (!kTransforms) {
        ptx::wgmma_wait_group<1>();
        if (releases) ring.release(before);
      }
      before = at;
      at.next();
    }
  }
  ptx::wgmma_wait_group<0>();
  ptx::wgmma_pin(d);
  if (releases) ring.release(before);
}

#endif

}  // namespace resnet_fused
