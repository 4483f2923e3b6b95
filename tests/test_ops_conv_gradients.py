"""conv_dgrad and conv_wgrad: implementation x case x dtype, layouts, NaN, fakes, bad input."""

from __future__ import annotations

import pytest
import torch
from matrix import ACTIVATION, bound_options, cells, random_operands
from torch.testing import assert_close

import resnet_fused as rf
from resnet_fused import backends, cases, numerics
from resnet_fused.ops import _triton
from resnet_fused.ops._library import overload
from resnet_fused.triton import _limits, _tiles

CASES = {case.name: case for case in cases.CONV_CASES}
OPS = ("conv_dgrad", "conv_wgrad")
CELLS = [
    pytest.param(op, *cell.values, id=f"{op}-{cell.id}", marks=cell.marks)
    for op in OPS
    for cell in cells(op)
]
TELLING = [
    "3x3_residual",
    "1x1_stride2",
    "3x3_groups4",
    "3x3_stride3",
    "uneven",
    "odd_channels_1x1",
]


def gradient_operands(case, dtype, *, exact=False):
    """dy, y (None without ReLU), x, weight, scale."""
    if exact:
        x, weight, scale, _, _ = numerics.exact_inputs(case, dtype)
        dy = torch.randint(-4, 5, case.output_shape).to(dtype)
        y = torch.randint(-2, 3, case.output_shape).to(dtype)
    else:
        operands = random_operands(case, dtype)
        x, weight, scale = operands.x, operands.weight, operands.scale
        dy, y = (torch.randn(case.output_shape).to(dtype) for _ in range(2))
    return dy, y if case.act == "relu" else None, x, weight, scale


def geometry(case):
    return list(case.stride), list(case.padding), list(case.dilation), case.groups


def run(op, name, operands, case, channels_last=False):
    dy, y, x, weight, scale = operands
    if op == "conv_dgrad":
        call = overload(op, name)
        return call(dy, y, weight, scale, list(x.shape), channels_last, *geometry(case))
    return overload(op, name)(dy, y, x, weight, scale, *geometry(case))


def check(op, entry, operands, case, got):
    oracle = numerics.conv_gradients_oracle(*operands, **case.geometry)
    options = bound_options(entry, operands[0].dtype)
    bound = numerics.conv_gradients_bound(*operands, oracle, **case.geometry, **options)
    index = OPS.index(op)
    return numerics.check_bound(got, oracle[index], bound[index])


@pytest.mark.op_matrix
@pytest.mark.parametrize("case", cases.CONV_CASES, ids=str)
@pytest.mark.parametrize(("op", "entry", "dtype"), CELLS)
def test_exact_on_integers(op, entry, dtype, case):
    operands = gradient_operands(case, dtype, exact=True)
    expected = numerics.conv_gradients_oracle(*operands, **case.geometry)[OPS.index(op)]
    assert_close(run(op, entry.name, operands, case), expected.to(dtype), rtol=0, atol=0)


@pytest.mark.op_matrix
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("case", cases.CONV_CASES, ids=str)
@pytest.mark.parametrize(("op", "entry", "dtype"), CELLS)
def test_within_the_bound(op, entry, dtype, case, layout):
    operands = gradient_operands(case, dtype)
    form = ACTIVATION[layout]
    operands = [
        t.contiguous(memory_format=form) if t is not None and t.dim() == 4 else t for t in operands
    ]
    before = [None if t is None else t.clone() for t in operands]
    got = run(op, entry.name, operands, case, layout == "nhwc")
    found = check(op, entry, operands, case, got)
    assert found.ok, found
    for t, old in zip(operands, before, strict=True):
        assert t is None or torch.equal(t, old), "an input was written"
    like = operands[2 if op == "conv_dgrad" else 3]
    assert got.shape == like.shape
    if op == "conv_wgrad":
        assert got.stride() == like.stride()
    elif got.numel():
        assert got.is_contiguous(memory_format=form)


@pytest.mark.op_matrix
@pytest.mark.parametrize(("op", "entry", "dtype"), CELLS)
def test_a_wrong_mask_or_scale_is_beyond_the_bound(op, entry, dtype):
    case = CASES["3x3_residual"]
    dy, y, x, weight, scale = operands = gradient_operands(case, dtype)
    for planted in ((dy, None, x, weight, scale), (dy, y, x, weight, scale.roll(1))):
        assert not check(op, entry, operands, case, run(op, entry.name, planted, case)).ok


