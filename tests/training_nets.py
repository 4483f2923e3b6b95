"""Training steps for the tests: blocks of every kind, one step of them, and who may serve it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import NamedTuple

import pytest
import timm.models.resnet as timm_resnet
import torch
from nets import stir
from torch import Tensor, nn
from torchvision.models import resnet as tv
from torchvision.ops import FrozenBatchNorm2d

import resnet_fused as rf
from resnet_fused import backends, ops

NODE = "_NodeBackward"
"""Name of the autograd node of a fused layer or block."""


def serves(backend: str) -> bool:
    """Whether training on the CPU has this implementation."""
    assert ops.conv_bn_stats  # the ops enter their implementations when they are imported
    return any(entry.name == backend for entry in backends.implementations("conv_bn_stats"))


BACKEND = "cpu" if serves("cpu") else "reference"
"""What a training step on the CPU takes by itself; else the one that is always there."""
SERVED = pytest.mark.skipif(not serves("cpu"), reason="no C++ kernels of training in this build")
BACKENDS = ["reference", pytest.param("cpu", marks=SERVED)]


class Step(NamedTuple):
    """What a training step left: output, gradients (of the input too: "x"), buffers."""

    out: Tensor
    grads: dict[str, Tensor | None]
    buffers: dict[str, Tensor]


def asked(backend: str | None) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if backend is None else rf.backend(backend)


def gradient_like(y: Tensor, seed: int = 7) -> Tensor:
    """A gradient of the output in its dtype: the same for the same shape."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(y.shape, dtype=torch.float64, generator=generator).bfloat16().to(y.dtype)


def step(
    model: nn.Module, x: Tensor, backend: str | None = None, *, autocast: bool = False
) -> Step:
    """Forward and backward of a model, with a gradient that is the same for every model."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    with asked(backend):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = model(x)
        out.backward(gradient_like(out))
    grads: dict[str, Tensor | None] = {name: p.grad for name, p in model.named_parameters()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    return Step(out.detach(), {"x": x.grad, **grads}, buffers)


def steps(plain: nn.Module, x: Tensor, backend: str | None) -> tuple[Step, Step]:
    """The same step of the model fused, and of the model as it is; it keeps its own state."""
    return step(rf.fuse(copy.deepcopy(plain)), x, backend), step(copy.deepcopy(plain), x)


def assert_same(
    ours: Step, theirs: Step, tolerance: float = 1e-12, *, infinite: bool = False
) -> None:
    """Output, every gradient and every buffer agree, relative to the largest of each tensor.

    NaN stands where NaN is expected, in gradients and buffers also Inf if `infinite`.
    """
    assert ours.grads.keys() == theirs.grads.keys()
    assert ours.buffers.keys() == theirs.buffers.keys()
    pairs = {"out": (ours.out, theirs.out)}
    pairs |= {f"gradient of {name}": (g, theirs.grads[name]) for name, g in ours.grads.items()}
    pairs |= {name: (b, theirs.buffers[name]) for name, b in ours.buffers.items()}
    for name, (got, expected) in pairs.items():
        assert (got is None) == (expected is None), name
        if got is None or expected is None:
            continue
        assert got.dtype == expected.dtype and got.shape == expected.shape, name
        if infinite and name != "out":
            got, expected = (torch.where(t.isfinite(), t, torch.nan) for t in (got, expected))
        assert torch.equal(got.isnan(), expected.isnan()), f"{name}: NaN elsewhere"
        finite = expected.double().nan_to_num()
        scale = max(1.0, float(finite.abs().max())) if finite.numel() else 1.0
        error = float((got.double().nan_to_num() - finite).abs().max()) if finite.numel() else 0.0
        assert error <= tolerance * scale, f"{name}: {error:.3g} off, of {scale:.3g}"


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps of a forward, parameters left out; each memory once."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    parameters |= {b.untyped_storage().data_ptr() for b in model.buffers()}
    kept: dict[int, tuple[int, Tensor]] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = (storage.nbytes(), t)  # alive: no address comes twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    del y
    return sum(nbytes for nbytes, _ in kept.values())


def projection(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


def padded(stride: int, before: int) -> nn.Module:
    shortcut = rf.nn.shortcuts.PaddedShortcut(6, 10, stride, before)
    return rf.nn.BasicBlock(6, 10, stride, shortcut)


def averaged() -> nn.Module:
    """timm's resnet50d: average pooling, then a 1x1 convolution in the shortcut."""
    shortcut = timm_resnet.downsample_avg(16, 24, 1, stride=2)
    return timm_resnet.Bottleneck(16, 6, 2, shortcut)


def row_of_layers() -> nn.Module:
    """A convolution with ReLU, one without, and a bare one."""
    return nn.Sequential(
        nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.Conv2d(8, 5, (1, 3), stride=(2, 1), bias=False), nn.BatchNorm2d(5),
        nn.Conv2d(5, 4, 1),
    )  # fmt: skip


class Case(NamedTuple):
    """A block, its input, and whether all of it is one autograd node."""

    make: Callable[[], nn.Module]
    shape: tuple[int, int, int, int]
    whole: bool = True


