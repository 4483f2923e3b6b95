// conv_bn_dgrad on the GPU, for sm_80 and later: the gradient of the input of a convolution between
// two BatchNorms, by implicit GEMM on mma.sync.
//
//     dy = A dz + (B y + C)                              as it arrives; 0 outside of the output
//     dx[m, c] = sum over e of dy[m, e] * filter[e, c] [+ addend]     where h passed the ReLU
//     sums = sum dx, sum dx (raw - mean)                 of every channel, of the rounded dx
//
// M: input pixels of one phase of the stride, N: input channels of a group, reduction: the phase's
// taps and the group's output channels. The last block of a column of tiles adds up what the others
// have summed; of a phase without taps the sums are what is added.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../device/affine_dgrad_loader.h"
#include "../device/affine_halo.h"
#include "../device/bn_dgrad_epilogue.h"
#include "../device/bn_dgrad_geometry.h"
#include "../device/dgrad_product.h"
#include "../device/gradient_epilogue.h"
#include "../device/merge_gradients.h"
#include "../device/resident_blocks.h"
#include "../device/split_reduction.h"

namespace resnet_fused {

// Finishes the tile whose sums lie in the ring; kUnit: channels that move together.
template <class T, class Shape, int kUnit, class Arguments>
RF_DEVICE void finish_gradients(const Arguments& arguments, const Tile& tile,
                                ptx::SharedAddress ring, uint32_t thread) {
  constexpr bool kEnd = std::is_same_v<Arguments, ConvBnDgradEndArguments>;
  using Epilogue = BnDgradEpilogue<T, Shape, kUnit, Arguments>;
  const auto where = DgradPlace::of<Shape>(tile, arguments.conv);
  Epilogue epilogue(arguments, where, thread);
  epilogue.finish({ring, 0});
  if (arguments.raw == nullptr) return;
  ptx::sync_threads();  // the tile has been read
  epilogue.put_sums(ring);
  ptx::sync_threads();
  const int32_t columns = arguments.conv.channels_in - where.n;
  const int32_t channel = where.group * arguments.conv.channels_in + where.n;
  const GradientReduction& reduction = arguments.reduction;
  const int32_t row = reduction.first_row + tile.m;
  const int32_t column = Epilogue::column_of_thread(thread);
  if (thread < Shape::kN && column < columns) {
    const int64_t at = row * reduction.channels + channel + column;
    ptx::store_global(reduction.partial + at, Epilogue::sums_of_column(ring, thread));
    if constexpr (kEnd) {
      if (arguments.third.partial != nullptr) {
        ptx::store_global(arguments.third.partial + at, Epilogue::sum_of_column(2, ring, thread));
      }
    }
  }
  const MeasuredColumn where_summed{
      static_cast<uint32_t>(tile.group * arguments.conv.tiles.tiles_n + tile.n), channel, columns};
  const ptx::SharedAddress scratch = ring + Shape::kRingBytes - kScratchBytes;
  if constexpr (kEnd) {
    merge_gradient_sums<Shape>(reduction, where_summed, row, ring, scratch, thread,
                               arguments.third);
  } else {
    merge_gradient_sums<Shape>(reduction, where_summed, row, ring, scratch, thread);
  }
}

// Adds this block's part of the reduction to `sums`: tap by tap, or slice by slice of the channels
// of all taps.
template <class T, class Shape, LoadWidth kWidth>
RF_DEVICE void add_affine_gradients(Sums<Shape>& sums, const ConvDgradArguments& arguments,
                                    const Tile& tile, ptx::SharedAddress ring) {
  const auto where = DgradPlace::of<Shape>(tile, arguments);
  const auto place = Place<Shape>::mine();
  if constexpr (kWindowsOf<Shape> > 0) {
    using Loader = HaloLoader<T, Shape, AffineHalo<T, Shape>>;
    const int slices = (arguments.channels_out + Loader::kSlice - 1) / Loader::kSlice;
    const int each = (slices + arguments.tiles.splits - 1) / arguments.tiles.splits;
    const int first = tile.split * each;
    const int mine = slices - first < each ? slices - first : each;
    Loader loader({arguments, where, place.thread}, where.m, first, mine, ring + Shape::kRingBytes,
                  place);
    const HaloFragments<Loader, Shape> left{loader};
    const MnMajorFragments<T, Side::kRight, Shape::kBlocksN, Shape::kN> right(place.column,
                                                                              place.lane);
    loader.begin();
    run_main_loop<T>(sums, ring, mine * kHaloTaps, left, right, loader, [](int) {});
  } else {
    add_gradients<T, Shape, kWidth, AffineDgradLoader<T, Shape, kWidth>>(sums, arguments, where,
                                                                         tile.split, ring, place);
  }
}

// A block of conv_bn_dgrad, or of conv_bn_dgrad_end.
template <class T, class Shape, LoadWidth kWidth, class Arguments>
RF_DEVICE void make_bn_gradients(const Arguments& arguments) {
  const ptx::SharedAddress ring = ptx::shared_address(ptx::dynamic_shared());
  // The tile is found anew wherever it is needed: from one such place to the next it would take
  // registers that there are none of.
  const auto find_tile = [&] {
    uint32_t block = blockIdx.x;
    ptx::keep(block);
    return tile_of(block, arguments.conv.tiles);
  };
  Sums<Shape> sums;
  sums.clear();
  add_affine_gradients<T, Shape, kWidth>(sums, arguments.conv, find_tile(), ring);
  uint32_t thread = threadIdx.x;
  ptx::keep(thread);
  if (arguments.conv.tiles.splits > 1) {
    const Tile part = find_tile();
    if (!merge_splits(sums, arguments.conv.workspace, part.index, part.split,
                      arguments.conv.tiles.splits, ring, thread)) {
      return;
    }
  }
  put_rows(TotalsTile<Shape>{ring, 0}, sums, Place<Shape>::of(thread),
           [](uint32_t) { return 1.0f; });
  ptx::sync_threads();
  if (arguments.conv.wide_dx) {
    finish_gradients<T, Shape, kVectorLength<T>>(arguments, find_tile(), ring, thread);
  } else {
    finish_gradients<T, Shape, 1>(arguments, find_tile(), ring, thread);
  }
}

template <class T, class Shape, LoadWidth kWidth>
__global__ void __launch_bounds__(Shape::kThreads, kResidentBlocks<Shape>)
    conv_bn_dgrad_kernel(const __grid_constant__ ConvBnDgradArguments arguments) {
  make_bn_gradients<T, Shape, kWidth>(arguments);
}

}  // namespace resnet_fused
