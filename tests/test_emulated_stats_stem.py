"""conv_bn_stats of a stem by wgmma, emulated: for sm_90a, from the image's rows."""

from __future__ import annotations

import dataclasses
import functools
import math
import random

import emulated
import pytest
import test_emulated_stats as stats_tests
import torch
from conv_by_tma import DTYPES, FEW
from emulated import Schedule
from test_emulated_stats import call, operands, planned, require, require_stats
from test_emulated_stats_image import HOSTILE, RESNET, STEM, asked

from resnet_fused import numerics
from resnet_fused.ops import _cuda_stats_checks

pytestmark = pytest.mark.emulated

NAMES = ("tma_image112x64_8s", "tma_image64x64_8s")
WIDE, SMALL = NAMES
every = pytest.mark.parametrize("name", NAMES)
ONE = (1, *emulated.H200[1:])
SHAPES = {
    "rows shorter than a tile": STEM,
    "rows of two tiles": dataclasses.replace(STEM, n=1, h=9, w=271),
    "rows of tiles without a rest": dataclasses.replace(STEM, n=3, h=6, w=255),
    "rows of a pixel": dataclasses.replace(STEM, n=1, h=40, w=1),
    "one pixel": dataclasses.replace(STEM, n=1, h=1, w=1),
    "images of a row": dataclasses.replace(STEM, n=11, h=1),
    "two channels": dataclasses.replace(STEM, c=2),
    "four channels": dataclasses.replace(STEM, c=4),
    "some filters": dataclasses.replace(STEM, k=40),
    "three columns of filters": dataclasses.replace(STEM, k=136),
    "no padding": dataclasses.replace(STEM, padding=(0, 0)),
    "padding that holds whole taps": dataclasses.replace(STEM, padding=(9, 12)),
}


@functools.cache
def tiles() -> dict[str, dict]:
    """The configurations by name."""
    table = emulated.load().conv_bn_stats_configurations()
    return {
        tile["name"]: tile | {"index": i}
        for i, tile in enumerate(table)
        if tile["tma"] and tile["image"]
    }


def drawn(case, dtype=torch.bfloat16, *, exact=True, layout=torch.channels_last):
    x, _, weight = operands(case, dtype, exact=exact, layout=layout)
    return x, None, weight


def run(case, given, name, **settings):
    """y, statistics and report of a configuration."""
    settings = {"splits": 1, **settings}
    y, stats, report = call(case, *given, configuration=tiles()[name]["index"], **settings)
    assert report["plan"]["configuration"] == tiles()[name]["index"]
    return y, stats, report


