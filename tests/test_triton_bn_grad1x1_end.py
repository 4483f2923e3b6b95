"""conv_bn_grad1x1_end in Triton: exact, in bound, each access, hostile operands; what it takes."""

from __future__ import annotations

import inspect
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_triton_bn_grad1x1 import LAYOUTS
from triton_bn_dgrad_end import channels_last
from triton_trace import PROOF, issued_bytes, needs_interpreter, watch

import resnet_fused as rf
from resnet_fused import cases, numerics
from resnet_fused.ops import _end_gradient
from resnet_fused.ops import _training_checks_dgrad_end as end_checks
from resnet_fused.ops import _training_checks_grad1x1_end as checks
from resnet_fused.triton import _grad1x1_end as rule
from resnet_fused.triton import _limits
from resnet_fused.triton import conv_bn_grad1x1_end as kernel

pytestmark = [
    *needs_interpreter,
    # NumPy's, about the NaN and Inf that are planted here.
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),
]

OP = _end_gradient.UNITED
TESTS = Path(__file__).resolve().parent
HALF = torch.float16
NAN, INF = float("nan"), float("inf")
# 126 pixels in tiles of 64; 65 channels and 40 filters, which no tile divides.
CASE = cases.ConvCase("odd", 2, 65, 7, 9, 40)
SERVED = cases.ConvCase("served", 2, 144, 7, 9, 48)
EVEN = cases.ConvCase("even", 2, 128, 8, 8, 64)
# 245 pixels: two programs with two tiles each.
SQUARE = cases.ConvCase("square", 5, 65, 7, 7, 40)
FORMS = tuple(itertools.product((True, False), (0, 1, 2), (True, False)))
"""Whether there are coefficients, the addend's stride (0: none), whether there is a projection."""


def operands_of(case, *, affine=True, projected=True, step=1, dtype=HALF):
    """channels_last, on which all is exact."""
    return channels_last(
        end_checks.exact_operands(case, dtype, affine=affine, addend=step, projected=projected)
    )


def launch(
    operands, case, *, step=1, name="64x128_8w2s", dx=None, dtype=torch.float32, parts=None
):  # fmt: skip
    """dx, sums, dweight, all in poisoned memory."""
    dx = torch.full_like(operands.raw, NAN) if dx is None else dx
    sums = torch.full((2 if operands.residual is None else 3, case.c), NAN)
    dweight = torch.full(case.weight_shape, NAN, dtype=dtype)
    config = kernel.BY_NAME[name]
    kernel.launch(*operands, dx, sums, dweight, max(1, step), config=config, parts=parts)
    return dx, sums, dweight


def same(got, wanted):
    return [
        torch.equal(one.double(), other.double()) for one, other in zip(got, wanted, strict=True)
    ]


def check_exact(operands, case, step=1, **options):
    got = launch(operands, case, step=step, **options)
    assert same(got, checks.expected(operands, case, step)) == [True] * 3


@pytest.mark.parametrize("name", checks.CONFIGURATIONS)
def test_every_configuration(name, monkeypatch):
    """The self-check of each, which poisons and guards the results; in CI of the odd sizes."""
    assert tuple(one.name for one in kernel.CONFIGS) == checks.CONFIGURATIONS
    assert checks.conv_bn_grad1x1_end_configurations() == checks.CONFIGURATIONS
    if not PROOF:
        _, odd = checks.cases_of(name)
        monkeypatch.setattr(checks, "cases_of", lambda configuration: (odd,))
    ran, right = [], kernel.launch

    def counting(*operands, **options):
        ran.append(options["config"].name)
        right(*operands, **options)

    monkeypatch.setattr(kernel, "launch", counting)
    checks.conv_bn_grad1x1_end(name, "cpu")
    limits = _limits.INTERPRETER_LIMITS
    served = limits.capability in kernel.BY_NAME[name].capabilities
    assert ran == ([name] * len(checks.WAYS) * (2 if PROOF else 1) if served else [])


