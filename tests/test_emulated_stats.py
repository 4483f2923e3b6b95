"""conv_bn_stats in CUDA, emulated: configurations, chunks of tiles, launches, costs, the plan."""

from __future__ import annotations

import dataclasses

import emulated
import emulated_stats
import pytest
import torch
from emulated import Schedule
from matrix import SPREADS, conv_arguments, spread_values

from resnet_fused import cases, numerics
from resnet_fused.ops import _cuda_plan, _cuda_stats, _cuda_stats_checks
from resnet_fused.ops import _training_checks_stats as checks
from resnet_fused.ops._library import overload

pytestmark = pytest.mark.emulated

DTYPES = emulated_stats.DTYPES
SMALL = cases.ConvCase("small", 2, 72, 7, 6, 72, 3, 3, (1, 1), (1, 1))
# More than a tile of every configuration along M and N, and nothing a multiple of a tile.
LARGE = cases.ConvCase("large", 2, 40, 13, 11, 136, 3, 3, (1, 1), (1, 1))
STRIDED = cases.ConvCase("strided", 2, 24, 11, 9, 40, 3, 3, (2, 2), (1, 1))
# Three chunks of the tiles of 64 pixels, the last of which is cut.
MANY = cases.ConvCase("many", 6, 8, 38, 37, 8)
NARROW = 4


def configurations() -> list[dict]:
    """Those for sm_80 and later; tests/test_emulated_stats_sm90.py has what is for sm_90a."""
    table = emulated.load().conv_bn_stats_configurations()
    return [tile for tile in table if not tile["tma"]]


def served(case, dtype=torch.bfloat16) -> dict[int, dict]:
    """The configurations for a case: windows are for some, and hold float32 where its tile fits.

    tests/test_emulated_stats_halo.py has what the others are refused with, and
    tests/test_emulated_stats_image.py what is for images."""
    plain = (case.r, case.s, case.stride, case.padding, case.dilation)
    return {
        index: tile
        for index, tile in enumerate(configurations())
        if (plain == (3, 3, (1, 1), (1, 1), (1, 1)) or not tile["window"])
        and not tile["image"]
        and (dtype != torch.float32 or tile["float32"])
    }


def operands(case, dtype, *, exact=True, layout=torch.channels_last):
    """x, norm, weight."""
    if exact:
        x, norm, weight = checks.exact_operands(case, dtype)
    else:
        x, weight = (torch.randn(s).to(dtype) for s in (case.input_shape, case.weight_shape))
        norm = torch.randn(4, case.c)
    return x.contiguous(memory_format=layout), norm, weight.contiguous(memory_format=layout)


def call(case, x, norm, weight, **settings):
    """(y, stats, report)."""
    with emulated.using(**settings) as runs:
        y, stats = overload("conv_bn_stats", emulated.NAME)(x, norm, weight, *conv_arguments(case))
    return y, stats, runs.reports[0]


def require_stats(y, stats, tiles=1):
    oracle = numerics.stats_oracle(y)
    found = numerics.check_bound(stats, oracle, numerics.stats_bound(y, oracle, tiles=tiles))
    assert found.ok, str(found)


def require(case, x, norm, weight, y, stats):
    """Every bit of y, and the statistics within their bound."""
    expected = numerics.conv_bn_stats_oracle(x, norm, weight, **case.geometry).to(y.dtype)
    assert torch.equal(y, expected), case.name
    require_stats(y, stats)


