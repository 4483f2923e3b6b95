// A CUDA thread as the kernel sees it: its indices, and where it stands in its warp.
#pragma once

#include <cstdint>

namespace resnet_fused::emulator {

constexpr int kWarpSize = 32;
constexpr uint32_t kFullMask = 0xFFFFFFFFu;

struct uint3 {
  uint32_t x, y, z;
};

struct dim3 {
  uint32_t x = 1, y = 1, z = 1;

  constexpr dim3() = default;
  // Implicit, as CUDA's is: a grid of n blocks is written as n.
  constexpr dim3(uint32_t x_, uint32_t y_ = 1, uint32_t z_ = 1) : x(x_), y(y_), z(z_) {}
  constexpr uint64_t count() const { return static_cast<uint64_t>(x) * y * z; }
};

// The part of a thread that kernels and wrappers read. The scheduler's part is in block.h.
struct Thread {
  uint3 thread_index;
  uint3 block_index;
  dim3 block_size;
  dim3 grid_size;
  int linear;  // in the block, x fastest
  int lane;
  int warp;
};

// Fibers stay on the host thread that launched them, so a thread_local pointer names the one that
// runs. Null outside of a kernel.
extern thread_local Thread* running_thread __attribute__((tls_model("initial-exec")));

inline Thread& this_thread() { return *running_thread; }
inline bool in_kernel() { return running_thread != nullptr; }
inline int lane() { return this_thread().lane; }
inline int warp() { return this_thread().warp; }

}  // namespace resnet_fused::emulator
