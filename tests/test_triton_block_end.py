"""bn_add_act_conv_stats: the bits of two kernels from one, each element of out stored once."""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matrix import norm_values
from test_training_row import check as check_row
from test_training_row import row
from test_triton_kernels import LAYOUTS, poisoned_workspace
from triton_trace import PROOF, issued_bytes, needs_interpreter, watch

import resnet_fused as rf
from resnet_fused import cases, numerics
from resnet_fused.ops import _block_end as _way
from resnet_fused.ops import _training_checks_block_end as checks
from resnet_fused.triton import _block_end, _tiles

pytestmark = [
    *needs_interpreter,
    # NumPy's, about the NaN and Inf that are planted here.
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),
]

TESTS = Path(__file__).resolve().parent
HALF = torch.float16
NAN, INF = float("nan"), float("inf")
# 126 pixels; steps and columns of tiles that are not full, or single elements; whole ones.
ODD = cases.ConvCase("odd", 2, 208, 7, 9, 144)
RAGGED = cases.ConvCase("ragged", 2, 65, 7, 9, 70)
EVEN = cases.ConvCase("even", 2, 128, 8, 8, 128)
KERNELS = ("bn_add_act_conv_stats_kernel", "stats_merge_kernel", "merge_moments_kernel")


def nhwc(t):
    return t.contiguous(memory_format=torch.channels_last)


def operands_of(case, dtype=HALF, *, projected=True):
    """y, norm, residual, residual_norm, weight."""
    y, residual = (nhwc(torch.randn(case.input_shape).to(dtype)) for _ in range(2))
    own = norm_values(case.c, dtype) if projected else None
    weight = nhwc(torch.randn(case.weight_shape).to(dtype))
    return y, norm_values(case.c, dtype), residual, own, weight


def results_of(case, dtype=HALF):
    """out, z and stats, full of NaN."""
    out, z = (nhwc(torch.full(s, NAN).to(dtype)) for s in (case.input_shape, case.output_shape))
    return out, z, torch.full((2, case.k), NAN)


def launch(case, operands, plan=None, results=None):
    from resnet_fused.triton import bn_add_act_conv_stats as kernel

    results = results or results_of(case, operands[0].dtype)
    with poisoned_workspace():
        kernel.launch(*operands, *results, plan=plan)
    return results


def by_two(case, operands, plan):
    """What the two kernels give, the second one by the same plan."""
    from resnet_fused.triton import bn_add_act, conv_bn_stats

    *end, weight = operands
    out, z, stats = results_of(case, weight.dtype)
    bn_add_act.launch(*end, out, 0, "relu")
    geometry = (1, 1), (0, 0), (1, 1), 1
    conv_bn_stats.launch(out, None, weight, z, stats, *geometry, plan=plan)
    return out, z, stats


def product_of(*sizes, projected=False, capability=90):
    return _block_end.product_of(*sizes, projected=projected, capability=capability)


def plan(name="64x64_4w4s", splits=1):
    return _tiles.Plan(_tiles.BY_NAME[name], splits, False, "for the test")


def same(one, other):
    return all(
        torch.equal(a.nan_to_num(77), b.nan_to_num(77)) for a, b in zip(one, other, strict=True)
    )


def cells():
    """All in `make proof`, else a turn of cases, dtypes, shortcuts and splits a configuration."""
    found = []
    for i, tile in enumerate(_block_end.TILES):
        for j, case in enumerate((ODD, RAGGED, EVEN)):
            for splits in (1, 2):
                for projected in (False, True):
                    turn = i + j + splits + projected
                    dtype = torch.float32 if turn % 3 == 0 else HALF
                    if PROOF or turn % 4 == 0:
                        found.append((tile.name, case, splits, projected, dtype))
    return found


@pytest.mark.parametrize(("name", "case", "splits", "projected", "dtype"), cells(), ids=str)
def test_the_bits_of_two_kernels(name, case, splits, projected, dtype):
    operands = operands_of(case, dtype, projected=projected)
    p = plan(name, splits)
    assert same(launch(case, operands, p), by_two(case, operands, p))


