"""conv_bn_act by windows of the input, emulated: its numbers, its costs, and what it refuses."""

from __future__ import annotations

import dataclasses
import itertools
import random

import conv_by_tma
import emulated
import emulated_shapes
import pytest
import torch
from conv_by_tma import (
    DTYPES,
    FEW,
    layer,
    operands,
    planned,
    problem,
    run,
    tensors_of,
    windows,
    wrong,
)
from emulated import Schedule
from emulated_shapes import lay_out

from resnet_fused import cases
from resnet_fused.cases import ConvCase

pytestmark = pytest.mark.emulated

CONFIGURATIONS = 3
every = pytest.mark.parametrize("place", range(CONFIGURATIONS))


def conv3x3(name, n, h, w, k=64, residual=False, act="relu"):
    """A 3x3 of stride 1 over 64 channels."""
    return ConvCase(name, n, 64, h, w, k, 3, 3, (1, 1), (1, 1), residual=residual, act=act)


CASES = (
    conv3x3("column", 3, 7, 1, residual=True),
    conv3x3("row", 2, 1, 60, act="none"),
    conv3x3("pixels", 90, 1, 1, residual=True),
    # Several images in a tile, tiles that end in every kind of place.
    conv3x3("images", 9, 5, 6, residual=True, act="none"),
    conv3x3("narrow", 5, 13, 2, 128),
    conv3x3("wide", 1, 5, 90, residual=True),
    conv3x3("layer1", 1, 9, 56, residual=True),
    conv3x3("channels", 2, 10, 9, 192, residual=True),
    conv3x3("many", 2, 18, 15, 128, act="none"),
)
NAMED = {case.name: case for case in CASES}


def index_of(place: int) -> int:
    return list(windows())[place]


def pixels_of(place: int) -> int:
    return windows()[index_of(place)]["m"]


def positions(case: ConvCase) -> int:
    """Of the walk, as far as its last pixel."""
    return case.n * (case.h + 1) * (case.w + 1) - (case.w + 1) - 1


def test_each_configuration_has_a_test_and_fits():
    names = [tile["name"] for tile in windows().values()]
    assert names == ["tma_win192x64_2w", "tma_win208x64_2w", "tma_win96x64_2w"]
    for tile in windows().values():
        assert tile["tma"] and not tile["float32"] and tile["shared_bytes"] == emulated.H200[1]


