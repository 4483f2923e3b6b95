// conv_bn_act for sm_90a: what its plan, its arguments and its launches share. Inside of this room.
#pragma once

#include <cstdint>
#include <string>

#include "../device/tma_conv.h"
#include "conv_bn_act.h"
#include "conv_strides.h"
#include "conv_tma_tiles.h"
#include "tensor_map.h"

namespace resnet_fused {

// What the plan and the launch know of a tile at run time.
struct TmaTileFacts {
  bool pixels_left;
  bool together;
  int32_t pixels;
  int32_t channels;
  int32_t stages;
  int32_t stored_pixels;
  int32_t stored_channels;
  int32_t shared_bytes;
  int32_t sharing;  // blocks of a cluster
  // A step's filters are rows of the reduction, as they lie for the forward convolution, and not of
  // the output's channels.
  bool across = false;
  int32_t pixel_sharing = 1;  // of them those of one tile of pixels

  constexpr int32_t filter_sharing() const { return sharing / pixel_sharing; }
  // Rows of a step that a block asks for itself.
  constexpr int32_t filters_asked() const { return channels / filter_sharing(); }
  constexpr int32_t pixels_asked() const { return pixels / pixel_sharing; }
};
template <class Shape>
constexpr TmaTileFacts facts_of() {
  TmaTileFacts facts{Shape::kPixelsLeft,
                     Shape::kTogether,
                     Shape::kPixels,
                     Shape::kChannels,
                     Shape::kStages,
                     Shape::kStoredPixels,
                     Shape::kPixelsLeft ? Shape::kChannels : kWarpgroupRows,
                     Shape::kSharedBytes,
                     Shape::kSharing};
  if constexpr (Shape::kSharing > 1) facts.pixel_sharing = Shape::kPixelSharing;
  return facts;
}
// index: in ConvTmaTiles.
TmaTileFacts tma_tile(int index);

// "tma_p128x256_3s": pixels on the left side, or s for channels; "_t": its warpgroups take turns;
// "_2c": two blocks of a cluster share their filters; "_4p": four share their pixels.
std::string tma_name(const TmaTileFacts& tile);
// Its entry of a table, but for the name.
RfConvConfiguration tma_configuration(const TmaTileFacts& tile);

// What the tensors' elements are to TMA: x's and weight's, the residual's, out's. e4m3 is kUint8.
struct TmaTypes {
  TensorElement operands;
  TensorElement residual;
  TensorElement out;
};
// Of a problem whose tensors are all alike, of 16 bits.
TmaTypes tma_types(const RfConvBnAct& problem);

// What keeps a problem from TMA, with the argument's name; empty if nothing does.
std::string tma_fault(const RfConvBnAct& problem, const TmaTypes& types, const TmaTileFacts& tile,
                      int64_t images);
// What keeps sizes alone from it, and what keeps the weight.
std::string tma_shape_fault(const RfConvBnAct& problem, const TmaTypes& types);
std::string tma_weight_fault(const RfConvBnAct& problem, TensorElement element,
                             const TmaTileFacts& tile);
// What keeps x alone from it. pixels: what it is called there.
std::string tma_pixels_fault(const RfConvBnAct& problem, TensorElement element,
                             const TmaTileFacts& tile, int64_t images, const char* pixels);

// What keeps a tensor that lies as the output does from it.
std::string tma_output_fault(const char* name, const RfConvBnAct& problem, TensorElement element,
                             const TmaTileFacts& tile, const void* at, const int64_t (&stride)[4],
                             int64_t images);
// Its map; 0 or a cudaError_t.
int encode_tma_output(const RfConvBnAct& problem, TensorElement element, const TmaTileFacts& tile,
                      const void* at, const int64_t (&stride)[4], int64_t first, int64_t images,
                      ptx::TensorMap* map);

// What of its taps im2col cannot count, whatever the tensors.
std::string tma_taps_fault(const RfConvBnAct& problem);

// Whether x comes as a matrix of pixels: a 1x1 filter over all of them.
bool tma_is_dense(const RfConvBnAct& problem);
// x's map for images [first, first + images); 0 or a cudaError_t.
int encode_tma_pixels(const RfConvBnAct& problem, TensorElement element, const TmaTileFacts& tile,
                      int64_t first, int64_t images, ptx::TensorMap* map);

// What a step takes where its pixels are transformed: bytes of shared memory's traffic, and cycles
// of those who do it.
struct StepTransform {
  double bytes;
  double cycles;
};
// Predicted cycles of a launch over so many pixels.
double tma_cost(const RfConvBnAct& problem, const TmaTypes& types, const TmaTileFacts& tile,
                int64_t pixels, const RfGpu& gpu, const StepTransform& transform = {});

// Everything but the maps of x and of what lies as the output does, and but the pixels: for so many
// images of an output's size.
int tma_common_arguments(const RfConvBnAct& problem, const TmaTypes& types,
                         const TmaTileFacts& tile, ConvTmaArguments* made);
void tma_set_pixels(const RfConvBnAct& problem, const TmaTileFacts& tile, int64_t images,
                    const OutputSize& size, ConvTmaArguments* made);
// The arguments of a launch of images [first, first + images), of which tma_fault finds nothing; 0
// or a cudaError_t.
int tma_arguments(const RfConvBnAct& problem, const TmaTypes& types, const TmaTileFacts& tile,
                  int64_t first, int64_t images, ConvTmaArguments* made);

// Tiles of pixels times tiles of channels, as wide as a cluster.
int64_t tma_tiles(const RfConvBnAct& problem, const TmaTileFacts& tile, int64_t pixels);
// The blocks that stay for them, whole clusters.
int64_t tma_blocks(const RfConvBnAct& problem, const TmaTileFacts& tile, int64_t pixels,
                   const RfGpu& gpu);
// Likewise for a launch of its own, as the plan says.
int32_t tma_blocks(const ConvTmaArguments& arguments, const TmaTileFacts& tile,
                   const RfConvPlan& plan);

// Launches images [first, first + images); 0 or a cudaError_t.
int run_conv_bn_act_tma(const RfConvBnAct& problem, const RfConvPlan& plan, int64_t first,
                        int64_t images, void* stream);

// The launches of one dtype; `blocks`: of the grid.
int launch_conv_bn_act_tma_bfloat16(const ConvTmaArguments& arguments, int index, int32_t blocks,
                                    void* stream);
int launch_conv_bn_act_tma_float16(const ConvTmaArguments& arguments, int index, int32_t blocks,
                                   void* stream);

}  // namespace resnet_fused
