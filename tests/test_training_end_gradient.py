"""The gradient between two blocks in a row from one op, and every way in which it must not be.

The op's own numbers are held in `test_ops_dgrad_end`; here are the nodes and what passes between
them in backward, beside the same blocks called one by one and beside the modules in float64.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import gc
import threading
import weakref

import pytest
import torch
from test_training_row import images, one_by_one, row, same, watched
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, Bottleneck
from training_nets import assert_same, gradient_like, kept_bytes, norms, padded, projection, steps
from training_nets import step as plain_step

import resnet_fused as rf
from resnet_fused import backends, cases, roofline
from resnet_fused.bench.nodes import by_triton, nodes, traffic
from resnet_fused.nn import _training as node
from resnet_fused.nn import _training_junction as junctions
from resnet_fused.nn import _training_route
from resnet_fused.ops import _end_gradient, _training
from resnet_fused.triton import _tiles

OP = _end_gradient.OP
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
    return ran.count(OP), ran.count(PASS)


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


# Numbers


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


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_float64_is_the_modules(name, layout):
    model, x = build(name)
    with watched() as ran:
        assert_same(*steps(model, x.contiguous(memory_format=layout), "reference"), 1e-11)
    assert counts(ran) == (len(model) - 1, 1)


@pytest.mark.parametrize("place", [0, 1])
def test_a_wrong_result_of_it_is_seen(monkeypatch, place):
    """By autograd's own way for the gradient, beside it for the reductions."""
    real = _training.overload

    def wrong(op, name):
        def run(*arguments):
            found = real(op, name)(*arguments)
            return tuple(t * (1 + 1e-6 * (i == place)) for i, t in enumerate(found))

        return run if op == OP else real(op, name)

    model, x = build("bottlenecks")
    monkeypatch.setattr(_training, "overload", wrong)
    backends.forget_choices()
    with pytest.raises(AssertionError, match="gradient of"):
        assert_same(*steps(model, x, "reference"), 1e-11)
    backends.forget_choices()


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16], ids=str)
def test_a_row_has_the_bits_of_its_blocks(dtype):
    check(row().to(dtype), images(dtype), 2)


def test_autocast():
    check(row(), images(), 2, autocast=True)


def test_mixed_layouts():
    """A channels_last weight alone does not change how the gradient between two blocks lies."""
    model = row()
    model[1].conv1.to(memory_format=torch.channels_last)
    x = images()
    ours, ran = step(model, x)
    theirs, _ = step(model, x, one_by_one)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert counts(ran) == (2, 1)


@pytest.mark.parametrize("which", ["bn1", "bn3", "downsample.1", "all of a block"])
def test_frozen_normalisations(which):
    model, x = build("bottlenecks")
    if which == "all of a block":
        for bn in norms(model[0]):
            bn.eval()  # then it is no node, and leads nobody
    else:
        model[0].get_submodule(which).eval()
    with watched() as ran:
        assert_same(*steps(model, x, "reference"), 1e-11)
    assert counts(ran)[0] == (1 if which == "all of a block" else 2)


def test_a_block_twice_in_a_row():
    model = row(2)
    model.append(model[1])
    check(model, images(), 2)


# Who else has to do with the tensor between


def between(out, place=1):
    """What lies in front of the last block but so many, found by the graph, and its node."""
    found = out
    for _ in range(place):
        found = found.grad_fn.saved_tensors[0]
    return found


def test_a_hook_on_it_sees_the_whole_gradient():
    seen = []

    def backward(out):
        between(out).register_hook(lambda g: seen.append(g.clone()))
        out.backward(gradient_like(out))

    check(row(), images(), 1, backward=backward)
    assert torch.equal(*seen) and (seen[0] != 0).all()


def test_a_hook_may_change_it():
    def backward(out):
        between(out).register_hook(lambda g: g * 3 + 1)
        out.backward(gradient_like(out))

    check(row(), images(), 1, backward=backward)


def test_a_hook_that_is_gone_is_none():
    def backward(out):
        between(out).register_hook(lambda g: g * 3).remove()
        out.backward(gradient_like(out))

    check(row(), images(), 2, backward=backward)


