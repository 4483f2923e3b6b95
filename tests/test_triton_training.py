"""Training's Triton kernels that multiply no matrices: values, accesses, layouts, hostile operands.

The op matrix holds them to the bounds with all implementations; here is what only kernels have:
tiles, programs, poisoned results, each access lane by lane.
"""

from __future__ import annotations

import importlib
import math
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import triton_trace
from matrix import kink_values, lay_out, norm_values
from torch import Tensor
from triton_trace import PROOF, needs_interpreter, watch

from resnet_fused import cases, numerics
from resnet_fused.numerics.training import fma, rows_of
from resnet_fused.ops import _training_checks_elementwise as checks
from resnet_fused.triton import _launch

pytestmark = [
    *needs_interpreter,
    # NumPy's, about the NaN and Inf that are planted here.
    pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide) :RuntimeWarning"),
]

TESTS = Path(__file__).resolve().parent
DTYPES = (torch.float16, torch.float32)
NAN, INF = math.nan, math.inf
ODD = cases.BnActCase("tiles", 3, 37, 7, 5)
ODD_NCHW = cases.BnActCase("tiles_nchw", 3, 5, 7, 5, layout="nchw")
"""With `small_tiles` rows and columns that no tile divides, more than one of each."""
LAID_OUT = [*(c for c in cases.BN_ACT_CASES if c.n), ODD, ODD_NCHW]
DEAR = (
    "long_rows", "odd_nchw", "many_channels", "all_equal", "nchw", "nchw_residual", "nhwc_no_act",
    "nhwc_residual",
)  # fmt: skip
"""Whose many programs take the interpreter long; `make proof` has them backward too."""
BACKWARD = [c for c in LAID_OUT if PROOF or c.name not in DEAR]
WINDOWS = (
    ((3, 3), (2, 2), (1, 1)),
    ((2, 3), (1, 2), (1, 0)),
    ((3, 4), (1, 1), (1, 2)),  # 12 taps, 12 windows a pixel: loops in place of unrolled code
    ((1, 1), (3, 2), (0, 0)),  # pixels in no window
)


NO_CASE = types.SimpleNamespace(params={})


def launch(op, *arguments):
    importlib.import_module(f"resnet_fused.triton.{op}").launch(*arguments)


def elementwise():
    from resnet_fused.triton import _elementwise

    return _elementwise


@pytest.fixture
def small_tiles(request, monkeypatch):
    """Several tiles a program, and several programs a channel, of a few hundred elements.

    A test of many cases has it for those that are made for it.
    """
    if getattr(request.node, "callspec", NO_CASE).params.get("case", ODD) not in (ODD, ODD_NCHW):
        return
    module = elementwise()
    monkeypatch.setattr(module, "PROGRAMS", 12)
    monkeypatch.setattr(module, "MAX_COLUMNS", 32)
    monkeypatch.setattr(module, "SUMMED_COLUMNS", 32)
    # Defaults of arguments are bound already.
    for name in ("tiles_of", "summed_tiles"):
        monkeypatch.setitem(getattr(module, name).__kwdefaults__, "elements", 512)


def values(case, dtype, layout=None):
    return lay_out(torch.randn(case.shape).to(dtype), layout or case.layout)


def poisoned(like, shape=None):
    """NaN, or 255, in the layout of a result for `like`, alone in its storage."""
    out = torch.empty_like(like) if shape is None else like.new_empty(shape)
    return out.fill_(255 if out.dtype == torch.uint8 else NAN)


def rows(*shape):
    return torch.full(shape, NAN)


def same(got, expected):
    """Bit for bit, NaN for NaN, and -0 for -0."""
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(got.signbit() & ~got.isnan(), expected.signbit() & ~expected.isnan())


def check_sums(sums, dz, *branches):
    found = numerics.check_bound(
        sums, numerics.reductions_oracle(dz, *branches), numerics.reductions_bound(dz, *branches)
    )
    assert found.ok, found


