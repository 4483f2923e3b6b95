"""conv_chain in CUDA, emulated: configurations, schedules, edges, costs, refusals, the choice."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import random
import sys

import emulated
import emulated_chains
import pytest
import torch
from emulated import Schedule
from emulated_chains import DTYPES, beyond, limits_of, operands_of, run, wrong
from emulated_shapes import SCHEDULES, lay_out
from guarded_memory import FAR, unmapped_around

from resnet_fused import numerics, roofline
from resnet_fused.cases import RESNET50_CHAINS, ChainCase
from resnet_fused.ops import _cuda_chain_checks as checks

pytestmark = pytest.mark.emulated

WHOLE = os.environ.get("HYPOTHESIS_PROFILE") == "proof"
# Tiles, steps of out and rows of filters that are cut; two images, so that tiles span them.
ODD = ChainCase("odd", 2, 40, 7, 9, 88, 40)
PROJECTED = dataclasses.replace(ODD, name="projected", projected=72, projection_stride=2)
THINNED = dataclasses.replace(ODD, name="thinned", out_stride=2)
# A step of 32 channels and a cut one in front; the self-check's case has three.
FRONT = dataclasses.replace(ODD, name="front", front=40)
ALL = dataclasses.replace(PROJECTED, name="all", front=24, out_stride=2)
WAYS = (ODD, PROJECTED, THINNED, dataclasses.replace(ODD, name="no_next", m=0), FRONT, ALL)
EVEN = ChainCase("even", 2, 64, 8, 8, 128, 64)
EVEN_FRONT = dataclasses.replace(EVEN, name="even_front", front=64)


H200 = emulated.H200[:3]
"""As if it had no TMA."""
plan = functools.partial(emulated_chains.plan, gpu=H200)


def configurations() -> list[dict]:
    """The table of the kernel for sm_80 and later: what stands ahead of those by TMA."""
    return [tile for tile in emulated_chains.configurations() if not tile["tma"]]


def room_in_front(tile: dict) -> int:
    """Channels that a configuration has room for in front; 0: it is made for chains without."""
    return int(tile["name"].partition("_front")[2] or 0)


def taking(case) -> list[tuple[int, dict]]:
    """The configurations that are made for such chains, by index."""
    found = list(enumerate(configurations()))
    return [(i, tile) for i, tile in found if (room_in_front(tile) > 0) == (case.front > 0)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", WAYS, ids=str)
def test_every_configuration_is_exact(case, dtype):
    operands = operands_of(case, dtype)
    for index, tile in taking(case):
        got, report = run(
            operands,
            case,
            reverse=index % 2 == 1,
            configuration=index,
            schedule=Schedule("lazy", "shuffled", seed=index),
        )
        assert report["plan"]["configuration"] == index
        assert not wrong(got, operands, case), tile["name"]


CONFIGURATIONS = 13
SMALL_FRONT = 8  # tiles of 64 pixels


@pytest.mark.parametrize("index", range(CONFIGURATIONS))
def test_the_self_checks_cases_are_exact(index):
    """All channels of next that a configuration has room for, and a few less."""
    tile = configurations()[index]
    cases = checks.cases_of(tile["name"])
    for case in cases if WHOLE else cases[:2]:
        operands = operands_of(case, DTYPES[index % 2])
        got, _ = run(operands, case, configuration=index)
        assert not wrong(got, operands, case), (tile["name"], case)
    assert len(configurations()) == CONFIGURATIONS, "one of them has no test"


@pytest.mark.parametrize("rounding", ["nearest", "toward_zero"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", WAYS, ids=str)
def test_every_configuration_is_within_the_bound(case, dtype, rounding):
    operands = operands_of(case, dtype, exact=False)
    how = "nearest" if rounding == "nearest" else "truncate"
    limits = limits_of(operands, case, how)
    # Sums are rounded alike by all of them: half for each way of rounding, all in `make proof`.
    some = slice(None) if WHOLE else slice(rounding == "nearest", None, 2)
    for index, tile in taking(case)[some]:
        schedule = Schedule("random", "reverse", rounding, seed=index)
        got, _ = run(operands, case, configuration=index, schedule=schedule)
        assert not beyond(got, operands, case, limits, how), tile["name"]


def draw(number):
    """A call: sizes in multiples of 8 channels, whether from the end, configuration, schedule."""
    rng = random.Random(number)
    index, schedule = number % len(configurations()), rng.choice(SCHEDULES)
    room, front = configurations()[index]["n"], room_in_front(configurations()[index])
    side = 8 if front else 12
    case = ChainCase(
        "random",
        rng.randint(1, 3),
        8 * rng.randint(1, front // 8 or 20),
        rng.randint(1, side),
        rng.randint(1, side),
        8 * rng.randint(1, 24),
        rng.choice((0, 8 * rng.randint(1, room // 8), room)),
        rng.choice((0, 8 * rng.randint(1, 12))),
        rng.randint(1, 3),
        8 * rng.randint(1, 14) if front else 0,
        rng.randint(1, 2),
    )
    return case, rng.random() < 0.5, index, dataclasses.replace(schedule, seed=number)


@pytest.mark.parametrize("chunk", range(5))
def test_random_shapes(chunk):
    """Exact on integers or within the bound on noise; a thousand in `make proof`."""
    for number in range(chunk, 1000 if WHOLE else 52, 5):
        case, reverse, index, schedule = draw(number)
        exact = number % 3 > 0
        operands = operands_of(case, DTYPES[number % 2], exact, number)
        got, _ = run(operands, case, reverse=reverse, configuration=index, schedule=schedule)
        how = "nearest" if schedule.rounding == "nearest" else "truncate"
        if exact:
            bad = wrong(got, operands, case)
        else:
            bad = beyond(got, operands, case, limits_of(operands, case, how), how)
        assert not bad, (number, case, index, schedule, bad)


@pytest.mark.parametrize("case", WAYS, ids=str)
def test_the_same_bits_under_every_schedule(case):
    operands = operands_of(case, DTYPES[0], exact=False)
    index = SMALL_FRONT if case.front else 1
    first, _ = run(operands, case, configuration=index, schedule=Schedule())
    for schedule in emulated.SCHEDULES:
        for reverse in (False, True):
            got, _ = run(operands, case, reverse=reverse, configuration=index, schedule=schedule)
            assert all(torch.equal(a, b) for a, b in zip(got, first, strict=True)), schedule


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("case", "index"), [(ODD, 1), (FRONT, SMALL_FRONT)], ids=str)
def test_where_the_walk_begins(case, index, reverse):
    """The first block writes the first pixels, or the last ones; two tiles of 64 of 126 pixels."""
    operands = operands_of(case, DTYPES[0])
    (out, _), report = run(operands, case, reverse=reverse, configuration=index, blocks=(0, 0))
    assert report["plan"]["blocks"] == 2
    written = ~out.permute(0, 2, 3, 1).reshape(126, -1).isnan().any(1)
    assert written.tolist() == [(i >= 64) == reverse for i in range(126)]


@pytest.mark.parametrize("case", WAYS, ids=str)
def test_no_bank_conflicts(case):
    """Not in the main loop nor elsewhere, in any configuration."""
    operands = operands_of(case, DTYPES[0])
    for index, tile in taking(case):
        _, report = run(operands, case, configuration=index, counting=True)
        assert sum(site["counters"]["shared_wavefronts"] for site in report["sites"]) > 0
        costly = {
            (site["file"], site["line"], site["instruction"]): site["counters"]["bank_conflicts"]
            for site in report["sites"]
            if site["counters"]["bank_conflicts"]
        }
        assert not costly, (tile["name"], costly)


@pytest.mark.parametrize("case", [*WAYS, EVEN, EVEN_FRONT], ids=str)
def test_every_byte_is_moved_once(case):
    """Of memory; `out` is written and never read, of a projection's source the pixels it takes."""
    operands = operands_of(case, DTYPES[0])
    least = roofline.conv_chain_cost(case, DTYPES[0]).bytes
    for index, _ in taking(case):
        _, report = run(operands, case, configuration=index, counting=True)
        tensors = report["tensors"]
        moved = sum(t["unique_bytes_read"] + t["unique_bytes_written"] for t in tensors.values())
        assert least * 0.999 <= moved <= 1.1 * least
        assert tensors["out"]["unique_bytes_read"] == 0


