"""Differentiation beyond one backward pass: forward mode, twice, torch.func. Right, or refused."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch.autograd import forward_ad

import resnet_fused as rf
from resnet_fused import backends
from resnet_fused.bench import work
from resnet_fused.bench.kernels import KINDS
from resnet_fused.bench.subject import Subject

OPS = {
    "conv_bn_act": ("3x3_8_8_at5_add", "x"),
    "conv_dgrad": ("3x3_8_8_at5", "dy"),
    "conv_wgrad": ("3x3_8_8_at5", "dy"),
    "bn_act": ("8_at5_add", "x"),
    "conv_bn_stats": ("3x3_8_8_at5", "x"),
    "conv_bn_dgrad": ("3x3_8_8_at5", "dz"),
    "conv_bn_dgrad_end": ("3x3_8_8_at5_add_noact", "dz"),
    "conv_bn_wgrad": ("3x3_8_8_at5", "dz"),
    "conv_bn_grad1x1_end": ("1x1_16_8_at5_add_noact", "dz"),
    "bn_add_act": ("8_at5_add", "y"),
    "bn_add_act_backward": ("8_at5_add", "dz"),
}
"""Op -> a call, and the operand that is differentiated."""
GRADIENTS = (
    "conv_dgrad", "conv_wgrad", "conv_bn_dgrad", "conv_bn_dgrad_end", "conv_bn_wgrad",
    "conv_bn_grad1x1_end", "bn_add_act_backward",
)  # fmt: skip


def call_of(op: str):
    """The op as a function of one operand, and that operand."""
    name, field = OPS[op]
    made = work.build(Subject("kernel", op, name, 2, "float32", "cpu"))
    run, given = KINDS[op].ours(made.case), made.sets[0]

    def call(t: torch.Tensor) -> torch.Tensor:
        out = run(dataclasses.replace(given, **{field: t}))
        return out[0] if isinstance(out, tuple) else out

    return call, getattr(given, field)


def block_and_plain():
    torch.manual_seed(0)
    fused = rf.nn.BasicBlock(8, 8).double().train()
    return fused, rf.unfuse(copy.deepcopy(fused)), torch.randn(3, 8, 5, 5, dtype=torch.float64)


def test_every_op_of_the_benchmark_is_asked():
    assert set(OPS) <= set(KINDS) and set(GRADIENTS) < set(OPS)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("op", OPS)
def test_an_op_refuses_a_tangent(op, backend):
    """Its kernels would compute the value and drop the tangent without a word."""
    call, t = call_of(op)
    with backends.backend(backend), forward_ad.dual_level():
        call(t)  # without a tangent nothing is refused
        for given in (t, t.clone().requires_grad_()):
            with pytest.raises(RuntimeError, match=f"^{op}: d?[a-z]+ carries a tangent"):
                call(forward_ad.make_dual(given, torch.ones_like(given)))
    refused = "carries a tangent|no derivative|setup_context"
    with backends.backend(backend), pytest.raises(RuntimeError, match=refused):
        torch.func.jvp(call, (t,), (torch.ones_like(t),))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("op", OPS)
def test_an_op_has_no_second_derivative(op, backend):
    call, t = call_of(op)
    t = t.clone().requires_grad_()
    why = "no derivative of its own" if op in GRADIENTS else "differentiate twice"

    def twice() -> None:
        (grad,) = torch.autograd.grad(call(t).square().sum(), t, create_graph=True)
        grad.sum().backward()

    with backends.backend(backend), pytest.raises(RuntimeError, match=why):
        twice()
    with backends.backend(backend), pytest.raises(RuntimeError, match="derivative|setup_context"):
        torch.func.grad(lambda t: call(t).sum())(t.detach())


def test_a_block_has_no_second_derivative():
    fused, _, x = block_and_plain()
    x.requires_grad_()
    (grad,) = torch.autograd.grad(fused(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


@pytest.mark.parametrize("recorded", [True, False])
def test_a_block_in_forward_mode_is_its_modules(recorded):
    """The tangent is PyTorch's, and explain says who computed it."""
    fused, plain, x = block_and_plain()
    found = []
    for block in (fused, plain):
        with torch.set_grad_enabled(recorded), forward_ad.dual_level():
            with backends.recording() as routes:
                y = block(forward_ad.make_dual(x, x.cos()))
            found.append(forward_ad.unpack_dual(y))
            if block is fused:
                assert {route.implementation for route in routes} == {"modules"}
                assert all("forward-mode" in route.why for route in routes)
    torch.testing.assert_close(found[0].tangent, found[1].tangent)
    torch.testing.assert_close(found[0].primal, found[1].primal)
    for (name, ours), theirs in zip(fused.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)
    with backends.recording() as routes:
        fused(x)
    assert {route.op for route in routes} == {"conv_bn_stats"}


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
@pytest.mark.parametrize("counts", [True, False])
def test_a_block_under_torch_func_does_as_its_modules(transform, counts):
    """PyTorch's BatchNorm refuses where it would write running statistics; without any it works."""
    fused, plain, x = block_and_plain()
    run = {
        "grad": lambda block: torch.func.grad(lambda t: block(t).square().sum())(x),
        "vmap": lambda block: torch.func.vmap(block)(torch.stack((x, x + 1))),
        "jvp": lambda block: torch.func.jvp(block, (x,), (x.cos(),))[1],
    }[transform]
    if not counts:
        for block in (fused, plain):
            torch.func.replace_all_batch_norm_modules_(block)
        torch.testing.assert_close(run(fused), run(plain))
        return
    said = []
    for block in (plain, fused):
        with pytest.raises(RuntimeError) as caught:
            run(block)
        said.append(str(caught.value))
    assert said[0] == said[1]
