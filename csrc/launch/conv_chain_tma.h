// conv_chain for sm_90a: what its plan, its arguments and its launches share. Inside of this room.
#pragma once

#include <cstdint>
#include <string>

#include "../device/chain_tma.h"
#include "conv_chain.h"
#include "conv_chain_tma_tiles.h"
#include "tma_request.h"

namespace resnet_fused {

// Bytes of a tensor's element.
inline int64_t chain_bytes(const RfConvChain& problem) {
  return element_bytes(element_of(problem.dtype));
}

// What the plan and the launch know of a tile at run time.
struct ChainTmaFacts {
  int32_t inner;
  int32_t next;
  int32_t stages;
  int32_t projected;
  int32_t sharing;  // blocks of a cluster, with neighbouring tiles
  int32_t rounds;   // in which `next` goes out
  bool own_rows;    // each warpgroup asks for its own, and the projection may have a stride
  int32_t shared_bytes;
};

// index: in ConvChainTmaTiles.
ChainTmaFacts chain_tma_tile(int index);

template <class Shape>
ChainTmaFacts chain_tma_facts() {
  constexpr int kRounds = (Shape::kNextBoxes + Shape::kNextAtOnce - 1) / Shape::kNextAtOnce;
  return {Shape::kInner,   Shape::kNext, Shape::kStages,  Shape::kProjected,
          Shape::kSharing, kRounds,      Shape::kOwnRows, Shape::kSharedBytes};
}

// "tma_128x64_4s_k64": pixels and channels of next, stages, channels that it reads; behind it
// "_d64", those that the shortcut projects, where it is made for that, and "_2c", blocks that share
// filters.
std::string chain_tma_name(const ChainTmaFacts& tile);

// A tile's entry of a table; row_bytes: of 64 channels.
RfConvConfiguration chain_tma_configuration(int32_t next, int32_t stages, int32_t shared_bytes,
                                            int32_t row_bytes = kStepRowBytes);

// What keeps a problem from a tile, with the argument's name; empty if nothing does. images: of a
// launch.
std::string chain_tma_fault(const RfConvChain& problem, const ChainTmaFacts& tile, int64_t images,
                            const RfGpu& gpu);

// Tiles of a launch over so many pixels, as many for each block of a cluster, and its blocks.
int64_t chain_tma_tiles(const ChainTmaFacts& tile, int64_t pixels);
int64_t chain_tma_blocks(const ChainTmaFacts& tile, int64_t pixels, const RfGpu& gpu);

// Predicted cycles, likewise.
double chain_tma_cost(const RfConvChain& problem, const ChainTmaFacts& tile, int64_t pixels,
                      const RfGpu& gpu);

// What a launch over images [first, first + images) is told, but for its factors; 0 or a
// cudaError_t.
int chain_tma_arguments(const RfConvChain& problem, const ChainTmaFacts& tile, int64_t first,
                        int64_t images, ChainTmaArguments* made);

// Launches them; 0 or a cudaError_t.
int run_conv_chain_tma(const RfConvChain& problem, const RfConvPlan& plan, int64_t first,
                       int64_t images, void* stream);

// A tensor that threads store, in units of 16 bytes as ConvChainArguments has it, from image
// `first` on, of `element` bytes each; `out` as far as it is stored.
ChainResult chain_result(void* data, const int64_t (&size)[4], const int64_t (&stride)[4],
                         int64_t first, int64_t element = kTmaElementBytes);
ChainResult chain_out(const RfConvChain& problem, int64_t first);

// What keeps a problem's shortcut from a tile with room for so many projected channels, 0 for none,
// and for strides; empty if nothing does.
std::string projection_fault(const RfConvChain& problem, int32_t room, bool strided = false);

// The projection's filters, in boxes of what one of so many blocks asks for.
TensorMapRequest projection_request(const RfConvChain& problem, int32_t sharing = 1);

// "72 channels of x, at most 64 fit".
std::string too_many(const char* what, int64_t given, int64_t most);

// The launches of one dtype.
int launch_conv_chain_tma_bfloat16(const ChainTmaArguments& arguments, int index, int32_t blocks,
                                   void* stream);
int launch_conv_chain_tma_float16(const ChainTmaArguments& arguments, int index, int32_t blocks,
                                  void* stream);

}  // namespace resnet_fused
