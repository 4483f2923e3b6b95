"""conv_bn_wgrad by TMA and wgmma behind a BatchNorm, emulated: boxes of x are transformed in shared
memory, between TMA and the products."""

from __future__ import annotations

import dataclasses

import emulated
import pytest
import torch
from emulated import Schedule
from test_emulated_bn_wgrad_sm90 import ALONE, CASES, NAMED, index_of
from test_emulated_bn_wgrad_sm90 import tiles as all_tiles
from test_emulated_wgrad import (
    call,
    configurations,
    exact,
    launch,
    noise,
    plan_index,
    planned,
    require,
)

from resnet_fused import cases, numerics
from resnet_fused.cases import ConvCase
from resnet_fused.ops import _cuda_wgrad_checks

pytestmark = pytest.mark.emulated

DTYPES = (torch.bfloat16, torch.float16)
every = pytest.mark.parametrize("place", range(ALONE))


def tiles() -> dict[int, dict]:
    """Those that read through a BatchNorm."""
    return dict(list(all_tiles().items())[:ALONE])


MORE = (
    *CASES,
    # A filter that leaves the image by more than one tap, of a box for each; without padding.
    ConvCase("5x2", 1, 16, 9, 8, 24, 5, 2, (2, 1), (2, 3), (1, 2)),
    ConvCase("unpadded", 2, 24, 10, 9, 64, 3, 3),
)


