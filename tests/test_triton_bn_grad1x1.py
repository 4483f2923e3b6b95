"""conv_bn_grad1x1: both gradients of a 1x1 convolution in one kernel; which calls it takes."""

from __future__ import annotations

import dataclasses
import inspect
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from triton_trace import PROOF, needs_interpreter, watch

import resnet_fused as rf
from resnet_fused import cases, numerics
from resnet_fused.ops import _training_checks_dgrad as dgrad_checks
from resnet_fused.ops import _training_checks_grad1x1 as checks
from resnet_fused.ops import _training_checks_wgrad as wgrad_checks
from resnet_fused.triton import _tiles

pytestmark = [
    *needs_interpreter,
    # NumPy's, about the NaN and Inf that are planted here.
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),
]

TESTS = Path(__file__).resolve().parent
HALF = torch.float16
NAN, INF = float("nan"), float("inf")
# 126 pixels in tiles of 64; 65 channels and 40 filters, which no tile divides.
CASE = cases.ConvCase("odd", 2, 65, 7, 9, 40)
SERVED = cases.ConvCase("served", 2, 72, 7, 9, 40)
EVEN = cases.ConvCase("even", 2, 64, 8, 8, 200)


def operands_of(case, *, affine=True, below=True, step=1, dtype=HALF):
    """dz, y, coefficients, weight, addend, x, norm, channels_last, on which all is exact."""
    found = dgrad_checks.exact_operands(case, dtype, affine=affine, addend=step)
    form = torch.channels_last
    found = [t if t is None or t.dim() == 2 else t.contiguous(memory_format=form) for t in found]
    operands = dgrad_checks.Operands(*found)
    return operands if below else operands._replace(norm=None)


def expected(operands, case, step=1):
    """dx, sums, dweight in float64."""
    dz, y, coefficients, _, _, x, norm = operands
    seen = operands if norm is not None else operands._replace(raw=None)
    dx, sums = dgrad_checks.expected_dgrad(seen, case, step)
    factors = wgrad_checks.Operands(dz, y, coefficients, x, norm)
    return dx, sums, wgrad_checks.expected_wgrad(factors, case)


def launch(operands, case, *, step=1, config=None, dx=None, dtype=torch.float32):
    """dx, sums, dweight, all in poisoned memory."""
    from resnet_fused.triton import conv_bn_grad1x1 as kernel

    dz, y, coefficients, weight, addend, x, norm = operands
    dx = torch.full_like(x, NAN) if dx is None else dx
    config = config or kernel.BY_NAME["64x128_8w2s" if case.k <= 64 else "256x64_8w2s"]
    sums = torch.full((0 if norm is None else 2, case.c), NAN)
    dweight = torch.full(case.weight_shape, NAN, dtype=dtype)
    kernel.launch(
        dz, y, coefficients, x, norm, weight, addend, dx, sums, dweight, step, config=config
    )
    return dx, sums, dweight


def check_exact(operands, case, step=1, **options):
    got = launch(operands, case, step=step, **options)
    for name, one, other in zip(
        ("dx", "sums", "dweight"), got, expected(operands, case, step), strict=True
    ):
        assert torch.equal(one.double(), other.double()), name


@pytest.mark.parametrize("name", checks.CONFIGURATIONS)
def test_every_configuration(name, monkeypatch):
    """The self-check of each, which poisons and guards the results; in CI of the odd sizes."""
    from resnet_fused.triton import conv_bn_grad1x1 as kernel

    assert tuple(one.name for one in kernel.CONFIGS) == checks.CONFIGURATIONS
    assert checks.conv_bn_grad1x1_configurations() == checks.CONFIGURATIONS
    if not PROOF:
        _, odd = checks.cases_of(name)
        monkeypatch.setattr(checks, "cases_of", lambda configuration: (odd,))
    checks.conv_bn_grad1x1(name, "cpu")


def test_the_self_check_finds_a_fault(monkeypatch):
    from resnet_fused.triton import conv_bn_grad1x1 as kernel

    right = kernel.launch
    for place, what in ((2, "dx"), (4, "elements are wrong|the sums")):

        def wrong(*operands, place=place, **options):
            found = list(operands)
            found[place] = found[place] if found[place] is None else found[place].roll(1, 1)
            right(*found, **options)

        monkeypatch.setattr(kernel, "launch", wrong)
        with pytest.raises(ArithmeticError, match=what):
            checks.conv_bn_grad1x1("256x64_8w2s", "cpu")


