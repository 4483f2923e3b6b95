"""conv_bn_dgrad in CUDA, emulated: configurations, phases, chunks, launches, costs, the plan."""

from __future__ import annotations

import dataclasses
import itertools

import emulated
import emulated_bn_dgrad
import pytest
import torch
from emulated import Schedule

from resnet_fused import cases, numerics, roofline
from resnet_fused.ops import _cuda_bn_dgrad_checks, _results
from resnet_fused.ops import _training_checks_dgrad as checks
from resnet_fused.ops._library import overload

pytestmark = pytest.mark.emulated

OP, DTYPES = emulated_bn_dgrad.OP, emulated_bn_dgrad.DTYPES
SMALL = cases.ConvCase("small", 2, 72, 7, 6, 72, 3, 3, (1, 1), (1, 1))
# More than a tile of every configuration along M and N, and nothing a multiple of a tile.
LARGE = cases.ConvCase("large", 2, 136, 13, 11, 40, 3, 3, (1, 1), (1, 1))
# Four phases of one, two, two and four taps; the last row and column are no pixels of the odd ones.
STRIDED = cases.ConvCase("strided", 2, 40, 11, 9, 24, 3, 3, (2, 2), (1, 1))
# Three chunks of the tiles of 64 pixels, the last of which is cut.
MANY = cases.ConvCase("many", 6, 8, 38, 37, 8)
NARROW = 6
WAYS = {
    "all": {},
    "plain": {"affine": False, "addend": 0, "below": False},
    "affine": {"addend": 0, "below": False},
    "addend": {"affine": False, "below": False},
    "below": {"affine": False, "addend": 0},
}
"""What of the op takes part."""


def table() -> list[dict]:
    return emulated.load().conv_bn_dgrad_configurations()


def configurations() -> list[dict]:
    """Those that any GPU runs; test_emulated_bn_dgrad_sm90.py has the others, which follow them."""
    return [tile for tile in table() if not tile["tma"]]


def operands(case, dtype, *, exact=True, layout=torch.channels_last, **way):
    """dz, y, coefficients, weight, addend, raw, norm."""
    made = checks.exact_operands(case, dtype, **way)
    if not exact:
        made = [None if t is None else torch.randn(t.shape).to(t.dtype) for t in made]
    made = [
        t.contiguous(memory_format=layout) if t is not None and t.dim() == 4 else t for t in made
    ]
    return checks.Operands(*made)


def call(case, given, step=1, **settings):
    """(dx, sums, report)."""
    last = given.dz.stride(1) == 1
    geometry = (case.stride, case.padding, case.dilation, case.groups)
    with emulated.using(**settings) as runs:
        dx, sums = overload(OP, emulated.NAME)(
            *given, list(case.input_shape), last, step, *geometry
        )
    return dx, sums, runs.reports[0]


def require(case, given, dx, sums, step=1):
    """Every bit of both results."""
    expected, reduced = checks.expected_dgrad(given, case, step)
    assert torch.equal(dx, expected), f"{(dx != expected).sum()} of {dx.numel()} elements"
    assert torch.equal(sums, reduced), f"{(sums != reduced).sum()} of {sums.numel()} sums"


def fits(tile, dtype):
    return dtype != torch.float32 or tile["float32"]


def served(case, dtype=torch.bfloat16) -> dict[int, dict]:
    """The configurations for a case; tests/test_emulated_bn_dgrad_halo.py has why windows are not
    for others."""
    run = (case.r, case.s, case.stride, case.padding, case.dilation)
    return {
        index: tile
        for index, tile in enumerate(configurations())
        if fits(tile, dtype) and (run == (3, 3, (1, 1), (1, 1), (1, 1)) or not tile["window"])
    }


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
            schedule = Schedule("lazy", "shuffled", seed=index)
            dx, sums, report = call(
                SMALL, given, configuration=index, splits=splits, schedule=schedule
            )
            assert report["plan"]["configuration"] == index
            assert report["plan"]["splits"] == splits
            require(SMALL, given, dx, sums)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("step", [1, 2])
def test_phases_of_a_stride(dtype, step):
    """The addend at every pixel, and at every other one: those of the first phase."""
    given = operands(STRIDED, dtype, addend=step)
    for index in served(STRIDED, dtype):
        for splits in (1, 2):
            found = call(STRIDED, given, step, configuration=index, splits=splits)
            require(STRIDED, given, *found[:2], step)


def test_phases_without_taps_are_what_is_added():
    """A 1x1 of stride 2, as a projection's: three phases of four have no taps."""
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
        dx, sums, report = call(
            LARGE, given, configuration=index, splits=2, resident_blocks=5, schedule=Schedule()
        )
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


