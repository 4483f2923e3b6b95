"""conv_bn_dgrad in Triton: every configuration bit for bit, each access, hostile operands."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from triton_bn_dgrad import channels_last, geometry
from triton_trace import PROOF, needs_interpreter, watch

import resnet_fused as rf
from resnet_fused import cases, numerics
from resnet_fused.ops import _training
from resnet_fused.ops import _training_checks_dgrad as checks
from resnet_fused.ops._library import overload
from resnet_fused.triton import _tiles, conv_bn_dgrad

TESTS = Path(__file__).resolve().parent
DTYPES = {"float16": torch.float16, "float32": torch.float32}
NAN, INF = float("nan"), float("inf")
CASES = (
    # Phases of unequal size, some without taps; 36 channels, 72 filters.
    cases.ConvCase("odd", 2, 36, 7, 5, 72, 2, 1, (3, 2), (1, 0)),
    cases.ConvCase("padded", 1, 24, 5, 7, 24, 3, 3, padding=(1, 1)),
    cases.ConvCase("stride2", 1, 65, 7, 6, 31, 3, 2, (2, 2), (1, 1)),
    cases.ConvCase("dilated", 1, 20, 6, 7, 33, 3, 3, (1, 1), (2, 1), (2, 1)),
    cases.ConvCase("grouped", 1, 40, 3, 4, 40, 2, 2, (1, 2), (1, 0), groups=10),
    cases.ConvCase("pointwise", 3, 66, 5, 5, 128),
    cases.ConvCase("shortcut", 2, 40, 5, 6, 80, 1, 1, (2, 2)),
    cases.ConvCase("stem", 1, 3, 9, 6, 33, 7, 3, (2, 2), (3, 1)),
)
BY_NAME = {case.name: case for case in CASES}
FORMS = tuple(itertools.product((True, False), (0, 1, 2), (True, False)))
"""Whether there are coefficients, the addend's stride (0: none), whether a ReLU is below."""

pytestmark = [
    *needs_interpreter,
    # NumPy's, about the NaN and Inf that are planted here.
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),
]


def plan(name="64x64_4w4s", splits=1):
    return _tiles.Plan(_tiles.BY_NAME[name], splits, True, "for the test")


def launch(operands, case, p=None, addend_stride=1, dx=None):
    """The gradient and its sums, in poisoned memory unless it is given."""
    if dx is None:
        dx = torch.full(case.input_shape, NAN, dtype=operands.dz.dtype)
        dx = dx.contiguous(memory_format=torch.channels_last)
    sums = torch.full((0 if operands.raw is None else 2, case.c), NAN)
    step = max(1, addend_stride)
    conv_bn_dgrad.launch(*operands, dx, sums, step, *geometry(case), plan=p)
    return dx, sums


def check_exact(operands, case, p=None, addend_stride=1):
    dx, sums = launch(channels_last(operands), case, p, addend_stride)
    expected = checks.expected_dgrad(operands, case, max(1, addend_stride))
    assert torch.equal(dx, expected[0]), (case.name, addend_stride)
    assert torch.equal(sums, expected[1]), (case.name, addend_stride)


