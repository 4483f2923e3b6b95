"""Layers of an engine in one launch: which, and by whose word.

The launches are stand-ins; plans are the extension's own, for the memory that the layers have.
"""

from __future__ import annotations

import dataclasses
import itertools

import cuda_standins
import network_standin
import pytest
import torch
from nets import images, stir
from one_launch_standins import (
    HALF,
    LAYERS,
    Gpu,
    bottlenecks,
    close,
    engine_of,
    install,
    needs_kernel,
    run,
    whys,
)
from torch import nn

import resnet_fused as rf
from resnet_fused import backends
from resnet_fused.freeze import _gpu, _kernels, _memory, _one_launch
from resnet_fused.freeze._ir import Graph, Ref, Step
from resnet_fused.ops import _cuda, _cuda_network

pytestmark = needs_kernel


@pytest.fixture
def gpu(monkeypatch) -> Gpu:
    return install(monkeypatch)


@pytest.fixture
def model():
    return bottlenecks()


# ---- What goes together


def test_all_layers_of_the_kernel_are_one_launch(gpu, model):
    engine, driver = engine_of(model, images(1, dtype=HALF))
    assert set(gpu.runs) == {LAYERS} and driver.captured == 1
    said = whys(engine)
    name, first = said.pop("0")
    assert name == "cuda" and "not in one launch: layer 0: " in first
    del said["8"]
    assert len(said) == LAYERS
    for name, why in said.values():
        assert name == "cuda"
        assert why.startswith("in one launch with 10 others: RESNET_FUSED_ONE_LAUNCH is always; ")
        assert "11 layers, " in why and " meetings of 256 blocks in clusters of 8" in why
    assert "in one launch with 10 others" in str(rf.explain(engine, images(1, dtype=HALF)))
    before = len(gpu.runs)
    for _ in range(2):
        x = images(1, dtype=HALF)
        close(run(engine, x), run(model, x))
    assert gpu.runs[before:] == [LAYERS, LAYERS]


def test_it_is_compared_with_kernels_of_the_same_bits(gpu, model):
    engine_of(model, images(1, dtype=HALF))
    (*_, (_, made)) = gpu.given
    assert gpu.wishes == [_cuda_network.alone(made, index) for index in range(LAYERS)]
    assert {configuration for configuration, _ in gpu.wishes} == {4}