@pytest.mark.parametrize("name", checks.bn_add_act_conv_stats_configurations())
def test_every_configuration(name, monkeypatch):
    """The self-check of each, which poisons and guards the results; in CI of one case."""
    if not PROOF:
        monkeypatch.setattr(checks, "CASES", checks.CASES[-1:])
    checks.bn_add_act_conv_stats(name, "cpu")


def test_the_self_check_finds_a_fault(monkeypatch):
    from resnet_fused.triton import bn_add_act_conv_stats as kernel

    right = kernel.launch
    monkeypatch.setattr(checks, "CASES", checks.CASES[-1:])
    for place, what in ((0, "out"), (2, "out"), (4, "z"), (7, "mean and M2")):

        def wrong(*operands, place=place, **options):
            found = list(operands)
            if place == 7:
                right(*operands, **options)
                operands[7].mul_(1.01)
                return
            found[place] = found[place].roll(1, 0)
            right(*found, **options)

        monkeypatch.setattr(kernel, "launch", wrong)
        with pytest.raises(ArithmeticError, match=what):
            checks.bn_add_act_conv_stats("64x128_4w4s", "cpu")


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("case", [EVEN, ODD], ids=str)
def test_out_is_stored_once_by_all_columns_together(case, splits):
    """Every column of tiles reads y and shortcut; each stores its share of out, none all of it."""
    operands = operands_of(case, projected=False)
    p = plan("32x64_4w4s", splits)
    with watch() as launches:
        out, z, stats = launch(case, operands, p)
    first = launches[0]
    columns = _tiles.cdiv(case.k, p.tile.n)
    assert columns > 1
    assert (first["out"].stores == 1).all() and first["out"].loaded == 0
    least = columns * (case.n * case.h * case.w // p.tile.m > 0)
    for name in ("y", "residual"):
        assert first[name].loads.min() == least and first[name].stored == 0, name
    stored = first["z"] if splits == 1 else launches[1]["out"]
    assert (stored.stores == 1).all() and (launches[-1]["stats"].stores == 1).all()
    names = [KERNELS[0], *KERNELS[1:splits], KERNELS[2]]
    assert [one.name for one in launches] == names
    assert not any(t.isnan().any() for t in (out, z, stats))


@pytest.mark.parametrize("splits", [1, 2])
def test_what_the_choice_counts_is_asked_of_the_caches(splits):
    p = plan("64x64_4w4s", splits)
    with watch() as launches:
        launch(EVEN, operands_of(EVEN, projected=False), p)
    product = product_of(EVEN.n * 64, EVEN.c, EVEN.k, 2)
    vectors = launches[0]["norm"].loaded
    moments = sum(one["moments"].stored for one in launches[:-1] if "moments" in one.accesses)
    counted = issued_bytes(launches[:-1]) - vectors - moments
    out = 2 * math.prod(EVEN.input_shape)
    assert counted == _block_end.asked_bytes(product, p, _block_end.READ) + out


PLANTS = {
    "shortcut forgotten": ("z += r", "z += 0 * r"),
    "its BatchNorm forgotten": ("r = tl.math.fma(a[None, :], r, b[None, :])", "r = r + 0"),
    "no ReLU": ("tl.where(z < 0.0, 0.0, z)", "z"),
    "ReLU that loses NaN": ("tl.where(z < 0.0, 0.0, z)", "tl.where(z > 0.0, z, 0.0)"),
    "another rounding": ("a.to(out.dtype.element_ty)", "(a * 0.9995).to(out.dtype.element_ty)"),
    "every column stores": ("(zeros + step % tiles_n == tile_n)", "(zeros == 0)"),
    "the first column alone stores a step": ("step % tiles_n == tile_n", "step == tile_n"),
    "a part's last step lost": ("tl.minimum(begin + each, blocks)", "blocks - 1"),
    "rows of another image": ("image * out_n", "0 * image * out_n"),
    "moments of another tile": ("* 2 * filters, inside", "* filters, inside"),
    "beyond the last pixel": ("stored = (inside &", "stored = ((inside | True) &"),
}


@pytest.mark.parametrize("name", PLANTS)
def test_planted_faults_are_seen(name, monkeypatch):
    from triton.runtime import interpreter

    text, other = PLANTS[name]
    operands = operands_of(ODD)
    if "NaN" in name:  # no statistics are left then
        operands[0][0, 3, 2, 2] = NAN
    p = plan("64x64_4w4s", 2 if "part" in name else 1)
    wanted = by_two(ODD, operands, p)
    assert same(launch(ODD, operands, p), wanted)
    lines, seen = inspect.getsourcelines, []

    def planted(fn):
        found, first = lines(fn)
        if getattr(fn, "__module__", "").endswith("bn_add_act_conv_stats"):
            seen.extend(line for line in found if text in line)
            found = [line.replace(text, other) for line in found]
        return found, first

    monkeypatch.setattr(inspect, "getsourcelines", planted)
    monkeypatch.setattr(interpreter.InterpretedFunction, "rewritten_fn", {})
    with watch() as launches:
        got = launch(ODD, operands, p)
    assert seen
    once = (launches[0]["out"].stores == 1).all()
    assert not (same(got, wanted) and once)


@pytest.mark.parametrize("name", ["y", "norm", "residual", "residual_norm", "weight"])
def test_nan_and_inf_stay_in_their_places(name):
    operands = operands_of(ODD)
    where = operands[("y", "norm", "residual", "residual_norm", "weight").index(name)]
    if where.dim() == 2:
        where[0, 3], where[1, 7], where[1, 9] = NAN, INF, -INF
    else:
        where[0, 3, 0, 0], where[-1, 7, -1, -1], where[1, 9, 0, 0] = NAN, INF, -INF
    p = plan("64x128_4w4s", 2 if name == "y" else 1)
    got = launch(ODD, operands, p)
    assert same(got, by_two(ODD, operands, p))
    assert any(not t.isfinite().all() for t in got)


def test_within_the_bounds_of_the_two_ops_and_the_same_bits_each_time():
    operands = operands_of(ODD)
    out, z, stats = launch(ODD, operands)
    *end, weight = operands
    oracle = numerics.bn_add_act_oracle(*end)
    bound = numerics.bn_add_act_bound(*end, 0, oracle)
    assert numerics.check_bound(out, oracle, bound).ok
    oracle = numerics.conv_bn_stats_oracle(out, None, weight)
    found = numerics.check_bound(z, oracle, numerics.conv_bn_stats_bound(out, None, weight, oracle))
    assert found.ok, str(found)
    oracle = numerics.stats_oracle(z)
    assert numerics.check_bound(stats, oracle, numerics.stats_bound(z, oracle)).ok
    for _ in range(20 if PROOF else 2):
        assert same(launch(ODD, operands), (out, z, stats))


@pytest.mark.parametrize(
    ("place", "layout"),
    [
        (p, x)
        for i, p in enumerate((0, 2, 4))
        for j, x in enumerate(LAYOUTS)
        if PROOF or (i + j) % 2
    ],
)
def test_operands_in_any_layout(place, layout):
    case = dataclasses.replace(RAGGED, c=64)
    operands = list(operands_of(case))
    operands[place] = LAYOUTS[layout](operands[place])
    assert same(
        launch(case, operands, plan()),
        by_two(case, [nhwc(t) if t.dim() == 4 else t for t in operands], plan()),
    )


@pytest.mark.parametrize("splits", [1, 2])
def test_results_in_any_layout(splits):
    operands, p = operands_of(ODD), plan(splits=splits)
    wanted = by_two(ODD, operands, p)
    out, z, stats = results_of(ODD)
    for given in ((out.contiguous(), z), (out, z.contiguous()), (out.contiguous(), z.contiguous())):
        assert same(launch(ODD, operands, p, (*given, stats)), wanted)


def test_an_empty_batch_launches_nothing(monkeypatch):
    from resnet_fused.triton import bn_add_act_conv_stats as kernel

    monkeypatch.delattr(kernel, "bn_add_act_conv_stats_kernel")
    case = cases.ConvCase("empty", 0, 16, 4, 4, 16)
    _, _, stats = launch(case, operands_of(case))
    assert stats.eq(0).all()


# The op


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("projected", [False, True])
def test_the_op_by_one_kernel(form, projected):
    y, norm, residual, own, weight = operands_of(ODD, projected=projected)
    y, weight = (t.contiguous(memory_format=form) for t in (y, weight))
    with rf.backend("triton"), watch() as launches:
        out, z, stats = rf.ops.bn_add_act_conv_stats(y, norm, residual, weight, own)
    assert {one.name for one in launches} == {KERNELS[0], KERNELS[2]}
    with rf.backend("triton"):
        end = rf.ops.bn_add_act(y, norm, residual, own)
        two = rf.ops.conv_bn_stats(end, weight)
    assert torch.equal(out, end) and out.stride() == end.stride() == y.stride()
    assert z.stride() == two[0].stride()
    torch.testing.assert_close(z, two[0], rtol=2e-3, atol=2e-2)
    torch.testing.assert_close(stats, two[1], rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("case", [RAGGED, dataclasses.replace(ODD, k=40)], ids=str)
def test_sizes_that_spill_go_to_two_kernels(case):
    y, norm, residual, own, weight = operands_of(case)
    with rf.backend("triton"), watch() as launches:
        rf.ops.bn_add_act_conv_stats(y, norm, residual, weight, own)
    names = [one.name for one in launches]
    assert names[0] == "bn_add_act_kernel" and KERNELS[0] not in names


def test_gradients_are_those_of_the_two_ops():
    y, norm, residual, own, weight = (
        t.float().requires_grad_() for t in operands_of(dataclasses.replace(EVEN, c=16, k=16))
    )
    with rf.backend("triton"), watch() as launches:
        out, z, stats = rf.ops.bn_add_act_conv_stats(y, norm, residual, weight, own)
    assert KERNELS[0] not in {one.name for one in launches}
    found = torch.autograd.grad((out.sum(), z.square().sum(), stats.sum()), (y, residual, weight))
    end = rf.ops.bn_add_act(y, norm, residual, own)
    product, moments = rf.ops.conv_bn_stats(end, weight)
    wanted = torch.autograd.grad(
        (end.sum(), product.square().sum(), moments.sum()), (y, residual, weight)
    )
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("word", ["reference", "auto"])
def test_without_triton_it_is_the_two_ops(dtype, word):
    y, norm, residual, own, weight = operands_of(RAGGED, dtype)
    with rf.backend(word):
        got = rf.ops.bn_add_act_conv_stats(y, norm, residual, weight, own)
        end = rf.ops.bn_add_act(y, norm, residual, own)
        two = rf.ops.conv_bn_stats(end, weight)
    assert same(got, (end, *two))
    assert same(
        torch.ops.resnet_fused.bn_add_act_conv_stats.reference(y, norm, residual, own, weight)[:1],
        (end,),
    )


T = torch.zeros
GOOD = {"y": T(2, 8, 4, 4), "norm": T(4, 8), "residual": T(2, 8, 4, 4), "weight": T(16, 8, 1, 1)}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"y": T(8, 4, 4)}, ValueError, "y must have 4 dimensions"),
        ({"y": None}, TypeError, "y must be a Tensor, got NoneType"),
        ({"norm": T(4, 9)}, ValueError, "norm has shape .4, 9."),
        ({"residual": None}, TypeError, "residual must be a Tensor"),
        ({"residual": T(2, 4, 4, 4)}, ValueError, "residual has shape .2, 4, 4, 4.; y's"),
        ({"residual": T(2, 8, 4, 4).half()}, TypeError, "residual has dtype torch.float16"),
        ({"residual_norm": T(4, 8).half()}, TypeError, "residual_norm has dtype"),
        ({"weight": T(16, 8, 3, 3)}, ValueError, "weight has shape .16, 8, 3, 3."),
        ({"weight": T(16, 4, 1, 1)}, ValueError, "x has 8 channels, but weight"),
    ],
)  # fmt: skip
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=f"bn_add_act_conv_stats: {message}"):
        rf.ops.bn_add_act_conv_stats(**{**GOOD, **options})