@pytest.mark.parametrize("case", [EVEN, EVEN_FRONT], ids=str)
def test_results_go_out_in_whole_sectors(case):
    """Where steps of out divide its channels: each row of a step is two sectors."""
    operands = operands_of(case, DTYPES[0])
    for index, _ in taking(case):
        _, report = run(operands, case, configuration=index, counting=True)
        stores = [s["counters"] for s in report["sites"] if s["instruction"] == "st.global"]
        assert stores
        for counted in stores:
            assert counted["global_store_sectors"] * 32 == counted["global_store_bytes_asked"]


@pytest.mark.parametrize("case", [ODD, PROJECTED, FRONT], ids=str)
def test_an_empty_batch_launches_nothing(case):
    case = dataclasses.replace(case, n=0)
    operands = operands_of(case, DTYPES[0])
    (out, following), report = run(operands, case)
    assert report["plan"]["launches"] == 0 and not report["sites"]
    assert (out.shape, following.shape) == ((0, 88, 7, 9), (0, 40, 7, 9))


@pytest.mark.parametrize("layout", ["nchw", "padded", "sliced"])
@pytest.mark.parametrize("case", [PROJECTED, ALL], ids=str)
def test_what_lies_otherwise_is_copied_or_read_in_its_strides(case, layout):
    operands = operands_of(case, DTYPES[0])
    moved = numerics.ChainOperands(
        *(t if t is None or t.dim() == 1 else lay_out(t, layout) for t in operands)
    )
    got, _ = run(moved, case, configuration=SMALL_FRONT if case.front else 0)
    assert not wrong(got, operands, case)
    form = torch.channels_last if layout == "padded" else torch.contiguous_format
    assert all(t.is_contiguous(memory_format=form) for t in got)