def end_of_block(y, norm, residual, residual_norm, offset, act):
    """Of bn_add_act: float32, each multiply-add rounded once, and the sum."""
    scale, shift, *_ = rows_of(norm)
    z = fma(scale, y, shift)
    if residual is not None:
        r = residual.float()
        if residual_norm is not None:
            scale, shift, *_ = rows_of(residual_norm)
            r = fma(scale, r, shift)
        z[:, offset : offset + r.shape[1]] += r
    return (torch.where(z < 0, torch.zeros(()), z) if act == "relu" else z).to(y.dtype)


def shortcuts(case, dtype):
    """(residual, residual_norm, offset) of every kind."""
    r, part = values(case, dtype), max(1, case.c // 3)
    found = [(None, None, 0), (r, None, 0), (r, norm_values(case.c, dtype), 0)]
    return [*found, (lay_out(r[:, :part].clone(), case.layout), None, case.c - part)]


def by_turns(chosen, kinds=DTYPES):
    """Each with every dtype in `make proof`, else the dtypes in turn."""
    return [
        pytest.param(one, kinds[k], id=f"{one}-{str(kinds[k])[6:]}")
        for i, one in enumerate(chosen)
        for k in (range(len(kinds)) if PROOF else [i % len(kinds)])
    ]


# Values


@pytest.mark.parametrize(("case", "dtype"), by_turns(LAID_OUT))
def test_a_block_ends_bit_for_bit(case, dtype, small_tiles):
    y, norm = values(case, dtype), norm_values(case.c, dtype)
    for residual, residual_norm, offset in shortcuts(case, dtype):
        out = poisoned(y)
        launch("bn_add_act", y, norm, residual, residual_norm, out, offset, case.act)
        same(out, end_of_block(y, norm, residual, residual_norm, offset, case.act))


@pytest.mark.parametrize(("case", "dtype"), by_turns(LAID_OUT))
def test_a_gradient_is_applied_bit_for_bit(case, dtype, small_tiles):
    dz, y, coefficients = values(case, dtype), values(case, dtype), torch.randn(3, case.c)
    dy = poisoned(dz)
    launch("bn_backward_apply", dz, y, coefficients, dy)
    same(dy, numerics.affine_gradient(dz, y, coefficients))


@pytest.mark.parametrize(("case", "dtype"), by_turns(BACKWARD))
def test_a_block_s_gradient_is_masked_bit_for_bit(case, dtype, small_tiles):
    dout, y, r, out = (values(case, dtype) for _ in range(4))
    norm, own = norm_values(case.c, dtype), norm_values(case.c, dtype)
    for result, residual, act in (
        (out, None, "relu"), (None, None, "relu"), (out, r, "relu"), (None, None, "none"),
    ):  # fmt: skip
        dz, sums = poisoned(y), rows(2 if residual is None else 3, case.c)
        own_norm = None if residual is None else own
        launch("bn_add_act_backward", dout, result, y, norm, residual, own_norm, dz, sums, act)
        passed = numerics.normalised(y, norm) if result is None else result
        same(dz, numerics.masked(dout, passed) if act == "relu" else dout.contiguous())
        check_sums(sums, dz, (y, norm), *([] if residual is None else [(residual, own)]))


def fits(case, window):
    sizes = zip(case.shape[2:], *window, strict=True)
    return all(size + 2 * pad >= kernel for size, kernel, _, pad in sizes)


@pytest.mark.parametrize(("case", "dtype"), by_turns(BACKWARD))
def test_pooling_forward_and_back(case, dtype, small_tiles):
    # Few values: windows have ties.
    y, norm = (values(case, dtype) * 2).round(), norm_values(case.c, dtype)
    y = lay_out(y, case.layout)
    turn = BACKWARD.index(case) % len(WINDOWS)
    for window in [w for w in (WINDOWS if PROOF else WINDOWS[turn : turn + 1]) if fits(case, w)]:
        expected, winners = numerics.bn_act_pool_oracle(y, norm, *window)
        form = torch.channels_last if y.stride(1) == 1 else torch.contiguous_format
        out = torch.full_like(expected, NAN).contiguous(memory_format=form)
        taps = torch.full_like(out, 255, dtype=torch.uint8)
        launch("bn_act_pool", y, norm, out, taps, *window)
        same(out, expected)
        assert torch.equal(taps, winners)

        dout, dz, sums = torch.randn_like(out), poisoned(y), rows(2, case.c)
        launch("bn_act_pool_backward", dout, taps, y, norm, dz, sums, *window)
        wide = torch.zeros(case.shape)
        (kernel, stride, pad) = window
        for p in range(out.shape[2]):  # windows in their order, added in float32
            for q in range(out.shape[3]):
                tap = taps[:, :, p, q].long()
                u, v = p * stride[0] - pad[0] + tap // kernel[1], q * stride[1] - pad[1]
                place = u * case.w + v + tap % kernel[1]
                wide.flatten(2).scatter_add_(2, place[..., None], dout[:, :, p, q, None].float())
        same(dz, numerics.masked(wide.to(dtype), numerics.normalised(y, norm)))
        check_sums(sums, dz, (y, norm))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_at_the_kink(dtype, monkeypatch):
    """The sign of scale * y + shift is that of the exact number, in forward and backward alike."""
    y, norm = kink_values(dtype)
    exact = norm[0].double().view(1, -1, 1, 1) * y.double() + norm[1].double().view(1, -1, 1, 1)
    passes = exact.float().to(dtype) > 0  # rounded, it may underflow

    def masks():
        dout, out, dz = torch.ones_like(y), poisoned(y), poisoned(y)
        launch("bn_add_act", y, norm, None, None, out, 0, "relu")
        launch("bn_add_act_backward", dout, None, y, norm, None, None, dz, rows(2, 48), "relu")
        return out > 0, dz > 0

    forward, backward = masks()
    assert torch.equal(forward, passes) and torch.equal(backward, passes)
    if dtype == torch.float32:  # a product and a sum would not do
        monkeypatch.setattr(triton_trace, "fused", lambda a, b, c: a * b + c)
        forward, backward = masks()
        assert not torch.equal(forward, passes) and torch.equal(forward, backward)


PLACES = ("y", "norm", "residual", "residual_norm", "dout", "out")


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("name", PLACES)
def test_nan_and_inf_stay_in_their_places(name, value):
    case, dtype = cases.BnActCase("special", 2, 6, 3, 4), torch.float16
    given = {k: values(case, dtype) for k in ("y", "residual", "dout", "out")}
    given |= {k: norm_values(6, dtype) for k in ("norm", "residual_norm")}
    if name.endswith("norm"):
        given[name][torch.arange(4), torch.arange(4)] = value
    else:
        given[name][0, 2, 1, 1] = value
    y, norm, r, own = (given[k] for k in PLACES[:4])
    out = poisoned(y)
    launch("bn_add_act", y, norm, r, own, out, 0, "relu")
    same(out, end_of_block(y, norm, r, own, 0, "relu"))
    dz, sums = poisoned(y), rows(3, 6)
    launch("bn_add_act_backward", given["dout"], given["out"], y, norm, r, own, dz, sums, "relu")
    same(dz, numerics.masked(given["dout"], given["out"]))
    check_sums(sums, dz, (y, norm), (r, own))
    oracle = numerics.reductions_oracle(dz, (y, norm), (r, own))
    assert torch.equal(sums.isfinite(), oracle.isfinite())
    dy, coefficients = poisoned(y), own[:3].contiguous()
    launch("bn_backward_apply", given["dout"], y, coefficients, dy)
    same(dy, numerics.affine_gradient(given["dout"], y, coefficients))
    window = WINDOWS[0]
    expected, winners = numerics.bn_act_pool_oracle(y, norm, *window)
    pooled, taps = poisoned(expected), poisoned(winners)
    launch("bn_act_pool", y, norm, pooled, taps, *window)
    same(pooled, expected)
    assert torch.equal(taps, winners)


def test_an_outside_shortcut_keeps_the_sign_of_zero():
    y = torch.full((1, 8, 2, 2), -0.0).contiguous(memory_format=torch.channels_last)
    norm = torch.zeros(4, 8)
    norm[0], norm[1] = 1, -0.0
    out = poisoned(y)
    launch("bn_add_act", y, norm, torch.zeros(1, 2, 2, 2), None, out, 3, "none")
    assert out.signbit().sum((0, 2, 3)).tolist() == [4, 4, 4, 0, 0, 4, 4, 4]


@pytest.mark.parametrize("layouts", [("nchw", "nhwc"), ("nhwc", "nchw")], ids="-".join)
def test_operands_and_results_of_different_layouts(layouts, small_tiles):
    case, dtype = cases.BnActCase("mixed", 2, 24, 3, 5), torch.float16
    y, dout = (values(case, dtype, layouts[0]) for _ in range(2))
    r = values(case, dtype, layouts[1])
    norm, own = norm_values(24, dtype), norm_values(24, dtype)
    out, dz, sums = poisoned(r), poisoned(r), rows(3, 24)
    launch("bn_add_act", y, norm, r, own, out, 0, "relu")
    same(out, end_of_block(y, norm, r, own, 0, "relu"))
    launch("bn_add_act_backward", dout, out, y, norm, r, own, dz, sums, "relu")
    same(dz, numerics.masked(dout, out))
    check_sums(sums, dz, (y, norm), (r, own))
    expanded = dout[:1, :1, :1, :1].expand(case.shape)  # the gradient of a sum
    launch("bn_add_act_backward", expanded, out, y, norm, None, None, dz, sums[:2], "relu")
    same(dz, numerics.masked(expanded, out))


def test_sums_have_the_same_bits_each_time_and_wherever_they_lie(small_tiles):
    dout, y = values(ODD, torch.float32), values(ODD, torch.float32)
    norm = norm_values(ODD.c, torch.float32)

    def sums(layout):
        dz, found = poisoned(y), rows(2, ODD.c)
        given = (lay_out(dout, layout), None, lay_out(y, layout), norm, None, None)
        launch("bn_add_act_backward", *given, dz, found, "relu")
        return found

    first = sums("nhwc")
    for layout in ("nhwc", "unaligned", "nhwc"):
        assert torch.equal(sums(layout), first)


def test_an_empty_batch_launches_nothing_and_sums_to_zero(monkeypatch):
    y, norm = torch.empty(0, 8, 4, 4), norm_values(8, torch.float32)
    dz, small = torch.empty_like(y), torch.empty(0, 8, 2, 2)
    monkeypatch.setattr(_launch, "traceable", None)
    launch("bn_add_act", y, norm, None, None, dz, 0, "relu")
    launch("bn_backward_apply", y, y, norm[:3], dz)
    launch("bn_act_pool", y, norm, small, small.byte(), *WINDOWS[0])
    for sums in (rows(2, 8), rows(3, 8)):
        launch("bn_add_act_backward", y, y, y, norm, None, None, dz, sums, "relu")
        assert not sums.any() and not sums.isnan().any()
    sums = rows(2, 8)
    launch("bn_act_pool_backward", small, small.byte(), y, norm, dz, sums, *WINDOWS[0])
    assert not sums.any() and not sums.isnan().any()


# Accesses: a lane that is active outside all arguments fails in `watch`, whatever lies there.


def own(t):
    """The tensor in memory of its own."""
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).copy_(t)


