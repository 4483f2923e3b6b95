"""conv_bn_stats by TMA and wgmma, emulated: numbers, costs, the plan, the self-check."""

from __future__ import annotations

import dataclasses

import emulated
import pytest
import test_emulated_stats as stats_tests
import torch
from conv_by_tma import CASES, DTYPES, FEW
from emulated import Schedule
from matrix import SPREADS, spread_values
from test_emulated_stats import call, operands, planned, require, require_stats

from resnet_fused import cases
from resnet_fused.cases import ConvCase
from resnet_fused.ops import _cuda_stats_checks

pytestmark = pytest.mark.emulated

NAMES = ("tma_s256x128_3s", "tma_s192x128_4s", "tma_s192x64_5s_t", "tma_s128x64_6s_t",
         "tma_s256x128_3s_2c", "tma_s256x128_3s_2p", "tma_s192x128_4s_2p")  # fmt: skip
every = pytest.mark.parametrize("name", NAMES)
NAMED = {case.name: case for case in CASES}
TURNS, TOGETHER, SHARED, PIXELS = NAMES[3], NAMES[1], NAMES[4], NAMES[5]


def tiles() -> dict[str, dict]:
    """The configurations by TMA that bring each tap's filters by itself, by name."""
    return {name: tile for name, tile in by_tma(window=False).items() if "stay" not in name}


def by_tma(*, window: bool) -> dict[str, dict]:
    """Those by windows of positions, or the others."""
    table = emulated.load().conv_bn_stats_configurations()
    return {
        tile["name"]: tile | {"index": i}
        for i, tile in enumerate(table)
        if tile["tma"] and not tile["image"] and bool(tile["window"]) == window
    }


def run(case, given, name, **settings):
    """y, statistics and report of a configuration."""
    settings = {"schedule": Schedule(), "splits": 1, **settings}
    y, stats, report = call(case, *given, configuration=tiles()[name]["index"], **settings)
    assert report["plan"]["configuration"] == tiles()[name]["index"]
    return y, stats, report


def drawn(case, dtype=torch.bfloat16, **more):
    x, _, weight = operands(case, dtype, **more)
    return x, None, weight


def test_each_configuration_has_a_test_and_fits():
    assert tuple(tiles()) == NAMES
    for tile in tiles().values():
        assert tile["shared_bytes"] <= emulated.H200[1] and not tile["float32"]


@every
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_bit_is_right(name, case):
    """On integers; dtype, schedule and the number of blocks change from case to case."""
    number = CASES.index(case) * len(NAMES) + NAMES.index(name)
    given = drawn(case, DTYPES[number % 2])
    schedule = dataclasses.replace(emulated.SCHEDULES[number % 9], seed=number)
    few = number % 3 != 0
    y, stats, _ = run(
        case, given, name, schedule=schedule, gpu=FEW if few else emulated.H200, resident_blocks=2
    )
    require(case, *given, y, stats)


def pixels_of_channels(values, dtype, channels=8):
    """A 1x1 convolution that copies its channels, and pixels that are such values."""
    size = values.numel()
    x = values.to(dtype).view(1, 1, 1, size).expand(1, channels, 1, size)
    weight = torch.eye(channels, dtype=dtype).view(channels, channels, 1, 1)
    case = ConvCase("copies", 1, channels, 1, size, channels)
    return case, tuple(t.contiguous(memory_format=torch.channels_last) if t is not None else None
                       for t in (x, None, weight))  # fmt: skip


@pytest.mark.parametrize("name", [TURNS, TOGETHER])
@pytest.mark.parametrize("kind", SPREADS)
def test_statistics_of_hard_values_over_many_tiles(kind, name):
    """As the kernel for sm_80's: a block that keeps them over many tiles loses nothing."""
    for dtype, kappa in ((torch.float16, 1e3), (torch.bfloat16, 4.0)):
        values = spread_values(kind, kappa, 6000).clamp(-(2**14), 2**14)
        case, given = pixels_of_channels(values, dtype)
        for multiprocessors in (1, 5):
            gpu = (multiprocessors, *emulated.H200[1:])
            y, stats, report = run(case, given, name, gpu=gpu)
            assert torch.equal(y, given[0]) and report["plan"]["blocks"] == multiprocessors
            require_stats(y, stats, tiles=multiprocessors)


