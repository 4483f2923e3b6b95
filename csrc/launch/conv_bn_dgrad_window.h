// conv_bn_dgrad's window kernel for sm_90a: what its plan and its launches share. Inside of this
// room.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../device/bn_dgrad_window.h"
#include "conv_bn_act_window.h"
#include "conv_bn_dgrad.h"
#include "conv_bn_dgrad_tma.h"

namespace resnet_fused {

// Its entries of the table (conv_plan.h).
struct BnDgradWindowEntry {
  std::string name;
  RfConvConfiguration configuration;
};
const std::vector<BnDgradWindowEntry>& bn_dgrad_window_table();

// index, here and below: in BnDgradWindowTiles, or behind those in BnDgradStreamTiles.
// What keeps a problem from a tile, with the argument's name; empty if nothing does.
std::string bn_dgrad_window_fault(const RfConvBnDgrad& problem, int index, int64_t images);

// Of one launch over so many images: predicted cycles, and its blocks.
double bn_dgrad_window_cost(const RfConvBnDgrad& problem, int index, const DgradWork& work,
                            int64_t images, const RfGpu& gpu);
int64_t bn_dgrad_window_blocks(const RfConvBnDgrad& problem, int index, int64_t images,
                               const RfGpu& gpu);

// Launches images [first, first + images), of which bn_dgrad_window_fault finds nothing; 0 or a
// cudaError_t.
int run_conv_bn_dgrad_window(const RfConvBnDgrad& problem, const RfConvPlan& plan, void* workspace,
                             int64_t first, int64_t images, void* stream);

// The launches of one dtype.
int launch_conv_bn_dgrad_window_bfloat16(const BnDgradWindowArguments& arguments,
                                         const ClearedCounters& counters, int index,
                                         const WindowGrid& grid, void* stream);
int launch_conv_bn_dgrad_window_float16(const BnDgradWindowArguments& arguments,
                                        const ClearedCounters& counters, int index,
                                        const WindowGrid& grid, void* stream);
// Of filters in slices; index: in BnDgradStreamTiles.
int launch_conv_bn_dgrad_stream_bfloat16(const BnDgradWindowArguments& arguments,
                                         const ClearedCounters& counters, int index,
                                         const WindowGrid& grid, void* stream);
int launch_conv_bn_dgrad_stream_float16(const BnDgradWindowArguments& arguments,
                                        const ClearedCounters& counters, int index,
                                        const WindowGrid& grid, void* stream);

}  // namespace resnet_fused
