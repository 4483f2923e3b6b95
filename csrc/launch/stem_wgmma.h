// The stem for sm_90a: its shapes, whose indices follow those of stem_tiles.h, and what the plan
// and the launch know of them. Inside of this room.
#pragma once

#include <cstdint>
#include <string>

#include "../device/stem_warpgroup.h"
#include "conv_bn_act.h"
#include "conv_tiles.h"
#include "stem_tiles.h"

namespace resnet_fused {

// Columns of the convolution. A product of 112 takes 79% of shared memory's bandwidth, one of 64
// all of it.
using StemWgmmaShapes = TileList<  //
    StemWarpgroupShape<112>,       // 56 pooled columns: a row of 224x224 images
    StemWarpgroupShape<64>>;       // 32: other widths, and too few images to fill the GPU

constexpr int kFirstStemWgmma = StemShapes::kSize;

// "tma_56x64_8s": pooled columns, filters, stages of the ring. The prefix, which tells what GPUs of
// capability 9.0 alone run, is that of the convolutions; nothing comes by TMA here.
std::string stem_wgmma_name(int index);
RfConvConfiguration stem_wgmma_configuration(int index);

// Tiles along a row of the pooled image.
int64_t stem_wgmma_tiles(int index, int64_t out_width);

// Predicted cycles: so many strips of all multiprocessors, each of so many pooled rows.
double stem_wgmma_cost(int index, int64_t items, int64_t rows, const RfGpu& gpu);

// The launches of one dtype; blocks: along x.
int launch_stem_wgmma_bfloat16(const StemArguments& arguments, int index, int32_t blocks,
                               void* stream);
int launch_stem_wgmma_float16(const StemArguments& arguments, int index, int32_t blocks,
                              void* stream);

}  // namespace resnet_fused
