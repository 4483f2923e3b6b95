"""Autograd's rules for training nodes; hooks, and parameters that want no gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from nets import stir
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from training_nets import (
    BACKEND,
    BACKENDS,
    SERVED,
    Step,
    assert_same,
    build,
    gradient_like,
    norms,
    state,
    step,
)

import resnet_fused as rf

F64 = torch.float64
BLOCKS = ["torchvision bottleneck halved", "torchvision basic", "padded halved", "stem"]


@pytest.fixture(autouse=True)
def _backend():
    """What a later version takes by itself; a test may ask for another."""
    with rf.backend(BACKEND):
        yield


# ------------------------------------------------------------------ hooks and parts


HOOKED = {
    "forward hook": lambda m, seen: m.register_forward_hook(lambda *a: seen.append(1)),
    "forward pre-hook": lambda m, seen: m.register_forward_pre_hook(lambda *a: seen.append(1)),
    "backward hook": lambda m, seen: m.register_full_backward_hook(lambda *a: seen.append(1)),
}


@pytest.mark.parametrize("hook", HOOKED)
@pytest.mark.parametrize("child", ["conv2", "bn1", "relu", "downsample.0", "downsample", ""])
def test_hooks_fire_as_often_and_the_rest_stays_fused(child, hook):
    # A backward hook forbids what works in place behind it, here and with PyTorch's modules.
    def make():
        block, x = build("torchvision bottleneck halved")
        block.relu.inplace = False
        return block, x

    counts, results = [], []
    for fuse in (True, False):
        block, x = make()
        model = rf.fuse(block) if fuse else block
        seen = []
        HOOKED[hook](model.get_submodule(child), seen)
        results.append(step(model, x))
        counts.append(len(seen))
    assert counts[0] == counts[1] > 0
    assert_same(*results)
    rows = {row.layer: row for row in rf.explain(rf.fuse(block), x).rows}
    left = {"conv2": {"conv2"}, "bn1": {"conv1"}, "downsample.0": {"downsample.0"}}
    by_modules = {name for name, row in rows.items() if row.implementation == "modules"}
    assert by_modules == left.get(child, set())
    for name in by_modules:
        assert "hook" in rows[name].why


def test_global_hooks_see_every_module():
    block, x = build("torchvision basic")
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *a: seen.append(type(m)))
    try:
        ours = step(rf.fuse(copy.deepcopy(block)), x)
    finally:
        handle.remove()
    assert seen.count(nn.Conv2d) == seen.count(nn.BatchNorm2d) == 2
    assert_same(ours, step(block, x))


def test_live_drop_path_and_other_extras_keep_the_blocks_own_forward():
    from timm.models.resnet import BasicBlock

    block = stir(BasicBlock(6, 6, drop_path=nn.Identity())).double().train()
    block.drop_path = nn.Dropout(0.5)
    x = torch.randn(3, 6, 5, 5, dtype=F64)
    results = []
    for model in (rf.fuse(copy.deepcopy(block)), block):
        torch.manual_seed(3)
        results.append(step(model, x))
    assert_same(*results)


@pytest.mark.parametrize("wanted", ["bn", "conv", "conv2.weight", "bn3.bias", "nothing, but x"])
@pytest.mark.parametrize("name", ["torchvision bottleneck halved", "stem"])
def test_gradients_of_some_parameters_only(name, wanted):
    if name == "stem" and wanted[-1].isalpha() and "." in wanted:
        wanted = wanted.replace("2", "").replace("3", "")
    results = []
    for fuse in (True, False):
        block, x = build(name)
        for key, p in block.named_parameters():
            p.requires_grad_(wanted in key)
        results.append(step(rf.fuse(block) if fuse else block, x))
    assert any(g is not None for g in results[0].grads.values())
    assert_same(*results)


@pytest.mark.parametrize("name", BLOCKS)
def test_an_input_without_gradient(name):
    results = []
    for fuse in (True, False):
        block, x = build(name)
        model = rf.fuse(block) if fuse else block
        y = model(x)
        y.backward(gradient_like(y))
        assert x.grad is None
        results.append(Step(y.detach(), state(model).grads, state(model).buffers))
    assert_same(*results)


def test_explain_in_training_names_implementation_and_pattern():
    block, x = build("torchvision bottleneck halved")
    rows = {row.layer: row for row in rf.explain(rf.fuse(block), x).rows}
    patterns = {name: row.pattern for name, row in rows.items()}
    assert patterns == {
        "conv1": "conv+bn+relu",
        "conv2": "conv+bn+relu",
        "conv3": "conv+bn+add+relu",
        "downsample.0": "conv+bn",
    }
    assert {row.implementation for row in rows.values()} == {BACKEND}
    assert all("training, one autograd node" in row.why for row in rows.values())
    with rf.backend("triton"):
        rows = rf.explain(rf.fuse(block), x).rows
    assert {row.implementation for row in rows} == {"modules"}
    assert all("no kernel serves conv_bn_stats in training" in row.why for row in rows)


def test_without_kernels_the_modules_train_bit_for_bit():
    """A backend that has no kernel here stands for a machine that has none at all."""
    block, x = build("torchvision bottleneck halved", torch.float32)
    with rf.backend("triton"):
        rows = rf.explain(rf.fuse(copy.deepcopy(block)), x).rows
        assert all("no kernel serves conv_bn_stats in training" in row.why for row in rows)
        ours = step(rf.fuse(copy.deepcopy(block)), x)
    assert_same(ours, step(block, x), 0.0)


@SERVED
def test_auto_takes_the_cpus_kernels():
    block, x = build("torchvision bottleneck halved", torch.float32)
    with rf.backend("auto"):
        assert rf.explain(rf.fuse(block), x).counts() == {"cpu": 4}


# ------------------------------------------------------------------ autograd's rules


class Overloads(TorchDispatchMode):
    """Which implementations of our ops the dispatcher ran."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func).startswith("resnet_fused."):
            self.names.add(str(func).rpartition(".")[2])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_is_by_the_backend_that_forward_was_asked_for(backend):
    block, x = build("torchvision bottleneck halved", torch.float32)
    with rf.backend(backend):
        y = rf.fuse(block)(x)
    with rf.backend("auto"), Overloads() as ran:
        y.sum().backward()
        assert rf.backends.requested() == ("auto", "rf.backend")
    # A vector's arithmetic may be PyTorch's in both.
    assert backend in ran.names and (backend == "cpu" or "cpu" not in ran.names)


