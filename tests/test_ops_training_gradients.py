"""Training's ops under autograd: gradcheck, the chain beside the modules, NaN, autocast."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from matrix import ACTIVATION, norm_values
from torch import nn
from torch.testing import assert_close

import resnet_fused as rf
from resnet_fused import cases

CASES = {case.name: case for case in cases.CONV_CASES}
WIDE = torch.float64


def leaf(*shape):
    return torch.randn(shape, dtype=WIDE, requires_grad=True)


@pytest.mark.op_matrix
@pytest.mark.parametrize("prologue", [False, True])
@pytest.mark.parametrize("name", ["3x3_stride2", "3x3_groups4"])
def test_gradcheck_of_conv_bn_stats(name, prologue):
    geometry = CASES[name].geometry
    groups = geometry["groups"]
    x, weight = leaf(2, groups, 3, 4), leaf(groups, 1, 3, 3)
    norm = norm_values(groups, WIDE).requires_grad_() if prologue else None

    def call(x, weight, *rest):
        return rf.ops.conv_bn_stats(x, weight, *rest, **geometry)

    args = (x, weight) if norm is None else (x, weight, norm)
    assert torch.autograd.gradcheck(call, args)


@pytest.mark.op_matrix
@pytest.mark.parametrize("total", [None, 40.0])
@pytest.mark.parametrize("affine", [False, True])
def test_gradcheck_of_bn_finalize(affine, total):
    stats = torch.stack((torch.randn(4, dtype=WIDE), torch.rand(4, dtype=WIDE) * 18 + 5))
    total = None if total is None else torch.tensor([total], dtype=WIDE)

    def call(stats, *rest):
        return rf.ops.bn_finalize(stats, 18, *rest, eps=0.1, total=total)

    args = (stats.requires_grad_(), *((leaf(4), leaf(4)) if affine else ()))
    assert torch.autograd.gradcheck(call, args)


@pytest.mark.op_matrix
@pytest.mark.parametrize("act", ["relu", "none"])
@pytest.mark.parametrize("shortcut", ["none", "identity", "projection", "narrow"])
def test_gradcheck_of_bn_add_act(shortcut, act):
    y, norm = leaf(2, 5, 3, 2), norm_values(5, WIDE).requires_grad_()
    args = [y, norm]
    if shortcut != "none":
        args.append(leaf(2, 2 if shortcut == "narrow" else 5, 3, 2))
    if shortcut == "projection":
        args.append(norm_values(5, WIDE).requires_grad_())
    offset = 2 if shortcut == "narrow" else 0
    assert torch.autograd.gradcheck(lambda *t: rf.ops.bn_add_act(*t, offset=offset, act=act), args)


@pytest.mark.op_matrix
@pytest.mark.parametrize("window", [(3, 2, 1), (2, 2, 0), ((3, 2), (2, 1), (1, 0))], ids=str)
def test_gradcheck_of_bn_act_pool(window):
    y, norm = leaf(2, 3, 5, 4), norm_values(3, WIDE).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda y, norm: rf.ops.bn_act_pool(y, norm, *window)[0], (y, norm)
    )


class Plain(nn.Module):
    """Two convolutions with their BatchNorms and a shortcut, as torch computes them."""

    def __init__(self, groups=1, pool=False, **options):
        super().__init__()
        self.conv1 = nn.Conv2d(8, 8, 3, 1, 1, groups=groups, bias=False)
        self.conv2 = nn.Conv2d(8, 8, 3, 1, 1, groups=groups, bias=False)
        self.short = nn.Conv2d(8, 8, 1, groups=groups, bias=False)
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(8, **options) for _ in range(3))
        for bn in (self.bn1, self.bn2, self.bn3):
            if bn.affine:
                nn.init.normal_(bn.weight)
                nn.init.normal_(bn.bias)
                with torch.no_grad():
                    bn.weight[1] = 0
        self.pool = pool

    def forward(self, x):
        h = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(h)) + self.bn3(self.short(x)))
        return F.max_pool2d(out, 3, 2, 1) if self.pool else out


def finalized(bn, y, stats):
    return rf.ops.bn_finalize(
        stats, y.numel() // y.shape[1], bn.weight, bn.bias, eps=bn.eps,
        running_mean=bn.running_mean, running_var=bn.running_var,
        num_batches_tracked=bn.num_batches_tracked, momentum=bn.momentum,
    )  # fmt: skip


def chained(model, x):
    """`Plain` by the ops of training."""
    groups = model.conv1.groups
    y1, stats = rf.ops.conv_bn_stats(x, model.conv1.weight, padding=1, groups=groups)
    norm = finalized(model.bn1, y1, stats)
    y2, stats = rf.ops.conv_bn_stats(y1, model.conv2.weight, norm, padding=1, groups=groups)
    norm = finalized(model.bn2, y2, stats)
    y3, stats = rf.ops.conv_bn_stats(x, model.short.weight, groups=groups)
    out = rf.ops.bn_add_act(y2, norm, y3, finalized(model.bn3, y3, stats))
    if model.pool:
        one = torch.ones(8, dtype=norm.dtype)
        plain = torch.stack((one, one * 0, one * 0, one))
        out, _ = rf.ops.bn_act_pool(out, plain)
    return out


def twins(dtype=WIDE, **options):
    plain = Plain(**options).to(dtype)
    ours = Plain(**options).to(dtype)
    ours.load_state_dict(plain.state_dict())
    return plain, ours


def gradients(model, out, x, dout):
    return torch.autograd.grad(out, [x, *model.parameters()], dout)


@pytest.mark.op_matrix
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pool": True},
        {"groups": 4, "momentum": None},
        {"affine": False},
        {"track_running_stats": False, "eps": 0.1},
    ],
    ids=["plain", "pool", "groups", "not_affine", "untracked"],
)
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_the_chain_is_the_modules(backend, options, layout):
    """Values, every gradient, running statistics, twice over."""
    plain, ours = twins(**options)
    for n in (2, 3):
        x = torch.randn(n, 8, 5, 6, dtype=WIDE).contiguous(memory_format=ACTIVATION[layout])
        x.requires_grad_()
        expected = plain(x)
        with rf.backend(backend):
            out = chained(ours, x)
            dout = torch.randn_like(out)
            found = gradients(ours, out, x, dout)
        assert_close(out, expected)
        assert_close(found, gradients(plain, expected, x, dout), rtol=1e-7, atol=1e-9)
    assert_close(dict(ours.state_dict()), dict(plain.state_dict()))


@pytest.mark.op_matrix
def test_gradcheck_of_the_chain():
    _, ours = twins(groups=8, track_running_stats=False)
    x = leaf(1, 8, 2, 2)
    assert torch.autograd.gradcheck(lambda x, *_: chained(ours, x), (x, *ours.parameters()))


@pytest.mark.op_matrix
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("operand", ["x", "conv1", "conv2", "gamma", "beta", "dout"])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_nan_and_inf_end_where_torch_puts_them(backend, operand, value):
    """One of two groups is hit; the other's values, gradients and statistics stay numbers."""
    plain, ours = twins(torch.float32, groups=2)
    x = torch.randn(2, 8, 5, 6)
    dout = torch.randn(2, 8, 5, 6)
    with torch.no_grad():
        for model in (plain, ours):
            model.conv1.weight[2, 0, 1, 1] = value if operand == "conv1" else 1
            model.conv2.weight[2, 0, 1, 1] = value if operand == "conv2" else 1
            model.bn1.weight[2] = value if operand == "gamma" else 1
            model.bn1.bias[2] = value if operand == "beta" else 0
    if operand in ("x", "dout"):
        {"x": x[0, 2, 1, 1], "dout": dout[0, 2]}[operand].fill_(value)
    x.requires_grad_()
    expected = plain(x)
    with rf.backend(backend):
        out = chained(ours, x)
        found = gradients(ours, out, x, dout)
    wanted = gradients(plain, expected, x, dout)
    named = zip([out, *found], [expected, *wanted], strict=True)
    for ours_is, torch_is in named:
        assert torch.equal(ours_is.isfinite(), torch_is.isfinite())
    for (key, t), other in zip(ours.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(t.isfinite(), other.isfinite()), key
    bad = [not t.isfinite().all() for t in (out, *found)]
    assert any(bad)
    assert out[:, 4:].isfinite().all() and found[0][:, 4:].isfinite().all()


def test_gamma_of_zero_has_a_gradient():
    """xhat comes from y: z tells nothing where gamma is zero."""
    plain, ours = twins()
    x, dout = torch.randn(2, 2, 8, 5, 6, dtype=WIDE)
    plain(x).backward(dout)
    chained(ours, x).backward(dout)
    for ours_is, torch_is in zip(ours.parameters(), plain.parameters(), strict=True):
        assert_close(ours_is.grad, torch_is.grad)
    assert plain.bn2.weight[1] == 0 and plain.bn2.weight.grad[1].abs() > 1e-3


def test_a_second_derivative_raises():
    _, model = twins()
    x = leaf(2, 8, 5, 6)
    (dx,) = torch.autograd.grad(chained(model, x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice|does not require grad"):
        dx.sum().backward()
    y, norm = leaf(2, 8, 5, 6), norm_values(8, WIDE).requires_grad_()
    for out in (rf.ops.bn_add_act(y, norm), rf.ops.bn_act_pool(y, norm)[0]):
        grads = torch.autograd.grad(out.sum(), (y, norm), create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice|does not require grad"):
            torch.autograd.grad(sum(g.sum() for g in grads), (y, norm))


def test_a_saved_tensor_that_is_written_is_reported():
    y, norm = torch.randn(1, 4, 3, 3, requires_grad=True), norm_values(4, torch.float32)
    inner = y * 1
    for call in (
        lambda: rf.ops.bn_add_act(inner, norm),
        lambda: rf.ops.conv_bn_stats(inner, torch.randn(2, 4, 1, 1), norm)[0],
        lambda: rf.ops.bn_act_pool(inner, norm)[0],
    ):
        out = call()
        with torch.no_grad():
            inner.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_takes_16_bits_and_leaves_the_vectors(dtype):
    model = Plain()
    x = torch.randn(2, 8, 5, 6, requires_grad=True)
    with torch.autocast("cpu", dtype):
        y, stats = rf.ops.conv_bn_stats(x, model.conv1.weight, padding=1)
        norm = finalized(model.bn1, y, stats)
        out = rf.ops.bn_add_act(y, norm, x)
        pooled, _ = rf.ops.bn_act_pool(y, norm)
        dz, sums = rf.ops.bn_add_act_backward(out.detach(), out.detach(), y.detach(), norm.detach())
        rows, _, _ = rf.ops.bn_backward_finalize(sums, norm.detach(), 60)
        dy = rf.ops.bn_backward_apply(dz.float(), y.detach(), rows)
        dx, _ = rf.ops.conv_bn_dgrad(
            dz.float(), model.conv1.weight.detach(), input_size=x.shape, padding=1
        )
        dw = rf.ops.conv_bn_wgrad(dz, x.detach(), model.conv1.weight.detach(), padding=1)
    assert {t.dtype for t in (y, out, pooled, dz, dy, dx)} == {dtype}
    assert {t.dtype for t in (stats, norm, sums, rows, dw)} == {torch.float32}
    (out.float().sum() + pooled.float().sum()).backward()
    assert x.grad.dtype is torch.float32 and model.conv1.weight.grad.dtype is torch.float32
    with torch.autocast("cpu", dtype):
        wide, _ = rf.ops.conv_bn_stats(x.double(), model.conv1.weight.double(), padding=1)
    assert wide.dtype is WIDE


def test_what_needs_no_gradient_gets_none():
    y, norm = leaf(1, 4, 3, 3), norm_values(4, WIDE)
    rf.ops.bn_add_act(y, norm, torch.randn_like(y)).sum().backward()
    assert norm.grad is None and y.grad is not None
    x, weight = torch.randn(1, 4, 3, 3, dtype=WIDE), leaf(2, 4, 1, 1)
    rf.ops.conv_bn_stats(x, weight, norm)[0].sum().backward()
    assert weight.grad is not None and x.grad is None
    with torch.no_grad():
        assert not rf.ops.conv_bn_stats(x, weight)[0].requires_grad
    gamma = leaf(4)
    stats = torch.rand(2, 4, dtype=WIDE)
    norm = rf.ops.bn_finalize(stats, 9, gamma)
    norm.sum().backward()
    assert gamma.grad is not None
