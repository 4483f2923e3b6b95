// The shape of a block's tile: what a configuration of a matrix kernel fixes at compile time.
#pragma once

#include <cstdint>

namespace resnet_fused {

// Bytes of the reduction that one matrix instruction takes: 16 elements of 16 bits, 8 of TF32. A
// tile's bytes in shared memory and the addresses of its fragments are the same for every dtype.
constexpr int kSliceBytes = 32;
constexpr int kChunkBytes = 16;  // what ldmatrix reads of a row, and the widest cp.async

// A tile of M x N results, by M-warps x N-warps; the reduction in steps of kStepBytes a row, of
// which kStages are in flight or in use; kBlocks blocks are to share a multiprocessor.
template <int kM_, int kN_, int kWarpsM_, int kWarpsN_, int kStages_, int kBlocks_>
struct TileShape {
  static constexpr int kM = kM_;
  static constexpr int kN = kN_;
  static constexpr int kWarpsM = kWarpsM_;
  static constexpr int kWarpsN = kWarpsN_;
  static constexpr int kStages = kStages_;
  static constexpr int kBlocks = kBlocks_;

  // 64 bytes: two instructions deep, so that the fragments of one are loaded while the other
  // multiplies, and two whole sectors of every row that is read.
  static constexpr int kStepBytes = 64;
  static constexpr int kSlices = kStepBytes / kSliceBytes;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kWarpM = kM / kWarpsM;
  static constexpr int kWarpN = kN / kWarpsN;
  static constexpr int kBlocksM = kWarpM / 16;  // of 16 rows: the instruction's m
  static constexpr int kBlocksN = kWarpN / 16;  // of 16 columns: twice the instruction's n
  // The right side's place in a stage.
  static constexpr int kRightAt = kM * kStepBytes;
  static constexpr int kStageBytes = (kM + kN) * kStepBytes;
  static constexpr int kRingBytes = kStages * kStageBytes;

  static_assert(kStages >= 3, "one step in use, one arriving, one being asked for");
  static_assert(kSlices % 2 == 0, "fragments are double-buffered by slices");
  static_assert(kWarpM % 16 == 0 && kWarpN % 16 == 0);
};

// How operands are read. kWide: 16 bytes at a time, straight into shared memory; channels are
// adjacent, their number and every stride multiples of 16 bytes, and so are the pointers. kNarrow:
// element by element, any strides; two 16-bit elements make a word that passes through registers.
enum class LoadWidth { kWide, kNarrow };

constexpr int kNarrowBytes = 4;  // that a thread brings at a time, of a narrow operand
constexpr int kLoadLanes = 4;    // threads along a row

template <class T, class Shape, LoadWidth kWidth>
struct LoadPattern {
  static constexpr int kUnitBytes = kWidth == LoadWidth::kWide ? kChunkBytes : kNarrowBytes;
  static constexpr int kUnit = kUnitBytes / static_cast<int>(sizeof(T));  // elements
  static constexpr int kLanes = kLoadLanes;
  static constexpr int kRowStep = Shape::kThreads / kLanes;
  static constexpr int kPasses = Shape::kStepBytes / (kLanes * kUnitBytes);
  static constexpr int kStep = Shape::kStepBytes / static_cast<int>(sizeof(T));  // elements
  static constexpr int kAdvance = kLanes * kUnit;  // elements from one pass to the next
  static constexpr bool kThroughRegisters = kUnit == 2;

  // A whole number of periods of the swizzle apart, a thread's rows share their chunk's place.
  static_assert(kRowStep % 8 == 0);
};

// Whether an output tile of T fits into the ring: its rows are put together there.
template <class T, class Shape>
constexpr bool kOutputFits =
    Shape::kM * Shape::kN * static_cast<int>(sizeof(T)) <= Shape::kRingBytes;

}  // namespace resnet_fused
