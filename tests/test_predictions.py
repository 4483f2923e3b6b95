"""The predictions in the docs are those of the code as it is, and follow from what it says."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

from resnet_fused.cases import RESNET50_LAYERS
from resnet_fused.ops import _cuda_plan

ROOT = Path(__file__).resolve().parent.parent


def loaded(name):
    path = ROOT / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tool():
    return loaded("predict_triton")


@pytest.fixture(scope="module")
def engine(tool):
    pytest.importorskip("triton", reason="an engine's head is Triton's, which is not installed")
    return loaded("predict_batch1")


def test_the_page_and_the_record_are_up_to_date(tool):
    page = tool.PAGE.read_text(encoding="utf-8")
    assert f"{tool.BEGIN}\n{tool.table()}\n{tool.END}" in page, (
        f"run python {tool.__file__} --write"
    )
    record = json.loads(tool.RECORD.read_text(encoding="utf-8"))
    assert record["layers"] == [dataclasses.asdict(p) for p in tool.predictions()]


def test_no_prediction_beats_the_limits(tool):
    for case in RESNET50_LAYERS:
        for batch in tool.BATCHES:
            found = tool.predict(dataclasses.replace(case, n=batch))
            assert found.issued_mb >= 0.99 * found.unique_mb
            products = 2e6 * case.macs * batch / tool.TENSOR
            assert found.us >= max(found.memory_us, found.cache_us, products)
            assert found.tensor_us >= products


def test_larger_batches_take_longer(tool):
    for case in RESNET50_LAYERS:
        times = [tool.predict(dataclasses.replace(case, n=n)).us for n in tool.BATCHES]
        assert times == sorted(times)


def test_the_page_of_the_engine_is_up_to_date(engine):
    page = engine.PAGE.read_text(encoding="utf-8")
    assert f"{engine.BEGIN}\n{engine.table()}\n{engine.END}" in page, (
        f"run python {engine.__file__} --write"
    )


def test_layers_of_an_engine_walk_backwards_where_the_cache_is_too_small(engine):
    """At 32 images a tensor of the first stage is 51 or 13 MB, at 256 the last one's is 51 MB."""
    for batch, stages in ((1, ""), (8, ""), (32, "12"), (256, "1234")):
        graph, _ = engine.graph_of(batch)
        back = {step.name.split(".")[0] for step in graph.steps if step.options.get("reverse")}
        assert back == {f"layer{stage}" for stage in stages}, batch


def test_a_launch_that_is_hidden_takes_less(engine):
    assert engine.EARLY < engine.ORDINARY
    rows = engine.rows()
    assert all(row.work > 0 and row.kernels in (1, 2) for row in rows)
    ordinary, last = engine.merges(engine.ORDINARY)
    early, same = engine.merges(engine.EARLY)
    merges = sum(row.kernels == 2 for row in rows) - 1  # all but the head
    assert ordinary - early == pytest.approx(0.8 * merges)
    assert last == same


def test_all_predictions_are_for_one_clock():
    """Rates in cycles belong to the clock beside them; a file with its own would not compare."""
    files = sorted((ROOT / "benchmarks").glob("predict_*.py"))
    assert len(files) > 5
    own = [f.name for f in files if re.search(r"\b[12]\.\d+e9\b|\bGHz\b", f.read_text("utf-8"))]
    assert own == []


def test_the_page_of_the_network_is_up_to_date():
    network = loaded("predict_network")
    page = network.PAGE.read_text(encoding="utf-8")
    assert f"{network.BEGIN}\n{network.table()}\n{network.END}" in page, (
        f"run python {network.__file__} --write"
    )


needs_network = pytest.mark.skipif(
    not _cuda_plan.exists("network"), reason="the extension was built without nvcc, or is older"
)


@needs_network
def test_what_the_engine_compares_is_on_the_page():
    network = loaded("predict_network")
    page = network.PAGE.read_text(encoding="utf-8")
    begin, end = network.ENGINE
    assert f"{begin}\n{network.engine_table()}\n{end}" in page, (
        f"run python {network.__file__} --write"
    )
    # In the words of the page and of CHANGELOG.md: for one image and for two.
    wins = [n for n in network.IMAGES if network.engine_us(n)[0] < network.engine_us(n)[1]]
    assert wins == [1, 2]


@needs_network
def test_the_plan_predicts_what_the_page_of_the_network_has():
    """One formula, written twice: the launch's own, and the page's."""
    network = loaded("predict_network")
    layers = network.engine_layers(1)
    for way, cluster in ((network.CLUSTERS, 8), (network.FOURS, 4), (network.SHARES, 1)):
        wish = network._cuda_network.Wish(cluster=cluster)
        made = network._cuda_network.plan(layers, network.H200, wish)
        assert made.meetings + made.launches == network.PHASES
        us = 1e6 * made.cycles / network.CLOCK
        # The page counts a shortcut for the projections that are alike but for that.
        assert us == pytest.approx(network.predicted(way)[2], rel=5e-3)


def test_sharing_a_merge_beats_the_last_block():
    network = loaded("predict_network")
    _, _, shares = network.predicted(network.SHARES)
    assert shares < 0.85 * network.predicted(network.LAST)[2]
    assert shares < 1.02 * network.predicted(network.MEETING)[2]
    split, merging = network.merges(network.SHARES)
    assert split > 10 and 0 < merging < shares


def test_clusters_merge_for_less_than_half():
    network = loaded("predict_network")
    _, _, clusters = network.predicted()
    assert network.TAKEN is network.CLUSTERS
    assert clusters < network.predicted(network.FOURS)[2] < network.predicted(network.SHARES)[2]
    split, merging = network.merges()
    more, through_memory = network.merges(network.SHARES)
    assert split > more and merging < 0.5 * through_memory
    for one in network.layers():
        for way in (network.CLUSTERS, network.SHARES):
            for tile, parts in one.cuts(way):
                assert (one.merge(tile, parts, way) > 0) == (parts > 1)
                assert 0 <= one.ahead(tile, parts, way) < one.loop(tile, parts, way)
                assert one.cycles(*one.cut(way), way) <= one.cycles(tile, parts, way)