@pytest.mark.parametrize("prologue", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_configuration_and_split_is_exact(dtype, prologue):
    x, norm, weight = operands(SMALL, dtype)
    given = (x, norm if prologue else None, weight)
    for index in served(SMALL, dtype):
        for splits in (1, 3):
            schedule = Schedule("lazy", "shuffled", seed=index)
            y, stats, report = call(
                SMALL, *given, configuration=index, splits=splits, schedule=schedule
            )
            assert report["plan"]["configuration"] == index
            assert report["plan"]["splits"] == splits
            require(SMALL, *given, y, stats)


def test_tiles_beside_each_other():
    """More than one tile along each axis, and tiles that are cut."""
    for index, tile in served(LARGE).items():
        given = operands(LARGE, torch.bfloat16)
        y, stats, report = call(
            LARGE, *given, configuration=index, splits=2, resident_blocks=5, schedule=Schedule()
        )
        assert report["plan"]["blocks"] >= 2 * 4, tile["name"]
        require(LARGE, *given, y, stats)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_groups_and_layouts(layout):
    case = cases.ConvCase("groups", 2, 48, 7, 6, 96, 3, 3, (2, 1), (1, 2), (1, 2), 6)
    given = operands(case, torch.float16, layout=layout)
    for index, tile in served(case).items():
        if tile["wide"] and layout is torch.contiguous_format:
            continue
        require(case, *given, *call(case, *given, configuration=index, splits=1)[:2])


def test_chunks_of_tiles_are_merged():
    given = operands(MANY, torch.bfloat16)
    pixels, tile = MANY.n * MANY.h * MANY.w, configurations()[NARROW]
    assert 2 * 64 < -(-pixels // tile["m"]) < 3 * 64 and pixels % tile["m"]
    for schedule in (Schedule(), Schedule("random", "shuffled", seed=3)):
        y, stats, _ = call(
            MANY, *given, configuration=NARROW, splits=1, schedule=schedule, resident_blocks=7
        )
        require(MANY, *given, y, stats)


@pytest.mark.parametrize("kind", SPREADS)
def test_statistics_of_hard_values_over_many_tiles(kind):
    """A 1x1 convolution that copies: y is what is given."""
    case = cases.ConvCase("copies", 1, 1, 74, 74, 1)
    values = spread_values(kind, 1e3, case.h * case.w).view(case.input_shape)
    one = torch.ones(1, 1, 1, 1)
    x = values.round() if kind == "even" else values
    x = (x * 1024).round().clamp(-(2**11), 2**11 - 1) if kind == "apart" else x
    # TF32 keeps eleven bits of what is given; y is measured as it is stored.
    y, stats, _ = call(case, x, None, one, configuration=NARROW, splits=1)
    require_stats(y, stats, tiles=-(-case.h * case.w // 64))


def cut(case, x, norm, weight, index, splits, images):
    """y and statistics by launches of so many images: what a batch beyond 2^31 pixels comes to."""
    module, gpu = emulated.load(), emulated.H200
    y, stats = (
        emulated.Guarded(t)
        for t in (
            torch.empty(case.output_shape, dtype=x.dtype, device="meta").contiguous(
                memory_format=torch.channels_last
            ),
            torch.empty(2, case.k, device="meta"),
        )
    )
    problem = emulated_stats.problem_of(
        x, norm, weight, y.tensor, stats.tensor, *conv_arguments(case)
    )
    count = module.conv_bn_stats_cut_bytes(problem, gpu, index, splits, images)
    memory = emulated.Guarded(torch.empty(count // 4 + 64))
    workspace = memory.tensor[-memory.tensor.data_ptr() % 256 // 4 :][: count // 4]
    written = {"y": y.tensor, "stats": stats.tensor, "workspace": workspace}
    inputs = {"x": x, "norm": norm, "weight": weight}
    with emulated.using(schedule=Schedule("lazy", "reverse")):
        settings = emulated.settings(("cut",), inputs, written)
    module.conv_bn_stats_cut(settings, problem, gpu, index, splits, images, workspace.data_ptr())
    memory.result()
    return y.result(), stats.result()


@pytest.mark.parametrize("splits", [1, 2])
def test_launches_share_the_statistics(splits):
    """In launches of two images: each ends in a tile."""
    case = cases.ConvCase("launches", 5, 16, 9, 8, 24, 3, 3, (1, 1), (1, 1))
    given = operands(case, torch.bfloat16)
    require(case, *given, *cut(case, *given, 2, splits, images=2))


def conflicts(report) -> dict[tuple, int]:
    """The instructions that met bank conflicts, and how many."""
    return {
        (site["file"], site["line"], site["instruction"]): site["counters"]["bank_conflicts"]
        for site in report["sites"]
        if site["counters"]["bank_conflicts"]
    }


@pytest.mark.parametrize("prologue", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_bank_conflicts(dtype, prologue):
    """Of 16-byte loads, ldmatrix, what is turned in place, the output's tile and its moments."""
    x, norm, weight = operands(STRIDED, dtype)
    for index, tile in served(STRIDED).items():
        _, _, report = call(
            STRIDED, x, norm if prologue else None, weight,
            configuration=index, splits=1, counting=True,
        )  # fmt: skip
        assert report["counters"]["shared_wavefronts"] > 0
        assert not conflicts(report), (tile["name"], conflicts(report))


def test_the_same_bits_whichever_block_comes_last():
    x, norm, weight = operands(LARGE, torch.float32, exact=False)
    results = []
    for order in (Schedule(), Schedule("lazy", "reverse"), Schedule("random", "shuffled")):
        results.append(
            call(
                LARGE, x, norm, weight,
                configuration=2, splits=3, schedule=order, resident_blocks=6,
            )[:2]
        )  # fmt: skip
    for y, stats in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(stats, results[0][1])


def test_every_byte_is_read_from_memory_once():
    """Unique bytes are the operands' and the result's; the moments are a few of a hundred more."""
    case = dataclasses.replace(MANY, c=64, n=1)
    x, norm, weight = operands(case, torch.bfloat16)
    y, _, report = call(case, x, norm, weight, configuration=1, splits=1, counting=True)
    tensors = report["tensors"]
    for name, t in (("x", x), ("weight", weight)):
        assert tensors[name]["unique_bytes_read"] == t.nbytes
    # Two of its four rows.
    assert tensors["norm"]["unique_bytes_read"] == norm.nbytes // 2
    assert tensors["y"]["unique_bytes_written"] == y.nbytes
    tiles = -(-case.h * case.w // 128)
    assert tensors["workspace"]["unique_bytes_written"] == tiles * case.k * 8 + 4


def test_nan_beyond_the_last_pixel_is_nobodys():
    """A filter's NaN meets the zeros of rows that do not exist: statistics are NaN of its channel
    alone."""
    x, norm, weight = operands(SMALL, torch.float16)
    weight[3, 5, 1, 1] = float("nan")
    y, stats, _ = call(SMALL, x, norm, weight, configuration=0, splits=1)
    assert y[:, 3].isnan().all() and stats[:, 3].isnan().all()
    rest = [k for k in range(SMALL.k) if k != 3]
    require_stats(y[:, rest], stats[:, rest])


@pytest.mark.parametrize("pixel", [0, 40, 70, 110])
def test_what_holds_an_inf_has_no_mean(pixel):
    """As torch's, whichever tile and band of rows it is in."""
    case = cases.ConvCase("inf", 1, 1, 11, 11, 2)
    x = torch.ones(case.input_shape)
    x.view(-1)[pixel] = float("inf")
    weight = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)
    for index in (NARROW - 1, NARROW):
        _, stats, _ = call(case, x, None, weight, configuration=index, splits=1)
        assert stats.isnan().all()


def test_one_pixel():
    case = cases.ConvCase("pixel", 1, 16, 1, 1, 24)
    given = operands(case, torch.bfloat16)
    for index in served(case):
        y, stats, _ = call(case, *given, configuration=index, splits=1)
        assert torch.equal(stats[0], y.float().flatten())
        assert not stats[1].any()


# The plan.


def problem(case, dtype=torch.bfloat16, prologue=True, address=4096, **changes):
    """A channels_last problem in memory that the plan never touches."""

    def strides(shape):
        _, c, h, w = shape
        return (h * w * c, 1, w * c, c)

    values = {
        "dtype": emulated.TYPE_NAMES[dtype],
        "allow_tf32": True,
        **dict.fromkeys(("x", "weight", "y", "stats"), address),
        "norm": 4096 if prologue else 0,
        "x_size": case.input_shape,
        "weight_size": case.weight_shape,
        "x_stride": strides(case.input_shape),
        "weight_stride": strides(case.weight_shape),
        "y_stride": strides(case.output_shape),
        "stride": case.stride,
        "padding": case.padding,
        "dilation": case.dilation,
        "groups": case.groups,
    }
    return emulated.load().ConvBnStats(**(values | changes))


def planned(*arguments, gpu=emulated.H200, configuration=-1, splits=0, **more):
    return emulated.load().conv_bn_stats_plan(
        problem(*arguments, **more), gpu, configuration, splits
    )


def name_of(plan) -> str:
    table = emulated.load().conv_bn_stats_configurations()
    return table[plan["configuration"]]["name"]


LAYER1 = cases.ConvCase("layer1", 256, 64, 56, 56, 64, 3, 3, (1, 1), (1, 1))
LAYER4 = cases.ConvCase("layer4", 256, 2048, 7, 7, 512)


def test_the_plan_follows_the_shape():
    assert name_of(planned(LAYER1, gpu=emulated.A100)) == "halo_128x64_4w4s"
    strided = dataclasses.replace(LAYER1, stride=(2, 2))
    assert name_of(planned(strided, gpu=emulated.A100)) == "128x64_4w4s"
    assert name_of(planned(LAYER4, gpu=emulated.A100)) == "128x128_4w4s"
    few = planned(dataclasses.replace(LAYER4, n=1))
    assert few["splits"] > 1 and name_of(few) == "64x64_4w4s"
    odd = dataclasses.replace(LAYER4, c=2047)
    assert name_of(planned(odd)).startswith("narrow_")
    # A norm that lies askew is read element by element, and so is everything.
    assert name_of(planned(LAYER4, norm=4100)).startswith("narrow_")


def test_what_is_read_through_a_batch_norm_costs_more():
    for case in (LAYER1, LAYER4):
        for gpu in (emulated.A100, emulated.H200):
            normed, plain = (
                planned(case, gpu=gpu, prologue=one)["cycles"] for one in (True, False)
            )
            # By TMA it may be that products or L2 take longer than those who transform.
            assert normed > plain or (gpu is emulated.H200 and normed == plain)


def test_the_workspace_holds_moments_chunks_and_parts():
    plan = planned(LAYER1, configuration=1, splits=1)
    tiles = LAYER1.n * LAYER1.h * LAYER1.w // 128
    chunks = -(-tiles // 64)
    least = tiles * 64 * 8 + chunks * 64 * 16 + (chunks + 1) * 4
    assert least <= plan["workspace_bytes"] < least + 4 * 256
    more = planned(LAYER1, configuration=1, splits=2)["workspace_bytes"]
    assert more >= plan["workspace_bytes"] + 2 * tiles * 128 * 64 * 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": torch.float64}, "dtype 1"),
        ({"weight_size": (64, 64, 16, 3)}, "at most 15 x 15"),
        ({"groups": 3}, "groups do not divide"),
        ({"stride": (0, 1)}, "strides"),
    ],
)
def test_what_no_launch_takes_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        planned(LAYER1, **changes)
    with pytest.raises(ValueError, match="TF32 is not allowed"):
        planned(LAYER1, dtype=torch.float32, allow_tf32=False)
    count = len(emulated.load().conv_bn_stats_configurations())
    with pytest.raises(ValueError, match=f"there are 0 to {count - 1}"):
        planned(LAYER1, configuration=count)


# The launch in Python, and the self-check, on the emulator.


def launch(x, norm, weight, y, stats, *geometry, wish=None):
    """In the place of `_cuda_stats.launch`."""
    wished = {} if wish is None else dict(zip(("configuration", "splits"), wish, strict=True))
    with emulated.using(**wished):
        found = overload("conv_bn_stats", emulated.NAME)(
            x, norm, weight, *map(list, geometry[:3]), geometry[3]
        )
    for to, result in zip((y, stats), found, strict=True):
        to.copy_(result)


def plan_index(made, index, splits):
    x, norm, weight = made.operands
    made = emulated_stats.problem_of(x, norm, weight, made.out, made.out, *made.geometry[:4])
    try:
        return emulated.load().conv_bn_stats_plan(made, emulated.H200, index, splits)[
            "configuration"
        ]
    except ValueError:
        return -1


NAMES = (
    "128x128_4w4s", "128x64_4w4s", "64x64_4w4s", "narrow_128x64_4w4s", "narrow_64x32_4w4s",
    "halo_128x128_4w4s", "halo_128x64_4w4s", "halo_64x64_4w4s",
    "image_128x64_4w7s",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_self_check_passes(name):
    assert tuple(tile["name"] for tile in configurations()) == NAMES
    _cuda_stats_checks.check(name, "cpu", launch, plan_index, NAMES)


def test_the_self_check_notices_faults():
    def statistics(*arguments, **more):
        launch(*arguments, **more)
        arguments[4][1] *= 1.001

    def padding(x, norm, weight, y, stats, *geometry, **more):
        launch(x, norm, weight, y, stats, *geometry, **more)
        if norm is not None:
            y[0, 0, 0, 0] += 1

    def silent(*arguments, **more):
        pass

    for fault in (statistics, padding, silent):
        with pytest.raises(ArithmeticError):
            _cuda_stats_checks.check(NAMES[2], "cpu", fault, plan_index, NAMES)
    with pytest.raises(ArithmeticError, match="no case"):
        _cuda_stats_checks.check(NAMES[2], "cpu", launch, lambda *_: -1, NAMES)
    with pytest.raises(ValueError, match="accepted are"):
        _cuda_stats_checks.check("other", "cpu", launch, plan_index, NAMES)


def test_what_no_configuration_takes_is_computed_by_plain_pytorch(monkeypatch):
    case = cases.ConvCase("long", 1, 4, 18, 3, 8, 17, 1)
    x, norm, weight = operands(case, torch.float32)
    refusal = _cuda_plan.Plan(-1, "", 0, 0, 0.0, "a filter of 17 x 1")
    monkeypatch.setattr(_cuda_plan, "plan", lambda *_: refusal)
    monkeypatch.setattr(_cuda_plan, "gpu", lambda _: emulated.H200)
    y, stats = torch.empty(case.output_shape), torch.empty(2, case.k)
    with pytest.warns(UserWarning, match="a filter of 17 x 1; plain PyTorch computes it"):
        _cuda_stats.launch(x, norm, weight, y, stats, *conv_arguments(case))
    require(case, x, norm, weight, y, stats)


def test_an_empty_batch_has_statistics_of_zeros():
    stats = torch.full((2, 8), float("nan"))
    empty = torch.empty(0, 4, 5, 5)
    _cuda_stats.launch(
        empty, None, torch.ones(8, 4, 1, 1), torch.empty(0, 8, 5, 5), stats,
        (1, 1), (0, 0), (1, 1), 1,
    )  # fmt: skip
    assert not stats.any()
