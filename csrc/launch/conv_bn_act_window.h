// conv_bn_act's window kernel for sm_90a: what its plan, its arguments and its launches share.
// Inside of this room.
#pragma once

#include <cstdint>
#include <string>

#include "../device/conv_window.h"
#include "conv_bn_act.h"
#include "conv_window_tiles.h"
#include "tensor_map.h"
#include "window_request.h"

namespace resnet_fused {

// What the plan and the launch know of a tile at run time.
struct WindowTileFacts {
  int32_t pixels;      // positions
  int32_t row_bytes;   // of a position's channels
  int32_t passes;      // products side by side
  int32_t windows_at;  // bytes of shared memory in front of the windows
  // Taps' filters in flight where channels come in slices of 64; 0: those of 64 stay.
  int32_t filter_stages = 0;
};
template <class Shape>
constexpr WindowTileFacts window_facts() {
  WindowTileFacts facts{Shape::kPixels, Shape::kRowBytes, Shape::kPasses, Shape::kWindowsAt};
  if constexpr (requires { Shape::kFilterStages; }) facts.filter_stages = Shape::kFilterStages;
  return facts;
}
// index: in ConvWindowTiles.
WindowTileFacts window_tile(int index);

// "tma_win192x64_2w": pixels, channels, windows; "_6s": stages of filters, where these do not stay.
std::string window_name(const WindowTileFacts& tile);

// Its entry of a table, but for the name. Its windows' size hangs on the width of an image; at most
// they fill a block's shared memory.
RfConvConfiguration window_configuration(const WindowTileFacts& tile);

// Of a block, for images so wide.
int64_t window_shared_bytes(const WindowTileFacts& tile, int64_t width);

// Positions of a walk over so many images, up to the last pixel.
int64_t window_positions(const RfConvBnAct& problem, int64_t images);

// What keeps a problem from every window kernel: they are made for 3x3 filters that lie on every
// pixel, 64 channels, or more of them in slices, and threads that store 16 bytes at a time; empty
// if nothing does.
std::string window_shape_fault(const RfConvBnAct& problem, bool slices = false);
std::string window_out_fault(const RfConvBnAct& problem, TensorElement out);

// What keeps a problem from the window kernel, with the argument's name; empty if nothing does. x,
// weight and residual are the problem's dtype; out's elements may be others.
std::string window_fault(const RfConvBnAct& problem, TensorElement out, const WindowTileFacts& tile,
                         int64_t images);

// Of a launch over so many positions: each block has one column of tiles.
int64_t window_blocks(const RfConvBnAct& problem, const WindowTileFacts& tile, int64_t positions,
                      const RfGpu& gpu);

// What else a tile takes: bytes of shared memory's traffic, and cycles of those who transform, for
// each of its windows; cycles more of its results.
struct WindowWork {
  double transformed;
  double transforming;
  double results;
};
// Predicted cycles, likewise.
double window_cost(const RfConvBnAct& problem, TensorElement out, const WindowTileFacts& tile,
                   int64_t positions, const RfGpu& gpu, const WindowWork& work = {});

// Of tiles of so many positions: all arguments but the maps.
ConvWindowArguments window_arguments_but_maps(const RfConvBnAct& problem, TensorElement element,
                                              int32_t pixels, const WindowParts& parts,
                                              int64_t first, int64_t images);

// The arguments of a launch of images [first, first + images), of which window_fault finds nothing;
// 0 or a cudaError_t.
int window_arguments(const RfConvBnAct& problem, TensorElement out, const WindowTileFacts& tile,
                     int64_t first, int64_t images, ConvWindowArguments* made);

// Blocks, and bytes of shared memory of each.
struct WindowGrid {
  int32_t blocks;
  int32_t shared_bytes;
};
// Of a launch with these arguments; the last one may have fewer tiles than the first, of which the
// plan tells.
WindowGrid window_grid(const ConvWindowArguments& arguments, const WindowTileFacts& tile,
                       const RfConvPlan& plan);

// Launches images [first, first + images); 0 or a cudaError_t.
int run_conv_bn_act_window(const RfConvBnAct& problem, const RfConvPlan& plan, int64_t first,
                           int64_t images, void* stream);

// The launches of one dtype.
int launch_conv_bn_act_window_bfloat16(const ConvWindowArguments& arguments, int index,
                                       const WindowGrid& grid, void* stream);
int launch_conv_bn_act_window_float16(const ConvWindowArguments& arguments, int index,
                                      const WindowGrid& grid, void* stream);

}  // namespace resnet_fused
