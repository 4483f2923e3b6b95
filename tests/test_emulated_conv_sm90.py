"""conv_bn_act by TMA and wgmma, emulated: its numbers, its costs, and what it refuses."""

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
    CASES,
    DTYPES,
    FEW,
    layer,
    operands,
    planned,
    problem,
    run,
    sharing,
    tensors_of,
    tiles,
    windows,
    wrong,
)
from emulated import Schedule
from emulated_shapes import lay_out

from resnet_fused import cases
from resnet_fused.cases import ConvCase

pytestmark = pytest.mark.emulated

CONFIGURATIONS = 12
every = pytest.mark.parametrize("place", range(CONFIGURATIONS))
NAMED = {case.name: case for case in CASES}


def index_of(place: int) -> int:
    return list(tiles())[place]


def test_each_configuration_has_a_test_and_fits():
    assert len(tiles()) == CONFIGURATIONS
    for tile in tiles().values():
        assert tile["shared_bytes"] <= emulated.H200[1]
        assert tile["name"].startswith("tma_") and not tile["float32"]


@every
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_bit_is_right(place, case):
    """On integers; dtype, schedule, walk and the number of blocks change from case to case."""
    number = CASES.index(case) * CONFIGURATIONS + place
    dtype = DTYPES[number % 2]
    given = operands(case, dtype)
    schedule = dataclasses.replace(emulated.SCHEDULES[number % 9], seed=number)
    few = number % 3 != 0
    y, report = run(
        case,
        given,
        index_of(place),
        schedule=schedule,
        reverse=number // 2 % 2 == 1,
        gpu=FEW if few else emulated.H200,
        resident_blocks=8,
    )
    assert wrong(case, given, y) is None
    filters, pixels = sharing(tiles()[index_of(place)]["name"])
    assert report["plan"]["blocks"] <= (max(2, filters * pixels) if few else 132)


@every
@pytest.mark.parametrize("rounding", ["nearest", "toward_zero"])
def test_noise_is_within_the_bound(place, rounding):
    for dtype, name in itertools.product(DTYPES, ("3x3", "1x1")):
        given = operands(NAMED[name], dtype, exact=False)
        schedule = Schedule("random", "shuffled", rounding, seed=place)
        y, _ = run(NAMED[name], given, index_of(place), schedule=schedule)
        found = conv_by_tma.check(NAMED[name], given, y, rounding)
        assert found.ok, (dtype, name, found)


@pytest.mark.parametrize("reverse", [False, True])
def test_fewer_tiles_than_blocks_and_more(reverse):
    """Each block's walk is its own: the first block alone leaves the others' pixels alone."""
    case, index = NAMED["many"], index_of(5)  # five tiles of 128 pixels
    given = operands(case, torch.bfloat16)
    for blocks, gpu in ((5, emulated.H200), (2, FEW)):
        y, report = run(case, given, index, gpu=gpu, reverse=reverse, resident_blocks=3)
        assert report["plan"]["blocks"] == blocks and wrong(case, given, y) is None
    y, _ = run(case, given, index, gpu=FEW, reverse=reverse, blocks=(0, 0))
    there = ~y.permute(0, 2, 3, 1).reshape(-1, case.k).isnan().any(1)
    tile = torch.arange(len(there)) // 128
    assert torch.equal(there, (4 - tile if reverse else tile) % 2 == 0)


