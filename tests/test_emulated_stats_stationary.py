"""conv_bn_stats by TMA and wgmma with filters that stay, emulated: numbers, costs, the plan."""

from __future__ import annotations

import dataclasses

import emulated
import pytest
import test_emulated_stats as stats_tests
import torch
from conv_by_tma import DTYPES, FEW
from emulated import Schedule
from matrix import SPREADS, spread_values
from test_emulated_stats import call, operands, planned, require, require_stats
from test_emulated_stats_sm90 import name_of, pixels_of_channels
from test_emulated_stats_sm90_norm import NAMES as BRINGING

from resnet_fused import cases, numerics
from resnet_fused.cases import ConvCase
from resnet_fused.ops import _cuda_stats_checks

pytestmark = pytest.mark.emulated

NAMES = ("tma_stay128x128_8s", "tma_stay128x128_4s")
STEPS = dict(zip(NAMES, (4, 8), strict=True))
every = pytest.mark.parametrize("name", NAMES)
behind = pytest.mark.parametrize("normed", [False, True], ids=["as_it_is", "behind_a_norm"])
CASES = (
    # Tiles cut along both sides; a half of the channels alone; two steps, of which one is cut.
    ConvCase("1x1", 2, 72, 9, 9, 136),
    ConvCase("1x1_stride2", 5, 40, 12, 13, 72, 1, 1, (2, 2)),
    ConvCase("half", 3, 64, 11, 13, 64),
    ConvCase("1x1_groups", 1, 192, 9, 8, 480, groups=3),
    # Taps beside the image, by rows, by columns, and by both.
    ConvCase("1x3", 2, 64, 7, 9, 200, 1, 3, (1, 1), (0, 1)),
    ConvCase("3x1", 1, 8, 9, 17, 24, 3, 1, (1, 2), (2, 0), (2, 1)),
    ConvCase("2x2", 2, 16, 8, 11, 40, 2, 2, (1, 1), (1, 1)),
    # All steps that fit beside eight stages; many tiles, one step each; one pixel.
    ConvCase("deep", 1, 256, 13, 10, 264),
    ConvCase("many", 2, 64, 18, 35, 64),
    ConvCase("pixel", 1, 16, 1, 1, 8),
)
DEEPEST = ConvCase("deepest", 1, 512, 13, 20, 136)
NAMED = {case.name: case for case in CASES}


def tiles() -> dict[str, dict]:
    """The configurations whose filters stay, by name."""
    table = emulated.load().conv_bn_stats_configurations()
    return {t["name"]: t | {"index": i} for i, t in enumerate(table) if "stay" in t["name"]}


def run(case, given, name, **settings):
    """y, statistics and report of a configuration."""
    settings = {"schedule": Schedule(), "splits": 1, **settings}
    y, stats, report = call(case, *given, configuration=tiles()[name]["index"], **settings)
    assert report["plan"]["configuration"] == tiles()[name]["index"]
    return y, stats, report


def drawn(case, dtype=torch.bfloat16, *, normed=True, **more):
    x, norm, weight = operands(case, dtype, **more)
    return x, norm if normed else None, weight


def test_each_configuration_has_a_test_and_fits():
    assert tuple(tiles()) == NAMES
    for tile in tiles().values():
        assert tile["shared_bytes"] <= emulated.H200[1] and not tile["float32"]


@every
@behind
@pytest.mark.parametrize("case", [*CASES, DEEPEST], ids=lambda case: case.name)
def test_every_bit_is_right(name, case, normed):
    """On integers; dtype, schedule and the number of blocks change from case to case."""
    if case is DEEPEST and STEPS[name] < 8:
        pytest.skip("eight steps")
    number = 2 * (*CASES, DEEPEST).index(case) + NAMES.index(name) + normed
    given = drawn(case, DTYPES[number % 2], normed=normed)
    schedule = dataclasses.replace(emulated.SCHEDULES[number % 9], seed=number)
    few = number % 3 != 0
    y, stats, _ = run(
        case, given, name, schedule=schedule, gpu=FEW if few else emulated.H200, resident_blocks=2
    )
    require(case, *given, y, stats)


