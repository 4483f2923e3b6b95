"""conv_chain on wgmma with a 3x3 in front, emulated: its numbers, costs, refusals and faults."""

from __future__ import annotations

import dataclasses
import functools
import os

import emulated
import emulated_chains
import mutants
import pytest
import torch
from emulated import Schedule
from emulated_chains import DTYPES, beyond, limits_of, operands_of, plan, wrong
from mutants import HOSTILE, Mutant, Trial

from resnet_fused import numerics, roofline
from resnet_fused.cases import RESNET50_CHAINS, ChainCase
from resnet_fused.ops import _cuda_chain_checks as checks

pytestmark = pytest.mark.emulated

WHOLE = os.environ.get("HYPOTHESIS_PROFILE") == "proof"
# Name -> bytes of shared memory at 56 pixels a row, with 128 channels in front at 28, and the
# widest row.
FITS = {
    "tma_win128x64_3s_front64": (224256, 90),
    "tma_win128x128_2s_front64": (207872, 154),
    "tma_win128x64_2s_front64_d64": (226304, 78),
    "tma_win128x128_7s_front128_2c": (220160, 54),
}
NAMES = tuple(FITS)
PLAIN, BROAD, PROJECTING, SHARING = NAMES
every = pytest.mark.parametrize("name", NAMES)
ONE, TWO = ((count, *emulated.H200[1:]) for count in (1, 2))
"""So few multiprocessors that blocks stay for several tiles."""


def chain(name, n, h, w, c=256, m=64, out_stride=1):
    return ChainCase(name, n, 64, h, w, c, m, front=64, out_stride=out_stride)


CASES = (
    chain("images", 6, 5, 6, c=128, m=40),  # several in a tile, tiles that end in all places
    chain("even", 2, 12, 15),
    chain("pixels", 70, 1, 1, c=64, m=8),
    chain("column", 4, 31, 1, c=192, m=64),
    chain("row", 2, 1, 70, c=64, m=16),
    chain("wide", 1, 3, 90, c=64, m=24),  # all of the shared memory; up to three parts of a window
    chain("layer1", 1, 4, 56),
    chain("thinned", 3, 9, 11, m=56, out_stride=2),
    chain("thinned_even", 2, 10, 12, c=128, out_stride=2),
)
NAMED = {case.name: case for case in CASES}


@functools.cache
def index(name: str) -> int:
    return [tile["name"] for tile in emulated_chains.configurations()].index(name)


def filling(case: ChainCase, name: str) -> ChainCase:
    """With what a configuration has room for: a projection, more channels, wider rows."""
    front = 128 if name == SHARING else 64
    return dataclasses.replace(
        case,
        k=front,
        front=front,
        m=case.m + (64 if name in (BROAD, SHARING) else 0),
        projected=(40 if case.m % 16 else 64) if name == PROJECTING else 0,
        w=FITS[name][1] if case.name == "wide" else min(case.w, FITS[name][1]),
    )


def positions(case: ChainCase) -> int:
    """Of the walk, as far as its last pixel."""
    return case.n * (case.h + 1) * (case.w + 1) - (case.w + 1) - 1


