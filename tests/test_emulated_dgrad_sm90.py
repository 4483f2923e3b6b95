"""conv_dgrad by TMA and wgmma, emulated: its numbers, its costs, and what it refuses."""

from __future__ import annotations

import dataclasses
import itertools
import random

import emulated
import pytest
import torch
from dgrad_by_tma import (
    CASES,
    DTYPES,
    FEW,
    STRIDED,
    expected,
    layer,
    operands,
    planned,
    problem,
    run,
    tensors_of,
    tiles,
    wrong,
)
from emulated import Schedule
from emulated_shapes import lay_out
from test_emulated_conv_sm90 import sharing

from resnet_fused import cases, numerics
from resnet_fused.cases import ConvCase

pytestmark = pytest.mark.emulated

CONFIGURATIONS = 5
every = pytest.mark.parametrize("place", range(CONFIGURATIONS))
ALL = (*CASES, *STRIDED)
NAMED = {case.name: case for case in ALL}


def index_of(place: int) -> int:
    return list(tiles())[place]


def test_each_configuration_has_a_test_and_fits():
    assert len(tiles()) == CONFIGURATIONS
    for tile in tiles().values():
        assert tile["shared_bytes"] <= emulated.H200[1]
        assert tile["name"].startswith("tma_p128x") and not tile["float32"]


@every
@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_every_bit_is_right(place, case):
    """On integers; dtype, schedule and the number of blocks change from case to case."""
    number = ALL.index(case) * CONFIGURATIONS + place
    given = operands(case, DTYPES[number % 2])
    schedule = dataclasses.replace(emulated.SCHEDULES[number % 9], seed=number)
    few = number % 3 != 0
    dx, report = run(
        case, given, index_of(place), schedule=schedule, gpu=FEW if few else emulated.H200,
        resident_blocks=4,
    )  # fmt: skip
    assert wrong(case, given, dx) is None
    filters, pixels = sharing(tiles()[index_of(place)]["name"])
    assert report["plan"]["blocks"] <= (max(2, filters * pixels) if few else 132)


WIDE = ConvCase("wide", 2, 328, 18, 15, 136)
# Of four phases two have a tile of pixels less.
WIDE_BY_2 = ConvCase("wide_by_2", 2, 584, 35, 29, 72, 1, 1, (2, 2))


