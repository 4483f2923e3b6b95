// conv_bn_act for sm_90a: what its plan, its arguments and its launches share. Inside of this room.
#pragma once

#include <cstdint>
#include <string>

#include "../device/tma_conv.h"
#include "conv_bn_act.h"
#include "conv_tma_tiles.h"

namespace resnet_fused {

// What the plan and the launch know of a tile at run time.
struct TmaTileFacts {
  bool pixels_left;
  bool together;
  int32_t pixels;
  int32_t channels;
  int32_t stages;
  int32_t stored_pixels;
  int32_t shared_bytes;
};
// index: in ConvTmaTiles.
TmaTileFacts tma_tile(int index);

// "tma_p128x256_3s": pixels on the left side, or s for channels; "_t": its warpgroups take turns.
std::string tma_name(const TmaTileFacts& tile);

// What keeps a problem from TMA, with the argument's name; empty if nothing does.
std::string tma_fault(const RfConvBnAct& problem, const TmaTileFacts& tile, int64_t images);

// Predicted cycles of a launch over so many pixels.
double tma_cost(const RfConvBnAct& problem, const TmaTileFacts& tile, int64_t pixels,
                const RfGpu& gpu);

// Launches images [first, first + images); 0 or a cudaError_t.
int run_conv_bn_act_tma(const RfConvBnAct& problem, const RfConvPlan& plan, int64_t first,
                        int64_t images, void* stream);

// The launches of one dtype; `blocks`: of the grid.
int launch_conv_bn_act_tma_bfloat16(const ConvTmaArguments& arguments, int index, int32_t blocks,
                                    void* stream);
int launch_conv_bn_act_tma_float16(const ConvTmaArguments& arguments, int index, int32_t blocks,
                                   void* stream);

}  // namespace resnet_fused
