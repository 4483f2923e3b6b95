"""conv_bn_stats by windows and wgmma, emulated: 3x3 of 128 channels and more, in slices of 64
beside a ring of filters."""

from __future__ import annotations

import dataclasses
import itertools
import random
from pathlib import Path

import emulated
import pytest
import test_emulated_stats as stats_tests
import test_emulated_stats_window as narrow
import torch
from conv_by_tma import DTYPES, FEW
from emulated import Schedule
from test_emulated_conv_window import conv3x3, positions
from test_emulated_stats import call, planned, require, require_stats
from test_emulated_stats_sm90 import by_tma, name_of
from test_emulated_stats_sm90_norm import NAMES as BY_TAP
from test_emulated_stats_window import drawn

from resnet_fused import cases, numerics
from resnet_fused.ops import _cuda_stats_checks

pytestmark = pytest.mark.emulated

NAMES = ("tma_win256x64_2w_6s", "tma_win192x64_2w_6s")
SMALL = NAMES[1]
every = pytest.mark.parametrize("name", NAMES)
both = pytest.mark.parametrize("normed", [False, True])


def deep(name, n, h, w, c=128, k=64):
    """A 3x3 of stride 1 over more than 64 channels."""
    return dataclasses.replace(conv3x3(name, n, h, w, k), c=c)


CASES = (
    deep("column", 3, 7, 1),
    deep("row", 2, 1, 60, 192),
    deep("pixels", 130, 1, 1),
    # Several images in a tile, tiles that end in every kind of place.
    deep("images", 9, 5, 6, 256),
    deep("narrow", 7, 13, 2, 128, 128),
    deep("wide", 1, 5, 90),
    deep("layer2", 1, 14, 28, 128, 128),
    deep("layer4", 5, 7, 7, 320, 192),
    deep("many", 2, 18, 15, 192, 128),
)
NAMED = {case.name: case for case in CASES}


def tiles() -> dict[str, dict]:
    return {name: tile for name, tile in by_tma(window=True).items() if name not in narrow.NAMES}


def run(case, given, name, **settings):
    """y, statistics and report of a configuration."""
    settings = {"schedule": Schedule(), "splits": 1, **settings}
    y, stats, report = call(case, *given, configuration=tiles()[name]["index"], **settings)
    assert report["plan"]["configuration"] == tiles()[name]["index"]
    return y, stats, report


def test_each_configuration_has_a_test_and_fits():
    assert tuple(tiles()) == NAMES
    for tile in tiles().values():
        assert tile["shared_bytes"] <= emulated.H200[1] and not tile["float32"]


