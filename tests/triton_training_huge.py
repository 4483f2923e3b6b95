"""Run as a child: the last programs of training's kernels on tensors of more than 2^31 elements."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch
import triton_guard
from guarded_memory import unreserved
from torch import Tensor
from triton_huge import HALF, IMAGES, integers, last_programs

from resnet_fused import numerics

SHAPE = (IMAGES, 64, 22, 22)
PROGRAMS = 16384
"""More than ship: else the last of them would have a thousand tiles of zeros."""
POOLED = (IMAGES, 64, 11, 11)
WINDOW = ((3, 3), (2, 2), (1, 1))
Operands = dict[str, Any]


def filled(shape: tuple[int, ...], layout: str, dtype: torch.dtype = HALF) -> Tensor:
    """Huge and zero but for the last image."""
    t = unreserved(shape, dtype, layout)
    t[-1] = integers(*shape[1:]).to(dtype)
    return t


def norm() -> Tensor:
    scale = torch.ldexp(torch.ones(64), torch.arange(64) % 3 - 1)
    return torch.stack((scale, integers(64).float(), integers(64).float(), torch.ones(64)))


def last_rows(t: Tensor, notes: Operands) -> Tensor:
    """What the last tile holds of the last image, rows first."""
    form = (0, 2, 3, 1) if notes["BY_CHANNEL"] else (0, 1, 2, 3)
    flat = 3 if notes["BY_CHANNEL"] else 2
    count = (notes["rows"] - 1) % notes["BLOCK_M"] + 1
    return t[-1:].permute(form).flatten(0, flat - 1)[-count:]


def plain(op: str, layout: str, narrow: str) -> None:
    """bn_add_act and bn_backward_apply."""
    module = importlib.import_module(f"resnet_fused.triton.{op}")
    y, r, out = filled(SHAPE, layout), filled(SHAPE, layout), unreserved(SHAPE, HALF, layout)
    values, notes = norm(), {}
    with last_programs(module, narrow, notes):
        if op == "bn_add_act":
            module.launch(y, values, r, None, out, 0, "relu")
            expected = numerics.bn_add_act_oracle(y[-1:], values, r[-1:])
        else:
            module.launch(y, r, values[:3], out)
            expected = numerics.affine_gradient(y[-1:], r[-1:], values[:3])
    equal(last_rows(out, notes), last_rows(expected, notes))


def pool(op: str, layout: str, narrow: str) -> None:
    module = importlib.import_module(f"resnet_fused.triton.{op}")
    y, out = filled(SHAPE, layout), unreserved(POOLED, HALF, layout)
    taps, values, notes = unreserved(POOLED, torch.uint8, layout), norm(), {}
    with last_programs(module, narrow, notes):
        module.launch(y, values, out, taps, *WINDOW)
    expected, winners = numerics.bn_act_pool_oracle(y[-1:], values, *WINDOW)
    equal(last_rows(out, notes), last_rows(expected, notes))
    equal(last_rows(taps, notes), last_rows(winners, notes))


def backward(op: str, layout: str, narrow: str) -> None:
    """The last program's run of tiles ends with the last image, of which its sums are made."""
    module = importlib.import_module(f"resnet_fused.triton.{op}")
    y, dz = filled(SHAPE, layout), unreserved(SHAPE, HALF, layout)
    values, notes = norm(), {}
    sums = torch.zeros(2, 64)
    with last_programs(module, narrow, notes):
        if op == "bn_add_act_backward":
            dout = filled(SHAPE, layout)
            module.launch(dout, None, y, values, None, None, dz, sums, "relu")
            expected = numerics.masked(dout[-1:], numerics.normalised(y[-1:], values))
        else:
            dout = filled(POOLED, layout)
            _, winners = numerics.bn_act_pool_oracle(y[-1:], values, *WINDOW)
            taps = unreserved(POOLED, torch.uint8, layout)
            taps[-1] = winners[0]
            module.launch(dout, taps, y, values, dz, sums, *WINDOW)
            expected, _ = numerics.bn_act_pool_backward_oracle(
                dout[-1:], winners, y[-1:], values, *WINDOW
            )
    first = 0 if layout == "nhwc" else 63  # without channels side by side a program has one
    equal(dz[-1, first:], expected[0, first:])
    # Of the merge, too, the last program ran: its 16 columns are centred sums.
    oracle = numerics.reductions_oracle(expected, (y[-1:], values))
    last = max(first, 64 - 16)
    equal(sums[1, last:], oracle[1, last:])


def equal(got: Tensor, expected: Tensor) -> None:
    assert torch.equal(got, expected.to(got.dtype)), (got, expected)
    assert got.count_nonzero()


RUNS = {
    "bn_add_act": plain,
    "bn_backward_apply": plain,
    "bn_act_pool": pool,
    "bn_add_act_backward": backward,
    "bn_act_pool_backward": backward,
}


def training(op: str, layout: str, narrow: str) -> None:
    """One op; `narrow` is a kernel that computes offsets in 32 bits all the same, or "-"."""
    from resnet_fused.triton import _elementwise

    _elementwise.PROGRAMS = PROGRAMS
    RUNS[op](op, layout, narrow)


triton_guard.SCENARIOS["training"] = training

if __name__ == "__main__":
    triton_guard.main(sys.argv[1:])
