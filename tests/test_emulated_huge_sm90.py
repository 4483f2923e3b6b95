"""Convolutions by TMA of more than 2^31 elements, or pixels, emulated and exact on integers.

As in test_emulated_huge.py, over memory that is reserved and never filled. TMA reaches 2^32
elements along a dimension and strides below 2^40 bytes; what a launch counts in 31 bits, pixels and
tiles, is cut into several launches.
"""

from __future__ import annotations

import sys

import emulated
import pytest
import torch
from conv_by_tma import tiles, windows
from test_emulated_huge import HALF, PLAIN, empty, far_apart, integers, launch, powers

from resnet_fused import cases, numerics

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: mmap without reserve"),
]

OP = "conv_bn_act"
CASE = cases.ConvCase("strides", 3, 64, 5, 6, 64, 3, 3, padding=(1, 1), residual=True)
APART = (0, 2, 3)
"""Dimensions whose elements may lie apart; channels are adjacent."""


def first_of(table):
    """The configuration of the fewest pixels."""
    return min(table(), key=lambda index: table()[index]["m"])


def exact(case):
    """Operands by name with the result among them, channels_last, and what it must be."""
    operands = numerics.exact_inputs(case, HALF)
    expected = numerics.conv_bn_act_oracle(*operands, **case.geometry).to(
        HALF, memory_format=torch.channels_last
    )
    made = {
        name: t if t is None or t.dim() == 1 else t.contiguous(memory_format=torch.channels_last)
        for name, t in operands._asdict().items()
    }
    return made | {"out": torch.full_like(expected, torch.nan)}, expected


@pytest.mark.parametrize("bits", [31, 32])
@pytest.mark.parametrize(
    ("table", "name", "dim"),
    [
        *((tiles, name, dim) for name in ("x", "weight") for dim in APART),
        *((windows, name, dim) for name in ("x", "weight", "residual", "out") for dim in APART),
    ],
)
def test_strides_beyond(table, name, dim, bits):
    """Rows of a launch by windows may lie apart in every tensor, by im2col in what it reads."""
    tensors, expected = exact(CASE)
    tensors[name] = far_apart(tensors[name], dim, 2**bits)
    launch(OP, tensors, CASE, configuration=first_of(table))
    assert torch.equal(tensors["out"], expected)


@pytest.mark.parametrize("step", [2**25, 2**27])
@pytest.mark.parametrize("name", ["x", "residual", "out"])
def test_pixels_far_apart(name, step):
    """Of a 1x1, all in one step: more than 2^31 elements between the first and the last."""
    case = cases.ConvCase("1x1", 3, 64, 5, 6, 64, residual=True)
    tensors, expected = exact(case)
    n, c, h, w = tensors[name].shape
    assert (n * h * w - 1) * step > 2**31
    apart = empty((n * h * w - 1) * step + c)
    tensors[name] = apart.as_strided((n, c, h, w), (h * w * step, 1, w * step, step)).copy_(
        tensors[name]
    )
    launch(OP, tensors, case, configuration=first_of(tiles))
    assert torch.equal(tensors["out"], expected)


ENOUGH = (2**22, *emulated.H200[1:])
"""So many multiprocessors that each block has one tile."""


def last_of(case, rows):
    """Operands and result of a 1x1, the operands zero but for the last pixels; their results."""

    def image(channels):
        flat = empty(case.n * case.h * case.w * channels)
        return flat.view(case.n, case.h, case.w, channels).permute(0, 3, 1, 2)

    def end(t):
        return t.permute(0, 2, 3, 1).view(-1, t.shape[1])[-rows:]

    tensors = {"x": image(case.c), "residual": image(case.k), "out": image(case.k)}
    for name in ("x", "residual"):
        end(tensors[name])[:] = integers(rows, tensors[name].shape[1])
    tensors["weight"] = integers(case.k, case.c, 1, 1)
    tensors["scale"] = torch.ldexp(torch.ones(case.k), powers(case.k))
    tensors["shift"] = integers(case.k).float()
    x, shortcut = (end(tensors[name]).double() for name in ("x", "residual"))
    expected = x @ tensors["weight"][..., 0, 0].double().T * tensors["scale"] + tensors["shift"]
    return tensors, (expected + shortcut).to(HALF), end(tensors["out"])


@pytest.mark.parametrize(
    ("case", "launches"),
    [
        (cases.ConvCase("elements", 2**21 + 77, 64, 1, 1, 1024, residual=True, act="none"), 1),
        (cases.ConvCase("pixels", 33, 8, 2**13, 2**13 + 1, 8, residual=True, act="none"), 2),
    ],
    ids=str,
)
def test_dense_beyond(case, launches):
    """Of the last tile, every bit; no other is written."""
    index = first_of(tiles)
    tile = tiles()[index]
    together = 31 if launches > 1 else case.n  # images: as many as 31 bits of pixels hold
    pixels = ((case.n - 1) % together + 1) * case.h * case.w  # of the last launch
    of_pixels, of_channels = -(-pixels // tile["m"]), -(-case.k // tile["n"])
    block = of_pixels * of_channels - 1
    plans = []

    def last(plan):
        plans.append(plan)
        return ((block, block),)

    pixels = (pixels - 1) % tile["m"] + 1
    tensors, expected, got = last_of(case, tile["m"])
    launch(OP, tensors, case, blocks=last, gpu=ENOUGH, configuration=index, splits=1)
    assert [plan["launches"] for plan in plans] == [launches]
    channels = (case.k - 1) % tile["n"] + 1
    assert torch.equal(got[-pixels:, -channels:], expected[-pixels:, -channels:])
    assert got[-pixels:, -channels:].count_nonzero()
    assert not got[:-pixels].count_nonzero() and not got[:, :-channels].count_nonzero()


@pytest.mark.parametrize("images", [3, 33])
def test_the_choice_counts_all_launches(images):
    """Those of mma.sync, whose offsets reach three of these images, are not the cheaper for it."""
    case = cases.ConvCase("far", images, 64, 2**13, 2**13 + 1, 64)
    module = emulated.load()

    def image(*shape):
        return torch.empty(shape, dtype=HALF, device="meta", memory_format=torch.channels_last)

    strides = {
        "x_stride": image(*case.input_shape).stride(),
        "weight_stride": image(*case.weight_shape).stride(),
        "out_stride": image(*case.output_shape).stride(),
        "residual_stride": (0, 0, 0, 0),
    }
    problem = module.ConvBnAct(
        dtype="float16", allow_tf32=True, x_size=case.input_shape, weight_size=case.weight_shape,
        stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1, relu=True, residual=0,
        **dict.fromkeys(("x", "weight", "scale", "shift", "out"), 4096), **strides, **PLAIN,
    )  # fmt: skip
    found = module.conv_bn_act_plan(problem, emulated.H200)
    by_mma = module.conv_bn_act_plan(problem, (*emulated.H200[:3], 80))
    assert (found["launches"], by_mma["launches"]) == (-(-images // 31), -(-images // 3))
    assert found["configuration"] in tiles() and found["cycles"] < by_mma["cycles"]
