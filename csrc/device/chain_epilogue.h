// The epilogues of a chain of convolutions: what a warp's sums become, and how its rows go out.
//
// A step of `out` passes through a tile of shared memory, so that rows go out 16 bytes a thread; it
// is multiplied on from registers: as PTX lays out the fragments of mma.m16n8k16, the sums of 16
// columns, rounded to 16 bits, are the left operand of a slice of the next product.
#pragma once

#include <cstdint>

#include "../ptx/ptx.h"
#include "bn_act.h"
#include "chain_geometry.h"
#include "chain_loader.h"
#include "conv_epilogue.h"
#include "main_loop.h"
#include "vector.h"

namespace resnet_fused {

// A warp's step of `out` as the left operand of the next product.
template <class Shape>
struct RegisterFragments {
  uint32_t value[Shape::kSlices][Shape::kBlocksM][4];

  RF_DEVICE void load(uint32_t (&fragments)[Shape::kBlocksM][4], ptx::SharedAddress,
                      int slice) const {
#pragma unroll
    for (int i = 0; i < Shape::kBlocksM; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) fragments[i][j] = value[slice][i][j];
    }
  }
};

// Where a thread's pairs of results lie in a tile [kM][step]: rows eight apart, columns of 8.
template <class T, class Shape>
class PairPlaces {
 public:
  RF_DEVICE explicit PairPlaces(const Place<Shape>& place)
      : row_((place.row + place.lane / 4) * KMajor::kRowBytes + place.lane % 4 * sizeof(Pair<T>)),
        swizzle_(KMajor::swizzle(place.lane / 4) * kChunkBytes) {
    ptx::keep(row_);
  }
  RF_DEVICE uint32_t at(int i, int column) const {
    return row_ + static_cast<uint32_t>(i) * kSlabBytes<8> +
           (static_cast<uint32_t>(column) * kChunkBytes ^ swizzle_);
  }

 private:
  uint32_t row_;
  uint32_t swizzle_;
};

using FloatPair = Pair<float>;

template <class T, class Shape>
class ChainEpilogue {
 public:
  RF_DEVICE ChainEpilogue(const ConvChainArguments& arguments, const ChainRows<Shape>& rows,
                          const Place<Shape>& place)
      : arguments_(arguments), rows_(rows), pairs_(place), lane_(place.lane) {
    const int32_t odd = (1 << arguments.out_shift) - 1;
#pragma unroll
    for (int i = 0; i < Shape::kRows; ++i) {
      Pixel pixel = rows.pixel(i);
      const bool stored = rows.known(i) && ((pixel.p | pixel.q) & odd) == 0;
      pixel.p >>= arguments.out_shift;
      pixel.q >>= arguments.out_shift;
      out_[i] = stored ? offset_of(pixel, arguments.out.strides) + rows.unit() : kNowhere;
      ptx::keep(out_[i]);
    }
  }

  // The projected shortcut in fp32, in place of its sums. `vectors`: of the step.
  RF_DEVICE void project(Sums<Shape>& sums, ptx::SharedAddress vectors) const {
    const BnAct<float> op{-__builtin_huge_valf()};
    for_each_pair(
        sums, vectors,
        [&](float& first, float& second, int, int, const FloatPair& scale, const FloatPair& shift) {
          first = op(first, scale.first, shift.first);
          second = op(second, scale.second, shift.second);
        });
  }

  // A step of `out`: into `tile`, where the shortcut stands unless it is in `projected`, and into
  // the fragments of the next product.
  template <bool kProjected>
  RF_DEVICE void put(RegisterFragments<Shape>& fragments, Sums<Shape>& sums,
                     const Sums<Shape>& projected, ptx::SharedAddress tile,
                     ptx::SharedAddress vectors) const {
    const BnAct<float> op{0.0f};
    for_each_pair(sums, vectors,
                  [&](float first, float second, int i, int j, const FloatPair& scale,
                      const FloatPair& shift) {
                    const ptx::SharedAddress at = tile + pairs_.at(i, j);
                    FloatPair added;
                    if constexpr (kProjected) {
                      const auto& block = projected.value[i / 2][j];
                      added = FloatPair{block[i % 2 * 2], block[i % 2 * 2 + 1]};
                    } else {
                      const auto stored = ptx::load_shared<Pair<T>>(at);
                      added = FloatPair{widen(stored.first), widen(stored.second)};
                    }
                    Pair<T> result;
                    result.first = narrow<T>(op(first, scale.first, shift.first, added.first));
                    result.second = narrow<T>(op(second, scale.second, shift.second, added.second));
                    ptx::store_shared(at, result);
                    fragments.value[j / 2][i / 2][j % 2 * 2 + i % 2] =
                        __builtin_bit_cast(uint32_t, result);
                  });
  }

