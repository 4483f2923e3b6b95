"""conv_bn_dgrad_end in Triton: every configuration bit for bit, each access, hostile operands."""

from __future__ import annotations

import inspect
import itertools
import os
import signal
import subprocess
import sys

import pytest
import torch
from test_triton_bn_dgrad import BY_NAME, CASES, DTYPES, INF, LAYOUTS, NAN, TESTS, plan
from triton_bn_dgrad import geometry
from triton_bn_dgrad_end import channels_last
from triton_trace import PROOF, needs_interpreter, watch

import resnet_fused as rf
from resnet_fused import cases, numerics
from resnet_fused.ops import _end_gradient
from resnet_fused.ops import _training_checks_dgrad_end as checks
from resnet_fused.ops._library import overload
from resnet_fused.triton import _end_gradient as rule
from resnet_fused.triton import _tiles, conv_bn_dgrad_end

OP = _end_gradient.OP
FORMS = tuple(itertools.product((True, False), (0, 1, 2), (True, False)))
"""Whether there are coefficients, the addend's stride (0: none), whether there is a projection."""

pytestmark = [
    *needs_interpreter,
    # NumPy's, about the NaN and Inf that are planted here.
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),
]


def launch(operands, case, p=None, addend_stride=1, dx=None):
    """The gradient and its sums, in poisoned memory unless it is given."""
    if dx is None:
        dx = torch.full(case.input_shape, NAN, dtype=operands.dz.dtype)
        dx = dx.contiguous(memory_format=torch.channels_last)
    sums = torch.full((2 if operands.residual is None else 3, case.c), NAN)
    step = max(1, addend_stride)
    conv_bn_dgrad_end.launch(*operands, dx, sums, step, *geometry(case), plan=p)
    return dx, sums


def check_exact(operands, case, p=None, addend_stride=1):
    dx, sums = launch(channels_last(operands), case, p, addend_stride)
    expected = checks.expected_end(operands, case, max(1, addend_stride))
    assert torch.equal(dx, expected[0]), (case.name, addend_stride)
    assert torch.equal(sums, expected[1]), (case.name, addend_stride)


def random_operands(case, dtype, addend_stride=1):
    shape = (*case.input_shape[:2], -(-case.h // addend_stride), -(-case.w // addend_stride))
    activations = case.output_shape, case.output_shape, case.weight_shape, shape
    dz, y, weight, addend = (torch.randn(shape).to(dtype) for shape in activations)
    out, raw, residual = (torch.randn(case.input_shape).to(dtype) for _ in range(3))
    coefficients, norm, own = torch.randn(3, case.k), torch.randn(4, case.c), torch.randn(4, case.c)
    return channels_last(
        checks.Operands(
            dz, y, coefficients, weight, addend, out.relu(), raw, norm, residual, own
        )
    )  # fmt: skip


def check_bound(operands, case, got):
    """Against float64 of the operands given, and the sums of what was stored."""
    dx, sums = got
    oracle = numerics.conv_bn_dgrad_end_oracle(*operands[:6], **case.geometry)
    bound = numerics.conv_bn_dgrad_end_bound(*operands[:6], oracle, **case.geometry)
    found = numerics.check_bound(dx, oracle, bound)
    assert found.ok, found
    branches = [(operands.raw, operands.norm)]
    if operands.residual is not None:
        branches.append((operands.residual, operands.residual_norm))
    bound = numerics.reductions_bound(dx, *branches)
    found = numerics.check_bound(sums, numerics.reductions_oracle(dx, *branches), bound)
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
    for case, (affine, addend, projected) in turns:
        operands = checks.exact_operands(
            case, dtype, affine=affine, addend=addend, projected=projected
        )
        with watch() as launches:
            check_exact(operands, case, p, addend)
        check_accesses(launches, operands, p)


def check_accesses(launches, operands, p):
    """Each gradient, tile's sum and partial product is stored once; what is read, once or equally.

    A configuration that does not split takes the kernel alone, and the sums'.
    """
    first, finished = launches[0], launches[p.splits > 1]
    assert len(launches) == 2 + (p.splits > 1)
    assert (finished["dx"].stores == 1).all()
    if p.splits > 1:
        assert (first["partial"].stores == 1).all()
        assert (finished["partial"].loads == 1).all()
    if operands.y is not None:
        assert (first["y"].loads == first["dz"].loads).all()
    once = ["out", "raw", "addend", "residual"]
    for name in once:
        if getattr(operands, name) is not None:
            assert (finished[name].loads == 1).all(), name
    assert (finished["workspace"].stores == 1).all()
    assert (launches[-1]["workspace"].loads == 1).all()
    assert (launches[-1]["sums"].stores == 1).all()


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form)))
def test_every_combination_of_prologue_and_epilogue(form):
    """With strides of 1, 2 and 3, whose missed taps a C that is not 0 would show."""
    affine, addend, projected = form
    for at, case in enumerate(CASES):
        if PROOF or at % 4 == FORMS.index(form) % 4:
            operands = checks.exact_operands(
                case, torch.float16, affine=affine, addend=addend, projected=projected
            )
            check_exact(operands, case, addend_stride=addend)


