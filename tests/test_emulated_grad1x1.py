"""conv_bn_grad1x1 in CUDA, emulated: exact, in bound, every byte once, any layout, the plan."""

from __future__ import annotations

import dataclasses
import itertools

import emulated
import emulated_grad1x1
import pytest
import torch
from emulated import Schedule
from emulated_grad1x1 import DTYPES, OP
from matrix import LAYOUTS, lay_out

from resnet_fused import cases, numerics, roofline
from resnet_fused.ops import _cuda_grad1x1, _cuda_grad1x1_checks
from resnet_fused.ops import _training_checks_dgrad as dgrad_checks
from resnet_fused.ops import _training_checks_wgrad as wgrad_checks
from resnet_fused.ops._library import overload
from resnet_fused.ops._training_checks_grad1x1 import cases_of

pytestmark = pytest.mark.emulated

NAMES = (
    "64x64_8w3s", "64x256_8w2s", "256x64_8w3s",
    "tma_64x64_6s", "tma_64x256_4s", "tma_256x64_4s", "tma_128x128_4s",
)  # fmt: skip
# Affine, norm, the addend's stride, parts.
WAYS = ((True, True, 1, 2), (True, False, 2, 1), (False, True, 0, 3), (False, False, 3, 2))
ODD = cases.ConvCase("odd", 3, 72, 7, 9, 40)


def configurations() -> list[dict]:
    return emulated.load().conv_bn_grad1x1_configurations()


def laid_out(operands, layout="nhwc"):
    return dgrad_checks.Operands(
        *(t if t is None or t.dim() == 2 else lay_out(t, layout) for t in operands)
    )


def exact(case, dtype, affine=True, norm=True, step=1):
    made = dgrad_checks.exact_operands(case, dtype, affine=affine, addend=step, below=True)
    return laid_out(made if norm else made._replace(norm=None))


def noise(case, dtype):
    o = exact(case, dtype)
    images = {
        name: torch.randn(t.shape).to(dtype)
        for name, t in o._asdict().items()
        if t is not None and t.dim() == 4
    }
    rows = {"coefficients": torch.randn(3, case.k), "norm": torch.randn(4, case.c)}
    return laid_out(o._replace(**images, **rows))


def call(o, step=1, dtype=torch.float32, **settings):
    """dx, sums, dweight, and the report of the kernel that multiplies."""
    parameter = torch.empty(o.weight.shape, dtype=dtype)
    with emulated.using(**settings) as runs:
        got = overload(OP, emulated.NAME)(
            o.dz, o.y, o.coefficients, o.raw, o.norm, o.weight, o.addend, parameter, True,
            max(1, step),
        )  # fmt: skip
    return got, runs.reports[0]


def factors(o):
    return wgrad_checks.Operands(o.dz, o.y, o.coefficients, o.raw, o.norm)


