"""conv_bn_wgrad by TMA and wgmma, emulated: where x is read as it is."""

from __future__ import annotations

import dataclasses

import emulated
import pytest
import torch
from emulated import Schedule
from emulated_shapes import lay_out
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

CONFIGURATIONS = 9
"""Of which the last ones are clusters that share what they read."""
ALONE = 6
every = pytest.mark.parametrize("place", range(CONFIGURATIONS))

CASES = (
    # 126 pixels, less than two steps, tiles that are cut along every side.
    ConvCase("1x1", 2, 136, 9, 7, 72),
    ConvCase("1x1_strided", 3, 64, 13, 11, 200, 1, 1, (2, 2)),
    ConvCase("3x3", 1, 72, 9, 9, 136, 3, 3, (1, 1), (1, 1)),
    ConvCase("3x3_strided", 2, 64, 11, 13, 136, 3, 3, (2, 2), (1, 1)),
    ConvCase("groups", 2, 48, 6, 7, 96, 3, 3, (2, 1), (1, 2), (1, 2), 2),
    ConvCase("pixel", 1, 8, 1, 1, 16),
)
NAMED = {case.name: case for case in CASES}


def tiles() -> dict[int, dict]:
    """Those by TMA, by index; test_emulated_bn_wgrad_window.py has the one by windows."""
    return {
        i: tile for i, tile in enumerate(configurations()) if tile["tma"] and not tile["window"]
    }


def index_of(place: int) -> int:
    return list(tiles())[place]


def test_each_configuration_is_conv_wgrads():
    names = [tile["name"] for tile in tiles().values()]
    of_wgrad = [t["name"] for t in emulated.load().conv_wgrad_configurations() if t["tma"]]
    assert names == of_wgrad and len(names) == CONFIGURATIONS


@every
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_bit_is_right(place, case, affine):
    """On integers; dtypes, schedule and splits change from case to case."""
    number = CASES.index(case) * CONFIGURATIONS + place
    dtype = (torch.bfloat16, torch.float16)[number % 2]
    given = exact(case, dtype, affine=affine, norm=False)
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
    case = NAMED["1x1_strided"]
    for dtype in (torch.bfloat16, torch.float16):
        given = noise(case, dtype)._replace(norm=None)
        weight = torch.empty(case.weight_shape)
        schedule = Schedule("random", "shuffled", rounding, seed=place)
        got, _ = call(
            case, given, weight, configuration=index_of(place), splits=2, schedule=schedule
        )
        oracle = numerics.conv_bn_wgrad_oracle(*given, weight, **case.geometry)
        accumulation = "nearest" if rounding == "nearest" else "truncate"
        bound = numerics.conv_bn_wgrad_bound(
            *given, weight, oracle, **case.geometry, accumulation=accumulation, k=16
        )
        assert numerics.check_bound(got, oracle, bound).ok, dtype
        # Coefficients of the next channel are beyond it.
        planted = given._replace(coefficients=given.coefficients.roll(1, 1))
        got, _ = call(case, planted, weight, configuration=index_of(place), splits=2)
        assert not numerics.check_bound(got, oracle, bound).ok


@every
def test_pixels_that_do_not_exist_are_zeros_and_not_c(place):
    """Behind the last pixel dy would be C; zeros of x times an infinite C would be NaN."""
    case = ConvCase("few", 1, 64, 5, 5, 72)  # 25 pixels: less than a step
    given = exact(case, torch.float16, norm=False)
    # An infinity that no pixel has: A dz + B y + C of them all is finite only without it.
    given.coefficients[2, 1] = float("inf")
    given.x.abs_().add_(1)
    got, _ = call(case, given, configuration=index_of(place), splits=1)
    kept = [0, *range(2, case.k)]
    expected = numerics.conv_bn_wgrad_oracle(*given, got, **case.geometry).half()
    assert torch.equal(got[kept], expected[kept])
    assert got[1].isinf().all() and expected[1].isinf().all()


@every
def test_nan_stays_with_its_filter_or_column(place):
    case = NAMED["3x3"]
    for operand in ("dz", "y", "coefficients", "x"):
        given = noise(case, torch.float16)._replace(norm=None)
        t = getattr(given, operand)
        t[(0, 3) if t.dim() == 2 else (0, 3, 1, 1)] = float("nan")
        weight = torch.empty(case.weight_shape)
        got, _ = call(case, given, weight, configuration=index_of(place), splits=2)
        oracle = numerics.conv_bn_wgrad_oracle(*given, weight, **case.geometry)
        assert torch.equal(got.isnan(), oracle.isnan()), operand
        assert oracle.isnan().any() and not oracle.isnan().all()


