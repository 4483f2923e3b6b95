"""The CUDA kernels of `stem` and `head` in the emulator: every configuration, layout, schedule.

Of the stem what is for sm_80 and later; tests/test_emulated_stem_sm90.py has what is for sm_90a.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Iterator

import emulated
import emulated_shapes
import pytest
import torch
from emulated import Schedule
from emulated_stems import DTYPES as TYPES
from emulated_stems import run_stem, stem_operands, stem_problem, wrong_stem

from resnet_fused import numerics, roofline
from resnet_fused.cases import HEAD_CASES, STEM_CASES, HeadCase, StemCase
from resnet_fused.ops import _cuda_plan, _cuda_stem, _cuda_stem_checks
from resnet_fused.ops._library import overload
from resnet_fused.ops._selfchecks import _lay_out

pytestmark = pytest.mark.emulated

WHOLE = os.environ.get("HYPOTHESIS_PROFILE") == "proof"
STEM, HEAD = (_cuda_stem_checks.CASES, HEAD_CASES)
LONELY = (1, 232448, 233472, 89)
"""A GPU of one multiprocessor: each block goes through several strips."""
NAMES = {"stem": ("56x64_8w", "28x64_4w", "14x64_4w"), "head": ("16x8_8w", "16x32_8w", "64x32_4w")}
CONFIGURATIONS = [(op, index) for op, names in NAMES.items() for index in range(len(names))]


def head_operands(case: HeadCase, dtype: torch.dtype) -> tuple[torch.Tensor | None, ...]:
    """Noise in the layout of the case."""
    generator = torch.Generator().manual_seed(2)
    x = _lay_out(torch.randn(case.shape, generator=generator).to(dtype), case)
    weight = torch.randn(case.classes, case.c, generator=generator).to(dtype)
    bias = torch.randn(case.classes, generator=generator).to(dtype) if case.bias else None
    return x, weight, bias


def served() -> Iterator[StemCase]:
    """The cases that the kernel is made for, and sizes that leave its tiles overhanging."""
    for case in STEM:
        if (case.r, case.s, case.stride) == (7, 7, (2, 2)) and case.pool[0] == (3, 3):
            yield case
    yield StemCase("odd", 1, 3, 33, 47, 64)
    yield StemCase("uneven_padding", 3, 4, 15, 21, 8, padding=(0, 5))
    yield StemCase("one_channel_7x7", 2, 1, 12, 19, 10, layout="nchw", padding=(5, 0))
    yield StemCase("unaligned_filters", 1, 2, 14, 13, 20, normed=True, layout="unaligned")
    if WHOLE:
        yield StemCase("large_bytes", 1, 3, 97, 131, 64, images="uint8", layout="nchw")
        yield StemCase("large", 3, 3, 97, 131, 72, normed=True)


def test_the_tables_hold_what_the_tests_go_through():
    for op, names in NAMES.items():
        table = [one["name"] for one in emulated_shapes.tiles(op) if not one["tma"]]
        assert tuple(table) == names


OUT_SCALE = 2.0**-6
"""Of results in e4m3: of the integers' most need rounding, and some saturate."""
ODD = (float("nan"), float("inf"), -float("inf")) if WHOLE else (float("nan"), float("inf"))
PLACES = ((0, 0), (0, 18), (16, 0), (16, 18), (7, 8), (8, 9), (9, 14), (3, 11))
"""Of a 17 x 19 image: its corners, and both parities of row and column."""


@pytest.mark.parametrize("half", range(2) if WHOLE else [0])
@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("case", list(served()), ids=str)
def test_stem_is_exact_on_integers(case, index, half):
    """Also where blocks go through several strips, tiles and images; a dtype each, or both."""
    dtype = TYPES[(emulated.drawn(case.name, index) + half) % 2]
    operands = stem_operands(case, dtype, exact=True)
    for splits in (1, 2):
        settings = {"configuration": index, "splits": splits, "gpu": LONELY}
        try:
            with emulated.using(**settings) as runs:
                got = run_stem(case, operands)
        except ValueError:
            assert splits == 2 and case.h <= 6, "only few rows make no two strips"
            continue
        assert wrong_stem(case, operands, got, exact=True) is None
        blocks = runs.reports[0]["plan"]["blocks"]
        assert blocks <= 2 * math.ceil(case.k / 64)


