// The PTX instructions that every kernel uses, each one function: its assembly for nvcc, its
// meaning on the host for the emulator. Section names are those of the PTX ISA manual, version 9.0.
//
//   shared.h           dynamic shared memory and its addresses
//   async_copy.h       cp.async and its groups
//   matrix_load.h      ldmatrix, stmatrix
//   mma.h              mma.sync, the conversion to TF32
//   barrier.h          bar.sync, bar.arrive, bar.warp.sync
//   warp.h             shuffles and votes
//   memory.h           loads and stores
//   atomic.h           atomics, acquire, release, fences
//   grid_dependency.h  griddepcontrol
//   keep.h             no instruction: what the compiler is to keep in registers
//
// Kernels for sm_90 and later include more themselves. What a kernel's results hang on is all that
// it includes (admission's hashes), so the others are not to include what they do not use:
//
//   mbarrier.h         mbarriers
//   tma.h              bulk copies, tiled and im2col, and their groups; tensor_map.h
//   proxy.h            fence.proxy.async
//   cluster.h          barrier.cluster, mapa
//   wgmma.h            wgmma and its groups; matrix_descriptor.h
//   registers.h        setmaxnreg
#pragma once

#include "async_copy.h"
#include "atomic.h"
#include "barrier.h"
#include "common.h"
#include "grid_dependency.h"
#include "keep.h"
#include "matrix_load.h"
#include "memory.h"
#include "mma.h"
#include "shared.h"
#include "types.h"
#include "warp.h"
