"""Training's CUDA passes as implementations of their ops: reasons, places, operands."""

from __future__ import annotations

import pytest
import torch
from matrix import norm_values

from resnet_fused import _extension, admission, backends, ops  # noqa: F401
from resnet_fused.ops import _cuda_passes
from resnet_fused.ops._library import overload

OPS = (
    "bn_finalize", "bn_update_stats", "bn_add_act", "bn_add_act_backward", "bn_backward_finalize",
    "bn_backward_apply", "bn_act_pool", "bn_act_pool_backward",
)  # fmt: skip
GPU = ("cuda", torch.bfloat16)


def reason(op="bn_add_act", device="cuda", dtype=torch.bfloat16):
    return _cuda_passes.supports(backends.Call(op, device, dtype))


def test_why_a_pass_does_not_serve(monkeypatch):
    assert reason(device="cpu") == "x is on cpu"
    assert reason(dtype=torch.float64) == "no CUDA kernel for torch.float64"
    monkeypatch.setattr(_extension, "available", lambda: False)
    monkeypatch.setattr(_extension, "why_not", lambda: "it was not built")
    assert reason() == "the compiled extension is missing: it was not built"
    assert not _cuda_passes.exists("bn_add_act")
    monkeypatch.setattr(_extension, "available", lambda: True)
    monkeypatch.setattr(_extension, "has_cuda_kernels", lambda: False)
    assert reason() == "the extension was built without nvcc"
    monkeypatch.setattr(_extension, "has_cuda_kernels", lambda: True)
    monkeypatch.setattr(_cuda_passes, "exists", lambda op: False)
    assert reason() == "the extension holds no CUDA kernel of bn_add_act: build it again"
    monkeypatch.setattr(_cuda_passes, "exists", lambda op: True)
    monkeypatch.setattr(admission, "refusal", lambda call, name: f"{name} is not admitted")
    assert reason() == "cuda is not admitted"


@pytest.mark.parametrize("op", OPS)
def test_triton_comes_first_and_every_kernel_is_to_be_admitted(op):
    names = [entry.name for entry in backends.implementations(op)]
    assert names[:3] == ["triton", "cuda", "cpu"]
    kernel = next(k for k in admission.kernels() if (k.op, k.implementation) == (op, "cuda"))
    assert f"csrc/kernels/{op}_sm80.cuh" in kernel.sources
    assert kernel.check == f"resnet_fused.ops._cuda_training_checks:{op}"


@pytest.mark.skipif(not _extension.available(), reason="the extension is not built")
def test_an_extension_of_the_cpu_alone_holds_no_kernel():
    assert not _cuda_passes.exists("bn_stats")
    assert _cuda_passes.exists("bn_add_act") == _extension.has_cuda_kernels()


def arguments(op):
    """In the order of the op's schema; every optional operand is there."""
    y, r, g = (torch.randn(2, 5, 6, 4) for _ in range(3))
    norm, other = norm_values(5, torch.float32), norm_values(5, torch.float32)
    total, window = torch.tensor([50.0], dtype=torch.float64), ([3, 3], [2, 2], [1, 1])
    stats, sums = torch.rand(2, 5), torch.randn(3, 5)
    if op == "bn_act_pool_backward":
        out, taps = overload("bn_act_pool", "reference")(y, norm, *window)
        return torch.randn_like(out), taps, y, norm, *window
    return {
        "bn_finalize": (stats, total, torch.rand(5), torch.rand(5).bfloat16(), 48, 1e-5),
        "bn_add_act": (y, norm, r, other, 0, "relu"),
        "bn_add_act_backward": (g, r, y, norm, r, other, "relu"),
        "bn_backward_finalize": (sums, sums + 1, total, norm, 48, 2, False),
        "bn_backward_apply": (g, y, norm[:3].clone()),
        "bn_act_pool": (y, norm, *window),
    }[op]


@pytest.mark.skipif(not _extension.available(), reason="the extension is not built")
@pytest.mark.parametrize("op", [op for op in OPS if op != "bn_update_stats"])
def test_an_overload_hands_on_what_it_was_given(op):
    """The raw op is the CPU's too: on the CPU's tensors both overloads give its bits."""
    given = arguments(op)
    mine, theirs = (overload(op, name)(*given) for name in ("cuda", "cpu"))
    pairs = zip(*(t if isinstance(t, tuple) else (t,) for t in (mine, theirs)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.skipif(not _extension.available(), reason="the extension is not built")
def test_a_batch_is_counted_by_the_kernel_of_a_gpu_alone():
    raw = torch.ops.resnet_fused.bn_update_stats_out
    stats, mean, var = torch.rand(2, 5), torch.zeros(5), torch.ones(5)
    with pytest.raises(RuntimeError, match="tracked: counted on a GPU alone"):
        raw(stats, None, mean, var, 9, None, torch.tensor(1))
    with pytest.raises(RuntimeError, match="factor: expected a number"):
        raw(stats, None, mean, var, 9, None)