@pytest.mark.parametrize("rounding", ["nearest", "toward_zero"])
@pytest.mark.parametrize("images", ["same", "float32", "uint8"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_stem_stays_within_its_bound(dtype, images, rounding):
    case = StemCase("noise", 2, 3, 19, 30, 24, images=images, normed=images != "same")
    operands = stem_operands(case, dtype, exact=False)
    for index in range(3):
        schedule = Schedule(rounding=rounding)
        with emulated.using(configuration=index, splits=1, schedule=schedule):
            got = run_stem(case, operands)
        assert wrong_stem(case, operands, got, exact=False) is None


@pytest.mark.parametrize("case", list(served()), ids=str)
def test_a_result_in_e4m3_is_right(case):
    """On integers, of which most need rounding and some saturate, and on noise."""
    draw = emulated.drawn(case.name)
    for exact in (True, False):
        operands = stem_operands(case, TYPES[(draw + exact) % 2], exact=exact)
        settings = {"configuration": draw % 3, "splits": 1, "gpu": LONELY}
        with emulated.using(**settings, schedule=emulated.SCHEDULES[draw % 9]):
            got = run_stem(case, operands, OUT_SCALE)
        assert got.dtype is torch.float8_e4m3fn
        assert wrong_stem(case, operands, got, exact=exact, out_scale=OUT_SCALE) is None


@pytest.mark.parametrize("rounding", ["nearest", "toward_zero"])
@pytest.mark.parametrize("index", range(3))
def test_e4m3_is_rounded_once_and_saturates(index, rounding):
    """Scales of no power of two; and what lies a little beyond the middle of two numbers of e4m3,
    which 16 bits put into the middle.
    """
    case = StemCase("noise", 2, 3, 19, 30, 24)
    operands = stem_operands(case, torch.bfloat16, exact=False)
    most = float(numerics.stem_oracle(*operands, *case.geometry).max())
    for out_scale in (most / 448 / 3, most / 448, most):
        schedule = Schedule(rounding=rounding)
        with emulated.using(configuration=index, splits=2, schedule=schedule):
            got = run_stem(case, operands, out_scale)
        assert wrong_stem(case, operands, got, exact=False, out_scale=out_scale) is None
        assert bool((got.float() == 448).any()) is (out_scale < most)
    x, weight, scale, shift, norm = stem_operands(case, torch.bfloat16, exact=True)
    operands = (x, weight, scale, shift + 2.0**-13, norm)
    with emulated.using(configuration=index, splits=1):
        got = run_stem(case, operands, 1.0)
    assert wrong_stem(case, operands, got, exact=True, out_scale=1.0) is None


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("index", range(3))
def test_in_e4m3_nan_stays_and_inf_is_the_largest(index, odd):
    case = StemCase("odd", len(PLACES), 3, 17, 19, 8)
    operands = stem_operands(case, torch.float16, exact=False)
    for n, (h, w) in enumerate(PLACES):
        operands[0][n, n % 3, h, w] = odd
    oracle = numerics.stem_oracle(*operands, *case.geometry)
    with emulated.using(configuration=index, splits=2, gpu=LONELY):
        got = run_stem(case, operands, OUT_SCALE).float()
    assert torch.equal(got.isnan(), oracle.isnan()) and oracle.isnan().any() == math.isnan(odd)
    assert (got[oracle.isposinf()] == 448).all()


@pytest.mark.parametrize("schedule", emulated.SCHEDULES, ids=str)
def test_every_schedule_gives_the_same_bits(schedule):
    case = StemCase("schedules", 2, 3, 15, 34, 16, images="uint8")
    operands = stem_operands(case, torch.bfloat16, exact=False)
    head = head_operands(HeadCase("schedules", 5, 72, 3, 3, 19), torch.float16)
    for index in range(3):
        found = []
        for one in (Schedule(), dataclasses.replace(schedule, seed=index)):
            with emulated.using(configuration=index, splits=1, gpu=LONELY, schedule=one):
                found.append((run_stem(case, operands), overload("head", emulated.NAME)(*head)))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("index", range(3))
def test_nan_and_inf_stay_where_torch_has_them(index, odd):
    """The eighth tap's column of the reduction lies in the image; no 0 * Inf comes of it."""
    case = StemCase("odd", len(PLACES), 3, 17, 19, 8)
    operands = stem_operands(case, torch.float16, exact=False)
    for n, (h, w) in enumerate(PLACES):
        operands[0][n, n % 3, h, w] = odd
    oracle = numerics.stem_oracle(*operands, *case.geometry)
    with emulated.using(configuration=index, splits=2, gpu=LONELY):
        got = run_stem(case, operands)
    for name in ("isnan", "isposinf", "isfinite"):
        assert torch.equal(getattr(got, name)(), getattr(oracle, name)()), name
    assert not got.isfinite().all()
    assert got.isfinite().any()


def test_nan_in_scale_and_weight_reach_their_filters_alone():
    case = StemCase("filters", 1, 3, 14, 18, 24)
    x, weight, scale, shift, norm = stem_operands(case, torch.bfloat16, exact=False)
    weight[3, 1, 2, 6], scale[9], shift[17] = (float("nan"),) * 3
    got = run_stem(case, (x, weight, scale, shift, norm))
    assert got.isnan().all((0, 2, 3)).nonzero().flatten().tolist() == [3, 9, 17]
    assert got.isnan().any((0, 2, 3)).sum() == 3


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("index", range(3))
def test_the_head_stays_within_its_bound(index, dtype):
    more = (
        HeadCase("groups", 3, 200, 7, 7, 45),
        HeadCase("images", 70, 72, 3, 5, 40, layout="nchw"),
        HeadCase("unaligned", 2, 64, 2, 3, 9, layout="unaligned"),
    )
    for case in (*HEAD, *more):
        operands = head_operands(case, dtype)
        with emulated.using(configuration=index, splits=1):
            got = overload("head", emulated.NAME)(*operands)
        oracle, bound = (f(*operands) for f in (numerics.head_oracle, numerics.head_bound))
        check = numerics.check_bound(got, oracle, bound)
        assert check.ok, (case.name, str(check))


def test_the_head_takes_any_strides_of_its_weight():
    x, weight, bias = head_operands(HeadCase("strides", 2, 64, 2, 2, 9), torch.float16)
    expected = overload("head", emulated.NAME)(x, weight, bias)
    wide = torch.full((9, 65), float("nan"), dtype=torch.float16)
    wide[:, 1:] = weight
    for other in (weight.t().contiguous().t(), wide[:, 1:]):
        with emulated.using(configuration=0, splits=1):
            got = overload("head", emulated.NAME)(x, other, bias)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("index", range(3))
def test_a_head_of_nan_is_nan_in_its_image_alone(index):
    x, weight, bias = head_operands(HeadCase("nan", 4, 40, 3, 3, 12), torch.bfloat16)
    x[2, 39, 1, 2] = float("inf")
    weight[5, 0] = float("nan")
    with emulated.using(configuration=index, splits=1):
        got = overload("head", emulated.NAME)(x, weight, bias)
    expected = torch.zeros(4, 12, dtype=torch.bool)
    expected[2], expected[:, 5] = True, True
    assert torch.equal(~got.isfinite(), expected)


def test_a_head_of_no_channels_is_its_bias():
    x, weight, bias = torch.ones(2, 0, 2, 2), torch.ones(3, 0), torch.tensor([1.0, 2.0, 3.0])
    got = overload("head", emulated.NAME)(x.half(), weight.half(), bias.half())
    assert torch.equal(got, bias.half().expand(2, 3))


@pytest.mark.parametrize(("op", "index"), CONFIGURATIONS)
def test_no_bank_conflicts_anywhere(op, index):
    case = StemCase("banks", 1, 3, 20, 150, 64, images="uint8")
    with emulated.using(configuration=index, splits=1, counting=True) as runs:
        if op == "stem":
            run_stem(case, stem_operands(case, torch.bfloat16, exact=True))
        else:
            overload(op, emulated.NAME)(
                *head_operands(HeadCase("banks", 64, 512, 2, 2, 64), torch.float16)
            )
    report = runs.reports[0]
    assert report["counters"]["shared_wavefronts"] > 0
    costly = {
        (site["file"], site["line"], site["instruction"]): site["counters"]["bank_conflicts"]
        for site in report["sites"]
        if site["counters"]["bank_conflicts"]
    }
    assert not costly


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("images", ["uint8", "same"])
def test_the_stem_moves_little_more_than_it_must(index, images):
    """Every byte of memory once; of the cache halos twice: columns of tiles, rows of strips."""
    case = StemCase("traffic", 1, 3, 56, 224, 64, images=images)
    operands = stem_operands(case, torch.bfloat16, exact=True)
    with emulated.using(configuration=index, splits=1, counting=True) as runs:
        run_stem(case, operands)
    report = runs.reports[0]
    moved = sum(
        tensor["unique_bytes_read"] + tensor["unique_bytes_written"]
        for tensor in report["tensors"].values()
    )
    least = roofline.stem_cost(case, torch.bfloat16).bytes
    assert least <= moved <= 1.1 * least
    loads = [site for site in report["sites"] if "stem_loader" in site["file"]]
    asked = sum(site["counters"]["global_load_bytes_asked"] for site in loads)
    columns = NAMES["stem"][index].split("x")[0]
    tiles = 56 // int(columns)
    halo = tiles * (4 * int(columns) + 10) / 224  # 10 pixels a tile belong to two
    image = operands[0]
    assert image.nbytes <= asked <= halo * image.nbytes
    stores = report["counters"]
    # Eight filters of a pixel at a time, four such side by side: whole sectors.
    assert stores["global_store_sectors"] * 32 == stores["global_store_bytes_asked"]


def test_the_head_reads_everything_once():
    case = HeadCase("traffic", 16, 256, 7, 7, 32)
    operands = head_operands(case, torch.bfloat16)
    with emulated.using(configuration=1, splits=1, counting=True) as runs:
        overload("head", emulated.NAME)(*operands)
    tensors = runs.reports[0]["tensors"]
    for name, t in zip(("x", "weight", "bias"), operands, strict=True):
        assert t is not None
        assert tensors[name]["unique_bytes_read"] == t.nbytes
    moved = sum(
        tensor["unique_bytes_read"] + tensor["unique_bytes_written"] for tensor in tensors.values()
    )
    least = roofline.head_cost(case.shape, case.classes, torch.bfloat16).bytes
    mean = 2 * case.n * case.c * 2  # written once, and read
    assert moved == least + mean
    counters = runs.reports[0]["counters"]
    row = case.classes * 2  # bytes: of a row of results, and of the bias, which each image reads
    read = least - case.n * row + mean // 2 + (case.n - 1) * row
    assert counters["global_load_bytes_asked"] == read


# Plans, and what the kernels are not made for.


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"r": 3, "s": 3}, "7 x 7 with stride 2"),
        ({"stride": (2, 1)}, "7 x 7 with stride 2"),
        ({"pool": ((2, 2), (2, 2), (0, 0))}, "3 x 3 with stride 2 and padding 1"),
        ({"pool": ((3, 3), (1, 1), (1, 1))}, "3 x 3 with stride 2 and padding 1"),
        ({"c": 5}, "1 to 4 are possible"),
        ({"h": 1 << 29}, "below 2\\^29"),
        ({"n": 1 << 28, "w": 4000}, "more than a launch can take"),
    ],
)
def test_what_the_stem_is_not_made_for_has_a_reason(changed, message):
    with pytest.raises(ValueError, match=message):
        emulated.load().stem_plan(stem_problem(**changed), emulated.H200)


