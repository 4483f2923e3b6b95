// The shape of a block's tile in the kernels for sm_90a, and what lies where in its shared memory.
// Numbers alone: the launches know it as well.
#pragma once

#include <cstdint>

namespace resnet_fused {

constexpr int kWarpgroupThreads = 128;
constexpr int kWarpgroupWarps = 4;
constexpr int kWarpgroupRows = 64;    // of the left side, that a warpgroup multiplies
constexpr int kStepRowBytes = 128;    // of the reduction, in a row of a step: the swizzle's span
constexpr int kStepElements = 64;     // those of 16 bits in it
constexpr int kTileAlignment = 1024;  // bytes, of an operand tile's beginning

// A step's elements of a storage type.
template <class T>
constexpr int kElementsOfStep = kStepRowBytes / static_cast<int>(sizeof(T));

// Which side of the product the pixels are: with pixels on the left a thread has two of them and a
// quarter of the channels, with channels on the left two channels and a quarter of the pixels.
enum class Orientation { kPixelsLeft, kChannelsLeft };

// What the two consuming warpgroups do. kTogether: each takes 64 of a tile's 128 rows on the left
// side. kInTurns: each takes every other tile, of 64 rows, so that one multiplies while the other
// one's results go out.
enum class Consumers { kTogether, kInTurns };

constexpr int kConsumers = 2;  // warpgroups
constexpr int kWarpgroupBlockThreads = (1 + kConsumers) * kWarpgroupThreads;
// A launch gives every thread 168; the producer gives some back (PTX ISA, setmaxnreg).
constexpr int kProducerRegisters = 40;
constexpr int kConsumerRegisters = 232;
// Where the producer's warpgroup transforms what has landed.
constexpr int kTransformRegisters = 56;
// Of a consumer, where the first warpgroup keeps so many of a launch's.
template <int kFirst>
constexpr int kRegistersBeside = (3 * 168 - kFirst) / kConsumers;
static_assert(kRegistersBeside<kProducerRegisters> == kConsumerRegisters);
constexpr int kMostSharedBytes = 227 * 1024;  // of a block on sm_90

constexpr int kBarrierBytes = 8;
// Of a ring: a full and an empty one for each stage.
constexpr int ring_bytes(int stages) { return 2 * stages * kBarrierBytes; }

// Blocks of a cluster share what they read: kFilterSharing of them, with neighbouring tiles of
// pixels, their filters, and kPixelSharing, with neighbouring tiles of channels, their pixels. Each
// asks for its part of a step's rows, and they come to all that share them.
template <Orientation kOrientation_, Consumers kConsumers_, int kPixels_, int kChannels_,
          int kStages_, int kFilterSharing_ = 1, int kPixelSharing_ = 1>
struct WarpgroupShape {
  static constexpr Orientation kOrientation = kOrientation_;
  static constexpr bool kPixelsLeft = kOrientation == Orientation::kPixelsLeft;
  static constexpr bool kTogether = kConsumers_ == Consumers::kTogether;
  static constexpr int kPixels = kPixels_;
  static constexpr int kChannels = kChannels_;
  static constexpr int kStages = kStages_;
  static constexpr int kFilterSharing = kFilterSharing_;
  static constexpr int kPixelSharing = kPixelSharing_;
  static constexpr int kSharing = kFilterSharing * kPixelSharing;  // blocks of a cluster
  static constexpr bool kTransforms = false;  // what has landed, before it is multiplied

  static constexpr int kLeft = kPixelsLeft ? kPixels : kChannels;     // rows: the products' m
  static constexpr int kColumns = kPixelsLeft ? kChannels : kPixels;  // and n
  static constexpr int kReaders = kWarpgroupWarps * (kTogether ? kConsumers : 1);  // of a stage
  static_assert(kLeft == kWarpgroupRows * (kTogether ? kConsumers : 1));
  static_assert(kColumns % (kPixelsLeft ? 64 : 32) == 0 && kColumns <= 256);
  static_assert(kStages >= 2, "one step in use, one arriving");

  // A warpgroup's part of the output.
  static constexpr int kStoredPixels = kPixelsLeft ? kWarpgroupRows : kPixels;

  // From a multiple of 1024: the stages, each the left rows and behind them the right ones; for
  // each consumer a staging tile, and scale and shift of the channels where they are columns; the
  // ring's barriers, one a consumer for its shortcut, and one a consumer for its turn.
  static constexpr int kPixelBytes = kPixels * kStepRowBytes;
  static constexpr int kFilterBytes = kChannels * kStepRowBytes;
  static constexpr int kFilterPart = kChannels / kFilterSharing;  // rows that a block asks for
  static constexpr int kPixelPart = kPixels / kPixelSharing;
  static_assert(kFilterPart * kStepRowBytes % kTileAlignment == 0);
  static_assert(kPixelPart * kStepRowBytes % kTileAlignment == 0);
  static constexpr int kStageBytes = kPixelBytes + kFilterBytes;
  static constexpr int kPixelsAt = kPixelsLeft ? 0 : kFilterBytes;
  static constexpr int kFiltersAt = kPixelsLeft ? kPixelBytes : 0;
  static constexpr int kRightAt = kLeft * kStepRowBytes;
  static constexpr int kStagingAt = kStages * kStageBytes;
  static constexpr int kStagingBytes = kColumns * kStepRowBytes;
  static constexpr int kVectorsAt = kStagingAt + kConsumers * kStagingBytes;
  static constexpr int kVectorsBytes = kPixelsLeft ? kChannels * 2 * 4 : 0;
  static constexpr int kRingAt = kVectorsAt + kConsumers * kVectorsBytes;
  static constexpr int kResidualAt = kRingAt + ring_bytes(kStages);
  static constexpr int kTurnsAt = kResidualAt + kConsumers * kBarrierBytes;
  static constexpr int kSharedBytes = kTurnsAt + kConsumers * kBarrierBytes;
  static_assert(kStageBytes % kTileAlignment == 0 && kRightAt % kTileAlignment == 0);
  static_assert(kSharedBytes <= kMostSharedBytes);
};

}  // namespace resnet_fused