@pytest.mark.parametrize(
    ("place", "what"), [(5, "dx"), (6, "sums are wrong"), (8, "sums are wrong"), (0, "dx")]
)
def test_the_self_check_finds_a_fault(place, what, monkeypatch):
    right, (_, odd) = kernel.launch, checks.cases_of("64x128_8w2s")
    monkeypatch.setattr(checks, "cases_of", lambda configuration: (odd,))

    def wrong(*operands, **options):
        found = list(operands)
        found[place] = found[place] if found[place] is None else found[place].roll(1, 1)
        right(*found, **options)

    monkeypatch.setattr(kernel, "launch", wrong)
    with pytest.raises(ArithmeticError, match=what):
        checks.conv_bn_grad1x1_end("64x128_8w2s", "cpu")
    with pytest.raises(KeyError):
        checks.conv_bn_grad1x1_end("1x1", "cpu")


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form)))
def test_every_prologue_and_end(form):
    affine, step, projected = form
    operands = operands_of(CASE, affine=affine, projected=projected, step=step)
    name = kernel.CONFIGS[FORMS.index(form) % len(kernel.CONFIGS)].name
    check_exact(operands, CASE, step, name=name)


@pytest.mark.parametrize("projected", [True, False])
def test_each_operand_is_read_once(projected):
    """`out` a second time for its sign; nothing else twice."""
    operands = operands_of(EVEN, projected=projected)
    with watch() as launches:
        check_exact(operands, EVEN)
    first, merge, sums = launches
    assert [one.name for one in launches] == [
        f"{OP}_kernel", "wgrad_merge_kernel", "sums_kernel"
    ]  # fmt: skip
    times = {"dz": 1, "y": 1, "weight": first.values["parts"], "addend": 1, "out": 2, "raw": 1}
    for name, count in (times | ({"residual": 1} if projected else {})).items():
        assert (first[name].loads == count).all(), name
    for name in ("dx", "partial", "workspace"):
        assert (first[name].stores == 1).all(), name
    assert (merge["partial"].loads == 1).all() and (merge["dweight"].stores == 1).all()
    assert (sums["workspace"].loads == 1).all() and (sums["sums"].stores == 1).all()


