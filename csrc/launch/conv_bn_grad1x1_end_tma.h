// The launches of conv_bn_grad1x1_end for sm_90a. Inside of this room.
#pragma once

#include "../device/grad1x1_tma.h"

namespace resnet_fused {

// The launches of one dtype. index: in Grad1x1EndTmaTiles.
int launch_conv_bn_grad1x1_end_tma_bfloat16(const Grad1x1EndTmaArguments& arguments, int index,
                                            void* stream);
int launch_conv_bn_grad1x1_end_tma_float16(const Grad1x1EndTmaArguments& arguments, int index,
                                           void* stream);

}  // namespace resnet_fused
