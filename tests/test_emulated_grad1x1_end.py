"""conv_bn_grad1x1_end in CUDA, emulated: exact, in bound, every byte once, any layout, the plan."""

from __future__ import annotations

import dataclasses
import itertools

import emulated
import emulated_grad1x1_end
import pytest
import torch
from emulated import Schedule
from emulated_grad1x1_end import DTYPES, OP
from matrix import LAYOUTS, lay_out

from resnet_fused import cases, numerics, roofline
from resnet_fused.ops import _cuda_grad1x1_end_checks as checks
from resnet_fused.ops._library import overload
from resnet_fused.ops._training_checks_dgrad_end import Operands, exact_operands

pytestmark = pytest.mark.emulated

NAMES = ("tma_64x128_4s", "tma_128x128_4s", "64x64_8w3s", "128x128_8w2s")
# By wgmma and by mma.sync.
BOTH = pytest.mark.parametrize("configuration", [0, NAMES.index("64x64_8w3s")])
# Affine, projected, the addend's stride, parts.
WAYS = ((True, True, 1, 2), (True, False, 2, 1), (False, True, 0, 3), (False, False, 3, 2))
ODD = cases.ConvCase("odd", 3, 136, 7, 9, 40)


def laid_out(operands, layout="nhwc"):
    return Operands(*(t if t is None or t.dim() == 2 else lay_out(t, layout) for t in operands))


def exact(case, dtype, affine=True, projected=True, step=1):
    return laid_out(exact_operands(case, dtype, affine=affine, addend=step, projected=projected))


def noise(case, dtype, **options):
    o = exact(case, dtype, **options)
    images = {
        name: torch.randn(t.shape).to(dtype)
        for name, t in o._asdict().items()
        if t is not None and t.dim() == 4
    }
    rows = {
        name: torch.randn(t.shape)
        for name, t in o._asdict().items()
        if t is not None and t.dim() == 2
    }
    return laid_out(o._replace(**images, **rows))


def call(o, step=1, dtype=torch.float32, **settings):
    """dx, sums, dweight, and the report of the kernel that multiplies."""
    parameter = torch.empty(o.weight.shape, dtype=dtype)
    with emulated.using(**settings) as runs:
        got = overload(OP, emulated.NAME)(*o, parameter, max(1, step))
    return got, runs.reports[0]


def require(case, o, got, step=1):
    """Every bit."""
    wanted = checks.expected(o, case, step)
    for name, one, other in zip(("dx", "sums", "dweight"), got, wanted, strict=True):
        assert torch.equal(one, other.to(one.dtype)), (case.name, name)


def branches(o):
    found = [(o.raw, o.norm)]
    return found if o.residual is None else [*found, (o.residual, o.residual_norm)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_configuration_is_exact(name, dtype):
    """Whole tiles and cut ones, in every way, with blocks side by side."""
    schedules = itertools.cycle(emulated.SCHEDULES[1::3])
    for case in checks.cases_of(name):
        for affine, projected, step, parts in WAYS:
            o = exact(case, dtype, affine, projected, step)
            kept = torch.float32 if projected else dtype
            got, report = call(
                o, step, kept, configuration=NAMES.index(name), splits=parts,
                schedule=next(schedules), resident_blocks=2,
            )  # fmt: skip
            assert report["plan"]["splits"] == parts
            require(case, o, got, step)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rounding", ["nearest", "toward_zero"])
def test_within_the_bounds(name, rounding):
    case, dtype = checks.cases_of(name)[1], torch.float16
    o = noise(case, dtype)
    got, _ = call(
        o, configuration=NAMES.index(name), splits=2, schedule=Schedule(rounding=rounding)
    )
    how = {"accumulation": "nearest" if rounding == "nearest" else "truncate", "k": 16}
    dx = numerics.conv_bn_dgrad_end_oracle(*o[:6])
    factors = (o.dz, o.y, o.coefficients, o.out, None, got[2])
    dweight = numerics.conv_bn_wgrad_oracle(*factors)
    oracles = (dx, numerics.reductions_oracle(got[0], *branches(o)), dweight)
    bounds = (
        numerics.conv_bn_dgrad_end_bound(*o[:6], dx, **how),
        numerics.reductions_bound(got[0], *branches(o)),
        numerics.conv_bn_wgrad_bound(*factors, dweight, **how),
    )
    for one, oracle, bound in zip(got, oracles, bounds, strict=True):
        assert (found := numerics.check_bound(one, oracle, bound)).ok, str(found)


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_no_bank_conflicts_and_every_byte_once(name, projected):
    case = checks.cases_of(name)[0]
    o = exact(case, torch.bfloat16, projected=projected)
    got, report = call(o, configuration=NAMES.index(name), splits=1, counting=True)
    assert report["counters"]["shared_wavefronts"] > 0
    assert not [site for site in report["sites"] if site["counters"]["bank_conflicts"]]
    tensors = report["tensors"]
    images = ("dz", "y", "weight", "addend", "out", "raw", *(["residual"] * projected))
    for key in images:
        assert tensors[key]["unique_bytes_read"] == getattr(o, key).nbytes, key
    vectors = ("coefficients", "norm", *(["residual_norm"] * projected))
    read = sum(tensors[key]["unique_bytes_read"] for key in (*images, *vectors))
    written = sum(tensors[key]["unique_bytes_written"] for key in ("dx", "workspace"))
    assert written == got[0].nbytes + report["plan"]["workspace_bytes"]
    cost = roofline.conv_bn_grad1x1_end_cost(
        case, torch.bfloat16, addend=o.addend.numel(), projected=projected,
        parameter=torch.float32,
    )  # fmt: skip
    assert read + sum(t.nbytes for t in got) <= 1.1 * cost.bytes


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout):
    """What the kernel cannot read is copied; so is a result that it cannot write."""
    o = laid_out(exact(ODD, torch.bfloat16, step=2), layout)
    got, _ = call(o, 2, configuration=-1, splits=0)
    require(ODD, o, got, 2)


