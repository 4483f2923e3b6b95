"""conv_chain's kernel in Triton's interpreter: every configuration, bytes, masks, edges."""

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
from triton_trace import PROOF, issued_bytes, needs_interpreter, unique_bytes, watch

import resnet_fused as rf
from resnet_fused import numerics, roofline
from resnet_fused.cases import CHAIN_CASES, ChainCase
from resnet_fused.ops import _chain_checks as checks
from resnet_fused.ops import _chain_plan
from resnet_fused.triton import _chain_tiles, _tiles

pytestmark = [
    *needs_interpreter,
    # NumPy's, about the NaN and Inf that are planted here.
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),
]

TESTS = Path(__file__).resolve().parent
HALF = torch.float16
NAN, INF = float("nan"), float("inf")
FIRST = _chain_tiles.CONFIGS[0]
BY_NAME = {case.name: case for case in CHAIN_CASES}
EVEN = ChainCase("even", 2, 64, 8, 8, 128, 64)
"""Whole tiles and blocks of `FIRST`."""
TRAFFIC = (
    EVEN,
    dataclasses.replace(EVEN, out_stride=2),
    dataclasses.replace(EVEN, projected=64, projection_stride=2),
    dataclasses.replace(EVEN, m=0),
    dataclasses.replace(EVEN, n=8, h=28, w=28, k=64, c=256),
)


def launch(operands, case, *, reverse=False, config=FIRST, form=torch.channels_last, results=None):
    """out and next, in poisoned memory."""
    from resnet_fused.triton import conv_chain as kernel

    dtype = operands.x.dtype
    out, following = results or (
        torch.full(shape, NAN, dtype=dtype).contiguous(memory_format=form)
        for shape in (case.stored_shape, (case.n, case.m, case.h, case.w))
    )
    strides = case.projection_stride, case.out_stride
    kernel.launch(*operands, out, following, *strides, reverse, config=config)
    return out, following


def exact(case, dtype=HALF):
    operands = numerics.chain_operands(case, dtype, exact=True)
    moved = (
        t if t is None or t.dim() == 1 else t.contiguous(memory_format=torch.channels_last)
        for t in operands
    )
    return numerics.ChainOperands(*moved)


def is_right(got, operands, case):
    dtype = operands.x.dtype
    wanted = numerics.conv_chain_expected(operands, dtype, case.projection_stride, case.out_stride)
    return all(
        expected is None or torch.equal(y, expected.to(dtype))
        for y, expected in zip(got, wanted, strict=True)
    )


@pytest.mark.parametrize("name", checks.conv_chain_configurations())
def test_every_configuration(name, monkeypatch):
    """The self-check of each, which poisons and guards the results; in CI of the odd sizes."""
    if not PROOF:
        odd = checks.cases_of(name)[1]
        small = dataclasses.replace(odd, n=2, h=6, w=7)
        monkeypatch.setattr(checks, "cases_of", lambda configuration: (small,))
    with watch() as launches:
        checks.conv_chain(name, "cpu")
    assert launches


@pytest.mark.parametrize("config", _chain_tiles.CONFIGS, ids=lambda c: c.name)
def test_every_configuration_in_float32(config):
    """Right in float32 too, whatever a GPU has room for."""
    case = ChainCase("odd", 1, config.k - 3, 5, 7, config.chunk + 5, config.m - 1)
    operands = exact(case, torch.float32)
    assert is_right(launch(operands, case, config=config), operands, case)


def test_the_self_check_finds_a_fault(monkeypatch):
    from resnet_fused.triton import conv_chain as kernel

    right = kernel.launch
    case = ChainCase("whole", 2, 64, 8, 8, 64, 64)
    monkeypatch.setattr(checks, "cases_of", lambda configuration: (case,))
    for place, what in ((4, "out"), (10, "next")):

        def wrong(*operands, place=place, **options):
            found = list(operands)
            found[place] = found[place].roll(1, int(found[place].dim() > 1))
            right(*found, **options)

        monkeypatch.setattr(kernel, "launch", wrong)
        with pytest.raises(ArithmeticError, match=f"{what}: .* elements are wrong"):
            checks.conv_chain(FIRST.name, "cpu")


