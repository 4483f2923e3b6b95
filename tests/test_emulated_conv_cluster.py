"""conv_bn_act by clusters that share a reduction, emulated: numbers, costs, what it refuses."""

from __future__ import annotations

import dataclasses
import itertools
import random

import conv_by_tma
import emulated
import emulated_shapes
import pytest
import torch
from conv_by_tma import (
    CASES,
    DTYPES,
    clusters,
    layer,
    operands,
    planned,
    problem,
    run,
    wrong,
)
from conv_by_tma import tensors_of as tensors
from emulated import Schedule
from emulated_shapes import lay_out

from resnet_fused import cases
from resnet_fused.cases import ConvCase

pytestmark = pytest.mark.emulated

NAMES = ["tma_cluster56x64_6s", "tma_cluster112x64_4s"]
BLOCKS = (2, 4, 8)
every = pytest.mark.parametrize("place", range(len(NAMES)))
NAMED = {case.name: case for case in CASES}
# Shares of 9 steps, of 18 and 10 in groups, of as few steps as blocks, of more than the stages.
DEEP = (
    *(NAMED[name] for name in ("3x3", "3x3_wide", "3x3_stride2", "5x2", "groups")),
    ConvCase("equal", 2, 512, 5, 7, 72, residual=True),
    ConvCase("ring", 1, 136, 9, 13, 72, 3, 3, (1, 1), (1, 1), residual=True),
)


def index_of(place: int) -> int:
    return list(clusters())[place]