  // The rows of a step of `out`, which the warp has put into `tile`.
  RF_DEVICE void store_out(ptx::SharedAddress tile, int step) const {
    store(tile, arguments_.out, step, [&](int i) { return out_[i]; });
  }

  // All of `next`, by way of `tile`, of which nothing is needed any more.
  RF_DEVICE void finish(Sums<typename Shape::Next>& sums, ptx::SharedAddress tile) const {
    const ChainFilters& next = arguments_.next;
    const BnAct<float> op{0.0f};
#pragma unroll
    for (int part = 0; part < Shape::kNext / Shape::kN; ++part) {
      if (part * Shape::kN >= next.filters) return;
      ptx::sync_warp();  // the tile's rows have gone out
#pragma unroll
      for (int j = 0; j < Shape::kN / 8; ++j) {
        const int block = part * (Shape::kN / 8) + j;
        const int channel = block * 8 + static_cast<int>(lane_ % 4) * 2;
        float scale[2];
        float shift[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const bool there = channel + e < next.filters;
          scale[e] = there ? ptx::load_global_read_only(next.scale + channel + e) : 0.0f;
          shift[e] = there ? ptx::load_global_read_only(next.shift + channel + e) : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < 2 * Shape::kBlocksM; ++i) {
          const auto& value = sums.value[i / 2][block];
          Pair<T> result;
          result.first = narrow<T>(op(value[i % 2 * 2], scale[0], shift[0]));
          result.second = narrow<T>(op(value[i % 2 * 2 + 1], scale[1], shift[1]));
          ptx::store_shared(tile + pairs_.at(i, j), result);
        }
      }
      ptx::sync_warp();
      store(tile, arguments_.following, part, [&](int i) {
        const int32_t at = offset_of(rows_.pixel(i), arguments_.following.strides) + rows_.unit();
        return rows_.known(i) ? at : kNowhere;
      });
    }
  }

 private:
  static constexpr int32_t kNowhere = -1;

  // visit(a sum, its right neighbour, row i * 8, columns j * 8, their scales, their shifts).
  template <class Visit>
  RF_DEVICE void for_each_pair(Sums<Shape>& sums, ptx::SharedAddress vectors,
                               const Visit& visit) const {
    constexpr int kVectorBytes = ChainLoader<Shape>::kVectorBytes;
#pragma unroll
    for (int j = 0; j < Shape::kN / 8; ++j) {
      const ptx::SharedAddress at = vectors + (j * 8 + lane_ % 4 * 2) * 4;
      const auto scale = ptx::load_shared<FloatPair>(at);
      const auto shift = ptx::load_shared<FloatPair>(at + kVectorBytes);
#pragma unroll
      for (int i = 0; i < 2 * Shape::kBlocksM; ++i) {
        float (&block)[4] = sums.value[i / 2][j];
        visit(block[i % 2 * 2], block[i % 2 * 2 + 1], i, j, scale, shift);
      }
    }
  }

  template <class OffsetOf>
  RF_DEVICE void store(ptx::SharedAddress tile, const ChainResult& result, int step,
                       const OffsetOf& offset_of_row) const {
    if (step * kLoadLanes + rows_.unit() >= result.units) return;
#pragma unroll
    for (int i = 0; i < Shape::kRows; ++i) {
      const int32_t at = offset_of_row(i);
      if (at < 0) continue;
      const auto row = ptx::load_shared<Vector<T>>(tile + rows_.at(i));
      auto* to = static_cast<unsigned char*>(result.data) +
                 (int64_t{at} + step * kLoadLanes) * kChunkBytes;
      ptx::store_global(reinterpret_cast<Vector<T>*>(to), row);
    }
  }

  const ConvChainArguments& arguments_;
  const ChainRows<Shape>& rows_;
  PairPlaces<T, Shape> pairs_;
  uint32_t lane_;
  int32_t out_[Shape::kRows];  // 16 bytes, from the first pixel's first channel; or kNowhere
};

}  // namespace resnet_fused
