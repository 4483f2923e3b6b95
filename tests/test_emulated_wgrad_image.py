"""conv_bn_wgrad of an image in CUDA, emulated: the kernel that reads it by rows."""

from __future__ import annotations

import dataclasses
import functools
import math

import emulated
import pytest
import torch
from emulated import Schedule
from test_emulated_wgrad import call, configurations, exact, noise, planned, require

from resnet_fused import cases, numerics, roofline

pytestmark = pytest.mark.emulated

NAME = "image_64x224_4w3s"
STEM = cases.ConvCase("stem", 2, 3, 19, 71, 64, 7, 7, (2, 2), (3, 3))
"""Rows of 36 output pixels: a step, and four pixels of another one."""
SHAPES = {
    "rows of a step": dataclasses.replace(STEM, w=64),
    "rows of less than a step": dataclasses.replace(STEM, w=9),
    "one pixel": dataclasses.replace(STEM, n=1, h=1, w=1),
    "one channel": dataclasses.replace(STEM, c=1),
    "four channels": dataclasses.replace(STEM, c=4),
    "some filters": dataclasses.replace(STEM, k=40),
    "more than a tile": dataclasses.replace(STEM, k=136),
    "3x3": dataclasses.replace(STEM, r=3, s=3, padding=(1, 1)),
    "eight taps": dataclasses.replace(STEM, s=8, padding=(3, 4)),
    "no padding": dataclasses.replace(STEM, padding=(0, 0)),
    "padding that holds whole taps": dataclasses.replace(STEM, padding=(9, 12)),
    "stride down": dataclasses.replace(STEM, stride=(1, 2)),
    "stride far down": dataclasses.replace(STEM, stride=(5, 2)),
    "dilated down": dataclasses.replace(STEM, dilation=(2, 1)),
}
HOSTILE = (Schedule("lazy", "shuffled", seed=1), Schedule("random", "reverse", seed=2))


@functools.cache
def index() -> int:
    return next(i for i, tile in enumerate(configurations()) if tile["name"] == NAME)


@functools.cache
def by_element() -> int:
    """Of the configuration that reads any shape element by element."""
    return next(i for i, tile in enumerate(configurations()) if not tile["wide"])


def by_rows(case, operands, weight=None, **settings):
    return call(case, operands, weight, configuration=index(), **{"splits": 1} | settings)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_bit_of_a_stem(dtype, affine):
    given = exact(STEM, dtype, affine, norm=False)
    for splits, schedule in ((1, HOSTILE[0]), (7, HOSTILE[1])):
        for kept in (dtype, torch.float32):
            weight = torch.empty(STEM.weight_shape, dtype=kept)
            got, report = by_rows(STEM, given, weight, splits=splits, schedule=schedule)
            assert report["plan"]["blocks"] == splits
            require(STEM, given, got)


@pytest.mark.parametrize("name", SHAPES)
def test_every_bit_of_other_shapes(name):
    case = SHAPES[name]
    given = exact(case, torch.bfloat16, norm=False)
    splits = min(2, case.n * case.p)
    require(case, given, by_rows(case, given, splits=splits, schedule=HOSTILE[0])[0])


@pytest.mark.parametrize("layout", ["nchw", "slice", "mirrored weights"])
def test_images_of_any_strides(layout):
    given = exact(STEM, torch.float16, norm=False)
    weight = torch.empty(STEM.weight_shape, dtype=torch.float16)
    if layout == "nchw":
        given = given._replace(x=given.x.contiguous())
    elif layout == "slice":  # of a larger image, at an odd address
        wide = torch.zeros(2, 5, 21, 75, dtype=torch.float16)
        wide[:, 1:4, 1:20, 3:74] = given.x
        given = given._replace(x=wide[:, 1:4, 1:20, 3:74])
    else:
        weight = weight.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    require(STEM, given, by_rows(STEM, given, weight)[0])


def test_what_is_beside_a_row_never_counts():
    """C is no zero where there is no pixel, and the image holds Inf where a row of steps ends."""
    given = exact(STEM, torch.float16, norm=False)
    given.coefficients[2].abs_()
    given.x[..., -1] = math.inf
    got, _ = by_rows(STEM, given, splits=3)
    plain, _ = call(STEM, given, configuration=by_element(), splits=3)
    assert got.isinf().any() and not got.isinf().all()
    assert torch.equal(got, plain) or torch.equal(got.isnan(), plain.isnan())
    assert torch.equal(got.nan_to_num(), plain.nan_to_num())


@pytest.mark.parametrize("operand", ["dz", "y", "coefficients", "x"])
def test_nan_stays_with_its_filter_or_column(operand):
    given = noise(STEM, torch.float16)._replace(norm=None)
    t = getattr(given, operand)
    t[(0, 3) if t.dim() == 2 else (0, 2, 1, 34)] = math.nan
    got, _ = by_rows(STEM, given, splits=2)
    oracle = numerics.conv_bn_wgrad_oracle(*given, torch.empty(STEM.weight_shape), **STEM.geometry)
    assert torch.equal(got.isnan(), oracle.isnan())
    assert oracle.isnan().any() and not oracle.isnan().all()


