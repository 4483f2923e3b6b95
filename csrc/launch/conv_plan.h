// What the plans of all convolutions share: the rates of a GPU, limits, and refusals. Inside of
// this room.
#pragma once

#include <algorithm>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <vector>

#include "../device/bn_act.h"
#include "../device/conv_geometry.h"
#include "conv_bn_act_arguments.h"

namespace resnet_fused {

// What one multiprocessor does in a clock cycle, for an H200. None has been measured by this
// project on a GPU; only their proportions matter.
constexpr double kMatrixUnit = 4 * 323;  // products of 16 bits: mma.sync at 0.63 of wgmma's rate
constexpr double kWarpgroupUnit = 2048 * 0.85;  // likewise by wgmma
constexpr double kSharedBytes = 128;            // the documented width of shared memory
constexpr double kCacheBytes = 28;     // from L2, when all multiprocessors read different lines
constexpr double kSameLines = 45;      // from L2, when all read the same
constexpr double kMemoryBytes = 22;    // from memory
constexpr double kInstructions = 128;  // of single threads: four warps
constexpr double kResults = 36;        // that an epilogue behind wgmma makes
// Cycles until a load from L2 or memory has come.
constexpr double kLatency = 800;
// Cycles that a block waits while it turns what has landed in shared memory: loads, a store, the
// barrier.
constexpr double kTurnLatency = 100;
// Cycles that splits cost beside their traffic: the counters' clearing and the arrivals, or a
// second kernel.
constexpr double kMeeting = 3000;
constexpr double kClusterMeeting = 250;  // cycles of a barrier of a cluster
// Instructions that a narrow operand's element takes: its bounds, its address, its load.
constexpr double kNarrowInstructions = 10;

// Blocks that any configuration lets run on a multiprocessor at once, for plans that ask whether
// all of a launch do.
constexpr int64_t kResident = 2;

// A launch counts pixels, blocks and places in a reduction in 31 bits, with room to round up.
constexpr int64_t kMost = (int64_t{1} << 31) - 4096;

using Long = long long;  // what %lld prints

// How many of the `busy` blocks that come to a multiprocessor are on it at once.
inline double resident_blocks(const RfConvConfiguration& tile, int64_t shared_bytes, double busy,
                              const RfGpu& gpu) {
  const int64_t fit = gpu.shared_per_multiprocessor / (shared_bytes + 1024);
  return std::min(
      {busy, static_cast<double>(tile.blocks), std::max(1.0, static_cast<double>(fit))});
}

// What a step of a block takes beside its products.
struct StepWork {
  double brought;      // bytes from L2 into shared memory
  double turned = 0;   // bytes read and written there, to be turned in their place
  double turning = 0;  // cycles of the instructions that do it
};

// Cycles of a block's step at its limit: the tensor cores, shared memory, the cache, the latency
// that the stages and the neighbours do not hide, or the instructions of narrow loads and turning.
inline double step_cycles(const RfConvConfiguration& tile, const StepWork& work, int64_t bytes,
                          double resident) {
  const double slices = tile.step_bytes / 32.0;
  // m16n8k16 in 16 bits and m16n8k8 in TF32 take the same time for the same bytes.
  const double matrix = slices * tile.m * tile.n * 16 / kMatrixUnit;
  const double read = slices * 32.0 * (tile.m * tile.warps_n + tile.n * tile.warps_m);
  const double shared = (read + work.brought + work.turned) / kSharedBytes;
  const double cache = work.brought / kCacheBytes;
  const double latency = kLatency / ((tile.stages - 1) * resident);
  const double elements = work.brought / static_cast<double>(bytes);
  const double narrow = tile.wide != 0 ? 0 : elements * kNarrowInstructions / kInstructions;
  return std::max({matrix, shared, cache, latency, narrow + work.turning});
}

// Cycles of `busy` blocks, each of so many for its work and so many for what memory has to bring
// and take at its ends: neighbours on a multiprocessor work while one waits for memory, a block
// alone does one after the other.
inline double blocks_cycles(double busy, double resident, double work, double ends) {
  const double hidden = std::min(work, ends) + kLatency;
  return busy * (std::max(work, ends) + hidden / resident);
}

// Multiprocessors that clusters of so many blocks can have, one block on each. A cluster lies in
// one GPC; where the driver has not been asked, those are taken to have 16 or 18. On a GPU that has
// one of 14 a cluster that waits for another one to end would double a kernel's time.
inline int64_t cluster_multiprocessors(int64_t blocks, const RfGpu& gpu) {
  constexpr int64_t kNeighbours = 16;
  const int64_t asked = blocks == 4 ? gpu.clusters_of_4 : blocks == 8 ? gpu.clusters_of_8 : 0;
  if (asked > 0) return asked * blocks;
  const int64_t all = gpu.multiprocessors;
  return blocks > 2 && all >= kNeighbours ? all - all % kNeighbours : all;
}

// Into how many parts a reduction may be cut: each has a step at least.
constexpr bool has_work(int64_t steps, int64_t splits) {
  return divide_up(steps, divide_up(steps, splits)) == splits;
}

// Writes why; returns 1.
struct Refusal {
  char* why;
  size_t bytes;

