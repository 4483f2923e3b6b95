"""Triton's op in traced programs: what torch.compile sees, and what an exported program holds."""

from __future__ import annotations

import copy

import pytest
import torch
from nets import images, stir, tiny_resnet
from torchvision.models.resnet import BasicBlock, Bottleneck

import resnet_fused as rf
from resnet_fused import backends
from resnet_fused.ops import _triton
from resnet_fused.triton import _limits


def graph_of(model, x):
    """The ops of the graph that torch.compile hands to its backend, and the result."""
    seen = []

    def keep(graph, _):
        seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch._dynamo.reset()
    backends.forget_choices()
    y = torch.compile(model, backend=keep, fullgraph=True)(x)
    return [str(target) for target in seen], y


def test_plain_ops_where_triton_does_not_serve():
    model, x = rf.fuse(tiny_resnet()), images()
    with torch.no_grad():
        targets, y = graph_of(model, x)
        torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-4)
    assert not any("resnet_fused" in target for target in targets)


def blocks_and_input():
    """Two bottleneck blocks, the first with a projection, and an input: quick when interpreted."""
    torch.manual_seed(0)
    conv, bn = torch.nn.Conv2d(16, 32, 1, 2, bias=False), torch.nn.BatchNorm2d(32)
    first = Bottleneck(16, 8, 2, torch.nn.Sequential(conv, bn))
    model = stir(torch.nn.Sequential(first, Bottleneck(32, 8))).eval()
    x = torch.randn(2, 16, 7, 7).contiguous(memory_format=torch.channels_last)
    return rf.fuse(model), x


@pytest.mark.interpreter
def test_tritons_op_where_it_does():
    model, x = blocks_and_input()
    with torch.no_grad(), rf.backend("triton"):
        targets, y = graph_of(model, x)
    assert sum("conv_bn_act" in target for target in targets) == 7
    assert not any("conv2d" in target for target in targets)
    with torch.no_grad():
        torch.testing.assert_close(y, rf.unfuse(model)(x), rtol=1e-4, atol=1e-4)


@pytest.mark.interpreter
def test_gradients_and_training_are_left_to_the_compiler():
    model, x = blocks_and_input()
    with rf.backend("triton"):
        targets, _ = graph_of(model, x)
        assert not any("resnet_fused" in target for target in targets)
        with torch.no_grad():
            targets, _ = graph_of(copy.deepcopy(model).train(), x)
    assert not any("resnet_fused" in target for target in targets)


@pytest.mark.interpreter
def test_exported_programs_need_no_resnet_fused():
    model, x = blocks_and_input()
    with torch.no_grad(), rf.backend("triton"):
        program = torch.export.export(model, (x,))
    assert "resnet_fused" not in str(program.graph)


@pytest.mark.interpreter
def test_a_frozen_network_is_fine_tuned_through_the_kernels():
    blocks = rf.fuse(stir(BasicBlock(16, 16)).eval())
    for name in ("bn1", "bn2"):
        getattr(blocks, name).requires_grad_(False)
    x = torch.randn(2, 16, 7, 7, requires_grad=True)
    plain = rf.unfuse(blocks)
    expected = torch.autograd.grad(plain(x).square().sum(), (x, plain.conv1.weight))
    with rf.backend("triton"), backends.recording() as routes:
        y = blocks(x)
        found = torch.autograd.grad(y.square().sum(), (x, blocks.conv1.weight))
    assert [route.implementation for route in routes] == ["triton", "triton"]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(_limits.interpreted(), reason="interpreted kernels can't be traced")
@pytest.mark.skipif(not _limits.installed(), reason="needs the triton package")
@pytest.mark.parametrize("splits", [False, True])
def test_inductor_sees_the_kernel(monkeypatch, splits):
    """On fake CUDA tensors: AOTAutograd takes the op apart into the kernel for Inductor."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch._subclasses.functional_tensor import FunctionalTensorMode, dispatch_functionalize
    from torch.fx.experimental.proxy_tensor import make_fx

    monkeypatch.setattr(_limits, "limits", lambda device: _limits.INTERPRETER_LIMITS)
    _triton.load()
    op = torch.ops.resnet_fused.conv_bn_act.triton

    def layer(x, weight, scale, shift):
        with rf.backend("triton"):
            return op(x, weight, scale, shift, None, [1, 1], [1, 1], [1, 1], 1, "relu")

    with FakeTensorMode():
        size, channels = (3, 512) if splits else (56, 64)
        x = torch.empty(1, channels, size, size, device="cuda", dtype=torch.bfloat16)
        x = x.to(memory_format=torch.channels_last)
        weight = torch.empty(64, channels, 3, 3, device="cuda", dtype=torch.bfloat16)
        scale, shift = (torch.empty(64, device="cuda") for _ in range(2))
        y = layer(x, weight, scale, shift)
        assert y.shape == (1, 64, size, size)
        assert y.is_contiguous(memory_format=torch.channels_last)
        graph = make_fx(dispatch_functionalize(layer, FunctionalTensorMode()))(
            x, weight, scale, shift
        )
    kernels = [n for n in graph.graph.nodes if "triton_kernel_wrapper" in str(n.target)]
    assert len(kernels) == (2 if splits else 1)