def test_the_stems_plan():
    plan = emulated.load().stem_plan
    older = emulated.H200[:3]  # of no known capability
    large = plan(stem_problem(n=256), older)
    assert NAMES["stem"][large["configuration"]] == "56x64_8w"
    assert large["splits"] == 1 and large["blocks"] == 132
    # One image: strips and narrow tiles bring most multiprocessors to work.
    single = plan(stem_problem(n=1), older)
    assert single["blocks"] >= 100
    assert "strips an image: least predicted time" in single["why"]
    for gpu in (emulated.A100, emulated.RTX3080):
        assert plan(stem_problem(), gpu)["blocks"] >= gpu[0] // 2
    with pytest.raises(ValueError, match="57 strips"):
        plan(stem_problem(), emulated.H200, 0, 57)
    with pytest.raises(ValueError, match="configuration 5"):
        plan(stem_problem(), emulated.H200, 5)
    with pytest.raises(ValueError, match="shared memory"):
        plan(stem_problem(), (132, 1024, 233472))


def test_the_heads_plan():
    def problem(n: int, **changed):
        return emulated.load().Head(
            **{
                "dtype": "bfloat16", "x": 0, "weight": 0, "bias": 0, "out": 0, "classes": 1000,
                "x_size": (n, 2048, 7, 7), "x_stride": (100352, 1, 14336, 2048),
                "weight_stride": (2048, 1), "dependent": False, "follows": False, **changed,
            }
        )  # fmt: skip

    plan = emulated.load().head_plan
    assert NAMES["head"][plan(problem(1), emulated.H200)["configuration"]] == "16x8_8w"
    assert NAMES["head"][plan(problem(256), emulated.H200)["configuration"]] == "64x32_4w"
    assert plan(problem(8), emulated.H200)["workspace_bytes"] == 8 * 2048 * 2
    for changed, message in (
        ({"dtype": "float32"}, "bfloat16 and float16"),
        ({"x_size": (1, 8, 0, 3)}, "there is to be a pixel"),
        ({"x_size": (1 << 21, 8, 1, 1)}, "more than a launch"),
    ):
        with pytest.raises(ValueError, match=message):
            plan(problem(1, **changed), emulated.H200)
    with pytest.raises(ValueError, match="2 splits"):
        plan(problem(1), emulated.H200, -1, 2)


