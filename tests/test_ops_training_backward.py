"""Training's backward ops: implementation x case x dtype, layouts, NaN, the kink, repetition."""

from __future__ import annotations

import math

import pytest
import torch
from matrix import (
    ACTIVATION,
    EXACT,
    FUSED,
    SAMPLED_CASES,
    bound_options,
    cells,
    compute_dtype,
    conv_arguments,
    kink_values,
    lay_out,
    norm_values,
    random_layer,
    repeats,
)
from torch import Tensor
from torch.testing import assert_close

from resnet_fused import cases, numerics
from resnet_fused.ops._library import overload

CASES = {case.name: case for case in cases.CONV_CASES}
SPECIALS = [math.nan, math.inf, -math.inf]
KINDS = (torch.isnan, torch.isposinf, torch.isneginf)


def within(y: Tensor, oracle: Tensor, bound: Tensor) -> None:
    found = numerics.check_bound(y, oracle, bound)
    assert found.ok, found


def check_sums(sums: Tensor, dz: Tensor, *branches: tuple[Tensor, Tensor]) -> None:
    """The sums that go with a stored gradient."""
    assert sums.dtype == compute_dtype(dz.dtype)
    oracle = numerics.reductions_oracle(dz, *branches)
    within(sums, oracle, numerics.reductions_bound(dz, *branches))


# bn_add_act_backward


def behind_the_block(case, dtype, projection, *, integers=False):
    """dout, out, y, norm, residual, residual_norm."""

    def values():
        t = torch.randint(-3, 4, case.shape) if integers else torch.randn(case.shape)
        return lay_out(t.to(dtype), case.layout)

    norm, other = (norm_values(case.c, dtype, exact=integers) for _ in range(2))
    rest = (values(), other) if projection else (None, None)
    return (values(), values(), values(), norm, *rest)


@pytest.mark.op_matrix
@pytest.mark.parametrize("case", cases.BN_ACT_CASES, ids=str)
@pytest.mark.parametrize(("entry", "dtype"), cells("bn_add_act_backward"))
def test_bn_add_act_backward(entry, dtype, case):
    for mask in ("out", "rebuilt", "projection", "none", "integers"):
        integers, act = mask == "integers", "none" if mask == "none" else "relu"
        args = list(behind_the_block(case, dtype, mask == "projection", integers=integers))
        dout, out, y, norm, residual, other = args
        if mask == "rebuilt":
            out = args[1] = None
        before = [None if t is None else t.clone() for t in args]
        dz, sums = overload("bn_add_act_backward", entry.name)(*args, act)
        result = numerics.normalised(y, norm) if out is None else out
        expected = dout if act == "none" else numerics.masked(dout, result)
        assert torch.equal(dz, expected), mask
        assert dz.dtype == dtype
        if case.layout in ACTIVATION:
            assert dz.is_contiguous(memory_format=ACTIVATION[case.layout])
        branches = ((y, norm),) if residual is None else ((y, norm), (residual, other))
        check_sums(sums, dz, *branches)
        if integers:
            assert torch.equal(sums.double(), numerics.reductions_oracle(dz, *branches))
        for t, old in zip(args, before, strict=True):
            assert t is None or torch.equal(t, old), "an input was written"