def random_operands(case, dtype, addend_stride=1):
    shape = (*case.input_shape[:2], -(-case.h // addend_stride), -(-case.w // addend_stride))
    activations = case.output_shape, case.output_shape, case.weight_shape, shape, case.input_shape
    dz, y, weight, addend, raw = (torch.randn(shape).to(dtype) for shape in activations)
    coefficients, norm = torch.randn(3, case.k), torch.randn(4, case.c)
    return channels_last(checks.Operands(dz, y, coefficients, weight, addend, raw, norm))


def check_bound(operands, case, got):
    """Against float64 of the operands given, and the sums of what was stored."""
    dx, sums = got
    size = {"input_size": case.input_shape}
    oracle = numerics.conv_bn_dgrad_oracle(*operands, **size, **case.geometry)
    bound = numerics.conv_bn_dgrad_bound(*operands, oracle, **case.geometry)
    found = numerics.check_bound(dx, oracle, bound)
    assert found.ok, found
    branch = operands.raw, operands.norm
    bound = numerics.reductions_bound(dx, branch)
    found = numerics.check_bound(sums, numerics.reductions_oracle(dx, branch), bound)
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
                        (case, form)
                        for at, case in enumerate(CASES)
                        for to, form in enumerate(FORMS)
                        # Steps without a divisor in common with the counts: all meet in time.
                        if PROOF or (at == 3 * turn % 8 and to == 5 * turn % 12)
                    ]
                    label = f"{tile.name}-{splits}-{name}"
                    found.append(
                        pytest.param(plan(tile.name, splits), DTYPES[name], turns, id=label)
                    )
    return found


@pytest.mark.parametrize(("p", "dtype", "turns"), cells())
def test_every_configuration(p, dtype, turns):
    for case, (affine, addend, below) in turns:
        operands = checks.exact_operands(case, dtype, affine=affine, addend=addend, below=below)
        with watch() as launches:
            check_exact(operands, case, p, addend)
        check_accesses(launches, operands, p)


def check_accesses(launches, operands, p):
    """Each gradient, tile's sum and partial product is stored once; what is read, once or equally.

    A configuration that does not split takes the kernel alone, and the sums' where there are any.
    """
    first, finished = launches[0], launches[p.splits > 1]
    assert len(launches) == 1 + (p.splits > 1) + (operands.raw is not None)
    assert (finished["dx"].stores == 1).all()
    if p.splits > 1:
        assert (first["partial"].stores == 1).all()
        assert (finished["partial"].loads == 1).all()
    if operands.y is not None:
        assert (first["y"].loads == first["dz"].loads).all()
    if operands.addend is not None:
        assert (finished["addend"].loads == 1).all()
    if operands.raw is not None:
        assert (finished["raw"].loads == 1).all()
        assert (finished["workspace"].stores == 1).all()
        assert (launches[-1]["workspace"].loads == 1).all()
        assert (launches[-1]["sums"].stores == 1).all()


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form)))
def test_every_combination_of_prologue_and_epilogue(form):
    """With strides of 1, 2 and 3, whose missed taps a C that is not 0 would show."""
    affine, addend, below = form
    for at, case in enumerate(CASES):
        if PROOF or at % 4 == FORMS.index(form) % 4:
            operands = checks.exact_operands(
                case, torch.float16, affine=affine, addend=addend, below=below
            )
            check_exact(operands, case, addend_stride=addend)


PLANTS = {
    "outside the image counts, as C": (
        "made = tl.where(seen, made, 0.0)",
        "made = tl.where(there[None, :], made, 0.0)",
    ),
    "y forgotten": ("z, result, factor[None, :]", "z, 0 * result, factor[None, :]"),
    "a zero passes the ReLU": ("(h.to(tl.float32) <= 0.0)", "(h.to(tl.float32) < 0.0)"),
    "sums not centred": ("y.to(tl.float32) - mean[None, :]", "y.to(tl.float32)"),
    "sums of the unrounded": ("0.0, dz.to(tl.float32))", "0.0, dh)"),
    "sums of what the ReLU stopped": ("tl.sum(kept, 0)", "tl.sum(tl.where(stored, dh, 0.0), 0)"),
    "an addend for every pixel": ("added = inside & (up * addend_stride == h)", "added = inside"),
    "the addend rounded before": ("dh = acc", "dh = acc.to(dx.dtype.element_ty).to(tl.float32)"),
    "another tile's row": ("row_of_tiles = phase * tiles_m", "row_of_tiles = 0 * phase * tiles_m"),
}
"""What is changed in the kernels' source, as (text, text in its place)."""


ROUNDED = (BY_NAME["padded"], 1), (BY_NAME["stride2"], 2)


def beyond_float16(case, step):
    """Operands whose gradients float16 can't hold: they are rounded, once."""
    operands = checks.exact_operands(case, torch.float16, addend=step)
    operands.weight.mul_(9)
    return operands


@pytest.mark.parametrize("name", PLANTS)
def test_the_exact_cases_bite(name, monkeypatch):
    """Each planted fault changes the gradient or the sums of some case."""
    from triton.runtime import interpreter

    text, other = PLANTS[name]
    lines, found_in = inspect.getsourcelines, set()

    def planted(fn):
        found, first = lines(fn)
        if any(text in line for line in found):
            found_in.add(getattr(fn, "__name__", ""))
            found = [line.replace(text, other) for line in found]
        return found, first

    monkeypatch.setattr(inspect, "getsourcelines", planted)
    monkeypatch.setattr(interpreter.InterpretedFunction, "rewritten_fn", {})
    right = True
    for case, step in ROUNDED:
        if right:
            operands = beyond_float16(case, step)
            expected = checks.expected_dgrad(operands, case, step)
            got = launch(channels_last(operands), case, plan("32x64_4w4s"), step)
            right = all(itertools.starmap(torch.equal, zip(got, expected, strict=True)))
    assert len(found_in) == 1 and not right