POISONED = (
    *((ODD, name) for name in ("x", "weight", "residual", "next_weight", "scale", "next_shift")),
    *((FRONT, name) for name in ("x", "front_scale", "front_shift")),
)


@pytest.mark.parametrize(("case", "name"), POISONED, ids=str)
def test_nan_and_inf_come_through(case, name):
    operands = operands_of(case, torch.bfloat16, exact=False)
    t = getattr(operands, name)
    flat = t.view(-1) if t.dim() == 1 else t.permute(0, 2, 3, 1).reshape(-1)
    flat[3], flat[7] = float("nan"), float("inf")
    if t.dim() == 4:
        t.copy_(flat.view(t.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2))
    got, _ = run(operands, case)
    for y, expected in zip(got, numerics.conv_chain_oracle(operands), strict=True):
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y.isinf(), expected.isinf())


def test_an_infinite_pixel_makes_nothing_of_channels_that_are_not_there():
    """40 channels of 64 are made in front: infinity times no filter must not become a NaN."""
    operands = operands_of(FRONT, torch.bfloat16, exact=False)
    operands.x[0, 0, 3, 3] = float("inf")
    operands.front_weight[:, 0] = -1.0
    operands.front_scale.fill_(1.0)
    got, _ = run(operands, FRONT, configuration=SMALL_FRONT)
    assert all(y.isfinite().all() for y in got)


# Plans: pure functions of sizes, strides and alignment.


def refusal(*arguments, **changes):
    with pytest.raises(ValueError) as caught:
        plan(*arguments, **changes)
    return str(caught.value)