@pytest.mark.parametrize("splits", [1, 5])
@pytest.mark.parametrize("rounding", ["nearest", "toward_zero"])
def test_within_the_bound_in_either_rounding_of_sums(rounding, splits):
    given = noise(STEM, torch.bfloat16)._replace(norm=None)
    weight = torch.empty(STEM.weight_shape)
    got, _ = by_rows(STEM, given, weight, splits=splits, schedule=Schedule(rounding=rounding))
    oracle = numerics.conv_bn_wgrad_oracle(*given, weight, **STEM.geometry)
    accumulation = "nearest" if rounding == "nearest" else "truncate"
    bound = numerics.conv_bn_wgrad_bound(
        *given, weight, oracle, **STEM.geometry, accumulation=accumulation, k=16
    )
    found = numerics.check_bound(got, oracle, bound)
    assert found.ok, str(found)


def test_no_bank_conflicts_and_every_byte_once():
    given = noise(STEM, torch.bfloat16)._replace(norm=None)
    weight = torch.empty(STEM.weight_shape)
    got, report = by_rows(STEM, given, weight, counting=True)
    assert report["counters"]["shared_wavefronts"] > 0
    costly = [site for site in report["sites"] if site["counters"]["bank_conflicts"]]
    assert not costly, costly
    tensors = report["tensors"]
    read = sum(tensors[name]["unique_bytes_read"] for name in ("dz", "y", "coefficients", "x"))
    cost = roofline.conv_bn_wgrad_cost(
        STEM, torch.bfloat16, affine=True, prologue=False, parameter=torch.float32
    )
    assert read + got.nbytes <= 1.1 * cost.bytes


def test_an_element_is_asked_for_once_a_step():
    """The other kernel asks for it once a tap."""
    given = noise(STEM, torch.bfloat16)._replace(y=None, coefficients=None, norm=None)
    asked = []
    for configuration in (index(), by_element()):
        _, report = call(STEM, given, configuration=configuration, splits=1, counting=True)
        asked.append(
            sum(
                site["counters"]["global_load_bytes_asked"]
                for site in report["sites"]
                if site["instruction"] == "ld.global.nc"  # the kernel by rows copies dz
            )
        )
    asked[1] -= 3 * given.dz.nbytes  # by each tile of columns
    assert 3 * asked[0] < asked[1]


# The plan.

RESNET = cases.ConvCase("resnet", 256, 3, 224, 224, 64, 7, 7, (2, 2), (3, 3))


@pytest.mark.parametrize("gpu", [emulated.H200, emulated.A100, emulated.RTX3080], ids=str)
@pytest.mark.parametrize("n", [1, 32, 256])
def test_a_stem_is_read_by_rows(gpu, n):
    case = dataclasses.replace(RESNET, n=n)
    plan = planned(case, prologue=False, gpu=gpu)
    assert plan["configuration"] == index()
    other = planned(case, prologue=False, gpu=gpu, configuration=by_element())
    assert plan["cycles"] < (0.9 if n == 1 else 0.4) * other["cycles"]
    assert plan["workspace_bytes"] == plan["splits"] * 64 * 224 * 4


def test_blocks_share_the_steps():
    for splits in (1, 88):
        plan = planned(RESNET, prologue=False, configuration=index(), splits=splits)
        assert plan["blocks"] == splits
    steps = 2 * 10 * 2  # images, rows, steps of a row
    small = dataclasses.replace(STEM, n=2)
    assert planned(small, prologue=False, configuration=index(), splits=steps)["splits"] == steps
    with pytest.raises(ValueError, match="no such parts"):
        planned(small, prologue=False, configuration=index(), splits=steps + 1)


@pytest.mark.parametrize(
    ("changes", "more", "words"),
    [
        ({}, {"prologue": True}, "not read through a BatchNorm"),
        ({}, {"dtype": torch.float32}, "by rows in 16 bits"),
        ({"c": 5}, {}, "up to 4 channels"),
        ({"c": 6, "k": 64, "groups": 2}, {}, "in one group"),
        ({"r": 9, "padding": (4, 3)}, {}, "up to 7 x 8"),
        ({"s": 9, "padding": (3, 4)}, {}, "up to 7 x 8"),
        ({"stride": (2, 1)}, {}, "a stride of 2"),
        ({"dilation": (1, 2)}, {}, "a dilation of 1"),
        ({"k": 60}, {}, "16 bytes at a time"),
        ({}, {"dz": 4100}, "16 bytes at a time"),
        ({}, {"y": 4100}, "16 bytes at a time"),
        ({}, {"coefficients": 4100}, "16 bytes at a time"),
        ({}, {"gpu": (80, 32 * 1024, 64 * 1024)}, "too much shared memory"),
    ],
)
def test_what_it_does_not_take_is_said(changes, more, words):
    case = dataclasses.replace(RESNET, **changes)
    with pytest.raises(ValueError, match=words):
        planned(case, **{"prologue": False} | more, configuration=index())
    # An x at an odd address is no matter.
    planned(RESNET, prologue=False, x=4098, configuration=index())
