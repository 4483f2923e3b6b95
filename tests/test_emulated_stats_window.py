"""conv_bn_stats by windows and wgmma, emulated: 3x3 of 64 channels, as they are and behind a
BatchNorm, whose windows are transformed once for all taps."""

from __future__ import annotations

import dataclasses
import itertools
import random
from pathlib import Path

import emulated
import pytest
import test_emulated_stats as stats_tests
import torch
from conv_by_tma import DTYPES, FEW
from emulated import Schedule
from test_emulated_conv_window import CASES, NAMED, conv3x3, positions
from test_emulated_stats import call, operands, planned, require, require_stats
from test_emulated_stats_sm90 import by_tma, name_of
from test_emulated_stats_sm90_norm import NAMES as BY_TAP

from resnet_fused import cases, numerics
from resnet_fused.ops import _cuda_stats_checks

pytestmark = pytest.mark.emulated

NAMES = ("tma_win192x64_2w", "tma_win208x64_2w", "tma_win96x64_2w")
SMALL = NAMES[2]
every = pytest.mark.parametrize("name", NAMES)
both = pytest.mark.parametrize("normed", [False, True])


def tiles() -> dict[str, dict]:
    return {name: tile for name, tile in by_tma(window=True).items() if name in NAMES}


def drawn(case, dtype=torch.bfloat16, *, normed=True, **more):
    """x, norm or None, weight. On integers norm's mean and invstd are NaN: nobody reads them."""
    x, norm, weight = operands(case, dtype, **more)
    return x, norm if normed else None, weight


def run(case, given, name, **settings):
    """y, statistics and report of a configuration."""
    settings = {"schedule": Schedule(), "splits": 1, **settings}
    y, stats, report = call(case, *given, configuration=tiles()[name]["index"], **settings)
    assert report["plan"]["configuration"] == tiles()[name]["index"]
    return y, stats, report


def fits(case, name):
    """Each tile of positions has a pixel."""
    return case.w + 2 < tiles()[name]["m"]


def test_each_configuration_has_a_test_and_fits():
    assert tuple(tiles()) == NAMES
    for tile in tiles().values():
        assert tile["shared_bytes"] <= emulated.H200[1] and not tile["float32"]


@every
@both
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_bit_is_right(name, normed, case):
    """On integers. Padding taken for relu(shift) would show, and positions that are no pixels in
    the statistics; dtype, schedule and the number of blocks change from case to case."""
    number = (2 * CASES.index(case) + normed) * len(NAMES) + NAMES.index(name)
    given = drawn(case, DTYPES[number % 2], normed=normed)
    schedule = dataclasses.replace(emulated.SCHEDULES[number % 9], seed=number)
    few = number % 4 != 0
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
    """Beside the ends of rows and images, whose positions the neighbours' taps share."""
    case = NAMED["images"]
    places = ((0, 1, 5), (2, 3, 0), (8, 4, 5))
    for value, (n, p, q) in itertools.product((torch.nan, torch.inf, -torch.inf), places):
        given = drawn(case, torch.bfloat16, normed=normed)
        given[0][n, 5, p, q] = value
        if normed:
            given[1][0, 5] = 1
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
    given[1][:2, 5] = 1
    given[1][row, 5] = value
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
    given[2][3, 5, 1, 1] = torch.nan
    y, stats, _ = run(case, given, name, gpu=FEW)
    assert y[:, 3].isnan().all() and stats[:, 3].isnan().all()
    rest = [k for k in range(case.k) if k != 3]
    require_stats(y[:, rest], stats[:, rest])


@pytest.mark.parametrize("place", [(0, 0, 0), (4, 3, 2), (8, 4, 5)])
def test_what_holds_an_inf_has_no_mean(place):
    """As torch's, whichever tile and run it is in."""
    case = NAMED["images"]
    x, _, weight = drawn(case, normed=False)
    n, p, q = place
    x[n, 0, p, q] = torch.inf
    weight.fill_(1)
    y, stats, _ = run(case, (x, None, weight), SMALL, gpu=FEW)
    assert y.isinf().any() and stats.isnan().all()


def copying(values, n, h, w, dtype):
    """A 3x3 convolution that copies its channels, and pixels that are such values."""
    case = conv3x3("copies", n, h, w)
    x = values.to(dtype).view(n, 1, h, w).expand(n, 64, h, w)
    weight = torch.zeros(64, 64, 3, 3, dtype=dtype)
    weight[:, :, 1, 1] = torch.eye(64, dtype=dtype)
    return case, (
        x.contiguous(memory_format=torch.channels_last),
        None,
        weight.contiguous(memory_format=torch.channels_last),
    )


