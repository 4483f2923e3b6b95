// conv_bn_act's window kernel for sm_90a: what its plan, its arguments and its launches share.
// Inside of this room.
#pragma once

#include <cstdint>
#include <string>

#include "../device/conv_window.h"
#include "conv_bn_act.h"
#include "conv_window_tiles.h"

namespace resnet_fused {

// What the plan and the launch know of a tile at run time.
struct WindowTileFacts {
  int32_t pixels;      // positions
  int32_t windows_at;  // bytes of shared memory in front of the windows
};
// index: in ConvWindowTiles.
WindowTileFacts window_tile(int index);

// "tma_win192x64_2w": pixels, channels, windows.
std::string window_name(const WindowTileFacts& tile);

// Positions of a walk over so many images, up to the last pixel.
int64_t window_positions(const RfConvBnAct& problem, int64_t images);

// What keeps a problem from the window kernel, with the argument's name; empty if nothing does.
std::string window_fault(const RfConvBnAct& problem, const WindowTileFacts& tile, int64_t images);

// Of a launch over so many positions: each block has one column of tiles.
int64_t window_blocks(const RfConvBnAct& problem, const WindowTileFacts& tile, int64_t positions,
                      const RfGpu& gpu);

// Predicted cycles, likewise.
double window_cost(const RfConvBnAct& problem, const WindowTileFacts& tile, int64_t positions,
                   const RfGpu& gpu);

// Launches images [first, first + images); 0 or a cudaError_t.
int run_conv_bn_act_window(const RfConvBnAct& problem, const RfConvPlan& plan, int64_t first,
                           int64_t images, void* stream);

// The launches of one dtype; `blocks`: of the grid, `shared_bytes` of a block.
int launch_conv_bn_act_window_bfloat16(const ConvWindowArguments& arguments, int index,
                                       int32_t blocks, int32_t shared_bytes, void* stream);
int launch_conv_bn_act_window_float16(const ConvWindowArguments& arguments, int index,
                                      int32_t blocks, int32_t shared_bytes, void* stream);

}  // namespace resnet_fused