@every
def test_what_it_costs(place):
    """No bank conflict; each byte of what it reads comes from memory once at least, no other."""
    case = ConvCase("layer2.conv1", 1, 256, 16, 12, 128)
    given = exact(case, torch.bfloat16, norm=False)
    got, report = call(
        case, given, torch.empty(case.weight_shape), configuration=index_of(place), splits=1,
        counting=True,
    )  # fmt: skip
    assert report["counters"]["bank_conflicts"] == 0
    for name in ("dz", "y", "coefficients", "x"):
        read = report["tensors"][name]["unique_bytes_read"]
        assert read == getattr(given, name).nbytes, name
    assert report["tensors"]["weight"]["unique_bytes_written"] == got.nbytes


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dtype": torch.float32}, "dtype: float32 is not served"),
        ({"dz": 4098}, "dz: address is "),
        ({"y": 4098}, "y: address is "),
        ({"x": 4098}, "x: address is "),
        ({"dz_stride": (1, 1, 1, 1)}, "dz: strides"),
        ({"stride": (1, 9)}, "stride: 9; up to 8 is accepted"),
    ],
    ids=str,
)
def test_what_tma_cannot_take_is_refused_in_words(changes, said):
    case = NAMED["3x3"]
    for index in tiles():
        with pytest.raises(ValueError, match=said):
            planned(case, prologue=False, configuration=index, **changes)


@pytest.mark.parametrize(
    "gpu", [emulated.A100, emulated.RTX3080, (*emulated.H200[:3], 100)], ids=str
)
def test_no_other_gpu_gets_them(gpu):
    for case in cases.RESNET50_LAYERS:
        made = planned(case, prologue=False, gpu=gpu)
        assert made["configuration"] not in tiles() and "TMA" not in made["why"]


def test_first_convolutions_and_projections_take_them_at_a_full_batch():
    for case in cases.RESNET50_LAYERS:
        made = planned(dataclasses.replace(case, n=256), prologue=False)
        tile = configurations()[made["configuration"]]
        assert tile["tma"] == (case.c % 8 == 0), (case.name, made["why"])
        assert "no TMA" not in made["why"] or not tile["tma"]
        # 3x3 of stride 1 go by windows, but where clusters share what few pixels ask for.
        if case.h > 7:
            run = case.r == 3 and case.stride == (1, 1)
            assert tile["window"] == run, (case.name, made["why"])


def test_pixels_that_do_not_follow_one_another():
    """dz, y and x within wider images: gathered, and not as rows of one matrix."""
    case = NAMED["1x1"]
    given = exact(case, torch.bfloat16, norm=False)
    moved = {
        name: torch.full((2, 9, 16, 144), torch.nan, dtype=torch.bfloat16)
        .permute(0, 3, 1, 2)[:, 8 : 8 + t.shape[1], :, 2:16:2]
        .copy_(t)
        for name, t in (("dz", given.dz), ("y", given.y), ("x", given.x))
    }
    for index in tiles():
        got, report = call(case, given._replace(**moved), configuration=index, splits=2)
        require(case, given, got)
        used = {site["instruction"] for site in report["sites"]}
        assert any("tensor.im2col" in one for one in used)
        assert not any("tensor.tile" in one for one in used)
    askew = given._replace(dz=moved["dz"], y=lay_out(given.y, "nhwc"))
    with pytest.raises(ValueError, match="y: its pixels do not lie as dz's do"):
        call(case, askew, configuration=index_of(0), splits=1)


@every
def test_the_self_check_passes_and_notices_faults(place):
    names = tuple(tile["name"] for tile in configurations())
    name = names[index_of(place)]
    _cuda_wgrad_checks.check(name, "cpu", launch, plan_index, names)

    def rolled(dz, y, rows, *rest, **more):
        launch(dz, y, rows.roll(1, 1), *rest, **more)

    with pytest.raises(ArithmeticError):
        _cuda_wgrad_checks.check(name, "cpu", rolled, plan_index, names)