def test_one_rounding_behind_the_addend():
    for case, step in ROUNDED:
        for splits in (1, 2):
            check_exact(beyond_float16(case, step), case, plan("32x64_4w4s", splits), step)


def test_the_sums_of_many_rows_are_added_in_float64(monkeypatch):
    rows, columns = 1030, 11
    values = torch.randint(-9, 10, (rows, columns)).float()
    values[3], values[1027] = 2.0**30, -(2.0**30)
    sums = torch.full((columns,), NAN)
    conv_bn_dgrad.sums_kernel[(2,)](values, sums, rows, columns, BLOCK_M=256, BLOCK_N=8)
    assert torch.equal(sums, values.double().sum(0).float())
    assert not torch.equal(sums, torch.from_numpy(values.numpy().cumsum(0)[-1]))
    # The same with more rows than a program takes at a time.
    monkeypatch.setattr(conv_bn_dgrad, "SUMS_TILE", (2, 4))
    case = BY_NAME["padded"]
    check_exact(checks.exact_operands(case, torch.float16), case, plan("32x64_4w4s"))


@pytest.mark.parametrize("splits", [1, 2])
def test_a_gradient_passes_where_the_activation_is_nan(splits):
    case = BY_NAME["padded"]
    operands = checks.exact_operands(case, torch.float32)
    operands.raw[0, :, 1, 2] = NAN
    got, sums = launch(channels_last(operands), case, plan(splits=splits))
    free, _ = launch(channels_last(operands._replace(raw=None, norm=None)), case)
    assert torch.equal(got[0, :, 1, 2], free[0, :, 1, 2]) and free[0, :, 1, 2].all()
    assert torch.equal(got, checks.expected_dgrad(operands, case, 1)[0])
    assert not sums[0].isnan().any() and sums[1].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_the_mask_at_the_kink_is_forwards(dtype):
    """Raw values next to -shift / scale, where another rounding would change the mask."""
    case = dataclasses.replace(BY_NAME["pointwise"], n=8)
    operands = random_operands(case, dtype)
    scale, shift = (operands.norm[row].view(1, -1, 1, 1) for row in (0, 1))
    kink = (-shift / scale).expand(case.input_shape).to(dtype)
    towards = torch.where(torch.rand_like(kink.float()) < 0.5, -INF, INF).to(dtype)
    operands.raw.copy_(torch.where(torch.rand_like(kink.float()) < 0.3, kink, 0))
    operands.raw.copy_(torch.where(operands.raw == 0, torch.nextafter(kink, towards), kink))
    operands.addend.fill_(1)
    operands.dz.zero_()
    operands.coefficients.zero_()
    dx, sums = launch(operands, case)
    passed = ~(_training.normalised(operands.raw, operands.norm) <= 0)
    assert torch.equal(dx, passed.to(dtype))
    assert torch.equal(sums[0], passed.sum((0, 2, 3)).float())
    # Two roundings in place of one would find other masks.
    other = (operands.raw.float() * scale + shift).to(dtype) > 0
    assert dtype is torch.float16 or not torch.equal(other, passed)


def test_an_activation_that_underflows_stops_the_gradient():
    case = BY_NAME["pointwise"]
    operands = checks.exact_operands(case, torch.float16)
    operands.norm[0], operands.norm[1] = 2.0**-30, 0
    operands.raw.fill_(1)
    dx, sums = launch(channels_last(operands), case)
    assert not dx.any() and not sums.any()


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, dtype, id=f"{case.name}-{name}")
        for i, case in enumerate(CASES)
        for j, (name, dtype) in enumerate(DTYPES.items())
        if PROOF or i % 2 != j
    ],
)
def test_within_the_bound_and_the_same_bits_each_time(case, dtype):
    operands = random_operands(case, dtype)
    for splits in (1, 3) if PROOF or case.name in ("padded", "shortcut") else (1,):
        got = launch(operands, case, plan(splits=splits))
        check_bound(operands, case, got)
        for _ in range(20 if PROOF else 1):
            again = launch(operands, case, plan(splits=splits))
            assert all(itertools.starmap(torch.equal, zip(again, got, strict=True)))


