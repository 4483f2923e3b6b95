"""Blocks in a row: an end made with the next block's first convolution, and when it is not.

The kernel's own numbers are held in `test_triton_block_end`; here are the nodes and what they hand
on, each beside the same blocks called one by one, which hand on nothing.
"""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, Bottleneck
from training_nets import gradient_like, norms

import resnet_fused as rf
from resnet_fused import backends
from resnet_fused.nn import _blocks, _training_block, _training_route
from resnet_fused.nn import _training as node
from resnet_fused.ops import _block_end, _training
from resnet_fused.triton import _limits, _tiles

OP = "bn_add_act_conv_stats"
H200 = _tiles.Limits(132, 232448, 90)


def row(count=3, **options):
    """Bottlenecks of 64 channels in and out, the first one projected."""
    torch.manual_seed(5)
    down = nn.Sequential(nn.Conv2d(16, 64, 1, 2, bias=False), nn.BatchNorm2d(64))
    blocks = [Bottleneck(16, 16, 2, down), *(Bottleneck(64, 16) for _ in range(count - 1))]
    model = nn.Sequential(*blocks).train()
    for bn in norms(model):
        with torch.no_grad():
            bn.weight.uniform_(0.5, 1.5)
            bn.bias.normal_(0, 0.2)
    return rf.fuse(model)


def images(dtype=torch.float32):
    return torch.randn(2, 16, 9, 9).to(dtype)


def one_by_one(model, x):
    for block in model:
        x = block(x)
    return x


def step(model, x, call=None, *, word="reference", autocast=False):
    """Output, gradients and buffers of a step of a copy, and the ops that it ran."""
    model, x = copy.deepcopy(model), x.clone().requires_grad_()
    with rf.backend(word), watched() as ran:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = model(x) if call is None else call(model, x)
        forward = list(ran)
        out.backward(gradient_like(out))
    grads = [x.grad, *(p.grad for p in model.parameters())]
    return [out.detach(), *grads, *model.buffers()], forward


@contextlib.contextmanager
def watched():
    """The names of the ops that nodes run."""
    found, real = [], _training.overload

    def overload(op, name):
        def run(*arguments):
            found.append(op)
            return real(op, name)(*arguments)

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_training, "overload", overload)
        backends.forget_choices()  # nodes keep the overloads that they have found
        yield found
    backends.forget_choices()


def same(one, other):
    assert len(one) == len(other)
    return all(
        (a is None) == (b is None) and (a is None or torch.equal(a, b))
        for a, b in zip(one, other, strict=True)
    )


def check(model, x, folded, call=None, **options):
    """The bits of the blocks one by one, and so many ends made with a convolution."""
    ours, ran = step(model, x, call, **options)
    theirs, plain = step(model, x, one_by_one, **options)
    assert same(ours, theirs)
    assert (ran.count(OP), plain.count(OP)) == (folded, 0)
    assert ran.count("conv_bn_stats") + folded == plain.count("conv_bn_stats")
    assert ran.count("bn_add_act") + folded == plain.count("bn_add_act")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_row_has_the_bits_of_its_blocks(dtype):
    check(row().to(dtype), images(dtype), 2)


def test_autocast():
    check(row(), images(), 2, autocast=True)


def test_a_projection_within_the_row_reads_out_after_it_is_made():
    model = row(2)
    down = nn.Sequential(nn.Conv2d(64, 32, 1, 2, bias=False), nn.BatchNorm2d(32))
    tail = rf.fuse(nn.Sequential(Bottleneck(64, 8, 2, down), Bottleneck(32, 8)).train())
    check(type(model)(*model, *tail), images(), 3)


def test_a_block_twice_in_a_row():
    """One module, two places: each hands on to the next call, not to itself."""
    model = row(2)
    model.append(model[1])
    check(model, images(), 2)


def test_a_step_without_gradients():
    ours, theirs = copy.deepcopy(row()), copy.deepcopy(row())
    x = images()
    with rf.backend("reference"), torch.no_grad(), watched() as ran:
        assert torch.equal(ours(x), one_by_one(theirs, x))
    assert ran.count(OP) == 2
    assert same(list(ours.buffers()), list(theirs.buffers()))


def test_the_padded_and_the_basic_have_none():
    model = rf.fuse(nn.Sequential(BasicBlock(16, 16), BasicBlock(16, 16)).train())
    check(model, images(), 0)


def freeze(model):
    model[1].bn1.eval()


def hook(*path):
    def add(model):
        module = model
        for name in path:
            module = module[name] if isinstance(name, int) else getattr(module, name)
        module.register_forward_hook(lambda *_: None)

    return add


