"""conv_bn_dgrad_end by TMA and wgmma, emulated: its numbers, its sums, its costs, its refusals."""

from __future__ import annotations

import dataclasses
import math
import random

import emulated
import emulated_bn_dgrad_end
import pytest
import torch
from emulated import Schedule
from emulated_shapes import lay_out
from ended_by_tma import (
    DTYPES,
    FEW,
    OP,
    WAYS,
    call,
    operands,
    planned,
    require,
    tiles,
)
from test_emulated_bn_dgrad import planned as dgrad_planned
from test_emulated_bn_dgrad_sm90 import ALL, CHUNKS, NAMED, SIMPLE, WIDE, WIDE_BY_2
from test_emulated_conv_sm90 import sharing

from resnet_fused import numerics, roofline
from resnet_fused.cases import ConvCase
from resnet_fused.ops import _results
from resnet_fused.ops._library import overload

pytestmark = pytest.mark.emulated

CONFIGURATIONS = 5
ALONE = 2
"""The first ones; blocks of a cluster of the others share what they read."""
every = pytest.mark.parametrize("place", range(CONFIGURATIONS))
sharing_ones = pytest.mark.parametrize("place", range(ALONE, CONFIGURATIONS))


def index_of(place: int) -> int:
    return list(tiles())[place]


def name_of(place: int) -> str:
    return tiles()[index_of(place)]["name"]


def test_each_configuration_has_a_test_and_fits():
    assert len(tiles()) == CONFIGURATIONS
    for tile in tiles().values():
        assert tile["shared_bytes"] <= emulated.H200[1]
        assert tile["name"].startswith("tma_p128x") and not tile["float32"]
    assert [sharing(name_of(place)) == (1, 1) for place in range(CONFIGURATIONS)] == (
        [True] * ALONE + [False] * (CONFIGURATIONS - ALONE)
    )


def ways_of(place: int, case: ConvCase) -> list[str]:
    """All of the op, and in turns what may be left out of it."""
    return ["all", list(WAYS)[1 + (ALL.index(case) + place) % 4]]


