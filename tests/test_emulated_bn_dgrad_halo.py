"""conv_bn_dgrad in CUDA, emulated, by windows: one run of dz and y for all nine taps of a 3x3."""

from __future__ import annotations

import dataclasses

import emulated
import emulated_bn_dgrad
import pytest
import torch
from emulated import SCHEDULES, Schedule
from test_emulated_bn_dgrad import (
    LAYER1,
    OP,
    WAYS,
    call,
    configurations,
    conflicts,
    name_of,
    operands,
    planned,
    require,
)

from resnet_fused import cases, numerics
from resnet_fused.ops import _results
from resnet_fused.ops._library import overload

pytestmark = pytest.mark.emulated

HALO = {3: "halo_128x128_4w4s", 4: "halo_128x64_4w4s", 5: "halo_64x64_4w4s"}
OTHERS = range(3)  # that turn each tap
SMALLEST = max(HALO)
LINE = 128
every_tile = pytest.mark.parametrize("index", HALO, ids=HALO.values())


def image(n, c, h, w, k, groups=1) -> cases.ConvCase:
    return cases.ConvCase("halo", n, c, h, w, k, 3, 3, (1, 1), (1, 1), groups=groups)


def served(dtype):
    """Float's sums and fragments leave no registers for 128 columns."""
    return [i for i in HALO if dtype != torch.float32 or configurations()[i]["float32"]]


def shared_bytes(tile, width) -> int:
    """Zeros, two windows of dz and one of y; the tile's totals come in their place."""
    windows = LINE + 3 * (tile["m"] + 2 * (width + 1)) * 64
    return max(tile["shared_bytes"] + windows, tile["m"] * tile["n"] * 4)


def test_windows_are_the_last_of_the_wide_ones():
    table = configurations()
    assert {i: tile["name"] for i, tile in enumerate(table) if tile["window"]} == HALO
    assert [table[i]["float32"] for i in HALO] == [0, 1, 1]
    for i in HALO:
        assert table[i]["wide"]
        assert table[i]["shared_bytes"] == table[i]["n"] * 4 * 64  # four stages of filters


# Images of one pixel, rows and columns; of many to a tile; rows that are longer than a tile.
SIZES = [
    (3, 1, 1), (2, 1, 9), (2, 9, 1), (5, 2, 2), (9, 3, 3), (40, 2, 3), (3, 7, 6), (2, 13, 11),
    (1, 3, 131), (1, 2, 300),
]  # fmt: skip


@every_tile
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_edge(size, index):
    n, h, w = size
    case = image(n, 24, h, w, 40)
    schedule = SCHEDULES[(n + w) % len(SCHEDULES)]
    for dtype, way in ((torch.bfloat16, "all"), (torch.float16, "plain")):
        given = operands(case, dtype, **WAYS[way])
        dx, sums, _ = call(case, given, configuration=index, splits=1, schedule=schedule)
        require(case, given, dx, sums)