PLACES = ("dz", "y", "coefficients", "weight", "addend", "raw", "norm")


# A weight meets the zeros around the output, which the oracle leaves out: without padding alone.
@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("case", [BY_NAME["grouped"], BY_NAME["pointwise"]], ids=str)
def test_nan_and_inf_stay_in_their_places(case, name):
    case = BY_NAME["shortcut"] if name == "weight" and case.groups > 1 else case
    operands = random_operands(case, torch.float16)
    if name not in ("raw", "norm"):
        # No ReLU stops what is planted.
        operands.raw.abs_()
        operands.norm[:2].abs_()
    where = getattr(operands, name)
    if where.dim() == 2:
        where[0, 3], where[1, 7], where[2, -1] = NAN, INF, -INF
    elif name == "weight":
        where[3, 0, 0, 0], where[-1, -1, 0, 0] = NAN, INF
    else:
        where[0, 3, 1, 1], where[-1, -1, 1, 0], where[0, 5, 0, 1] = NAN, INF, -INF
    oracle = check_bound(operands, case, launch(operands, case))
    assert oracle.isfinite().any() or (case.name, name) == ("pointwise", "coefficients")
    assert name in ("raw", "norm") or oracle.isnan().any()


def test_a_mean_that_is_not_finite_reaches_its_channel_alone():
    case = BY_NAME["padded"]
    operands = checks.exact_operands(case, torch.float16)
    operands.norm[2, 5] = INF
    operands.raw.fill_(1)
    operands.norm[0], operands.norm[1] = 1, 1
    operands.addend.fill_(10000)  # no gradient is 0
    dx, sums = launch(channels_last(operands), case)
    assert (dx > 0).all()
    assert sums[1, 5] == -INF and sums[0].isfinite().all()
    sums[1, 5] = 0
    assert sums.isfinite().all()


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


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["dz", "y", "weight", "addend", "raw"])
def test_operands_in_any_layout(name, layout):
    case = BY_NAME["shortcut"]
    operands = channels_last(checks.exact_operands(case, torch.float16, addend=2))
    operands = operands._replace(**{name: LAYOUTS[layout](getattr(operands, name))})
    got = launch(operands, case, addend_stride=2)
    for one, expected in zip(got, checks.expected_dgrad(operands, case, 2), strict=True):
        assert torch.equal(one, expected)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("name", ["padded", "odd"])
def test_nothing_beside_the_gradient_is_written(name, splits):
    """It lies with steps of two between its pixels, and three channels more behind each."""
    case = BY_NAME[name]
    operands = checks.exact_operands(case, torch.float16)
    expected = checks.expected_dgrad(operands, case, 1)
    n, c, h, w = case.input_shape
    for form in ((0, 3, 1, 2), (0, 1, 2, 3)):
        shape = (n, 2 * h, w, c + 8) if form[1] == 3 else (n, c + 8, 2 * h, w)
        memory = torch.full(shape, 77.0, dtype=torch.float16).permute(form)
        dx = memory[:, :c, ::2]
        dx.fill_(NAN)
        _, sums = launch(channels_last(operands), case, plan(splits=splits), dx=dx)
        assert torch.equal(dx, expected[0]) and torch.equal(sums, expected[1])
        dx.fill_(77.0)
        assert (memory == 77.0).all()


def test_an_empty_batch_gives_empty_gradients_and_zero_sums(monkeypatch):
    monkeypatch.delattr(conv_bn_dgrad, "conv_bn_dgrad_kernel")
    case = cases.ConvCase("empty", 0, 8, 4, 4, 8)
    dx, sums = launch(random_operands(case, torch.float16), case)
    assert dx.shape == case.input_shape and sums.eq(0).all()


@pytest.mark.parametrize("name", ["odd", "grouped", "shortcut"])
def test_the_op_takes_the_chosen_configuration(name):
    case = BY_NAME[name]
    operands = checks.exact_operands(case, torch.float16, addend=2)
    expected = checks.expected_dgrad(operands, case, 2)
    options = [list(case.input_shape), True, 2, *map(list, geometry(case)[:3]), case.groups]
    got = overload("conv_bn_dgrad", "triton")(*operands, *options)
    given = {key: getattr(operands, key) for key in ("addend", "raw", "norm")}
    with rf.backend("triton"):
        again = rf.ops.conv_bn_dgrad(
            operands.dz, operands.weight, operands.y, operands.coefficients,
            input_size=case.input_shape, addend_stride=2, **given, **case.geometry,
        )  # fmt: skip
    for results in (got, again):
        assert all(itertools.starmap(torch.equal, zip(results, expected, strict=True)))


