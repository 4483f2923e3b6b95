"""conv_chain_fp8 by TMA and wgmma, emulated: its numbers, costs, refusals, choice and faults."""

from __future__ import annotations

import dataclasses
import functools
import os

import emulated
import emulated_chains_fp8 as chains
import mutants
import pytest
import torch
from emulated import Schedule
from emulated_chains_fp8 import beyond, one_by_one, operands_of, plan, wrong
from fp8_operands import E4M3, same_bits
from mutants import HOSTILE, Mutant, Trial

from resnet_fused import numerics, roofline
from resnet_fused.cases import RESNET50_CHAINS, ChainCase
from resnet_fused.ops import _cuda_chain_fp8_checks as checks

pytestmark = pytest.mark.emulated

WHOLE = os.environ.get("HYPOTHESIS_PROFILE") == "proof"
CONFIGURATIONS = 5
PROJECTING, SHARING = 3, 4  # places; of SHARING two blocks share filters
every = pytest.mark.parametrize("place", range(CONFIGURATIONS))
ONE, TWO = ((count, *emulated.H200[1:]) for count in (1, 2))
"""So few multiprocessors that blocks stay for several tiles."""
# Tiles, steps of out and of next, and what a tile reads: whole, or cut; parts of a sum, two steps,
# too. A block's tiles are more than its buffers.
EVEN = ChainCase("even", 1, 64, 16, 16, 256, 64)
ODD = ChainCase("odd", 2, 48, 9, 11, 80, 48)
MANY = ChainCase("many", 3, 64, 13, 11, 144, 48)
TINY = ChainCase("tiny", 1, 16, 1, 3, 16, 16)
THINNED = dataclasses.replace(MANY, name="thinned", out_stride=2)
SHORT = ChainCase("short", 1, 64, 16, 32, 64, 64)  # of `out` a step
CASES = (EVEN, ODD, MANY, TINY, THINNED)


@functools.cache
def tiles() -> list[dict]:
    return chains.configurations()


def room(place: int, what: str) -> int:
    """Channels of x ("_k") or of a projection ("_d") that a configuration has room for."""
    return int(tiles()[place]["name"].partition(what)[2].split("_")[0] or 0)


def filling(case: ChainCase, place: int) -> ChainCase:
    """With a projection, and with more channels, where a configuration is made for them."""
    more = 64 if room(place, "_k") > 64 else 0
    wide = 64 if tiles()[place]["n"] > 64 else 0
    projected = room(place, "_d") - (16 if case.k < 64 else 0) if room(place, "_d") else 0
    return dataclasses.replace(case, k=case.k + more, m=case.m + wide, projected=projected)


def sharing(place: int) -> int:
    """Blocks of a cluster."""
    return 2 if tiles()[place]["name"].endswith("_2c") else 1


