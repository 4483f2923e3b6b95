"""conv_bn_stats_finalize: the bits of the three ops that it stands for, in every implementation."""

from __future__ import annotations

import functools
import math

import emulated
import pytest
import torch
from matrix import EXACT, FUSED, SAMPLED_CASES, cells, conv_arguments, lay_out, random_layer
from torch import nn

import resnet_fused as rf
from resnet_fused import backends, cases
from resnet_fused.ops import _finalize, _training
from resnet_fused.ops._library import overload

OP = _finalize.OP
CASES = {case.name: case for case in cases.CONV_CASES}
EPS = 1e-3
WAYS = {
    "plain": {"momentum": 0.1},
    "cumulative": {"momentum": None, "tracked": torch.tensor(3)},
    "int32": {"momentum": None, "tracked": torch.tensor(3, dtype=torch.int32)},
    "counted": {"momentum": 0.25, "tracked": torch.tensor(7)},
    "uncounted cumulative": {"momentum": None},
    "float64": {"momentum": 0.1, "running": torch.float64},
    "float16": {"momentum": 0.1, "running": torch.float16, "affine": torch.bfloat16},
    "not affine": {"momentum": 0.1, "affine": None},
    "no running": {"momentum": 0.1, "running": None, "affine": torch.float64},
}


def part(op, entry):
    """The op that the implementation's results are to be those of."""
    composed = {"parts": "reference", "cuda_emulated": emulated.NAME}
    return overload(op, composed.get(entry.name, "reference"))


def vectors(k, way):
    """gamma, beta, running mean and variance, number of batches."""
    affine, running = way.get("affine", torch.float32), way.get("running", torch.float32)
    found = [None if affine is None else torch.randn(k).to(affine) for _ in range(2)]
    if running is None:
        return (*found, None, None, None)
    return (*found, torch.randn(k).to(running), torch.rand(k).to(running), way.get("tracked"))


def copies(tensors):
    return [None if t is None else t.clone() for t in tensors]


def check(entry, case, x, norm, weight, way):
    """Asserts that every result is that of the three ops; gives them."""
    given = vectors(case.k, way)
    before = copies((x, norm, weight, *given))
    geometry, momentum = conv_arguments(case), way["momentum"]
    mine, theirs = copies(given), copies(given)
    y, stats, rows, kept = overload(OP, entry.name)(
        x, norm, weight, *mine, *geometry, EPS, momentum
    )
    if entry.name != emulated.NAME:  # whose configuration is drawn by the op's name
        wanted = _training.overload("conv_bn_stats", "reference")
        if entry.name == "parts":
            wanted = functools.partial(_training.run, "conv_bn_stats", x)
        for found, right in zip((y, stats), wanted(x, norm, weight, *geometry), strict=True):
            assert torch.equal(found, right)
    count = y.numel() // case.k
    affine, running = theirs[:2], theirs[2:]
    assert torch.equal(rows, part("bn_finalize", entry)(stats, None, *affine, count, EPS))
    if running[0] is None:
        assert kept.shape == (0, case.k)
        return y, stats, rows
    assert torch.equal(kept, torch.stack((running[0], running[1])).double())
    part("bn_update_stats", entry)(stats, None, *running, count, momentum)
    for found, right in zip(mine[2:], running, strict=True):
        assert found is None or (torch.equal(found, right) and found.dtype == right.dtype)
    for now, old in zip((x, norm, weight, *mine[:2]), before, strict=False):
        assert now is None or torch.equal(now, old), "an input was written"
    return y, stats, rows


@pytest.mark.op_matrix
@pytest.mark.parametrize("case", SAMPLED_CASES, ids=str)
@pytest.mark.parametrize(("entry", "dtype"), cells(OP, EXACT))
def test_every_case_has_the_bits_of_three_ops(entry, dtype, case):
    if case.n * case.output_shape[2] * case.output_shape[3] == 1:
        return
    layer = random_layer(case, dtype)
    for norm in (None, layer.norm):
        check(entry, case, layer.x, norm, layer.weight, WAYS["plain"])


@pytest.mark.op_matrix
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(("entry", "dtype"), cells(OP, FUSED))
def test_every_kind_of_vectors(entry, dtype, way):
    for name, layout in (("3x3_groups4", "nhwc"), ("odd_channels_1x1", "sliced")):
        case = CASES[name]
        layer = random_layer(case, dtype)
        check(entry, case, lay_out(layer.x, layout), layer.norm, layer.weight, way)


@pytest.mark.op_matrix
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("entry", "dtype"), cells(OP, (torch.float32, torch.bfloat16)))
def test_what_is_no_number_stays_in_its_channel(entry, dtype, value):
    case = CASES["1x1"]
    layer = random_layer(case, dtype)
    weight = layer.weight.clone()
    weight[3] = value
    running = torch.zeros(case.k), torch.ones(case.k), None
    _, _, rows, _ = overload(OP, entry.name)(
        layer.x, None, weight, None, None, *running, *conv_arguments(case), EPS, 0.1
    )
    others = torch.arange(case.k) != 3
    for t in (rows, running[0], running[1]):
        assert not t[..., 3].isfinite().all()
        assert t[..., others].isfinite().all()


