"""Emulated convolutions whose offsets or partial sums are beyond 2^31 elements, exact on integers.

The tensors lie in memory that is reserved and never filled. The kernels may touch their tensors
alone, so that an offset that wraps is an error if it does not lead to wrong numbers.
"""

from __future__ import annotations

import sys

import emulated
import pytest
import torch
from guarded_memory import FAR, unmapped_around
from matrix import geometry_args
from test_ops_conv_gradients import gradient_operands
from torch import Tensor

from resnet_fused import cases, numerics

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: mmap without reserve"),
]

HALF = torch.float16
# Each operand's dimensions have more than one element. 12 images: conv_wgrad reads 64 more at most,
# whose offsets must be in reach of wide loads.
CASE = cases.ConvCase("strides", 12, 16, 5, 5, 16, 3, 3, padding=(1, 1), residual=True)
PLAIN = {"reverse": False, "dependent": False, "follows": False, "arrivals": 0, "arrivals_count": 0}
"""A launch by itself, from the first tile to the last."""
RESULTS = {"conv_bn_act": "out", "conv_dgrad": "x", "conv_wgrad": "weight"}
INPUTS = {
    "conv_bn_act": ("x", "weight", "residual"),
    "conv_dgrad": ("dy", "y", "weight"),
    "conv_wgrad": ("dy", "y", "x"),
}
# Those that all offsets of 16 bytes reach, though elements are beyond 2^31.
WIDE = {
    *(("conv_bn_act", name, dim) for name in ("x", "weight") for dim in (0, 3)),
    *((op, name, 0) for op in ("conv_dgrad", "conv_wgrad") for name in ("dy", "y")),
    *(("conv_dgrad", "weight", 0), ("conv_dgrad", "weight", 3), ("conv_wgrad", "x", 0)),
    *(("conv_wgrad", name, dim) for name in ("dy", "y", "x") for dim in (2, 3)),
    *((op, result, dim) for op, result in RESULTS.items() for dim in range(4)),
    *(("conv_bn_act", "residual", dim) for dim in range(4)),
}
# Wide offsets run over 32 rows of taps that do not exist, and conv_bn_act's chooser leaves narrow
# loads to those who ask for them.
REFUSED = {("conv_bn_act", "x", 2), ("conv_bn_act", "weight", 2)}


def empty(count: int, dtype: torch.dtype = HALF) -> Tensor:
    """Zeros that take no memory, with nothing around them."""
    return unmapped_around(count, dtype, "start", FAR)


def far_apart(t: Tensor, dim: int, beyond: int) -> Tensor:
    """A copy, channels_last but for the last element of a dimension, which is `beyond` away."""
    strides = list(t.contiguous(memory_format=torch.channels_last).stride())
    strides[dim] = -(-beyond // (t.shape[dim] - 1) // 64) * 64 + 64
    span = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, strides, strict=True))
    return empty(span, t.dtype).as_strided(t.shape, strides).copy_(t)


def launch(op, tensors, case, *, blocks=None, gpu=emulated.H200, **choice):
    """Runs a kernel on tensors by name; the plan.

    Args:
        op: the op.
        tensors: its operands and its result.
        case: the convolution.
        blocks: the only ones to run, (first, last) of each launch in turn; None for all.
        gpu: what the plan is made for.
        choice: configuration and splits.
    """
    module = emulated.load()
    stride, padding, dilation, groups = geometry_args(case)[:4]
    forward = op == "conv_bn_act"
    absent = "residual" if forward else "y"
    given = {
        absent: 0,
        f"{absent}_stride": (0, 0, 0, 0),
        **{name: t.data_ptr() for name, t in tensors.items()},
        **{f"{name}_stride": t.stride() for name, t in tensors.items() if t.dim() == 4},
        **({"relu": case.act == "relu", **PLAIN} if forward else {}),
    }
    problem = (module.ConvBnAct if forward else module.ConvGradient)(
        dtype="float16",
        allow_tf32=True,
        x_size=case.input_shape,
        weight_size=case.weight_shape,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        **given,
    )
    plan = getattr(module, f"{op}_plan")(problem, gpu, **choice)
    workspace = empty(plan["workspace_bytes"] // 4 + 1, torch.float32)
    result = RESULTS[op]
    inputs = {name: t for name, t in tensors.items() if name != result}
    for part in blocks(plan) if blocks else (None,):
        with emulated.using(blocks=part):
            settings = emulated.settings(
                (op, case), inputs, {result: tensors[result], "workspace": workspace}
            )
        getattr(module, op)(
            settings,
            problem,
            gpu,
            plan["configuration"],
            plan["splits"],
            workspace.data_ptr(),
        )
    return plan


def operands_of(op):
    """Operands by name, the result among them, and what it must be."""
    if op == "conv_bn_act":
        operands = numerics.exact_inputs(CASE, HALF)
        expected = numerics.conv_bn_act_oracle(*operands, **CASE.geometry)
        tensors = operands._asdict()
    else:
        dy, y, x, weight, scale = gradient_operands(CASE, HALF, exact=True)
        oracle = numerics.conv_gradients_oracle(dy, y, x, weight, scale, **CASE.geometry)
        expected = oracle[op == "conv_wgrad"]
        tensors = {"dy": dy, "y": y, "x": x, "weight": weight, "scale": scale}
    tensors = {
        name: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t
        for name, t in tensors.items()
    }
    return tensors | {RESULTS[op]: torch.full_like(expected, torch.nan, dtype=HALF)}, expected


@pytest.mark.parametrize("bits", [31, 32])
@pytest.mark.parametrize("dim", range(4))
@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op in RESULTS for name in (*INPUTS[op], RESULTS[op])]
)
def test_strides_beyond(op, name, dim, bits):
    tensors, expected = operands_of(op)
    tensors[name] = far_apart(tensors[name], dim, 2**bits)
    chosen = -1
    if (op, name, dim) in REFUSED:
        with pytest.raises(ValueError, match="one image is more than a launch can take"):
            launch(op, tensors, CASE)
        chosen = tile_of(op, wide=False)[0]
    plan = launch(op, tensors, CASE, configuration=chosen)
    assert torch.equal(tensors[RESULTS[op]], expected.to(HALF))
    tile = tiles(op)[plan["configuration"]]
    if bits == 31:
        assert tile["wide"] == ((op, name, dim) in WIDE)