@pytest.mark.parametrize(
    ("case", "dtype", "reverse"),
    [
        pytest.param(case, dtype, reverse, id=f"{case}-{str(dtype)[6:]}-{reverse}")
        for place, case in enumerate(CHAIN_CASES)
        for dtype in (torch.float16, torch.float32)
        for reverse in (False, True)
        # By default float16 walks forwards and every other case in float32 backwards.
        if PROOF or (reverse == (dtype is torch.float32) and (not reverse or place % 2))
    ],
)
def test_exact_on_integers(case, dtype, reverse):
    operands = exact(case, dtype)
    assert is_right(launch(operands, case, reverse=reverse), operands, case)


@pytest.mark.parametrize("case", [c for c in CHAIN_CASES if c.n], ids=str)
def test_within_the_bound(case):
    """Of the whole chain; and next, tighter, of the very `out` that was written."""
    operands = numerics.chain_operands(case, HALF)
    strides = case.projection_stride, case.out_stride
    got = launch(operands, case)
    oracle = numerics.conv_chain_oracle(operands, *strides)
    bound = numerics.conv_chain_bound(operands, *strides)
    for y, expected, most in zip(got, oracle, bound, strict=True):
        if expected is not None:
            found = numerics.check_bound(y, expected, most)
            assert found.ok, found
    if case.m and case.out_stride == 1:
        after = numerics.conv_bn_act_oracle(got[0], *operands.next)
        most = numerics.conv_bn_act_bound(got[0], *operands.next, None, after)
        found = numerics.check_bound(got[1], after, most)
        assert found.ok, found


@pytest.mark.parametrize(
    "name", ["x", "weight", "scale", "shift", "residual", "next_weight", "front_weight"]
)
def test_nan_and_inf_stay_in_their_places(name):
    """Within the bound, which is 0 there."""
    case = BY_NAME["front"]
    operands = numerics.chain_operands(case, HALF)
    t = getattr(operands, name)
    t.view(-1)[3], t.view(-1)[9] = NAN, INF
    got = launch(operands, case)
    oracle, bound = numerics.conv_chain_oracle(operands), numerics.conv_chain_bound(operands)
    for y, expected, most in zip(got, oracle, bound, strict=True):
        found = numerics.check_bound(y, expected, most)
        assert found.ok, found
    assert any(y.isnan().any() for y in got)


@pytest.mark.parametrize("case", TRAFFIC if PROOF else TRAFFIC[:4], ids=repr)
def test_bytes(case):
    """Each tensor once but the weights; exactly what the chooser counts with."""
    operands = exact(case)
    with watch() as launches:
        got = launch(operands, case)
    assert is_right(got, operands, case)
    (one,) = launches
    assert (one["out"].stores == 1).all() and not one["out"].loads.any()
    assert (one["x"].loads == 1).all()
    if case.m:
        assert (one["following"].stores == 1).all()
    if not case.projected:
        assert (one["residual"].loads == 1).all()
    work = _chain_tiles.work(FIRST, _chain_plan.sizes_of(case, 2))
    least = roofline.conv_chain_cost(case, HALF).bytes
    assert work.unique == least
    assert issued_bytes(launches) == work.issued
    assert least <= unique_bytes(launches) <= 1.1 * least


def test_a_front_reads_its_taps_and_nothing_else():
    case = dataclasses.replace(EVEN, front=64)
    operands = exact(case)
    with watch() as launches:
        launch(operands, case)
    (one,) = launches
    taps = one["x"].loads.reshape(case.n, case.h, case.w, -1)
    assert (taps[:, 1:-1, 1:-1] == 9).all() and (taps[:, 0, 0] == 4).all()
    least = roofline.conv_chain_cost(case, HALF).bytes
    assert unique_bytes(launches) == least == _chain_tiles.work(
        FIRST, _chain_plan.sizes_of(case, 2)
    ).unique  # fmt: skip


