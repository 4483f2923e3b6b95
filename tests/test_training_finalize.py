"""Layers whose convolution finalizes its BatchNorm as it ends: which do, and by whose word.

The references run: the kernel's numbers are held in `test_emulated_stats_finalize`.
"""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from nets import stir
from test_training_row import images, row, same, watched
from torch import nn
from training_nets import CASES, build, gradient_like, norms

import resnet_fused as rf
from resnet_fused import backends, models
from resnet_fused.nn import _training_route
from resnet_fused.ops import _end_gradient, _finalize, _training

OP = _finalize.OP
CONVOLUTION = "conv_bn_stats"


def passed(model, x, word, **options):
    """Output, gradients and buffers of a step of a copy, and the ops that its forward ran."""
    model, x = copy.deepcopy(model), x.clone().requires_grad_()
    with rf.backend("reference"), _finalize.preferring(word), watched() as ran:
        with torch.autocast("cpu", dtype=torch.bfloat16, **({"enabled": False} | options)):
            out = model(x)
        forward = list(ran)
        out.backward(gradient_like(out))
    grads = [x.grad, *(p.grad for p in model.parameters())]
    return [out.detach(), *grads, *model.buffers()], forward


def check(model, x, **options):
    """The bits are the same in both ways; the ops that the forward pass ran."""
    ours, ran = passed(model, x, "always", **options)
    theirs, plain = passed(model, x, "auto", **options)
    assert same(ours, theirs)
    assert OP not in plain
    merged = ran.count(OP)
    assert ran.count(CONVOLUTION) + merged == plain.count(CONVOLUTION)
    assert ran.count("bn_finalize") + merged == plain.count("bn_finalize")
    return ran, plain


@pytest.mark.parametrize("name", CASES)
def test_every_block_has_the_bits_of_three_ops(name):
    block, x = build(name)
    fused = rf.fuse(block).train()
    ran, plain = check(fused, x)
    assert OP in ran or CONVOLUTION not in plain
    assert ran.count("bn_update_stats") <= plain.count("bn_update_stats")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_network(momentum, dtype):
    torch.manual_seed(1)
    model = models.resnet18(num_classes=5).to(dtype)
    stir(model)
    for bn in norms(model):
        bn.momentum = momentum
    ran, plain = check(model.train(), torch.randn(2, 3, 33, 33).to(dtype))
    assert ran.count(OP) == plain.count("bn_update_stats") == 20
    assert CONVOLUTION not in ran and "bn_update_stats" not in ran


def test_autocast():
    ran, _ = check(row(), images(), enabled=True)
    assert OP in ran


def test_no_running_statistics_and_frozen_ones():
    block, x = build("torchvision bottleneck")
    first, second, third = norms(block)[:3]
    first.track_running_stats, first.running_mean, first.running_var = False, None, None
    first.num_batches_tracked = None
    second.eval()
    third.track_running_stats = False
    ran, _ = check(rf.fuse(block), x)
    assert ran.count(OP) == 2 and ran.count("bn_update_stats") == 0


def test_without_gradients():
    block, x = build("torchvision basic")
    fused = rf.fuse(block)
    other = copy.deepcopy(fused)
    with torch.no_grad(), rf.backend("reference"):
        with _finalize.preferring("always"), watched() as ran:
            y = fused(x)
        assert ran.count(OP) == 2
        assert torch.equal(other(x), y)
    for a, b in zip(fused.buffers(), other.buffers(), strict=True):
        assert torch.equal(a, b)


def test_what_the_block_before_has_made_is_finalized_by_itself():
    ran, _ = check(row(), images())
    made = ran.count("bn_add_act_conv_stats")
    assert made == ran.count("bn_finalize") == ran.count("bn_update_stats") > 0


def test_a_shortcut_of_modules_waits_with_its_statistics():
    """A node inside of `later` leaves them to the block, whose memory may still run out."""
    from timm.models.resnet import BasicBlock, downsample_avg

    torch.manual_seed(0)
    shortcut = downsample_avg(8, 16, 1, stride=2)
    block = BasicBlock(8, 16, stride=2, downsample=shortcut).double().train()
    ran, _ = check(rf.fuse(block), torch.randn(3, 8, 6, 6, dtype=torch.float64))
    assert ran.count(OP) == 3 and ran.count("bn_update_stats") == 1


def test_versions_of_what_was_updated_are_new():
    block, x = build("torchvision basic")
    fused = rf.fuse(block)
    buffers = dict(block.named_buffers())
    before = {name: t._version for name, t in buffers.items()}
    with rf.backend("reference"), _finalize.preferring("always"):
        fused(x)
    assert all(t._version > before[name] for name, t in buffers.items())