@BOTH
def test_each_operand_may_lie_otherwise(configuration):
    o = exact(ODD, torch.float16, step=2)
    for name in ("dz", "y", "weight", "addend", "out", "raw", "residual"):
        for layout in ("nchw", "sliced", "unaligned"):
            if name == "weight" and layout == "sliced":
                continue
            moved = o._replace(**{name: lay_out(getattr(o, name), layout)})
            require(ODD, o, call(moved, 2, configuration=configuration, splits=2)[0], 2)


def test_pixels_that_repeat_need_no_copy():
    """By mma.sync: no map leads to them."""
    o = exact(ODD, torch.bfloat16)
    for name in ("dz", "out", "raw", "residual"):
        one = getattr(o, name)[:1, :, :1, :1].permute(0, 2, 3, 1)
        t = one.expand(3, 7, 9, one.shape[-1]).permute(0, 3, 1, 2)
        moved = o._replace(**{name: t})
        got, report = call(moved, configuration=-1, splits=0)
        assert NAMES[report["plan"]["configuration"]] == "64x64_8w3s", name
        assert f"; no TMA: {name}: " in report["plan"]["why"]
        require(ODD, moved, got)


@BOTH
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "operand", ["dz", "y", "coefficients", "out", "raw", "residual", "norm", "weight", "addend"]
)
def test_nan_and_inf_go_where_they_go_in_two_kernels(operand, value, configuration):
    o = noise(ODD, torch.float16)
    t = getattr(o, operand)
    t[(2 if operand == "norm" else 0, 3) if t.dim() == 2 else (0, 3, 0, 0)] = value
    got, _ = call(o, configuration=configuration, splits=2)
    dx = numerics.conv_bn_dgrad_end_oracle(*o[:6])
    dweight = numerics.conv_bn_wgrad_oracle(o.dz, o.y, o.coefficients, o.out, None, got[2])
    for one, oracle in ((got[0], dx), (got[2], dweight)):
        assert torch.equal(one.isnan(), oracle.isnan())
        assert torch.equal(one.isposinf(), oracle.isposinf())
    if value != value:
        sums = numerics.reductions_oracle(got[0], *branches(o))
        assert torch.equal(got[1].isnan(), sums.isnan())
        finite = dx.isfinite().all() and dweight.isfinite().all() and sums.isfinite().all()
        assert not finite


@BOTH
def test_the_mask_is_the_sign_of_the_output(configuration):
    """NaN passes, both zeros and what is below do not."""
    case = cases.ConvCase("one", 1, 8, 1, 7, 8)
    o = exact(case, torch.bfloat16, affine=False, projected=False, step=0)
    tiny = torch.finfo(torch.bfloat16).smallest_normal
    signs = torch.tensor([torch.nan, torch.inf, tiny, 0.0, -0.0, -tiny, -1.0])
    o = o._replace(
        out=laid_out([signs.expand(case.input_shape).to(torch.bfloat16)] * 10).out,
        dz=torch.ones_like(o.dz), weight=torch.eye(8).view(8, 8, 1, 1).to(o.weight),
    )  # fmt: skip
    (dx, _, _), _ = call(o, 0, configuration=configuration, splits=1)
    assert torch.equal(dx, torch.tensor([1.0, 1, 1, 0, 0, 0, 0]).to(dx).expand_as(dx))
    assert not dx.signbit().any(), "what did not pass is zero, and never minus zero"