@pytest.mark.parametrize("name", [TURNS, SHARED, PIXELS])
def test_more_parts_than_a_chunk_and_blocks_of_one_column(name):
    """Parts in two chunks and three, of which the last one is cut; tiles of three columns."""
    case = ConvCase("many", 3, 8, 58, 57, 8)
    for rows in (case, dataclasses.replace(case, n=6, k=136)):
        given = drawn(rows)
        for schedule in (Schedule(), Schedule("random", "shuffled", seed=3)):
            y, stats, report = run(rows, given, name, schedule=schedule, resident_blocks=7)
            columns = -(-rows.k // tiles()[name]["n"])
            assert report["plan"]["blocks"] % columns == 0
            require(rows, *given, y, stats)
        if name == TURNS:
            assert report["plan"]["workspace_bytes"] > 64 * rows.k * 8


def test_more_columns_than_multiprocessors():
    case = ConvCase("columns", 1, 8, 12, 11, 200)
    given = drawn(case)
    for name, blocks in ((TURNS, 4), (SHARED, 4), (PIXELS, 2)):
        y, stats, report = run(case, given, name, gpu=FEW, resident_blocks=3)
        require(case, *given, y, stats)
        assert report["plan"]["blocks"] == blocks


def test_the_same_bits_whichever_comes_last():
    case = NAMED["3x3_wide"]
    given = drawn(case, exact=False)
    for name in NAMES:
        results = [
            run(case, given, name, schedule=order, gpu=(5, *emulated.H200[1:]), resident_blocks=4)
            for order in (Schedule(), Schedule("lazy", "reverse"), Schedule("random", "shuffled"))
        ]
        for y, stats, _ in results[1:]:
            assert torch.equal(y, results[0][0]) and torch.equal(stats, results[0][1])


@every
def test_nan_beyond_the_last_pixel_is_nobodys(name):
    """A filter's NaN meets the zeros of pixels that do not exist: its channel's alone is NaN."""
    case = NAMED["3x3"]
    x, _, weight = drawn(case, torch.float16)
    weight[3, 5, 1, 1] = torch.nan
    y, stats, _ = run(case, (x, None, weight), name, gpu=FEW)
    assert y[:, 3].isnan().all() and stats[:, 3].isnan().all()
    rest = [k for k in range(case.k) if k != 3]
    require_stats(y[:, rest], stats[:, rest])


@pytest.mark.parametrize("name", [TURNS, TOGETHER])
@pytest.mark.parametrize("pixel", [0, 700, 2999])
def test_what_holds_an_inf_has_no_mean(name, pixel):
    """As torch's, whichever tile and part it is in."""
    case, (x, _, weight) = pixels_of_channels(torch.ones(3000), torch.bfloat16)
    x[0, 0, 0, pixel] = torch.inf
    weight[:] = 1
    y, stats, _ = run(case, (x, None, weight), name, gpu=FEW)
    assert y.isinf().sum() == case.k and stats.isnan().all()


@every
def test_what_it_costs(name):
    """No bank conflict; of memory what the layer has, each byte of it, and its parts' moments."""
    case = ConvCase("layer2.conv2", 1, 128, 8, 48, 128, 3, 3, (1, 1), (1, 1))
    given = drawn(case)
    y, stats, report = run(case, given, name, counting=True)
    require(case, *given, y, stats)
    assert report["counters"]["bank_conflicts"] == 0
    tensors = report["tensors"]
    assert tensors["x"]["unique_bytes_read"] == given[0].nbytes
    assert tensors["weight"]["unique_bytes_read"] == given[2].nbytes
    assert tensors["y"]["unique_bytes_written"] == y.nbytes
    parts = -(-case.h * case.w // tiles()[name]["m"])
    assert tensors["workspace"]["unique_bytes_written"] == parts * case.k * 8 + 2 * 4


# The plan.

LAYER1 = stats_tests.LAYER1
EXPAND = ConvCase("layer1.conv3", 256, 64, 56, 56, 256)


def name_of(plan):
    return emulated.load().conv_bn_stats_configurations()[plan["configuration"]]["name"]


def test_layers_that_read_no_batch_norm_are_served_by_them():
    taken = set()
    for case in cases.RESNET50_LAYERS:
        made = planned(dataclasses.replace(case, n=256), prologue=False)
        if name_of(made).startswith("halo_"):
            assert case.r == 3 and case.c == 512, case.name
            continue
        if name_of(made).startswith("tma_win"):
            assert case.r == 3 and case.c <= 256, case.name
            continue
        if name_of(made).startswith("tma_stay"):
            assert case.r == 1 and case.c <= 512, case.name
            continue
        assert (name_of(made) in NAMES) == (case.c % 8 == 0), (case.name, made["why"])
        taken.add(name_of(made))
    assert len(taken) >= 3, taken


def test_blocks_keep_to_their_channels():
    """132 multiprocessors: 2 tiles of channels take all, 8 of them 128."""
    for k, blocks in ((64, 132), (256, 132), (1024, 128), (2048, 128)):
        case = dataclasses.replace(EXPAND, k=k)
        made = planned(case, prologue=False, configuration=tiles()[NAMES[0]]["index"], splits=1)
        assert made["blocks"] == blocks


REFUSED = [
    (LAYER1, {"dtype": torch.float32}, "dtype: float32 is not served"),
    (LAYER1, {"y": 4098}, "out: address is "),
    (dataclasses.replace(LAYER1, c=12), {}, "x: strides"),
    (dataclasses.replace(LAYER1, groups=2), {}, "groups: 32 channels of each"),
    (ConvCase("huge", 50_000, 8, 224, 224, 8), {}, "batch: more pixels than a launch counts"),
]


@pytest.mark.parametrize(("case", "changes", "said"), REFUSED, ids=[said for *_, said in REFUSED])
def test_what_they_cannot_take_is_refused_in_words(case, changes, said):
    changes = {"prologue": False, **changes}
    for name, tile in tiles().items():
        with pytest.raises(ValueError, match=said) as error:
            planned(case, configuration=tile["index"], **changes)
        assert name in str(error.value)
    made = planned(case, **changes)
    assert name_of(made) not in NAMES and f"; no TMA: {said}" in made["why"]


def test_splits_and_other_gpus_are_refused():
    for tile in tiles().values():
        with pytest.raises(ValueError, match="splits: only 1 is served by TMA"):
            planned(LAYER1, prologue=False, configuration=tile["index"], splits=2)
        for gpu in (emulated.A100, (*emulated.H200[:3], 100)):
            with pytest.raises(ValueError, match="for GPUs of capability 9.0"):
                planned(LAYER1, prologue=False, configuration=tile["index"], gpu=gpu)
            assert "TMA" not in planned(LAYER1, prologue=False, gpu=gpu)["why"]


def test_strided_images_and_outputs_are_right():
    """x within a wider and longer image: any strides do."""
    case = NAMED["1x1"]
    x, _, weight = drawn(case)
    room = torch.full((2, 12, 20, 80), torch.nan, dtype=torch.bfloat16).permute(0, 3, 1, 2)
    given = (room[:, 8:80, 1:10, 2:20:2].copy_(x), None, weight)
    for name in NAMES:
        y, stats, _ = run(case, given, name, gpu=FEW)
        require(case, *given, y, stats)


@every
def test_the_self_check_passes(name):
    names = tuple(tile["name"] for tile in emulated.load().conv_bn_stats_configurations())
    _cuda_stats_checks.check(name, "cpu", stats_tests.launch, stats_tests.plan_index, names)