def test_a_gradient_that_is_retained():
    seen = []

    def backward(out):
        t = between(out)
        t.retain_grad()
        out.backward(gradient_like(out))
        seen.append(t.grad)

    check(row(), images(), 1, backward=backward)
    assert torch.equal(*seen) and (seen[0] != 0).all()


def consumed(out, elsewhere):
    """A step in which what lies between is used once more, behind the blocks.

    Args:
        out: of the blocks.
        elsewhere: made by another thread, whose nodes count anew: its gradient comes last, and is
            added in place, since nobody else holds the one that has come.
    """
    t, found = between(out), []

    def consume():
        found.append((t.square() * gradient_like(t)).sum())

    thread = threading.Thread(target=consume)
    run = thread.start if elsewhere else consume
    run()
    if elsewhere:
        thread.join()
    ((out * gradient_like(out)).sum() + found[0]).backward()


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_second_consumer(elsewhere):
    """Its gradient is added to one that is masked: the pass runs, and masks and reduces the sum."""
    check(row(), images(), 2, 2, backward=lambda out: consumed(out, elsewhere))


def test_a_second_consumer_without_the_version_would_be_seen(monkeypatch):
    def take(self, dout):
        left, self._left = self._left, None
        return None if left is None or left[0]() is not dout else left[2]

    monkeypatch.setattr(junctions.Junction, "take", take)
    with pytest.raises(AssertionError):
        check(row(), images(), 2, 2, backward=lambda out: consumed(out, True))


@pytest.mark.parametrize("change", [lambda g: g.mul_(2), lambda g: g * 2, lambda g: g.clone()])
def test_a_node_s_hook_that_gives_another_gradient(change):
    """Masked or not, what such a hook scales comes out the same."""

    def backward(out):
        between(out).grad_fn.register_prehook(lambda given: (change(given[0]),))
        out.backward(gradient_like(out))

    check(row(), images(), 2, 2, backward=backward)


def test_only_the_very_tensor_is_taken_and_once():
    junction, sums = junctions.Junction(), torch.ones(2, 3)
    dz = torch.ones(4)
    assert junction.take(dz) is None
    for other in (torch.ones(4), dz.clone(), dz.detach(), dz.view(4)):
        junction.leave(dz, sums)
        assert junction.take(other) is None
    junction.leave(dz, sums)
    assert junction.take(dz) is sums and junction.take(dz) is None
    junction.leave(dz, sums)
    dz.add_(1)
    assert junction.take(dz) is None
    junction.leave(dz, sums)
    place = weakref.ref(dz)
    del dz, other
    assert place() is None, "the junction holds nobody"
    assert junction.take(torch.ones(4)) is None
    with torch.inference_mode():
        dz = torch.ones(4)
        junction.leave(dz, sums)
        assert junction.take(dz) is None


# Autograd


def test_a_graph_that_is_kept():
    def backward(out):
        for keep in (True, True, False):
            out.backward(gradient_like(out), retain_graph=keep)
        with pytest.raises(RuntimeError, match="second time"):
            out.backward(gradient_like(out))

    ours, ran = step(row(), images(), None, backward)
    theirs, _ = step(row(), images(), one_by_one, backward)
    assert same(ours, theirs) and counts(ran) == (6, 3)


def test_a_second_derivative_raises():
    model, x = row(), images().requires_grad_()
    with rf.backend("reference"):
        out = model(x)
        dout = gradient_like(out).requires_grad_()
        (grad,) = torch.autograd.grad(out, x, dout, create_graph=True)
        theirs = one_by_one(copy.deepcopy(model), x)
        (plain,) = torch.autograd.grad(theirs, x, gradient_like(out))
    torch.testing.assert_close(grad.detach(), plain)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant):
    """Packed tensors are left alone: it takes no op there. A re-entrant one has nothing packed."""

    def whole(model, x):
        return checkpoint(model, x, use_reentrant=reentrant)

    ours, ran = step(row(), images(), whole)
    theirs, _ = step(row(), images(), functools.partial(called, whole))
    assert same(ours, theirs) and counts(ran) == ((2, 1) if reentrant else (0, 3))


