"""conv_bn_dgrad by windows on wgmma, emulated: dz and y become dy once for all nine taps."""

from __future__ import annotations

import dataclasses
import random

import emulated
import emulated_bn_dgrad
import pytest
import torch
from emulated import Schedule
from emulated_shapes import lay_out
from test_emulated_bn_dgrad import call, operands, require
from test_emulated_bn_dgrad_sm90 import DTYPES, FEW, planned

from resnet_fused import cases, numerics, roofline
from resnet_fused.cases import ConvCase
from resnet_fused.ops import _results
from resnet_fused.ops._library import overload

pytestmark = pytest.mark.emulated

OP = emulated_bn_dgrad.OP
NAMES = ("tma_win192x64_2w", "tma_win96x64_2w")
WIDE, SMALL = NAMES
every = pytest.mark.parametrize("name", NAMES)
WAYS = {
    "all": {},
    "layer": {"addend": 0},
    "shortcut": {"below": False},
    "affine": {"addend": 0, "below": False},
    "addend": {"affine": False, "below": False},
    "below": {"affine": False, "addend": 0},
    "plain": {"affine": False, "addend": 0, "below": False},
}
"""What of the op takes part; all of it takes staging tiles that the wide tile has no room for."""


def image(name, n, h, w, c=64) -> ConvCase:
    """A 3x3 whose gradient is read by 64 filters."""
    return ConvCase(name, n, c, h, w, 64, 3, 3, (1, 1), (1, 1))


CASES = (
    image("column", 3, 7, 1),
    image("row", 2, 1, 60),
    image("pixels", 90, 1, 1),
    # Several images in a tile, tiles that end in every kind of place.
    image("images", 9, 5, 6),
    image("narrow", 5, 13, 2, 128),
    image("wide", 1, 6, 80),
    image("layer1", 1, 9, 56),
    image("channels", 2, 10, 9, 192),
    image("many", 2, 18, 15, 128),
)
NAMED = {case.name: case for case in CASES}


def tiles() -> dict[str, tuple[int, dict]]:
    """Index and configuration, by name."""
    table = emulated.load().conv_bn_dgrad_configurations()
    return {t["name"]: (i, t) for i, t in enumerate(table) if t["name"] in NAMES}


def run(case, given, name, **settings):
    """(dx, sums, report)."""
    return call(case, given, configuration=tiles()[name][0], splits=1, **settings)


def positions(case: ConvCase) -> int:
    """Of the walk, as far as its last pixel."""
    return case.n * (case.h + 1) * (case.w + 1) - (case.w + 1) - 1


