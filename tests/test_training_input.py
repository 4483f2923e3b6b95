"""Training on input that does not fit, and on what goes wrong in the middle."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from nets import stir
from torch import nn
from training_nets import (
    BACKENDS,
    NODE,
    Step,
    assert_same,
    build,
    gradient_like,
    norms,
    projection,
    replace_norms,
    step,
    steps,
)

import resnet_fused as rf
from resnet_fused.ops import _finalize, _training

F64 = torch.float64
BLOCKS = ["torchvision bottleneck halved", "torchvision basic", "padded halved", "stem"]


def memory(model):
    """Everything that a step may change."""
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def assert_untouched(model, before):
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


# ------------------------------------------------------------------ out of memory

FORWARD = ["conv_bn_stats", "bn_finalize", "bn_add_act"]
BACKWARD = ["bn_add_act_backward", "bn_backward_finalize", "conv_bn_wgrad", "conv_bn_dgrad"]


def fails(monkeypatch, op, at):
    """Plants running out of memory in the at-th call of an op; -1 is its last."""
    real, calls = _training.Table.__getitem__, []

    def found(table, name):
        if name == op:
            calls.append(name)
            if len(calls) == at:
                raise torch.OutOfMemoryError("planted")
        return real(table, name)

    monkeypatch.setattr(_training.Table, "__getitem__", found)
    return calls


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", FORWARD)
def test_out_of_memory_in_forward_leaves_running_statistics(monkeypatch, op, backend):
    block, x = build("torchvision bottleneck halved")
    fused = rf.fuse(copy.deepcopy(block))
    before = memory(fused)
    with rf.backend(backend):
        with monkeypatch.context() as patch:
            calls = fails(patch, op, 10**9)
            fused(x)
        fused.load_state_dict(before)
        assert len(calls) >= 3
        for at in range(1, len(calls) + 1):
            with monkeypatch.context() as patch:
                fails(patch, op, at)
                with pytest.raises(torch.OutOfMemoryError, match="planted"):
                    fused(x)
            assert_untouched(fused, before)
    assert_same(step(fused, x, backend), step(block, x))


@pytest.mark.parametrize("op", ["conv_bn_stats_finalize", "bn_add_act"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_out_of_memory_puts_back_what_convolutions_have_updated(monkeypatch, momentum, op):
    """Their launches take the batch in before the rest of the block has its memory."""
    block, x = build("torchvision bottleneck halved")
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
    fused = rf.fuse(copy.deepcopy(block))
    before = memory(fused)
    with rf.backend("reference"), _finalize.preferring("always"):
        with monkeypatch.context() as patch:
            calls = fails(patch, op, 10**9)
            fused(x)
        assert len(calls) == (4 if op == _finalize.OP else 3)
        fused.load_state_dict(before)
        for at in range(1, len(calls) + 1):
            with monkeypatch.context() as patch:
                fails(patch, op, at)
                with pytest.raises(torch.OutOfMemoryError, match="planted"):
                    fused(x)
            assert_untouched(fused, before)
        assert_same(step(fused, x, "reference"), step(block, x))


@pytest.mark.parametrize("op", FORWARD)
def test_out_of_memory_behind_a_pooled_shortcut_leaves_its_statistics_too(monkeypatch, op):
    """timm's average pooling in front of the projection makes the shortcut a node of its own."""
    from timm.models.resnet import BasicBlock, downsample_avg

    torch.manual_seed(0)
    shortcut = downsample_avg(8, 16, 1, stride=2)
    block = BasicBlock(8, 16, stride=2, downsample=shortcut).double().train()
    x = torch.randn(3, 8, 6, 6, dtype=F64)
    fused = rf.fuse(copy.deepcopy(block))
    before = memory(fused)
    with monkeypatch.context() as patch, rf.backends.recording() as routes:
        calls = fails(patch, op, 10**9)
        fused(x)
    assert [route.op for route in routes] == ["conv_bn_stats"] * 3
    for name, value in fused.state_dict().items():
        assert ("running" in name or "tracked" in name) is not torch.equal(value, before[name])
    fused.load_state_dict(before)
    for at in range(1, len(calls) + 1):
        with monkeypatch.context() as patch:
            fails(patch, op, at)
            with pytest.raises(torch.OutOfMemoryError, match="planted"):
                fused(x)
        assert_untouched(fused, before)
    assert_same(step(fused, x), step(block, x))