  __attribute__((format(printf, 2, 3))) int32_t operator()(const char* format, ...) const {
    va_list values;
    va_start(values, format);
    if (bytes > 0) std::vsnprintf(why, bytes, format, values);
    va_end(values);
    return 1;
  }
};

// The configuration at an index, with its name, or nullptr. kTable: a function that gives an op's
// array of {name, configuration}, made once.
template <auto kTable>
const RfConvConfiguration* configuration_at(int32_t index) {
  static const auto all = [] {
    std::vector<RfConvConfiguration> made;
    for (const auto& entry : kTable()) {
      made.push_back(entry.configuration);
      made.back().name = entry.name.c_str();
    }
    return made;
  }();
  return index < 0 || index >= static_cast<int32_t>(all.size()) ? nullptr : &all[index];
}

// What is asked of a plan beside its problem; `count` configurations.
inline int32_t check_wish(const RfGpu& gpu, int32_t configuration, int32_t count,
                          const Refusal& refuse) {
  if (gpu.multiprocessors < 1) return refuse("a GPU of %d multiprocessors", gpu.multiprocessors);
  if (configuration < -1 || configuration >= count) {
    return refuse("configuration %d; there are 0 to %d", configuration, count - 1);
  }
  return 0;
}

// Sizes and options that no convolution takes; Problem: RfConvBnAct or RfConvGradient.
template <class Problem>
int32_t check_sizes(const Problem& problem, const Refusal& refuse) {
  for (int d = 0; d < 4; ++d) {
    if (problem.x_size[d] < 0 || problem.x_size[d] > kMost || problem.weight_size[d] < 0 ||
        problem.weight_size[d] > kMost) {
      return refuse("sizes run from 0 to %lld; dimension %d of x has %lld, of weight %lld",
                    static_cast<Long>(kMost), d, static_cast<Long>(problem.x_size[d]),
                    static_cast<Long>(problem.weight_size[d]));
    }
  }
  const int64_t groups = problem.groups;
  if (groups < 1 || problem.weight_size[0] % groups != 0 ||
      problem.x_size[1] != problem.weight_size[1] * groups) {
    return refuse("%lld groups do not divide %lld channels by weights of [%lld, %lld]",
                  static_cast<Long>(groups), static_cast<Long>(problem.x_size[1]),
                  static_cast<Long>(problem.weight_size[0]),
                  static_cast<Long>(problem.weight_size[1]));
  }
  if (problem.weight_size[2] > kMostTaps || problem.weight_size[3] > kMostTaps) {
    return refuse("a filter of %lld x %lld; at most %d x %d are possible",
                  static_cast<Long>(problem.weight_size[2]),
                  static_cast<Long>(problem.weight_size[3]), kMostTaps, kMostTaps);
  }
  constexpr int64_t kFar = int64_t{1} << 30;  // positions stay in 32 bits, however far they lead
  for (int d = 0; d < 2; ++d) {
    const int64_t reach = problem.dilation[d] * problem.weight_size[2 + d];
    if (problem.stride[d] < 1 || problem.dilation[d] < 1 || problem.padding[d] < 0 ||
        problem.dilation[d] >= kFar || reach >= kFar ||
        problem.x_size[2 + d] + 2 * problem.padding[d] >= kFar || problem.stride[d] >= kFar) {
      return refuse(
          "stride %lld, padding %lld, dilation %lld along dimension %d of %lld: strides "
          "and dilations start at 1, and positions end below 2^30",
          static_cast<Long>(problem.stride[d]), static_cast<Long>(problem.padding[d]),
          static_cast<Long>(problem.dilation[d]), 2 + d, static_cast<Long>(problem.x_size[2 + d]));
    }
  }
  return 0;
}

inline int32_t check_depth(const RfConvBnAct& problem, const Refusal& refuse) {
  const int64_t depth = problem.weight_size[1] * problem.weight_size[2] * problem.weight_size[3];
  if (depth < 1 || depth > kMost) {
    return refuse("a reduction over %lld elements; from 1 to %lld are possible",
                  static_cast<Long>(depth), static_cast<Long>(kMost));
  }
  return 0;
}

template <class Problem>
int32_t check_dtype(const Problem& problem, const Refusal& refuse) {
  switch (static_cast<DataType>(problem.dtype)) {
    case DataType::kBFloat16:
    case DataType::kFloat16:
      return 0;
    case DataType::kFloat32:
      if (problem.allow_tf32 != 0) return 0;
      return refuse("float32 is multiplied in TF32, and TF32 is not allowed");
    default:
      return refuse("dtype %d; bfloat16, float16 and float32 in TF32 are served", problem.dtype);
  }
}

}  // namespace resnet_fused
