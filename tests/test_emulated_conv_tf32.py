"""conv_bn_act on float32 by TMA and wgmma, emulated: what TMA rounds, numbers, costs, refusals."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import conv_by_tma
import emulated
import emulated_shapes
import pytest
import torch
from conv_by_tma import (
    CASES,
    FEW,
    layer,
    operands,
    planned,
    problem,
    run,
    tensors_of,
    tf32_tiles,
    tiles,
    wrong,
)
from conv_tf32_operands import cut, fractions, rounded
from emulated import Schedule
from emulated_shapes import lay_out

from resnet_fused import cases
from resnet_fused.cases import ConvCase
from resnet_fused.ops import _cuda_checks, _selfchecks

pytestmark = pytest.mark.emulated

CONFIGURATIONS = 8
every = pytest.mark.parametrize("place", range(CONFIGURATIONS))
# A step is 32 channels: what others have of a multiple of 64 here has one and a half.
NAMED = {case.name: case for case in CASES} | {
    "quads": ConvCase("quads", 2, 36, 9, 10, 100, 3, 3, (1, 1), (1, 1), residual=True),
    "1x1_groups": ConvCase("1x1_groups", 1, 96, 9, 8, 84, groups=3, residual=True),
    "few": ConvCase("few", 3, 4, 12, 9, 4, 3, 3, (2, 1), (1, 1), act="none"),
}


def index_of(place: int) -> int:
    return list(tf32_tiles())[place]


def of(name: str) -> int:
    return next(i for i, tile in tf32_tiles().items() if tile["name"] == name)


def test_each_configuration_has_a_test_and_fits():
    assert len(tf32_tiles()) == CONFIGURATIONS
    for tile in tf32_tiles().values():
        assert tile["shared_bytes"] <= emulated.H200[1]
        assert tile["name"].startswith("tma_tf32_s")


@every
@pytest.mark.parametrize("case", NAMED.values(), ids=lambda case: case.name)
def test_every_bit_is_right(place, case):
    """On integers; schedule, walk and the number of blocks change from case to case."""
    number = list(NAMED).index(case.name) * CONFIGURATIONS + place
    given = operands(case, torch.float32)
    schedule = dataclasses.replace(emulated.SCHEDULES[number % 9], seed=number)
    few = number % 3 != 0
    y, _ = run(
        case,
        given,
        index_of(place),
        schedule=schedule,
        reverse=number // 2 % 2 == 1,
        gpu=FEW if few else emulated.H200,
        resident_blocks=8,
    )
    assert wrong(case, given, y) is None


@every
@pytest.mark.parametrize("rounding", ["nearest", "toward_zero"])
def test_noise_is_within_the_bound_of_rounded_operands(place, rounding):
    for name in ("3x3", "1x1", "few"):
        given = operands(NAMED[name], torch.float32, exact=False)
        schedule = Schedule("random", "shuffled", rounding, seed=place)
        y, _ = run(NAMED[name], given, index_of(place), schedule=schedule)
        found = conv_by_tma.check(NAMED[name], given, y, rounding)
        assert found.ok, (name, found)


@every
@pytest.mark.parametrize("side", [0, 1], ids=["x", "weight"])
@pytest.mark.parametrize("name", ["1x1", "3x3_stride2"])
def test_operands_are_rounded_and_not_cut(place, side, name):
    case = dataclasses.replace(NAMED[name], residual=False, act="none")
    given = fractions(case, side)
    y, _ = run(case, given, index_of(place))
    results = [
        conv_by_tma.expected(case, (way(given[0]), way(given[1]), *given[2:]))[0].float()
        for way in (rounded, cut)
    ]
    assert torch.equal(y, results[0])
    assert not torch.equal(results[0], results[1])


@every
def test_the_self_check_tells_what_is_rounded_from_what_is_cut(place):
    case = _selfchecks.CONV_CASES[0]
    generator = torch.Generator().manual_seed(0)
    (x, weight, residual), (scale, shift, act), expected = _cuda_checks.INPUTS[conv_by_tma.OP](
        case, torch.float32, generator
    )
    assert act == case.act
    for way, right in ((lambda t: t, True), (cut, False)):
        operands_ = (lay_out(way(x), "nhwc"), lay_out(way(weight), "nhwc"))
        shortcut = lay_out(residual, "nhwc")
        y, _ = run(case, (*operands_, scale, shift, shortcut), index_of(place))
        assert torch.equal(y, expected) == right


@pytest.mark.parametrize("reverse", [False, True])
def test_fewer_tiles_than_blocks_and_more(reverse):
    case, index = NAMED["many"], of("tma_tf32_s128x64_6s_t")  # five tiles of 128 pixels
    given = operands(case, torch.float32)
    for blocks, gpu in ((5, emulated.H200), (2, FEW)):
        y, report = run(case, given, index, gpu=gpu, reverse=reverse, resident_blocks=3)
        assert report["plan"]["blocks"] == blocks and wrong(case, given, y) is None


@every
def test_nan_and_infinity_stay_where_torch_has_them(place):
    """In x, in the shortcut, and in memory beside x that nobody may read."""
    case = NAMED["3x3_dilated"]
    given = list(operands(case, torch.float32, layout="padded"))
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
    given = list(operands(case, torch.float32))
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
    """No bank conflict, in the epilogue either; of memory nothing but what the layer has."""
    given = operands(case, torch.float32)
    y, report = run(case, given, index_of(place), counting=True)
    assert wrong(case, given, y) is None
    assert report["counters"]["bank_conflicts"] == 0
    roof = sum(t.nbytes for t in (*given, y) if t is not None)
    moved = sum(t["unique_bytes_read"] for t in report["tensors"].values())
    moved += sum(t["unique_bytes_written"] for t in report["tensors"].values())
    assert 0.999 * roof <= moved <= 1.1 * roof, report["tensors"]
    assert report["counters"]["global_store_bytes_asked"] == y.nbytes


@pytest.mark.parametrize("name", ["x", "weight", "residual", "out"])
@pytest.mark.parametrize("layout", ["nchw", "unaligned"])
def test_a_tensor_that_tma_cannot_take_is_named(name, layout):
    given = tensors_of(NAMED["3x3"], torch.float32)
    given[name] = lay_out(given[name], layout)
    adjacent = f"{name}: its channels are not adjacent"
    said = adjacent if layout == "nchw" else f"{name}: address is "
    made = problem(**given, dtype="float32")
    for index in tf32_tiles():
        with pytest.raises(ValueError, match=said) as error:
            planned(made, index)
        assert tf32_tiles()[index]["name"] in str(error.value)
    # Left to the chooser, mma.sync serves it and says why.
    chosen = planned(made)
    assert chosen["configuration"] not in tf32_tiles() and f"no TMA: {said}" in chosen["why"]


FAR = ConvCase("far", 1, 4, 3, 300, 4, 3, 3, padding=(1, 1))


@pytest.mark.parametrize(
    ("case", "changes", "said"),
    [
        (FAR, {"dilation": (1, 128)}, "dilation: taps 256 pixels apart"),
        (FAR, {"padding": (129, 1)}, "padding: 129"),
        (FAR, {"stride": (1, 9)}, "stride: 9"),
        (ConvCase("c", 1, 6, 5, 5, 8), {}, "x: strides"),
        (ConvCase("k", 1, 8, 5, 5, 10), {}, "out: strides"),
        (ConvCase("g", 1, 32, 5, 5, 32, groups=2), {}, "groups: 16 channels of each"),
        (FAR, {"allow_tf32": False}, "TF32 is not allowed"),
    ],
    ids=lambda value: value.name if isinstance(value, ConvCase) else None,
)
def test_a_problem_that_tma_cannot_take_is_refused_in_words(case, changes, said):
    given = {**tensors_of(case, torch.float32), "residual": None}
    made = problem(**given, case=case, **{"dtype": "float32", **changes})
    for index in tf32_tiles():
        with pytest.raises(ValueError, match=said):
            planned(made, index)


def test_each_dtype_has_its_own_and_hears_nothing_of_the_others():
    case = NAMED["3x3"]
    for dtype, others, said in (
        (torch.bfloat16, tf32_tiles(), "dtype: 16 bits; this configuration is for float32"),
        (torch.float32, tiles(), "dtype: float32 is not served"),
    ):
        made = problem(**tensors_of(case, dtype), case=case, dtype=emulated.TYPE_NAMES[dtype])
        for index in others:
            with pytest.raises(ValueError, match=said):
                planned(made, index)
        assert "dtype" not in planned(made)["why"] and "TMA" not in planned(made)["why"]


def test_splits_and_other_gpus_are_refused():
    made = problem(**tensors_of(NAMED["3x3"], torch.float32), dtype="float32")
    for index in tf32_tiles():
        with pytest.raises(ValueError, match="splits: only 1 is served by TMA"):
            planned(made, index, 2)
        for gpu in (emulated.A100, emulated.RTX3080, (*emulated.H200[:3], 100)):
            with pytest.raises(ValueError, match="for GPUs of capability 9.0"):
                planned(made, index, gpu=gpu)


@pytest.mark.parametrize("batch", [256, 32])
def test_the_layers_of_resnet50_are_served_by_them(batch):
    """All but the stem, and each predicted faster than by mma.sync."""
    taken = set()
    table = emulated_shapes.tiles(conv_by_tma.OP)
    wide = [i for i, tile in enumerate(table) if tile["wide"] and not tile["tma"]]
    wide = [i for i in wide if table[i]["float32"]]
    for case in cases.RESNET50_LAYERS:
        asked = layer(case, batch, torch.float32)
        made = planned(asked)
        if case.c % 4:
            assert made["configuration"] not in tf32_tiles()  # the stem's three channels
            continue
        assert made["configuration"] in tf32_tiles(), (case.name, made["why"])
        assert made["cycles"] < min(planned(asked, index)["cycles"] for index in wide)
        taken.add(table[made["configuration"]]["name"])
    assert len(taken) >= 4, taken


DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "convolutions_sm90.md"


@pytest.mark.parametrize(
    ("batch", "row"),
    [
        (256, "all of ResNet-50's but the stem | {:,} | {:,} |"),
        (32, "the same, 32 images | {:,} | {:,} |"),
        (8, "8 images, the faster one of each | {} | {} |"),
        (1, "1 image, likewise | {} | {} |"),
    ],
)
def test_the_document_has_the_predictions(batch, row):
    table = emulated_shapes.tiles(conv_by_tma.OP)
    others = [i for i, tile in enumerate(table) if tile["wide"] and not tile["tma"]]
    others = [i for i in others if table[i]["float32"]]
    before, now = 0.0, 0.0
    for case in cases.RESNET50_LAYERS:
        if case.c % 4 == 0:
            asked = layer(case, batch, torch.float32)
            before += case.count * min(planned(asked, index)["cycles"] for index in others)
            now += case.count * planned(asked)["cycles"]
    assert row.format(round(before / 1480), round(now / 1480)) in DOCUMENT.read_text()


def test_strided_images_and_outputs_are_right():
    """x within a wider and longer image."""
    case = ConvCase("1x1", 2, 36, 9, 9, 132, residual=True)
    given = list(operands(case, torch.float32))
    room = torch.full((2, 12, 20, 44), torch.nan).permute(0, 3, 1, 2)
    given[0] = room[:, 4:40, 1:10, 2:20:2].copy_(given[0])
    for place in range(CONFIGURATIONS):
        y, report = run(case, tuple(given), index_of(place))
        assert wrong(case, tuple(given), y) is None
        used = {site["instruction"] for site in report["sites"]}
        assert used & {"cp.async.bulk.tensor.im2col", "cp.async.bulk.tensor.im2col.multicast"}


def test_a_launch_counts_its_pixels_in_31_bits():
    case = ConvCase("huge", 1, 4, 224, 224, 4)
    made = planned(layer(case, 100_000, torch.float32), of("tma_tf32_s128x64_6s_t"))
    assert made["launches"] == 3 and made["blocks"] == 132


def test_random_shapes():
    for number in range(8):
        rng = random.Random(number)
        case = ConvCase(
            "random", rng.randint(1, 3), 4 * rng.randint(1, 18), rng.randint(1, 12),
            rng.randint(1, 12), 4 * rng.randint(1, 40), rng.randint(1, 4), rng.randint(1, 4),
            (rng.randint(1, 3), rng.randint(1, 3)), (rng.randint(0, 3), rng.randint(0, 3)),
            (rng.randint(1, 2), rng.randint(1, 2)), 1, rng.random() < 0.5,
            rng.choice(("relu", "none")),
        )  # fmt: skip
        if case.p < 1 or case.q < 1:
            continue
        given = operands(case, torch.float32, layout=rng.choice(("nhwc", "padded")))
        schedule = dataclasses.replace(rng.choice(emulated_shapes.SCHEDULES), seed=number)
        y, _ = run(
            case, given, index_of(number % CONFIGURATIONS), schedule=schedule, gpu=FEW,
            reverse=rng.random() < 0.5,
        )  # fmt: skip
        assert wrong(case, given, y) is None, case