@pytest.mark.parametrize("projected", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("sizes", [(40, 72), (128, 264)], ids=str)
def test_what_it_asks_of_the_caches(sizes, affine, projected):
    """Bytes of active lanes, as the prediction counts them: 162 pixels, the last tile not full."""
    filters, channels = sizes
    case = cases.ConvCase("asked", 2, channels, 9, 9, filters)
    operands = operands_of(case, affine=affine, projected=projected)
    name = "64x128_8w2s" if filters <= 64 else "128x128_8w2s"
    with watch() as launches:
        launch(operands, case, name=name, dtype=HALF)
    expected = rule.issued_bytes(
        162, filters, channels, 2, kernel.BY_NAME[name], _limits.INTERPRETER_LIMITS, affine=affine,
        projected=projected, addend=operands.addend.numel(),
    )  # fmt: skip
    first = launches[0]
    places = {"x": ("out",), "raws": ("raw", "residual") if projected else ("raw",)}
    for field in ("dz", "y", "x", "weight", "addend", "raws"):
        names = places.get(field, (field,)) if field != "y" or affine else ()
        assert sum(first[one].loaded for one in names) == getattr(expected, field), field
    assert first["dx"].stored == expected.dx
    assert issued_bytes(launches) == expected.total


PLANTS = {
    "rows behind the last pixel": ("tl.where(inside[:, None], z, 0.0)", "z"),
    "C forgotten": ("a3[None, :])", "0 * a3[None, :])"),
    "y of the wrong rows": ("row = image * y_n + p * y_h", "row = image * y_n + q * y_h"),
    "weights of the raw output": (
        "            out + row[:, None]", "            raw + row[:, None]",
    ),
    "the mask of raw": ("passed = tl.load(out + where", "passed = tl.load(raw + where"),
    "a row for a column": ("dx, workspace, tile, image, p,", "dx, workspace, tile, image, q,"),
    "another tile's row": ("dx, workspace, tile, image", "dx, workspace, 0 * tile, image"),
    "a tile lost": ("tl.cdiv(pixels, BLOCK_M), parts", "tl.cdiv(pixels, BLOCK_M) - 1, parts"),
    "the last tile alone": ("h, acc, input_precision", "h, input_precision"),
    "one program's sums alone": ("(part.to(tl.int64) * filt", "(0 * part.to(tl.int64) * filt"),
    "a projection is not there": ("HAS_ADDEND, PROJECTED, BLOCK_N", "HAS_ADDEND, False, BLOCK_N"),
}  # fmt: skip
"""What is changed in the kernels' source, as (text, text in its place)."""


@pytest.mark.parametrize("name", PLANTS)
def test_the_exact_cases_bite(name, monkeypatch):
    """Each planted fault changes some result."""
    from triton.runtime import interpreter

    text, other = PLANTS[name]
    operands = operands_of(SQUARE)
    if "behind" in name:
        # Times an `out` of 0 behind the last pixel, an infinite C makes a NaN of dweight's Inf.
        operands.coefficients[2, 1] = INF
        operands.out.abs_().add_(1)
        operands.weight.abs_().add_(1)
    wanted = checks.expected(operands, SQUARE, 1)
    lines, found_in = inspect.getsourcelines, set()

    def planted(fn):
        found, first = lines(fn)
        if any(text in line for line in found):
            found_in.add(getattr(fn, "__name__", ""))
            found = [line.replace(text, other) for line in found]
        return found, first

    def right(got):
        return (
            torch.equal(got[0], wanted[0])
            and ("behind" in name or torch.equal(got[1], wanted[1]))
            and torch.equal(got[2].double(), wanted[2])
        )

    assert right(launch(operands, SQUARE, parts=2))
    monkeypatch.setattr(inspect, "getsourcelines", planted)
    monkeypatch.setattr(interpreter.InterpretedFunction, "rewritten_fn", {})
    got = launch(operands, SQUARE, parts=2)
    assert found_in and not right(got)


@pytest.mark.parametrize("step", [1, 2])
def test_one_rounding_behind_the_addend(step):
    """Gradients that float16 can't hold: they are rounded once, and so are the sums' terms."""
    operands = operands_of(CASE, step=step)
    operands.weight.mul_(9)
    check_exact(operands, CASE, step)


def test_the_mask_is_read_off_the_output():
    """NaN passes, both zeros and what is below do not."""
    case = cases.ConvCase("signs", 2, 72, 3, 7, 40)
    operands = operands_of(case)
    tiny = 2.0**-24
    signs = torch.tensor([NAN, INF, tiny, 0.0, -0.0, -tiny, -INF]).half()
    operands.out.copy_(signs.expand_as(operands.out))
    dx, sums, _ = launch(operands, case)
    free = checks.expected(operands._replace(out=torch.ones_like(operands.out)), case, 1)[0]
    assert torch.equal(dx[..., :3], free[..., :3]) and free[..., :3].any()
    zeros = dx[..., 3:]
    assert not zeros.any() and not zeros.signbit().any()
    assert torch.equal(sums, checks.expected(operands, case, 1)[1])


def test_a_mean_that_is_not_finite_reaches_its_channel_alone():
    """Of either BatchNorm, and only where there are pixels."""
    operands = operands_of(CASE)
    operands.norm[2, 5], operands.residual_norm[2, 7] = INF, -INF
    operands.out.fill_(1)
    operands.addend.fill_(10000)  # no gradient is 0
    dx, sums, _ = launch(operands, CASE)
    assert (dx > 0).all()
    assert sums[1, 5] == -INF and sums[2, 7] == INF and sums[0].isfinite().all()
    sums[1, 5] = sums[2, 7] = 0
    assert sums.isfinite().all()


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        (name, layout)
        for i, name in enumerate(["dz", "y", "weight", "addend", "out", "raw", "residual"])
        for j, layout in enumerate(LAYOUTS)
        if PROOF or (i + j) % 2
    ],
)
def test_operands_in_any_layout(name, layout):
    operands = operands_of(CASE)
    operands = operands._replace(**{name: LAYOUTS[layout](getattr(operands, name))})
    check_exact(operands, CASE)


