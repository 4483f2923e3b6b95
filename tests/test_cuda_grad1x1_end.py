"""conv_bn_grad1x1_end in CUDA as far as it goes without a GPU: arguments, plans, a node's way."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from resnet_fused import _extension, admission, backends
from resnet_fused.ops import (
    _admitted,
    _cuda,
    _cuda_grad1x1,
    _cuda_grad1x1_end,
    _cuda_plan,
    _end_gradient,
    _grad1x1,
)
from resnet_fused.ops._library import overload

OP = _cuda_grad1x1_end.OP
ROOT = Path(__file__).resolve().parent.parent
H200 = (132, 232448, 233472, 90)
A100 = (108, 166912, 167936, 80)
RTX3080 = (68, 101376, 102400, 86)
BF16 = torch.bfloat16
POINT = ((1, 1), (0, 0), (1, 1), 1)

needs_cuda_build = pytest.mark.skipif(
    not _extension.has_cuda_kernels(), reason="the extension was built without nvcc"
)


def image(*shape: int, dtype: torch.dtype = BF16, device: str = "cpu") -> torch.Tensor:
    made = torch.zeros(shape, dtype=dtype, device=device)
    return made.contiguous(memory_format=torch.channels_last)


@needs_cuda_build
def test_configurations_have_names_of_their_own():
    names = _cuda_plan.configurations(OP)
    assert names == ("tma_64x128_4s", "tma_128x128_4s", "64x64_8w3s", "128x128_8w2s")
    kernel = next(k for k in admission.kernels() if (k.op, k.implementation) == (OP, "cuda"))
    assert kernel.list_configurations() == names


# The arguments.


def arguments(**changes):
    return {
        "dz": image(2, 8, 3, 5),
        "y": image(2, 8, 3, 5),
        "coefficients": torch.zeros(3, 8),
        "weight": image(8, 16, 1, 1),
        "addend": image(2, 16, 2, 3),
        "out": image(2, 16, 3, 5),
        "raw": image(2, 16, 3, 5),
        "norm": torch.zeros(4, 16),
        "residual": image(2, 16, 3, 5),
        "residual_norm": torch.zeros(4, 16),
        "addend_stride": 2,
        "configuration": -1,
        "splits": 0,
        "dx": image(2, 16, 3, 5),
        "sums": torch.zeros(3, 16),
        "dweight": torch.zeros(8, 16, 1, 1),
    } | changes


SHARED = torch.zeros(1024)
PIXELS = torch.as_strided(SHARED.view(BF16), (2, 16, 3, 5), (240, 1, 80, 16))
OTHER = image(2, 16, 3, 4)
WEIGHTS = SHARED[:128].view(8, 16, 1, 1)
BAD = [
    ({}, f"{OP}_out: expected CUDA tensors"),
    ({"residual": None, "residual_norm": None}, "sums: expected contiguous float32 [2, 16]"),
    ({"sums": torch.zeros(2, 16)}, "sums: expected contiguous float32 [3, 16]"),
    ({"y": None}, "y: expected with coefficients, or neither of them"),
    ({"residual": None}, "residual: expected with residual_norm, or neither of them"),
    ({"coefficients": torch.zeros(4, 8)}, "coefficients: expected contiguous float32 [3, 8]"),
    ({"norm": torch.zeros(3, 16)}, "norm: expected contiguous float32 [4, 16]"),
    ({"out": OTHER}, "out: expected dx's shape [2, 16, 3, 5]"),
    ({"raw": OTHER}, "raw: expected dx's shape [2, 16, 3, 5]"),
    ({"residual": OTHER}, "residual: expected dx's shape [2, 16, 3, 5]"),
    ({"out": torch.zeros(2, 16, 3, 5)}, "out: expected dz's dtype bfloat16"),
    ({"addend": PIXELS}, "addend: expected every addend_stride-th pixel of dx"),
    ({"addend_stride": 0}, "addend_stride: expected 1 to"),
    ({"dweight": torch.zeros(8, 15, 1, 1)}, "dweight: expected weight's shape [8, 16, 1, 1]"),
    ({"dweight": torch.zeros(8, 16, 1, 1).half()}, "dweight: expected dz's dtype bfloat16"),
    ({"out": PIXELS, "dx": PIXELS}, "dx: it shares memory with out"),
    ({"raw": PIXELS, "dweight": WEIGHTS}, "dweight: it shares memory with raw"),
    ({"dx": PIXELS, "dweight": WEIGHTS}, "dweight: it shares memory with dx"),
    ({"sums": SHARED[:48].view(3, 16), "dweight": WEIGHTS}, "dweight: it shares memory with sums"),
    ({"sums": SHARED[:48].view(3, 16), "dx": PIXELS}, "dx: it shares memory with sums"),
]


@needs_cuda_build
@pytest.mark.parametrize(("changes", "said"), BAD, ids=[said for _, said in BAD])
def test_bad_arguments_are_named(changes, said):
    with pytest.raises(RuntimeError) as caught:
        _cuda_plan.raw(OP, "out")(*arguments(**changes).values())
    assert said in str(caught.value)


def test_each_argument_arrives_under_its_own_name(monkeypatch):
    given = arguments(configuration=1, splits=3)
    got: list[object] = []
    monkeypatch.setattr(_cuda_plan, "raw", lambda op, part: lambda *one: got.extend(one))
    read = [given[name] for name in list(given)[:10]]
    results = [given[name] for name in ("dx", "sums", "dweight")]
    _cuda_grad1x1_end.launch(*read, *results, 2, wish=(1, 3))
    for name, value in zip(given, got, strict=True):
        same = value is given[name] if isinstance(value, torch.Tensor) else value == given[name]
        assert same, name
    if _extension.has_cuda_kernels():
        schema = torch._C._get_schema(f"resnet_fused::{OP}_out", "")
        assert [argument.name for argument in schema.arguments] == list(given)


def test_what_the_kernel_cannot_read_or_write_is_copied(monkeypatch):
    """Into channels_last, and out of it."""
    given = arguments(raw=torch.randn(2, 16, 3, 5).to(BF16))

    def run(*got):
        raw, out, sums, dweight = got[6], *got[-3:]
        assert torch.equal(raw, given["raw"]) and _cuda_grad1x1.in_rows(raw)
        for t in (out, sums, dweight):
            t.fill_(3)

    monkeypatch.setattr(_cuda_plan, "raw", lambda op, part: run)
    dx = torch.zeros(2, 16, 3, 5, dtype=BF16)
    read = [given[name] for name in list(given)[:10]]
    _cuda_grad1x1_end.launch(*read, dx, given["sums"], given["dweight"], 2, wish=(0, 1))
    assert (dx == 3).all() and dx.is_contiguous()
    made = _cuda_grad1x1_end.problem_of(read, dx.to("meta"), 2, real=False)
    assert made.operands[6].is_meta and made.operands[5] is read[5] and made.out.stride(1) == 1


@needs_cuda_build
def test_what_no_configuration_takes_is_plain_pytorchs(monkeypatch):
    monkeypatch.setattr(_cuda_plan, "gpu", lambda device: H200)
    monkeypatch.setattr(_admitted, "names", lambda *_: None)
    dz, raw, weight = torch.randn(2, 4, 3, 3), torch.randn(2, 8, 3, 3), torch.randn(4, 8, 1, 1)
    given = (dz, dz, torch.randn(3, 4), weight, raw, raw.relu(), raw, torch.randn(4, 8), None, None)
    results = torch.empty_like(raw), torch.empty(2, 8), torch.empty_like(weight)
    with pytest.warns(UserWarning, match="float32 .*; plain PyTorch computes it"):
        _cuda_grad1x1_end.launch(*given, *results, 1)
    wanted = overload(OP, "reference")(*given, weight, 1)
    assert all(map(torch.equal, results, wanted))
    nothing = [t if t is None or t.dim() == 2 or t is weight else t[:0] for t in given]
    _cuda_grad1x1_end.launch(*nothing, raw[:0], *results[1:], 1)
    assert not results[1].any() and not results[2].any()


# The way of a node.

PLACE = _end_gradient.Place(
    torch.device("cuda"), BF16, (256, 256, 56, 56), (64, 256, 1, 1), POINT, False, 1
)


def numbers(why: str) -> list[int]:
    return [int(word) for word in why.split() if word.isdigit()]


def chosen(between, filters, about=H200, **how):
    return _cuda_grad1x1_end.choose(BF16, between, (filters, between[1], 1, 1), about, **how)


SIZES = [(256, 64, 56), (256, 128, 56), (512, 128, 28)]
"""Channels, filters and side of the places that the kernel is for, at a batch of 256."""


@needs_cuda_build
@pytest.mark.parametrize("about", [H200, A100, RTX3080], ids=["H200", "A100", "RTX3080"])
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("batch", [32, 256])
@pytest.mark.parametrize(("channels", "filters", "side"), SIZES)
def test_it_is_taken_where_it_is_predicted_faster(channels, filters, side, batch, projected, about):
    """By wgmma on an H200, by mma.sync on the others."""
    found = chosen((batch, channels, side, side), filters, about, projected=projected)
    one, more = numbers(found.why)
    assert found.ended is (one < 0.9 * more)
    assert found.ended or (batch, about) == (32, H200)


@needs_cuda_build
def test_what_no_tile_holds_is_left_to_more_kernels():
    assert "more filters than a block keeps" in chosen((256, 512, 28, 28), 256).why
    assert chosen((0, 256, 56, 56), 64) == (False, "an empty batch")
    one = frozenset({"tma_64x128_4s"})
    assert "no admitted configuration" in chosen((256, 512, 28, 28), 128, names=one).why


@needs_cuda_build
def test_the_page_s_cycles_are_the_plans():
    """Of docs/training_cuda.md: K to C at a side, thousands of cycles on an H200 and on an A100."""
    page = (ROOT / "docs" / "training_cuda.md").read_text()
    for about, tile in ((H200, r"tma_\d+x\d+_4s"), (A100, r"\d+x\d+_8w\ds")):
        row = rf"^\| (\d+), (\d+), (\d+)x\d+ \| `{tile}` \| (\d+), (\d+) \| (\d+), (\d+) \|$"
        found = [tuple(map(int, one)) for one in re.findall(row, page, re.MULTILINE)]
        assert [(c, k, side) for k, c, side, *_ in found] == SIZES
        for filters, channels, side, *cycles in found:
            sizes = (256, channels, side, side), filters, about
            said = [numbers(chosen(*sizes, projected=projected).why) for projected in (False, True)]
            assert [*said[0], *said[1]] == cycles


@pytest.fixture
def asked(monkeypatch):
    """way() on a pretended H200 where the CUDA kernels are admitted."""

    def choose(call):
        entries = backends.implementations(call.op)
        return backends.Choice(next(e for e in entries if e.name == "cuda"), "pretended")

    monkeypatch.setattr(backends, "choose", choose)
    monkeypatch.setattr(_cuda_plan, "gpu", lambda device: H200)
    monkeypatch.setattr(_admitted, "names", lambda *_: None)
    _end_gradient._word.cache_clear()
    yield lambda **changes: _end_gradient.way(PLACE._replace(**changes), folds=True)
    _end_gradient._word.cache_clear()
    _grad1x1._word.cache_clear()


@needs_cuda_build
def test_a_node_s_way(asked):
    assert asked().united and "thousand cycles predicted, of more kernels" in asked().why
    assert asked(added=2, projected=True).united
    later = {"between": (256, 1024, 14, 14), "weight": (256, 1024, 1, 1)}
    assert asked(**later) == (True, asked(**later).why, False)
    with _grad1x1.preferring("never"):
        assert asked().ended and not asked().united
    with _grad1x1.preferring("always"):
        assert asked().united
    small = {"between": (1, 256, 7, 7)}
    with _end_gradient.preferring("always"), _grad1x1.preferring("always"):
        assert asked(**small).united and not asked(**later).united


def test_it_is_served_once_admitted_or_asked_for(monkeypatch):
    entry = next(e for e in backends.implementations(OP) if e.name == "cuda")
    assert "on cpu" in (entry.supports(backends.Call(OP, "cpu", BF16)) or "")
    monkeypatch.setattr(_cuda._extension, "available", lambda: True)
    monkeypatch.setattr(_cuda._extension, "has_cuda_kernels", lambda: True)
    monkeypatch.setattr(_cuda_plan, "exists", lambda op: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_cuda_plan, "gpu", lambda device: A100)
    why = entry.supports(backends.Call(OP, "cuda", BF16))
    assert why is None or "wgmma" not in why, "mma.sync serves it"
