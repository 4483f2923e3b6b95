// What a warpgroup makes of its sums in a chain of convolutions on sm_90a, a box of 64 channels at
// a time: it is stored from shared memory and multiplied on from registers.
#pragma once

#include <cstdint>

#include "../ptx/proxy.h"
#include "../ptx/ptx.h"
#include "block_walk.h"
#include "chain_tma.h"
#include "vector.h"
#include "warpgroup_epilogue.h"
#include "warpgroup_tile.h"

namespace resnet_fused {

#if defined(RF_HAS_WGMMA)

using ChainBox = StagedTile<Orientation::kPixelsLeft, kStepElements>;
constexpr int kBoxSums = kStepElements / 2;  // that a thread has of a box
constexpr int kBoxVectors = kBoxSums * static_cast<int>(sizeof(ChannelPair));  // bytes of a box's

// A block's tiles.
template <class Arguments>
RF_DEVICE BlockWalk tiles_of(const Arguments& arguments) {
  return {arguments.tiles, arguments.reverse, static_cast<int32_t>(blockIdx.x),
          static_cast<int32_t>(gridDim.x)};
}

// The half of each tile that a warpgroup has.
struct ChainPart {
  uint32_t bytes;  // in front of its half of a box
  int32_t pixels;  // likewise
  uint32_t thread;

  RF_DEVICE ChainPart(uint32_t consumer, uint32_t of_warpgroup)
      : bytes(consumer * ChainBoxes::kPartBytes),
        pixels(static_cast<int32_t>(consumer) * kWarpgroupRows),
        thread(of_warpgroup) {}

  RF_DEVICE uint32_t lane() const { return thread % 32; }
};

// Scale and shift of all channels, up to the end of their last step, where they are zeros.
RF_DEVICE void fetch_vectors(ptx::SharedAddress to, const ChannelVectors& from, int32_t steps) {
  for (auto pair = static_cast<int32_t>(threadIdx.x); pair < steps * kBoxSums;
       pair += kWarpgroupBlockThreads) {
    const int32_t first = 2 * pair;
    const ChannelPair both{{from.scale_of(first), from.scale_of(first + 1)},
                           {from.shift_of(first), from.shift_of(first + 1)}};
    ptx::store_shared(to + pair * sizeof(ChannelPair), both);
  }
}

// What is added to scale sums + shift: nothing, what lies in the box, or other sums in fp32.
enum class Added { kNothing, kStored, kSums };

// scale sums + shift of 64 channels, in place. vectors: of these.
RF_DEVICE void scale_sums(float (&sums)[kBoxSums], ptx::SharedAddress vectors, uint32_t lane) {
  const BnAct<float> op{-__builtin_huge_valf()};
#pragma unroll
  for (int j = 0; j < kBoxSums / 4; ++j) {
    const auto of =
        ptx::load_shared<ChannelPair>(vectors + (4 * j + lane % 4) * sizeof(ChannelPair));
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      sums[4 * j + e] = op(sums[4 * j + e], of.scale[e % 2], of.shift[e % 2]);
    }
  }
}

// In the place of a box, for what is multiplied on alone.
struct Unstored {
  RF_DEVICE void store(int, const uint32_t (&)[4]) const {}
};

// relu(scale sums + shift [+ shortcut]) of 64 channels, rounded, into the box and, as wgmma takes
// its left operand, into `made`. kBox: of `sums`. vectors: of its channels. Others: float
// [kBoxSums] where they are added. Box: ChainBox or Unstored.
template <class T, Added kAdded, int kBox, int kRegisters, class Others, class Box>
RF_DEVICE void put_box(uint32_t (&made)[kProducts][4], const float (&sums)[kRegisters],
                       const Others& others, const Box& box, ptx::SharedAddress vectors,
                       uint32_t lane) {
  const BnAct<float> op{0.0f};
#pragma unroll
  for (int i = 0; i < kProducts; ++i) {
    uint32_t (&words)[4] = made[i];
    if constexpr (kAdded == Added::kStored) box.load(words, i);
    ChannelPair pairs[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      pairs[half] = ptx::load_shared<ChannelPair>(vectors + (8 * i + 4 * half + lane % 4) *
                                                                sizeof(ChannelPair));
    }
#pragma unroll
    for (int m = 0; m < 4; ++m) {  // two rows of the first eight columns, two of the others
      const ChannelPair& of = pairs[m / 2];
      const int at = 8 * i + 2 * m;
      const float a = sums[kBox * kBoxSums + at];
      const float b = sums[kBox * kBoxSums + at + 1];
      if constexpr (kAdded == Added::kNothing) {
        words[m] = narrow_pair<T>(op(a, of.scale[0], of.shift[0]), op(b, of.scale[1], of.shift[1]));
      } else {
        float low, high;
        if constexpr (kAdded == Added::kStored) {
          low = widen(T{static_cast<uint16_t>(words[m])});
          high = widen(T{static_cast<uint16_t>(words[m] >> 16)});
        } else {
          low = others[at];
          high = others[at + 1];
        }
        words[m] = narrow_pair<T>(op(a, of.scale[0], of.shift[0], low),
                                  op(b, of.scale[1], of.shift[1], high));
      }
    }
    box.store(i, words);
  }
}