@pytest.mark.parametrize("form", [(0, 3, 1, 2), (0, 1, 2, 3)])
def test_nothing_beside_the_gradient_is_written(form):
    """It lies with steps of two between its rows, and eight channels more behind each."""
    n, c, h, w = CASE.input_shape
    shape = (n, 2 * h, w, c + 8) if form[1] == 3 else (n, c + 8, 2 * h, w)
    memory = torch.full(shape, 77.0, dtype=HALF).permute(form)
    dx = memory[:, :c, ::2]
    dx.fill_(NAN)
    check_exact(operands_of(CASE), CASE, dx=dx)
    dx.fill_(77.0)
    assert (memory == 77.0).all()


def random_operands(case):
    dz, y = (torch.randn(case.output_shape).to(HALF) for _ in range(2))
    out, raw, residual, addend = (torch.randn(case.input_shape).to(HALF) for _ in range(4))
    weight = torch.randn(case.weight_shape).to(HALF)
    norm, own = torch.randn(4, case.c), torch.randn(4, case.c)
    return channels_last(
        end_checks.Operands(
            dz, y, torch.randn(3, case.k), weight, addend, out.relu(), raw, norm, residual, own
        )
    )


def check_bound(operands, got):
    """Against float64 of the operands given, and the sums of what was stored."""
    dx, sums, dweight = got
    end = operands[:6]
    oracle = numerics.conv_bn_dgrad_end_oracle(*end)
    factors = (*operands[:3], operands.out, None, dweight)
    wanted = numerics.conv_bn_wgrad_oracle(*factors)
    branches = [(operands.raw, operands.norm), (operands.residual, operands.residual_norm)]
    for one, other, bound in (
        (dx, oracle, numerics.conv_bn_dgrad_end_bound(*end, oracle)),
        (sums, numerics.reductions_oracle(dx, *branches), numerics.reductions_bound(dx, *branches)),
        (dweight, wanted, numerics.conv_bn_wgrad_bound(*factors, wanted)),
    ):
        found = numerics.check_bound(one, other, bound)
        assert found.ok, found
    return oracle


@pytest.mark.parametrize("name", checks.CONFIGURATIONS)
def test_within_the_bound_and_the_same_bits_each_time(name):
    operands = random_operands(CASE)
    got = launch(operands, CASE, name=name)
    check_bound(operands, got)
    for _ in range(20 if PROOF else 2):
        assert all(map(torch.equal, got, launch(operands, CASE, name=name)))


PLACES = ("dz", "y", "coefficients", "weight", "addend", "raw", "norm", "residual", "residual_norm")


@pytest.mark.parametrize("name", PLACES)
def test_nan_and_inf_stay_in_their_places(name):
    operands = random_operands(CASE)
    operands.out.add_(1)  # no ReLU stops what is planted
    where = getattr(operands, name)
    if where.dim() == 2:
        where[0, 3], where[1, 7], where[2, -1] = NAN, INF, -INF
    else:
        where[0, 3, 0, 0], where[-1, 7, -1, -1] = NAN, INF
    oracle = check_bound(operands, launch(operands, CASE))
    assert oracle.isfinite().any() or name == "coefficients"
    assert name in PLACES[5:] or oracle.isnan().any()


def test_an_empty_batch_gives_zeros_and_launches_nothing(monkeypatch):
    monkeypatch.delattr(kernel, f"{OP}_kernel")
    case = cases.ConvCase("empty", 0, 16, 4, 4, 16)
    dx, sums, dweight = launch(random_operands(case), case)
    assert not dx.numel() and sums.eq(0).all() and dweight.eq(0).all()


