"""Both gradients of a 1x1 convolution from one op: which layers take it, and by whose word.

Numbers are held elsewhere: the reference's path in `test_training_blocks` with all others, the
kernel's in `test_triton_bn_grad1x1` and, within a node, in `test_triton_training_nodes`.
"""

from __future__ import annotations

import collections
import copy
import functools
import logging

import pytest
import torch
from torch import nn
from training_nets import CASES, assert_same, build, norms, steps

import resnet_fused as rf
from resnet_fused import _tuned, backends, models, roofline
from resnet_fused.bench.nodes import by_triton, ends_by_triton, nodes, traffic, unites_by_triton
from resnet_fused.cases import ConvCase
from resnet_fused.nn import _training_route
from resnet_fused.ops import _end_gradient, _grad1x1, _training
from resnet_fused.triton import _grad1x1 as rule
from resnet_fused.triton import _limits, _tiles

OP = "conv_bn_grad1x1"
H200 = _tiles.Limits(132, 232448, 90)
A100 = _tiles.Limits(108, 163 * 1024, 80)
BF16 = torch.bfloat16


@functools.cache
def resnet50():
    return models.resnet50()


@pytest.fixture
def ran(monkeypatch):
    """(op, implementation, shape of its second tensor) of every op of training that a node runs."""
    found = []
    real = _training.overload

    def overload(op, name):
        def run(*arguments):
            found.append((op, name, arguments))
            return real(op, name)(*arguments)

        return run

    monkeypatch.setattr(_training, "overload", overload)
    backends.forget_choices()  # nodes keep the overloads that they have found
    yield found
    backends.forget_choices()


@pytest.fixture
def pretend(monkeypatch, ran):
    """Makes the nodes take Triton's way on a GPU of given limits; fakes make the results.

    The tensors have no memory, so that whole networks take a step at their full size.
    """

    def choose(call):
        known = {entry.name: entry for entry in backends.implementations(call.op)}
        return backends.Choice(known.get("triton") or known["reference"], "pretended")

    real = _training.overload
    monkeypatch.setattr(_training, "overload", lambda op, name: real(op, "reference"))
    monkeypatch.setattr(backends, "choose", choose)
    monkeypatch.setattr(_training_route, "call_reason", lambda *arguments: None)

    def use(limits):
        monkeypatch.setattr(_limits, "limits", lambda device: limits)
        backends.forget_choices()
        ran.clear()
        return ran

    return use


def meta_step(model, shape, dtype=BF16):
    """A step without memory; the routes."""
    form = torch.channels_last
    with torch.device("meta"):
        model = model().to(dtype, memory_format=form).train()
        x = torch.empty(shape, dtype=dtype).contiguous(memory_format=form)
    with backends.recording() as routes:
        y = rf.fuse(model)(x)
    assert {route.implementation for route in routes} == {"triton"}
    y.backward(torch.empty_like(y))
    return model, routes


# What the prediction says


@pytest.mark.parametrize("ending", [False, True])
@pytest.mark.parametrize(
    ("batch", "limits", "merged", "ended", "between", "united"),
    [
        (256, H200, (11, 5), 12, 9, 6),
        (8, H200, (8, 5), 15, 9, 6),
        (1, H200, (0, 0), 15, 15, 0),
        (256, A100, (0, 0), 2, 12, 3),
    ],
)
def test_a_node_takes_what_the_prediction_counts(
    pretend, batch, limits, merged, ended, between, united, ending
):
    """ResNet-50 at its full size: the same ops on the same shapes, the merged one among them.

    A block's end made with the next convolution is counted as the two ops that it stands for. The
    gradient between two blocks is made behind the earlier one's ReLU where it pays, or nowhere.
    """
    ran = pretend(limits)
    shape = (batch, 3, 224, 224)
    with _end_gradient.preferring("auto" if ending else "never"):
        meta_step(models.resnet50, shape)
    merging = by_triton(BF16, limits)
    ends = ends_by_triton(BF16, limits) if ending else False
    unites = unites_by_triton(BF16, limits)
    found = nodes(resnet50(), shape, BF16, merging=merging, ending=ends, uniting=unites)
    counted = collections.Counter(
        (kernel.op, sizes(node.case_of(kernel), kernel.op) if "conv" in kernel.op else None)
        for node in found
        for kernel in node.kernels
    )
    places = {"conv_bn_stats": 2, "conv_bn_wgrad": 5, "conv_bn_dgrad": 3, OP: 5}
    places[_end_gradient.OP] = places[_end_gradient.UNITED] = 3

    def asked(op, arguments):
        weight = tuple(arguments[places[op]].shape)
        # A projection's gradient is of the pixels that it reads, one of four.
        return (weight, tuple(arguments[7])) if op == "conv_bn_dgrad" else weight

    seen = collections.Counter(
        (op, asked(op, arguments) if op in places else None)
        for op, _, arguments in ran
        if op in {kernel.op for node in found for kernel in node.kernels}
    )
    ends = [arguments[4].shape for op, _, arguments in ran if op == "bn_add_act_conv_stats"]
    seen.update(("conv_bn_stats", tuple(shape)) for shape in ends)
    seen["bn_add_act", None] += len(ends)
    assert seen == counted and len(ends) == ended
    assert sum(count for (op, _), count in seen.items() if op == OP) == merged[ending]
    every = [
        sum(count for (op, _), count in seen.items() if op == one)
        for one in (_end_gradient.OP, _end_gradient.UNITED)
    ]
    assert every == ([between, united] if ending else [0, 0])


