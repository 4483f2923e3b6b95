"""The oracle and the bounds: right implementations pass, planted faults do not."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused import numerics
from resnet_fused.cases import BN_ACT_CASES, CONV_CASES, ConvCase

LOW = (torch.bfloat16, torch.float16)
DTYPES = (*LOW, torch.float32, torch.float64)
BY_NAME = {case.name: case for case in CONV_CASES}
# Layers deep enough that a fault has room to hide among honest roundings.
TELLING = tuple(BY_NAME[name] for name in ("3x3_residual", "odd_channels", "deep"))


def column(v: Tensor) -> Tensor:
    return v.view(1, -1, 1, 1)


def operands(case: ConvCase, dtype: torch.dtype, seed: int = 0) -> numerics.ExactInputs:
    g = torch.Generator().manual_seed(seed)
    acc = numerics.accumulator_dtype(dtype)
    fan_in = case.c // case.groups * case.r * case.s
    return numerics.ExactInputs(
        torch.randn(case.input_shape, generator=g).relu().to(dtype),
        (torch.randn(case.weight_shape, generator=g) / math.sqrt(fan_in)).to(dtype),
        torch.randn(case.k, generator=g).to(acc),
        torch.randn(case.k, generator=g).to(acc),
        torch.randn(case.output_shape, generator=g).to(dtype) if case.residual else None,
    )


def simulate(
    inputs: numerics.ExactInputs,
    case: ConvCase,
    rounding: str = "fused",
    store: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """An implementation in torch: sums in the accumulator's dtype, roundings as asked."""
    x, weight, scale, shift, residual = inputs
    dtype, acc = x.dtype, scale.dtype
    a, b = column(scale), column(shift)
    if rounding == "folded":
        weight = (weight.to(acc) * scale.view(-1, 1, 1, 1)).to(dtype)
        a = torch.ones_like(a)
    z = F.conv2d(x.to(acc), weight.to(acc), **case.geometry)
    if rounding in ("stored_conv", "modules"):
        z = z.to(dtype).to(acc)
    z = z * a + b
    if residual is not None:
        z = (z.to(dtype) if rounding == "modules" else z) + residual.to(acc)
    if case.act == "relu":
        z = z.relu()
    return z.to(dtype) if store is None else store(z)


def judge(
    y: Tensor, inputs: numerics.ExactInputs, case: ConvCase, **modes: str
) -> numerics.BoundCheck:
    oracle = numerics.conv_bn_act_oracle(*inputs, act=case.act, **case.geometry)
    bound = numerics.conv_bn_act_bound(*inputs, oracle, **case.geometry, **modes)
    return numerics.check_bound(y, oracle, bound)


def truncated(z: Tensor, dtype: torch.dtype) -> Tensor:
    """Stores in 16 bits by cutting mantissa bits off, as a careless kernel would."""
    lost = 16 if dtype is torch.bfloat16 else 13
    return (z.view(torch.int32) >> lost << lost).view(torch.float32).to(dtype)


def test_unit_roundoff_is_half_the_gap_above_one() -> None:
    for dtype in DTYPES:
        assert numerics.unit_roundoff(dtype) == torch.finfo(dtype).eps / 2
    with pytest.raises(TypeError, match=r"dtype is torch\.int8; accepted are torch\.bfloat16"):
        numerics.unit_roundoff(torch.int8)


