"""Admission's lists of sources against the files themselves, and against what is compiled."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from resnet_fused import admission, ops  # noqa: F401  (ops enter their kernels)

ROOT = Path(__file__).resolve().parent.parent
EMULATED = re.compile(
    r"^#\s*if\s+defined\(RF_EMULATED\)\n(.*?)^#\s*(?:else|endif)\b", re.MULTILINE | re.DOTALL
)
INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)
GENERATED = "rf_build_info.h"
HOPPER = {"cluster", "mbarrier", "proxy", "registers", "tensor_map", "tma", "wgmma"}
OLDER = sorted((ROOT / "csrc" / "kernels").glob("*_sm80.cuh"))
CUDA_KERNELS = [kernel for kernel in admission.kernels() if kernel.implementation == "cuda"]


def included(text: str) -> list[str]:
    """The files that a source includes where it is compiled for a GPU."""
    return INCLUDE.findall(EMULATED.sub("", text))


def closure(roots: Iterable[str]) -> set[str]:
    """The sources and everything of csrc/ that they include, directly or not."""
    found: set[str] = set()
    left = list(roots)
    while left:
        name = left.pop()
        if name in found:
            continue
        found.add(name)
        path = ROOT / name
        for other in included(path.read_text()):
            if other != GENERATED:
                left.append((path.parent / other).resolve().relative_to(ROOT).as_posix())
    return found


@pytest.mark.parametrize("kernel", CUDA_KERNELS, ids=lambda kernel: kernel.name)
def test_sources_are_what_the_launch_and_the_binding_include(kernel):
    listed = set(kernel.sources)
    roots = {name for name in listed if Path(name).suffix in (".cu", ".cpp")}
    assert listed == closure(roots)
    # Each of the op's own files, but for those of the CPU and of an op whose name goes on.
    frozen = kernel.op in ("conv_dgrad", "conv_wgrad")
    families = [kernel.op, "conv_gradient"] if frozen else [kernel.op]
    others = tuple(k.op for k in CUDA_KERNELS if k.op.startswith(kernel.op) and k.op != kernel.op)
    own = {
        path.relative_to(ROOT).as_posix()
        for family in families
        for room in ("bindings", "launch")
        for path in (ROOT / "csrc" / room).glob(f"{family}*")
        if path.suffix in (".cu", ".cpp")
        and not path.stem.endswith(("_cpu", "_cpu_body"))
        and not path.name.startswith(others)
    }
    assert own and own <= roots


@pytest.mark.parametrize("kernel", CUDA_KERNELS, ids=lambda kernel: kernel.name)
def test_sources_are_compiled(kernel):
    build = (ROOT / "CMakeLists.txt").read_text()
    compiled = {name for name in kernel.sources if Path(name).suffix in (".cu", ".cpp")}
    assert {name for name in compiled if name not in build} == set()


@pytest.mark.parametrize("path", OLDER, ids=lambda path: path.stem)
def test_kernels_of_older_gpus_hang_on_no_header_of_hopper(path):
    found = closure([path.relative_to(ROOT).as_posix()])
    assert "csrc/ptx/common.h" in found
    assert found & {f"csrc/ptx/{name}.h" for name in HOPPER} == set()


def test_what_only_the_emulator_includes_is_left_out():
    text = (
        '#include "a.h"\n#if defined(RF_EMULATED)\n#include "b.h"\n#else\n#include "c.h"\n#endif\n'
        '#if defined(RF_EMULATED)\n#include "d.h"\n#endif\n#include "e.h"\n#include <f.h>\n'
    )
    assert included(text) == ["a.h", "c.h", "e.h"]