@BOTH
def test_pixels_that_do_not_exist_are_zeros_and_not_c(configuration):
    case = dataclasses.replace(ODD, n=1, h=3, w=3)  # less than a step
    o = exact(case, torch.float16)
    o.coefficients[2] = 3
    require(case, o, call(o, configuration=configuration, splits=1)[0])


@BOTH
def test_the_same_bits_whatever_the_order(configuration):
    o, results = noise(ODD, torch.bfloat16), []
    for order in (Schedule(), Schedule("lazy", "reverse"), Schedule("random", "shuffled", seed=5)):
        how = {"configuration": configuration, "splits": 3, "resident_blocks": 3}
        results.append(call(o, schedule=order, **how)[0])
    for got in results[1:]:
        assert all(map(torch.equal, got, results[0]))


# The plan.


def problem(case, dtype=torch.bfloat16, projected=False, **changes):
    """A channels_last problem in memory that the plan never touches."""

    def image(shape):
        last = torch.channels_last
        return torch.empty(shape, dtype=dtype, device="meta", memory_format=last)

    dz, x, weight = map(image, (case.output_shape, case.input_shape, case.weight_shape))
    norm, rows = (torch.empty(n, c, device="meta") for n, c in ((4, case.c), (3, case.k)))
    given = {
        "dz": dz, "y": dz, "coefficients": rows, "weight": weight, "addend": x, "out": x, "raw": x,
        "norm": norm, "residual": x if projected else None,
        "residual_norm": norm if projected else None, "dx": x, "sums": norm, "dweight": weight,
    }  # fmt: skip
    places = {name: 4096 for name, t in given.items() if t is not None}
    return emulated_grad1x1_end.problem_of(given, 1, **(places | changes))


def planned(*arguments, gpu=emulated.H200, configuration=-1, splits=0, **more):
    made = problem(*arguments, **more)
    return emulated.load().conv_bn_grad1x1_end_plan(made, gpu, configuration, splits)


FIRST = cases.ConvCase("first", 256, 256, 56, 56, 64)
SECOND = cases.ConvCase("second", 256, 512, 28, 28, 128)
WITHOUT_TMA = (*emulated.H200[:3], 80)


def test_the_plan_follows_the_shape():
    table = emulated.load().conv_bn_grad1x1_end_configurations()
    assert tuple(tile["name"] for tile in table) == NAMES
    for case, index, parts in ((FIRST, 0, 66), (SECOND, 1, 33)):
        for projected in (False, True):
            plan = planned(case, projected=projected)
            assert (plan["configuration"], plan["splits"], plan["blocks"]) == (index, parts, 132)
            rows = case.k + 2 + projected
            assert plan["workspace_bytes"] == parts * 4 * rows * case.c
    # By mma.sync two blocks of the smaller tile share a multiprocessor.
    for gpu in (emulated.A100, emulated.RTX3080, WITHOUT_TMA):
        for case, name, each in ((FIRST, NAMES[2], 2), (SECOND, NAMES[3], 1)):
            plan = planned(case, projected=True, gpu=gpu)
            assert NAMES[plan["configuration"]] == name and "TMA" not in plan["why"]
            assert (each - 1) * gpu[0] < plan["blocks"] <= each * gpu[0]
    # As many parts as it has steps; of so few, more columns of channels are more blocks.
    small = planned(dataclasses.replace(FIRST, n=1, h=7, w=7))
    assert (NAMES[small["configuration"]], small["splits"], small["blocks"]) == (NAMES[2], 2, 8)