@pytest.mark.parametrize(
    ("affine", "below", "step"),
    [
        (bool(affine), bool(below), step)
        for affine in range(2)
        for below in range(2)
        for step in range(4)
        if PROOF or (affine + below + step) % 2
    ],
)
def test_every_prologue_and_addend(affine, below, step):
    operands = operands_of(CASE, affine=affine, below=below, step=step)
    check_exact(operands, CASE, max(1, step))


@pytest.mark.parametrize("below", [True, False])
def test_each_operand_is_read_once(below):
    """dz and y once for each 128 channels, x a second time for its mask; nothing else twice."""
    operands = operands_of(EVEN, below=below)
    with watch() as launches:
        check_exact(operands, EVEN)
    first, merge = launches[:2]
    for name, times in (("dz", 1), ("y", 1), ("weight", None), ("addend", 1)):
        parts = first.values["parts"]
        assert (first[name].loads == (parts if times is None else times)).all(), name
    assert (first["x"].loads == (2 if below else 1)).all()
    assert (first["dx"].stores == 1).all()
    assert (first["partial"].stores == 1).all() and (merge["partial"].loads == 1).all()
    assert (merge["dweight"].stores == 1).all()
    if below:
        assert (first["workspace"].stores == 1).all()
        assert (launches[2]["workspace"].loads == 1).all()
    assert len(launches) == (3 if below else 2)


PLANTS = {
    "rows behind the last pixel": ("tl.where(inside[:, None], z, 0.0)", "z"),
    "no ReLU": ("activated(h, scale[None, :], shift[None, :])", "h * scale[None, :]"),
    "C forgotten": ("a3[None, :])", "0 * a3[None, :])"),
    "addend of another pixel": ("image, p, q, inside", "image, q, p, inside"),
    "a tile lost": ("tl.cdiv(pixels, BLOCK_M), parts", "tl.cdiv(pixels, BLOCK_M) - 1, parts"),
}

PLANTED = ("conv_bn_grad1x1_kernel", "gradient_of_tile")
"""The functions that are changed."""


@pytest.mark.parametrize("name", PLANTS)
def test_the_exact_cases_bite(name, monkeypatch):
    from triton.runtime import interpreter

    text, other = PLANTS[name]
    case = cases.ConvCase("square", 2, 65, 7, 7, 40)
    operands = operands_of(case)
    if "behind" in name:
        # Times an h of 0 behind the last pixel, an infinite C would make NaN of dweight's Inf.
        operands.coefficients[2, 1] = INF
        operands.raw.abs_().add_(1)
        operands.norm[:2].abs_()
        operands.weight.abs_().add_(1)
    wanted = expected(operands, case)
    got = launch(operands, case)
    assert torch.equal(got[2].double(), wanted[2]) and torch.equal(got[0], wanted[0])
    lines, found_in = inspect.getsourcelines, set()

    def planted(fn):
        found, first = lines(fn)
        name = getattr(fn, "__name__", "")
        if name in PLANTED and any(text in line for line in found):
            found_in.add(name)
            found = [line.replace(text, other) for line in found]
        return found, first

    monkeypatch.setattr(inspect, "getsourcelines", planted)
    monkeypatch.setattr(interpreter.InterpretedFunction, "rewritten_fn", {})
    dx, _, dweight = launch(operands, case)
    assert len(found_in) == 1
    assert not (torch.equal(dweight.double(), wanted[2]) and torch.equal(dx, wanted[0]))


def sliced(t):
    n, c, h, w = t.shape
    memory = torch.full((n, 2 * h, 3 * w, c + 3), NAN, dtype=t.dtype).permute(0, 3, 1, 2)
    memory[:, 2:-1, ::2, ::3] = t
    return memory[:, 2:-1, ::2, ::3]


LAYOUTS = {
    "nchw": lambda t: t.contiguous(),
    "sliced": sliced,
    "expanded": lambda t: t[:1, :1, :1, :1].expand_as(t),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
}


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        (name, layout)
        for i, name in enumerate(["dz", "y", "raw", "addend", "weight"])
        for j, layout in enumerate(LAYOUTS)
        if PROOF or (i + j) % 2
    ],
)
def test_operands_in_any_layout(name, layout):
    operands = operands_of(CASE)
    operands = operands._replace(**{name: LAYOUTS[layout](getattr(operands, name))})
    check_exact(operands, CASE)


@pytest.mark.parametrize("layout", ["nchw", "sliced"])
def test_gradients_in_any_layout(layout):
    operands = operands_of(CASE)
    check_exact(operands, CASE, dx=LAYOUTS[layout](torch.full(CASE.input_shape, NAN).half()))