@pytest.mark.parametrize("case", CONV_CASES, ids=str)
def test_oracle_is_the_unfused_modules_in_float64(case: ConvCase) -> None:
    x, weight, _, _, residual = operands(case, torch.float32)
    g = torch.Generator().manual_seed(3)
    conv = torch.nn.Conv2d(case.c, case.k, (case.r, case.s), bias=False, **case.geometry)
    bn = torch.nn.BatchNorm2d(case.k, eps=1e-3).eval()
    with torch.no_grad():
        conv.weight.copy_(weight)
        for tensor in (bn.weight, bn.bias, bn.running_mean):
            tensor.copy_(torch.randn(case.k, generator=g))
        bn.running_var.copy_(torch.rand(case.k, generator=g) + 0.1)
        conv, bn = conv.double(), bn.double()
        expected = bn(conv(x.double()))
        if residual is not None:
            expected = expected + residual.double()
        if case.act == "relu":
            expected = F.relu(expected)
        scale = bn.weight / torch.sqrt(bn.running_var + bn.eps)
        shift = bn.bias - bn.running_mean * scale
    got = numerics.conv_bn_act_oracle(
        x, weight, scale, shift, residual, act=case.act, **case.geometry
    )
    assert got.dtype is torch.float64 and got.shape == case.output_shape
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rounding", numerics.ROUNDINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CONV_CASES, ids=str)
def test_right_implementation_is_within_its_bound(
    case: ConvCase, dtype: torch.dtype, rounding: str
) -> None:
    inputs = operands(case, dtype)
    check = judge(simulate(inputs, case, rounding), inputs, case, rounding=rounding)
    assert check, str(check)
    assert check.unchecked == 0
    assert check.worst > 0 or not case.n or dtype is torch.float64, "an error of 0 proves nothing"


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("case", TELLING, ids=str)
def test_the_bound_is_tight_in_16_bits(case: ConvCase, dtype: torch.dtype) -> None:
    inputs = operands(case, dtype)
    assert judge(simulate(inputs, case), inputs, case).worst > 0.7


def low_precision_sums(inputs: numerics.ExactInputs, case: ConvCase) -> Tensor:
    """The filter's taps are added one after the other, the sum rounded each time."""
    x, weight, scale, shift, residual = inputs
    z = torch.zeros(case.output_shape, dtype=x.dtype)
    for i in range(case.r):
        for j in range(case.s):
            tap = torch.zeros_like(weight)
            tap[:, :, i, j] = weight[:, :, i, j]
            z = (z.float() + F.conv2d(x.float(), tap.float(), **case.geometry)).to(x.dtype)
    z = z.float() * column(scale) + column(shift)
    z = z if residual is None else z + residual.float()
    return (z.relu() if case.act == "relu" else z).to(x.dtype)


def wrong_eps(inputs: numerics.ExactInputs, case: ConvCase) -> Tensor:
    """A scale of gamma / sqrt(1 + 1e-3) where gamma / sqrt(1 + 1e-5) was meant."""
    return simulate(inputs._replace(scale=inputs.scale * math.sqrt(1.00001 / 1.001)), case)


def zeroed_channel(inputs: numerics.ExactInputs, case: ConvCase) -> Tensor:
    y = simulate(inputs, case)
    y[:, -1] = 0
    return y


def dropped_residual(inputs: numerics.ExactInputs, case: ConvCase) -> Tensor:
    return simulate(inputs._replace(residual=None), case)


def swapped_shifts(inputs: numerics.ExactInputs, case: ConvCase) -> Tensor:
    order = torch.arange(case.k)
    order[0], order[1] = 1, 0
    return simulate(inputs._replace(shift=inputs.shift[order]), case)


def relu_before_the_add(inputs: numerics.ExactInputs, case: ConvCase) -> Tensor:
    assert inputs.residual is not None
    y = simulate(inputs._replace(residual=None), case)
    return (y.float() + inputs.residual.float()).to(y.dtype)


def shifted_by_one_pixel(inputs: numerics.ExactInputs, case: ConvCase) -> Tensor:
    return simulate(inputs, case).roll(1, dims=3)


@pytest.mark.parametrize(
    "fault",
    [
        wrong_eps,
        zeroed_channel,
        dropped_residual,
        swapped_shifts,
        relu_before_the_add,
        shifted_by_one_pixel,
        low_precision_sums,
    ],
)
@pytest.mark.parametrize("dtype", [*LOW, torch.float32], ids=str)
@pytest.mark.parametrize("case", TELLING, ids=str)
def test_planted_fault_breaks_the_bound(
    case: ConvCase,
    dtype: torch.dtype,
    fault: Callable[[numerics.ExactInputs, ConvCase], Tensor],
) -> None:
    if fault is low_precision_sums and dtype is torch.float32:
        fault = low_precision_in_float32
    inputs = operands(case, dtype)
    check = judge(fault(inputs, case), inputs, case)
    assert not check and check.count > 0 and check.worst > 1, f"{fault.__name__}: {check}"


