// What conv_bn_act for sm_90a multiplies and stores, by the type that its kernel is made for: here
// tensors of 16 bits, all alike. Others specialise it.
#pragma once

#include "warpgroup_epilogue.h"
#include "warpgroup_shape.h"

namespace resnet_fused {

template <class T>
struct ConvTypes {
  using Operand = T;
  using Result = T;
  // Whether each step's products are added up by themselves, and to the sums by the threads.
  static constexpr bool kInParts = false;

#if defined(RF_HAS_WGMMA)
  template <Orientation kOrientation, int kColumns>
  using Epilogue = WarpgroupEpilogue<T, kOrientation, kColumns>;

  // What the epilogue is told beside scale and shift.
  template <class Arguments>
  static RF_DEVICE float act(const Arguments& arguments) {
    return arguments.floor;
  }
#endif
};

}  // namespace resnet_fused
