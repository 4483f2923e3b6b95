// conv_bn_stats of a stem for sm_90a: what its plan, its arguments and its launches share. Inside
// of this room.
#pragma once

#include <cstdint>
#include <string>

#include "../device/stem_stats.h"
#include "conv_bn_stats.h"
#include "conv_bn_stats_stem_tiles.h"

namespace resnet_fused {

// "tma_image112x64_8s": columns of a tile, filters, stages of the ring. index: in StatsStemTiles.
std::string stats_stem_name(int index);
RfConvConfiguration stats_stem_configuration(int index);

// What keeps a problem from it, with the argument's name; empty if nothing does.
std::string stats_stem_fault(const RfConvBnStats& problem, int index);

// The one launch that takes all of the batch, but for the configuration's index.
RfConvPlan stats_stem_plan(const RfConvBnStats& problem, int index, const RfGpu& gpu);

// Launches it; 0 or a cudaError_t.
int run_conv_bn_stats_stem(const RfConvBnStats& problem, const RfConvPlan& plan, void* workspace,
                           void* stream);

// The launches of one dtype; blocks: along x.
int launch_conv_bn_stats_stem_bfloat16(const ConvStatsStemArguments& arguments, int index,
                                       int32_t blocks, void* stream);
int launch_conv_bn_stats_stem_float16(const ConvStatsStemArguments& arguments, int index,
                                      int32_t blocks, void* stream);

}  // namespace resnet_fused