def low_precision_in_float32(inputs: numerics.ExactInputs, case: ConvCase) -> Tensor:
    """Operands cut to TF32's 11 bits."""
    cut = [(t.view(torch.int32) >> 13 << 13).view(torch.float32) for t in inputs[:2]]
    return simulate(inputs._replace(x=cut[0], weight=cut[1]), case)


def test_tf32_has_a_bound_of_its_own() -> None:
    case = BY_NAME["deep"]
    inputs = operands(case, torch.float32)
    y = low_precision_in_float32(inputs, case)
    oracle = numerics.conv_bn_act_oracle(*inputs, act=case.act, **case.geometry)
    bound = numerics.conv_bn_act_bound(*inputs, oracle, **case.geometry, tf32=True)
    assert numerics.check_bound(y, oracle, bound)


def test_tf32_bounds_operands_that_were_rounded_not_cut() -> None:
    """Each just below a number of TF32: rounded up, or cut by 2^-10 of itself."""
    one = torch.ones(1)
    x = torch.full((1, 64, 1, 1), 1 + 2.0**-10 - 2.0**-23)
    oracle = numerics.conv_bn_act_oracle(x, x, one, 0 * one)
    bound = numerics.conv_bn_act_bound(x, x, one, 0 * one, None, oracle, tf32=True)
    rounded, cut = (torch.full((1, 1, 1, 1), 64 * v**2) for v in (1 + 2.0**-10, 1.0))
    assert numerics.check_bound(rounded, oracle, bound)
    assert not numerics.check_bound(cut, oracle, bound)


@pytest.mark.parametrize("rounding", ["fused", "stored_conv"])
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("case", TELLING, ids=str)
def test_truncating_store_breaks_the_bound(
    case: ConvCase, dtype: torch.dtype, rounding: str
) -> None:
    inputs = operands(case, dtype)
    y = simulate(inputs, case, rounding, store=lambda z: truncated(z, dtype))
    assert not judge(y, inputs, case)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_an_extra_rounding_is_told_from_one(dtype: torch.dtype) -> None:
    case = BY_NAME["deep"]
    inputs = operands(case, dtype)
    for rounding in ("folded", "stored_conv", "modules"):
        y = simulate(inputs, case, rounding)
        assert not judge(y, inputs, case, rounding="fused"), rounding


