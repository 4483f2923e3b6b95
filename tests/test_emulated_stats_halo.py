"""conv_bn_stats in CUDA, emulated, by windows: one run of pixels for all nine taps of a 3x3."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import emulated
import emulated_stats
import pytest
import torch
from emulated import SCHEDULES, Schedule
from matrix import conv_arguments
from test_emulated_stats import (
    LAYER1,
    call,
    configurations,
    conflicts,
    name_of,
    operands,
    planned,
    require,
    require_stats,
)

from resnet_fused import cases, numerics
from resnet_fused.ops import _results

pytestmark = pytest.mark.emulated

HALO = {5: "halo_128x128_4w4s", 6: "halo_128x64_4w4s", 7: "halo_64x64_4w4s"}
SMALLEST = max(HALO)
every_tile = pytest.mark.parametrize("index", HALO, ids=HALO.values())
SIXTEEN = (torch.bfloat16, torch.float16)


def image(n, c, h, w, k, groups=1) -> cases.ConvCase:
    return cases.ConvCase("halo", n, c, h, w, k, 3, 3, (1, 1), (1, 1), groups=groups)


def test_windows_are_behind_all_tiles_that_read_tap_by_tap():
    table = configurations()[: SMALLEST + 1]
    assert {i: tile["name"] for i, tile in enumerate(table) if tile["window"]} == HALO
    assert [tile["float32"] for tile in table[5:]] == [0, 0, 1]
    for tile in table[5:]:
        # Four stages of filters alone, and the moments of two bands.
        assert tile["shared_bytes"] == tile["n"] * (4 * 64 + 2 * 8)


# Images of one pixel, rows and columns; of many to a tile; rows that are longer than a tile.
SIZES = [
    (3, 1, 1), (2, 1, 9), (2, 9, 1), (5, 2, 2), (9, 3, 3), (40, 2, 3), (3, 7, 6), (2, 13, 11),
    (1, 3, 131), (1, 2, 300),
]  # fmt: skip


@every_tile
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_edge(size, index):
    n, h, w = size
    case = image(n, 40, h, w, 24)
    schedule = SCHEDULES[(n + w) % len(SCHEDULES)]
    for dtype, prologue in ((torch.bfloat16, True), (torch.float16, False)):
        x, norm, weight = operands(case, dtype)
        given = (x, norm if prologue else None, weight)
        y, stats, _ = call(case, *given, configuration=index, splits=1, schedule=schedule)
        require(case, *given, y, stats)


@pytest.mark.parametrize("tap", range(9))
def test_each_tap_alone(tap):
    """y is x moved by a tap, zeros where that lies outside: not relu(shift)."""
    case = image(2, 8, 5, 6, 8)
    x = torch.randint(1, 9, case.input_shape, generator=torch.Generator().manual_seed(tap))
    weight = torch.zeros(case.weight_shape)
    weight[range(8), range(8), tap // 3, tap % 3] = 1
    norm = torch.full((4, 8), float("nan"))
    norm[:2] = torch.tensor([[2.0], [64.0]])
    last = {"memory_format": torch.channels_last}
    x, weight = (t.to(torch.bfloat16).contiguous(**last) for t in (x, weight))
    around = torch.nn.functional.pad(2 * x.float() + 64, (1, 1, 1, 1))
    moved = around[:, :, tap // 3 :, tap % 3 :][:, :, :5, :6].to(torch.bfloat16)
    for index in HALO:
        y, stats, _ = call(case, x, norm, weight, configuration=index, splits=1)
        assert torch.equal(y, moved)
        require_stats(y, stats)


@every_tile
@pytest.mark.parametrize(
    "case",
    [
        image(1, 8, 9, 9, 8), image(1, 72, 9, 9, 136), image(1, 104, 5, 5, 40),
        image(2, 80, 6, 5, 32, groups=2), image(1, 96, 12, 12, 200, groups=4),
    ],
    ids=lambda case: f"{case.c}to{case.k}in{case.groups}",
)  # fmt: skip
def test_cut_slices_channels_and_groups(case, index):
    """As many splits as there are slices, and all numbers below that leave work for each."""
    slices = -(-case.c // case.groups // 32)
    for splits in range(1, slices + 1):
        if -(-slices // -(-slices // splits)) != splits:
            continue
        given = operands(case, torch.bfloat16)
        schedule = Schedule("random", "shuffled", seed=splits)
        y, stats, report = call(
            case, *given, configuration=index, splits=splits, schedule=schedule,
            resident_blocks=2 * splits,
        )  # fmt: skip
        assert report["plan"]["splits"] == splits
        require(case, *given, y, stats)


@every_tile
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_every_schedule(schedule, index):
    """Three slices, so that both windows are written again, and tiles of two images."""
    case = image(2, 72, 9, 10, 24)
    given = operands(case, torch.bfloat16)
    y, stats, _ = call(
        case, *given, configuration=index, splits=1, schedule=schedule, resident_blocks=3
    )
    require(case, *given, y, stats)


def test_float32():
    """In TF32, of the tile whose output fits."""
    case = image(2, 40, 9, 10, 72)
    given = operands(case, torch.float32)
    for splits in (1, 3):
        require(case, *given, *call(case, *given, configuration=SMALLEST, splits=splits)[:2])


@pytest.mark.parametrize("dtype", [*SIXTEEN, torch.float32], ids=str)
def test_noise_is_within_its_bound(dtype):
    case = image(2, 40, 9, 10, 24)
    x, norm, weight = operands(case, dtype, exact=False)
    oracle = numerics.conv_bn_stats_oracle(x, norm, weight, **case.geometry)
    tf32 = dtype == torch.float32
    bound = numerics.conv_bn_stats_bound(x, norm, weight, oracle, **case.geometry, tf32=tf32)
    for index in [SMALLEST] if tf32 else HALO:
        y, stats, _ = call(case, x, norm, weight, configuration=index, splits=1)
        assert numerics.check_bound(y, oracle, bound).ok
        require_stats(y, stats)


@pytest.mark.parametrize("place", ["x", "weight"])
def test_what_is_no_number_stays_where_it_belongs(place):
    """A row of pixels ends beside the next one's beginning, an image beside the next image."""
    case = image(2, 40, 4, 5, 24)
    for at in ((0, 3, 4), (1, 0, 0), (0, 1, 4), (1, 2, 0)):
        x, norm, weight = operands(case, torch.float16)
        if place == "x":
            # Of a slice that has too many channels the others are the next pixel's in memory.
            x[at[0], 3, at[1], at[2]] = float("nan")
        else:
            weight[3, 33, at[1] % 3, at[2] % 3] = float("inf")  # inf * 0 of the padding
        expected = numerics.conv_bn_stats_oracle(x, norm, weight, **case.geometry)
        for index in HALO:
            y = call(case, x, norm, weight, configuration=index, splits=1)[0]
            assert torch.equal(y.isnan(), expected.isnan())
            assert 0 < y.isnan().sum() < y.numel()