def pre_hook(model):
    model[1].register_forward_pre_hook(lambda module, given: (given[0] * 2,))


def strided(model):
    model[1].conv1.stride = (1, 1)
    model[1].conv1.padding = (1, 1)
    model[1].conv2.padding = (0, 0)


def biased(model):
    model[1].conv1.bias = nn.Parameter(torch.ones(16))


@pytest.mark.parametrize(
    ("change", "left"),
    [
        (freeze, 1), (hook(1), 0), (hook(1, "conv1"), 0), (hook(1, "relu"), 0), (hook(1, "bn1"), 0),
        (hook(1, "conv3"), 0), (hook(2), 1), (hook(0), 1), (pre_hook, 0), (strided, 1), (biased, 0),
    ],
    ids=lambda v: getattr(v, "__name__", None),
)  # fmt: skip
def test_who_could_see_or_change_it_gets_the_output_first(change, left):
    model = row()
    change(model)
    check(model, images(), left)


def test_a_layer_between_two_blocks():
    model = row(2)
    check(type(model)(model[0], nn.ReLU(), model[1]), images(), 0)


def test_who_looks_in_between_is_handed_nothing():
    """A generator's caller may change what it is given before it asks for more."""
    x = images()

    def doubled(blocks, y):
        for block in blocks:
            y = block(y)
            y.mul_(2)
        return y

    ours, theirs = row(), row()
    with rf.backend("reference"), watched() as ran, torch.no_grad():
        for _, y in _blocks.run_in_order(ours._modules.items(), x):
            y.mul_(2)
        assert torch.equal(y, doubled(theirs, x))
    assert OP not in ran
    named = _blocks.run_in_order(row()._modules.items(), x, frozenset({"0"}))
    with rf.backend("reference"), watched() as ran:
        list(named)
    assert OP not in ran


def test_evaluation_and_the_cpu_have_none():
    model = row()
    with rf.backend("reference"), watched() as ran:
        copy.deepcopy(model).eval()(images())
    assert OP not in ran
    if any(entry.name == "cpu" for entry in backends.implementations("conv_bn_stats")):
        ran = step(model, images(), word="cpu")[1]
        assert OP not in ran


def test_a_failure_behind_a_block_leaves_nothing_behind(monkeypatch):
    """The next forward takes nothing of what the failed one had made."""
    model, x, calls = row(), images(), []
    real = node.run

    def fails(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise MemoryError
        return real(*arguments)

    tried = copy.deepcopy(model)
    with pytest.MonkeyPatch.context() as patch, rf.backend("reference"):
        patch.setattr(node, "run", fails)
        with pytest.raises(MemoryError):
            tried(x)
    left = calls[1][4].made
    assert left is not None and left.y.isfinite().all()
    assert tried[1].bn1.num_batches_tracked == 0 and tried[0].bn3.num_batches_tracked == 1
    for ours, fresh in zip(tried.buffers(), model.buffers(), strict=True):
        ours.copy_(fresh)
    assert same(step(tried, x)[0], step(model, x)[0])


def test_one_value_a_channel_is_the_next_block_s_to_report():
    """The first block has run by then, as without a row."""
    model = row(2)
    down = nn.Sequential(nn.Conv2d(64, 64, 1, 2, bias=False), nn.BatchNorm2d(64))
    model[1] = rf.fuse(Bottleneck(64, 16, 2, down).train())
    with rf.backend("reference"), pytest.raises(ValueError, match="more than 1 value"):
        model(torch.randn(1, 16, 3, 4))
    assert model[0].bn3.num_batches_tracked == 1 and model[1].bn1.num_batches_tracked == 0


def test_only_the_very_tensor_is_taken():
    row, out, made, end = _training_block.Row(), torch.ones(1), object(), object()
    way = _block_end.Way(True, "because")
    nothing = (None, _training_route.NO_WAY, None)
    for x, dtype, found in (
        (out, out.dtype, (made, way, end)),
        (out.clone(), out.dtype, nothing),
        (out, torch.float64, nothing),
    ):
        row.leave(out, made, way, end)
        assert row.take(x, dtype) == found
        assert row.take(x, dtype)[0] is None  # once


def test_what_autograd_keeps_is_whole_when_it_is_packed():
    """Hooks that copy what is saved (offloading) copy no memory that is yet to be filled."""

    def copied(model, x):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
            return model(x)

    check(row(), images(), 2, copied)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant):
    def whole(model, x):
        return checkpoint(model, x, use_reentrant=reentrant)

    model, x = row(), images()
    ours, ran = step(model, x, whole)
    theirs, _ = step(model, x, lambda m, x: checkpoint(one_by_one, m, x, use_reentrant=reentrant))
    assert same(ours, theirs) and ran.count(OP) == 2


