// How many bytes a cycle plain loads of 16 bytes bring to every multiprocessor: the boxes of
// ceilings_reads_sm90.cuh into registers, where they are added up.
#pragma once

#include "../device/ceiling_path.h"
#include "../ptx/barrier.h"
#include "../ptx/clock.h"
#include "../ptx/memory.h"

namespace resnet_fused {

struct CeilingLoadArguments {
  const uint4* set;
  CeilingPath path;  // of which count is a multiple of kLoadsAtOnce
  uint32_t* sum;     // [blocks, kLoadThreads]
  int64_t* cycles;   // [blocks]
};

// A set is larger than L1, so that what comes round again has left it.
__global__ void __launch_bounds__(kLoadThreads, 1)
    ceilings_loads_kernel(const __grid_constant__ CeilingLoadArguments arguments) {
  CeilingWalk walk(arguments.path);
  uint32_t sum = 0;
  const int64_t begun = ptx::clock_cycles();
#pragma unroll 1
  for (int32_t i = 0; i < arguments.path.count; i += kLoadsAtOnce) {
    uint4 piece[kLoadsAtOnce];
#pragma unroll
    for (uint4& one : piece) {
      one = ptx::load_global(arguments.set + int64_t{walk.box()} * kCeilingPieces + threadIdx.x);
      walk.next();
    }
#pragma unroll
    for (const uint4& one : piece) sum += piece_sum(one);
  }
  ptx::store_global(arguments.sum + blockIdx.x * kLoadThreads + threadIdx.x, sum);
  ptx::sync_threads();
  if (threadIdx.x == 0) {
    ptx::store_global(arguments.cycles + blockIdx.x, ptx::clock_cycles() - begun);
  }
}

}  // namespace resnet_fused