def once(access):
    """Every element was touched exactly once."""
    return bool((access.loads + access.stores == 1).all())


@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
def test_each_element_is_read_and_written_once(layout, small_tiles):
    case = ODD if layout == "nhwc" else ODD_NCHW
    dtype, norm, other = torch.float16, norm_values(case.c, torch.float16), torch.randn(4, case.c)
    t = [own(values(case, dtype, layout)) for _ in range(5)]
    with watch() as seen:
        launch("bn_add_act", t[0], norm, t[1], other, t[2], 0, "relu")
        launch("bn_backward_apply", t[0], t[1], torch.randn(3, case.c), t[2])
        launch("bn_add_act_backward", *t[:3], norm, t[3], other, t[4], rows(3, case.c), "relu")
    names = [launch.name for launch in seen]
    assert names == [
        "bn_add_act_kernel", "bn_backward_apply_kernel", "bn_add_act_backward_kernel",
        "merge_sums_kernel",
    ]  # fmt: skip
    for touched, tensors in zip(
        seen[:3],
        (("y", "residual", "out"), ("dz", "y", "dy"), ("dout", "out", "y", "residual", "dz")),
        strict=True,
    ):
        assert all(once(touched[name]) for name in tensors), touched.name
    assert once(seen[3]["partial"]) and once(seen[3]["sums"])
    assert (seen[2]["partial"].stores == 1).all()
    assert seen[3].values["parts"] > 1
    assert seen[2].values["each"] > 1 or layout == "nchw"


