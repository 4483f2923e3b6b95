"""Blocks in training against PyTorch's modules: outputs, gradients, running statistics, memory."""

from __future__ import annotations

import copy
import os

import pytest
import torch
import torchvision
from nets import images
from torch import nn
from torchvision.ops import FrozenBatchNorm2d
from training_nets import (
    BACKEND,
    BACKENDS,
    CASES,
    NODE,
    SERVED,
    assert_same,
    build,
    kept_bytes,
    norms,
    replace_norms,
    step,
    steps,
    to_frozen,
)

import resnet_fused as rf
from resnet_fused import numerics

F64 = torch.float64
PROOF = os.environ.get("HYPOTHESIS_PROFILE") == "proof"


def routes_of(model, x, backend):
    with rf.backend(backend), rf.backends.recording() as routes:
        y = model(x)
    return routes, y


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_float64_is_the_modules(name, backend):
    block, x = build(name)
    assert_same(*steps(block, x, backend))
    routes, y = routes_of(rf.fuse(copy.deepcopy(block)), x.requires_grad_(), backend)
    convs = [m for m in block.modules() if isinstance(m, nn.Conv2d)]
    assert len(routes) == len(convs) - (name == "row of layers")
    assert {(route.op, route.implementation) for route in routes} == {("conv_bn_stats", backend)}
    assert (type(y.grad_fn).__name__ == NODE) == CASES[name].whole


def only(*live):
    """Keeps the batch's statistics in some BatchNorms (0 first, -1 the last main one)."""

    def change(model):
        found = norms(model)
        for bn in found:
            bn.eval()
        for index in live:
            found[index].train()

    return change


def each(change):
    def do(model):
        with torch.no_grad():
            for bn in norms(model):
                change(bn)

    return do


def without_statistics(bn):
    return nn.BatchNorm2d(bn.num_features, track_running_stats=False)


def mixed_types(model):
    count = iter(range(9))
    replace_norms(model, lambda bn: FrozenBatchNorm2d(bn.num_features) if next(count) % 2 else bn)


def fewer_parameters(model):
    replace_norms(model, lambda bn: nn.BatchNorm2d(bn.num_features, affine=False))


NORMS = {
    "all frozen": only(),
    "first live": only(0),
    "last live": only(-1),
    "all but the last": lambda m: norms(m)[-1].eval(),
    "all but the first": lambda m: norms(m)[0].eval(),
    "FrozenBatchNorm2d": to_frozen,
    "every second FrozenBatchNorm2d": mixed_types,
    "affine=False": fewer_parameters,
    "no running statistics": lambda m: replace_norms(m, without_statistics),
    "no running statistics, eval": lambda m: replace_norms(m, without_statistics).eval(),
    "track_running_stats turned off": each(lambda bn: setattr(bn, "track_running_stats", False)),
    "momentum None": each(lambda bn: setattr(bn, "momentum", None)),
    "momentum 0": each(lambda bn: setattr(bn, "momentum", 0.0)),
    "momentum 1": each(lambda bn: setattr(bn, "momentum", 1.0)),
    "no counter": each(lambda bn: setattr(bn, "num_batches_tracked", None)),
    "eps": each(lambda bn: setattr(bn, "eps", 0.3)),
    "last gamma 0": lambda m: norms(m)[-1].weight.detach().zero_(),
    "some gamma 0": each(lambda bn: bn.weight[::2].zero_()),
    "gamma negative": each(lambda bn: bn.weight.abs_().neg_()),
    "SyncBatchNorm alone": lambda m: replace_norms(m, lambda bn: nn.SyncBatchNorm(bn.num_features)),
}
MANY = ["torchvision bottleneck halved", "torchvision basic", "padded halved", "stem"]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("name", "backend"), [*((name, BACKEND) for name in MANY), (MANY[0], "reference")]
)
def test_float64_with_other_normalisations(name, norm, backend):
    block, x = build(name)
    NORMS[norm](block)
    for _ in range(2):  # a cumulative average differs from the second step on
        ours, theirs = steps(block, x, backend)
        assert_same(ours, theirs)
        step(block, x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MANY)
def test_contiguous_expanded_and_sliced_tensors(name, backend):
    block, x = build(name)
    fused = rf.fuse(block)
    wide = torch.randn(*x.shape[:3], 2 * x.shape[3], dtype=F64)
    for given in (x.contiguous(), wide[..., ::2], x[:1, :, :, :1].expand(x.shape)):
        results = []
        for model in (fused, rf.unfuse(fused)):
            for p in model.parameters():
                p.grad = None
            leaf = given.detach().requires_grad_()
            with rf.backend(backend):
                y = model(leaf)
            # Its gradient is one number, expanded.
            y.sum().backward()
            results.append([y.detach(), leaf.grad, *[p.grad for p in model.parameters()]])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_layouts_are_eagers(layout):
    for name in MANY:
        block, x = build(name)
        ours, theirs = steps(block, x.contiguous(memory_format=layout), "reference")
        assert ours.out.stride() == theirs.out.stride(), name
        for key, grad in ours.grads.items():
            assert grad.stride() == theirs.grads[key].stride(), (name, key)


# ------------------------------------------------------------------ lower precision

SIZES = {
    "basic": (8, 32, 14, 14),
    "bottleneck": (8, 64, 14, 14),
    "padded": (8, 32, 14, 14),
    "stem": (4, 3, 48, 48),
}


