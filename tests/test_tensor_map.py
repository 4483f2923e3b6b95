"""Tensor maps as the driver makes them, by a CUDA that stands in: it wants a context, as the real
one does, and a thread that has launched nothing has none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import emulated
import pytest

sys.path.append(str(emulated.TOOLS))
import toolchain

LAUNCH = emulated.TOOLS.parent / "csrc" / "launch"

DRIVER = """#pragma once
#include <cstdint>
using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;
enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_CONTEXT = 201 };
struct alignas(64) CUtensorMap { uint64_t opaque[16]; };
enum CUtensorMapDataType {
  CU_TENSOR_MAP_DATA_TYPE_UINT8, CU_TENSOR_MAP_DATA_TYPE_UINT32, CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
  CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, CU_TENSOR_MAP_DATA_TYPE_TFLOAT32,
  CU_TENSOR_MAP_DATA_TYPE_FLOAT32
};
enum CUtensorMapSwizzle {
  CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_32B, CU_TENSOR_MAP_SWIZZLE_64B,
  CU_TENSOR_MAP_SWIZZLE_128B
};
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_128B };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };
CUresult cuTensorMapEncodeTiled(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*,
                                const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                                const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
CUresult cuTensorMapEncodeIm2col(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*,
                                 const cuuint64_t*, const cuuint64_t*, const int*, const int*,
                                 cuuint32_t, cuuint32_t, const cuuint32_t*, CUtensorMapInterleave,
                                 CUtensorMapSwizzle, CUtensorMapL2promotion,
                                 CUtensorMapFloatOOBfill);
"""

RUNTIME = """#pragma once
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorNotSupported = 801 };
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess = 0 };
constexpr unsigned long long cudaEnableDefault = 0;
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void**, unsigned int, unsigned long long,
                                             cudaDriverEntryPointQueryResult*);
cudaError_t cudaGetDevice(int*);
cudaError_t cudaSetDevice(int);
"""

PROGRAM = """
#include <cstdio>
#include <cstring>
#include <thread>

#include <cuda.h>
#include <cuda_runtime.h>

#include "tensor_map.h"

namespace {
thread_local bool bound = false;
int looked_up = 0, pixels = 0, corner = 0, rows = 0;
}  // namespace

CUresult cuTensorMapEncodeTiled(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*,
                                const cuuint64_t*, const cuuint64_t*, const cuuint32_t* box,
                                const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  rows = static_cast<int>(box[1]);
  return bound ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}
CUresult cuTensorMapEncodeIm2col(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*,
                                 const cuuint64_t*, const cuuint64_t*, const int* lower, const int*,
                                 cuuint32_t, cuuint32_t count, const cuuint32_t*,
                                 CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                                 CUtensorMapFloatOOBfill) {
  pixels = static_cast<int>(count);
  corner = lower[1];
  return bound ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** address, unsigned int,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  ++looked_up;
  const bool tiled = std::strcmp(name, "cuTensorMapEncodeTiled") == 0;
  *address = tiled ? reinterpret_cast<void*>(cuTensorMapEncodeTiled)
                   : reinterpret_cast<void*>(cuTensorMapEncodeIm2col);
  *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) { return *device = 3, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return bound = device == 3, cudaSuccess; }

int main() {
  using namespace resnet_fused;
  alignas(16) static char memory[16];
  TensorMapRequest request;
  request.rank = 4;
  request.address = memory;
  request.sizes = {64, 8, 8, 2};
  request.strides = {128, 1024, 8192};
  request.box = {64, 5, 1, 1};
  ptx::TensorMap map;
  const auto encode = [&] {
    request.pixels = 0;
    const int tiled = encode_tensor_map(request, &map);
    request.pixels = 7;
    request.lower = {-1, -2};
    return 1000 * tiled + encode_tensor_map(request, &map);
  };
  int there = -1;
  const int here = encode();
  std::thread([&] { there = encode(); }).join();
  std::printf("%d %d %d %d %d %d", here, there, rows, pixels, corner, looked_up);
}
"""


def test_a_thread_without_a_context_gets_one(tmp_path: Path) -> None:
    compiler = toolchain.find_cxx()
    if compiler is None:
        pytest.skip("no C++ compiler")
    (tmp_path / "cuda.h").write_text(DRIVER)
    (tmp_path / "cuda_runtime.h").write_text(RUNTIME)
    (tmp_path / "main.cpp").write_text(PROGRAM)
    sources = (LAUNCH / "tensor_map.cu", LAUNCH / "tensor_map_rules.cpp", tmp_path / "main.cpp")
    program = tmp_path / "program"
    command = [compiler, "-std=c++20", f"-I{tmp_path}", f"-I{LAUNCH}", "-pthread", "-x", "c++"]
    subprocess.run([*command, *map(str, sources), "-o", str(program)], check=True)
    said = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout
    # Both kinds on both threads; what they were asked for; each function looked up once.
    assert said.split() == ["0", "0", "5", "7", "-2", "2"]
