"""Prints in one line what the installed extension holds, or why there is none."""

from __future__ import annotations

from resnet_fused import _extension


def line() -> str:
    """The line, for example "CPU and CUDA kernels (nvcc 13.0.88; sm_80, sm_90a)"."""
    if not _extension.available():
        return f"no compiled extension, PyTorch and Triton serve every op: {_extension.why_not()}"
    info = _extension.build_info()
    if not info["cuda"]:
        return f"CPU kernels alone, Triton serves the GPU: {info['why_no_cuda']}"
    return f"CPU and CUDA kernels (nvcc {info['nvcc']}; {', '.join(info['archs'])})"


if __name__ == "__main__":
    print(f"resnet_fused: {line()}")