def larger(name, seed):
    """Blocks with enough elements for a ratio of two errors to mean something."""
    torch.manual_seed(seed)
    down = nn.Sequential(nn.Conv2d(64, 128, 1, 2, bias=False), nn.BatchNorm2d(128))
    shortcut = rf.nn.shortcuts.PaddedShortcut(32, 48, 2, 4)
    block = {
        "basic": lambda: rf.nn.BasicBlock(32, 32),
        "bottleneck": lambda: rf.nn.Bottleneck(64, 32, 2, down),
        "padded": lambda: rf.nn.BasicBlock(32, 48, 2, shortcut),
        "stem": lambda: rf.nn.Stem(3, 32),
    }[name]()
    for bn in norms(block):
        with torch.no_grad():
            bn.weight.copy_(torch.rand(bn.num_features) + 0.5)
            bn.bias.normal_(0, 0.2)
    with torch.no_grad():  # the float64 oracle sees what 16 bits see
        for p in block.parameters():
            p.copy_(p.bfloat16())
    return rf.unfuse(block).train(), torch.randn(SIZES[name]).bfloat16()


def judge(results):
    """Outputs by the relative tier; gradients beside eager's.

    How many masks flip in a block this small is chance: the largest error is judged over all
    gradients together, each in units of its own size, and a single one's rms as outputs are.
    """
    pools = ([], [], [])
    for ours, theirs, oracle in results:
        out = numerics.relative_check(ours.out, theirs.out, oracle.out)
        assert out, f"out: {out}"
        for name, grad in ours.grads.items():
            three = (grad, theirs.grads[name], oracle.grads[name])
            check = numerics.gradient_check(*three)
            assert check.ratio <= check.limit * numerics.chance(grad.numel()), f"{name}: {check}"
            size = three[2].square().mean().sqrt()
            for pool, t in zip(pools, three, strict=True):
                pool.append((t.double() / size).flatten())
    check = numerics.gradient_check(*map(torch.cat, pools))
    assert check, f"all gradients: {check}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("name", SIZES)
def test_errors_beside_eagers(name, kind, backend):
    results = []
    for seed in range(2):
        block, x = larger(name, seed)
        oracle = step(copy.deepcopy(block).double(), x.double())
        if kind == "float32":
            x = x.float()
        elif kind == "bfloat16":
            block.bfloat16()
        x = x.contiguous(memory_format=torch.channels_last)
        autocast = kind == "autocast"
        theirs = step(copy.deepcopy(block), x, autocast=autocast)
        ours = step(rf.fuse(block), x, backend, autocast=autocast)
        results.append((ours, theirs, oracle))
        assert ours.out.dtype == theirs.out.dtype == x.dtype
        for key, grad in ours.grads.items():
            assert grad.dtype == theirs.grads[key].dtype, key
        for key, buffer in ours.buffers.items():
            torch.testing.assert_close(buffer, theirs.buffers[key], rtol=2e-2, atol=2e-2)
    judge(results)


# ------------------------------------------------------------------ autograd

CHECKED = {
    "identity": (lambda: rf.nn.BasicBlock(2, 2), (2, 2, 3, 3)),
    "projection": (
        lambda: rf.nn.Bottleneck(
            2, 1, 2, nn.Sequential(nn.Conv2d(2, 4, 1, 2, bias=False), nn.BatchNorm2d(4))
        ),
        (2, 2, 4, 4),
    ),
    "padded": (
        lambda: rf.nn.BasicBlock(2, 3, 2, rf.nn.shortcuts.PaddedShortcut(2, 3, 2)),
        (2, 2, 4, 4),
    ),
    "frozen first": (lambda: rf.nn.BasicBlock(2, 2), (2, 2, 3, 3)),
    "stem": (lambda: rf.nn.Stem(1, 2), (2, 1, 8, 8)),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CHECKED)
def test_gradcheck(name, backend):
    make, shape = CHECKED[name]
    block = make().double().train()
    if name == "frozen first":
        block.bn1.eval()
    for bn in norms(block):
        bn.weight.detach().uniform_(0.5, 1.5)
        bn.bias.detach().normal_()
    names = [key for key, _ in block.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in block.parameters()]
    x = torch.randn(shape, dtype=F64, requires_grad=True)

    def run(x, *values):
        with rf.backend(backend):
            return torch.func.functional_call(block, dict(zip(names, values, strict=True)), (x,))

    assert type(run(x, *values).grad_fn).__name__ == NODE
    # Every element in `make proof`; else along random directions.
    assert torch.autograd.gradcheck(run, (x, *values), atol=1e-6, fast_mode=not PROOF)


# ------------------------------------------------------------------ memory


@pytest.mark.parametrize(("network", "most"), [("resnet50", 0.79), ("resnet18", 0.63)])
def test_what_is_kept_for_backward(network, most):
    model = getattr(torchvision.models, network)(num_classes=10).bfloat16().train()
    model.to(memory_format=torch.channels_last)
    x = images(1, 224, torch.bfloat16)
    eager = kept_bytes(model, x)
    with rf.backend(BACKEND):
        ours = kept_bytes(rf.fuse(model), x)
    assert ours <= most * eager, (ours, eager)


@SERVED
def test_the_cpus_own_kernels_are_the_default():
    block, x = build("torchvision bottleneck halved", torch.float32)
    with rf.backends.recording() as routes:
        rf.fuse(block)(x)
    assert {route.implementation for route in routes} == {"cpu"}