def between() -> nn.Module:
    """Two runs: what stands between is no layer; then one that stands alone."""
    torch.manual_seed(0)

    def conv(c, k, taps=1, **options):
        return nn.Conv2d(c, k, taps, padding=taps // 2, bias=False, **options), nn.BatchNorm2d(k)

    return stir(
        nn.Sequential(
            *conv(16, 32), nn.ReLU(), *conv(32, 32, 3), nn.MaxPool2d(2), *conv(32, 64), nn.ReLU(),
            *conv(64, 64, 3), nn.ReLU(), *conv(64, 24, 3), nn.MaxPool2d(2), *conv(24, 40),
        )
    ).eval()  # fmt: skip


def activations(dtype=HALF):
    return torch.randn(2, 16, 12, 12).to(dtype).contiguous(memory_format=torch.channels_last)


def test_what_stands_between_ends_a_run(gpu):
    net, x = between().to(HALF), activations()
    engine, _ = engine_of(net, x)
    assert gpu.runs == [2, 3] * (len(gpu.runs) // 2) and gpu.runs
    said = [row.why for row in engine.report().rows if row.implementation == "cuda"]
    others = [why.partition(":")[0] for why in said]
    assert others == ["in one launch with 1 other"] * 2 + ["in one launch with 2 others"] * 3 + [
        others[-1]
    ]
    assert said[-1].endswith("not in one launch: no such layer stands beside it")
    close(run(engine, x), run(net, x))


def test_narrow_layers_and_those_that_walk_backwards_stay_apart(gpu):
    net, x = between().to(HALF), activations()
    graph = rf.freeze(net, x)._graph
    convs = [at for at, step in enumerate(graph.steps) if step.kind == "conv_bn_act"]
    steps = list(graph.steps)
    back = steps[convs[3]]
    steps[convs[3]] = dataclasses.replace(back, options={**back.options, "reverse": True})
    turned = dataclasses.replace(graph, steps=tuple(steps))
    engine, _ = engine_of(net, x, graph=turned)
    assert set(gpu.runs) == {2}
    program = next(iter(engine._programs.values()))
    assert "it walks the batch backwards" in program.served[convs[3]][1]
    single = net.float()
    gpu.runs.clear()
    engine, _ = engine_of(single, activations(torch.float32))
    assert gpu.runs == []
    said = [row.why for row in engine.report().rows if row.implementation == "cuda"]
    assert all("not in one launch: layer 0: its dtype" in why for why in said)


def test_the_kernel_behind_a_launch_does_not_begin_early(gpu, monkeypatch):
    begin = _kernels.Kernel.__init__

    def early(self, step, values):
        begin(self, step, values)
        self.late = None

    monkeypatch.setattr(_kernels.Kernel, "__init__", early)
    torch.manual_seed(0)
    # Runs of two, a kernel alone behind them for its 12 channels, and one that follows that.
    parts = [
        layer
        for c, k in ((16, 32), (32, 12), (12, 12), (12, 16))
        for layer in (nn.Conv2d(c, k, 1, bias=False), nn.BatchNorm2d(k))
    ]
    net = stir(nn.Sequential(*parts)).eval().to(HALF)
    engine, _ = engine_of(net, activations())
    assert set(gpu.runs) == {2}
    gpu.single.clear()
    run(engine, activations())
    assert gpu.single == [("own", False), ("own", True)]


# ---- Memory


def spans(layer):
    def span(t):
        first = t.data_ptr()
        return first, first + t.numel() * t.element_size()

    reads = [span(t) for t in (layer.x, layer.residual) if t is not None]
    return reads, span(layer.out)


def meet(a, b):
    return a[0] < b[1] and b[0] < a[1]


def test_memory_serves_again_within_a_launch_only_behind_a_meeting(gpu, model):
    """What a layer overwrites nobody of its phase reads or writes: reuse is right in one launch."""
    engine_of(model, images(1, dtype=HALF))
    (*_, (layers, made)) = gpu.given
    phases = list(itertools.accumulate(made.meets))
    reused = 0
    for (i, one), (j, two) in itertools.combinations(enumerate(layers), 2):
        reads, writes = spans(one)
        later, over = spans(two)
        reused += meet(writes, over) or any(meet(read, over) for read in reads)
        if phases[i] == phases[j]:
            assert not meet(writes, over)
            assert not any(meet(read, over) for read in reads)
            assert not any(meet(read, writes) for read in later)
    assert reused > 4
    # Each projection runs beside its block's second layer: the arena leaves their memory apart.
    assert [at for at, meets in enumerate(made.meets) if not meets] == [0, 2, 9]


def test_what_may_run_side_by_side_has_its_memory_apart():
    """Of a, b(a), c(x), d(b, c): c may run beside b, and is not to lie where a was."""

    def step(name, kind, inputs, output):
        return Step(kind, name, inputs, (output,))

    conv = "conv_bn_act"
    steps = (
        step("a", conv, (0,), 1), step("b", conv, (1,), 2), step("c", conv, (0,), 3),
        step("d", conv, (2, 3), 4), step("e", "relu", (4,), 5),
    )  # fmt: skip
    graph = Graph(steps, (0,), Ref(5))
    found = _memory.lives(graph, dict.fromkeys(range(1, 6), (256, HALF)), {})
    assert [life.last for life in found] == [1, 3, 3, 4, 5]
    beside = _memory.beside(graph, found, conv)
    assert [life.last for life in beside] == [2, 3, 3, 4, 5]
    before, after = _memory.plan(found).offsets, _memory.plan(beside).offsets
    assert before[3] == before[1] and after[3] != after[1]


# ---- By whose word


def test_never_leaves_every_layer_a_launch(gpu, model):
    engine, driver = engine_of(model, images(1, dtype=HALF), "never")
    assert gpu.runs == [] and gpu.asked == 0 and driver.captured == 1
    assert "one launch" not in str(engine.report())


def test_auto_takes_what_is_predicted_to_win_and_admitted(gpu, model, monkeypatch):
    x = images(1, dtype=HALF)
    engine, _ = engine_of(model, x, "auto")
    assert set(gpu.runs) == {LAYERS}
    assert "in one launch with 10 others: predicted " in str(engine.report())
    assert "0: conv+bn+relu by cuda (by CUDA" in str(engine.report())
    assert "not in one launch" not in str(engine.report())  # of what can't be nobody asked
    gpu.runs.clear()
    gpu.refusal = "not admitted: it failed its self-check"
    engine, _ = engine_of(model, x, "auto")
    assert gpu.runs == []
    assert "not in one launch: not admitted: it failed its self-check" in str(engine.report())
    # No self-check for what loses.
    gpu.asked = 0
    monkeypatch.setattr(_one_launch, "CLOCK", 1e3)
    monkeypatch.setattr(_one_launch, "_alone", lambda *given: 2.0)
    engine, _ = engine_of(model, x, "auto")
    assert gpu.runs == [] and gpu.asked == 0
    assert "not in one launch: predicted " in str(engine.report())
    gpu.refusal = None
    engine_of(model, x, "always")
    assert set(gpu.runs) == {LAYERS}


def test_auto_leaves_large_batches_to_single_kernels(gpu):
    net = between().to(HALF)
    x = torch.randn(64, 16, 40, 40).to(HALF).contiguous(memory_format=torch.channels_last)
    engine, _ = engine_of(net, x, "auto")
    assert gpu.runs == [] and gpu.asked == 0
    assert "not in one launch: predicted " in str(engine.report())


def test_tritons_layers_are_taken_by_the_users_word_alone(gpu, model, monkeypatch):
    x = images(1, dtype=HALF)
    begin = _kernels.Kernel.__init__

    def renamed(self, step, values):
        begin(self, step, values)
        self.name = "triton" if self.name == "cuda" else self.name

    monkeypatch.setattr(_kernels.Kernel, "__init__", renamed)
    monkeypatch.setitem(_kernels.ORDERS, "triton", _cuda)
    monkeypatch.setitem(_kernels._LAUNCHES, "triton", _cuda._launch)
    engine_of(model, x, "auto")
    assert gpu.runs == []
    engine, _ = engine_of(model, x, "always")
    assert set(gpu.runs) == {LAYERS}
    assert whys(engine)["3.conv1"][0] == "cuda"


def test_a_backend_asked_for_by_name_keeps_its_kernels(gpu, model):
    with backends.backend("triton"):
        engine, _ = engine_of(model, images(1, dtype=HALF))
    assert gpu.runs == [] and gpu.asked == 0
    assert "not in one launch: rf.backend asks for triton" in str(engine.report())


def test_a_word_that_is_none_is_refused(gpu, model, monkeypatch):
    monkeypatch.setenv(_one_launch.ENVIRONMENT, "sometimes")
    _one_launch.word.cache_clear()
    with pytest.raises(ValueError, match="RESNET_FUSED_ONE_LAUNCH is 'sometimes'; accepted are"):
        _one_launch.asked(torch.device("cpu"))
    monkeypatch.delenv(_one_launch.ENVIRONMENT)
    assert _one_launch.word() == "auto"


def test_on_other_devices_nobody_looks(model):
    assert not _one_launch.asked(torch.device("cpu"))


# ---- By the emulator's kernels


@pytest.mark.emulated
def test_the_kernels_bits_are_those_of_its_layers_alone(gpu, monkeypatch):
    """No stand-in's arithmetic: the first replay agrees bit for bit with single kernels."""
    agreed = []
    agrees = _gpu.Captured._agrees

    def noted(self):
        agreed.append(agrees(self))
        return agreed[-1]

    monkeypatch.setattr(_gpu.Captured, "_agrees", noted)
    monkeypatch.setattr(_cuda_network, "launch", network_standin.launch)

    def alone(*given, wish=None, **more):
        cuda_standins.forward(*given, wish=wish)

    monkeypatch.setattr(_cuda, "launch_conv_bn_act", alone)
    clusters = _cuda_network.clusters
    monkeypatch.setattr(
        _cuda_network, "clusters", lambda device, cluster: clusters(device, cluster) // 16
    )
    net, x = between().to(torch.float16), activations(torch.float16)
    engine, driver = engine_of(net, x)
    assert agreed == [True] and driver.captured == 1
    assert "in one launch with 2 others" in str(engine.report())
