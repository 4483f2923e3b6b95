"""Run as a child: kernels on tensors that end, or begin, where memory that may be touched ends.

Any access beyond is a fault of the processor's, so that the parent sees the child die by a signal.
"""

from __future__ import annotations

import functools
import importlib
import math
import os
import resource
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import triton_huge
from guarded_memory import guarded
from matrix import geometry_args
from torch import Tensor
from triton_trace import Programs, every_program

from resnet_fused import cases, numerics
from resnet_fused.triton import _tiles

CASES = (
    # Pixels, channels and filters that no tile divides.
    cases.ConvCase("odd", 1, 70, 7, 5, 69, 2, 2, (1, 1), (1, 1), residual=True),
    # No padding and whole steps: the loads of pixels have no mask at all.
    cases.ConvCase("even", 3, 64, 5, 5, 66, stride=(2, 2), residual=True),
    cases.ConvCase("stem", 1, 3, 9, 9, 33, 7, 7, (2, 2), (3, 3)),
    cases.ConvCase("grouped", 1, 20, 4, 5, 20, 1, 2, groups=5),
    cases.ConvCase("depthwise", 1, 70, 4, 4, 70, 2, 2, groups=70, act="none"),
)
BARE = cases.ConvCase("bare", 1, 70, 7, 5, 69, 2, 2)
"""Without padding: every row of the result lies beyond the last for some tap and input pixel."""

BN_ACT_CASES = (
    # Rows and columns that no tile divides, of several tiles.
    cases.BnActCase("nhwc", 2, 65, 7, 5, True),
    cases.BnActCase("nchw", 2, 65, 7, 5, True, layout="nchw"),
    cases.BnActCase("wide", 1, 1031, 5, 3),
    cases.BnActCase("long", 1, 3, 33, 35, layout="nchw"),
)
ENDS = (("end",), ("start",))
Prepared = tuple[Callable[..., None], Tensor, Tensor]


def prepare(op: str, case: Any, place: Callable[[Tensor], Tensor]) -> Prepared:
    """A launch but for its plan, the tensor that it writes, and what must stand there.

    Args:
        op: "conv_bn_act", "conv_dgrad", "conv_wgrad" or "bn_act".
        case: its sizes.
        place: puts a tensor where it is to lie.
    """
    launch = importlib.import_module(f"resnet_fused.triton.{op}").launch
    if op == "bn_act":
        form = torch.contiguous_format if case.layout == "nchw" else torch.channels_last
        x, residual = (integers(case.shape).contiguous(memory_format=form) for _ in range(2))
        vectors = [integers((case.c,)).float() for _ in range(2)]
        expected = numerics.bn_act_oracle(
            x, *vectors, residual if case.residual else None, case.act
        )
        shortcut = place(residual) if case.residual else None
        out = place(torch.full_like(x, math.nan))
        given = (place(x), *map(place, vectors), shortcut, out, case.act)
        return functools.partial(launch, *given), out, expected.half()

    form = torch.channels_last
    operands = numerics.exact_inputs(case, torch.float16)
    x, weight, scale, shift, residual = (
        t if t is None else place(t.contiguous(memory_format=form) if t.dim() == 4 else t)
        for t in operands
    )
    geometry = geometry_args(case)
    if op == "conv_bn_act":
        oracle = numerics.conv_bn_act_oracle(*operands, **case.geometry, act=case.act)
        expected = numerics.exact_expected(oracle, torch.float16)
        out = place(torch.full_like(expected, math.nan, memory_format=form))
        given = (x, weight, scale, shift, residual, out, *geometry)
        return functools.partial(launch, *given), out, expected

    dy, y = (place(integers(case.output_shape).contiguous(memory_format=form)) for _ in range(2))
    mask = y if case.act == "relu" else None
    oracle = numerics.conv_gradients_oracle(dy, mask, x, weight, scale, **case.geometry)
    like, expected = (x, oracle[0]) if op == "conv_dgrad" else (weight, oracle[1])
    gradient = place(torch.full_like(like, math.nan))
    other = (weight, scale) if op == "conv_dgrad" else (x, scale)
    given = (dy, mask, *other, gradient, *geometry[:-1])
    return functools.partial(launch, *given), gradient, expected.half()