@every
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_bit_is_right(place, case):
    """On integers; dtype, schedule, walk and the number of blocks change from case to case."""
    number = CASES.index(case) * CONFIGURATIONS + place
    dtype = DTYPES[number % 2]
    given = operands(case, dtype)
    schedule = dataclasses.replace(emulated.SCHEDULES[number % 9], seed=number)
    few = number % 4 != 0
    y, report = run(
        case,
        given,
        index_of(place),
        schedule=schedule,
        reverse=number // 2 % 2 == 1,
        gpu=FEW if few else emulated.H200,
        resident_blocks=2,
    )
    assert wrong(case, given, y) is None
    tiles, columns = -(-positions(case) // pixels_of(place)), case.k // 64
    of_column = max(1, (2 if few else 132) // columns)
    assert report["plan"]["blocks"] == columns * min(of_column, tiles)


@every
@pytest.mark.parametrize("rounding", ["nearest", "toward_zero"])
def test_noise_is_within_the_bound(place, rounding):
    for dtype, name in itertools.product(DTYPES, ("images", "narrow")):
        given = operands(NAMED[name], dtype, exact=False)
        schedule = Schedule("random", "shuffled", rounding, seed=place)
        y, _ = run(NAMED[name], given, index_of(place), schedule=schedule, gpu=FEW)
        found = conv_by_tma.check(NAMED[name], given, y, rounding)
        assert found.ok, (dtype, name, found)


@pytest.mark.parametrize("reverse", [False, True])
def test_each_block_walks_over_its_own_tiles(reverse):
    """Of 64 channels, every other tile; the first block alone leaves all else alone."""
    case, index = NAMED["many"], index_of(2)
    given = operands(case, torch.bfloat16)
    four = (4, *emulated.H200[1:])  # two blocks for each of two columns
    y, report = run(case, given, index, gpu=four, reverse=reverse, blocks=(0, 0))
    assert report["plan"]["blocks"] == 4
    there = ~y.isnan()
    assert not there[:, 64:].any()
    n, p, q = torch.meshgrid(*(torch.arange(i) for i in (2, 18, 15)), indexing="ij")
    tile = ((n * 19 + p) * 16 + q) // 96
    last = (positions(case) - 1) // 96
    mine = (last - tile if reverse else tile) % 2 == 0
    assert torch.equal(there[:, :64], mine[:, None].expand(2, 64, 18, 15))


@every
def test_nan_and_infinity_stay_where_torch_has_them(place):
    """At the ends of rows and images, in the shortcut, and in memory that nobody may read."""
    case = NAMED["images"]
    given = list(operands(case, torch.float16, layout="padded"))
    x, residual = given[0], given[4]
    x[0, 3, 1, 5], x[2, 0, 3, 0] = torch.nan, torch.inf  # beside a row's end, before one
    x[4, 7, 4, 2], x[6, 1, 0, 3] = -torch.inf, torch.inf  # an image's last row, its first
    x[8, 2, 4, 5] = torch.nan  # the last pixel of all
    residual[1, 9, 4, 5], residual[7, 40, 0, 0] = torch.nan, torch.inf
    y, _ = run(case, tuple(given), index_of(place), schedule=Schedule("lazy", "reverse"), gpu=FEW)
    oracle, _ = conv_by_tma.expected(case, tuple(given))
    assert oracle.isnan().any() and oracle.isinf().any()
    kept = ~oracle.isnan()
    assert 0.5 < kept.float().mean() < 1
    assert torch.equal(y.isnan(), oracle.isnan())
    assert torch.equal(y[kept], oracle[kept].to(y.dtype))


STAGE = conv3x3("stage", 2, 28, 56, residual=True)


@every
def test_what_it_costs(place):
    """No bank conflict, each byte once; L2 is asked for a window's rows, not for nine taps."""
    given = operands(STAGE, torch.bfloat16)
    y, report = run(STAGE, given, index_of(place), counting=True)
    assert wrong(STAGE, given, y) is None
    assert report["counters"]["bank_conflicts"] == 0
    roof = sum(t.nbytes for t in (*given, y) if t is not None)
    moved = sum(t["unique_bytes_read"] for t in report["tensors"].values())
    moved += sum(t["unique_bytes_written"] for t in report["tensors"].values())
    assert 0.999 * roof <= moved <= 1.1 * roof, report["tensors"]
    assert report["counters"]["global_store_bytes_asked"] == y.nbytes
    assert report["counters"]["global_store_sectors"] == y.nbytes // 32
    # Of a window of two rows, two pixels and the tile's own, in parts of whole patterns.
    factor = {192: 312 / 192, 208: 336 / 208, 96: 216 / 96}[pixels_of(place)]
    assert 0.95 * factor <= loaded_of_x(report) / given[0].nbytes <= factor


def loaded_of_x(report) -> int:
    """Bytes of the input that a kernel by TMA has asked for."""
    return sum(
        site["counters"]["global_load_bytes_asked"]
        for site in report["sites"]
        if site["instruction"] == "cp.async.bulk.tensor.im2col"
        and ("/kernels/" in site["file"] or site["file"].endswith("/tap_steps.h"))
    )


def test_the_other_kernel_reads_nine_times():
    """What the windows are compared with."""
    index = next(i for i, t in conv_by_tma.tiles().items() if t["name"] == "tma_s256x64_4s_t")
    given = operands(STAGE, torch.bfloat16)
    _, report = run(STAGE, given, index, counting=True)
    assert 8 <= loaded_of_x(report) / given[0].nbytes <= 9


@pytest.mark.parametrize("name", ["x", "weight", "residual", "out"])
@pytest.mark.parametrize("layout", ["nchw", "unaligned"])
def test_a_tensor_that_it_cannot_take_is_named(name, layout):
    given = tensors_of(NAMED["images"])
    given[name] = lay_out(given[name], layout)
    said = f"{name}: its channels are not adj" if layout == "nchw" else f"{name}: address is "
    for index in windows():
        with pytest.raises(ValueError, match=said) as error:
            planned(problem(**given, case=NAMED["images"]), index)
        assert windows()[index]["name"] in str(error.value)


REFUSED = (
    (conv3x3("c", 1, 5, 5, 72), {}, "channels: 72 of the output; a multiple of 64"),
    (dataclasses.replace(conv3x3("c", 1, 5, 5), c=128), {}, "windows are for 64 in one group"),
    (
        dataclasses.replace(conv3x3("g", 1, 5, 5, 128), c=128, groups=2),
        {},
        "windows are for 64 in one group",
    ),
    (conv3x3("t", 1, 5, 5), {"dtype": "float32"}, "dtype: float32 is not served"),
    (conv3x3("s", 1, 9, 9), {"stride": (2, 2)}, "3x3, stride, padding and dilation 1"),
    (conv3x3("d", 1, 9, 9), {"dilation": (2, 1)}, "3x3, stride, padding and dilation 1"),
    (conv3x3("p", 1, 9, 9), {"padding": (0, 1)}, "3x3, stride, padding and dilation 1"),
    (ConvCase("1x1", 1, 64, 5, 5, 64), {}, "windows are for filters of 3x3"),
    (conv3x3("w", 1, 2, 300), {}, "x: rows of 300 pixels take .* of shared memory"),
)


@pytest.mark.parametrize(("case", "changes", "said"), REFUSED, ids=[c[0].name for c in REFUSED])
def test_a_problem_that_it_is_not_for_is_refused_in_words(case, changes, said):
    made = problem(**{**tensors_of(case), "residual": None}, case=case, **changes)
    for index in windows():
        with pytest.raises(ValueError, match=said):
            planned(made, index)
    # Left to the chooser, another kernel serves it, and nothing is said of windows.
    if not changes:
        found = planned(made)
        assert found["configuration"] not in windows() and "window" not in found["why"]


def test_the_widest_rows_that_fit():
    widest = {}
    for index, tile in windows().items():
        for width in range(300, 0, -1):
            case = conv3x3("w", 1, 1, width)
            try:
                planned(layer(case, 1), index)
            except ValueError:
                continue
            widest[tile["m"]] = width
            break
        given = operands(case, torch.bfloat16)
        y, _ = run(case, given, index, schedule=Schedule("random", "shuffled"))
        assert wrong(case, given, y) is None
    assert widest == {192: 110, 208: 98, 96: 210}


def test_strided_images_and_outputs_are_right():
    """x within a wider and longer image, shortcut and output with gaps behind rows and images."""
    case = NAMED["narrow"]
    given = list(operands(dataclasses.replace(case, residual=True), torch.bfloat16))
    room = torch.full((5, 15, 6, 80), torch.nan, dtype=torch.bfloat16).permute(0, 3, 1, 2)
    given[0] = room[:, 8:72, 1:14, 1:5:2].copy_(given[0])
    wide = torch.full((5, 16, 5, 136), torch.nan, dtype=torch.bfloat16).permute(0, 3, 1, 2)
    given[4] = wide[:, :128, :13, :2].copy_(given[4])
    for place in range(CONFIGURATIONS):
        y, _ = run(case, tuple(given), index_of(place))
        assert wrong(case, tuple(given), y) is None
        out = torch.full((5, 16, 5, 136), torch.nan, dtype=torch.bfloat16).permute(0, 3, 1, 2)
        inside = out[:, 8:136, 2:15, 1:5:2]
        conv_by_tma.run_into(case, tuple(given), inside, index_of(place))
        assert torch.equal(inside, y)
        assert int((~out.isnan()).sum()) == inside.numel()


@pytest.mark.parametrize("gpu", [emulated.A100, emulated.H200[:3], (*emulated.H200[:3], 100)])
def test_no_other_gpu_gets_them(gpu):
    made = problem(**tensors_of(STAGE), case=STAGE)
    found = planned(made, gpu=gpu)
    assert found["configuration"] not in windows() and "TMA" not in found["why"]
    for index in windows():
        with pytest.raises(ValueError, match="for GPUs of capability 9.0"):
            planned(made, index, gpu=gpu)


def test_the_first_stage_is_served_by_them():
    """By what is predicted; at a batch of 32 by the tile that leaves no short last round.

    A single image is predicted to take a little less in clusters.
    """
    chosen = {}
    for batch in (256, 32, 2):
        made = planned(layer(conv3x3("layer1.conv2", 1, 56, 56), batch))
        chosen[batch] = windows()[made["configuration"]]["name"]
    assert chosen == {256: "tma_win192x64_2w", 32: "tma_win208x64_2w", 2: "tma_win96x64_2w"}


def test_a_launch_counts_its_positions_in_31_bits():
    made = planned(layer(conv3x3("huge", 1, 56, 56), 1_000_000), index_of(0))
    assert made["launches"] == 2 and made["blocks"] == 132


def test_random_shapes():
    for number in range(9):
        rng = random.Random(number)
        case = conv3x3(
            "random", rng.randint(1, 9), rng.randint(1, 20), rng.randint(1, 24),
            64 * rng.randint(1, 3), rng.random() < 0.5, rng.choice(("relu", "none")),
        )  # fmt: skip
        given = operands(case, rng.choice(DTYPES), layout=rng.choice(("nhwc", "padded")))
        schedule = dataclasses.replace(rng.choice(emulated_shapes.SCHEDULES), seed=number)
        y, _ = run(
            case, given, index_of(number % CONFIGURATIONS), schedule=schedule,
            gpu=rng.choice((FEW, (5, *emulated.H200[1:]))), reverse=rng.random() < 0.5,
        )  # fmt: skip
        assert wrong(case, given, y) is None, case


def test_resnet50_has_layers_for_them():
    for case in cases.RESNET50_LAYERS:
        if case.c == 64 and case.r == 3:
            assert case.k % 64 == 0 and case.stride == (1, 1)
            return
    pytest.fail("no layer of ResNet-50 is a 3x3 of 64 channels")
