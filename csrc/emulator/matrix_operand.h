// Where the elements of an operand of wgmma lie in shared memory, as its descriptor says. PTX ISA,
// Asynchronous Warpgroup Level Matrix Shared Memory Layout.
#pragma once

#include <cstdint>
#include <vector>

#include "async_proxy.h"

namespace resnet_fused::emulator {

struct MatrixOperand {
  uint64_t descriptor;
  bool mn_major;      // memory lies along M or N
  int extent;         // of M or N: a multiple of 8
  int element_bytes;  // 4, 2 or 1; 2 where mn_major

  int chunk_elements() const { return 16 / element_bytes; }
  int depth() const { return 32 / element_bytes; }
};

// The chunks of 16 bytes, eight (a core matrix) at a time: of K-major operands one chunk of eight
// rows, of MN-major ones eight elements of K of one chunk. Core matrices: along K first, two of
// them, then along M or N.
std::vector<AsyncPiece> chunks_of(const MatrixOperand& operand);

// The chunks' bytes -> numbers [extent, depth]. `value` widens one element's bits.
void widen(const MatrixOperand& operand, const uint8_t* bytes, float (*value)(uint32_t),
           float* numbers);

}  // namespace resnet_fused::emulator
