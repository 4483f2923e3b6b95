"""conv_bn_dgrad_end in CUDA as far as it goes without a GPU: arguments, plans, a node's way."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch

from resnet_fused import _extension, admission, backends
from resnet_fused.ops import (
    _admitted,
    _cuda,
    _cuda_bn_dgrad_end,
    _cuda_plan,
    _end_gradient,
    _grad1x1,
)
from resnet_fused.ops._library import overload

OP = _cuda_bn_dgrad_end.OP
ROOT = Path(__file__).resolve().parent.parent
H200 = (132, 232448, 233472, 90)
A100 = (108, 166912, 167936, 80)
BF16 = torch.bfloat16
POINT = ((1, 1), (0, 0), (1, 1), 1)

needs_cuda_build = pytest.mark.skipif(
    not _extension.has_cuda_kernels(), reason="the extension was built without nvcc"
)


def image(*shape: int, dtype: torch.dtype = BF16, device: str = "meta") -> torch.Tensor:
    made = torch.zeros(shape, dtype=dtype, device=device)
    return made.contiguous(memory_format=torch.channels_last)


@needs_cuda_build
def test_configurations_have_names_of_their_own():
    names = _cuda_plan.configurations(OP)
    assert len(set(names)) == len(names) >= 7
    kernel = next(k for k in admission.kernels() if (k.op, k.implementation) == (OP, "cuda"))
    assert kernel.list_configurations() == names


# The arguments.


def arguments(**changes):
    def pixels(*shape, **how):
        return image(*shape, device="cpu", **how)

    return {
        "dz": pixels(2, 8, 3, 3),
        "y": pixels(2, 8, 3, 3),
        "coefficients": torch.zeros(3, 8),
        "weight": pixels(8, 16, 3, 3),
        "addend": pixels(2, 16, 3, 3),
        "out": pixels(2, 16, 5, 5),
        "raw": pixels(2, 16, 5, 5),
        "norm": torch.zeros(4, 16),
        "residual": pixels(2, 16, 5, 5),
        "residual_norm": torch.zeros(4, 16),
        "addend_stride": 2,
        "stride": [2, 2],
        "padding": [1, 1],
        "dilation": [1, 1],
        "groups": 1,
        "allow_tf32": False,
        "configuration": -1,
        "splits": 0,
        "dx": pixels(2, 16, 5, 5),
        "sums": torch.zeros(3, 16),
    } | changes


SHARED = torch.zeros(1024)
PIXELS = torch.as_strided(SHARED.view(BF16), (2, 16, 5, 5), (400, 1, 80, 16))
OTHER = image(2, 16, 5, 4, device="cpu")
BAD = [
    ({}, f"{OP}_out: expected CUDA tensors"),
    ({"residual": None, "residual_norm": None}, "sums: expected contiguous float32 [2, 16]"),
    ({"sums": torch.zeros(2, 16)}, "sums: expected contiguous float32 [3, 16]"),
    ({"y": None}, "y: expected with coefficients, or neither of them"),
    ({"residual": None}, "residual: expected with residual_norm, or neither of them"),
    ({"residual_norm": None}, "residual: expected with residual_norm, or neither of them"),
    ({"coefficients": torch.zeros(4, 8)}, "coefficients: expected contiguous float32 [3, 8]"),
    ({"norm": torch.zeros(3, 16)}, "norm: expected contiguous float32 [4, 16]"),
    ({"residual_norm": torch.zeros(4, 15)}, "residual_norm: expected contiguous float32 [4, 16]"),
    ({"out": OTHER}, "out: expected dx's shape [2, 16, 5, 5]"),
    ({"raw": OTHER}, "raw: expected dx's shape [2, 16, 5, 5]"),
    ({"residual": OTHER}, "residual: expected dx's shape [2, 16, 5, 5]"),
    ({"out": torch.zeros(2, 16, 5, 5)}, "out: expected dz's dtype bfloat16"),
    ({"residual": torch.zeros(2, 16, 5, 5)}, "residual: expected dz's dtype bfloat16"),
    ({"addend": PIXELS}, "addend: expected every addend_stride-th pixel of dx"),
    ({"addend_stride": 0}, "addend_stride: expected 1 to"),
    ({"groups": 3}, "weight: expected [K, 16/groups"),
    ({"out": PIXELS, "dx": PIXELS}, "dx: it shares memory with out"),
    ({"residual": PIXELS, "dx": PIXELS}, "dx: it shares memory with residual"),
    (
        {"residual_norm": SHARED[:64].view(4, 16), "sums": SHARED[16:64].view(3, 16)},
        "sums: it shares memory with residual_norm",
    ),
    ({"sums": SHARED[:48].view(3, 16), "dx": PIXELS}, "dx: it shares memory with sums"),
]


@needs_cuda_build
@pytest.mark.parametrize(("changes", "said"), BAD, ids=[said for _, said in BAD])
def test_bad_arguments_are_named(changes, said):
    with pytest.raises(RuntimeError) as caught:
        _cuda_plan.raw(OP, "out")(*arguments(**changes).values())
    assert said in str(caught.value)


def test_each_argument_arrives_under_its_own_name(monkeypatch):
    given = arguments(configuration=2, splits=3, allow_tf32=_cuda_plan.tf32())
    got: list[object] = []
    monkeypatch.setattr(_cuda_plan, "raw", lambda op, part: lambda *one: got.extend(one))
    read = [given[name] for name in list(given)[:10]]
    options = [given[name] for name in ("addend_stride", "stride", "padding", "dilation", "groups")]
    _cuda_bn_dgrad_end.launch(*read, given["dx"], given["sums"], *options, wish=(2, 3))
    for name, value in zip(given, got, strict=True):
        same = value is given[name] if isinstance(value, torch.Tensor) else value == given[name]
        assert same, name
    if _extension.has_cuda_kernels():
        schema = torch._C._get_schema(f"resnet_fused::{OP}_out", "")
        assert [argument.name for argument in schema.arguments] == list(given)


def test_nothing_is_launched_for_an_empty_gradient():
    given = list(arguments().values())
    sums = torch.ones(3, 16)
    _cuda_bn_dgrad_end.launch(*given[:10], given[18][:0], sums, 2, *given[11:15])
    assert not sums.any()


@needs_cuda_build
def test_what_no_configuration_takes_is_plain_pytorchs(monkeypatch):
    monkeypatch.setattr(_cuda_plan, "gpu", lambda device: H200)
    dz, weight = torch.randn(1, 4, 4, 20), torch.randn(4, 4, 17, 1)
    raw, norm = torch.randn(1, 4, 20, 20), torch.randn(4, 4)
    dx, sums = torch.empty_like(raw), torch.empty(2, 4)
    given = (dz, None, None, weight, raw, raw, raw, norm, None, None)
    geometry = ([1, 1], [0, 0], [1, 1], 1)
    with pytest.warns(UserWarning, match="at most 15 x 15.*; plain PyTorch computes it"):
        _cuda_bn_dgrad_end.launch(*given, dx, sums, 1, *geometry)
    wanted = overload(OP, "reference")(*given, 1, *geometry)
    assert torch.equal(dx, wanted[0]) and torch.equal(sums, wanted[1])


# The way of a node.

PLACE = _end_gradient.Place(
    torch.device("cuda"), BF16, (256, 256, 56, 56), (64, 256, 1, 1), POINT, False, True
)


def numbers(why: str) -> list[int]:
    return [int(word) for word in why.split() if word.isdigit()]


def chosen(between, filters, about=A100, **how):
    return _cuda_bn_dgrad_end.choose(
        BF16, between, (filters, between[1], 1, 1), POINT, about, **how
    )


SIZES = [(256, 64, 56), (512, 128, 28), (1024, 256, 14), (2048, 512, 7)]
"""Channels, filters and side of the four stages of ResNet-50."""


@needs_cuda_build
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize(("channels", "filters", "side"), SIZES)
def test_it_is_taken_where_it_is_predicted_faster(channels, filters, side, projected):
    """On a GPU of mma.sync alone, at all of ResNet-50's places at a batch of 256."""
    found = chosen((256, channels, side, side), filters, projected=projected)
    one, two = numbers(found.why)
    assert found.ended and one < 0.9 * two


