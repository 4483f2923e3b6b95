"""conv_wgrad by TMA and wgmma, emulated: its numbers, its costs, and what it refuses."""

from __future__ import annotations

import dataclasses
import itertools
import random

import emulated
import pytest
import torch
from dgrad_by_tma import DTYPES, FEW, layer, operands, problem, tensors_of
from emulated import Schedule
from emulated_shapes import lay_out
from wgrad_by_tma import CASES, expected, planned, run, sharing, tiles, wrong

from resnet_fused import cases, numerics
from resnet_fused.cases import ConvCase

pytestmark = pytest.mark.emulated

CONFIGURATIONS = 9
every = pytest.mark.parametrize("place", range(CONFIGURATIONS))
NAMED = {case.name: case for case in CASES}


def index_of(place: int) -> int:
    return list(tiles())[place]


def steps_of(case: ConvCase) -> int:
    return -(-case.n * case.p * case.q // 64)


def test_each_configuration_has_a_test_and_fits():
    assert len(tiles()) == CONFIGURATIONS
    for tile in tiles().values():
        assert tile["shared_bytes"] <= emulated.H200[1]
        assert tile["name"].startswith("tma_") and not tile["float32"]


@every
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_bit_is_right(place, case):
    """On integers; dtype, schedule, splits and the result's layout change from case to case."""
    number = CASES.index(case) * CONFIGURATIONS + place
    given = list(operands(case, DTYPES[number % 2]))
    if number % 3 == 0:
        given[3] = lay_out(given[3], "nchw")
    schedule = dataclasses.replace(emulated.SCHEDULES[number % 9], seed=number)
    splits = min(1 + (number + place) % 3, steps_of(case))
    if splits * -(-steps_of(case) // splits) >= steps_of(case) + -(-steps_of(case) // splits):
        splits = 1  # no work for the last one
    got, report = run(case, tuple(given), index_of(place), schedule=schedule, splits=splits)
    assert wrong(case, tuple(given), got) is None
    plan, tile = report["plan"], tiles()[index_of(place)]
    columns = -(-case.c // case.groups // 64) * 64 * case.r * case.s
    rows, width = -(-case.k // case.groups // tile["m"]), -(-columns // tile["n"])
    left, right = sharing(tile)
    clusters = -(-rows // right) * -(-width // left) * case.groups
    assert plan["blocks"] == clusters * left * right * splits
    # Blocks behind the last tile leave nothing.
    parts = rows * width * case.groups * splits
    assert plan["workspace_bytes"] == parts * tile["m"] * tile["n"] * 4


@every
@pytest.mark.parametrize("rounding", ["nearest", "toward_zero"])
def test_noise_is_within_the_bound(place, rounding):
    for dtype, name in itertools.product(DTYPES, ("3x3_strided", "1x1")):
        given = operands(NAMED[name], dtype, exact=False)
        schedule = Schedule("random", "shuffled", rounding, seed=place)
        got, _ = run(NAMED[name], given, index_of(place), schedule=schedule, splits=2)
        found = numerics.check_bound(got, *expected(NAMED[name], given, rounding))
        assert found.ok, (dtype, name, found)


def test_a_wrong_mask_or_scale_or_tap_is_beyond_the_bound():
    case, index = NAMED["3x3"], index_of(1)
    dy, y, x, weight, scale = given = operands(case, torch.bfloat16, exact=False)
    moved = lay_out(x.roll(1, 3), "nhwc")
    for planted in (
        (dy, None, x, weight, scale), (dy, y, x, weight, scale.roll(1)),
        (dy, y, moved, weight, scale),
    ):  # fmt: skip
        got, _ = run(case, planted, index)
        assert not numerics.check_bound(got, *expected(case, given)).ok


@every
def test_parts_are_added_in_one_order(place):
    """The same bits under every schedule, of parts of which the last has fewest steps."""
    case = ConvCase("parts", 2, 72, 14, 13, 72)  # six steps in four parts of two, two, two, none
    with pytest.raises(ValueError, match="no such parts with work for each"):
        planned(layer(case, 2), index_of(place), 4)
    case = dataclasses.replace(case, h=16)  # seven: two, two, two, one
    given = operands(case, torch.float16, exact=False)
    results = [
        run(case, given, index_of(place), schedule=schedule, splits=4)[0]
        for schedule in (Schedule(), Schedule("lazy", "reverse"), Schedule("random", "shuffled"))
    ]
    assert all(torch.equal(result, results[0]) for result in results[1:])


@every
def test_nan_stays_where_torch_has_it(place):
    """NaN in dy passes the mask or not as eager's, in y it lets pass; beside them nobody reads."""
    case = NAMED["3x3_dilated"]
    dy, y, *rest = operands(case, torch.float16, layout="padded")
    y[0, 3, 4, 5], y[0, 5, 2, 2], y[0, 6, 7, 7] = 1, -1, torch.nan
    dy[0, 3, 4, 5], dy[0, 5, 2, 2], dy[0, 6, 7, 7] = torch.nan, torch.nan, 2
    given = (dy, y, *rest)
    got, _ = run(case, given, index_of(place), schedule=Schedule("lazy", "reverse"))
    oracle, _ = expected(case, given)
    assert oracle.isnan().any() and not oracle.isnan().all()
    assert torch.equal(got.isnan(), oracle.isnan())
    assert torch.equal(got.nan_to_num(), oracle.to(got.dtype).nan_to_num())


@every
@pytest.mark.parametrize("name", ["groups", "narrow_groups"])
def test_a_group_knows_nothing_of_its_neighbour(place, name):
    case = NAMED[name]
    dy, y, x, weight, scale = operands(case, torch.bfloat16)
    k, c = case.k // case.groups, case.c // case.groups
    if y is not None:
        y[:, :k] = 1
    dy[:, :k], x[:, :c] = torch.inf, torch.nan
    given = (dy, y, x, weight, scale)
    got, _ = run(case, given, index_of(place))
    oracle, _ = expected(case, given)
    assert torch.equal(got[k:], oracle[k:].to(got.dtype))
    assert got[:k].isnan().all()


# Layers of ResNet-50, cut down: the same channels, so that a step and a tile are what they are.
LAYERS = (
    ConvCase("layer1.conv2", 1, 64, 16, 12, 64, 3, 3, (1, 1), (1, 1)),
    ConvCase("layer2.conv3", 1, 128, 16, 12, 256),
)


@every
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.name)
def test_what_it_costs(place, case, masked):
    """No bank conflict; of memory nothing but what the layer has, each byte of it."""
    case = dataclasses.replace(case, act="relu" if masked else "none")
    given = operands(case, torch.bfloat16)
    got, report = run(case, given, index_of(place), counting=True)
    assert wrong(case, given, got) is None
    assert report["counters"]["bank_conflicts"] == 0
    dy, y, x, _, scale = given
    tensors = report["tensors"]
    for name, tensor in (("dy", dy), ("y", y), ("x", x), ("scale", scale)):
        if tensor is not None:
            assert tensors[name]["unique_bytes_read"] == tensor.nbytes
    assert tensors["weight"]["unique_bytes_written"] == got.nbytes
    # dy as often as there are tiles of columns, x for each tap and tile of output channels; nothing
    # where a tile has no more columns. Blocks that share ask once.
    tile = tiles()[index_of(place)]
    copies = [s for s in report["sites"] if s["instruction"].startswith("cp.async.bulk.tensor")]
    loaded = sum(site["counters"]["global_load_bytes_asked"] for site in copies)
    of_left, of_right = sharing(tile)
    columns = -(-case.c * case.r * case.s // (tile["n"] * of_left))
    left = dy.nbytes * (2 if masked else 1) * columns
    right = x.nbytes * case.r * case.s * -(-case.k // (tile["m"] * of_right))
    assert 0.8 * right <= loaded - left <= right


NOT_ADJACENT = "its channels are not adjacent"


@pytest.mark.parametrize("name", ["dy", "y", "x"])
@pytest.mark.parametrize("layout", ["nchw", "unaligned"])
def test_a_tensor_that_tma_cannot_take_is_named(name, layout):
    case = NAMED["3x3"]
    given = tensors_of(case)
    given[name] = lay_out(given[name], layout)
    said = f"{name}: " + (NOT_ADJACENT if layout == "nchw" else "address is ")
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
        (FAR, {"padding": (1, 129)}, "padding: 129; up to 128 is accepted"),
        (FAR, {"stride": (1, 9)}, "stride: 9; up to 8 is accepted"),
        (ConvCase("k", 1, 16, 5, 5, 12), {}, "dy: strides"),
        (ConvCase("c", 1, 20, 5, 5, 16), {}, "x: strides"),
    ],
    ids=lambda value: value.name if isinstance(value, ConvCase) else None,
)
def test_a_problem_that_tma_cannot_take_is_refused_in_words(case, changes, said):
    made = problem(tensors_of(case), case, **changes)
    for index in tiles():
        with pytest.raises(ValueError, match=said):
            planned(made, index)


def test_pixels_that_do_not_follow_one_another():
    """dy, y and x within wider and longer images: gathered, and not as rows of one matrix."""
    case = NAMED["1x1"]
    given = list(operands(case, torch.bfloat16))
    for i, channels in ((0, 72), (1, 72), (2, 136)):
        wide = torch.full((2, 12, 20, 144), torch.nan, dtype=torch.bfloat16).permute(0, 3, 1, 2)
        given[i] = wide[:, 8 : 8 + channels, 1:10, 2:20:2].copy_(given[i])
    for index in tiles():
        got, report = run(case, tuple(given), index)
        assert wrong(case, tuple(given), got) is None
        used = {site["instruction"] for site in report["sites"]}
        assert any("tensor.im2col" in one for one in used)
        assert not any("tensor.tile" in one for one in used)
    tensors = dict(zip(("dy", "y", "x", "weight"), given, strict=False))
    tensors["y"] = lay_out(given[1], "nhwc")
    with pytest.raises(ValueError, match="y: its pixels do not lie as dy's do"):
        planned(problem(tensors, case), index_of(0))


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
        made, few = (planned(layer(case, batch)) for batch in (256, 32))
        if case.c % 8:
            assert made["configuration"] not in tiles() and "no TMA: " in made["why"]
        else:
            assert made["configuration"] in tiles(), (case.name, made["why"])
            taken |= {made["configuration"], few["configuration"]} & set(tiles())
    assert len(taken) == CONFIGURATIONS, taken


def test_sums_run_over_the_whole_batch_in_one_launch():
    case = ConvCase("huge", 1, 8, 224, 224, 8)
    assert planned(layer(case, 40_000), index_of(2))["launches"] == 1
    with pytest.raises(ValueError, match="more tiles or pixels than a launch can have"):
        planned(layer(case, 50_000), index_of(2))


def test_random_shapes():
    for number in range(18):
        rng = random.Random(number)
        case = ConvCase(
            "random", rng.randint(1, 3), 8 * rng.randint(1, 20), rng.randint(1, 12),
            rng.randint(1, 12), 8 * rng.randint(1, 20), rng.randint(1, 4), rng.randint(1, 4),
            (rng.randint(1, 3), rng.randint(1, 3)), (rng.randint(0, 3), rng.randint(0, 3)),
            (rng.randint(1, 2), rng.randint(1, 2)), 1, False, rng.choice(("relu", "none")),
        )  # fmt: skip
        if case.p < 1 or case.q < 1:
            continue
        given = operands(case, rng.choice(DTYPES), layout=rng.choice(("nhwc", "padded")))
        schedule = dataclasses.replace(rng.choice(emulated.SCHEDULES), seed=number)
        got, _ = run(
            case, given, index_of(number % CONFIGURATIONS), schedule=schedule, splits=0, gpu=FEW
        )
        assert wrong(case, given, got) is None, case