def random_operands(case):
    dz, y = (torch.randn(case.output_shape).to(HALF) for _ in range(2))
    x, addend = (torch.randn(case.input_shape).to(HALF) for _ in range(2))
    weight = torch.randn(case.weight_shape).to(HALF)
    rows, norm = torch.randn(3, case.k), torch.randn(4, case.c)
    return dgrad_checks.Operands(dz, y, rows, weight, addend, x, norm)


def check_bound(operands, case, got):
    dz, y, coefficients, weight, addend, x, norm = operands
    factors = dz, y, coefficients, x, norm
    oracle = numerics.conv_bn_wgrad_oracle(*factors, got[2])
    bound = numerics.conv_bn_wgrad_bound(*factors, got[2], oracle)
    found = numerics.check_bound(got[2], oracle, bound)
    assert found.ok, found
    separate = rf.ops.conv_bn_dgrad(
        dz, weight, y, coefficients, input_size=x.shape, addend=addend, raw=x, norm=norm
    )
    # The reference adds in another order: its roundings differ here and there by one step.
    torch.testing.assert_close(got[0], separate[0], rtol=2**-10, atol=2e-2, equal_nan=True)
    return oracle


def test_within_the_bound_and_the_same_bits_each_time():
    operands = random_operands(CASE)
    got = launch(operands, CASE)
    check_bound(operands, CASE, got)
    for _ in range(20 if PROOF else 2):
        again = launch(operands, CASE)
        assert all(torch.equal(one, other) for one, other in zip(got, again, strict=True))


@pytest.mark.parametrize("name", ["dz", "y", "raw", "coefficients", "norm", "weight", "addend"])
def test_nan_and_inf_stay_in_their_places(name):
    operands = random_operands(CASE)
    where = getattr(operands, name)
    if where.dim() == 2:
        where[0, 3], where[1, 7] = NAN, INF
    else:
        where[0, 3, 0, 0], where[-1, 7, -1, -1] = NAN, INF
    check_bound(operands, CASE, launch(operands, CASE))


def test_an_empty_batch_gives_zeros_and_launches_nothing(monkeypatch):
    from resnet_fused.triton import conv_bn_grad1x1 as kernel

    monkeypatch.delattr(kernel, "conv_bn_grad1x1_kernel")
    case = cases.ConvCase("empty", 0, 8, 4, 4, 8)
    dx, sums, dweight = launch(random_operands(case), case)
    assert not dx.numel() and sums.eq(0).all() and dweight.eq(0).all()


