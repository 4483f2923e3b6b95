"""conv_bn_stats_finalize in CUDA without a GPU: arguments, plans, the registry."""

from __future__ import annotations

import warnings

import pytest
import torch
from test_cuda_stats import H200, image

from resnet_fused import _extension, admission, backends
from resnet_fused.ops import (
    _admitted,
    _cuda,
    _cuda_finalize,
    _cuda_finalize_checks,
    _cuda_plan,
    _cuda_stats,
    _cuda_stats_checks,
)

OP = _cuda_finalize.OP
SAME = ((1, 1), (1, 1), (1, 1), 1)

needs_cuda_build = pytest.mark.skipif(
    not _cuda_plan.exists(OP), reason="the extension was built without nvcc"
)


@needs_cuda_build
def test_plans_and_configurations_are_those_of_the_convolution():
    names = _cuda_plan.configurations(OP)
    assert names == _cuda_plan.configurations(_cuda_stats.OP) != ()
    kernel = next(k for k in admission.kernels() if (k.op, k.implementation) == (OP, "cuda"))
    assert kernel.list_configurations() == names
    x, weight, y = image(8, 64, 56, 56), image(64, 64, 3, 3), image(8, 64, 56, 56)
    given = (x, torch.zeros(4, 64, device="meta"), weight, y, SAME)
    made = _cuda_finalize.problem_of(*given, real=False)
    alone = _cuda_stats.problem_of(*given, real=False)
    assert made.op == OP and made.operands == alone.operands
    assert _cuda_plan.plan(made, H200) == _cuda_plan.plan(alone, H200)


def arguments(**changes):
    x, weight = image(2, 16, 5, 5, device="cpu"), image(8, 16, 3, 3, device="cpu")
    return {
        "x": x,
        "norm": torch.zeros(4, 16),
        "weight": weight,
        "gamma": torch.ones(8),
        "beta": torch.zeros(8),
        "eps": 1e-5,
        "running_mean": torch.zeros(8),
        "running_var": torch.ones(8),
        "tracked": torch.tensor(3),
        "factor": 0.1,
        "stride": [1, 1],
        "padding": [1, 1],
        "dilation": [1, 1],
        "groups": 1,
        "allow_tf32": False,
        "configuration": -1,
        "splits": 0,
        "out": image(2, 8, 5, 5, device="cpu"),
        "stats": torch.zeros(2, 8),
        "rows": torch.zeros(4, 8),
        "kept": torch.zeros(2, 8, dtype=torch.float64),
    } | changes


SHARED = torch.zeros(32)
BAD = [
    ({}, f"{OP}_out: expected CUDA tensors"),
    ({"norm": torch.zeros(4, 15)}, "norm: expected contiguous float32 [4, 16]"),
    ({"stats": torch.zeros(8, 2)}, "stats: expected contiguous float32 [2, 8]"),
    ({"rows": torch.zeros(2, 8)}, "rows: expected contiguous float32 [4, 8]"),
    ({"gamma": torch.zeros(7)}, "gamma: expected shape [8]"),
    ({"gamma": torch.zeros(8).half()}, "gamma: expected float32 or float64"),
    ({"beta": torch.zeros(16)[::2]}, "beta: expected a contiguous tensor"),
    ({"running_mean": torch.zeros(9)}, "running_mean: expected shape [8]"),
    ({"running_var": None}, "running_var: expected together with running_mean"),
    ({"running_mean": None, "running_var": None}, "tracked: expected None where running_mean is"),
    ({"factor": None, "tracked": None}, "factor: expected a number where there is no `tracked`"),
    ({"tracked": torch.tensor(3.0)}, "tracked: expected int64 or int32"),
    ({"tracked": torch.tensor([1, 2])}, "tracked: expected one number"),
    ({"kept": torch.zeros(2, 8)}, "kept: expected float64, got float32"),
    ({"kept": torch.zeros(0, 8, dtype=torch.float64)}, "kept: expected shape [2, 8]"),
    ({"weight": torch.zeros(8, 16, 3, 3)}, "weight: expected x's dtype bfloat16"),
    ({"stride": [0, 1]}, "stride: expected 1 to"),
    ({"rows": SHARED.view(4, 8), "beta": SHARED[:8]}, "rows: it shares memory with beta"),
    (
        {"running_mean": SHARED[:8], "running_var": SHARED[:8]},
        "running_mean: it shares memory with running_var",
    ),
    (
        {"running_var": SHARED[:8], "gamma": SHARED[:8]},
        "running_var: it shares memory with gamma",
    ),
    (
        {"x": image(0, 16, 5, 5, device="cpu"), "out": image(0, 8, 5, 5, device="cpu")},
        "out: expected elements",
    ),
]