// Stores the pixels of a warpgroup's tile, 16 bytes a thread; each warp those whose sums it has.
template <class T>
class StoredPixels {
  static constexpr int kUnits = kStepRowBytes / kVectorBytes;  // of a row of a box
  static constexpr int kRows = 16 / (ptx::kWarpSize / kUnits);

 public:
  // first: the tile's first pixel of the grid, of which the last `beside` rows and columns of each
  // image are none. thinned: those in even rows and columns alone. thread: of the warpgroup.
  RF_DEVICE StoredPixels(const ChainResult& to, const PixelGrid& grid, int32_t first,
                         int32_t beside, bool thinned, uint32_t thread)
      : result_(to),
        row_(thread / 32 * 16 + thread % 32 / kUnits),
        unit_(static_cast<int32_t>(thread % kUnits)) {
    const int32_t columns = static_cast<int32_t>(grid.columns.value) - beside;
    const int32_t rows = static_cast<int32_t>(grid.rows.value) - beside;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int32_t m = first + static_cast<int32_t>(row(i));
      const bool known = m < grid.pixels;
      Pixel at = pixel_of(known ? m : 0, grid);
      bool stored = known && at.q < columns && at.p < rows;
      if (thinned) {
        stored = stored && ((at.p | at.q) & 1) == 0;
        at.p /= 2;
        at.q /= 2;
      }
      to_[i] = stored ? offset_of(at, result_.strides) + unit_ : kNowhere;
    }
  }

  // A step of channels from a box's part, whose rows the warp has written.
  RF_DEVICE void store(ptx::SharedAddress part, int step) const {
    if (step * kUnits + unit_ >= result_.units) return;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (to_[i] < 0) continue;
      const uint32_t chunk = static_cast<uint32_t>(unit_) ^ row(i) % 8;
      const auto made =
          ptx::load_shared<Vector<T>>(part + row(i) * kStepRowBytes + chunk * kVectorBytes);
      auto* to = static_cast<unsigned char*>(result_.data) +
                 (int64_t{to_[i]} + step * kUnits) * kVectorBytes;
      ptx::store_global(reinterpret_cast<Vector<T>*>(to), made);
    }
  }

 private:
  static constexpr int32_t kNowhere = -1;

  RF_DEVICE uint32_t row(int i) const {
    return row_ + static_cast<uint32_t>(i) * (ptx::kWarpSize / kUnits);
  }

  const ChainResult& result_;
  uint32_t row_;
  int32_t unit_;
  int32_t to_[kRows];  // 16 bytes, from the first pixel's first channel; or kNowhere
};

RF_DEVICE void pin_words(uint32_t (&words)[kProducts][4]) {
#pragma unroll
  for (int i = 0; i < kProducts; ++i) ptx::wgmma_pin(words[i]);
}

// The warp may read the rows that it has written, and TMA may write there when all warps have.
RF_DEVICE void publish_rows() {
  ptx::fence_proxy_async_shared();
  ptx::sync_warp();
}

// All sums go out, 64 channels at a time, by way of a warpgroup's part of one box, of which each
// warp has read its own rows alone. vectors: of all channels.
template <class T, int kBox = 0, int kRegisters>
RF_DEVICE void put_boxes(uint32_t (&made)[kProducts][4], const float (&sums)[kRegisters],
                         const StoredPixels<T>& to, ptx::SharedAddress part,
                         ptx::SharedAddress vectors, uint32_t thread) {
  if constexpr (kBox * kBoxSums < kRegisters) {
    ptx::sync_warp();  // all of its lanes have
    put_box<T, Added::kNothing, kBox>(made, sums, nullptr, ChainBox(part, thread),
                                      vectors + kBox * kBoxVectors, thread % 32);
    publish_rows();
    to.store(part, kBox);
    put_boxes<T, kBox + 1>(made, sums, to, part, vectors, thread);
  }
}

#endif

}  // namespace resnet_fused