def test_truncated_sums_need_the_linear_bound() -> None:
    n = 2048
    x, weight = torch.ones(1, n, 1, 1), torch.full((1, n, 1, 1), math.pi / 3)
    one, zero = torch.ones(1), torch.zeros(1)
    inputs = numerics.ExactInputs(x, weight, one, zero, None)
    case = ConvCase("sum", 1, n, 1, 1, 1)
    total = torch.zeros((), dtype=torch.float64)
    for product in (x * weight).flatten().double():
        total = total + product
        mantissa, exponent = torch.frexp(total)
        total = torch.ldexp(torch.floor(torch.ldexp(mantissa, torch.tensor(24))), exponent - 24)
    y = total.float().view(1, 1, 1, 1)
    assert not judge(y, inputs, case)
    assert judge(y, inputs, case, accumulation="truncate", k=1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "operand"),
    [
        (name, operand)
        for name in ("3x3_residual", "1x1_residual", "stem")
        for operand in ("x", "weight", "scale", "shift", "residual")
        if operand != "residual" or BY_NAME[name].residual
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_inf_keep_their_places(
    dtype: torch.dtype, operand: str, value: float, name: str
) -> None:
    case = BY_NAME[name]
    inputs = operands(case, dtype)
    getattr(inputs, operand).view(-1)[1] = value
    y = simulate(inputs, case)
    check = judge(y, inputs, case)
    assert check, str(check)
    oracle = numerics.conv_bn_act_oracle(*inputs, act=case.act, **case.geometry)
    odd = ~torch.isfinite(oracle)
    # A ReLU may make 0 of every -Inf, nothing else may lose NaN and Inf.
    assert bool(odd.any()) or (value == -math.inf and case.act == "relu")
    free = torch.isinf(numerics.conv_bn_act_bound(*inputs, oracle, **case.geometry))
    for wrong in (0.0, torch.finfo(dtype).max):
        spoilt = torch.where(odd, torch.full_like(y, wrong), y)
        assert bool(judge(spoilt, inputs, case)) == (not bool((odd & ~free).any()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_relu_that_drops_nan_fails(dtype: torch.dtype) -> None:
    case = BY_NAME["3x3_residual"]
    inputs = operands(case, dtype)
    inputs.x[0, 0, 4, 4] = math.nan
    y = simulate(inputs, case)
    assert bool(torch.isnan(y).any()) and judge(y, inputs, case)
    assert not judge(y.nan_to_num(0.0), inputs, case)


def test_inf_of_the_wrong_sign_and_stray_nan_fail() -> None:
    oracle = torch.tensor([math.inf, 1.0, math.nan], dtype=torch.float64)
    bound = torch.tensor([0.0, 0.1, 0.0], dtype=torch.float64)
    assert numerics.check_bound(torch.tensor([math.inf, 1.05, math.nan]), oracle, bound)
    for y in ([-math.inf, 1.0, math.nan], [math.inf, math.nan, math.nan], [math.inf, 1.0, 0.0]):
        check = numerics.check_bound(torch.tensor(y), oracle, bound)
        assert not check and check.worst == math.inf and check.count == 1


def test_padding_at_an_infinite_weight_is_free_and_only_that() -> None:
    case = BY_NAME["3x3"]
    inputs = operands(case, torch.float32)
    inputs.weight[0, 0, 0, 0] = math.inf
    oracle = numerics.conv_bn_act_oracle(*inputs, act=case.act, **case.geometry)
    bound = numerics.conv_bn_act_bound(*inputs, oracle, **case.geometry)
    free = torch.isinf(bound)
    assert bool(free[:, 0, 0].all()) and bool(free[:, 0, :, 0].all())
    assert not bool(free[:, 0, 1:, 1:].any()) and not bool(free[:, 1:].any())
    assert numerics.check_bound(oracle.float(), oracle, bound).unchecked == int(free.sum())


def test_overflow_of_the_output_is_inf() -> None:
    oracle = torch.tensor([65504.0, 65519.0, 65521.0, 7e4, -7e4], dtype=torch.float64)
    bound = oracle.abs() * 2.0**-11
    assert numerics.check_bound(oracle.half(), oracle, bound)
    capped = numerics.check_bound(oracle.half().clamp(-65504, 65504), oracle, bound)
    assert not capped and capped.count == 2
    early = oracle.half()
    early[0] = math.inf
    assert numerics.check_bound(early, oracle, bound), "65504 is within one rounding of Inf"
    assert not numerics.check_bound(-oracle.half(), oracle, bound)


def test_overflow_on_the_way_is_not_judged_where_it_may_happen() -> None:
    x, weight = torch.full((1, 2, 1, 1), 200.0).half(), torch.full((2, 2, 1, 1), 200.0).half()
    weight[1] = 1.0
    inputs = numerics.ExactInputs(x, weight, torch.full((2,), 0.1), torch.zeros(2), None)
    case = ConvCase("overflow", 1, 2, 1, 1, 2)
    fused = judge(simulate(inputs, case), inputs, case)
    assert fused and fused.unchecked == 0
    assert not judge(simulate(inputs, case, "stored_conv"), inputs, case)
    stored = judge(simulate(inputs, case, "stored_conv"), inputs, case, rounding="stored_conv")
    assert stored and stored.unchecked == 1


def test_subnormal_results_round_absolutely() -> None:
    case = BY_NAME["1x1"]
    inputs = operands(case, torch.float16)
    small = inputs._replace(scale=inputs.scale * 1e-6, shift=inputs.shift * 0)
    assert judge(simulate(small, case), small, case)
    assert judge(simulate(small, case, "folded"), small, case, rounding="folded")
    flushed = torch.zeros(case.output_shape, dtype=torch.float16)
    assert not judge(flushed, small, case)


@pytest.mark.parametrize("rounding", numerics.ROUNDINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CONV_CASES, ids=str)
def test_exact_tier_is_exact(case: ConvCase, dtype: torch.dtype, rounding: str) -> None:
    inputs = numerics.exact_inputs(case, dtype, torch.Generator().manual_seed(5))
    oracle = numerics.conv_bn_act_oracle(*inputs, act=case.act, **case.geometry)
    ones, zeros = torch.ones(case.k), torch.zeros(case.k)
    conv = numerics.conv_bn_act_oracle(
        inputs.x, inputs.weight, ones, zeros, act="none", **case.geometry
    )
    expected = numerics.exact_expected(
        oracle,
        dtype,
        rounding,
        conv=conv,
        scale=inputs.scale,
        shift=inputs.shift,
        residual=inputs.residual,
        act=case.act,
    )
    y = simulate(inputs, case, rounding)
    assert expected.dtype is dtype and torch.equal(y, expected)
    if y.numel():
        wrong = y.clone()
        wrong.view(-1)[0] += 1 if wrong.view(-1)[0].abs() < 100 else wrong.view(-1)[0]
        assert not torch.equal(wrong, expected)


def test_exact_inputs_are_what_they_promise() -> None:
    case = BY_NAME["deep"]
    first = numerics.exact_inputs(case, torch.bfloat16, torch.Generator().manual_seed(1))
    again = numerics.exact_inputs(case, torch.bfloat16, torch.Generator().manual_seed(1))
    for a, b in zip(first, again, strict=True):
        assert a is not None and b is not None and torch.equal(a, b)
    assert first.residual is not None
    for t in (first.x, first.weight, first.shift, first.residual):
        assert torch.equal(t, t.round()) and float(t.abs().max()) == 4
    assert torch.equal(first.scale.log2().nan_to_num(0) % 1, torch.zeros(case.k))
    assert set(first.scale.sign().tolist()) == {-1.0, 1.0}
    assert first.scale.dtype is torch.float32
    with pytest.raises(ValueError, match="reduces over 65536 taps"):
        numerics.exact_inputs(ConvCase("huge", 1, 2**16, 1, 1, 1), torch.float32)
    oracle = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match="needs conv, scale and shift"):
        numerics.exact_expected(oracle, torch.float32, "modules")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", BN_ACT_CASES, ids=str)
def test_bn_act_bound(case: object, dtype: torch.dtype) -> None:
    shape, residual, act = case.shape, case.residual, case.act  # type: ignore[attr-defined]
    g = torch.Generator().manual_seed(2)
    acc = numerics.accumulator_dtype(dtype)
    x = torch.randn(shape, generator=g).to(dtype)
    a, b = (torch.randn(shape[1], generator=g).to(acc) for _ in range(2))
    r = torch.randn(shape, generator=g).to(dtype) if residual else None
    oracle = numerics.bn_act_oracle(x, a, b, r, act)
    bound = numerics.bn_act_bound(x, a, b, r, oracle)
    z = x.to(acc) * column(a) + column(b)
    z = z if r is None else z + r.to(acc)
    z = z.relu() if act == "relu" else z
    check = numerics.check_bound(z.to(dtype), oracle, bound)
    assert check, str(check)
    if z.numel() < 16:
        return
    faults = [z * (1 - 2e-3) if dtype not in LOW else z * (1 - 1e-2), z.roll(1, 0).roll(1, 3)]
    for fault in faults:
        assert not numerics.check_bound(fault.to(dtype), oracle, bound)


def test_bound_of_float64_is_of_float64() -> None:
    case = BY_NAME["3x3_residual"]
    inputs = operands(case, torch.float64)
    y = simulate(inputs, case)
    assert judge(y, inputs, case)
    assert not judge(y * (1 + 1e-13), inputs, case)


def test_relative_check() -> None:
    g = torch.Generator().manual_seed(4)
    oracle = torch.randn(1024, 1024, generator=g, dtype=torch.float64)
    eager = oracle + 1e-3 * torch.randn(1024, 1024, generator=g, dtype=torch.float64)

    def off(factor: float, dtype: torch.dtype = torch.float32) -> numerics.RelativeCheck:
        return numerics.relative_check(oracle + factor * (eager - oracle), eager, oracle, dtype)

    assert off(1.4) and not off(1.6)
    assert off(0.99, torch.bfloat16) and not off(1.01, torch.bfloat16)
    low = (oracle + 1.2 * (eager - oracle)).bfloat16()
    assert numerics.relative_check(low, low, oracle).limit == 1.0 + 4 / 1024
    folded = numerics.relative_check(low, low, oracle, folded=True)
    assert folded.limit == 1.25 * (1 + 4 / 1024) and folded.max_limit == math.inf
    assert off(0.0).ratio == 0.0 and off(1.4).ratio == pytest.approx(1.4)
    spike = oracle + 0.5 * (eager - oracle)
    spike[0, 0] = oracle[0, 0] + 1.3 * float((eager - oracle).abs().max())
    judged = numerics.relative_check(spike, eager, oracle, torch.float16)
    assert judged.ratio < 1 and judged.max_ratio == pytest.approx(1.3) and not judged
    assert numerics.relative_check(spike, eager, oracle, torch.float32)
    assert not numerics.relative_check(eager, oracle, oracle, torch.float32), "eager is exact"
    assert numerics.relative_check(oracle, oracle, oracle, torch.float32)
    poisoned = oracle.clone()
    poisoned[3, 3] = math.nan
    assert not numerics.relative_check(poisoned, eager, oracle, torch.float32)
    assert numerics.relative_check(poisoned, poisoned, poisoned, torch.float32)
    assert not numerics.relative_check(eager, poisoned, poisoned, torch.float32), "NaN is gone"


def test_gradient_check_judges_both_norms_in_every_dtype() -> None:
    oracle = torch.zeros(100, dtype=torch.float64)
    eager = torch.full((100,), 1e-3)
    assert numerics.gradient_check(eager * 1.4, eager, oracle)
    assert not numerics.gradient_check(eager * 1.6, eager, oracle)
    spike = eager * 0.5
    spike[0] = 1.6e-3
    assert not numerics.gradient_check(spike, eager, oracle)


def test_bad_arguments_are_named() -> None:
    case = BY_NAME["3x3_residual"]
    inputs = operands(case, torch.float32)
    oracle = numerics.conv_bn_act_oracle(*inputs, **case.geometry)
    with pytest.raises(ValueError, match="act is 'gelu'; accepted are 'none', 'relu'"):
        numerics.conv_bn_act_oracle(*inputs, act="gelu", **case.geometry)
    with pytest.raises(ValueError, match="rounding is 'once'; accepted are 'fused'"):
        numerics.conv_bn_act_bound(*inputs, oracle, rounding="once", **case.geometry)
    with pytest.raises(ValueError, match="accumulation is 'up'"):
        numerics.conv_bn_act_bound(*inputs, oracle, accumulation="up", **case.geometry)
    with pytest.raises(ValueError, match="k is 0"):
        numerics.conv_bn_act_bound(*inputs, oracle, k=0, **case.geometry)
    with pytest.raises(ValueError, match="oracle has shape"):
        numerics.conv_bn_act_bound(*inputs, oracle[:1], **case.geometry)
    with pytest.raises(ValueError, match="residual has shape"):
        numerics.conv_bn_act_oracle(*inputs._replace(residual=inputs.x[:1]), **case.geometry)
    with pytest.raises(ValueError, match="y has shape"):
        numerics.check_bound(oracle[:1], oracle, oracle)
    with pytest.raises(ValueError, match="eager has shape"):
        numerics.relative_check(oracle, oracle[:1], oracle)
