// The stem on the GPU, for sm_80 and later: convolution 7x7 with stride 2, BatchNorm, ReLU and max
// pooling 3x3 with stride 2 on mma.sync, from the image to the pooled activation.
//
//     out = maxpool(relu(scale[k] * conv(rnd(a[c] x + b[c]), weight)[k] + shift[k]))
//
// A block walks down strips of the image, one row of the convolution after the other; what a row
// needs anew of the image is loaded while the one before multiplies. A warp keeps the weights of 32
// filters in its registers all along. A row is pooled along itself at once; what the window's rows
// above have left waits in registers, so that no row is computed twice but the one above a strip.
//
// The last four columns of the reduction belong to an eighth tap that there is not. The image has
// pixels there; since 0 * Inf is NaN, zero weights are not enough, and the pixels become zeros too.
#pragma once

#include <cstdint>

#include "../device/dependent.h"
#include "../device/matrix_unit.h"
#include "../device/stem_loader.h"
#include "../device/stem_result.h"
#include "../device/stem_stage.h"

namespace resnet_fused {

constexpr int kStemBlocksN = kStemWarpFilters / 8;  // of 8 filters: the instruction's n
constexpr int kStemHaloLanes = 4;                   // that hold one pooled pixel

// A warp's share of a row of the convolution.
template <class T, class Out, class Shape>
class StemWarp {
  using Result = StemResult<Out>;

 public:
  static constexpr int kTiles = Shape::kTiles;
  using Pooled = uint32_t[kTiles][kStemBlocksN];  // pairs of filters of a lane's pooled pixels

  RF_DEVICE StemWarp(const StemArguments& arguments, ptx::SharedAddress factors,
                     ptx::SharedAddress ring, uint32_t first_filter, uint32_t thread)
      : arguments_(arguments), lane_(thread % 32), tile_(thread / 32 % Shape::kColumnWarps) {
    const uint32_t group = thread / 32 / Shape::kColumnWarps;
    tile_ *= kTiles;
    const uint32_t filter = group * kStemWarpFilters + lane_ % 4 * 8;
    factors_ = factors + filter * 4;
    filter_ = static_cast<int32_t>(first_filter + filter);
    tap_mask_ = lane_ % 4 < 2 ? 0xFFFFFFFFu : 0u;  // the upper half of its registers: tap 6 or 7
    // Matrices of eight chunks, every other one: those of the windows' first four chunks, by lane.
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const uint32_t chunk = (tile_ + i) * (2 * kStemPooled) + lane_ % 8 * 2;
      chunks_[i] = ring + Shape::chunk_place(chunk + lane_ / 8);
    }
    // And the fifth's, of both tiles at once.
    const uint32_t chunk = (tile_ + lane_ / 8 % kTiles) * (2 * kStemPooled) + lane_ % 8 * 2;
    last_chunk_ = ring + Shape::chunk_place(chunk + kStemWindowChunks);

    const uint32_t row = (group * kStemWarpFilters + lane_ % 8) * Shape::kFilterBytes;
    const ptx::SharedAddress filters = ring + row + Shape::filter_chunk(lane_ % 8, lane_ / 8);
#pragma unroll
    for (int r = 0; r < kStemTaps; ++r) {
#pragma unroll
      for (int j = 0; j < kStemBlocksN; ++j) {
        ptx::ldmatrix_x4(weights_[r][j], filters + j * (8 * Shape::kFilterBytes) +
                                             r * (kStemWindowChunks * kChunkBytes));
      }
    }
  }

  RF_DEVICE void begin(const StemItem& item) {
    column_ = item.first_column + static_cast<int32_t>(tile_ * kStemPooled + lane_ / 4) - 1;
  }

  // Of two pairs of results.
  static RF_DEVICE uint32_t larger(uint32_t a, uint32_t b) {
    return larger_pair<typename Result::Kept>(a, b);
  }

