"""NaN and Inf in single elements of a training step: where the modules put them, and statistics."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

import resnet_fused as rf

FORMS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
BLOCKS = ("layer", "identity", "projection", "bottleneck")
PLACES = ("x", "weight", "gamma", "beta", "gradient")
VALUES = (math.nan, math.inf, -math.inf)
INF_GRADIENT = ("gamma", "gradient")
"""Where an Inf reaches BatchNorm's backward, whose sums of Inf and -Inf depend on their order."""


def block_of(kind: str) -> nn.Module:
    if kind == "layer":
        return nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        )
    if kind == "identity":
        return BasicBlock(8, 8)
    if kind == "bottleneck":
        return Bottleneck(16, 4)
    projection = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
    return BasicBlock(8, 16, 2, projection)


def kinds(t: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.isnan(t), torch.isposinf(t), torch.isneginf(t)


def step_of(block, x, gradient):
    x = x.clone().requires_grad_()
    with rf.backends.recording() as routes:
        y = block(x)
    y.backward(gradient(y))
    grads = {name: p.grad for name, p in block.named_parameters()} | {"x": x.grad}
    return {"y": y.detach(), **dict(block.named_buffers())}, grads, routes


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("place", PLACES)
def test_nan_and_inf_are_where_the_modules_put_them(kind, form, place):
    """Output and running statistics: the same kind of value at every place. Gradients too, but for
    an Inf that reaches BatchNorm's backward: there what is finite is the same."""
    for value in VALUES:
        torch.manual_seed(1)
        block = block_of(kind)
        for module in block.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
        x = torch.randn(3, 16 if kind == "bottleneck" else 8, 6, 6).to(memory_format=FORMS[form])
        convs = [module for module in block.modules() if isinstance(module, nn.Conv2d)]
        norms = [module for module in block.modules() if isinstance(module, nn.BatchNorm2d)]
        with torch.no_grad():
            if place == "x":
                x[1, 2, 3, 1] = value
            elif place == "weight":
                convs[-1].weight[1, 0, 0, 0] = value
            elif place in ("gamma", "beta"):
                (norms[0].weight if place == "gamma" else norms[0].bias)[1] = value

        def gradient(y, value=value):
            made = torch.linspace(-1, 1, y.numel()).view_as(y) ** 3
            if place == "gradient":  # where the ReLU lets it through
                made.view(-1)[y.detach().reshape(-1).argmax()] = value
            return made

        block = block.to(memory_format=FORMS[form]).train()
        fused = rf.fuse(copy.deepcopy(block))
        before = {name: t.clone() for name, t in block.named_buffers()}
        theirs, their_grads, _ = step_of(block, x, gradient)
        ours, our_grads, routes = step_of(fused, x, gradient)
        assert {route.op for route in routes} == {"conv_bn_stats"}
        assert any(not torch.equal(theirs[name], t) for name, t in before.items())
        for name, t in theirs.items():
            same = itertools.starmap(torch.equal, zip(kinds(ours[name]), kinds(t), strict=True))
            assert all(same), f"{name} with {value} in {place}"
        if math.isnan(value):
            assert not all(t.isfinite().all() for t in (*their_grads.values(), theirs["y"]))
        for name, t in their_grads.items():
            got, wanted = kinds(our_grads[name]), kinds(t)
            if not math.isnan(value) and place in INF_GRADIENT:
                got, wanted = (our_grads[name].isfinite(),), (t.isfinite(),)
            same = itertools.starmap(torch.equal, zip(got, wanted, strict=True))
            assert all(same), f"gradient of {name} with {value} in {place}"
