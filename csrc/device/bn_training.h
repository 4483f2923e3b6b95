// What the CPU kernels of training are told: operands, options, and how the work is cut into tiles.
//
// Tensors are [N, K, P, Q]. A tile is a range of channels times a range of pixels. Channels-last
// tensors are cut so that a tile's rows are pixels and its columns channels ("channels inside");
// others so that its rows are channels, of one image or of several small ones, and its columns
// pixels. Columns then have stride 1 in memory; an operand for which that is not so is copied
// through a small buffer.
//
// Where the cuts lie depends on sizes and strides alone, never on the number of threads, and sums
// are merged in the order of the tiles: the same input gives the same bits.
#pragma once

#include <cstdint>

#include "bn_act.h"

namespace resnet_fused {

enum class BnTrainingOp : int32_t {
  kStatistics,    // y -> mean, M2
  kForward,       // y, residual -> result
  kBackward,      // gradient, passed, y, residual -> result, sums
  kApply,         // gradient, y -> result
  kPool,          // y -> result, taps
  kPoolBackward,  // gradient and taps of the windows, y -> result, sums
};

// Places in BnTrainingCall::operand.
enum BnTrainingOperandIndex : int32_t {
  kRaw,       // y, the convolution's raw output
  kGradient,  // what comes from above: dout, or dz
  kPassed,    // the forward result, whose sign is the ReLU's mask
  kResidual,
  kResult,
  kBnTrainingOperands
};

struct BnTrainingOperand {
  void* data;  // null: absent
  int64_t stride[4];
};

// The window of a pooling, and what lies at its end: [N, K, windows[0], windows[1]].
struct BnTrainingPool {
  int64_t kernel[2];
  int64_t step[2];
  int64_t padding[2];
  int64_t windows[2];
  uint8_t* taps;
  int64_t taps_stride[4];
};

struct BnTrainingTiles {
  bool channels_inside;
  bool packed[kBnTrainingOperands];           // copied through a buffer
  int64_t pixel_stride[kBnTrainingOperands];  // channels inside, not packed: from row to row
  int64_t group;                              // channels of a tile
  int64_t images;                             // of a tile, where it holds whole ones
  int64_t length;                             // pixels of a tile, or of each of its images
  int64_t pixels;                             // that tiles share: N P Q, or P Q of each image
  int64_t blocks;                             // tiles along the pixels, all images together
  int64_t chunk;                              // blocks of one task
  int64_t chunks;
  int64_t groups;
};

constexpr int64_t kLongestGroup = 512;  // channels of a tile
constexpr int64_t kPackedTile = 4096;   // elements of a tile whose operands go through buffers
constexpr int kMostSums = 3;

struct BnTrainingCall {
  BnTrainingOp op;
  DataType dtype;
  bool relu;
  int64_t size[4];
  BnTrainingOperand operand[kBnTrainingOperands];
  int64_t residual_first;  // the channel that the residual's first one is added to
  int64_t residual_channels;
  // Per-channel values: float, or double where the tensors are double.
  const void* norm;           // [4, K] scale, shift, mean, invstd; kApply: [3, K] A, B, C
  const void* residual_norm;  // [4, K], or null
  void* sums;                 // [rows, K]
  int32_t rows;               // of sums
  double* workspace;          // [chunks, rows, K]
  BnTrainingPool pool;
  BnTrainingTiles tiles;
};

}  // namespace resnet_fused