def test_a_second_backward():
    model, x = row(), images().requires_grad_()
    with rf.backend("reference"):
        out = model(x)
        first = torch.autograd.grad(out, model[0].conv1.weight, torch.ones_like(out), True)
        again = torch.autograd.grad(out, model[0].conv1.weight, torch.ones_like(out))
    assert torch.equal(first[0], again[0])
    with pytest.raises(RuntimeError, match="second time"):
        out.backward(torch.ones_like(out))


def test_a_weight_changed_in_between_is_an_error():
    """As in eager: backward needs the weight that forward took."""
    model, x = row(), images()
    with rf.backend("reference"):
        out = model(x)
        with torch.no_grad():
            model[1].conv1.weight.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_gradients_are_there_as_soon_as_their_block_is_done():
    """What DDP's buckets wait for: those of a later block before an earlier one's backward."""
    model, seen = row(), []
    for index, block in enumerate(model):
        for p in block.parameters():
            p.register_post_accumulate_grad_hook(lambda _, index=index: seen.append(index))
    with rf.backend("reference"):
        model(images()).sum().backward()
    assert seen == sorted(seen, reverse=True) and set(seen) == {0, 1, 2}


def test_explain_says_so():
    model = row()
    with rf.backend("reference"), backends.recording() as routes:
        model(images())
    said = {route.conv: route.why for route in routes if "end of the block" in route.why}
    assert set(said) == {model[1].conv1, model[2].conv1}
    text = f"with the end of the block before it by one op ({OP}): the reference is asked for"
    assert all(text in why for why in said.values())


# By whose word


@pytest.fixture
def asked(monkeypatch):
    """way() for a block of ResNet-50 on a pretended H200."""

    def choose(call):
        known = {entry.name: entry for entry in backends.implementations(call.op)}
        return backends.Choice(known["triton"], "pretended")

    monkeypatch.setattr(backends, "choose", choose)
    monkeypatch.setattr(_limits, "limits", lambda device: H200)

    def ask(out=(64, 256, 56, 56), weight=(64, 256, 1, 1), geometry=None, **options):
        geometry = geometry or ([1, 1], [0, 0], [1, 1], 1)
        given = {"folds": True, "projected": False, **options}
        return _block_end.way(torch.device("cpu"), torch.bfloat16, out, weight, geometry, **given)

    yield ask
    _block_end._word.cache_clear()


def test_what_is_predicted_to_win_is_taken(asked):
    assert asked().folded and asked().why.startswith("102.8 MB less through memory")
    assert not asked((256, 2048, 7, 7), (512, 2048, 1, 1)).folded
    assert asked(folds=False) == _training_route.NO_WAY
    for weight, geometry in (
        ((64, 256, 3, 3), ([1, 1], [1, 1], [1, 1], 1)),
        ((64, 256, 1, 1), ([2, 2], [0, 0], [1, 1], 1)),
        ((64, 128, 1, 1), ([1, 1], [0, 0], [1, 1], 2)),
    ):
        assert asked(weight=weight, geometry=geometry) == _training_route.NO_WAY
    assert asked((64, 200, 56, 56), (64, 200, 1, 1)).why == (
        "200 channels and 64 filters are no multiples of 16"
    )


def test_the_environment_s_word_comes_first(asked, monkeypatch):
    lost = (256, 2048, 7, 7), (512, 2048, 1, 1)
    for word, taken in (("never", (False, False)), ("always", (True, True)), ("", (True, False))):
        monkeypatch.setenv(_block_end.ENVIRONMENT, word)
        _block_end._word.cache_clear()
        assert (asked().folded, asked(*lost).folded) == taken, word
    with _block_end.preferring("never"):
        assert not asked().folded
    monkeypatch.setenv(_block_end.ENVIRONMENT, "always")
    _block_end._word.cache_clear()
    assert not asked((64, 200, 56, 56), (64, 200, 1, 1)).folded  # no word makes it fit
    monkeypatch.setenv(_block_end.ENVIRONMENT, "yes")
    _block_end._word.cache_clear()
    with pytest.raises(ValueError, match="RESNET_FUSED_BLOCK_END is 'yes'; accepted are auto, nev"):
        asked()


def test_a_refused_kernel_leaves_it_to_two(asked, monkeypatch):
    known = {entry.name: entry for entry in backends.implementations(OP)}
    refused = backends.Choice(known["reference"], "?", (("triton", "not admitted: because"),))
    monkeypatch.setattr(backends, "choose", lambda call: refused)
    assert asked() == (False, "not admitted: because")