def require(case, o, got, step=1):
    """Every bit."""
    seen = o if o.norm is not None else o._replace(raw=None)
    dx, sums = dgrad_checks.expected_dgrad(seen, case, max(1, step))
    dweight = wgrad_checks.expected_wgrad(factors(o), case).to(got[2].dtype)
    for name, one, other in zip(("dx", "sums", "dweight"), got, (dx, sums, dweight), strict=True):
        assert torch.equal(one, other), (case.name, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_configuration_is_exact(name, dtype):
    """Whole tiles and cut ones, in every way, with blocks side by side."""
    schedules = itertools.cycle(emulated.SCHEDULES[1::3])
    for case in cases_of(name):
        for affine, norm, step, parts in WAYS:
            o = exact(case, dtype, affine, norm, step)
            kept = torch.float32 if norm else dtype
            got, report = call(
                o, step, kept, configuration=NAMES.index(name), splits=parts,
                schedule=next(schedules), resident_blocks=2,
            )  # fmt: skip
            assert report["plan"]["splits"] == parts
            require(case, o, got, step)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rounding", ["nearest", "toward_zero"])
def test_within_the_bounds(name, rounding):
    case, dtype = cases_of(name)[1], torch.float16
    o = noise(case, dtype)
    got, _ = call(
        o, configuration=NAMES.index(name), splits=2, schedule=Schedule(rounding=rounding)
    )
    how = {"accumulation": "nearest" if rounding == "nearest" else "truncate", "k": 16}
    dx = numerics.conv_bn_dgrad_oracle(*o, input_size=case.input_shape)
    sums = numerics.reductions_oracle(got[0], (o.raw, o.norm))
    dweight = numerics.conv_bn_wgrad_oracle(*factors(o), got[2])
    bounds = (
        numerics.conv_bn_dgrad_bound(*o, dx, **how),
        numerics.reductions_bound(got[0], (o.raw, o.norm)),
        numerics.conv_bn_wgrad_bound(*factors(o), got[2], dweight, **how),
    )
    for one, oracle, bound in zip(got, (dx, sums, dweight), bounds, strict=True):
        assert (found := numerics.check_bound(one, oracle, bound)).ok, str(found)


@pytest.mark.parametrize("name", NAMES)
def test_no_bank_conflicts_and_every_byte_once(name):
    case = cases_of(name)[0]
    o = exact(case, torch.bfloat16)
    got, report = call(o, configuration=NAMES.index(name), splits=1, counting=True)
    assert report["counters"]["shared_wavefronts"] > 0
    assert not [site for site in report["sites"] if site["counters"]["bank_conflicts"]]
    tensors = report["tensors"]
    named = {"dz": o.dz, "y": o.y, "x": o.raw, "weight": o.weight, "addend": o.addend}
    for key, t in named.items():
        assert tensors[key]["unique_bytes_read"] == t.nbytes, key
    read = sum(tensors[key]["unique_bytes_read"] for key in (*named, "coefficients", "norm"))
    written = sum(tensors[key]["unique_bytes_written"] for key in ("dx", "workspace"))
    assert written == got[0].nbytes + report["plan"]["workspace_bytes"]
    cost = roofline.conv_bn_grad1x1_cost(
        case, torch.bfloat16, addend=o.addend.numel(), masked=True, parameter=torch.float32
    )
    assert read + sum(t.nbytes for t in got) <= 1.1 * cost.bytes


def test_warps_share_the_parts_of_an_element():
    """Nobody loads all of them one behind the other; some warps have one more than others."""
    case = dataclasses.replace(ODD, n=9, h=8, w=8)
    o = exact(case, torch.bfloat16)
    parts, columns, elements = 18, 2, (case.k + 2) * case.c
    got, report = call(o, configuration=0, splits=parts)
    require(case, o, got)
    assert report["blocks"] == parts * columns + -(-elements // 32)  # of eight warps


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout):
    """What the kernel cannot read is copied; so is a result that it cannot write."""
    o = laid_out(exact(ODD, torch.bfloat16, step=2), layout)
    got, _ = call(o, 2, configuration=-1, splits=0)
    require(ODD, o, got, 2)


def test_each_operand_may_lie_otherwise():
    o = exact(ODD, torch.float16, step=2)
    for name in ("dz", "y", "raw", "weight", "addend"):
        for layout in ("nchw", "sliced", "unaligned"):
            if name == "weight" and layout == "sliced":
                continue
            moved = o._replace(**{name: lay_out(getattr(o, name), layout)})
            require(ODD, o, call(moved, 2, configuration=0, splits=2)[0], 2)


def test_pixels_in_rows_need_no_copy():
    """Slices of more channels, repeated pixels and sizes of 1 are read as they lie."""
    o = exact(ODD, torch.bfloat16)
    wide = torch.full((3, 7, 9, 64), torch.nan, dtype=torch.bfloat16)
    wide[..., 16:56] = o.dz.permute(0, 2, 3, 1)
    sliced = wide[..., 16:56].permute(0, 3, 1, 2)
    assert _cuda_grad1x1.in_rows(sliced) and _cuda_grad1x1.in_rows(o.raw)
    require(ODD, o, call(o._replace(dz=sliced), configuration=0, splits=1)[0])
    one = torch.randint(-4, 5, (1, 1, 1, 40)).to(torch.bfloat16)
    repeated = o._replace(dz=one.expand(3, 7, 9, 40).permute(0, 3, 1, 2))
    assert _cuda_grad1x1.in_rows(repeated.dz)
    require(ODD, repeated, call(repeated, configuration=0, splits=1)[0])
    memory = torch.empty(256, dtype=torch.bfloat16)
    for shape in ((5, 40, 1, 1), (1, 40, 5, 1), (1, 40, 1, 1)):
        assert _cuda_grad1x1.in_rows(memory.as_strided(shape, (48, 1, 48, 7)))
    columns = torch.empty(2, 8, 6, 40, dtype=torch.bfloat16).permute(0, 3, 2, 1)
    assert not _cuda_grad1x1.in_rows(columns) and _cuda_grad1x1.in_chunks(columns)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("operand", ["dz", "y", "coefficients", "raw", "norm", "weight", "addend"])
def test_nan_and_inf_go_where_they_go_in_two_kernels(operand, value):
    o = noise(ODD, torch.float16)
    t = getattr(o, operand)
    t[(0, 3) if t.dim() == 2 else (0, 3, 0, 0)] = value
    got, _ = call(o, configuration=0, splits=2)
    dx = numerics.conv_bn_dgrad_oracle(*o, input_size=ODD.input_shape)
    dweight = numerics.conv_bn_wgrad_oracle(*factors(o), got[2])
    for one, oracle in ((got[0], dx), (got[2], dweight)):
        assert torch.equal(one.isnan(), oracle.isnan())
        assert torch.equal(one.isposinf(), oracle.isposinf())
    assert not (dx.isfinite().all() and dweight.isfinite().all())
    if value != value:
        sums = numerics.reductions_oracle(got[0], (o.raw, o.norm))
        assert torch.equal(got[1].isnan(), sums.isnan())


def test_pixels_that_do_not_exist_are_zeros_and_not_c_or_the_shift():
    """Behind the last pixel, where both factors would be constants that are not zero."""
    case = dataclasses.replace(ODD, n=1, h=5, w=5)  # less than a step
    o = exact(case, torch.float16)
    o.norm[1] = 2
    o.coefficients[2] = 3
    require(case, o, call(o, configuration=0, splits=1)[0])


def test_the_same_bits_whatever_the_order():
    o, results = noise(ODD, torch.bfloat16), []
    for order in (Schedule(), Schedule("lazy", "reverse"), Schedule("random", "shuffled", seed=5)):
        results.append(call(o, schedule=order, configuration=0, splits=3, resident_blocks=3)[0])
    for got in results[1:]:
        assert all(map(torch.equal, got, results[0]))


# The plan.


def problem(case, dtype=torch.bfloat16, masked=True, **changes):
    """A channels_last problem in memory that the plan never touches."""

    def image(shape):
        last = torch.channels_last
        return torch.empty(shape, dtype=dtype, device="meta", memory_format=last)

    dz, x, weight = map(image, (case.output_shape, case.input_shape, case.weight_shape))
    norm = torch.empty(4, case.c, device="meta") if masked else None
    rows = torch.empty(3, case.k, device="meta")
    given = {
        "dz": dz, "y": dz, "coefficients": rows, "x": x, "norm": norm, "weight": weight,
        "addend": None, "dx": x, "sums": None, "dweight": weight,
    }  # fmt: skip
    places = {name: 4096 for name, t in given.items() if t is not None}
    return emulated_grad1x1.problem_of(given, 1, **(places | changes))


def planned(*arguments, gpu=emulated.H200, configuration=-1, splits=0, **more):
    made = problem(*arguments, **more)
    return emulated.load().conv_bn_grad1x1_plan(made, gpu, configuration, splits)


EXPANDING = cases.ConvCase("expanding", 256, 64, 56, 56, 256)
REDUCING = cases.ConvCase("reducing", 256, 256, 56, 56, 64)
WITHOUT_TMA = (*emulated.H200[:3], 80)


def test_the_plan_follows_the_shape():
    assert tuple(tile["name"] for tile in configurations()) == NAMES
    for gpu in (emulated.H200, WITHOUT_TMA):
        tma = gpu is emulated.H200
        for case, names in ((EXPANDING, (NAMES[5], NAMES[2])), (REDUCING, (NAMES[4], NAMES[1]))):
            plan = planned(case, gpu=gpu)
            assert (NAMES[plan["configuration"]], plan["splits"]) == (names[not tma], 132)
            assert plan["workspace_bytes"] == 132 * 4 * (case.k * case.c + 2 * case.c)
            assert "TMA" not in plan["why"]
        # All blocks run at one time, two of the smallest of sm_80 on a multiprocessor.
        first = planned(dataclasses.replace(REDUCING, c=64), gpu=gpu)
        assert NAMES[first["configuration"]] == NAMES[3 if tma else 0]
        assert 131 <= first["blocks"] <= 132 if tma else 132 < first["blocks"] <= 264
    # Those that share the pixels stand side by side.
    for index in (1, 4):
        wide = planned(dataclasses.replace(REDUCING, c=512), configuration=index)
        assert wide["splits"] == 66 and wide["blocks"] == 132
    next_stage = planned(dataclasses.replace(REDUCING, k=128))
    assert (NAMES[next_stage["configuration"]], next_stage["splits"]) == (NAMES[6], 66)
    small = planned(dataclasses.replace(EXPANDING, n=1, h=7, w=7))
    assert small["splits"] == 2


@pytest.mark.parametrize("name", NAMES)
def test_what_is_read_and_turned_and_masked_costs_more(name):
    filters, channels = map(int, name.removeprefix("tma_").split("_")[0].split("x"))
    case = dataclasses.replace(EXPANDING, k=filters, c=channels)

    def cycles(**more):
        return planned(case, configuration=NAMES.index(name), **more)["cycles"]

    bare = cycles(masked=False, y=0, coefficients=0)
    if name.startswith("tma"):  # memory bounds it: what is masked is hidden
        rows = (channels * 3136, 1, 56 * channels, channels)
        added = cycles(masked=False, addend=4096, addend_stride=rows)
        assert bare < cycles(masked=False) <= cycles() < added
    else:
        assert bare < cycles(masked=False) < cycles()


def test_what_keeps_a_problem_from_tma_is_said():
    still = {"dz_stride": (0, 1, 0, 0), "y_stride": (0, 1, 0, 0)}
    plan = planned(EXPANDING, **still)
    assert NAMES[plan["configuration"]] == NAMES[2] and "; no TMA: dz: " in plan["why"]
    with pytest.raises(ValueError, match=r"\(tma_256x64_4s\), 0 parts: dz: "):
        planned(EXPANDING, configuration=5, **still)
    with pytest.raises(ValueError, match="TMA and wgmma are for GPUs of capability 9.0"):
        planned(EXPANDING, gpu=WITHOUT_TMA, configuration=5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": torch.float32}, "float32; bfloat16 and float16 are served"),
        ({"dweight_dtype": "float16"}, "dtype 2 of the weights' gradient; that of dz, 3"),
        ({"weight_size": (256, 64, 3, 1)}, "a 1x1 convolution of stride 1 in one group"),
        ({"stride": (1, 2)}, "a 1x1 convolution of stride 1"),
        ({"padding": (0, 1)}, "a 1x1 convolution of stride 1"),
        ({"weight_size": (256, 32, 1, 1), "groups": 2}, "in one group"),
        ({"dz": 4098}, "dz: its channels do not lie side by side in units of 16 bytes"),
        ({"dz_stride": (1, 3136, 56, 1)}, "dz: its channels"),
        ({"y_stride": (0, 1, 256, 256)}, "y: its channels"),
        ({"x_stride": (64 * 3136 + 8, 1, 64 * 56, 64)}, "x: .* not one behind the other"),
        ({"dx": 4100}, "the result: its"),
        ({"weight_stride": (60, 1, 1, 1)}, "weight: its"),
        ({"coefficients": 4100}, "coefficients: its"),
        ({"norm": 4100}, "norm: its"),
        ({"addend": 4100, "addend_stride": (64 * 3136, 1, 3584, 64)}, "addend: its"),
        ({"addend": 4096, "addend_step": 0}, "an addend at every 0-th pixel"),
        ({"x_size": (1 << 20, 64, 56, 56)}, "more pixels or weights than a launch can have"),
    ],
)
def test_what_no_launch_takes_is_refused(changes, words):
    dtype = changes.get("dtype", torch.bfloat16)
    changes = {name: change for name, change in changes.items() if name != "dtype"}
    with pytest.raises(ValueError, match=words):
        planned(EXPANDING, dtype, **changes)


