"""Training's forward ops: conv_bn_stats, bn_finalize, bn_update_stats, bn_add_act, bn_act_pool."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from matrix import (
    ACTIVATION,
    EXACT,
    FUSED,
    SAMPLED_CASES,
    SPREADS,
    bound_options,
    cells,
    compute_dtype,
    conv_arguments,
    kink_values,
    lay_out,
    norm_values,
    random_layer,
    repeats,
    spread_values,
)
from torch import nn
from torch.testing import assert_close

import resnet_fused as rf
from resnet_fused import cases, numerics
from resnet_fused.ops._library import overload

CASES = {case.name: case for case in cases.CONV_CASES}
SPECIALS = [math.nan, math.inf, -math.inf]
PER_CHANNEL = (torch.float32, torch.float64)


def as_multiplied(t, entry):
    """What an implementation's products see of float32: TF32's eleven bits, ties away from zero."""
    if not bound_options(entry, t.dtype)["tf32"]:
        return t
    return ((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def stats_conv(entry, layer, case, norm):
    call = overload("conv_bn_stats", entry.name)
    return call(layer.x, norm, layer.weight, *conv_arguments(case))


def check_stats_conv(entry, layer, case, norm):
    """Asserts that raw output and statistics are within their bounds; returns both."""
    y, stats = stats_conv(entry, layer, case, norm)
    operands = (layer.x, norm, layer.weight)
    oracle = numerics.conv_bn_stats_oracle(*operands, **case.geometry)
    tf32 = bound_options(entry, layer.x.dtype)["tf32"]
    bound = numerics.conv_bn_stats_bound(*operands, oracle, **case.geometry, tf32=tf32)
    found = numerics.check_bound(y, oracle, bound)
    assert found.ok, found
    assert y.dtype == layer.x.dtype
    assert stats.dtype == compute_dtype(y.dtype)
    wanted = numerics.stats_oracle(y)
    found = numerics.check_bound(stats, wanted, numerics.stats_bound(y, wanted))
    assert found.ok, found
    return y, stats


@pytest.mark.op_matrix
@pytest.mark.parametrize("case", cases.CONV_CASES, ids=str)
@pytest.mark.parametrize(("entry", "dtype"), cells("conv_bn_stats", EXACT))
def test_conv_bn_stats_exact_on_integers(entry, dtype, case):
    layer = random_layer(case, dtype, exact=True)
    y, _ = check_stats_conv(entry, layer, case, layer.norm)
    expected = numerics.conv_bn_stats_oracle(layer.x, layer.norm, layer.weight, **case.geometry)
    assert_close(y, expected.to(dtype), rtol=0, atol=0)


@pytest.mark.op_matrix
@pytest.mark.parametrize("case", SAMPLED_CASES, ids=str)
@pytest.mark.parametrize(("entry", "dtype"), cells("conv_bn_stats"))
def test_conv_bn_stats_within_the_bound(entry, dtype, case):
    layer = random_layer(case, dtype).lay_out("nhwc")
    before = [t.clone() for t in (layer.x, layer.norm, layer.weight)]
    for norm in (None, layer.norm):
        y, _ = check_stats_conv(entry, layer, case, norm)
        eager = F.conv2d(layer.x, layer.weight, None, **case.geometry)
        assert not y.numel() or y.stride() == eager.stride()
    for t, old in zip((layer.x, layer.norm, layer.weight), before, strict=True):
        assert torch.equal(t, old), "an input was written"


@pytest.mark.op_matrix
@pytest.mark.parametrize("layout", ["nchw", "sliced", "unaligned"])
@pytest.mark.parametrize("name", ["3x3_residual", "odd_channels_1x1"])
@pytest.mark.parametrize(("entry", "dtype"), cells("conv_bn_stats", FUSED))
def test_conv_bn_stats_of_any_layout(entry, dtype, name, layout):
    case = CASES[name]
    layer = random_layer(case, dtype)
    layer.x = lay_out(layer.x, layout)
    layer.weight = lay_out(layer.weight, "sliced" if layout == "sliced" else "nchw")
    y, _ = check_stats_conv(entry, layer, case, layer.norm)
    if layout == "nchw":
        assert y.is_contiguous()


@pytest.mark.op_matrix
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize(("entry", "dtype"), cells("conv_bn_stats", (torch.float32,)))
def test_another_geometry_of_the_same_shape_is_computed_anew(entry, dtype, dilation):
    case = CASES["3x3"]
    layer = random_layer(case, dtype)
    for d in (dilation, 3 - dilation):
        check_stats_conv(
            entry, layer, dataclasses.replace(case, padding=(d, d), dilation=(d, d)), layer.norm
        )


@pytest.mark.op_matrix
@pytest.mark.parametrize("value", SPECIALS)
@pytest.mark.parametrize("operand", ["x", "scale", "shift", "weight"])
@pytest.mark.parametrize(("entry", "dtype"), cells("conv_bn_stats", FUSED))
def test_conv_bn_stats_puts_nan_and_inf_where_torch_does(entry, dtype, operand, value):
    case = CASES["3x3_groups4"]
    layer = random_layer(case, dtype)
    layer.norm[0] = layer.norm[0].abs() + 1
    layer.norm[1] = layer.norm[1].abs() + 5  # what is read is never 0, which times Inf is NaN
    target = {"x": layer.x, "weight": layer.weight, "scale": layer.norm[0], "shift": layer.norm[1]}
    target = target[operand]
    target[(0,) * (target.dim() - 2) + tuple(size // 2 for size in target.shape[-2:])] = value
    y, stats = stats_conv(entry, layer, case, layer.norm)
    scale, shift = (row.view(1, -1, 1, 1) for row in layer.norm[:2])
    h = F.relu(scale.double() * layer.x.double() + shift.double()).to(dtype)
    eager = F.conv2d(h.to(scale.dtype), layer.weight.to(scale.dtype), **case.geometry).to(dtype)
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(y), kind(eager))
    odd = ~y.isfinite().all(dim=(0, 2, 3))
    assert odd.any() or (value == -math.inf and operand != "weight")
    assert not odd.all(), "the groups beside it are untouched"
    mean, m2 = stats
    assert torch.equal(~mean.isfinite(), odd)
    assert torch.equal(m2.isnan(), odd), "the variance of Inf is NaN"


@pytest.mark.op_matrix
@pytest.mark.parametrize("kappa", [0.0, 1e3])
@pytest.mark.parametrize("kind", SPREADS)
@pytest.mark.parametrize(("entry", "dtype"), cells("conv_bn_stats", (torch.float32, torch.float16)))
def test_statistics_of_hard_values(entry, dtype, kind, kappa):
    """A 1x1 convolution that copies: y is what is given, 1024 values a channel."""
    x = torch.cat([spread_values(kind, kappa, 1024).view(1, 1, 32, 32) for _ in range(2)], 1)
    x = as_multiplied(x.to(dtype), entry).contiguous(memory_format=torch.channels_last)
    weight = torch.eye(2, dtype=dtype).view(2, 2, 1, 1)
    y, stats = overload("conv_bn_stats", entry.name)(x, None, weight, [1, 1], [0, 0], [1, 1], 1)
    assert torch.equal(y, x)
    oracle = numerics.stats_oracle(y)
    found = numerics.check_bound(stats, oracle, numerics.stats_bound(y, oracle))
    assert found.ok, found


@pytest.mark.op_matrix
@pytest.mark.parametrize(
    ("entry", "dtype"), cells("conv_bn_stats", (torch.float16, torch.bfloat16))
)
def test_overflow_and_subnormals_are_as_in_torch(entry, dtype):
    big = torch.finfo(dtype).max
    x = torch.tensor([big, 1.0, torch.finfo(dtype).smallest_normal / 4]).to(dtype)
    x = x.view(1, 3, 1, 1).expand(2, 3, 1, 1)
    weight = torch.eye(3, dtype=dtype).view(3, 3, 1, 1) * 2
    args = (x, None, weight, [1, 1], [0, 0], [1, 1], 1)
    y, stats = overload("conv_bn_stats", entry.name)(*args)
    subnormal = float(x[0, 2]) * 2
    if {"cpu", "reference"} & set(entry.backends):
        # PyTorch's own convolution: processors with instructions for bfloat16 (AVX512_BF16) take
        # its subnormals for zero.
        subnormal = float(F.conv2d(x, weight)[0, 2])
    assert y[0].flatten().tolist() == [math.inf, 2.0, subnormal]
    assert stats[1].isnan().tolist() == [True, False, False]
    assert float(stats[0, 2]) == subnormal


@pytest.mark.op_matrix
@pytest.mark.parametrize(("entry", "dtype"), cells("conv_bn_stats"))
def test_conv_bn_stats_repeats_bit_for_bit(entry, dtype):
    case = CASES["3x3_stride2"]
    layer = random_layer(case, dtype).lay_out("nhwc")
    first = stats_conv(entry, layer, case, layer.norm)
    for _ in range(repeats(entry)):
        again = stats_conv(entry, layer, case, layer.norm)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


@pytest.mark.op_matrix
@pytest.mark.parametrize(("entry", "dtype"), cells("conv_bn_stats", FUSED))
def test_values_at_the_kink_are_read_alike(entry, dtype):
    """Behind an identity, h itself: bit for bit, where a product and a sum would flip its mask."""
    y, norm = kink_values(dtype)
    k = y.shape[1]
    weight = torch.eye(k, dtype=dtype).view(k, k, 1, 1)
    h = numerics.normalised(y, norm)
    assert 0.2 < (h > 0).double().mean() < 0.8
    read, _ = overload("conv_bn_stats", entry.name)(y, norm, weight, [1, 1], [0, 0], [1, 1], 1)
    assert torch.equal(read, as_multiplied(h, entry))


# bn_finalize, bn_update_stats


def statistics(k, dtype, count):
    acc = compute_dtype(dtype)
    return torch.stack((torch.randn(k) * 3, torch.rand(k) * count)).to(acc)


def finalized(entry, stats, total, gamma, beta, count, eps):
    norm = overload("bn_finalize", entry.name)(stats, total, gamma, beta, count, eps)
    oracle = numerics.bn_finalize_oracle(stats, total, gamma, beta, count, eps, scale=norm[0])
    found = numerics.check_bound(norm, oracle, numerics.bn_finalize_bound(oracle, stats, beta))
    return norm, found


@pytest.mark.op_matrix
@pytest.mark.parametrize("total", [None, 250.0])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("k", [1, 16, 65, 2048])
@pytest.mark.parametrize(("entry", "dtype"), cells("bn_finalize", PER_CHANNEL))
def test_bn_finalize_within_the_bound(entry, dtype, k, affine, total):
    stats = statistics(k, dtype, 98)
    gamma, beta = (torch.randn(k, dtype=stats.dtype) if affine else None for _ in range(2))
    if affine:
        gamma[0] = 0
    total = None if total is None else torch.tensor([total], dtype=torch.float64)
    for eps in (1e-5, 1e-2):  # nothing is kept from the call before
        norm, found = finalized(entry, stats, total, gamma, beta, 98, eps)
        assert found.ok, found
        assert norm.dtype == stats.dtype
    stats[0] *= 1e3
    assert finalized(entry, stats, total, gamma, beta, 98, 1e-5)[1].ok


@pytest.mark.op_matrix
@pytest.mark.parametrize("value", SPECIALS)
@pytest.mark.parametrize("place", ["mean", "m2", "gamma", "beta"])
@pytest.mark.parametrize(("entry", "dtype"), cells("bn_finalize", PER_CHANNEL))
def test_bn_finalize_keeps_nan_and_inf_in_their_channel(entry, dtype, place, value):
    stats = statistics(8, dtype, 98)
    gamma, beta = torch.randn(2, 8, dtype=stats.dtype)
    {"mean": stats[0], "m2": stats[1], "gamma": gamma, "beta": beta}[place][3] = value
    norm, found = finalized(entry, stats, None, gamma, beta, 98, 1e-5)
    assert found.ok, found
    others = torch.arange(8) != 3
    assert norm[:, others].isfinite().all()


@pytest.mark.op_matrix
@pytest.mark.parametrize(("entry", "dtype"), cells("bn_finalize", PER_CHANNEL))
def test_bn_finalize_of_16_bit_parameters_and_no_pixels(entry, dtype):
    gamma, beta = torch.randn(2, 8).bfloat16()
    assert finalized(entry, statistics(8, dtype, 98), None, gamma, beta, 98, 1e-5)[1].ok
    empty = torch.zeros(2, 8, dtype=compute_dtype(dtype))
    norm, found = finalized(entry, empty, None, gamma, beta, 0, 1e-5)
    assert found.ok, found
    assert norm.isfinite().all()
    total = torch.zeros(1, dtype=torch.float64)
    assert torch.equal(finalized(entry, empty, total, gamma, beta, 0, 1e-5)[0], norm)


@pytest.mark.op_matrix
@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
@pytest.mark.parametrize("total", [None, 250.0, 0.0])
@pytest.mark.parametrize("running_dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize(("entry", "dtype"), cells("bn_update_stats", PER_CHANNEL))
def test_bn_update_stats(entry, dtype, running_dtype, total, momentum):
    stats, k = statistics(65, dtype, 98), 65
    before = [torch.randn(k).to(running_dtype), torch.rand(k).to(running_dtype)]
    total = None if total is None else torch.tensor([total], dtype=torch.float64)
    for tracked in (torch.tensor(3), None):
        mean, var = (t.clone() for t in before)
        counted = None if tracked is None else tracked.clone()
        overload("bn_update_stats", entry.name)(stats, total, mean, var, counted, 98, momentum)
        seen = None if tracked is None else 4
        assert counted is None or int(counted) == 4
        oracle = numerics.bn_update_stats_oracle(stats, total, *before, seen, 98, momentum)
        bound = numerics.bn_update_stats_bound(oracle, *before, running_dtype)
        found = numerics.check_bound(torch.stack((mean, var)), oracle, bound)
        assert found.ok, found
        if total is not None and float(total) == 0 and running_dtype != torch.float64:
            assert torch.equal(mean, before[0])
            assert torch.equal(var, before[1])


@pytest.mark.op_matrix
@pytest.mark.parametrize(("entry", "dtype"), cells("bn_update_stats", (torch.float32,)))
def test_an_empty_batch_is_counted_and_no_more(entry, dtype):
    mean, var, tracked = torch.randn(4), torch.rand(4), torch.tensor(7)
    before = mean.clone(), var.clone()
    overload("bn_update_stats", entry.name)(torch.zeros(2, 4), None, mean, var, tracked, 0, 0.1)
    assert torch.equal(mean, before[0]) and torch.equal(var, before[1]) and int(tracked) == 8


# bn_add_act


SHORTCUTS = ("none", "identity", "projection", "narrow")


def block_end(case, dtype, shortcut, *, exact=False):
    """y, norm, residual, residual_norm, offset of `bn_add_act`."""

    def values(channels):
        shape = (case.n, channels, *case.shape[2:])
        t = torch.randint(-4, 5, shape) if exact else torch.randn(shape, dtype=torch.float64)
        return lay_out(t.to(dtype), case.layout)

    held, offset = case.c, 0
    if shortcut == "narrow":
        held = max(1, case.c // 2)
        offset = (case.c - held + 1) // 2
    residual = None if shortcut == "none" else values(held)
    other = norm_values(case.c, dtype, exact=exact) if shortcut == "projection" else None
    return values(case.c), norm_values(case.c, dtype, exact=exact), residual, other, offset


@pytest.mark.op_matrix
@pytest.mark.parametrize("case", cases.BN_ACT_CASES, ids=str)
@pytest.mark.parametrize(("entry", "dtype"), cells("bn_add_act"))
def test_bn_add_act_within_the_bound(entry, dtype, case):
    call = overload("bn_add_act", entry.name)
    for shortcut in SHORTCUTS:
        args = block_end(case, dtype, shortcut)
        given = [t for t in args[:4] if t is not None]
        before = [t.clone() for t in given]
        out = call(*args, case.act)
        oracle = numerics.bn_add_act_oracle(*args, case.act)
        found = numerics.check_bound(out, oracle, numerics.bn_add_act_bound(*args, oracle))
        assert found.ok, f"{shortcut}: {found}"
        assert out.dtype == dtype
        if case.layout in ACTIVATION:
            assert out.is_contiguous(memory_format=ACTIVATION[case.layout])
        if shortcut == "none" and dtype is not torch.float64:
            assert torch.equal(out, numerics.normalised(args[0], args[1], case.act))
        for t, old in zip(given, before, strict=True):
            assert torch.equal(t, old), "an input was written"
        args = block_end(case, dtype, shortcut, exact=True)
        expected = numerics.bn_add_act_oracle(*args, case.act).to(dtype)
        assert torch.equal(call(*args, case.act), expected), f"{shortcut}, integers"


@pytest.mark.op_matrix
@pytest.mark.parametrize("value", SPECIALS)
@pytest.mark.parametrize("operand", ["y", "norm", "residual", "residual_norm"])
@pytest.mark.parametrize(("entry", "dtype"), cells("bn_add_act"))
def test_bn_add_act_keeps_nan_and_inf(entry, dtype, operand, value):
    case = cases.BnActCase("nan", 2, 9, 3, 5)
    args = block_end(case, dtype, "projection")
    target = dict(zip(("y", "norm", "residual", "residual_norm"), args, strict=False))[operand]
    target[(0, 4) + (0,) * (target.dim() - 2)] = value
    out = overload("bn_add_act", entry.name)(*args, "relu")
    oracle = numerics.bn_add_act_oracle(*args)
    for kind in (torch.isnan, torch.isinf):
        assert torch.equal(kind(out), kind(oracle))
    if math.isnan(value):
        assert out.isnan().any()


@pytest.mark.op_matrix
@pytest.mark.parametrize(("entry", "dtype"), cells("bn_add_act"))
def test_bn_add_act_at_the_kink_and_again(entry, dtype):
    y, norm = kink_values(dtype)
    call = overload("bn_add_act", entry.name)
    out = call(y, norm, None, None, 0, "relu")
    if dtype is not torch.float64:
        assert torch.equal(out, numerics.normalised(y, norm))
    for _ in range(repeats(entry)):
        assert torch.equal(call(y, norm, None, None, 0, "relu"), out)
    if dtype is torch.float16:
        y = torch.tensor([6e4, 3e-8, 1.0]).half().view(1, 3, 1, 1)
        norm = torch.tensor([[2.0, 0.5, 1e-8], [0.0, 0.0, 0.0]]).repeat(2, 1)
        out = call(y, norm, None, None, 0, "relu").flatten().tolist()
        assert out == [math.inf, 0.0, 0.0]  # half of the smallest subnormal rounds to even


# bn_act_pool


@pytest.mark.op_matrix
@pytest.mark.parametrize("ties", [False, True], ids=["random", "ties"])
@pytest.mark.parametrize("case", cases.POOL_CASES, ids=str)
@pytest.mark.parametrize(("entry", "dtype"), cells("bn_act_pool"))
def test_bn_act_pool_is_exact(entry, dtype, case, ties):
    y = torch.randint(-3, 4, case.shape) if ties else torch.randn(case.shape)
    y, norm = lay_out(y.to(dtype), case.layout), norm_values(case.c, dtype, exact=ties)
    if ties and y.numel():
        for value in SPECIALS:
            picked = torch.randint(0, y.numel(), (max(1, y.numel() // 30),))
            flat = y.reshape(-1)
            flat[picked] = value
            y = lay_out(flat.view(case.shape), case.layout)
    out, taps = overload("bn_act_pool", entry.name)(y, norm, *case.window)
    wanted, winners = numerics.bn_act_pool_oracle(y, norm, *case.window)
    assert out.shape == case.output_shape
    assert taps.dtype is torch.uint8 and out.dtype == dtype
    assert torch.equal(taps, winners)
    close = {"rtol": 1e-14, "atol": 1e-14} if dtype is torch.float64 else {"rtol": 0, "atol": 0}
    assert_close(out, wanted, equal_nan=True, **close)


@pytest.mark.op_matrix
@pytest.mark.parametrize(("entry", "dtype"), cells("bn_act_pool"))
def test_bn_act_pool_repeats_bit_for_bit(entry, dtype):
    y, norm = torch.randn(2, 8, 7, 7).to(dtype), norm_values(8, dtype)
    args = (lay_out(y, "nhwc"), norm, [3, 3], [2, 2], [1, 1])
    first = overload("bn_act_pool", entry.name)(*args)
    for _ in range(repeats(entry)):
        again = overload("bn_act_pool", entry.name)(*args)
        assert torch.equal(again[0], first[0]) and torch.equal(again[1], first[1])


# The public functions, beside the modules


MODULES = {
    "plain": {},
    "cumulative": {"momentum": None},
    "all of it": {"momentum": 1.0},
    "none of it": {"momentum": 0.0},
    "not affine": {"affine": False},
    "untracked": {"track_running_stats": False},
    "eps": {"eps": 0.1},
}


@pytest.mark.op_matrix
@pytest.mark.parametrize("options", MODULES.values(), ids=MODULES)
def test_running_statistics_are_the_modules(options):
    """Three batches, one of them empty."""
    bn = nn.BatchNorm2d(6, **options).double()
    other = nn.BatchNorm2d(6, **options).double()
    if bn.affine:
        nn.init.normal_(bn.weight)
        other.load_state_dict(bn.state_dict())
    for n in (2, 0, 3):
        y = torch.randn(n, 6, 4, 3, dtype=torch.float64)
        weight = torch.eye(6, dtype=torch.float64).view(6, 6, 1, 1)
        with torch.no_grad():
            _, stats = rf.ops.conv_bn_stats(y, weight)
            norm = rf.ops.bn_finalize(
                stats, n * 12, other.weight, other.bias, eps=other.eps,
                running_mean=other.running_mean, running_var=other.running_var,
                num_batches_tracked=other.num_batches_tracked, momentum=other.momentum,
            )  # fmt: skip
            ours = rf.ops.bn_add_act(y, norm, act="none")
            assert_close(ours, bn(y))
    assert_close(dict(other.state_dict()), dict(bn.state_dict()))
