// Products of warpgroups (wgmma) and their groups; how many registers a warpgroup has.
#pragma once

#include <cstddef>
#include <cstdint>

#include "errors.h"

namespace resnet_fused::emulator {

struct ProductType {
  const char* instruction;
  int element_bytes;
  float (*value)(uint32_t bits);  // widens an element
  bool a_mn_major, b_mn_major;    // memory lies along M or N
};

// What a thread passes. Arrays stay the product's until it has been waited for.
struct ProductOperands {
  float* d;  // [registers]
  int registers;
  const uint32_t* a;  // [4]; null: in shared memory
  uint64_t a_descriptor, b_descriptor;
  bool accumulate;
  // Planted faults.
  bool swapped;    // registers of a
  bool truncated;  // sums as if kept in 16 bits
};

// All lanes of the running warp issue the warpgroup's next product, which begins when its four
// warps have, and takes effect when the schedule says.
void issue_product(Site site, const ProductType& type, const ProductOperands& operands);

// The running thread's accesses of an array of registers end here: a product in flight may not use
// it, and the next product that does wants a fence behind this line and the same values.
void pin_registers(Site site, const void* registers, size_t bytes);
void product_fence(Site site);

void commit_products(Site site);
void wait_products(Site site, int pending);

// setmaxnreg: the running warp's threads have that many registers from now on.
void limit_registers(Site site, const char* instruction, int registers, bool increase);

}  // namespace resnet_fused::emulator
