"""conv_bn_dgrad by windows on wgmma, emulated: of 128 filters and more, in slices of 64 beside a
ring of filters."""

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
from test_emulated_bn_dgrad_window import WAYS, image, positions

from resnet_fused import cases, numerics, roofline
from resnet_fused.ops._library import overload

pytestmark = pytest.mark.emulated

OP = emulated_bn_dgrad.OP
NAMES = ("tma_win256x64_2w_6s", "tma_win192x64_2w_6s")
WIDE, SMALL = NAMES
every = pytest.mark.parametrize("name", NAMES)


def deep(name, n, h, w, k=128, c=64):
    """A 3x3 whose gradient is read by more than 64 filters."""
    return dataclasses.replace(image(name, n, h, w, c), k=k)


CASES = (
    deep("column", 3, 7, 1),
    deep("row", 2, 1, 30, 192),
    deep("pixels", 130, 1, 1),
    # Several images in a tile, tiles that end in every kind of place.
    deep("images", 9, 5, 6, 256),
    deep("narrow", 7, 13, 2, 128, 128),
    deep("layer2", 1, 14, 28, 128, 128),
    deep("layer4", 5, 7, 7, 320, 192),
    deep("many", 2, 18, 15, 192, 128),
)
NAMED = {case.name: case for case in CASES}


def tiles() -> dict[str, tuple[int, dict]]:
    """Index and configuration, by name."""
    table = emulated.load().conv_bn_dgrad_configurations()
    return {t["name"]: (i, t) for i, t in enumerate(table) if t["name"] in NAMES}


def run(case, given, name, **settings):
    """(dx, sums, report)."""
    return call(case, given, configuration=tiles()[name][0], splits=1, **settings)


def test_each_configuration_has_a_test_and_fits():
    table = emulated.load().conv_bn_dgrad_configurations()
    sliced = [t["name"] for t in table if t["window"] and t["name"].endswith("2w_6s")]
    assert tuple(tiles()) == NAMES == tuple(sliced)
    for _, tile in tiles().values():
        assert tile["shared_bytes"] <= emulated.H200[1] and not tile["float32"]


