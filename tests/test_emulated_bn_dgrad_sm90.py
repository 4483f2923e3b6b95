"""conv_bn_dgrad by TMA and wgmma, emulated: its numbers, its sums, its costs, what it refuses."""

from __future__ import annotations

import dataclasses
import random

import emulated
import emulated_bn_dgrad
import pytest
import torch
from dgrad_by_tma import STRIDED
from emulated import Schedule
from emulated_shapes import lay_out
from test_emulated_bn_dgrad import WAYS, call, operands, problem, require
from test_emulated_conv_sm90 import sharing

from resnet_fused import cases, numerics, roofline
from resnet_fused.cases import ConvCase
from resnet_fused.ops import _results
from resnet_fused.ops._library import overload

pytestmark = pytest.mark.emulated

OP = emulated_bn_dgrad.OP
DTYPES = (torch.bfloat16, torch.float16)
FEW = (2, *emulated.H200[1:])
"""So few multiprocessors that blocks stay for several tiles."""
CASES = (
    # Tiles that are cut along every side, two steps of filters, and an odd number of steps.
    ConvCase("1x1", 2, 136, 9, 9, 72),
    ConvCase("3x3", 1, 72, 7, 9, 64, 3, 3, (1, 1), (1, 1)),
    ConvCase("3x3_dilated", 1, 128, 9, 10, 8, 3, 3, (1, 1), (2, 2), (2, 2)),
    ConvCase("3x3_unpadded", 2, 24, 10, 9, 64, 3, 3),
    ConvCase("5x2", 1, 16, 9, 8, 24, 5, 2, (1, 1), (2, 3), (1, 2)),
    ConvCase("1x1_padded", 2, 8, 5, 6, 16, 1, 1, (1, 1), (2, 1)),
    ConvCase("groups", 2, 144, 6, 7, 128, 3, 3, (1, 1), (1, 1), groups=2),
    # Many pixels, few steps: tiles follow one another.
    ConvCase("many", 2, 64, 18, 15, 64),
    ConvCase("pixel", 1, 8, 1, 1, 16),
)
ALL = (*CASES, *STRIDED)
NAMED = {case.name: case for case in ALL}
# Three chunks of the rows of 64 pixels, the last of which is cut.
CHUNKS = ConvCase("chunks", 6, 8, 38, 37, 8)


def tiles() -> dict[int, dict]:
    """The configurations by TMA, by index; test_emulated_bn_dgrad_window.py has windows."""
    table = emulated.load().conv_bn_dgrad_configurations()
    return {i: tile for i, tile in enumerate(table) if tile["tma"] and not tile["window"]}


CONFIGURATIONS = 5
ALONE = 2
"""The first ones; blocks of a cluster of the others share what they read."""
every = pytest.mark.parametrize("place", range(CONFIGURATIONS))
sharing_ones = pytest.mark.parametrize("place", range(ALONE, CONFIGURATIONS))


def index_of(place: int) -> int:
    return list(tiles())[place]


def name_of(place: int) -> str:
    return tiles()[index_of(place)]["name"]


def planned(*arguments, gpu=emulated.H200, configuration=-1, splits=0, **more):
    return emulated.load().conv_bn_dgrad_plan(
        problem(*arguments, **more), gpu, configuration, splits
    )


def test_each_configuration_has_a_test_and_fits():
    assert len(tiles()) == CONFIGURATIONS
    for tile in tiles().values():
        assert tile["shared_bytes"] <= emulated.H200[1]
        assert tile["name"].startswith("tma_p128x") and not tile["float32"]
    assert [sharing(name_of(place)) == (1, 1) for place in range(CONFIGURATIONS)] == (
        [True] * ALONE + [False] * (CONFIGURATIONS - ALONE)
    )


