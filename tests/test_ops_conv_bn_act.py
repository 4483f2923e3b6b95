"""conv_bn_act: implementation x case x dtype, gradients, fakes, autocast, bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from matrix import IDS, bound_options, cells, geometry_args, random_operands
from torch.testing import assert_close

import resnet_fused as rf
from resnet_fused import backends, cases, numerics
from resnet_fused.ops._library import overload

CASES = {case.name: case for case in cases.CONV_CASES}
LAYOUTS = ("nchw", "nhwc")
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.mark.op_matrix
@pytest.mark.parametrize("case", cases.CONV_CASES, ids=str)
@pytest.mark.parametrize(("entry", "dtype"), cells("conv_bn_act"))
def test_exact_on_integers(entry, dtype, case, generator):
    inputs = numerics.exact_inputs(case, dtype, generator)
    oracle = numerics.conv_bn_act_oracle(*inputs, **case.geometry, act=case.act)
    expected = numerics.exact_expected(
        oracle,
        dtype,
        entry.rounding,
        conv=F.conv2d(inputs.x.double(), inputs.weight.double(), None, **case.geometry),
        scale=inputs.scale,
        shift=inputs.shift,
        residual=inputs.residual,
        act=case.act,
    )
    y = overload("conv_bn_act", entry.name)(*inputs, *geometry_args(case))
    assert y.dtype == dtype
    assert_close(y, expected, rtol=0, atol=0)


@pytest.mark.op_matrix
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", cases.CONV_CASES, ids=str)
@pytest.mark.parametrize(("entry", "dtype"), cells("conv_bn_act"))
def test_within_the_bound(entry, dtype, case, layout):
    operands = random_operands(case, dtype).to_layout(layout)
    before = [None if t is None else t.clone() for t in operands.tuple()]
    y = overload("conv_bn_act", entry.name)(*operands.tuple(), *geometry_args(case))
    oracle = numerics.conv_bn_act_oracle(*operands.tuple(), **case.geometry, act=case.act)
    bound = numerics.conv_bn_act_bound(
        *operands.tuple(), oracle, **case.geometry, **bound_options(entry, dtype), out_dtype=dtype
    )
    check = numerics.check_bound(y, oracle, bound)
    assert check.ok, check
    assert y.shape == case.output_shape
    for t, old in zip(operands.tuple(), before, strict=True):
        assert t is None or torch.equal(t, old), "an input was written"
    if y.numel() == 0:
        return
    eager = F.conv2d(operands.x, operands.weight, None, **case.geometry)
    form = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    assert eager.is_contiguous(memory_format=form) == y.is_contiguous(memory_format=form)


@pytest.mark.op_matrix
@pytest.mark.parametrize("name", ["3x3_residual", "1x1", "3x3_groups4"])
@pytest.mark.parametrize("operand", ["x", "weight", "scale", "shift", "residual"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("entry", "dtype"), cells("conv_bn_act"))
def test_nan_and_inf_as_in_torch(entry, dtype, name, operand, value):
    case = CASES[name]
    operands = random_operands(case, dtype)
    # A zero scale times Inf is NaN in one association and not in the other: no zero here.
    operands.scale[0] = 1
    target = getattr(operands, operand)
    if target is None:
        target = operands.residual = torch.randn(case.output_shape).to(dtype)
    target.view(-1)[target.numel() // 2] = value
    y = overload("conv_bn_act", entry.name)(*operands.tuple(), *geometry_args(case))
    # Eager's own convolution: whether a zero of the padding meets an infinite weight is its choice.
    raw = F.conv2d(operands.x, operands.weight, None, **case.geometry).to(operands.scale.dtype)
    scale, shift = (t[:, None, None] for t in (operands.scale, operands.shift))
    expected = raw * scale + shift
    if operands.residual is not None:
        expected = expected + operands.residual
    expected = F.relu(expected)
    judged = torch.ones_like(expected, dtype=torch.bool)
    if entry.name in ("triton", "cuda_emulated"):  # they have convolutions of their own
        bound = numerics.conv_bn_act_bound(
            *operands.tuple(), expected.double(), **case.geometry, out_dtype=dtype
        )
        judged = ~bound.isinf()
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(y) & judged, kind(expected) & judged)
    odd = judged & ~expected.isfinite()
    assert odd.any() or value < 0


@pytest.mark.op_matrix
@pytest.mark.parametrize("how", ["sliced", "expanded", "misaligned", "transposed"])
@pytest.mark.parametrize(("entry", "dtype"), cells("conv_bn_act"))
def test_any_strides(entry, dtype, how):
    case = CASES["3x3_residual"]
    operands = random_operands(case, dtype)
    n, c, h, w = case.input_shape
    if how == "sliced":
        big = torch.randn(n, c + 3, h, 2 * w).to(dtype)
        operands.x = big[:, 2 : c + 2, :, ::2]
    elif how == "expanded":
        operands.x = operands.x[:1].expand(n, -1, -1, -1)
        operands.residual = operands.residual[:, :1].expand(-1, case.k, -1, -1)
    elif how == "misaligned":
        operands.x = torch.randn(operands.x.numel() + 1).to(dtype)[1:].view(case.input_shape)
    else:
        operands.x = operands.x.transpose(2, 3)
        operands.residual = operands.residual.permute(0, 1, 3, 2)
    y = overload("conv_bn_act", entry.name)(*operands.tuple(), *geometry_args(case))
    oracle = numerics.conv_bn_act_oracle(*operands.tuple(), **case.geometry, act=case.act)
    bound = numerics.conv_bn_act_bound(
        *operands.tuple(), oracle, **case.geometry, **bound_options(entry, dtype), out_dtype=dtype
    )
    assert numerics.check_bound(y, oracle, bound).ok


def test_residual_may_be_the_input():
    x = torch.randn(2, 8, 5, 5)
    weight = torch.randn(8, 8, 3, 3)
    scale, shift = torch.randn(8), torch.randn(8)
    y = rf.ops.conv_bn_act(x, weight, scale, shift, x, padding=1)
    expected = F.relu(
        F.conv2d(x, weight, padding=1) * scale[:, None, None] + shift[:, None, None] + x
    )
    assert_close(y, expected, rtol=1e-4, atol=1e-4)


GRADIENT_CASES = ["3x3_residual", "1x1_stride2", "3x3_groups4", "3x3_dilated2", "nc11", "uneven"]


@pytest.mark.op_matrix
@pytest.mark.parametrize("name", GRADIENT_CASES)
def test_gradcheck(name):
    case = CASES[name]
    operands = random_operands(case, torch.float64)
    inputs = [t.requires_grad_() for t in operands.tuple() if t is not None]

    def run(*tensors):
        residual = tensors[4] if len(tensors) == 5 else None
        return rf.ops.conv_bn_act(*tensors[:4], residual, **case.geometry, act=case.act)

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("wanted", range(5))
def test_each_gradient_alone(wanted):
    case = CASES["3x3_residual"]
    tensors = list(random_operands(case, torch.float64).tuple())
    tensors[wanted].requires_grad_()
    y = rf.ops.conv_bn_act(*tensors, **case.geometry)
    (grad,) = torch.autograd.grad(y.sin().sum(), tensors[wanted])
    clones = [t.detach().clone().requires_grad_() for t in tensors]
    x, weight, scale, shift, residual = clones
    z = F.conv2d(x, weight, None, **case.geometry) * scale[:, None, None] + shift[:, None, None]
    expected = torch.autograd.grad(F.relu(z + residual).sin().sum(), clones[wanted])[0]
    assert_close(grad, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=IDS.get)
def test_gradients_no_worse_than_eagers(dtype):
    case = CASES["3x3_residual"]
    operands = random_operands(case, dtype)
    dy = torch.randn(case.output_shape).to(dtype)

    def gradients(function, kind):
        inputs = [
            t.detach().to(kind if t.dtype == dtype else torch.promote_types(kind, t.dtype))
            for t in operands.tuple()
        ]
        inputs = [t.requires_grad_() for t in inputs]
        y = function(*inputs)
        # The same mask for all: that of the op's own result, so that no kink decides.
        y.backward(dy.to(y.dtype) * mask)
        return [t.grad for t in inputs]

    def fused(*t):
        return rf.ops.conv_bn_act(*t, **case.geometry, act="none")

    def eager(x, weight, scale, shift, residual):
        raw = F.conv2d(x, weight, None, **case.geometry)
        z = (raw * scale.to(raw.dtype)[:, None, None]) + shift.to(raw.dtype)[:, None, None]
        return z + residual

    mask = (fused(*operands.tuple()) > 0).to(dtype)
    ours, theirs, oracle = (
        gradients(fused, dtype),
        gradients(eager, dtype),
        gradients(eager, torch.float64),
    )
    for mine, other, exact in zip(ours, theirs, oracle, strict=True):
        error = (mine.double() - exact).norm()
        assert error <= 1.5 * (other.double() - exact).norm() + 1e-6 * exact.norm()


def test_relu_passes_the_gradient_of_nan_and_stops_it_at_zero():
    x = torch.tensor([float("nan"), -1.0, 0.0, 2.0]).view(1, 4, 1, 1).requires_grad_()
    weight = torch.ones(4, 1, 1, 1)
    y = rf.ops.conv_bn_act(x, weight, torch.ones(4), torch.zeros(4), groups=4)
    y.sum().backward()
    assert x.grad.flatten().tolist() == [1.0, 0.0, 0.0, 1.0]
    reference = x.detach().clone().requires_grad_()
    F.relu(reference).sum().backward()
    assert_close(x.grad, reference.grad, equal_nan=True)


def test_second_derivative_raises():
    x = torch.randn(1, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 4, 1, 1, dtype=torch.float64)
    one = torch.ones(4, dtype=torch.float64)
    y = rf.ops.conv_bn_act(x, weight, one, one)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiate twice|once_differentiable"):
        grad.sum().backward()


def test_a_changed_saved_tensor_is_noticed():
    x = torch.randn(1, 4, 3, 3, requires_grad=True)
    weight = torch.randn(4, 4, 1, 1)
    y = rf.ops.conv_bn_act(x * 1, weight, torch.ones(4, requires_grad=True), torch.ones(4))
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_empty_batch_has_zero_weight_gradients():
    weight = torch.randn(8, 4, 3, 3, requires_grad=True)
    scale = torch.ones(8, requires_grad=True)
    y = rf.ops.conv_bn_act(torch.randn(0, 4, 6, 6), weight, scale, torch.zeros(8), padding=1)
    assert y.shape == (0, 8, 6, 6)
    y.sum().backward()
    assert weight.grad.abs().sum() == 0
    assert scale.grad.abs().sum() == 0


@pytest.mark.op_matrix
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "name", ["3x3_residual", "1x1", "one_channel", "nc11", "n1hw", "empty_batch", "stem"]
)
@pytest.mark.parametrize(("entry", "dtype"), cells("conv_bn_act", (torch.float32,)))
def test_opcheck(entry, dtype, name, layout):
    case = CASES[name]
    operands = random_operands(case, dtype).to_layout(layout)
    torch.library.opcheck(
        overload("conv_bn_act", entry.name), (*operands.tuple(), *geometry_args(case))
    )


@pytest.mark.op_matrix
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_with_gradients(layout):
    case = CASES["3x3_residual"]
    operands = random_operands(case, torch.float32).to_layout(layout)
    inputs = [t.requires_grad_() for t in operands.tuple()]

    def run(*t):
        return rf.ops.conv_bn_act(*t, **case.geometry)

    y = torch.compile(run, fullgraph=True, backend="aot_eager")(*inputs)
    expected = run(*inputs)
    assert_close(y, expected)
    assert y.stride() == expected.stride()
    dy = torch.randn_like(y)
    ours = torch.autograd.grad(y, inputs, dy)
    for mine, theirs in zip(ours, torch.autograd.grad(expected, inputs, dy), strict=True):
        assert_close(mine, theirs)


def test_autocast_casts_activations_and_weights_only():
    case = CASES["3x3_residual"]
    operands = random_operands(case, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = rf.ops.conv_bn_act(*operands.tuple(), **case.geometry)
    half = [operands.x, operands.weight, operands.residual]
    x, weight, residual = (t.to(torch.bfloat16) for t in half)
    expected = rf.ops.conv_bn_act(
        x, weight, operands.scale, operands.shift, residual, **case.geometry
    )
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)


@pytest.mark.parametrize("mode", ["nan", "huge"])
def test_values_that_onednns_relu_would_lose(mode):
    """NaN, and finite values whose sums overflow, come out as in torch.

    Whether such a sum is infinite or NaN hangs on its order, and so on the processor.
    """
    x = torch.full((1, 2, 4, 4), 3e38)
    weight = torch.tensor([[1.0, -1.0], [2.0, -2.0]]).view(2, 2, 1, 1)
    if mode == "nan":
        x[0, 0, 1, 1] = float("nan")
    one = torch.ones(2)
    y = rf.ops.conv_bn_act(x, weight * 10, one, one)
    expected = F.relu(F.conv2d(x, weight * 10) + 1)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())
    assert expected.isnan().any() if mode == "nan" else not expected.isfinite().all()


def test_a_filter_larger_than_the_image():
    """oneDNN errs for this one; every path leaves it to PyTorch."""
    x = torch.randn(2, 1, 6, 2).contiguous(memory_format=torch.channels_last)
    weight, one = torch.randn(8, 1, 3, 4), torch.ones(8)
    options = {"stride": (1, 3), "padding": (2, 2), "dilation": (2, 1)}
    expected = F.relu(F.conv2d(x.double(), weight.double(), None, **options) + 1)
    assert_close(rf.ops.conv_bn_act(x, weight, one, one, **options).double(), expected, **CLOSE)
    layer = rf.nn.ConvBNAct(1, 8, (3, 4), **options).eval()
    with torch.no_grad():
        layer.conv.weight.copy_(weight)
        layer.bn.bias.fill_(1)
        layer.bn.eps = 0.0
        for _ in range(3):
            assert_close(layer(x).double(), expected, **CLOSE)


def _call(**changes):
    arguments = {
        "x": torch.randn(2, 8, 5, 5),
        "weight": torch.randn(16, 8, 3, 3),
        "scale": torch.ones(16),
        "shift": torch.zeros(16),
        "residual": None,
        "padding": 1,
    }
    arguments.update(changes)
    return rf.ops.conv_bn_act(**arguments)


BAD = {
    "x is a list": ({"x": [1.0]}, TypeError, "x must be a Tensor, got list"),
    "x int": ({"x": torch.ones(2, 8, 5, 5).int()}, TypeError, "x has dtype torch.int32"),
    "x 3-D": ({"x": torch.randn(8, 5, 5)}, ValueError, "x must have 4 dimensions, got 3"),
    "weight dtype": ({"weight": torch.randn(16, 8, 3, 3).half()}, TypeError, "weight has dtype"),
    "weight channels": ({"weight": torch.randn(16, 4, 3, 3)}, ValueError, "x has 8 channels"),
    "scale length": ({"scale": torch.ones(8)}, ValueError, r"scale has shape \(8,\)"),
    "scale 2-D": ({"scale": torch.ones(16, 1)}, ValueError, "scale has shape"),
    "scale int": ({"scale": torch.ones(16, dtype=torch.int64)}, TypeError, "scale has dtype"),
    "shift missing": ({"shift": None}, TypeError, "shift must be a Tensor"),
    "residual shape": ({"residual": torch.randn(2, 16, 4, 5)}, ValueError, "residual has shape"),
    "residual dtype": ({"residual": torch.randn(2, 16, 5, 5).double()}, TypeError, "residual has"),
    "stride 0": ({"stride": 0}, ValueError, "stride is 0"),
    "stride of 3": ({"stride": (1, 1, 1)}, ValueError, "stride is"),
    "padding -1": ({"padding": -1}, ValueError, "padding is -1"),
    "dilation 0": ({"dilation": (0, 1)}, ValueError, "dilation is"),
    "groups 0": ({"groups": 0}, ValueError, "groups is 0"),
    "groups 3": ({"groups": 3}, ValueError, "groups=3"),
    "act": ({"act": "gelu"}, ValueError, "act is 'gelu'; accepted are 'relu', 'none'"),
    "kernel too large": ({"dilation": 9}, ValueError, "weight spans 19 pixels"),
    "meta scale": ({"scale": torch.ones(16, device="meta")}, ValueError, "scale is on meta"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    changes, error, message = BAD[name]
    with pytest.raises(error, match=message):
        _call(**changes)
    assert _call().shape == (2, 16, 5, 5)


def test_a_unknown_backend_is_refused_with_the_accepted_ones(monkeypatch):
    with (
        pytest.raises(ValueError, match=r"unknown backend 'tritn'.*auto, reference, cpu"),
        rf.backend("tritn"),
    ):
        pass
    monkeypatch.setenv("RESNET_FUSED_BACKEND", "cudda")
    backends.forget_choices()
    with pytest.raises(ValueError, match=r"RESNET_FUSED_BACKEND.*'cudda'"):
        _call()


def test_a_backend_that_cannot_serve_warns_once_and_runs_right(caplog):
    backends.forget_choices()
    arguments = {"x": torch.randn(2, 8, 5, 5), "weight": torch.randn(16, 8, 3, 3)}
    expected = _call(**arguments)
    with caplog.at_level("WARNING", logger="resnet_fused"), rf.backend("triton"):
        assert_close(_call(**arguments), expected, rtol=1e-4, atol=1e-4)
        _call()
    messages = [r.message for r in caplog.records if "conv_bn_act" in r.message]
    assert len(messages) == 1
    assert "triton" in messages[0]


def test_the_environment_chooses_and_the_context_manager_overrules(monkeypatch):
    monkeypatch.setenv("RESNET_FUSED_BACKEND", "reference")
    backends.forget_choices()
    call = backends.Call("conv_bn_act", "cpu", torch.float32)
    assert backends.choose(call).implementation.name == "reference"
    with rf.backend("cpu"):
        assert backends.choose(call).implementation.name == "cpu"
    assert backends.choose(call).implementation.name == "reference"