@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
def test_pooling_touches_nothing_else(layout, small_tiles):
    case = ODD if layout == "nhwc" else ODD_NCHW
    y, norm = values(case, torch.float16, layout), rows(4, case.c)
    small = values(cases.BnActCase("pooled", 3, case.c, 4, 3), torch.float16, layout)
    kernel, stride, pad = WINDOWS[0]
    with watch() as seen:
        taps = torch.zeros_like(small, dtype=torch.uint8)
        launch("bn_act_pool", own(y), norm.zero_(), own(small), taps, kernel, stride, pad)
        given = (own(small), taps, own(y), norm, own(y), rows(2, case.c))
        launch("bn_act_pool_backward", *given, kernel, stride, pad)
    forward, backward, merged = seen
    assert (forward["out"].stores == 1).all() and (forward["taps"].stores == 1).all()
    assert forward["y"].loads.min() >= 1 and forward["y"].loads.max() <= 4
    assert once(backward["y"]) and once(backward["dz"]) and once(merged["partial"])
    # A 3x3 window of stride 2 reaches 9 pixels at most, each once.
    assert backward["taps"].loads.max() == 9 and backward["dout"].loads.max() == 9


# Self-checks

OPS = (
    "bn_finalize", "bn_update_stats", "bn_backward_finalize", "bn_add_act", "bn_add_act_backward",
    "bn_backward_apply", "bn_act_pool", "bn_act_pool_backward",
)  # fmt: skip


