// What a warpgroup makes of its sums in a chain of convolutions on sm_90a, a box of 64 channels at
// a time: it is stored from shared memory and multiplied on from registers.
#pragma once

#include <cstdint>

#include "../ptx/cluster.h"
#include "../ptx/proxy.h"
#include "../ptx/ptx.h"
#include "block_walk.h"
#include "chain_tma.h"
#include "chain_types.h"
#include "vector.h"
#include "warpgroup_epilogue.h"
#include "warpgroup_tile.h"

namespace resnet_fused {

#if defined(RF_HAS_WGMMA)

// A block's tiles.
template <class Arguments>
RF_DEVICE BlockWalk tiles_of(const Arguments& arguments) {
  return {arguments.tiles, arguments.reverse, static_cast<int32_t>(blockIdx.x),
          static_cast<int32_t>(gridDim.x)};
}

// A block's way through the tiles; those of a cluster's blocks lie side by side. One that begins
// behind the last position brings zeros and stores nothing, but takes part.
template <class Shape>
class SharedWalk {
 public:
  template <class Arguments>
  RF_DEVICE explicit SharedWalk(const Arguments& arguments)
      : walk_(arguments.tiles / Shape::kSharing, arguments.reverse,
              static_cast<int32_t>(blockIdx.x / Shape::kSharing),
              static_cast<int32_t>(gridDim.x / Shape::kSharing)) {
    if constexpr (Shape::kSharing > 1) rank_ = static_cast<int32_t>(ptx::cluster_rank());
  }

  RF_DEVICE bool done() const { return walk_.done(); }
  RF_DEVICE void next() { walk_.next(); }
  // The tile's first one.
  RF_DEVICE int32_t position() const {
    return (walk_.index() * Shape::kSharing + rank_) * kChainTmaPixels;
  }

 private:
  BlockWalk walk_;
  int32_t rank_ = 0;
};

// The half of each tile that a warpgroup has.
struct ChainPart {
  uint32_t bytes;  // in front of its half of a box
  int32_t pixels;  // likewise
  uint32_t thread;

  RF_DEVICE ChainPart(uint32_t consumer, uint32_t of_warpgroup,
                      uint32_t part_bytes = ChainBoxes::kPartBytes)
      : bytes(consumer * part_bytes),
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

// Scale and shift of a half of group i, of a box's vectors.
template <class T>
RF_DEVICE ChannelPair load_pair(ptx::SharedAddress vectors, int i, int half, uint32_t lane) {
  return ptx::load_shared<ChannelPair>(vectors + ChainTypes<T>::pair_at(i, half, lane % 4) *
                                                     sizeof(ChannelPair));
}

// scale sums + shift of 64 channels, in place, as a shortcut is added. vectors: of these.
template <class T = BFloat16>
RF_DEVICE void scale_sums(float (&sums)[kBoxSums], ptx::SharedAddress vectors, uint32_t lane,
                          const typename ChainTypes<T>::Act& act = ChainTypes<T>::linear()) {
  using Types = ChainTypes<T>;
#pragma unroll
  for (int i = 0; i < kBoxGroups; ++i) {
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const auto of = load_pair<T>(vectors, i, m / 2, lane);
      const int at = Types::template sum_at<kBoxSums>(0, i, m);
      const FloatPair made = Types::stored(
          {act(sums[at], of.scale[0], of.shift[0]), act(sums[at + 1], of.scale[1], of.shift[1])});
      sums[at] = made.low;
      sums[at + 1] = made.high;
    }
  }
}

// In the place of a box, for what is multiplied on alone.
struct Unstored {
  template <int kWords>
  RF_DEVICE void store(int, const uint32_t (&)[kWords]) const {}
};

// act(scale sums + shift [+ shortcut]) of 64 channels, rounded, into the box and, as wgmma takes
// its left operand, into `made`. kBox: of `sums`. vectors: of its channels. Others: float
// [kBoxSums] where they are added. Box: a ChainBox or Unstored.
template <class T, Added kAdded, int kBox, int kRegisters, class Others, class Box>
RF_DEVICE void put_box(typename ChainTypes<T>::Operand& made, const float (&sums)[kRegisters],
                       const Others& others, const Box& box, ptx::SharedAddress vectors,
                       uint32_t lane,
                       const typename ChainTypes<T>::Act& act = ChainTypes<T>::relu()) {
  using Types = ChainTypes<T>;
#pragma unroll
  for (int i = 0; i < kBoxGroups; ++i) {
    typename Types::Words words;
    typename Types::Words shortcut;
    if constexpr (kAdded == Added::kStored) box.load(shortcut, i);
    const ChannelPair pairs[2] = {load_pair<T>(vectors, i, 0, lane),
                                  load_pair<T>(vectors, i, 1, lane)};
#pragma unroll
    for (int m = 0; m < 4; ++m) {  // two rows of the first eight columns, two of the others
      const ChannelPair& of = pairs[m / 2];
      const int at = Types::template sum_at<kRegisters>(kBox, i, m);
      const float a = sums[at];
      const float b = sums[at + 1];
      if constexpr (kAdded == Added::kNothing) {
        Types::put(words, m, {act(a, of.scale[0], of.shift[0]), act(b, of.scale[1], of.shift[1])});
      } else {
        FloatPair added;
        if constexpr (kAdded == Added::kStored) {
          added = Types::added(shortcut, m);
        } else {
          const int other = Types::template sum_at<kBoxSums>(0, i, m);
          added = {others[other], others[other + 1]};
        }
        Types::put(words, m,
                   {act(a, of.scale[0], of.shift[0], added.low),
                    act(b, of.scale[1], of.shift[1], added.high)});
      }
    }
    box.store(i, words);
#pragma unroll
    for (int w = 0; w < Types::kWords; ++w) {
      const int word = i * Types::kWords + w;
      made[word / 4][word % 4] = words[w];
    }
  }
}

// Stores the pixels of a warpgroup's tile, 16 bytes a thread; each warp those whose sums it has.
template <class T>
class StoredPixels {
  static constexpr int kRowBytes = ChainTypes<T>::kRowBytes;  // of a box
  static constexpr int kUnits = kRowBytes / kVectorBytes;
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
      // As the swizzle of a row's span has it: units change places by the number of 128 bytes.
      const uint32_t chunk =
          static_cast<uint32_t>(unit_) ^ row(i) * kRowBytes / kStepRowBytes % kUnits;
      const auto made =
          ptx::load_shared<Vector<T>>(part + row(i) * kRowBytes + chunk * kVectorBytes);
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
