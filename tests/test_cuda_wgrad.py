"""conv_bn_wgrad in CUDA as far as it goes without a GPU: arguments, plans, the registry."""

from __future__ import annotations

import pytest
import torch

from resnet_fused import _extension, admission, backends
from resnet_fused.ops import _cuda, _cuda_plan, _cuda_wgrad

OP = _cuda_wgrad.OP
H200 = (132, 232448, 233472, 90)
SAME = ((1, 1), (1, 1), (1, 1), 1)

needs_cuda_build = pytest.mark.skipif(
    not _extension.has_cuda_kernels(), reason="the extension was built without nvcc"
)


def image(*shape: int, dtype: torch.dtype = torch.bfloat16, device: str = "meta") -> torch.Tensor:
    made = torch.zeros(shape, dtype=dtype, device=device)
    return made.contiguous(memory_format=torch.channels_last)


def problem(n: int, c: int, size: int, k: int, taps: int, *, affine: bool = True):
    dz, x = image(n, k, size, size), image(n, c, size, size)
    y = image(n, k, size, size) if affine else None
    rows = torch.zeros(3, k, device="meta") if affine else None
    dweight = torch.zeros(k, c, taps, taps, device="meta")
    geometry = ((1, 1), (taps // 2, taps // 2), (1, 1), 1)
    below = torch.zeros(4, c, device="meta")
    return _cuda_wgrad.problem_of(dz, y, rows, x, below, dweight, geometry, real=False)


@needs_cuda_build
def test_configurations_have_names_of_their_own():
    names = _cuda_plan.configurations(OP)
    assert len(set(names)) == len(names) == 18
    kernel = next(k for k in admission.kernels() if (k.op, k.implementation) == (OP, "cuda"))
    assert kernel.list_configurations() == names


@needs_cuda_build
def test_plans_take_the_wish_and_say_why():
    made = problem(256, 512, 7, 512, 3)
    found = _cuda_plan.plan(made, H200)
    assert found.name == "tma_win64x576_3s" and "least predicted time" in found.why
    for index, name in enumerate(_cuda_plan.configurations(OP)):
        if name.startswith("image_"):  # of few channels
            continue
        asked = _cuda_plan.plan(made, H200, index, 2)
        if name.endswith(("_2d", "_2x")):
            assert asked.configuration == -1 and "blocks that share x read it as it is" in asked.why
            continue
        assert (asked.name, asked.splits) == (name, 2)
    bare = _cuda_plan.plan(problem(256, 512, 7, 512, 3, affine=False), H200)
    assert bare.cycles == found.cycles  # products bound both


@needs_cuda_build
def test_long_filters_are_refused():
    dz, x = image(1, 8, 4, 20), image(1, 8, 20, 20)
    dweight = torch.zeros(8, 8, 17, 1, device="meta")
    made = _cuda_wgrad.problem_of(
        dz, None, None, x, None, dweight, ((1, 1), (0, 0), (1, 1), 1), real=False
    )
    found = _cuda_plan.plan(made, H200)
    assert found.configuration == -1 and f"at most {_cuda_plan.MOST_TAPS} x" in found.why


def arguments(**changes):
    return {
        "dz": image(2, 8, 5, 5, device="cpu"),
        "y": image(2, 8, 5, 5, device="cpu"),
        "coefficients": torch.zeros(3, 8),
        "x": image(2, 16, 5, 5, device="cpu"),
        "norm": torch.zeros(4, 16),
        "stride": [1, 1],
        "padding": [1, 1],
        "dilation": [1, 1],
        "groups": 1,
        "allow_tf32": False,
        "configuration": -1,
        "splits": 0,
        "out": torch.zeros(8, 16, 3, 3),
    } | changes


SHARED = torch.zeros(8 * 16 * 9)
BAD = [
    ({}, f"{OP}_out: expected CUDA tensors"),
    ({"out": image(8, 16, 3, 3, device="cpu")}, f"{OP}_out: expected CUDA tensors"),
    ({"out": torch.zeros(8, 16, 3, 3).half()}, "out: expected dz's dtype bfloat16"),
    ({"norm": torch.zeros(4, 15)}, "norm: expected contiguous float32 [4, 16], got float32 of"),
    ({"coefficients": torch.zeros(8, 3).t()}, "coefficients: expected contiguous float32 [3, 8]"),
    ({"coefficients": None}, "coefficients: expected beside y, got none"),
    ({"y": None}, "y: expected beside coefficients, got none"),
    ({"y": torch.zeros(2, 8, 5, 5)}, "y: expected dz's dtype bfloat16"),
    ({"y": image(2, 8, 5, 4, device="cpu")}, "y: expected dz's shape"),
    ({"x": torch.zeros(2, 16, 5, 5)}, "x: expected dz's dtype bfloat16"),
    ({"dz": image(2, 8, 5, 4, device="cpu")}, "dz: expected the convolution's shape"),
    ({"dz": torch.zeros(2, 8, 5, 5).double()}, "dz: expected bfloat16, float16 or float32"),
    ({"out": torch.zeros(8, 16, 3)}, "out: expected"),
    ({"groups": 3}, "out: expected [K, 16/groups"),
    ({"stride": [0, 1]}, "stride: expected 1 to"),
    (
        {"norm": SHARED[:64].view(4, 16), "out": SHARED.view(8, 16, 3, 3)},
        "out: it shares memory with norm",
    ),
    (
        {"coefficients": SHARED[:24].view(3, 8), "out": SHARED.view(8, 16, 3, 3)},
        "out: it shares memory with coefficients",
    ),
]


@needs_cuda_build
@pytest.mark.parametrize(("changes", "said"), BAD, ids=[said for _, said in BAD])
def test_bad_arguments_are_named(changes, said):
    with pytest.raises(RuntimeError) as caught:
        torch.ops.resnet_fused.conv_bn_wgrad_out(*arguments(**changes).values())
    assert said in str(caught.value)


@needs_cuda_build
def test_each_argument_arrives_under_its_own_name(monkeypatch):
    given = arguments(
        stride=[1, 2], padding=[3, 4], dilation=[5, 6], allow_tf32=True, configuration=2, splits=3
    )
    got: list[object] = []
    monkeypatch.setattr(_cuda_plan, "raw", lambda op, part: lambda *one: got.extend(one))
    monkeypatch.setattr(_cuda_plan, "tf32", lambda: True)
    tensors = [given[name] for name in ("dz", "y", "coefficients", "x", "norm", "out")]
    _cuda_wgrad.launch(*tensors, (1, 2), (3, 4), (5, 6), 1, wish=(2, 3))
    schema = torch._C._get_schema(f"resnet_fused::{OP}_out", "")
    assert [argument.name for argument in schema.arguments] == list(given)
    for name, value in zip(given, got, strict=True):
        same = value is given[name] if isinstance(value, torch.Tensor) else value == given[name]
        assert same, name


def test_operands_are_copied_only_where_that_is_worth_it():
    dz, x, dweight = torch.zeros(2, 8, 5, 5), torch.zeros(2, 16, 5, 5), torch.zeros(8, 16, 3, 3)
    made = _cuda_wgrad.problem_of(dz, dz, torch.zeros(3, 8), x, None, dweight, SAME)
    assert all(t.stride(1) == 1 for t in (made.operands[0], made.operands[1], made.operands[3]))
    assert made.out is dweight
    odd = _cuda_wgrad.problem_of(dz[:, :7], None, None, x[:, :15], None, dweight, SAME)
    assert odd.operands[0].stride(1) == odd.operands[3].stride(1) == 25


def test_it_is_served_once_admitted_or_asked_for(monkeypatch):
    entry = next(e for e in backends.implementations(OP) if e.name == "cuda")
    assert "on cpu" in (entry.supports(backends.Call(OP, "cpu", torch.float32)) or "")
    assert "no CUDA kernel" in (entry.supports(backends.Call(OP, "cuda", torch.float64)) or "")
    monkeypatch.setattr(_cuda._extension, "available", lambda: True)
    monkeypatch.setattr(_cuda._extension, "has_cuda_kernels", lambda: True)
    monkeypatch.setattr(_cuda_plan, "exists", lambda op: False)
    said = entry.supports(backends.Call(OP, "cuda", torch.bfloat16))
    assert said == f"the extension holds no CUDA kernel of {OP}: build it again"
