"""conv_bn_dgrad_end in CUDA, emulated: the mask by a block's output, two or three rows of sums."""

from __future__ import annotations

import dataclasses

import emulated
import emulated_bn_dgrad_end
import pytest
import torch
from emulated import SCHEDULES, Schedule
from test_emulated_bn_dgrad import (
    LARGE,
    LAYER1,
    LAYER4,
    MANY,
    NARROW,
    SMALL,
    STRIDED,
    conflicts,
    fits,
    plan_index,
    served,
)
from test_emulated_bn_dgrad import planned as planned_alone

from resnet_fused import cases, numerics, roofline
from resnet_fused.ops import _cuda_bn_dgrad_end_checks, _results
from resnet_fused.ops import _training_checks_dgrad_end as checks
from resnet_fused.ops._library import overload

pytestmark = pytest.mark.emulated

OP, DTYPES = emulated_bn_dgrad_end.OP, emulated_bn_dgrad_end.DTYPES
WAYS = {
    "all": {},
    "identity": {"projected": False},
    "bare": {"affine": False, "addend": 0, "projected": False},
    "no addend": {"addend": 0},
}
"""What of the op takes part."""
END = ("out", "raw", "norm", "addend", "residual", "residual_norm")


def table() -> list[dict]:
    return emulated.load().conv_bn_dgrad_end_configurations()


def configurations() -> list[dict]:
    """Those that any GPU runs."""
    return [tile for tile in table() if not tile["tma"]]


def laid_out(given, layout=torch.channels_last):
    return checks.Operands(
        *(
            t.contiguous(memory_format=layout) if t is not None and t.dim() == 4 else t
            for t in given
        )
    )


def operands(case, dtype, *, exact=True, layout=torch.channels_last, **way):
    """dz, y, coefficients, weight, addend, out, raw, norm, residual, residual_norm."""
    made = checks.exact_operands(case, dtype, **way)
    if not exact:
        made = [None if t is None else torch.randn(t.shape).to(t.dtype) for t in made]
    return laid_out(checks.Operands(*made), layout)


def call(case, given, step=1, **settings):
    """(dx, sums, report)."""
    geometry = (case.stride, case.padding, case.dilation, case.groups)
    with emulated.using(**settings) as runs:
        dx, sums = overload(OP, emulated.NAME)(*given, step, *geometry)
    return dx, sums, runs.reports[0]


def require(case, given, dx, sums, step=1):
    """Every bit of both results."""
    expected, reduced = checks.expected_end(given, case, step)
    assert torch.equal(dx, expected), f"{(dx != expected).sum()} of {dx.numel()} elements"
    assert torch.equal(sums, reduced), f"{(sums != reduced).sum()} of {sums.numel()} sums"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_configuration_and_split_is_exact(dtype, way):
    given = operands(SMALL, dtype, **WAYS[way])
    for index, tile in enumerate(configurations()):
        if not fits(tile, dtype):
            with pytest.raises(ValueError, match="does not serve float32"):
                call(SMALL, given, configuration=index, splits=1)
            continue
        for splits in (1, 3):
            dx, sums, report = call(
                SMALL, given, configuration=index, splits=splits,
                schedule=Schedule("lazy", "shuffled", seed=index),
            )  # fmt: skip
            assert (report["plan"]["configuration"], report["plan"]["splits"]) == (index, splits)
            assert sums.shape[0] == 2 + (given.residual is not None)
            require(SMALL, given, dx, sums)


@pytest.mark.parametrize("step", [1, 2])
def test_phases_of_a_stride(step):
    """The addend at every pixel, and at every other one: those of the first phase."""
    for dtype in DTYPES:
        given = operands(STRIDED, dtype, addend=step)
        for index in served(STRIDED, dtype):
            for splits in (1, 2):
                found = call(STRIDED, given, step, configuration=index, splits=splits)
                require(STRIDED, given, *found[:2], step)


def test_phases_without_taps_are_what_is_added():
    """A 1x1 of stride 2: three phases of four have no taps, and are masked and summed as well."""
    case = cases.ConvCase("projection", 2, 40, 9, 8, 24, 1, 1, (2, 2))
    for step in (0, 1, 2, 3):
        given = operands(case, torch.bfloat16, addend=step)
        for index in served(case):
            found = call(case, given, max(1, step), configuration=index, splits=1)
            require(case, given, *found[:2], max(1, step))


