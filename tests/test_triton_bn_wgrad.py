"""conv_bn_wgrad in Triton: every configuration bit for bit, each access, hostile operands."""

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
from resnet_fused.ops import _training_checks_wgrad as checks
from resnet_fused.ops._library import overload
from resnet_fused.triton import _tiles

TESTS = Path(__file__).resolve().parent
DTYPES = {"float16": torch.float16, "float32": torch.float32}
NAN, INF = float("nan"), float("inf")
PROLOGUES = ((True, True), (True, False), (False, True), (False, False))
CASES = (
    # 70 and 24 pixels in steps of 64 and 32: the last one overhangs. 65 channels, 72 filters.
    cases.ConvCase("odd", 2, 65, 7, 5, 72, 2, 1, (3, 2), (1, 0)),
    cases.ConvCase("padded", 2, 24, 5, 7, 40, 2, 3, padding=(1, 1)),
    cases.ConvCase("dilated", 1, 20, 6, 7, 33, 3, 2, (1, 1), (2, 1), (2, 1)),
    cases.ConvCase("grouped", 1, 80, 4, 4, 80, 2, 2, (1, 2), (1, 0), groups=20),
    cases.ConvCase("stem", 1, 3, 9, 8, 33, 7, 7, (2, 2), (3, 3)),
    cases.ConvCase("pointwise", 3, 64, 5, 5, 66),
)
BY_NAME = {case.name: case for case in CASES}


pytestmark = [
    *needs_interpreter,
    # NumPy's, about the NaN and Inf that are planted here.
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),
]


def plan(name="64x64_4w4s", splits=1):
    return _tiles.Plan(_tiles.BY_NAME[name], splits, False, "for the test")


def geometry(case):
    return case.stride, case.padding, case.dilation, case.groups


def channels_last(operands):
    form = torch.channels_last
    return checks.Operands(
        *(t if t is None or t.dim() == 2 else t.contiguous(memory_format=form) for t in operands)
    )


def launch(operands, case, p=None, dweight=None, dtype=None):
    """The gradient, in poisoned memory unless it is given."""
    from resnet_fused.triton import conv_bn_wgrad

    if dweight is None:
        dweight = torch.full(case.weight_shape, NAN, dtype=dtype or operands.dz.dtype)
    conv_bn_wgrad.launch(*operands, dweight, *geometry(case), plan=p)
    return dweight


def random_operands(case, dtype, affine=True, norm=True):
    dz, x = (torch.randn(shape).to(dtype) for shape in (case.output_shape, case.input_shape))
    y = torch.randn(case.output_shape).to(dtype) if affine else None
    coefficients = torch.randn(3, case.k) if affine else None
    operands = dz, y, coefficients, x, torch.randn(4, case.c) if norm else None
    return channels_last(operands)


def check_bound(operands, case, got):
    """Against float64 of the operands given."""
    oracle = numerics.conv_bn_wgrad_oracle(*operands, got, **case.geometry)
    bound = numerics.conv_bn_wgrad_bound(*operands, got, oracle, **case.geometry)
    found = numerics.check_bound(got, oracle, bound)
    assert found.ok, found
    return oracle


