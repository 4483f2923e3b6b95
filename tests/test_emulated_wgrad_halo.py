"""conv_bn_wgrad in CUDA, emulated, by a window: nine taps meet one run of input pixels."""

from __future__ import annotations

import dataclasses

import emulated
import pytest
import torch
from emulated import SCHEDULES, Schedule
from test_emulated_wgrad import (
    LAYER1,
    PROLOGUES,
    call,
    configurations,
    exact,
    name_of,
    noise,
    planned,
    require,
)

from resnet_fused import cases, numerics
from resnet_fused.ops import _training_checks_wgrad as checks

pytestmark = pytest.mark.emulated

HALO = 5
NAME = "halo_64x288_4w3s"
OTHERS = range(5)
SIXTEEN = (torch.bfloat16, torch.float16)


def image(n, c, h, w, k, groups=1) -> cases.ConvCase:
    return cases.ConvCase("halo", n, c, h, w, k, 3, 3, (1, 1), (1, 1), groups=groups)


def rows_of(width) -> int:
    """A power of two: what the taps of a step of 32 pixels read, and two steps more."""
    return max(64, 1 << (2 * (width + 1) + 3 * 32 - 1).bit_length())


def test_the_window_is_the_last_of_the_wide_ones():
    table = configurations()
    by_mma = [i for i, tile in enumerate(table) if tile["window"] and not tile["tma"]]
    assert by_mma == [HALO]
    tile = table[HALO]
    assert tile["name"] == NAME and tile["wide"] and not tile["float32"]
    assert (tile["m"], tile["n"]) == (64, 9 * 32)
    assert tile["shared_bytes"] == 3 * 2 * 64 * 64  # three stages of dz and y


# Images of one pixel, rows and columns; many to a step; rows that are longer than one.
SIZES = [
    (3, 1, 1), (2, 1, 9), (2, 9, 1), (5, 2, 2), (9, 3, 3), (40, 2, 3), (3, 7, 6), (2, 13, 11),
    (1, 3, 131), (1, 2, 300), (2, 8, 8), (1, 56, 56),
]  # fmt: skip


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_edge(size):
    n, h, w = size
    case = image(n, 16, h, w, 24)
    schedule = SCHEDULES[(n + w) % len(SCHEDULES)]
    for dtype, (affine, norm) in zip(SIXTEEN, ((True, True), (False, False)), strict=True):
        given = exact(case, dtype, affine, norm)
        require(case, given, call(case, given, configuration=HALO, splits=1, schedule=schedule)[0])