@needs_cuda_build
@pytest.mark.parametrize(("changes", "said"), BAD, ids=[said for _, said in BAD])
def test_bad_arguments_are_named(changes, said):
    with pytest.raises(RuntimeError) as caught:
        torch.ops.resnet_fused.conv_bn_stats_finalize_out(*arguments(**changes).values())
    assert said in str(caught.value)


def launched(given, monkeypatch, options=((1, 2), (3, 4), (5, 6), 1), momentum=0.1, **how):
    """What the raw op is given."""
    got: list[object] = []
    monkeypatch.setattr(_cuda_plan, "raw", lambda op, part: lambda *one: got.extend(one))
    monkeypatch.setattr(_cuda_plan, "tf32", lambda: True)
    vectors = ("gamma", "beta", "running_mean", "running_var", "tracked")
    results = ("out", "stats", "rows", "kept")
    _cuda_finalize.launch(
        given["x"], given["norm"], given["weight"], *(given[name] for name in vectors),
        *(given[name] for name in results), *options, 1e-5, momentum, **how,
    )  # fmt: skip
    return got


def test_each_argument_arrives_under_its_own_name(monkeypatch):
    given = arguments(
        stride=[1, 2], padding=[3, 4], dilation=[5, 6], allow_tf32=True, configuration=2, splits=3
    )
    got = launched(given, monkeypatch, wish=(2, 3))
    if _cuda_plan.exists(OP):
        schema = torch._C._get_schema(f"resnet_fused::{OP}_out", "")
        assert [argument.name for argument in schema.arguments] == list(given)
    for name, value in zip(given, got, strict=True):
        same = value is given[name] if isinstance(value, torch.Tensor) else value == given[name]
        assert same, name


def test_vectors_of_other_dtypes_are_copied_and_brought_back(monkeypatch):
    given = arguments(
        gamma=torch.ones(8).half(), running_mean=torch.zeros(8).bfloat16(),
        tracked=torch.tensor(3, dtype=torch.int16),
    )  # fmt: skip

    def raw(op, part):
        def run(*one):
            by_name = dict(zip(given, one, strict=True))
            assert by_name["gamma"].dtype is by_name["running_mean"].dtype is torch.float64
            assert by_name["factor"] is None
            by_name["running_mean"] += 2
            by_name["tracked"] += 1

        return run

    vectors = ("gamma", "beta", "running_mean", "running_var", "tracked")
    results = ("out", "stats", "rows", "kept")
    monkeypatch.setattr(_cuda_plan, "raw", raw)
    _cuda_finalize.launch(
        given["x"], given["norm"], given["weight"], *(given[name] for name in vectors),
        *(given[name] for name in results), *SAME, 1e-5, None, wish=(2, 1),
    )  # fmt: skip
    assert torch.equal(given["running_mean"], torch.full((8,), 2.0).bfloat16())
    assert int(given["tracked"]) == 4