def test_refusals_say_why():
    count = len(emulated_chains.configurations())
    assert "dtype 0; bfloat16 and float16" in refusal(ODD, torch.float32)
    assert f"configuration {count}; there are 0 to {count - 1}" in refusal(ODD, configuration=count)
    for name in ("x", "residual", "out", "weight", "next_weight"):
        assert f"{name} cannot be moved 16 bytes" in refusal(ODD, **{name: 4098})
    assert "next cannot be moved 16 bytes" in refusal(ODD, following=4098)
    assert "projected cannot be" in refusal(PROJECTED, projected=4098)
    assert "x cannot be" in refusal(dataclasses.replace(ODD, k=41))
    assert "next_weight cannot be" in refusal(ODD, next_weight_stride=(92, 1, 1, 1))
    assert "a projection of 0 channels" in refusal(ODD, projects=True)
    assert "72 channels of next, at most 64 fit" in refusal(
        dataclasses.replace(ODD, m=72), configuration=0
    )
    deep = dataclasses.replace(ODD, k=1024)
    assert "bytes of shared memory, 232448 are there" in refusal(deep)
    assert "an out_stride of 3" in refusal(ODD, out_stride=3)
    assert "264 channels of next" in refusal(dataclasses.replace(ODD, m=264))
    assert "a GPU of 0 multiprocessors" in refusal(ODD, gpu=(0, 1, 1))
    huge = dataclasses.replace(ODD, h=1 << 16, w=1 << 16)
    assert "one image is more than a launch can take" in refusal(huge)


def test_refusals_of_a_front_say_why():
    assert "it is made for a 3x3 convolution in front" in refusal(ODD, configuration=SMALL_FRONT)
    assert "it takes no 3x3 convolution in front" in refusal(FRONT, configuration=0)
    assert "136 channels of the convolution in front, at most 128 fit" in refusal(
        dataclasses.replace(FRONT, k=136)
    )
    assert "72 channels of the convolution in front, at most 64 fit" in refusal(
        dataclasses.replace(FRONT, k=72), configuration=SMALL_FRONT
    )
    assert "264 channels of next, at most 256 fit" in refusal(dataclasses.replace(FRONT, m=264))
    assert "front_weight cannot be moved 16 bytes" in refusal(FRONT, front_weight=4098)
    assert "front_weight cannot be" in refusal(FRONT, front_weight_stride=(360, 1, 120, 36))
    wide = dataclasses.replace(FRONT, h=1, w=2000)
    assert "bytes of shared memory, 232448 are there" in refusal(wide)
    assert plan(dataclasses.replace(wide, w=600))["blocks"] > 0
    assert "rows of 2097152 pixels" in refusal(dataclasses.replace(wide, w=1 << 21))
    far = 1 << 34
    assert "one image is more" in refusal(FRONT, front_weight_stride=(360, 1, far, 40))


def test_a_batch_beyond_a_launchs_reach_is_cut():
    """Pixels are counted and offsets reach in 31 bits: of pixels, or of 16 bytes of a row."""
    many = dataclasses.replace(EVEN, n=1 << 20, h=64, w=64)
    made = plan(many)
    # out has 64 * 64 * 128 / 8 units an image; 2^31 of them are 32768 images.
    assert made["launches"] == 33
    assert plan(dataclasses.replace(many, n=1 << 14))["launches"] == 1


