// Sums over pixels of a walk: of a block in shared memory, of a group by its last block. The order
// depends on shapes and strides alone, so that a call gives the same bits each time, and on every
// GPU; no value is ever added by an atomic.
#pragma once

#include <cstdint>

#include "../ptx/atomic.h"
#include "../ptx/barrier.h"
#include "../ptx/shared.h"
#include "channel_walker.h"

namespace resnet_fused {

struct ChannelSums {
  float* sums;         // [kSums, C]
  float* partial;      // [parts, kSums, C]
  uint32_t* arrivals;  // [groups], zeros
};

// Bytes of shared memory: every thread's sums, then the merge's, in double, of four values each.
constexpr uint32_t sums_shared_bytes(int sums, int length) {
  const int first = sums * length * 4, second = (length < 4 ? 1 : 4) * 8;
  return static_cast<uint32_t>(kWalkThreads * (first > second ? first : second));
}

// One block's sums over its pixels to `partial`. Every thread comes.
template <int kSums, int kLength>
RF_DEVICE void store_block_sums(const float (&sum)[kSums][kLength], const ChannelWalk& walk,
                                const WalkPlace& at, const ChannelSums& to) {
  constexpr int kPiece = kLength < 4 ? kLength : 4;
  using Piece = Lanes<float, kPiece>;
  const ptx::SharedAddress scratch = ptx::shared_address(ptx::dynamic_shared());
  const uint32_t thread = threadIdx.y * blockDim.x + threadIdx.x;
  const uint32_t width = blockDim.x * kLength;
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
    const uint32_t mine = (s * blockDim.y + threadIdx.y) * width + threadIdx.x * kLength;
#pragma unroll
    for (int i = 0; i < kLength; i += kPiece) {
      Piece piece;
#pragma unroll
      for (int j = 0; j < kPiece; ++j) piece.lane[j] = sum[s][i + j];
      ptx::store_shared(scratch + (mine + i) * 4, piece);
    }
  }
  ptx::sync_threads();
  for (uint32_t value = thread; value < kSums * width; value += kWalkThreads) {
    const uint32_t row = value / width, column = value % width;
    const int64_t channel = static_cast<int64_t>(at.group) * width + column;
    if (channel >= walk.channels) continue;
    double total = 0;
    for (uint32_t y = 0; y < blockDim.y; ++y) {
      total += ptx::load_shared<float>(scratch + ((row * blockDim.y + y) * width + column) * 4);
    }
    float* into = to.partial + (static_cast<int64_t>(at.part) * kSums + row) * walk.channels;
    ptx::store_global(into + channel, static_cast<float>(total));
  }
}

// The parts' sums become the group's: shares of the parts side by side, then one after the other.
template <int kSums, int kLength>
RF_DEVICE void merge_parts(const ChannelWalk& walk, const WalkPlace& at, const ChannelSums& to) {
  constexpr int kPiece = kLength < 4 ? 1 : 4;
  using Piece = Lanes<float, kPiece>;
  constexpr uint32_t kLoads = 8;  // in flight
  const ptx::SharedAddress scratch = ptx::shared_address(ptx::dynamic_shared());
  const uint32_t thread = threadIdx.y * blockDim.x + threadIdx.x;
  const uint32_t width = blockDim.x * kLength / kPiece;  // pieces of a row
  const uint32_t pieces = kSums * width;
  const uint32_t together = pieces < kWalkThreads ? pieces : kWalkThreads;
  const uint32_t shares = kWalkThreads / together;
  const uint32_t share = thread / together;
  const int64_t part_stride = kSums * walk.channels;
  for (uint32_t base = 0; base < pieces; base += together) {
    const uint32_t piece = base + thread % together;
    const uint32_t row = piece / width;
    const int64_t channel = (static_cast<int64_t>(at.group) * width + piece % width) * kPiece;
    const bool mine = piece < pieces && share < shares && channel < walk.channels;
    double total[kPiece] = {};
    if (mine) {
      const float* from = to.partial + row * walk.channels + channel;
      for (uint32_t first = share; first < walk.parts; first += shares * kLoads) {
        Piece found[kLoads];
#pragma unroll
        for (uint32_t i = 0; i < kLoads; ++i) {
          const uint32_t part = first + i * shares;
          found[i] = Piece{};
          if (part < walk.parts) {
            found[i] = ptx::load_global(reinterpret_cast<const Piece*>(from + part * part_stride));
          }
        }
#pragma unroll
        for (uint32_t i = 0; i < kLoads; ++i) {
#pragma unroll
          for (int j = 0; j < kPiece; ++j) total[j] += found[i].lane[j];
        }
      }
    }
    ptx::sync_threads();  // what lay there has been read
#pragma unroll
    for (int j = 0; j < kPiece; ++j) {
      ptx::store_shared(scratch + (thread * kPiece + j) * 8, total[j]);
    }
    ptx::sync_threads();
    if (!mine || share != 0) continue;
    Piece sums;
#pragma unroll
    for (int j = 0; j < kPiece; ++j) {
      for (uint32_t other = 1; other < shares; ++other) {
        const uint32_t place = (thread + other * together) * kPiece + j;
        total[j] += ptx::load_shared<double>(scratch + place * 8);
      }
      sums.lane[j] = static_cast<float>(total[j]);
    }
    ptx::store_global(reinterpret_cast<Piece*>(to.sums + row * walk.channels + channel), sums);
  }
}

// A thread's sums become those of its channels over all pixels. Every thread comes, also one
// without a channel, whose sums are zeros.
template <int kSums, int kLength>
RF_DEVICE void merge_sums(const float (&sum)[kSums][kLength], const ChannelWalk& walk,
                          const WalkPlace& at, const ChannelSums& to) {
  const ptx::SharedAddress scratch = ptx::shared_address(ptx::dynamic_shared());
  store_block_sums<kSums, kLength>(sum, walk, at, to);
  // The last one to arrive sees what all blocks stored: a release by one thread is one of all that
  // it has seen, which the barrier makes of what the block's others wrote; and the other way round.
  ptx::sync_threads();
  if (threadIdx.x == 0 && threadIdx.y == 0) {
    ptx::store_shared(scratch, ptx::atomic_add_acq_rel(to.arrivals + at.group, 1u));
  }
  ptx::sync_threads();
  if (ptx::load_shared<uint32_t>(scratch) + 1 != walk.parts) return;
  merge_parts<kSums, kLength>(walk, at, to);
}

}  // namespace resnet_fused