def tiles_of(case: ChainCase, name: str) -> int:
    """As many for each block of a cluster."""
    sharing = 2 if name == SHARING else 1
    return -(-positions(case) // (128 * sharing)) * sharing


def run(name, case, operands, **settings):
    return emulated_chains.run(operands, case, configuration=index(name), **settings)


def test_each_configuration_has_a_test_and_fits():
    table = emulated_chains.configurations()
    found = [tile for tile in table if tile["tma"] and "_front" in tile["name"]]
    assert tuple(tile["name"] for tile in found) == NAMES
    for tile in found:
        assert tile["m"] == 128 and tile["n"] == (128 if "x128_" in tile["name"] else 64)
        assert tile["shared_bytes"] == FITS[tile["name"]][0] < emulated.H200[1]


@every
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_bit_is_right(name, case):
    """On integers; dtype, schedule, walk and the number of blocks change from case to case."""
    number = CASES.index(case) + NAMES.index(name)
    case = filling(case, name)
    for dtype in DTYPES if WHOLE else DTYPES[number % 2 :][:1]:
        operands = operands_of(case, dtype)
        got, report = run(
            name,
            case,
            operands,
            schedule=dataclasses.replace(emulated.SCHEDULES[number % 9], seed=number),
            reverse=number % 2 == 1,
            gpu=(ONE, TWO, emulated.H200)[number % 3],
            resident_blocks=2,
        )
        assert not wrong(got, operands, case)
        most = (2 if name == SHARING else 1, 2, 132)[number % 3]
        assert report["plan"]["blocks"] == min(most, tiles_of(case, name))


@every
def test_the_self_checks_cases_are_exact(name):
    """The last of them is for a GPU: as many tiles take minutes here."""
    for number, case in enumerate(checks.cases_of(name)[:-1]):
        operands = operands_of(case, DTYPES[number % 2])
        got, _ = run(name, case, operands, gpu=TWO, resident_blocks=2)
        assert not wrong(got, operands, case), case


@every
def test_the_same_bits_under_every_schedule(name):
    case = filling(NAMED["thinned"], name)
    operands = operands_of(case, DTYPES[0], exact=False)
    first, _ = run(name, case, operands, schedule=Schedule(), gpu=ONE)
    for schedule in emulated.SCHEDULES if WHOLE else HOSTILE[:2]:
        got, _ = run(name, case, operands, schedule=schedule, gpu=TWO, resident_blocks=2)
        assert all(torch.equal(a, b) for a, b in zip(got, first, strict=True)), schedule


@every
@pytest.mark.parametrize(
    ("dtype", "rounding"), [(DTYPES[0], "nearest"), (DTYPES[1], "toward_zero")], ids=str
)
def test_noise_is_within_the_bound(name, dtype, rounding):
    case = filling(NAMED["images"], name)
    how = "nearest" if rounding == "nearest" else "truncate"
    operands = operands_of(case, dtype, exact=False)
    got, _ = run(name, case, operands, schedule=Schedule("random", "reverse", rounding, 1))
    assert not beyond(got, operands, case, limits_of(operands, case, how), how)


@every
@pytest.mark.parametrize("out_stride", [1, 2])
def test_what_it_costs(name, out_stride):
    """No bank conflicts; each byte of the tensors from memory, and results in whole sectors."""
    case = dataclasses.replace(filling(NAMED["even"], name), out_stride=out_stride)
    operands = operands_of(case, DTYPES[0])
    least = roofline.conv_chain_cost(case, DTYPES[0]).bytes
    _, report = run(name, case, operands, counting=True, gpu=ONE)
    assert report["counters"]["bank_conflicts"] == 0
    tensors = report["tensors"]
    moved = sum(t["unique_bytes_read"] + t["unique_bytes_written"] for t in tensors.values())
    assert least * 0.999 <= moved <= 1.1 * least
    assert tensors["out"]["unique_bytes_read"] == 0
    counted = report["counters"]
    assert counted["global_store_sectors"] * 32 == counted["global_store_bytes_asked"]
    # Filters once for all tiles but those that come by steps, the shortcut once for each pixel. Two
    # blocks ask for theirs together.
    tiles = 1 if name == PLAIN else tiles_of(case, name) // (2 if name == SHARING else 1)
    kind = "cp.async.bulk.tensor.tile" + (".multicast" if name == SHARING else "")
    tiled = [s for s in report["sites"] if s["instruction"].startswith("cp.async.bulk.tensor.tile")]
    assert {site["instruction"] for site in tiled} == {kind}
    filters = [operands.weight, operands.front_weight, operands.projection_weight]
    filters = filters * (tiles if name == SHARING else 1) + [operands.next_weight] * tiles
    asked = sum(t.numel() * t.element_size() for t in filters if t is not None)
    assert sum(site["counters"]["global_load_bytes_asked"] for site in tiled) == asked


@pytest.mark.parametrize("reverse", [False, True])
def test_where_the_walk_begins(reverse):
    """Of two blocks the first one has every other tile, from the first position or the last."""
    case = NAMED["even"]
    operands = operands_of(case, DTYPES[0])
    got, _ = run(PLAIN, case, operands, gpu=TWO, reverse=reverse, blocks=(0, 0))
    n, p, q = torch.meshgrid(*(torch.arange(i) for i in (case.n, case.h, case.w)), indexing="ij")
    tile = ((n * (case.h + 1) + p) * (case.w + 1) + q) // 128
    last = (positions(case) - 1) // 128
    assert last == 3
    mine = (last - tile if reverse else tile) % 2 == 0
    for y in got:
        assert torch.equal(~y.isnan(), mine[:, None].expand(y.shape))


@pytest.mark.parametrize(
    ("name", "operand"),
    [
        *((PLAIN, one) for one in ("x", "front_weight", "residual", "front_scale", "next_weight")),
        *((PROJECTING, one) for one in ("projected", "projection_weight", "projection_shift")),
        *((BROAD, one) for one in ("x", "residual", "next_scale")),
        *((SHARING, one) for one in ("x", "front_weight", "residual", "front_shift", "weight")),
    ],
)
def test_nan_and_inf_come_through(name, operand):
    """And no further than they reach: not over the ends of rows and images."""
    case = filling(NAMED["images"], name)
    operands = operands_of(case, torch.bfloat16, exact=False)
    t = getattr(operands, operand)
    if t.dim() == 1:
        t[3], t[7] = float("nan"), float("inf")
    else:
        t[1, 3, 0, -1], t[2, 7, -1, 0] = float("nan"), float("inf")
    got, _ = run(name, case, operands)
    for y, expected in zip(got, numerics.conv_chain_oracle(operands), strict=True):
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y.isinf(), expected.isinf())


