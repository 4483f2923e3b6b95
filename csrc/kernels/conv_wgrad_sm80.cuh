// conv_wgrad on the GPU, for sm_80 and later: the gradient of a convolution's weights.
//
//     dweight[k, e] = scale[k] * sum over m of dz[m, k] * pixel[m, e]
//
// M: output channels of a group, N: its taps and input channels, reduction: output pixels of the
// batch. That is a long reduction and a small result, so many blocks share a tile: each leaves its
// sums in a workspace, and a second kernel adds them in a fixed order.
#pragma once

#include <cstdint>

#include "../device/gradient_epilogue.h"
#include "../device/gradient_geometry.h"
#include "../device/main_loop.h"
#include "../device/mn_major.h"
#include "../device/wgrad_loader.h"

namespace resnet_fused {

// Where an element of the gradient lies: row and column of the group; null beyond.
template <class T>
RF_DEVICE T* dweight_at(const ConvWgradArguments& arguments, int32_t group, int32_t row,
                        int32_t column) {
  if (row >= arguments.channels_out || column >= arguments.columns_each) return nullptr;
  const int64_t k = group * arguments.channels_out + row;
  return static_cast<T*>(arguments.dweight) + k * arguments.dweight_k +
         offset_of(column_of(column, arguments.columns), arguments.dweight_columns);
}

RF_DEVICE float scale_of(const ConvWgradArguments& arguments, int32_t group, int32_t row) {
  if (row >= arguments.channels_out) return 0.0f;
  return ptx::load_global_read_only(arguments.scale + group * arguments.channels_out + row);
}

template <class T, class Shape, LoadWidth kWidth>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    conv_wgrad_kernel(const __grid_constant__ ConvWgradArguments arguments) {
  constexpr int kStep = Shape::kStepBytes / static_cast<int>(sizeof(T));
  const ptx::SharedAddress ring = ptx::shared_address(ptx::dynamic_shared());
  const auto place = Place<Shape>::mine();
  const Tile tile = tile_of(blockIdx.x, arguments.tiles);
  const int first_step = tile.split * arguments.steps_each;
  const int steps_left = arguments.steps - first_step;
  const int steps = steps_left < arguments.steps_each ? steps_left : arguments.steps_each;

  WgradLoader<T, Shape, kWidth> loader(arguments, tile, first_step * kStep, place.thread);
  const MnMajorFragments<T, Side::kLeft, Shape::kBlocksM, Shape::kM> left(place.row, place.lane);
  const MnMajorFragments<T, Side::kRight, Shape::kBlocksN, Shape::kN> right(place.column,
                                                                            place.lane);
  Sums<Shape> sums;
  sums.clear();
  run_main_loop<T>(sums, ring, steps, left, right, loader, [](int) {});

  if (arguments.tiles.splits > 1) {
    constexpr int kColumns = 2 * Shape::kBlocksN;
    constexpr int kVectors = Shape::kBlocksM * kColumns;
    const int64_t first =
        (static_cast<int64_t>(tile.index) * arguments.tiles.splits + tile.split) * kVectors;
    auto* to = reinterpret_cast<Vector<float>*>(arguments.partial) + first * Shape::kThreads;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const float (&sum)[4] = sums.value[i / kColumns][i % kColumns];
      ptx::store_global(to + i * Shape::kThreads + place.thread,
                        Vector<float>{{sum[0], sum[1], sum[2], sum[3]}});
    }
    return;
  }
  const int32_t row0 = tile.m * Shape::kM;
  const int32_t column0 = tile.n * Shape::kN;
  const OutputTile<T, Shape> output{ring, 0};
  put_rows(output, sums, place, [&](uint32_t row) {
    return scale_of(arguments, tile.group, row0 + static_cast<int32_t>(row));
  });
  ptx::sync_threads();
  store_rows(output, arguments.wide_dweight, false, place.thread,
             [&](uint32_t row, uint32_t column) {
               return dweight_at<T>(arguments, tile.group, row0 + static_cast<int32_t>(row),
                                    column0 + static_cast<int32_t>(column));
             });
}

// The shape of the tiles whose parts are added: what the kernel above knows at compile time.
struct WgradTile {
  int32_t m;
  int32_t n;
  int32_t warps_m;
  int32_t warp_m;
  int32_t warp_n;
  int32_t warps;
};

constexpr int kWgradMergeWarps = 8;

// Adds the splits' sums. A block does the vectors that the 32 lanes of one warp have left in one
// place: its warps share the splits, one in kWgradMergeWarps each, and warp 0 adds their eight
// sums.
template <class T>
__global__ void __launch_bounds__(32 * kWgradMergeWarps)
    conv_wgrad_merge_kernel(const __grid_constant__ ConvWgradArguments arguments,
                            const WgradTile shape) {
  const ptx::SharedAddress sums = ptx::shared_address(ptx::dynamic_shared());
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t part = threadIdx.x / 32;
  const auto columns = static_cast<uint32_t>(shape.warp_n / 8);
  const auto vectors = static_cast<uint32_t>(shape.warp_m / 16) * columns;
  const uint32_t warp = blockIdx.x % shape.warps;
  const uint32_t vector = blockIdx.x / shape.warps % vectors;
  const uint32_t index = blockIdx.x / shape.warps / vectors;
  const int splits = arguments.tiles.splits;

  const int64_t stride = static_cast<int64_t>(vectors) * shape.warps * 32;  // of splits
  const auto* from = reinterpret_cast<const Vector<float>*>(arguments.partial) +
                     index * splits * stride + (vector * shape.warps + warp) * 32 + lane;
  Vector<float> sum{};
#pragma unroll 4
  for (int split = static_cast<int>(part); split < splits; split += kWgradMergeWarps) {
    const Vector<float> value = ptx::load_global(from + split * stride);
#pragma unroll
    for (int e = 0; e < 4; ++e) sum.lane[e] += value.lane[e];
  }
  ptx::store_shared(sums + threadIdx.x * kVectorBytes, sum);
  ptx::sync_threads();
  if (part != 0) return;
#pragma unroll
  for (int other = 1; other < kWgradMergeWarps; ++other) {
    const auto value = ptx::load_shared<Vector<float>>(sums + (other * 32 + lane) * kVectorBytes);
#pragma unroll
    for (int e = 0; e < 4; ++e) sum.lane[e] += value.lane[e];
  }

  const Tile tile = tile_of(index * static_cast<uint32_t>(splits), arguments.tiles);
  const auto warp_row = static_cast<int32_t>(warp % shape.warps_m) * shape.warp_m;
  const auto warp_column = static_cast<int32_t>(warp / shape.warps_m) * shape.warp_n;
  const int32_t row0 =
      tile.m * shape.m + warp_row + static_cast<int32_t>(vector / columns * 16 + lane / 4);
  const int32_t column0 =
      tile.n * shape.n + warp_column + static_cast<int32_t>(vector % columns * 8 + lane % 4 * 2);
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int32_t row = row0 + e / 2 * 8;
    T* to = dweight_at<T>(arguments, tile.group, row, column0 + e % 2);
    if (to == nullptr) continue;
    ptx::store_global(to, narrow<T>(sum.lane[e] * scale_of(arguments, tile.group, row)));
  }
}

}  // namespace resnet_fused