PLANTS = {
    "outside the image counts, as C": (
        "made = tl.where(seen, made, 0.0)",
        "made = tl.where(there[None, :], made, 0.0)",
    ),
    "y forgotten": ("z, result, factor[None, :]", "z, 0 * result, factor[None, :]"),
    "a zero passes the ReLU": ("passed <= 0.0", "passed < 0.0"),
    "no mask": ("passed <= 0.0", "passed != passed"),
    "the mask of raw": ("passed = tl.load(out + where", "passed = tl.load(raw + where"),
    "sums not centred": ("(y - tl.load(mean", "(y - 0 * tl.load(mean"),
    "a variance for the mean": ("norm + 2 * channels + channel, sums", "norm + channel, sums"),
    "the other BatchNorm's mean": ("residual_norm + 2 * channels", "norm + 2 * channels"),
    "the other raw output": ("kept, residual + where", "kept, raw + where"),
    "sums of the unrounded": (
        "rounded = dout.to(dx.dtype.element_ty).to(tl.float32)", "rounded = dout",
    ),
    "sums of what the ReLU stopped": ("tl.sum(kept, 0)", "tl.sum(tl.where(stored, dout, 0.0), 0)"),
    "an addend for every pixel": ("added = inside & (up * addend_stride == h)", "added = inside"),
    "the addend rounded before": (
        "dout = acc", "dout = acc.to(dx.dtype.element_ty).to(tl.float32)",
    ),
    "rows of two where there are three": ("(3 if PROJECTED else 2)", "2"),
    "another tile's row": ("row_of_tiles = phase * tiles_m", "row_of_tiles = 0 * phase * tiles_m"),
}  # fmt: skip
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
            expected = checks.expected_end(operands, case, step)
            got = launch(channels_last(operands), case, plan("32x64_4w4s"), step)
            right = all(itertools.starmap(torch.equal, zip(got, expected, strict=True)))
    assert len(found_in) == 1 and not right


def test_one_rounding_behind_the_addend():
    for case, step in ROUNDED:
        for splits in (1, 2):
            check_exact(beyond_float16(case, step), case, plan("32x64_4w4s", splits), step)


@pytest.mark.parametrize("splits", [1, 2])
def test_the_mask_is_read_off_the_output(splits):
    """NaN passes, both zeros and what is below do not."""
    case = BY_NAME["padded"]
    operands = checks.exact_operands(case, torch.float16)
    tiny = 2.0**-24
    signs = torch.tensor([NAN, INF, tiny, 0.0, -0.0, -tiny, -INF]).half()
    operands.out.copy_(signs.expand_as(operands.out))
    got, sums = launch(channels_last(operands), case, plan(splits=splits))
    free = checks.expected_end(operands._replace(out=torch.ones_like(operands.out)), case, 1)[0]
    assert torch.equal(got[..., :3], free[..., :3]) and free[..., :3].any()
    zeros = got[..., 3:]
    assert not zeros.any() and not zeros.signbit().any()
    assert torch.equal(sums, checks.expected_end(operands, case, 1)[1])


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


PLACES = ("dz", "y", "coefficients", "weight", "addend", "raw", "norm", "residual", "residual_norm")