@every
def test_noise_is_within_the_bound(name):
    """Not on integers: h is rounded as if it had been stored."""
    for case in (NAMED["1x3"], NAMED["deep"]):
        for dtype in DTYPES:
            x, norm, weight = drawn(case, dtype, exact=False)
            oracle = numerics.conv_bn_stats_oracle(x, norm, weight, **case.geometry)
            bound = numerics.conv_bn_stats_bound(x, norm, weight, oracle, **case.geometry)
            y, stats, _ = run(case, (x, norm, weight), name, gpu=FEW)
            found = numerics.check_bound(y, oracle, bound)
            assert found.ok, str(found)
            require_stats(y, stats)


@pytest.mark.parametrize("kind", SPREADS)
def test_statistics_of_hard_values_over_many_tiles(kind):
    """In both halves of the channels; a block that keeps them over many tiles loses nothing."""
    for dtype, kappa in ((torch.float16, 1e3), (torch.bfloat16, 4.0)):
        values = spread_values(kind, kappa, 6000).clamp(-(2**14), 2**14)
        case, given = pixels_of_channels(values, dtype, channels=72)
        for multiprocessors in (1, 5):
            gpu = (multiprocessors, *emulated.H200[1:])
            y, stats, report = run(case, given, NAMES[0], gpu=gpu)
            assert torch.equal(y, given[0]) and report["plan"]["blocks"] == multiprocessors
            require_stats(y, stats, tiles=multiprocessors)


