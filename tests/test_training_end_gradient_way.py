"""The gradient between two blocks in a row from one op: by whose word, and what it saves."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from end_gradient import build
from test_training_row import images, row
from training_nets import assert_same, step

import resnet_fused as rf
from resnet_fused import backends, cases, roofline
from resnet_fused.bench.nodes import by_triton, ends_by_triton, nodes, traffic, unites_by_triton
from resnet_fused.nn import _training_route
from resnet_fused.ops import _block_end, _end_gradient, _grad1x1, _training
from resnet_fused.triton import _tiles

OP, UNITED = _end_gradient.OP, _end_gradient.UNITED
PASS = "bn_add_act_backward"


def test_explain_says_so():
    model = row()
    with rf.backend("reference"), backends.recording() as routes:
        model(images())
    said = {route.conv: route.why for route in routes if "gradient of the end" in route.why}
    assert set(said) == {model[1].conv1, model[2].conv1}
    text = (
        f"gradient of the end of the block before it by one op ({UNITED}): the reference is asked"
    )
    assert all(text in why and "both gradients" not in why for why in said.values())


PLACE = _end_gradient.Place(
    torch.device("cpu"), torch.bfloat16, (64, 256, 56, 56), (64, 256, 1, 1),
    ([1, 1], [0, 0], [1, 1], 1), False, 1,
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
    monkeypatch.delitem(_end_gradient.UNITING, "triton")

    def ask(filters=64, folds=True, trained=True, weight=None):
        place = PLACE._replace(weight=weight or (filters, 256, 1, 1))
        return _end_gradient.way(place, folds=folds, trained=trained)

    _end_gradient._word.cache_clear()
    yield ask
    _end_gradient._word.cache_clear()


def test_what_a_kernel_is_predicted_to_win_is_taken(asked):
    assert asked() == (True, "64 filters", False) and asked().how == f"one op ({OP})"
    assert asked(256) == (False, "256 filters", False) and asked(256).how == "two ops"
    assert asked(63) == (False, "odd", False)
    assert asked(folds=False) == (False, "", False)
    for word, ways in (("reference", True), ("cuda", True), ("cpu", False), ("triton", True)):
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
    refused = backends.Choice(entry, "?", (("triton", "not admitted: because"), ("another", "no")))
    monkeypatch.setattr(backends, "choose", lambda call: refused)
    assert asked() == (False, "not admitted: because", False)


def test_a_kernel_of_all_three_gradients_is_taken_where_it_wins(asked, monkeypatch):
    """Pretended: it takes multiples of 4 filters, at best 64; by whose word it does not."""

    def refusal(place):
        return None if place.weight[0] % 4 == 0 else "no fours"

    def verdict(place):
        return place.weight[0] <= 64, "all three"

    monkeypatch.setitem(_end_gradient.UNITING, "triton", _end_gradient.Kernel(refusal, verdict))
    assert asked() == (True, "all three", True) and asked().how == f"one op ({UNITED})"
    assert asked(128) == (True, "128 filters", False) and asked(62).op == OP
    assert asked(256).op == "conv_bn_dgrad"
    assert not asked(trained=False).united and asked(trained=False).ended
    assert not asked(weight=(64, 256, 3, 3)).united
    for end, both, found in (
        ("never", "always", (False, False)), ("always", "never", (True, False)),
        ("always", "auto", (True, False)), ("auto", "always", (True, False)),
        ("always", "always", (True, True)),
    ):  # fmt: skip
        with _end_gradient.preferring(end), _grad1x1.preferring(both):
            way = asked(128)
        assert (way.ended, way.united) == found, (end, both)
    with _end_gradient.preferring("always"), _grad1x1.preferring("always"):
        assert asked(62) == (True, f"{_end_gradient.ENVIRONMENT} is always", False)
    with rf.backend("reference"):
        assert asked(62).united and not asked(weight=(64, 256, 3, 3)).united
        assert not asked(trained=False).united


def test_nodes_of_kernels_that_apply_batchnorm_as_they_read(asked, monkeypatch):
    """Pretended: all ops are Triton's by name, and the references' by what they do."""
    ran, real = [], _training.overload

    def overload(op, name):
        def run(*arguments):
            ran.append((op, arguments))
            return real(op, "reference")(*arguments)

        return run

    monkeypatch.setattr(_training, "overload", overload)
    monkeypatch.setattr(_training_route, "call_reason", lambda *arguments: None)
    model, x = build("projected within")
    backends.forget_choices()
    with _block_end.preferring("never"), _grad1x1.preferring("never"):
        ours = step(rf.fuse(copy.deepcopy(model)), x)
        said = {}
        for word in ("auto", "never"):
            with _end_gradient.preferring(word), backends.recording() as routes:
                rf.fuse(copy.deepcopy(model))(x.clone().requires_grad_())
            said[word] = [r.why for r in routes if "gradient of the end" in r.why]
    backends.forget_choices()
    assert_same(ours, step(copy.deepcopy(model), x, "auto"), 1e-11)
    ends = [arguments for op, arguments in ran if op == OP]
    assert len(ends) == 2 and all(t is not None for one in ends for t in one[:8])
    assert all(one[8] is not None for one in ends), "both blocks in front have a projection"
    for word, how in (("auto", f"one op ({OP})"), ("never", "two ops")):
        assert len(said[word]) == 2 and all(f"before it by {how}: " in why for why in said[word])
    assert PASS in {op for op, _ in ran} and "bn_backward_apply" not in {op for op, _ in ran}


def test_without_a_kernel_nothing_is_said(monkeypatch):
    monkeypatch.setattr(_end_gradient, "ENDING", {})
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

    With the ends of blocks that go to the next convolution in forward, 10.0 MB less to read
    (`predict_block_end.py`).
    """
    limits, batch = _tiles.Limits(132, 232448, 90), 256
    model, shape, dtype = rf.models.resnet50(), (batch, 3, 224, 224), torch.bfloat16
    merging, ends = by_triton(dtype, limits), ends_by_triton(dtype, limits)
    before, after = (
        nodes(
            model, shape, dtype, merging=merging, ending=ending,
            uniting=unites_by_triton(dtype, limits),
        )
        for ending in (False, ends)
    )  # fmt: skip
    moved = [sum(traffic(found)) / batch / 1e6 for found in (before, after)]
    assert moved == pytest.approx([248.6, 219.7], abs=0.1)
    assert (moved[1] - 10.0) / 472.5 <= 0.45
    kernels = [kernel.op for found in after for kernel in found.kernels]
    assert (kernels.count(OP), kernels.count(UNITED), kernels.count(PASS)) == (9, 6, 1)