def call(operands, **options):
    dz, y, coefficients, weight, addend, x, norm = operands
    given = {"y": y, "coefficients": coefficients, "norm": norm, "addend": addend}
    return rf.ops.conv_bn_grad1x1(dz, x, weight, **{**given, **options})


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_the_op_by_one_kernel(dtype, form):
    """Layouts as of the two ops; the gradient's dtype and strides are the parameter's."""
    from resnet_fused.triton import conv_bn_grad1x1 as kernel

    assert kernel.serves(SERVED.k, SERVED.c, 2, _tiles.Limits(4, 232448, 90)) is not None
    operands = operands_of(SERVED)
    weight = operands.weight.contiguous(memory_format=form)
    operands = operands._replace(raw=operands.raw.contiguous(memory_format=form), weight=weight)
    parameter = None
    if dtype is not None:
        parameter = torch.empty(SERVED.c, SERVED.k, 1, 1, dtype=dtype).transpose(0, 1)
    with rf.backend("triton"), watch() as launches:
        dx, sums, dweight = call(operands, parameter=parameter)
    assert [one.name for one in launches] == [
        "conv_bn_grad1x1_kernel", "wgrad_merge_kernel", "sums_kernel"
    ]  # fmt: skip
    wanted = expected(operands, SERVED)
    assert torch.equal(dx, wanted[0]) and torch.equal(sums, wanted[1])
    like = weight if parameter is None else parameter
    assert dweight.dtype is like.dtype and dweight.stride() == like.stride()
    assert torch.equal(dweight, wanted[2].to(like.dtype))
    assert dx.is_contiguous(memory_format=form)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (cases.ConvCase("filters", 1, 8, 3, 3, 257), HALF),
        (cases.ConvCase("channels", 1, 257, 3, 3, 130), HALF),
        (CASE, HALF),
        (SERVED, torch.float32),
    ],
    ids=str,
)
def test_other_calls_go_to_two_kernels(case, dtype):
    operands = operands_of(case, dtype=dtype)
    with rf.backend("triton"), watch() as launches:
        got = call(operands)
    names = {one.name for one in launches}
    assert "conv_bn_grad1x1_kernel" not in names and "conv_bn_wgrad_kernel" in names
    for one, other in zip(got, expected(operands, case), strict=True):
        assert torch.equal(one, other.to(one.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_without_triton_it_is_the_two_ops(dtype):
    operands = operands_of(CASE, dtype=dtype)
    if dtype is torch.float64:
        operands = operands._replace(
            coefficients=operands.coefficients.double(), norm=operands.norm.double()
        )
    for word in ("reference", "auto"):
        with rf.backend(word):
            got = call(operands)
        for one, other in zip(got, expected(operands, CASE), strict=True):
            assert torch.equal(one, other.to(one.dtype))


def test_what_is_served():
    from resnet_fused.triton import conv_bn_grad1x1 as kernel

    h200, small = _tiles.Limits(132, 232448, 90), _tiles.Limits(170, 99 * 1024, 120)
    for filters, channels, name in (
        (64, 256, "64x128_8w2s"), (64, 64, "64x128_8w2s"), (128, 512, "128x128_8w2s"),
        (256, 64, "256x64_8w2s"), (256, 264, None), (264, 64, None), (128, 520, None),
        (65, 64, None), (64, 65, None),
    ):  # fmt: skip
        found = kernel.serves(filters, channels, 2, h200)
        assert (found.name if found else None) == name
        assert kernel.serves(filters, channels, 4, h200) is None
    assert kernel.serves(256, 64, 2, small) is None
    assert kernel.serves(64, 64, 2, h200, frozenset({"256x64_8w2s"})) is None
    b200, a100 = (dataclasses.replace(h200, capability=capability) for capability in (100, 80))
    assert [kernel.serves(k, 64, 2, b200) is None for k in (64, 128, 256)] == [False, False, True]
    assert kernel.serves(64, 64, 2, a100) is None
    case = cases.ConvCase("many", 1, 8, 2, 2, 300)
    dz, y, coefficients, weight, addend, x, norm = operands_of(case)
    results = torch.empty_like(x), torch.empty(2, 8), torch.empty_like(weight)
    with pytest.raises(LookupError, match="300 filters and 8 channels"):
        kernel.launch(dz, y, coefficients, x, norm, weight, addend, *results, 1)


T = torch.zeros


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weight": T(8, 16, 3, 3)}, ValueError, "weight has shape .8, 16, 3, 3."),
        ({"dz": T(2, 8, 5, 4)}, ValueError, "dz has shape"),
        ({"coefficients": T(3, 8)}, ValueError, "y and coefficients are given together"),
        ({"norm": T(3, 16)}, ValueError, "norm has shape .3, 16."),
        ({"addend": T(2, 16, 4, 4), "addend_stride": 2}, ValueError, "addend has shape"),
        ({"addend_stride": 0}, ValueError, "addend_stride is 0"),
        ({"parameter": T(16, 8, 1, 1)}, ValueError, "parameter has shape .16, 8, 1, 1."),
        ({"parameter": T(8, 16, 1, 1).half()}, TypeError, "parameter has dtype torch.float16"),
        ({"parameter": 3}, TypeError, "parameter must be a Tensor, got int"),
    ],
)
def test_bad_input_is_named(options, error, message):
    given = {"dz": T(2, 8, 4, 4), "x": T(2, 16, 4, 4), "weight": T(8, 16, 1, 1), **options}
    with pytest.raises(error, match=f"conv_bn_grad1x1: {message}"):
        rf.ops.conv_bn_grad1x1(**given)


HUGE = ("dz", "y", "raw", "addend", "dx")
RIGHT = (
    *(f"both {at} -" for at in ("end", "start")),
    *(f"wide {which} -" for which in HUGE),
)
FAULTS = (
    *(f"both end {fault}" for fault in ("pixels=99", "dz_w=99", "y_w=99", "x_w=99")),
    *(f"both end {fault}" for fault in ("dx_w=99", "addend_w=99", "filters=99", "channels=99")),
    *(f"wide {which} WIDE=-1" for which in HUGE),
)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: mmap without reserve")
@pytest.mark.timeout(300)
def test_nothing_beyond_is_touched_and_planted_faults_kill():
    """Between guard pages, and with steps beyond 2^31: what is off ends a child by a signal."""
    child = subprocess.run(
        [sys.executable, str(TESTS / "triton_bn_grad1x1_guard.py"), *RIGHT, *FAULTS],
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
