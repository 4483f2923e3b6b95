"""Prepared weights: what makes them stale, what keeps them, and who may share them."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch
from nets import images, stir, tiny_resnet
from torch import nn
from torch.testing import assert_close

import resnet_fused as rf
from resnet_fused.nn import _prepared
from resnet_fused.ops import onednn

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture
def layer():
    return rf.nn.ConvBNAct(4, 8, 3)


@pytest.fixture
def folds(monkeypatch):
    """Counts how often weights are folded."""
    counts = []
    real = onednn.fold

    def fold(*args):
        counts.append(1)
        return real(*args)

    monkeypatch.setattr(onednn, "fold", fold)
    return counts


def check(layer, x):
    with torch.no_grad():
        ours = layer(x)
        assert_close(ours, layer.relu(layer.bn(layer.conv(x))), **CLOSE)
    return ours


def prepared(layer, x):
    """A layer in eval mode whose weights are folded and packed."""
    stir(layer).eval()
    for _ in range(3):
        check(layer, x)
    return layer


def x4():
    return torch.randn(2, 4, 8, 8)


def step(layer):
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.5)
    layer(x4()).square().mean().backward()
    optimiser.step()


def train_forward(layer):
    layer.train()
    layer(x4() * 3 + 1)
    layer.eval()


def load_assign(layer):
    state = {k: v.clone() * 1.5 for k, v in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)


def in_place(name):
    def change(layer):
        with torch.no_grad():
            layer.get_parameter(name).mul_(1.5)

    return change


def buffer(name):
    def change(layer):
        layer.get_buffer(name).add_(0.5)

    return change


def attribute(path, value):
    def change(layer):
        target = layer.get_submodule(path.rpartition(".")[0])
        setattr(target, path.rpartition(".")[2], value)

    return change


def half_and_back(layer):
    layer.bfloat16()
    layer.float()


CHANGES = {
    "optimiser step": step,
    "eval, train, eval": train_forward,
    "load_state_dict": lambda m: m.load_state_dict({k: v * 2 for k, v in m.state_dict().items()}),
    "load_state_dict(assign=True)": load_assign,
    "conv.weight in place": in_place("conv.weight"),
    "bn.weight in place": in_place("bn.weight"),
    "bn.bias in place": in_place("bn.bias"),
    "running_mean in place": buffer("bn.running_mean"),
    "running_var in place": buffer("bn.running_var"),
    "eps": attribute("bn.eps", 0.7),
    "stride": attribute("conv.stride", (2, 2)),
    "padding": attribute("conv.padding", (0, 0)),
    "dilation": attribute("conv.dilation", (2, 2)),
    "a new parameter": attribute("conv.weight", nn.Parameter(torch.randn(8, 4, 3, 3))),
    "a new buffer": attribute("bn.running_mean", torch.ones(8)),
    "a bias": attribute("conv.bias", nn.Parameter(torch.randn(8))),
    "gamma frozen away": attribute("bn.weight", None),
    "bfloat16 and back": half_and_back,
    "swapped storage": lambda m: setattr(m.conv.weight, "data", m.conv.weight.data * 2),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_shows_in_the_next_forward(layer, name):
    x = x4()
    before = check(prepared(layer, x), x)
    CHANGES[name](layer)
    after = check(layer, x)
    assert before.shape != after.shape or not torch.allclose(before, after)


def test_nothing_is_folded_twice_without_a_change(layer, folds):
    x = x4()
    prepared(layer, x)
    assert len(folds) == 1
    check(layer, torch.randn(1, 4, 6, 6))
    assert len(folds) == 1


def test_the_step_of_a_fused_optimiser_shows_with_frozen_batchnorm(layer):
    x = x4()
    before = check(prepared(layer, x), x)
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.1, fused=True)
    layer(x4()).square().mean().backward()
    version = layer.conv.weight._version
    optimiser.step()
    assert layer.conv.weight._version == version, "torch counts these writes now: drop the rule"
    assert not torch.allclose(check(layer, x), before)


def uncounted(layer):
    """A write that leaves no version, as a fused optimiser's or a replay's."""
    for t in (*layer.bn.parameters(), *layer.bn.buffers()):
        t.detach().numpy()[...] += 1


@pytest.mark.parametrize("live", [False, True])
def test_scale_and_shift_are_made_anew_behind_a_step(layer, live):
    """On a GPU they are what is kept; here the reference stands in for its kernels."""
    x = x4()
    with rf.backend("reference"):
        before = check(prepared(layer, x), x)
        layer.bn.train(live)
        layer(x4()).square().mean().backward()
        layer.bn.eval()
        uncounted(layer)
        assert not torch.allclose(check(layer, x), before)


@pytest.mark.parametrize("live", [False, True])
def test_nothing_is_kept_of_a_layer_whose_step_is_in_a_graph(layer, live, monkeypatch):
    """Replays write its parameters and running statistics, and PyTorch counts none of them."""
    x = x4()
    with rf.backend("reference"):
        prepared(layer, x)
        with monkeypatch.context() as capturing:
            capturing.setattr(_prepared, "is_captured", lambda t: True)
            layer.bn.train(live)
            layer(x4()).square().mean().backward()
        layer.bn.eval()
        for _ in range(2):  # between two epochs
            before = check(layer, x)
            uncounted(layer)
            assert not torch.allclose(check(layer, x), before)


def test_vectors_that_a_graph_reads_live_on_and_its_own_are_not_kept(layer, monkeypatch):
    x = x4()

    def vectors():
        with torch.no_grad():
            return _prepared.vectors(layer.conv, layer.bn, torch.float32)

    with rf.backend("reference"):
        prepared(layer, x)
        kept = vectors()
        assert vectors() is kept
        with monkeypatch.context() as capturing:
            capturing.setattr(_prepared, "is_captured", lambda t: True)
            assert vectors() is kept  # its address is in the graph now
            with torch.no_grad():
                layer.bn.weight.mul_(2)
            inside = vectors()
        alive = weakref.ref(kept[0])
        del kept
        assert vectors() is not inside  # whose memory holds nothing before the graph's first replay
        gc.collect()
        assert alive() is not None


def test_who_counts_what_replays_write_lets_vectors_be_kept(layer, monkeypatch):
    """As `train.CapturedStep` does: an evaluation between two epochs is as fast as ever."""
    x = x4()
    with rf.backend("reference"):
        prepared(layer, x)
        with monkeypatch.context() as capturing, _prepared.counted():
            capturing.setattr(_prepared, "is_captured", lambda t: True)
            layer.bn.requires_grad_(False)
            layer(x4()).square().mean().backward()
        before = check(layer, x)
        with torch.no_grad():
            kept = _prepared.vectors(layer.conv, layer.bn, torch.float32)
            assert _prepared.vectors(layer.conv, layer.bn, torch.float32) is kept
            uncounted(layer)
            torch.autograd.graph.increment_version([layer.bn.weight])
        assert not torch.allclose(check(layer, x), before)


def test_a_step_in_a_graph_reads_the_statistics_of_each_replay(layer, monkeypatch):
    with rf.backend("reference"):
        prepared(layer, x4())
        with torch.no_grad():
            kept = _prepared.vectors(layer.conv, layer.bn, torch.float32)
        layer.bn.requires_grad_(False)
        monkeypatch.setattr(_prepared, "is_captured", lambda t: True)
        assert _prepared.vectors(layer.conv, layer.bn, torch.float32) is not kept


def test_other_streams_find_vectors_that_are_computed(layer, monkeypatch):
    """Where they are kept: a thread on another stream may be the next to read them."""
    waited = []
    monkeypatch.setattr(_prepared, "finish", waited.append)
    with torch.no_grad():
        stir(layer).eval()
        scale, _ = _prepared.vectors(layer.conv, layer.bn, torch.float32)
        _prepared.vectors(layer.conv, layer.bn, torch.float32)
    assert len(waited) == 1 and waited[0] is scale


def test_a_data_write_is_not_seen_until_refresh(layer):
    x = x4()
    before = check(prepared(layer, x), x)
    layer.conv.weight.data.mul_(2)
    with torch.no_grad():
        assert torch.equal(layer(x), before)
    rf.refresh(layer)
    assert not torch.allclose(check(layer, x), before)


def test_dtypes_of_autocast_do_not_mix(layer):
    x = x4()
    prepared(layer, x)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    check(layer, x)


def test_both_trees_share_one_copy(folds):
    plain = tiny_resnet()
    first, second = rf.fuse(plain), rf.fuse(plain)
    x = images()
    with torch.no_grad():
        first(x)
        count = len(folds)
        second(x)
    assert len(folds) == count > 0


def test_nothing_of_it_shows_in_state_dict_or_copies(layer):
    x = x4()
    keys = list(layer.state_dict())
    prepared(layer, x)
    assert list(layer.state_dict()) == keys
    assert len(list(layer.buffers())) == 3
    twin = copy.deepcopy(layer)
    assert twin.conv.__dict__[_prepared.ATTRIBUTE].entry is None
    check(twin, x)


def test_packed_shapes_are_few_and_every_shape_is_right(layer):
    sizes = [(2, 8), (1, 8), (2, 6), (3, 5), (2, 8)]
    prepared(layer, x4())
    for n, size in sizes * 2:
        x = torch.randn(n, 4, size, size)
        for _ in range(3):
            check(layer, x)
    value = layer.conv.__dict__[_prepared.ATTRIBUTE].entry.value
    assert 1 <= len(value._packs) <= onednn.MAX_SHAPES


def test_tensors_made_in_inference_mode_are_not_cached(folds):
    with torch.inference_mode():
        layer = stir(rf.nn.ConvBNAct(4, 8, 3)).eval()
        x = x4()
        before = layer(x)
        layer.conv.weight.mul_(2)
        after = layer(x)
        assert_close(after, layer.relu(layer.bn(layer.conv(x))), **CLOSE)
    assert len(folds) == 2
    assert not torch.allclose(before, after)


def test_memory_of_replaced_weights_is_released(layer):
    x = x4()
    prepared(layer, x)
    from torch.multiprocessing.reductions import StorageWeakRef

    old = StorageWeakRef(layer.conv.weight.untyped_storage())
    layer.double()
    assert old.expired()


def test_the_functional_op_folds_a_weight_once(folds):
    x, weight = torch.randn(2, 8, 9, 9), torch.randn(16, 8, 3, 3)
    scale, shift = torch.rand(16), torch.randn(16)

    def both():
        """The op, and the same by eager, which sees every change."""
        with torch.no_grad():
            z = torch.conv2d(x, weight, padding=1) * scale[:, None, None] + shift[:, None, None]
            y = rf.ops.conv_bn_act(x, weight, scale.clone(), shift, padding=1)
            assert_close(y, z.relu(), **CLOSE)
            return y

    for _ in range(3):
        before = both()
    assert len(folds) == 1
    weight.mul_(1.5)
    assert not torch.allclose(both(), before)
    scale.mul_(2)
    both()
    weight.data = torch.randn(16, 8, 3, 3)
    both()
    assert len(folds) == 4
    with torch.no_grad():
        rf.ops.conv_bn_act(x, weight, scale, shift, padding=1, stride=2)
    assert len(folds) == 5


def test_what_the_functional_op_keeps_dies_with_the_weight():
    weight = torch.randn(16, 8, 3, 3)
    one = torch.ones(16)
    count = len(onednn._kept)
    rf.ops.conv_bn_act(torch.randn(2, 8, 9, 9), weight, one, one)
    assert len(onednn._kept) == count + 1
    del weight
    assert len(onednn._kept) == count


def test_eight_threads_call_one_model():
    fused = rf.fuse(tiny_resnet())
    inputs = [images(1 + i % 3) for i in range(8)]
    with torch.no_grad():
        expected = [rf.unfuse(fused)(x) for x in inputs]
    errors = []

    def work(x, y):
        try:
            with torch.no_grad():
                for _ in range(4):
                    assert_close(fused(x), y, rtol=1e-3, atol=1e-3)
        except Exception as error:
            errors.append(error)

    threads = [
        threading.Thread(target=work, args=pair) for pair in zip(inputs, expected, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors[0]


def test_backend_is_a_threads_own():
    seen = {}

    def work():
        seen["thread"] = rf.backends.requested()

    with rf.backend("reference"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert rf.backends.requested() == ("reference", "rf.backend")
    assert seen["thread"] == ("auto", "default")