def tiles_of(case: ChainCase, place: int) -> int:
    """As many for each block of a cluster."""
    return -(-case.pixels // (128 * sharing(place))) * sharing(place)


def run(place, case, operands, **settings):
    return chains.run(operands, case, configuration=place, **settings)


def same(got, expected) -> bool:
    return all(same_bits(a, b) for a, b in zip(got, expected, strict=True))


def test_each_configuration_has_a_test_and_fits():
    assert len(tiles()) == CONFIGURATIONS
    for tile in tiles():
        assert tile["shared_bytes"] <= emulated.H200[1] and tile["name"].startswith("tma_")


@every
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_bit_is_right(place, case):
    """On integers; schedule, walk and the number of blocks change from case to case."""
    number = CASES.index(case) * CONFIGURATIONS + place
    case = filling(case, place)
    operands = operands_of(case)
    got, report = run(
        place,
        case,
        operands,
        schedule=dataclasses.replace(emulated.SCHEDULES[number % 9], seed=number),
        reverse=number % 2 == 1,
        gpu=(ONE, TWO, emulated.H200)[number % 3],
        resident_blocks=2,
    )
    assert not wrong(got, operands, case)
    most = (sharing(place), 2, 132)[number % 3]
    assert report["plan"]["blocks"] == min(most, tiles_of(case, place))


@every
def test_tiles_of_one_step_do_not_meet(place):
    """Where `out` has no second step, the tile before may still be on its way to memory."""
    case = filling(SHORT, place)
    operands = operands_of(case)
    got, _ = run(place, case, operands, schedule=HOSTILE[0], gpu=ONE, resident_blocks=2)
    assert not wrong(got, operands, case)


@every
def test_the_self_checks_cases_are_exact(place):
    """The last of them is for a GPU: as many tiles take minutes here."""
    for case in checks.cases_of(tiles()[place]["name"])[:-1]:
        operands = operands_of(case)
        got, _ = run(place, case, operands, gpu=TWO, resident_blocks=2)
        assert not wrong(got, operands, case), case


@every
@pytest.mark.parametrize("rounding", ["nearest", "toward_zero"])
def test_chained_is_unchained_bit_for_bit(place, rounding):
    """On noise as well, since a chain's sums have the same parts in the same order."""
    for case in (filling(MANY, place), filling(THINNED, place)):
        operands = operands_of(case, exact=False)
        schedule = Schedule("random", "reverse", rounding, place)
        got, _ = run(place, case, operands, schedule=schedule, gpu=TWO, resident_blocks=2)
        assert same(got, one_by_one(operands, case, schedule=schedule))


@pytest.mark.parametrize("place", sorted(set(range(CONFIGURATIONS)) - {PROJECTING}))
@pytest.mark.parametrize("rounding", ["nearest", "toward_zero"])
def test_noise_is_within_the_bound(place, rounding):
    """But of a projection: what that is rounded to is not seen. Its bits are compared above."""
    case = filling(ODD, place)
    how = "nearest" if rounding == "nearest" else "truncate"
    operands = operands_of(case, exact=False)
    got, _ = run(place, case, operands, schedule=Schedule("random", "reverse", rounding, place))
    assert not beyond(got, operands, case, how)


@every
def test_the_same_bits_under_every_schedule(place):
    case = filling(MANY, place)
    operands = operands_of(case, exact=False)
    first, _ = run(place, case, operands, schedule=Schedule(), gpu=ONE)
    for schedule in emulated.SCHEDULES if WHOLE else HOSTILE[:2]:
        got, _ = run(place, case, operands, schedule=schedule, gpu=TWO, resident_blocks=2)
        assert same(got, first), schedule


@every
@pytest.mark.parametrize("out_stride", [1, 2])
def test_what_it_costs(place, out_stride):
    """No bank conflicts; each byte of the tensors from memory, and results in whole sectors."""
    case = dataclasses.replace(filling(EVEN, place), out_stride=out_stride)
    operands = operands_of(case)
    least = roofline.conv_chain_cost(case, E4M3).bytes
    _, report = run(place, case, operands, counting=True, gpu=ONE)
    assert report["counters"]["bank_conflicts"] == 0
    tensors = report["tensors"]
    moved = sum(t["unique_bytes_read"] + t["unique_bytes_written"] for t in tensors.values())
    assert least * 0.999 <= moved <= 1.1 * least
    assert tensors["out"]["unique_bytes_read"] == 0
    counted = report["counters"]
    assert counted["global_store_sectors"] * 32 == counted["global_store_bytes_asked"]
    # Activations once; filters for each of the two tiles, or for both at once.
    copy, together = "cp.async.bulk.tensor.tile", sharing(place) > 1
    asked = dict.fromkeys((copy, copy + ".multicast"), 0)
    for name, t in operands._asdict().items():
        if t is not None and t.dim() == 4:
            filters = "weight" in name
            kind = copy + ".multicast" if filters and together else copy
            asked[kind] += t.numel() * t.element_size() * (2 if filters and not together else 1)
    for kind, wanted in asked.items():
        sites = [site for site in report["sites"] if site["instruction"] == kind]
        assert sum(site["counters"]["global_load_bytes_asked"] for site in sites) == wanted, kind


@pytest.mark.parametrize("reverse", [False, True])
def test_where_the_walk_begins(reverse):
    """Of two blocks the first one has every other tile, from the first pixel or from the last."""
    operands = operands_of(MANY)
    (out, _), _ = run(0, MANY, operands, gpu=TWO, reverse=reverse, blocks=(0, 0))
    there = ~out.float().permute(0, 2, 3, 1).reshape(MANY.pixels, -1).isnan().any(1)
    tile = torch.arange(MANY.pixels) // 128
    assert torch.equal(there, (3 - tile if reverse else tile) % 2 == 0)


@pytest.mark.parametrize("reverse", [False, True])
def test_where_the_walk_of_clusters_begins(reverse):
    """Of two clusters the first one has every other pair of tiles; of the last pair's second tile
    there is nothing."""
    case = dataclasses.replace(filling(MANY, SHARING), n=4)
    operands = operands_of(case)
    four = (4, *emulated.H200[1:])
    (out, _), report = run(SHARING, case, operands, gpu=four, reverse=reverse, blocks=(0, 1))
    assert report["plan"]["blocks"] == 4 and tiles_of(case, SHARING) == 6
    there = ~out.float().permute(0, 2, 3, 1).reshape(case.pixels, -1).isnan().any(1)
    pair = torch.arange(case.pixels) // 256
    assert pair[-1] == 2 and case.pixels < 5 * 128
    assert torch.equal(there, (2 - pair if reverse else pair) % 2 == 0)


@pytest.mark.parametrize("name", ["x", "weight", "residual", "next_weight", "scale", "next_shift"])
def test_nan_comes_through_and_inf_saturates(name):
    """e4m3 has no infinity: one of scale or shift saturates, or makes NaN of a zero."""
    operands = operands_of(ODD, exact=False)
    t = getattr(operands, name)
    if t.dim() == 1:
        t[3], t[7] = float("nan"), float("inf")
    else:
        flat = t.permute(0, 2, 3, 1).reshape(-1).float()
        flat[3] = float("nan")
        shape = t.permute(0, 2, 3, 1).shape
        t.copy_(flat.view(shape).permute(0, 3, 1, 2).to(E4M3))
    got, _ = run(0, ODD, operands)
    expected = numerics.conv_chain_fp8_expected(operands, 1, 1, chains.SCALES)
    for y, wanted in zip(got, expected, strict=True):
        assert torch.equal(y.float().isnan(), wanted.float().isnan())
        assert torch.equal(y.float().abs() == 448, wanted.float().abs() == 448)


@pytest.mark.parametrize("place", [0, SHARING])
def test_it_may_begin_early(place):
    """Before its wait it reads constants alone, and it lets the next kernel begin."""
    case = filling(MANY, place)
    operands = operands_of(case)
    got, _ = run(place, case, operands, gpu=TWO, resident_blocks=2, flow=(True, True))
    assert not wrong(got, operands, case)


# Plans


def refusal(case, place=0, **changes):
    with pytest.raises(ValueError) as caught:
        plan(case, configuration=place, **changes)
    return str(caught.value)


def test_refusals_say_why():
    for gpu in (emulated.H200[:3], emulated.A100, (132, 232448, 233472, 100)):
        assert "for GPUs of capability 9.0" in refusal(ODD, gpu=gpu)
    changed = functools.partial(dataclasses.replace, ODD)
    assert "it takes no projection" in refusal(changed(projected=16))
    assert "it is made for a projection" in refusal(ODD, place=PROJECTING)
    assert "80 channels of the projection, at most 64" in refusal(
        changed(projected=80), place=PROJECTING
    )
    strided = changed(projected=16, projection_stride=2)
    assert "a projection of stride 2" in refusal(strided, place=PROJECTING)
    assert "it takes no 3x3 convolution in front" in refusal(changed(front=16))
    assert "no next convolution" in refusal(changed(m=0))
    assert "80 channels of x, at most 64 fit" in refusal(changed(k=80))
    assert "80 channels of next, at most 64 fit" in refusal(changed(m=80))
    assert "1040 channels of out, at most 1024 fit" in refusal(changed(c=1040))
    for odd in ("k", "c", "m"):
        assert "16 bytes at a time" in refusal(changed(**{odd: 40}))
    apart = (9 * 11 * 48 + 16, 1, 11 * 48, 48)
    assert "x: its pixels do not lie one behind the other" in refusal(ODD, x_stride=apart)
    assert "2 splits; a chain is not split" in refusal(ODD, splits=2)


def test_the_choice():
    """What ResNet-50's first two stages take."""
    chosen = {}
    for case in RESNET50_CHAINS:
        case = dataclasses.replace(case, n=256)
        fits = case.k <= 128 and case.m <= 128
        fits = fits and (case.projected <= 64 and case.projection_stride == 1)
        if not fits:
            with pytest.raises(ValueError, match="no configuration serves it"):
                plan(case)
            continue
        made = plan(case)
        chosen[case.name] = tiles()[made["configuration"]]["name"]
        assert made["blocks"] == 132
    assert chosen["layer1"] == "tma_128x64_8s_k64"
    assert chosen["layer1_first"] == "tma_128x64_6s_k64_d64"
    assert chosen["layer1_last"] == "tma_128x128_8s_k64"
    assert chosen["layer2"] == "tma_128x128_6s_k128_2c"


# Faults

CHUNKS = 4
FILES = {
    "conv_chain_sm90.cuh",
    "chain_box.h",
    "chain_steps.h",
    "quantised_chain.h",
    "warpgroup_epilogue.h",
    "warpgroup_tile.h",
    "pipeline.h",
}
# (file, the line's text, instruction, fault) -> why the fault does no harm there.
HARMLESS: dict[tuple[str, str, str, str], str] = {
    ("conv_chain_sm90.cuh", "ptx::sync_warp();", "bar.warp.sync", "skip"): (
        "the warp meets again behind what one of its lanes did; fibers wait for each other at the "
        "next instruction of the warp in any case"
    ),
}
# More steps than stages, more tiles than buffers.
FAULTY = (
    (0, dataclasses.replace(MANY, c=272)),
    (1, dataclasses.replace(MANY, m=112)),
    (2, dataclasses.replace(MANY, k=112, m=112)),
    (3, dataclasses.replace(MANY, projected=48)),
    (0, THINNED),
    # Pairs of tiles, of which the last one is half.
    (SHARING, dataclasses.replace(MANY, n=4, k=112, m=112)),
)


@functools.cache
def found() -> dict[Mutant, list[Trial]]:
    """Every mutant, with the trials that reach it. Clean runs pass."""
    return mutants.reached(chains.trials(FAULTY, ONE))


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_every_fault_is_noticed(chunk):
    mutants.check(found(), HARMLESS, chunk, CHUNKS)


def test_the_faults_are_of_every_kind():
    assert {mutant.key[0] for mutant in found()} == FILES
    assert set(HARMLESS) <= {mutant.key for mutant in found()}
    planted = {(mutant.instruction, mutant.fault) for mutant in found()}
    for wanted in (
        ("mbarrier.try_wait.parity", "skip"), ("fence.proxy.async", "no_fence"),
        ("fence.mbarrier_init", "no_fence"), ("mbarrier.arrive.expect_tx", "wrong_bytes"),
        ("wgmma.wait_group", "wait_one_fewer"), ("cp.async.bulk.wait_group.read", "skip"),
        ("griddepcontrol.wait", "skip"), ("wgmma.e4m3", "stale_accumulator"), ("bar.sync", "skip"),
        ("cp.async.bulk.tensor.tile.multicast", "row_off"), ("barrier.cluster.arrive", "skip"),
        ("mbarrier.arrive.relaxed.cluster", "skip"), ("mapa", "wrong_lane"),
    ):  # fmt: skip
        assert wanted in planted, sorted(planted)
