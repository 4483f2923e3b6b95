"""Training's passes in the emulator: plans, bits, schedules, traffic, far operands, self-checks.

The op matrix holds them to their bounds with all implementations, and `test_mutations.py` plants
faults in them.
"""

from __future__ import annotations

import contextlib
import itertools
import sys

import emulated
import emulated_finalize
import emulated_training
import mutants_training
import pytest
import torch
from guarded_memory import FAR, unmapped_around
from matrix import lay_out, norm_values
from test_triton_training import end_of_block

from resnet_fused import cases, numerics, roofline
from resnet_fused.ops import _cuda_training_checks, _results, _training_checks_elementwise
from resnet_fused.ops._library import overload

pytestmark = pytest.mark.emulated

OPS = tuple(emulated_training.OPERANDS)
SUMMING = 256
"""Blocks that share the pixels of a pass with sums, all groups together."""


def plan_of(op, shape, dtype=torch.bfloat16, layout="nhwc", *, rows=2, held=None):
    """The plan for operands of one layout; nothing is read."""
    if layout == "nhwc":  # no copy: some are large, and not touched
        like = torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)
    else:
        like = lay_out(torch.empty(shape, dtype=dtype), layout)
    given = dict.fromkeys(emulated_training.OPERANDS[op], like)
    if rows == 2 and op == "bn_add_act_backward":
        given["residual"] = None
    if held is not None:
        given["residual"] = like[:, :held]
    values = torch.empty(4, shape[1])
    given |= {"norm": values, "residual_norm": None, "coefficients": values}
    results = {"result": like}
    if op in emulated_training.SUMMED:
        results["sums"] = torch.empty(rows, shape[1])
    if "pool" in op:
        p, q = ((size - 1) // 2 + 1 for size in shape[2:])
        bytes_as = "nchw" if layout == "nchw" else "nhwc"
        taps = lay_out(torch.empty(shape, dtype=torch.uint8), bytes_as)[:, :, :p, :q]
        pooled = like[:, :, :p, :q]
        given |= {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1), "taps": taps}
        results |= {"taps": taps} if op == "bn_act_pool" else {}
        if op == "bn_act_pool":
            results["result"] = pooled
        else:
            given["dout"] = pooled
    return emulated.load().bn_pass_plan(emulated_training.problem_of(op, given, results))


@pytest.mark.parametrize("op", OPS)
def test_a_plan_takes_16_bytes_of_channels_where_it_can(op):
    wide = {
        ("nhwc", 64): True, ("nhwc", 60): False, ("nchw", 64): False, ("sliced", 64): False,
        ("unaligned", 64): False,
    }  # fmt: skip
    for (layout, channels), expected in wide.items():
        plan = plan_of(op, (2, channels, 6, 8), layout=layout)
        assert plan["wide"] == expected, (layout, channels)
        assert plan["dense"] == (layout in ("nhwc", "unaligned") and "pool" not in op)
        assert plan["columns"] * plan["rows"] == 256
    assert plan_of(op, (2, 60, 6, 8), torch.float32)["wide"]
    assert plan_of(op, (2, 64, 6, 8), layout="nchw")["columns"] == 1
    assert plan_of(op, (0, 64, 6, 8))["parts"] == 0