@pytest.mark.parametrize("tap", range(9))
def test_each_tap_alone(tap):
    """One output pixel that meets one input pixel, by one tap."""
    case = image(2, 16, 5, 6, 8)
    given = exact(case, torch.bfloat16, affine=False)
    given.dz.zero_()
    given.dz[1, 3, 2, 3] = 1
    got, _ = call(case, given, configuration=HALO, splits=1)
    x = given.x[1, :, 1 + tap // 3, 2 + tap % 3].float()
    h = (given.norm[0] * x + given.norm[1]).relu()
    assert torch.equal(got[3, :, tap // 3, tap % 3].float(), h)
    assert not got[[0, 1, 2, 4, 5, 6, 7]].any()


@pytest.mark.parametrize(("affine", "norm"), PROLOGUES)
@pytest.mark.parametrize(
    "case",
    [
        image(2, 16, 7, 6, 8), image(2, 48, 7, 6, 72), image(1, 80, 9, 9, 136),
        image(2, 32, 6, 5, 80, groups=2), image(1, 192, 6, 6, 64, groups=4),
    ],
    ids=lambda case: f"{case.k}by{case.c}in{case.groups}",
)  # fmt: skip
def test_cut_tiles_channels_and_groups(case, affine, norm):
    given = exact(case, torch.bfloat16, affine, norm)
    for splits in (1, 2):
        weight = torch.empty(case.weight_shape, dtype=(torch.bfloat16, torch.float32)[splits - 1])
        got, report = call(
            case, given, weight, configuration=HALO, splits=splits,
            schedule=Schedule("random", "shuffled", seed=splits), resident_blocks=3,
        )  # fmt: skip
        assert report["plan"]["splits"] == splits
        require(case, given, got)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_layouts_of_the_gradient(layout):
    case = image(2, 48, 7, 6, 24)
    given = exact(case, torch.float16)
    weight = torch.empty(case.weight_shape, dtype=torch.float16).contiguous(memory_format=layout)
    require(case, given, call(case, given, weight, configuration=HALO, splits=2)[0])


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_every_schedule(schedule):
    """Seven steps, in which the window's rows wrap, and steps of two images; parts of them."""
    case = image(4, 48, 7, 8, 72)
    given = exact(case, torch.bfloat16)
    for splits in (1, 3):
        got, _ = call(
            case, given, configuration=HALO, splits=splits, schedule=schedule, resident_blocks=3
        )
        require(case, given, got)


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
def test_noise_is_within_its_bound(dtype):
    case = image(2, 48, 9, 10, 72)
    given = noise(case, dtype)
    weight = torch.empty(case.weight_shape)
    got, _ = call(case, given, weight, configuration=HALO, splits=2)
    oracle = numerics.conv_bn_wgrad_oracle(*given, weight, **case.geometry)
    bound = numerics.conv_bn_wgrad_bound(*given, weight, oracle, **case.geometry)
    assert numerics.check_bound(got, oracle, bound).ok


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["dz", "y", "x", "coefficients", "norm"])
def test_what_is_no_number_stays_where_it_belongs(name, value):
    """A row of pixels ends beside the next one's beginning, an image beside the next image."""
    case = image(2, 16, 4, 5, 24)
    for n, p, q in ((0, 3, 4), (1, 0, 0), (0, 1, 4), (1, 3, 4)):
        given = noise(case, torch.float16)
        t = getattr(given, name).clone()
        t[(n, 3) if t.dim() == 2 else (n, 3, p, q)] = value
        given = given._replace(**{name: t})
        weight = torch.empty(case.weight_shape)
        got, _ = call(case, given, weight, configuration=HALO, splits=1)
        oracle = numerics.conv_bn_wgrad_oracle(*given, weight, **case.geometry)
        assert torch.equal(got.isnan(), oracle.isnan()), (n, p, q)
        assert torch.equal(got.isinf(), oracle.isinf()), (n, p, q)


@pytest.mark.parametrize(("affine", "norm"), PROLOGUES)
def test_no_bank_conflicts(affine, norm):
    """At the images' edges neither: zeros lie in the banks of what they stand for."""
    for case in (image(2, 48, 7, 6, 40), image(5, 80, 5, 5, 72), image(1, 32, 3, 17, 64)):
        given = exact(case, torch.bfloat16, affine, norm)
        _, report = call(case, given, configuration=HALO, splits=1, counting=True)
        assert report["counters"]["shared_wavefronts"] > 0
        assert not report["counters"]["bank_conflicts"]


@pytest.mark.parametrize("splits", [1, 3])
def test_pixels_come_and_are_turned_once_for_all_taps(splits):
    """Of memory every byte once; asked of the cache: dz and y by every tile, of x a run."""
    case = image(1, 96, 24, 24, 128)
    given = exact(case, torch.bfloat16)
    weight = torch.empty(case.weight_shape)
    got, report = call(case, given, weight, configuration=HALO, splits=splits, counting=True)
    tensors = report["tensors"]
    for name in ("dz", "y", "x", "coefficients"):
        assert tensors[name]["unique_bytes_read"] == getattr(given, name).nbytes, name
    assert tensors["weight"]["unique_bytes_written"] == got.nbytes
    pixels, parts = 24 * 24, splits
    each = pixels // parts
    around = sum(min((i + 1) * each + 25, pixels) - max(i * each - 25, 0) for i in range(parts))
    copied = sum(
        site["counters"]["global_load_bytes_asked"]
        for site in report["sites"]
        if site["instruction"].startswith("cp.async")
    )
    rows, slices = 128 // 64, 96 // 32
    assert copied == rows * slices * (2 * pixels * 64 * 2 + around * 32 * 2)


def test_the_widest_image_of_each_gpu():
    for gpu in (emulated.RTX3080, emulated.A100, emulated.H200):
        free = gpu[1] - configurations()[HALO]["shared_bytes"] - 128
        width = max(w for w in range(1, 2000) if rows_of(w) * 64 <= free)
        wide = image(1, 16, 1, width, 8)
        given = exact(wide, torch.bfloat16)
        require(wide, given, call(wide, given, configuration=HALO, splits=1, gpu=gpu)[0])
        broad = image(1, 16, 1, width + 1, 8)
        with pytest.raises(ValueError, match="too much shared memory for this GPU"):
            planned(broad, configuration=HALO, gpu=gpu)
        assert "; no windows: too much shared memory" in planned(broad, gpu=gpu)["why"]


REFUSED = [
    ({"stride": (2, 2)}, "stride, padding and dilation 1"),
    ({"padding": (0, 1)}, "stride, padding and dilation 1"),
    ({"dilation": (2, 2), "padding": (2, 2)}, "stride, padding and dilation 1"),
    ({"r": 1, "s": 1, "padding": (0, 0)}, "windows are for filters of 3x3"),
    ({"r": 5, "s": 5, "padding": (2, 2)}, "windows are for filters of 3x3"),
    ({"c": 72}, "windows are for input channels in sixteens"),
    ({"k": 63}, "cannot be read 16 bytes at a time"),
]


@pytest.mark.parametrize(("changes", "said"), REFUSED)
def test_what_no_window_serves_is_refused_and_others_serve_it(changes, said):
    case = dataclasses.replace(LAYER1, **changes)
    with pytest.raises(ValueError, match=said):
        planned(case, configuration=HALO)
    found = planned(case)
    assert found["configuration"] != HALO
    missed = "; no windows: " in found["why"]
    assert missed == ("k" in changes or "c" in changes) and (not missed or said in found["why"])


def test_a_gradient_whose_rows_do_not_follow_each_other_is_refused():
    apart = (9 * 64 * 2, 1, 4 * 64, 64)
    with pytest.raises(ValueError, match="filters whose rows follow each other"):
        planned(LAYER1, configuration=HALO, weight_stride=apart)
    with pytest.raises(ValueError, match="does not serve float32"):
        planned(LAYER1, torch.float32, configuration=HALO)


def test_the_plan_takes_the_window_for_the_networks_layers():
    """The 3x3 layers of ResNet-50, at a batch of 256: the least cycles."""
    for channels, side in ((64, 56), (128, 28), (256, 14), (512, 7)):
        case = image(256, channels, side, side, channels)
        for gpu in (emulated.H200, emulated.A100, emulated.RTX3080):
            found = planned(case, gpu=gpu)
            others = [planned(case, gpu=gpu, configuration=i)["cycles"] for i in OTHERS]
            assert found["cycles"] < min(others)
            assert name_of(found) == ("tma_win64x576_3s" if gpu == emulated.H200 else NAME)
            assert planned(case, gpu=gpu, configuration=HALO)["cycles"] < min(others)


def test_expected_is_of_the_taps(tmp_path):
    """The integers of these tests make a difference between any two taps."""
    case = image(2, 16, 5, 6, 8)
    found = checks.expected_wgrad(exact(case, torch.bfloat16), case)
    taps = found.flatten(2).unbind(2)
    assert all(not torch.equal(a, b) for i, a in enumerate(taps) for b in taps[:i])