@pytest.mark.parametrize("name", ["addend", "raw", "norm"])
def test_what_the_end_of_a_tile_reads_may_lie_askew(name):
    """Then elements move one by one there, whatever the main loop does."""
    given = operands(STRIDED, torch.bfloat16)
    t = getattr(given, name)
    room = torch.zeros(t.numel() + 1, dtype=t.dtype)[1:]
    askew = room.as_strided(t.shape, t.stride()).copy_(t)
    given = given._replace(**{name: askew})
    for index in served(STRIDED):
        require(STRIDED, given, *call(STRIDED, given, configuration=index, splits=1)[:2])


def test_chunks_of_tiles_are_merged():
    given = operands(MANY, torch.bfloat16)
    pixels, tile = MANY.n * MANY.h * MANY.w, configurations()[NARROW]
    assert 2 * 64 < -(-pixels // tile["m"]) < 3 * 64 and pixels % tile["m"]
    for schedule in (Schedule(), Schedule("random", "shuffled", seed=3)):
        dx, sums, _ = call(
            MANY, given, configuration=NARROW, splits=1, schedule=schedule, resident_blocks=7
        )
        require(MANY, given, dx, sums)


@pytest.mark.parametrize("splits", [1, 2])
def test_launches_share_the_sums(splits):
    """What a batch beyond 2^31 pixels comes to, in launches of two images: each ends in a tile."""
    case = cases.ConvCase("launches", 5, 16, 9, 8, 24, 3, 3, (2, 2), (1, 1))
    given = operands(case, torch.bfloat16)
    module, gpu, index, images = emulated.load(), emulated.H200, 2, 2
    geometry = (case.stride, case.padding, case.dilation, case.groups)
    results = _results.FORMS[OP].empty(*given, list(case.input_shape), True, 1, *geometry)
    written = dict(zip(("x", "sums"), map(emulated.Guarded, results), strict=True))
    outputs = {name: one.tensor for name, one in written.items()}
    problem = emulated_bn_dgrad.problem_of(given._asdict() | outputs, 1, *geometry)
    count = module.conv_bn_dgrad_cut_bytes(problem, gpu, index, splits, images)
    memory = emulated.Guarded(torch.empty(count // 4 + 64))
    workspace = memory.tensor[-memory.tensor.data_ptr() % 256 // 4 :][: count // 4]
    with emulated.using(schedule=Schedule("lazy", "reverse")):
        settings = emulated.settings(("cut",), given._asdict(), outputs | {"workspace": workspace})
    module.conv_bn_dgrad_cut(settings, problem, gpu, index, splits, images, workspace.data_ptr())
    memory.result()
    require(case, given, *(one.result() for one in written.values()))


def conflicts(report) -> dict[tuple, int]:
    """The instructions that met bank conflicts, and how many."""
    return {
        (site["file"], site["line"], site["instruction"]): site["counters"]["bank_conflicts"]
        for site in report["sites"]
        if site["counters"]["bank_conflicts"]
    }


@pytest.mark.parametrize("way", ["all", "plain"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_bank_conflicts(dtype, way):
    """Of copies, ldmatrix, what is turned in place, the totals' tile and the meetings of sums."""
    given = operands(STRIDED, dtype, **WAYS[way])
    for index, tile in served(STRIDED, dtype).items():
        _, _, report = call(STRIDED, given, configuration=index, splits=1, counting=True)
        assert report["counters"]["shared_wavefronts"] > 0
        assert not conflicts(report), (tile["name"], conflicts(report))


def test_the_same_bits_whichever_block_comes_last():
    given = operands(LARGE, torch.float32, exact=False)
    results = [
        call(
            LARGE, given,
            configuration=2, splits=3, schedule=order, resident_blocks=6,
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
    options = {"tf32": dtype == torch.float32}
    oracle = numerics.conv_bn_dgrad_oracle(*given, input_size=case.input_shape, **case.geometry)
    bound = numerics.conv_bn_dgrad_bound(*given, oracle, **case.geometry, **options)
    for index, tile in served(case, dtype).items():
        dx, sums, _ = call(case, given, configuration=index, splits=1)
        found = numerics.check_bound(dx, oracle, bound)
        assert found.ok, (tile["name"], str(found))
        wanted = numerics.reductions_oracle(dx, (given.raw, given.norm))
        limit = numerics.reductions_bound(dx, (given.raw, given.norm))
        found = numerics.check_bound(sums, wanted, limit)
        assert found.ok, (tile["name"], str(found))


@pytest.mark.parametrize("way", ["all", "plain"])
def test_every_byte_moves_once(way):
    """Unique bytes are the operands' and the results'; the tiles' sums are a few of a hundred."""
    case = dataclasses.replace(MANY, c=64, k=64, n=1)
    given = operands(case, torch.bfloat16, **WAYS[way])
    dx, _, report = call(case, given, configuration=1, splits=1, counting=True)
    tensors = report["tensors"]
    for name in ("dz", "y", "weight", "addend", "raw", "coefficients"):
        t = getattr(given, name)
        if t is not None:
            assert tensors[name]["unique_bytes_read"] == t.nbytes, name
    assert tensors["x"]["unique_bytes_written"] == dx.nbytes
    moved = sum(t["unique_bytes_read"] + t["unique_bytes_written"] for t in tensors.values())
    full = way == "all"
    cost = roofline.conv_bn_dgrad_cost(
        case, torch.bfloat16, affine=full, addend=dx.numel() if full else 0, masked=full
    )
    assert cost.bytes <= moved <= 1.1 * cost.bytes
    if full:
        # Three of its four rows.
        assert tensors["norm"]["unique_bytes_read"] == given.norm.nbytes * 3 // 4
        tiles = -(-case.h * case.w // 128)
        assert tensors["workspace"]["unique_bytes_written"] == tiles * case.c * 8 + 4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["dz", "y", "coefficients", "addend", "raw", "norm"])
def test_what_is_not_finite_is_where_it_is_in_the_reference(name, value):
    case = cases.ConvCase("specials", 2, 16, 6, 5, 24, 3, 3, (2, 2), (1, 1))
    given = operands(case, torch.float16)
    given = given._replace(norm=torch.nan_to_num(given.norm))
    t = getattr(given, name).clone()
    t[(0, 1, 1, 1)[: t.dim()]] = value
    given = given._replace(**{name: t})
    geometry = (case.stride, case.padding, case.dilation, case.groups)
    wanted = overload(OP, "reference")(*given, list(case.input_shape), True, 1, *geometry)
    for index in (1, NARROW):
        found = call(case, given, configuration=index, splits=1)
        for got, want in zip(found[:2], wanted, strict=True):
            assert torch.equal(got.isnan(), want.isnan()), name
            assert torch.equal(got.isinf(), want.isinf()), name


def test_a_pixel_outside_counts_as_zero_though_c_does_not():
    """C is added inside alone: with dz and y of zeros dx is what the taps inside make of C."""
    case = cases.ConvCase("padding", 1, 8, 3, 3, 8, 3, 3, (1, 1), (1, 1))
    given = operands(case, torch.bfloat16, addend=0, below=False)
    rows = torch.stack((torch.ones(8), torch.ones(8), torch.full((8,), 2.0)))
    zeros = torch.zeros_like(given.dz)
    given = given._replace(
        dz=zeros, y=zeros, coefficients=rows, weight=torch.ones_like(given.weight)
    )
    for index in range(len(configurations())):
        dx, _, _ = call(case, given, configuration=index, splits=1)
        taps = torch.tensor([[4.0, 6, 4], [6, 9, 6], [4, 6, 4]])
        assert torch.equal(dx.float(), (16 * taps).expand(1, 8, 3, 3))


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
    there = {"affine": True, "addend": 1, "below": True} | takes_part
    values = {
        "dtype": emulated.TYPE_NAMES[dtype],
        "allow_tf32": True,
        **dict.fromkeys(("dz", "weight", "x", "sums"), address),
        **dict.fromkeys(("y", "coefficients"), address if there["affine"] else 0),
        **dict.fromkeys(("raw", "norm"), address if there["below"] else 0),
        "addend": address if there["addend"] else 0,
        "addend_step": max(1, there["addend"]),
        "x_size": case.input_shape,
        "weight_size": case.weight_shape,
        "weight_stride": strides(case.weight_shape),
        **dict.fromkeys(("dz_stride", "y_stride"), strides(case.output_shape)),
        **dict.fromkeys(("x_stride", "raw_stride", "addend_stride"), strides(case.input_shape)),
        "stride": case.stride,
        "padding": case.padding,
        "dilation": case.dilation,
        "groups": case.groups,
    }
    return emulated.load().ConvBnDgrad(**(values | changes))


def planned(*arguments, gpu=emulated.H200[:3], configuration=-1, splits=0, **more):
    return emulated.load().conv_bn_dgrad_plan(
        problem(*arguments, **more), gpu, configuration, splits
    )


def name_of(plan) -> str:
    return table()[plan["configuration"]]["name"]


LAYER1 = cases.ConvCase("layer1", 256, 64, 56, 56, 64, 3, 3, (1, 1), (1, 1))
LAYER4 = cases.ConvCase("layer4", 256, 512, 7, 7, 2048)


def test_the_plan_follows_the_shape():
    assert name_of(planned(LAYER1)) == "halo_128x64_4w4s"
    strided = dataclasses.replace(LAYER1, stride=(2, 2))
    assert name_of(planned(strided)) == "128x64_4w3s"
    assert name_of(planned(LAYER4)) == "128x128_4w3s"
    few = planned(dataclasses.replace(LAYER4, n=1))
    assert few["splits"] > 1 and name_of(few) == "64x64_4w3s"
    for name in ("dz", "y", "weight", "coefficients"):
        assert name_of(planned(LAYER4, **{name: 4098})).startswith("narrow_"), name
    assert not name_of(planned(LAYER4, torch.float32)).startswith("128x128")
    # Of what the end of a tile reads nothing hangs on the alignment.
    assert planned(LAYER4, raw=4098, addend=4098) == planned(LAYER4)


def test_what_more_is_done_costs_more():
    for case in (LAYER1, LAYER4):
        costs = {way: planned(case, way=way)["cycles"] for way in WAYS}
        assert costs["plain"] < min(costs["affine"], costs["addend"], costs["below"])
        assert costs["all"] > max(costs["affine"], costs["addend"], costs["below"])
    half = planned(LAYER4, addend_step=2)["cycles"]
    assert half < planned(LAYER4)["cycles"]


def test_the_workspace_holds_sums_chunks_and_parts():
    plan = planned(LAYER1, configuration=1, splits=1)
    tiles = LAYER1.n * LAYER1.h * LAYER1.w // 128
    chunks = -(-tiles // 64)
    least = tiles * 64 * 8 + chunks * 64 * 16 + (chunks + 1) * 4
    assert least <= plan["workspace_bytes"] < least + 4 * 256
    more = planned(LAYER1, configuration=1, splits=2)["workspace_bytes"]
    assert more >= plan["workspace_bytes"] + 2 * tiles * 128 * 64 * 4
    assert planned(LAYER1, way="plain", configuration=1, splits=1)["workspace_bytes"] == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": torch.float64}, "dtype 1"),
        ({"weight_size": (64, 64, 16, 3)}, "at most 15 x 15"),
        ({"groups": 3}, "groups do not divide"),
        ({"stride": (0, 1)}, "strides"),
        ({"addend_step": 0}, "an addend at every 0-th pixel"),
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
            tile = table()[made["configuration"]]
            assert tile["shared_bytes"] <= gpu[1]
            assert tile["blocks"] * tile["warps"] <= 16, "255 registers a thread, 64 K each"
            assert made["blocks"] > 0


# The self-check.


def launch(*arguments, wish, wrong=None):
    """As `_cuda_bn_dgrad.launch`, by the emulated kernel; `wrong` changes what it wrote."""
    given, (dx, sums, step, *geometry) = arguments[:7], arguments[7:]
    with emulated.using(configuration=wish[0], splits=wish[1]):
        found = overload(OP, emulated.NAME)(*given, list(dx.shape), True, step, *geometry)
    for to, result in zip((dx, sums), found, strict=True):
        to.copy_(result)
    if wrong is not None:
        wrong(dx, sums)


def plan_index(made, index, splits):
    """As a plan's: -1 where operands or their dtype are not the configuration's."""
    first, weight = made.operands[0], made.operands[3]
    tile, size = configurations()[index], first.element_size()
    groups = made.geometry[4]
    wide = all(c * size % 16 == 0 for c in (first.shape[1] // groups, weight.shape[1]))
    run = [*weight.shape[2:], *itertools.chain(*made.geometry[1:4])] == [3, 3, 1, 1, 1, 1, 1, 1]
    serves = fits(tile, first.dtype) and (wide or not tile["wide"]) and (run or not tile["window"])
    return index if serves else -1


@pytest.mark.parametrize("index", range(7))
def test_the_self_check_passes(index):
    names = [tile["name"] for tile in configurations()]
    assert len(names) == 7
    _cuda_bn_dgrad_checks.check(names[index], "cpu", launch, plan_index, names)
    with pytest.raises(ValueError, match="accepted are"):
        _cuda_bn_dgrad_checks.check("no", "cpu", launch, plan_index, names)
    with pytest.raises(ArithmeticError, match="no case"):
        _cuda_bn_dgrad_checks.check(names[index], "cpu", launch, lambda *_: -1, names)


@pytest.mark.parametrize("which", [0, 1])
def test_the_self_check_fails_on_a_wrong_result(which):
    names = [tile["name"] for tile in configurations()]

    def broken(*arguments, wish):
        def change(*results):
            if results[which].numel():
                results[which][(0,) * results[which].dim()] += 1

        launch(*arguments, wish=wish, wrong=change)

    with pytest.raises(ArithmeticError):
        _cuda_bn_dgrad_checks.check(
            names[NARROW], "cpu", broken, lambda made, index, splits: index, names
        )
