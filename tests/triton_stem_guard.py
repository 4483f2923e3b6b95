"""Run as a child: `stem` and `head` beside memory that can't be touched, and with huge steps."""

from __future__ import annotations

import dataclasses
import importlib
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton_guard
from guarded_memory import guarded, unmapped_around
from torch import Tensor
from triton_huge import unreserved
from triton_trace import Programs, every_program

from resnet_fused import cases, numerics
from resnet_fused.triton import _stem_tiles

STEMS = {
    # 5 pooled columns and 9 channels that no tile divides, 3 rows of windows, two strips of rows.
    "stem": cases.StemCase("odd", 2, 3, 9, 17, 9),
    "bytes": cases.StemCase("bytes", 1, 3, 8, 11, 9, images="uint8"),
    "far": cases.StemCase("far", 3, 3, 4, 4, 8),
}
HEADS = {
    "one": cases.HeadCase("one", 3, 40, 3, 3, 7),
    "two": cases.HeadCase("two", 3, 40, 3, 3, 130),
}
STEP = 2**30 + 64
"""Elements between the images: the third begins beyond 2^31."""
Place = Callable[[str, Tensor], Tensor]


def launched(modules: list[Any], fault: str, place: Place, call: Callable[[], None]) -> None:
    """Runs every program of the modules' kernels; fault: "kernel.argument=what to add", or "-"."""
    whose, _, rest = fault.partition(".")
    name, _, by = rest.partition("=")

    def programs(kernel: Any, _: Tensor) -> Programs:
        def plant(arguments: dict[str, Any]) -> None:
            if by and kernel.fn.__name__ == whose:
                arguments[name] += int(by)

        return Programs(kernel, every_program, plant)

    def workspace(t: Tensor, shape: tuple[int, ...]) -> Tensor:
        return place("workspace", torch.full(shape, math.nan, dtype=t.dtype))

    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            patch.setattr(module, "traceable", programs)
        patch.setattr(torch.Tensor, "new_empty", workspace)
        call()


def stem(which: str, place: Place, fault: str) -> None:
    """One call of `stem` in strips of two rows; `place` puts a tensor where it is to lie."""
    kernel = importlib.import_module("resnet_fused.triton.stem")
    case = STEMS[which]
    given = numerics.exact_stem_inputs(case, torch.float16, torch.Generator().manual_seed(0))
    expected = numerics.stem_oracle(*given, *case.geometry).half()
    names = ("x", "weight", "scale", "shift", "norm")
    placed = [
        None if t is None else place(name, channels_last(t))
        for name, t in zip(names, given, strict=True)
    ]
    out = place("out", channels_last(torch.full_like(expected, math.nan)))
    plan = _stem_tiles.Plan(_stem_tiles.TILES[-1], 2, "the test asks for it")
    modules = [kernel, importlib.import_module("resnet_fused.triton._stem_pack")]
    launched(modules, fault, place, lambda: kernel.launch(*placed, out, *case.geometry, plan=plan))
    assert torch.equal(out, expected)


def head(which: str, place: Place, fault: str) -> None:
    """One call of `head`, by one kernel or by two."""
    kernel = importlib.import_module("resnet_fused.triton.head")
    case = HEADS[which]
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (case.n, case.c, 1, 1), "weight": (case.classes, case.c), "bias": case.classes}
    made = {
        name: torch.randint(-3, 4, shape if isinstance(shape, tuple) else (shape,),
                            generator=generator).half()
        for name, shape in shapes.items()
    }  # fmt: skip
    made["x"] = made["x"].expand(case.shape).contiguous()  # its mean is exact
    expected = numerics.head_oracle(*made.values()).half()
    placed = [place(name, channels_last(t)) for name, t in made.items()]
    out = place("out", torch.full_like(expected, math.nan))
    launched([kernel], fault, place, lambda: kernel.launch(*placed, out))
    assert torch.equal(out, expected)


def channels_last(t: Tensor) -> Tensor:
    """Images and filters in channels_last, the rest as it is."""
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t


def _run(which: str, place: Place, fault: str) -> None:
    (stem if which in STEMS else head)(which, place, fault)


def pages(which: str, at: str, fault: str) -> None:
    """Everything, workspaces too, ends or begins where memory that may be touched ends."""

    def place(name: str, t: Tensor) -> Tensor:
        if name == "workspace":
            memory = unmapped_around(t.numel(), t.dtype, at)
            return memory.view(t.shape).copy_(t)
        return guarded(t, at)

    _run(which, place, fault)


def wide(which: str, moved: str, fault: str) -> None:
    """The images (or classes) of one tensor lie 2^30 elements apart."""

    def place(name: str, t: Tensor) -> Tensor:
        if name != moved:
            return t
        whole = unreserved((3 * STEP,), t.dtype)
        return whole.as_strided(t.shape, (STEP, *t.stride()[1:])).copy_(t)

    if moved == "weight":  # three classes
        HEADS[which] = dataclasses.replace(HEADS[which], classes=3)
    _run(which, place, fault)


if __name__ == "__main__":
    triton_guard.SCENARIOS.update({"ends": pages, "wide": wide})
    triton_guard.main(sys.argv[1:])