def test_what_is_packed_is_packed_no_more_often():
    def packed(call):
        found = []

        def pack(t):
            found.append(t.shape)
            return t.clone()

        def run(model, x):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                return call(model, x)

        ours, ran = step(row(), images(), run)
        return ours, ran, found

    ours, ran, found = packed(lambda model, x: model(x))
    theirs, _, plain = packed(one_by_one)
    assert same(ours, theirs) and len(found) == len(plain) and counts(ran) == (0, 3)


def test_nothing_more_is_kept(monkeypatch):
    """The later node keeps what the earlier one keeps anyway."""
    model, x = row(), images().requires_grad_()
    monkeypatch.setattr("resnet_fused.nn._training_block.packs", lambda: False)
    with rf.backend("reference"):
        plain = kept_bytes(nn.Sequential(*copy.deepcopy(model)), x)
        assert kept_bytes(model, x) == plain
        assert model(x).grad_fn.gives is not None


@pytest.mark.parametrize("how", ["backward", "none", "in part", "failed"])
def test_all_of_it_is_given_back(monkeypatch, how):
    """By reference counts alone: there is no cycle that waits for the collector."""
    model, x, alive = row(), images().requires_grad_(), []
    real = node._Forward.computed

    def computed(self, residual):
        out = real(self, residual)
        alive.extend(weakref.ref(t) for t in (out, *self.raw, *(n.rows for n in self.norms)))
        return out

    monkeypatch.setattr(node._Forward, "computed", computed)
    gc.collect()
    gc.disable()
    try:
        with rf.backend("reference"):
            out = model(x)
            if how == "backward":
                out.backward(torch.ones_like(out))
                assert sum(ref() is not None for ref in alive) == 1  # out itself
            elif how == "in part":
                torch.autograd.grad(out, model[2].conv1.weight, torch.ones_like(out))
            elif how == "failed":
                handle = between(out).grad_fn.register_prehook(lambda given: 1 / 0)
                with contextlib.suppress(ZeroDivisionError):
                    out.backward(torch.ones_like(out))
                handle.remove()
                del handle
        del out
        assert len(alive) > 9 and [ref() for ref in alive if ref() is not None] == []
    finally:
        gc.enable()


def test_gradients_of_some():
    """A part of the graph at a time: what one pass left, another one does not find."""
    results = []
    for call in (None, one_by_one):
        model, x = row(), images().requires_grad_()
        with rf.backend("reference"):
            out = model(x) if call is None else call(model, x)
            wanted = [model[2].conv1.weight, model[1].conv1.weight, x]
            found = [
                torch.autograd.grad(out, t, gradient_like(out), retain_graph=True)[0]
                for t in (*wanted, *wanted)
            ]
            results.append([*found, *torch.autograd.grad(out, wanted, gradient_like(out))])
    assert same(*results)
    ours = results[0]
    assert all(torch.equal(ours[i], ours[i + 3]) for i in range(3)) and same(ours[:3], ours[6:])


def test_an_input_that_needs_no_gradient():
    """Nor do the parameters of the first block: nothing lies between that has one."""
    results = []
    for call in (None, one_by_one):
        model = row()
        model[0].requires_grad_(False)
        with rf.backend("reference"), watched() as ran:
            x = images()
            out = model(x) if call is None else call(model, x)
            out.backward(gradient_like(out))
        results.append([p.grad for p in model.parameters()])
        assert counts(ran) == ((1, 1) if call is None else (0, 2))
        assert between(model(x)).grad_fn.gives is None, "nothing is kept for nobody"
    assert same(*results)


def test_without_gradients_nothing_is_left(monkeypatch):
    left = []
    real = node.Neighbours

    def neighbours(*arguments, **options):
        left.append(real(*arguments, **options))
        return left[-1]

    monkeypatch.setattr(node, "Neighbours", neighbours)
    with rf.backend("reference"), torch.no_grad():
        row()(images())
    assert len(left) == 3 and not any(n.leads or n.end or n.before for n in left)


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_anomaly_mode():
    with torch.autograd.detect_anomaly(check_nan=True):
        check(row(), images(), 2)


# Which blocks


class Looks(nn.Module):
    """A module that gives what it is given, and keeps it."""

    def forward(self, x):
        self.seen = x
        return x


