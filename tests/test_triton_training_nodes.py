"""Nodes of training by Triton's kernels: blocks whose backward takes the merged 1x1 gradient.

The op matrix and the kernels' own tests hold each op to its bound; here is what the node hands to
them: gradients beside those by two ops and by eager PyTorch, all against float64.
"""

from __future__ import annotations

import collections
import copy
import functools

import pytest
import torch
from torch import nn
from training_nets import Step, assert_same, gradient_like, norms, projection, replace_norms
from triton_trace import needs_interpreter, watch

import resnet_fused as rf
from resnet_fused import numerics
from resnet_fused.nn import _training_route
from resnet_fused.ops import _grad1x1
from resnet_fused.triton import _grad1x1 as rule
from resnet_fused.triton import _limits

pytestmark = [*needs_interpreter, pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")]

HALF = torch.float16
MERGED, IMAGE, WEIGHT = (f"conv_bn_{name}_kernel" for name in ("grad1x1", "dgrad", "wgrad"))


def bottleneck(projected=False):
    """32 channels in, 8 within, 32 out: conv1, conv3 and the projection are 1x1."""
    torch.manual_seed(3)
    block = rf.nn.Bottleneck(32, 8, 1, projection(32, 32) if projected else None)
    for bn in norms(block):
        with torch.no_grad():
            bn.weight.uniform_(0.5, 1.5)
            bn.bias.normal_(0, 0.2)
    with torch.no_grad():  # the oracle sees what 16 bits see
        for p in block.parameters():
            p.copy_(p.half())
    x = torch.randn(2, 32, 7, 9).half().contiguous(memory_format=torch.channels_last)
    return rf.unfuse(block).train(), x


def step(model, x, word=None):
    """A step of a model; with a word by the Triton kernels, whose launches are counted."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    names = []
    if word is None:
        out = model(x)
        out.backward(gradient_like(out))
    else:
        model = rf.fuse(model)
        with rf.backend("triton"), _grad1x1.preferring(word), watch() as launches:
            out = model(x)
            out.backward(gradient_like(out))
        names = [launch.name for launch in launches]
    grads = {"x": x.grad, **{name: p.grad for name, p in model.named_parameters()}}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    return Step(out.detach(), grads, buffers), collections.Counter(names)


def check_taken(names, merged, others):
    """So many convolutions had both gradients from one kernel, so many from two."""
    assert (names[MERGED], names[IMAGE], names[WEIGHT]) == (merged, others, others)


def check_gradients(ours, theirs, oracle):
    """Each gradient's error is at most 1.5 times that of the other way's."""
    assert ours.grads.keys() == theirs.grads.keys() == oracle.grads.keys()
    wrong = []
    for name, grad in ours.grads.items():
        found = numerics.gradient_check(grad, theirs.grads[name], oracle.grads[name])
        if not found.ratio <= found.limit * numerics.chance(grad.numel()):
            wrong.append(f"{name}: {found}")
    if wrong:  # all of them: an assertion would be cut
        raise AssertionError("; ".join(wrong))


KINDS = {
    "identity": (False, lambda block: None, (2, 1)),
    "projection": (True, lambda block: None, (3, 1)),
    "frozen in the middle": (True, lambda block: norms(block)[1].eval(), (3, 1)),
}


def made(kind):
    projected, change, taken = KINDS[kind]
    block, x = bottleneck(projected)
    change(block)
    return block.half(), x, taken


@functools.cache
def by_two(kind):
    """A step with two ops each, what it launched, and the step of float64's modules."""
    block, x, _ = made(kind)
    return *step(copy.deepcopy(block), x, "never"), step(block.double(), x.double())[0]


@functools.cache
def by_one(kind):
    block, x, _ = made(kind)
    return step(block, x, "always")


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_s_gradients(kind):
    taken = KINDS[kind][2]
    (merged, names), (two, others, oracle) = by_one(kind), by_two(kind)
    check_taken(names, *taken)
    check_taken(others, 0, sum(taken))
    assert torch.equal(merged.out, two.out)
    assert all(torch.equal(merged.buffers[name], two.buffers[name]) for name in two.buffers)
    check_gradients(merged, two, oracle)
    with pytest.raises(AssertionError):  # two ops in the place of one would be seen
        check_taken(others, *taken)


def test_weights_in_float32_get_unrounded_gradients():
    """Under autocast: the sums are the parameter's, not rounded to 16 bits first."""
    block, x = bottleneck()
    with torch.autocast("cpu", HALF):
        ours, names = step(copy.deepcopy(block), x.float(), "always")
    check_taken(names, 2, 1)
    oracle, _ = step(copy.deepcopy(block).double(), x.double())
    for name in ("conv1.weight", "conv3.weight"):
        grad = ours.grads[name]
        assert grad.dtype is torch.float32 and not torch.equal(grad, grad.half().float())
        error = (grad.double() - oracle.grads[name]).norm() / oracle.grads[name].norm()
        assert error < 2e-2


def test_the_rule_decides_by_itself():
    """288 pixels on the interpreter's four multiprocessors: conv3 saves more than its sums cost."""
    block, _ = bottleneck()
    x = torch.randn(4, 32, 8, 9).half().contiguous(memory_format=torch.channels_last)
    limits = _limits.limits(torch.device("cpu"))
    verdicts = [
        rule.choose(288, *sizes, 2, limits, masked=masked).config is not None
        for sizes, masked in (((8, 32), False), ((32, 8), True))
    ]
    assert verdicts[1]
    _, names = step(block.half(), x, "auto")
    check_taken(names, sum(verdicts), 3 - sum(verdicts))


@pytest.mark.parametrize("name", ["x", "conv3.weight", "bn2.weight"])
def test_a_fault_of_the_merged_kernel_is_seen(name, monkeypatch):
    """Of dx, of dweight, of the sums that the BatchNorm below gets."""
    from resnet_fused.triton import conv_bn_grad1x1 as kernel

    right = kernel.launch

    def wrong(*operands, **options):
        right(*operands, **options)
        dx, sums, dweight = operands[7:10]
        first = operands[3].shape[1] == 32
        if name == "x" and first:
            dx[:, 3] *= 1.25
        elif name == "bn2.weight" and not first:
            sums[1] *= 1.25
        elif name == "conv3.weight" and not first:
            dweight[5] *= 1.25

    block, x, _ = made("identity")
    monkeypatch.setattr(kernel, "launch", wrong)
    merged, _ = step(block, x, "always")
    two, _, oracle = by_two("identity")
    with pytest.raises(AssertionError, match=f"{name}: "):
        check_gradients(merged, two, oracle)


def test_shared_statistics(tmp_path, monkeypatch):
    """SyncBatchNorm with its collectives, in a group of one: the numbers of BatchNorm."""
    from torch import distributed as dist

    block, x, taken = made("projection")
    shared = replace_norms(block, lambda bn: nn.SyncBatchNorm(bn.num_features, dtype=HALF)).train()
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        monkeypatch.setattr(_training_route, "_process_group", lambda bn: dist.group.WORLD)
        ours, names = step(shared, x, "always")
    finally:
        dist.destroy_process_group()
    check_taken(names, *taken)
    alone, _ = by_one("projection")
    assert_same(ours, alone, 2.0**-9)