@pytest.mark.op_matrix
@pytest.mark.parametrize("name", ["3x3_residual", "3x3_groups4", "1x1"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("operand", ["dy", "y", "x", "weight"])
@pytest.mark.parametrize(("op", "entry", "dtype"), CELLS)
def test_nan_and_inf_reach_what_they_touch_and_nothing_else(op, entry, dtype, name, operand, value):
    if operand == {"conv_dgrad": "x", "conv_wgrad": "weight"}[op]:
        return  # its values are not looked at
    case = CASES[name]
    dy, y, x, weight, scale = (t.abs() + 1 for t in gradient_operands(case, dtype))
    given = {"dy": dy, "y": y, "x": x, "weight": weight}
    target = given[operand]
    # In the middle: a zero of the padding that meets Inf is multiplied or skipped, as one likes.
    place = (0, 0, *(size // 2 for size in target.shape[2:]))
    touching = {key: torch.ones_like(t) for key, t in given.items()}
    marked = touching["dy" if operand == "y" else operand]
    marked.zero_()
    marked[place] = 1
    touched = numerics.conv_gradients_oracle(
        *touching.values(), torch.ones_like(scale), **case.geometry
    )[OPS.index(op)].bool()
    target[place] = value
    operands = (*given.values(), scale)
    got = run(op, entry.name, operands, case)
    oracle = numerics.conv_gradients_oracle(*operands, **case.geometry)[OPS.index(op)]
    assert 0 < touched.sum() < touched.numel()
    assert torch.isfinite(got[~touched]).all(), "it leaked"
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(got), kind(oracle))


@pytest.mark.op_matrix
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
@pytest.mark.parametrize("name", ["3x3_residual", "3x3_stride3", "odd_channels_1x1"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("op", "entry", "dtype"), CELLS)
def test_a_scale_that_is_not_finite_meets_no_zero_of_the_padding(
    op, entry, dtype, value, name, relu
):
    """All values are positive, so that Inf makes no NaN."""
    if op == "conv_wgrad":
        return  # its padding lies in x, where PyTorch multiplies or skips as its library likes
    case = CASES[name]
    dy, y, x, weight, scale = (t.abs() + 1 for t in gradient_operands(case, dtype))
    scale[1] = value
    operands = (dy, y if relu else None, x, weight, scale)
    got = run(op, entry.name, operands, case)
    oracle = numerics.conv_gradients_oracle(*operands, **case.geometry)[OPS.index(op)]
    assert not torch.isfinite(oracle).all()
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(got), kind(oracle))


@pytest.mark.op_matrix
@pytest.mark.parametrize("how", ["sliced", "expanded", "misaligned"])
@pytest.mark.parametrize(("op", "entry", "dtype"), CELLS)
def test_any_strides(op, entry, dtype, how):
    case = CASES["3x3_residual"]
    dy, y, x, weight, scale = gradient_operands(case, dtype)
    n, k, p, q = case.output_shape
    if how == "sliced":
        dy = torch.randn(n, k + 3, p, 2 * q).to(dtype)[:, 2 : k + 2, :, ::2]
    elif how == "expanded":
        dy = dy[:1, :, :1].expand(n, -1, p, -1)
    else:
        dy = torch.randn(dy.numel() + 1).to(dtype)[1:].view(dy.shape)
    operands = (dy, y, x, weight, scale)
    found = check(op, entry, operands, case, run(op, entry.name, operands, case))
    assert found.ok, found


def to_tf32(t):
    """11 bits of each value: what eager multiplies in TF32, rounded as cvt.rna does."""
    return ((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.op_matrix
@pytest.mark.parametrize("name", TELLING)
@pytest.mark.parametrize(("op", "entry", "dtype"), CELLS)
def test_no_worse_than_eager(op, entry, dtype, name):
    case = CASES[name]
    dy, y, x, weight, scale = operands = gradient_operands(case, dtype)
    dz = dy if y is None else torch.where(y <= 0, torch.zeros((), dtype=dtype), dy)
    g = (dz.to(scale.dtype) * scale[:, None, None]).to(dtype)
    factors = (g, x, weight)
    if bound_options(entry, dtype)["tf32"]:
        factors = tuple(map(to_tf32, factors))
    eager = torch.ops.aten.convolution_backward(
        *factors, None, *geometry(case)[:3], False, [0, 0], case.groups, [True, True, False]
    )[OPS.index(op)]
    oracle = numerics.conv_gradients_oracle(*operands, **case.geometry)[OPS.index(op)]
    found = numerics.gradient_check(run(op, entry.name, operands, case), eager, oracle)
    if dtype in (torch.float32, torch.float64):  # two orders of one sum: the maximum is a toss
        assert found.ratio <= found.limit * numerics.chance(oracle.numel())
    else:
        assert found.ok


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_opcheck(op, layout):
    case = CASES["3x3_groups4"]
    form = ACTIVATION[layout]
    dy, y, x, weight, scale = (
        t.contiguous(memory_format=form) if t.dim() == 4 else t
        for t in gradient_operands(case, torch.float32)
    )
    if op == "conv_dgrad":
        arguments = (dy, y, weight, scale, list(x.shape), layout == "nhwc", *geometry(case))
    else:
        arguments = (dy, y, x, weight, scale, *geometry(case))
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(
        getattr(torch.ops.resnet_fused, op).reference, arguments, test_utils=tests
    )


def test_the_public_functions_are_autograds():
    case = CASES["3x3_stride2"]
    operands = random_operands(case, torch.float64)
    x, weight = operands.x.requires_grad_(), operands.weight.requires_grad_()
    scale, shift = operands.scale, operands.shift
    y = rf.ops.conv_bn_act(x, weight, scale, shift, **case.geometry)
    dy = torch.randn_like(y)
    dx, dweight = torch.autograd.grad(y, (x, weight), dy)
    y, x, weight = y.detach(), x.detach(), weight.detach()
    ours = rf.ops.conv_dgrad(dy, weight, scale, y, input_size=x.shape, **case.geometry)
    assert_close(ours, dx)
    assert_close(rf.ops.conv_wgrad(dy, x, weight, scale, y, **case.geometry), dweight)


def test_bad_input_is_named():
    dy, weight, scale = torch.randn(1, 8, 5, 5), torch.randn(8, 4, 3, 3), torch.randn(8)
    size, x = (1, 4, 5, 5), torch.randn(1, 4, 5, 5)
    with pytest.raises(ValueError, match=r"conv_dgrad: input_size is \(1, 4\); four sizes"):
        rf.ops.conv_dgrad(dy, weight, scale, input_size=(1, 4))
    with pytest.raises(ValueError, match=r"dy has shape \(1, 8, 5, 5\); .*\(1, 8, 3, 3\)"):
        rf.ops.conv_dgrad(dy, weight, scale, input_size=size)
    with pytest.raises(ValueError, match=r"scale has shape \(3,\)"):
        rf.ops.conv_dgrad(dy, weight, scale[:3], input_size=size, padding=1)
    with pytest.raises(TypeError, match="y has dtype torch.float64"):
        rf.ops.conv_dgrad(dy, weight, scale, dy.double(), input_size=size, padding=1)
    with pytest.raises(ValueError, match="x has 5 channels"):
        rf.ops.conv_wgrad(dy, torch.randn(1, 5, 5, 5), weight, scale, padding=1)
    with pytest.raises(TypeError, match="x must be a Tensor"):
        rf.ops.conv_wgrad(dy, None, weight, scale, padding=1)
    with pytest.raises(RuntimeError, match="conv_wgrad has no derivative"):
        rf.ops.conv_wgrad(dy.requires_grad_(), x, weight, scale, padding=1)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.skipif(not _limits.installed(), reason="needs the triton package")
def test_a_refused_configuration_costs_the_kernel_not_the_backward(monkeypatch, op):
    """With some configurations gone a size may find none left: PyTorch's own gradients serve."""
    monkeypatch.setattr(_triton.admission, "refusal", lambda call, implementation: None)
    monkeypatch.setattr(_triton, "allowed", lambda op, device: names)
    call = backends.Call(op, "cuda", torch.bfloat16, index=0)
    names = frozenset(_tiles.BY_NAME)
    assert _triton.supports(call) is None
    names = frozenset(list(_tiles.BY_NAME)[:-1])
    assert "configurations were refused" in _triton.supports(call)


def test_autocast_takes_16_bits():
    dy, weight, scale = torch.randn(1, 8, 5, 5), torch.randn(8, 4, 3, 3), torch.randn(8)
    x = torch.randn(1, 4, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert (
            rf.ops.conv_dgrad(dy, weight, scale, input_size=x.shape, padding=1).dtype
            is torch.bfloat16
        )
        assert rf.ops.conv_wgrad(dy, x, weight, scale, padding=1).dtype is torch.bfloat16
