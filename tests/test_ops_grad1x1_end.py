"""Both gradients of a 1x1 behind a block's end in one op: implementation x case x dtype, faults."""

from __future__ import annotations

import pytest
import torch
from matrix import EXACT, FUSED, bound_options, cells, repeats
from test_ops_dgrad_end import FAULTS, Operands
from test_ops_dgrad_end import judge as judge_end

import resnet_fused as rf
from resnet_fused import backends, cases, numerics
from resnet_fused.ops import _end_gradient, _grad1x1, _training
from resnet_fused.ops._library import overload

OP = _end_gradient.UNITED
SERVED = cases.ConvCase("served", 3, 136, 7, 6, 56)
SIXTEENS = cases.ConvCase("sixteens", 3, 144, 7, 6, 48)
CASES = (
    SERVED,
    SIXTEENS,
    *(
        case
        for case in cases.CONV_CASES
        if _grad1x1.fits_geometry(case.weight_shape, case.stride, case.padding, case.groups)
    ),
)
LAYOUTS = ("nchw", "nhwc", "sliced", "unaligned")


def arguments_of(o, *, parameter=None, **options):
    *operands, step, _, _, _, _ = o.arguments(**options)
    return (*operands, o.layer.weight if parameter is None else parameter, step)


def judge(entry, o, arguments, found):
    """All three results within their bounds; the oracles."""
    *operands, parameter, step = arguments
    below, sums, dweight = found
    geometry = ([1, 1], [0, 0], [1, 1], 1)
    oracles = judge_end(entry, o, (*operands, step, *geometry), (below, sums))
    dz, y, coefficients, _, _, out, *_ = operands
    factors = (dz, y, coefficients, out, None, parameter)
    wanted = numerics.conv_bn_wgrad_oracle(*factors)
    tf32 = bound_options(entry, dz.dtype)["tf32"]
    check = numerics.check_bound(
        dweight, wanted, numerics.conv_bn_wgrad_bound(*factors, wanted, tf32=tf32)
    )
    assert check.ok, check
    assert (dweight.dtype, dweight.stride()) == (parameter.dtype, parameter.stride())
    return (*oracles, wanted)


def check(entry, o, **options):
    arguments = arguments_of(o, **options)
    found = overload(OP, entry.name)(*arguments)
    return found, judge(entry, o, arguments, found)


def serves(entry, dtype, case):
    """Whether an implementation takes a case; what a kernel does not take goes to two ops."""
    if entry.name == "triton":
        return dtype.itemsize == 2 and case.k % 16 == case.c % 16 == 0 and case.k <= 128
    return entry.name == "reference" or (case.k % 8 == case.c % 8 == 0 and case.k <= 128)


def served(entry):
    """A case that an implementation takes."""
    return SIXTEENS if entry.name == "triton" else SERVED


FITTING = [cell for cell in cells(OP, FUSED) if serves(*cell.values, served(cell.values[0]))]


@pytest.mark.op_matrix
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("entry", "dtype"), cells(OP, EXACT))
def test_exact_on_integers(entry, dtype, case):
    o = Operands(case, dtype, exact=True)
    if not serves(entry, dtype, case):
        with pytest.raises((LookupError, ValueError)):
            overload(OP, entry.name)(*arguments_of(o))
        return
    for addend, projected in ((1, True), (0, False), (2, True)):
        found, oracles = check(entry, o, addend=addend, projected=projected)
        for one, oracle in zip(found, oracles, strict=True):
            assert torch.equal(one, oracle.to(one.dtype))


@pytest.mark.op_matrix
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("entry", "dtype"), FITTING)
def test_any_layout_within_the_bound(entry, dtype, layout):
    o = Operands(served(entry), dtype, layout)
    given = [t for t in o.arguments() if isinstance(t, torch.Tensor)]
    before = [t.clone() for t in given]
    for addend, affine, projected in ((1, True, True), (2, False, False), (0, True, False)):
        parameter = torch.empty(o.case.weight_shape, dtype=torch.float32)
        options = {"addend": addend, "affine": affine, "projected": projected}
        (dz, *_), _ = check(entry, o, parameter=parameter, **options)
        assert dz.stride() == torch.empty_like(o.raw).stride()
    for t, old in zip(given, before, strict=True):
        assert torch.equal(t, old), "an input was written"


@pytest.mark.op_matrix
@pytest.mark.parametrize(("entry", "dtype"), FITTING)
def test_the_bits_are_those_of_two_ops_and_of_another_time(entry, dtype):
    o = Operands(served(entry), dtype)
    arguments = arguments_of(o, addend=2)
    found = overload(OP, entry.name)(*arguments)
    for _ in range(repeats(entry)):
        assert all(map(torch.equal, overload(OP, entry.name)(*arguments), found))
    if entry.name != "reference":
        return
    *operands, parameter, step = arguments
    geometry = ([1, 1], [0, 0], [1, 1], 1)
    end = overload(_end_gradient.OP, "reference")(*operands, step, *geometry)
    dweight = overload("conv_bn_wgrad", "reference")(
        *operands[:3], o.out, None, parameter, *geometry
    )
    assert all(map(torch.equal, (*end, dweight), found))