PARTS = 3
PIXELS, CHANNELS = 2**20 + 7, 1040
"""A result with fewer than 2^31 elements, of which two parts' sums are more."""


def integers(*shape):
    return torch.randint(-4, 5, shape).to(HALF)


@pytest.mark.parametrize("op", ["conv_bn_act", "conv_dgrad"])
def test_partial_sums_beyond(op):
    """Of the last tile; all but the last part's operands are zero."""
    index, tile = tile_of(op)
    depth = PARTS * tile["step_bytes"] // HALF.itemsize
    last = slice(-(depth // PARTS), None)
    pixels, channels = (PIXELS - 1) % tile["m"] + 1, (CHANNELS - 1) % tile["n"] + 1
    forward = op == "conv_bn_act"
    c, k = (depth, CHANNELS) if forward else (CHANNELS, depth)
    case = cases.ConvCase("sums", PIXELS, c, 1, 1, k, act="none")
    source, result = (empty(PIXELS * size).view(PIXELS, size, 1, 1) for size in (depth, CHANNELS))
    source[-pixels:, last] = integers(pixels, depth // PARTS, 1, 1)
    tensors = {"weight": integers(k, c, 1, 1), "scale": torch.ldexp(torch.ones(k), powers(k))}
    weight, scale = tensors["weight"][..., 0, 0].double(), tensors["scale"].double()
    if forward:
        tensors |= {"x": source, "out": result, "shift": integers(k).float()}
        expected = source[-pixels:, :, 0, 0].double() @ weight.T * scale + tensors["shift"]
    else:
        tensors |= {"dy": source, "x": result}
        expected = (source[-pixels:, :, 0, 0].double() * scale) @ weight
    plan = launch(op, tensors, case, blocks=last_tile, configuration=index, splits=PARTS)
    assert plan["workspace_bytes"] // 4 > 2**31
    got = result[-pixels:, -channels:, 0, 0]
    assert torch.equal(got, expected[:, -channels:].to(HALF))
    assert got.count_nonzero()


def test_partial_sums_beyond_of_weights():
    """As above: the last tile's parts, then the blocks that merge them."""
    index, tile = tile_of("conv_wgrad")
    depth = PARTS * tile["step_bytes"] // HALF.itemsize
    last = slice(-(depth // PARTS), None)
    k, c = PIXELS // 32 + 8, 32 * CHANNELS + 16
    rows, columns = (k - 1) % tile["m"] + 1, (c - 1) % tile["n"] + 1
    case = cases.ConvCase("sums", depth, c, 1, 1, k, act="none")
    dy, x, dweight = (empty(n * m).view(n, m, 1, 1) for n, m in ((depth, k), (depth, c), (k, c)))
    dy[last, -rows:] = integers(depth // PARTS, rows, 1, 1)
    x[last, -columns:] = integers(depth // PARTS, columns, 1, 1)
    scale = torch.ldexp(torch.ones(k), powers(k))

    def blocks(plan):
        merging = tile["m"] * tile["n"] // (4 * 32)
        tiles = plan["blocks"] // PARTS
        return *last_tile(plan), (merging * (tiles - 1), merging * tiles - 1)

    tensors = {"dy": dy, "x": x, "weight": dweight, "scale": scale}
    plan = launch("conv_wgrad", tensors, case, blocks=blocks, configuration=index, splits=PARTS)
    assert plan["workspace_bytes"] // 4 > 2**31
    got = dweight[-rows:, -columns:, 0, 0]
    sums = dy[:, -rows:, 0, 0].double().T @ x[:, -columns:, 0, 0].double()
    assert torch.equal(got, (scale[-rows:, None] * sums).to(HALF))
    assert got.count_nonzero()


def tiles(op):
    """The table of an op's kernel."""
    return getattr(emulated.load(), f"{op}_configurations")()


def tile_of(op, *, wide=True):
    """Index and entry of a small configuration."""
    return next((i, t) for i, t in enumerate(tiles(op)) if t["wide"] == wide and t["m"] == 64)


def last_tile(plan):
    """Its parts' blocks, the last ones of the grid."""
    return ((plan["blocks"] - PARTS, plan["blocks"] - 1),)


def powers(size):
    return torch.randint(-3, 2, (size,))