def test_tiles_beside_each_other():
    """More than one tile along each axis, and tiles that are cut."""
    given = operands(LARGE, torch.bfloat16)
    for index, tile in enumerate(configurations()):
        dx, sums, report = call(LARGE, given, configuration=index, splits=2, resident_blocks=5)
        assert report["plan"]["blocks"] >= 2 * 4, tile["name"]
        require(LARGE, given, dx, sums)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_groups_dilation_and_layouts(layout):
    case = cases.ConvCase("groups", 2, 48, 7, 6, 96, 3, 3, (2, 1), (1, 2), (1, 2), 6)
    given = operands(case, torch.float16, layout=layout, addend=2)
    for index, tile in served(case).items():
        if tile["wide"] and layout is torch.contiguous_format:
            continue
        require(case, given, *call(case, given, 2, configuration=index, splits=1)[:2], 2)


@pytest.mark.parametrize("name", END)
def test_what_the_end_of_a_tile_reads_may_lie_askew(name):
    """Then elements move one by one there, whatever the main loop does."""
    given = operands(STRIDED, torch.bfloat16)
    t = getattr(given, name)
    room = torch.zeros(t.numel() + 1, dtype=t.dtype)[1:]
    askew = room.as_strided(t.shape, t.stride()).copy_(t)
    given = given._replace(**{name: askew})
    for index in served(STRIDED):
        require(STRIDED, given, *call(STRIDED, given, configuration=index, splits=1)[:2])


@pytest.mark.parametrize("name", ["out", "residual"])
def test_each_has_strides_of_its_own(name):
    """A tensor in another layout than the others: read element by element."""
    given = operands(STRIDED, torch.bfloat16)
    given = given._replace(**{name: getattr(given, name).contiguous()})
    for index in served(STRIDED):
        require(STRIDED, given, *call(STRIDED, given, configuration=index, splits=1)[:2])