OWN = {
    "weights of the raw output": lambda dweight, o: torch.einsum(
        "nkhw,nchw->kc", o.layer.dz, o.raw
    )[..., None, None],
    "a pixel is missing": lambda dweight, o: (
        dweight
        - torch.einsum("nk,nc->kc", o.layer.dz[..., 0, 0], o.out[..., 0, 0])[..., None, None]
    ),
}


@pytest.mark.parametrize("fault", [*FAULTS, *OWN])
def test_a_fault_is_seen(fault):
    entry = next(e for e in backends.implementations(OP) if e.name == "reference")
    o = Operands(SERVED, torch.float32)
    arguments = arguments_of(o, affine=fault not in OWN)
    *end, dweight = overload(OP, "reference")(*arguments)
    judge(entry, o, arguments, (*end, dweight))
    if fault in OWN:
        dweight = OWN[fault](dweight, o)
    else:
        end = FAULTS[fault](*end, o)
    with pytest.raises(AssertionError, match="ok=False"):
        judge(entry, o, arguments, (*end, dweight))


# The public function


def call(o, **changes):
    dz, y, coefficients, weight, addend, out, raw, norm, residual, residual_norm, _, step = (
        arguments_of(o)
    )
    given = {
        "dz": dz, "weight": weight, "y": y, "coefficients": coefficients, "out": out, "raw": raw,
        "norm": norm, "residual": residual, "residual_norm": residual_norm, "addend": addend,
        "addend_stride": step, **changes,
    }  # fmt: skip
    return rf.ops.conv_bn_grad1x1_end(**given)


@pytest.fixture
def ran(monkeypatch):
    """Names of the ops that the public function runs."""
    found, real = [], overload

    def watching(op, name):
        found.append(op)
        return real(op, "reference")

    monkeypatch.setattr(_training, "overload", watching)
    for function in (rf.ops.conv_bn_grad1x1_end, rf.ops.conv_bn_dgrad_end):
        monkeypatch.setitem(function.__globals__, "overload", watching)
    return found


def test_without_a_kernel_it_is_the_ops_in_its_place(ran):
    o = Operands(SERVED, torch.float64)
    entry = next(e for e in backends.implementations(OP) if e.name == "reference")
    with rf.backend("reference"):
        judge(entry, o, arguments_of(o), call(o))
    assert ran == ["conv_bn_dgrad", "bn_add_act_backward", "conv_bn_wgrad"]


def test_a_kernel_takes_what_it_does_not_refuse(ran, monkeypatch):
    """Pretended: an entry of a name that serves, whose body is the reference's."""
    o, places = Operands(SERVED, torch.float32), []

    def refusal(place):
        places.append(place)
        return None if len(places) == 1 else "too wide"

    monkeypatch.setitem(_end_gradient.UNITING, "reference", _end_gradient.Kernel(refusal, None))
    with rf.backend("reference"):
        first, second = call(o), call(o)
    assert ran == [OP, "conv_bn_dgrad", "bn_add_act_backward", "conv_bn_wgrad"]
    assert all(map(torch.equal, first, second))
    assert places[0] == places[1] == _end_gradient.Place(
        torch.device("cpu"), torch.float32, tuple(o.out.shape), tuple(o.layer.weight.shape),
        ([1, 1], [0, 0], [1, 1], 1), True, 1,
    )  # fmt: skip


def test_a_backend_without_a_kernel_is_not_warned_about(monkeypatch, caplog):
    """The ops in its place are as good; what they do not serve is said of them."""
    monkeypatch.setattr(_end_gradient, "UNITING", {"cuda": _end_gradient.UNITING["cuda"]})
    backends.forget_choices()
    said = {}
    for name in ("triton", "cuda"):
        caplog.clear()
        with rf.backend(name):
            call(Operands(SERVED, torch.float32))
        said[name] = [record.getMessage().partition(" ")[0] for record in caplog.records]
    backends.forget_choices()
    assert OP not in said["triton"] and OP in said["cuda"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.ones(56, 136, 3, 3)}, r"weight has shape \(56, 136, 3, 3\); \[K, C, 1"),
        ({"parameter": torch.ones(56, 136)}, "parameter has shape"),
        ({"parameter": torch.ones(56, 136, 1, 1).half()}, "parameter has dtype torch.float16"),
        ({"parameter": 3}, "parameter must be a Tensor, got int"),
        ({"out": torch.ones(3, 136, 7, 7)}, "dz has shape"),
        ({"raw": torch.ones(3, 136, 7, 7)}, "raw has shape"),
        ({"residual": None}, "residual and residual_norm are given together"),
        ({"coefficients": None}, "y and coefficients are given together"),
        ({"addend_stride": 0}, "addend_stride is 0"),
        ({"addend_stride": 2}, "addend has shape"),
    ],
)
def test_bad_input_is_named(changes, message):
    o = Operands(SERVED, torch.float32)
    with pytest.raises((TypeError, ValueError), match=f"^{OP}: .*{message}"):
        call(o, **changes)


def test_it_has_no_derivative_of_its_own():
    o = Operands(SERVED, torch.float32)
    with pytest.raises(RuntimeError, match="no derivative"):
        call(o, dz=o.layer.dz.clone().requires_grad_())
