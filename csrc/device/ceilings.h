// What the kernels that measure a GPU's ceilings read and write. Numbers alone: the launches and
// the driver know them as well.
#pragma once

#include <cstdint>

#include "warpgroup_shape.h"

namespace resnet_fused {

// A set of bytes is read in boxes, of rows as the convolutions' steps have them.
constexpr int kCeilingBoxRows = 128;
constexpr int kCeilingBoxBytes = kCeilingBoxRows * kStepRowBytes;
constexpr int kPieceBytes = 16;
constexpr int kCeilingPieces = kCeilingBoxBytes / kPieceBytes;

// The boxes of a set that a block reads, one behind the other.
struct CeilingPath {
  int32_t boxes;     // of the set
  int32_t together;  // neighbouring blocks that read the same boxes
  int32_t apart;     // boxes from where one such group begins to where the next does
  int32_t count;     // that each block reads, beginning again behind the last
};

// By TMA: a warp asks, four others wait. 128 KB are under way at once.
constexpr int kReadStages = 8;
constexpr int kReaderThreads = 128;
constexpr int kReadThreads = kReaderThreads + 32;
constexpr int kReadSharedBytes = kReadStages * kCeilingBoxBytes + ring_bytes(kReadStages);

// By loads of 16 bytes: a thread takes the same piece of every box, of so many at once.
constexpr int kLoadThreads = kCeilingPieces;
constexpr int kLoadsAtOnce = 4;

// Products of steps of 64, of 64 rows by a warpgroup; the traffic beside them comes in quarters of
// a box, at most twelve a step, which is what 128 rows and 256 columns of a convolution bring.
constexpr int kTrafficRows = kCeilingBoxRows / 4;
constexpr int kTrafficBytes = kTrafficRows * kStepRowBytes;
constexpr int kMostTraffic = 12;
constexpr int kTrafficStages = 3;
constexpr int kMostColumns = 256;
constexpr int kOperandRows = kConsumers * kWarpgroupRows + kMostColumns;
constexpr int kOperandBoxRows = 64;

// Where the operands lie, from a multiple of 1024: left rows, right rows, the traffic's ring.
template <int kColumns>
struct ProductRoom {
  static constexpr int kRightAt = kConsumers * kWarpgroupRows * kStepRowBytes;
  static constexpr int kTrafficAt = kRightAt + kColumns * kStepRowBytes;
  static constexpr int kRingAt = kTrafficAt + kTrafficStages * kMostTraffic * kTrafficBytes;
  static constexpr int kFullAt = kRingAt + ring_bytes(kTrafficStages);
  static constexpr int kSharedBytes = kFullAt + kBarrierBytes;
  static_assert(kSharedBytes <= kMostSharedBytes);
};

constexpr int kMeetingThreads = 128;

}  // namespace resnet_fused