def rows_of(case, name):
    """Of tiles: what is shared out."""
    return case.n * case.p * -(-case.q // tiles()[name]["m"])


def test_each_configuration_has_a_test_and_fits():
    assert tuple(tiles()) == NAMES
    for tile in tiles().values():
        assert tile["shared_bytes"] <= emulated.H200[1] and not tile["float32"]


@every
@pytest.mark.parametrize("shape", SHAPES)
def test_every_bit_is_right(name, shape):
    """On integers; runs that begin and end anywhere, within strips, tiles and images."""
    case = SHAPES[shape]
    number = list(SHAPES).index(shape)
    given = drawn(case, DTYPES[number % 2])
    columns = -(-case.k // 64)
    for gpu, schedule in zip((FEW, (5, *emulated.H200[1:])), HOSTILE, strict=True):
        y, stats, report = run(case, given, name, gpu=gpu, schedule=schedule, resident_blocks=4)
        require(case, *given, y, stats)
        of_column = max(1, gpu[0] // columns)
        assert report["plan"]["blocks"] == columns * min(of_column, rows_of(case, name))


@every
@pytest.mark.parametrize("rounding", ["nearest", "toward_zero"])
def test_noise_is_within_the_bound(name, rounding):
    for dtype in DTYPES:
        given = drawn(STEM, dtype, exact=False)
        y, stats, _ = run(STEM, given, name, schedule=Schedule(rounding=rounding), gpu=FEW)
        oracle = numerics.conv_bn_stats_oracle(*given, **STEM.geometry)
        accumulation = "nearest" if rounding == "nearest" else "truncate"
        bound = numerics.conv_bn_stats_bound(
            *given, oracle, **STEM.geometry, accumulation=accumulation, k=16
        )
        found = numerics.check_bound(y, oracle, bound)
        assert found.ok, str(found)
        require_stats(y, stats)


@every
@pytest.mark.parametrize("layout", ["slice", "weights in rows", "mirrored weights"])
def test_images_and_filters_of_any_strides(name, layout):
    x, _, weight = drawn(STEM, torch.float16)
    if layout == "weights in rows":
        weight = weight.contiguous()
    elif layout == "slice":  # of a larger image, at an odd address
        wide = torch.full((2, 5, 21, 75), math.nan, dtype=torch.float16)
        wide[:, 1:4, 1:20, 3:74] = x
        x = wide[:, 1:4, 1:20, 3:74]
    else:
        weight = weight.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    require(STEM, x, None, weight, *run(STEM, (x, None, weight), name, gpu=FEW)[:2])


@every
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_stays_where_it_is(name, value):
    """Also beside the seventh tap, where the product has an eighth, and at an image's end."""
    for place in ((0, 1, 5, 31), (1, 2, 0, 0), (0, 0, 18, 70)):
        x, _, weight = drawn(STEM, torch.float16)
        x[place] = value
        weight = weight.abs() + 1
        y, _, _ = run(STEM, (x, None, weight), name, gpu=FEW)
        oracle = numerics.conv_bn_stats_oracle(x, None, weight, **STEM.geometry)
        assert torch.equal(y.isnan(), oracle.isnan()) and torch.equal(y.isinf(), oracle.isinf())


@every
def test_a_filters_nan_is_its_channels_alone(name):
    """It meets the zeros of pixels that do not exist; columns that do not are measured nowhere."""
    x, _, weight = drawn(STEM, torch.float16)
    weight[3, 1, 6, 6] = math.nan
    y, stats, _ = run(STEM, (x, None, weight), name, gpu=FEW)
    assert y[:, 3].isnan().all() and stats[:, 3].isnan().all()
    rest = [k for k in range(STEM.k) if k != 3]
    require_stats(y[:, rest], stats[:, rest])


def test_what_holds_an_inf_has_no_mean():
    """As torch's, whichever run it is in."""
    x, _, weight = drawn(STEM)
    x[1, 0, 9, 9] = math.inf
    weight.fill_(1)
    y, stats, _ = run(STEM, (x, None, weight), SMALL, gpu=FEW)
    assert y.isinf().any() and stats.isnan().all()


def test_statistics_around_a_mean_far_from_zero():
    """A run keeps them over many rows, of which each is measured around its own mean."""
    case = dataclasses.replace(STEM, n=3, h=40, w=150, padding=(0, 0))
    x = torch.randn(3, 3, 40, 150, dtype=torch.float64).mul(0.25).add(40)
    x = x.half().contiguous(memory_format=torch.channels_last)
    weight = torch.zeros(64, 3, 7, 7, dtype=torch.float16)
    weight[:, 0, 3, 3] = 1
    for gpu in (ONE, FEW):
        y, stats, report = run(case, (x, None, weight), SMALL, gpu=gpu)
        assert torch.equal(y[:, 5], x[:, 0, 3:-3:2, 3:-3:2])
        require_stats(y, stats, tiles=2 * report["plan"]["blocks"])


def test_more_runs_than_a_chunk():
    """In two chunks, and in columns of filters, whose moments lie side by side."""
    case = dataclasses.replace(STEM, n=4, h=40, w=30, k=72)
    given = drawn(case)
    for schedule in (Schedule(), *HOSTILE):
        y, stats, report = run(case, given, SMALL, schedule=schedule, resident_blocks=7)
        assert rows_of(case, SMALL) == 80 and report["plan"]["blocks"] == 132
        require(case, *given, y, stats)
    # The chunks' moments in float64 lie behind the runs'.
    assert report["plan"]["workspace_bytes"] >= (8 * 80 + 16 * 2) * case.k


@every
def test_the_same_bits_in_every_order(name):
    given = drawn(STEM, torch.bfloat16, exact=False)
    first, *others = [
        run(STEM, given, name, schedule=order, gpu=(5, *emulated.H200[1:]), resident_blocks=4)[:2]
        for order in (Schedule(), *HOSTILE)
    ]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@every
@pytest.mark.parametrize("shape", ["rows of two tiles", "four channels"])
def test_no_bank_conflicts_and_every_byte_once(name, shape):
    """The image is asked for once, but for the rows above a run and the columns between tiles."""
    case = SHAPES[shape]
    given = drawn(case, exact=False)
    y, _, report = run(case, given, name, counting=True, gpu=ONE)
    assert report["counters"]["bank_conflicts"] == 0
    tensors = report["tensors"]
    assert tensors["x"]["unique_bytes_read"] == given[0].nbytes
    assert tensors["weight"]["unique_bytes_read"] == given[2].nbytes
    assert tensors["y"]["unique_bytes_written"] == y.nbytes
    assert asked(report, "image_filters.h") == given[2].nbytes
    m, of_run = tiles()[name]["m"], -(-rows_of(case, name) // 2)
    strips = 2 + rows_of(case, name) // of_run + case.n * -(-case.q // m)
    columns = 2 * case.q + 6 * -(-case.q // m)
    most = (2 * case.n * case.p + 6 * strips) * columns * case.c * 2
    assert given[0].nbytes <= asked(report, "stem_rows.h") <= most


def test_random_shapes():
    for number in range(9):
        rng = random.Random(number)
        case = dataclasses.replace(
            STEM, n=rng.randint(1, 5), c=rng.randint(2, 4), h=rng.randint(1, 24),
            w=rng.randint(1, 260), k=8 * rng.randint(1, 18),
            padding=(rng.randint(3, 5), rng.randint(3, 5)),
        )  # fmt: skip
        given = drawn(case, rng.choice(DTYPES))
        schedule = dataclasses.replace(rng.choice(emulated.SCHEDULES), seed=number)
        gpu = rng.choice((FEW, (5, *emulated.H200[1:])))
        y, stats, _ = run(case, given, NAMES[number % 2], schedule=schedule, gpu=gpu)
        require(case, *given, y, stats)


# The plan.


@pytest.mark.parametrize(("n", "name"), [(256, WIDE), (32, WIDE), (16, WIDE), (4, None)])
def test_where_a_stem_goes_by_wgmma(n, name):
    """Of a few images many small blocks of mma.sync are ahead."""
    case = dataclasses.replace(RESNET, n=n)
    made = planned(case, prologue=False)
    names = [tile["name"] for tile in emulated.load().conv_bn_stats_configurations()]
    assert "no TMA" not in made["why"] and "not by rows" not in made["why"]
    if name is None:
        assert names[made["configuration"]] not in NAMES
        return
    assert names[made["configuration"]] == name and made["blocks"] == 132
    other = planned(case, prologue=False, configuration=names.index("image_128x64_4w7s"))
    assert made["cycles"] < other["cycles"]
    assert n != 256 or made["cycles"] < 0.45 * other["cycles"]


def test_narrow_images_take_narrow_tiles():
    case = dataclasses.replace(RESNET, h=128, w=128)
    wide, small = [
        planned(case, prologue=False, configuration=tile["index"])["cycles"]
        for tile in tiles().values()
    ]
    assert small < wide


REFUSED = [
    ({}, {"prologue": True}, "not read through a BatchNorm"),
    ({}, {"dtype": torch.float32}, "by rows in 16 bits"),
    ({"r": 3, "s": 3, "padding": (1, 1)}, {}, "filters of 7 x 7 with a stride of 2"),
    ({"s": 8, "padding": (3, 4)}, {}, "filters of 7 x 7 with a stride of 2"),
    ({"stride": (1, 2)}, {}, "filters of 7 x 7 with a stride of 2"),
    ({"dilation": (2, 1)}, {}, "a dilation of 1"),
    ({"stride": (2, 1)}, {}, "a stride of 2"),
    ({"c": 5}, {}, "up to 4 channels"),
    ({"k": 41}, {}, "out: "),
    ({"n": 40_000_000}, {}, "batch: more rows than a launch counts"),
    ({}, {"capability": 80}, "GPUs of capability 9.0"),
]


@pytest.mark.parametrize(("changes", "more", "words"), REFUSED, ids=[one[2] for one in REFUSED])
def test_what_it_cannot_take_is_refused_in_words(changes, more, words):
    case = dataclasses.replace(RESNET, **changes)
    more = {"prologue": False, **more}
    if more.pop("capability", None):
        more["gpu"] = emulated.A100
    for name, tile in tiles().items():
        with pytest.raises(ValueError, match=words) as error:
            planned(case, configuration=tile["index"], **more)
        assert name in str(error.value)
    assert planned(case, **more)["configuration"] not in [t["index"] for t in tiles().values()]


def test_an_image_whose_output_lies_in_planes_is_left_to_others():
    """As y lies where neither x nor weight are in channels_last."""
    x, _, weight = drawn(STEM)
    weight = weight.contiguous()
    for tile in tiles().values():
        with pytest.raises(ValueError, match="out: its channels are not adjacent"):
            call(STEM, x.contiguous(), None, weight, configuration=tile["index"], splits=1)


@every
def test_the_selfcheck_is_held_to_it(name):
    names = tuple(t["name"] for t in emulated.load().conv_bn_stats_configurations())
    _cuda_stats_checks.check(name, "cpu", stats_tests.launch, stats_tests.plan_index, names)
    with pytest.raises(ArithmeticError, match=f"{name}/1"):
        _cuda_stats_checks.check(name, "cpu", _wrong, stats_tests.plan_index, names)


def _wrong(x, vectors, weight, y, stats, *geometry, wish):
    stats_tests.launch(x, vectors, weight, y, stats, *geometry, wish=wish)
    stats[1, 3] *= 1.5
