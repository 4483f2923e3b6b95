// Gradients of an input for sm_90a: what the plans, arguments and launches of conv_dgrad and
// conv_bn_dgrad share. Inside of this room.
//
// By a stride of 1 the gradient of an input is a convolution itself, so that all but the filters'
// boxes and what is read beside dy is conv_bn_act's (conv_bn_act_tma.h).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../device/dgrad_tma.h"
#include "conv_bn_act_tma.h"
#include "conv_gradients.h"

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

// The convolution of dy that a gradient by a stride of 1 is. Weight keeps its memory: channels have
// changed sides in sizes and strides, and taps are walked backwards.
RfConvBnAct convolution_of(const RfConvGradient& problem);

// What an op's kernel does beside the products.
struct DgradWork {
  bool reads_y;      // beside dy
  double turning;    // instructions that two elements of dy take until they are an operand
  double finishing;  // that an element of the result takes beside its rounding
  double ends;       // elements that a tile reads and writes at its end, for each of the result's
};
// What an op calls dy, and what it is multiplied by.
struct DgradNames {
  const char* dy;
  const char* vectors;
};

// What keeps a problem from a tile, with the argument's name; empty if nothing does.
std::string dgrad_tma_fault(const RfConvGradient& problem, const TmaTileFacts& tile,
                            const DgradNames& names, bool reads_y, int64_t images);

// Of one launch over so many images: predicted cycles, and its blocks.
double dgrad_tma_cost(const RfConvGradient& problem, const TmaTileFacts& tile,
                      const DgradWork& work, int64_t images, const RfGpu& gpu);
int64_t dgrad_tma_blocks(const RfConvGradient& problem, const TmaTileFacts& tile, int64_t images,
                         const RfGpu& gpu);

// The arguments of a launch of images [first, first + images), of which dgrad_tma_fault finds
// nothing; 0 or a cudaError_t.
int dgrad_tma_arguments(const RfConvGradient& problem, const TmaTileFacts& tile, bool reads_y,
                        int64_t first, int64_t images, ConvDgradTmaArguments* made);

}  // namespace resnet_fused
