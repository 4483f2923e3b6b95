"""`stem` by wgmma, emulated: its numbers, costs, refusals and choice, and its faults."""

from __future__ import annotations

import dataclasses
import functools
import os

import emulated
import emulated_shapes
import mutants
import pytest
import torch
from _cuda_stem_rules import StemWgmmaTile  # it lies in tools/, where emulated looks too
from emulated import Schedule
from emulated_stems import DTYPES, run_stem, stem_operands, stem_problem, wrong_stem
from mutants import HOSTILE, Mutant, Trial

from resnet_fused import numerics, roofline
from resnet_fused.cases import StemCase
from resnet_fused.ops import _cuda_stem_checks
from resnet_fused.ops._library import overload

pytestmark = pytest.mark.emulated

WHOLE = os.environ.get("HYPOTHESIS_PROFILE") == "proof"
NAMES = ("tma_56x64_8s", "tma_32x64_8s")
every = pytest.mark.parametrize("place", range(len(NAMES)))
ONE, TWO = ((count, *emulated.H200[1:]) for count in (1, 2))
"""So few multiprocessors that each worker goes through several strips."""

CASES = (
    # Tiles cut on the right, rows of either parity at an image's end, filters of two blocks.
    StemCase("even", 2, 3, 18, 20, 64),
    StemCase("odd", 1, 3, 21, 27, 72, images="uint8"),
    StemCase("large", 1, 3, 97, 131, 64, images="uint8", layout="nchw"),
    # Several tiles of either configuration; filters that are stored one by one.
    StemCase("wide", 1, 3, 9, 470, 20, images="float32", normed=True, layout="nchw"),
    StemCase("whole_tiles", 1, 3, 10, 252, 8, images="float32"),
    StemCase("sliced", 3, 2, 13, 16, 24, normed=True, layout="sliced"),
    StemCase("unaligned", 1, 4, 14, 40, 40, layout="unaligned"),
    StemCase("uneven_padding", 2, 1, 15, 21, 8, padding=(0, 5), layout="nchw"),
    StemCase("pixel", 3, 3, 1, 1, 64, images="uint8"),
)


@functools.cache
def tiles() -> dict[int, dict]:
    """The configurations by wgmma, by index."""
    return {i: tile for i, tile in enumerate(emulated_shapes.tiles("stem")) if tile["tma"]}


def index_of(place: int) -> int:
    return list(tiles())[place]


def run(place, case, operands, **settings):
    """A configuration's result and its report; settings are those of `emulated.using`."""
    settings = {"schedule": Schedule(), "splits": 1, "gpu": TWO, **settings}
    out_scale = settings.pop("out_scale", None)
    with emulated.using(configuration=index_of(place), **settings) as runs:
        y = run_stem(case, operands, out_scale)
    return y, runs.reports[0]


def test_each_configuration_has_a_test_and_fits():
    assert tuple(tile["name"] for tile in tiles().values()) == NAMES
    for tile in tiles().values():
        assert tile["shared_bytes"] <= emulated.H200[1]
        assert StemWgmmaTile(tile["m"]).shared == tile["shared_bytes"]  # what the gates reckon with


