"""bn_act: implementation x case x dtype, gradients, fakes, bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from matrix import cells, lay_out
from torch.testing import assert_close

import resnet_fused as rf
from resnet_fused import cases, numerics
from resnet_fused.ops._library import overload


def operands(case, dtype, values):
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    x = lay_out(values(case.shape).to(dtype), case.layout)
    residual = lay_out(values(case.shape).to(dtype), case.layout) if case.residual else None
    return x, values((case.c,)).to(compute), values((case.c,)).to(compute), residual


def integers(shape):
    return torch.randint(-4, 5, shape, dtype=torch.float64)


def normals(shape):
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.op_matrix
@pytest.mark.parametrize("case", cases.BN_ACT_CASES, ids=str)
@pytest.mark.parametrize(("entry", "dtype"), cells("bn_act"))
def test_exact_on_integers(entry, dtype, case):
    args = operands(case, dtype, integers)
    y = overload("bn_act", entry.name)(*args, case.act)
    oracle = numerics.bn_act_oracle(*args, case.act)
    assert y.dtype == dtype
    assert_close(y, oracle.to(dtype), rtol=0, atol=0)
    assert y.is_contiguous(memory_format=torch.channels_last) or case.layout != "nhwc"


@pytest.mark.op_matrix
@pytest.mark.parametrize("case", cases.BN_ACT_CASES, ids=str)
@pytest.mark.parametrize(("entry", "dtype"), cells("bn_act"))
def test_within_the_bound(entry, dtype, case):
    args = operands(case, dtype, normals)
    before = [None if t is None else t.clone() for t in args]
    y = overload("bn_act", entry.name)(*args, case.act)
    oracle = numerics.bn_act_oracle(*args, case.act)
    check = numerics.check_bound(y, oracle, numerics.bn_act_bound(*args, oracle))
    assert check.ok, check
    for t, old in zip(args, before, strict=True):
        assert t is None or torch.equal(t, old), "an input was written"


@pytest.mark.op_matrix
@pytest.mark.parametrize("operand", range(4))
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("entry", "dtype"), cells("bn_act"))
def test_nan_and_inf_as_in_torch(entry, dtype, operand, value):
    case = cases.BnActCase("nan", 2, 9, 3, 5, residual=True)
    args = operands(case, dtype, normals)
    args[operand][(0,) * args[operand].dim()] = value
    y = overload("bn_act", entry.name)(*args, "relu")
    expected = numerics.bn_act_oracle(*args, "relu")
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())


@pytest.mark.op_matrix
@pytest.mark.parametrize("residual", [False, True])
def test_gradcheck(residual):
    case = cases.BnActCase("grad", 2, 3, 3, 2, residual=residual)
    args = [t.requires_grad_() for t in operands(case, torch.float64, normals) if t is not None]
    assert torch.autograd.gradcheck(lambda *t: rf.ops.bn_act(*t), args)


def test_gradient_of_a_stride_0_upstream():
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    scale, shift = torch.randn(2, 3, dtype=torch.float64).unbind()
    y = rf.ops.bn_act(x, scale, shift)
    (ours,) = torch.autograd.grad(y, x, torch.ones(1, dtype=torch.float64).expand_as(y))
    z = F.relu(x * scale[:, None, None] + shift[:, None, None])
    assert_close(ours, torch.autograd.grad(z.sum(), x)[0])


@pytest.mark.op_matrix
@pytest.mark.parametrize("case", cases.BN_ACT_CASES, ids=str)
@pytest.mark.parametrize(("entry", "dtype"), cells("bn_act", (torch.float32,)))
def test_opcheck(entry, dtype, case):
    args = operands(case, dtype, normals)
    torch.library.opcheck(overload("bn_act", entry.name), (*args, case.act))


BAD = {
    "x int": ({"x": torch.ones(1, 2, 3, 3, dtype=torch.int64)}, TypeError, "x has dtype"),
    "x 2-D": ({"x": torch.ones(2, 2)}, ValueError, "x must have 4 dimensions"),
    "scale": ({"scale": torch.ones(3)}, ValueError, r"scale has shape \(3,\)"),
    "residual": ({"residual": torch.ones(1, 2, 3, 4)}, ValueError, "residual has shape"),
    "residual dtype": ({"residual": torch.ones(1, 2, 3, 3).half()}, TypeError, "residual has"),
    "act": ({"act": "silu"}, ValueError, "act is 'silu'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    changes, error, message = BAD[name]
    good = {"x": torch.ones(1, 2, 3, 3), "scale": torch.ones(2), "shift": torch.ones(2)}
    with pytest.raises(error, match=message):
        rf.ops.bn_act(**{**good, **changes})
    assert rf.ops.bn_act(**good).unique().item() == 2