@pytest.mark.parametrize("op", BACKWARD)
def test_out_of_memory_in_backward_gives_no_gradient(monkeypatch, op):
    block, x = build("torchvision bottleneck halved")
    fused = rf.fuse(copy.deepcopy(block))
    with rf.backend("reference"):
        y = fused(x)
        with monkeypatch.context() as patch:
            fails(patch, op, 1)
            with pytest.raises(torch.OutOfMemoryError, match="planted"):
                y.backward(gradient_like(y), retain_graph=True)
        assert all(p.grad is None for p in fused.parameters())
        y.backward(gradient_like(y))  # what was kept is whole
    expected = step(block, x)
    for name, p in fused.named_parameters():
        torch.testing.assert_close(p.grad, expected.grads[name], rtol=1e-11, atol=1e-11)


# ------------------------------------------------------------------ NaN and Inf


def poison(model, x, where, value):
    with torch.no_grad():
        if where == "x":
            x[0, 0, 1, 1] = value
            return
        bn = norms(model)[0 if len(norms(model)) == 1 else 1]
        conv = [m for m in model.modules() if isinstance(m, nn.Conv2d)][-1]
        {"gamma": bn.weight, "beta": bn.bias, "weight": conv.weight[:, 0, 0]}[where][0] = value


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["x", "gamma", "beta", "weight"])
@pytest.mark.parametrize("name", BLOCKS)
def test_nan_and_inf_end_up_where_pytorch_puts_them(name, where, value, backend):
    block, x = build(name)
    poison(block, x, where, value)
    ours, theirs = steps(block, x, backend)
    assert any(not t.isfinite().all() for t in (theirs.out, *theirs.grads.values()))
    # PyTorch's own sums of Inf differ with the device: Welford's makes NaN of it, a plain one not.
    assert_same(ours, theirs, infinite=math.isinf(value))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_nan_in_the_gradient(name, frozen):
    block, x = build(name)
    if frozen:
        norms(block)[-1].eval()
    results = []
    for fuse in (True, False):
        model = rf.fuse(copy.deepcopy(block)) if fuse else copy.deepcopy(block)
        given = x.clone().requires_grad_()
        with rf.backend("reference"):
            y = model(given)
        dout = gradient_like(y)
        place = (y[0, 0] > 0).nonzero()[0].tolist()
        dout[0, 0, place[0], place[1]] = math.nan
        y.backward(dout)
        grads = {key: p.grad for key, p in model.named_parameters()}
        results.append(Step(y.detach(), {"x": given.grad, **grads}, dict(model.named_buffers())))
    assert results[1].grads["x"].isnan().any()
    assert_same(*results)


# ------------------------------------------------------------------ few elements


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", BLOCKS)
def test_an_empty_batch(name, backend):
    block, x = build(name)
    ours, theirs = steps(block, x[:0], backend)
    assert ours.out.shape == theirs.out.shape and ours.out.shape[0] == 0
    assert_same(ours, theirs)
    assert all(bool(b == 1) for key, b in ours.buffers.items() if "tracked" in key)
    assert all(g.abs().max() == 0 for key, g in ours.grads.items() if key != "x")


