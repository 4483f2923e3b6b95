"""A network's convolutions in one launch of clusters, emulated: bits, what is moved, plans."""

from __future__ import annotations

import itertools
import runpy
from collections import Counter
from pathlib import Path

import emulated
import emulated_network
import pytest
import torch
from emulated import Schedule
from emulated_network import DTYPES, Network, one_by_one, shares, stage, wrong

pytestmark = pytest.mark.emulated

HOSTILE = (
    Schedule("lazy", "reverse", seed=1),
    Schedule("random", "shuffled", seed=2),
    Schedule("eager", "forward"),
)
SPLITS = (1, 4, 2, 1, 2, 4, 1)
"""Of the layers of `stage`: cut ones beside each other in a phase, and behind one another."""
PIXELS = (32, 64, 32, 64, 32, 32, 64)
"""Of their tiles: each kind with parts and without."""
TURNED = tuple(96 - pixels for pixels in PIXELS)
PROCESSORS, BLOCK, WHOLE, CAPABILITY = emulated.H200


def same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """Names of the activations whose bits differ."""
    return [name for name in got if not torch.equal(got[name], expected[name])]


def counters(report, file, instruction):
    """Of what a file's code does by an instruction, added up."""
    found: Counter[str] = Counter()
    for site in report["sites"]:
        if site["file"].endswith(file) and site["instruction"] == instruction:
            found.update(site["counters"])
    return found


# ---- Bits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("exact", [True, False])
def test_a_stage_has_the_bits_of_its_layers_one_by_one(dtype, exact):
    x, layers = stage(dtype, exact=exact)
    expected = one_by_one(x, layers, SPLITS)
    assert wrong(expected, layers) == []
    runs = ((8, 8, PIXELS), (24, 8, TURNED), (4, 4, PIXELS))
    for schedule, (blocks, cluster, pixels) in zip(HOSTILE, runs, strict=True):
        with emulated.using(schedule=schedule):
            got, (report,) = Network(x, layers).run(SPLITS, blocks, pixels=pixels, cluster=cluster)
        assert same(got, expected) == [], (schedule, blocks)
        assert report["launches"] == 1


@pytest.mark.parametrize("splits", [(4, 8, 2), (2, 4, 8), (1, 2, 4)], ids=str)
@pytest.mark.parametrize("pixels", [64, 32])
def test_shares_of_tiles_that_end_within_them(pixels, splits):
    """25 pixels and 12 channels, stored one by one; parts of 8, with and without a shortcut."""
    dtype = DTYPES[pixels % 3 % 2]
    x, layers = shares(dtype)
    expected = one_by_one(x, layers, splits)
    assert wrong(expected, layers) == []
    for schedule, blocks in zip(HOSTILE, (16, 8, 24), strict=True):
        with emulated.using(schedule=schedule):
            got, _ = Network(x, layers).run(splits, blocks, pixels=(pixels,) * 3, cluster=8)
        assert same(got, expected) == [], schedule


def test_a_workspace_serves_again_as_it_is_left():
    x, layers = stage(DTYPES[1], exact=False, images=1)
    network = Network(x, layers)
    with emulated.using(schedule=HOSTILE[0]):
        first, _ = network.run(SPLITS, 8, cluster=8)
        again, _ = network.run(SPLITS, 8, times=2, cluster=8)
    assert same(again, first) == []
    plan = network.plan(SPLITS, 8, cluster=8)
    assert plan["workspace_bytes"] == plan["counter_bytes"] == 256  # the barrier's counter alone


def test_room_for_blocks_that_are_alone_is_not_the_networks():
    """Two of its blocks share a multiprocessor: `rf_network_clusters` says how many may be."""
    x, layers = stage(DTYPES[0], exact=False, images=1)
    asked = Network(x, layers).plan(cluster=8, gpu=(*emulated.H200, 31, 15))
    assert asked == Network(x, layers).plan(cluster=8)


