// conv_chain on the GPU, for sm_80 and later: a block's last 1x1 convolution, its shortcut, and the
// next block's first one, on mma.sync.
//
//     made[m, c] = sum over k of x[m, k] * weight[c, k]
//     out[m, c]  = relu(scale[c] * made[m, c] + shift[c] + shortcut[m, c])
//     sums[m, j] = sum over c of out[m, c] * next_weight[j, c]
//     next[m, j] = relu(next_scale[j] * sums[m, j] + next_shift[j])
//
// and, where a 3x3 convolution stands in front, in place of x what it makes of it:
//
//     x[m, k] = relu(front_scale[k] * front[m, k] + front_shift[k]), rounded
//
// M: pixels. A block holds a tile of them, all channels of x and of what the shortcut projects. It
// makes `out` a step of channels at a time, rounds it, stores it, and multiplies it on as it stands
// in registers; the sums of all channels of `next` stay in registers until the last step. Filters,
// shortcuts, scales and shifts come through a ring, a stage for each step; the first steps are
// those of the convolution in front.
#pragma once

#include <cstdint>

#include "../device/chain_epilogue.h"
#include "../device/chain_front.h"
#include "../device/chain_geometry.h"
#include "../device/chain_loader.h"
#include "../device/dependent.h"
#include "../device/main_loop.h"