ONE_VALUE = {
    "block": (lambda: rf.nn.BasicBlock(4, 4), (1, 4, 1, 1)),
    "only the second layer": (lambda: rf.nn.Bottleneck(8, 2, 2, projection(8, 8, 2)), (1, 8, 2, 1)),
    "one layer": (lambda: rf.nn.ConvBNAct(4, 4, 3, padding=0), (1, 4, 3, 3)),
    "stem": (lambda: rf.nn.Stem(3, 4), (1, 3, 2, 2)),
    "no running statistics, eval": (
        lambda: replace_norms(
            rf.nn.ConvBNAct(4, 4, 1), lambda bn: nn.BatchNorm2d(4, track_running_stats=False)
        ).eval(),
        (1, 4, 1, 1),
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ONE_VALUE)
def test_one_value_a_channel_raises_as_in_pytorch_before_anything_changes(name, backend):
    make, shape = ONE_VALUE[name]
    fused = make()
    before = memory(fused)
    x = torch.randn(shape)
    raises = pytest.raises(ValueError, match="more than 1 value per channel")
    with rf.backend(backend), raises as ours:
        fused(x)
    assert_untouched(fused, before)
    with pytest.raises(ValueError) as theirs:
        rf.unfuse(fused)(x)
    assert str(ours.value) == str(theirs.value)


def test_one_value_a_channel_is_fine_where_statistics_are_given():
    block, _ = build("torchvision basic")
    for bn in norms(block)[1:]:
        bn.eval()
    x = torch.randn(1, 6, 1, 1, dtype=F64)
    with rf.backend("reference"), pytest.raises(ValueError, match="more than 1 value"):
        rf.fuse(block)(x)
    norms(block)[0].eval()
    assert_same(*steps(block, x, "reference"))


def test_two_values_a_channel_are_enough():
    block, _ = build("torchvision basic")
    x = torch.randn(2, 6, 1, 1, dtype=F64)
    assert_same(*steps(block, x, "reference"), 1e-8)  # a variance of two: 1 / (n - 1) is 1


# ------------------------------------------------------------------ what does not fit


def same_error(model, x):
    """What PyTorch says of a call, said of the fused one too; or the same result of both."""
    results = []
    for each in (rf.fuse(copy.deepcopy(model)), copy.deepcopy(model)):
        try:
            with rf.backend("reference"):
                results.append(step(each, x))
        except (RuntimeError, ValueError) as error:
            results.append(error)
    ours, theirs = results
    assert type(ours) is type(theirs), (ours, theirs)
    if isinstance(theirs, Step):
        assert_same(ours, theirs, 1e-5)
    else:
        assert str(ours) == str(theirs)
    return ours


class Narrow(nn.Module):
    """A shortcut of one pixel an image, which broadcasting takes."""

    def forward(self, x):
        return x.mean((2, 3), keepdim=True)


WRONG = {
    "channels": lambda: (rf.nn.BasicBlock(6, 6), (2, 5, 4, 4)),
    "identity of fewer channels": lambda: (rf.nn.BasicBlock(6, 10), (2, 6, 4, 4)),
    "identity of another size": lambda: (rf.nn.BasicBlock(6, 6, 2), (2, 6, 8, 8)),
    "projection of fewer channels": lambda: (
        rf.nn.BasicBlock(6, 10, 1, projection(6, 5)), (2, 6, 4, 4),
    ),
    "projection of another size": lambda: (
        rf.nn.BasicBlock(6, 10, 2, projection(6, 10, 1)), (2, 6, 8, 8),
    ),
    "padded to other channels": lambda: (
        rf.nn.BasicBlock(6, 10, 1, rf.nn.shortcuts.PaddedShortcut(6, 9)), (2, 6, 4, 4),
    ),
    "padded from other channels": lambda: (
        rf.nn.BasicBlock(6, 10, 1, rf.nn.shortcuts.PaddedShortcut(5, 10)), (2, 6, 4, 4),
    ),
    "padded at another stride": lambda: (
        rf.nn.BasicBlock(6, 10, 2, rf.nn.shortcuts.PaddedShortcut(6, 10, 1)), (2, 6, 8, 8),
    ),
    "a window larger than the image": lambda: (
        rf.nn.ConvBNAct(6, 6, 3, padding=0), (1, 6, 1, 1),
    ),
    "convolutions that do not follow": lambda: (
        broken(lambda b: setattr(b, "conv2", nn.Conv2d(7, 6, 3, padding=1, bias=False))),
        (2, 6, 4, 4),
    ),
    "a BatchNorm of other channels": lambda: (
        broken(lambda b: setattr(b, "bn1", nn.BatchNorm2d(7))), (2, 6, 4, 4),
    ),
    "a layer in float64": lambda: (broken(lambda b: b.conv2.double()), (2, 6, 4, 4)),
    "three dimensions": lambda: (rf.nn.BasicBlock(6, 6), (6, 4, 4)),
}  # fmt: skip


def broken(change):
    block = rf.nn.BasicBlock(6, 6)
    change(block)
    return block


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_reported_by_pytorch(name):
    torch.manual_seed(0)
    model, shape = WRONG[name]()
    found = same_error(rf.unfuse(model), torch.randn(shape))
    assert isinstance(found, Exception)


def test_a_double_input_under_autocast_is_reported_as_by_pytorch():
    for model in (rf.nn.BasicBlock(6, 6), rf.nn.BasicBlock(6, 6).eval()):
        x = torch.randn(2, 6, 4, 4, dtype=F64)
        texts = []
        for each in (model, rf.unfuse(model)):
            autocast = torch.autocast("cpu", dtype=torch.bfloat16)
            with rf.backend("reference"), autocast, pytest.raises(RuntimeError) as error:
                each(x)
            texts.append(str(error.value))
        assert texts[0] == texts[1]


def test_a_shortcut_that_broadcasts():
    block = stir(rf.nn.BasicBlock(6, 6, 1, Narrow())).double()
    block = rf.unfuse(block)
    x = torch.randn(3, 6, 4, 5, dtype=F64)
    with rf.backend("reference"):
        assert type(rf.fuse(block)(x.requires_grad_()).grad_fn).__name__ == NODE
    assert_same(*steps(block, x.detach(), "reference"))


BIASED = {
    "all live": lambda block: None,
    "the biased layer frozen": lambda block: block.bn2.eval(),
    "all frozen": lambda block: [bn.eval() for bn in norms(block)],
}


@pytest.mark.parametrize("frozen", BIASED)
def test_a_convolutions_bias_is_never_lost(frozen):
    torch.manual_seed(0)
    block = broken(lambda b: setattr(b, "conv2", nn.Conv2d(6, 6, 3, padding=1)))
    block = rf.unfuse(stir(block).double().train())
    BIASED[frozen](block)
    ours, theirs = steps(block, torch.randn(3, 6, 4, 5, dtype=F64), "reference")
    assert_same(ours, theirs)


PADDINGS = {
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "same": {"padding": "same"},
    "uneven": {"padding": (1, 0), "stride": (2, 1)},
}


@pytest.mark.parametrize("name", PADDINGS)
def test_other_paddings(name):
    conv = nn.Conv2d(4, 5, 3, bias=False, **PADDINGS[name])
    model = stir(nn.Sequential(conv, nn.BatchNorm2d(5), nn.ReLU())).double()
    assert_same(*steps(model, torch.randn(2, 4, 7, 6, dtype=F64), "reference"))


def test_pools_that_are_no_maximum_of_a_window_stay_modules():
    for pool in (
        nn.MaxPool2d(3, 2, 1, dilation=2),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.AvgPool2d(2),
        nn.MaxPool2d(16, 1),
    ):
        layers = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), pool
        model = stir(nn.Sequential(*layers)).double()
        assert_same(*steps(model, torch.randn(2, 3, 17, 19, dtype=F64), "reference"))


def test_pixels_that_are_equal_share_no_gradient():
    """Of equal pixels in a window the first one wins, as in PyTorch; of several NaN the last."""
    model, x = build("stem")
    norms(model)[0].weight.detach().copy_(-torch.rand(8))  # many zeros behind the ReLU
    x = x.round()
    assert_same(*steps(model, x, "reference"))