@every
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_bit_is_right(place, case):
    """On integers; dtype, schedule, strips and the number of blocks change from case to case."""
    number = CASES.index(case) * len(NAMES) + place
    operands = stem_operands(case, DTYPES[number // 2 % 2], exact=True)
    got, report = run(
        place,
        case,
        operands,
        schedule=dataclasses.replace(emulated.SCHEDULES[number % 9], seed=number),
        gpu=(ONE, TWO, emulated.H200)[number % 3],
        splits=2 if case.h > 6 and number % 4 < 2 else 1,
        resident_blocks=2,
    )
    assert wrong_stem(case, operands, got, exact=True) is None
    most = (1, 2, 132)[number % 3] * -(-case.k // 64)
    assert report["plan"]["blocks"] <= most


@every
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_result_in_e4m3_is_right(place, case):
    """On integers, of which most need rounding and some saturate, and on noise."""
    number = CASES.index(case) * len(NAMES) + place
    for exact, out_scale in ((True, 2.0**-6), (False, 0.01)):
        operands = stem_operands(case, DTYPES[number // 2 % 2], exact=exact)
        schedule = dataclasses.replace(emulated.SCHEDULES[number % 9], seed=number)
        got, _ = run(place, case, operands, schedule=schedule, out_scale=out_scale)
        assert got.dtype is torch.float8_e4m3fn
        assert wrong_stem(case, operands, got, exact=exact, out_scale=out_scale) is None


@every
def test_e4m3_is_rounded_once(place):
    """What lies a little beyond the middle of two numbers of e4m3, 16 bits put into the middle."""
    case = StemCase("once", 2, 3, 19, 34, 24)
    x, weight, scale, shift, norm = stem_operands(case, DTYPES[place], exact=True)
    operands = (x, weight, scale, shift + 2.0**-13, norm)
    got, _ = run(place, case, operands, out_scale=1.0)
    assert wrong_stem(case, operands, got, exact=True, out_scale=1.0) is None


@every
@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_in_e4m3_nan_stays_and_inf_is_the_largest(place, odd):
    case = StemCase("odd", 1, 3, 17, 19, 8)
    operands = stem_operands(case, DTYPES[place], exact=False)
    operands[0][0, 1, 9, 14] = odd
    oracle = numerics.stem_oracle(*operands, *case.geometry)
    got, _ = run(place, case, operands, out_scale=0.01)
    assert torch.equal(got.isnan(), oracle.isnan())
    assert (got.float()[oracle.isposinf()] == 448).all()
    assert not oracle.isfinite().all()


@every
@pytest.mark.parametrize("images", ["same", "float32", "uint8"])
@pytest.mark.parametrize("rounding", ["nearest", "toward_zero"])
def test_noise_is_within_the_bound(place, images, rounding):
    case = StemCase("noise", 2, 3, 19, 70, 24, images=images, normed=images != "same")
    dtype = DTYPES[(place + (rounding == "nearest")) % 2]
    operands = stem_operands(case, dtype, exact=False)
    got, _ = run(place, case, operands, schedule=Schedule("random", "shuffled", rounding, place))
    assert wrong_stem(case, operands, got, exact=False) is None


@every
def test_the_same_bits_under_every_schedule(place):
    """And however strips meet workers: the ring is passed several times."""
    case = StemCase("schedules", 3, 3, 23, 34, 16, images="uint8")
    operands = stem_operands(case, DTYPES[0], exact=False)
    first, _ = run(place, case, operands, gpu=ONE)
    for i, schedule in enumerate(emulated.SCHEDULES):
        schedule = dataclasses.replace(schedule, seed=i)
        ways = {"gpu": (ONE, TWO, emulated.H200)[i % 3], "splits": 1 + i % 4}
        got, _ = run(place, case, operands, schedule=schedule, resident_blocks=2, **ways)
        assert torch.equal(got, first), schedule


@every
def test_strips_go_to_first_workers_then_to_second_ones(place):
    """Six strips and two blocks: the first block takes 0, 2, 4; its neighbour is never run."""
    case = StemCase("walk", 3, 3, 18, 20, 8)
    operands = stem_operands(case, DTYPES[0], exact=True)
    got, report = run(place, case, operands, splits=2, blocks=(0, 0))
    assert report["plan"]["blocks"] == 2
    there = ~got.isnan().all(3).all(1)  # [image, pooled row]: strips of three rows and of two
    expected = torch.tensor([[1, 1, 1, 0, 0]] * 3, dtype=torch.bool)
    assert torch.equal(there, expected)


ODD = (float("nan"), float("inf"), -float("inf"))
PLACES = ((0, 0), (0, 18), (16, 0), (16, 18), (7, 8), (8, 9), (9, 14), (3, 11))
"""Of a 17 x 19 image: its corners, and both parities of row and column."""


@every
@pytest.mark.parametrize("odd", ODD)
def test_nan_and_inf_stay_where_torch_has_them(place, odd):
    """The eighth tap's column of the reduction lies in the image; no 0 * Inf comes of it."""
    case = StemCase("odd", len(PLACES), 3, 17, 19, 8)
    operands = stem_operands(case, DTYPES[place], exact=False)
    for n, (h, w) in enumerate(PLACES):
        operands[0][n, n % 3, h, w] = odd
    oracle = numerics.stem_oracle(*operands, *case.geometry)
    got, _ = run(place, case, operands, splits=2, gpu=ONE)
    for name in ("isnan", "isposinf", "isfinite"):
        assert torch.equal(getattr(got, name)(), getattr(oracle, name)()), name
    assert not got.isfinite().all()
    assert got.isfinite().any()


@every
def test_nan_in_scale_and_weight_reach_their_filters_alone(place):
    case = StemCase("filters", 1, 3, 14, 18, 40)
    x, weight, scale, shift, norm = stem_operands(case, torch.bfloat16, exact=False)
    weight[3, 1, 2, 6], scale[9], shift[37] = (float("nan"),) * 3
    got, _ = run(place, case, (x, weight, scale, shift, norm))
    assert got.isnan().all((0, 2, 3)).nonzero().flatten().tolist() == [3, 9, 37]
    assert got.isnan().any((0, 2, 3)).sum() == 3


@every
@pytest.mark.parametrize("images", ["uint8", "same"])
def test_what_it_costs(place, images):
    """No bank conflict; every byte of memory once; of the cache, halos of tiles twice."""
    case = StemCase("traffic", 1, 3, 48, 224, 64, images=images)
    operands = stem_operands(case, DTYPES[0], exact=True)
    got, report = run(place, case, operands, counting=True, gpu=ONE)
    assert wrong_stem(case, operands, got, exact=True) is None
    counted = report["counters"]
    assert counted["bank_conflicts"] == 0
    tensors = report["tensors"].values()
    moved = sum(t["unique_bytes_read"] + t["unique_bytes_written"] for t in tensors)
    least = roofline.stem_cost(case, DTYPES[0]).bytes
    assert least <= moved <= 1.1 * least
    loads = [site for site in report["sites"] if "stem_rows" in site["file"]]
    asked = sum(site["counters"]["global_load_bytes_asked"] for site in loads)
    image = operands[0].nbytes
    # Two tiles of 64 columns meet at a pooled pixel: the second one begins 124 pixels further, and
    # the first ends 10 behind that.
    assert image <= asked <= image * (1 if place == 0 else 234 / 224)
    # Sixteen filters of a pixel at a time: whole sectors.
    assert counted["global_store_sectors"] * 32 == counted["global_store_bytes_asked"] == got.nbytes
    # A row of the convolution is 14 products, and none is computed twice.
    products = [site for site in report["sites"] if site["instruction"] == "wgmma.bf16"]
    chunks = sum(site["counters"]["shared_load_requests"] for site in products)
    columns = (112, 64)[place]
    assert chunks == 24 * 14 * (64 + columns) // 8 * 2 * (1, 2)[place]


@every
def test_it_may_begin_early(place):
    """Before its wait it reads constants alone, and it lets the next kernel begin."""
    case = CASES[1]
    operands = stem_operands(case, DTYPES[1], exact=True)
    got, _ = run(place, case, operands, flow=(True, True))
    assert wrong_stem(case, operands, got, exact=True) is None


@every
def test_the_self_check_passes_and_bites(place, monkeypatch):
    sample = ("usual", "two_strips", "one_channel", "empty_batch")
    chosen = [case for case in _cuda_stem_checks.CASES if WHOLE or case.name in sample]
    monkeypatch.setattr(_cuda_stem_checks, "CASES", chosen)

    def launch(*given, wish):
        *operands, out = given[:6]
        with emulated.using(configuration=wish[0], splits=wish[1], gpu=ONE):
            out.copy_(overload("stem", emulated.NAME)(*operands, *given[6:]))

    def plan(problem, index, strips):
        x, weight = problem.operands
        geometry = problem.geometry
        case = StemCase("", *x.shape, weight.shape[0], *weight.shape[2:], *geometry[:2])
        case = dataclasses.replace(case, pool=tuple(map(tuple, geometry[2:])))
        try:
            made = stem_problem(**dataclasses.asdict(case))
            emulated.load().stem_plan(made, emulated.H200, index, strips)
        except ValueError:
            return -1
        return index

    _cuda_stem_checks.check_stem(index_of(place), NAMES[place], "cpu", launch, plan)

    def faulty(*given, wish):
        launch(*given, wish=wish)
        if given[5].numel():
            given[5][-1, -1, -1, -1] += 1

    with pytest.raises(ArithmeticError, match="wrong"):
        _cuda_stem_checks.check_stem(index_of(place), NAMES[place], "cpu", faulty, plan)


# Plans


def planned(gpu=emulated.H200, index=-1, strips=0, **changed):
    return emulated.load().stem_plan(stem_problem(**changed), gpu, index, strips)


def test_the_choice():
    large = planned(n=256)
    assert large["configuration"] == index_of(0) and large["splits"] == 1
    assert large["blocks"] == 132 and "tma_56x64_8s" in large["why"]
    # One image: strips and narrow tiles bring most multiprocessors to work.
    assert planned(n=1)["blocks"] >= 100
    assert planned(n=1, index=index_of(1))["blocks"] >= 100
    # 112 pooled columns: four tiles of 64 columns are fewer than three of 112.
    assert planned(n=256, h=448, w=448)["configuration"] == index_of(1)


@pytest.mark.parametrize(
    "gpu",
    [emulated.A100, emulated.RTX3080, emulated.H200[:3], (*emulated.H200[:3], 100)],
    ids=str,
)
def test_no_other_gpu_gets_them(gpu):
    for n in (1, 32, 256):
        made = planned(gpu, n=n)
        assert made["configuration"] not in tiles() and "wgmma" not in made["why"]
    for index in tiles():
        with pytest.raises(ValueError, match="wgmma is for GPUs of capability 9.0"):
            planned(gpu, index)


@every
def test_refusals_say_why(place):
    index = index_of(place)
    with pytest.raises(ValueError, match="7 x 7 with stride 2"):
        planned(index=index, r=3, s=3)
    with pytest.raises(ValueError, match="1 to 4 are possible"):
        planned(index=index, c=5)
    with pytest.raises(ValueError, match="57 strips"):
        planned(index=index, strips=57)
    with pytest.raises(ValueError, match="shared memory"):
        planned((132, 100_000, 233472, 90), index)


# Faults

CHUNKS = 4
FILES = {
    "stem_sm90.cuh", "stem_worker.h", "stem_result.h", "stem_stage.h", "stem_rows.h",
    "image_filters.h", "pipeline.h",
}  # fmt: skip
# (file, the line's text, instruction, fault) -> why the fault does no harm there.
HARMLESS: dict[tuple[str, str, str, str], str] = {
    (
        "stem_sm90.cuh",
        "ptx::sync_warp();  // the staging has been read",
        "bar.warp.sync",
        "skip",
    ): "fibers wait for each other at the next row's shuffles in any case",
} | {
    (
        "stem_worker.h",
        "const uint32_t warp = ptx::shuffle(ptx::kWholeWarp, thread / 32, 0);",
        "shfl.sync.idx",
        fault,
    ): "all lanes have the same value, which is what the shuffle tells the compiler"
    for fault in ("skip", "wrong_lane")
}
# The ring is passed more than once, tiles and strips follow one another; each dtype of images, both
# ways to store.
FAULTY = (
    (1, StemCase("bytes", 1, 3, 26, 134, 64, images="uint8")),
    (1, StemCase("floats", 2, 3, 21, 30, 68, images="float32", normed=True, layout="nchw")),
    (0, StemCase("plain", 1, 4, 23, 61, 12, layout="unaligned")),
)


def trials() -> list[Trial]:
    """Calls that notice faults: on integers under hostile schedules, and on noise."""
    made = []
    for place, case in FAULTY:
        for exact in (True, False):
            dtype = DTYPES[0] if exact else DTYPES[1]
            x, weight, *vectors = stem_operands(case, dtype, exact=exact)
            # Sums of more bits than bfloat16 has.
            operands = (x, 9 * weight if exact else weight, *vectors)
            oracle = numerics.stem_oracle(*operands, *case.geometry)
            bound = numerics.stem_bound(*operands, *case.geometry)
            wrong = mutants._bits(oracle.to(dtype)) if exact else mutants._bound(oracle, bound)
            made += [
                Trial(
                    f"{case.name} exact={exact} {schedule}",
                    functools.partial(run_stem, case, operands),
                    operands,
                    wrong,
                    {
                        "schedule": schedule,
                        "configuration": index_of(place),
                        "splits": 2,
                        "gpu": ONE,
                    },
                )
                for schedule in (HOSTILE if exact else HOSTILE[-1:])
            ]
    return made


@functools.cache
def found() -> dict[Mutant, list[Trial]]:
    """Every mutant, with the trials that reach it. Clean runs pass."""
    return mutants.reached(trials())


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_every_fault_is_noticed(chunk):
    mutants.check(found(), HARMLESS, chunk, CHUNKS)


def test_every_file_takes_part_with_what_it_is_made_of():
    assert {mutant.key[0] for mutant in found()} >= FILES
    assert set(HARMLESS) <= {mutant.key for mutant in found()}
    planted = {(mutant.instruction, mutant.fault) for mutant in found()}
    for wanted in (
        ("mbarrier.try_wait.parity", "skip"), ("mbarrier.arrive", "skip"),
        ("fence.proxy.async", "no_fence"), ("wgmma.a", "lead_off"), ("wgmma.a", "stride_off"),
        ("wgmma.b", "lead_off"), ("wgmma.b", "stride_off"), ("wgmma.wait_group", "wait_one_fewer"),
        ("stmatrix.x4.trans", "row_off"), ("shfl.sync.idx", "wrong_lane"),
        ("griddepcontrol.wait", "skip"),
    ):  # fmt: skip
        assert wanted in planted, wanted
    assert len(found()) > 60
