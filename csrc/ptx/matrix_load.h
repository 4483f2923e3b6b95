// 8x8 matrices of 16-bit elements between shared memory and a warp's registers.
// PTX ISA, Warp-level Matrix Instructions: ldmatrix (sm_75 and later), stmatrix (sm_90 and later).
//
// `row`: lane l passes the address of row l % 8 of matrix l / 8; 16 bytes, a multiple of 16. Those
// of x2 read the lanes 0-15 only. Register m of lane l holds two neighbours of matrix m: row l / 4,
// columns 2 (l % 4) and + 1 (the lower half first); with _trans the same place of its transpose.
// All 32 lanes must call them together.
#pragma once

#include "common.h"

#if defined(RF_EMULATED)
#include <cstring>
#include <utility>
#endif

namespace resnet_fused::ptx {

#if defined(RF_EMULATED)
namespace detail {

// What a lane brings to the exchange: one row of one matrix, and its registers.
template <int kMatrices>
struct MatrixLane {
  uint16_t row[8];
  uint32_t r[kMatrices];
};

// The element at (row, column) of matrix m: lane 8 m + row holds that row.
template <int kMatrices>
uint16_t& matrix_element(void* const* lanes, int m, int row, int column) {
  return static_cast<MatrixLane<kMatrices>*>(lanes[8 * m + row])->row[column];
}

// The faults of the address and of the order of the elements that both directions share.
inline emulator::Fault matrix_fault(emulator::Site site, const char* name, SharedAddress& row,
                                    bool& transposed) {
  using emulator::Fault;
  const Fault fault = emulator::fault_at(
      site, name, {Fault::kRowOff, Fault::kChunkOff, Fault::kTransposed, Fault::kSwapOperands});
  if (fault == Fault::kRowOff) row += 16 * kWarpSize;
  if (fault == Fault::kChunkOff) row ^= 16;
  if (fault == Fault::kTransposed) transposed = !transposed;
  return fault;
}

// Each lane reads its own row, as itself, so that every check names the lane whose address it is;
// then the rows are dealt out to the registers.
template <int kMatrices>
void load_matrices(emulator::Site site, const char* name, uint32_t (&r)[kMatrices],
                   SharedAddress row, bool transposed) {
  const auto fault = matrix_fault(site, name, row, transposed);
  MatrixLane<kMatrices> mine = {};
  if (emulator::lane() < 8 * kMatrices) {
    std::memcpy(mine.row, emulator::shared(site, name, row, 16, 16, emulator::Access::kRead), 16);
  }
  emulator::collective(site, name, kWholeWarp, &mine, [transposed](void* const* lanes) {
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const int i = lane / 4;
      const int j = 2 * (lane % 4);
      for (int m = 0; m < kMatrices; ++m) {
        const uint32_t low = transposed ? matrix_element<kMatrices>(lanes, m, j, i)
                                        : matrix_element<kMatrices>(lanes, m, i, j);
        const uint32_t high = transposed ? matrix_element<kMatrices>(lanes, m, j + 1, i)
                                         : matrix_element<kMatrices>(lanes, m, i, j + 1);
        static_cast<MatrixLane<kMatrices>*>(lanes[lane])->r[m] = low | high << 16;
      }
    }
  });
  if (fault == emulator::Fault::kSwapOperands) std::swap(mine.r[0], mine.r[1]);
  std::memcpy(r, mine.r, sizeof(r));
}

// The way back: the registers make up the rows, then each lane writes its own.
template <int kMatrices>
void store_matrices(emulator::Site site, const char* name, SharedAddress row,
                    const uint32_t (&r)[kMatrices], bool transposed) {
  const auto fault = matrix_fault(site, name, row, transposed);
  MatrixLane<kMatrices> mine = {};
  std::memcpy(mine.r, r, sizeof(r));
  if (fault == emulator::Fault::kSwapOperands) std::swap(mine.r[0], mine.r[1]);
  emulator::collective(site, name, kWholeWarp, &mine, [transposed](void* const* lanes) {
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const int i = lane / 4;
      const int j = 2 * (lane % 4);
      for (int m = 0; m < kMatrices; ++m) {
        const uint32_t pair = static_cast<MatrixLane<kMatrices>*>(lanes[lane])->r[m];
        const auto low = static_cast<uint16_t>(pair);
        const auto high = static_cast<uint16_t>(pair >> 16);
        matrix_element<kMatrices>(lanes, m, transposed ? j : i, transposed ? i : j) = low;
        matrix_element<kMatrices>(lanes, m, transposed ? j + 1 : i, transposed ? i : j + 1) = high;
      }
    }
  });
  if (emulator::lane() < 8 * kMatrices) {
    std::memcpy(emulator::shared(site, name, row, 16, 16, emulator::Access::kWrite), mine.row, 16);
  }
}

}  // namespace detail
#endif

RF_DEVICE void ldmatrix_x4(uint32_t (&r)[4], SharedAddress row RF_SITE_PARAMETER) {
#if defined(RF_EMULATED)
  detail::load_matrices(site, "ldmatrix.x4", r, row, false);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row));
#endif
}

RF_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], SharedAddress row RF_SITE_PARAMETER) {
#if defined(RF_EMULATED)
  detail::load_matrices(site, "ldmatrix.x4.trans", r, row, true);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row));
#endif
}

RF_DEVICE void ldmatrix_x2(uint32_t (&r)[2], SharedAddress row RF_SITE_PARAMETER) {
#if defined(RF_EMULATED)
  detail::load_matrices(site, "ldmatrix.x2", r, row, false);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(row));
#endif
}

RF_DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], SharedAddress row RF_SITE_PARAMETER) {
#if defined(RF_EMULATED)
  detail::load_matrices(site, "ldmatrix.x2.trans", r, row, true);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(row));
#endif
}

// Compiled for an architecture before sm_90, a call of these is a compile error.
#if defined(RF_EMULATED) || !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define RF_HAS_STMATRIX

RF_DEVICE void stmatrix_x4(SharedAddress row, const uint32_t (&r)[4] RF_SITE_PARAMETER) {
#if defined(RF_EMULATED)
  detail::store_matrices(site, "stmatrix.x4", row, r, false);
#else
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
#endif
}

RF_DEVICE void stmatrix_x4_trans(SharedAddress row, const uint32_t (&r)[4] RF_SITE_PARAMETER) {
#if defined(RF_EMULATED)
  detail::store_matrices(site, "stmatrix.x4.trans", row, r, true);
#else
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
#endif
}

#endif

}  // namespace resnet_fused::ptx
