// How training's passes over activations walk memory: each thread keeps to its channels, and goes
// from pixel to pixel. What the kernels are told; channel_walker.h has the walk itself.
//
// A block is columns x rows of threads. A column is kLength channels that lie side by side: 16
// bytes where the tensors allow it, else one channel with strides of any kind. Blocks of a group
// have the same columns and share the pixels; what belongs to a channel is loaded once a thread.
// All offsets are 64 bits wide.
#pragma once

#include <cstdint>

#include "bn_training.h"
#include "portable.h"

namespace resnet_fused {

constexpr int kWalkThreads = 256;
constexpr int kWalkColumns = 32;  // of a block, at most: 512 bytes of a pixel

// Pixels that a thread has in flight: 4 to 16 loads of 16 bytes, which two blocks a multiprocessor
// turn into what hides the latency. `more`: sums, a choice between channels or several loops of
// pixels take registers too.
RF_HOST_DEVICE constexpr int walk_ahead(int reads, bool more) {
  if (reads <= 2) return more ? 4 : 8;
  return reads == 3 ? 4 : 2;
}

// Blocks of a walk with sums, all groups together: about two for each of an H200's 132
// multiprocessors. More leave more to add up; a number of the GPU's would make the sums' bits its
// own.
constexpr int kSummingBlocks = 256;

// Channels [first, first + channels) of the walk's; it holds no others.
struct WalkOperand {
  void* data;  // null: absent
  int64_t pixel[3];
  int64_t channel;
  int64_t first;
  int64_t channels;
};

// Of the passes of a max pooling, whose windows make loads enough.
constexpr int kPoolAhead = 1;

// Pixels are numbered through three loops, of which neighbours that lie together are merged.
struct ChannelWalk {
  int64_t pixels;
  int64_t channels;
  int64_t inner[2];  // sizes of the two inner loops
  uint32_t groups;
  uint32_t parts;  // blocks of a group
  WalkOperand operand[kBnTrainingOperands];
};

}  // namespace resnet_fused
