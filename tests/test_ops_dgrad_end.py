"""A convolution's input gradient behind a block's end: implementation x case x dtype, faults."""

from __future__ import annotations

import math

import pytest
import torch
from matrix import (
    EXACT,
    FUSED,
    SAMPLED_CASES,
    bound_options,
    cells,
    compute_dtype,
    conv_arguments,
    lay_out,
    norm_values,
    random_layer,
    repeats,
)

import resnet_fused as rf
from resnet_fused import backends, cases, numerics
from resnet_fused.ops import _end_gradient, _training
from resnet_fused.ops._library import overload

OP = _end_gradient.OP
CASES = {case.name: case for case in cases.CONV_CASES}
LAID_OUT = [
    *((case, "nhwc") for case in SAMPLED_CASES),
    *((CASES[name], other) for name, other in (
        ("1x1", "nchw"), ("3x3_stride2", "sliced"), ("3x3_groups4", "unaligned")
    )),
]  # fmt: skip
KINDS = (torch.isnan, torch.isposinf, torch.isneginf)


class Operands:
    """A layer, and the end of the block in front of it: its output, raw outputs and BatchNorms.

    Args:
        case: of the layer.
        dtype: of the activations.
        layout: of the activations.
        exact: integers on which every sum is exact.
    """

    def __init__(self, case, dtype, layout="nhwc", *, exact=False):
        self.case, shape = case, case.input_shape

        def values():
            t = torch.randint(-3, 4, shape) if exact else torch.randn(shape)
            return lay_out(t.to(dtype), layout)

        self.layer = random_layer(case, dtype, exact=exact).lay_out(layout)
        self.out, self.raw, self.residual = values().relu(), values(), values()
        self.norm, self.residual_norm = (norm_values(case.c, dtype, exact=exact) for _ in range(2))

    def arguments(self, *, addend=1, affine=True, projected=True):
        """Of an overload; `addend` is its stride, 0 for none."""
        layer = self.layer
        shortcut = {0: None, 1: layer.x.flip(0), 2: layer.addend}[addend]
        pair = (layer.y, layer.coefficients) if affine else (None, None)
        rest = (self.residual, self.residual_norm) if projected else (None, None)
        return (
            layer.dz, *pair, layer.weight, shortcut, self.out, self.raw, self.norm, *rest,
            max(1, addend), *conv_arguments(self.case),
        )  # fmt: skip


def judge(entry, o, arguments, found):
    """dz and its sums within their bounds; the oracle."""
    dz, sums = found
    operands, branches = arguments[:6], [(o.raw, o.norm)]
    if arguments[8] is not None:
        branches.append((o.residual, o.residual_norm))
    options = {"addend_stride": arguments[10], **o.case.geometry}
    oracle = numerics.conv_bn_dgrad_end_oracle(*operands, **options)
    tf32 = bound_options(entry, dz.dtype)["tf32"]
    bound = numerics.conv_bn_dgrad_end_bound(*operands, oracle, **options, tf32=tf32)
    wanted = numerics.reductions_oracle(dz, *branches)
    assert (dz.shape, dz.dtype) == (o.out.shape, o.raw.dtype)
    assert sums.shape == wanted.shape and sums.dtype == compute_dtype(dz.dtype)
    for one, other, most in (
        (dz, oracle, bound),
        (sums, wanted, numerics.reductions_bound(dz, *branches)),
    ):
        check = numerics.check_bound(one, other, most)
        assert check.ok, check
    return oracle, wanted


def check(entry, o, **options):
    arguments = o.arguments(**options)
    found = overload(OP, entry.name)(*arguments)
    return *found, *judge(entry, o, arguments, found)


@pytest.mark.op_matrix
@pytest.mark.parametrize("case", cases.CONV_CASES, ids=str)
@pytest.mark.parametrize(("entry", "dtype"), cells(OP, EXACT))
def test_exact_on_integers(entry, dtype, case):
    o = Operands(case, dtype, exact=True)
    for addend, projected in ((1, True), (0, False)):
        dz, sums, oracle, wanted = check(entry, o, addend=addend, projected=projected)
        assert torch.equal(dz, oracle.to(dtype))
        assert torch.equal(sums.double(), wanted)


@pytest.mark.op_matrix
@pytest.mark.parametrize(("case", "layout"), LAID_OUT, ids=str)
@pytest.mark.parametrize(("entry", "dtype"), cells(OP))
def test_any_layout_within_the_bound(entry, dtype, case, layout):
    o = Operands(case, dtype, layout)
    given = [t for t in o.arguments() if isinstance(t, torch.Tensor)]
    before = [t.clone() for t in given]
    for addend, affine, projected in ((1, True, True), (2, False, False), (0, True, False)):
        dz, *_ = check(entry, o, addend=addend, affine=affine, projected=projected)
        assert dz.stride() == torch.empty_like(o.raw).stride()
    for t, old in zip(given, before, strict=True):
        assert torch.equal(t, old), "an input was written"