def test_who_looks_in_between_gets_the_whole_gradient():
    seen = []
    for call in (None, one_by_one):
        model = row(2)
        model = type(model)(model[0], Looks(), model[1])
        with rf.backend("reference"), watched() as ran:
            out = model(images()) if call is None else call(model, images())
            between = model[1].seen
            seen.append(torch.autograd.grad(out, between, gradient_like(out))[0])
        assert OP not in ran
    assert torch.equal(*seen) and (seen[0] != 0).all()


def hook(model):
    model[1].register_forward_hook(lambda *_: None)


def backward_hook(model):
    model[1].register_full_backward_hook(lambda *_: None)


def other_shortcut(model):
    """Its module reads what lies between, too, and adds a gradient of its own."""
    model[1].downsample = nn.Sequential(nn.AvgPool2d(1), nn.Conv2d(64, 64, 1, bias=False))


@pytest.mark.parametrize(
    ("change", "ended"), [(hook, 0), (backward_hook, 0), (other_shortcut, 1)],
    ids=lambda v: getattr(v, "__name__", None),
)  # fmt: skip
def test_who_could_see_it_gets_the_whole_gradient(change, ended):
    model, x = row(), images()
    change(model)
    ours, ran = step(model, x)
    theirs, _ = step(model, x, one_by_one)
    assert same(ours, theirs) and ran.count(OP) == ended


@pytest.mark.parametrize(("name", "ended"), [("bn1", 2), ("bn3", 1), ("downsample.1", 1)])
def test_sums_of_several_processes_are_left_to_their_node(monkeypatch, name, ended):
    """Pretended: a group whose exchange gives back what it is given."""
    model, group = row(), object()
    module = model[0].get_submodule(name)
    real = _training_route._process_group
    monkeypatch.setattr(
        _training_route, "_process_group", lambda bn: group if bn is module else real(bn)
    )
    monkeypatch.setattr(node, "_gathered", lambda stats, count, group: (stats, None))
    monkeypatch.setattr(node, "_reduced", lambda sums, layer: None)
    shared = copy.deepcopy
    monkeypatch.setattr(copy, "deepcopy", lambda t: t if t is model else shared(t))
    _, ran = step(model, images())
    assert counts(ran) == (ended, 3 - ended)


def test_the_cpu_s_own_way_and_evaluation_have_none():
    model, x = build("bottlenecks")
    with watched() as ran:
        plain_step(rf.fuse(copy.deepcopy(model)), x, "cpu")
        plain_step(rf.fuse(copy.deepcopy(model)).eval(), x, "reference")
    assert OP not in ran


# By whose word


def test_explain_says_so():
    model = row()
    with rf.backend("reference"), backends.recording() as routes:
        model(images())
    said = {route.conv: route.why for route in routes if "gradient of the end" in route.why}
    assert set(said) == {model[1].conv1, model[2].conv1}
    text = f"gradient of the end of the block before it by one op ({OP}): the reference is asked"
    assert all(text in why and "both gradients" not in why for why in said.values())


PLACE = _end_gradient.Place(
    torch.device("cpu"), torch.bfloat16, (64, 256, 56, 56), (64, 256, 1, 1),
    ([1, 1], [0, 0], [1, 1], 1), False, True,
)  # fmt: skip


@pytest.fixture
def asked(monkeypatch):
    """way() with a pretended Triton kernel, which takes even numbers of filters, at best 128."""

    def choose(call):
        known = {entry.name: entry for entry in backends.implementations(call.op)}
        return backends.Choice(dataclasses.replace(known["reference"], name="triton"), "pretended")

    def refusal(place):
        return None if place.weight[0] % 2 == 0 else "odd"

    def verdict(place):
        return place.weight[0] <= 128, f"{place.weight[0]} filters"

    monkeypatch.setattr(backends, "choose", choose)
    monkeypatch.setitem(_end_gradient.ENDING, "triton", _end_gradient.Kernel(refusal, verdict))

    def ask(filters=64, folds=True):
        place = PLACE._replace(weight=(filters, 256, 1, 1))
        return _end_gradient.way(place, folds=folds)

    _end_gradient._word.cache_clear()
    yield ask
    _end_gradient._word.cache_clear()