@pytest.mark.parametrize(
    ("place", "case", "way"),
    [
        pytest.param(place, case, way, id=f"{case.name}-{way}-{place}")
        for case in ALL
        for place in range(CONFIGURATIONS)
        for way in ways_of(place, case)
    ],
)
def test_every_bit_is_right(place, case, way):
    """On integers; dtype, schedule and the number of blocks change from case to case."""
    number = (ALL.index(case) * len(WAYS) + list(WAYS).index(way)) * CONFIGURATIONS + place
    given = operands(case, DTYPES[number // 2 % 2], seed=number, **WAYS[way])
    schedule = dataclasses.replace(emulated.SCHEDULES[number % 9], seed=number)
    dx, sums, report = call(
        case, given, configuration=index_of(place), schedule=schedule,
        gpu=FEW if number % 3 else emulated.H200, resident_blocks=4,
    )  # fmt: skip
    assert report["plan"]["configuration"] == index_of(place)
    filters, pixels = sharing(name_of(place))
    assert report["plan"]["blocks"] % (filters * pixels) == 0
    assert sums.shape[0] == (3 if given.residual is not None else 2)
    require(case, given, dx, sums)


@sharing_ones
@pytest.mark.parametrize("case", [WIDE, WIDE_BY_2], ids=lambda case: case.name)
@pytest.mark.parametrize("way", ["all", "identity"])
def test_blocks_that_share_walk_side_by_side(place, case, way):
    """A tile behind the last pixel or channel takes part, stores nothing, asks for the next one's,
    and is not among those that meet."""
    filters, pixels = sharing(name_of(place))
    blocks, step = filters * pixels, case.stride[0]
    given = operands(case, torch.bfloat16, **(WAYS[way] | {"addend": step}))
    two = (2 * blocks + 1, *emulated.H200[1:])  # clusters, and one multiprocessor alone
    for gpu in (emulated.H200, two, (1, *two[1:])):
        found = call(
            case, given, step, configuration=index_of(place), gpu=gpu,
            schedule=Schedule("random", "shuffled", seed=gpu[0]), resident_blocks=2 * blocks,
        )  # fmt: skip
        require(case, given, *found[:2], step)


@every
@pytest.mark.parametrize("rounding", ["nearest", "toward_zero"])
def test_noise_is_within_its_bound(place, rounding):
    for dtype, name in (
        (torch.bfloat16, "3x3"),
        (torch.float16, "1x1"),
        (torch.float16, "3x3_by_2"),
    ):
        case = NAMED[name]
        given = operands(case, dtype, exact=False)
        schedule = Schedule("random", "shuffled", rounding, seed=place)
        oracle = numerics.conv_bn_dgrad_end_oracle(*given[:6], **case.geometry)
        how = {"accumulation": "nearest" if rounding == "nearest" else "truncate", "k": 16}
        bound = numerics.conv_bn_dgrad_end_bound(*given[:6], oracle, **case.geometry, **how)
        dx, sums, _ = call(case, given, configuration=index_of(place), schedule=schedule)
        found = numerics.check_bound(dx, oracle, bound)
        assert found.ok, (name, str(found))
        branches = [(given.raw, given.norm), (given.residual, given.residual_norm)]
        wanted = numerics.reductions_oracle(dx, *branches)
        found = numerics.check_bound(sums, wanted, numerics.reductions_bound(dx, *branches))
        assert found.ok, (name, str(found))


@every
@pytest.mark.parametrize("name", ["3x3_by_2", "1x1_by_2", "pixel_by_2"])
def test_an_addend_of_one_phase(place, name):
    """At every other pixel, as a projection by the same stride leaves it."""
    case = NAMED[name]
    for dtype, way in zip(DTYPES, ("all", "identity"), strict=True):
        given = operands(case, dtype, **(WAYS[way] | {"addend": 2}))
        found = call(
            case, given, 2, configuration=index_of(place), schedule=Schedule("lazy", "reverse")
        )
        require(case, given, *found[:2], 2)


SPECIALS = ConvCase("specials", 2, 72, 9, 8, 24)


@every
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_above_zero_masks_but_for_nan(place, dtype):
    """NaN of both signs passes; the least number above zero does, and minus zero does not."""
    given = operands(SPECIALS, dtype)
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    values = torch.tensor(
        [math.nan, 0.0, -0.0, least, -least, 1.0, -1.0, math.inf, -math.inf], dtype=dtype
    )
    number = given.out.numel()
    out = values[torch.arange(number) * 5 // 7 % len(values)]
    out.view(torch.int16)[:: 9 * 7] |= -(2**15)  # NaN of the other sign
    out = out.view(given.out.shape).contiguous(memory_format=torch.channels_last)
    assert {*map(bool, torch.signbit(out[out.isnan()]))} == {False, True}
    given = given._replace(out=out)
    dx, sums, _ = call(SPECIALS, given, configuration=index_of(place))
    require(SPECIALS, given, dx, sums)
    for value in (math.nan, least, math.inf):
        where = out.isnan() if math.isnan(value) else out == value
        assert (dx[where] != 0).any(), value


@every
def test_chunks_of_rows_are_merged(place):
    given = operands(CHUNKS, torch.bfloat16)
    for schedule in (Schedule(), Schedule("random", "shuffled", seed=3)):
        dx, sums, _ = call(
            CHUNKS, given, configuration=index_of(place), schedule=schedule,
            resident_blocks=7, gpu=(7, *emulated.H200[1:]),
        )  # fmt: skip
        require(CHUNKS, given, dx, sums)


@every
@pytest.mark.parametrize("way", ["all", "identity"])
def test_launches_share_the_sums(place, way):
    """What a batch beyond 2^31 pixels comes to, in launches of two images: each ends in a tile."""
    case = ConvCase("launches", 5, 16, 9, 8, 24, 3, 3, (1, 1), (1, 1))
    given = operands(case, torch.bfloat16, **WAYS[way])
    module, gpu, index, images = emulated.load(), emulated.H200, index_of(place), 2
    geometry = (case.stride, case.padding, case.dilation, case.groups)
    results = _results.FORMS[OP].empty(*given, 1, *geometry)
    written = dict(zip(("x", "sums"), map(emulated.Guarded, results), strict=True))
    outputs = {name: one.tensor for name, one in written.items()}
    made = emulated_bn_dgrad_end.problem_of(given._asdict() | outputs, 1, *geometry)
    count = module.conv_bn_dgrad_end_cut_bytes(made, gpu, index, 1, images)
    memory = emulated.Guarded(torch.empty(count // 4 + 64))
    workspace = memory.tensor[-memory.tensor.data_ptr() % 256 // 4 :][: count // 4]
    with emulated.using(schedule=Schedule("lazy", "reverse")):
        settings = emulated.settings(("cut",), given._asdict(), outputs | {"workspace": workspace})
    module.conv_bn_dgrad_end_cut(settings, made, gpu, index, 1, images, workspace.data_ptr())
    memory.result()
    require(case, given, *(one.result() for one in written.values()))


@every
def test_the_same_bits_whoever_comes_last(place):
    given = operands(NAMED["many"], torch.bfloat16, exact=False)
    orders = (Schedule(), Schedule("lazy", "reverse"), Schedule("random", "shuffled"))
    results = [
        call(
            NAMED["many"], given, configuration=index_of(place), schedule=order,
            resident_blocks=5, gpu=gpu,
        )[:2]
        for order in orders for gpu in (emulated.H200, FEW)
    ]  # fmt: skip
    for dx, sums in results[1:]:
        assert torch.equal(dx, results[0][0])
        assert torch.equal(sums, results[0][1])


@every
@pytest.mark.parametrize("way", ["all", "identity", "plain"])
def test_what_it_costs(place, way):
    """No bank conflict; of memory nothing but what the layer has, each byte of it once."""
    case = ConvCase("layer", 1, 64, 16, 16, 256)
    given = operands(case, torch.bfloat16, **WAYS[way])
    dx, sums, report = call(case, given, configuration=index_of(place), counting=True)
    require(case, given, dx, sums)
    assert report["counters"]["bank_conflicts"] == 0
    tensors = report["tensors"]
    for name, t in given._asdict().items():
        if t is None:
            continue
        read = tensors[name]["unique_bytes_read"]
        assert read == (t.nbytes // 4 if "norm" in name else t.nbytes), name
    assert tensors["x"]["unique_bytes_written"] == dx.nbytes
    cost = roofline.conv_bn_dgrad_end_cost(
        case, torch.bfloat16, affine=given.y is not None,
        addend=dx.numel() if given.addend is not None else 0,
        projected=given.residual is not None,
    )  # fmt: skip
    moved = sum(t["unique_bytes_read"] + t["unique_bytes_written"] for t in tensors.values())
    assert cost.bytes <= moved <= 1.1 * cost.bytes
    rows = 2 * -(-case.h * case.w // 128)
    assert tensors["workspace"]["unique_bytes_written"] == rows * case.c * 4 * len(sums) + 4


@every
def test_each_byte_of_the_end_is_asked_for_once(place):
    """`out`, raw and the projection's come one after the other into one place."""
    case = ConvCase("layer", 1, 256, 16, 16, 192)
    given = operands(case, torch.bfloat16)
    assert given.residual is not None and given.addend is not None
    (filters, pixels), tile = sharing(name_of(place)), tiles()[index_of(place)]
    dx, sums, report = call(case, given, configuration=index_of(place), counting=True)
    require(case, given, dx, sums)
    assert report["counters"]["bank_conflicts"] == 0
    copies = [s for s in report["sites"] if s["instruction"].startswith("cp.async.bulk.tensor")]
    loaded = sum(site["counters"]["global_load_bytes_asked"] for site in copies)
    rows, columns = 256 // (filters * tile["m"]), 256 // (pixels * tile["n"])
    ends = sum(t.nbytes for t in (given.addend, given.out, given.raw, given.residual))
    assert loaded == 2 * given.dz.nbytes * columns + given.weight.nbytes * rows + ends


@pytest.mark.parametrize("place", [0, CONFIGURATIONS - 1])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "name", ["dz", "y", "coefficients", "addend", "out", "raw", "norm", "residual", "residual_norm"]
)
def test_what_is_not_finite_is_where_it_is_in_the_reference(place, name, value):
    case = ConvCase("specials", 2, 16, 6, 5, 24, 3, 3, (1, 1), (1, 1))
    given = operands(case, torch.float16)
    for norm in ("norm", "residual_norm"):
        given = given._replace(**{norm: torch.nan_to_num(getattr(given, norm))})
    t = getattr(given, name).clone()
    t[(2, 1) if "norm" in name else (0, 1, 1, 1)[: t.dim()]] = value
    given = given._replace(**{name: t})
    geometry = (case.stride, case.padding, case.dilation, case.groups)
    wanted = overload(OP, "reference")(*given, 1, *geometry)
    found = call(case, given, configuration=index_of(place))
    for got, want in zip(found[:2], wanted, strict=True):
        assert torch.equal(got.isnan(), want.isnan()), name
        assert torch.equal(got.isinf(), want.isinf()), name


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dtype": torch.float32}, "dtype: float32 is not served"),
        ({"stride": (3, 3)}, "stride: 3 x 3; up to 2 x 2 is accepted"),
        ({"addend_step": 2, "addend": 4100}, "addend: its channels do not lie in whole chunks"),
        ({"stride": (2, 2), "addend_step": 3}, "addend: every 3-th pixel; every one is accepted,"),
        ({"dz": 4098}, "dz: address is "),
        ({"y": 4098}, "y: address is "),
        ({"addend": 4098}, "addend: address is "),
        ({"raw": 4098}, "raw: address is "),
        ({"out": 4098}, "out: address is "),
        ({"residual": 4098}, "residual: address is "),
        ({"x": 4098}, "dx: address is "),
        ({"weight": 4098}, "weight: address is "),
        ({"coefficients": 4100}, "coefficients: its address is no multiple of 8"),
        ({"out_stride": (3136, 49, 7, 1)}, "out: its channels are not adjacent"),
        ({"residual_stride": (3136, 49, 7, 1)}, "residual: its channels are not adjacent"),
        ({"dz_stride": (3136, 49, 7, 1)}, "dz: its channels are not adjacent"),
    ],
    ids=str,
)
def test_what_tma_cannot_take_is_refused_in_words(changes, said):
    for index in tiles():
        with pytest.raises(ValueError, match=said):
            planned(SIMPLE, configuration=index, **changes)
    made = planned(SIMPLE, **changes)  # mma.sync serves it and says why
    assert made["configuration"] not in tiles() and f"no TMA: {said}" in made["why"]


def test_splits_and_other_gpus_are_refused():
    for index in tiles():
        with pytest.raises(ValueError, match="splits: only 1 is served by TMA"):
            planned(SIMPLE, configuration=index, splits=2)
        for gpu in (emulated.A100, emulated.RTX3080, emulated.H200[:3]):
            with pytest.raises(ValueError, match="for GPUs of capability 9.0"):
                planned(SIMPLE, configuration=index, gpu=gpu)
    # What is not there need not lie anywhere.
    planned(SIMPLE, way="identity", residual_stride=(3136, 49, 7, 1), configuration=index)


PLACES = (
    ConvCase("layer1", 256, 256, 56, 56, 64),
    ConvCase("layer2", 256, 512, 28, 28, 128),
    ConvCase("layer3", 256, 1024, 14, 14, 256),
    ConvCase("layer4", 256, 2048, 7, 7, 512),
)


@pytest.mark.parametrize("case", PLACES, ids=lambda case: case.name)
def test_the_places_of_resnet50_are_served_by_them(case):
    """By less than the convolution's gradient, and a pass over as many tensors as are its end."""
    between = dgrad_planned(case, way={"below": False}, gpu=emulated.H200)["cycles"]
    for way, tensors in (("identity", 4), ("all", 5)):
        made = planned(case, way=way)
        assert made["configuration"] in tiles(), made["why"]
        ends = tensors * case.n * case.h * case.w * case.c * 2 / (22 * 132)
        assert ends <= made["cycles"] < 0.9 * (between + ends), made
    small = planned(dataclasses.replace(case, n=32))
    assert small["configuration"] in tiles(), small["why"]


@pytest.mark.parametrize(
    ("case", "images", "place"),
    [
        (PLACES[0], 256, 0),  # memory, and one step a tile
        (ConvCase("next2", 1, 64, 56, 56, 128, 3, 3, (2, 2), (1, 1)), 256, 1),
        (PLACES[1], 256, 2),
        (PLACES[2], 256, 2),
        (PLACES[3], 256, 2),
        # One tile of channels, so that pixels cannot be shared.
        (ConvCase("next3", 1, 128, 28, 28, 256, 3, 3, (2, 2), (1, 1)), 256, 3),
        (PLACES[3], 8, 4),
    ],
    ids=lambda value: value.name if isinstance(value, ConvCase) else None,
)
def test_which_tiles_are_chosen(case, images, place):
    step = case.stride[0]
    way = {"projected": False, "addend": step}
    made = planned(dataclasses.replace(case, n=images), way=way)
    assert made["configuration"] == index_of(place), made["why"]


def test_what_more_is_done_costs_more():
    for case in (dataclasses.replace(SIMPLE, n=256), PLACES[2]):
        costs = {way: planned(case, way=way)["cycles"] for way in WAYS}
        assert costs["plain"] < costs["identity"] < costs["all"]
        assert all(costs["plain"] <= cost <= costs["all"] for cost in costs.values())


def test_the_workspace_holds_sums_and_chunks():
    case, index = PLACES[0], index_of(0)
    rows = 2 * case.n * case.h * case.w // 128
    chunks = -(-rows // 64)
    for way, of_tile, of_chunk in (("identity", 8, 16), ("all", 12, 32)):
        plan = planned(case, way=way, configuration=index)
        least = (rows * of_tile + chunks * of_chunk) * case.c + 2 * (chunks + 1) * 4
        assert least <= plan["workspace_bytes"] < least + 6 * 256


def test_random_shapes():
    for number in range(10):
        rng = random.Random(number)
        case = ConvCase(
            "random", rng.randint(1, 3), 8 * rng.randint(1, 20), rng.randint(1, 12),
            rng.randint(1, 12), 8 * rng.randint(1, 14), rng.randint(1, 4), rng.randint(1, 4),
            (1, 1), (rng.randint(0, 3), rng.randint(0, 3)),
            (rng.randint(1, 2), rng.randint(1, 2)),
        )  # fmt: skip
        if case.p < 1 or case.q < 1:
            continue
        given = operands(case, rng.choice(DTYPES), **rng.choice(list(WAYS.values())))
        padded = {
            name: lay_out(getattr(given, name), "padded")
            for name in ("dz", "y", "addend", "out", "raw", "residual")
            if getattr(given, name) is not None
        }
        schedule = dataclasses.replace(rng.choice(emulated.SCHEDULES), seed=number)
        found = call(
            case, given._replace(**padded), configuration=index_of(number % CONFIGURATIONS),
            schedule=schedule, gpu=FEW,
        )  # fmt: skip
        require(case, given, *found[:2])