def test_what_has_no_plan_is_plain_pytorch_with_a_warning(monkeypatch):
    why = "filters of at most 15 x 15 taps"
    monkeypatch.setattr(_cuda_plan, "plan", lambda *given: _cuda_plan.Plan(-1, "", 0, 0, 0.0, why))
    monkeypatch.setattr(_cuda_plan, "gpu", lambda device: H200)
    x, weight = torch.randn(2, 3, 20, 20), torch.randn(4, 3, 17, 1)
    given = arguments(
        x=x, weight=weight, norm=None, gamma=None, beta=None, running_mean=torch.zeros(4),
        running_var=torch.ones(4), out=torch.zeros(2, 4, 4, 20), stats=torch.zeros(2, 4),
        rows=torch.zeros(4, 4), kept=torch.zeros(2, 4).double(),
    )  # fmt: skip
    with pytest.warns(UserWarning, match=f"{OP}.cuda: {why}; plain PyTorch computes it"):
        assert launched(given, monkeypatch, ((1, 1), (0, 0), (1, 1), 1)) == []
    y = torch.conv2d(x, weight)
    torch.testing.assert_close(given["out"], y)
    torch.testing.assert_close(given["rows"][2], y.mean((0, 2, 3)))
    torch.testing.assert_close(given["running_mean"], 0.1 * y.mean((0, 2, 3)))
    assert int(given["tracked"]) == 4 and given["kept"][1].eq(1).all()


def test_no_elements_need_no_plan(monkeypatch):
    given = arguments(x=image(0, 16, 5, 5, device="cpu"), out=image(0, 8, 5, 5, device="cpu"))
    given["stats"].fill_(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert launched(given, monkeypatch, SAME) == []
    assert not given["stats"].any() and int(given["tracked"]) == 4
    assert not given["running_mean"].any()


def test_what_was_tuned_for_the_convolution_counts(monkeypatch):
    made = _cuda_finalize.problem_of(
        image(2, 16, 5, 5), None, image(8, 16, 3, 3), image(2, 8, 5, 5), SAME, real=False
    )
    found = _cuda_plan.Plan(5, "halo", 2, 0, 0.0, "tuned")
    monkeypatch.setattr(
        _cuda_plan, "tuned", lambda one, device: found if one.op == _cuda_stats.OP else None
    )
    monkeypatch.setattr(_cuda_plan, "wanted", lambda one: (one.op, 0))
    for names, wanted in ((None, (5, 2)), ({"halo"}, (5, 2)), ({"other"}, (OP, 0))):
        monkeypatch.setattr(_admitted, "names", lambda op, by, device, names=names: names)
        assert _cuda_finalize._wanted(made) == wanted


def test_a_self_check_is_given_the_extensions_launch_and_plan(monkeypatch):
    monkeypatch.setattr(_cuda_plan, "gpu", lambda device: (device.type, *H200[1:]))
    monkeypatch.setattr(_cuda_plan, "configurations", lambda op: (op, "other"))
    given: list[object] = []

    def check(configuration, device, launch, plan, names):
        given.extend([configuration, device, names])

    monkeypatch.setattr(_cuda_stats_checks, "check", check)
    _cuda_finalize_checks.conv_bn_stats_finalize("other", "cuda:0")
    assert given == ["other", "cuda:0", (OP, "other")]
    monkeypatch.setattr(_cuda_plan, "configurations", lambda op: ())
    with pytest.raises(ImportError, match=f"no CUDA kernel of {OP}"):
        _cuda_finalize_checks.conv_bn_stats_finalize("other", "cuda:0")


def test_it_is_served_once_admitted_or_asked_for(monkeypatch):
    entry = next(e for e in backends.implementations(OP) if e.name == "cuda")
    assert "on cpu" in (entry.supports(backends.Call(OP, "cpu", torch.float32)) or "")
    assert "no CUDA kernel" in (entry.supports(backends.Call(OP, "cuda", torch.float64)) or "")
    monkeypatch.setattr(_extension, "available", lambda: True)
    monkeypatch.setattr(_extension, "has_cuda_kernels", lambda: True)
    monkeypatch.setattr(_cuda._cuda_plan, "exists", lambda op: False)
    said = entry.supports(backends.Call(OP, "cuda", torch.bfloat16))
    assert said == f"the extension holds no CUDA kernel of {OP}: build it again"