@pytest.mark.parametrize("op", OPS)
def test_the_self_check_passes_and_bites(op, monkeypatch):
    if not PROOF:
        names = ("nhwc_residual", "unaligned", "one_channel")
        monkeypatch.setattr(checks, "CASES", [c for c in checks.CASES if c.name in names])
    check = getattr(checks, op)
    (configuration,) = getattr(checks, f"{op}_configurations")()
    check(configuration, "cpu")
    with pytest.raises(ValueError, match="configuration is 'other'; accepted is 'default'"):
        check("other", "cpu")
    module = importlib.import_module(f"resnet_fused.triton.{op}")
    right = module.launch

    def wrong(*arguments):
        right(*arguments)
        written = [t for t in arguments if isinstance(t, Tensor) and t.dtype != torch.uint8]
        last = written[3 if op == "bn_update_stats" else -1]
        last[tuple(slice(-1, None) for _ in last.shape)] += 1

    monkeypatch.setattr(module, "launch", wrong)
    with pytest.raises(ArithmeticError, match=op):
        check(configuration, "cpu")


# More than 2^31 elements

SAMPLED = [("bn_add_act", "nhwc"), ("bn_add_act_backward", "nhwc")]
HUGE = [(op, layout) for op in OPS[3:] for layout in ("nhwc", "nchw")] if PROOF else SAMPLED


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: mmap without reserve")
@pytest.mark.timeout(600)
def test_offsets_beyond_32_bits():
    """The last program of each kernel is right; with offsets of 32 bits it dies by a signal."""
    right = [f"training {op} {layout} -" for op, layout in HUGE]
    faults = [f"training {op} {layout} {op}_kernel" for op, layout in HUGE]
    child = subprocess.run(
        [sys.executable, str(TESTS / "triton_training_huge.py"), *right, *faults],
        capture_output=True,
        text=True,
        timeout=600,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
            "OMP_NUM_THREADS": "1",
        },
    )
    assert child.returncode == 0, child.stderr
    status = {line.partition(": ")[0]: int(line.split()[-2]) for line in child.stdout.splitlines()}
    assert {s: status[s] for s in right} == dict.fromkeys(right, 0), child.stderr
    died = {s: status[s] in (-signal.SIGSEGV, -signal.SIGBUS) for s in faults}
    assert died == dict.fromkeys(faults, True), child.stderr
