"""conv_bn_stats in CUDA as far as it goes without a GPU: arguments, plans, the registry."""

from __future__ import annotations

import pytest
import torch

from resnet_fused import _extension, admission, backends
from resnet_fused.ops import _cuda, _cuda_plan, _cuda_stats, _cuda_stats_checks

OP = _cuda_stats.OP
H200 = (132, 232448, 233472, 90)
SAME = ((1, 1), (1, 1), (1, 1), 1)

needs_cuda_build = pytest.mark.skipif(
    not _extension.has_cuda_kernels(), reason="the extension was built without nvcc"
)


def image(*shape: int, dtype: torch.dtype = torch.bfloat16, device: str = "meta") -> torch.Tensor:
    made = torch.zeros(shape, dtype=dtype, device=device)
    return made.contiguous(memory_format=torch.channels_last)


def problem(n: int, c: int, size: int, k: int, taps: int, *, prologue: bool = True):
    x, weight = image(n, c, size, size), image(k, c, taps, taps)
    norm = torch.zeros(4, c, device="meta") if prologue else None
    geometry = ((1, 1), (taps // 2, taps // 2), (1, 1), 1)
    y = image(n, k, size, size)
    return _cuda_stats.problem_of(x, norm, weight, y, geometry, real=False)


@needs_cuda_build
def test_configurations_have_names_of_their_own():
    names = _cuda_plan.configurations(OP)
    assert len(set(names)) == len(names) == 25
    kernel = next(k for k in admission.kernels() if (k.op, k.implementation) == (OP, "cuda"))
    assert kernel.list_configurations() == names


# What the 64 channels and nine taps below are not for.
OF_OTHERS = {
    "tma_win256x64_2w_6s": "windows in slices",
    "tma_win192x64_2w_6s": "windows in slices",
    "tma_stay128x128_8s": "the filters of 4 stay",
    "tma_stay128x128_4s": "the filters of 8 stay",
}


@needs_cuda_build
def test_plans_take_the_wish_and_say_why():
    made = problem(256, 64, 56, 64, 3)
    found = _cuda_plan.plan(made, H200)
    # This build may hold no machine code for sm_90a.
    assert found.name in ("tma_win192x64_2w", "halo_128x64_4w4s")
    assert "least predicted time" in found.why
    bare = problem(256, 64, 56, 64, 3, prologue=False)
    for index, name in enumerate(_cuda_plan.configurations(OP)):
        if name.startswith(("image_", "tma_image")):  # of few channels
            continue
        by_tma = name.startswith(_cuda_plan.TMA)
        asked = _cuda_plan.plan(bare if by_tma else made, H200, index, 1 if by_tma else 2)
        if name in OF_OTHERS:
            assert asked.configuration == -1 and OF_OTHERS[name] in asked.why
            continue
        assert (asked.name, asked.splits) == (name, 1 if by_tma else 2)
        assert by_tma or asked.workspace_bytes > found.workspace_bytes
    # By windows and wgmma products take longer than those who transform.
    assert _cuda_plan.plan(bare, H200).cycles <= found.cycles
    for prologue in (False, True):
        served = _cuda_plan.plan(problem(256, 64, 56, 256, 1, prologue=prologue), H200)
        # This build may hold no machine code for sm_90a.
        assert served.name.startswith(_cuda_plan.TMA) or "no TMA: this build" in served.why
    assert "no TMA: this build" in served.why or "no TMA" not in found.why


@needs_cuda_build
def test_long_filters_are_refused():
    x, weight = image(1, 8, 20, 20), image(8, 8, 17, 1)
    made = _cuda_stats.problem_of(
        x, None, weight, image(1, 8, 4, 20), ((1, 1), (0, 0), (1, 1), 1), real=False
    )
    found = _cuda_plan.plan(made, H200)
    assert found.configuration == -1 and f"at most {_cuda_plan.MOST_TAPS} x" in found.why


def arguments(**changes):
    x, weight = image(2, 16, 5, 5, device="cpu"), image(8, 16, 3, 3, device="cpu")
    return {
        "x": x,
        "norm": torch.zeros(4, 16),
        "weight": weight,
        "stride": [1, 1],
        "padding": [1, 1],
        "dilation": [1, 1],
        "groups": 1,
        "allow_tf32": False,
        "configuration": -1,
        "splits": 0,
        "out": image(2, 8, 5, 5, device="cpu"),
        "stats": torch.zeros(2, 8),
    } | changes


SHARED = torch.zeros(256)[:64]
BFLOAT = torch.as_strided(SHARED.view(torch.bfloat16), (2, 8, 5, 5), (200, 1, 40, 8))
BAD = [
    ({}, "conv_bn_stats_out: expected CUDA tensors"),
    ({"norm": torch.zeros(4, 15)}, "norm: expected contiguous float32 [4, 16], got float32 of"),
    (
        {"norm": torch.zeros(4, 16).double()},
        "norm: expected contiguous float32 [4, 16], got float64",
    ),
    ({"norm": torch.zeros(16, 4).t()}, "norm: expected contiguous float32 [4, 16]"),
    ({"stats": torch.zeros(8, 2)}, "stats: expected contiguous float32 [2, 8]"),
    ({"weight": torch.zeros(8, 16, 3, 3)}, "weight: expected x's dtype bfloat16"),
    ({"out": image(2, 8, 5, 4, device="cpu")}, "out: expected the convolution's shape"),
    ({"groups": 3}, "weight: expected [K, 16/groups"),
    ({"stride": [0, 1]}, "stride: expected 1 to"),
    ({"x": image(2, 16, 5, 5, dtype=torch.float64, device="cpu")}, "x: expected bfloat16"),
    (
        {"norm": SHARED.view(4, 16), "stats": SHARED[:16].view(2, 8)},
        "stats: it shares memory with norm",
    ),
    ({"norm": SHARED.view(4, 16), "out": BFLOAT}, "out: it shares memory with norm"),
]


@needs_cuda_build
@pytest.mark.parametrize(("changes", "said"), BAD, ids=[said for _, said in BAD])
def test_bad_arguments_are_named(changes, said):
    with pytest.raises(RuntimeError) as caught:
        torch.ops.resnet_fused.conv_bn_stats_out(*arguments(**changes).values())
    assert said in str(caught.value)


@needs_cuda_build
def test_each_argument_arrives_under_its_own_name(monkeypatch):
    given = arguments(
        stride=[1, 2], padding=[3, 4], dilation=[5, 6], allow_tf32=True, configuration=2, splits=3
    )
    got: list[object] = []
    monkeypatch.setattr(_cuda_plan, "raw", lambda op, part: lambda *one: got.extend(one))
    monkeypatch.setattr(_cuda_plan, "tf32", lambda: True)
    _cuda_stats.launch(
        given["x"], given["norm"], given["weight"], given["out"], given["stats"],
        (1, 2), (3, 4), (5, 6), 1, wish=(2, 3),
    )  # fmt: skip
    schema = torch._C._get_schema(f"resnet_fused::{OP}_out", "")
    assert [argument.name for argument in schema.arguments] == list(given)
    for name, value in zip(given, got, strict=True):
        same = value is given[name] if isinstance(value, torch.Tensor) else value == given[name]
        assert same, name


def test_operands_are_copied_only_where_that_is_worth_it():
    x, weight = torch.zeros(2, 16, 5, 5), torch.zeros(8, 16, 3, 3)
    y = torch.zeros(2, 8, 5, 5)
    made = _cuda_stats.problem_of(x, None, weight, y, SAME)
    assert all(t.stride(1) == 1 for t in (made.operands[0], made.operands[2]))
    odd = _cuda_stats.problem_of(x[:, :15], None, weight[:, :15], y, SAME)
    assert odd.operands[0].stride(1) == 25  # 15 channels: element by element in any case


def test_a_self_check_is_given_the_extensions_launch_and_plan(monkeypatch):
    """Float32 in TF32 meanwhile, whatever was allowed before."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(_cuda_plan, "gpu", lambda device: (device.type, *H200[1:]))
    monkeypatch.setattr(_cuda_plan, "configurations", lambda op: (op, "other"))
    found = _cuda_plan.Plan(1, "other", 2, 0, 0.0, "")
    asked: list[object] = []
    monkeypatch.setattr(_cuda_plan, "plan", lambda *given: asked.append(given) or found)
    given: list[object] = []

    def check(configuration, device, launch, plan, names):
        assert plan("problem", 1, 2) == 1
        given.extend([configuration, device, launch, names, torch.backends.cudnn.allow_tf32])

    monkeypatch.setattr(_cuda_stats_checks, "check", check)
    _cuda_stats_checks.conv_bn_stats("other", "cuda:0")
    assert given == ["other", "cuda:0", _cuda_stats.launch, (OP, "other"), True]
    assert asked == [("problem", ("cuda", *H200[1:]), 1, 2)]
    assert not torch.backends.cudnn.allow_tf32
    monkeypatch.setattr(_cuda_plan, "configurations", lambda op: ())
    with pytest.raises(ImportError, match="no CUDA kernel of conv_bn_stats"):
        _cuda_stats_checks.conv_bn_stats("other", "cuda:0")


def test_it_is_served_once_admitted_or_asked_for(monkeypatch):
    entry = next(e for e in backends.implementations(OP) if e.name == "cuda")
    assert "on cpu" in (entry.supports(backends.Call(OP, "cpu", torch.float32)) or "")
    assert "no CUDA kernel" in (entry.supports(backends.Call(OP, "cuda", torch.float64)) or "")
    monkeypatch.setattr(_cuda._extension, "available", lambda: True)
    monkeypatch.setattr(_cuda._extension, "has_cuda_kernels", lambda: True)
    monkeypatch.setattr(_cuda_plan, "exists", lambda op: False)
    said = entry.supports(backends.Call(OP, "cuda", torch.bfloat16))
    assert said == f"the extension holds no CUDA kernel of {OP}: build it again"
