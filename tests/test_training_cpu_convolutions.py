"""Convolutions between the C++ passes of training: bit by bit what the ops' references give."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from matrix import DTYPES, IDS, conv_arguments, random_layer
from torch.testing import assert_close

from resnet_fused import _extension, cases, numerics
from resnet_fused.ops import _training_cpu
from resnet_fused.ops._library import overload

pytestmark = pytest.mark.skipif(
    not _extension.available(), reason=f"no compiled extension: {_extension.why_not()}"
)
CASES = {case.name: case for case in cases.CONV_CASES}
TELLING = ["1x1", "3x3_residual", "3x3_groups4", "1x1_stride2", "uneven", "odd_channels_1x1"]


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("name", TELLING)
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS.get)
def test_convolutions_read_and_write_what_the_references_do(dtype, name, layout):
    """Between the passes stands the same convolution of PyTorch, so all but the sums is equal."""
    case = CASES[name]
    layer = random_layer(case, dtype).lay_out(layout)
    geometry = conv_arguments(case)
    close = {"rtol": 1e-9, "atol": 1e-9} if dtype is torch.float64 else {"rtol": 0, "atol": 0}
    for norm in (None, layer.norm):
        arguments = (layer.x, norm, layer.weight, *geometry)
        y, _ = overload("conv_bn_stats", "cpu")(*arguments)
        expected, _ = overload("conv_bn_stats", "reference")(*arguments)
        assert y.stride() == expected.stride()
        assert_close(y, expected, **close)
    for affine in ((None, None), (layer.y, layer.coefficients)):
        for norm in (None, layer.norm):
            arguments = (layer.dz, *affine, layer.x, norm, layer.weight, *geometry)
            got = overload("conv_bn_wgrad", "cpu")(*arguments)
            expected = overload("conv_bn_wgrad", "reference")(*arguments)
            assert got.stride() == expected.stride()
            assert_close(got, expected, **close)
        for addend in (None, layer.addend):
            for below in ((None, None), (layer.x, layer.norm)):
                arguments = (
                    layer.dz, *affine, layer.weight, addend, *below, list(case.input_shape),
                    layout == "nhwc", 2, *geometry,
                )  # fmt: skip
                dx, sums = overload("conv_bn_dgrad", "cpu")(*arguments)
                expected, wanted = overload("conv_bn_dgrad", "reference")(*arguments)
                assert dx.stride() == expected.stride()
                assert_close(dx, expected, **close)
                assert sums.shape == wanted.shape
                if below[0] is not None:
                    branch = (layer.x, layer.norm)
                    oracle = numerics.reductions_oracle(dx, branch)
                    found = numerics.check_bound(
                        sums, oracle, numerics.reductions_bound(dx, branch)
                    )
                    assert found.ok, found


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("name", TELLING)
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS.get)
def test_both_gradients_at_once_are_those_of_the_ops(dtype, name, layout):
    case = CASES[name]
    layer = random_layer(case, dtype).lay_out(layout)
    geometry, last = conv_arguments(case), layout == "nhwc"
    for norm in (None, layer.norm):
        raw = None if norm is None else layer.x
        for addend, step in ((None, 1), (layer.addend, 2), (layer.x, 1)):
            got = _training_cpu.gradients(
                layer.dz, layer.x, norm, layer.weight, layer.weight, addend, step, last, *geometry
            )
            wide = dtype in (torch.float16, torch.bfloat16)
            if dtype is torch.float16 or (wide and addend is not None):
                assert got is None  # the sum is to be rounded once: PyTorch's calls differ
                continue
            dx, sums = overload("conv_bn_dgrad", "cpu")(
                layer.dz, None, None, layer.weight, addend, raw, norm, list(case.input_shape), last,
                step, *geometry,
            )  # fmt: skip
            dweight = overload("conv_bn_wgrad", "cpu")(
                layer.dz, None, None, layer.x, norm, layer.weight, *geometry
            )
            for found, wanted in zip(got, (dx, sums, dweight), strict=True):
                assert found.stride() == wanted.stride()
                assert torch.equal(found, wanted)


STRIDED = """
import sys

import torch
from torch.testing import assert_close

from resnet_fused.ops import _training_cpu, conv_bn_stats
from resnet_fused.ops._library import overload

torch.set_num_threads(2)
geometry = ([2, 2], [0, 0], [1, 1], 1)
op, channels = sys.argv[1], int(sys.argv[2])
x = torch.randn(4, channels, 56, 56).to(memory_format=torch.channels_last)
weight = torch.randn(8, channels, 1, 1)
dy = torch.randn(4, 8, 28, 28).to(memory_format=torch.channels_last)
_, expected, _ = torch.ops.aten.convolution_backward(
    dy.double(), x.double(), weight.double(), None, *geometry[:3], False, [0, 0], 1,
    [False, True, False],
)
for _ in range(30):
    if op == "conv_bn_stats":
        learnt = weight.clone().requires_grad_()
        conv_bn_stats(x, learnt, stride=2)[0].backward(dy)
        got = learnt.grad
    elif op == "both":
        got = _training_cpu.gradients(dy, x, None, weight, weight, None, 1, True, *geometry)[2]
    elif op == "conv_wgrad":
        got = overload(op, "reference")(dy, None, x, weight, torch.ones(8), *geometry)
    else:
        op, _, way = op.partition(":")
        got = overload(op, way or "cpu")(dy, None, None, x, None, weight, *geometry)
    assert_close(got.double(), expected, rtol=1e-4, atol=1e-3)
"""


@pytest.mark.parametrize("channels", [4, 15])
@pytest.mark.parametrize(
    "op", ["conv_wgrad", "conv_bn_wgrad:cpu", "conv_bn_wgrad:reference", "both", "conv_bn_stats"]
)
def test_strided_1x1_convolutions_of_few_channels(op, channels):
    """oneDNN's own gradient of such weights writes beyond its memory, which ends the process."""
    command = [sys.executable, "-c", STRIDED, op, str(channels)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