def test_a_plan_cuts_pixels_by_shape_alone():
    stage = plan_of("bn_add_act_backward", (256, 256, 56, 56))
    assert (stage["columns"], stage["groups"], stage["parts"]) == (32, 1, SUMMING)
    deep = plan_of("bn_add_act_backward", (256, 2048, 7, 7), rows=3)
    assert (deep["groups"], deep["parts"], deep["ahead"]) == (8, SUMMING // 8, 2)
    plain = plan_of("bn_backward_apply", (256, 256, 56, 56))
    assert plain["parts"] == 256 * 56 * 56 // (8 * plain["ahead"])
    assert plain["workspace_bytes"] == 0
    assert plan_of("bn_add_act", (2, 64, 4, 4), held=32)["wide"]
    assert not plan_of("bn_add_act", (2, 64, 4, 4), held=36)["wide"]


def test_what_the_kernels_do_not_take_is_refused():
    shape = (2, 8, 3, 3)
    with pytest.raises(ValueError, match="float64; the kernels compute in float32"):
        plan_of("bn_backward_apply", shape, torch.float64)
    like = torch.empty(shape)
    given = {"dout": like, "out": None, "y": like, "residual": like, "norm": torch.empty(4, 8)}
    results = {"result": like, "sums": torch.empty(3, 8)}
    problem = emulated_training.problem_of("bn_add_act_backward", given, results)
    with pytest.raises(ValueError, match="a projection without the result"):
        emulated.load().bn_pass_plan(problem)


def bits(results):
    found = results if isinstance(results, tuple) else (results,)
    return [t.clone() for t in found]


@pytest.mark.parametrize("layout", ["nhwc", "nchw", "sliced", "wide"])
def test_sums_have_the_same_bits_in_every_order(layout):
    given = mutants_training.operands("bn_add_act_backward", layout, torch.float16)
    noise = torch.Generator().manual_seed(1)
    for name in ("dout", "y", "residual"):
        given[name].copy_(torch.randn(given[name].shape, generator=noise))
    seen = []
    for schedule, resident in itertools.product(emulated.SCHEDULES[::2], (1, 3, 64)):
        with emulated.using(schedule=schedule, resident_blocks=resident) as run:
            got = overload("bn_add_act_backward", emulated.NAME)(*given.values())
        seen.append(bits(got))
        plan = run.reports[-1]["plan"]
        assert plan["parts"] >= 2
        assert run.reports[-1]["blocks"] == plan["parts"] * plan["groups"]
    for other in seen[1:]:
        assert all(map(torch.equal, seen[0], other))


@pytest.mark.parametrize("dtype", emulated_training.DTYPES, ids=str)
@pytest.mark.parametrize("case", [c for c in cases.BN_ACT_CASES if c.n], ids=str)
def test_forward_and_the_affine_have_one_arithmetic(case, dtype):
    y, r = (lay_out(torch.randn(case.shape).to(dtype), case.layout) for _ in range(2))
    norm, other = norm_values(case.c, dtype), norm_values(case.c, dtype)
    held = max(1, case.c // 3)
    for given in (
        (y, norm, None, None, 0),
        (y, norm, r, None, 0),
        (y, norm, r, other, 0),
        (y, norm, lay_out(r[:, :held].clone(), case.layout), None, case.c - held),
    ):
        got = overload("bn_add_act", emulated.NAME)(*given, case.act)
        assert torch.equal(got, end_of_block(*given, case.act))
    got = overload("bn_backward_apply", emulated.NAME)(y, r, norm[:3].clone())
    assert torch.equal(got, overload("bn_backward_apply", "reference")(y, r, norm[:3].clone()))


def traffic(op, given, result, dtype):
    """Bytes of the call by the roofline."""
    shape = tuple(result.shape)
    projected = given.get("residual_norm") is not None
    if op == "bn_backward_apply":
        return roofline.training.bn_backward_apply_cost(shape, dtype).bytes
    if op == "bn_act_pool":
        y = tuple(given["y"].shape)
        return roofline.training.bn_act_pool_cost(y, shape, dtype).bytes
    if op == "bn_act_pool_backward":
        pooled = tuple(given["dout"].shape)
        return roofline.training.bn_act_pool_backward_cost(shape, pooled, dtype).bytes
    if op == "bn_add_act":
        held = 0 if given["residual"] is None else given["residual"].numel()
        cost = roofline.training.bn_add_act_cost
        return cost(shape, dtype, residual=held, projected=projected).bytes
    out = given["out"] is not None
    cost = roofline.training.bn_add_act_backward_cost
    return cost(shape, dtype, out=out, projected=projected).bytes


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_every_byte_is_moved_once(op, plain):
    """Asked of memory, and in whole sectors; what blocks leave for each other is its size more."""
    given = mutants_training.operands(op, "nhwc", torch.bfloat16, plain=plain)
    with emulated.using(counting=True) as run:
        result = bits(overload(op, emulated.NAME)(*given.values()))[0]
    report = run.reports[-1]
    tensors, counters = report["tensors"], report["counters"]
    own = {name: one for name, one in tensors.items() if name != "workspace"}
    moved = sum(one["unique_bytes_read"] + one["unique_bytes_written"] for one in own.values())
    least = traffic(op, given, result, torch.bfloat16)
    assert least * 0.9 <= moved <= least * 1.1
    if "pool" in op:
        return  # what windows share is asked for again: the caches have it
    activations = sum(
        t.nbytes for t in (*given.values(), result) if isinstance(t, torch.Tensor) and t.dim() == 4
    )
    sectors = 32 * (counters["global_load_sectors"] + counters["global_store_sectors"])
    values = 256 * 3 * 4 * report["blocks"] * (1 + 2 * (op == "bn_add_act_backward"))
    assert activations <= sectors <= activations + 4 * values


def test_results_may_take_the_place_of_gradients():
    given = mutants_training.operands("bn_add_act_backward", "nhwc", torch.bfloat16)
    expected, wanted = mutants_training.expected("bn_add_act_backward", given, torch.bfloat16)
    sums = torch.empty(3, 24)
    place = given["dout"]
    results = {"result": place, "sums": sums}
    problem = emulated_training.problem_of("bn_add_act_backward", given, results)
    workspace = torch.empty(emulated.load().bn_pass_plan(problem)["workspace_bytes"] // 4 + 64)
    with emulated.using(resident_blocks=64):
        inputs = {name: t for name, t in given.items() if isinstance(t, torch.Tensor)}
        del inputs["dout"]
        outputs = {"dout": place, "sums": sums, "workspace": workspace}
        settings = emulated.settings(("in place",), inputs, outputs)
    first = workspace[-workspace.data_ptr() % 16 // 4 :]
    emulated.load().bn_pass(settings, "bn_add_act_backward", problem, first.data_ptr())
    assert torch.equal(place, expected)
    assert torch.equal(sums, wanted)


@pytest.mark.parametrize("op", OPS)
def test_self_checks_pass_and_notice(op):
    """The check that admits a kernel on a GPU, on the emulated one; and with a store that skips."""

    def launch(name):
        def run(*arguments):
            form = emulated_training.results_of(name, arguments)
            got = bits(overload(name, emulated.NAME)(*form.arguments))
            for to, made in zip(form.results, got, strict=True):
                to.copy_(made)

        return run

    check = getattr(_training_checks_elementwise, op)
    with _training_checks_elementwise.launching(launch):
        with emulated.using() as run:
            check("default", "cpu")
        assert len(run.reports) > len(_training_checks_elementwise.CASES)
        site = next(one for one in run.reports[0]["sites"] if one["instruction"] == "st.global")
        fault = (site["file"], site["line"], "st.global", "skip")
        with emulated.using(fault=fault), pytest.raises((ArithmeticError, AssertionError)):
            check("default", "cpu")
    with pytest.raises(ImportError, match="holds no CUDA kernel"), without_kernels():
        getattr(_cuda_training_checks, op)("default", "cpu")


@contextlib.contextmanager
def without_kernels():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_cuda_training_checks._cuda_passes, "exists", lambda op: False)
        yield


@pytest.mark.parametrize("op", emulated_finalize.BODIES)
def test_self_checks_of_values_pass_and_notice(op):
    body = emulated_finalize.BODIES[op]

    def launch(name):
        def run(*arguments):
            if op == "bn_update_stats":
                return body(*arguments)
            count = len(_results.FORMS[op].operands)
            results = {"bn_finalize": 1, "bn_backward_finalize": 3}[op]
            got = bits(body(*arguments[:count], *arguments[count + results :]))
            for to, made in zip(arguments[count : count + results], got, strict=True):
                to.copy_(made)

        return run

    check = getattr(_training_checks_elementwise, op)
    with _training_checks_elementwise.launching(launch):
        with emulated.using() as run:
            check("default", "cpu")
        site = next(one for one in run.reports[0]["sites"] if one["instruction"] == "st.global")
        fault = (site["file"], site["line"], "st.global", "skip")
        with emulated.using(fault=fault), pytest.raises((ArithmeticError, AssertionError)):
            check("default", "cpu")
    with pytest.raises(ImportError, match="holds no CUDA kernel"), without_kernels():
        getattr(_cuda_training_checks, op)("default", "cpu")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_are_counted_where_they_are(dtype, momentum):
    stats, count = torch.rand(2, 700), 9
    results = []
    for name in (emulated.NAME, "reference"):
        mean, var = torch.arange(700) / 7, torch.ones(700).bfloat16()
        tracked = torch.tensor(4, dtype=dtype)
        overload("bn_update_stats", name)(stats, None, mean, var, tracked, count, momentum)
        results.append((mean, var, tracked))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2**-7 if mine.dtype == var.dtype else 2e-7,
                                   atol=0)  # fmt: skip
    assert results[0][2] == 5


def far_apart(t, dim, beyond=2**31):
    """A copy whose last element along a dimension lies `beyond` elements away."""
    strides = list(t.contiguous(memory_format=torch.channels_last).stride())
    strides[dim] = -(-beyond // (t.shape[dim] - 1) // 64) * 64 + 64
    span = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, strides, strict=True))
    return unmapped_around(span, t.dtype, "start", FAR).as_strided(t.shape, strides).copy_(t)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: mmap without reserve")
@pytest.mark.parametrize("dim", range(4))
@pytest.mark.parametrize("op", OPS)
def test_operands_beyond_32_bits(op, dim):
    given = mutants_training.operands(op, "nhwc", torch.float16)
    expected = mutants_training.expected(op, given, torch.float16)
    for name, t in given.items():
        if isinstance(t, torch.Tensor) and t.dim() == 4:
            far = given | {name: far_apart(t, dim)}
            got = bits(emulated_training.run(op, *far.values(), dense=True))
            assert all(map(torch.equal, got, expected)), name


def test_infinite_gradients_and_results_stay_where_they_are():
    given = mutants_training.operands("bn_add_act_backward", "nhwc", torch.float16)
    given["dout"][0, 3, 0, 0] = float("inf")
    given["out"][0, 3, 0, 0] = float("nan")
    given["out"][0, 4, 0, 0] = float("-inf")
    dz, sums = overload("bn_add_act_backward", emulated.NAME)(*given.values())
    assert dz[0, 3, 0, 0] == float("inf")
    assert dz[0, 4, 0, 0] == 0
    assert sums[0, 3] == float("inf")
    assert bool(sums[0, [*range(3), *range(4, 24)]].isfinite().all())
    oracle = numerics.reductions_oracle(dz, (given["y"], given["norm"]))
    assert torch.equal(sums[0].isfinite(), oracle[0].isfinite())