def test_what_a_kernel_is_predicted_to_win_is_taken(asked):
    assert asked() == (True, "64 filters") and asked().how == f"one op ({OP})"
    assert asked(256) == (False, "256 filters") and asked(256).how == "two ops"
    assert asked(63) == (False, "odd")
    assert asked(folds=False) == (False, "")
    for word, ways in (("reference", True), ("cuda", False), ("cpu", False), ("triton", True)):
        with rf.backend(word):
            assert asked().ended is ways, word


def test_the_environment_s_word_comes_first(asked, monkeypatch):
    for word, taken in (("never", (False, False)), ("always", (True, True)), ("", (True, False))):
        monkeypatch.setenv(_end_gradient.ENVIRONMENT, word)
        _end_gradient._word.cache_clear()
        assert (asked().ended, asked(256).ended) == taken, word
    with _end_gradient.preferring("never"):
        assert not asked().ended
    monkeypatch.setenv(_end_gradient.ENVIRONMENT, "always")
    _end_gradient._word.cache_clear()
    assert not asked(63).ended  # no word makes it fit
    monkeypatch.setenv(_end_gradient.ENVIRONMENT, "yes")
    _end_gradient._word.cache_clear()
    text = "RESNET_FUSED_BLOCK_END_GRADIENT is 'yes'; accepted are auto, never"
    with pytest.raises(ValueError, match=text):
        asked()


def test_a_refused_kernel_leaves_it_to_two(asked, monkeypatch):
    entry = next(e for e in backends.implementations(OP) if e.name == "reference")
    refused = backends.Choice(entry, "?", (("triton", "not admitted: because"), ("cuda", "no")))
    monkeypatch.setattr(backends, "choose", lambda call: refused)
    assert asked() == (False, "not admitted: because")


def test_without_a_kernel_nothing_is_said():
    assert not _end_gradient.ENDING
    assert _end_gradient.way(PLACE, folds=True) == _training_route.NO_GRADIENT


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("projected", [False, True])
def test_what_it_saves_is_the_gradient_between(merged, projected):
    """By the roofline: against the ops in its place, both gradients from one kernel or not."""
    case = cases.ConvCase("c", 4, 256, 14, 14, 64)
    dtype, added = torch.bfloat16, 4 * 256 * 196
    shape = case.input_shape
    wgrad = roofline.conv_bn_wgrad_cost(case, dtype)
    one = roofline.conv_bn_dgrad_end_cost(case, dtype, addend=added, projected=projected)
    two = roofline.bn_add_act_backward_cost(shape, dtype, projected=projected)
    if merged:
        before = roofline.conv_bn_grad1x1_cost(case, dtype, addend=added).bytes
    else:
        before = roofline.conv_bn_dgrad_cost(case, dtype, addend=added).bytes + wgrad.bytes
    place = PLACE._replace(between=shape, projected=projected)
    less = before + two.bytes - one.bytes - wgrad.bytes
    vectors = 4 * (5 + 2 * projected - 3 - 2 * projected) * 256
    again = 4 * 3 * 64 if merged else 0
    assert less + again - vectors == _end_gradient.less_bytes(place, merged=merged)
    assert one.flops == wgrad.flops


def test_traffic_is_at_most_half_of_eagers():
    """472.5 MB an image: the passes of eager PyTorch, added up in `predict_training.py`.

    With the ends of blocks that go to the next convolution in forward, 7.2 MB less to read
    (`predict_block_end.py`).
    """
    limits, batch = _tiles.Limits(132, 232448, 90), 256
    model, shape, dtype = rf.models.resnet50(), (batch, 3, 224, 224), torch.bfloat16
    merging = by_triton(dtype, limits)
    before, after = (
        nodes(model, shape, dtype, merging=merging, ending=ending) for ending in (False, True)
    )
    moved = [sum(traffic(found)) / batch / 1e6 for found in (before, after)]
    assert moved == pytest.approx([252.8, 239.5], abs=0.1)
    assert (moved[1] - 7.2) / 472.5 <= 0.5
    kernels = [kernel.op for found in after for kernel in found.kernels]
    assert kernels.count(OP) == 12 and kernels.count(PASS) == 4
