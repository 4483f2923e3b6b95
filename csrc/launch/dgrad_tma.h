// Gradients of an input for sm_90a: what the plans, arguments and launches of conv_dgrad and
// conv_bn_dgrad share. Inside of this room.
//
// The gradient of a phase of the stride is a convolution itself, so that filters and what is stored
// without gaps are conv_bn_act's (conv_bn_act_tma.h); dgrad_phases.h has the rest.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "../device/dgrad_tma.h"
#include "conv_bn_act_tma.h"
#include "conv_gradients.h"
#include "dgrad_phases.h"

namespace resnet_fused {

// An entry of a table (conv_plan.h).
struct DgradTmaEntry {
  std::string name;
  RfConvConfiguration configuration;
};

template <class Tiles>
TmaTileFacts dgrad_tma_tile(int index) {
  return Tiles::with(index, []<class Shape>() {
    TmaTileFacts tile = facts_of<Shape>();
    tile.across = true;
    return tile;
  });
}
template <class Tiles>
const std::vector<DgradTmaEntry>& dgrad_tma_table() {
  static const std::vector<DgradTmaEntry> made = [] {
    std::vector<DgradTmaEntry> entries;
    for (int i = 0; i < Tiles::kSize; ++i) {
      const TmaTileFacts tile = dgrad_tma_tile<Tiles>(i);
      entries.push_back({tma_name(tile), tma_configuration(tile)});
    }
    return entries;
  }();
  return made;
}

// The convolution of dy by a stride of 1 that a gradient is, of one phase with all of the filter's
// taps. Weight keeps its memory: channels have changed sides in sizes and strides, and taps are
// walked backwards.
RfConvBnAct convolution_of(const RfConvGradient& problem);

// What an op's kernel does beside the products.
struct DgradWork {
  bool reads_y;      // beside dy
  double turning;    // instructions that two elements of dy take until they are an operand
  double finishing;  // that an element of the result takes beside its rounding
  double ends;       // elements that a tile reads and writes at its end, for each of the result's
  double loads = 0;  // of channels' values, that a warp makes a step by wgmma
  double waits = 0;  // cycles that a warpgroup waits for its tile's end, its products beside
  double asked = 0;  // of `ends` those that L2 is asked for, where they are counted
};
// What an op calls dy, what it is multiplied by, and dx.
struct DgradNames {
  const char* dy;
  const char* vectors;
  const char* result = "out";
};

// What keeps a problem from a tile, with the argument's name; empty if nothing does.
std::string dgrad_tma_fault(const RfConvGradient& problem, const TmaTileFacts& tile,
                            const DgradNames& names, bool reads_y, int64_t images);

// Of one launch over so many images: predicted cycles, and its blocks, whole clusters.
double dgrad_tma_cost(const RfConvGradient& problem, const TmaTileFacts& tile,
                      const DgradWork& work, int64_t images, const RfGpu& gpu);
int64_t dgrad_tma_blocks(const RfConvGradient& problem, const TmaTileFacts& tile, int64_t images,
                         const RfGpu& gpu);

// What keeps a tensor that lies as dx does from it; `step`: there is but every so many-th pixel.
std::string dgrad_tma_output_fault(const char* name, const RfConvGradient& problem,
                                   const TmaTileFacts& tile, const Placed& tensor, int64_t images,
                                   int64_t step = 1);
// The map of a phase's part of images [first, first + images); 0 or a cudaError_t.
int encode_dgrad_output(const RfConvGradient& problem, const DgradPhaseFacts& phase,
                        const TmaTileFacts& tile, const Placed& tensor, int64_t first,
                        int64_t images, ptx::TensorMap* map, int64_t step = 1);

// The arguments of a launch of images [first, first + images), of which dgrad_tma_fault finds
// nothing, by so many blocks at most; 0 or a cudaError_t.
int dgrad_tma_arguments(const RfConvGradient& problem, const TmaTileFacts& tile, bool reads_y,
                        int64_t first, int64_t images, int64_t blocks, ConvDgradTmaArguments* made);

// The blocks of that launch, whole clusters.
inline int32_t dgrad_tma_grid(const ConvDgradTmaArguments& arguments, const TmaTileFacts& tile,
                              const RfConvPlan& plan) {
  return static_cast<int32_t>(std::min(int64_t{arguments.tiles.count} * tile.sharing, plan.blocks));
}

}  // namespace resnet_fused