PLANTS = {
    "not rounded": ("tl.dot(rounded, weights", "tl.dot(y, weights.to(tl.float32)"),
    "no ReLU of out": ("y = tl.where(y < 0.0, 0.0, y)\n        if not", "if not"),
    "not there": ("y = tl.where(known[None, :], y, 0.0)", "pass"),
    "another channel's shortcut": ("shortcut[:, None] + c[None, :]", "shortcut[:, None] + (c ^ 1)"),
    "odd pixels stored": ("(p % OUT_STRIDE == 0)", "(p % OUT_STRIDE == 1)"),
    "a chunk lost": ("range(0, channels, BLOCK_N)", "range(0, channels - BLOCK_N, BLOCK_N)"),
    "the last chunk's next alone": ("tl.dot(rounded, weights, acc,", "tl.dot(rounded, weights,"),
}


@pytest.mark.parametrize("name", PLANTS)
def test_the_exact_cases_bite(name, monkeypatch):
    from triton.runtime import interpreter

    text, other = PLANTS[name]
    case = ChainCase("square", 2, 17, 5, 5, 70, 19, out_stride=2 if "pixels" in name else 1)
    operands = exact(case)
    if "rounded" in name:
        # Otherwise float16 holds every value of out as it is.
        operands.scale.mul_(1 + 2**-11)
    if "there" in name:
        # Inf alone stays Inf; with a NaN from a channel that does not exist it is NaN.
        for t in (operands.weight, operands.next_weight):
            t.abs_().add_(1)
        for t in (operands.scale, operands.next_scale):
            t.abs_()
        operands.x[0, 0, 0, 0] = INF
    right = launch(operands, case)
    assert is_right(right, operands, case)
    lines = inspect.getsourcelines

    def planted(fn):
        found, first = lines(fn)
        if getattr(fn, "__name__", "") == "conv_chain_kernel":
            joined = "".join(found)
            assert text in joined
            found = joined.replace(text, other).splitlines(keepends=True)
        return found, first

    monkeypatch.setattr(inspect, "getsourcelines", planted)
    monkeypatch.setattr(interpreter.InterpretedFunction, "rewritten_fn", {})
    assert not is_right(launch(operands, case), operands, case)


def sliced(t):
    n, c, h, w = t.shape
    memory = torch.full((n, 2 * h, 3 * w, c + 3), NAN, dtype=t.dtype).permute(0, 3, 1, 2)
    memory[:, 2:-1, ::2, ::3] = t
    return memory[:, 2:-1, ::2, ::3]


LAYOUTS = {
    "nchw": lambda t: t.contiguous(),
    "sliced": sliced,
    "expanded": lambda t: t[:1, :1, :1, :1].expand_as(t),
}
MOVED = ("x", "weight", "residual", "projected", "projection_weight", "next_weight", "front_weight")


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        (name, layout)
        for i, name in enumerate(MOVED)
        for j, layout in enumerate(LAYOUTS)
        if PROOF or (i + j) % 3 < 2
    ],
)
def test_operands_in_any_layout(name, layout):
    case = BY_NAME["front" if name in ("residual", "front_weight") else "projected_stride2"]
    operands = exact(case)
    operands = operands._replace(**{name: LAYOUTS[layout](getattr(operands, name))})
    assert is_right(launch(operands, case), operands, case)


@pytest.mark.parametrize("layout", ["nchw", "sliced"])
def test_results_in_any_layout(layout):
    case = BY_NAME["identity"]
    operands = exact(case)
    shapes = case.stored_shape, (case.n, case.m, case.h, case.w)
    results = [LAYOUTS[layout](torch.full(shape, NAN, dtype=HALF)) for shape in shapes]
    assert is_right(launch(operands, case, results=results), operands, case)


