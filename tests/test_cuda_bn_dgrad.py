"""conv_bn_dgrad in CUDA as far as it goes without a GPU: arguments, plans, the registry."""

from __future__ import annotations

import pytest
import torch

from resnet_fused import _extension, admission, backends
from resnet_fused.ops import _cuda, _cuda_bn_dgrad, _cuda_plan
from resnet_fused.ops._library import overload

OP = _cuda_bn_dgrad.OP
H200 = (132, 232448, 233472, 90)
SAME = ((1, 1), (1, 1), (1, 1), 1)

needs_cuda_build = pytest.mark.skipif(
    not _extension.has_cuda_kernels(), reason="the extension was built without nvcc"
)


def image(*shape: int, dtype: torch.dtype = torch.bfloat16, device: str = "meta") -> torch.Tensor:
    made = torch.zeros(shape, dtype=dtype, device=device)
    return made.contiguous(memory_format=torch.channels_last)


def problem(n: int, c: int, size: int, k: int, taps: int, *, plain: bool = False):
    dz, weight = image(n, k, size, size), image(k, c, taps, taps)
    more: list[torch.Tensor | None] = [None] * 5
    if not plain:
        more = [
            image(n, k, size, size), torch.zeros(3, k, device="meta"), image(n, c, size, size),
            image(n, c, size, size), torch.zeros(4, c, device="meta"),
        ]  # fmt: skip
    y, rows, addend, raw, norm = more
    geometry = ((1, 1), (taps // 2, taps // 2), (1, 1), 1)
    given = (dz, y, rows, weight, addend, raw, norm)
    return _cuda_bn_dgrad.problem_of(given, image(n, c, size, size), 1, geometry, real=False)


@needs_cuda_build
def test_configurations_have_names_of_their_own():
    names = _cuda_plan.configurations(OP)
    assert len(set(names)) == len(names) == 16
    kernel = next(k for k in admission.kernels() if (k.op, k.implementation) == (OP, "cuda"))
    assert kernel.list_configurations() == names


# What the 64 channels and rows of 56 pixels below are not for. Two staging tiles and rows so long
# leave no room for windows of 192 positions.
OF_OTHERS = {
    "tma_win192x64_2w": "addend and raw",
    "tma_win256x64_2w_6s": "windows in slices",
    "tma_win192x64_2w_6s": "windows in slices",
}


@needs_cuda_build
def test_plans_take_the_wish_and_say_why():
    made = problem(256, 64, 56, 64, 3)
    found = _cuda_plan.plan(made, H200)
    assert found.name == "tma_win96x64_2w" and "least predicted time" in found.why
    for index, name in enumerate(_cuda_plan.configurations(OP)):
        asked = _cuda_plan.plan(made, H200, index, 2)
        if name.startswith("tma_"):
            fault = OF_OTHERS.get(name, "splits: only 1 is served by TMA")
            assert asked.configuration == -1 and fault in asked.why
            continue
        assert (asked.name, asked.splits) == (name, 2)
        assert asked.workspace_bytes > found.workspace_bytes
    # A plan reads no memory: what is on no device counts all the same.
    assert _cuda_plan.plan(problem(256, 64, 56, 64, 3, plain=True), H200).cycles < found.cycles


@needs_cuda_build
def test_long_filters_are_refused():
    dz, weight, dx = image(1, 8, 4, 20), image(8, 8, 17, 1), image(1, 8, 20, 20)
    given = (dz, None, None, weight, None, None, None)
    made = _cuda_bn_dgrad.problem_of(given, dx, 1, ((1, 1), (0, 0), (1, 1), 1), real=False)
    found = _cuda_plan.plan(made, H200)
    assert found.configuration == -1 and f"at most {_cuda_plan.MOST_TAPS} x" in found.why


def arguments(**changes):
    def pixels(*shape, **how):
        return image(*shape, device="cpu", **how)

    return {
        "dz": pixels(2, 8, 3, 3),
        "y": pixels(2, 8, 3, 3),
        "coefficients": torch.zeros(3, 8),
        "weight": pixels(8, 16, 3, 3),
        "addend": pixels(2, 16, 3, 3),
        "raw": pixels(2, 16, 5, 5),
        "norm": torch.zeros(4, 16),
        "addend_stride": 2,
        "stride": [2, 2],
        "padding": [1, 1],
        "dilation": [1, 1],
        "groups": 1,
        "allow_tf32": False,
        "configuration": -1,
        "splits": 0,
        "out": pixels(2, 16, 5, 5),
        "sums": torch.zeros(2, 16),
    } | changes


SHARED = torch.zeros(1024)
BFLOAT = torch.as_strided(SHARED.view(torch.bfloat16), (2, 16, 5, 5), (400, 1, 80, 16))
BAD = [
    ({}, "conv_bn_dgrad_out: expected CUDA tensors"),
    ({"y": None}, "y: expected with coefficients, or neither of them"),
    ({"norm": None}, "raw: expected with norm, or neither of them"),
    ({"coefficients": torch.zeros(4, 8)}, "coefficients: expected contiguous float32 [3, 8]"),
    (
        {"norm": torch.zeros(4, 16).double()},
        "norm: expected contiguous float32 [4, 16], got float6",
    ),
    ({"sums": torch.zeros(16, 2)}, "sums: expected contiguous float32 [2, 16]"),
    ({"raw": None, "norm": None}, "sums: expected contiguous float32 [0, 16]"),
    ({"y": image(2, 8, 3, 4, device="cpu")}, "y: expected dz's shape [2, 8, 3, 3]"),
    ({"dz": image(2, 8, 3, 4, device="cpu")}, "dz: expected the convolution's shape [2, 8, 3, 3]"),
    ({"addend": image(2, 16, 5, 5, device="cpu")}, "addend: expected every addend_stride-th pixel"),
    ({"addend_stride": 0}, "addend_stride: expected 1 to"),
    ({"raw": torch.zeros(2, 16, 5, 5)}, "raw: expected dz's dtype bfloat16"),
    ({"weight": torch.zeros(8, 16, 3, 3)}, "weight: expected dz's dtype bfloat16"),
    ({"groups": 3}, "weight: expected [K, 16/groups"),
    ({"stride": [0, 1]}, "stride: expected 1 to"),
    ({"dz": image(2, 8, 3, 3, dtype=torch.float64, device="cpu")}, "dz: expected bfloat16"),
    ({"raw": BFLOAT, "out": BFLOAT}, "out: it shares memory with raw"),
    (
        {"norm": SHARED[:64].view(4, 16), "sums": SHARED[32:64].view(2, 16)},
        "sums: it shares memory with norm",
    ),
    ({"sums": SHARED[:32].view(2, 16), "out": BFLOAT}, "out: it shares memory with sums"),
]


@needs_cuda_build
@pytest.mark.parametrize(("changes", "said"), BAD, ids=[said for _, said in BAD])
def test_bad_arguments_are_named(changes, said):
    with pytest.raises(RuntimeError) as caught:
        torch.ops.resnet_fused.conv_bn_dgrad_out(*arguments(**changes).values())
    assert said in str(caught.value)


@needs_cuda_build
def test_each_argument_arrives_under_its_own_name(monkeypatch):
    given = arguments(
        stride=[1, 2], padding=[3, 4], dilation=[5, 6], allow_tf32=True, configuration=2, splits=3
    )
    got: list[object] = []
    monkeypatch.setattr(_cuda_plan, "raw", lambda op, part: lambda *one: got.extend(one))
    monkeypatch.setattr(_cuda_plan, "tf32", lambda: True)
    names = ("dz", "y", "coefficients", "weight", "addend", "raw", "norm", "out", "sums")
    _cuda_bn_dgrad.launch(
        *(given[name] for name in names), 2, (1, 2), (3, 4), (5, 6), 1, wish=(2, 3)
    )
    schema = torch._C._get_schema(f"resnet_fused::{OP}_out", "")
    assert [argument.name for argument in schema.arguments] == list(given)
    for name, value in zip(given, got, strict=True):
        same = value is given[name] if isinstance(value, torch.Tensor) else value == given[name]
        assert same, name


def test_operands_are_copied_only_where_that_is_worth_it():
    dz, weight = torch.zeros(2, 16, 5, 5), torch.zeros(16, 8, 3, 3)
    dx = raw = torch.zeros(2, 8, 5, 5)
    rows, norm = torch.zeros(3, 16), torch.zeros(4, 8)
    made = _cuda_bn_dgrad.problem_of((dz, dz, rows, weight, raw, raw, norm), dx, 1, SAME)
    assert all(made.operands[i].stride(1) == 1 for i in (0, 1, 3))
    assert made.operands[4] is raw and made.operands[5] is raw  # read once, at a tile's end
    odd = _cuda_bn_dgrad.problem_of(
        (dz[:, :15], None, None, weight[:15, :7], None, None, None), dx[:, :7], 1, SAME
    )
    assert odd.operands[0].stride(1) == 25  # 15 channels: element by element in any case


def test_what_no_launch_takes_goes_to_plain_pytorch(monkeypatch):
    """With what it made of the addend and the mask."""
    plan = _cuda_plan.Plan(-1, "", 0, 0, 0.0, "too long")
    monkeypatch.setattr(_cuda_plan, "plan", lambda *_: plan)
    monkeypatch.setattr(_cuda_plan, "gpu", lambda device: H200)
    dz, weight = torch.randn(1, 4, 4, 20), torch.randn(4, 4, 17, 1)
    raw, norm = torch.randn(1, 4, 20, 20), torch.randn(4, 4)
    dx, sums = torch.empty_like(raw), torch.empty(2, 4)
    geometry = ([1, 1], [0, 0], [1, 1], 1)
    given = (dz, None, None, weight, raw, raw, norm)
    with pytest.warns(UserWarning, match="too long; plain PyTorch computes it"):
        _cuda_bn_dgrad.launch(*given, dx, sums, 1, *geometry)
    wanted = overload(OP, "reference")(*given, [1, 4, 20, 20], False, 1, *geometry)
    assert torch.equal(dx, wanted[0]) and torch.equal(sums, wanted[1])


def test_it_is_served_once_admitted_or_asked_for(monkeypatch):
    entries = [e.name for e in backends.implementations(OP)]
    assert entries.index("triton") < entries.index("cuda")
    entry = next(e for e in backends.implementations(OP) if e.name == "cuda")
    assert "on cpu" in (entry.supports(backends.Call(OP, "cpu", torch.float32)) or "")
    assert "no CUDA kernel" in (entry.supports(backends.Call(OP, "cuda", torch.float64)) or "")
    monkeypatch.setattr(_cuda._extension, "available", lambda: True)
    monkeypatch.setattr(_cuda._extension, "has_cuda_kernels", lambda: True)
    monkeypatch.setattr(_cuda_plan, "exists", lambda op: False)
    said = entry.supports(backends.Call(OP, "cuda", torch.bfloat16))
    assert said == f"the extension holds no CUDA kernel of {OP}: build it again"