WIDE = ConvCase("wide", 2, 64, 18, 15, 328)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("tma_p128x256_3s_2c", NAMED["many"]), ("tma_s192x128_4s_2c", NAMED["many"]),
        ("tma_s192x128_4s_2p", WIDE), ("tma_s224x64_4s_t_4p", WIDE),
        ("tma_s128x64_7s_t_2c_4p", WIDE),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_blocks_that_share_walk_side_by_side(name, case, reverse):
    """Of five or three tiles of pixels the last cluster's second block has none, of three or six of
    channels its last ones, and takes part."""
    index = next(i for i, tile in tiles().items() if tile["name"] == name)
    filters, pixels = sharing(name)
    blocks = filters * pixels
    wide, high = pixels * tiles()[index]["n"], filters * tiles()[index]["m"]
    columns = -(-case.k // wide)
    clusters = -(-540 // high) * columns
    given = operands(case, torch.bfloat16)
    two = (2 * blocks + 1, *emulated.H200[1:])  # clusters, and one multiprocessor alone
    for gpu, many in ((emulated.H200, clusters), (two, 2), ((1, *two[1:]), 1)):
        y, report = run(case, given, index, gpu=gpu, reverse=reverse, resident_blocks=2 * blocks)
        assert report["plan"]["blocks"] == many * blocks and wrong(case, given, y) is None
    y, _ = run(case, given, index, gpu=two, reverse=reverse, blocks=(0, blocks - 1))
    there = ~y.permute(0, 2, 3, 1).reshape(-1, case.k).isnan()
    pixel, channel = torch.arange(len(there))[:, None], torch.arange(case.k)[None]
    tile = pixel // high * columns + channel // wide
    assert torch.equal(there, (clusters - 1 - tile if reverse else tile) % 2 == 0)


@pytest.mark.parametrize(
    ("name", "blocks"), [("tma_s224x64_4s_t_4p", 4), ("tma_s128x64_7s_t_2c_4p", 8)]
)
def test_no_cluster_waits_for_another_one(name, blocks):
    """Where the driver has been asked, there are as many as it says run at once."""
    index = next(i for i, tile in tiles().items() if tile["name"] == name)
    made = layer(ConvCase("layer", 1, 512, 28, 28, 1024), 64)
    room = {4: 31, 8: 15}
    assert planned(made, index)["blocks"] == 128
    assert planned(made, index, gpu=(*emulated.H200, 31, 15))["blocks"] == blocks * room[blocks]
    few = layer(ConvCase("layer", 1, 64, 7, 7, 64), 1)
    assert planned(few, index, gpu=(*emulated.H200, 31, 15))["blocks"] == blocks


@every
def test_nan_stays_where_torch_has_it(place):
    """NaN and infinity in x, in the shortcut, and in memory beside x that nobody may read."""
    case = NAMED["3x3_dilated"]
    given = list(operands(case, torch.float16, layout="padded"))
    given[0][0, 3, 4, 5], given[0][0, 0, 0, 0] = torch.nan, torch.inf
    given[4][0, 9, 2, 2] = torch.nan
    y, _ = run(case, tuple(given), index_of(place), schedule=Schedule("lazy", "reverse"))
    oracle, _ = conv_by_tma.expected(case, tuple(given))
    assert oracle.isnan().any() and not oracle.isnan().all()
    assert torch.equal(y.isnan(), oracle.isnan())
    assert torch.equal(y.isinf(), oracle.isinf())


@every
def test_a_group_knows_nothing_of_its_neighbour(place):
    case = NAMED["groups"]
    given = list(operands(case, torch.bfloat16))
    given[0][:, :64] = torch.inf
    given[1][:72] = torch.nan
    y, _ = run(case, tuple(given), index_of(place))
    oracle, _ = conv_by_tma.expected(case, tuple(given))
    assert torch.equal(y[:, 72:], oracle[:, 72:].to(y.dtype))
    assert y[:, :72].isnan().all()


# Layers of ResNet-50, cut down: the same channels, so that a step and a tile are what they are.
LAYERS = (
    ConvCase("layer1.conv3", 1, 64, 16, 16, 256, residual=True),
    ConvCase("layer2.conv2", 1, 128, 8, 12, 128, 3, 3, (1, 1), (1, 1)),
)


@every
@pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.name)
def test_what_it_costs(place, case):
    """No bank conflict; of memory nothing but what the layer has, each byte of it."""
    tile = tiles()[index_of(place)]
    given = operands(case, torch.bfloat16)
    y, report = run(case, given, index_of(place), counting=True)
    assert wrong(case, given, y) is None
    assert report["counters"]["bank_conflicts"] == 0
    roof = sum(t.nbytes for t in (*given, y) if t is not None)
    moved = sum(t["unique_bytes_read"] for t in report["tensors"].values())
    moved += sum(t["unique_bytes_written"] for t in report["tensors"].values())
    assert 0.999 * roof <= moved <= 1.1 * roof, report["tensors"]
    # Whole sectors; pixels as often as there are taps and tiles of channels, filters for each tile.
    copies = [s for s in report["sites"] if s["instruction"].startswith("cp.async.bulk.tensor")]
    loaded = sum(site["counters"]["global_load_bytes_asked"] for site in copies)
    assert loaded == 32 * sum(site["counters"]["global_load_sectors"] for site in copies)
    columns, rows = -(-case.k // tile["n"]), -(-case.n * case.p * case.q // tile["m"])
    # To all that share them at a time.
    share_filters, share_pixels = sharing(tile["name"])
    columns, rows = -(-columns // share_pixels), -(-rows // share_filters)
    pixels = given[0].nbytes * case.r * case.s * columns
    residual = 0 if given[4] is None else y.nbytes
    assert 0.8 * pixels <= loaded - given[1].nbytes * rows - residual <= pixels
    assert report["counters"]["global_store_bytes_asked"] == y.nbytes


REFUSED = {
    "x": ("nchw", "x: its channels are not adjacent"),
    "weight": ("nchw", "weight: its channels are not adjacent"),
    "residual": ("nchw", "residual: its channels are not adjacent"),
    "out": ("nchw", "out: its channels are not adjacent"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("layout", ["nchw", "unaligned"])
def test_a_tensor_that_tma_cannot_take_is_named(name, layout):
    case = NAMED["3x3"]
    given = tensors_of(case)
    given[name] = lay_out(given[name], layout)
    said = REFUSED[name][1] if layout == "nchw" else f"{name}: address is "
    for index in tiles():
        with pytest.raises(ValueError, match=said) as error:
            planned(problem(**given), index)
        assert tiles()[index]["name"] in str(error.value)
    # Left to the chooser, mma.sync serves it and says why.
    made = planned(problem(**given))
    assert made["configuration"] not in tiles() and f"no TMA: {said}" in made["why"]


FAR = ConvCase("far", 1, 8, 3, 300, 8, 3, 3, padding=(1, 1))


@pytest.mark.parametrize(
    ("case", "changes", "said"),
    [
        (FAR, {"dtype": "float32"}, "dtype: float32 is not served"),
        (FAR, {"dilation": (1, 128)}, "dilation: taps 256 pixels apart"),
        (FAR, {"padding": (129, 1)}, "padding: 129"),
        (FAR, {"stride": (1, 9)}, "stride: 9"),
        (ConvCase("c", 1, 12, 5, 5, 16), {}, "x: strides"),
        (ConvCase("k", 1, 16, 5, 5, 20), {}, "out: strides"),
        (ConvCase("g", 1, 64, 5, 5, 64, groups=2), {}, "groups: 32 channels of each"),
    ],
    ids=lambda value: value.name if isinstance(value, ConvCase) else None,
)
def test_a_problem_that_tma_cannot_take_is_refused_in_words(case, changes, said):
    made = problem(**{**tensors_of(case), "residual": None}, case=case, **changes)
    for index in tiles():
        with pytest.raises(ValueError, match=said):
            planned(made, index)


def test_splits_are_refused():
    for index in tiles():
        with pytest.raises(ValueError, match="splits: only 1 is served by TMA"):
            planned(problem(**tensors_of(NAMED["3x3"])), index, 2)


def test_pixels_that_do_not_follow_one_another():
    """Any strides do for an image that is gathered; what is stored lies in a row."""
    case = NAMED["1x1"]
    wide = lay_out(torch.zeros(2, 80, 9, 20, dtype=torch.bfloat16), "nhwc")
    given = tensors_of(case)
    given["x"] = wide[:, :72, :, ::2][..., :9]
    index = index_of(0)
    assert planned(problem(**given, case=case), index)["configuration"] == index
    room = lay_out(torch.zeros(2, 136, 9, 18, dtype=torch.bfloat16), "nhwc")
    given["out"] = room[..., ::2]
    assert planned(problem(**given, case=case), index)["configuration"] == index
    given["out"] = room[..., :9]
    with pytest.raises(ValueError, match="out: its pixels do not lie one behind the other"):
        planned(problem(**given, case=case), index)


def test_strided_images_and_outputs_are_right():
    """x within a wider and longer image, the output in the channels of another tensor."""
    case = NAMED["1x1"]
    given = list(operands(case, torch.bfloat16))
    room = torch.full((2, 12, 20, 80), torch.nan, dtype=torch.bfloat16).permute(0, 3, 1, 2)
    given[0] = room[:, 8:80, 1:10, 2:20:2].copy_(given[0])
    for place in range(CONFIGURATIONS):
        y, report = run(case, tuple(given), index_of(place))
        assert wrong(case, tuple(given), y) is None
        used = {site["instruction"] for site in report["sites"]}
        assert used & {"cp.async.bulk.tensor.im2col", "cp.async.bulk.tensor.im2col.multicast"}


@pytest.mark.parametrize(
    "gpu",
    [emulated.A100, emulated.RTX3080, emulated.H200[:3], (*emulated.H200[:3], 80),
     (*emulated.H200[:3], 100)],
    ids=str,
)  # fmt: skip
def test_no_other_gpu_gets_them(gpu):
    for case in (*cases.RESNET50_LAYERS, *CASES):
        x, weight = (torch.empty(shape, dtype=torch.bfloat16, device="meta")
                     .contiguous(memory_format=torch.channels_last)
                     for shape in (case.input_shape, case.weight_shape))  # fmt: skip
        out = torch.empty(case.output_shape, dtype=torch.bfloat16, device="meta").contiguous(
            memory_format=torch.channels_last
        )
        made = problem(x, weight, None, out, case=case)
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
            assert made["configuration"] not in tiles()  # the stem's three channels
        else:
            by_window = (case.c, case.k, case.r, case.stride) == (64, 64, 3, (1, 1))
            serving = windows() if by_window else tiles()
            assert made["configuration"] in serving, (case.name, made["why"])
            taken.add(serving[made["configuration"]]["name"])
    assert len(taken) >= 4, taken


AT_32 = {256: "tma_s224x64_4s_t_4p", 512: "tma_s128x64_7s_t_2c_4p"}
"""Channels of a 3x3 -> what takes it."""


def test_clusters_take_the_deep_layers_at_32_images():
    """Each 3x3 of the last two stages in one round of clusters."""
    deep = [case for case in cases.RESNET50_LAYERS if case.r == 3 and case.k in AT_32]
    assert len(deep) == 4
    for case in deep:
        made = planned(layer(case, 32))
        assert tiles()[made["configuration"]]["name"] == AT_32[case.k], case.name
        assert made["blocks"] == 112
        # Of more images as many as lie in whole clusters of a GPC.
        assert planned(layer(case, 256), made["configuration"])["blocks"] == 128


def test_a_launch_counts_its_pixels_in_31_bits():
    case = ConvCase("huge", 1, 8, 224, 224, 8)
    made = planned(layer(case, 100_000), index_of(5))
    assert made["launches"] == 3 and made["blocks"] == 132


def test_random_shapes():
    for number in range(8):
        rng = random.Random(number)
        case = ConvCase(
            "random", rng.randint(1, 3), 8 * rng.randint(1, 14), rng.randint(1, 12),
            rng.randint(1, 12), 8 * rng.randint(1, 20), rng.randint(1, 4), rng.randint(1, 4),
            (rng.randint(1, 3), rng.randint(1, 3)), (rng.randint(0, 3), rng.randint(0, 3)),
            (rng.randint(1, 2), rng.randint(1, 2)), 1, rng.random() < 0.5,
            rng.choice(("relu", "none")),
        )  # fmt: skip
        if case.p < 1 or case.q < 1:
            continue
        given = operands(case, rng.choice(DTYPES), layout=rng.choice(("nhwc", "padded")))
        schedule = dataclasses.replace(rng.choice(emulated_shapes.SCHEDULES), seed=number)
        y, _ = run(
            case, given, index_of(number % CONFIGURATIONS), schedule=schedule, gpu=FEW,
            reverse=rng.random() < 0.5,
        )  # fmt: skip
        assert wrong(case, given, y) is None, case
