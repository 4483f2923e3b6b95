"""bn_add_act_conv_stats in CUDA, emulated: the bits of two kernels, each element of out stored
once, chunks of tiles, launches, costs, the plan, the self-check."""

from __future__ import annotations

import dataclasses
import itertools

import emulated
import emulated_block_end
import pytest
import torch
from emulated import Schedule
from emulated_block_end import DTYPES, OP
from matrix import LAYOUTS, lay_out

from resnet_fused import cases, numerics, roofline
from resnet_fused.ops import _cuda_block_end, _cuda_block_end_checks
from resnet_fused.ops import _training_checks_block_end as checks
from resnet_fused.ops._library import overload

pytestmark = pytest.mark.emulated

NAMES = ("128x256_8w3s", "128x128_4w3s", "128x64_4w3s", "64x64_4w3s")
"""For sm_80 and later; those for sm_90a are test_emulated_block_end_sm90.py's."""
# Two columns of every tile but the widest, a last tile, step and column that are not full.
ODD = cases.ConvCase("odd", 3, 200, 7, 9, 136)
# Four columns of 64, each with a share of seven steps; two of the widest.
WIDE = cases.ConvCase("wide", 2, 216, 9, 8, 264)
# Three chunks of tiles of 64 pixels, the last of which is cut.
MANY = cases.ConvCase("many", 6, 16, 38, 37, 8)


def configurations() -> list[dict]:
    return emulated.load().bn_add_act_conv_stats_configurations()


def served(dtype=torch.bfloat16, projected=True):
    """Indices of the configurations for a call."""
    return [
        index
        for index, tile in enumerate(configurations())
        if (dtype != torch.float32 or tile["float32"])
        and (not projected or tile["n"] <= 128)
        and not tile["tma"]
    ]


def exact(case, dtype, projected=True, layout="nhwc"):
    """y, norm, residual, residual_norm, weight."""
    y, norm, residual, own, weight = checks.exact_end(case, dtype, torch.Generator().manual_seed(3))
    images = (lay_out(t, layout) for t in (y, residual, weight))
    y, residual, weight = images
    return y, norm, residual, own if projected else None, weight


def noise(case, dtype, projected=True):
    y, residual, weight = (
        lay_out(torch.randn(s).to(dtype), "nhwc")
        for s in (case.input_shape, case.input_shape, case.weight_shape)
    )
    own = torch.randn(4, case.c) if projected else None
    return y, torch.randn(4, case.c), residual, own, weight


def call(operands, **settings):
    """(out, z, stats), and the report."""
    with emulated.using(**settings) as runs:
        found = overload(OP, emulated.NAME)(*operands)
    return found, runs.reports[0]


def require_stats(z, stats, tiles=1):
    oracle = numerics.stats_oracle(z)
    found = numerics.check_bound(stats, oracle, numerics.stats_bound(z, oracle, tiles=tiles))
    assert found.ok, str(found)


def require(operands, got):
    """Every bit of out and z, and the statistics within their bound."""
    *end, weight = operands
    out, z, stats = got
    expected = numerics.bn_add_act_oracle(*end).to(out.dtype)
    assert torch.equal(out, expected)
    assert torch.equal(z, numerics.conv_bn_stats_oracle(expected, None, weight).to(z.dtype))
    require_stats(z, stats)


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_configuration_and_split_is_exact(dtype, projected):
    """With blocks side by side, several columns and parts, whatever comes first."""
    schedules = itertools.cycle(emulated.SCHEDULES[1::3])
    for case in (ODD, WIDE):
        operands = exact(case, dtype, projected)
        for index in served(dtype, projected):
            for splits in (1, 3):
                got, report = call(
                    operands, configuration=index, splits=splits, schedule=next(schedules),
                    resident_blocks=3,
                )  # fmt: skip
                plan = report["plan"]
                assert (plan["configuration"], plan["splits"]) == (index, splits)
                require(operands, got)


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_are_those_of_two_kernels(dtype, projected):
    """out of bn_add_act; z of conv_bn_stats where the reduction is cut alike, by an equal tile."""
    *end, weight = noise(ODD, dtype, projected)
    (out, z, stats), _ = call((*end, weight), configuration=NAMES.index("64x64_4w3s"), splits=2)
    assert torch.equal(out, overload("bn_add_act", emulated.NAME)(*end, 0, "relu"))
    table = emulated.load().conv_bn_stats_configurations()
    alike = next(i for i, one in enumerate(table) if one["name"] == "64x64_4w4s")
    with emulated.using(configuration=alike, splits=2):
        alone = overload("conv_bn_stats", emulated.NAME)(
            out, None, weight, [1, 1], [0, 0], [1, 1], 1
        )
    assert torch.equal(z, alone[0]) and torch.equal(stats, alone[1])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rounding", ["nearest", "toward_zero"])