@pytest.mark.parametrize("place", [3, 4])
@pytest.mark.parametrize("case", [WIDE, WIDE_BY_2], ids=lambda case: case.name)
def test_blocks_that_share_walk_side_by_side(place, case):
    """Of five tiles of pixels the last cluster's second block has none, of three or five of
    channels its last one; it takes part, and stores nothing."""
    tile = tiles()[index_of(place)]
    filters, pixels = sharing(tile["name"])
    blocks, phases = filters * pixels, case.stride[0] ** 2
    clusters = phases * -(-540 // (filters * tile["m"])) * -(-case.c // (pixels * tile["n"]))
    given = operands(case, torch.bfloat16)
    two = (2 * blocks + 1, *emulated.H200[1:])  # clusters, and one multiprocessor alone
    most = min(clusters, 128 // blocks if blocks > 2 else 66)
    for gpu, many in ((emulated.H200, most), (two, 2), ((1, *two[1:]), 1)):
        dx, report = run(
            case, given, index_of(place), gpu=gpu, resident_blocks=2 * blocks,
            schedule=Schedule("random", "shuffled", seed=many),
        )  # fmt: skip
        assert report["plan"]["blocks"] == many * blocks and wrong(case, given, dx) is None


@every
@pytest.mark.parametrize("rounding", ["nearest", "toward_zero"])
def test_noise_is_within_the_bound(place, rounding):
    for dtype, name in itertools.product(DTYPES, ("3x3", "3x3_wide", "1x1", "3x3_by_2")):
        given = operands(NAMED[name], dtype, exact=False)
        schedule = Schedule("random", "shuffled", rounding, seed=place)
        dx, _ = run(NAMED[name], given, index_of(place), schedule=schedule)
        found = numerics.check_bound(dx, *expected(NAMED[name], given, rounding))
        assert found.ok, (dtype, name, found)


def test_a_wrong_mask_or_scale_or_tap_is_beyond_the_bound():
    case, index = NAMED["3x3"], index_of(1)
    dy, y, x, weight, scale = given = operands(case, torch.bfloat16, exact=False)
    turned = lay_out(weight.flip((2, 3)), "nhwc")
    for planted in (
        (dy, None, x, weight, scale), (dy, y, x, weight, scale.roll(1)),
        (dy, y, x, turned, scale),
    ):  # fmt: skip
        dx, _ = run(case, planted, index)
        assert not numerics.check_bound(dx, *expected(case, given)).ok


def test_fewer_tiles_than_blocks_and_more():
    """Each block's walk is its own: the first block alone leaves the others' pixels alone."""
    case, index = NAMED["many"], index_of(2)  # five tiles of 128 pixels
    given = operands(case, torch.bfloat16)
    for blocks, gpu in ((5, emulated.H200), (2, FEW)):
        dx, report = run(case, given, index, gpu=gpu, resident_blocks=3)
        assert report["plan"]["blocks"] == blocks and wrong(case, given, dx) is None
    dx, _ = run(case, given, index, gpu=FEW, blocks=(0, 0))
    there = ~dx.permute(0, 2, 3, 1).reshape(-1, case.c).isnan().any(1)
    assert torch.equal(there, torch.arange(len(there)) // 128 % 2 == 0)


@every
def test_nan_stays_where_torch_has_it(place):
    """NaN in dy passes the mask or not as eager's, in y it lets pass; beside them nobody reads."""
    case = NAMED["3x3_dilated"]
    dy, y, *rest = operands(case, torch.float16, layout="padded")
    y[0, 3, 4, 5], y[0, 5, 2, 2], y[0, 5, 7, 7] = 1, -1, torch.nan
    dy[0, 3, 4, 5], dy[0, 5, 2, 2] = torch.nan, torch.nan
    given = (dy, y, *rest)
    dx, _ = run(case, given, index_of(place), schedule=Schedule("lazy", "reverse"))
    oracle, _ = expected(case, given)
    assert oracle.isnan().any() and not oracle.isnan().all()
    assert torch.equal(dx.isnan(), oracle.isnan())
    assert torch.equal(dx.nan_to_num(), oracle.to(dx.dtype).nan_to_num())


@every
def test_a_scale_without_end_stays_with_its_filters(place):
    """No zero that stands for a place beside the image becomes NaN."""
    case = ConvCase("corner", 1, 64, 6, 6, 64, 3, 3, (1, 1), (1, 1), act="none")
    dy, y, x, weight, scale = operands(case, torch.bfloat16)
    dy[:, 5] = 0
    scale[5] = torch.inf
    dx, _ = run(case, (dy, y, x, weight, scale), index_of(place))
    finite = scale.clone()
    finite[5] = 1
    assert wrong(case, (dy, y, x, weight, finite), dx) is None


@every
def test_a_group_knows_nothing_of_its_neighbour(place):
    case = NAMED["groups"]
    dy, y, x, weight, scale = operands(case, torch.bfloat16)
    y[:, :64], dy[:, :64], weight[:64] = 1, torch.inf, torch.nan
    given = (dy, y, x, weight, scale)
    dx, _ = run(case, given, index_of(place))
    oracle, _ = expected(case, given)
    assert torch.equal(dx[:, 72:], oracle[:, 72:].to(dx.dtype))
    assert dx[:, :72].isnan().all()


# Layers of ResNet-50, cut down: the same channels, so that a step and a tile are what they are.
LAYERS = (
    ConvCase("layer1.conv3", 1, 64, 16, 16, 256),
    ConvCase("layer2.conv2", 1, 128, 8, 12, 128, 3, 3, (1, 1), (1, 1)),
    ConvCase("layer2.0.conv2", 1, 128, 16, 24, 128, 3, 3, (2, 2), (1, 1)),
)


@every
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.name)
def test_what_it_costs(place, case, masked):
    """No bank conflict; of memory nothing but what the layer has, each byte of it."""
    case = dataclasses.replace(case, act="relu" if masked else "none")
    given = operands(case, torch.bfloat16)
    dx, report = run(case, given, index_of(place), counting=True)
    assert wrong(case, given, dx) is None
    assert report["counters"]["bank_conflicts"] == 0
    dy, y, _, weight, scale = given
    read = sum(t.nbytes for t in (dy, y, weight, scale) if t is not None)
    tensors = report["tensors"].values()
    assert sum(t["unique_bytes_read"] for t in tensors) == read
    assert sum(t["unique_bytes_written"] for t in tensors) == dx.nbytes
    # Pixels as often as there are taps and tiles of channels, in whichever phase; filters for each
    # tile of pixels, those of all phases once.
    tile = tiles()[index_of(place)]
    copies = [s for s in report["sites"] if s["instruction"].startswith("cp.async.bulk.tensor")]
    loaded = sum(site["counters"]["global_load_bytes_asked"] for site in copies)
    of_phase = case.n * case.h * case.w // (case.stride[0] * case.stride[1])
    filters, shared = sharing(tile["name"])
    columns, rows = -(-case.c // (shared * tile["n"])), -(-of_phase // (filters * tile["m"]))
    pixels = dy.nbytes * (2 if masked else 1) * case.r * case.s * columns
    assert 0.8 * pixels <= loaded - weight.nbytes * rows <= pixels
    assert report["counters"]["global_store_bytes_asked"] == dx.nbytes


NOT_ADJACENT = "its channels are not adjacent"
OUT = {"dy": "dy", "y": "y", "weight": "weight", "x": "out"}


@pytest.mark.parametrize("name", OUT)
@pytest.mark.parametrize("layout", ["nchw", "unaligned"])
def test_a_tensor_that_tma_cannot_take_is_named(name, layout):
    case = NAMED["3x3"]
    given = tensors_of(case)
    given[name] = lay_out(given[name], layout)
    said = f"{OUT[name]}: " + (NOT_ADJACENT if layout == "nchw" else "address is ")
    for index in tiles():
        with pytest.raises(ValueError, match=said) as error:
            planned(problem(given, case), index)
        assert tiles()[index]["name"] in str(error.value)
    # Left to the chooser, mma.sync serves it and says why.
    made = planned(problem(given, case))
    assert made["configuration"] not in tiles() and f"no TMA: {said}" in made["why"]


FAR = ConvCase("far", 1, 8, 3, 300, 8, 3, 3, padding=(1, 1))


@pytest.mark.parametrize(
    ("case", "changes", "said"),
    [
        (FAR, {"dtype": "float32"}, "dtype: float32 is not served"),
        (FAR, {"dilation": (1, 128)}, "dilation: taps 256 pixels apart"),
        (FAR, {"padding": (1, 140)}, r"dy: lower\[0\] is 138; -128 to 127 is accepted"),
        (FAR, {"stride": (1, 3)}, "stride: 1 x 3; up to 2 x 2 is accepted"),
        (
            ConvCase("c", 1, 48, 5, 5, 128, stride=(2, 2), groups=2),
            {},
            "groups: 24 input channels of each; by a stride a multiple of 64 is accepted",
        ),
        (FAR, {"scale": 4}, "scale: its address is no multiple of 8"),
        (ConvCase("k", 1, 16, 5, 5, 12), {}, "dy: strides"),
        (ConvCase("c", 1, 20, 5, 5, 16), {}, "weight: strides|out: strides"),
        (ConvCase("odd", 1, 16, 1, 1, 5), {}, "weight: an odd number of filters"),
        (ConvCase("g", 1, 64, 5, 5, 64, groups=2), {}, "groups: 32 channels of each"),
    ],
    ids=lambda value: value.name if isinstance(value, ConvCase) else None,
)
def test_a_problem_that_tma_cannot_take_is_refused_in_words(case, changes, said):
    made = problem(tensors_of(case), case, **changes)
    for index in tiles():
        with pytest.raises(ValueError, match=said):
            planned(made, index)


def test_splits_are_refused():
    case = NAMED["3x3"]
    for index in tiles():
        with pytest.raises(ValueError, match="splits: only 1 is served by TMA"):
            planned(problem(tensors_of(case), case), index, 2)


def test_pixels_that_do_not_follow_one_another():
    """Any strides do for what is gathered, if y's pixels lie so too; what is stored is in a row."""
    case, index = NAMED["1x1"], index_of(0)
    given = tensors_of(case)
    wide = lay_out(torch.zeros(2, 80, 9, 20, dtype=torch.bfloat16), "nhwc")
    given["dy"] = wide[:, :72, :, ::2][..., :9]
    with pytest.raises(ValueError, match="y: its pixels do not lie as dy's do"):
        planned(problem(given, case), index)
    given["y"] = given["dy"]
    assert planned(problem(given, case), index)["configuration"] == index
    room = lay_out(torch.zeros(2, 144, 9, 18, dtype=torch.bfloat16), "nhwc")[:, :136]
    given["x"] = room[..., ::2]
    assert planned(problem(given, case), index)["configuration"] == index
    given["x"] = room[..., :9]
    with pytest.raises(ValueError, match="out: its pixels do not lie one behind the other"):
        planned(problem(given, case), index)


def test_gradients_of_a_wider_image_are_right():
    """dy and y within wider and longer images: gathered, and not as rows of one matrix."""
    case = NAMED["1x1"]
    given = list(operands(case, torch.bfloat16))
    for i in range(2):
        room = torch.full((2, 12, 20, 80), torch.nan, dtype=torch.bfloat16).permute(0, 3, 1, 2)
        given[i] = room[:, 8:80, 1:10, 2:20:2].copy_(given[i])
    for index in tiles():
        dx, report = run(case, tuple(given), index)
        assert wrong(case, tuple(given), dx) is None
        used = {site["instruction"] for site in report["sites"]}
        assert {name.removesuffix(".multicast") for name in used} & {"cp.async.bulk.tensor.im2col"}
        assert "cp.async.bulk.tensor.tile.multicast" not in used or "_2c" in tiles()[index]["name"]


@pytest.mark.parametrize(
    "gpu",
    [emulated.A100, emulated.RTX3080, emulated.H200[:3], (*emulated.H200[:3], 100)],
    ids=str,
)
def test_no_other_gpu_gets_them(gpu):
    for case in (*cases.RESNET50_LAYERS, *CASES):
        made = layer(case, 2)
        found = planned(made, gpu=gpu)
        assert found["configuration"] not in tiles() and "TMA" not in found["why"]
        for index in tiles():
            with pytest.raises(ValueError, match="for GPUs of capability 9.0"):
                planned(made, index, gpu=gpu)


def test_the_layers_of_resnet50_are_served_by_them_at_a_full_batch():
    taken = set()
    for case in cases.RESNET50_LAYERS:
        made = planned(layer(case, 256))
        if case.c % 8:
            assert made["configuration"] not in tiles() and "no TMA: " in made["why"]
        else:
            assert made["configuration"] in tiles(), (case.name, made["why"])
            taken.add(tiles()[made["configuration"]]["name"])
    assert len(taken) >= 4, taken


def test_a_launch_counts_its_pixels_in_31_bits():
    case = ConvCase("huge", 1, 8, 224, 224, 8)
    made = planned(layer(case, 100_000), index_of(2))
    assert made["launches"] == 3 and made["blocks"] == 132


def test_random_shapes():
    for number in range(9):
        rng = random.Random(number)
        case = ConvCase(
            "random", rng.randint(1, 3), 8 * rng.randint(1, 20), rng.randint(1, 12),
            rng.randint(1, 12), 8 * rng.randint(1, 14), rng.randint(1, 4), rng.randint(1, 4),
            (1, 1), (rng.randint(0, 3), rng.randint(0, 3)),
            (rng.randint(1, 2), rng.randint(1, 2)), 1, False, rng.choice(("relu", "none")),
        )  # fmt: skip
        if case.p < 1 or case.q < 1:
            continue
        given = operands(case, rng.choice(DTYPES), layout=rng.choice(("nhwc", "padded")))
        schedule = dataclasses.replace(rng.choice(emulated.SCHEDULES), seed=number)
        dx, _ = run(case, given, index_of(number % CONFIGURATIONS), schedule=schedule, gpu=FEW)
        assert wrong(case, given, dx) is None, case