@every
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_bit_is_right(name, case, way):
    """On integers. A slice's filters or coefficients taken for another's would show; dtype,
    schedule and the number of blocks change from case to case."""
    number = (CASES.index(case) * len(WAYS) + list(WAYS).index(way)) * 2 + NAMES.index(name)
    given = operands(case, DTYPES[number // 2 % 2], **WAYS[way])
    settings = {
        "schedule": dataclasses.replace(emulated.SCHEDULES[number % 9], seed=number),
        "gpu": FEW if number % 3 else emulated.H200, "resident_blocks": 2,
    }  # fmt: skip
    if way == "all" and (name == WIDE or case.w > 10):  # two staging tiles each
        with pytest.raises(ValueError, match="addend and raw: rows of .* bytes of shared memory"):
            run(case, given, name, **settings)
        return
    dx, sums, report = run(case, given, name, **settings)
    require(case, given, dx, sums)
    columns, pixels = case.c // 64, tiles()[name][1]["m"]
    of_column = max(1, settings["gpu"][0] // columns)
    assert report["plan"]["blocks"] == columns * min(of_column, -(-positions(case) // pixels))


@every
@pytest.mark.parametrize("rounding", ["nearest", "toward_zero"])
def test_noise_is_within_its_bound(name, rounding):
    for dtype, of, way in (
        (torch.bfloat16, "images", "layer"),
        (torch.float16, "layer2", "layer"),
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
    """No bank conflict; of memory nothing but what the layer has, each byte of it; of dz and y a
    window's rows once for nine taps."""
    case = deep("layer", 3, 14, 10, 192, 128)
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
    turned = sum(
        site["counters"]["shared_bytes"]
        for site in report["sites"]
        if site["file"].endswith("transform_ring.h") and site["instruction"] == "st.shared"
    )
    m = tiles()[name][1]["m"]
    rows = {256: 280, 192: 216}[m]
    assert turned == -(-positions(case) // m) * case.c // 64 * rows * case.k * 2


@every
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("of", ["dz", "y", "coefficients", "addend", "raw", "norm"])
def test_what_is_not_finite_is_where_it_is_in_the_reference(name, of, value):
    """At a row's end and an image's, where the walk goes on to what others read."""
    case = deep("specials", 3, 6, 5)
    given = operands(case, torch.float16, **WAYS["shortcut" if of == "addend" else "layer"])
    if given.norm is not None:
        given = given._replace(norm=torch.nan_to_num(given.norm))
    t = getattr(given, of).clone()
    for place in ((0, 1, 1, 4), (1, 2, 5, 0), (2, 67, 5, 4)):
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
    case = deep("padding", 3, 3, 3)
    given = operands(case, torch.bfloat16, **WAYS["affine"])
    rows = torch.stack((torch.ones(128), torch.ones(128), torch.full((128,), 2.0)))
    zeros, ones = torch.zeros_like(given.dz), torch.ones_like(given.weight)
    given = given._replace(dz=zeros, y=zeros, coefficients=rows, weight=ones)
    dx, _, _ = run(case, given, name)
    taps = torch.tensor([[4.0, 6, 4], [6, 9, 6], [4, 6, 4]])
    assert torch.equal(dx.float(), (256 * taps).expand(3, 64, 3, 3))


SIMPLE = deep("simple", 1, 7, 7)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"k": 64}, "channels: windows in slices are for 2, 3, .. times 64 in one group"),
        ({"k": 160}, "channels: windows in slices are for 2, 3, .. times 64 in one group"),
        ({"c": 128, "k": 256, "groups": 2}, "times 64 in one group"),
        ({"c": 72}, "channels: 72 of the output; a multiple of 64 is accepted"),
        ({"stride": (2, 2)}, "windows are for filters of 3x3, stride, padding and dilation 1"),
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
        assert planned(case, way=WAYS["affine"])["configuration"] != index, name


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dtype": torch.float32}, "dtype: float32 is not served"),
        ({"addend_step": 2}, "addend: every 2-th pixel; windows are for every one"),
        ({"y": 4098}, "y: address is "),
        ({"weight": 4098}, "weight: address is "),
        ({"coefficients": 4104}, "coefficients: address is not a multiple of 16"),
    ],
    ids=str,
)
def test_what_they_cannot_take_is_refused_in_words(changes, said):
    with pytest.raises(ValueError, match=said):
        planned(SIMPLE, configuration=tiles()[SMALL][0], **changes)


def test_splits_and_other_gpus_are_refused():
    for index, _ in tiles().values():
        with pytest.raises(ValueError, match="splits: only 1 is served by TMA"):
            planned(SIMPLE, way=WAYS["affine"], configuration=index, splits=2)
        for gpu in (emulated.A100, emulated.RTX3080, emulated.H200[:3]):
            with pytest.raises(ValueError, match="for GPUs of capability 9.0"):
                planned(SIMPLE, way=WAYS["affine"], configuration=index, gpu=gpu)


def test_which_layers_they_serve():
    """ResNet-50's 3x3 of 128 and 256 channels at batch 256, in fewer cycles than other windows; of
    512 the blocks are too few for what L2 is asked."""
    served = {}
    for case in cases.RESNET50_LAYERS:
        if (case.r, *case.stride) != (3, 1, 1) or case.c == 64:
            continue
        made = planned(dataclasses.replace(case, n=256), way=WAYS["layer"])
        served[case.c] = made["why"].split(",")[0]
        halo = min(
            planned(dataclasses.replace(case, n=256), way=WAYS["layer"], configuration=i)["cycles"]
            for i in (3, 4, 5)
        )
        assert (made["cycles"] < halo) == (case.c < 512)
    assert served.pop(512) not in NAMES and served == {128: WIDE, 256: WIDE}


def test_random_shapes():
    """dz, y and what the end reads lie within wider images."""
    for number in range(8):
        rng = random.Random(number)
        case = deep(
            "random", rng.randint(1, 4), rng.randint(1, 14), rng.randint(1, 30),
            64 * rng.randint(2, 4), 64 * rng.randint(1, 2),
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