@every
def test_it_may_begin_early(name):
    """Before its wait it reads constants alone, and it lets the next kernel begin."""
    case = filling(NAMED["images"], name)
    operands = operands_of(case, DTYPES[1])
    got, _ = run(name, case, operands, gpu=TWO, flow=(True, True))
    assert not wrong(got, operands, case)


# Plans


def refusal(case, name=PLAIN, **changes):
    with pytest.raises(ValueError) as caught:
        plan(case, configuration=index(name), **changes)
    return str(caught.value)


def test_refusals_say_why():
    case = NAMED["even"]
    for gpu in (emulated.H200[:3], emulated.A100, (132, 232448, 233472, 100)):
        assert "for GPUs of capability 9.0" in refusal(case, gpu=gpu)
    changed = functools.partial(dataclasses.replace, case)
    assert "it is made for a 3x3 convolution in front" in refusal(changed(front=0))
    for other in ({"front": 56}, {"k": 128}):
        assert "channels; it takes 64 to as many" in refusal(changed(**other))
        assert "channels; it takes 128 to as many" in refusal(changed(**other), SHARING)
    assert "it takes no projection" in refusal(changed(projected=64))
    assert "it is made for a projection" in refusal(case, PROJECTING)
    wide = changed(projected=72)
    assert "72 channels of the projection, at most 64 fit" in refusal(wide, PROJECTING)
    strided = changed(projected=64, projection_stride=2)
    assert "a projection of stride 2; it reads every pixel" in refusal(strided, PROJECTING)
    same = {"projected_stride": (12 * 15 * 64, 1, 0, 64)}  # rows that are one
    assert "projected: strides[1] is 0" in refusal(changed(projected=64), PROJECTING, **same)
    same = {"projection_weight_stride": (0, 1, 1, 1)}
    refused = refusal(changed(projected=64), PROJECTING, **same)
    assert "projection_weight: strides[0] is 0" in refused
    assert "no next convolution" in refusal(changed(m=0))
    assert "72 channels of next, at most 64 fit" in refusal(changed(m=72))
    assert "136 channels of next, at most 128 fit" in refusal(changed(m=136), BROAD)
    for c in (88, 320):
        assert f"{c} channels of out; multiples of 64 up to 256 fit" in refusal(changed(c=c))
    large = filling(changed(c=576), SHARING)
    assert "576 channels of out; multiples of 64 up to 512 fit" in refusal(large, SHARING)
    assert "x: rows of 91 pixels take 233472" in refusal(changed(w=91))
    for name, (_, widest) in FITS.items():
        fitting = filling(case, name)
        plan(dataclasses.replace(fitting, w=widest), configuration=index(name))
        wider = dataclasses.replace(fitting, w=widest + 1)
        assert f"x: rows of {widest + 1} pixels take" in refusal(wider, name)
    apart = (2 * 12 * 15 * 64, 1, 15 * 64, 64)  # every other image: there is no need to be dense
    plan(case, configuration=index(PLAIN), x_stride=apart)
    row = 15 * 256 + 8
    plan(case, configuration=index(PLAIN), residual_stride=(12 * row, 1, row, 256))
    # Of inputs whose pixels overlap a launch could take more than it can count.
    many = chain("many", 2**28 - 2**10, 2, 2, c=64, m=8, out_stride=2)
    near = {"x_stride": (8, 1, 8, 8), "residual_stride": (8, 1, 8, 8)}
    assert "x: more positions than a launch can take" in refusal(many, **near)