@needs_cuda_build
def test_what_it_takes_the_place_of_counts():
    sizes = (256, 256, 56, 56), 64
    _, apart = numbers(chosen(*sizes, H200).why)
    _, merged = numbers(chosen(*sizes, H200, merged=True).why)
    assert merged < apart, "one kernel for both gradients spares the weights' half of the reading"
    with_projection = numbers(chosen(*sizes, projected=True).why)
    for one, more in zip(numbers(chosen(*sizes).why), with_projection, strict=True):
        # A tensor more: 256 x 256 x 56 x 56 x 2 bytes at 22 a cycle of 108 multiprocessors.
        assert abs(more - one - 173) < 30
    assert chosen((0, 256, 56, 56), 64) == (False, "an empty batch")
    assert chosen(*sizes, names=frozenset({"halo_128x64_4w4s"})).why.startswith("no admitted")


@needs_cuda_build
def test_one_kernel_is_not_taken_to_be_faster_than_memory(monkeypatch):
    plan = _cuda_plan.plan
    monkeypatch.setattr(_cuda_plan, "plan", lambda *given: plan(*given)._replace(cycles=1.0))
    _cuda_bn_dgrad_end.choose.cache_clear()
    one, two = numbers(chosen((256, 256, 56, 56), 64).why)
    _cuda_bn_dgrad_end.choose.cache_clear()
    pixel = 2 * 256 * 56 * 56 / 22 / 108e3
    assert abs(one - (2 * 64 + 4 * 256) * pixel) < 2
    assert abs(two - (2 * 64 + 2 * 256 + 4 * 256) * pixel) < 2


