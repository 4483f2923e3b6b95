"""Run as a child: conv_bn_dgrad_end in Triton where a fault ends the process.

    python triton_bn_dgrad_end.py "pages" "huge dx -"    each in a fork; prints what became of it

It needs TRITON_INTERPRET=1.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import triton_bn_dgrad
import triton_huge
from guarded_memory import guarded, unreserved
from torch import Tensor
from triton_bn_dgrad import BARE, CASES, HUGE, NAN, TILE, geometry
from triton_trace import PROOF, Programs, every_program

from resnet_fused import cases
from resnet_fused.ops import _training_checks_dgrad_end as checks
from resnet_fused.triton import _tiles
from resnet_fused.triton import conv_bn_dgrad as plain
from resnet_fused.triton import conv_bn_dgrad_end as kernel
from resnet_fused.triton._launch import MERGE_TILE


def channels_last(operands: checks.Operands) -> checks.Operands:
    form = torch.channels_last
    return checks.Operands(
        *(t if t is None or t.dim() == 2 else t.contiguous(memory_format=form) for t in operands)
    )


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

    def programs(launched: Any, _: Tensor) -> Programs:
        def look(arguments: dict[str, Any]) -> None:
            # A copy that a launch made instead would have no guards.
            places = {t.data_ptr() for t in own}
            given = [t for t in arguments.values() if isinstance(t, Tensor)]
            assert all(t.data_ptr() in places for t in given), case
            if change is not None:
                change(launched.fn.__name__, arguments)

        return Programs(launched, every_program, look)

    operands = channels_last(checks.exact_operands(case, torch.float16, addend=2))
    expected = checks.expected_end(operands, case, 2)
    given = [place(t) for t in operands]
    dx, sums = place(torch.full_like(operands.raw, NAN)), place(torch.full((3, case.c), NAN))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "traceable", programs)
        patch.setattr(plain, "traceable", programs)
        patch.setattr(torch, "empty", workspace)
        kernel.launch(*given, dx, sums, 2, *geometry(case), plan=plan)
    assert torch.equal(dx, expected[0]) and torch.equal(sums, expected[1]), (case, plan)


def pages() -> None:
    """Each configuration with a case by turns, its memory's end or start by turns."""
    for i, tile in enumerate(_tiles.TILES):
        for j, case in enumerate(CASES):
            if PROOF or j == i % 4:
                plan = _tiles.Plan(tile, 1 + (i + j // 2) % 2, True, "for the test")
                for at in ("end", "start") if PROOF else (("end", "start")[i // 4 % 2],):
                    run(case, at, plan)


def planted(name: str, argument: str, by: str) -> None:
    """One argument of one of the op's kernels off by a few: the child must die of it."""

    def change(launched: str, arguments: dict[str, Any]) -> None:
        if launched == name:
            arguments[argument] += int(by)

    splits = 2 if "merge" in name else 1
    plan = _tiles.Plan(_tiles.BY_NAME["64x64_4w4s"], splits, True, "for the test")
    case = BARE if argument == "out_height" else CASES[0]
    run(case, "end" if int(by) > 0 else "start", plan, change)


@contextlib.contextmanager
def last_programs(narrow: str) -> Iterator[None]:
    with triton_huge.last_programs(kernel, narrow), triton_huge.last_programs(plain, narrow):
        yield


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
    expected, _ = checks.expected_end(small, one, 1)
    names = ("dz", "y", "addend", "out", "raw", "residual")
    shapes = {name: (case.n, *getattr(small, name).shape[1:]) for name in names}
    operands = small._replace(
        **{name: triton_huge.filled(shapes[name], getattr(small, name)) for name in names}
    )
    dx, sums = unreserved(case.input_shape), torch.full((3, case.c), NAN)
    assert max(dx.numel(), operands.dz.numel()) > 2**31
    plan = _tiles.Plan(TILE, 1 + merged, True, "for the test")
    with last_programs(narrow):
        kernel.launch(*operands, dx, sums, 1, *geometry(case), plan=plan)
    # Pixels of the last phase, those of the last tile.
    got, expected, raw, residual = (
        t[-1:, :, case.stride[0] - 1 :: case.stride[0], case.stride[1] - 1 :: case.stride[1]]
        for t in (dx, expected, small.raw, small.residual)
    )
    image = got.shape[2] * got.shape[3]
    rows = MERGE_TILE[0] if merged else TILE.m
    pixels = min(image, (case.n * image - 1) % rows + 1)
    expected = triton_huge.last_pixels(expected, pixels)
    triton_huge.check(triton_huge.last_pixels(got, pixels), expected)
    # The last program of the merge of sums has the last 8 of the last row.
    centred = triton_huge.last_pixels(residual, pixels).double() - small.residual_norm[2]
    triton_huge.check(sums[2, -8:], (expected * centred).sum(0)[-8:])
    assert raw.count_nonzero()


if __name__ == "__main__":
    triton_bn_dgrad.SCENARIOS.update(pages=pages, planted=planted, huge=huge)
    triton_bn_dgrad.main(sys.argv[1:])
