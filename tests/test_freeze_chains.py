"""Chains in a network's graph: which convolutions they take, and that the network stays right."""

from __future__ import annotations

import pytest
import torch
from nets import images, stir
from test_freeze_gpu import StandIn
from torch import nn
from torchvision.models import resnet as tv

import resnet_fused as rf
from resnet_fused.freeze import _chains, _gpu, _order, _rules, _served, _trace
from resnet_fused.ops.conv_chain import Answer

CPU = torch.device("cpu")


def network(block: type = tv.Bottleneck, **options) -> nn.Module:
    torch.manual_seed(0)
    return stir(tv.ResNet(block, [2, 2, 1, 1], num_classes=7, **options)).eval()


@pytest.fixture
def asked(monkeypatch) -> list:
    """Chains are served wherever they can be cut; the longest wins."""
    cases: list = []

    def serves(case, dtype, device) -> Answer:
        cases.append(case)
        count = len(case.parts) + case.out_stride
        return Answer(None, True, f"saves {count} us", float(count))

    monkeypatch.setattr(_chains, "serves", serves)
    monkeypatch.setattr(
        _served, "refusal", lambda op, *place: None if op == "conv_chain" else "not asked for"
    )
    return cases


def chained(model: nn.Module, x: torch.Tensor):
    graph = _trace.trace(rf.unfuse(model), 1)
    place = _rules.Place(CPU, x.dtype, (x,))
    graph, _ = _rules.apply(_rules.PLAIN, graph, place)
    return _rules.apply(_rules.DEVICE, graph, place)


def test_every_block_of_a_bottleneck_network_is_cut(asked):
    graph, notes = chained(network(), images(1, 64))
    chains = [step for step in graph.steps if step.kind == "conv_chain"]
    assert [step.name for step in chains] == [
        "layer1.0.conv2+layer1.0.downsample.0+layer1.0.conv3+layer1.1.conv1",
        "layer1.1.conv2+layer1.1.conv3+layer2.0.conv1",
        "layer2.0.downsample.0+layer2.0.conv3+layer2.1.conv1",
        "layer2.1.conv2+layer2.1.conv3+layer3.0.conv1",
        "layer3.0.downsample.0+layer3.0.conv3+layer4.0.conv1",
        "layer4.0.downsample.0+layer4.0.conv3",
    ]
    # Where a stage ends, the even pixels alone are stored, and the projection reads all of those.
    assert [step.options["out_stride"] for step in chains] == [1, 2, 1, 2, 2, 1]
    assert [step.options["projection_stride"] for step in chains] == [1] * 6
    # All of it fits into a cache, or none of it would be asked for the other way round.
    assert not any(step.options["reverse"] for step in chains)
    assert sum(note.done for note in notes if note.rule == "conv_chain") == 6
    assert any(case.front and case.projected and case.m for case in asked)
    assert all(case.h == case.w for case in asked)
    assert {case.h for case in asked} == {16, 8, 4, 2}


@pytest.mark.parametrize("size", [(64, 64), (49, 67)])
def test_a_chained_network_is_right(asked, monkeypatch, size):
    model = network()
    x = torch.randn(2, 3, *size).contiguous(memory_format=torch.channels_last)
    graph, _ = chained(model, x)
    monkeypatch.undo()
    engine = rf.freeze(model, x)
    frozen = {step.name: step for step in engine._graph.steps}
    steps = [s if s.kind == "conv_chain" else frozen.get(s.name, s) for s in graph.steps]
    steps = [s if s.kind == "conv_chain" or s.module is None else frozen[s.name] for s in steps]
    # A stage's projection in a chain of its own, or alone with the stride that is left to it.
    graph = _gpu.laid_out(type(graph)(tuple(steps), graph.inputs, graph.output))
    program, _ = _gpu.Builder(graph, StandIn(), lambda: None).build([x], True)
    with torch.inference_mode():
        for _ in range(2):
            given = torch.randn_like(x)
            torch.testing.assert_close(program([given]), model(given), rtol=2e-4, atol=2e-4)


def test_the_way_that_saves_most_is_taken_and_none_that_loses(asked, monkeypatch):
    def serves(case, dtype, device) -> Answer:
        if case.front:
            return Answer("shared memory", False, "no configuration: shared memory")
        gain = 3.0 if case.m and not case.projected else -1.0
        return Answer(None, gain > 0, f"saves {gain} us", gain)

    monkeypatch.setattr(_chains, "serves", serves)
    graph, notes = chained(network(), images(1, 64))
    chains = [step.name for step in graph.steps if step.kind == "conv_chain"]
    assert chains[0] == "layer1.0.conv3+layer1.1.conv1" and len(chains) == 5
    left = [note for note in notes if note.rule == "conv_chain" and not note.done]
    assert [note.layers for note in left] == ["layer4.0.conv3"]