  // The i-th row of the strip, pooled along itself.
  RF_DEVICE void run(Pooled& best, int32_t i) const {
    float sums[kTiles][kStemBlocksN][4] = {};
    uint32_t chunks[2][kTiles][4];
    uint32_t last[2][2];
    load(chunks[0], last[0], 2 * i);
#pragma unroll
    for (int r = 0; r < kStemTaps; ++r) {
      if (r + 1 < kStemTaps) load(chunks[(r + 1) % 2], last[(r + 1) % 2], 2 * i + r + 1);
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        // Rows 0-7 are even columns, 8-15 the odd ones behind them: windows one chunk apart.
        const uint32_t (&chunk)[4] = chunks[r % 2][t];
        const uint32_t first[4] = {chunk[0], chunk[1], chunk[1], chunk[2]};
        const uint32_t second[4] = {chunk[2], chunk[3], chunk[3] & tap_mask_,
                                    last[r % 2][t] & tap_mask_};
#pragma unroll
        for (int j = 0; j < kStemBlocksN; ++j) {
          const uint32_t (&w)[4] = weights_[r][j];
          multiply<T>(sums[t][j], first, {w[0], w[1]});
          multiply<T>(sums[t][j], second, {w[2], w[3]});
        }
      }
    }
    pool(best, sums);
  }

  // Stores the pooled row p.
  RF_DEVICE void store(const Pooled& best, const StemItem& item, int32_t p) const {
    Out* out = static_cast<Out*>(arguments_.out) +
               (item.n * arguments_.out_n + p * arguments_.out_h + filter_ * arguments_.out_c);
    const int32_t left = arguments_.filters - filter_;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const int32_t column = column_ + t * kStemPooled;
      if (lane_ < kStemHaloLanes || column >= arguments_.out_width) continue;
      Vector<uint32_t> filters;
#pragma unroll
      for (int j = 0; j < kStemBlocksN; ++j) filters.lane[j] = best[t][j];
      stem_store(out + column * arguments_.out_w, filters, arguments_, left);
    }
  }

 private:
  // What row `row` of the strip's image brings.
  RF_DEVICE void load(uint32_t (&chunks)[kTiles][4], uint32_t (&last)[2], int32_t row) const {
    const uint32_t at = static_cast<uint32_t>(row) % (2 * Shape::kPairs) * Shape::kRowBytes;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) ptx::ldmatrix_x4(chunks[t], chunks_[t] + at);
    ptx::ldmatrix_x2(last, last_chunk_ + at);
  }

  // Scale, shift and rounding, then the largest of each pooled pixel's three columns. Columns that
  // there are not count as zeros: no ReLU is less.
  RF_DEVICE void pool(Pooled& best, const float (&sums)[kTiles][kStemBlocksN][4]) const {
#pragma unroll
    for (int j = 0; j < kStemBlocksN; ++j) {
      const auto scale = ptx::load_shared<Two>(factors_ + j * sizeof(Two));
      const auto shift = ptx::load_shared<Two>(factors_ + Shape::kScaleBytes + j * sizeof(Two));
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        const int32_t column = 2 * (column_ + t * kStemPooled);
        const float (&sum)[4] = sums[t][j];
        const auto both = [&](int first, int32_t at) -> uint32_t {
          const uint32_t pair =
              Result::rounded(__builtin_fmaf(scale.first, sum[first], shift.first),
                              __builtin_fmaf(scale.second, sum[first + 1], shift.second));
          return static_cast<uint32_t>(at) < static_cast<uint32_t>(arguments_.conv_width) ? pair
                                                                                          : 0u;
        };
        const uint32_t odd = both(2, column + 1);
        const uint32_t left = ptx::shuffle_up(ptx::kWholeWarp, odd, kStemHaloLanes);
        best[t][j] = larger(larger(both(0, column), odd), left);
      }
    }
  }

  struct alignas(8) Two {
    float first;
    float second;
  };

  const StemArguments& arguments_;
  uint32_t lane_;
  uint32_t tile_;  // the warp's first
  ptx::SharedAddress factors_;
  int32_t filter_;  // the lane's first
  uint32_t tap_mask_;
  int32_t column_;  // of the pooled image: the lane's pixel in the first tile
  ptx::SharedAddress chunks_[kTiles];
  ptx::SharedAddress last_chunk_;
  uint32_t weights_[kStemTaps][kStemBlocksN][4];
};

template <class T, class Out, class Shape>
RF_DEVICE void run_stem(const StemArguments& arguments) {
  using Warp = StemWarp<T, Out, Shape>;
  const ptx::SharedAddress factors = ptx::shared_address(ptx::dynamic_shared());
  const ptx::SharedAddress ring = factors + Shape::kHeadBytes;
  const uint32_t thread = threadIdx.x;
  const uint32_t first_filter = blockIdx.y * kStemFilters;
  stem_stage_factors<Shape>(arguments, first_filter, factors, thread);
  stem_stage_filters<T, Shape>(arguments, first_filter, ring, thread);
  ptx::sync_threads();
  Warp warp(arguments, factors, ring, first_filter, thread);
  StemLoader<T, Shape> loader(arguments, ring, factors + 2 * Shape::kScaleBytes, thread);
  wait_for_ahead(arguments.dependent);
  ptx::sync_threads();  // the filters have left the ring

  for (auto at = static_cast<int32_t>(blockIdx.x); at < arguments.items;
       at += static_cast<int32_t>(gridDim.x)) {
    const StemItem item = StemItem::of(at, arguments, Shape::kPooled);
    loader.begin(item);
    warp.begin(item);
    StemUnit units[Shape::kPairsInUse];
#pragma unroll
    for (int pair = 0; pair < Shape::kPairsInUse; ++pair) loader.issue(units[pair], pair);
#pragma unroll
    for (int pair = 0; pair < Shape::kPairsInUse; ++pair) loader.land(units[pair], pair);
    ptx::sync_threads();
    typename Warp::Pooled above = {};
    const int32_t rows = 2 * (item.end_row - item.first_row) + 1;  // of the convolution
    for (int32_t i = 0; i < rows; ++i) {
      const bool more = i + 1 < rows;
      if (more) loader.issue(units[0], i + Shape::kPairsInUse);
      typename Warp::Pooled best = {};  // of a row that there is not: the padding
      const auto q = static_cast<uint32_t>(2 * item.first_row - 1 + i);
      if (q < static_cast<uint32_t>(arguments.conv_height)) warp.run(best, i);
      const bool last = i % 2 == 0;  // of a window, and the first of the next
      typename Warp::Pooled window;
#pragma unroll
      for (int t = 0; t < Shape::kTiles; ++t) {
#pragma unroll
        for (int j = 0; j < kStemBlocksN; ++j) {
          window[t][j] = Warp::larger(above[t][j], best[t][j]);
          above[t][j] = last ? Warp::larger(best[t][j], 0u) : window[t][j];
        }
      }
      if (last && i > 0) warp.store(window, item, item.first_row + i / 2 - 1);
      if (more) loader.land(units[0], i + Shape::kPairsInUse);
      ptx::sync_threads();
    }
  }
}

// Block (x, y): items x, x + gridDim.x, .. for the filters from 64 y on. Empty where e4m3 is to be
// written by a GPU that has no instruction for it, and no plan chooses it.
template <class T, class Out, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    stem_kernel(const __grid_constant__ StemArguments arguments) {
  if constexpr (StemResult<Out>::kServed) run_stem<T, Out, Shape>(arguments);
}

}  // namespace resnet_fused
