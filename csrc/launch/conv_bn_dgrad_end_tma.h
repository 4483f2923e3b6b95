// conv_bn_dgrad_end for sm_90a: what its plan and its launches share. Inside of this room.
#pragma once

#include <cstdint>
#include <string>

#include "../device/bn_dgrad_end_tma.h"
#include "conv_bn_dgrad_end.h"
#include "conv_bn_dgrad_tma.h"

namespace resnet_fused {

// What keeps a problem from a tile, with the argument's name; empty if nothing does.
std::string bn_dgrad_end_tma_fault(const RfConvBnDgradEnd& problem, const TmaTileFacts& tile,
                                   int64_t images);

// Launches images [first, first + images), of which bn_dgrad_end_tma_fault finds nothing, by a
// tile of BnDgradEndTmaTiles; 0 or a cudaError_t.
int run_conv_bn_dgrad_end_tma(const RfConvBnDgradEnd& problem, const RfConvPlan& plan,
                              void* workspace, int64_t first, int64_t images, void* stream);

// The launches of one dtype; index: in BnDgradEndTmaTiles; `blocks`: of the grid.
int launch_conv_bn_dgrad_end_tma_bfloat16(const ConvBnDgradEndTmaArguments& arguments,
                                          const ClearedCounters& counters, int index,
                                          int32_t blocks, void* stream);
int launch_conv_bn_dgrad_end_tma_float16(const ConvBnDgradEndTmaArguments& arguments,
                                         const ClearedCounters& counters, int index, int32_t blocks,
                                         void* stream);

}  // namespace resnet_fused
