"""A network's convolutions in one launch, emulated: numbers, phases, grids, hazards, plans."""

from __future__ import annotations

import dataclasses
import itertools

import emulated
import emulated_network
import pytest
import torch
from emulated import Schedule
from emulated_network import DTYPES, Network, one_by_one, stage, wrong

pytestmark = pytest.mark.emulated

HOSTILE = (
    Schedule("lazy", "reverse", seed=1),
    Schedule("random", "shuffled", seed=2),
    Schedule("eager", "forward"),
)
SPLITS = (1, 1, 3, 1, 2, 2, 1)
"""Of the layers of `stage`: parts that meet, in a layer of one tile and of several."""


def counted(report, file):
    """How often a file's code has counted a block."""
    return sum(
        site["counters"]["global_atomics"]
        for site in report["sites"]
        if site["instruction"] == "red.release.add.u32" and site["file"].endswith(file)
    )


def same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """Names of the activations whose bits differ."""
    return [name for name in got if not torch.equal(got[name], expected[name])]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("exact", [True, False])
def test_a_stage_has_the_bits_of_its_layers_one_by_one(dtype, exact):
    x, layers = stage(dtype, exact=exact)
    expected = one_by_one(x, layers, SPLITS)
    assert wrong(expected, layers) == []
    runs = zip(HOSTILE, (3, 7, 1), strict=True)
    for schedule, blocks in runs:
        with emulated.using(schedule=schedule):
            got, _ = Network(x, layers).run(SPLITS, blocks)
        assert same(got, expected) == [], (schedule, blocks)


def test_more_blocks_than_tiles_have_nothing_to_do():
    x, layers = stage(DTYPES[0], exact=True, images=1)
    expected = one_by_one(x, layers, (1,) * 7)
    with emulated.using(schedule=HOSTILE[1]):
        got, _ = Network(x, layers).run((1,) * 7, 9)
    assert same(got, expected) == []


def test_a_workspace_serves_again_as_it_is_left():
    x, layers = stage(DTYPES[1], exact=False, images=1)
    network = Network(x, layers)
    with emulated.using(schedule=HOSTILE[0]):
        first, _ = network.run(SPLITS, 4)
        again, _ = network.run(SPLITS, 4, times=2)
    assert same(again, first) == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shares_of_what_is_not_moved_16_bytes_at_a_time(dtype):
    """Of 12 filters, of more parts than are added at a time, and of more than there are rows."""
    x, layers = emulated_network.shares(dtype)
    splits = (7, 19, 57)
    expected = one_by_one(x, layers, splits)
    assert wrong(expected, layers) == []
    for schedule, blocks in zip(HOSTILE, (20, 2, 5), strict=True):
        with emulated.using(schedule=schedule):
            got, _ = Network(x, layers).run(splits, blocks)
        assert same(got, expected) == [], schedule


def test_memory_serves_again_behind_its_last_reader():
    """Where an activation lies in an earlier one's place, the blocks meet in between."""
    x, layers = stage(DTYPES[0], exact=True)
    expected = one_by_one(x, layers, SPLITS)
    network = Network(x, layers, places={"e": "b"})
    with emulated.using(schedule=HOSTILE[1]):
        got, _ = network.run(SPLITS, 5)
    assert same({"z": got["z"]}, expected) == []


# ---- The plan


def test_layers_that_do_not_hang_together_share_a_phase():
    x, layers = stage(DTYPES[0], exact=True)
    plan = Network(x, layers).plan(SPLITS, 4)
    assert plan["meets"] == [False, False, True, True, True, True, True]
    assert plan["meetings"] == 5
    assert plan["splits"] == list(SPLITS)
    # What reads, or writes, the other one's memory does not.
    for places in ({"d": "x"}, {"e": "b"}):
        meets = Network(x, layers, places=places).plan(SPLITS, 4)["meets"]
        assert meets == [False, "d" in places, *[True] * 5]


def test_long_reductions_of_few_tiles_are_cut():
    """By hand, 72 steps of one tile: 18 parts of 4 steps take 4.2 thousand cycles, 12 of 6 4.5."""
    generator = torch.Generator().manual_seed(3)
    x = torch.zeros(1, 256, 8, 8, dtype=DTYPES[0]).to(memory_format=torch.channels_last)
    one = emulated_network.layer(generator, x.dtype, "256 64 3 1", "x y", exact=True)
    assert Network(x, [one]).plan(cluster=1)["splits"] == [18]
    for blocks, parts in ((1, 1), (4, 4)):  # no more than are there at once
        assert Network(x, [one]).plan(blocks=blocks, cluster=1)["splits"] == [parts]
    x, layers = stage(DTYPES[0], exact=True)
    plan = Network(x, layers).plan(cluster=1)
    assert plan["splits"] == [1, 5, 1, 1, 1, 1, 1]  # of 21 steps, and of 12 at most
    assert plan["blocks"] == 2 * emulated.H200[0]


