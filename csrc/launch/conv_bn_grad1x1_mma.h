// What the plans of conv_bn_grad1x1 and conv_bn_grad1x1_end share of their configurations by
// mma.sync: a table's entry and its predicted cycles. Inside of this room.
#pragma once

#include <algorithm>
#include <string>

#include "conv_bn_grad1x1_arguments.h"
#include "conv_gradient_choice.h"

namespace resnet_fused {

// A configuration, and the bytes of shared memory that a step of it moves.
struct Grad1x1MmaEntry {
  std::string name;
  RfConvConfiguration configuration;
  double gradient;    // of dz, or y
  double input;       // of x
  double multiplied;  // fragments of both products
};

template <class Shape>
Grad1x1MmaEntry grad1x1_mma_entry() {
  constexpr int32_t kBytes = 2;  // of an element
  constexpr int kWarpsX = Shape::kWarps / Shape::kWarpsP;
  constexpr int kWarpsC = Shape::kWarps / Shape::kWarpsK;
  Grad1x1MmaEntry made;
  made.name = std::to_string(Shape::kFilters) + "x" + std::to_string(Shape::kChannels) + "_" +
              std::to_string(Shape::kWarps) + "w" + std::to_string(Shape::kStages) + "s";
  made.configuration = {nullptr,
                        1,
                        Shape::kFilters,
                        Shape::kChannels,
                        Shape::kWarpsK,
                        kWarpsC,
                        Shape::kStages,
                        Shape::kBlocks,
                        Shape::kPixels * kBytes,
                        Shape::kSharedBytes,
                        0};
  made.gradient = Shape::kGradientBytes;
  made.input = Shape::kInputBytes;
  made.multiplied = 1.0 * kWarpsC * Shape::kGradientBytes + Shape::kWarpsK * Shape::kInputBytes +
                    kWarpsX * Shape::kGradientBytes + Shape::kWarpsP * Shape::kWeightBytes;
  return made;
}

// What a step takes beside its operands and products.
struct Grad1x1MmaWork {
  double turned;       // of x's tile: bytes in shared memory, so many times, until it is multiplied
  double turning;      // instructions of an element of it
  double tensors = 0;  // of x's size, read past shared memory
  double finished = 0;   // as `turned`, for mask and sums, and while dx is put together
  double finishing = 0;  // instructions of an element beside those of its rounding
};

// Blocks that a multiprocessor runs at one time.
inline int64_t grad1x1_resident(const RfConvConfiguration& tile, const RfGpu& gpu) {
  const int64_t fit = gpu.shared_per_multiprocessor / (tile.shared_bytes + 1024);
  return std::clamp<int64_t>(fit, 1, tile.blocks);
}

// Cycles, predicted, as `cost` predicts those of other gradients: each step at its limit, and
// beside it what keeps a block, not its neighbours, from multiplying. dz and y come from memory
// once, to all blocks that share them.
inline double grad1x1_mma_cycles(const RfConvBnDgrad& image, const Grad1x1MmaEntry& entry,
                                 const Grad1x1MmaWork& work, int64_t parts, const RfGpu& gpu) {
  const RfConvConfiguration& tile = entry.configuration;
  const RfConvGradient& conv = image.conv;
  const int64_t each = tile.step_bytes / 2;  // pixels of a step
  const int64_t all = conv.x_size[0] * conv.x_size[2] * conv.x_size[3];
  const int64_t across = divide_up(conv.weight_size[1], int64_t{tile.n});
  const auto columns = static_cast<double>(across);
  const auto pixels = static_cast<double>(each);
  const double blocks = static_cast<double>(parts) * columns;
  const auto busy = static_cast<double>(divide_up(parts * across, int64_t{gpu.multiprocessors}));
  const double above =
      static_cast<double>(conv.weight_size[0]) * (image.affine != 0 ? 2 : 1) * tile.step_bytes;
  const double below = static_cast<double>(conv.weight_size[1]) / columns * tile.step_bytes;
  const double thinned = static_cast<double>(image.addend_step) * image.addend_step;
  const double added = (image.added != 0 ? below / thinned : 0) + work.tensors * below;

  const double memory = (above / columns + 2 * below + added) / kMemoryBytes;
  const double cache = (above + below + added) / kCacheBytes;
  const double matrix = 2.0 * pixels * tile.m * tile.n / kMatrixUnit;
  const double shared = (entry.multiplied + above + below) / kSharedBytes;
  const double neighbours = std::min(busy, static_cast<double>(grad1x1_resident(tile, gpu)));
  const double latency = kLatency / ((tile.stages - 1) * neighbours);
  const double step = std::max({memory, cache, latency, matrix, shared});

  const double turned = 3 * entry.gradient + work.turned * entry.input;
  const double turning =
      pixels * (tile.m * (image.affine != 0 ? kBackwardInstructions : 0) + tile.n * work.turning);
  const double finishing = pixels * tile.n * (kEndInstructions + work.finishing);
  const double pause =
      std::max(turning / kInstructions, turned / kSharedBytes) +
      std::max(finishing / kInstructions, work.finished * entry.input / kSharedBytes) +
      2 * kTurnLatency;
  const auto steps = static_cast<double>(divide_up(divide_up(all, each), parts));
  const double block = steps * (step + pause / neighbours) + 2 * kLatency / neighbours;
  return busy * block + left_and_merged(tile, blocks, gpu);
}

}  // namespace resnet_fused