def test_a_long_network_takes_several_launches():
    """Clusters that are cut in the first launch's last layer, and in the next one's first."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(1, 128, 2, 2, generator=generator).round().to(DTYPES[0])
    x = x.to(memory_format=torch.channels_last)
    names = ["x", *(f"y{i}" for i in range(65))]
    layers = [
        emulated_network.layer(generator, x.dtype, "128 128 1 1", f"{a} {b}'", exact=False)
        for a, b in itertools.pairwise(names)
    ]
    splits = [2 if i in (63, 64) else 1 for i in range(65)]
    with emulated.using(schedule=HOSTILE[2]):
        got, (report,) = Network(x, layers).run(splits, 4, cluster=4)
    assert report["launches"] == 2
    assert same(got, one_by_one(x, layers, splits)) == []


# ---- What it costs


@pytest.mark.parametrize("pixels", [64, 32])
def test_sums_pass_once_and_without_conflicts(pixels):
    x, layers = shares(DTYPES[0])
    splits = (4, 8, 2)
    with emulated.using(schedule=HOSTILE[2], counting=True):
        _, (report,) = Network(x, layers).run(splits, 8, pixels=(pixels,) * 3, cluster=8)
    put = counters(report, "split_cluster.h", "st.shared")
    assert report["counters"]["bank_conflicts"] == 0
    # Pairs by warps: 256 bytes a request, which shared memory takes in two goes.
    assert put["shared_store_requests"] == sum(splits) * pixels * 64 * 4 // 256
    assert put["shared_wavefronts"] == 2 * put["shared_store_requests"]
    # Nothing is stored to memory but each result once, and the counter's zeros when all is done.
    results = sum(layer.weight.shape[0] * 25 * 2 for layer in layers)
    assert report["counters"]["global_store_bytes_asked"] == results + 256


def test_blocks_meet_as_often_as_through_memory():
    x, layers = stage(DTYPES[0], exact=True)
    with emulated.using(schedule=HOSTILE[2], counting=True):
        _, (report,) = Network(x, layers).run(SPLITS, 8, cluster=8)
    counted = counters(report, "network_walk.h", "red.release.add.u32")
    assert counted["global_atomics"] == 5 * 8
    for i, one in enumerate(layers):
        assert report["tensors"][f"{i} weight"]["unique_bytes_read"] == 2 * one.weight.numel()


# ---- The plan


def test_parts_of_a_tile_lie_in_one_cluster():
    """Layers of a phase begin with a cluster's first block, whatever lies ahead of them."""
    x, layers = stage(DTYPES[0], exact=True)
    plan = Network(x, layers).plan(SPLITS, 16, cluster=8)
    assert plan["meets"] == [False, False, True, True, True, True, True]
    assert (plan["blocks"], plan["cluster"], plan["splits"]) == (16, 8, list(SPLITS))
    assert plan["why"] == "7 layers, 5 meetings of 16 blocks in clusters of 8 in 1 launches"


def test_clusters_are_taken_where_they_are_predicted_faster():
    x, layers = stage(DTYPES[0], exact=True)
    network = Network(x, layers)
    assert network.plan()["cluster"] == 8
    # 128 of 132 multiprocessors: a cluster lies in one GPC, of which those of 18 lose two.
    assert network.plan()["blocks"] == 256
    assert network.plan(cluster=1)["blocks"] == 264
    # Six multiprocessors have room for one cluster of eight, and three of four.
    few = (6, BLOCK, WHOLE, CAPABILITY)
    assert [network.plan(gpu=few, cluster=n)["blocks"] for n in (8, 4)] == [8, 12]
    assert network.plan(gpu=few)["cluster"] == 4
    # One by one layers are predicted no longer for being allowed clusters.
    for gpu in (emulated.A100, (PROCESSORS, BLOCK, WHOLE, 0), (PROCESSORS, BLOCK, WHOLE, 100)):
        assert network.plan(gpu=gpu)["cluster"] == 1, gpu
    # What asks for parts or blocks that no cluster has goes through memory.
    assert network.plan((1, 1, 3, 1, 2, 2, 1))["cluster"] == 1
    assert network.plan(SPLITS, 9)["cluster"] == 1


