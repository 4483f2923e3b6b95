"""Run as a child: conv_bn_dgrad in Triton where a fault ends the process, or ahead of time.

    python triton_bn_dgrad.py "pages" "huge dx -"    each in a fork; prints what became of it
    python triton_bn_dgrad.py "compile 90"           machine code, of a GPU that is not there

The first kind needs TRITON_INTERPRET=1, the second must not have it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import triton_huge
from guarded_memory import guarded, unreserved
from torch import Tensor
from triton_trace import PROOF, Programs, every_program

from resnet_fused import cases
from resnet_fused.ops import _training_checks_dgrad as checks
from resnet_fused.triton import _tiles, conv_bn_dgrad
from resnet_fused.triton._launch import MERGE_TILE

NAN = float("nan")
CASES = (
    # Pixels, channels and filters that no tile divides; an addend at every other pixel.
    cases.ConvCase("odd", 1, 70, 7, 5, 69, 2, 2, (1, 1), (1, 1)),
    cases.ConvCase("even", 3, 64, 5, 5, 66, stride=(2, 2)),
    cases.ConvCase("stem", 1, 3, 7, 5, 33, 7, 3, (2, 2), (3, 1)),
    cases.ConvCase("grouped", 1, 20, 4, 5, 20, 1, 2, groups=5),
)
BARE = cases.ConvCase("bare", 1, 70, 7, 5, 69, 2, 2)
"""Without padding: every row of the result lies beyond the last for some tap and input pixel."""


def channels_last(operands: checks.Operands) -> checks.Operands:
    form = torch.channels_last
    return checks.Operands(
        *(t if t is None or t.dim() == 2 else t.contiguous(memory_format=form) for t in operands)
    )


def geometry(case: cases.ConvCase) -> tuple[Any, ...]:
    return case.stride, case.padding, case.dilation, case.groups


def run(
    case: cases.ConvCase,
    at: str,
    plan: _tiles.Plan,
    change: Callable[[str, dict[str, Any]], None] | None = None,
) -> None:
    """One call on guarded memory, workspaces included; its results must be right as well."""
    own: list[Tensor] = []

    def place(t: Tensor) -> Tensor:
        own.append(guarded(t, at))
        return own[-1]

    def workspace(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        return place(torch.full(tuple(shape), NAN, dtype=dtype, device=device))

    def programs(kernel: Any, _: Tensor) -> Programs:
        def look(arguments: dict[str, Any]) -> None:
            # A copy that a launch made instead would have no guards.
            places = {t.data_ptr() for t in own}
            given = [t for t in arguments.values() if isinstance(t, Tensor)]
            assert all(t.data_ptr() in places for t in given), case
            if change is not None:
                change(kernel.fn.__name__, arguments)

        return Programs(kernel, every_program, look)

    operands = channels_last(checks.exact_operands(case, torch.float16, addend=2))
    expected = checks.expected_dgrad(operands, case, 2)
    given = [place(t) for t in operands]
    dx, sums = place(torch.full_like(operands.raw, NAN)), place(torch.full((2, case.c), NAN))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conv_bn_dgrad, "traceable", programs)
        patch.setattr(torch, "empty", workspace)
        conv_bn_dgrad.launch(*given, dx, sums, 2, *geometry(case), plan=plan)
    assert torch.equal(dx, expected[0]) and torch.equal(sums, expected[1]), (case, plan)


def pages() -> None:
    """Each configuration with a case by turns, its memory's end or start by turns."""
    for i, tile in enumerate(_tiles.TILES):
        for j, case in enumerate(CASES):
            if PROOF or j == i % 4:
                plan = _tiles.Plan(tile, 1 + (i + j // 2) % 2, True, "for the test")
                for at in ("end", "start") if PROOF else (("end", "start")[i // 4 % 2],):
                    run(case, at, plan)


def planted(kernel: str, argument: str, by: str) -> None:
    """One argument of one of the op's kernels off by a few: the child must die of it."""

    def change(name: str, arguments: dict[str, Any]) -> None:
        if name == kernel:
            arguments[argument] += int(by)

    splits = 2 if "merge" in kernel else 1
    plan = _tiles.Plan(_tiles.BY_NAME["64x64_4w4s"], splits, True, "for the test")
    case = BARE if argument == "out_height" else CASES[0]
    run(case, "end" if int(by) > 0 else "start", plan, change)


def huge(which: str, narrow: str) -> None:
    """The last programs of a call with huge tensors, of which the last image alone counts.

    Args:
        which: of `HUGE`; "merged" adds two parts of the reduction, of which the second counts.
        narrow: the kernel that computes offsets in 32 bits all the same; "-" for none.
    """
    case, step = HUGE[which], triton_huge.STEP
    one = dataclasses.replace(case, n=1)
    small = channels_last(checks.exact_operands(one, torch.float16))
    merged = which == "merged"
    if merged:
        small.coefficients[:, :step] = 0
    expected, _ = checks.expected_dgrad(small, one, 1)
    names = ("dz", "y", "addend", "raw")
    shapes = {name: (case.n, *getattr(small, name).shape[1:]) for name in names}
    operands = small._replace(
        **{name: triton_huge.filled(shapes[name], getattr(small, name)) for name in names}
    )
    dx, sums = unreserved(case.input_shape), torch.full((2, case.c), NAN)
    assert max(dx.numel(), operands.dz.numel()) > 2**31
    plan = _tiles.Plan(TILE, 1 + merged, True, "for the test")
    with triton_huge.last_programs(conv_bn_dgrad, narrow):
        conv_bn_dgrad.launch(*operands, dx, sums, 1, *geometry(case), plan=plan)
    # Pixels of the last phase, those of the last tile.
    got, expected, raw = (
        t[-1:, :, case.stride[0] - 1 :: case.stride[0], case.stride[1] - 1 :: case.stride[1]]
        for t in (dx, expected, small.raw)
    )
    image = got.shape[2] * got.shape[3]
    rows = MERGE_TILE[0] if merged else TILE.m
    pixels = min(image, (case.n * image - 1) % rows + 1)
    expected = triton_huge.last_pixels(expected, pixels)
    triton_huge.check(triton_huge.last_pixels(got, pixels), expected)
    centred = triton_huge.last_pixels(raw, pixels).double() - small.norm[2]
    triton_huge.check(sums[1, -8:], (expected * centred).sum(0)[-8:])


TILE = _tiles.BY_NAME["32x64_4w4s"]
IMAGES = triton_huge.IMAGES
HUGE = {
    "dz": cases.ConvCase("dz", IMAGES, 8, 22, 22, 64, 3, 3, padding=(1, 1)),
    # The last of four phases of the stride.
    "dx": cases.ConvCase("dx", IMAGES, 64, 22, 22, 8, 2, 2, (2, 2)),
    "merged": cases.ConvCase("merged", IMAGES, 64, 22, 22, 128),
}


def compiled(capability: int) -> Iterator[list[Any]]:
    """(label, registers, what is wrong) of each variant that a GPU of this architecture compiles.

    The shipped configurations on a loop over channels alone, one over taps too, parts of a
    reduction, groups, and channel counts that fit no tile; CI takes one of them.
    """
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
    import _triton_aot as aot
    import _triton_cases
    import _triton_rules as rules

    shapes = {shape.name: shape for shape in _triton_cases.SHAPES}
    chosen = [("3x3_split", "bf16", "32x64_4w4s", True)]
    if PROOF:
        chosen = [
            (name, kind, tile.name, affine)
            for name in ("1x1_long", "3x3_short", "3x3_split", "3x3_grouped", "3x3_odd")
            for kind in (("bf16", "tf32", "tf32x3") if name == "3x3_short" else ("bf16",))
            for tile in _tiles.TILES
            for affine in (True, False)
        ]
    seen = set()
    for name, kind, tile, affine in chosen:
        for variant in recorded(aot, _triton_cases, capability, shapes[name], kind, tile, affine):
            if variant.key in seen or (variant.kernel == "sums_kernel" and not PROOF):
                continue
            seen.add(variant.key)
            code = aot.compile_variant(variant)
            wrong = rules.failures(variant, code)
            label = f"sm_{capability} {variant.kernel} {name} {kind} {tile} {affine}"
            yield [label, code.registers, wrong]


def recorded(
    aot: Any, shapes: Any, capability: int, shape: Any, kind: str, tile: str, affine: bool
) -> list[Any]:
    """The variants of one call, none where the chooser does not offer the configuration."""
    tensor = shapes.Call("conv_bn_dgrad", shape, kind).tensor

    def rows(*sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=torch.float32, device="meta")

    dz, dx = tensor(*shape.output_shape), tensor(*shape.input_shape)
    operands = (
        dz, dz if affine else None, rows(3, shape.k) if affine else None,
        tensor(*shape.weight_shape), dx, dx, rows(4, shape.c), dx, rows(2, shape.c), 1,
    )  # fmt: skip
    with aot.recording(aot.ARCHITECTURES[capability].limits, tf32=kind == "tf32") as launches:
        try:
            conv_bn_dgrad.launch(*operands, *geometry(shape), allowed=frozenset({tile}))
        except LookupError:
            return []
    return [one.variant for one in launches]


SCENARIOS = {"pages": pages, "planted": planted, "huge": huge}


def main(scenarios: Sequence[str]) -> None:
    """Runs each scenario in a fork, prints its exit status (negative: the signal) and peak MB."""
    if scenarios[0].startswith("compile"):
        print(json.dumps([*compiled(int(scenarios[0].split()[1]))]))
        return
    torch.set_num_threads(1)  # a fork has no threads of a pool
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # those that die leave nothing behind
    for scenario in scenarios:
        child = os.fork()
        if child == 0:
            kind, *arguments = scenario.split()
            status = 1
            try:
                torch.manual_seed(0)
                SCENARIOS[kind](*arguments)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        _, status, usage = os.wait4(child, 0)
        size = usage.ru_maxrss // 1024
        print(f"{scenario}: {os.waitstatus_to_exitcode(status)} {size}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