# A weight meets the zeros around the output, which the oracle leaves out: without padding alone.
@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("case", [BY_NAME["grouped"], BY_NAME["pointwise"]], ids=str)
def test_nan_and_inf_stay_in_their_places(case, name):
    case = BY_NAME["shortcut"] if name == "weight" and case.groups > 1 else case
    operands = random_operands(case, torch.float16)
    operands.out.add_(1)  # no ReLU stops what is planted
    where = getattr(operands, name)
    if where.dim() == 2:
        where[0, 3], where[1, 7], where[2, -1] = NAN, INF, -INF
    elif name == "weight":
        where[3, 0, 0, 0], where[-1, -1, 0, 0] = NAN, INF
    else:
        where[0, 3, 1, 1], where[-1, -1, 1, 0], where[0, 5, 0, 1] = NAN, INF, -INF
    oracle = check_bound(operands, case, launch(operands, case))
    assert oracle.isfinite().any() or (case.name, name) == ("pointwise", "coefficients")
    assert name in PLACES[5:] or oracle.isnan().any()


def test_a_mean_that_is_not_finite_reaches_its_channel_alone():
    """Of either BatchNorm, and only where there are pixels."""
    case = BY_NAME["padded"]
    operands = checks.exact_operands(case, torch.float16)
    operands.norm[2, 5], operands.residual_norm[2, 7] = INF, -INF
    operands.out.fill_(1)
    operands.addend.fill_(10000)  # no gradient is 0
    dx, sums = launch(channels_last(operands), case)
    assert (dx > 0).all()
    assert sums[1, 5] == -INF and sums[2, 7] == INF and sums[0].isfinite().all()
    sums[1, 5] = sums[2, 7] = 0
    assert sums.isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["dz", "y", "weight", "addend", "out", "raw", "residual"])
def test_operands_in_any_layout(name, layout):
    case = BY_NAME["shortcut"]
    operands = channels_last(checks.exact_operands(case, torch.float16, addend=2))
    operands = operands._replace(**{name: LAYOUTS[layout](getattr(operands, name))})
    got = launch(operands, case, addend_stride=2)
    for one, expected in zip(got, checks.expected_end(operands, case, 2), strict=True):
        assert torch.equal(one, expected)


def test_tensors_of_a_block_s_end_that_lie_alike_are_read_where_they_are():
    """All sliced alike, or of one row: else they are copied, all to one layout."""

    def nhwc(*shape):
        return torch.zeros(shape).contiguous(memory_format=torch.channels_last)

    same = [nhwc(2, 8, 6, 5)[:, :, ::2] for _ in range(3)]
    assert all(map(lambda a, b: a is b, conv_bn_dgrad_end.alike(*same), same))
    lone = [nhwc(1, 8, 3, 5), nhwc(2, 8, 3, 5)[:1], nhwc(1, 8, 3, 5)]
    lone[1] = lone[1].as_strided(lone[1].shape, (7, *lone[1].stride()[1:]))
    assert all(map(lambda a, b: a is b, conv_bn_dgrad_end.alike(*lone), lone))
    mixed = conv_bn_dgrad_end.alike(same[0], nhwc(2, 8, 3, 5), nhwc(2, 8, 3, 5).contiguous())
    assert len({t.stride() for t in mixed}) == 1 and mixed[0] is not same[0]


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("name", ["padded", "odd"])
def test_nothing_beside_the_gradient_is_written(name, splits):
    """It lies with steps of two between its pixels, and eight channels more behind each."""
    case = BY_NAME[name]
    operands = checks.exact_operands(case, torch.float16)
    expected = checks.expected_end(operands, case, 1)
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
    monkeypatch.delattr(conv_bn_dgrad_end, "conv_bn_dgrad_end_kernel")
    case = cases.ConvCase("empty", 0, 8, 4, 4, 8)
    dx, sums = launch(random_operands(case, torch.float16), case)
    assert dx.shape == case.input_shape and sums.shape == (3, 8) and sums.eq(0).all()


