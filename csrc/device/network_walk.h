// How the blocks of a network's kernel go through its layers, however the parts of a tile are
// merged.
//
// Blocks stay. They walk the tiles of one layer after the other, each tile as conv_bn_act_kernel
// computes it, and meet where a layer reads what those ahead of it have written. What needs no
// meeting comes before it: a tile's first filters, and the share of the next layer's weights that
// goes to L2.
#pragma once

#include <cstdint>

#include "conv_tile.h"
#include "dependent.h"
#include "grid_barrier.h"
#include "network_layers.h"
#include "network_tiles.h"

namespace resnet_fused {

// Merge: MergeByMemory or MergeByCluster.
template <class T, class Tiles, LoadWidth kWidth, class Merge>
RF_DEVICE void walk_network(const NetworkArguments& arguments) {
  GridBarrier barrier(arguments.counters, gridDim.x);
  Merge merge(ptx::shared_address(ptx::dynamic_shared()) + Tiles::kRingBytes);
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
    Tiles::with(layer.tile, [&]<class Shape>() {
      merge.template walk<T, Shape, kWidth>(layer, turn, used, ready);
    });
    ready();
  }
  merge.leave();
  barrier.leave(arguments.counter_bytes);
}

}  // namespace resnet_fused
