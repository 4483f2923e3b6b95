"""conv_bn_grad1x1 in CUDA as far as it goes without a GPU: arguments, plans, the way of a node."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch

from resnet_fused import _extension, _tuned, admission, backends
from resnet_fused.ops import (
    _admitted,
    _cuda,
    _cuda_grad1x1,
    _cuda_grad1x1_checks,
    _cuda_plan,
    _grad1x1,
)
from resnet_fused.ops._library import overload

OP = _cuda_grad1x1.OP
ROOT = Path(__file__).resolve().parent.parent
H200 = (132, 232448, 233472, 90)
A100 = (108, 166912, 167936, 80)
RTX3080 = (68, 101376, 102400, 86)
BF16 = torch.bfloat16

needs_cuda_build = pytest.mark.skipif(
    not _extension.has_cuda_kernels(), reason="the extension was built without nvcc"
)


def image(*shape: int, dtype: torch.dtype = BF16, device: str = "meta") -> torch.Tensor:
    made = torch.zeros(shape, dtype=dtype, device=device)
    return made.contiguous(memory_format=torch.channels_last)


@needs_cuda_build
def test_configurations_have_names_of_their_own():
    names = _cuda_plan.configurations(OP)
    assert len(set(names)) == len(names) == 7
    kernel = next(k for k in admission.kernels() if (k.op, k.implementation) == (OP, "cuda"))
    assert kernel.list_configurations() == names


@needs_cuda_build
def test_a_gpu_is_not_asked_for_what_it_cannot_hold(monkeypatch):
    names, ran = _cuda_plan.configurations(OP), []
    monkeypatch.setattr(_cuda_grad1x1_checks, "check", lambda name, *_: ran.append(name))
    for about, held in ((H200, names), (A100, names[:3]), (RTX3080, names[:2])):
        monkeypatch.setattr(_cuda_plan, "gpu", lambda device, about=about: about)
        for name in names:
            _cuda_grad1x1_checks.conv_bn_grad1x1(name, "cuda:0")
        assert tuple(ran) == held
        ran.clear()


# The arguments.


def arguments(**changes):
    def pixels(*shape, **how):
        return image(*shape, device="cpu", **how)

    return {
        "dz": pixels(2, 8, 5, 5),
        "y": pixels(2, 8, 5, 5),
        "coefficients": torch.zeros(3, 8),
        "x": pixels(2, 16, 5, 5),
        "norm": torch.zeros(4, 16),
        "weight": pixels(8, 16, 1, 1),
        "addend": pixels(2, 16, 3, 3),
        "addend_stride": 2,
        "configuration": -1,
        "splits": 0,
        "out": pixels(2, 16, 5, 5),
        "sums": torch.zeros(2, 16),
        "dweight": torch.zeros(8, 16, 1, 1),
    } | changes


SHARED = torch.zeros(1024)
PIXELS = torch.as_strided(SHARED.view(BF16), (2, 16, 5, 5), (400, 1, 80, 16))
BAD = [
    ({}, f"{OP}_out: expected CUDA tensors"),
    ({"dweight": image(8, 16, 1, 1, device="cpu")}, f"{OP}_out: expected CUDA tensors"),
    ({"y": None}, "y: expected beside coefficients, got none"),
    ({"coefficients": None}, "coefficients: expected beside y, got none"),
    ({"coefficients": torch.zeros(4, 8)}, "coefficients: expected contiguous float32 [3, 8]"),
    ({"norm": torch.zeros(4, 15)}, "norm: expected contiguous float32 [4, 16]"),
    ({"norm": None}, "sums: expected contiguous float32 [0, 16]"),
    ({"sums": torch.zeros(16, 2)}, "sums: expected contiguous float32 [2, 16]"),
    ({"y": image(2, 8, 5, 4, device="cpu")}, "y: expected dz's shape [2, 8, 5, 5]"),
    ({"x": image(2, 16, 5, 4, device="cpu")}, "x: expected out's shape [2, 16, 5, 5]"),
    ({"x": torch.zeros(2, 16, 5, 5)}, "x: expected dz's dtype bfloat16"),
    ({"dz": image(2, 8, 5, 4, device="cpu")}, "dz: expected the convolution's shape"),
    ({"weight": torch.zeros(8, 16, 1, 1)}, "weight: expected dz's dtype bfloat16"),
    ({"weight": image(8, 16, 3, 3, device="cpu")}, "dz: expected the convolution's shape"),
    ({"addend": image(2, 16, 5, 5, device="cpu")}, "addend: expected every addend_stride-th pixel"),
    ({"addend_stride": 0}, "addend_stride: expected 1 to"),
    ({"dweight": torch.zeros(8, 16, 1, 1).half()}, "dweight: expected dz's dtype bfloat16"),
    ({"dweight": torch.zeros(8, 15, 1, 1)}, "dweight: expected weight's shape"),
    ({"dz": torch.zeros(2, 8, 5, 5).double()}, "dz: expected bfloat16, float16 or float32"),
    ({"x": PIXELS, "out": PIXELS}, "out: it shares memory with x"),
    (
        {"norm": SHARED[:64].view(4, 16), "sums": SHARED[32:64].view(2, 16)},
        "sums: it shares memory with norm",
    ),
    (
        {"norm": SHARED[:64].view(4, 16), "dweight": SHARED[:128].view(8, 16, 1, 1)},
        "dweight: it shares memory with norm",
    ),
    ({"sums": SHARED[:32].view(2, 16), "out": PIXELS}, "out: it shares memory with sums"),
    (
        {"dweight": SHARED[:128].view(8, 16, 1, 1), "out": PIXELS},
        "out: it shares memory with dweight",
    ),
    (
        {"sums": SHARED[:32].view(2, 16), "dweight": SHARED[:128].view(8, 16, 1, 1)},
        "sums: it shares memory with dweight",
    ),
]


@needs_cuda_build
@pytest.mark.parametrize(("changes", "said"), BAD, ids=[said for _, said in BAD])
def test_bad_arguments_are_named(changes, said):
    with pytest.raises(RuntimeError) as caught:
        torch.ops.resnet_fused.conv_bn_grad1x1_out(*arguments(**changes).values())
    assert said in str(caught.value)


@needs_cuda_build
def test_each_argument_arrives_under_its_own_name(monkeypatch):
    given = arguments(configuration=2, splits=3)
    got: list[object] = []
    monkeypatch.setattr(_cuda_plan, "raw", lambda op, part: lambda *one: got.extend(one))
    read = [given[name] for name in list(given)[:7]]
    written = [given[name] for name in ("out", "sums", "dweight")]
    _cuda_grad1x1.launch(*read, *written, 2, wish=(2, 3))
    schema = torch._C._get_schema(f"resnet_fused::{OP}_out", "")
    assert [argument.name for argument in schema.arguments] == list(given)
    for name, value in zip(given, got, strict=True):
        same = value is given[name] if isinstance(value, torch.Tensor) else value == given[name]
        assert same, name


@needs_cuda_build
def test_what_the_kernel_cannot_read_or_write_is_copied(monkeypatch):
    """Into channels_last, and out of it."""

    def run(*given):
        dz, *_, out, sums, dweight = given
        assert all(t is None or t.dim() == 2 or _cuda_grad1x1.in_rows(t) for t in given[:7])
        assert torch.equal(dz, dense) and dz.data_ptr() != dense.data_ptr()
        for t in (out, sums, dweight):
            t.fill_(3)

    dense = torch.randn(2, 8, 5, 5).to(BF16)
    given = arguments(dz=dense)
    monkeypatch.setattr(_cuda_plan, "raw", lambda op, part: run)
    out = torch.zeros(2, 16, 5, 5, dtype=BF16)
    read = [given[name] for name in list(given)[:7]]
    _cuda_grad1x1.launch(*read, out, given["sums"], given["dweight"], 2, wish=(0, 1))
    assert (out == 3).all() and out.is_contiguous()
    made = _cuda_grad1x1.problem_of(read, out.to("meta"), 2, real=False)
    assert made.operands[0].is_meta and made.operands[1] is read[1] and made.out.stride(1) == 1


@needs_cuda_build
def test_what_no_configuration_takes_is_plain_pytorchs(monkeypatch):
    monkeypatch.setattr(_cuda_plan, "gpu", lambda device: H200)
    monkeypatch.setattr(_admitted, "names", lambda *_: None)
    dz, x, weight = torch.randn(2, 4, 3, 3), torch.randn(2, 8, 3, 3), torch.randn(4, 8, 1, 1)
    given = (dz, dz, torch.randn(3, 4), x, torch.randn(4, 8), weight, x)
    results = torch.empty_like(x), torch.empty(2, 8), torch.empty_like(weight)
    with pytest.warns(UserWarning, match="float32 .*; plain PyTorch computes it"):
        _cuda_grad1x1.launch(*given, *results, 1)
    wanted = overload(OP, "reference")(*given, weight, False, 1)
    assert all(map(torch.equal, results, wanted))
    nothing = (dz[:0], dz[:0], given[2], x[:0], given[4], weight, None)
    _cuda_grad1x1.launch(*nothing, x[:0], *results[1:], 1)
    assert not results[1].any() and not results[2].any()


# The way of a node.


def chosen(x, filters, about=H200, **how):
    return _cuda_grad1x1.choose(BF16, x, filters, about, **how)


@needs_cuda_build
def test_it_is_taken_where_it_is_predicted_faster():
    def against(x, filters, about=H200, **how):
        """One kernel's cycles, of two kernels'."""
        why = chosen(x, filters, about, **how).why
        merged, apart = (float(word) for word in why.split() if word.isdigit())
        return merged / apart

    expanding, reducing = (256, 64, 56, 56), (256, 256, 56, 56)
    assert chosen(expanding, 256, masked=True).merged
    assert 0.4 < against(expanding, 256, masked=True) < against(expanding, 256, A100, masked=True)
    # By wgmma reductions too, and blocks that share the pixels and read dz and y from L2.
    for filters in (64, 128):
        assert chosen(reducing, filters).merged
        assert not chosen(reducing, filters, A100).merged
    # A near tie goes to two kernels.
    assert _cuda_grad1x1.WORTH < against((256, 512, 28, 28), 128) < 1
    assert _cuda_grad1x1.WORTH < against(reducing, 64, A100) < 1 < against(reducing, 128, A100)
    assert chosen((256, 64, 56, 56), 264).why.endswith("more filters than a block keeps")
    assert chosen((0, 64, 56, 56), 256) == (False, "an empty batch")
    assert not chosen((256, 63, 56, 56), 256).merged
    half = frozenset({"64x64_8w3s"})
    assert "more filters" in chosen((256, 64, 56, 56), 256, names=half).why


@needs_cuda_build
def test_two_kernels_are_not_taken_to_be_faster_than_memory(monkeypatch):
    plan = _cuda_plan.plan
    monkeypatch.setattr(_cuda_plan, "plan", lambda *given: plan(*given)._replace(cycles=1.0))
    _cuda_grad1x1.choose.cache_clear()
    # Both read dz and y of 256 filters and x; one of them writes dx.
    apart = chosen((256, 64, 56, 56), 256, masked=True).why.split()[-1]
    _cuda_grad1x1.choose.cache_clear()
    assert abs(int(apart) - (2 * 1024 + 3 * 128) * 256 * 56 * 56 / 22 / 132e3) < 2


@needs_cuda_build
@pytest.mark.parametrize("about", [H200, A100], ids=["H200", "A100"])
def test_the_page_s_cycles_are_the_plans(about):
    """Of docs/training_cuda.md: K x C, thousands of cycles of one kernel and of two."""
    page = (ROOT / "docs" / "training_cuda.md").read_text()
    row = r"^\| (\d+) x (\d+) \| (.*?) \| .*? \| (\d+), (\d+) \| (\d+), (\d+) \|$"
    found = re.findall(row, page, re.MULTILINE)
    assert len(found) == 5
    for filters, channels, which, *cycles in found:
        said = _cuda_grad1x1.choose(
            BF16, (256, int(channels), 56, 56), int(filters), about, masked="masked" in which
        ).why
        wanted = cycles[:2] if about == H200 else cycles[2:]
        assert [word for word in said.split() if word.isdigit()] == wanted


@pytest.fixture
def asked(monkeypatch):
    """way() on a pretended H200 where the CUDA kernel is admitted."""
    entry = next(e for e in backends.implementations(OP) if e.name == "cuda")
    monkeypatch.setattr(backends, "choose", lambda call: backends.Choice(entry, "pretended"))
    monkeypatch.setattr(_cuda_plan, "gpu", lambda device: H200)
    monkeypatch.setattr(_admitted, "names", lambda *_: None)

    def ask(x=(256, 64, 56, 56), filters=256, dtype=BF16):
        return _grad1x1.way(
            torch.device("cuda"), dtype, x, (filters, x[1], 1, 1), _grad1x1.GEOMETRY, folds=True,
            masked=True,
        )  # fmt: skip

    yield ask
    _grad1x1._word.cache_clear()


@needs_cuda_build
def test_a_node_s_way(asked, monkeypatch):
    assert asked().merged and "thousand cycles predicted" in asked().why
    assert "more filters" in asked(filters=264).why
    assert "float32" in asked(dtype=torch.float32).why
    monkeypatch.setattr(_admitted, "names", lambda *_: frozenset({"256x64_8w3s"}))
    assert not asked(x=(256, 256, 56, 56), filters=128).merged
    with _grad1x1.preferring("always"):
        assert asked(x=(256, 256, 56, 56), filters=128).merged
        assert not asked(filters=264).merged
    calls = []
    tuned = _tuned.Tuned(_grad1x1.TWO, 1, 1.2, 1.1, 1.3, "other")
    monkeypatch.setattr(_tuned, "find", lambda *call: calls.append(call) or tuned)
    assert not asked().merged and calls[0][0] == "cuda"


@needs_cuda_build
def test_the_op_takes_the_kernel_where_it_is_chosen(asked, monkeypatch):
    public = importlib.import_module(f"resnet_fused.ops.{OP}")
    ran = []
    monkeypatch.setattr(public, "overload", lambda op, name: lambda *one: ran.append((op, name)))
    dz, x, weight = image(2, 16, 4, 4), image(2, 8, 4, 4), image(16, 8, 1, 1)
    public.conv_bn_grad1x1(dz, x, weight)
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