def sizes(case, op):
    """By which the calls of an op are told from one another."""
    return (case.weight_shape, case.input_shape) if op == "conv_bn_dgrad" else case.weight_shape


def test_explain_says_which_way(pretend):
    pretend(H200)
    model, routes = meta_step(models.resnet50, (64, 3, 224, 224))
    names = {id(module): name for name, module in model.named_modules()}
    why = {names[id(route.conv)]: route.why for route in routes}
    assert (
        "both gradients by one op (conv_bn_grad1x1): 231.2 MB less to read"
        in (why["layer1.1.conv3"])
    )
    assert "by two ops: 512 filters and 128 channels of 2 bytes do not fit" in why["layer2.1.conv3"]
    said = {name for name, text in why.items() if "both gradients" in text}
    # The others' gradient of the input is that behind the block before.
    behind = "gradient of the end of the block before it by one op "
    ops = {
        op: {name for name, text in why.items() if f"{behind}({op}): " in text}
        for op in (_end_gradient.OP, _end_gradient.UNITED)
    }
    ended = set().union(*ops.values())
    assert [len(names) for names in ops.values()] == [9, 6]
    assert "102.8 MB less through memory" in why["layer3.0.conv1"]
    assert f"{behind}({_end_gradient.UNITED}): 176 thousand cycles" in why["layer1.2.conv1"]
    ones = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and module.kernel_size == module.stride == (1, 1)
    }
    assert said == ones - ended and ended <= ones


def test_the_traffic_of_a_step_is_at_most_055_of_eagers():
    """472.5 MB an image: the passes of eager PyTorch, added up in `predict_training.py`."""
    for batch in (32, 256):
        found = nodes(resnet50(), (batch, 3, 224, 224), BF16, merging=by_triton(BF16, H200))
        assert sum(traffic(found)) / batch / 472.5e6 <= 0.55
    two = nodes(resnet50(), (256, 3, 224, 224), BF16)
    assert sum(traffic(two)) / 256 / 472.5e6 > 0.55


@pytest.mark.parametrize("masked", [False, True])
def test_what_it_saves_is_the_second_reading(masked):
    case = ConvCase("c", 4, 64, 14, 14, 256)
    two = [
        roofline.conv_bn_dgrad_cost(case, BF16, masked=masked, addend=77),
        roofline.conv_bn_wgrad_cost(case, BF16, prologue=masked, parameter=torch.float32),
    ]
    one = roofline.conv_bn_grad1x1_cost(
        case, BF16, masked=masked, addend=77, parameter=torch.float32
    )
    again = rule.again_bytes(4 * 196, 256, 64, 2, affine=True, masked=masked)
    vectors = 4 * (3 * 256 + 2 * 64 * masked)
    assert sum(cost.bytes for cost in two) - one.bytes == again + vectors
    assert sum(cost.flops for cost in two) == one.flops


def test_a_small_batch_goes_to_two_kernels():
    """The programs' sums do not shrink with it."""
    sizes = 64, 256, 2  # filters, channels
    taken = [rule.choose(n * 3136, *sizes, H200).config is not None for n in (1, 2, 8, 64)]
    assert taken == [False, False, True, True]
    assert rule.choose(0, *sizes, H200).why == "an empty batch"
    assert "fill 132" in rule.choose(64, *sizes, H200).why
    assert "do not fit" in rule.choose(64, 512, 256, 2, H200).why
    parts, across = rule.programs(64 * 3136, 256, rule.BY_NAME["64x128_8w2s"], H200)
    assert (parts, across) == (66, 2)
    verdict = rule.choose(64 * 3136, *sizes, H200)
    saved, more = (float(text.split()[0]) for text in verdict.why.split(", "))
    assert saved == pytest.approx(64 * 3136 * 128 * 2 / 1e6, rel=1e-2) and more < saved


# By whose word


@pytest.fixture
def asked(monkeypatch, pretend):
    """way() for the heaviest layer of ResNet-50 on a pretended H200."""
    pretend(H200)

    def ask(x=(64, 64, 56, 56), weight=(256, 64, 1, 1), geometry=None, **options):
        geometry = geometry or ([1, 1], [0, 0], [1, 1], 1)
        given = {"folds": True, "masked": True, **options}
        return _grad1x1.way(torch.device("cpu"), BF16, x, weight, geometry, **given)

    yield ask
    _grad1x1._word.cache_clear()


