"""conv_bn_wgrad by windows, TMA and wgmma, emulated: a 3x3's input, once for all nine taps."""

from __future__ import annotations

import dataclasses

import emulated
import pytest
import torch
from emulated import Schedule
from emulated_shapes import lay_out
from test_emulated_wgrad import (
    PROLOGUES,
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

NAME = "tma_win64x576_3s"
STEP = 128  # positions


def window(name: str, n: int, c: int, h: int, w: int, k: int) -> ConvCase:
    return ConvCase(name, n, c, h, w, k, 3, 3, (1, 1), (1, 1))


CASES = (
    window("step", 1, 64, 5, 9, 64),  # less than a step
    window("images", 5, 128, 7, 7, 64),  # steps that end within images
    window("rows", 2, 64, 14, 13, 128),
    window("wide", 1, 64, 3, 100, 64),  # windows in two parts, the longest rows that there are
    window("row", 3, 64, 1, 40, 64),
    window("column", 2, 64, 40, 1, 64),
    window("pixels", 70, 64, 1, 1, 64),
)
NAMED = {case.name: case for case in CASES}
SQUARES = [
    case
    for case in cases.RESNET50_LAYERS
    if (case.r, case.stride, case.padding) == (3, (1, 1), (1, 1))
]


def steps(case: ConvCase) -> int:
    positions = case.n * (case.h + 1) * (case.w + 1) - case.w - 2
    return -(-positions // STEP)


def index() -> int:
    return next(i for i, tile in enumerate(configurations()) if tile["name"] == NAME)


def test_it_is_the_last_configuration():
    names = [tile["name"] for tile in configurations()]
    assert names[-1] == NAME and names.count(NAME) == 1
    assert [t["name"] for t in configurations() if t["tma"] and t["window"]] == [NAME]


@pytest.mark.parametrize(("affine", "norm"), PROLOGUES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_bit_is_right(case, affine, norm):
    """On integers; dtypes, schedule and splits change from case to case."""
    number = CASES.index(case) * len(PROLOGUES) + PROLOGUES.index((affine, norm))
    dtype = (torch.bfloat16, torch.float16)[number // 2 % 2]
    given = exact(case, dtype, affine=affine, norm=norm)
    weight = torch.empty(case.weight_shape, dtype=(dtype, torch.float32)[number % 2])
    schedule = dataclasses.replace(emulated.SCHEDULES[number % 9], seed=number)
    splits = (1, 2, steps(case))[number % 3] if steps(case) > 1 else 1
    got, report = call(case, given, weight, configuration=index(), splits=splits, schedule=schedule)
    assert report["plan"]["configuration"] == index() and report["plan"]["splits"] == splits
    tiles = case.k // 64 * case.c // 64
    assert report["plan"]["blocks"] == tiles * splits and got.dtype == weight.dtype
    require(case, given, got)


@pytest.mark.parametrize("schedule", emulated.SCHEDULES, ids=str)
def test_a_ring_that_is_passed_three_times_is_right_in_any_order(schedule):
    case = window("ring", 3, 64, 20, 21, 64)
    assert steps(case) > 9
    given = exact(case, torch.bfloat16)
    got, _ = call(case, given, configuration=index(), splits=1, schedule=schedule)
    require(case, given, got)


@pytest.mark.parametrize("rounding", ["nearest", "toward_zero"])
def test_noise_is_within_the_bound(rounding):
    case = NAMED["rows"]
    for dtype in (torch.bfloat16, torch.float16):
        given = noise(case, dtype)
        weight = torch.empty(case.weight_shape)
        schedule = Schedule("random", "shuffled", rounding, seed=3)
        settings = {"configuration": index(), "splits": 2, "schedule": schedule}
        got, _ = call(case, given, weight, **settings)
        oracle = numerics.conv_bn_wgrad_oracle(*given, weight, **case.geometry)
        accumulation = "nearest" if rounding == "nearest" else "truncate"
        bound = numerics.conv_bn_wgrad_bound(
            *given, weight, oracle, **case.geometry, accumulation=accumulation, k=16
        )
        assert numerics.check_bound(got, oracle, bound).ok, dtype
        # What belongs to the next channel is beyond it.
        for name in ("coefficients", "norm"):
            planted = given._replace(**{name: getattr(given, name).roll(1, 1)})
            got, _ = call(case, planted, weight, **settings)
            assert not numerics.check_bound(got, oracle, bound).ok, name


def test_what_lies_beside_and_behind_images_is_zero_and_not_the_shift():
    """There x is zero, of which a shift beyond float16 would make Inf, and Inf times 0 is NaN."""
    for case in (NAMED["images"], NAMED["step"]):
        given = exact(case, torch.float16)
        given.x.fill_(1)
        given.norm[0, 1], given.norm[1, 1] = -8e4, 7e4  # of all pixels: below zero
        got, _ = call(case, given, configuration=index(), splits=1)
        assert not got[:, 1].any()
        require(case, given, got)


def test_dy_is_zero_and_not_c_where_no_pixel_is():
    """There dz and y are zero, of which C beyond float16 would make Inf, and Inf times 0 is NaN."""
    for case in (NAMED["images"], NAMED["step"]):
        given = exact(case, torch.float16)
        given.y.fill_(1)
        given.coefficients[1, 1], given.coefficients[2, 1] = -7e4, 7e4  # of all pixels: A dz
        got, _ = call(case, given, configuration=index(), splits=1)
        require(case, given, got)


def test_nan_stays_with_its_filter_or_channel():
    case = NAMED["rows"]
    for operand in ("dz", "y", "coefficients", "x", "norm"):
        given = noise(case, torch.float16)
        t = getattr(given, operand)
        t[(0, 3) if t.dim() == 2 else (0, 3, 1, 1)] = float("nan")
        weight = torch.empty(case.weight_shape)
        got, _ = call(case, given, weight, configuration=index(), splits=2)
        oracle = numerics.conv_bn_wgrad_oracle(*given, weight, **case.geometry)
        assert torch.equal(got.isnan(), oracle.isnan()), operand
        assert oracle.isnan().any() and not oracle.isnan().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_at_an_image_s_edge_may_reach_all_taps_of_its_channel(value):
    """docs/training.md, "Known differences": taps enter zeros of dy beside it."""
    case = NAMED["rows"]
    given = noise(case, torch.float16)._replace(norm=None)
    given.x[0, 3, 5, case.w - 1] = value
    weight = torch.empty(case.weight_shape)
    got, _ = call(case, given, weight, configuration=index(), splits=2)
    oracle = numerics.conv_bn_wgrad_oracle(*given, weight, **case.geometry)
    assert not oracle[:, 3, :, 1:].isfinite().any() and oracle[:, 3, :, 0].isfinite().all()
    assert not got[:, 3].isfinite().any()
    others = [c for c in range(case.c) if c != 3]
    assert got[:, others].isfinite().all() and oracle[:, others].isfinite().all()


def test_what_it_costs():
    """No bank conflict; each byte of what it reads comes from memory once at least, no other."""
    case = window("costs", 1, 64, 16, 12, 128)
    given = exact(case, torch.bfloat16)
    got, report = call(
        case, given, torch.empty(case.weight_shape), configuration=index(), splits=1,
        counting=True,
    )  # fmt: skip
    assert report["counters"]["bank_conflicts"] == 0
    for name in ("dz", "y", "coefficients", "x"):
        read = report["tensors"][name]["unique_bytes_read"]
        assert read == getattr(given, name).nbytes, name
    assert report["tensors"]["norm"]["unique_bytes_read"] == given.norm.nbytes // 2
    assert report["tensors"]["weight"]["unique_bytes_written"] == got.nbytes


def test_it_serves_every_3x3_of_stride_1_at_a_full_batch():
    for case in SQUARES:
        full = dataclasses.replace(case, n=256)
        for prologue in (True, False):
            made = planned(full, prologue=prologue)
            # Of 7x7 pixels as they are, clusters that share x ask for them about as well.
            if prologue or case.h > 7:
                assert made["configuration"] == index(), (case.name, made["why"])
            assert "no windows" not in made["why"]
    assert len(SQUARES) >= 4


def test_a_plan_counts_what_bounds_it():
    """The positions that are no pixels, and rows of windows that two steps ask for."""
    made = {
        case.h: planned(dataclasses.replace(case, n=256), configuration=index())["cycles"]
        for case in SQUARES
    }
    # The same products at every size of ResNet-50, but for positions beside the images.
    assert made[56] < made[28] < made[14] < made[7]
    assert 1.1 < made[7] / made[56] < 1.35


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dtype": torch.float32}, "dtype: float32 is not served"),
        ({"dz": 4098}, "dz: address is "),
        ({"y": 4098}, "y: address is "),
        ({"x": 4098}, "x: address is "),
        ({"norm": 4100}, "norm: address is not a multiple of 16"),
        ({"dz_stride": (1, 1, 1, 1)}, "dz: strides"),
        ({"x_stride": (64, 2, 64, 64)}, "x: its channels are not adjacent"),
        ({"weight_stride": (576, 1, 64, 64)}, "weight: its rows of taps do not follow"),
        ({"stride": (1, 2)}, "windows are for filters of 3x3, stride, padding and dilation 1"),
        ({"groups": 2, "weight_size": (128, 32, 3, 3)}, "multiples of 64 in one group"),
    ],
    ids=str,
)
def test_what_it_cannot_take_is_refused_in_words(changes, said):
    with pytest.raises(ValueError, match=said):
        planned(NAMED["rows"], configuration=index(), **changes)


@pytest.mark.parametrize(
    ("case", "said"),
    [
        (window("channels", 2, 72, 9, 9, 64), "multiples of 64 in one group"),
        (window("filters", 2, 64, 9, 9, 72), "multiples of 64 in one group"),
        (window("long", 1, 64, 3, 108, 64), "rows of 108 pixels take 234496 bytes"),
        (window("many", 1 << 20, 64, 56, 56, 64), "more positions than a launch counts"),
    ],
    ids=lambda given: getattr(given, "name", ""),
)
def test_what_is_no_window_is_refused_and_a_plan_says_so(case, said):
    with pytest.raises(ValueError, match=said):
        planned(case, configuration=index())
    if case.name != "many":  # of which nothing else takes any
        made = planned(case)
        assert made["configuration"] != index() and "; no windows by TMA: " in made["why"]
        assert said in made["why"]


@pytest.mark.parametrize(
    "gpu", [emulated.A100, emulated.RTX3080, (*emulated.H200[:3], 100)], ids=str
)
def test_no_other_gpu_gets_it(gpu):
    for case in SQUARES:
        made = planned(case, gpu=gpu)
        assert made["configuration"] != index() and "TMA" not in made["why"]
        with pytest.raises(ValueError, match="for GPUs of capability 9.0"):
            planned(case, gpu=gpu, configuration=index())


def test_pixels_that_do_not_follow_one_another():
    """dz, y and x within wider images."""
    case = NAMED["rows"]
    given = exact(case, torch.bfloat16)
    moved = {
        name: torch.full((2, 16, 32, 144), torch.nan, dtype=torch.bfloat16)
        .permute(0, 3, 1, 2)[:, 8 : 8 + t.shape[1], 1 : 1 + case.h, 2 : 2 + 2 * case.w : 2]
        .copy_(t)
        for name, t in (("dz", given.dz), ("y", given.y), ("x", given.x))
    }
    got, _ = call(case, given._replace(**moved), configuration=index(), splits=2)
    require(case, given, got)
    got, _ = call(
        case, given._replace(dz=moved["dz"], y=lay_out(given.y, "nhwc")), configuration=index()
    )
    require(case, given, got)


def test_the_self_check_passes_and_notices_faults():
    names = tuple(tile["name"] for tile in configurations())
    _cuda_wgrad_checks.check(NAME, "cpu", launch, plan_index, names)

    def rolled(dz, y, rows, x, norm, *rest, **more):
        launch(dz, y, rows, x, None if norm is None else norm.roll(1, 1), *rest, **more)

    with pytest.raises(ArithmeticError):
        _cuda_wgrad_checks.check(NAME, "cpu", rolled, plan_index, names)