@pytest.mark.op_matrix
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "operand", ["dz", "y", "weight", "addend", "coefficients", "raw", "residual", "norm"]
)
@pytest.mark.parametrize(("entry", "dtype"), cells(OP, FUSED))
def test_nan_and_inf_are_where_torch_puts_them(entry, dtype, operand, value):
    o = Operands(CASES["3x3_groups4"], dtype)
    for name in ("dz", "y", "weight", "addend", "coefficients"):
        t = getattr(o.layer, name)
        t.copy_(t.abs() + 1)  # no zero that meets Inf
    o.out += 1
    o.out[..., ::2] = 0
    target = getattr(o, operand, None)
    target = getattr(o.layer, operand) if target is None else target
    place = (0,) * (target.dim() - 2) + tuple(size // 2 for size in target.shape[-2:])
    target[place] = value
    dz, sums, oracle, wanted = check(entry, o, addend=2)
    for kind in KINDS:
        assert torch.equal(kind(dz), kind(oracle)) and torch.equal(kind(sums), kind(wanted))
    assert torch.equal(dz == 0, o.out <= 0)
    assert operand == "norm" or sums[:, -1].isfinite().all(), "the groups beside it are untouched"


@pytest.mark.op_matrix
@pytest.mark.parametrize(("entry", "dtype"), cells(OP, FUSED))
def test_the_mask_is_read_off_the_output(entry, dtype):
    """NaN passes, both zeros and what is below do not; nothing is made of raw and norm."""
    case = cases.ConvCase("one", 1, 8, 1, 7, 8)
    o = Operands(case, dtype)
    tiny = torch.finfo(dtype).smallest_normal
    signs = torch.tensor([math.nan, math.inf, tiny, 0.0, -0.0, -tiny, -1.0]).to(dtype)
    o.out.copy_(signs.expand_as(o.out))
    o.layer.weight.copy_(torch.eye(8).view(8, 8, 1, 1))
    o.layer.dz.fill_(1)
    dz, _, _, _ = check(entry, o, addend=0, affine=False)
    assert torch.equal(dz, torch.tensor([1.0, 1, 1, 0, 0, 0, 0]).to(dtype).expand_as(dz))


@pytest.mark.op_matrix
@pytest.mark.parametrize(("entry", "dtype"), cells(OP))
def test_the_bits_are_those_of_two_ops_and_of_another_time(entry, dtype):
    o = Operands(CASES["1x1"], dtype)
    arguments = o.arguments()
    found = overload(OP, entry.name)(*arguments)
    for _ in range(repeats(entry)):
        assert all(map(torch.equal, overload(OP, entry.name)(*arguments), found))
    if entry.name != "reference":
        return
    dout, _ = torch.ops.resnet_fused.conv_bn_dgrad.reference(
        *arguments[:5], None, None, list(o.out.shape), True, *arguments[10:]
    )
    two = torch.ops.resnet_fused.bn_add_act_backward.reference(dout, *arguments[5:10], "relu")
    assert all(map(torch.equal, two, found))


FAULTS = {
    "no mask": lambda dz, sums, o: (torch.where(o.out <= 0, torch.ones_like(dz), dz), sums),
    "mask of raw": lambda dz, sums, o: (torch.where(o.raw <= 0, torch.zeros_like(dz), dz), sums),
    "no addend": lambda dz, sums, o: (dz - numerics.masked(o.layer.x.flip(0), o.out), sums),
    "sums are not centred": lambda dz, sums, o: (dz, sums + sums[:1] * o.norm[2]),
    "sums of the rounded elsewhere": lambda dz, sums, o: (dz, sums * (1 + 2e-4)),
    "rows swapped": lambda dz, sums, o: (dz, sums[[0, 2, 1]]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(fault):
    entry = next(e for e in backends.implementations(OP) if e.name == "reference")
    o = Operands(CASES["1x1"], torch.float32)
    arguments = o.arguments()
    found = overload(OP, "reference")(*arguments)
    judge(entry, o, arguments, found)
    with pytest.raises(AssertionError, match="ok=False"):
        judge(entry, o, arguments, FAULTS[fault](*found, o))


# The public function


def call(o):
    dz, y, coefficients, weight, addend, out, raw, norm, residual, residual_norm, *rest = (
        o.arguments()
    )
    stride, padding, dilation, groups = rest[1:]
    return rf.ops.conv_bn_dgrad_end(
        dz, weight, y, coefficients, out=out, raw=raw, norm=norm, residual=residual,
        residual_norm=residual_norm, addend=addend, stride=stride, padding=padding,
        dilation=dilation, groups=groups,
    )  # fmt: skip


@pytest.fixture
def ran(monkeypatch):
    """Names of the ops that the public function runs."""
    found = []
    for module in (_training, rf.ops.conv_bn_dgrad_end.__globals__):
        real = overload

        def watching(op, name, real=real):
            found.append((op, name))
            return real(op, "reference")

        if isinstance(module, dict):
            monkeypatch.setitem(module, "overload", watching)
        else:
            monkeypatch.setattr(module, "overload", watching)
    return found


@pytest.mark.parametrize("name", ["1x1", "3x3_stride2", "3x3_groups4"])
def test_without_a_kernel_it_is_two_ops(ran, name):
    o = Operands(CASES[name], torch.float64)
    entry = next(e for e in backends.implementations(OP) if e.name == "reference")
    with rf.backend("reference"):
        judge(entry, o, o.arguments(), call(o))
    assert [op for op, _ in ran] == ["conv_bn_dgrad", "bn_add_act_backward"]


def test_a_kernel_takes_what_it_does_not_refuse(ran, monkeypatch):
    """Pretended: an entry of a name that serves, whose body is the reference's."""
    o, places = Operands(CASES["1x1"], torch.float32), []

    def refusal(place):
        places.append(place)
        return None if len(places) == 1 else "too wide"

    monkeypatch.setitem(_end_gradient.ENDING, "reference", _end_gradient.Kernel(refusal, None))
    with rf.backend("reference"):
        first, second = call(o), call(o)
    assert [op for op, _ in ran] == [OP, "conv_bn_dgrad", "bn_add_act_backward"]
    assert all(map(torch.equal, first, second))
    assert places[0] == places[1] == _end_gradient.Place(
        torch.device("cpu"), torch.float32, tuple(o.out.shape), tuple(o.layer.weight.shape),
        conv_arguments(o.case), True, 1,
    )  # fmt: skip