@pytest.mark.parametrize("projected", [True, False])
def test_chunks_of_tiles_are_merged(projected):
    given = operands(MANY, torch.bfloat16, projected=projected)
    pixels, tile = MANY.n * MANY.h * MANY.w, configurations()[NARROW]
    assert 2 * 64 < -(-pixels // tile["m"]) < 3 * 64 and pixels % tile["m"]
    for schedule in (Schedule(), Schedule("random", "shuffled", seed=3)):
        dx, sums, _ = call(
            MANY, given, configuration=NARROW, splits=1, schedule=schedule, resident_blocks=7
        )
        require(MANY, given, dx, sums)


@pytest.mark.parametrize("projected", [True, False])
@pytest.mark.parametrize("splits", [1, 2])
def test_launches_share_the_sums(splits, projected):
    """What a batch beyond 2^31 pixels comes to, in launches of two images: each ends in a tile."""
    case = cases.ConvCase("launches", 5, 16, 9, 8, 24, 3, 3, (2, 2), (1, 1))
    given = operands(case, torch.bfloat16, projected=projected)
    module, gpu, index, images = emulated.load(), emulated.H200, 2, 2
    geometry = (case.stride, case.padding, case.dilation, case.groups)
    results = _results.FORMS[OP].empty(*given, 1, *geometry)
    written = dict(zip(("x", "sums"), map(emulated.Guarded, results), strict=True))
    outputs = {name: one.tensor for name, one in written.items()}
    problem = emulated_bn_dgrad_end.problem_of(given._asdict() | outputs, 1, *geometry)
    count = module.conv_bn_dgrad_end_cut_bytes(problem, gpu, index, splits, images)
    memory = emulated.Guarded(torch.empty(count // 4 + 64))
    workspace = memory.tensor[-memory.tensor.data_ptr() % 256 // 4 :][: count // 4]
    with emulated.using(schedule=Schedule("lazy", "reverse")):
        settings = emulated.settings(("cut",), given._asdict(), outputs | {"workspace": workspace})
    module.conv_bn_dgrad_end_cut(
        settings, problem, gpu, index, splits, images, workspace.data_ptr()
    )
    memory.result()
    require(case, given, *(one.result() for one in written.values()))


# Of 3x3 by windows: single pixels, rows and columns; rows that are longer than a tile.
WINDOWS = [(3, 1, 1), (2, 1, 9), (2, 9, 1), (5, 2, 2), (3, 7, 6), (2, 13, 11), (1, 3, 131)]


@pytest.mark.parametrize("size", WINDOWS, ids=str)
def test_windows_at_every_edge(size):
    n, h, w = size
    case = cases.ConvCase("halo", n, 24, h, w, 40, 3, 3, (1, 1), (1, 1))
    given = operands(case, torch.bfloat16)
    for index, tile in served(case).items():
        if tile["window"]:
            schedule = SCHEDULES[(n + w + index) % len(SCHEDULES)]
            found = call(case, given, configuration=index, splits=1, schedule=schedule)
            require(case, given, *found[:2])


@pytest.mark.parametrize("way", ["all", "bare"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_bank_conflicts(dtype, way):
    """Of copies, ldmatrix, what is turned in place, the totals' tile and the meetings of sums."""
    for case in (STRIDED, SMALL):
        given = operands(case, dtype, **WAYS[way])
        for index, tile in served(case, dtype).items():
            _, _, report = call(case, given, configuration=index, splits=1, counting=True)
            assert report["counters"]["shared_wavefronts"] > 0
            assert not conflicts(report), (tile["name"], conflicts(report))


def test_the_same_bits_whichever_block_comes_last():
    """Of noise, in three chunks of tiles and three splits."""
    for case, index, splits in ((LARGE, 2, 3), (MANY, NARROW, 1)):
        given = operands(case, torch.float32, exact=False)
        results = [
            call(
                case, given,
                configuration=index, splits=splits, schedule=order, resident_blocks=6,
            )[:2]
            for order in (Schedule(), Schedule("lazy", "reverse"), Schedule("random", "shuffled"))
        ]  # fmt: skip
        for dx, sums in results[1:]:
            assert torch.equal(dx, results[0][0])
            assert torch.equal(sums, results[0][1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [SMALL, STRIDED], ids=lambda case: case.name)
def test_noise_is_within_its_bound(case, dtype):
    given = operands(case, dtype, exact=False)
    oracle = numerics.conv_bn_dgrad_end_oracle(*given[:6], **case.geometry)
    tf32 = dtype == torch.float32
    bound = numerics.conv_bn_dgrad_end_bound(*given[:6], oracle, **case.geometry, tf32=tf32)
    branches = (given.raw, given.norm), (given.residual, given.residual_norm)
    for index, tile in served(case, dtype).items():
        dx, sums, _ = call(case, given, configuration=index, splits=1)
        found = numerics.check_bound(dx, oracle, bound)
        assert found.ok, (tile["name"], str(found))
        wanted = numerics.reductions_oracle(dx, *branches)
        found = numerics.check_bound(sums, wanted, numerics.reductions_bound(dx, *branches))
        assert found.ok, (tile["name"], str(found))


@pytest.mark.parametrize("projected", [True, False])
def test_every_byte_moves_once(projected):
    """Unique bytes are the operands' and the results'; the tiles' sums are a few of a hundred."""
    case = dataclasses.replace(MANY, c=64, k=64, n=1)
    given = operands(case, torch.bfloat16, projected=projected)
    dx, _, report = call(case, given, configuration=1, splits=1, counting=True)
    tensors = report["tensors"]
    for name in ("dz", "y", "weight", "addend", "out", "raw", "residual", "coefficients"):
        t = getattr(given, name)
        if t is not None:
            assert tensors[name]["unique_bytes_read"] == t.nbytes, name
    assert tensors["x"]["unique_bytes_written"] == dx.nbytes
    # The means alone.
    for name in ("norm", "residual_norm")[: 1 + projected]:
        assert tensors[name]["unique_bytes_read"] == case.c * 4, name
    moved = sum(t["unique_bytes_read"] + t["unique_bytes_written"] for t in tensors.values())
    cost = roofline.conv_bn_dgrad_end_cost(
        case, torch.bfloat16, addend=dx.numel(), projected=projected
    )
    assert cost.bytes <= moved <= 1.1 * cost.bytes
    tiles = -(-case.h * case.w // 128)
    sums = 12 if projected else 8
    assert tensors["workspace"]["unique_bytes_written"] == tiles * case.c * sums + 4


SPECIAL = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, -1.0, 1e-30]


def test_what_the_mask_makes_of_every_kind_of_output():
    """NaN passes, zeros of either sign do not; a subnormal does."""
    case = cases.ConvCase("signs", 1, 8, 1, len(SPECIAL), 8)
    made = operands(case, torch.float32, projected=False)
    out = torch.tensor([*SPECIAL]).expand(1, 8, 1, len(SPECIAL))
    given = laid_out(made._replace(out=out, dz=torch.ones_like(made.dz)))
    passed = torch.tensor([True, True, False, False, False, False, True])
    bare, _ = checks.expected_end(given._replace(out=torch.ones_like(out)), case, 1)
    for index in served(case, torch.float32):
        dx, sums, _ = call(case, given, configuration=index, splits=1)
        assert torch.equal(dx, torch.where(passed, bare, torch.zeros(())))
        require(case, given, dx, sums)
    lowest = laid_out(made._replace(out=torch.full_like(out, torch.finfo().smallest_normal / 2)))
    require(case, lowest, *call(case, lowest, configuration=NARROW, splits=1)[:2])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["dz", "y", "coefficients", *END])
def test_what_is_not_finite_is_where_it_is_in_the_reference(name, value):
    case = cases.ConvCase("specials", 2, 16, 6, 5, 24, 3, 3, (2, 2), (1, 1))
    given = operands(case, torch.float16)
    given = given._replace(
        norm=torch.nan_to_num(given.norm), residual_norm=torch.nan_to_num(given.residual_norm)
    )
    t = getattr(given, name).clone()
    t[(0, 1, 1, 1)[: t.dim()] if t.dim() == 4 else (2, 1)] = value
    given = given._replace(**{name: t})
    geometry = (case.stride, case.padding, case.dilation, case.groups)
    wanted = overload(OP, "reference")(*given, 1, *geometry)
    for index in (1, NARROW):
        found = call(case, given, configuration=index, splits=1)
        for got, want in zip(found[:2], wanted, strict=True):
            assert torch.equal(got.isnan(), want.isnan()), name
            assert torch.equal(got.isinf(), want.isinf()), name


def test_one_pixel():
    case = cases.ConvCase("pixel", 1, 16, 1, 1, 24)
    given = operands(case, torch.bfloat16)
    for index in served(case):
        require(case, given, *call(case, given, configuration=index, splits=1)[:2])


# The plan.


def problem(case, dtype=torch.bfloat16, way="all", address=4096, **changes):
    """A channels_last problem in memory that the plan never touches."""

    def strides(shape):
        _, c, h, w = shape
        return (h * w * c, 1, w * c, c)

    takes_part = WAYS[way] if isinstance(way, str) else way
    there = {"affine": True, "addend": 1, "projected": True} | takes_part
    values = {
        "dtype": emulated.TYPE_NAMES[dtype],
        "allow_tf32": True,
        **dict.fromkeys(("dz", "weight", "x", "sums", "out", "raw", "norm"), address),
        **dict.fromkeys(("y", "coefficients"), address if there["affine"] else 0),
        **dict.fromkeys(("residual", "residual_norm"), address if there["projected"] else 0),
        "addend": address if there["addend"] else 0,
        "addend_step": max(1, there["addend"]),
        "x_size": case.input_shape,
        "weight_size": case.weight_shape,
        "weight_stride": strides(case.weight_shape),
        **dict.fromkeys(("dz_stride", "y_stride"), strides(case.output_shape)),
        **dict.fromkeys(
            ("x_stride", "raw_stride", "addend_stride", "out_stride", "residual_stride"),
            strides(case.input_shape),
        ),
        "stride": case.stride,
        "padding": case.padding,
        "dilation": case.dilation,
        "groups": case.groups,
    }
    return emulated.load().ConvBnDgradEnd(**(values | changes))


def planned(*arguments, gpu=emulated.H200[:3], configuration=-1, splits=0, **more):
    return emulated.load().conv_bn_dgrad_end_plan(
        problem(*arguments, **more), gpu, configuration, splits
    )


def name_of(plan) -> str:
    return table()[plan["configuration"]]["name"]


def test_the_tiles_are_conv_bn_dgrad_s():
    names = [tile["name"] for tile in configurations()]
    alone = emulated.load().conv_bn_dgrad_configurations()
    assert names == [tile["name"] for tile in alone if not tile["tma"]] and len(names) == 7


def test_the_plan_follows_the_shape():
    assert name_of(planned(LAYER1)) == "halo_128x64_4w4s"
    few = planned(dataclasses.replace(LAYER4, n=1))
    assert few["splits"] > 1 and name_of(few) == "64x64_4w3s"
    for name in ("dz", "y", "weight", "coefficients"):
        assert name_of(planned(LAYER4, **{name: 4098})).startswith("narrow_"), name
    assert not name_of(planned(LAYER4, torch.float32)).startswith("128x128")
    # Of what the end of a tile reads nothing hangs on the alignment.
    assert planned(LAYER4, raw=4098, addend=4098, out=4098, residual=4098) == planned(LAYER4)


@pytest.mark.parametrize("gpu", [emulated.H200[:3], emulated.A100, emulated.RTX3080], ids=str)
def test_what_more_is_read_costs_more(gpu):
    """A tensor more than conv_bn_dgrad that masks, and another for a projection."""
    for case in (LAYER1, LAYER4):
        costs = {way: planned(case, way=way, gpu=gpu)["cycles"] for way in WAYS}
        assert costs["bare"] < costs["identity"] < costs["all"]
        assert costs["no addend"] < costs["all"]
        alone = planned_alone(case, gpu=gpu)["cycles"]
        assert alone < costs["identity"] < 2 * alone


def test_the_workspace_holds_sums_chunks_and_parts():
    tiles = LAYER1.n * LAYER1.h * LAYER1.w // 128
    chunks = -(-tiles // 64)
    for way, pairs, thirds in (("identity", 1, 0), ("all", 1, 1)):
        plan = planned(LAYER1, way=way, configuration=1, splits=1)
        of_tiles, of_chunks = tiles * 64 * (8 * pairs + 4 * thirds), chunks * 64 * 16 * (1 + thirds)
        least = of_tiles + of_chunks + (chunks + 1) * 4
        assert least <= plan["workspace_bytes"] < least + 6 * 256
        more = planned(LAYER1, way=way, configuration=1, splits=2)["workspace_bytes"]
        assert more >= plan["workspace_bytes"] + 2 * tiles * 128 * 64 * 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": torch.float64}, "dtype 1"),
        ({"weight_size": (64, 64, 16, 3)}, "at most 15 x 15"),
        ({"groups": 3}, "groups do not divide"),
        ({"stride": (0, 1)}, "strides"),
        ({"addend_step": 0}, "an addend at every 0-th pixel"),
        ({"configuration": 99}, "configuration 99; there are 0 to"),
    ],
)
def test_what_no_launch_takes_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        planned(LAYER1, **changes)
    with pytest.raises(ValueError, match="TF32 is not allowed"):
        planned(LAYER1, dtype=torch.float32, allow_tf32=False)


@pytest.mark.parametrize("gpu", [emulated.H200, emulated.A100, emulated.RTX3080], ids=str)
def test_every_layer_of_resnet50_has_a_plan_that_fits(gpu):
    for layer in cases.RESNET50_LAYERS:
        for dtype in DTYPES:
            made = planned(layer, dtype, gpu=gpu)
            assert table()[made["configuration"]]["shared_bytes"] <= gpu[1]
            assert made["blocks"] > 0


# The self-check.


def launch(*arguments, wish, wrong=None):
    """As `_cuda_bn_dgrad_end.launch`, by the emulated kernel; `wrong` changes what it wrote."""
    given, (dx, sums, step, *geometry) = arguments[:10], arguments[10:]
    with emulated.using(configuration=wish[0], splits=wish[1]):
        found = overload(OP, emulated.NAME)(*given, step, *geometry)
    for to, result in zip((dx, sums), found, strict=True):
        to.copy_(result)
    if wrong is not None:
        wrong(dx, sums)


@pytest.mark.parametrize("index", range(7))
def test_the_self_check_passes(index):
    names = [tile["name"] for tile in configurations()]
    _cuda_bn_dgrad_end_checks.check(names[index], "cpu", launch, plan_index, names)
    with pytest.raises(ValueError, match="accepted are"):
        _cuda_bn_dgrad_end_checks.check("no", "cpu", launch, plan_index, names)
    with pytest.raises(ArithmeticError, match="no case"):
        _cuda_bn_dgrad_end_checks.check(names[index], "cpu", launch, lambda *_: -1, names)


@pytest.mark.parametrize("which", [0, 1])
def test_the_self_check_fails_on_a_wrong_result(which):
    names = [tile["name"] for tile in configurations()]

    def broken(*arguments, wish):
        def change(*results):
            results[which][(-1,) * results[which].dim()] += 1

        launch(*arguments, wish=wish, wrong=change)

    with pytest.raises(ArithmeticError):
        _cuda_bn_dgrad_end_checks.check(
            names[NARROW], "cpu", broken, lambda made, index, splits: index, names
        )
