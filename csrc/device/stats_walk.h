// What conv_bn_stats' kernel for sm_90a is told. Plain values, which a launch computes on the host.
//
// A block stays for many tiles of pixels of the same channels: what it measures of them it keeps in
// registers, and leaves once, as one part of each channel. Parts are merged as the tiles of the
// kernel for sm_80 are.
#pragma once

#include <cstdint>

#include "portable.h"
#include "stats_geometry.h"
#include "stats_norm.h"
#include "tma_conv.h"

namespace resnet_fused {

// Part i of a column has its tiles i, i + step, i + 2 step and so on.
struct WalkedParts {
  int64_t pixels;
  int32_t tiles;  // of pixels
  int32_t rows;   // of a whole tile
  int32_t step;

  // Parts that have a tile: the first ones.
  RF_HOST_DEVICE int32_t count() const { return tiles < step ? tiles : step; }
  // Pixels of all parts ahead of one; the last tile may have fewer than others.
  RF_HOST_DEVICE int64_t before(int32_t part) const {
    const int32_t each = tiles / step;
    const int32_t more = tiles - each * step;
    const int64_t begun = int64_t{part} * each + (part < more ? part : more);
    const bool cut = part > (tiles - 1) % step;
    return begun * rows - (cut ? int64_t{tiles} * rows - pixels : 0);
  }
};

struct ConvStatsTmaArguments {
  ConvTmaArguments conv;  // out is y; there is no residual, scale or shift
  NormedImages norm;      // of the layer before
  WalkedParts measured;
  int32_t groups;
  int32_t columns;        // of 64 channels, in a group
  uint32_t* arrivals;     // [group][column][chunks + 1], zero before the launch
  Moments* moments;       // [part][K]
  WideMoments* merged;    // [chunk][K]; unused where there is one chunk
  float* stats;           // [2, K]: mean, M2
  int64_t cleared_bytes;  // of arrivals: for the launch
  StatsNorm finalized;

  RF_HOST_DEVICE int32_t filters() const { return conv.channels * groups; }
};

}  // namespace resnet_fused