# Whose word


def layer_of(implementation):
    entry = next(e for e in backends.implementations(CONVOLUTION) if e.name == implementation)
    return backends.Choice(entry, "pretended")


MERGED = (OP, "conv_bn_grad1x1", "bn_add_act_conv_stats")


@contextlib.contextmanager
def kernels(*merged, others="cuda"):
    """Some ops of `MERGED` as if they were admitted in CUDA; all others, too, or by that name."""

    def choose(call):
        known = {entry.name: entry for entry in backends.implementations(call.op)}
        if call.op in merged:
            return backends.Choice(known["cuda"], "pretended")
        if call.op not in MERGED:
            return backends.Choice(known.get(others) or known["reference"], "pretended")
        rest = known.get("parts") or known["reference"]
        return backends.Choice(rest, "the rest", (("cuda", "not admitted"),))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "choose", choose)
        backends.forget_choices()
        yield
    backends.forget_choices()


CUDA, FLOAT = torch.device("cuda"), torch.float32


@pytest.mark.parametrize(
    ("word", "admitted", "merged", "why"),
    [
        ("auto", True, True, "the blocks that merge the statistics do that as well"),
        ("always", True, True, "the blocks that merge the statistics do that as well"),
        ("never", True, False, "RESNET_FUSED_FINALIZE is never"),
        ("auto", False, False, "not admitted"),
        ("always", False, False, "not admitted"),
    ],
)
def test_the_kernel_is_taken_where_it_may_be(word, admitted, merged, why):
    with kernels(*([OP] if admitted else [])), _finalize.preferring(word):
        assert _finalize.way(layer_of("cuda"), CUDA, FLOAT) == (merged, why)
        for other in ("triton", "cpu", "reference"):
            assert _finalize.way(layer_of(other), CUDA, FLOAT) == (False, "")


def test_the_environment_has_the_users_word(monkeypatch):
    monkeypatch.setenv("RESNET_FUSED_FINALIZE", "never")
    _finalize._word.cache_clear()
    try:
        with kernels(OP):
            assert not _finalize.way(layer_of("cuda"), CUDA, FLOAT).merged
        monkeypatch.setenv("RESNET_FUSED_FINALIZE", "perhaps")
        _finalize._word.cache_clear()
        with pytest.raises(ValueError, match=r"RESNET_FUSED_FINALIZE is 'perhaps'; accepted are"):
            _finalize.way(layer_of("cuda"), CUDA, FLOAT)
    finally:
        _finalize._word.cache_clear()


@pytest.fixture
def pretend(monkeypatch):
    """Makes the nodes take CUDA's way; fakes make the results, which have no memory."""
    real = _training.overload
    monkeypatch.setattr(_training, "overload", lambda op, name: real(op, "reference"))
    monkeypatch.setattr(_training_route, "call_reason", lambda *arguments: None)
    monkeypatch.setattr(_end_gradient, "possible", lambda folds: False)  # it would ask the GPU


def explained(*merged, **others):
    """What is said of each layer of a network."""
    form = torch.channels_last
    with torch.device("meta"):
        model = models.resnet18(num_classes=3).train()
        x = torch.empty(2, 3, 64, 64).contiguous(memory_format=form)
    with kernels(*merged, **others), backends.recording() as routes:
        rf.fuse(model)(x)
    return [route.why for route in routes if route.op == CONVOLUTION]


@pytest.mark.usefixtures("pretend")
def test_explain_says_which_way_a_layer_takes():
    said = explained(OP)
    one = f"BatchNorm finalized by one op ({OP}): the blocks that merge the statistics"
    assert len(said) == 20 and all(one in why for why in said)
    said = explained()
    assert all("BatchNorm finalized by ops of their own: not admitted" in why for why in said)
    assert not any("BatchNorm finalized" in why for why in explained(OP, others="triton"))


def test_what_cannot_is_said():
    choice, conv = layer_of("cuda"), nn.Conv2d(4, 4, 1)
    pair = _training_route.Pair(conv, nn.BatchNorm2d(4))
    with kernels(OP):
        said = _training_route._finalizing(pair, choice, CUDA, FLOAT, True)
        assert said == (
            "BatchNorm finalized by ops of their own: the block before made the convolution"
        )
        frozen = pair._replace(bn=nn.BatchNorm2d(4).eval())
        assert _training_route._finalizing(frozen, choice, CUDA, FLOAT, False) == ""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_training_route, "_process_group", lambda bn: "others")
            said = _training_route._finalizing(pair, choice, CUDA, FLOAT, False)
        assert said == "BatchNorm finalized by ops of their own: statistics are exchanged"