def test_more_parts_than_a_chunk_and_blocks_of_one_column():
    """Parts in two chunks and three, of which the last one is cut; tiles of two columns."""
    case = ConvCase("many", 3, 8, 58, 57, 8)
    for rows in (case, dataclasses.replace(case, n=6, k=136)):
        given = drawn(rows)
        for schedule in (Schedule(), Schedule("random", "shuffled", seed=3)):
            y, stats, report = run(rows, given, NAMES[1], schedule=schedule, resident_blocks=7)
            assert report["plan"]["blocks"] % -(-rows.k // 128) == 0
            require(rows, *given, y, stats)
        assert report["plan"]["workspace_bytes"] > 64 * rows.k * 8


def test_more_columns_than_multiprocessors():
    case = ConvCase("columns", 1, 8, 12, 11, 504)
    given = drawn(case)
    y, stats, report = run(case, given, NAMES[0], gpu=FEW, resident_blocks=3)
    require(case, *given, y, stats)
    assert report["plan"]["blocks"] == 4


@behind
def test_the_same_bits_in_every_order(normed):
    case = NAMED["1x3"]
    given = drawn(case, torch.float16, exact=False, normed=normed)
    for name in NAMES:
        results = [
            run(case, given, name, schedule=order, gpu=(5, *emulated.H200[1:]), resident_blocks=4)
            for order in (Schedule(), Schedule("lazy", "reverse"), Schedule("random", "shuffled"))
        ]
        for y, stats, _ in results[1:]:
            assert torch.equal(y, results[0][0]) and torch.equal(stats, results[0][1])


@every
def test_a_nan_is_its_channels_alone(name):
    """A filter's meets the zeros of pixels and channels that do not exist."""
    case = NAMED["1x3"]
    x, _, weight = drawn(case, torch.float16)
    weight[70, 5, 0, 1] = torch.nan
    y, stats, _ = run(case, (x, None, weight), name, gpu=FEW)
    assert y[:, 70].isnan().all() and stats[:, 70].isnan().all()
    rest = [k for k in range(case.k) if k != 70]
    require_stats(y[:, rest], stats[:, rest])


@every
@behind
def test_what_it_costs(name, normed):
    """No bank conflict; each byte of memory that the layer has, and its parts' moments.

    L2 is asked for the pixels once a column of tiles, and for a block's filters once.
    """
    case = ConvCase("layer1.conv3", 1, 64, 16, 48, 256)
    given = drawn(case, normed=normed)
    y, stats, report = run(case, given, name, counting=True, gpu=(4, *emulated.H200[1:]))
    require(case, *given, y, stats)
    assert report["counters"]["bank_conflicts"] == 0
    tensors = report["tensors"]
    assert tensors["x"]["unique_bytes_read"] == given[0].nbytes
    assert tensors["weight"]["unique_bytes_read"] == given[2].nbytes
    assert tensors["y"]["unique_bytes_written"] == y.nbytes
    asked = {
        site["file"].rpartition("/")[2]: site["counters"]["global_load_bytes_asked"]
        for site in report["sites"]
        if site["instruction"] == "cp.async.bulk.tensor.tile"
    }
    filters, pixels = report["plan"]["blocks"] * 128 * 64 * 2, given[0].nbytes * case.k // 128
    assert asked == {"conv_bn_act_sm90.cuh": filters, "tap_steps.h": pixels}
    # A part for each consumer: its mean and M2, of each channel; a counter each.
    parts, columns = 4, case.k // 64
    assert tensors["workspace"]["unique_bytes_written"] == parts * case.k * 8 + columns * 4


# The plan.

EXPAND = ConvCase("layer3.conv3", 256, 256, 14, 14, 1024)


def test_layers_whose_filters_stay():
    """At batch 256 those of all 1x1 of up to 512 channels but 64 to 64."""
    taken = set()
    for case in cases.RESNET50_LAYERS:
        if case.c % 8 != 0 or case.r != 1:
            continue
        made = planned(dataclasses.replace(case, n=256), prologue=case.k == 4 * case.c)
        stays = name_of(made) in NAMES
        assert stays == (case.c <= 512 and (case.c, case.k) != (64, 64)), (case, made["why"])
        taken.add(name_of(made))
    assert taken >= set(NAMES)


def test_it_is_ahead_of_tiles_that_bring_filters():
    other = [
        planned(EXPAND, configuration=i, splits=1)["cycles"]
        for i, tile in enumerate(emulated.load().conv_bn_stats_configurations())
        if tile["name"] in BRINGING
    ]
    assert planned(EXPAND)["cycles"] < 0.75 * min(other)


REFUSED = [
    (dataclasses.replace(EXPAND, c=520), {}, "weight: 9 steps of 64 channels of a tap"),
    (stats_tests.LAYER1, {}, "weight: 9 steps of 64 channels of a tap"),
    (EXPAND, {"dtype": torch.float32}, "dtype: float32 is not served"),
    (EXPAND, {"y": 4098}, "out: address is "),
    (ConvCase("huge", 50_000, 8, 224, 224, 8), {}, "batch: more pixels than a launch counts"),
]


@pytest.mark.parametrize(("case", "changes", "said"), REFUSED, ids=range(len(REFUSED)))
def test_what_they_cannot_take_is_refused_in_words(case, changes, said):
    for name, tile in tiles().items():
        with pytest.raises(ValueError, match=said) as error:
            planned(case, configuration=tile["index"], **changes)
        assert name in str(error.value)
    made = planned(case, **changes)
    assert name_of(made) not in NAMES


def test_splits_other_gpus_and_five_steps_beside_eight_stages_are_refused():
    for tile in tiles().values():
        with pytest.raises(ValueError, match="splits: only 1 is served by TMA"):
            planned(EXPAND, configuration=tile["index"], splits=2)
        for gpu in (emulated.A100, (*emulated.H200[:3], 100)):
            with pytest.raises(ValueError, match="for GPUs of capability 9.0"):
                planned(EXPAND, configuration=tile["index"], gpu=gpu)
    with pytest.raises(ValueError, match="weight: 5 steps.*of 4 stay"):
        planned(dataclasses.replace(EXPAND, c=264), configuration=tiles()[NAMES[0]]["index"])


@every
def test_the_self_check_passes(name):
    names = tuple(tile["name"] for tile in emulated.load().conv_bn_stats_configurations())
    _cuda_stats_checks.check(name, "cpu", stats_tests.launch, stats_tests.plan_index, names)
