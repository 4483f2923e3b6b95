// The main loop of the matrix kernels: a ring of steps in shared memory, filled ahead, multiplied.
#pragma once

#include <cstdint>

#include "../ptx/ptx.h"
#include "matrix_unit.h"
#include "operand_tile.h"
#include "tile_shape.h"

namespace resnet_fused {

// A thread's share of the results: [16 rows][8 columns] blocks of its warp.
template <class Shape>
struct Sums {
  float value[Shape::kBlocksM][2 * Shape::kBlocksN][4];

  RF_DEVICE void clear() {
#pragma unroll
    for (auto& row : value) {
#pragma unroll
      for (auto& block : row) {
#pragma unroll
        for (float& sum : block) sum = 0.0f;
      }
    }
  }
};

// Which threads a thread stands among.
template <class Shape>
struct Place {
  uint32_t thread;
  uint32_t lane;
  uint32_t row;     // first of its warp within the tile
  uint32_t column;  // likewise

  static RF_DEVICE Place mine() { return of(threadIdx.x); }
  static RF_DEVICE Place of(uint32_t thread) {
    const uint32_t warp = thread / 32;
    return Place{thread, thread % 32, warp % Shape::kWarpsM * Shape::kWarpM,
                 warp / Shape::kWarpsM * Shape::kWarpN};
  }
};

// One slice of the warp's rows times 16 columns.
template <class T, int kBlocksM, int kColumns>
RF_DEVICE void multiply_columns(float (&sums)[kBlocksM][kColumns][4], int block,
                                const uint32_t (&left)[kBlocksM][4], const uint32_t (&right)[4]) {
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const uint32_t b[2] = {right[2 * j], right[2 * j + 1]};
#pragma unroll
    for (int i = 0; i < kBlocksM; ++i) multiply<T>(sums[i][2 * block + j], left[i], b);
  }
}

// A warp's fragments: of the slice in use and of the next one, and of the right side's columns.
template <class Shape>
struct Fragments {
  uint32_t left[2][Shape::kBlocksM][4];
  uint32_t right[2][4];
};

// Adds one step of the product, whose first fragments are in `fragments` already. While one slice's
// rows multiply, the next one's are loaded; columns come 16 at a time, which keeps registers free.
// `last` is called when all fragments of the step are in registers, and may load the next one's.
template <class T, class Shape, class LeftFragments, class RightFragments, class Last>
RF_DEVICE void multiply_step(Sums<Shape>& sums, Fragments<Shape>& fragments,
                             const LeftFragments& left, const RightFragments& right,
                             ptx::SharedAddress left_tile, ptx::SharedAddress right_tile,
                             const Last& last) {
  auto& a = fragments.left;
  auto& b = fragments.right;
#pragma unroll
  for (int i = 0; i < Shape::kSlices * Shape::kBlocksN; ++i) {
    const int slice = i / Shape::kBlocksN;
    const int block = i % Shape::kBlocksN;
    const int next_slice = (i + 1) / Shape::kBlocksN;
    const int next_block = (i + 1) % Shape::kBlocksN;
    if (next_slice < Shape::kSlices) {
      right.load_block(b[(i + 1) % 2], right_tile, next_slice, next_block);
      if (block == 0 && slice + 1 < Shape::kSlices) {
        left.load(a[(slice + 1) % 2], left_tile, slice + 1);
      }
    } else {
      last();
    }
    if (block == 0) round_operands<T>(a[slice % 2]);
    round_operands<T>(b[i % 2]);
    multiply_columns<T>(sums.value, block, a[slice % 2], b[i % 2]);
  }
}

// Adds `steps` (at least one) steps of the product to `sums`. Stage i of the ring, at ring + i *
// kStageBytes, holds the left tile and behind it the right one.
//
// Loader: `issue(stage)` asks for the next step and goes on to the one after it; `land(stage)`
// stores what came through registers; `arrived(stage)` runs when the thread's own copies have
// landed, before others see them. One that has brought a part of the steps before the loop has
// `first(stage)`, which brings and stores what is left of them.
// Tail: `tail(i)` is called in place of the (steps + i)-th step, for i < kStages - 1: its stage,
// (steps + i) % kStages, is free, and what it copies there arrives behind the loop.
//
// When the loop ends nobody reads the ring any more; the tails' copies may be under way.
template <class T, class Shape, class LeftFragments, class RightFragments, class Loader, class Tail>
RF_DEVICE void run_main_loop(Sums<Shape>& sums, ptx::SharedAddress ring, int steps,
                             const LeftFragments& left, const RightFragments& right, Loader& loader,
                             const Tail& tail) {
  constexpr int kAhead = Shape::kStages - 1;
  const auto stage_at = [&](int stage) { return ring + stage * Shape::kStageBytes; };
  const auto right_of = [](ptx::SharedAddress at) { return at + Shape::kRightAt; };

  for (int i = 0; i < kAhead; ++i) {
    if (i < steps) {
      if constexpr (requires { loader.first(ring); }) {
        loader.first(stage_at(i));
      } else {
        loader.issue(stage_at(i));
        loader.land(stage_at(i));
      }
    } else {
      tail(i - steps);
    }
    ptx::cp_async_commit_group();
  }
  ptx::cp_async_wait_group<kAhead - 1>();
  loader.arrived(stage_at(0));
  ptx::sync_threads();

  Fragments<Shape> fragments;
  const auto load_first = [&](ptx::SharedAddress at) {
    left.load(fragments.left[0], at, 0);
    right.load_block(fragments.right[0], right_of(at), 0, 0);
  };
  load_first(stage_at(0));
  int stage = 0;            // in use
  int free_stage = kAhead;  // read to its end before the last barrier
  for (int step = 0; step < steps; ++step) {
    const int next_stage = stage + 1 == Shape::kStages ? 0 : stage + 1;
    if (step + kAhead < steps) {
      loader.issue(stage_at(free_stage));
    } else {
      tail(step + kAhead - steps);
    }
    ptx::cp_async_commit_group();
    const ptx::SharedAddress at = stage_at(stage);
    multiply_step<T>(sums, fragments, left, right, at, right_of(at), [&] {
      // All fragments of this stage are in registers. The next one must have arrived; what every
      // thread has left behind becomes the free one.
      ptx::cp_async_wait_group<kAhead - 1>();
      if (step + 1 < steps) loader.arrived(stage_at(next_stage));
      ptx::sync_threads();
      if (step + 1 < steps) load_first(stage_at(next_stage));
    });
    if (step + kAhead < steps) loader.land(stage_at(free_stage));
    free_stage = stage;
    stage = next_stage;
  }
}

}  // namespace resnet_fused