@pytest.mark.parametrize("name", BLOCKS)
def test_double_backward_raises(name):
    block, x = build(name)
    fused = rf.fuse(block)
    y = fused(x.requires_grad_())
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


def test_a_saved_tensor_modified_in_place_is_reported():
    def modify(what):
        block, x = build("torchvision basic")
        fused = rf.fuse(block)
        given = x.clone().requires_grad_() * 1
        y = fused(given)
        with torch.no_grad():
            {"input": given, "output": y, "weight": fused.conv1.weight}[what].add_(1)
        y.sum().backward()

    for what in ("input", "output", "weight"):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            modify(what)


def test_an_output_without_shortcut_may_be_modified():
    """As BatchNorm's own: its gradient needs what went in, not what came out."""
    block, x = build("one layer without ReLU")
    results = []
    for model in (rf.fuse(copy.deepcopy(block)), block):
        given = x.clone().requires_grad_()
        model(given).mul_(2).sum().backward()
        results.append(given.grad)
    assert_close(*results, rtol=1e-12, atol=1e-12)


def test_backward_twice_over_a_kept_graph():
    block, x = build("torchvision bottleneck halved")
    fused = rf.fuse(block)
    y = fused(x.requires_grad_())
    inputs = [x, *fused.parameters()]
    first = torch.autograd.grad(y, inputs, gradient_like(y), retain_graph=True)
    second = torch.autograd.grad(y, inputs, gradient_like(y))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


def test_saved_tensors_may_live_elsewhere():
    results = []
    for fuse in (True, False):
        block, x = build("torchvision bottleneck halved")
        model = rf.fuse(block) if fuse else block
        with torch.autograd.graph.save_on_cpu():
            y = model(x.requires_grad_())
        y.backward(gradient_like(y))
        results.append(Step(y.detach(), {"x": x.grad, **state(model).grads}, {}))
    assert_same(*results)


def test_a_function_transform_runs_the_modules():
    block, x = build("torchvision basic")
    fused = rf.fuse(block)
    for bn in norms(block):
        bn.track_running_stats, bn.running_mean, bn.running_var = False, None, None
        bn.num_batches_tracked = None
    values = dict(fused.named_parameters())

    def loss(values, model):
        return torch.func.functional_call(model, values, (x,)).square().sum()

    ours, theirs = (torch.func.grad(loss)(values, model) for model in (fused, rf.unfuse(fused)))
    for name, grad in ours.items():
        assert_close(grad, theirs[name])