@pytest.mark.parametrize("tap", range(9))
def test_each_tap_alone(tap):
    """dx is dy moved the other way, zeros where that lies outside of the output, and not c."""
    case = image(2, 8, 5, 6, 8)
    given = operands(case, torch.bfloat16, addend=0, below=False)
    weight = torch.zeros_like(given.weight)
    weight[range(8), range(8), tap // 3, tap % 3] = 1
    given = given._replace(weight=weight)
    a, b, c = (row.view(1, -1, 1, 1) for row in given.coefficients)
    around = torch.nn.functional.pad(a * given.dz.float() + b * given.y.float() + c, (1, 1, 1, 1))
    moved = around[:, :, 2 - tap // 3 :, 2 - tap % 3 :][:, :, :5, :6].to(torch.bfloat16)
    for index in HALO:
        assert torch.equal(call(case, given, configuration=index, splits=1)[0], moved)


@every_tile
@pytest.mark.parametrize(
    "case",
    [
        image(1, 8, 9, 9, 8), image(1, 136, 9, 9, 72), image(1, 40, 5, 5, 104),
        image(2, 32, 6, 5, 80, groups=2), image(1, 160, 12, 12, 96, groups=4),
    ],
    ids=lambda case: f"{case.k}to{case.c}in{case.groups}",
)  # fmt: skip
def test_cut_slices_channels_and_groups(case, index):
    """As many splits as there are slices, and all numbers below that leave work for each."""
    slices = -(-case.k // case.groups // 32)
    given = operands(case, torch.bfloat16)
    for splits in range(1, slices + 1):
        if -(-slices // -(-slices // splits)) != splits:
            continue
        dx, sums, report = call(
            case, given, configuration=index, splits=splits,
            schedule=Schedule("random", "shuffled", seed=splits), resident_blocks=2 * splits,
        )  # fmt: skip
        assert report["plan"]["splits"] == splits
        require(case, given, dx, sums)
    with pytest.raises(ValueError, match="no such parts with work"):
        planned(case, configuration=index, splits=slices + 1)


@every_tile
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_every_schedule(schedule, index):
    """Three slices, so that all windows are written again, and tiles of two images."""
    case = image(2, 24, 9, 10, 72)
    given = operands(case, torch.bfloat16)
    dx, sums, _ = call(
        case, given, configuration=index, splits=1, schedule=schedule, resident_blocks=3
    )
    require(case, given, dx, sums)


@pytest.mark.parametrize("way", ["all", "plain"])
@pytest.mark.parametrize("splits", [1, 3])
def test_float32(splits, way):
    """In TF32: a slice has half as many channels."""
    case = image(2, 72, 9, 10, 40)
    given = operands(case, torch.float32, **WAYS[way])
    for index in served(torch.float32):
        require(case, given, *call(case, given, configuration=index, splits=splits)[:2])


@pytest.mark.parametrize("dtype", emulated_bn_dgrad.DTYPES, ids=str)
def test_noise_is_within_its_bound(dtype):
    case = image(2, 24, 9, 10, 40)
    given = operands(case, dtype, exact=False)
    oracle = numerics.conv_bn_dgrad_oracle(*given, input_size=case.input_shape, **case.geometry)
    tf32 = dtype == torch.float32
    bound = numerics.conv_bn_dgrad_bound(*given, oracle, **case.geometry, tf32=tf32)
    for index in served(dtype):
        dx, sums, _ = call(case, given, configuration=index, splits=1)
        assert numerics.check_bound(dx, oracle, bound).ok
        below = given.raw, given.norm
        wanted, limit = numerics.reductions_oracle(dx, below), numerics.reductions_bound(dx, below)
        assert numerics.check_bound(sums, wanted, limit).ok


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["dz", "y", "coefficients"])
def test_what_is_no_number_stays_where_it_belongs(name, value):
    """A row of pixels ends beside the next one's beginning, an image beside the next image; of a
    slice that has too many channels the others are the next pixel's in memory."""
    case = image(2, 24, 4, 5, 40)
    made = operands(case, torch.float16, below=False)
    geometry = (case.stride, case.padding, case.dilation, case.groups)
    for n, p, q in ((0, 3, 4), (1, 0, 0), (0, 1, 4), (1, 2, 0)):
        t = getattr(made, name).clone()
        t[(n, 33) if t.dim() == 2 else (n, 3, p, q)] = value
        given = made._replace(**{name: t})
        wanted, _ = overload(OP, "reference")(*given, list(case.input_shape), True, 1, *geometry)
        for index in HALO:
            dx = call(case, given, configuration=index, splits=1)[0]
            assert torch.equal(dx.isnan(), wanted.isnan()), (n, p, q)
            assert torch.equal(dx.isinf(), wanted.isinf()), (n, p, q)
            assert (~dx.isfinite()).sum() > 0


@pytest.mark.parametrize("way", ["all", "plain"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_no_bank_conflicts(dtype, way):
    """At the images' edges neither: zeros lie in the banks of what they stand for."""
    for case in (image(2, 24, 7, 6, 40), image(5, 72, 5, 5, 72), image(1, 24, 3, 17, 40)):
        given = operands(case, dtype, **WAYS[way])
        for index in served(dtype):
            report = call(case, given, configuration=index, splits=1, counting=True)[2]
            assert report["counters"]["shared_wavefronts"] > 0
            assert not conflicts(report), (configurations()[index]["name"], conflicts(report))


@every_tile
@pytest.mark.parametrize("splits", [1, 3])
def test_pixels_come_and_are_turned_once_for_all_taps(index, splits):
    """Of memory every byte once; asked of the cache: each tile's windows, and its filters."""
    case = image(1, 128, 24, 24, 96)
    given = operands(case, torch.bfloat16)
    tile = configurations()[index]
    dx, _, report = call(case, given, configuration=index, splits=splits, counting=True)
    tensors = report["tensors"]
    for name in ("dz", "y", "weight", "addend", "raw", "coefficients"):
        assert tensors[name]["unique_bytes_read"] == getattr(given, name).nbytes, name
    assert tensors["x"]["unique_bytes_written"] == dx.nbytes
    tiles, columns = -(-case.h * case.w // tile["m"]), case.c // tile["n"]
    around = sum(
        min((t + 1) * tile["m"] + 25, 24 * 24) - max(t * tile["m"] - 25, 0) for t in range(tiles)
    )
    asked = {}
    for site in report["sites"]:
        key = site["file"].rsplit("/", 1)[-1], site["instruction"]
        asked[key] = asked.get(key, 0) + site["counters"]["global_load_bytes_asked"]
    copied = sum(n for (_, name), n in asked.items() if name.startswith("cp.async"))
    assert copied == columns * around * 2 * 2 * case.k + tiles * given.weight.nbytes


def test_the_widest_image_of_each_gpu():
    """Three windows of all pixels of a tile, and a row and a pixel on either side."""
    for gpu in (emulated.RTX3080, emulated.A100, emulated.H200):
        for index in HALO:
            tile = configurations()[index]
            width = max(w for w in range(1, 2000) if shared_bytes(tile, w) <= gpu[1])
            wide = image(1, 8, 1, width, 8)
            given = operands(wide, torch.bfloat16)
            require(wide, given, *call(wide, given, configuration=index, splits=1, gpu=gpu)[:2])
            with pytest.raises(ValueError, match="too much shared memory for this GPU"):
                planned(image(1, 8, 1, width + 1, 8), configuration=index, gpu=gpu)
        missed = planned(image(1, 8, 1, width + 1, 8), gpu=gpu)["why"]
        assert "; no windows: too much shared memory for this GPU" in missed


@pytest.mark.parametrize("splits", [1, 2])
def test_launches_of_some_images(splits):
    """The last pixels of one launch and the first ones of the next are no neighbours."""
    case = image(5, 24, 4, 5, 40)
    given = operands(case, torch.bfloat16)
    module, gpu, images = emulated.load(), emulated.H200, 2
    geometry = (case.stride, case.padding, case.dilation, case.groups)
    results = _results.FORMS[OP].empty(*given, list(case.input_shape), True, 1, *geometry)
    written = dict(zip(("x", "sums"), map(emulated.Guarded, results), strict=True))
    outputs = {name: one.tensor for name, one in written.items()}
    made = emulated_bn_dgrad.problem_of(given._asdict() | outputs, 1, *geometry)
    count = module.conv_bn_dgrad_cut_bytes(made, gpu, SMALLEST, splits, images)
    memory = torch.empty(count // 4 + 64)
    workspace = memory[-memory.data_ptr() % 256 // 4 :][: count // 4]
    with emulated.using(schedule=Schedule("lazy", "reverse")):
        settings = emulated.settings(("cut",), given._asdict(), outputs | {"workspace": workspace})
    module.conv_bn_dgrad_cut(settings, made, gpu, SMALLEST, splits, images, workspace.data_ptr())
    require(case, given, *(one.result() for one in written.values()))


REFUSED = [
    ({"stride": (2, 2)}, "stride, padding and dilation 1"),
    ({"stride": (1, 2)}, "stride, padding and dilation 1"),
    ({"padding": (0, 1)}, "stride, padding and dilation 1"),
    ({"padding": (2, 2)}, "stride, padding and dilation 1"),
    ({"dilation": (2, 2), "padding": (2, 2)}, "stride, padding and dilation 1"),
    ({"r": 1, "s": 1, "padding": (0, 0)}, "windows are for filters of 3x3"),
    ({"s": 1, "padding": (1, 0)}, "windows are for filters of 3x3"),
    ({"r": 5, "s": 5, "padding": (2, 2)}, "windows are for filters of 3x3"),
    ({"k": 63}, "cannot be read 16 bytes at a time"),
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
    assert missed == ("k" in changes) and (not missed or said in found["why"])


def test_the_plan_takes_windows_for_the_networks_layers():
    """The 3x3 layers of ResNet-50, at a batch of 256: the least cycles."""
    for channels, side in ((64, 56), (128, 28), (256, 14), (512, 7)):
        case = image(256, channels, side, side, channels)
        for gpu in (emulated.H200, emulated.A100, emulated.RTX3080):
            found = planned(case, gpu=gpu)
            wgmma = gpu == emulated.H200 and channels == 64
            assert name_of(found).startswith("tma_win" if wgmma else "halo_128x"), name_of(found)
            others = [planned(case, gpu=gpu, configuration=i)["cycles"] for i in OTHERS]
            assert found["cycles"] < 0.7 * min(others)
