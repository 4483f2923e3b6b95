"""The oracles and bounds of training: right implementations pass, planted faults do not."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from matrix import compute_dtype, conv_arguments, norm_values, random_layer
from torch import Tensor, nn

from resnet_fused import cases, numerics

LOW = (torch.bfloat16, torch.float16)
DTYPES = (*LOW, torch.float32, torch.float64)
CASES = {case.name: case for case in cases.CONV_CASES}
TELLING = tuple(CASES[name] for name in ("3x3_residual", "odd_channels", "3x3_dilated4_stride2"))


def column(v: Tensor) -> Tensor:
    return v.view(1, -1, 1, 1)


def truncated(z: Tensor, dtype: torch.dtype) -> Tensor:
    """Stores in 16 bits by cutting mantissa bits off."""
    lost = 16 if dtype is torch.bfloat16 else 13
    return (z.float().view(torch.int32) >> lost << lost).view(torch.float32).to(dtype)


def judge(y: Tensor, oracle: Tensor, bound: Tensor) -> numerics.BoundCheck:
    return numerics.check_bound(y, oracle, bound)


# The formulas, against autograd of the plain modules in float64.


@pytest.mark.parametrize(
    "case", [c for c in cases.CONV_CASES if c.n and c.p * c.q * c.n > 2], ids=str
)
def test_oracles_are_the_plain_modules(case: cases.ConvCase) -> None:
    """BN, ReLU, conv, BN in float64: output, statistics and every gradient."""
    below, above = nn.BatchNorm2d(case.c, eps=1e-3), nn.BatchNorm2d(case.k, eps=1e-2)
    for bn in (below, above):
        nn.init.normal_(bn.weight)
        nn.init.normal_(bn.bias)
        bn.double()
    weight = torch.randn(case.weight_shape, dtype=torch.float64, requires_grad=True)
    raw = torch.randn(case.input_shape, dtype=torch.float64, requires_grad=True)
    dz = torch.randn(case.output_shape, dtype=torch.float64)
    if not case.n * case.h * case.w > 1:
        return
    inner = below(raw)
    inner.retain_grad()
    y = F.conv2d(inner.relu(), weight, **case.geometry)
    y.retain_grad()
    above(y).backward(dz)
    count_x, count_y = (t.numel() // t.shape[1] for t in (raw, y))
    with torch.no_grad():
        norms = [
            numerics.bn_finalize_oracle(
                numerics.stats_oracle(t), None, bn.weight, bn.bias, count, bn.eps
            )
            for t, bn, count in ((raw, below, count_x), (y, above, count_y))
        ]
        ours = numerics.conv_bn_stats_oracle(raw, norms[0], weight, **case.geometry)
        close = {"rtol": 1e-9, "atol": 1e-9}
        torch.testing.assert_close(ours, y, **close)
        sums = numerics.reductions_oracle(dz, (y, norms[1]))
        coefficients, dgamma, dbeta = numerics.bn_backward_finalize_oracle(
            sums, None, None, norms[1], count_y
        )
        torch.testing.assert_close(dgamma, above.weight.grad, **close)
        torch.testing.assert_close(dbeta, above.bias.grad, **close)
        dy = numerics.bn_backward_apply_oracle(dz, y, coefficients)
        torch.testing.assert_close(dy, y.grad, **close)
        operands = (dz, y, coefficients)
        dx = numerics.conv_bn_dgrad_oracle(
            *operands, weight, None, raw, norms[0], input_size=raw.shape, **case.geometry
        )
        torch.testing.assert_close(dx, inner.grad, **close)
        dweight = numerics.conv_bn_wgrad_oracle(*operands, raw, norms[0], weight, **case.geometry)
        torch.testing.assert_close(dweight, weight.grad, **close)
        sums = numerics.reductions_oracle(dx, (raw, norms[0]))
        found = numerics.bn_backward_finalize_oracle(sums, None, None, norms[0], count_x)
        torch.testing.assert_close(found[1], below.weight.grad, **close)
        torch.testing.assert_close(
            numerics.bn_backward_apply_oracle(dx, raw, found[0]), raw.grad, **close
        )


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
def test_running_statistics_are_batch_norms(momentum: float | None) -> None:
    bn = nn.BatchNorm2d(5, momentum=momentum).double()
    for step in range(3):
        y = torch.randn(2, 5, 3, 3, dtype=torch.float64)
        before = bn.running_mean.clone(), bn.running_var.clone()
        bn(y)
        found = numerics.bn_update_stats_oracle(
            numerics.stats_oracle(y), None, *before, step + 1, 18, momentum
        )
        torch.testing.assert_close(found, torch.stack((bn.running_mean, bn.running_var)))


# Planted faults. `simulate_*` is a right kernel, in float32 with one rounding at the end.


def simulate_stats_conv(layer, case, h=None) -> Tensor:
    h = numerics.normalised(layer.x, layer.norm) if h is None else h
    wide = compute_dtype(h.dtype)
    return F.conv2d(h.to(wide), layer.weight.to(wide), **case.geometry)


def judge_conv(y: Tensor, layer, case) -> numerics.BoundCheck:
    operands = (layer.x, layer.norm, layer.weight)
    oracle = numerics.conv_bn_stats_oracle(*operands, **case.geometry)
    bound = numerics.conv_bn_stats_bound(*operands, oracle, **case.geometry)
    return judge(y, oracle, bound)


def padded_with_shift(layer, case) -> Tensor:
    """relu(shift) where the padding is 0 behind the ReLU."""
    (ph, pw), wide = case.padding, compute_dtype(layer.x.dtype)
    h = numerics.normalised(F.pad(layer.x, (pw, pw, ph, ph)), layer.norm)
    geometry = {**case.geometry, "padding": 0}
    return F.conv2d(h.to(wide), layer.weight.to(wide), **geometry)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", TELLING, ids=str)
def test_faults_of_conv_bn_stats(case: cases.ConvCase, dtype: torch.dtype) -> None:
    layer = random_layer(case, dtype)
    right = simulate_stats_conv(layer, case)
    assert judge_conv(right.to(dtype), layer, case)
    assert not judge_conv(padded_with_shift(layer, case).to(dtype), layer, case)
    raw = simulate_stats_conv(layer, case, layer.x)
    assert not judge_conv(raw.to(dtype), layer, case), "no prologue"
    if dtype in LOW:
        assert not judge_conv(truncated(right, dtype), layer, case)
        scale, shift, *_ = layer.norm
        unrounded = (layer.x.float() * column(scale) + column(shift)).relu()
        wide = F.conv2d(unrounded, layer.weight.float(), **case.geometry)
        assert not judge_conv(wide.to(dtype), layer, case), "h was not rounded"


def faulty_norm(stats: Tensor, gamma: Tensor, beta: Tensor, count: int, fault: str) -> Tensor:
    mean, m2 = stats.double()
    variance = m2 / (count - 1 if fault == "unbiased" else count)
    eps = 1e-3 if fault == "eps" else 1e-5
    invstd = 1 / (variance + eps).sqrt()
    if fault == "eps outside":
        invstd = 1 / (variance.sqrt() + eps)
    if fault == "float32":
        invstd = (1 / (variance.float() + 1e-5).sqrt()).double()
    scale = (gamma.double() * invstd).float()
    used = gamma.double() * invstd if fault == "unrounded scale" else scale.double()
    shift = beta.double() - mean * used
    if fault == "float32":
        shift = beta - stats[0] * scale
    return torch.stack((scale, shift.float(), stats[0], invstd.float()))


@pytest.mark.parametrize(
    "fault", ["", "unbiased", "eps", "eps outside", "float32", "unrounded scale"]
)
def test_faults_of_bn_finalize(fault: str) -> None:
    k, count = 64, 72
    mean, variance = torch.randn(k) * 30, torch.rand(k) + 0.1
    stats = torch.stack((mean, variance * count))
    gamma, beta = torch.randn(k), torch.randn(k)
    norm = faulty_norm(stats, gamma, beta, count, fault)
    oracle = numerics.bn_finalize_oracle(stats, None, gamma, beta, count, 1e-5, scale=norm[0])
    found = judge(norm, oracle, numerics.bn_finalize_bound(oracle, stats, beta))
    assert bool(found) == (fault == ""), found


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_biased_running_variance_is_beyond_the_bound(dtype: torch.dtype) -> None:
    stats = torch.stack((torch.randn(32), torch.rand(32) * 700 + 1))
    running = torch.randn(32).to(dtype), torch.rand(32).to(dtype)
    oracle = numerics.bn_update_stats_oracle(stats, None, *running, 1, 72, 0.1)
    bound = numerics.bn_update_stats_bound(oracle, *running, dtype)
    assert judge(oracle.to(dtype), oracle, bound)
    biased = numerics.bn_update_stats_oracle(stats, None, *running, 1, 73, 0.1)
    assert not judge(biased.to(dtype), oracle, bound)
    for n, row in enumerate((running[0], running[1])):  # no update at all
        kept = oracle.to(dtype).clone()
        kept[n] = row
        assert not judge(kept, oracle, bound)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_faults_of_bn_add_act(dtype: torch.dtype) -> None:
    shape = (4, 24, 7, 7)
    y, residual = (torch.randn(shape).to(dtype) for _ in range(2))
    norm, other = norm_values(24, dtype), norm_values(24, dtype)
    args = (y, norm, residual, other, 0)
    oracle = numerics.bn_add_act_oracle(*args)
    bound = numerics.bn_add_act_bound(*args, oracle)
    z, r = numerics.normalised(y, norm, "none"), numerics.normalised(residual, other, "none")
    assert judge(oracle.to(dtype), oracle, bound)
    assert not judge((oracle.relu() + 1e-2).to(dtype), oracle, bound)
    assert not judge((z.relu() + r).to(dtype), oracle, bound), "ReLU before the sum"
    if dtype in LOW:
        assert not judge((z.float() + r.float()).relu().to(dtype), oracle, bound), "two roundings"
        assert not judge(truncated(oracle, dtype), oracle, bound)
    narrow = residual[:, :16]
    args = (y, norm, narrow, None, 4)
    oracle = numerics.bn_add_act_oracle(*args)
    bound = numerics.bn_add_act_bound(*args, oracle)
    elsewhere = numerics.bn_add_act_oracle(y, norm, narrow, None, 8)
    assert judge(oracle.to(dtype), oracle, bound)
    assert not judge(elsewhere.to(dtype), oracle, bound)


def test_masks_pass_nan_and_no_zero() -> None:
    out = torch.tensor([math.nan, 0.0, -0.0, 1e-8, math.inf]).view(1, 5, 1, 1)
    dout = torch.ones_like(out)
    assert numerics.masked(dout, out).flatten().tolist() == [1.0, 0.0, 0.0, 1.0, 1.0]
    h = torch.where(out > 0, dout, 0.0)  # the fault: NaN stops the gradient
    assert not torch.equal(h, numerics.masked(dout, out))


@pytest.mark.parametrize("kappa", [0.0, 1e3])
def test_sums_that_are_not_centred_are_beyond_the_bound(kappa: float) -> None:
    y = torch.randn(2, 16, 8, 8) + kappa
    dz = torch.randn_like(y)
    norm = norm_values(16, torch.float32)
    norm[2] = kappa
    oracle = numerics.reductions_oracle(dz, (y, norm))
    bound = numerics.reductions_bound(dz, (y, norm))
    first = dz.sum((0, 2, 3))
    right = torch.stack((first, (dz * (y - column(norm[2]))).sum((0, 2, 3))))
    assert judge(right, oracle, bound)
    raw = torch.stack((first, (dz * y).sum((0, 2, 3)) - norm[2] * first))
    assert bool(judge(raw, oracle, bound)) == (kappa == 0)
    unmasked = torch.stack((first, (dz.abs() * (y - column(norm[2]))).sum((0, 2, 3))))
    assert not judge(unmasked, oracle, bound)
    half = torch.stack([row.half().float() for row in right])
    assert not judge(half, oracle, bound), "sums in 16 bits"


def test_faults_of_bn_backward_finalize_and_apply() -> None:
    k, m = 32, 98
    sums, norm = torch.randn(3, k) * 5, norm_values(k, torch.float32)
    oracle = numerics.bn_backward_finalize_oracle(sums, None, None, norm, m, 2)
    bounds = numerics.bn_backward_finalize_bound(oracle, norm)
    right = [t.float() for t in oracle]
    for got, wanted, bound in zip(right, oracle, bounds, strict=True):
        assert judge(got, wanted, bound)
    rounded_b = right[0].clone()
    rounded_b[2] = (
        -norm[0].double() * sums[0].double() / m - right[0][1].double() * norm[2].double()
    ).float()
    assert judge(rounded_b, oracle[0], bounds[0]), "C made of the rounded B is right too"
    for faulty in (
        numerics.bn_backward_finalize_oracle(sums, None, None, norm, m - 1, 2),
        numerics.bn_backward_finalize_oracle(sums, None, None, norm, m, 1),
        numerics.bn_backward_finalize_oracle(sums, None, None, norm, m, 2, True),
    ):
        assert not judge(faulty[0].float(), oracle[0], bounds[0])
    for dtype in DTYPES:
        dz, y = (torch.randn(4, k, 7, 7).to(dtype) for _ in range(2))
        rows = oracle[0].to(compute_dtype(dtype))
        wanted = numerics.bn_backward_apply_oracle(dz, y, rows)
        bound = numerics.bn_backward_apply_bound(dz, y, rows, wanted)
        assert judge(numerics.affine_gradient(dz, y, rows), wanted, bound)
        rows = rows.clone()
        rows[2] = 0
        assert not judge(numerics.bn_backward_apply_oracle(dz, y, rows).to(dtype), wanted, bound)
        if dtype in LOW:
            assert not judge(truncated(wanted, dtype), wanted, bound)


# dgrad and wgrad


def gradients(layer, case, dy, dtype=None):
    """dh and dweight by float32 products of the given dy, h."""
    wide = compute_dtype(layer.x.dtype)
    h = numerics.normalised(layer.x, layer.norm)
    stride, padding, dilation, groups = conv_arguments(case)
    dh, dweight, _ = torch.ops.aten.convolution_backward(
        dy.to(wide), h.to(wide), layer.weight.to(wide), None, stride, padding, dilation, False,
        [0, 0], groups, [True, True, False],
    )  # fmt: skip
    return dh, dweight


def judge_dgrad(dx, layer, case):
    args = (layer.dz, layer.y, layer.coefficients, layer.weight, layer.addend, layer.x, layer.norm)
    options = {"addend_stride": 2, **case.geometry}
    oracle = numerics.conv_bn_dgrad_oracle(*args, input_size=layer.x.shape, **options)
    return judge(dx, oracle, numerics.conv_bn_dgrad_bound(*args, oracle, **options))


def judge_wgrad(dweight, layer, case, weight=None):
    weight = layer.weight if weight is None else weight
    args = (layer.dz, layer.y, layer.coefficients, layer.x, layer.norm, weight)
    oracle = numerics.conv_bn_wgrad_oracle(*args, **case.geometry)
    return judge(dweight, oracle, numerics.conv_bn_wgrad_bound(*args, oracle, **case.geometry))


def with_addend(dh, layer, dtype, early=False):
    dh = dh.to(dtype).to(dh.dtype) if early else dh.clone()
    dh[:, :, ::2, ::2] += layer.addend.to(dh.dtype)
    return dh


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", TELLING, ids=str)
def test_faults_of_conv_bn_dgrad(case: cases.ConvCase, dtype: torch.dtype) -> None:
    layer = random_layer(case, dtype)
    h = numerics.normalised(layer.x, layer.norm)
    dy = numerics.affine_gradient(layer.dz, layer.y, layer.coefficients)
    dh, _ = gradients(layer, case, dy)
    right = with_addend(dh, layer, dtype)
    assert judge_dgrad(numerics.masked(right, h).to(dtype), layer, case)
    assert not judge_dgrad(right.to(dtype), layer, case), "no mask"
    assert not judge_dgrad(numerics.masked(dh, h).to(dtype), layer, case), "no addend"
    unmasked_c = widened_by_c(layer, case, dtype)
    assert not judge_dgrad(numerics.masked(unmasked_c, h).to(dtype), layer, case)
    if dtype in LOW:
        twice = with_addend(dh, layer, dtype, early=True)
        assert not judge_dgrad(numerics.masked(twice, h).to(dtype), layer, case)
        assert not judge_dgrad(truncated(numerics.masked(right, h), dtype), layer, case)


def widened_by_c(layer, case, dtype):
    """dy outside the output image is C in place of 0: the affine was applied to masked reads."""
    (sh, sw), (dh, dw) = case.stride, case.dilation
    rings = max(case.r * dh, case.s * dw)
    dz, y = (F.pad(t, (rings,) * 4) for t in (layer.dz, layer.y))
    dy = numerics.affine_gradient(dz, y, layer.coefficients).to(compute_dtype(dtype))
    stride, padding, dilation, groups = conv_arguments(case)
    wide = F.conv_transpose2d(dy, layer.weight.to(dy.dtype), None, stride, 0, 0, groups, dilation)
    top, left = rings * sh + padding[0], rings * sw + padding[1]
    inside = wide[:, :, top : top + case.h, left : left + case.w]
    return with_addend(inside, layer, dtype)


def test_widened_by_c_is_dgrad_where_c_is_zero() -> None:
    """The planted fault is that fault alone."""
    case = CASES["3x3_dilated4_stride2"]
    layer = random_layer(case, torch.float64)
    layer.coefficients[2] = 0
    dx = widened_by_c(layer, case, torch.float64)
    assert judge_dgrad(numerics.masked(dx, numerics.normalised(layer.x, layer.norm)), layer, case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", TELLING, ids=str)
def test_faults_of_conv_bn_wgrad(case: cases.ConvCase, dtype: torch.dtype) -> None:
    layer = random_layer(case, dtype)
    dy = numerics.affine_gradient(layer.dz, layer.y, layer.coefficients)
    _, right = gradients(layer, case, dy)
    assert judge_wgrad(right.to(dtype), layer, case)
    wide = compute_dtype(dtype)
    assert judge_wgrad(right, layer, case, layer.weight.to(wide))
    _, plain = gradients(layer, case, layer.dz)
    assert not judge_wgrad(plain.to(dtype), layer, case), "no affine"
    raw = dataclasses.replace(layer, norm=torch.stack([torch.ones_like(layer.norm[0])] * 4))
    _, other = gradients(raw, case, dy)
    assert not judge_wgrad(other.to(dtype), layer, case), "another prologue"
    if dtype in LOW:
        assert not judge_wgrad(truncated(right, dtype), layer, case)
        rounded = right.to(dtype).float()
        assert not judge_wgrad(rounded, layer, case, layer.weight.float()), "rounded on the way"


def test_one_of_the_products_in_low_precision_is_beyond_the_bound() -> None:
    case = CASES["3x3_residual"]
    layer = random_layer(case, torch.float32)
    for name, judged in (("dgrad", judge_dgrad), ("wgrad", judge_wgrad)):
        cut = (numerics.affine_gradient(layer.dz, layer.y, layer.coefficients)).bfloat16().float()
        dh, dweight = gradients(layer, case, cut)
        if name == "dgrad":
            h = numerics.normalised(layer.x, layer.norm)
            dweight = numerics.masked(with_addend(dh, layer, torch.float32), h)
        assert not judged(dweight, layer, case)


# Pooling


@pytest.mark.parametrize("case", [c for c in cases.POOL_CASES if c.n], ids=str)
def test_pool_oracle_is_torchs(case: cases.PoolCase) -> None:
    """With ties by the dozen and some NaN: values, places and gradient."""
    y = torch.randint(-3, 4, case.shape).double()
    y.view(-1)[torch.randperm(y.numel())[: y.numel() // 20]] = math.nan
    norm = norm_values(case.c, torch.float64, exact=True)
    out, taps = numerics.bn_act_pool_oracle(y, norm, *case.window)
    h = numerics.normalised(y, norm).requires_grad_()
    expected, index = F.max_pool2d(h, *case.window, return_indices=True)
    assert out.shape == case.output_shape
    torch.testing.assert_close(out, expected, equal_nan=True, rtol=0, atol=0)
    p, q = case.output_shape[2:]
    rows = torch.arange(p).view(-1, 1) * case.stride[0] - case.padding[0] + taps // case.kernel[1]
    columns = torch.arange(q) * case.stride[1] - case.padding[1] + taps % case.kernel[1]
    assert torch.equal(rows * case.w + columns, index)
    dout = torch.randn_like(out)
    (dh,) = torch.autograd.grad(expected, h, dout)
    dz, _ = numerics.bn_act_pool_backward_oracle(dout, taps, y, norm, *case.window)
    torch.testing.assert_close(dz, numerics.masked(dh, h.detach()))


def test_pooling_before_rounding_or_with_the_last_maximum_differs() -> None:
    y = torch.randn(2, 32, 16, 16).bfloat16()
    norm = norm_values(32, torch.bfloat16)
    _, taps = numerics.bn_act_pool_oracle(y, norm, 3, 2, 1)
    _, unrounded = numerics.bn_act_pool_oracle(y.float(), norm, 3, 2, 1)
    assert not torch.equal(taps, unrounded)
    flipped = numerics.bn_act_pool_oracle(y.flip(2, 3), norm, 3, 2, 1)[1].flip(2, 3)
    assert not torch.equal(taps, 8 - flipped)


def test_a_gradient_of_the_pooling_that_is_rounded_at_every_window_is_beyond_the_bound() -> None:
    y, norm = torch.randn(2, 32, 9, 9).bfloat16(), norm_values(32, torch.bfloat16)
    out, taps = numerics.bn_act_pool_oracle(y, norm, 3, 1, 1)
    dout = torch.randn(out.shape).bfloat16()
    args = (taps, y, norm, 3, 1, 1)
    oracle, bound = numerics.bn_act_pool_backward_oracle(dout, *args)
    assert judge(oracle.bfloat16(), oracle, bound)
    total = torch.zeros_like(y)
    for tap in range(9):
        one = torch.where(taps == tap, dout, torch.zeros((), dtype=y.dtype))
        total += numerics.bn_act_pool_backward_oracle(one, *args)[0].bfloat16()
    assert not judge(total, oracle, bound)
    unmasked = oracle.clone()
    unmasked[oracle == 0] = 1.0
    assert not judge(unmasked.bfloat16(), oracle, bound)


def test_unknown_choices_are_named() -> None:
    layer, case = random_layer(CASES["1x1"], torch.float32), CASES["1x1"]
    with pytest.raises(ValueError, match="act is 'gelu'"):
        numerics.normalised(layer.x, layer.norm, "gelu")
    args = (layer.dz, None, None, layer.x, None, layer.weight)
    oracle = numerics.conv_bn_wgrad_oracle(*args, **case.geometry)
    with pytest.raises(ValueError, match="accumulation is 'up'"):
        numerics.conv_bn_wgrad_bound(*args, oracle, accumulation="up", **case.geometry)
