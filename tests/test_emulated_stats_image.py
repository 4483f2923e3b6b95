"""conv_bn_stats of an image in CUDA, emulated: the kernel that reads it by rows."""

from __future__ import annotations

import dataclasses
import functools
import math

import emulated
import pytest
import torch
from emulated import Schedule
from test_emulated_stats import (
    call,
    configurations,
    conflicts,
    cut,
    operands,
    planned,
    require,
    require_stats,
)

from resnet_fused import cases, numerics, roofline

pytestmark = pytest.mark.emulated

NAME, NARROW = "image_128x64_4w7s", 3
STEM = cases.ConvCase("stem", 2, 3, 19, 71, 64, 7, 7, (2, 2), (3, 3))
"""20 rows of 36 output pixels: six tiles, which begin and end within rows and images."""
ALONE = (1, *emulated.H200[1:])
"""One multiprocessor: its four blocks have a tile or two each."""
GPUS = (emulated.H200, ALONE)
SHAPES = {
    "rows of more than a tile": dataclasses.replace(STEM, h=9, w=271),
    "rows of a pixel": dataclasses.replace(STEM, n=1, h=40, w=1, padding=(3, 0), s=1),
    "rows of half a fragment": dataclasses.replace(STEM, w=9),
    "one pixel": dataclasses.replace(STEM, n=1, h=1, w=1),
    "images of a row": dataclasses.replace(STEM, n=11, h=1),
    "one channel": dataclasses.replace(STEM, c=1),
    "four channels": dataclasses.replace(STEM, c=4),
    "some filters": dataclasses.replace(STEM, k=41),
    "three columns of tiles": dataclasses.replace(STEM, k=136),
    "3x3": dataclasses.replace(STEM, r=3, s=3, padding=(1, 1)),
    "one row of taps": dataclasses.replace(STEM, r=1, padding=(0, 3)),
    "one tap of a row": dataclasses.replace(STEM, s=1, padding=(3, 0)),
    "eight taps": dataclasses.replace(STEM, s=8, padding=(3, 4)),
    "no padding": dataclasses.replace(STEM, padding=(0, 0)),
    "padding that holds whole taps": dataclasses.replace(STEM, padding=(9, 12)),
    "stride down": dataclasses.replace(STEM, stride=(1, 2)),
    "stride far down": dataclasses.replace(STEM, stride=(5, 2)),
    "dilated down": dataclasses.replace(STEM, dilation=(2, 1)),
}
HOSTILE = (Schedule("lazy", "shuffled", seed=1), Schedule("random", "reverse", seed=2))
SIXTEEN = (torch.bfloat16, torch.float16)


@functools.cache
def index() -> int:
    return next(i for i, tile in enumerate(configurations()) if tile["name"] == NAME)


def given_of(case, dtype=torch.bfloat16, *, exact=True, layout=torch.channels_last):
    x, _, weight = operands(case, dtype, exact=exact, layout=layout)
    return x, None, weight


def by_rows(case, given, **settings):
    return call(case, *given, **{"configuration": index(), "splits": 1} | settings)


@pytest.mark.parametrize("gpu", GPUS, ids=("a tile a block", "blocks that stay"))
@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
def test_every_bit_of_a_stem(dtype, gpu):
    given = given_of(STEM, dtype)
    for schedule in HOSTILE:
        y, stats, report = by_rows(STEM, given, gpu=gpu, schedule=schedule, resident_blocks=3)
        assert report["plan"]["blocks"] == (4 if gpu is ALONE else 6)
        require(STEM, *given, y, stats)


@pytest.mark.parametrize("name", SHAPES)
def test_every_bit_of_other_shapes(name):
    case = SHAPES[name]
    given = given_of(case)
    for gpu, schedule in zip(GPUS, HOSTILE, strict=True):
        y, stats, _ = by_rows(case, given, gpu=gpu, schedule=schedule)
        require(case, *given, y, stats)


@pytest.mark.parametrize("layout", ["nchw", "slice", "mirrored weights"])
def test_images_and_filters_of_any_strides(layout):
    x, _, weight = given_of(STEM, torch.float16)
    if layout == "nchw":
        x, weight = x.contiguous(), weight.contiguous()
    elif layout == "slice":  # of a larger image, at an odd address
        wide = torch.full((2, 5, 21, 75), math.nan, dtype=torch.float16)
        wide[:, 1:4, 1:20, 3:74] = x
        x = wide[:, 1:4, 1:20, 3:74]
    else:
        weight = weight.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    require(STEM, x, None, weight, *by_rows(STEM, (x, None, weight))[:2])