def test_wishes_that_nobody_can_fulfil_are_refused():
    with pytest.raises(ValueError, match="there are 0 to 6"):
        planned(EXPANDING, configuration=7)
    with pytest.raises(ValueError, match="no such parts with work for each"):
        planned(dataclasses.replace(ODD), configuration=0, splits=7)
    with pytest.raises(ValueError, match="more filters than a block keeps"):
        planned(EXPANDING, configuration=0)
    with pytest.raises(ValueError, match="serves it: more filters"):
        planned(dataclasses.replace(EXPANDING, k=264))
    with pytest.raises(ValueError, match="too much shared memory"):
        planned(EXPANDING, gpu=emulated.RTX3080)
    assert NAMES[planned(REDUCING, gpu=emulated.RTX3080)["configuration"]] == NAMES[1]


def test_nothing_is_launched_for_nothing():
    case = dataclasses.replace(ODD, n=0)
    got, report = call(exact(case, torch.bfloat16), configuration=-1, splits=0)
    assert report["plan"]["launches"] == 0 and not got[2].any()


# The launch's self-check, on the emulator.


def launch(dz, y, rows, x, norm, weight, addend, dx, sums, dweight, step, wish=None):
    """In the place of `_cuda_grad1x1.launch`."""
    wished = {} if wish is None else dict(zip(("configuration", "splits"), wish, strict=True))
    with emulated.using(**wished):
        found = overload(OP, emulated.NAME)(
            dz, y, rows, x, norm, weight, addend, dweight, True, step
        )
    for to, one in zip((dx, sums, dweight), found, strict=True):
        to.copy_(one)


@pytest.mark.parametrize("name", NAMES)
def test_the_self_check_passes(name):
    _cuda_grad1x1_checks.check(name, "cpu", launch, NAMES)


def test_the_self_check_notices_faults():
    def rows(dz, y, coefficients, *rest, **more):
        turned = None if coefficients is None else coefficients.roll(1, 1)
        launch(dz, y, turned, *rest, **more)

    def below(*arguments, **more):
        norm = None if arguments[4] is None else arguments[4].roll(1, 1)
        launch(*arguments[:4], norm, *arguments[5:], **more)

    def result(place):
        def run(*arguments, **more):
            launch(*arguments, **more)
            arguments[place].select(0, -1).select(0, -1).add_(1)

        return run

    def silent(*arguments, **more):
        pass

    for fault in (rows, below, result(7), result(8), result(9), silent):
        with pytest.raises(ArithmeticError):
            _cuda_grad1x1_checks.check(NAMES[0], "cpu", fault, NAMES)
    with pytest.raises(ValueError, match="accepted are"):
        _cuda_grad1x1_checks.check("other", "cpu", launch, NAMES)
