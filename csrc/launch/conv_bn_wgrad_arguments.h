// From a problem of conv_bn_wgrad and its plan to what the kernels are told. Pure functions, inside
// of this room.
#pragma once

#include <cstdint>

#include "../device/image_shape.h"
#include "conv_bn_wgrad.h"
#include "conv_gradient_arguments.h"
#include "wgrad_tma.h"

namespace resnet_fused {

// Whether everything that is read can be read 16 bytes at a time.
bool bn_wgrad_reads_wide(const RfConvBnWgrad& problem);

// What keeps a problem from the kernel for images of a few channels; null if nothing.
const char* wgrad_image_fault(const RfConvBnWgrad& problem);
// Pixels of a row of so many, in whole steps of that kernel.
constexpr int64_t image_pixels(int64_t pixels) {
  return divide_up(pixels, kImagePixels) * kImagePixels;
}

// Whether the gradient's columns can be counted by 16 channels, all nine taps of them.
bool bn_wgrad_goes_by_slices(const RfConvGradient& problem);

ConvBnWgradArguments conv_bn_wgrad_arguments(const RfConvBnWgrad& problem, const RfConvPlan& plan,
                                             void* workspace);

// For sm_90a; index: in WgradTmaTiles.
int launch_conv_bn_wgrad_tma_bfloat16(const ConvBnWgradTmaArguments& arguments, int index,
                                      void* stream);
int launch_conv_bn_wgrad_tma_float16(const ConvBnWgradTmaArguments& arguments, int index,
                                     void* stream);

// The launches of one dtype, each in a file of its own to be compiled side by side.
int launch_conv_bn_wgrad_bfloat16(const ConvBnWgradArguments& arguments, int configuration,
                                  void* stream);
int launch_conv_bn_wgrad_float16(const ConvBnWgradArguments& arguments, int configuration,
                                 void* stream);
int launch_conv_bn_wgrad_float32(const ConvBnWgradArguments& arguments, int configuration,
                                 void* stream);

}  // namespace resnet_fused