@pytest.mark.op_matrix
@pytest.mark.parametrize(("entry", "dtype"), cells(OP, (torch.float32,)))
def test_an_empty_batch_is_counted_and_no_more(entry, dtype):
    mean, var, tracked = torch.randn(4), torch.rand(4), torch.tensor(7)
    before = mean.clone(), var.clone()
    x, weight = torch.zeros(0, 8, 5, 5), torch.randn(4, 8, 1, 1)
    y, stats, rows, _ = overload(OP, entry.name)(
        x, None, weight, None, None, mean, var, tracked, [1, 1], [0, 0], [1, 1], 1, EPS, 0.1
    )
    assert y.shape == (0, 4, 5, 5) and not stats.any() and rows.isfinite().all()
    assert torch.equal(mean, before[0]) and torch.equal(var, before[1]) and int(tracked) == 8


# The public function


def layers(dtype=torch.float32):
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 8, 3, padding=1, bias=False).to(dtype)
    bn = nn.BatchNorm2d(8, momentum=None).to(dtype).train()
    with torch.no_grad():
        bn.weight.uniform_(-1, 2)
        bn.bias.uniform_(-1, 1)
    return conv, bn, torch.randn(3, 6, 7, 5, dtype=dtype)


def call(conv, bn, x, **more):
    return rf.ops.conv_bn_stats_finalize(
        x, conv.weight, None, bn.weight, bn.bias, padding=1, eps=bn.eps,
        running_mean=bn.running_mean, running_var=bn.running_var,
        num_batches_tracked=bn.num_batches_tracked, momentum=bn.momentum, **more,
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["auto", "reference", "cpu"])
@pytest.mark.parametrize("grad", [False, True])
def test_the_layer_is_that_of_the_modules(grad, backend):
    conv, bn, x = layers(torch.float64)
    version = bn.running_mean._version
    other, wanted = nn.BatchNorm2d(8, momentum=None).double().train(), None
    other.load_state_dict(bn.state_dict())
    for _ in range(2):
        with torch.set_grad_enabled(grad), rf.backend(backend):
            y, stats, rows = call(conv, bn, x)
            wanted = other(conv(x))
            scale, shift = (row.view(1, -1, 1, 1) for row in rows[:2])
            torch.testing.assert_close(scale * y + shift, wanted, rtol=1e-12, atol=1e-12)
    for name, value in other.state_dict().items():
        torch.testing.assert_close(bn.state_dict()[name], value, rtol=1e-12, atol=1e-12)
    assert bn.running_mean._version > version
    assert y.requires_grad == stats.requires_grad == rows.requires_grad == grad
    if grad:
        found = torch.autograd.grad((scale * y + shift).square().sum(), (conv.weight, bn.weight))
        right = torch.autograd.grad(wanted.square().sum(), (conv.weight, other.weight))
        for a, b in zip(found, right, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def T(*shape):
    return torch.ones(shape)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"x": T(2, 6, 5)}, ValueError, "x must have 4 dimensions"),
        ({"weight": T(8, 5, 3, 3)}, ValueError, "x has 6 channels"),
        ({"norm": T(4, 5)}, ValueError, "norm has shape"),
        ({"gamma": T(7)}, ValueError, "gamma has shape"),
        ({"beta": T(7)}, ValueError, "beta has shape"),
        ({"eps": "1"}, TypeError, "eps is '1'"),
        ({"running_var": None}, ValueError, "running_mean and running_var are given together"),
        ({"running_mean": T(7)}, ValueError, "running_mean is torch.float32"),
        ({"running_var": T(8).long()}, ValueError, "running_var is torch.int64"),
        ({"num_batches_tracked": T(1)}, ValueError, "num_batches_tracked is torch.float32"),
        (
            {"running_mean": None, "running_var": None},
            ValueError,
            "num_batches_tracked is given without running_mean",
        ),
        ({"momentum": "1"}, TypeError, "momentum is '1'"),
        ({"x": T(1, 6, 1, 1)}, ValueError, "expected more than 1 value per channel"),
        ({"stride": 0}, ValueError, "stride is 0"),
        ({"groups": 4}, ValueError, "groups"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(changes, error, said):
    running = {"running_mean": torch.zeros(8), "running_var": torch.ones(8)}
    tracked = torch.tensor(3)
    given = {
        "x": T(2, 6, 5, 5), "weight": T(8, 6, 3, 3), "gamma": T(8), "beta": T(8), "padding": 1,
        "num_batches_tracked": tracked, **running,
    }  # fmt: skip
    with pytest.raises(error) as caught:
        rf.ops.conv_bn_stats_finalize(**(given | changes))
    assert str(caught.value).startswith(f"{OP}: ") and said in str(caught.value), caught.value
    assert not running["running_mean"].any() and int(tracked) == 3


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_who_serves_it(device):
    """The three ops, wherever the kernel does not; by name as well."""
    known = [entry.name for entry in backends.implementations(OP)]
    assert known == ["cuda", "parts", "reference", emulated.NAME]
    call = backends.Call(OP, device, torch.float32)
    for word, served in (("auto", "parts"), ("reference", "reference"), ("triton", "parts")):
        with backends.backend(word):
            assert backends.choose(call).implementation.name == served