def ways_of(place: int, case: ConvCase) -> list[str]:
    """All by a block alone; of those that share, what they do at a tile's end is the same."""
    number = ALL.index(case) + place
    return list(WAYS) if place < ALONE else ["all", list(WAYS)[1 + number % 4]]


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
    given = operands(case, DTYPES[number // 2 % 2], **WAYS[way])
    schedule = dataclasses.replace(emulated.SCHEDULES[number % 9], seed=number)
    dx, sums, report = call(
        case, given, configuration=index_of(place), splits=1, schedule=schedule,
        gpu=FEW if number % 3 else emulated.H200, resident_blocks=4,
    )  # fmt: skip
    assert report["plan"]["configuration"] == index_of(place)
    filters, pixels = sharing(name_of(place))
    most = max(2, filters * pixels) if number % 3 else 132
    assert report["plan"]["blocks"] <= most and report["plan"]["blocks"] % (filters * pixels) == 0
    require(case, given, dx, sums)


WIDE = ConvCase("wide", 2, 328, 18, 15, 136)
# Of four phases two have a tile of pixels less.
WIDE_BY_2 = ConvCase("wide_by_2", 2, 328, 35, 29, 72, 1, 1, (2, 2))


@sharing_ones
@pytest.mark.parametrize("case", [WIDE, WIDE_BY_2], ids=lambda case: case.name)
def test_blocks_that_share_walk_side_by_side(place, case):
    """Of five tiles of pixels the last cluster's second block has none, of three or six of
    channels its last one; it takes part, stores nothing, and is not among those that meet."""
    (filters, pixels), tile = sharing(name_of(place)), tiles()[index_of(place)]
    blocks, phases = filters * pixels, case.stride[0] ** 2
    rows, columns = -(-540 // (filters * tile["m"])), -(-case.c // (pixels * tile["n"]))
    given = operands(case, torch.bfloat16, **({"addend": 2} if phases > 1 else {}))
    two = (2 * blocks + 1, *emulated.H200[1:])  # clusters, and one multiprocessor alone
    most = 128 // blocks if blocks > 2 else 66
    for gpu, many in (
        (emulated.H200, min(most, phases * rows * columns)), (two, 2), ((1, *two[1:]), 1),
    ):  # fmt: skip
        found = call(
            case, given, case.stride[0], configuration=index_of(place), splits=1, gpu=gpu,
            schedule=Schedule("random", "shuffled", seed=many), resident_blocks=2 * blocks,
        )  # fmt: skip
        assert found[2]["plan"]["blocks"] == many * blocks
        require(case, given, *found[:2], case.stride[0])


@sharing_ones
def test_what_blocks_share_is_asked_for_once(place):
    case = ConvCase("layer", 1, 256, 16, 16, 192)
    given = operands(case, torch.bfloat16)
    (filters, pixels), tile = sharing(name_of(place)), tiles()[index_of(place)]
    dx, sums, report = call(case, given, configuration=index_of(place), splits=1, counting=True)
    require(case, given, dx, sums)
    assert report["counters"]["bank_conflicts"] == 0
    copies = [s for s in report["sites"] if s["instruction"].startswith("cp.async.bulk.tensor")]
    loaded = sum(site["counters"]["global_load_bytes_asked"] for site in copies)
    rows, columns = 256 // (filters * tile["m"]), 256 // (pixels * tile["n"])
    ends = given.raw.nbytes + given.addend.nbytes
    assert loaded == 2 * given.dz.nbytes * columns + given.weight.nbytes * rows + ends
    assert ("multicast" in str({s["instruction"] for s in copies})) == (filters * pixels > 1)


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
        oracle = numerics.conv_bn_dgrad_oracle(*given, input_size=case.input_shape, **case.geometry)
        how = {"accumulation": "nearest" if rounding == "nearest" else "truncate", "k": 16}
        bound = numerics.conv_bn_dgrad_bound(*given, oracle, **case.geometry, **how)
        dx, sums, _ = call(case, given, configuration=index_of(place), splits=1, schedule=schedule)
        found = numerics.check_bound(dx, oracle, bound)
        assert found.ok, (name, str(found))
        below = given.raw, given.norm
        wanted = numerics.reductions_oracle(dx, below)
        found = numerics.check_bound(sums, wanted, numerics.reductions_bound(dx, below))
        assert found.ok, (name, str(found))


@every
@pytest.mark.parametrize("name", ["3x3_by_2", "1x1_by_2", "pixel_by_2"])
def test_an_addend_of_one_phase(place, name):
    """At every other pixel, as a projection by the same stride leaves it."""
    case = NAMED[name]
    for dtype, way in zip(DTYPES, ("all", "addend"), strict=True):
        given = operands(case, dtype, **(WAYS[way] | {"addend": 2}))
        schedule = Schedule("lazy", "reverse")
        found = call(case, given, 2, configuration=index_of(place), splits=1, schedule=schedule)
        require(case, given, *found[:2], 2)


@every
@pytest.mark.parametrize("name", ["1x1", "many", "groups", "pixel"])
def test_an_addend_of_fewer_pixels_is_gathered(place, name):
    """At every second or third pixel of all, as a projection leaves it beside a stride of 1."""
    case = NAMED[name]
    for dtype, way, step in zip(DTYPES, ("all", "addend"), (2, 3), strict=True):
        given = operands(case, dtype, **(WAYS[way] | {"addend": step}))
        # Asked for late, it must not be missed; nor may the last tile's store lose its rows.
        for schedule in (Schedule("lazy", "reverse"), Schedule("random", "shuffled", seed=place)):
            found = call(
                case, given, step, configuration=index_of(place), splits=1, schedule=schedule,
                gpu=FEW, resident_blocks=4,
            )  # fmt: skip
            require(case, given, *found[:2], step)


@every
def test_what_is_gathered_is_read_once(place):
    case = ConvCase("layer", 1, 256, 16, 16, 64)
    given = operands(case, torch.bfloat16, addend=2)
    dx, sums, report = call(case, given, 2, configuration=index_of(place), splits=1, counting=True)
    require(case, given, dx, sums, 2)
    assert report["counters"]["bank_conflicts"] == 0
    assert report["tensors"]["addend"]["unique_bytes_read"] == given.addend.nbytes
    asked = [s for s in report["sites"] if s["file"].endswith("gathered_addend.h")]
    read = sum(site["counters"]["global_load_bytes_asked"] for site in asked)
    assert read == given.addend.nbytes == dx.nbytes // 4


@every
def test_chunks_of_rows_are_merged(place):
    given = operands(CHUNKS, torch.bfloat16)
    pixels = CHUNKS.n * CHUNKS.h * CHUNKS.w
    assert 2 * 64 < 2 * -(-pixels // 128) < 3 * 64 and pixels % 128
    for schedule in (Schedule(), Schedule("random", "shuffled", seed=3)):
        dx, sums, _ = call(
            CHUNKS, given, configuration=index_of(place), splits=1, schedule=schedule,
            resident_blocks=7, gpu=(7, *emulated.H200[1:]),
        )  # fmt: skip
        require(CHUNKS, given, dx, sums)


@every
def test_launches_share_the_sums(place):
    """What a batch beyond 2^31 pixels comes to, in launches of two images: each ends in a tile."""
    case = ConvCase("launches", 5, 16, 9, 8, 24, 3, 3, (1, 1), (1, 1))
    given = operands(case, torch.bfloat16)
    module, gpu, index, images = emulated.load(), emulated.H200, index_of(place), 2
    geometry = (case.stride, case.padding, case.dilation, case.groups)
    results = _results.FORMS[OP].empty(*given, list(case.input_shape), True, 1, *geometry)
    written = dict(zip(("x", "sums"), map(emulated.Guarded, results), strict=True))
    outputs = {name: one.tensor for name, one in written.items()}
    made = emulated_bn_dgrad.problem_of(given._asdict() | outputs, 1, *geometry)
    count = module.conv_bn_dgrad_cut_bytes(made, gpu, index, 1, images)
    memory = emulated.Guarded(torch.empty(count // 4 + 64))
    workspace = memory.tensor[-memory.tensor.data_ptr() % 256 // 4 :][: count // 4]
    with emulated.using(schedule=Schedule("lazy", "reverse")):
        settings = emulated.settings(("cut",), given._asdict(), outputs | {"workspace": workspace})
    module.conv_bn_dgrad_cut(settings, made, gpu, index, 1, images, workspace.data_ptr())
    memory.result()
    require(case, given, *(one.result() for one in written.values()))


@every
def test_the_same_bits_whoever_comes_last(place):
    given = operands(NAMED["many"], torch.bfloat16, exact=False)
    orders = (Schedule(), Schedule("lazy", "reverse"), Schedule("random", "shuffled"))
    results = [
        call(
            NAMED["many"], given, configuration=index_of(place), splits=1, schedule=order,
            resident_blocks=5, gpu=gpu,
        )[:2]
        for order in orders for gpu in (emulated.H200, FEW)
    ]  # fmt: skip
    for dx, sums in results[1:]:
        assert torch.equal(dx, results[0][0])
        assert torch.equal(sums, results[0][1])


@every
@pytest.mark.parametrize("way", ["all", "plain"])
def test_what_it_costs(place, way):
    """No bank conflict; of memory nothing but what the layer has, each byte of it."""
    case = ConvCase("layer", 1, 64, 16, 16, 256)
    given = operands(case, torch.bfloat16, **WAYS[way])
    dx, sums, report = call(case, given, configuration=index_of(place), splits=1, counting=True)
    require(case, given, dx, sums)
    assert report["counters"]["bank_conflicts"] == 0
    tensors = report["tensors"]
    for name in ("dz", "y", "weight", "addend", "raw", "coefficients"):
        t = getattr(given, name)
        assert t is None or tensors[name]["unique_bytes_read"] == t.nbytes, name
    assert tensors["x"]["unique_bytes_written"] == dx.nbytes
    full = way == "all"
    cost = roofline.conv_bn_dgrad_cost(
        case, torch.bfloat16, affine=full, addend=dx.numel() if full else 0, masked=full
    )
    moved = sum(t["unique_bytes_read"] + t["unique_bytes_written"] for t in tensors.values())
    assert cost.bytes <= moved <= 1.1 * cost.bytes
    if full:
        rows = 2 * -(-case.h * case.w // 128)
        assert tensors["workspace"]["unique_bytes_written"] == rows * case.c * 8 + 4


@every
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["dz", "y", "coefficients", "addend", "raw", "norm"])
def test_what_is_not_finite_is_where_it_is_in_the_reference(place, name, value):
    case = ConvCase("specials", 2, 16, 6, 5, 24, 3, 3, (1, 1), (1, 1))
    given = operands(case, torch.float16)
    given = given._replace(norm=torch.nan_to_num(given.norm))
    t = getattr(given, name).clone()
    t[(0, 1, 1, 1)[: t.dim()]] = value
    given = given._replace(**{name: t})
    geometry = (case.stride, case.padding, case.dilation, case.groups)
    wanted = overload(OP, "reference")(*given, list(case.input_shape), True, 1, *geometry)
    found = call(case, given, configuration=index_of(place), splits=1)
    for got, want in zip(found[:2], wanted, strict=True):
        assert torch.equal(got.isnan(), want.isnan()), name
        assert torch.equal(got.isinf(), want.isinf()), name


@every
def test_a_pixel_outside_counts_as_zero_though_c_does_not(place):
    """C is added inside alone: with dz and y of zeros dx is what the taps inside make of C."""
    case = ConvCase("padding", 1, 8, 3, 3, 8, 3, 3, (1, 1), (1, 1))
    given = operands(case, torch.bfloat16, addend=0, below=False)
    rows = torch.stack((torch.ones(8), torch.ones(8), torch.full((8,), 2.0)))
    zeros = torch.zeros_like(given.dz)
    ones = torch.ones_like(given.weight)
    given = given._replace(dz=zeros, y=zeros, coefficients=rows, weight=ones)
    dx, _, _ = call(case, given, configuration=index_of(place), splits=1)
    taps = torch.tensor([[4.0, 6, 4], [6, 9, 6], [4, 6, 4]])
    assert torch.equal(dx.float(), (16 * taps).expand(1, 8, 3, 3))


SIMPLE = ConvCase("simple", 1, 64, 7, 7, 64, 3, 3, (1, 1), (1, 1))


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
        ({"x": 4098}, "out: address is "),
        ({"weight": 4098}, "weight: address is "),
        ({"coefficients": 4100}, "coefficients: its address is no multiple of 8"),
        ({"raw_stride": (3136, 49, 7, 1)}, "raw: its channels are not adjacent"),
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


def test_the_layers_of_resnet50_are_served_by_them_at_a_full_batch():
    taken = set()
    for case in cases.RESNET50_LAYERS:
        made = planned(dataclasses.replace(case, n=256))
        if case.c % 8:
            assert made["configuration"] not in tiles() and "no TMA: " in made["why"]
        elif (case.r, case.s, *case.stride) == (3, 3, 1, 1):
            windows = "tma_win" if case.c == 64 else "halo_"
            assert made["why"].startswith(windows), made["why"]
        else:
            assert made["configuration"] in tiles(), (case.name, made["why"])
            taken.add(tiles()[made["configuration"]]["name"])
    assert len(taken) >= 4, taken


@pytest.mark.parametrize(
    ("case", "images", "place"),
    [
        # Of 256 channels two tiles, and the reduction is deep.
        (ConvCase("layer3.conv3", 1, 256, 14, 14, 1024), 256, 2),
        (ConvCase("layer4.conv3", 1, 512, 7, 7, 2048), 256, 2),
        # One tile of channels, so that pixels cannot be shared.
        (ConvCase("layer2.conv3", 1, 128, 28, 28, 512), 256, 3),
        (ConvCase("layer2.conv1", 1, 512, 28, 28, 128), 256, 0),  # memory, and no loads
        (ConvCase("layer3.conv3", 1, 256, 14, 14, 1024), 32, 2),
        (ConvCase("layer4.conv3", 1, 512, 7, 7, 2048), 32, 4),
    ],
    ids=lambda value: value.name if isinstance(value, ConvCase) else None,
)
def test_which_layers_are_read_in_clusters(case, images, place):
    made = planned(dataclasses.replace(case, n=images))
    assert made["configuration"] == index_of(place), made["why"]
    alone = planned(dataclasses.replace(case, n=images), configuration=index_of(0))
    if place >= ALONE:
        assert made["cycles"] < 0.9 * alone["cycles"]


def test_what_more_is_done_costs_more():
    for case in (dataclasses.replace(SIMPLE, n=256), ConvCase("layer4", 256, 512, 7, 7, 2048)):
        costs = {way: planned(case, way=way)["cycles"] for way in WAYS}
        assert costs["plain"] < costs["all"]
        assert all(costs["plain"] <= cost <= costs["all"] for cost in costs.values())


def test_the_workspace_holds_sums_and_chunks():
    case = ConvCase("layer1", 256, 64, 56, 56, 64, 3, 3, (1, 1), (1, 1))
    index = index_of(1)
    plan = planned(case, configuration=index)
    rows = 2 * case.n * case.h * case.w // 128
    chunks = -(-rows // 64)
    least = rows * 64 * 8 + chunks * 64 * 16 + (chunks + 1) * 4
    assert least <= plan["workspace_bytes"] < least + 4 * 256
    assert planned(case, way="plain", configuration=index)["workspace_bytes"] == 0


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
            for name in ("dz", "y", "addend", "raw")
            if getattr(given, name) is not None
        }
        schedule = dataclasses.replace(rng.choice(emulated.SCHEDULES), seed=number)
        found = call(
            case, given._replace(**padded), configuration=index_of(number % CONFIGURATIONS),
            splits=1, schedule=schedule, gpu=FEW,
        )  # fmt: skip
        require(case, given, *found[:2])
