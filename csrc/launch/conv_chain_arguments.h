// From a chain and its plan to what the kernel is told. Pure functions, inside of this room.
#pragma once

#include <cstdint>

#include "../device/chain_geometry.h"
#include "conv_chain.h"
#include "conv_plan.h"
#include "conv_strides.h"

namespace resnet_fused {

// What keeps the kernel from reading or writing a chain's tensors 16 bytes at a time, by name; null
// if nothing does.
const char* not_wide(const RfConvChain& problem);

// How many images 31 bits of 16 bytes reach over in every tensor; 0 if they do not over filters.
int64_t images_in_reach(const RfConvChain& problem);

// Images of a launch: pixels and places in 31 bits; 0: one is too much.
int64_t chain_images(const RfConvChain& problem);

// Sizes that no launch takes.
int32_t check_chain(const RfConvChain& problem, const Refusal& refuse);

// How many channels a configuration has room for in front; 0: it is made for chains without.
int32_t chain_front(int32_t configuration);

// What a block's shared memory depends on, beside its configuration.
ChainSizes chain_sizes(const RfConvChain& problem);

// Shared memory of a block of a configuration.
ChainMemory chain_memory(const RfConvChain& problem, int32_t configuration);

// The arguments for images [first, first + images).
ConvChainArguments conv_chain_arguments(const RfConvChain& problem, const RfConvPlan& plan,
                                        int64_t first, int64_t images);

// The launches of one dtype, each in a file of its own to be compiled side by side.
int launch_conv_chain_bfloat16(const ConvChainArguments& arguments, int configuration,
                               void* stream);
int launch_conv_chain_float16(const ConvChainArguments& arguments, int configuration, void* stream);

}  // namespace resnet_fused