def test_a_gradient_read_as_it_is_may_take_the_larger_configurations():
    """The operand that is made in registers takes as many of them as sums do."""
    case = BY_NAME["padded"]
    dx = torch.empty(case.input_shape, dtype=torch.float16, device="meta")
    weight = torch.empty(case.weight_shape, dtype=torch.float16, device="meta")
    tile, limits = _tiles.BY_NAME["128x32_4w4s"], _tiles.Limits(132, 232448, 90)
    products = [conv_bn_dgrad.product_of(dx, weight, (1, 1), 1, affine) for affine in (True, False)]
    assert [_tiles.fits(product, tile, limits) for product in products] == [False, True]


def test_the_self_check_passes_and_finds_a_fault(monkeypatch):
    monkeypatch.setattr(checks, "CONV_CASES", CASES[1:2])
    name = "64x64_4w4s"
    assert name in checks.conv_bn_dgrad_configurations()
    checks.conv_bn_dgrad(name, "cpu")
    right = conv_bn_dgrad.launch

    def shifted(dz, y, coefficients, *rest, **options):
        right(dz, y, coefficients.roll(1, 1), *rest, **options)

    def uncentred(*arguments, **options):
        right(*arguments, **options)
        arguments[8].add_(1)

    for launch_, message in ((shifted, "elements are wrong"), (uncentred, "sums are wrong")):
        monkeypatch.setattr(conv_bn_dgrad, "launch", launch_)
        with pytest.raises(ArithmeticError, match=message):
            checks.conv_bn_dgrad(name, "cpu")
    with pytest.raises(KeyError):
        checks.conv_bn_dgrad("1x1", "cpu")


MEGABYTES = 2000  # of a process; one of the huge tensors would take 4,000 more
# An argument of one kernel, off by so much: beyond the end, or with a stride of the wrong sign
# before the start.
PLANTED = (
    "conv_bn_dgrad_kernel pixels 1",
    "conv_bn_dgrad_kernel out_height 1",
    "conv_bn_dgrad_kernel dx_w -1000",
    "bn_dgrad_merge_kernel pixels 1",
    "bn_dgrad_merge_kernel addend_h -1000",
    "sums_kernel rows 1",
    "sums_kernel columns 1",
)
RIGHT = ("pages", "huge dx -", "huge dz -", "huge merged -")
FAULTS = (
    *(f"planted {fault}" for fault in PLANTED),
    "huge dx conv_bn_dgrad_kernel",
    "huge dz conv_bn_dgrad_kernel",
    "huge merged bn_dgrad_merge_kernel",
)


def child(*arguments, **environment):
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    done = subprocess.run(
        [sys.executable, str(TESTS / "triton_bn_dgrad.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: mmap without reserve")
def test_nothing_beyond_is_touched_and_planted_faults_kill():
    """Configurations between guard pages, the last tile of tensors of more than 2^31 elements.

    An argument that is off, or offsets of 32 bits, must end the child by a signal.
    """
    right, faults = (RIGHT, FAULTS) if PROOF else (RIGHT[:2], FAULTS[::3])
    done, found = child(*right, *faults), {}
    for line in done.stdout.splitlines():
        scenario, _, outcome = line.partition(": ")
        found[scenario] = [int(number) for number in outcome.split()]
    assert {s: found[s][0] for s in right} == dict.fromkeys(right, 0), done.stderr
    assert max(found[s][1] for s in right) < MEGABYTES
    died = {s: found[s][0] in (-signal.SIGSEGV, -signal.SIGBUS) for s in faults}
    assert died == dict.fromkeys(faults, True), done.stderr


@pytest.mark.slow
@pytest.mark.timeout(3600 if PROOF else 300)
@pytest.mark.parametrize("capability", [80, 90, 100, 120] if PROOF else [90])
def test_the_machine_code_spills_nothing(capability, tmp_path):
    """The gates of the other kernels, on every configuration or, in CI, on one."""
    options = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    results = json.loads(child(f"compile {capability}", **options).stdout)
    assert len(results) >= (40 if PROOF else 2)
    assert [result for result in results if result[2]] == []
