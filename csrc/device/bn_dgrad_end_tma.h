// What conv_bn_dgrad_end for sm_90a is told. Numbers alone: the launches know it as well.
#pragma once

#include "bn_dgrad_tma.h"

namespace resnet_fused {

struct ConvBnDgradEndTmaArguments {
  // Always reduced; of norm the mean alone is read.
  ConvBnDgradTmaArguments image;
  // Mapped as dx is.
  ptx::TensorMap out[kMostPhases];
  ptx::TensorMap residual[kMostPhases];
  const float* residual_mean;  // [C]
  bool projected;              // residual and its mean are read
  ThirdSums third;
};

}  // namespace resnet_fused