def test_an_empty_batch_launches_nothing(monkeypatch):
    from resnet_fused.triton import conv_chain as kernel

    monkeypatch.delattr(kernel, "conv_chain_kernel")
    case = BY_NAME["empty_batch"]
    assert not any(t.numel() for t in launch(numerics.chain_operands(case, HALF), case))


def test_the_op_by_one_kernel_or_by_its_parts():
    """One launch where a configuration takes the call; conv_bn_act's kernels otherwise."""
    for case, names in (
        (EVEN, ["conv_chain_kernel"]),
        (BY_NAME["odd_channels"], ["conv_bn_act_kernel"] * 2),
    ):
        o = exact(case)
        with rf.backend("triton"), watch() as launches:
            got = rf.ops.conv_chain(
                *o[:4], residual=o.residual, next_weight=o.next_weight, next_scale=o.next_scale,
                next_shift=o.next_shift, reverse=True,
            )  # fmt: skip
        assert [one.name for one in launches] == names
        assert is_right(got, o, case)


def test_the_same_bits_each_time():
    operands = numerics.chain_operands(EVEN, HALF)
    first = launch(operands, EVEN)
    for reverse in (False, True):
        again = launch(operands, EVEN, reverse=reverse)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


HUGE = ("x", "residual", "projected", "out", "following")
RIGHT = (*(f"both {at} -" for at in ("end", "start")), *(f"wide {which} -" for which in HUGE))
BEYOND = (
    "pixels=99", "residual_w=99", "out_w=99", "following_w=99", "x_w=99", "channels=99", "inner=9",
    "filters=9", "depth=9", "projected_h=99", "below=9",
)  # fmt: skip
FAULTS = (
    *(f"both end {fault}" for fault in (BEYOND if PROOF else BEYOND[:4])),
    *(f"wide {which} WIDE=-1" for which in HUGE),
)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: mmap without reserve")
@pytest.mark.timeout(300)
def test_nothing_beyond_is_touched_and_planted_faults_kill():
    """Between guard pages, and with steps beyond 2^31: what is off ends a child by a signal."""
    child = subprocess.run(
        [sys.executable, str(TESTS / "triton_chain_guard.py"), *RIGHT, *FAULTS],
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


def test_what_is_served():
    """By sizes, shared memory and dtype; each refusal says why."""
    h200 = _tiles.Limits(132, 232448, 90)
    small = _tiles.Limits(84, 99 * 1024, 86)

    def chosen(case, limits=h200, itemsize=2, allowed=None):
        sizes = _chain_plan.sizes_of(case, itemsize, "tf32" if itemsize == 4 else "ieee")
        found = _chain_tiles.choose(sizes, limits, allowed)
        return found if isinstance(found, str) else found.name

    layer1 = ChainCase("layer1", 256, 64, 56, 56, 256, 64)
    layer2 = ChainCase("layer2", 256, 128, 28, 28, 512, 128)
    assert chosen(layer1) == "128x64x64_4w3s"
    assert chosen(dataclasses.replace(layer1, n=1)) == "64x64x64_4w3s"
    assert chosen(dataclasses.replace(layer1, m=128)) == "128x64x128_8w3s"
    assert chosen(layer2) == "128x128x128_8w2s"
    assert chosen(layer2, small) == "64x128x128_4w3s"
    assert chosen(layer1, itemsize=4) == "64x64x64_4w3s"
    assert "float32" in chosen(layer2, itemsize=4)
    assert "264 channels" in chosen(dataclasses.replace(layer1, k=264))
    assert "multiple of 16" in chosen(dataclasses.replace(layer1, k=60))
    assert "no configuration is left" in chosen(layer1, allowed=frozenset())
    assert "4 warps" in chosen(
        dataclasses.replace(layer1, k=256, front=64, m=256)
    )  # all of 256 channels have 8
    both = dataclasses.replace(layer2, projected=64, front=64)
    assert "does not fit" in chosen(both, allowed=frozenset({"64x128x128_4w3s"}))
    assert "512 projected" in chosen(dataclasses.replace(layer1, projected=512))