def test_the_choice():
    """Two stages; what it does not serve mma.sync does, and says why."""
    names = [tile["name"] for tile in emulated_chains.configurations()]
    chosen = {
        "layer1_first": PROJECTING, "layer1": PLAIN, "layer1_last": BROAD, "layer2": SHARING,
    }  # fmt: skip
    chains = [case for case in RESNET50_CHAINS if case.name in chosen]
    fronts = [dataclasses.replace(case, front=case.k) for case in chains]
    assert [case.name for case in fronts] == list(chosen)
    for case in fronts:
        made = plan(dataclasses.replace(case, n=256))
        assert names[made["configuration"]] == chosen[case.name] and made["blocks"] == 132
        without = plan(dataclasses.replace(case, n=256), gpu=emulated.H200[:3])
        assert made["cycles"] < 0.75 * without["cycles"]
    for case in (dataclasses.replace(fronts[1], m=136), dataclasses.replace(fronts[2], w=155)):
        made = plan(dataclasses.replace(case, n=256))
        assert not names[made["configuration"]].startswith("tma_") and "no TMA: " in made["why"]
    # A chain without a front is told nothing of this one.
    with pytest.raises(ValueError, match="no configuration serves it"):
        plan(dataclasses.replace(fronts[1], front=0, m=512))
    assert "in front" not in plan(dataclasses.replace(fronts[1], front=0, m=0))["why"]


# Faults

CHUNKS = 4
FILES = {
    "conv_chain_window_sm90.cuh",
    "conv_chain_stream_sm90.cuh",
    "chain_box.h",
    "warpgroup_tile.h",
    "pipeline.h",
    "warpgroup_epilogue.h",
}
# (file, the line's text, instruction, fault) -> why the fault does no harm there.
HARMLESS: dict[tuple[str, str, str, str], str] = {
    (
        "chain_box.h",
        "ptx::sync_warp();  // all of its lanes have",
        "bar.warp.sync",
        "skip",
    ): (
        "the products' wait before it and stmatrix behind it bring the warp together as well, but "
        "PTX promises no order of what was read and what is written of those"
    ),
    (
        "pipeline.h",
        "ptx::mbarrier_arrive_relaxed_cluster(ptx::cluster_address(empty(at), threadIdx.x % 32));",
        "mapa",
        "wrong_lane",
    ): "two lanes tell two blocks: each tells the one that the other would have told",
}
# More steps than stages, several tiles for a block.
FAULTY = (
    (PLAIN, chain("faults", 2, 7, 9)),
    (PLAIN, chain("faults_thinned", 2, 7, 9, c=128, m=40, out_stride=2)),
    (BROAD, chain("faults_broad", 2, 7, 9, m=104)),
    (PROJECTING, dataclasses.replace(chain("faults_projecting", 2, 7, 9), projected=40)),
    (SHARING, filling(chain("faults_sharing", 4, 7, 9, m=40), SHARING)),
)


@functools.cache
def found() -> dict[Mutant, list[Trial]]:
    """Every mutant, with the trials that reach it. Clean runs pass."""
    taken = [(index(name), case) for name, case in FAULTY]
    return mutants.reached(emulated_chains.trials(taken, ONE))


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
        ("wgmma.wait_group", "wait_one_fewer"), ("wgmma.a", "row_off"), ("wgmma.b", "row_off"),
        ("cp.async.bulk.tensor.im2col", "coordinate_off"), ("griddepcontrol.wait", "skip"),
        ("ldmatrix.x4", "swap_operands"), ("cp.async.bulk.tensor.tile.multicast", "row_off"),
        ("barrier.cluster.arrive", "skip"), ("mbarrier.arrive.relaxed.cluster", "skip"),
        ("mbarrier.try_wait.parity.relaxed", "skip"), ("bar.sync 0", "skip"),
    ):  # fmt: skip
        assert wanted in planted, sorted(planted)