def test_only_plain_1x1_convolutions_are_asked_about(asked):
    assert asked().merged
    assert not asked(folds=False).merged
    for weight, geometry in (
        ((256, 64, 3, 3), ([1, 1], [1, 1], [1, 1], 1)),
        ((256, 64, 1, 1), ([2, 2], [0, 0], [1, 1], 1)),
        ((256, 64, 1, 1), ([1, 1], [1, 0], [1, 1], 1)),
        ((256, 32, 1, 1), ([1, 1], [0, 0], [1, 1], 2)),
    ):
        assert asked(weight=weight, geometry=geometry) == (False, "")


def test_the_environment_s_word_comes_first(asked, monkeypatch):
    small = {"x": (1, 64, 56, 56)}
    for word, taken in (("never", (False, False)), ("always", (True, True)), ("", (True, False))):
        monkeypatch.setenv(_grad1x1.ENVIRONMENT, word)
        _grad1x1._word.cache_clear()
        assert (asked().merged, asked(**small).merged) == taken, word
    monkeypatch.setenv(_grad1x1.ENVIRONMENT, "always")
    _grad1x1._word.cache_clear()
    assert not asked(weight=(512, 64, 1, 1)).merged  # no word makes it fit
    monkeypatch.setenv(_grad1x1.ENVIRONMENT, "yes")
    _grad1x1._word.cache_clear()
    with pytest.raises(ValueError, match="RESNET_FUSED_GRAD1X1 is 'yes'; accepted are auto, never"):
        asked()


@pytest.mark.parametrize("configuration", [_grad1x1.TWO, "256x64_8w2s"])
def test_what_was_measured_overrules_the_rule(asked, monkeypatch, configuration):
    calls = []

    def find(*call):
        calls.append(call)
        return _tuned.Tuned(configuration, 1, 1.2, 1.1, 1.3, "other")

    monkeypatch.setattr(_tuned, "find", find)
    merged = configuration != _grad1x1.TWO
    for n in (1, 64):
        way = asked(x=(n, 64, 56, 56))
        assert way.merged is merged and "tuned on this GPU: 1.20x" in way.why
    assert calls[0][:2] == ("triton", torch.device("cpu")) and calls[0][2] == OP
    assert len(_tuned.key("triton", *calls[0][2:])) == _tuned.KEY_LENGTH


def test_a_refused_kernel_leaves_it_to_two(asked, monkeypatch, caplog):
    known = {entry.name: entry for entry in backends.implementations(OP)}
    refused = backends.Choice(known["reference"], "?", (("triton", "not admitted: because"),))
    monkeypatch.setattr(backends, "choose", lambda call: refused)
    _grad1x1._log.cache_clear()
    with caplog.at_level(logging.INFO, logger="resnet_fused"):
        assert asked() == (False, "not admitted: because")
        asked()
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "both gradients of x (64, 64, 56, 56), weight (256, 64, 1, 1) by two ops: not admitted: "
        "because"
    ]


# The reference's path


def plain_1x1(block):
    return [
        module
        for module in block.modules()
        if isinstance(module, nn.Conv2d)
        and (*module.kernel_size, *module.stride, module.groups) == (1, 1, 1, 1, 1)
        and module.bias is None
    ]


@pytest.mark.parametrize("name", [name for name in CASES if "bottleneck" in name])
def test_who_asks_for_the_reference_gets_the_merged_one(ran, name):
    """So that the blocks' tests, which run it, hold the node's calls of it to float64."""
    block, x = build(name)
    steps(block, x, "reference")
    merged = [arguments[5].shape for op, _, arguments in ran if op == OP]
    assert len(merged) == len(plain_1x1(block)) > 0
    ran.clear()
    steps(block, x, "cpu")
    assert OP not in {op for op, _, _ in ran}


@pytest.mark.parametrize("place", range(3))
def test_a_wrong_result_of_it_is_seen(monkeypatch, place):
    real = _training.overload

    def wrong(op, name):
        def run(*arguments):
            found = real(op, name)(*arguments)
            if op == OP and (place != 1 or found[1].numel()):
                found = tuple(t * (1 + 1e-6 * (i == place)) for i, t in enumerate(found))
            return found

        return run

    block, x = build("torchvision bottleneck projected")
    assert_same(*steps(block, x, "reference"))
    monkeypatch.setattr(_training, "overload", wrong)
    backends.forget_choices()  # a node keeps the overloads that it has found
    with pytest.raises(AssertionError, match="gradient of"):
        assert_same(*steps(block, x, "reference"))


def test_one_wanted_gradient_alone_is_no_reason(ran):
    block, x = build("torchvision bottleneck")
    block.conv3.weight.requires_grad_(False)
    with rf.backend("reference"):
        rf.fuse(block)(x).sum().backward()  # x itself wants none: neither does conv1
    assert OP not in {op for op, _, _ in ran}
    assert block.conv1.weight.grad is not None


def test_frozen_layers_take_it_too(ran):
    block, x = build("torchvision bottleneck projected")
    for bn in norms(block)[1:]:
        bn.eval()
    assert_same(*steps(copy.deepcopy(block), x, "reference"))
    assert sum(op == OP for op, _, _ in ran) == 3
    assert [bn.training for bn in norms(block)].count(True) == 1
