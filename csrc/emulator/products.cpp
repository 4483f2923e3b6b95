// What a product of a warpgroup computes.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "matrix_operand.h"
#include "warpgroup_state.h"

namespace resnet_fused::emulator {
namespace {

constexpr uint32_t kCanonicalNan = 0x7FFFFFFFu;  // the NaN that matrix products return

// Row and column of a thread's i-th sum. PTX ISA, Register Fragments for wgmma.mma_async.m64nNk16,
// D; the same for the other depths.
int row_of(int thread, int i) {
  return thread / kWarpSize * 16 + thread % kWarpSize / 4 + i / 2 % 2 * 8;
}
int column_of(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

// The same sections, A: 4 registers hold elements of two rows and two halves of K.
void widen_fragment(const ProductType& type, int thread, const uint32_t* registers, int depth,
                    float* numbers) {
  const int elements = 4 / type.element_bytes;  // of a register
  for (int r = 0; r < 4; ++r) {
    const int row = thread / kWarpSize * 16 + thread % kWarpSize / 4 + r % 2 * 8;
    for (int e = 0; e < elements; ++e) {
      const int k = thread % 4 * elements + e + r / 2 * (depth / 2);
      const uint32_t bits = registers[r] >> (8 * type.element_bytes * e);
      const uint32_t mask = type.element_bytes == 4 ? ~0u : (1u << 8 * type.element_bytes) - 1;
      numbers[row * depth + k] = type.value(bits & mask);
    }
  }
}

// d += a b, term after term. Products are exact in float: 11 bits by 11 at most. b: [depth, n].
void multiply_to_nearest(int n, int depth, const float* a, const float* b, float* d) {
  for (int i = 0; i < kProductRows; ++i) {
    float* sums = d + static_cast<size_t>(i) * n;
    for (int k = 0; k < depth; ++k) {
      const float factor = a[i * depth + k];
      const float* row = b + static_cast<size_t>(k) * n;
      for (int j = 0; j < n; ++j) sums[j] += factor * row[j];
    }
  }
}

// One rounding a product, toward zero, of the sum (in double) of all terms and d. A sum beyond the
// range is infinite, as it is to nearest.
void multiply_toward_zero(int n, int depth, const float* a, const float* b, float* d) {
  std::vector<double> sums(n);
  for (int i = 0; i < kProductRows; ++i) {
    float* row = d + static_cast<size_t>(i) * n;
    std::copy(row, row + n, sums.begin());
    for (int k = 0; k < depth; ++k) {
      const double factor = a[i * depth + k];
      for (int j = 0; j < n; ++j) sums[j] += factor * b[static_cast<size_t>(k) * n + j];
    }
    for (int j = 0; j < n; ++j) {
      float result = static_cast<float>(sums[j]);
      if (std::isfinite(result) && std::abs(static_cast<double>(result)) > std::abs(sums[j])) {
        result = std::bit_cast<float>(std::bit_cast<uint32_t>(result) - 1);
      }
      row[j] = result;
    }
  }
}

// a [64, depth] and b [n, depth] of a product, as they are now.
void read_operands(Product& product, int depth, int n, std::vector<float>& a,
                   std::vector<float>& b) {
  const ProductType& type = product.type;
  std::vector<uint8_t> bytes(product.read.bytes());
  product.read.values(bytes.data());
  const uint8_t* from = bytes.data();
  if (product.operands.a == nullptr) {
    const MatrixOperand operand{product.operands.a_descriptor, type.a_mn_major, kProductRows,
                                type.element_bytes};
    widen(operand, from, type.value, a.data());
    from += kProductRows * 32;
  } else {
    for (int thread = 0; thread < kGroupThreads; ++thread) {
      uint32_t registers[4];
      std::memcpy(registers, product.a[thread].at, sizeof(registers));
      if (product.operands.swapped) std::swap(registers[1], registers[2]);
      widen_fragment(type, thread, registers, depth, a.data());
    }
  }
  const MatrixOperand operand{product.operands.b_descriptor, type.b_mn_major, n,
                              type.element_bytes};
  widen(operand, from, type.value, b.data());
}

}  // namespace

void multiply(Product& product) {
  const int n = 2 * product.operands.registers;
  const int depth = 32 / product.type.element_bytes;
  std::vector<float> a(kProductRows * depth), rows(static_cast<size_t>(n) * depth);
  read_operands(product, depth, n, a, rows);
  std::vector<float> b(rows.size()), d(static_cast<size_t>(kProductRows) * n);
  for (int j = 0; j < n; ++j) {
    for (int k = 0; k < depth; ++k) b[static_cast<size_t>(k) * n + j] = rows[j * depth + k];
  }
  Sums& sums = *product.sums;
  const auto each_sum = [&](auto&& visit) {
    for (int thread = 0; thread < kGroupThreads; ++thread) {
      float* values = sums.values.data() + static_cast<size_t>(thread) * sums.registers;
      for (int i = 0; i < sums.registers; ++i) {
        visit(values[i], d[static_cast<size_t>(row_of(thread, i)) * n + column_of(thread, i)]);
      }
    }
  };
  if (product.operands.accumulate) each_sum([](float& value, float& sum) { sum = value; });
  if (schedule().rounding == Rounding::kTowardZero) {
    multiply_toward_zero(n, depth, a.data(), b.data(), d.data());
  } else {
    multiply_to_nearest(n, depth, a.data(), b.data(), d.data());
  }
  const bool truncated = product.operands.truncated;
  each_sum([truncated](float& value, float& sum) {
    const uint32_t bits = std::bit_cast<uint32_t>(sum) & (truncated ? 0xFFFF0000u : ~0u);
    value = std::bit_cast<float>(std::isnan(sum) ? kCanonicalNan : bits);
  });
}

}  // namespace resnet_fused::emulator
