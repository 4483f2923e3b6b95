"""What training's convolutions load and store, access by access, beside what is predicted."""

from __future__ import annotations

import math

import pytest
from triton_trace import issued_bytes, needs_interpreter, watch

from resnet_fused.bench.subject import Subject
from resnet_fused.bench.tune_kernels import Option, TritonKernel
from resnet_fused.bench.tune_ops import OPS, outputs
from resnet_fused.bench.work import build
from resnet_fused.triton import _tiles
from resnet_fused.triton import _training_traffic as traffic

pytestmark = needs_interpreter

CASES = (
    "3x3_16_40_at7",
    "1x1_40_72_at9_add_noact",
    "3x3s2_24_16_at8",
    "1x1s2_72_40_at7_noact",
    "3x3g4_32_32_at6",
    "7x7s2_3_16_at12_noact",
)
"""Taps, long reductions, strides, groups side by side, a filter's row at once; none fits a tile."""
TILES = ("32x64_4w4s", "64x64_4w4s")
DGRAD, END = "conv_bn_dgrad", "conv_bn_dgrad_end"
FIRST = {"conv_bn_stats": "x", DGRAD: "dz", END: "dz", "conv_bn_wgrad": "dz"}
SECOND = {"conv_bn_stats": "weight", DGRAD: "weight", END: "weight", "conv_bn_wgrad": "x"}
RESULT = {"conv_bn_stats": "out", DGRAD: "dx", END: "dx", "conv_bn_wgrad": "dweight"}
SUMS = {"conv_bn_stats": "moments", DGRAD: "workspace", END: "workspace"}
BELOW = {"conv_bn_stats": (), DGRAD: ("raw",), END: ("out", "raw"), "conv_bn_wgrad": ()}
MERGES = ("merge_moments_kernel", "merge_chunks_kernel", "sums_kernel")
"""What is left out: kernels over the tiles' sums."""


def cells():
    for op in FIRST:
        for index, name in enumerate(CASES):
            if op in (DGRAD, END) and name.startswith("7x7"):
                continue  # nobody needs the images' gradient
            for splits in (1, 2):
                yield op, name, TILES[(index + splits) % 2], splits


def predicted(op, case, product, plan, given):
    below, affine = given.norm is not None, given.y is not None
    if op == "conv_bn_stats":
        return traffic.stats_issued_bytes(case, product, plan, prologue=below)
    if op == "conv_bn_wgrad":
        return traffic.bn_wgrad_issued_bytes(case, product, plan, affine=affine, prologue=below)
    addend = 0 if given.addend is None else given.addend.numel()
    if op == END:
        return traffic.bn_dgrad_end_issued_bytes(case, product, plan, affine=affine, addend=addend)
    return traffic.bn_dgrad_issued_bytes(
        case, product, plan, affine=affine, addend=addend, masked=below
    )


@pytest.mark.parametrize(("op", "name", "tile", "splits"), list(cells()))
def test_every_access_is_predicted(op, name, tile, splits):
    from importlib import import_module

    work = build(Subject("kernel", op, name, 2, "float16", "cpu"))
    case, given = work.case, work.sets[0]
    product = OPS[op].product(import_module(f"resnet_fused.triton.{op}"), given, case)
    tile = _tiles.BY_NAME[tile]
    plan = _tiles.Plan(tile, splits, tile.warps == 4, "for the test")
    outs = outputs(work)
    outs[0].fill_(math.nan)
    with watch() as launches:
        TritonKernel().launch(work, 0, outs, Option(tile.name, splits, wish=plan))
    assert work.judge(outs if len(outs) > 1 else outs[0]).ok
    over = [launch for launch in launches if launch.name not in MERGES]
    assert len(over) == splits
    expected = predicted(op, case, product, plan, given)

    def loaded(*names):
        return sum(x[n].loaded for x in over for n in names if n in x.accesses)

    def stored(name):
        return sum(x[name].stored for x in over if name in x.accesses)

    assert loaded(FIRST[op]) == expected.rows
    assert (loaded("y") if given.y is not None else 0) == expected.raw
    assert loaded(SECOND[op]) == expected.columns
    vectors = ("norm", "coefficients") if given.norm is not None else ("coefficients",)
    assert loaded(*vectors) == expected.vectors
    assert (loaded("addend") if given.addend is not None else 0) == expected.addend
    assert (loaded(*BELOW[op]) if given.norm is not None else 0) == expected.below
    assert stored(RESULT[op]) == expected.result
    assert (stored(SUMS[op]) if op in SUMS and expected.sums else 0) == expected.sums
    assert (stored("partial") if splits > 1 else 0) == expected.partial_stored
    assert (loaded("partial") if splits > 1 else 0) == expected.partial_loaded
    assert issued_bytes(over) == expected.total