@every
@both
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_bit_is_right(name, normed, case):
    """On integers. A slice's filters or channels taken for another's would show, padding taken for
    relu(shift), and positions that are no pixels in the statistics; dtype, schedule and the number
    of blocks change from case to case."""
    number = (2 * CASES.index(case) + normed) * len(NAMES) + NAMES.index(name)
    given = drawn(case, DTYPES[number % 2], normed=normed)
    schedule = dataclasses.replace(emulated.SCHEDULES[number % 9], seed=number)
    few = number % 3 != 0
    y, stats, report = run(
        case, given, name, schedule=schedule, gpu=FEW if few else emulated.H200, resident_blocks=2
    )
    require(case, *given, y, stats)
    count, columns = -(-positions(case) // tiles()[name]["m"]), case.k // 64
    of_column = max(1, (2 if few else 132) // columns)
    assert report["plan"]["blocks"] == columns * min(of_column, count)


@every
def test_noise_is_within_the_bound(name):
    """Not on integers: h is rounded as if it had been stored."""
    for dtype, of in itertools.product(DTYPES, ("images", "narrow")):
        case = NAMED[of]
        given = drawn(case, dtype, exact=False)
        oracle = numerics.conv_bn_stats_oracle(*given, **case.geometry)
        bound = numerics.conv_bn_stats_bound(*given, oracle, **case.geometry)
        y, stats, _ = run(case, given, name, gpu=FEW)
        found = numerics.check_bound(y, oracle, bound)
        assert found.ok, str(found)
        require_stats(y, stats)


@every
@both
def test_what_is_no_number_stays_where_it_is(name, normed):
    """In another slice than the first, beside the ends of rows and images, whose positions the
    neighbours' taps share."""
    case = NAMED["images"]
    places = ((0, 1, 5), (2, 3, 0), (8, 4, 5))
    for value, (n, p, q) in itertools.product((torch.nan, torch.inf), places):
        given = drawn(case, torch.bfloat16, normed=normed)
        given[0][n, 133, p, q] = value
        if normed:
            given[1][0, 133] = 1
        y, _, _ = run(case, given, name, gpu=FEW)
        oracle = numerics.conv_bn_stats_oracle(*given, **case.geometry)
        assert torch.equal(y.isnan(), oracle.isnan())
        assert torch.equal(y.isinf(), oracle.isinf())


@every
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("row", [0, 1], ids=["scale", "shift"])
def test_a_channels_vectors_that_are_no_numbers(name, row, value):
    """A ReLU keeps a NaN, and takes -Inf away; what lies beside an image is zero all the same."""
    case = NAMED["images"]
    given = drawn(case, torch.bfloat16)
    given[1][:2, 70] = 1
    given[1][row, 70] = value
    y, _, _ = run(case, given, name, gpu=FEW)
    oracle = numerics.conv_bn_stats_oracle(*given, **case.geometry)
    assert torch.equal(y.isnan(), oracle.isnan())
    assert torch.equal(y.isinf(), oracle.isinf())


@every
@both
def test_a_filters_nan_is_its_channels_alone(name, normed):
    """It meets the zeros of positions that are no pixels, which are measured nowhere."""
    case = NAMED["images"]
    given = drawn(case, torch.float16, normed=normed)
    given[2][3, 197, 1, 1] = torch.nan
    y, stats, _ = run(case, given, name, gpu=FEW)
    assert y[:, 3].isnan().all() and stats[:, 3].isnan().all()
    rest = [k for k in range(case.k) if k != 3]
    require_stats(y[:, rest], stats[:, rest])


@pytest.mark.parametrize("kind", stats_tests.SPREADS)
def test_statistics_of_hard_values_over_many_tiles(kind):
    """A run keeps them over many tiles, of which each has another number of pixels."""
    dtype, n, h, w = torch.float16, 5, 24, 25
    values = stats_tests.spread_values(kind, 1e3, n * h * w).clamp(-(2**14), 2**14)
    x = values.to(dtype).view(n, 1, h, w).expand(n, 128, h, w)
    weight = torch.zeros(64, 128, 3, 3, dtype=dtype)
    weight[:, 64:, 1, 1] = torch.eye(64, dtype=dtype)  # the second slice is copied
    given = (
        x.contiguous(memory_format=torch.channels_last),
        None,
        weight.contiguous(memory_format=torch.channels_last),
    )
    for multiprocessors in (1, 3):
        gpu = (multiprocessors, *emulated.H200[1:])
        y, stats, report = run(deep("copies", n, h, w), given, SMALL, gpu=gpu)
        assert torch.equal(y, given[0][:, 64:]) and report["plan"]["blocks"] == multiprocessors
        require_stats(y, stats, tiles=2 * multiprocessors)


def test_more_runs_than_a_chunk_and_blocks_of_one_column():
    """Runs in two chunks, of which the last one is cut; two columns of channels."""
    case = deep("many", 5, 45, 60, 128, 128)
    given = drawn(case)
    y, stats, report = run(
        case, given, SMALL, schedule=Schedule("random", "shuffled", seed=3), resident_blocks=7
    )
    runs = min(report["plan"]["blocks"], -(-positions(case) // 192))
    assert report["plan"]["blocks"] % 2 == 0 and runs > 64 + 1
    require(case, *given, y, stats)
    # The chunks' moments in float64 lie behind the runs'.
    assert report["plan"]["workspace_bytes"] >= (8 * runs + 16 * 2) * case.k


def test_more_columns_than_multiprocessors():
    case = deep("columns", 1, 12, 11, 128, 256)
    given = drawn(case)
    y, stats, report = run(case, given, SMALL, gpu=FEW, resident_blocks=3)
    require(case, *given, y, stats)
    assert report["plan"]["blocks"] == 4


@both
def test_the_same_bits_in_every_order(normed):
    case = NAMED["many"]
    given = drawn(case, torch.float16, normed=normed, exact=False)
    for name in NAMES:
        results = [
            run(case, given, name, schedule=order, gpu=(4, *emulated.H200[1:]), resident_blocks=4)
            for order in (Schedule(), Schedule("lazy", "reverse"), Schedule("random", "shuffled"))
        ]
        for y, stats, _ in results[1:]:
            assert torch.equal(y, results[0][0]) and torch.equal(stats, results[0][1])


@every
@both
def test_what_it_costs(name, normed):
    """No bank conflict; each byte of memory that the layer has; L2 is asked for a window's rows of
    each slice, and for a tile's filters."""
    case = deep("stage", 2, 28, 28, 192, 128)
    given = drawn(case, normed=normed)
    y, stats, report = run(case, given, name, counting=True)
    require(case, *given, y, stats)
    assert report["counters"]["bank_conflicts"] == 0
    tensors = report["tensors"]
    assert tensors["x"]["unique_bytes_read"] == given[0].nbytes
    assert tensors["weight"]["unique_bytes_read"] == given[2].nbytes
    assert tensors["y"]["unique_bytes_written"] == y.nbytes
    if normed:
        assert tensors["norm"]["unique_bytes_read"] == 2 * case.c * 4

    def asked(instruction):
        return sum(
            site["counters"]["global_load_bytes_asked"]
            for site in report["sites"]
            if site["instruction"] == instruction
        )

    m, rows = tiles()[name]["m"], {192: 256, 256: 320}[tiles()[name]["m"]]
    count = -(-positions(case) // m) * case.k // 64
    assert asked("cp.async.bulk.tensor.tile") == count * 64 * case.c * 9 * 2
    windows = count * rows * case.c * 2
    # The input's walk of an image has places beside it, which are nobody's bytes.
    assert 0.8 * windows < asked("cp.async.bulk.tensor.im2col") <= windows
    # Each element that a window holds is loaded and stored once, whatever the taps.
    turned = sum(
        site["counters"]["shared_bytes"]
        for site in report["sites"]
        if site["file"].endswith("transform_ring.h") and site["instruction"] == "st.shared"
    )
    assert turned == (windows if normed else 0)


def test_strided_images_are_right():
    """x within a wider and longer image: any strides do."""
    case = NAMED["narrow"]
    x, norm, weight = drawn(case)
    room = torch.full((7, 15, 6, 144), torch.nan, dtype=torch.bfloat16).permute(0, 3, 1, 2)
    given = (room[:, 8:136, 1:14, 1:5:2].copy_(x), norm, weight)
    for name in NAMES:
        y, stats, _ = run(case, given, name, gpu=FEW)
        require(case, *given, y, stats)


def test_random_shapes():
    for number in range(8):
        rng = random.Random(number)
        case = deep(
            "random", rng.randint(1, 9), rng.randint(1, 20), rng.randint(1, 24),
            64 * rng.randint(2, 5), 64 * rng.randint(1, 3),
        )  # fmt: skip
        given = drawn(case, rng.choice(DTYPES), normed=rng.random() < 0.7)
        schedule = dataclasses.replace(rng.choice(emulated.SCHEDULES), seed=number)
        gpu = rng.choice((FEW, (5, *emulated.H200[1:])))
        y, stats, _ = run(case, given, NAMES[number % 2], schedule=schedule, gpu=gpu)
        require(case, *given, y, stats)


# The plan.

LAYERS = {c: deep("layer", 256, side, side, c, c) for c, side in ((128, 28), (256, 14), (512, 7))}


def test_the_widest_rows_that_fit():
    """Of shared memory."""
    widest = {}
    for name, tile in tiles().items():
        for width in range(300, 0, -1):
            case = deep("w", 3, 1, width)
            try:
                planned(case, configuration=tile["index"])
            except ValueError:
                continue
            widest[tile["m"]] = width
            break
        given = drawn(case)
        y, stats, _ = run(case, given, name, schedule=Schedule("random", "shuffled"))
        require(case, *given, y, stats)
    assert widest == {256: 98, 192: 162}


REFUSED = [
    (LAYERS[128], {"dtype": torch.float32}, "dtype: float32 is not served"),
    (LAYERS[128], {"y": 4098}, "out: address is "),
    (deep("k", 1, 5, 5, 128, 72), {}, "channels: 72 of the output; a multiple of 64"),
    (stats_tests.LAYER1, {}, "channels: windows in slices are for 2, 3, .. times 64 in one group"),
    (dataclasses.replace(LAYERS[128], c=160), {}, "windows in slices are for 2, 3, .. times 64"),
    (dataclasses.replace(LAYERS[256], groups=2), {}, "times 64 in one group"),
    (dataclasses.replace(LAYERS[128], stride=(2, 2)), {}, "windows are for filters of 3x3"),
    (cases.ConvCase("1x1", 1, 128, 5, 5, 64), {}, "windows are for filters of 3x3"),
    (deep("wide", 1, 2, 300), {}, "x: rows of 300 pixels take .* of shared memory"),
    (deep("huge", 700_000, 56, 56), {}, "batch: more pixels than a launch counts"),
]


@pytest.mark.parametrize(("case", "changes", "said"), REFUSED, ids=[said for *_, said in REFUSED])
def test_what_they_cannot_take_is_refused_in_words(case, changes, said):
    for name, tile in tiles().items():
        with pytest.raises(ValueError, match=said) as error:
            planned(case, configuration=tile["index"], **changes)
        assert name in str(error.value)
    # Left to the chooser, another kernel serves it, and nothing is said of these.
    made = planned(case, **changes)
    assert name_of(made) not in NAMES and "in one group" not in made["why"]


def test_a_norm_between_two_multiples_of_16():
    case = NAMED["wide"]
    x, _, weight = drawn(case)
    norm = torch.zeros(4 * case.c + 1)[1:].view(4, case.c)
    with pytest.raises(ValueError, match="norm: address is not a multiple of 16"):
        run(case, (x, norm, weight), SMALL)


def test_splits_and_other_gpus_are_refused():
    for tile in tiles().values():
        with pytest.raises(ValueError, match="splits: only 1 is served by TMA"):
            planned(LAYERS[256], configuration=tile["index"], splits=2)
        for gpu in (emulated.A100, (*emulated.H200[:3], 100)):
            with pytest.raises(ValueError, match="for GPUs of capability 9.0"):
                planned(LAYERS[256], configuration=tile["index"], gpu=gpu)
            assert name_of(planned(LAYERS[256], gpu=gpu)) not in NAMES


def test_the_deeper_stages_are_served_by_them():
    """By what is predicted, behind a BatchNorm: by the tile that leaves no short last round, and at
    64 images where the others are ahead no more."""
    chosen = {
        (c, batch): name_of(planned(dataclasses.replace(case, n=batch)))
        for c, case in LAYERS.items()
        for batch in (256, 64, 16)
    }
    taken = {of: name for of, name in chosen.items() if name in NAMES}
    large, small = NAMES
    assert taken == {
        (128, 256): small, (256, 256): large, (512, 256): large,
        (128, 64): small, (256, 64): large, (512, 64): large,
    }  # fmt: skip
    # What is read as it is: blocks that share pixels are ahead of them, or mma.sync by a little.
    for c, case in LAYERS.items():
        assert (name_of(planned(case, prologue=False)) in NAMES) == (c < 256)


def test_the_page_says_what_the_plan_predicts():
    """Thousands of cycles behind a BatchNorm: by tap, by mma.sync, in windows by each."""
    page = (Path(__file__).resolve().parent.parent / "docs" / "training_cuda.md").read_text()
    halo = [i for i, tile in enumerate(stats_tests.configurations()) if tile["window"]]
    by_tap = [by_tma(window=False)[name]["index"] for name in BY_TAP]
    windows = [tile["index"] for tile in tiles().values()]
    for c, case in LAYERS.items():
        cells = []
        for form in (by_tap, range(3), windows, halo):
            cycles = min(planned(case, configuration=i)["cycles"] for i in form)
            cells.append(f"{cycles / 1e3:.0f}")
        assert f"| 3x3, {c} at {case.h} | | {' | '.join(cells)} |" in page, cells


@every
def test_the_self_check_passes(name):
    names = tuple(tile["name"] for tile in emulated.load().conv_bn_stats_configurations())
    _cuda_stats_checks.check(name, "cpu", stats_tests.launch, stats_tests.plan_index, names)