def call(operands, **options):
    named = {key: getattr(operands, key) for key in operands._fields[4:]}
    return rf.ops.conv_bn_grad1x1_end(
        operands.dz, operands.weight, operands.y, operands.coefficients, **{**named, **options}
    )


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_the_op_by_one_kernel(dtype, form):
    """Layouts as of the ops in its place; the gradient's dtype and strides are the parameter's."""
    operands = operands_of(SERVED, step=2)
    weight = operands.weight.contiguous(memory_format=form)
    operands = operands._replace(raw=operands.raw.contiguous(memory_format=form), weight=weight)
    parameter = None
    if dtype is not None:
        parameter = torch.empty(SERVED.c, SERVED.k, 1, 1, dtype=dtype).transpose(0, 1)
    with rf.backend("triton"), watch() as launches:
        got = call(operands, parameter=parameter, addend_stride=2)
    assert [one.name for one in launches] == [
        f"{OP}_kernel", "wgrad_merge_kernel", "sums_kernel"
    ]  # fmt: skip
    wanted = checks.expected(operands, SERVED, 2)
    like = weight if parameter is None else parameter
    assert same(got[:2], wanted[:2]) == [True] * 2
    assert torch.equal(got[2], wanted[2].to(like.dtype))
    assert got[2].dtype is like.dtype and got[2].stride() == like.stride()
    assert got[0].is_contiguous(memory_format=form)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (cases.ConvCase("filters", 1, 16, 3, 3, 144), HALF),
        (cases.ConvCase("channels", 1, 528, 3, 3, 48), HALF),
        (cases.ConvCase("eights", 1, 72, 3, 3, 40), HALF),
        (CASE, HALF),
        (SERVED, torch.float32),
    ],
    ids=str,
)
def test_other_calls_go_to_more_kernels(case, dtype):
    operands = operands_of(case, dtype=dtype)
    with rf.backend("triton"), watch() as launches:
        got = call(operands)
    names = {one.name for one in launches}
    assert f"{OP}_kernel" not in names
    assert {"conv_bn_dgrad_end_kernel", "conv_bn_wgrad_kernel"} <= names
    for one, other in zip(got, checks.expected(operands, case, 1), strict=True):
        assert torch.equal(one, other.to(one.dtype))
    results = (
        torch.empty_like(operands.raw),
        torch.empty(3, case.c),
        torch.empty_like(operands.weight),
    )
    with pytest.raises(LookupError, match=f"{case.k} filters and {case.c} channels"):
        kernel.launch(*operands, *results, 1)


HUGE = ("dz", "y", "raw", "addend", "dx")
RIGHT = (
    *(f"both {at} -" for at in ("end", "start")),
    *(f"wide {which} -" for which in HUGE),
)
FAULTS = (
    *(f"both end {fault}" for fault in ("pixels=99", "dz_w=99", "y_w=99", "end_w=99")),
    *(f"both end {fault}" for fault in ("dx_w=99", "addend_w=99", "filters=99", "channels=99")),
    *(f"wide {which} WIDE=-1" for which in HUGE),
)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: mmap without reserve")
@pytest.mark.timeout(300)
def test_nothing_beyond_is_touched_and_planted_faults_kill():
    """Between guard pages, and with steps beyond 2^31: what is off ends a child by a signal."""
    child = subprocess.run(
        [sys.executable, str(TESTS / "triton_bn_grad1x1_end_guard.py"), *RIGHT, *FAULTS],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
            "OMP_NUM_THREADS": "1",
        },
    )
    assert child.returncode == 0, child.stderr
    found = dict(line.split(": ") for line in child.stdout.splitlines())
    status = {scenario: int(outcome.split()[0]) for scenario, outcome in found.items()}
    assert {s: status[s] for s in RIGHT} == dict.fromkeys(RIGHT, 0), child.stderr
    died = {s: status[s] in (-signal.SIGSEGV, -signal.SIGBUS) for s in FAULTS}
    assert died == dict.fromkeys(FAULTS, True), child.stderr