def steps_of(case: ConvCase) -> int:
    return -(-case.c // case.groups // 64) * case.r * case.s


def test_each_configuration_has_a_test_and_two_blocks_fit():
    assert [tile["name"] for tile in clusters().values()] == NAMES
    for tile in clusters().values():
        assert tile["tma"] and tile["cluster"] == max(BLOCKS) and not tile["float32"]
        assert 2 * (tile["shared_bytes"] + 1024) <= emulated.H200[2]


@every
@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("case", DEEP, ids=lambda case: case.name)
def test_every_bit_is_right(place, blocks, case):
    """On integers; dtype, schedule and walk change from case to case."""
    number = (DEEP.index(case) * len(BLOCKS) + BLOCKS.index(blocks)) * len(NAMES) + place
    given = operands(case, DTYPES[number % 2])
    schedule = dataclasses.replace(emulated.SCHEDULES[number % 9], seed=number)
    y, report = run(
        case, given, index_of(place), schedule=schedule, splits=blocks,
        reverse=number // 2 % 2 == 1, resident_blocks=2 * blocks,
    )  # fmt: skip
    assert wrong(case, given, y) is None
    tile = clusters()[index_of(place)]
    tiles = -(-case.n * case.p * case.q // tile["m"]) * -(-case.k // case.groups // 64)
    assert report["plan"]["blocks"] == blocks * tiles * case.groups
    assert report["plan"]["workspace_bytes"] == 0


@every
@pytest.mark.parametrize("rounding", ["nearest", "toward_zero"])
def test_noise_is_within_the_bound_and_always_the_same(place, rounding):
    """Whoever comes first: sums are added in the order of the ranks."""
    for dtype, blocks in itertools.product(DTYPES, (2, 8)):
        case = NAMED["3x3"]
        given = operands(case, dtype, exact=False)
        made = []
        for asynchrony, order in (
            ("random", "shuffled"),
            ("lazy", "reverse"),
            ("eager", "forward"),
        ):
            schedule = Schedule(asynchrony, order, rounding, seed=place)
            made.append(run(case, given, index_of(place), schedule=schedule, splits=blocks)[0])
        found = conv_by_tma.check(case, given, made[0], rounding)
        assert found.ok, (dtype, blocks, found)
        assert all(torch.equal(y, made[0]) for y in made)


@every
def test_sums_are_added_in_the_order_of_the_ranks(place):
    case, given, expected = conv_by_tma.in_rank_order()
    for schedule in (Schedule(), Schedule("lazy", "reverse"), Schedule("random", "shuffled")):
        y, _ = run(case, given, index_of(place), schedule=schedule, splits=4)
        assert torch.equal(y, expected)


@pytest.mark.parametrize("reverse", [False, True])
def test_each_cluster_has_a_tile_and_each_block_its_pixels(reverse):
    case, index = NAMED["3x3"], index_of(0)  # 63 pixels in tiles of 56, two of channels
    given = operands(case, torch.bfloat16)
    y, _ = run(case, given, index, splits=4, reverse=reverse, blocks=(0, 3))
    there = ~y.isnan().permute(0, 2, 3, 1).reshape(63, 72)
    tile = torch.zeros(63, 72, dtype=torch.bool)
    if reverse:
        tile[56:, 64:] = True
    else:
        tile[:56, :64] = True
    assert torch.equal(there, tile)


@every
@pytest.mark.parametrize("blocks", BLOCKS)
def test_nan_and_infinity_stay_where_torch_has_them(place, blocks):
    """In x, in the shortcut, and in memory beside x that nobody may read."""
    case = NAMED["3x3_dilated"]
    given = list(operands(case, torch.float16, layout="padded"))
    given[0][0, 3, 4, 5], given[0][0, 0, 0, 0] = torch.nan, torch.inf
    given[4][0, 9, 2, 2] = torch.nan
    schedule = Schedule("lazy", "reverse")
    y, _ = run(case, tuple(given), index_of(place), schedule=schedule, splits=blocks)
    oracle, _ = conv_by_tma.expected(case, tuple(given))
    assert oracle.isnan().any() and not oracle.isnan().all()
    assert torch.equal(y.isnan(), oracle.isnan())
    assert torch.equal(y.isinf(), oracle.isinf())


LAYERS = (
    ConvCase("layer2.conv2", 1, 128, 8, 14, 128, 3, 3, (1, 1), (1, 1), residual=True),
    ConvCase("layer3.conv1", 1, 1024, 14, 4, 64),
)


@every
@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.name)
def test_what_it_costs(place, blocks, case):
    """No bank conflict; of memory nothing but what the layer has; every sum is read once."""
    tile = clusters()[index_of(place)]
    given = operands(case, torch.bfloat16)
    y, report = run(case, given, index_of(place), counting=True, splits=blocks)
    assert wrong(case, given, y) is None
    assert report["counters"]["bank_conflicts"] == 0
    roof = sum(t.nbytes for t in (*given, y) if t is not None)
    moved = sum(t["unique_bytes_read"] for t in report["tensors"].values())
    moved += sum(t["unique_bytes_written"] for t in report["tensors"].values())
    assert 0.999 * roof <= moved <= 1.1 * roof, report["tensors"]
    copies = [s for s in report["sites"] if s["instruction"].startswith("cp.async.bulk.tensor")]
    loaded = sum(site["counters"]["global_load_bytes_asked"] for site in copies)
    columns, rows = -(-case.k // 64), -(-case.n * case.p * case.q // tile["m"])
    pixels = given[0].nbytes * case.r * case.s * columns
    assert 0.8 * pixels <= loaded - given[1].nbytes * rows <= pixels
    assert report["counters"]["global_store_bytes_asked"] == y.nbytes
    # Of 8 bytes a thread, 128 bytes of neighbouring channels in four whole sectors.
    assert report["counters"]["global_store_sectors"] * 32 == y.nbytes


@pytest.mark.parametrize(
    ("case", "splits", "said"),
    [
        (NAMED["3x3"], 1, "splits: 2, 4 or 8 are served by clusters"),
        (NAMED["3x3"], 3, "splits: 2, 4 or 8 are served by clusters"),
        (NAMED["3x3"], 16, "splits: 2, 4 or 8 are served by clusters"),
        (NAMED["1x1"], 4, "splits: 4 of a reduction of 2 steps"),
        (NAMED["1x1_stride2"], 0, "splits: 2 of a reduction of 1 steps"),
    ],
)
def test_clusters_that_cannot_be_are_refused(case, splits, said):
    made = problem(**tensors(case), case=case)
    for index in clusters():
        with pytest.raises(ValueError, match=said):
            planned(made, index, splits)


def test_what_tma_cannot_take_and_channels_that_threads_cannot_store_are_refused():
    case = NAMED["3x3"]
    given = tensors(case)
    given["x"] = lay_out(given["x"], "nchw")
    for index in clusters():
        with pytest.raises(ValueError, match="x: its channels are not adjacent"):
            planned(problem(**given), index, 2)
    odd = ConvCase("odd", 1, 64, 7, 9, 18, 3, 3, (1, 1), (1, 1))
    room = lay_out(torch.zeros(1, 24, 7, 9, dtype=torch.bfloat16), "nhwc")
    given = tensors(odd) | {"out": room[:, :18]}
    for index in clusters():
        with pytest.raises(ValueError, match="channels: 18 of the output; a multiple of 4"):
            planned(problem(**given, case=odd), index, 2)


def test_neighbours_of_a_strided_output_stay():
    """Output and shortcut among the channels of wider tensors."""
    case = NAMED["3x3"]
    given = list(operands(case, torch.bfloat16))
    room = torch.full((1, 7, 9, 96), 7.0, dtype=torch.bfloat16).permute(0, 3, 1, 2)
    wide = torch.full((1, 7, 9, 88), torch.nan, dtype=torch.bfloat16).permute(0, 3, 1, 2)
    given[4] = wide[:, 8:80].copy_(given[4])
    oracle, _ = conv_by_tma.expected(case, tuple(given))
    out = room[:, 16:88]
    conv_by_tma.run_into(case, tuple(given), out, index_of(0), 4)
    assert torch.equal(out, oracle.to(out.dtype))
    assert (room[:, :16] == 7).all() and (room[:, 88:] == 7).all()


def test_no_other_gpu_gets_them():
    for gpu in (emulated.A100, emulated.RTX3080, (*emulated.H200[:3], 100)):
        for index in clusters():
            with pytest.raises(ValueError, match="for GPUs of capability 9.0"):
                planned(layer(cases.RESNET50_LAYERS[5], 1), index, 4, gpu=gpu)


def test_small_batches_of_deep_layers_are_theirs_and_large_ones_are_not():
    taken = set()
    for case in cases.RESNET50_LAYERS:
        if case.c % 8:
            continue
        one, full = planned(layer(case, 1)), planned(layer(case, 256))
        assert full["configuration"] not in clusters(), case.name
        if one["configuration"] in clusters():
            taken.add(case.name)
            assert one["splits"] in BLOCKS and one["blocks"] % one["splits"] == 0
    deep = {case.name for case in cases.RESNET50_LAYERS if case.c * case.r * case.s >= 1152}
    assert deep <= taken, deep - taken


def test_random_shapes():
    for number in range(8):
        rng = random.Random(100 + number)
        case = ConvCase(
            "random", rng.randint(1, 3), 8 * rng.randint(1, 20), rng.randint(2, 12),
            rng.randint(2, 12), 8 * rng.randint(1, 20), rng.randint(1, 4), rng.randint(1, 4),
            (rng.randint(1, 3), rng.randint(1, 3)), (rng.randint(0, 3), rng.randint(0, 3)),
            (rng.randint(1, 2), rng.randint(1, 2)), 1, rng.random() < 0.5,
            rng.choice(("relu", "none")),
        )  # fmt: skip
        able = [blocks for blocks in BLOCKS if blocks <= steps_of(case)]
        if case.p < 1 or case.q < 1 or not able:
            continue
        given = operands(case, rng.choice(DTYPES), layout=rng.choice(("nhwc", "padded")))
        schedule = dataclasses.replace(rng.choice(emulated_shapes.SCHEDULES), seed=number)
        y, _ = run(
            case, given, index_of(number % 2), schedule=schedule, splits=rng.choice(able),
            reverse=rng.random() < 0.5,
        )  # fmt: skip
        assert wrong(case, given, y) is None, case