@every
@pytest.mark.parametrize("case", MORE, ids=lambda case: case.name)
def test_every_bit_is_right(place, case):
    """On integers; dtypes, prologue, schedule and splits change from case to case. Padding taken
    for relu(shift) would show, and so would what lies behind the last channel: norm's mean is NaN.
    """
    number = MORE.index(case) * ALONE + place
    dtype = DTYPES[number % 2]
    given = exact(case, dtype, affine=number % 5 != 0)
    assert given.norm[2:].isnan().all()
    weight = torch.empty(case.weight_shape, dtype=(dtype, torch.float32)[number // 2 % 2])
    schedule = dataclasses.replace(emulated.SCHEDULES[number % 9], seed=number)
    splits = 2 if case.n * case.p * case.q > 64 and number % 3 else 1
    got, report = call(
        case, given, weight, configuration=index_of(place), splits=splits, schedule=schedule
    )
    assert report["plan"]["configuration"] == index_of(place)
    assert report["plan"]["splits"] == splits and got.dtype == weight.dtype
    require(case, given, got)


@every
@pytest.mark.parametrize("rounding", ["nearest", "toward_zero"])
def test_noise_is_within_the_bound(place, rounding):
    """Not on integers: h is rounded as if it had been stored."""
    case = NAMED["1x1_strided"]
    dtype = DTYPES[place % 2]
    given = noise(case, dtype)
    weight = torch.empty(case.weight_shape)
    schedule = Schedule("random", "shuffled", rounding, seed=place)
    got, _ = call(case, given, weight, configuration=index_of(place), splits=2, schedule=schedule)
    oracle = numerics.conv_bn_wgrad_oracle(*given, weight, **case.geometry)
    accumulation = "nearest" if rounding == "nearest" else "truncate"
    bound = numerics.conv_bn_wgrad_bound(
        *given, weight, oracle, **case.geometry, accumulation=accumulation, k=16
    )
    assert numerics.check_bound(got, oracle, bound).ok
    # Scale and shift of the next channel are beyond it.
    planted = given._replace(norm=given.norm.roll(1, 1))
    got, _ = call(case, planted, weight, configuration=index_of(place), splits=2)
    assert not numerics.check_bound(got, oracle, bound).ok


@every
@pytest.mark.parametrize(
    "case",
    [
        ConvCase("dense", 1, 64, 5, 5, 72),  # 25 pixels: less than a step
        ConvCase("gathered", 1, 64, 9, 9, 72, 1, 1, (2, 2)),
        ConvCase("padded", 1, 64, 5, 5, 72, 3, 3, (1, 1), (1, 1)),
    ],
    ids=lambda case: case.name,
)
def test_pixels_that_do_not_exist_are_zeros_and_not_the_shift(place, case):
    """Zeros of dy times an infinite shift would be NaN."""
    given = exact(case, torch.float16, affine=False)
    given.dz.abs_().add_(1)
    given.norm[1, 3] = float("inf")
    got, _ = call(case, given, configuration=index_of(place), splits=1)
    expected = numerics.conv_bn_wgrad_oracle(*given, got, **case.geometry).half()
    assert torch.equal(got, expected) and got[:, 3].isinf().all()
    assert got.isinf().sum() == got[:, 3].numel()


@every
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_stays_where_it_is(place, value):
    """In x, in scale and in shift: a ReLU keeps a NaN, and takes -Inf away."""
    case = NAMED["3x3_strided"]
    for name in ("x", "scale", "shift"):
        given = exact(case, torch.bfloat16)
        given.norm[:2, 5] = 1
        given.dz.abs_().add_(1)
        if name == "x":
            given.x[1, 5, 6, 4] = value
        else:
            given.norm[("scale", "shift").index(name), 5] = value
        weight = torch.empty(case.weight_shape)
        got, _ = call(case, given, weight, configuration=index_of(place), splits=2)
        oracle = numerics.conv_bn_wgrad_oracle(*given, weight, **case.geometry)
        assert torch.equal(got.isnan(), oracle.isnan()), name
        assert torch.equal(got.isinf(), oracle.isinf()), name


def test_the_same_bits_in_every_order():
    case = NAMED["3x3"]
    given = noise(case, torch.float16)
    weight = torch.empty(case.weight_shape)
    orders = (Schedule(), Schedule("lazy", "reverse"), Schedule("random", "shuffled"))
    for index in tiles():
        results = [
            call(case, given, weight, configuration=index, splits=2, schedule=order,
                 resident_blocks=4)[0].clone()
            for order in orders
        ]  # fmt: skip
        assert all(torch.equal(one, results[0]) for one in results[1:])


@every
def test_what_it_costs(place):
    """No bank conflict; each byte of what it reads comes from memory once at least, no other."""
    case = ConvCase("layer2.conv3", 1, 128, 16, 12, 256)
    given = exact(case, torch.bfloat16)
    got, report = call(
        case, given, torch.empty(case.weight_shape), configuration=index_of(place), splits=1,
        counting=True,
    )  # fmt: skip
    assert report["counters"]["bank_conflicts"] == 0
    for name in ("dz", "y", "coefficients", "x"):
        read = report["tensors"][name]["unique_bytes_read"]
        assert read == getattr(given, name).nbytes, name
    assert report["tensors"]["norm"]["unique_bytes_read"] == 2 * case.c * 4
    assert report["tensors"]["weight"]["unique_bytes_written"] == got.nbytes


def test_pixels_that_do_not_follow_one_another():
    """x within wider images: gathered, and not as rows of one matrix."""
    case = NAMED["1x1"]
    given = exact(case, torch.bfloat16)
    room = torch.full((2, 9, 16, 144), torch.nan, dtype=torch.bfloat16).permute(0, 3, 1, 2)
    moved = room[:, 8:, :, 2:16:2].copy_(given.x)
    for index in tiles():
        got, _ = call(case, given._replace(x=moved), configuration=index, splits=2)
        require(case, given, got)


@every
def test_the_self_check_passes_and_notices_faults(place):
    names = tuple(tile["name"] for tile in configurations())
    name = names[index_of(place)]

    def rolled(dz, y, rows, x, norm, *rest, **more):
        norm = None if norm is None else norm.roll(1, 1)
        launch(dz, y, rows, x, norm, *rest, **more)

    with pytest.raises(ArithmeticError, match="True"):  # of a case behind a BatchNorm
        _cuda_wgrad_checks.check(name, "cpu", rolled, plan_index, names)


# The plan.


def test_what_threads_cannot_load_is_refused_in_words():
    case = NAMED["3x3"]
    grouped = dataclasses.replace(case, c=72, k=72, groups=6)
    for index in tiles():
        with pytest.raises(ValueError, match="norm: 12 channels; a multiple of 8 is accepted"):
            planned(grouped, configuration=index)
        with pytest.raises(ValueError, match="norm: address is not a multiple of 16"):
            planned(case, configuration=index, norm=4100)
    assert planned(grouped)["configuration"] not in all_tiles()
    assert "no TMA: norm: 12 channels" in planned(grouped)["why"]


def test_blocks_that_share_x_are_refused_in_words():
    for index in set(all_tiles()) - set(tiles()):
        with pytest.raises(ValueError, match="norm: blocks that share x read it as it is"):
            planned(NAMED["1x1"], configuration=index)


def test_which_layers_they_serve():
    """At a full batch all but the stem, and but for 3x3 of stride 1, which have windows too."""
    for case in cases.RESNET50_LAYERS:
        made = planned(dataclasses.replace(case, n=256))
        assert case.c % 8 != 0 or "no TMA" not in made["why"]
        if case.r == 3 and case.stride == (1, 1):
            continue
        assert (made["configuration"] in tiles()) == (case.c % 8 == 0), (case.name, made["why"])


def test_what_is_transformed_costs_more_where_little_is_asked_of_memory():
    """Cycles of threads are no more than L2's in most tiles; rings of few stages wait for both."""
    case = ConvCase("layer1.conv2", 256, 64, 56, 56, 64, 3, 3, (1, 1), (1, 1))
    unpadded = dataclasses.replace(case, h=58, w=58, padding=(0, 0))
    for index in tiles():
        bare, normed, inside = (
            planned(one, prologue=prologue, configuration=index, splits=64)["cycles"]
            for one, prologue in ((case, False), (case, True), (unpadded, True))
        )
        assert bare <= inside <= normed < 2 * bare, tiles()[index]["name"]
    wide = index_of(3)  # 64x384 in three stages
    assert (
        planned(case, prologue=False, configuration=wide, splits=64)["cycles"]
        < (planned(unpadded, configuration=wide, splits=64)["cycles"])
    )