@pytest.mark.op_matrix
@pytest.mark.parametrize("value", SPECIALS)
@pytest.mark.parametrize("operand", ["dout", "out", "y", "scale", "residual"])
@pytest.mark.parametrize(("entry", "dtype"), cells("bn_add_act_backward"))
def test_bn_add_act_backward_passes_a_gradient_at_nan(entry, dtype, operand, value):
    case = cases.BnActCase("nan", 2, 9, 3, 5)
    rebuilt = operand in ("y", "scale")
    args = list(behind_the_block(case, dtype, not rebuilt))
    dout, out, y, norm, residual, _ = args
    target = {"dout": dout, "out": out, "y": y, "scale": norm[:1], "residual": residual}[operand]
    target[(0, 4) + (0,) * (target.dim() - 2)] = value
    if rebuilt:
        out = args[1] = None
    dz, sums = overload("bn_add_act_backward", entry.name)(*args, "relu")
    result = numerics.normalised(y, norm) if out is None else out
    expected = numerics.masked(dout, result)
    assert_close(dz, expected, rtol=0, atol=0, equal_nan=True)
    oracle = numerics.reductions_oracle(
        dz, (y, norm), *([args[4:]] if residual is not None else [])
    )
    for kind in KINDS:
        assert torch.equal(kind(sums), kind(oracle))
    assert sums[:, [0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all()
    if operand == "out" and math.isnan(value):
        assert dz[0, 4, 0, 0] == dout[0, 4, 0, 0]


@pytest.mark.op_matrix
@pytest.mark.parametrize(("entry", "dtype"), cells("bn_add_act_backward"))
def test_masks_at_the_kink_are_those_of_forward(entry, dtype):
    y, norm = kink_values(dtype)
    ones = torch.ones_like(y)
    dz, _ = overload("bn_add_act_backward", entry.name)(ones, None, y, norm, None, None, "relu")
    forward = overload("bn_add_act", entry.name)(y, norm, None, None, 0, "relu")
    assert torch.equal(dz != 0, ~(forward <= 0))
    if dtype is not torch.float64:
        assert torch.equal(dz != 0, ~(numerics.normalised(y, norm) <= 0))


@pytest.mark.op_matrix
@pytest.mark.parametrize("kappa", [1.0, 1e3])
@pytest.mark.parametrize(
    ("entry", "dtype"), cells("bn_add_act_backward", (torch.float32, torch.float16))
)
def test_sums_are_centred(entry, dtype, kappa):
    y = (torch.randn(2, 16, 8, 8) + kappa).to(dtype)
    norm = norm_values(16, dtype)
    norm[2] = y.float().mean((0, 2, 3))
    dout = torch.randn(y.shape).to(dtype)
    for residual in (None, y + 1):
        other = None if residual is None else norm + 1
        dz, sums = overload("bn_add_act_backward", entry.name)(
            dout, dout, y, norm, residual, other, "relu"
        )
        check_sums(sums, dz, (y, norm), *([] if residual is None else [(residual, other)]))


@pytest.mark.op_matrix
@pytest.mark.parametrize(("entry", "dtype"), cells("bn_add_act_backward"))
def test_bn_add_act_backward_repeats_bit_for_bit(entry, dtype):
    args = behind_the_block(cases.BnActCase("again", 3, 16, 5, 7), dtype, True)
    call = overload("bn_add_act_backward", entry.name)
    first = call(*args, "relu")
    for _ in range(repeats(entry)):
        assert all(map(torch.equal, call(*args, "relu"), first))


@pytest.mark.op_matrix
@pytest.mark.parametrize("layout", ["expanded", "nchw"])
@pytest.mark.parametrize(("entry", "dtype"), cells("bn_add_act_backward"))
def test_a_gradient_in_another_layout(entry, dtype, layout):
    """Of a mean or a sum autograd hands down an expanded gradient."""
    dout, out, y, norm, *rest = behind_the_block(cases.BnActCase("laid", 3, 16, 5, 7), dtype, False)
    dout = dout[:1, :, :1, :1].expand(dout.shape) if layout == "expanded" else dout.contiguous()
    dz, sums = overload("bn_add_act_backward", entry.name)(dout, out, y, norm, *rest, "relu")
    assert torch.equal(dz, numerics.masked(dout, out))
    assert dz.stride() == y.stride()
    check_sums(sums, dz, (y, norm))


# bn_backward_finalize, bn_backward_apply


@pytest.mark.op_matrix
@pytest.mark.parametrize("ranks", [False, True])
@pytest.mark.parametrize("row", [1, 2])
@pytest.mark.parametrize("k", [1, 65, 512])
@pytest.mark.parametrize(
    ("entry", "dtype"), cells("bn_backward_finalize", (torch.float32, torch.float64))
)
def test_bn_backward_finalize(entry, dtype, k, row, ranks):
    sums, norm = (torch.randn(3, k) * 9).to(dtype), norm_values(k, dtype)
    everywhere = (sums * 2 + 1) if ranks else None
    total = torch.tensor([400.0], dtype=torch.float64) if ranks else None
    for frozen in (False, True):
        args = (sums, everywhere, total, norm, 98, row, frozen)
        found = overload("bn_backward_finalize", entry.name)(*args)
        oracle = numerics.bn_backward_finalize_oracle(*args)
        bounds = numerics.bn_backward_finalize_bound(oracle, norm)
        for got, wanted, bound in zip(found, oracle, bounds, strict=True):
            assert got.dtype == dtype
            within(got, wanted, bound)
    sums[0, 0], norm[3, -1] = math.nan, math.inf
    found = overload("bn_backward_finalize", entry.name)(*args[:-1], False)
    oracle = numerics.bn_backward_finalize_oracle(*args[:-1], False)
    for got, wanted in zip(found, oracle, strict=True):
        assert torch.equal(got.isnan(), wanted.isnan())
        assert torch.equal(got.isinf(), wanted.isinf())


@pytest.mark.op_matrix
@pytest.mark.parametrize(
    ("entry", "dtype"), cells("bn_backward_finalize", (torch.float32, torch.float64))
)
def test_an_empty_batch_has_finite_coefficients(entry, dtype):
    sums, norm = torch.zeros(2, 5).to(dtype), norm_values(5, dtype)
    for total in (None, torch.zeros(1, dtype=torch.float64)):
        found = overload("bn_backward_finalize", entry.name)(sums, None, total, norm, 0, 1, False)
        assert all(t.isfinite().all() for t in found)
        assert not found[1].any() and not found[2].any()


@pytest.mark.op_matrix
@pytest.mark.parametrize("case", cases.BN_ACT_CASES, ids=str)
@pytest.mark.parametrize(("entry", "dtype"), cells("bn_backward_apply"))
def test_bn_backward_apply(entry, dtype, case):
    call = overload("bn_backward_apply", entry.name)
    rows = norm_values(case.c, dtype)[:3]
    dz, y = (lay_out(torch.randn(case.shape).to(dtype), case.layout) for _ in range(2))
    dy = call(dz, y, rows)
    oracle = numerics.bn_backward_apply_oracle(dz, y, rows)
    within(dy, oracle, numerics.bn_backward_apply_bound(dz, y, rows, oracle))
    if dtype is not torch.float64:
        assert torch.equal(dy, numerics.affine_gradient(dz, y, rows))
    if case.layout in ACTIVATION:
        assert dy.is_contiguous(memory_format=ACTIVATION[case.layout])


@pytest.mark.op_matrix
@pytest.mark.parametrize("value", SPECIALS)
@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize(("entry", "dtype"), cells("bn_backward_apply"))
def test_bn_backward_apply_keeps_nan_and_inf_and_its_bits(entry, dtype, place, value):
    call, rows = overload("bn_backward_apply", entry.name), norm_values(9, dtype)[:3]
    args = (torch.randn(2, 9, 3, 5).to(dtype), torch.randn(2, 9, 3, 5).to(dtype), rows)
    first = call(*args)
    for _ in range(repeats(entry) // 20 + 1):
        assert torch.equal(call(*args), first)
    args[place][(1,) * args[place].dim()] = value
    got, wanted = call(*args), numerics.bn_backward_apply_oracle(*args)
    assert all(torch.equal(kind(got), kind(wanted)) for kind in KINDS)
    assert not got.isfinite().all()


# conv_bn_dgrad


def dgrad(entry, layer, case, *, affine=True, addend=0, mask=True, channels_last=False):
    """The call and its oracle and bound; `addend` is its stride, 0 for none."""
    shortcut = None
    if addend:
        shortcut = layer.addend if addend == 2 else layer.x.flip(0)
    args = (
        layer.dz,
        layer.y if affine else None,
        layer.coefficients if affine else None,
        layer.weight,
        shortcut,
        layer.x if mask else None,
        layer.norm if mask else None,
    )
    size, step = list(layer.x.shape), max(1, addend)
    found = overload("conv_bn_dgrad", entry.name)(
        *args, size, channels_last, step, *conv_arguments(case)
    )
    options = {"addend_stride": step, **case.geometry}
    oracle = numerics.conv_bn_dgrad_oracle(*args, input_size=size, **options)
    tf32 = bound_options(entry, layer.dz.dtype)["tf32"]
    return *found, oracle, numerics.conv_bn_dgrad_bound(*args, oracle, **options, tf32=tf32)


def check_dgrad(entry, layer, case, **options):
    dx, sums, oracle, bound = dgrad(entry, layer, case, **options)
    within(dx, oracle, bound)
    assert dx.dtype == layer.dz.dtype
    if options.get("mask", True):
        check_sums(sums, dx, (layer.x, layer.norm))
    else:
        assert sums.shape == (0, case.c)
    return dx, sums, oracle


@pytest.mark.op_matrix
@pytest.mark.parametrize("case", cases.CONV_CASES, ids=str)
@pytest.mark.parametrize(("entry", "dtype"), cells("conv_bn_dgrad", EXACT))
def test_conv_bn_dgrad_exact_on_integers(entry, dtype, case):
    layer = random_layer(case, dtype, exact=True)
    for addend in (0, 2):
        dx, sums, oracle = check_dgrad(entry, layer, case, addend=addend)
        assert_close(dx, oracle.to(dtype), rtol=0, atol=0)
        assert torch.equal(sums.double(), numerics.reductions_oracle(dx, (layer.x, layer.norm)))


@pytest.mark.op_matrix
@pytest.mark.parametrize("case", SAMPLED_CASES, ids=str)
@pytest.mark.parametrize(("entry", "dtype"), cells("conv_bn_dgrad"))
def test_conv_bn_dgrad_within_the_bound(entry, dtype, case):
    layer = random_layer(case, dtype).lay_out("nhwc")
    before = [t.clone() for t in vars(layer).values()]
    dx, _, _ = check_dgrad(entry, layer, case, addend=1, channels_last=True)
    assert dx.is_contiguous(memory_format=torch.channels_last)
    check_dgrad(entry, layer, case, mask=False, affine=False)
    for t, old in zip(vars(layer).values(), before, strict=True):
        assert torch.equal(t, old), "an input was written"


@pytest.mark.op_matrix
@pytest.mark.parametrize("layout", ["nchw", "sliced", "unaligned"])
@pytest.mark.parametrize("name", ["3x3_residual", "1x1_stride2", "3x3_groups4"])
@pytest.mark.parametrize(("entry", "dtype"), cells("conv_bn_dgrad", FUSED))
def test_conv_bn_dgrad_of_any_layout(entry, dtype, name, layout):
    case = CASES[name]
    layer = random_layer(case, dtype).lay_out(layout)
    for addend, mask in ((2, True), (1, False), (0, True)):
        dx, *_ = check_dgrad(entry, layer, case, addend=addend, mask=mask)
        assert dx.is_contiguous()


@pytest.mark.op_matrix
@pytest.mark.parametrize("value", SPECIALS)
@pytest.mark.parametrize("operand", ["dz", "y", "weight", "addend", "x", "coefficients", "norm"])
@pytest.mark.parametrize(("entry", "dtype"), cells("conv_bn_dgrad", FUSED))
def test_conv_bn_dgrad_puts_nan_and_inf_where_torch_does(entry, dtype, operand, value):
    case = CASES["3x3_groups4"]
    layer = random_layer(case, dtype)
    for name in ("dz", "y", "weight", "addend", "coefficients"):
        t = getattr(layer, name)
        t.copy_(t.abs() + 1)  # no zero that meets Inf
    target = getattr(layer, operand)
    place = (0,) * (target.dim() - 2) + tuple(size // 2 for size in target.shape[-2:])
    target[place] = value
    dx, sums, oracle, _ = dgrad(entry, layer, case, addend=2)
    h = numerics.normalised(layer.x, layer.norm)
    for kind in KINDS:
        assert torch.equal(kind(dx), kind(oracle))
    assert torch.equal(dx == 0, h <= 0), "the mask passes NaN"
    wanted = numerics.reductions_oracle(dx, (layer.x, layer.norm))
    for kind in KINDS:
        assert torch.equal(kind(sums), kind(wanted))
    assert sums[:, -1].isfinite().all(), "the groups beside it are untouched"


@pytest.mark.op_matrix
@pytest.mark.parametrize(("entry", "dtype"), cells("conv_bn_dgrad", FUSED))
def test_conv_bn_dgrad_masks_at_the_kink_as_forward(entry, dtype):
    raw, norm = kink_values(dtype)
    k = raw.shape[1]
    weight = torch.eye(k, dtype=dtype).view(k, k, 1, 1)
    dz = torch.ones_like(raw)
    dx, _ = overload("conv_bn_dgrad", entry.name)(
        dz, None, None, weight, None, raw, norm, list(raw.shape), False, 1, [1, 1], [0, 0],
        [1, 1], 1,
    )  # fmt: skip
    assert torch.equal(dx, numerics.masked(dz, numerics.normalised(raw, norm)))


@pytest.mark.op_matrix
@pytest.mark.parametrize(("entry", "dtype"), cells("conv_bn_dgrad"))
def test_conv_bn_dgrad_repeats_bit_for_bit(entry, dtype):
    case = CASES["3x3_stride2"]
    layer = random_layer(case, dtype).lay_out("nhwc")
    first = dgrad(entry, layer, case, addend=2)[:2]
    args = (layer.dz, layer.y, layer.coefficients, layer.weight, layer.addend, layer.x, layer.norm)
    for _ in range(repeats(entry)):
        again = overload("conv_bn_dgrad", entry.name)(
            *args, list(layer.x.shape), False, 2, *conv_arguments(case)
        )
        assert all(map(torch.equal, again, first))


# conv_bn_wgrad


def wgrad(entry, layer, case, weight=None, *, affine=True, norm=True):
    args = (
        layer.dz,
        layer.y if affine else None,
        layer.coefficients if affine else None,
        layer.x,
        layer.norm if norm else None,
        layer.weight if weight is None else weight,
    )
    got = overload("conv_bn_wgrad", entry.name)(*args, *conv_arguments(case))
    oracle = numerics.conv_bn_wgrad_oracle(*args, **case.geometry)
    tf32 = bound_options(entry, layer.dz.dtype)["tf32"]
    return got, oracle, numerics.conv_bn_wgrad_bound(*args, oracle, **case.geometry, tf32=tf32)


@pytest.mark.op_matrix
@pytest.mark.parametrize("case", cases.CONV_CASES, ids=str)
@pytest.mark.parametrize(("entry", "dtype"), cells("conv_bn_wgrad", EXACT))
def test_conv_bn_wgrad_exact_on_integers(entry, dtype, case):
    layer = random_layer(case, dtype, exact=True)
    got, oracle, _ = wgrad(entry, layer, case)
    assert_close(got, oracle.to(dtype), rtol=0, atol=0)


@pytest.mark.op_matrix
@pytest.mark.parametrize("case", SAMPLED_CASES, ids=str)
@pytest.mark.parametrize(("entry", "dtype"), cells("conv_bn_wgrad"))
def test_conv_bn_wgrad_within_the_bound(entry, dtype, case):
    layer = random_layer(case, dtype).lay_out("nhwc")
    before = [t.clone() for t in vars(layer).values()]
    parameter = layer.weight.to(compute_dtype(dtype))
    form = torch.channels_last if case.r > 1 else torch.contiguous_format
    for weight, kept in (
        (layer.weight, True),
        (parameter.contiguous(memory_format=form), True),
        (parameter, False),
    ):
        got, oracle, bound = wgrad(entry, layer, case, weight, affine=kept, norm=kept)
        within(got, oracle, bound)
        assert got.dtype == weight.dtype and got.stride() == weight.stride()
    for t, old in zip(vars(layer).values(), before, strict=True):
        assert torch.equal(t, old), "an input was written"


@pytest.mark.op_matrix
@pytest.mark.parametrize("layout", ["nchw", "sliced", "unaligned"])
@pytest.mark.parametrize("name", ["3x3_residual", "1x1_stride2", "3x3_groups4"])
@pytest.mark.parametrize(("entry", "dtype"), cells("conv_bn_wgrad", FUSED))
def test_conv_bn_wgrad_of_any_layout(entry, dtype, name, layout):
    case = CASES[name]
    layer = random_layer(case, dtype).lay_out(layout)
    got, oracle, bound = wgrad(entry, layer, case)
    within(got, oracle, bound)
    first = got
    for _ in range(repeats(entry) if (name, layout) == ("3x3_residual", "nchw") else 0):
        args = (layer.dz, layer.y, layer.coefficients, layer.x, layer.norm, layer.weight)
        again = overload("conv_bn_wgrad", entry.name)(*args, *conv_arguments(case))
        assert torch.equal(again, first)


@pytest.mark.op_matrix
@pytest.mark.parametrize("value", SPECIALS)
@pytest.mark.parametrize("operand", ["dz", "y", "x", "coefficients", "norm"])
@pytest.mark.parametrize(("entry", "dtype"), cells("conv_bn_wgrad", FUSED))
def test_conv_bn_wgrad_puts_nan_and_inf_where_torch_does(entry, dtype, operand, value):
    case = CASES["1x1_groups2"]
    layer = random_layer(case, dtype)
    for name in ("dz", "y", "x", "coefficients", "norm"):
        t = getattr(layer, name)
        t.copy_(t.abs() + 1)  # no zero that meets Inf
    target = getattr(layer, operand)
    target[(0,) * (target.dim() - 2) + tuple(size // 3 for size in target.shape[-2:])] = value
    got, oracle, _ = wgrad(entry, layer, case)
    # Beside Inf PyTorch's own bfloat16 product sums zeros that only its blocks have.
    for kind in (torch.isfinite,) if dtype is torch.bfloat16 else KINDS:
        assert torch.equal(kind(got), kind(oracle))
    hidden = value == -math.inf and operand in ("x", "norm")
    assert oracle.isfinite().all() == hidden
    assert got[-1].isfinite().all(), "the groups beside it are untouched"


# bn_act_pool_backward


@pytest.mark.op_matrix
@pytest.mark.parametrize("integers", [False, True], ids=["random", "integers"])
@pytest.mark.parametrize("case", cases.POOL_CASES, ids=str)
@pytest.mark.parametrize(("entry", "dtype"), cells("bn_act_pool_backward"))
def test_bn_act_pool_backward(entry, dtype, case, integers):
    y = torch.randint(-3, 4, case.shape) if integers else torch.randn(case.shape)
    y, norm = lay_out(y.to(dtype), case.layout), norm_values(case.c, dtype, exact=integers)
    out, taps = numerics.bn_act_pool_oracle(y, norm, *case.window)
    dout = torch.randint(-4, 5, out.shape) if integers else torch.randn(out.shape)
    if case.layout == "nhwc":
        taps = taps.contiguous(memory_format=torch.channels_last)
    dout = lay_out(dout.to(dtype), case.layout)
    call = overload("bn_act_pool_backward", entry.name)
    dz, sums = call(dout, taps, y, norm, *case.window)
    oracle, bound = numerics.bn_act_pool_backward_oracle(dout, taps, y, norm, *case.window)
    within(dz, oracle, bound)
    check_sums(sums, dz, (y, norm))
    if integers:
        assert torch.equal(dz.double(), oracle)
    for _ in range(repeats(entry) // 20 + 1):
        assert all(map(torch.equal, call(dout, taps, y, norm, *case.window), (dz, sums)))


@pytest.mark.op_matrix
@pytest.mark.parametrize("value", SPECIALS)
@pytest.mark.parametrize("operand", ["dout", "y", "norm"])
@pytest.mark.parametrize(("entry", "dtype"), cells("bn_act_pool_backward"))
def test_bn_act_pool_backward_keeps_nan_and_inf(entry, dtype, operand, value):
    case = next(case for case in cases.POOL_CASES if case.name == "stem_odd")
    y, norm = torch.randn(case.shape).to(dtype), norm_values(case.c, dtype)
    dout = torch.randn(case.output_shape).to(dtype)
    target = {"dout": dout, "y": y, "norm": norm}[operand]
    target[(0, 4) + (1,) * (target.dim() - 2)] = value
    _, taps = numerics.bn_act_pool_oracle(y, norm, *case.window)
    args = (dout, taps, y, norm, *case.window)
    dz, sums = overload("bn_act_pool_backward", entry.name)(*args)
    oracle, bound = numerics.bn_act_pool_backward_oracle(*args)
    within(dz, oracle, bound)
    wanted = numerics.reductions_oracle(dz, (y, norm))
    for kind in KINDS:
        assert torch.equal(kind(sums), kind(wanted))