def test_within_the_bounds(name, rounding):
    operands = noise(ODD, torch.float16, projected=name != NAMES[0])
    *end, weight = operands
    (out, z, stats), _ = call(
        operands, configuration=NAMES.index(name), splits=2, schedule=Schedule(rounding=rounding)
    )
    oracle = numerics.bn_add_act_oracle(*end)
    found = numerics.check_bound(out, oracle, numerics.bn_add_act_bound(*end, 0, oracle))
    assert found.ok, str(found)
    how = {"accumulation": "nearest" if rounding == "nearest" else "truncate", "k": 16}
    product = numerics.conv_bn_stats_oracle(out, None, weight)
    bound = numerics.conv_bn_stats_bound(out, None, weight, product, **how)
    assert (found := numerics.check_bound(z, product, bound)).ok, str(found)
    require_stats(z, stats, tiles=3)


def test_chunks_of_tiles_are_merged():
    index = NAMES.index("64x64_4w3s")
    operands = exact(MANY, torch.bfloat16)
    pixels = MANY.n * MANY.h * MANY.w
    assert 2 * 64 < -(-pixels // configurations()[index]["m"]) < 3 * 64 and pixels % 64
    for schedule in (Schedule(), Schedule("random", "shuffled", seed=3)):
        got, _ = call(operands, configuration=index, splits=1, schedule=schedule, resident_blocks=7)
        require(operands, got)


@pytest.mark.parametrize("splits", [1, 2])
def test_launches_share_the_statistics(splits):
    """What a batch beyond 2^31 pixels comes to, in launches of two images: each ends in a tile."""
    case = cases.ConvCase("launches", 5, 64, 9, 8, 72)
    operands = exact(case, torch.bfloat16)
    module, index, images = emulated.load(), NAMES.index("64x64_4w3s"), 2
    inputs = dict(zip(("y", "norm", "residual", "residual_norm", "weight"), operands, strict=True))
    out, z = (
        torch.empty(s, dtype=torch.bfloat16, memory_format=torch.channels_last)
        for s in (case.input_shape, case.output_shape)
    )
    results = {"out": out, "z": z, "stats": torch.empty(2, case.k)}
    guarded = {name: emulated.Guarded(t) for name, t in results.items()}
    written = {name: one.tensor for name, one in guarded.items()}
    problem = emulated_block_end.problem_of(inputs | written)
    where = (problem, emulated.H200, index, splits, images)
    count = module.bn_add_act_conv_stats_cut_bytes(*where)
    memory = emulated.Guarded(torch.empty(count // 4 + 64))
    workspace = memory.tensor[-memory.tensor.data_ptr() % 256 // 4 :][: count // 4]
    with emulated.using(schedule=Schedule("lazy", "reverse")):
        settings = emulated.settings(("cut",), inputs, written | {"workspace": workspace})
    module.bn_add_act_conv_stats_cut(settings, *where, workspace.data_ptr())
    memory.result()
    require(operands, [one.result() for one in guarded.values()])


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_bank_conflicts(dtype, projected):
    """Of 16-byte loads, ldmatrix, what is made in place, z's tile and its moments."""
    operands = exact(ODD, dtype, projected)
    for index in served(dtype, projected):
        _, report = call(operands, configuration=index, splits=1, counting=True)
        assert report["counters"]["shared_wavefronts"] > 0
        assert not [site for site in report["sites"] if site["counters"]["bank_conflicts"]]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("projected", [False, True])
def test_every_byte_once_and_one_column_stores_it(name, projected):
    """Of memory; and whatever the number of columns, each byte of out is stored by one of them."""
    if projected and name == NAMES[0]:
        pytest.skip("it serves no projection")
    operands = exact(WIDE, torch.bfloat16, projected)
    got, report = call(operands, configuration=NAMES.index(name), splits=1, counting=True)
    tensors = report["tensors"]
    y, norm, residual, own, weight = operands
    for key, t in {"y": y, "residual": residual, "weight": weight}.items():
        assert tensors[key]["unique_bytes_read"] == t.nbytes, key
    rows = norm.nbytes // 2  # two of four
    assert tensors["norm"]["unique_bytes_read"] == rows
    assert own is None or tensors["residual_norm"]["unique_bytes_read"] == rows
    assert tensors["out"]["unique_bytes_written"] == got[0].nbytes
    stores = [
        site["counters"]["global_store_bytes_asked"]
        for site in report["sites"]
        if site["file"].endswith("block_end_loader.h")
    ]
    assert sum(stores) == got[0].nbytes
    cost = roofline.bn_add_act_conv_stats_cost(WIDE, torch.bfloat16, projected=projected)
    moved = y.nbytes + residual.nbytes + weight.nbytes + sum(t.nbytes for t in got)
    moved += rows * (2 if projected else 1)
    assert moved <= 1.1 * cost.bytes


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout):
    """What the kernel cannot read is copied; so is a result that it cannot write."""
    operands = exact(ODD, torch.bfloat16, layout=layout)
    require(operands, call(operands, configuration=-1, splits=0)[0])


def test_each_operand_may_lie_otherwise():
    operands = exact(ODD, torch.float16)
    for place in (0, 2, 4):
        for layout in ("nchw", "sliced", "unaligned"):
            if place == 4 and layout == "sliced":
                continue
            moved = list(operands)
            moved[place] = lay_out(operands[place], layout)
            require(moved, call(moved, configuration=2, splits=2)[0])


def strike(place, value):
    """Noise with one value in operand `place`."""
    operands = noise(ODD, torch.float16)
    for rows in operands[1::2]:
        rows[0].abs_()
    t = operands[place]
    t[(0, 3) if t.dim() == 2 else (0, 3, 0, 0)] = value
    return operands


def require_struck(operands, got, place, value):
    """NaN and infinity where two kernels have them, and NaN in the statistics of those channels."""
    out, z, stats = got
    *end, weight = operands
    wanted = numerics.bn_add_act_oracle(*end)
    for one, oracle in (
        (out, wanted), (z, numerics.conv_bn_stats_oracle(wanted.to(out.dtype), None, weight)),
    ):  # fmt: skip
        assert torch.equal(one.isnan(), oracle.isnan())
        assert torch.equal(one.isposinf(), oracle.isposinf())
    struck = z.isfinite().all(dim=3).all(dim=2).all(dim=0).logical_not()
    assert torch.equal(stats[1].isnan(), struck)
    assert struck.any() != (value < 0 and place in (0, 2))  # those end at the ReLU


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", range(5))
def test_nan_and_inf_go_where_they_go_in_two_kernels(place, value):
    operands = strike(place, value)
    require_struck(operands, call(operands, configuration=3, splits=2)[0], place, value)


def test_what_does_not_exist_is_zero_and_not_the_shift():
    """Behind the last pixel and the last channel, where out would be a constant that is not 0."""
    case = cases.ConvCase("few", 1, 40, 5, 5, 24)
    operands = exact(case, torch.float16)
    operands[1][1] = 2
    operands[3][1] = 1
    operands[4][3, 5] = 1
    for index in served():
        require(operands, call(operands, configuration=index, splits=1)[0])


def test_one_pixel():
    case = cases.ConvCase("pixel", 1, 16, 1, 1, 24)
    operands = exact(case, torch.bfloat16)
    for index in served():
        (_, z, stats), _ = got = call(operands, configuration=index, splits=1)
        require(operands, got[0])
        assert torch.equal(stats[0], z.float().flatten()) and not stats[1].any()


def test_the_same_bits_whichever_block_comes_last():
    operands, results = noise(ODD, torch.bfloat16), []
    for order in (Schedule(), Schedule("lazy", "reverse"), Schedule("random", "shuffled", seed=5)):
        results.append(
            call(operands, schedule=order, configuration=3, splits=3, resident_blocks=6)[0]
        )
    for got in results[1:]:
        assert all(map(torch.equal, got, results[0]))


# The plan.


def problem(case, dtype=torch.bfloat16, projected=True, **changes):
    """A channels_last problem in memory that the plan never touches."""

    def image(shape):
        last = torch.channels_last
        return torch.empty(shape, dtype=dtype, device="meta", memory_format=last)

    y, z, weight = map(image, (case.input_shape, case.output_shape, case.weight_shape))
    rows = torch.empty(4, case.c, device="meta")
    given = {
        "y": y, "norm": rows, "residual": y, "residual_norm": rows if projected else None,
        "weight": weight, "out": y, "z": z, "stats": None,
    }  # fmt: skip
    places = {name: 4096 for name, t in given.items() if t is not None}
    return emulated_block_end.problem_of(given, **(places | changes))


def planned(*arguments, gpu=emulated.H200, configuration=-1, splits=0, **more):
    made = problem(*arguments, **more)
    return emulated.load().bn_add_act_conv_stats_plan(made, gpu, configuration, splits)


FIRST = cases.ConvCase("first", 256, 256, 56, 56, 64)
OTHER = (*emulated.H200[:3], 80)
"""An H200 whose kernels for sm_90a are not asked."""
THIRD = cases.ConvCase("third", 256, 1024, 14, 14, 256)


def test_the_plan_follows_the_shape():
    assert tuple(tile["name"] for tile in configurations() if not tile["tma"]) == NAMES
    second = dataclasses.replace(FIRST, c=512, h=28, w=28, k=128)
    for case, name in ((FIRST, NAMES[2]), (second, NAMES[1]), (THIRD, NAMES[0])):
        assert NAMES[planned(case, projected=False, gpu=OTHER)["configuration"]] == name
    assert NAMES[planned(THIRD, gpu=OTHER)["configuration"]] == NAMES[1]
    few = planned(dataclasses.replace(THIRD, n=1), gpu=OTHER)
    assert few["splits"] > 1 and NAMES[few["configuration"]] == NAMES[3]
    # 102 KB: more than a block has there.
    older = planned(THIRD, gpu=emulated.RTX3080, projected=False)
    assert NAMES[older["configuration"]] == NAMES[1]
    full = planned(THIRD, torch.float32, projected=False)
    assert NAMES[full["configuration"]] == NAMES[1]


def test_a_projection_costs_more():
    for index in served():
        plain = planned(THIRD, projected=False, configuration=index)
        assert plain["cycles"] < planned(THIRD, configuration=index)["cycles"]


def test_the_workspace_holds_moments_chunks_and_parts():
    plan = planned(FIRST, configuration=2, splits=1)
    tiles = FIRST.n * FIRST.h * FIRST.w // 128
    chunks = -(-tiles // 64)
    least = tiles * 64 * 8 + chunks * 64 * 16 + (chunks + 1) * 4
    assert least <= plan["workspace_bytes"] < least + 4 * 256
    more = planned(FIRST, configuration=2, splits=2)["workspace_bytes"]
    assert more >= plan["workspace_bytes"] + 2 * tiles * 128 * 64 * 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": torch.float64}, "dtype 1; bfloat16, float16"),
        ({"dtype": torch.float32, "allow_tf32": False}, "TF32 is not allowed"),
        ({"weight_size": (64, 256, 3, 1)}, "a 1x1 convolution of stride 1 in one group"),
        ({"stride": (1, 2)}, "a 1x1 convolution of stride 1"),
        ({"padding": (0, 1)}, "a 1x1 convolution of stride 1"),
        ({"weight_size": (64, 128, 1, 1), "groups": 2}, "in one group"),
        ({"norm": 0}, "a block's end is read through a BatchNorm"),
        ({"y": 4098}, "y: its channels do not lie side by side in units of 16 bytes"),
        ({"y_stride": (1, 3136, 56, 1)}, "y: its channels"),
        ({"residual_stride": (256 * 3136 + 8, 1, 256 * 56, 256)}, "residual: .* not one behind"),
        ({"out": 4100}, "out: its"),
        ({"weight_stride": (252, 1, 1, 1)}, "weight: its"),
        ({"norm": 4100}, "norm: its"),
        ({"residual_norm": 4100}, "residual_norm: its"),
        ({"y_size": (1, 256, 1 << 16, 1 << 15)}, "y: its channels"),
    ],
)
def test_what_no_launch_takes_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        planned(FIRST, **changes)


def test_wishes_that_nobody_can_fulfil_are_refused():
    with pytest.raises(ValueError, match="there are 0 to 7"):
        planned(FIRST, configuration=8)
    with pytest.raises(ValueError, match="no such parts with work for each"):
        planned(FIRST, configuration=2, splits=9)
    with pytest.raises(ValueError, match="in float32 does not fit"):
        planned(FIRST, torch.float32, projected=False, configuration=0)
    with pytest.raises(ValueError, match="too many columns for a projection"):
        planned(FIRST, configuration=0)
    with pytest.raises(ValueError, match="too much shared memory"):
        planned(FIRST, gpu=emulated.RTX3080, configuration=0)
    huge = dataclasses.replace(FIRST, n=1, h=1 << 16, w=1 << 15)
    with pytest.raises(ValueError, match="serves it: one image is more than a launch can take"):
        planned(huge)
    assert planned(dataclasses.replace(FIRST, n=1 << 20))["launches"] == 2


def test_nothing_is_launched_for_nothing():
    case = dataclasses.replace(ODD, n=0)
    got, report = call(exact(case, torch.bfloat16), configuration=-1, splits=0)
    assert report["plan"]["launches"] == 0 and not got[2].any()


# The launch's self-check, on the emulator.


def launch(*arguments, wish=None):
    """In the place of `_cuda_block_end.launch`."""
    wished = {} if wish is None else dict(zip(("configuration", "splits"), wish, strict=True))
    with emulated.using(**wished):
        found = overload(OP, emulated.NAME)(*arguments[:5])
    for to, one in zip(arguments[5:], found, strict=True):
        to.copy_(one)


def plan_index(made, index, splits):
    names = ("y", "norm", "residual", "residual_norm", "weight")
    given = dict(zip(names, made.operands, strict=True))
    given |= {"out": made.geometry[-1], "z": made.out, "stats": made.out}
    problem = emulated_block_end.problem_of(given)
    try:
        plan = emulated.load().bn_add_act_conv_stats_plan(problem, emulated.H200, index, splits)
    except ValueError:
        return -1
    return plan["configuration"]


@pytest.mark.parametrize("name", NAMES)
def test_the_self_check_passes(name):
    _cuda_block_end_checks.check(name, "cpu", launch, plan_index, NAMES)


def test_the_self_check_notices_faults():
    def turned(place):
        def run(*arguments, **more):
            given = list(arguments)
            given[place] = None if given[place] is None else given[place].roll(1, 1)
            launch(*given, **more)

        return run

    def result(place):
        def run(*arguments, **more):
            launch(*arguments, **more)
            last = (-1,) * arguments[place].dim()
            arguments[place][last] = 1.01 * arguments[place][last] + 1

        return run

    def silent(*arguments, **more):
        pass

    faults = (*map(turned, range(5)), *map(result, (5, 6, 7)), silent)
    for fault in faults:
        with pytest.raises(ArithmeticError):
            _cuda_block_end_checks.check(NAMES[3], "cpu", fault, plan_index, NAMES)
    with pytest.raises(ArithmeticError, match="no case"):
        _cuda_block_end_checks.check(NAMES[3], "cpu", launch, lambda *_: -1, NAMES)
    with pytest.raises(ValueError, match="accepted are"):
        _cuda_block_end_checks.check("other", "cpu", launch, plan_index, NAMES)


def test_an_empty_batch_has_statistics_of_zeros():
    stats = torch.full((2, 8), float("nan"))
    y, z = torch.empty(0, 16, 5, 5), torch.empty(0, 8, 5, 5)
    rows, weight = torch.ones(4, 16), torch.ones(8, 16, 1, 1)
    _cuda_block_end.launch(y, rows, y, None, weight, y.clone(), z, stats)
    assert not stats.any()