@pytest.mark.parametrize("prologue", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_no_bank_conflicts(dtype, prologue):
    """At the images' edges neither: zeros lie in the banks of what they stand for."""
    for case in (image(2, 40, 7, 6, 24), image(5, 72, 5, 5, 72), image(1, 40, 3, 17, 24)):
        x, norm, weight = operands(case, dtype)
        for index in [SMALLEST] if dtype == torch.float32 else HALO:
            _, _, report = call(
                case, x, norm if prologue else None, weight,
                configuration=index, splits=1, counting=True,
            )  # fmt: skip
            assert report["counters"]["shared_wavefronts"] > 0
            assert not conflicts(report)


@every_tile
@pytest.mark.parametrize("splits", [1, 3])
def test_pixels_come_and_are_turned_once_for_all_taps(index, splits):
    """Of memory every byte once; asked of the cache: each tile's windows, and its filters."""
    case = image(1, 96, 24, 24, 128)
    x, norm, weight = operands(case, torch.bfloat16)
    tile = configurations()[index]
    y, _, report = call(case, x, norm, weight, configuration=index, splits=splits, counting=True)
    tensors = report["tensors"]
    for name, t in (("x", x), ("weight", weight)):
        assert tensors[name]["unique_bytes_read"] == t.nbytes
    assert tensors["norm"]["unique_bytes_read"] == norm.nbytes // 2
    assert tensors["y"]["unique_bytes_written"] == y.nbytes
    tiles, columns = -(-case.h * case.w // tile["m"]), case.k // tile["n"]
    around = sum(
        min((t + 1) * tile["m"] + 25, 24 * 24) - max(t * tile["m"] - 25, 0) for t in range(tiles)
    )
    asked = {}
    for site in report["sites"]:
        key = site["file"].rsplit("/", 1)[-1], site["instruction"]
        asked[key] = asked.get(key, 0) + site["counters"]["global_load_bytes_asked"]
    copied = sum(n for (file, name), n in asked.items() if name.startswith("cp.async"))
    assert copied == columns * around * 2 * case.c + tiles * weight.nbytes


def test_the_widest_image_of_each_gpu():
    """Two windows of all pixels of a tile, and a row and a pixel on either side."""
    for gpu in (emulated.RTX3080, emulated.A100, emulated.H200):
        for index, tile in enumerate(configurations()):
            if not tile["window"]:
                continue
            free = gpu[1] - tile["shared_bytes"] - 128
            width = (free // (2 * 64) - tile["m"]) // 2 - 1
            wide = image(1, 8, 1, width, 8)
            given = operands(wide, torch.bfloat16)
            require(wide, *given, *call(wide, *given, configuration=index, splits=1, gpu=gpu)[:2])
            with pytest.raises(ValueError, match="too much shared memory for this GPU"):
                planned(image(1, 8, 1, width + 1, 8), configuration=index, gpu=gpu)
        # The last one is the smallest.
        missed = planned(image(1, 8, 1, width + 1, 8), gpu=gpu)["why"]
        assert "; no windows: too much shared memory for this GPU" in missed


@pytest.mark.parametrize("splits", [1, 2])
def test_launches_of_some_images(splits):
    """The last pixels of one launch and the first ones of the next are no neighbours."""
    case = image(5, 40, 4, 5, 24)
    x, norm, weight = operands(case, torch.bfloat16)
    y, stats = map(
        emulated.Guarded,
        _results.FORMS["conv_bn_stats"].empty(x, norm, weight, *conv_arguments(case)),
    )
    module, gpu, images = emulated.load(), emulated.H200, 2
    problem = emulated_stats.problem_of(
        x, norm, weight, y.tensor, stats.tensor, *conv_arguments(case)
    )
    count = module.conv_bn_stats_cut_bytes(problem, gpu, SMALLEST, splits, images)
    memory = torch.empty(count // 4 + 64)
    workspace = memory[-memory.data_ptr() % 256 // 4 :][: count // 4]
    written = {"y": y.tensor, "stats": stats.tensor, "workspace": workspace}
    with emulated.using(schedule=Schedule("lazy", "reverse")):
        made = emulated.settings(("cut",), {"x": x, "norm": norm, "weight": weight}, written)
    module.conv_bn_stats_cut(made, problem, gpu, SMALLEST, splits, images, workspace.data_ptr())
    require(case, x, norm, weight, y.result(), stats.result())


REFUSED = [
    ({"stride": (2, 2)}, "stride, padding and dilation 1"),
    ({"stride": (1, 2)}, "stride, padding and dilation 1"),
    ({"padding": (0, 1)}, "stride, padding and dilation 1"),
    ({"padding": (2, 2)}, "stride, padding and dilation 1"),
    ({"dilation": (2, 2), "padding": (2, 2)}, "stride, padding and dilation 1"),
    ({"r": 1, "s": 1, "padding": (0, 0)}, "windows are for filters of 3x3"),
    ({"s": 1, "padding": (1, 0)}, "windows are for filters of 3x3"),
    ({"r": 5, "s": 5, "padding": (2, 2)}, "windows are for filters of 3x3"),
    ({"c": 63}, "cannot be read 16 bytes at a time"),
]


@every_tile
@pytest.mark.parametrize(("changes", "said"), REFUSED)
def test_what_no_window_serves_is_refused_and_others_serve_it(changes, said, index):
    case = dataclasses.replace(LAYER1, **changes)
    with pytest.raises(ValueError, match=said):
        planned(case, configuration=index)
    found = planned(case)
    assert found["configuration"] not in HALO
    # What could have been windows says why it is not.
    missed = "; no windows: " in found["why"]
    assert missed == ("c" in changes) and (not missed or said in found["why"])


def test_float32_that_does_not_fit_is_refused():
    for index in HALO:
        if index == SMALLEST:
            assert planned(LAYER1, dtype=torch.float32, configuration=index)
            continue
        with pytest.raises(ValueError, match="its output tile in float32 does not fit"):
            planned(LAYER1, dtype=torch.float32, configuration=index)


def test_what_nothing_serves_is_not_told_of_windows():
    far = 2**40
    with pytest.raises(ValueError, match="no configuration serves it: one image is more than"):
        planned(cases.ConvCase("far", 1, 8, 2**15, 2**17, 8), x_stride=(far, 1, far, far))


def test_the_plan_takes_windows_for_the_networks_layers():
    """The 3x3 layers of ResNet-50 behind a BatchNorm, at a batch of 256: the least cycles, but for
    windows by wgmma."""
    for channels, side in ((64, 56), (128, 28), (256, 14), (512, 7)):
        case = image(256, channels, side, side, channels)
        for gpu in (emulated.H200, emulated.A100, emulated.RTX3080):
            name = "halo_128x64_4w4s" if channels == 64 else "halo_128x128_4w4s"
            found = min(
                (planned(case, gpu=gpu, configuration=i) for i in HALO), key=lambda p: p["cycles"]
            )
            assert name_of(found) == name
            taken = planned(case, gpu=gpu)
            if gpu is emulated.H200:
                assert name_of(taken).startswith("tma_win") and taken["cycles"] < found["cycles"]
            else:
                assert name_of(taken) == name
            others = [planned(case, gpu=gpu, configuration=i)["cycles"] for i in range(3)]
            assert found["cycles"] < 0.7 * min(others)


def test_the_page_says_what_the_plan_predicts():
    """Cycles of windows, of the least of the other form, on an H200."""
    page = (Path(__file__).resolve().parent.parent / "docs" / "training_cuda.md").read_text()
    for channels, side in ((64, 56), (128, 28), (256, 14), (512, 7)):
        cells = []
        for n, prologue in ((256, False), (256, True), (4, True), (1, True)):
            case = image(n, channels, side, side, channels)
            windows, others = (
                min(planned(case, prologue=prologue, configuration=i)["cycles"] for i in form)
                for form in (HALO, range(3))
            )
            taken = planned(case, prologue=prologue)["cycles"]
            assert not prologue or taken == windows or n == 256
            cells.append(f"{windows:,.0f} of {others:,.0f}")
        row = f"| {channels} channels, {side}x{side} | {' | '.join(cells)} |"
        assert row in page, row