def integers(shape: Sequence[int]) -> Tensor:
    """-4 .. 4 in float16: every sum is exact."""
    return torch.randint(-4, 5, tuple(shape)).half()


def run(
    op: str,
    case: Any,
    at: str,
    plan: _tiles.Plan | None,
    change: Callable[[str, dict[str, Any]], None] | None = None,
) -> None:
    """One call on guarded memory, workspace included; its result must be right as well."""
    module = importlib.import_module(f"resnet_fused.triton.{op}")
    own: list[Tensor] = []

    def place(t: Tensor) -> Tensor:
        own.append(guarded(t, at))
        return own[-1]

    def workspace(*shape: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        sizes = shape[0] if isinstance(shape[0], Sequence) else shape
        return place(torch.full(tuple(sizes), math.nan, dtype=dtype, device=device))

    def programs(kernel: Any, _: Tensor) -> Programs:
        def look(arguments: dict[str, Any]) -> None:
            # A copy that a launch made instead would have no guards.
            places = {t.data_ptr() for t in own}
            given = [t for t in arguments.values() if isinstance(t, Tensor)]
            assert all(t.data_ptr() in places for t in given), (op, case)
            if change is not None:
                change(kernel.fn.__name__, arguments)

        return Programs(kernel, every_program, look)

    launch, result, expected = prepare(op, case, place)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "traceable", programs)
        patch.setattr(torch, "empty", workspace)
        launch() if plan is None else launch(plan=plan)
    assert torch.equal(result, expected), (op, case, plan)


def pages(op: str, every: str) -> None:
    """Each configuration with each case at both ends; else by turns of cases and ends."""
    if op == "bn_act":
        for case in BN_ACT_CASES:
            for at in ("end", "start"):
                run(op, case, at, None)
        return
    for i, tile in enumerate(_tiles.TILES):
        for j, case in enumerate(CASES):
            splits, flat = 1 + (i + j) % 2, tile.warps == 4
            forward = op == "conv_bn_act" and j in (i % 5, (i + 2) % 5)
            if every == "all" or forward or j == i % 5:
                for at in ("end", "start") if every == "all" or forward else ENDS[i % 2]:
                    run(op, case, at, _tiles.Plan(tile, splits, flat, "for the test"))


def planted(op: str, kernel: str, argument: str, by: str) -> None:
    """One argument of one of the op's kernels off by a few: the child must die of it."""

    def change(name: str, arguments: dict[str, Any]) -> None:
        if name == kernel:
            arguments[argument] += int(by)

    splits = 2 if "merge" in kernel else 1
    plan = _tiles.Plan(_tiles.BY_NAME["64x64_4w4s"], splits, True, "for the test")
    case = BARE if argument == "out_height" else CASES[0]
    at = "end" if int(by) > 0 else "start"
    if op == "bn_act":
        run(op, BN_ACT_CASES[0], at, None, change)
    else:
        run(op, case, at, plan, change)


SCENARIOS = {
    "pages": pages,
    "planted": planted,
    "huge": triton_huge.huge,
    "sums": triton_huge.sums,
}


def main(scenarios: Sequence[str]) -> None:
    """Runs each scenario, "pages bn_act some", in a fork, and prints what became of it.

    A line for each: the exit status (negative: the signal) and the peak of its memory in MB beyond
    what the imports had taken.
    """
    torch.set_num_threads(1)  # a fork has no threads of a pool
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # those that die leave nothing behind
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
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
        more = (usage.ru_maxrss - before) // 1024
        print(f"{scenario}: {os.waitstatus_to_exitcode(status)} {more}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
