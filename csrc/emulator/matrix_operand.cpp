#include "matrix_operand.h"

#include <cstring>

namespace resnet_fused::emulator {
namespace {

constexpr int kCore = 8;  // rows of a core matrix

struct Fields {
  uint32_t start, leading, stride, base_offset;
  uint32_t span;  // bytes that the swizzle permutes; 16: none
};

Fields fields_of(uint64_t descriptor) {
  constexpr uint32_t kSpans[] = {16, 128, 64, 32};
  const auto bytes = [descriptor](int bit) {
    return static_cast<uint32_t>(descriptor >> bit & 0x3FFF) << 4;
  };
  return {bytes(0), bytes(16), bytes(32), static_cast<uint32_t>(descriptor >> 49 & 7),
          kSpans[descriptor >> 62]};
}

// Bits 4-6 of the address, as many as the span has, XOR bits 7-9, counted from where the pattern
// starts.
uint32_t swizzled(const Fields& fields, uint32_t address) {
  const uint32_t line = (address >> 7) - fields.base_offset;
  return address ^ (line & (fields.span / 16 - 1)) << 4;
}

// The i-th chunk of the core matrix at (group of M or N, half of K).
uint32_t chunk_address(const Fields& f, bool mn_major, uint32_t group, uint32_t half, uint32_t i) {
  uint32_t address = f.start;
  if (f.span == 16) {
    address += i * 16 + group * f.stride + half * f.leading;  // either major
  } else if (mn_major) {
    const uint32_t chunks = f.span / 16;
    address += group / chunks * f.leading + group % chunks * 16 + i * f.span + half * f.stride;
  } else {
    address += group * f.stride + i * f.span + half * 16;
  }
  return swizzled(f, address);
}

}  // namespace

std::vector<AsyncPiece> chunks_of(const MatrixOperand& operand) {
  const Fields fields = fields_of(operand.descriptor);
  const auto groups = static_cast<uint32_t>(operand.extent / kCore);
  std::vector<AsyncPiece> chunks;
  chunks.reserve(groups * 2 * kCore);
  for (uint32_t group = 0; group < groups; ++group) {
    for (uint32_t half = 0; half < 2; ++half) {
      for (uint32_t i = 0; i < kCore; ++i) {
        chunks.push_back({chunk_address(fields, operand.mn_major, group, half, i), 16});
      }
    }
  }
  return chunks;
}

void widen(const MatrixOperand& operand, const uint8_t* bytes, float (*value)(uint32_t),
           float* numbers) {
  const int elements = operand.chunk_elements();
  const int depth = operand.depth();
  for (int chunk = 0; chunk < operand.extent * 2; ++chunk, bytes += 16) {
    const int i = chunk % kCore;
    const int half = chunk / kCore % 2;
    const int first = chunk / (2 * kCore) * kCore;  // row
    for (int e = 0; e < elements; ++e) {
      uint32_t bits = 0;
      std::memcpy(&bits, bytes + e * operand.element_bytes, operand.element_bytes);
      const int row = first + (operand.mn_major ? e : i);
      const int k = operand.mn_major ? half * kCore + i : half * elements + e;
      numbers[row * depth + k] = value(bits);
    }
  }
}

}  // namespace resnet_fused::emulator
