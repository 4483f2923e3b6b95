"""The machine below a GPU kernel: which GPU it is, whether a kernel can run on it, and when.

`Gpu` identifies a GPU together with the software that compiles and runs kernels on it.
`refusal_of_platform` is a pure function of plain values, so that every case is tested without a
GPU. `no_check_now` says why a self-check may not start at this moment.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import functools
import importlib.metadata
import platform
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import _extension

OLDEST_CAPABILITY = (8, 0)  # bfloat16, cp.async and mma.sync of 16-bit operands start here
DRIVER_FILE = Path("/proc/driver/nvidia/version")
TRITON_PACKAGES = ("triton", "pytorch-triton", "triton-windows")

Device = int | str
"""The index of a GPU, or "cpu": kernels that run on the CPU, as those of the tests do."""


class Gpu(NamedTuple):
    """A GPU and the software below a kernel: a verdict holds for exactly these.

    Attributes:
        name: as the driver gives it, "NVIDIA H100 80GB HBM3".
        capability: "sm_90"; "cpu" for the CPU.
        driver: its CUDA version and its own, "13000 580.65.06".
        torch: version of torch, with its local suffix.
        cuda: the CUDA version of torch's build.
        triton: version of Triton, or None.
    """

    name: str
    capability: str
    driver: str | None
    torch: str
    cuda: str | None
    triton: str | None


@functools.cache
def triton_version() -> str | None:
    """The version of the installed Triton, without importing it; None where there is none."""
    for package in TRITON_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package)
    return None


@functools.cache
def cuda_of_driver() -> int | None:
    """The newest CUDA that the installed driver runs, as 1000 major + 10 minor; None without one.

    Asked of the driver's library, which answers without touching a GPU.
    """
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    version = ctypes.c_int(0)
    try:
        failed = ctypes.CDLL(name).cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return version.value if not failed and version.value > 0 else None


def _driver() -> str | None:
    cuda = cuda_of_driver()
    if cuda is None:
        return None
    try:
        first = DRIVER_FILE.read_text(encoding="utf-8").splitlines()[0]
    except (OSError, IndexError, UnicodeDecodeError):
        return str(cuda)
    # "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build ..."
    numbers = [w for w in first.split() if w[0].isdigit() and w.replace(".", "").isdigit()]
    return f"{cuda} {numbers[0]}" if numbers else str(cuda)


@functools.cache
def identify(device: Device) -> Gpu:
    """The identity of a GPU, or of the CPU.

    Args:
        device: the GPU's index, or "cpu".
    """
    if device == "cpu":
        name, capability = platform.processor() or platform.machine(), "cpu"
    else:
        about = torch.cuda.get_device_properties(device)
        name, capability = about.name, f"sm_{about.major}{about.minor}"
    return Gpu(name, capability, _driver(), torch.__version__, torch.version.cuda, triton_version())


def uuid_of(device: Device) -> str | None:
    """What tells this GPU from an equal one beside it; None for the CPU."""
    if device == "cpu":
        return None
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return None if uuid is None else str(uuid)


def _major(version: str) -> int:
    return int(version.split(".")[0])


def _holds(archs: list[str], capability: tuple[int, int]) -> bool:
    """Whether code for one of `archs` ("80", "90a", "120+PTX") runs on a GPU.

    Machine code runs on later minor versions of its major version, "a" code on its own version
    only, and PTX on every later version.
    """
    for arch in archs:
        number, _, ptx = arch.partition("+")
        exact = number.endswith(("a", "f"))
        built = divmod(int(number.rstrip("af")), 10)
        if built == capability:
            return True
        if exact or built > capability:
            continue
        if ptx or built[0] == capability[0]:
            return True
    return False


def refusal_of_platform(
    implementation: str,
    *,
    torch_cuda: str | None,
    driver: int | None,
    capability: tuple[int, int] | None,
    build: Mapping[str, Any],
) -> str | None:
    """Why no kernel of an implementation can run on a machine, or None.

    Args:
        implementation: "triton" or "cuda".
        torch_cuda: the CUDA version of torch's build, "13.0"; None for one without CUDA.
        driver: the CUDA version that the driver runs, 1000 major + 10 minor; None without driver.
        capability: of the GPU; None if it could not be asked.
        build: `_extension.build_info()`; read for "cuda" only.
    """
    if torch_cuda is None:
        return "torch is built without CUDA"
    if driver is None:
        return "no NVIDIA driver is found"
    drives = f"{driver // 1000}.{driver % 1000 // 10}"
    if driver // 1000 < _major(torch_cuda):
        return f"the driver runs CUDA {drives}, too old for torch's CUDA {torch_cuda}"
    if implementation == "cuda":
        nvcc = build.get("nvcc")
        if not nvcc:
            return "the extension was built without nvcc"
        if _major(nvcc) != _major(torch_cuda):
            return (
                f"the extension was built with CUDA {nvcc}, torch with CUDA {torch_cuda}: "
                "another major version; build the extension again"
            )
        if driver // 1000 < _major(nvcc):
            return f"the driver runs CUDA {drives}, too old for the extension's CUDA {nvcc}"
    if capability is None:
        return "torch can't use the GPU"
    sm = f"sm_{capability[0]}{capability[1]}"
    if capability < OLDEST_CAPABILITY:
        return f"the GPU is {sm}; kernels need sm_80 or later"
    archs = list(build.get("archs", []))
    if implementation == "cuda" and not _holds(archs, capability):
        return f"the extension holds no code for {sm}, only for {', '.join(archs) or 'none'}"
    return None


@functools.cache
def platform_refusal(implementation: str, device: Device) -> str | None:
    """`refusal_of_platform` of this machine; None for the CPU."""
    if device == "cpu":
        return None
    driver, capability, detail = cuda_of_driver(), None, ""
    if torch.version.cuda is not None and driver is not None:
        try:
            capability = torch.cuda.get_device_capability(device)
        except (RuntimeError, AssertionError) as error:
            detail = f": {str(error).splitlines()[0]}"
    build = _extension.build_info() if implementation == "cuda" else {}
    reason = refusal_of_platform(
        implementation,
        torch_cuda=torch.version.cuda,
        driver=driver,
        capability=capability,
        build=build,
    )
    return reason + detail if reason and reason == "torch can't use the GPU" else reason


def current_device() -> int:
    """The index of the current GPU; 0 where CUDA is not in use yet."""
    return torch.cuda.current_device() if torch.cuda.is_initialized() else 0


_withheld: contextvars.ContextVar[str | None] = contextvars.ContextVar("withheld", default=None)


@contextlib.contextmanager
def without_checks(why: str) -> Iterator[None]:
    """No self-check starts within the block, in this thread or task."""
    token = _withheld.set(why)
    try:
        yield
    finally:
        _withheld.reset(token)


def no_check_now() -> str | None:
    """Why no self-check may start at this moment, or None.

    A check takes seconds, and what it finds changes which kernel runs: neither fits into a graph
    that is being recorded, nor into a rank that the others wait for.
    """
    if (why := _withheld.get()) is not None:
        return why
    if torch.cuda._is_in_bad_fork():
        return "this process was forked after CUDA was in use"
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured"
    if _is_tracing():
        return "the call is being traced"
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        ranks = distributed.get_world_size()
        if ranks > 1:
            return f"this is one of {ranks} ranks of torch.distributed"
    if torch.utils.data.get_worker_info() is not None:
        return "this is a worker of a DataLoader"
    return None


def _is_tracing() -> bool:
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    if torch._C._functorch.peek_interpreter_stack() is not None:  # vmap, grad and their kin
        return True
    fx = sys.modules.get("torch.fx._symbolic_trace")
    if fx is not None and fx.is_fx_symbolic_tracing():  # make_fx too
        return True
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