@pytest.fixture
def asked(monkeypatch):
    """way() on a pretended A100 where the CUDA kernels are admitted."""

    def choose(call):
        entries = backends.implementations(call.op)
        return backends.Choice(next(e for e in entries if e.name == "cuda"), "pretended")

    monkeypatch.setattr(backends, "choose", choose)
    monkeypatch.setattr(_cuda_plan, "gpu", lambda device: A100)
    monkeypatch.setattr(_admitted, "names", lambda *_: None)
    _end_gradient._word.cache_clear()
    yield lambda **changes: _end_gradient.way(PLACE._replace(**changes), folds=True)
    _end_gradient._word.cache_clear()
    _grad1x1._word.cache_clear()


@needs_cuda_build
def test_a_node_s_way(asked, monkeypatch):
    assert asked().ended and "thousand cycles predicted" in asked().why
    long = {"between": (1, 4, 20, 20), "weight": (4, 4, 17, 1)}
    assert not asked(**long).ended and "at most 15 x 15" in asked(**long).why
    deep = {"between": (256, 512, 7, 7), "weight": (512, 512, 3, 3)}
    deep["geometry"] = ([1, 1], [1, 1], [1, 1], 1)
    assert not asked(**deep).ended, "a near tie goes to two kernels"
    with _end_gradient.preferring("always"):
        assert asked(**deep).ended and not asked(**long).ended
    monkeypatch.setattr(_admitted, "names", lambda *_: frozenset({"halo_64x64_4w4s"}))
    assert "no admitted configuration" in asked().why


@needs_cuda_build
def test_the_op_takes_the_kernel_where_it_is_chosen(asked, monkeypatch):
    public = importlib.import_module(f"resnet_fused.ops.{OP}")
    ran = []
    monkeypatch.setattr(public, "overload", lambda op, name: lambda *one: ran.append((op, name)))
    between = image(2, 8, 4, 4)
    public.conv_bn_dgrad_end(
        image(2, 16, 4, 4), image(16, 8, 1, 1), out=between, raw=between,
        norm=torch.zeros(4, 8, device="meta"),
    )  # fmt: skip
    assert ran == [(OP, "cuda")]


@needs_cuda_build
def test_the_page_s_cycles_are_the_plans():
    """Of docs/training_cuda.md: K to C at a side, thousands of cycles on an A100."""
    page = (ROOT / "docs" / "training_cuda.md").read_text()
    row = r"^\| (\d+) to (\d+) \| (\d+) x \d+ \| (\d+), (\d+) \| (\d+), (\d+) \|$"
    found = [tuple(map(int, one)) for one in re.findall(row, page, re.MULTILINE)]
    assert [(c, k, side) for k, c, side, *_ in found] == SIZES
    for filters, channels, side, *cycles in found:
        sizes = (256, channels, side, side), filters
        said = [numbers(chosen(*sizes, projected=projected).why) for projected in (False, True)]
        assert [*said[0], *said[1]] == cycles


def test_it_is_served_once_admitted_or_asked_for(monkeypatch):
    entries = [e.name for e in backends.implementations(OP)]
    assert entries.index("triton") < entries.index("cuda")
    entry = next(e for e in backends.implementations(OP) if e.name == "cuda")
    assert "on cpu" in (entry.supports(backends.Call(OP, "cpu", torch.float32)) or "")
    assert "no CUDA kernel" in (entry.supports(backends.Call(OP, "cuda", torch.float64)) or "")
    monkeypatch.setattr(_cuda._extension, "available", lambda: True)
    monkeypatch.setattr(_cuda._extension, "has_cuda_kernels", lambda: True)
    monkeypatch.setattr(_cuda_plan, "exists", lambda op: False)
    said = entry.supports(backends.Call(OP, "cuda", BF16))
    assert said == f"the extension holds no CUDA kernel of {OP}: build it again"
