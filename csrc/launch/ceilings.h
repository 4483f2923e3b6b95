// The C interface of the kernels that measure what a multiprocessor can do, each beside the rate
// that the plans count with. Knows no framework. For GPUs of compute capability 9.0.
//
//   RfCeiling ceiling;
//   rf_ceiling(index, &ceiling);  // index: 0 to rf_ceilings() - 1
//   run.set = ...;                // and the rest that its kind asks for
//   int error = rf_ceiling_cuda(&ceiling, &run, stream);
#pragma once

#include <cstddef>
#include <cstdint>

#include "gpu.h"

extern "C" {

enum RfCeilingKind {
  RF_CEILING_READS,     // bytes that come to each multiprocessor in a cycle
  RF_CEILING_PRODUCTS,  // products of 16 bits that each makes in a cycle
  RF_CEILING_MEETINGS,  // cycles of a meeting of blocks
  RF_CEILING_LAUNCHES   // microseconds from one kernel of a graph to the next
};

enum RfCeilingWay { RF_WAY_ROWS, RF_WAY_PIECE, RF_WAY_LOADS };

// One thing that is measured, and how.
struct RfCeiling {
  const char* name;
  const char* constant;  // of csrc/launch/conv_plan.h, that it stands beside; empty: of none
  double predicted;      // what the plans' rates make of it, in the kind's unit
  int32_t kind;          // RfCeilingKind
  // Of reads: how, by how many neighbouring blocks the same boxes (0: all), of which so many, a
  // cluster, each ask for a part for all of them; of a set of so many bytes.
  int32_t way;  // RfCeilingWay
  int32_t together;
  int32_t sharing;
  int64_t set_bytes;
  // Of products: columns (64, 128 or 256), warpgroups (1 or 2), whether the left side is in
  // registers, and bytes that TMA brings in each step of 64 rows each by 64.
  int32_t columns;
  int32_t consumers;
  int32_t left_in_registers;
  int32_t traffic;
  // Of meetings: blocks of a cluster; 0: all of the launch. Of launches: whether each begins before
  // the one ahead has ended.
  int32_t cluster;
  int32_t early;
};

// How many there are; 0 in a build without machine code for sm_90a.
int32_t rf_ceilings(void);
// 0; 1 where there is none of that index.
int32_t rf_ceiling(int32_t index, RfCeiling* ceiling);

// One launch. Addresses are multiples of 128.
struct RfCeilingRun {
  const void* set;       // reads, products: boxes of 16 KB
  int64_t boxes;         // of the set, at least one
  const void* operands;  // products: [384][64] of bfloat16, 128 rows of the left side ahead
  int32_t blocks;        // a multiple of the cluster; of a grid's meeting all at once on the GPU
  int32_t count;         // boxes that each block reads, steps, or meetings
  int32_t judged;        // reads by TMA, meetings: whether sums and words are looked at
  uint32_t* counters;    // meetings: 16 bytes of zeros; launches: the first counts
  uint32_t* words;       // meetings: [2, blocks]
  void* out;             // rf_ceiling_out_bytes
  int64_t* cycles;       // [blocks, consumers], or [blocks]
};

// Of a launch's `out`: sums of the threads, [blocks, threads] of uint32_t, of boxes' pieces (see
// csrc/device/ceiling_path.h); d of the products as wgmma leaves it, [blocks, consumers, 128,
// columns / 2] of float; right words of [blocks]; nothing.
int64_t rf_ceiling_out_bytes(const RfCeiling* ceiling, int32_t blocks);
// A block for each multiprocessor that has one, clusters and neighbours being whole.
int32_t rf_ceiling_blocks(const RfCeiling* ceiling, const RfGpu* gpu);
// Boxes from where a group of blocks that reads the same begins to where the next one does.
int32_t rf_ceiling_apart(const RfCeiling* ceiling, const RfCeilingRun* run);

// Runs it on the current device and the given cudaStream_t; 0, or a cudaError_t.
int rf_ceiling_cuda(const RfCeiling* ceiling, const RfCeilingRun* run, void* stream);
// The launch of a chain of kernels that follow one another.
int rf_ceiling_launch_cuda(int32_t follows, int32_t blocks, uint32_t* count, void* stream);

}  // extern "C"