@pytest.mark.parametrize("kind", stats_tests.SPREADS)
def test_statistics_of_hard_values_over_many_tiles(kind):
    """A run keeps them over many tiles, of which each has another number of pixels."""
    for dtype, kappa in ((torch.float16, 1e3), (torch.bfloat16, 4.0)):
        values = stats_tests.spread_values(kind, kappa, 5 * 24 * 25).clamp(-(2**14), 2**14)
        case, given = copying(values, 5, 24, 25, dtype)
        for multiprocessors in (1, 5):
            gpu = (multiprocessors, *emulated.H200[1:])
            y, stats, report = run(case, given, SMALL, gpu=gpu)
            assert torch.equal(y, given[0]) and report["plan"]["blocks"] == multiprocessors
            require_stats(y, stats, tiles=2 * multiprocessors)


def test_more_runs_than_a_chunk_and_blocks_of_one_column():
    """Runs in two chunks and three, of which the last one is cut; two columns of channels."""
    case = conv3x3("many", 4, 45, 46)
    for rows in (case, dataclasses.replace(case, n=6, k=128)):
        given = drawn(rows)
        for schedule in (Schedule(), Schedule("random", "shuffled", seed=3)):
            y, stats, report = run(rows, given, SMALL, schedule=schedule, resident_blocks=7)
            columns = rows.k // 64
            runs = min(2 * report["plan"]["blocks"] // columns, -(-positions(rows) // 96))
            assert report["plan"]["blocks"] % columns == 0 and runs > 64 + 1
            require(rows, *given, y, stats)
        # The chunks' moments in float64 lie behind the runs'.
        assert report["plan"]["workspace_bytes"] >= (8 * runs + 16 * 2) * rows.k


def test_runs_that_begin_beside_and_below_an_image():
    """Where no pixel is: what is ahead of a run is counted all the same."""
    for h, w, tile, place in ((5, 17, 1, (5, 6)), (6, 16, 3, (2, 16))):
        case = conv3x3("begins", 3, h, w)
        row, column = divmod(96 * tile, w + 1)
        assert (row % (h + 1), column) == place  # of the run of that number: each has one tile
        given = drawn(case)
        y, stats, _ = run(case, given, SMALL, gpu=FEW)
        require(case, *given, y, stats)


def test_more_columns_than_multiprocessors():
    case = conv3x3("columns", 1, 12, 11, 256)
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
            run(case, given, name, schedule=order, gpu=(5, *emulated.H200[1:]), resident_blocks=4)
            for order in (Schedule(), Schedule("lazy", "reverse"), Schedule("random", "shuffled"))
        ]
        for y, stats, _ in results[1:]:
            assert torch.equal(y, results[0][0]) and torch.equal(stats, results[0][1])


