// What the kernel of a whole network is told: its convolutions, one behind the other.
#pragma once

#include <cstdint>

#include "conv_geometry.h"

namespace resnet_fused {

// A convolution of the network. Those between two meetings of the blocks make a phase: none of them
// reads or overwrites what another one of the phase writes.
struct NetworkLayer {
  ConvBnActArguments conv;  // prefetch_bytes: its weights, asked for while the layer ahead runs
  uint32_t parts;           // tiles and their splits
  uint32_t first;           // the block that takes the first of them; the next one takes the next
  int32_t tile;             // its place in the kernel's list
  bool meets;               // it begins a phase: all blocks have done the layers ahead
};

// Of a launch; a longer network takes several. A kernel's parameters have room for so many (CUDA
// C++ Programming Guide, Function Parameters: 32,764 bytes), and what lies there is constant to the
// compiler, as a table in memory would not be.
constexpr int kMostLayers = 64;

struct NetworkArguments {
  uint32_t* counters;  // the barrier's and, 256 bytes behind it, the split tiles'; zeros before the
                       // kernel, and again behind it
  int32_t counter_bytes;
  int32_t count;
  NetworkLayer layer[kMostLayers];
};
static_assert(sizeof(NetworkArguments) <= 32764);

}  // namespace resnet_fused