def shared_bytes(case: ConvCase, pixels: int, *, affine: bool = True, ends: int = 1) -> int:
    """Filters, scratch and barriers; staging tiles, two windows, two parts of y."""
    rows = pixels + 2 * (case.w + 2)
    fits = [(-(-rows // count) + 7) // 8 * 8 * count for count in range(-(-rows // 128), 9)]
    least = -(-rows // 128)
    whole = min(fits[:4])
    part = whole // (least + fits.index(whole))
    return 75 * 1024 + 128 * (2 * ends * pixels + 2 * whole + (2 * part if affine else 0))


def test_each_configuration_has_a_test_and_fits():
    assert tuple(tiles()) == NAMES
    for _, tile in tiles().values():
        assert tile["shared_bytes"] <= emulated.H200[1] and not tile["float32"]
    # With rows of 56 pixels not a byte is left.
    assert shared_bytes(image("", 1, 56, 56), 192) == 227 * 1024


@every
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_bit_is_right(name, case, way):
    """On integers; dtype, schedule and the number of blocks change from case to case."""
    number = (CASES.index(case) * len(WAYS) + list(WAYS).index(way)) * 2 + NAMES.index(name)
    given = operands(case, DTYPES[number // 2 % 2], **WAYS[way])
    settings = {
        "schedule": dataclasses.replace(emulated.SCHEDULES[number % 9], seed=number),
        "gpu": FEW if number % 3 else emulated.H200, "resident_blocks": 2,
    }  # fmt: skip
    pixels = tiles()[name][1]["m"]
    ends = {"all": 2}.get(way, 1)
    if shared_bytes(case, pixels, affine="affine" not in WAYS[way], ends=ends) > emulated.H200[1]:
        with pytest.raises(ValueError, match="bytes of shared memory; up to 232448 are there"):
            run(case, given, name, **settings)
        return
    dx, sums, report = run(case, given, name, **settings)
    require(case, given, dx, sums)
    columns = case.c // 64
    of_column = max(1, settings["gpu"][0] // columns)
    assert report["plan"]["blocks"] == columns * min(of_column, -(-positions(case) // pixels))


@every
@pytest.mark.parametrize("rounding", ["nearest", "toward_zero"])
def test_noise_is_within_its_bound(name, rounding):
    for dtype, of, way in (
        (torch.bfloat16, "images", "layer"),
        (torch.float16, "layer1", "layer"),
        (torch.float16, "narrow", "shortcut"),
    ):
        case = NAMED[of]
        given = operands(case, dtype, exact=False, **WAYS[way])
        schedule = Schedule("random", "shuffled", rounding, seed=len(of))
        oracle = numerics.conv_bn_dgrad_oracle(*given, input_size=case.input_shape, **case.geometry)
        how = {"accumulation": "nearest" if rounding == "nearest" else "truncate", "k": 16}
        bound = numerics.conv_bn_dgrad_bound(*given, oracle, **case.geometry, **how)
        dx, sums, _ = run(case, given, name, schedule=schedule, gpu=FEW)
        found = numerics.check_bound(dx, oracle, bound)
        assert found.ok, (of, str(found))
        if given.raw is None:
            continue
        below = given.raw, given.norm
        wanted = numerics.reductions_oracle(dx, below)
        found = numerics.check_bound(sums, wanted, numerics.reductions_bound(dx, below))
        assert found.ok, (of, str(found))


def test_chunks_of_tiles_are_merged():
    case = image("chunks", 4, 56, 56)
    assert 64 < -(-positions(case) // 192) < 2 * 64 < -(-positions(case) // 96) < 3 * 64
    for name, schedule in ((WIDE, Schedule()), (SMALL, Schedule("random", "shuffled", seed=3))):
        given = operands(case, torch.bfloat16, **WAYS["layer"])
        dx, sums, _ = run(
            case, given, name, schedule=schedule, resident_blocks=3, gpu=(7, *emulated.H200[1:])
        )
        require(case, given, dx, sums)


@every
def test_launches_share_the_sums(name):
    """What a batch beyond 2^31 positions comes to, in launches of two images."""
    case = image("launches", 5, 9, 8, 128)
    given = operands(case, torch.bfloat16, **WAYS["layer"])
    module, gpu, index, images = emulated.load(), emulated.H200, tiles()[name][0], 2
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
def test_the_same_bits_whoever_comes_last(name):
    """And on however many multiprocessors: a tile leaves its sums by itself."""
    given = operands(NAMED["many"], torch.bfloat16, exact=False, **WAYS["layer"])
    orders = (Schedule(), Schedule("lazy", "reverse"), Schedule("random", "shuffled"))
    results = [
        run(NAMED["many"], given, name, schedule=order, resident_blocks=5, gpu=gpu)[:2]
        for order in orders for gpu in (emulated.H200, FEW)
    ]  # fmt: skip
    for dx, sums in results[1:]:
        assert torch.equal(dx, results[0][0])
        assert torch.equal(sums, results[0][1])


@pytest.mark.parametrize(("name", "way"), [(WIDE, "layer"), (WIDE, "shortcut"), (SMALL, "all")])
def test_what_it_costs(name, way):
    """No bank conflict; of memory nothing but what the layer has, each byte of it."""
    case = image("layer", 2, 24, 24, 128)
    given = operands(case, torch.bfloat16, **WAYS[way])
    dx, sums, report = run(case, given, name, counting=True)
    require(case, given, dx, sums)
    assert report["counters"]["bank_conflicts"] == 0
    tensors = report["tensors"]
    for of in ("dz", "y", "weight", "addend", "raw", "coefficients"):
        t = getattr(given, of)
        assert t is None or tensors[of]["unique_bytes_read"] == t.nbytes, of
    assert tensors["x"]["unique_bytes_written"] == dx.nbytes
    cost = roofline.conv_bn_dgrad_cost(
        case, torch.bfloat16, affine=True, addend=0 if given.addend is None else dx.numel(),
        masked=given.raw is not None,
    )  # fmt: skip
    moved = sum(t["unique_bytes_read"] + t["unique_bytes_written"] for t in tensors.values())
    assert cost.bytes <= moved <= 1.1 * cost.bytes
    if given.raw is not None:
        rows = -(-positions(case) // tiles()[name][1]["m"])
        counters = 4 * case.c // 64
        assert tensors["workspace"]["unique_bytes_written"] == rows * case.c * 8 + counters


@every
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("of", ["dz", "y", "coefficients", "addend", "raw", "norm"])
def test_what_is_not_finite_is_where_it_is_in_the_reference(name, of, value):
    """At a row's end and an image's, where the walk goes on to what others read."""
    case = image("specials", 3, 6, 5)
    given = operands(case, torch.float16, **WAYS["shortcut" if of == "addend" else "layer"])
    if given.norm is not None:
        given = given._replace(norm=torch.nan_to_num(given.norm))
    t = getattr(given, of).clone()
    for place in ((0, 1, 1, 4), (1, 2, 5, 0), (2, 3, 5, 4)):
        t[tuple(i % size for i, size in zip(place, t.shape, strict=False))] = value
    given = given._replace(**{of: t})
    geometry = (case.stride, case.padding, case.dilation, case.groups)
    wanted = overload(OP, "reference")(*given, list(case.input_shape), True, 1, *geometry)
    found = run(case, given, name, gpu=FEW)
    for got, want in zip(found[:2], wanted, strict=True):
        assert torch.equal(got.isnan(), want.isnan()), of
        assert torch.equal(got.isinf(), want.isinf()), of


@every
def test_a_pixel_outside_counts_as_zero_though_c_does_not(name):
    """C is added inside alone: with dz and y of zeros dx is what the taps inside make of C."""
    case = image("padding", 3, 3, 3)
    given = operands(case, torch.bfloat16, **WAYS["affine"])
    rows = torch.stack((torch.ones(64), torch.ones(64), torch.full((64,), 2.0)))
    zeros, ones = torch.zeros_like(given.dz), torch.ones_like(given.weight)
    given = given._replace(dz=zeros, y=zeros, coefficients=rows, weight=ones)
    dx, _, _ = run(case, given, name)
    taps = torch.tensor([[4.0, 6, 4], [6, 9, 6], [4, 6, 4]])
    assert torch.equal(dx.float(), (128 * taps).expand(3, 64, 3, 3))


SIMPLE = image("simple", 1, 7, 7)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dtype": torch.float32}, "dtype: float32 is not served"),
        ({"addend_step": 2}, "addend: every 2-th pixel; windows are for every one"),
        ({"dz": 4098}, "dz: address is "),
        ({"y": 4098}, "y: address is "),
        ({"addend": 4098}, "addend: address is "),
        ({"raw": 4098}, "raw: address is "),
        ({"x": 4098}, "out: address is "),
        ({"weight": 4098}, "weight: address is "),
        ({"coefficients": 4104}, "coefficients: address is not a multiple of 16"),
        ({"raw_stride": (3136, 49, 7, 1)}, "raw: its channels are not adjacent"),
        ({"dz_stride": (3136, 49, 7, 1)}, "dz: its channels are not adjacent"),
        ({"x_stride": (3136, 49, 7, 1)}, "out: its channels are not adjacent"),
    ],
    ids=str,
)
def test_what_they_cannot_take_is_refused_in_words(changes, said):
    index = tiles()[SMALL][0]
    with pytest.raises(ValueError, match=said):
        planned(SIMPLE, configuration=index, **changes)
    assert planned(SIMPLE, **changes)["configuration"] != index


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"k": 72}, "64 in one group"),
        ({"c": 128, "k": 128, "groups": 2}, "64 in one group"),
        ({"c": 72}, "channels: 72 of the output; a multiple of 64 is accepted"),
        ({"stride": (2, 2)}, "windows are for filters of 3x3, stride, padding and dilation 1"),
        ({"padding": (0, 0)}, "windows are for filters of 3x3, stride, padding and dilation 1"),
        ({"r": 1, "s": 1, "padding": (0, 0)}, "windows are for filters of 3x3"),
        ({"w": 300}, "dz: rows of 300 pixels take"),
    ],
    ids=str,
)
def test_shapes_that_others_serve(changes, said):
    case = dataclasses.replace(SIMPLE, **changes)
    for name, (index, _) in tiles().items():
        with pytest.raises(ValueError, match=said):
            planned(case, way=WAYS["affine"], configuration=index)
        made = planned(case, way=WAYS["affine"])
        assert made["configuration"] != index, name
    # Of a shape that windows are not for nothing is missed.
    missed = "; no windows by TMA: " in made["why"]
    assert missed == ("3x3" not in said) and (not missed or said in made["why"])


def test_an_addend_beside_raw_takes_a_smaller_tile():
    with pytest.raises(ValueError, match="addend and raw: rows of 7 pixels take"):
        planned(SIMPLE, configuration=tiles()[WIDE][0])
    assert planned(SIMPLE, configuration=tiles()[SMALL][0])["blocks"] == 1


def test_splits_and_other_gpus_are_refused():
    for index, _ in tiles().values():
        with pytest.raises(ValueError, match="splits: only 1 is served by TMA"):
            planned(SIMPLE, way=WAYS["affine"], configuration=index, splits=2)
        for gpu in (emulated.A100, emulated.RTX3080, emulated.H200[:3]):
            with pytest.raises(ValueError, match="for GPUs of capability 9.0"):
                planned(SIMPLE, way=WAYS["affine"], configuration=index, gpu=gpu)


def test_which_layers_they_serve():
    """ResNet-50's 3x3 of 64 channels, and at batch 256 in half the cycles of other windows."""
    for case in cases.RESNET50_LAYERS:
        if (case.r, *case.stride) != (3, 1, 1):
            continue
        for batch in (1, 32, 256):
            made = planned(dataclasses.replace(case, n=batch), way=WAYS["layer"])
            assert made["why"].startswith(NAMES) == (case.c == 64), made["why"]
    layer = dataclasses.replace(NAMED["layer1"], n=256, h=56)
    made = planned(layer, way=WAYS["layer"])
    assert made["why"].startswith(WIDE)
    halo = planned(layer, way=WAYS["layer"], configuration=4)
    assert made["cycles"] < 0.6 * halo["cycles"]


def test_what_more_is_done_costs_more():
    case, index = image("layer", 256, 56, 56), tiles()[SMALL][0]
    costs = {way: planned(case, way=WAYS[way], configuration=index)["cycles"] for way in WAYS}
    assert costs["plain"] < costs["addend"] < costs["all"]
    assert costs["plain"] < costs["below"] < costs["all"]
    assert all(costs["plain"] <= cost <= costs["all"] for cost in costs.values())


def test_the_workspace_holds_sums_and_chunks():
    case = image("layer", 256, 56, 56)
    plan = planned(case, way=WAYS["layer"], configuration=tiles()[WIDE][0])
    rows = -(-positions(case) // 192)
    chunks = -(-rows // 64)
    least = rows * 64 * 8 + chunks * 64 * 16 + (chunks + 1) * 4
    assert least <= plan["workspace_bytes"] < least + 4 * 256
    plan = planned(case, way=WAYS["plain"], configuration=tiles()[WIDE][0])
    assert plan["workspace_bytes"] == 0


def test_random_shapes():
    """dz, y and what the end reads lie within wider images."""
    for number in range(8):
        rng = random.Random(number)
        case = image(
            "random", rng.randint(1, 4), rng.randint(1, 14), rng.randint(1, 30),
            64 * rng.randint(1, 2),
        )  # fmt: skip
        given = operands(case, rng.choice(DTYPES), **rng.choice(list(WAYS.values())))
        padded = {
            name: lay_out(getattr(given, name), "padded")
            for name in ("dz", "y", "addend", "raw")
            if getattr(given, name) is not None
        }
        name = SMALL if given.addend is not None and given.raw is not None else rng.choice(NAMES)
        schedule = dataclasses.replace(rng.choice(emulated.SCHEDULES), seed=number)
        found = run(case, given._replace(**padded), name, schedule=schedule, gpu=FEW)
        require(case, given, *found[:2])