@pytest.mark.parametrize("taps", range(1, 9))
def test_what_is_beside_a_pixels_taps_never_counts(taps):
    """The image has Inf where a row of eight taps goes on behind the filter's: zeros meet it."""
    case = dataclasses.replace(STEM, h=9, s=taps, padding=(3, 0))
    x, _, weight = given_of(case, torch.float16)
    weight = weight.abs() + 1
    for column in (30, 31):
        x[..., column] = math.inf
        y, _, _ = by_rows(case, (x, None, weight))
        touched = [2 * q <= column < 2 * q + taps for q in range(case.q)]
        assert (y == math.inf)[..., touched].all()
        assert y[..., [not one for one in touched]].isfinite().all()
        x[..., column] = 1


def test_an_image_ends_where_the_next_begins():
    """A tile has pixels of both; what one image holds is not the other's."""
    x, _, weight = given_of(STEM, torch.float16)
    x[1] = math.nan
    y, _, _ = by_rows(STEM, (x, None, weight))
    assert y[0].isfinite().all() and y[1].isnan().all()


def test_a_filters_nan_is_its_channels_alone():
    """It meets the zeros of pixels that do not exist, too."""
    x, _, weight = given_of(STEM, torch.float16)
    weight[3, 1, 6, 6] = math.nan
    y, stats, _ = by_rows(STEM, (x, None, weight))
    assert stats[:, 3].isnan().all()
    rest = [k for k in range(STEM.k) if k != 3]
    require_stats(y[:, rest], stats[:, rest])


@pytest.mark.parametrize("rounding", ["nearest", "toward_zero"])
@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
def test_within_the_bound_in_either_rounding_of_sums(dtype, rounding):
    given = given_of(STEM, dtype, exact=False)
    y, stats, _ = by_rows(STEM, given, schedule=Schedule(rounding=rounding), gpu=ALONE)
    oracle = numerics.conv_bn_stats_oracle(*given, **STEM.geometry)
    accumulation = "nearest" if rounding == "nearest" else "truncate"
    bound = numerics.conv_bn_stats_bound(
        *given, oracle, **STEM.geometry, accumulation=accumulation, k=16
    )
    found = numerics.check_bound(y, oracle, bound)
    assert found.ok, str(found)
    require_stats(y, stats)


def test_the_same_bits_whoever_has_a_tile():
    """However many blocks there are, and whichever comes last."""
    given = given_of(STEM, torch.bfloat16, exact=False)
    first, *others = [
        by_rows(STEM, given, gpu=gpu, schedule=schedule)[:2]
        for gpu in GPUS
        for schedule in (Schedule(), *HOSTILE)
    ]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_launches_of_some_images():
    case = dataclasses.replace(STEM, n=5, h=9)
    given = given_of(case)
    require(case, *given, *cut(case, *given, index(), 1, images=2))


@pytest.mark.parametrize("case", [STEM, SHAPES["four channels"]], ids=["C 3", "C 4"])
def test_no_bank_conflicts_and_every_byte_once(case):
    given = given_of(case, exact=False)
    y, _, report = by_rows(case, given, counting=True)
    assert report["counters"]["shared_wavefronts"] > 0
    assert not conflicts(report)
    read = {name: report["tensors"][name]["unique_bytes_read"] for name in ("x", "weight")}
    assert read == {"x": given[0].nbytes, "weight": given[2].nbytes}
    assert report["tensors"]["y"]["unique_bytes_written"] == y.nbytes
    cost = roofline.conv_bn_stats_cost(case, torch.bfloat16)
    assert sum(read.values()) + y.nbytes <= cost.bytes


def asked(report, file) -> int:
    """Bytes that a file's loads have asked for; moments are not among them."""
    return sum(
        site["counters"]["global_load_bytes_asked"]
        for site in report["sites"]
        if site["instruction"].startswith("ld.global") and site["file"].endswith(file)
    )


