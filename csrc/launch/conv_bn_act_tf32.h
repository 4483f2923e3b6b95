// conv_bn_act for sm_90a on float32: what its plan and its launch share. Inside of this room.
#pragma once

#include <cstdint>
#include <string>

#include "conv_bn_act_tma.h"
#include "conv_tf32_tiles.h"

namespace resnet_fused {

// index: in ConvTf32Tiles.
TmaTileFacts tf32_tile(int index);
// "tma_tf32_s192x128_3s_2c_2p": behind it as tma_name.
std::string tf32_name(const TmaTileFacts& tile);
RfConvConfiguration tf32_configuration(const TmaTileFacts& tile);

// Operands are rounded to TF32 as they come; the residual and the output are float32.
constexpr TmaTypes kTf32Types{TensorElement::kTfloat32, TensorElement::kFloat32,
                              TensorElement::kFloat32};

// What keeps a problem from it, with the argument's name; empty if nothing does.
std::string tf32_fault(const RfConvBnAct& problem, const TmaTileFacts& tile, int64_t images);

// Launches images [first, first + images); 0 or a cudaError_t.
int run_conv_bn_act_tf32(const RfConvBnAct& problem, const RfConvPlan& plan, int64_t first,
                         int64_t images, void* stream);

int launch_conv_bn_act_tf32(const ConvTmaArguments& arguments, int index, int32_t blocks,
                            void* stream);

}  // namespace resnet_fused