def test_basic_blocks_have_no_chain(asked):
    graph, _ = chained(network(tv.BasicBlock), images(1, 64))
    assert not any(step.kind == "conv_chain" for step in graph.steps) and asked == []


@pytest.mark.parametrize("options", [{"groups": 4}, {}])
def test_what_a_chain_does_not_take(asked, options):
    """Groups in front, a result that the caller sees, a shortcut that others read."""
    model = network(**options)
    body = nn.Sequential(*list(model.children())[:5])  # ends with layer1, which is given back
    graph, _ = chained(body.eval(), images(1, 64))
    chains = [step for step in graph.steps if step.kind == "conv_chain"]
    assert [("front_weight" in step.tensors) for step in chains] == (
        [False] if options else [True, True]
    )
    assert all(step.options["out_stride"] == 1 for step in chains)
    assert graph.results()[0] in {value for step in graph.steps for value in step.outputs}


def test_without_kernels_the_answer_is_why():
    _, notes = chained(network(), images(1, 64))
    (note,) = (note for note in notes if note.rule == "conv_chain")
    assert not note.done and note.why == "on the CPU it is the same calls one after the other"


def test_sizes_follow_from_the_example():
    model, x = network(), images(2, 49)
    graph = _trace.trace(rf.unfuse(model), 1)
    graph, _ = _rules.apply(_rules.PLAIN, graph, _rules.Place(CPU, x.dtype, (x,)))
    shapes = _chains.shapes_of(graph, (x,))
    engine = rf.freeze(model, x)
    found: dict[int, tuple[int, ...]] = {}
    steps = _gpu.Steps(engine._graph, (x,))
    keep = steps._again

    def noted(at, step, values):
        made = keep(at, step, values)
        found.update({v: tuple(y.shape) for v, y in zip(step.outputs, made, strict=True)})
        return made

    steps._again = noted
    steps.run([x])
    for value, shape in found.items():
        if len(shape) == 4 and value in shapes:
            assert shapes[value] == shape
    assert len(shapes) > 20


@pytest.fixture
def cache(monkeypatch) -> dict[str, int]:
    """A cache of a size that the test says: none at first."""
    size = {"bytes": 0}
    monkeypatch.setattr(_order, "capacity", lambda device: size["bytes"])
    return size


@pytest.mark.parametrize("block", [tv.Bottleneck, tv.BasicBlock])
def test_layers_walk_against_the_step_that_they_read(asked, cache, block):
    graph, notes = chained(network(block), images(1, 64))
    makers, turned = graph.makers(), []
    for step in graph.steps:
        if step.kind not in _order.KINDS:
            continue
        maker = makers.get(step.inputs[0])
        ahead = None if maker is None else graph.steps[maker]
        back = step.options.get("reverse", False)
        assert back == (ahead is not None and not ahead.options.get("reverse", False))
        turned += [step.name] if back else []
    assert len(turned) > 3
    said = [note for note in notes if note.rule == "batch_order"]
    assert [note.layers for note in said] == turned and all(note.done for note in said)
    assert "backwards, since the step ahead reads and writes more than the 0 MB" in said[0].why


def test_only_behind_what_the_cache_does_not_hold(asked, cache):
    """64x64 images: 64 channels of 32x32, then 16x16 pixels, in float32; later layers are small."""
    cache["bytes"] = 500_000
    graph, _ = chained(network(tv.BasicBlock), images(1, 64))
    back = [step.name for step in graph.steps if step.options.get("reverse")]
    # The stem's pooling reads 262 kB and writes 66 kB, the stem reads 49 kB and writes 262 kB.
    assert back == []
    cache["bytes"] = 150_000
    graph, _ = chained(network(tv.BasicBlock), images(1, 64))
    back = [step.name for step in graph.steps if step.options.get("reverse")]
    # Behind the pooling, and where a shortcut is read along: 66 kB three times.
    assert back == ["layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1", "layer2.0.downsample.0"]
    cache["bytes"] = 10**9
    graph, notes = chained(network(tv.BasicBlock), images(1, 64))
    (note,) = (note for note in notes if note.rule == "batch_order")
    assert not note.done and "no step reads and writes more than the 1000 MB" in note.why


def test_a_cpu_is_asked_for_no_order(asked):
    _, notes = chained(network(), images(1, 64))
    assert _order.capacity(CPU) is None
    assert not any(note.rule == "batch_order" for note in notes)
