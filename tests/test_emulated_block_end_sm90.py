"""bn_add_act_conv_stats by TMA and wgmma, emulated: every bit, each element of out stored once,
costs, the plan, the self-check."""

from __future__ import annotations

import dataclasses

import emulated
import pytest
import test_emulated_block_end as ends
import torch
from conv_by_tma import DTYPES, FEW
from emulated import Schedule
from matrix import SPREADS, lay_out, spread_values
from test_emulated_block_end import call, configurations, exact, noise, planned, require

from resnet_fused import numerics, roofline
from resnet_fused.cases import RESNET50_LAYERS, ConvCase
from resnet_fused.ops import _cuda_block_end_checks
from resnet_fused.ops._library import overload

pytestmark = pytest.mark.emulated

NAMES = ("tma_s128x256_3s", "tma_s128x128_4s", "tma_s64x256_4s", "tma_s64x128_6s")
every = pytest.mark.parametrize("name", NAMES)
either = pytest.mark.parametrize("projected", [False, True], ids=["as_it_is", "projected"])
CASES = (
    # Tiles cut along both sides; a column of them cut within the second half of a warpgroup's
    # channels, within the first one, and before a warpgroup has any.
    ConvCase("odd", 3, 200, 7, 9, 136),
    ConvCase("half", 2, 72, 9, 9, 72),
    ConvCase("quarter", 2, 64, 11, 13, 40),
    # Several columns, of which one stores nothing: fewer steps than columns; and more steps.
    ConvCase("wide", 2, 64, 9, 8, 520),
    ConvCase("columns", 1, 456, 8, 9, 392),
    # More steps than stages, by no multiple of them; many tiles, one step each; one pixel.
    ConvCase("deep", 1, 648, 13, 10, 264),
    ConvCase("many", 2, 64, 18, 35, 64),
    ConvCase("pixel", 1, 16, 1, 1, 8),
)
NAMED = {case.name: case for case in CASES}


def tiles() -> dict[str, dict]:
    """The configurations by TMA, by name."""
    return {t["name"]: t | {"index": i} for i, t in enumerate(configurations()) if t["tma"]}


def run(given, name, **settings):
    """(out, z, stats) and report of a configuration."""
    settings = {"schedule": Schedule(), "splits": 1, **settings}
    got, report = call(given, configuration=tiles()[name]["index"], **settings)
    assert report["plan"]["configuration"] == tiles()[name]["index"]
    return got, report


def test_each_configuration_has_a_test_and_fits():
    assert tuple(tiles()) == NAMES
    for tile in tiles().values():
        assert tile["shared_bytes"] <= emulated.H200[1] and not tile["float32"]


@every
@either
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_bit_is_right(name, case, projected):
    """On integers; dtype, schedule and the number of blocks change from case to case."""
    number = 2 * CASES.index(case) + NAMES.index(name) + projected
    given = exact(case, DTYPES[number % 2], projected)
    schedule = dataclasses.replace(emulated.SCHEDULES[number % 9], seed=number)
    few = number % 3 != 0
    got, _ = run(
        given, name, schedule=schedule, gpu=FEW if few else emulated.H200, resident_blocks=2
    )
    require(given, got)


@every
@either
def test_noise_is_within_the_bound(name, projected):
    for case in (NAMED["odd"], NAMED["deep"]):
        for dtype in DTYPES:
            given = noise(case, dtype, projected)
            *end, weight = given
            (out, z, stats), _ = run(given, name, gpu=FEW)
            oracle = numerics.bn_add_act_oracle(*end)
            found = numerics.check_bound(out, oracle, numerics.bn_add_act_bound(*end, 0, oracle))
            assert found.ok, str(found)
            product = numerics.conv_bn_stats_oracle(out, None, weight)
            bound = numerics.conv_bn_stats_bound(out, None, weight, product)
            assert (found := numerics.check_bound(z, product, bound)).ok, str(found)
            ends.require_stats(z, stats)


@either
def test_out_has_the_values_of_bn_add_act(projected):
    """To the last bit, but for the sign of a zero."""
    *end, weight = noise(NAMED["odd"], torch.bfloat16, projected)
    (out, *_), _ = run((*end, weight), NAMES[0])
    assert torch.equal(out, overload("bn_add_act", emulated.NAME)(*end, 0, "relu"))