# The self-checks that admit the kernels, on the emulator in place of a GPU.


@pytest.mark.parametrize("index", range(3))
def test_the_self_check_of_the_stem_passes_and_bites(index, monkeypatch):
    sample = ("usual", "two_strips", "one_channel", "empty_batch")
    if not WHOLE:
        chosen = [case for case in STEM if case.name in sample]
        monkeypatch.setattr(_cuda_stem_checks, "CASES", chosen)
    ran = []

    def launch(*given, wish):
        *operands, out = given[:6]
        with emulated.using(configuration=wish[0], splits=wish[1], gpu=LONELY):
            out.copy_(overload("stem", emulated.NAME)(*operands, *given[6:]))
        ran.append(wish)

    def plan(problem: _cuda_plan.Problem, index: int, strips: int) -> int:
        x, weight = problem.operands
        assert x is not None and weight is not None
        geometry = problem.geometry
        case = StemCase("", *x.shape, weight.shape[0], *weight.shape[2:], *geometry[:2])
        case = dataclasses.replace(case, pool=tuple(map(tuple, geometry[2:])))
        try:
            emulated.load().stem_plan(
                stem_problem(**dataclasses.asdict(case)), emulated.H200, index, strips
            )
        except ValueError:
            return -1
        return index

    name = NAMES["stem"][index]
    _cuda_stem_checks.check_stem(index, name, "cpu", launch, plan)
    assert len(set(ran)) == 2

    def faulty(*given, wish):
        launch(*given, wish=wish)
        if given[5].numel():
            given[5][-1, -1, -1, -1] += 1

    with pytest.raises(ArithmeticError, match="wrong"):
        _cuda_stem_checks.check_stem(index, name, "cpu", faulty, plan)
    with pytest.raises(ArithmeticError, match="no case"):
        _cuda_stem_checks.check_stem(index, name, "cpu", launch, lambda *given: -1)


@pytest.mark.parametrize("index", range(3))
def test_the_self_check_of_the_head_passes(index):
    def launch(x, weight, bias, out, *, wish):
        with emulated.using(configuration=wish[0], splits=wish[1]):
            out.copy_(overload("head", emulated.NAME)(x, weight, bias))

    _cuda_stem_checks.check_head(index, NAMES["head"][index], "cpu", launch)

    def faulty(x, weight, bias, out, *, wish):
        if out.numel():
            launch(x.roll(1, 1), weight, bias, out, wish=wish)

    with pytest.raises(ArithmeticError, match="wrong"):
        _cuda_stem_checks.check_head(index, NAMES["head"][index], "cpu", faulty)


def test_problems_are_what_the_plans_take():
    x, weight = torch.empty(2, 3, 16, 16), torch.empty(64, 3, 7, 7)
    case = STEM_CASES[0]
    problem = _cuda_stem.stem_problem(x, weight, case.geometry, weight)
    assert problem.op == "stem" and list(problem.geometry) == list(case.geometry)
    assert _cuda_stem.head_problem(x, weight, weight).geometry == ()
    assert all(isinstance(pair, list) for pair in itertools.chain(problem.geometry))
