"""Layers of an engine in one launch: what goes wrong there, and chains that are taken apart."""

from __future__ import annotations

import pytest
import torch
from nets import images
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
from test_freeze_gpu import StandIn

import resnet_fused as rf
from resnet_fused.freeze import _chains, _gpu, _memory, _one_launch, _rules

pytestmark = needs_kernel


@pytest.fixture
def gpu(monkeypatch) -> Gpu:
    return install(monkeypatch)


@pytest.fixture
def model():
    return bottlenecks()


# ---- What goes wrong


def test_another_result_than_the_layers_alone_separates_them(gpu, model, caplog):
    gpu.wrong = 1.0
    engine, driver = engine_of(model, images(1, dtype=HALF))
    assert driver.captured == 2 and _one_launch.OTHER in caplog.text
    said = whys(engine)["3.conv1"]
    assert said[0] == "cuda" and said[1].endswith(f"not in one launch: {_one_launch.OTHER}")
    assert "in one launch with" not in str(engine.report())
    count = len(gpu.runs)
    x = images(1, dtype=HALF)
    close(run(engine, x), run(model, x))
    assert len(gpu.runs) == count


@pytest.mark.parametrize("where", ["launch", "capture"])
def test_what_the_gpu_refuses_is_launched_apart(gpu, model, caplog, where):
    error = RuntimeError("network_out: the CUDA launch failed: too many blocks\nmore")
    x = images(1, dtype=HALF)
    engine, driver = rf.freeze(model, x), StandIn()
    engine._programs.clear()
    if where == "launch":
        gpu.fails = error
    else:
        driver.failures = [error]
    engine._builder = _gpu.Builder(_gpu.laid_out(engine._graph), driver, engine._free)
    with _one_launch.preferring("always"):
        engine._programs[engine._first], _ = engine._built([x], True)
    assert driver.captured == 1 and "too many blocks: each layer is a launch" in caplog.text
    assert "not in one launch: network_out: the CUDA launch failed" in str(engine.report())
    assert "more" not in whys(engine)["3.conv1"][1].split("failed")[1]
    close(run(engine, x), run(model, x))


def test_out_of_memory_is_no_fault_of_the_launch(gpu, model):
    x = images(1, dtype=HALF)
    engine, driver = rf.freeze(model, x), StandIn()
    engine._programs.clear()
    driver.failures = [torch.OutOfMemoryError("CUDA out of memory")]
    engine._builder = _gpu.Builder(_gpu.laid_out(engine._graph), driver, engine._free)
    with _one_launch.preferring("always"):
        program, _ = engine._builder.build([x], True)
    assert program.arena and "release" in driver.log
    assert "in one launch with 10 others" in program.served[2][1]
    # Step by step nothing is.
    driver.failures = [torch.OutOfMemoryError("CUDA out of memory")] * 2
    with _one_launch.preferring("always"):
        program, _ = engine._builder.build([x], True)
    assert not program.arena and "not in one launch: no graph: " in program.served[2][1]


@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError])
def test_where_nobody_can_look_each_layer_is_a_launch(gpu, model, caplog, monkeypatch, error):
    def find(*given):
        raise error("no room\nfor that")

    monkeypatch.setattr(_one_launch, "find", find)
    x = images(1, dtype=HALF)
    engine, driver = engine_of(model, x)
    assert gpu.runs == [] and driver.captured == 1
    assert "no layers in one launch: no room" in caplog.text and "for that" not in caplog.text
    (program,) = engine._programs.values()
    life = {life.value: life.last for life in program.plan.lives}
    lives = _memory.lives(engine._graph, dict.fromkeys(life, (256, HALF)), {})
    assert life == {life.value: life.last for life in lives}  # of steps one after the other
    close(run(engine, x), run(model, x))


# ---- Chains


@pytest.fixture
def chained(model, monkeypatch):
    """The engine's graph with a chain for every block's end, as where chains win."""
    answer = type("Answer", (), {"reason": None, "wins": True, "gain": 1.0, "why": "it wins"})
    monkeypatch.setattr(_chains, "serves", lambda case, dtype, device: answer)
    x = images(1, dtype=HALF)
    graph = rf.freeze(model, x)._graph
    made, _ = _chains.chained(graph, [x], HALF, torch.device("cpu"))
    assert sum(step.kind == "conv_chain" for step in made.steps) == 3
    return x, made, _gpu.laid_out(graph)


def test_the_users_word_takes_chains_apart(gpu, model, chained):
    x, graph, apart = chained
    engine, _ = engine_of(model, x, "always", apart, graph)
    assert gpu.runs[-1] == LAYERS
    assert "3.conv2" in whys(engine)  # the rows are the program's own steps
    y = images(1, dtype=HALF)
    close(run(engine, y), run(model, y))
    engine, _ = engine_of(model, x, "never", apart, graph)
    assert "3.conv2" not in whys(engine)


def test_auto_takes_chains_apart_where_the_whole_is_predicted_faster(
    gpu, model, chained, monkeypatch
):
    x, graph, apart = chained
    engine, _ = engine_of(model, x, "auto", apart, graph)
    assert "3.conv2" not in whys(engine)  # chains by parts: what they take is not known
    known = {True: 100.0, False: 50.0}
    find = _one_launch.find

    def timed(steps, *more):
        chains = any(step.kind == "conv_chain" for step in steps)
        return find(steps, *more)._replace(us=known[chains])

    monkeypatch.setattr(_one_launch, "find", timed)
    engine, _ = engine_of(model, x, "auto", apart, graph)
    assert "3.conv2" in whys(engine)
    known[False] = 150.0
    engine, _ = engine_of(model, x, "auto", apart, graph)
    assert "3.conv2" not in whys(engine)


def test_what_chains_by_parts_take_is_not_known(gpu, chained):
    """Steps of other kernels count nothing: the whole would seem too short."""
    x, graph, apart = chained
    found = []
    for one in (graph, apart):
        with _one_launch.preferring("never"):
            steps = _gpu.Steps(_gpu.laid_out(one), [x])
        with _one_launch.preferring("auto"):
            steps.join([x])
        found.append(steps.us)
    assert found[0] is None and found[1] > _one_launch.ORDINARY


def test_the_rules_without_chains_are_the_others():
    assert [rule.name for rule in _rules.APART] == ["stem", "head", "batch_order"]
