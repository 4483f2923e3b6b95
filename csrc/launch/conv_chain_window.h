// conv_chain for sm_90a with a 3x3 convolution in front: what its plan, its arguments and its
// launches share. Inside of this room.
#pragma once

#include <cstdint>
#include <string>

#include "../device/chain_window.h"
#include "conv_chain.h"
#include "conv_chain_window_tiles.h"

namespace resnet_fused {

// What the plan and the launch know of a tile at run time.
struct ChainWindowFacts {
  int32_t front;
  int32_t next;
  int32_t steps;
  int32_t stages;
  int32_t projected;
  int32_t sharing;       // blocks of a cluster, with neighbouring tiles
  FilterBytes staying;   // for the block's life
  FilterBytes streamed;  // for each tile
  int32_t window_at;     // bytes of shared memory in front of the window
};
// index: in ConvChainWindowTiles.
ChainWindowFacts chain_window_tile(int index);

// "tma_win128x64_3s_front64": positions and channels of next, stages, channels in front; behind it
// "_d64", those that the shortcut projects, where it is made for that, and "_2c", blocks that share
// filters.
std::string chain_window_name(const ChainWindowFacts& tile);

// Of a block, for rows of so many pixels.
int64_t chain_window_shared_bytes(const ChainWindowFacts& tile, int64_t width);

// What keeps a problem from a tile, with the argument's name; empty if nothing does. images: of a
// launch.
std::string chain_window_fault(const RfConvChain& problem, const ChainWindowFacts& tile,
                               int64_t images, const RfGpu& gpu);

// Tiles of a launch over so many images, as many for each block of a cluster, and its blocks.
int64_t chain_window_tiles(const RfConvChain& problem, const ChainWindowFacts& tile,
                           int64_t images);
int64_t chain_window_blocks(const RfConvChain& problem, const ChainWindowFacts& tile,
                            int64_t images, const RfGpu& gpu);

// Predicted cycles, likewise.
double chain_window_cost(const RfConvChain& problem, const ChainWindowFacts& tile, int64_t images,
                         const RfGpu& gpu);

// Launches images [first, first + images); 0 or a cudaError_t.
int run_conv_chain_window(const RfConvChain& problem, const RfConvPlan& plan, int64_t first,
                          int64_t images, void* stream);

// The launches of one dtype; `blocks`: of the grid, `shared_bytes` of a block.
int launch_conv_chain_window_bfloat16(const ChainWindowArguments& arguments, int index,
                                      int32_t blocks, int32_t shared_bytes, void* stream);
int launch_conv_chain_window_float16(const ChainWindowArguments& arguments, int index,
                                     int32_t blocks, int32_t shared_bytes, void* stream);

}  // namespace resnet_fused
