// The convolutions of a whole network in one launch, for sm_80 and later: at batch 1 a layer's work
// takes a few microseconds, and a launch for each costs about as much.
//
// Blocks stay. They walk the tiles of one layer after the other, each tile as conv_bn_act_kernel
// computes it, and meet where a layer reads what those ahead of it have written. What needs no
// meeting comes before it: a tile's first filters, and the share of the next layer's weights that
// goes to L2. The blocks that hold a tile's parts meet by themselves, and each finishes a share.
#pragma once

#include <cstdint>

#include "../device/conv_tile.h"
#include "../device/dependent.h"
#include "../device/grid_barrier.h"
#include "../device/network_layers.h"
#include "../device/split_shares.h"

namespace resnet_fused {

template <class T, class Shape, LoadWidth kWidth>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    network_kernel(const __grid_constant__ NetworkArguments arguments) {
  GridBarrier barrier(arguments.counters, gridDim.x);
  bool used = false;  // shared memory, since all threads of the block have last met
#pragma unroll 1
  for (int32_t i = 0; i < arguments.count; ++i) {
    const NetworkLayer& layer = arguments.layer[i];
    if (layer.meets) {
      barrier.arrive();
      used = false;
    }
    bool begun = false;
    const auto ready = [&] {
      if (begun) return;
      begun = true;
      if (i + 1 < arguments.count) {
        const ConvBnActArguments& next = arguments.layer[i + 1].conv;
        prefetch_share(next.operands.weight, next.prefetch_bytes);
      }
      if (layer.meets) barrier.wait();
    };
    const uint32_t turn = blockIdx.x + (blockIdx.x < layer.first ? gridDim.x : 0) - layer.first;
#pragma unroll 1
    for (uint32_t part = turn; part < layer.parts; part += gridDim.x) {
      if (used) ptx::sync_threads();
      used = true;
      compute_tile<T, Shape, kWidth>(
          layer.conv, [&] { return part; }, ready,
          [&](const Sums<Shape>& sums, const Tile& tile, const Place<Shape>& place) {
            leave_sums(sums, layer.conv, tile, place);
            return false;
          });
    }
    ready();
    if (layer.conv.tiles.splits == 1) continue;
    // Behind all of the block's own parts: whoever waits has left nobody waiting for it.
#pragma unroll 1
    for (uint32_t part = turn; part < layer.parts; part += gridDim.x) {
      finish_share<T, Shape>(layer.conv, part);
    }
  }
  barrier.leave(arguments.counter_bytes);
}

}  // namespace resnet_fused