@pytest.mark.parametrize("dtype", [HALF, torch.float32] if PROOF else [HALF], ids=str)
def test_blocks_in_a_row_by_it_have_the_bits_of_blocks_one_by_one(dtype):
    model, x = row(3 if PROOF else 2).to(dtype), torch.randn(2, 16, 5, 5).to(dtype)
    with _way.preferring("always"):
        check_row(model, x, len(model) - 1, word="triton")
    with _way.preferring("never"), rf.backend("triton"), watch() as launches, torch.no_grad():
        model(x)
    assert KERNELS[0] not in {one.name for one in launches}


# Which sizes


def test_what_is_served_and_chosen():
    h200, small = _tiles.Limits(132, 232448, 90), _tiles.Limits(4, 16 * 1024, 90)
    product = product_of(64 * 3136, 256, 64, 2)
    assert _block_end.choose(product, h200).folded
    assert "multiples of 16" in _block_end.choose(dataclasses.replace(product, depth=200), h200).why
    assert not _block_end.choose(dataclasses.replace(product, rows=0), h200).folded
    assert "none of its configurations" in _block_end.choose(product, small).why
    assert "none of" in _block_end.unfit(product, h200, frozenset({"256x64_8w3s"}))
    # Four columns of tiles read two tensors each: what is saved is lost again.
    many = _block_end.choose(product_of(256 * 49, 2048, 512, 2), h200)
    assert not many.folded and "+102.8 MB asked of the caches" in many.why
    assert many.why.startswith("51.4 MB less through memory")
    # A projection's BatchNorm leaves no registers for the widest tile.
    wide = [
        _tiles.choose(product_of(256 * 196, 1024, 256, 2, projected=p), h200) for p in (False, True)
    ]
    assert [one.tile.name for one in wide] == ["128x256_8w3s", "128x128_8w3s"]
    elsewhere = product_of(256 * 196, 1024, 256, 2, capability=80)
    assert (
        _tiles.choose(elsewhere, dataclasses.replace(h200, capability=80)).tile.name == "64x64_4w4s"
    )
    assert all(tile.m <= 16 * tile.warps for tile in _block_end.TILES)
    gathered = dataclasses.replace(product, columns=256)
    assert {t for t in _tiles.TILES if not _tiles.crowded(gathered, t, h200)} == set(
        _block_end.TILES
    )


# Memory

HUGE = ("y", "residual", "out", "z")
RIGHT = (
    *(f"both {at} {splits} -" for at in ("end", "start") for splits in (1, 2)),
    *(f"wide {which} -" for which in HUGE),
)
FAULTS = (
    *(f"both end 1 {name}=99" for name in ("pixels", "y_w", "residual_w", "out_w", "z_w")),
    *(f"both end 1 {name}=99" for name in ("filters", "channels")),
    *(f"wide {which} WIDE=-1" for which in HUGE),
)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: mmap without reserve")
@pytest.mark.timeout(600)
def test_nothing_beyond_is_touched_and_planted_faults_kill():
    """Between guard pages, and with steps beyond 2^31: what is off ends a child by a signal."""
    child = subprocess.run(
        [sys.executable, str(TESTS / "triton_block_end_guard.py"), *RIGHT, *FAULTS],
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
