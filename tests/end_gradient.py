"""Rows of blocks whose gradients between them one op makes: steps of them, and what these ran."""

from __future__ import annotations

import copy
import functools

import torch
from test_training_row import one_by_one, same, watched
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from training_nets import gradient_like, norms, padded, projection

import resnet_fused as rf
from resnet_fused.ops import _end_gradient

OP, UNITED = _end_gradient.OP, _end_gradient.UNITED
PASS = "bn_add_act_backward"
F64 = torch.float64


def step(model, x, call=None, backward=None, *, autocast=False):
    """Gradients and buffers of a step of a copy by the references, and the ops of backward."""
    model, x = copy.deepcopy(model), x.clone().requires_grad_()
    with rf.backend("reference"), watched() as ran:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = model(x) if call is None else call(model, x)
        ran.clear()
        if backward is None:
            out.backward(gradient_like(out))
        else:
            backward(out)
    return [x.grad, *(p.grad for p in model.parameters()), *model.buffers()], list(ran)


def counts(ran):
    """Of the gradients between blocks, and of the passes in their place."""
    return ran.count(OP) + ran.count(UNITED), ran.count(PASS)


def check(model, x, ended, passes=None, call=None, backward=None, **options):
    """The bits of the blocks one by one; so many gradients from one op, and passes of their own."""
    alone = functools.partial(called, call)
    ours, ran = step(model, x, call, backward, **options)
    theirs, plain = step(model, x, alone, backward, **options)
    assert same(ours, theirs)
    blocks = len(model)
    assert counts(plain) == (0, blocks)
    assert counts(ran) == (ended, blocks - ended if passes is None else passes)


def called(call, model, x):
    """What `call` does, with blocks that are called one by one."""
    return one_by_one(model, x) if call is None else call(functools.partial(one_by_one, model), x)


def basic(count=3):
    blocks = [BasicBlock(6, 8, 2, projection(6, 8, 2)), *(BasicBlock(8, 8) for _ in range(2))]
    return nn.Sequential(*blocks[:count]), (3, 6, 7, 6)


def bottlenecks():
    blocks = [Bottleneck(8, 4, 2, projection(8, 16, 2)), Bottleneck(16, 4), Bottleneck(16, 4)]
    return nn.Sequential(*blocks), (3, 8, 7, 6)


def projected_within():
    """Two projections: what the later one's adds, and what the earlier one's reduces."""
    blocks = [
        Bottleneck(8, 4, 1, projection(8, 16)), Bottleneck(16, 2, 2, projection(16, 8, 2)),
        Bottleneck(8, 2),
    ]  # fmt: skip
    return nn.Sequential(*blocks), (2, 8, 6, 7)


def padded_first():
    return nn.Sequential(padded(2, 2), rf.nn.BasicBlock(10, 10)), (3, 6, 7, 5)


def plain_network():
    blocks = [rf.nn.BasicBlock(6, 9, 2, residual=False), rf.nn.BasicBlock(9, 9, residual=False)]
    return nn.Sequential(*blocks), (3, 6, 7, 5)


def grouped():
    return nn.Sequential(Bottleneck(16, 4, groups=4, base_width=64), Bottleneck(16, 4)), (
        2, 16, 5, 5,
    )  # fmt: skip


ROWS = {
    "basic": basic, "bottlenecks": bottlenecks, "projected within": projected_within,
    "padded first": padded_first, "plain": plain_network, "grouped": grouped,
}  # fmt: skip


def build(name, dtype=F64):
    torch.manual_seed(4)
    model, shape = ROWS[name]()
    model = rf.unfuse(model).to(dtype).train()
    for bn in norms(model):
        with torch.no_grad():
            bn.weight.uniform_(0.5, 1.5)
            bn.bias.normal_(0, 0.2)
    return model, torch.randn(shape, dtype=dtype)