namespace resnet_fused {

// Adds the product of a tile's rows, `slabs` steps of the reduction (one at least), and as many
// tiles of filters.
template <class T, class Shape>
RF_DEVICE void multiply_slabs(Sums<Shape>& sums,
                              const KMajorFragments<Side::kLeft, Shape::kBlocksM>& left,
                              const KMajorFragments<Side::kRight, Shape::kBlocksN>& right,
                              ptx::SharedAddress rows, ptx::SharedAddress filters, int slabs) {
  Fragments<Shape> fragments;
  const auto load_first = [&] {
    left.load(fragments.left[0], rows, 0);
    right.load_block(fragments.right[0], filters, 0, 0);
  };
  load_first();
#pragma unroll 1
  for (int slab = 0; slab < slabs; ++slab) {
    const ptx::SharedAddress at_rows = rows;
    const ptx::SharedAddress at_filters = filters;
    rows += kSlabBytes<Shape::kM>;
    filters += kSlabBytes<Shape::kN>;
    multiply_step<T>(sums, fragments, left, right, at_rows, at_filters, [&] {
      if (slab + 1 < slabs) load_first();
    });
  }
}

// Adds a step of `out` times the filters that read it.
template <class T, class Shape>
RF_DEVICE void multiply_on(Sums<typename Shape::Next>& sums, const RegisterFragments<Shape>& left,
                           const KMajorFragments<Side::kRight, Shape::Next::kBlocksN>& right,
                           ptx::SharedAddress filters) {
  Fragments<typename Shape::Next> fragments;
  left.load(fragments.left[0], filters, 0);
  right.load_block(fragments.right[0], filters, 0, 0);
  multiply_step<T>(sums, fragments, left, right, filters, filters, [] {});
}

template <class T, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    conv_chain_kernel(const __grid_constant__ ConvChainArguments arguments) {
  constexpr int kAhead = Shape::kStages - 1;
  const ptx::SharedAddress shared = ptx::shared_address(ptx::dynamic_shared());
  const auto place = Place<Shape>::mine();
  const uint32_t tile = arguments.reverse ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  const ChainRows<Shape> rows(static_cast<int32_t>(tile), arguments.grid, place);
  const ChainLoader<Shape> loader(arguments, rows, shared, place.thread);
  const ChainEpilogue<T, Shape> epilogue(arguments, rows, place);
  const KMajorFragments<Side::kLeft, Shape::kBlocksM> left(place.row, place.lane);
  const KMajorFragments<Side::kRight, Shape::kBlocksN> right(0, place.lane);
  const KMajorFragments<Side::kRight, Shape::Next::kBlocksN> next_right(0, place.lane);
  const ptx::SharedAddress projected_rows = loader.projected_rows();
  const FrontLoader<Shape> front_loader(arguments, static_cast<int32_t>(tile), shared,
                                        place.thread);
  const int front_steps = Shape::kFront > 0 ? kFrontTaps * arguments.front_slabs : 0;
  const int steps = front_steps + arguments.steps;
  const auto issue = [&](int step, int stage) {
    if constexpr (Shape::kFront > 0) {
      if (step < front_steps) {
        front_loader.template issue<kAhead>(step, loader.filters_at(stage));
        return;
      }
    }
    loader.issue(step - front_steps, stage);
  };

  // Filters share the stages' groups with pixels: before the wait they come to L2.
  prefetch_share(arguments.weight.data, arguments.weight.prefetch_bytes);
  prefetch_share(arguments.projection.data, arguments.projection.prefetch_bytes);
  prefetch_share(arguments.next.data, arguments.next.prefetch_bytes);
  prefetch_share(arguments.front.data, arguments.front.prefetch_bytes);
  wait_for_ahead(arguments.dependent);
  loader.issue_rows();
  if constexpr (Shape::kFront > 0) front_loader.begin();
  for (int i = 0; i < kAhead; ++i) {
    if (i < steps) issue(i, i);
    ptx::cp_async_commit_group();
  }
  int stage = 0;            // in use
  int free_stage = kAhead;  // read to its end before the last barrier
  const auto arrive = [&](int step) {
    // This step's copies have landed, and everybody has left the last step behind.
    ptx::cp_async_wait_group<kAhead - 1>();
    ptx::sync_threads();
    if (step + kAhead < steps) issue(step + kAhead, free_stage);
    ptx::cp_async_commit_group();
  };
  const auto leave = [&] {
    free_stage = stage;
    stage = stage + 1 == Shape::kStages ? 0 : stage + 1;
  };
  if constexpr (Shape::kFront > 0) {
    const ChainFront<T, Shape> front(arguments, static_cast<int32_t>(tile), place);
    Sums<typename Shape::Front> sums;
    sums.clear();
#pragma unroll 1
    for (int step = 0; step < front_steps; ++step) {
      arrive(step);
      front.multiply(sums, front_loader, step, loader.filters_at(stage));
      leave();
    }
    ptx::sync_threads();  // nobody reads the window any more
    front.put(sums, shared, front_loader.vectors());
  }
  Sums<typename Shape::Next> following;
  following.clear();
#pragma unroll 1
  for (int step = 0; step < arguments.steps; ++step) {
    arrive(front_steps + step);
    const ptx::SharedAddress filters = loader.filters_at(stage);
    const ptx::SharedAddress vectors = loader.vectors_at(stage);
    const ptx::SharedAddress out = loader.tile_at(stage);
    RegisterFragments<Shape> made;
    Sums<Shape> sums;
    sums.clear();
    multiply_slabs<T, Shape>(sums, left, right, shared, filters, arguments.x_slabs);
    if (arguments.projected_slabs > 0) {
      Sums<Shape> projected;
      projected.clear();
      multiply_slabs<T, Shape>(projected, left, right, projected_rows,
                               filters + arguments.x_slabs * kSlabBytes<Shape::kN>,
                               arguments.projected_slabs);
      epilogue.project(projected, vectors + 2 * ChainLoader<Shape>::kVectorBytes);
      epilogue.template put<true>(made, sums, projected, out, vectors);
    } else {
      epilogue.template put<false>(made, sums, sums, out, vectors);
    }
    ptx::sync_warp();  // its rows of the tile are whole
    epilogue.store_out(out, step);
    if (arguments.next.filters > 0) {
      multiply_on<T, Shape>(following, made, next_right, loader.next_filters_at(stage));
    }
    leave();
  }
  if (arguments.next.filters > 0) epilogue.finish(following, loader.tile_at(free_stage));
}

}  // namespace resnet_fused
