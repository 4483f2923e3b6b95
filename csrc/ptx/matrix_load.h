// 8x8 matrices of 16-bit elements between shared memory and a warp's registers.
// PTX ISA, Warp-level Matrix Instructions: ldmatrix (sm_75 and later), stmatrix (sm_90 and later).
//
// `row`: lane l passes the address of row l % 8 of matrix l / 8; 16 bytes, a multiple of 16. Those
// of x2 read the lanes 0-15 only. Register m of lane l holds two neighbours of matrix m: row l / 4,
// columns 2 (l % 4) and + 1 (the lower half first); with _trans the same place of its transpose.
// All 32 lanes must call them together.
#pragma once

#include "common.h"

namespace resnet_fused::ptx {

RF_DEVICE void ldmatrix_x4(uint32_t (&r)[4], SharedAddress row RF_SITE_PARAMETER) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row));
}

RF_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], SharedAddress row RF_SITE_PARAMETER) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row));
}

RF_DEVICE void ldmatrix_x2(uint32_t (&r)[2], SharedAddress row RF_SITE_PARAMETER) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(row));
}

RF_DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], SharedAddress row RF_SITE_PARAMETER) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(row));
}

// Compiled for an architecture before sm_90, a call of these is a compile error.
#if defined(RF_EMULATED) || !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

RF_DEVICE void stmatrix_x4(SharedAddress row, const uint32_t (&r)[4] RF_SITE_PARAMETER) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

RF_DEVICE void stmatrix_x4_trans(SharedAddress row, const uint32_t (&r)[4] RF_SITE_PARAMETER) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

#endif

}  // namespace resnet_fused::ptx