@pytest.mark.parametrize(
    ("splits", "blocks", "wish", "words"),
    [
        ((), 264, {"cluster": 8}, "264 blocks; from 8 to 256 are on this GPU at once"),
        ((), 12, {"cluster": 8}, "12 blocks; in clusters of 8 a multiple of that"),
        ((1, 1, 3, 1, 1, 1, 1), 8, {"cluster": 8}, "layer 2: splits: 3 in a cluster of 8"),
        ((1, 8, 1, 1, 1, 1, 1), 8, {"cluster": 8}, "layer 1: .*no such parts"),
        ((1, 1, 4, 1, 1, 1, 1), 2, {"cluster": 2}, "clusters of 2 blocks; 4 and 8 are built"),
        ((1, 8, 2, 1, 2, 4, 1), 8, {"cluster": 4}, "layer 1: "),
        ((), 8, {"pixels": (48,) * 7}, "layer 0: pixels: no tiles of 48"),
        ((), 8, {"pixels": (32,) * 7, "cluster": 1}, "layer 0: pixels: no tiles of 32"),
    ],
    ids=str,
)
def test_what_cannot_be_launched_is_refused(splits, blocks, wish, words):
    x, layers = stage(DTYPES[0], exact=True)
    with pytest.raises(ValueError, match=words):
        Network(x, layers).plan(splits, blocks, **wish)


def test_gpus_without_clusters_or_room_are_refused():
    x, layers = stage(DTYPES[0], exact=True)
    network = Network(x, layers)
    for gpu in (emulated.A100, (PROCESSORS, BLOCK, WHOLE, 120)):
        with pytest.raises(ValueError, match=r"clusters are for GPUs of capability 9\.0"):
            network.plan(gpu=gpu, cluster=8)
    tight = (PROCESSORS, 111 * 1024, WHOLE, CAPABILITY)
    with pytest.raises(ValueError, match="a block takes 114688 bytes of shared memory"):
        network.plan(gpu=tight, cluster=8)
    assert network.plan(gpu=tight)["cluster"] == 1
    three = (3, BLOCK, WHOLE, CAPABILITY)
    with pytest.raises(ValueError, match="a block takes 114688 bytes"):
        network.plan(gpu=three, cluster=8)  # six blocks


def test_the_prediction_knows_the_plan():
    """benchmarks/predict_network.py chooses ResNet-50's tiles and parts as the launch does."""
    path = Path(__file__).resolve().parent.parent / "benchmarks" / "predict_network.py"
    tool = runpy.run_path(str(path))
    last = {"dtype": DTYPES[0], "memory_format": torch.channels_last}
    vector = torch.empty(0)
    seen = Counter()
    for name, cluster in (("SHARES", 1), ("CLUSTERS", 8), ("FOURS", 4)):
        way = tool[name]
        for one in tool["layers"]():  # as products of matrices
            x, weight = (
                torch.empty(n, one.depth, 1, m, **last)
                for n, m in ((1, one.pixels), (one.filters, 1))
            )
            residual = "x" if one.residual else None
            case = emulated_network.Layer("x", "y", weight, vector, vector, residual=residual)
            plan = Network(x, [case]).plan(cluster=cluster)
            tile, parts = one.cut(way)
            assert (plan["pixels"], plan["splits"]) == ([tile.pixels], [parts]), (name, one)
            assert plan["blocks"] == way.blocks
            seen[cluster, tile.pixels, parts] += 1
    assert {(8, 32, 2), (8, 32, 8), (8, 64, 8), (4, 32, 4), (1, 64, 16)} <= set(seen)
