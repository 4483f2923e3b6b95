"""What a launch returns is what that launch said, not what an earlier call has left behind.

csrc/launch/launch.h is compiled with a stand-in for the CUDA runtime that, as CUDA's own, keeps the
last error until somebody asks for it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tools"))
import toolchain  # noqa: E402

RUNTIME = """
#pragma once
#include <cstddef>
#include <cstdint>
using cudaError_t = int;
constexpr int cudaSuccess = 0, kRefused = 9;
inline int last = 0, failing = 0, started = 0, asked_bytes = 0;
inline int said(int error) { if (error != 0) last = error; return error; }
inline int cudaGetLastError() { const int error = last; last = 0; return error; }
struct dim3 { unsigned x = 1, y = 1, z = 1; };
using cudaStream_t = void*;
enum { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum { cudaLaunchAttributeClusterDimension, cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute {
  int id;
  struct { dim3 clusterDim; int programmaticStreamSerializationAllowed; } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  void* stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
template <class Kernel>
int cudaFuncSetAttribute(Kernel, int, int bytes) { asked_bytes = bytes; return said(failing); }
template <class Kernel, class... Arguments>
int cudaLaunchKernelEx(const cudaLaunchConfig_t* config, Kernel, const Arguments&...) {
  if (failing == 0) started += 1 + 100 * static_cast<int>(config->numAttrs);
  return said(failing);
}
inline int cudaLaunchCooperativeKernel(const void*, dim3, dim3, void**, size_t, void*) {
  return said(failing);
}
inline int cudaMemsetAsync(void*, int, size_t, void*) { return said(failing); }
"""
PROGRAM = """
#include "launch.h"
#include <cstdio>
using namespace resnet_fused;
void kernel(int, float) {}
int main() {
  const dim3 one{};
  const auto plain = [&](uint32_t bytes) {
    return RF_LAUNCH(kernel, one, one, bytes, nullptr, 1, 2.0f);
  };
  const auto early = [&](bool follows) {
    return RF_LAUNCH_EARLY(follows, kernel, one, one, 0u, nullptr, 1, 2.0f);
  };
  failing = kRefused;
  const int refused[] = {
      plain(0), plain(1u << 17), early(true), early(false), clear_async(nullptr, 1, nullptr),
      RF_LAUNCH_CLUSTERS(kernel, one, one, one, 0u, nullptr, 1, 2.0f),
      RF_LAUNCH_COOPERATIVE(kernel, one, one, 0u, nullptr, 1, 2.0f)};
  for (const int error : refused) {
    if (error != kRefused) return 1;
  }
  failing = 0;
  if (started != 0) return 2;
  if (plain(0) != 0 || plain(1u << 17) != 0 || early(false) != 0) return 3;
  if (asked_bytes != 1 << 17) return 4;
  return started == 3 ? 0 : 5;
}
"""


def test_a_launch_is_not_blamed_for_one_that_was_refused(tmp_path: Path) -> None:
    compiler = toolchain.find_cxx()
    if compiler is None:
        pytest.skip("no C++ compiler")
    (tmp_path / "cuda_runtime.h").write_text(RUNTIME)
    source, made = tmp_path / "main.cpp", tmp_path / "main"
    source.write_text(PROGRAM)
    folders = [f"-I{tmp_path}", f"-I{ROOT / 'csrc' / 'launch'}"]
    built = subprocess.run(
        [compiler, "-std=c++20", *folders, str(source), "-o", str(made)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    assert subprocess.run([str(made)], check=False).returncode == 0