CASES = {
    "torchvision basic": Case(lambda: tv.BasicBlock(6, 6), (3, 6, 7, 6)),
    "torchvision basic projected": Case(
        lambda: tv.BasicBlock(6, 10, 1, projection(6, 10)), (2, 6, 5, 7)
    ),
    "torchvision basic halved": Case(
        lambda: tv.BasicBlock(6, 10, 2, projection(6, 10, 2)), (3, 6, 7, 5)
    ),
    "torchvision bottleneck": Case(lambda: tv.Bottleneck(16, 4), (3, 16, 5, 6)),
    "torchvision bottleneck projected": Case(
        lambda: tv.Bottleneck(8, 4, 1, projection(8, 16)), (2, 8, 6, 5)
    ),
    "torchvision bottleneck halved": Case(
        lambda: tv.Bottleneck(8, 4, 2, projection(8, 16, 2)), (3, 8, 7, 7)
    ),
    "torchvision bottleneck of 4 groups": Case(
        lambda: tv.Bottleneck(16, 4, groups=4, base_width=64), (2, 16, 5, 5)
    ),
    "torchvision bottleneck dilated": Case(lambda: tv.Bottleneck(16, 4, dilation=2), (2, 16, 6, 7)),
    "timm basic": Case(lambda: timm_resnet.BasicBlock(6, 6), (2, 6, 5, 5)),
    "timm bottleneck": Case(lambda: timm_resnet.Bottleneck(16, 4), (2, 16, 5, 5)),
    "timm bottleneck averaged": Case(averaged, (3, 16, 6, 6)),
    "rf basic": Case(lambda: rf.nn.BasicBlock(6, 6), (2, 6, 1, 9)),
    "rf bottleneck halved": Case(
        lambda: rf.nn.Bottleneck(8, 4, 2, projection(8, 16, 2)), (2, 8, 6, 8)
    ),
    "padded": Case(lambda: padded(1, 0), (3, 6, 5, 5)),
    "padded halved": Case(lambda: padded(2, 2), (3, 6, 7, 5)),
    "rf basic of a plain network": Case(
        lambda: rf.nn.BasicBlock(6, 9, 2, residual=False), (3, 6, 7, 5)
    ),
    "rf bottleneck of a plain network": Case(
        lambda: rf.nn.Bottleneck(16, 4, residual=False), (2, 16, 5, 6)
    ),
    "rf bottleneck, stride in the 1x1": Case(
        lambda: rf.nn.Bottleneck(8, 4, 2, projection(8, 16, 2), stride_in_1x1=True), (3, 8, 7, 7)
    ),
    "residual block of one layer": Case(lambda: rf.nn.ResidualBlock(6, [6]), (2, 6, 5, 6)),
    "residual block of four layers": Case(
        lambda: rf.nn.ResidualBlock(6, [4, 8, 4, 10], [1, 3, 5, 1], 2, strided=2), (3, 6, 7, 7)
    ),
    "residual block, option A": Case(
        lambda: rf.nn.ResidualBlock(6, [5, 4, 9], stride=2, shortcut="A"), (3, 6, 7, 5)
    ),
    "residual block, option C": Case(
        lambda: rf.nn.ResidualBlock(6, [4, 6], shortcut="C"), (2, 6, 5, 5)
    ),
    "residual block, no shortcut": Case(
        lambda: rf.nn.ResidualBlock(6, [4, 9], 3, 2, shortcut="none"), (3, 6, 7, 5)
    ),
    "one layer": Case(lambda: rf.nn.ConvBNAct(6, 9, 3, 2), (3, 6, 7, 7)),
    "one layer of groups": Case(lambda: rf.nn.ConvBNAct(6, 9, 3, groups=3), (2, 6, 6, 5)),
    "one layer without ReLU": Case(
        lambda: rf.nn.ConvBNAct(6, 9, (3, 1), act="none", dilation=2), (2, 6, 6, 5)
    ),
    "stem": Case(lambda: rf.nn.Stem(3, 8), (2, 3, 21, 18)),
    "row of layers": Case(row_of_layers, (3, 6, 5, 6), whole=False),
}


def build(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A case's plain block in training mode, its BatchNorms stirred, and an input."""
    case = CASES[name]
    torch.manual_seed(seed)
    block = rf.unfuse(stir(case.make(), seed)).to(dtype).train()
    x = torch.randn(case.shape, dtype=torch.float64).to(dtype)
    return block, x.contiguous(memory_format=torch.channels_last)


def norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.SyncBatchNorm)]


def replace_norms(model: nn.Module, make: Callable[[nn.BatchNorm2d], nn.Module]) -> nn.Module:
    """Puts another normalisation in the place of every BatchNorm, its values kept where it can."""
    for name, child in model.named_children():
        if isinstance(child, nn.BatchNorm2d):
            new = make(child).to(next(model.parameters()).dtype)
            new.load_state_dict(child.state_dict(), strict=False)
            setattr(model, name, new)
        else:
            replace_norms(child, make)
    return model


def to_frozen(model: nn.Module) -> nn.Module:
    return replace_norms(model, lambda bn: FrozenBatchNorm2d(bn.num_features))


def loss_of(model, x):
    y = model(x)
    return (y * gradient_like(y)).sum()


def state(model):
    """Gradients and buffers of a model, to compare."""
    grads = {name: p.grad for name, p in model.named_parameters()}
    return Step(torch.zeros(()), grads, dict(model.named_buffers()))


def assert_like(ours, theirs, tolerance=1e-11):
    assert_same(state(ours), state(theirs), tolerance)


def is_node(y):
    return type(y.grad_fn).__name__ == NODE