@pytest.mark.parametrize(
    ("splits", "blocks", "words"),
    [
        ((), 10000, "from 1 to 264 are on this GPU at once"),
        ((), -1, "-1 blocks"),
        ((1, 1, 13, 1, 1, 1, 1), 4, "layer 2: .*no such parts"),
    ],
)
def test_what_cannot_be_launched_is_refused(splits, blocks, words):
    x, layers = stage(DTYPES[0], exact=True)
    with pytest.raises(ValueError, match=words):
        Network(x, layers).plan(splits, blocks)


def test_a_gpu_with_too_little_shared_memory_is_refused():
    x, layers = stage(DTYPES[0], exact=True)
    processors, _, _, *rest = emulated.H200
    for block, whole in ((63, 228), (64, 64)):
        gpu = (processors, block * 1024, whole * 1024, *rest)
        with pytest.raises(ValueError, match="a block takes 65536 bytes of shared memory"):
            Network(x, layers).plan(SPLITS, 4, gpu)
    alone = (processors, 99 * 1024, 100 * 1024, *rest)  # one block on each multiprocessor
    assert Network(x, layers).plan((), 0, alone)["blocks"] == processors


@pytest.mark.parametrize("name", ["weight", "scale", "shift"])
def test_constants_are_written_by_nobody(name):
    """Blocks read them before they meet."""
    x, layers = stage(DTYPES[0], exact=True)
    network = Network(x, layers)
    memory = network.values["y"].permute(0, 2, 3, 1).reshape(-1)
    vector = memory.view(torch.float32)[:40]
    weight = memory[: 40 * 136].view(40, 1, 1, 136).permute(0, 3, 1, 2)
    constants = {"weight": weight, "scale": vector, "shift": vector}
    other = dataclasses.replace(layers[4], **{name: constants[name]})
    network.problems[4] = network._problem(other)
    with pytest.raises(ValueError, match="layer 3: it writes where weights, scales or shifts"):
        network.plan(SPLITS, 4)


def test_narrow_operands_and_other_dtypes_are_refused():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 12, 4, 4).to(torch.bfloat16).to(memory_format=torch.channels_last)
    one = emulated_network.layer(generator, x.dtype, "12 16 1 1", "x y", exact=True)
    with pytest.raises(ValueError, match="layer 0: .*16 bytes at a time"):
        Network(x, [one]).plan()
    x, layers = stage(DTYPES[0], exact=True)
    other, others = stage(DTYPES[1], exact=True)
    mixed = Network(x, layers)
    mixed.problems[3] = Network(other, others).problems[3]
    with pytest.raises(ValueError, match="layer 3: its dtype"):
        mixed.plan()


def test_a_long_network_takes_several_launches():
    generator = torch.Generator().manual_seed(2)
    dtype = DTYPES[0]
    x = torch.randn(1, 8, 2, 2, generator=generator).round().to(dtype)
    x = x.to(memory_format=torch.channels_last)
    names = ["x", *(f"y{i}" for i in range(66))]
    layers = [
        emulated_network.layer(generator, dtype, "8 8 1 1", f"{a} {b}'", exact=False)
        for a, b in itertools.pairwise(names)
    ]
    network = Network(x, layers)
    plan = network.plan(blocks=2)
    assert (plan["launches"], plan["meetings"]) == (2, 64)
    assert not plan["meets"][64]  # the launch's end orders
    with emulated.using(schedule=HOSTILE[2]):
        got, (report,) = network.run(blocks=2)
    assert report["launches"] == 2
    assert same(got, one_by_one(x, layers, [1] * 66)) == []


# ---- What it costs


def test_the_next_layers_weights_are_asked_for_ahead():
    x, layers = stage(DTYPES[0], exact=True)
    with emulated.using(schedule=HOSTILE[2], counting=True):
        _, (report,) = Network(x, layers).run(SPLITS, 4)
    files = {site["file"].split("/")[-1] for site in report["sites"]}
    assert {"network_walk.h", "grid_barrier.h", "conv_tile.h"} & files
    assert counted(report, "network_walk.h") == 5 * 4  # meetings by blocks
    assert counted(report, "split_shares.h") == 2 * (3 + 2 + 2)  # tiles by their parts
    # Every weight is read once by each row of tiles, and no more is stored than there is.
    for i, one in enumerate(layers):
        read = report["tensors"][f"{i} weight"]["unique_bytes_read"]
        assert read == 2 * one.weight.numel()