@pytest.mark.parametrize("projected", [True, False])
@pytest.mark.parametrize("name", ["odd", "grouped", "shortcut"])
def test_the_op_takes_the_chosen_configuration(name, projected):
    case = BY_NAME[name]
    operands = channels_last(
        checks.exact_operands(case, torch.float16, addend=2, projected=projected)
    )
    expected = checks.expected_end(operands, case, 2)
    options = [2, *map(list, geometry(case)[:3]), case.groups]
    got = overload(OP, "triton")(*operands, *options)
    with rf.backend("triton"), watch() as launches:
        again = rf.ops.conv_bn_dgrad_end(
            operands.dz, operands.weight, operands.y, operands.coefficients,
            addend_stride=2, **case.geometry,
            **{key: getattr(operands, key) for key in operands._fields[4:]},
        )  # fmt: skip
    assert launches[0].name == "conv_bn_dgrad_end_kernel" and len(launches) <= 3
    for results in (got, again):
        assert all(itertools.starmap(torch.equal, zip(results, expected, strict=True)))


def test_the_rule_and_the_launch_see_one_product():
    """What is asked about a place is what its launch chooses by."""
    for case in CASES:
        for dtype, precision in ((torch.float16, "ieee"), (torch.float32, "tf32x3")):
            for affine in (True, False):
                with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                    meta = {"dtype": dtype, "device": "meta"}
                    launched = conv_bn_dgrad_end.product_of(
                        torch.empty(case.input_shape, **meta),
                        torch.empty(case.weight_shape, **meta), case.stride, case.groups, affine,
                    )  # fmt: skip
                assert launched == rule.product_of(case, dtype.itemsize, precision, affine=affine)


def test_the_self_check_passes_and_finds_a_fault(monkeypatch):
    monkeypatch.setattr(checks, "CONV_CASES", CASES[1:2])
    name = "64x64_4w4s"
    assert name in checks.conv_bn_dgrad_end_configurations()
    checks.conv_bn_dgrad_end(name, "cpu")
    right = conv_bn_dgrad_end.launch

    def shifted(dz, y, coefficients, weight, addend, out, *rest, **options):
        right(dz, y, coefficients, weight, addend, out.roll(1, 1), *rest, **options)

    def uncentred(*arguments, **options):
        right(*arguments, **options)
        arguments[11][-1].add_(1)

    for launch_, message in ((shifted, "elements are wrong"), (uncentred, "sums are wrong")):
        monkeypatch.setattr(conv_bn_dgrad_end, "launch", launch_)
        with pytest.raises(ArithmeticError, match=message):
            checks.conv_bn_dgrad_end(name, "cpu")
    with pytest.raises(KeyError):
        checks.conv_bn_dgrad_end("1x1", "cpu")


MEGABYTES = 2000  # of a process; one of the huge tensors would take 4,000 more
# An argument of one kernel, off by so much: beyond the end, or with a stride of the wrong sign
# before the start.
PLANTED = (
    "conv_bn_dgrad_end_kernel pixels 1",
    "conv_bn_dgrad_end_kernel out_height 1",
    "conv_bn_dgrad_end_kernel end_w -1000",
    "bn_dgrad_end_merge_kernel pixels 1",
    "bn_dgrad_end_merge_kernel end_h -1000",
    "sums_kernel rows 1",
    "sums_kernel columns 1",
)
RIGHT = ("pages", "huge dx -", "huge dz -", "huge merged -")
FAULTS = (
    *(f"planted {fault}" for fault in PLANTED),
    "huge dx conv_bn_dgrad_end_kernel",
    "huge dz conv_bn_dgrad_end_kernel",
    "huge merged bn_dgrad_end_merge_kernel",
)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: mmap without reserve")
def test_nothing_beyond_is_touched_and_planted_faults_kill():
    """Configurations between guard pages, the last tile of tensors of more than 2^31 elements.

    An argument that is off, or offsets of 32 bits, must end the child by a signal.
    """
    right, faults = (RIGHT, FAULTS) if PROOF else (RIGHT[:2], FAULTS[1::3])
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    done = subprocess.run(
        [sys.executable, str(TESTS / "triton_bn_dgrad_end.py"), *right, *faults],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = {}
    for line in done.stdout.splitlines():
        scenario, _, outcome = line.partition(": ")
        found[scenario] = [int(number) for number in outcome.split()]
    assert {s: found[s][0] for s in right} == dict.fromkeys(right, 0), done.stderr
    assert max(found[s][1] for s in right) < MEGABYTES
    died = {s: found[s][0] in (-signal.SIGSEGV, -signal.SIGBUS) for s in faults}
    assert died == dict.fromkeys(faults, True), done.stderr