FAR_CASE = dataclasses.replace(PROJECTED, n=3, c=24, m=16)
FAR_FRONT = dataclasses.replace(FAR_CASE, projected=0, front=24)
LARGE = 2**33
"""Elements between images: two of them are all that offsets of 16 bytes reach."""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: mmap without reserve")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", ["x", "x in front", "residual", "projected", "out", "following"])
def test_parts_of_a_batch_are_launched_one_by_one(name, reverse):
    """Images lie gigabytes apart in memory that is never filled."""
    case = FAR_CASE if name == "projected" else dataclasses.replace(FAR_CASE, projected=0)
    if name == "x in front":
        name, case = "x", FAR_FRONT
    operands = operands_of(case, DTYPES[1])
    shapes = {"out": case.stored_shape, "following": (case.n, case.m, case.h, case.w)}
    results = {
        which: lay_out(torch.full(shape, float("nan"), dtype=DTYPES[1]), "nhwc")
        for which, shape in shapes.items()
    }
    tensors = operands._asdict() | results
    near = tensors[name]
    strides = (LARGE, *near.stride()[1:])
    count = 1 + sum((n - 1) * stride for n, stride in zip(near.shape, strides, strict=True))
    memory = unmapped_around(count, near.dtype, "start", FAR)
    tensors[name] = memory.as_strided(near.shape, strides).copy_(near)
    step = case.projection_stride
    problem = emulated.chain_problem(tensors, (step, 1, reverse))
    made = emulated.load().conv_chain_plan(problem, H200)
    assert made["launches"] == 2
    inputs = {which: t for which, t in tensors.items() if which not in results}
    settings = emulated.settings((name,), inputs, {which: tensors[which] for which in results})
    index = made["configuration"]
    emulated.load().conv_chain(settings, problem, H200, index, 1, 0)
    assert not wrong((tensors["out"], tensors["following"]), operands, case)


@pytest.mark.parametrize("gpu", [H200, emulated.A100, emulated.RTX3080], ids=str)
def test_what_resnet50_asks_for(gpu):
    """The first stage and the second fit, wide projections and the smallest GPU's limits aside."""
    for case in RESNET50_CHAINS:
        case = dataclasses.replace(case, n=32)
        little = case.m > 128 and gpu == emulated.RTX3080
        if case.k <= 128 and case.projected <= 64 and not little:
            made = plan(case, gpu=gpu)
            tile = configurations()[made["configuration"]]
            assert tile["blocks"] * tile["warps"] <= 16, "255 registers a thread, 64 K each"
            assert tile["n"] >= case.m and made["blocks"] > 0
        else:
            with contextlib.suppress(ValueError):
                assert plan(case, gpu=gpu)["blocks"] > 0


FRONTS = [dataclasses.replace(case, front=case.k) for case in RESNET50_CHAINS if case.k <= 128]


@pytest.mark.parametrize("gpu", [H200, emulated.A100, emulated.RTX3080], ids=str)
def test_what_resnet50_asks_for_in_front(gpu):
    """The first two stages fit every GPU; where they end, and wide projections, larger ones."""
    for case in FRONTS:
        case = dataclasses.replace(case, n=32, tags=())
        small = gpu == emulated.RTX3080 and (case.m > 128 or case.projected > 64)
        if small or case.projected > 128:
            with contextlib.suppress(ValueError):
                assert plan(case, gpu=gpu)["blocks"] > 0
        else:
            tile = configurations()[plan(case, gpu=gpu)["configuration"]]
            assert room_in_front(tile) >= case.k and tile["n"] >= case.m


def test_the_choice_in_front():
    """The fewest reads of its filters where there is room; smaller tiles for few pixels."""
    layer1 = dataclasses.replace(FRONTS[1], n=256)
    names = [tile["name"] for tile in configurations()]
    assert names[plan(layer1)["configuration"]] == "256x64_8w3s_front64"
    assert names[plan(layer1, gpu=emulated.RTX3080)["configuration"]] == "128x64_4w3s_front64"
    small = dataclasses.replace(layer1, n=1)
    assert names[plan(small)["configuration"]] == "64x64_4w3s_front64"
    layer2 = dataclasses.replace(FRONTS[4], n=256)
    assert names[plan(layer2)["configuration"]].endswith("_front128")


def test_the_choice():
    """The least room for next that is enough; smaller tiles where large ones leave GPUs idle."""
    layer1 = dataclasses.replace(RESNET50_CHAINS[1], n=256)
    names = [tile["name"] for tile in configurations()]
    assert names[plan(layer1)["configuration"]] == "128x64_4w3s"
    small = dataclasses.replace(layer1, n=1)
    assert names[plan(small)["configuration"]] == "64x64_4w3s"
    assert names[plan(dataclasses.replace(layer1, m=128))["configuration"]] == "128x128_4w3s"