def test_an_element_is_asked_for_once_a_tile():
    """The other kernel asks for it once a tap."""
    case = dataclasses.replace(STEM, h=18, padding=(0, 0), w=69)  # all taps inside: 6 x 32 pixels
    given = given_of(case)
    _, _, report = by_rows(case, given, gpu=ALONE, counting=True)
    tiles, rows = 3, 4
    assert case.p * case.q == 6 * 32 and report["plan"]["blocks"] == tiles
    elements = tiles * rows * 7 * (2 * 32 + 6) * 3
    assert asked(report, "image_chunk.h") == 2 * elements
    assert asked(report, "image_filters.h") == tiles * given[2].nbytes
    _, _, other = call(case, *given, configuration=NARROW, splits=1, counting=True)
    pixels = tiles * 128 * 7 * 7 * 3
    assert asked(other, "conv_loader.h") == 2 * pixels + tiles * given[2].nbytes
    assert pixels > 3 * elements


def test_filters_are_asked_for_once_a_block():
    given = given_of(STEM)
    for gpu, blocks in zip(GPUS, (6, 4), strict=True):
        _, _, report = by_rows(STEM, given, gpu=gpu, counting=True)
        assert asked(report, "image_filters.h") == blocks * given[2].nbytes


# The plan.

RESNET = cases.ConvCase("resnet", 256, 3, 224, 224, 64, 7, 7, (2, 2), (3, 3))


@pytest.mark.parametrize("gpu", [emulated.H200, emulated.A100, emulated.RTX3080], ids=str)
@pytest.mark.parametrize("n", [32, 256])
def test_a_stem_is_read_by_rows(gpu, n):
    case = dataclasses.replace(RESNET, n=n)
    plan = planned(case, prologue=False, gpu=gpu)
    if gpu is emulated.H200:  # there wgmma's kernel is ahead: tests/test_emulated_stats_stem.py
        plan = planned(case, prologue=False, gpu=gpu, configuration=index())
    assert (plan["configuration"], plan["splits"]) == (index(), 1)
    assert "not by rows" not in plan["why"]
    other = planned(case, prologue=False, gpu=gpu, configuration=NARROW)
    assert plan["cycles"] < 0.75 * other["cycles"]
    # 46 KB each, of 228, 164 and 100.
    resident = {emulated.H200: 4, emulated.A100: 3, emulated.RTX3080: 2}[gpu]
    assert plan["blocks"] == resident * gpu[0]


def test_blocks_have_whole_columns_of_tiles():
    case = dataclasses.replace(RESNET, k=136)
    plan = planned(case, prologue=False, configuration=index())
    assert plan["blocks"] == 4 * 132
    many = dataclasses.replace(RESNET, n=1, k=640)
    assert planned(many, prologue=False, configuration=index(), gpu=ALONE)["blocks"] == 10


@pytest.mark.parametrize(
    ("changes", "more", "words"),
    [
        ({}, {"prologue": True}, "not read through a BatchNorm"),
        ({}, {"dtype": torch.float32}, "by rows in 16 bits"),
        ({"r": 9, "padding": (4, 3)}, {}, "up to 7 x 8"),
        ({"s": 9, "padding": (3, 4)}, {}, "up to 7 x 8"),
        ({"stride": (2, 1)}, {}, "a stride of 2"),
        ({"dilation": (1, 2)}, {}, "a dilation of 1"),
        ({}, {"gpu": (80, 32 * 1024, 64 * 1024)}, "too much shared memory"),
        ({"w": 1}, {"gpu": emulated.RTX3080}, "too much shared memory"),  # each pixel is a row
    ],
)
def test_what_it_does_not_take_is_said(changes, more, words):
    case = dataclasses.replace(RESNET, **changes)
    settings = {"prologue": False} | more
    with pytest.raises(ValueError, match=words):
        planned(case, **settings, configuration=index())
    if words != "too much shared memory" or "w" in changes:
        why = planned(case, **settings)["why"]
        assert "; not by rows: " in why and words in why


@pytest.mark.parametrize("changes", [{"c": 5}, {"c": 6, "groups": 2}])
def test_other_inputs_are_no_images(changes):
    case = dataclasses.replace(RESNET, **changes)
    with pytest.raises(ValueError, match="up to 4 channels, in one group"):
        planned(case, prologue=False, configuration=index())
    assert "by rows" not in planned(case, prologue=False)["why"]


def test_what_is_asked_of_it():
    with pytest.raises(ValueError, match="only 1 is served"):
        planned(RESNET, prologue=False, configuration=index(), splits=2)
    # Any address does, and any strides.
    planned(RESNET, prologue=False, configuration=index(), x=4098, weight=4098, y=4098)
