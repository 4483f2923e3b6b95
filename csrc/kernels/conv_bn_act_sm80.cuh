// conv_bn_act on the GPU, for sm_80 and later: implicit GEMM on mma.sync, with BatchNorm's scale
// and shift, the shortcut and the ReLU in its epilogue.
//
//     out[m, k] = act(scale[k] * sum over e of pixel[m, e] * filter[k, e] + shift[k] + residual[m,
//     k])
//
// M: output pixels, N: output channels of a group, reduction: the taps and channels of a filter.
// The pixels' matrix exists nowhere: each step gathers its columns from the image. A block computes
// one tile, or with splits one part of a tile's sums. Filters come before the kernel ahead has
// ended, everything else after that.
#pragma once

#include <cstdint>

#include "../device/conv_geometry.h"
#include "../device/conv_tile.h"
#include "../device/dependent.h"
#include "../device/resident_blocks.h"
#include "../device/split_reduction.h"

namespace resnet_fused {

template <class T, class Shape, LoadWidth kWidth>
__global__ void __launch_bounds__(Shape::kThreads, kResidentBlocks<Shape>)
    conv_bn_act_kernel(const __grid_constant__ ConvBnActArguments arguments) {
  const auto block = [&] { return arguments.reverse ? gridDim.x - 1 - blockIdx.x : blockIdx.x; };
  const auto ready = [&] {
    prefetch_share(arguments.operands.weight, arguments.prefetch_bytes);
    wait_for_ahead(arguments.dependent);
  };
  const auto merge = [&](Sums<Shape>& sums, const Tile& tile, const Place<Shape>& place) {
    return merge_splits(sums, arguments.workspace, tile.index, tile.split, arguments.tiles.splits,
                        ptx::shared_address(ptx::dynamic_shared()), place.thread);
  };
  compute_tile<T, Shape, kWidth>(arguments, block, ready, merge);
}

}  // namespace resnet_fused