def cells():
    found = []
    for i, tile in enumerate(_tiles.TILES):
        for j, splits in enumerate((1, 3)):
            for k, name in enumerate(DTYPES):
                if PROOF or k == (i + j) % 2:
                    turn = 2 * i + j
                    turns = [
                        (case, prologue)
                        for at, case in enumerate(CASES)
                        for to, prologue in enumerate(PROLOGUES)
                        if PROOF or (at == turn % 6 and to == (turn // 6 + turn) % 4)
                    ]
                    label = f"{tile.name}-{splits}-{name}"
                    found.append(
                        pytest.param(plan(tile.name, splits), DTYPES[name], turns, id=label)
                    )
    return found


@pytest.mark.parametrize(("p", "dtype", "turns"), cells())
def test_every_configuration(p, dtype, turns):
    for case, (affine, norm) in turns:
        operands = checks.exact_operands(case, dtype, affine=affine, norm=norm)
        expected = checks.expected_wgrad(operands, case)
        with watch() as launches:
            got = launch(channels_last(operands), case, p)
        assert torch.equal(got, expected.to(dtype)), (case.name, affine, norm)
        check_accesses(launches, operands, case, p)


def check_accesses(launches, operands, case, p):
    """Vectors once a tile, dz and y equally often, each gradient and partial sum stored once."""
    first, last = launches[0], launches[-1]
    assert (last["dweight"].stores == 1).all()
    if p.splits > 1:
        assert (first["partial"].stores == 1).all()
        assert (last["partial"].loads == 1).all()
    dz = first["dz"].loads
    assert dz[0] and (dz == dz[0]).all()
    if operands.y is not None:
        assert (first["y"].loads == dz).all()
        # As often as dz, a tile at a time, and for each part: once a program.
        assert (first["coefficients"].loads == dz[0] * p.splits).all()
    if operands.norm is not None:
        loads = first["norm"].loads.reshape(4, case.c)
        assert (loads[:2] > 0).all() and not loads[2:].any()
        assert (loads[:2] == loads[0, 0]).all()


@pytest.mark.parametrize(("affine", "norm"), PROLOGUES, ids=["both", "affine", "norm", "none"])
@pytest.mark.parametrize("case", CASES if PROOF else CASES[3:], ids=str)
def test_every_prologue_with_every_geometry(case, affine, norm):
    operands = checks.exact_operands(case, torch.float16, affine=affine, norm=norm)
    expected = checks.expected_wgrad(operands, case).half()
    assert torch.equal(launch(channels_last(operands), case), expected)


def infinite(case):
    """C of one filter is Inf and every h positive: one row too many, whose h is 0, makes NaN."""
    operands = checks.exact_operands(case, torch.float16)
    operands.coefficients[2, 1] = INF
    operands.norm[:2].abs_()
    operands.x.abs_().add_(1)
    return operands


PLANTS = {
    "padding is relu(shift)": (
        "padded",
        "tl.where(seen, activated(b, scale[None, :], shift[None, :]), 0.0)",
        "activated(b, scale[None, :], shift[None, :])",
    ),
    "rows behind the last pixel": ("pointwise", "tl.where(inside[:, None], z, 0.0)", "z"),
    "no ReLU": (
        "padded",
        "activated(b, scale[None, :], shift[None, :])",
        "scale[None, :] * b + shift[None, :]",
    ),
    "B forgotten": ("pointwise", "a2[None, :]", "0 * a2[None, :]"),
    "the last part lost": ("padded", "(begin + each, steps)", "(begin + each, steps - 1)"),
    "another group's sums": (
        "grouped",
        " == (c // group_in)[None, :]",
        " <= (c // group_in)[None]",
    ),
}
"""Case, and what is changed in the loop's source: text, and text in its place."""


@pytest.mark.parametrize("name", PLANTS)
def test_the_exact_cases_bite(name, monkeypatch):
    from triton.runtime import interpreter

    case, text, other = PLANTS[name]
    case = BY_NAME[case]
    make = infinite if "rows" in name else lambda case: checks.exact_operands(case, torch.float16)
    operands = make(case)
    expected = checks.expected_wgrad(operands, case).half()
    assert torch.equal(launch(channels_last(operands), case, plan(splits=2)), expected)
    lines = inspect.getsourcelines

    def planted(fn):
        found, first = lines(fn)
        if getattr(fn, "__name__", "") == "weight_sums":
            assert any(text in line for line in found)
            found = [line.replace(text, other) for line in found]
        return found, first

    monkeypatch.setattr(inspect, "getsourcelines", planted)
    monkeypatch.setattr(interpreter.InterpretedFunction, "rewritten_fn", {})
    assert not torch.equal(launch(channels_last(operands), case, plan(splits=2)), expected)


@pytest.mark.parametrize("splits", [1, 2])
def test_a_float32_parameter_gets_the_sums_unrounded(splits):
    case = cases.ConvCase("sums", 5, 16, 7, 9, 24, 1, 2, padding=(0, 1))
    operands = checks.exact_operands(case, torch.float16)
    expected = checks.expected_wgrad(operands, case)
    assert not torch.equal(expected.half().double(), expected)
    got = launch(channels_last(operands), case, plan(splits=splits), dtype=torch.float32)
    assert torch.equal(got.double(), expected)


STRIDES = {
    "contiguous": lambda w: w.contiguous(),
    "channels_last": lambda w: w.contiguous(memory_format=torch.channels_last),
    "transposed": lambda w: w.transpose(0, 1).contiguous().transpose(0, 1),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("strides", STRIDES)
def test_the_gradient_has_its_parameters_strides(strides, dtype):
    case = BY_NAME["padded"]
    operands = checks.exact_operands(case, torch.float16)
    weight = STRIDES[strides](torch.zeros(case.weight_shape, dtype=dtype))
    given = {"y": operands.y, "coefficients": operands.coefficients, "norm": operands.norm}
    with rf.backend("triton"):
        got = rf.ops.conv_bn_wgrad(operands.dz, operands.x, weight, **given, **case.geometry)
    assert got.stride() == weight.stride() and got.dtype is dtype
    assert torch.equal(got, checks.expected_wgrad(operands, case).to(dtype))


@pytest.mark.parametrize("splits", [1, 2])
def test_nothing_beside_the_gradient_is_written(splits):
    """It lies with steps of two between its elements."""
    case = BY_NAME["odd"]
    memory = torch.full((2 * case.k, case.c, case.r, 2 * case.s), 77.0, dtype=torch.float16)
    dweight = memory[::2, :, :, ::2]
    operands = checks.exact_operands(case, torch.float16)
    dweight.fill_(NAN)
    launch(channels_last(operands), case, plan(splits=splits), dweight)
    assert torch.equal(dweight, checks.expected_wgrad(operands, case).half())
    dweight.fill_(77.0)
    assert (memory == 77.0).all()


def sliced(t):
    n, c, h, w = t.shape
    memory = torch.full((n, 2 * h, 3 * w, c + 3), NAN, dtype=t.dtype).permute(0, 3, 1, 2)
    memory[:, 2:-1, ::2, ::3] = t
    return memory[:, 2:-1, ::2, ::3]


LAYOUTS = {
    "nchw": lambda t: t.contiguous(),
    "sliced": sliced,
    "expanded": lambda t: t[:1, :1, :1, :1].expand_as(t),
    "images": lambda t: t[:1].expand_as(t),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
}


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        (name, layout)
        for i, name in enumerate(["dz", "y", "x"])
        for j, layout in enumerate(LAYOUTS)
        if PROOF or (i + j) % 2
    ],
)
def test_operands_in_any_layout(name, layout):
    case = BY_NAME["padded"]
    operands = channels_last(checks.exact_operands(case, torch.float16))
    operands = operands._replace(**{name: LAYOUTS[layout](getattr(operands, name))})
    expected = checks.expected_wgrad(operands, case).half()
    assert torch.equal(launch(operands, case), expected)


@pytest.mark.parametrize("case", CASES if PROOF else CASES[1:4], ids=str)
def test_within_the_bound_and_the_same_bits_each_time(case):
    dtype = [torch.float16, torch.float32][case.c % 8 // 4]
    operands = random_operands(case, dtype)
    got = launch(operands, case, plan(splits=3))
    check_bound(operands, case, got)
    for _ in range(20 if PROOF else 1):
        assert torch.equal(launch(operands, case, plan(splits=3)), got)


@pytest.mark.parametrize("name", ["dz", "y", "x", "coefficients", "norm"])
@pytest.mark.parametrize("case", [CASES[3], CASES[1]][: 2 if PROOF else 1], ids=str)
def test_nan_and_inf_stay_in_their_places(case, name):
    operands = random_operands(case, torch.float16)
    where = getattr(operands, name)
    if where.dim() == 2:
        where[0, 3], where[1, 7], where[1, -1] = NAN, INF, -INF
    else:
        where[0, 3, 1, 1], where[-1, -1, 1, 0], where[0, 5, 0, 1] = NAN, INF, -INF
    oracle = check_bound(operands, case, launch(operands, case))
    assert oracle.isnan().any() and oracle.isfinite().any()


def test_an_empty_batch_gives_zeros_and_launches_nothing(monkeypatch):
    from resnet_fused.triton import conv_bn_wgrad

    monkeypatch.delattr(conv_bn_wgrad, "conv_bn_wgrad_kernel")
    case = cases.ConvCase("empty", 0, 8, 4, 4, 8)
    assert launch(random_operands(case, torch.float16), case).eq(0).all()


def test_the_op_takes_the_chosen_configuration():
    """Through the dispatcher, where nothing says which configuration."""
    for case in CASES[:: 1 if PROOF else 3]:
        operands = checks.exact_operands(case, torch.float32)
        weight = torch.empty(case.weight_shape)
        given = [list(pair) for pair in geometry(case)[:3]], case.groups
        got = overload("conv_bn_wgrad", "triton")(*operands, weight, *given[0], given[1])
        assert torch.equal(got, checks.expected_wgrad(operands, case).float())


def test_configurations_that_would_spill_are_not_offered():
    from resnet_fused.triton import conv_bn_wgrad

    case = cases.ConvCase("wide", 32, 512, 28, 28, 128)
    dz = torch.empty(case.output_shape, dtype=torch.float16, device="meta")
    dweight = torch.empty(case.weight_shape, device="meta")
    product = conv_bn_wgrad.product_of(dz, dweight, 1)
    h200, small = _tiles.Limits(132, 232448, 90), _tiles.Limits(170, 99 * 1024, 120)
    assert conv_bn_wgrad.offered(product, False, False, h200) is None
    names = conv_bn_wgrad.offered(product, True, False, h200)
    assert "64x128_4w4s" in names and "128x256_8w3s" not in names
    names = conv_bn_wgrad.offered(product, False, True, h200)
    assert "128x128_8w3s" in names and not names & {"128x256_8w3s", "64x128_4w4s"}
    only = frozenset({"64x64_4w4s", "128x256_8w3s"})
    assert conv_bn_wgrad.offered(product, True, True, h200, only) == {"64x64_4w4s"}
    wide = conv_bn_wgrad.product_of(dz.float(), dweight, 1)
    wide = dataclasses.replace(wide, precision="tf32x3")
    assert "64x64_4w4s" in conv_bn_wgrad.offered(wide, True, True, h200)
    assert "64x64_4w4s" not in conv_bn_wgrad.offered(wide, True, True, small)
    for limits in (h200, small):
        for one in (product, wide):
            for affine, below in PROLOGUES:
                _tiles.choose(one, limits, conv_bn_wgrad.offered(one, affine, below, limits))


@pytest.mark.parametrize("name", [t.name for t in _tiles.TILES] if PROOF else ["64x64_4w4s"])
def test_the_self_check_passes_and_finds_a_fault(name, monkeypatch):
    from resnet_fused.triton import conv_bn_wgrad

    assert name in checks.conv_bn_wgrad_configurations()
    if not PROOF:
        few = [dataclasses.replace(BY_NAME["padded"], name="3x3")]
        monkeypatch.setattr(checks, "CONV_CASES", few)
    used, right = [], conv_bn_wgrad.launch

    def noted(*operands, **options):
        used.append(options["plan"].name)
        right(*operands, **options)

    def shifted(dz, y, coefficients, *rest, **options):
        right(dz, y, coefficients.roll(1, 1), *rest, **options)

    monkeypatch.setattr(conv_bn_wgrad, "launch", noted)
    checks.conv_bn_wgrad(name, "cpu")
    monkeypatch.setattr(conv_bn_wgrad, "launch", shifted)
    if not PROOF:
        assert used == ["64x64_4w4s", "64x64_4w4s/2"]
    if used:
        with pytest.raises(ArithmeticError, match="elements are wrong"):
            checks.conv_bn_wgrad(name, "cpu")


KERNEL, MERGE = "conv_bn_wgrad_kernel", "wgrad_merge_kernel"
MEGABYTES = 400  # one of the huge tensors would take 4,000
HUGE = ("dz", "x", "dweight")
RIGHT = (
    f"pages conv_bn_wgrad {'all' if PROOF else 'some'}",
    *(f"huge conv_bn_wgrad {which} -" for which in HUGE),
    "sums conv_bn_wgrad -",
)
FAULTS = (
    *(f"planted conv_bn_wgrad {KERNEL} {fault}" for fault in ("pixels 1", "height 1", "dz_w 99")),
    f"planted conv_bn_wgrad {KERNEL} dweight_c -999",
    f"planted conv_bn_wgrad {MERGE} count 999",
    *(f"huge conv_bn_wgrad {which} {KERNEL}" for which in HUGE),
    *(f"sums conv_bn_wgrad {kernel}" for kernel in (KERNEL, MERGE)),
)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: mmap without reserve")
@pytest.mark.timeout(300)
def test_nothing_beyond_is_touched_and_planted_faults_kill():
    """Between guard pages, and the last tile of huge tensors; what is off ends it by a signal."""
    child = subprocess.run(
        [sys.executable, str(TESTS / "triton_bn_wgrad_guard.py"), *RIGHT, *FAULTS],
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
    assert max(int(found[s].split()[1]) for s in RIGHT) < MEGABYTES
    assert {s: status[s] for s in RIGHT} == dict.fromkeys(RIGHT, 0), child.stderr
    died = {s: status[s] in (-signal.SIGSEGV, -signal.SIGBUS) for s in FAULTS}
    assert died == dict.fromkeys(FAULTS, True), child.stderr
