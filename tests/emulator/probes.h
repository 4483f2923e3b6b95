// Tiny kernels for the tests of the emulator: each has one hazard, or one known cost.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>

#include "../../csrc/ptx/ptx.h"

namespace resnet_fused::probes {

constexpr int kWords = 16384;

// What every probe may use: `in[i]` holds i, `out` zeros, both aligned to 128 bytes.
struct Memory {
  const uint32_t* in;  // [kWords]
  uint32_t* out;       // [kWords]
};

struct Probe {
  dim3 grid;
  dim3 block;
  uint32_t shared_bytes;
  bool cooperative;
  std::function<void(const Memory&)> kernel;
  uint32_t cluster = 1;  // blocks
  bool early = false;    // the launch ahead may still run; `in` is a constant
};

using Table = std::map<std::string, Probe>;

void add_hazards(Table& table);
void add_costs(Table& table);
void add_early(Table& table);
void add_products(Table& table);
void add_copies(Table& table);
void add_clusters(Table& table);
void add_grids(Table& table);

inline void launch(const Probe& probe, const Memory& memory) {
  emulator::launch_clusters(
      probe.grid, probe.block, probe.cluster, probe.shared_bytes, probe.cooperative,
      [&] { probe.kernel(memory); }, probe.early);
}

// The first byte of dynamic shared memory.
inline ptx::SharedAddress base() { return ptx::shared_address(ptx::dynamic_shared()); }
inline int thread() { return static_cast<int>(threadIdx.x); }

}  // namespace resnet_fused::probes