def test_what_is_read_and_summed_costs_more():
    for case, gpu in itertools.product((FIRST, SECOND), (emulated.H200, emulated.A100)):
        whole = planned(case, gpu=gpu)["cycles"]
        bare = planned(case, gpu=gpu, addend=0)["cycles"]
        assert bare < whole < planned(case, gpu=gpu, projected=True)["cycles"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": torch.float32}, "float32; bfloat16 and float16 are served"),
        ({"dweight_dtype": "float16"}, "dtype 2 of the weights' gradient; that of dz, 3"),
        ({"weight_size": (64, 256, 3, 1)}, "a 1x1 convolution of stride 1 in one group"),
        ({"stride": (1, 2)}, "a 1x1 convolution of stride 1"),
        ({"dz": 4098}, "dz: its channels do not lie side by side in units of 16 bytes"),
        ({"y_stride": (0, 1, 64, 64)}, "y: its channels"),
        ({"out_stride": (256 * 3136 + 8, 1, 256 * 56, 256)}, "out: .* not one behind the other"),
        ({"raw": 4100}, "raw: its"),
        ({"residual": 4100, "residual_norm": 4096, "projected": True}, "residual: its"),
        ({"dx": 4100}, "the result: its"),
        ({"weight_stride": (60, 1, 1, 1)}, "weight: its"),
        ({"coefficients": 4100}, "coefficients: its"),
        ({"addend": 4100}, "addend: its"),
        ({"addend_step": 0}, "an addend at every 0-th pixel"),
        ({"x_size": (1 << 20, 256, 56, 56)}, "more pixels or weights than a launch can have"),
    ],
)
def test_what_no_launch_takes_is_refused(changes, words):
    dtype = changes.get("dtype", torch.bfloat16)
    changes = {name: change for name, change in changes.items() if name != "dtype"}
    with pytest.raises(ValueError, match=words):
        planned(FIRST, dtype, **changes)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("raw", {"raw_stride": (0, 1, 0, 0)}),
        ("out", {"out_stride": (0, 1, 0, 0)}),
        ("dz", {"dz_stride": (0, 1, 0, 0), "y_stride": (0, 1, 0, 0)}),
    ],
)
def test_what_keeps_a_problem_from_tma_is_said(name, changes):
    plan = planned(FIRST, **changes)
    assert NAMES[plan["configuration"]] == NAMES[2] and f"; no TMA: {name}: " in plan["why"]
    with pytest.raises(ValueError, match=rf"\(tma_64x128_4s\), 0 parts: {name}: "):
        planned(FIRST, configuration=0, **changes)


def test_wishes_that_nobody_can_fulfil_are_refused():
    with pytest.raises(ValueError, match="there are 0 to 3"):
        planned(FIRST, configuration=4)
    with pytest.raises(ValueError, match="no such parts with work for each"):
        planned(ODD, configuration=0, splits=9)
    with pytest.raises(ValueError, match=r"1 \(tma_64x128_4s\)|more filters than a block keeps"):
        planned(SECOND, configuration=0)
    with pytest.raises(ValueError, match="serves it: more filters"):
        planned(dataclasses.replace(FIRST, k=136))
    with pytest.raises(ValueError, match="TMA and wgmma are for GPUs of capability 9.0"):
        planned(FIRST, gpu=WITHOUT_TMA, configuration=0)
    little = (*emulated.RTX3080[:1], 64 * 1024, *emulated.RTX3080[2:])
    with pytest.raises(ValueError, match="serves it: too much shared memory"):
        planned(SECOND, gpu=little)


def test_nothing_is_launched_for_nothing():
    case = dataclasses.replace(ODD, n=0)
    got, report = call(exact(case, torch.bfloat16), configuration=-1, splits=0)
    assert report["plan"]["launches"] == 0 and not got[2].any()


# The launch's self-check, on the emulator.


def launch(*arguments, wish=None):
    """In the place of `_cuda_grad1x1_end.launch`."""
    *operands, dx, sums, dweight, step = arguments
    wished = {} if wish is None else dict(zip(("configuration", "splits"), wish, strict=True))
    with emulated.using(**wished):
        found = overload(OP, emulated.NAME)(*operands, dweight, step)
    for to, one in zip((dx, sums, dweight), found, strict=True):
        to.copy_(one)


@pytest.mark.parametrize("name", NAMES)
def test_the_self_check_passes(name):
    checks.check(name, "cpu", launch, NAMES)


def test_the_self_check_notices_faults():
    def result(place):
        def run(*arguments, **more):
            launch(*arguments, **more)
            arguments[place].select(0, -1).select(0, -1).add_(1)

        return run

    def bare(*arguments, **more):
        launch(*arguments[:5], torch.ones_like(arguments[5]), *arguments[6:], **more)

    def silent(*arguments, **more):
        pass

    for fault in (result(10), result(11), result(12), bare, silent):
        with pytest.raises(ArithmeticError):
            checks.check(NAMES[0], "cpu", fault, NAMES)
    with pytest.raises(ValueError, match="accepted are"):
        checks.check("other", "cpu", launch, NAMES)
