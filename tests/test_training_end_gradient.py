"""The gradient between two blocks in a row from one op, and every way in which it must not be.

The op's own numbers are held in `test_ops_dgrad_end`; here are the nodes and what passes between
them in backward, beside the same blocks called one by one and beside the modules in float64.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import threading
import weakref
from typing import ClassVar

import pytest
import torch
from end_gradient import OP, ROWS, UNITED, build, called, check, counts, step
from test_training_row import images, one_by_one, row, same, watched
from torch import nn
from torch.utils.checkpoint import checkpoint
from training_nets import assert_same, gradient_like, kept_bytes, norms, steps
from training_nets import step as plain_step

import resnet_fused as rf
from resnet_fused import backends
from resnet_fused.nn import _training as node
from resnet_fused.nn import _training_junction as junctions
from resnet_fused.nn import _training_route
from resnet_fused.ops import _training

# Numbers


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

        return run if op in (OP, UNITED) else real(op, name)

    model, x = build("bottlenecks")
    monkeypatch.setattr(_training, "overload", wrong)
    backends.forget_choices()
    with pytest.raises(AssertionError, match="gradient of"):
        assert_same(*steps(model, x, "reference"), 1e-11)
    backends.forget_choices()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_row_has_the_bits_of_its_blocks(dtype):
    check(row().to(dtype), images(dtype), 2)


def test_a_1x1_has_its_other_gradient_from_the_same_op():
    """And nothing of it where the weights' gradient is not wanted, or its kernel is wider."""
    model, x = build("bottlenecks")
    model = rf.fuse(model)
    _, ran = step(model, x)
    assert (ran.count(UNITED), ran.count(OP)) == (2, 0)
    model[1].conv1.weight.requires_grad_(False)
    theirs, _ = step(model, x, one_by_one)
    ours, ran = step(model, x)
    assert (ran.count(UNITED), ran.count(OP)) == (1, 1)
    ours, theirs = ([t for t in found if t is not None] for found in (ours, theirs))
    assert same(ours, theirs) and len(ours) == len(step(model, x)[0]) - 1
    model, x = build("basic")
    assert UNITED not in step(rf.fuse(model), x)[1]


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


def test_sums_are_kept_for_the_stream_that_takes_them(monkeypatch):
    class Sums:
        is_cuda, device = True, torch.device("cuda", 1)
        kept: ClassVar[list[object]] = []

        def record_stream(self, stream):
            self.kept.append(stream)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: ("stream of", str(device)))
    junction, sums, dz = junctions.Junction(), Sums(), torch.ones(4)
    junction.leave(dz, sums)
    assert junction.take(torch.ones(4)) is None and sums.kept == []
    junction.leave(dz, sums)
    assert junction.take(dz) is sums and sums.kept == [("stream of", "cuda:1")]


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
        assert OP not in ran and UNITED not in ran
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
    assert same(ours, theirs) and counts(ran)[0] == ended


@pytest.mark.parametrize(("name", "ended"), [("bn1", 2), ("bn3", 1), ("downsample.1", 1)])
def test_sums_of_several_processes_are_left_to_their_node(monkeypatch, name, ended):
    """Pretended: a group whose exchange gives back what it is given."""
    model, group = row(), object()
    module = model[0].get_submodule(name)
    real = _training_route._process_group
    monkeypatch.setattr(
        _training_route, "_process_group", lambda bn: group if bn is module else real(bn)
    )
    monkeypatch.setattr(node._processes, "gathered", lambda stats, count, group: (stats, None))
    monkeypatch.setattr(node._processes, "reduced", lambda sums, layer: None)
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
