"""bn_add_act_conv_stats in CUDA as far as it goes without a GPU: arguments, plans, the way."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch

from resnet_fused import _extension, admission, backends
from resnet_fused.ops import (
    _admitted,
    _block_end,
    _cuda,
    _cuda_block_end,
    _cuda_block_end_checks,
    _cuda_grad1x1,
    _cuda_plan,
)
from resnet_fused.ops._library import overload

OP = _cuda_block_end.OP
ROOT = Path(__file__).resolve().parent.parent
H200 = (132, 232448, 233472, 90)
A100 = (108, 166912, 167936, 80)
RTX3080 = (68, 101376, 102400, 86)
BF16 = torch.bfloat16

needs_cuda_build = pytest.mark.skipif(
    not _extension.has_cuda_kernels(), reason="the extension was built without nvcc"
)


def image(*shape: int, dtype: torch.dtype = BF16, device: str = "cpu") -> torch.Tensor:
    made = torch.zeros(shape, dtype=dtype, device=device)
    return made.contiguous(memory_format=torch.channels_last)


@needs_cuda_build
def test_configurations_have_names_of_their_own():
    names = _cuda_plan.configurations(OP)
    assert len(set(names)) == len(names) == 8
    kernel = next(k for k in admission.kernels() if (k.op, k.implementation) == (OP, "cuda"))
    assert kernel.list_configurations() == names


@needs_cuda_build
def test_a_gpu_is_not_asked_for_what_it_cannot_hold(monkeypatch):
    names, ran = _cuda_plan.configurations(OP), []
    monkeypatch.setattr(_cuda_block_end_checks, "check", lambda name, *_: ran.append(name))
    smaller = tuple(name for name in names[1:] if not name.startswith("tma_"))
    for about, held in ((H200, names), (RTX3080, smaller)):
        monkeypatch.setattr(_cuda_plan, "gpu", lambda device, about=about: about)
        for name in names:
            _cuda_block_end_checks.bn_add_act_conv_stats(name, "cuda:0")
        assert tuple(ran) == held
        ran.clear()


# The arguments.


def arguments(**changes):
    return {
        "y": image(2, 16, 5, 5),
        "norm": torch.zeros(4, 16),
        "residual": image(2, 16, 5, 5),
        "residual_norm": torch.zeros(4, 16),
        "weight": image(8, 16, 1, 1),
        "allow_tf32": True,
        "out": image(2, 16, 5, 5),
        "configuration": -1,
        "splits": 0,
        "z": image(2, 8, 5, 5),
        "stats": torch.zeros(2, 8),
    } | changes


SHARED = torch.zeros(1024)
PIXELS = torch.as_strided(SHARED.view(BF16), (2, 16, 5, 5), (400, 1, 80, 16))
FEWER = torch.as_strided(SHARED.view(BF16), (2, 8, 5, 5), (200, 1, 40, 8))
ROWS, MEASURED = SHARED[:64].view(4, 16), SHARED[:16].view(2, 8)
BAD = [
    ({}, f"{OP}_out: expected CUDA tensors"),
    ({"residual_norm": None}, f"{OP}_out: expected CUDA tensors"),
    ({"norm": torch.zeros(4, 15)}, "norm: expected contiguous float32 [4, 16]"),
    ({"residual_norm": torch.zeros(3, 16)}, "residual_norm: expected contiguous float32 [4, 16]"),
    ({"stats": torch.zeros(8, 2)}, "stats: expected contiguous float32 [2, 8]"),
    ({"residual": image(2, 16, 5, 4)}, "residual: expected y's shape [2, 16, 5, 5]"),
    ({"out": image(2, 16, 5, 4)}, "out: expected y's shape [2, 16, 5, 5]"),
    ({"residual": torch.zeros(2, 16, 5, 5)}, "residual: expected y's dtype bfloat16"),
    ({"weight": torch.zeros(8, 16, 1, 1)}, "weight: expected y's dtype bfloat16"),
    ({"out": torch.zeros(2, 16, 5, 5)}, "out: expected y's dtype bfloat16"),
    ({"z": torch.zeros(2, 8, 5, 5)}, "z: expected y's dtype bfloat16"),
    ({"z": image(2, 8, 5, 4)}, "expected the convolution's shape"),
    ({"weight": image(8, 16, 3, 3)}, "expected the convolution's shape"),
    ({"y": torch.zeros(2, 16, 5, 5).double()}, "y: expected bfloat16, float16 or float32"),
    ({"y": PIXELS, "out": PIXELS}, "out: it shares memory with y"),
    ({"residual": PIXELS, "out": PIXELS}, "out: it shares memory with residual"),
    ({"residual": PIXELS, "z": FEWER}, "z: it shares memory with residual"),
    ({"z": FEWER, "out": PIXELS}, "out: it shares memory with z"),
    ({"norm": ROWS, "stats": MEASURED}, "stats: it shares memory with norm"),
    ({"residual_norm": ROWS, "stats": MEASURED}, "stats: it shares memory with residual_norm"),
    ({"z": FEWER, "stats": MEASURED}, "z: it shares memory with stats"),
    ({"out": PIXELS, "stats": MEASURED}, "out: it shares memory with stats"),
]


@needs_cuda_build
@pytest.mark.parametrize(("changes", "said"), BAD)
def test_bad_arguments_are_named(changes, said):
    with pytest.raises(RuntimeError) as caught:
        torch.ops.resnet_fused.bn_add_act_conv_stats_out(*arguments(**changes).values())
    assert said in str(caught.value)


@needs_cuda_build
def test_each_argument_arrives_under_its_own_name(monkeypatch):
    given = arguments(configuration=2, splits=3, allow_tf32=torch.backends.cudnn.allow_tf32)
    got: list[object] = []
    monkeypatch.setattr(_cuda_plan, "raw", lambda op, part: lambda *one: got.extend(one))
    read = [given[name] for name in list(given)[:5]]
    written = [given[name] for name in ("out", "z", "stats")]
    _cuda_block_end.launch(*read, *written, wish=(2, 3))
    schema = torch._C._get_schema(f"resnet_fused::{OP}_out", "")
    assert [argument.name for argument in schema.arguments] == list(given)
    for name, value in zip(given, got, strict=True):
        same = value is given[name] if isinstance(value, torch.Tensor) else value == given[name]
        assert same, name


@needs_cuda_build
def test_what_the_kernel_cannot_read_or_write_is_copied(monkeypatch):
    """Into channels_last, and out of it."""

    def run(*given):
        y, _, residual, _, weight, _, out, *_, z, stats = given
        assert all(map(_cuda_grad1x1.in_rows, (y, residual, weight, out)))
        assert torch.equal(y, dense) and y.data_ptr() != dense.data_ptr()
        for t in (out, z, stats):
            t.fill_(3)

    dense = torch.randn(2, 16, 5, 5).to(BF16)
    given = arguments(y=dense)
    monkeypatch.setattr(_cuda_plan, "raw", lambda op, part: run)
    out = torch.zeros(2, 16, 5, 5, dtype=BF16)
    read = [given[name] for name in list(given)[:5]]
    _cuda_block_end.launch(*read, out, given["z"], given["stats"], wish=(1, 1))
    assert (out == 3).all() and out.is_contiguous()
    made = _cuda_block_end.problem_of(*read, out.to("meta"), given["z"], real=False)
    assert made.operands[0].is_meta and made.operands[2] is read[2]
    assert made.geometry[-1].stride(1) == 1


@needs_cuda_build
def test_what_no_configuration_takes_is_plain_pytorchs(monkeypatch):
    monkeypatch.setattr(_cuda_plan, "gpu", lambda device: H200)
    monkeypatch.setattr(_admitted, "names", lambda *_: None)
    y, weight = torch.randn(2, 9, 3, 3).half(), torch.randn(4, 9, 1, 1).half()
    operands = (y, torch.rand(4, 9), y.flip(0), None, weight)
    results = torch.empty_like(y), torch.empty(2, 4, 3, 3).half(), torch.empty(2, 4)
    with pytest.warns(UserWarning, match="units of 16 bytes.*; plain PyTorch computes it"):
        _cuda_block_end.launch(*operands, *results)
    assert all(map(torch.equal, results, overload(OP, "reference")(*operands)))


# The way of two blocks.


def chosen(shape, filters, about=H200, **how):
    return _cuda_block_end.choose(BF16, shape, filters, about, **how)


def cycles(verdict):
    """Thousands, of one kernel and of two."""
    return [int(word) for word in verdict.why.split() if word.isdigit()]


@needs_cuda_build
def test_it_is_taken_where_it_is_predicted_faster():
    first = chosen((256, 256, 56, 56), 64, A100)
    assert first.folded
    one, two = cycles(first)
    assert one < _cuda_grad1x1.WORTH * two
    # wgmma multiplies in either way there, and a near tie of mma.sync's goes to two kernels.
    older = frozenset(n for n in _cuda_plan.configurations(OP) if not n.startswith("tma_"))
    hopper = chosen((256, 256, 56, 56), 64, names=older)
    one, two = cycles(hopper)
    assert not hopper.folded and _cuda_grad1x1.WORTH * two < one < two
    assert chosen((256, 256, 56, 56), 64).folded
    # Columns of tiles that read the pixels again.
    last = chosen((256, 2048, 7, 7), 512)
    assert not last.folded
    assert chosen((0, 256, 56, 56), 64) == (False, "an empty batch")
    assert "units of 16 bytes" in chosen((256, 255, 56, 56), 64).why
    widest = frozenset({"128x256_8w3s"})
    assert "projection" in chosen((256, 256, 56, 56), 64, names=widest, projected=True).why


@needs_cuda_build
@pytest.mark.parametrize("about", [H200, A100], ids=["H200", "A100"])
def test_the_page_s_cycles_are_the_plans(about):
    """Of docs/training_cuda.md: C to K, thousands of cycles of one kernel and of two."""
    page = (ROOT / "docs" / "training_cuda.md").read_text()
    row = r"^\| (\d+) to (\d+) at (\d+) \| (.*?) \| (\d+), (\d+) \| (\d+), (\d+) \|$"
    found = re.findall(row, page, re.MULTILINE)
    assert len(found) == 11
    for channels, filters, side, which, *said in found:
        shape = (256, int(channels), int(side), int(side))
        verdict = chosen(shape, int(filters), about, projected="projection" in which)
        assert cycles(verdict) == list(map(int, said[:2] if about == H200 else said[2:]))


@pytest.fixture
def asked(monkeypatch):
    """way() on a pretended A100 where the CUDA kernel is admitted."""
    entry = next(e for e in backends.implementations(OP) if e.name == "cuda")
    monkeypatch.setattr(backends, "choose", lambda call: backends.Choice(entry, "pretended"))
    monkeypatch.setattr(_cuda_plan, "gpu", lambda device: A100)
    monkeypatch.setattr(_admitted, "names", lambda *_: None)

    def ask(out=(256, 256, 56, 56), filters=64, projected=False):
        return _block_end.way(
            torch.device("cuda"), BF16, out, (filters, out[1], 1, 1), _cuda_grad1x1.GEOMETRY,
            folds=True, projected=projected,
        )  # fmt: skip

    yield ask
    _block_end._word.cache_clear()


@needs_cuda_build
def test_two_blocks_way(asked):
    lost = (256, 2048, 7, 7), 512
    assert asked().folded and "thousand cycles predicted" in asked().why
    assert not asked(*lost).folded
    with _block_end.preferring("always"):
        assert asked(*lost).folded
        assert "units of 16 bytes" in asked((256, 255, 56, 56)).why
    with _block_end.preferring("never"):
        assert not asked().folded


@needs_cuda_build
def test_the_op_takes_the_kernel_where_it_is_chosen(asked, monkeypatch):
    public = importlib.import_module(f"resnet_fused.ops.{OP}")
    ran = []
    monkeypatch.setattr(public, "overload", lambda op, name: lambda *one: ran.append((op, name)))
    y, rows = image(2, 16, 4, 4), torch.zeros(4, 16)
    public.bn_add_act_conv_stats(y, rows, y.clone(), image(8, 16, 1, 1), rows)
    assert ran == [(OP, "cuda")]


def test_it_is_served_once_admitted_or_asked_for(monkeypatch):
    entries = [e.name for e in backends.implementations(OP)]
    assert entries.index("triton") < entries.index("cuda")
    entry = next(e for e in backends.implementations(OP) if e.name == "cuda")
    assert "on cpu" in (entry.supports(backends.Call(OP, "cpu", BF16)) or "")
    assert "no CUDA kernel" in (entry.supports(backends.Call(OP, "cuda", torch.float64)) or "")
    monkeypatch.setattr(_cuda._extension, "available", lambda: True)
    monkeypatch.setattr(_cuda._extension, "has_cuda_kernels", lambda: True)
    monkeypatch.setattr(_cuda_plan, "exists", lambda op: False)
    said = entry.supports(backends.Call(OP, "cuda", BF16))
    assert said == f"the extension holds no CUDA kernel of {OP}: build it again"
