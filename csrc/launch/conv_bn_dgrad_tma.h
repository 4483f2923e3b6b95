// conv_bn_dgrad for sm_90a: what its plan and its launches share. Inside of this room.
#pragma once

#include <cstdint>
#include <string>

#include "../device/bn_dgrad_tma.h"
#include "conv_bn_dgrad.h"
#include "conv_bn_dgrad_arguments.h"
#include "dgrad_tma.h"

namespace resnet_fused {

// What keeps a problem from a tile, with the argument's name; empty if nothing does. result: what
// x is called.
std::string bn_dgrad_tma_fault(const RfConvBnDgrad& problem, const TmaTileFacts& tile,
                               int64_t images, const char* result = "out");

// The arguments of a launch of images [first, first + images), of which bn_dgrad_tma_fault finds
// nothing, by a plan and its layout; 0 or a cudaError_t.
int bn_dgrad_tma_arguments(const RfConvBnDgrad& problem, const TmaTileFacts& tile,
                           const BnDgradLayout& layout, const RfConvPlan& plan, void* workspace,
                           int64_t first, int64_t images, ConvBnDgradTmaArguments* made);

// Launches images [first, first + images), of which bn_dgrad_tma_fault finds nothing; 0 or a
// cudaError_t.
int run_conv_bn_dgrad_tma(const RfConvBnDgrad& problem, const RfConvPlan& plan, void* workspace,
                          int64_t first, int64_t images, void* stream);

// What is cleared ahead of a launch.
struct ClearedCounters {
  void* at;
  int64_t bytes;
};

// The launches of one dtype; index: in BnDgradTmaTiles; `blocks`: of the grid.
int launch_conv_bn_dgrad_tma_bfloat16(const ConvBnDgradTmaArguments& arguments,
                                      const ClearedCounters& counters, int index, int32_t blocks,
                                      void* stream);
int launch_conv_bn_dgrad_tma_float16(const ConvBnDgradTmaArguments& arguments,
                                     const ClearedCounters& counters, int index, int32_t blocks,
                                     void* stream);

}  // namespace resnet_fused