@every
@both
def test_what_it_costs(name, normed):
    """No bank conflict; each byte of memory that the layer has; L2 is asked for a window's rows."""
    case = conv3x3("stage", 2, 28, 56)
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
    asked = sum(
        site["counters"]["global_load_bytes_asked"]
        for site in report["sites"]
        if site["instruction"] == "cp.async.bulk.tensor.im2col"
    )
    factor = {192: 312 / 192, 208: 336 / 208, 96: 216 / 96}[tiles()[name]["m"]]
    assert 0.95 * factor <= asked / given[0].nbytes <= factor
    # Each element that a window holds is loaded and stored once, whatever the taps.
    turned = sum(
        site["counters"]["shared_bytes"]
        for site in report["sites"]
        if site["file"].endswith("transform_ring.h") and site["instruction"] == "st.shared"
    )
    count, m = -(-positions(case) // tiles()[name]["m"]), tiles()[name]["m"]
    assert turned == (count * m * factor * 128 if normed else 0)


def test_strided_images_and_outputs_are_right():
    """x within a wider and longer image: any strides do."""
    case = NAMED["narrow"]
    x, norm, weight = drawn(case)
    room = torch.full((5, 15, 6, 80), torch.nan, dtype=torch.bfloat16).permute(0, 3, 1, 2)
    given = (room[:, 8:72, 1:14, 1:5:2].copy_(x), norm, weight)
    for name in NAMES:
        y, stats, _ = run(case, given, name, gpu=FEW)
        require(case, *given, y, stats)


def test_random_shapes():
    for number in range(9):
        rng = random.Random(number)
        case = conv3x3(
            "random", rng.randint(1, 9), rng.randint(1, 20), rng.randint(1, 24),
            64 * rng.randint(1, 3),
        )  # fmt: skip
        given = drawn(case, rng.choice(DTYPES), normed=rng.random() < 0.7)
        schedule = dataclasses.replace(rng.choice(emulated.SCHEDULES), seed=number)
        gpu = rng.choice((FEW, (5, *emulated.H200[1:])))
        y, stats, _ = run(case, given, NAMES[number % 3], schedule=schedule, gpu=gpu)
        require(case, *given, y, stats)


# The plan.

LAYER1 = stats_tests.LAYER1


def test_the_widest_rows_that_fit():
    """Of shared memory, or so that no tile is all positions between two images."""
    widest = {}
    for name, tile in tiles().items():
        for width in range(300, 0, -1):
            case = conv3x3("w", 3, 1, width)
            try:
                planned(case, configuration=tile["index"])
            except ValueError:
                continue
            widest[tile["m"]] = width
            break
        given = drawn(case)
        y, stats, _ = run(case, given, name, schedule=Schedule("random", "shuffled"))
        require(case, *given, y, stats)
    assert widest == {192: 110, 208: 98, 96: 93}


REFUSED = [
    (LAYER1, {"dtype": torch.float32}, "dtype: float32 is not served"),
    (LAYER1, {"y": 4098}, "out: address is "),
    (conv3x3("k", 1, 5, 5, 72), {}, "channels: 72 of the output; a multiple of 64"),
    (dataclasses.replace(LAYER1, c=128), {}, "windows are for 64 in one group"),
    (dataclasses.replace(LAYER1, c=128, groups=2), {}, "windows are for 64 in one group"),
    (dataclasses.replace(LAYER1, stride=(2, 2)), {}, "windows are for filters of 3x3"),
    (dataclasses.replace(LAYER1, padding=(0, 1)), {}, "windows are for filters of 3x3"),
    (cases.ConvCase("1x1", 1, 64, 5, 5, 64), {}, "windows are for filters of 3x3"),
    (conv3x3("wide", 1, 2, 300), {}, "x: rows of 300 pixels take .* of shared memory"),
    (conv3x3("huge", 700_000, 56, 56), {}, "batch: more pixels than a launch counts"),
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


def test_a_tile_that_might_have_no_pixel_is_refused():
    case = conv3x3("between", 2, 3, 94)
    said = "x: rows of 94 pixels; a tile of 96 positions might hold none"
    with pytest.raises(ValueError, match=said):
        planned(case, configuration=tiles()[SMALL]["index"])


def test_a_norm_between_two_multiples_of_16():
    case = NAMED["images"]
    x, _, weight = drawn(case)
    norm = torch.zeros(4 * 64 + 1)[1:].view(4, 64)
    with pytest.raises(ValueError, match="norm: address is not a multiple of 16"):
        run(case, (x, norm, weight), SMALL)


def test_splits_and_other_gpus_are_refused():
    for tile in tiles().values():
        with pytest.raises(ValueError, match="splits: only 1 is served by TMA"):
            planned(LAYER1, configuration=tile["index"], splits=2)
        for gpu in (emulated.A100, (*emulated.H200[:3], 100)):
            with pytest.raises(ValueError, match="for GPUs of capability 9.0"):
                planned(LAYER1, configuration=tile["index"], gpu=gpu)
            assert name_of(planned(LAYER1, gpu=gpu)) not in NAMES


def test_the_first_stage_is_served_by_them():
    """By what is predicted; at 32 images by the tile that leaves no short last round."""
    for prologue in (False, True):
        chosen = {
            batch: name_of(planned(dataclasses.replace(LAYER1, n=batch), prologue=prologue))
            for batch in (256, 64, 32)
        }
        # What is transformed has to come and be transformed while one tile is multiplied.
        assert chosen == {256: NAMES[0], 64: NAMES[1 if prologue else 2], 32: NAMES[1]}, prologue


def test_the_page_says_what_the_plan_predicts():
    """Thousands of cycles of the first stage: by tap and in windows, each by its best tile."""
    page = (Path(__file__).resolve().parent.parent / "docs" / "training_cuda.md").read_text()
    halo = [i for i, tile in enumerate(stats_tests.configurations()) if tile["window"]]
    by_tap = [by_tma(window=False)[name]["index"] for name in BY_TAP]
    windows = [tile["index"] for tile in tiles().values()]
    cells = []
    for form in (by_tap, range(3), windows, halo):
        cycles = min(planned(LAYER1, configuration=i)["cycles"] for i in form)
        cells.append(f"{cycles / 1e3:.0f}")
    assert f"| 3x3, 64 at 56 | | {' | '.join(cells)} |" in page, cells
    for batch, taken in ((8, False), (16, True)):
        made = planned(dataclasses.replace(LAYER1, n=batch))
        assert (name_of(made) in NAMES) == taken
        assert name_of(planned(dataclasses.replace(LAYER1, n=batch), prologue=False)) not in NAMES


@every
def test_the_self_check_passes(name):
    names = tuple(tile["name"] for tile in emulated.load().conv_bn_stats_configurations())
    _cuda_stats_checks.check(name, "cpu", stats_tests.launch, stats_tests.plan_index, names)