@pytest.mark.parametrize("kind", SPREADS)
def test_statistics_of_hard_values_over_many_tiles(kind):
    """In both halves of the channels; a block that keeps them over many tiles loses nothing."""
    for dtype, kappa in ((torch.float16, 1e3), (torch.bfloat16, 4.0)):
        values = spread_values(kind, kappa, 3000).clamp(0, 2**14).to(dtype)
        y = lay_out(values.view(1, 1, 60, 50).expand(1, 136, 60, 50).contiguous(), "nhwc")
        rows = torch.ones(4, 136)
        rows[1] = 0
        weight = lay_out(torch.eye(136).view(136, 136, 1, 1).to(dtype), "nhwc")
        for multiprocessors in (1, 5):
            gpu = (multiprocessors, *emulated.H200[1:])
            given = (y, rows, torch.zeros_like(y), None, weight)
            (out, z, stats), report = run(given, NAMES[0], gpu=gpu)
            assert torch.equal(z, y) and torch.equal(out, y)
            assert report["plan"]["blocks"] == multiprocessors
            ends.require_stats(z, stats, tiles=multiprocessors)


def test_more_parts_than_a_chunk_and_columns():
    """Parts in two chunks, of which the last one is cut; tiles of two columns."""
    case = ConvCase("many", 2, 8, 58, 57, 8)
    for rows in (case, dataclasses.replace(case, k=136)):
        given = exact(rows, torch.bfloat16)
        for schedule in (Schedule(), Schedule("random", "shuffled", seed=3)):
            got, report = run(given, NAMES[3], schedule=schedule, resident_blocks=7)
            assert report["plan"]["blocks"] % -(-rows.k // 128) == 0
            require(given, got)
        assert report["plan"]["workspace_bytes"] > 64 * case.k * 8


def test_more_columns_than_multiprocessors():
    given = exact(ConvCase("columns", 1, 200, 12, 11, 504), torch.float16)
    got, report = run(given, NAMES[1], gpu=FEW, resident_blocks=3)
    require(given, got)
    assert report["plan"]["blocks"] == 4


@either
def test_the_same_bits_in_every_order(projected):
    given = noise(NAMED["odd"], torch.float16, projected)
    for name in NAMES:
        results = [
            run(given, name, schedule=order, gpu=(5, *emulated.H200[1:]), resident_blocks=4)[0]
            for order in (Schedule(), Schedule("lazy", "reverse"), Schedule("random", "shuffled"))
        ]
        for got in results[1:]:
            assert all(map(torch.equal, got, results[0]))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", range(5))
def test_nan_and_inf_go_where_they_go_in_two_kernels(place, value):
    given = ends.strike(place, value)
    ends.require_struck(given, run(given, NAMES[place % 4], gpu=FEW)[0], place, value)


@every
def test_what_does_not_exist_is_zero_and_not_the_shift(name):
    """Behind the last pixel and the last channel, where out would be a constant that is not 0."""
    given = exact(ConvCase("few", 1, 40, 5, 5, 24), torch.float16)
    given[1][1] = 2
    given[3][1] = 1
    given[4][3, 5] = 1
    require(given, run(given, name)[0])


@every
@either
def test_what_it_costs(name, projected):
    """No bank conflict; each byte of memory that the roofline has; L2 is asked for the pixels once
    a column of tiles, and each byte of out is stored by one of them."""
    case = ConvCase("costs", 2, 256, 16, 12, 264)
    given = exact(case, torch.bfloat16, projected)
    (out, z, stats), report = run(given, name, counting=True, gpu=(4, *emulated.H200[1:]))
    require(given, (out, z, stats))
    assert report["counters"]["bank_conflicts"] == 0
    tensors = report["tensors"]
    y, norm, residual, own, weight = given
    for key, t in {"y": y, "residual": residual, "weight": weight}.items():
        assert tensors[key]["unique_bytes_read"] == t.nbytes, key
    rows = norm.nbytes // 2  # two of four
    assert tensors["norm"]["unique_bytes_read"] == rows
    assert own is None or tensors["residual_norm"]["unique_bytes_read"] == rows
    for key, t in {"out": out, "z": z}.items():
        assert tensors[key]["unique_bytes_written"] == t.nbytes
    cost = roofline.bn_add_act_conv_stats_cost(case, torch.bfloat16, projected=projected)
    moved = sum(t.nbytes for t in (y, residual, weight, out, z, stats))
    assert moved + rows * (2 if projected else 1) <= 1.1 * cost.bytes
    sites = report["sites"]
    stored = sum(
        site["counters"]["global_store_bytes_asked"]
        for site in sites
        if site["file"].endswith("block_end_steps.h")
    )
    assert stored == out.nbytes
    asked = sum(
        site["counters"]["global_load_bytes_asked"]
        for site in sites
        if site["file"].endswith("tap_steps.h")
    )
    tile = tiles()[name]
    columns = -(-case.k // tile["n"])
    assert asked == columns * (y.nbytes + residual.nbytes)


# The plan.

FIRST = ConvCase("first", 256, 256, 56, 56, 64)
THIRD = ConvCase("third", 256, 1024, 14, 14, 256)


def name_of(plan: dict) -> str:
    return configurations()[plan["configuration"]]["name"]


def test_the_plan_takes_them_for_the_layers_of_resnet50():
    """Pixels are made once for up to 256 channels; beside the older kernel it is ahead."""
    for case in RESNET50_LAYERS:
        if case.r != 1 or case.c != 4 * case.k:
            continue
        many = dataclasses.replace(case, n=256)
        made = planned(many, projected=False)
        assert name_of(made) == (NAMES[1] if case.k <= 128 else NAMES[0]), (case, made["why"])
        assert made["cycles"] < 0.92 * planned(many, projected=False, gpu=ends.OTHER)["cycles"]
    assert name_of(planned(dataclasses.replace(THIRD, n=32, c=512, k=128))) == NAMES[3]


def test_a_projection_is_predicted_to_cost_nothing():
    """Those who make the block's end are not what a step waits for, with it or without."""
    for name in NAMES:
        index = tiles()[name]["index"]
        plain = planned(THIRD, projected=False, configuration=index)
        assert plain["cycles"] == planned(THIRD, configuration=index)["cycles"]


REFUSED = [
    (FIRST, {"dtype": torch.float32, "projected": False}, "dtype: float32 is not served"),
    (ConvCase("huge", 50_000, 8, 224, 224, 8), {}, "batch: more pixels than a launch counts"),
    (FIRST, {"z": 4098}, "z: address is "),
    (FIRST, {"z_stride": (64 * 3136, 3136, 56, 1)}, "z: its channels are not adjacent"),
]


@pytest.mark.parametrize(("case", "changes", "said"), REFUSED, ids=range(len(REFUSED)))
def test_what_they_cannot_take_is_refused_in_words(case, changes, said):
    for name, tile in tiles().items():
        with pytest.raises(ValueError, match=said) as error:
            planned(case, configuration=tile["index"], **changes)
        assert name in str(error.value)
    made = planned(case, **changes)
    assert name_of(made) not in NAMES and f"; no TMA: {said}" in made["why"]


def test_splits_and_other_gpus_are_refused():
    for tile in tiles().values():
        with pytest.raises(ValueError, match="splits: only 1 is served by TMA"):
            planned(FIRST, configuration=tile["index"], splits=2)
        for gpu in (emulated.A100, (*emulated.H200[:3], 100)):
            with pytest.raises(ValueError, match="for GPUs of capability 9.0"):
                planned(FIRST, configuration=tile["index"], gpu=gpu)
    # Of a GPU that has no TMA nothing is said.
    assert "TMA" not in planned(FIRST, gpu=emulated.A100)["why"]


@every
def test_the_self_check_passes(name):
    names = tuple(tile["name"] for tile in configurations())
    _cuda_block_end_checks.check(name, "cpu", ends.launch, ends.plan_index, names)


def test_any_operand_may_lie_otherwise():
    """What the kernel cannot read is copied."""
    given = exact(NAMED["odd"], torch.float16)
    for place in (2, 4):
        for layout in ("nchw", "unaligned"):
            moved = list(given)
            moved[place] = lay_out(given[place], layout)
            require(moved, run(moved, NAMES[1])[0])
