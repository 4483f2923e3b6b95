"""The CUDA kernels of `stem` and `head` as implementations: plans, reasons, arguments, the choice.

What the kernels compute is tested in the emulator; where a test needs a result, it stands in for a
GPU.
"""

from __future__ import annotations

import importlib

import emulated
import pytest
import torch

import resnet_fused as rf
from resnet_fused import _extension, admission, backends, numerics, ops  # noqa: F401
from resnet_fused.cases import STEM_CASES, StemCase
from resnet_fused.ops import _cuda, _cuda_plan, _cuda_stem
from resnet_fused.ops._library import overload
from resnet_fused.triton._tiles import Limits

H200 = (132, 232448, 233472)
HALF = torch.float16
CASE = StemCase("usual", 2, 3, 12, 14, 16)
POOL = ([3, 3], [2, 2], [1, 1])
stem_module = importlib.import_module("resnet_fused.ops.stem")
head_module = importlib.import_module("resnet_fused.ops.head")

needs_cuda_build = pytest.mark.skipif(
    not _extension.has_cuda_kernels(), reason="the extension was built without nvcc"
)


def images(n: int = 256, c: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and filters as ImageNet's, on the meta device."""
    x = torch.empty(n, c, 224, 224, dtype=torch.uint8, device="meta")
    return x, torch.empty(64, c, 7, 7, dtype=torch.bfloat16, device="meta")


# Plans.


@needs_cuda_build
@pytest.mark.parametrize(("op", "count"), [("stem", 5), ("head", 3)])
def test_configurations_have_names_of_their_own(op, count):
    names = _cuda_plan.configurations(op)
    assert len(set(names)) == len(names) == count
    kernel = next(k for k in admission.kernels() if (k.op, k.implementation) == (op, "cuda"))
    assert kernel.list_configurations() == names


@needs_cuda_build
def test_plans_choose_among_what_may_be_used():
    out = torch.empty(256, 64, 56, 56, dtype=torch.bfloat16, device="meta")
    problem = _cuda_stem.stem_problem(*images(), ([2, 2], [3, 3], *POOL), out)
    found = _cuda_plan.choose(problem, H200, None)
    assert (found.name, found.splits, found.workspace_bytes) == ("56x64_8w", 1, 0)
    other = _cuda_plan.choose(problem, H200, frozenset({"28x64_4w"}))
    assert other.name == "28x64_4w" and other.cycles >= found.cycles
    assert "none was admitted" in _cuda_plan.choose(problem, H200, frozenset()).why
    x = torch.empty(32, 2048, 7, 7, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(1000, 2048, dtype=torch.bfloat16, device="meta")
    head = _cuda_stem.head_problem(x, weight, torch.empty(32, 1000).bfloat16())
    assert _cuda_plan.choose(head, H200, None).workspace_bytes == 32 * 2048 * 2


@needs_cuda_build
def test_e4m3_is_for_gpus_that_convert_to_it():
    out = torch.empty(256, 64, 56, 56, dtype=torch.float8_e4m3fn, device="meta")
    problem = _cuda_stem.stem_problem(*images(), ([2, 2], [3, 3], *POOL), out)
    for capability in (89, 90, 120):
        assert _cuda_plan.choose(problem, (*H200[:3], capability), None).configuration >= 0
    for gpu in ((*H200[:3], 80), (*H200[:3], 86), H200[:3]):
        assert "capability 8.9 are the first" in _cuda_plan.choose(problem, gpu, None).why


@needs_cuda_build
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"pool": ([2, 2], [2, 2], [0, 0])}, "pooling 3 x 3 with stride 2 and padding 1"),
        ({"stride": [1, 1]}, "7 x 7 with stride 2"),
        ({"c": 5}, "1 to 4 are possible"),
        ({"n": 1 << 28}, "more than a launch can take"),
    ],
)
def test_what_the_stem_is_not_made_for_goes_elsewhere(changed, said, monkeypatch):
    monkeypatch.setattr(_cuda_plan, "gpu", lambda device: H200)
    x, weight = images(changed.get("n", 2), changed.get("c", 3))
    if "n" in changed:
        x = torch.empty(changed["n"], 3, 7, 4096, dtype=torch.uint8, device="meta")
    given = (x, weight, changed.get("stride", [2, 2]), [3, 3], changed.get("pool", POOL))
    reason = stem_module.unfit(*given, implementation="cuda")
    assert reason is not None and said in reason
    assert stem_module.unfit(*given, implementation="parts") is None
    assert stem_module.unfit(*images(), [2, 2], [3, 3], POOL, implementation="cuda") is None


@needs_cuda_build
def test_a_head_beyond_a_launch_has_a_reason(monkeypatch):
    monkeypatch.setattr(_cuda_plan, "gpu", lambda device: H200)
    weight = torch.empty(10, 8, dtype=HALF, device="meta")
    assert _cuda_stem.unfit_head(torch.empty(4, 8, 2, 2, dtype=HALF, device="meta"), weight) is None
    many = torch.empty(1 << 21, 8, 1, 1, dtype=HALF, device="meta")
    assert "more than a launch" in (_cuda_stem.unfit_head(many, weight) or "")


def test_what_the_kernels_serve(monkeypatch):
    monkeypatch.setattr(admission, "refusal", lambda call, implementation: None)
    monkeypatch.setattr(_extension, "has_cuda_kernels", lambda: True)
    monkeypatch.setattr(_extension, "available", lambda: True)
    monkeypatch.setattr(_cuda_plan, "exists", lambda op: True)

    def refused(device: str, dtype: torch.dtype) -> str | None:
        return _cuda_stem.supports(backends.Call("stem", device, dtype, index=0))

    assert refused("cuda", torch.bfloat16) is refused("cuda", HALF) is None
    assert refused("cuda", torch.float32) == "the CUDA kernel multiplies bfloat16 and float16"
    assert "no CUDA kernel for torch.float64" in (refused("cuda", torch.float64) or "")
    assert refused("cpu", torch.float32) == "x is on cpu"
    for op in ("stem", "head"):
        names = [entry.name for entry in backends.implementations(op)]
        assert names.index("cuda") < names.index("triton") < names.index("parts")


# Arguments: refused in the order of the checks, on the CPU too.


def stem_arguments(**changes):
    made = {
        "x": torch.zeros(2, 3, 12, 14, dtype=torch.uint8),
        "weight": torch.zeros(8, 3, 7, 7, dtype=HALF),
        "scale": torch.ones(8),
        "shift": torch.zeros(8),
        "input_norm": torch.ones(2, 3),
        "stride": [2, 2],
        "padding": [3, 3],
        "pool_kernel": [3, 3],
        "pool_stride": [2, 2],
        "pool_padding": [1, 1],
        "out_factor": 2.0,
        "dependent": False,
        "follows": True,
        "configuration": -1,
        "splits": 0,
        "out": torch.zeros(2, 8, 3, 4, dtype=HALF),
    }
    return made | changes


def head_arguments(**changes):
    made = {
        "x": torch.zeros(2, 16, 3, 3, dtype=HALF),
        "weight": torch.zeros(5, 16, dtype=HALF),
        "bias": torch.zeros(5, dtype=HALF),
        "dependent": False,
        "follows": True,
        "configuration": -1,
        "splits": 0,
        "out": torch.zeros(2, 5, dtype=HALF),
    }
    return made | changes


E4M3 = torch.float8_e4m3fn
OUT = torch.zeros(2, 8, 3, 4, dtype=HALF)
BAD = [
    ("stem", {"x": torch.zeros(2, 3, 12, dtype=torch.uint8)}, "x: expected 4 dimensions"),
    ("stem", {"x": torch.zeros(2, 3, 12, 14).bfloat16()}, "x: expected uint8, float32 or weight's"),
    ("stem", {"weight": torch.zeros(8, 3, 7, 7).double()}, "weight: expected bfloat16, float16"),
    ("stem", {"weight": torch.zeros(8, 4, 7, 7, dtype=HALF)}, "weight: expected [K, 3, R, S]"),
    ("stem", {"stride": [0, 2]}, "stride: expected 1 to"),
    ("stem", {"pool_stride": [2]}, "pool_stride: expected 2 integers, got [2]"),
    ("stem", {"pool_kernel": [9, 9]}, "pool_kernel: it spans 9 of 8 padded pixels"),
    ("stem", {"scale": torch.ones(7)}, "scale: expected shape [8]"),
    ("stem", {"shift": torch.zeros(8).half()}, "shift: expected float32"),
    ("stem", {"input_norm": torch.ones(3, 2)}, "input_norm: expected a factor and a summand"),
    ("stem", {"input_norm": torch.ones(2, 3).half()}, "input_norm: expected scale's dtype"),
    ("stem", {"input_norm": torch.ones(3, 2).t()}, "input_norm: expected a contiguous tensor"),
    ("stem", {"out": OUT[:1]}, "out: expected the pooled shape [2, 8, 3, 4]"),
    ("stem", {"out": OUT.float()}, "out: expected weight's dtype"),
    ("stem", {"out": OUT[:1].expand(2, 8, 3, 4)}, "out: its elements share memory"),
    ("stem", {"out": OUT.to(E4M3)[:1]}, "out: expected the pooled shape [2, 8, 3, 4]"),
    ("stem", {"out": OUT.to(E4M3)}, "stem_out: expected CUDA tensors"),
    ("stem", {}, "stem_out: expected CUDA tensors"),
    ("head", {"x": torch.zeros(2, 16, 3, dtype=HALF)}, "x: expected 4 dimensions"),
    ("head", {"weight": torch.zeros(5, 15, dtype=HALF)}, "weight: expected [classes, 16]"),
    ("head", {"weight": torch.zeros(5, 16)}, "weight: expected x's dtype"),
    ("head", {"bias": torch.zeros(4, dtype=HALF)}, "bias: expected one value a class"),
    ("head", {"out": torch.zeros(5, 2, dtype=HALF).t()}, "out: expected a contiguous tensor"),
    ("head", {"out": torch.zeros(2, 4, dtype=HALF)}, "out: expected images and classes"),
    ("head", {}, "head_out: expected CUDA tensors"),
]


@needs_cuda_build
@pytest.mark.parametrize(("op", "changes", "said"), BAD, ids=[said for _, _, said in BAD])
def test_bad_arguments_are_named(op, changes, said):
    given = (stem_arguments if op == "stem" else head_arguments)(**changes)
    with pytest.raises(RuntimeError) as caught:
        getattr(torch.ops.resnet_fused, f"{op}_out")(*given.values())
    assert said in str(caught.value)


@needs_cuda_build
@pytest.mark.parametrize("op", ["stem", "head"])
def test_each_argument_arrives_under_its_own_name(op, monkeypatch):
    named = (stem_arguments if op == "stem" else head_arguments)(configuration=1, splits=2)
    got: list[object] = []
    schema = torch._C._get_schema(f"resnet_fused::{op}_out", "")
    monkeypatch.setattr(_cuda_plan, "raw", lambda op, part: lambda *given: got.extend(given))
    if op == "stem":
        keys = ("x", "weight", "scale", "shift", "input_norm", "out", "stride", "padding")
        pool = [named[f"pool_{name}"] for name in ("kernel", "stride", "padding")]
        given = (*(named[key] for key in keys), *pool, 0.5)
        _cuda_stem.launch_stem(*given, wish=(1, 2), follows=True)
    else:
        given = (named[key] for key in ("x", "weight", "bias", "out"))
        _cuda_stem.launch_head(*given, wish=(1, 2), follows=True)
    names = [argument.name for argument in schema.arguments]
    assert names == list(named) and len(names) == len(got)
    for name, value in zip(names, got, strict=True):
        same = value is named[name] if isinstance(value, torch.Tensor) else value == named[name]
        assert same, name


# As implementations, the emulator in place of a GPU.


@pytest.fixture
def ran(monkeypatch):
    """The CUDA kernels serve calls on the CPU; the ops that were launched."""
    launched: list[str] = []
    for op in ("stem", "head"):
        entry = next(entry for entry in backends.implementations(op) if entry.name == "cuda")
        monkeypatch.setitem(entry.__dict__, "supports", lambda call: None)

        def launch(*given, op=op, **more):
            place = 5 if op == "stem" else 3
            y = overload(op, emulated.NAME)(*given[:place], *given[place + 1 :])
            given[place].copy_(y)
            launched.append(op)

        monkeypatch.setitem(_cuda._launches, op, launch)
    monkeypatch.setattr(_cuda_plan, "gpu", lambda device: H200)
    monkeypatch.setattr(_cuda_plan._admitted, "names", lambda *_: None)
    backends.forget_choices()
    yield launched
    backends.forget_choices()


@pytest.mark.emulated
@needs_cuda_build
def test_the_ops_take_the_kernels_that_are_asked_for(ran):
    given = numerics.exact_stem_inputs(CASE, HALF, torch.Generator().manual_seed(0))
    expected = numerics.stem_oracle(*given, *CASE.geometry).to(HALF)
    weight = torch.ones(5, 16, dtype=HALF)
    for form in (torch.channels_last, torch.contiguous_format):
        with rf.backend("cuda"):
            y = rf.ops.stem(given[0].contiguous(memory_format=form), *given[1:])
            logits = rf.ops.head(y, weight)
        assert torch.equal(y, expected)
        assert y.is_contiguous(memory_format=form)
        assert logits.shape == (2, 5)
    assert ran == ["stem", "head"] * 2


@pytest.mark.emulated
@needs_cuda_build
def test_e4m3_is_asked_for_by_its_scale_and_refused_where_it_is_unknown(ran, monkeypatch):
    given = numerics.exact_stem_inputs(CASE, HALF, torch.Generator().manual_seed(0))
    oracle = numerics.stem_oracle(*given, *CASE.geometry, out_scale=0.25)
    expected = numerics.conv_bn_act_fp8_expected(oracle, E4M3).to(E4M3).float()
    with rf.backend("cuda"):
        assert torch.equal(rf.ops.stem(*given, out_scale=0.25).float(), expected)
        assert ran == ["stem"]
        monkeypatch.setattr(stem_module._limits, "limits", lambda _: Limits(108, 166912, 80, ""))
        choice = stem_module.choose(given[0], given[1], [2, 2], [3, 3], POOL, 0.25)
        assert "sm_80 converts nothing to e4m3" in dict(choice.refused)["cuda"]
        assert torch.equal(rf.ops.stem(*given, out_scale=0.25).float(), expected)  # by the parts
        assert ran == ["stem"]
        assert rf.ops.stem(*given).dtype is HALF and ran == ["stem", "stem"]


@pytest.mark.emulated
@needs_cuda_build
def test_another_filter_goes_to_the_parts_and_says_why(ran):
    case = next(case for case in STEM_CASES if case.name == "one_channel")
    given = numerics.exact_stem_inputs(case, HALF, torch.Generator().manual_seed(0))
    stride, padding, *pool = case.geometry
    with rf.backend("cuda"):
        choice = stem_module.choose(given[0], given[1], stride, padding, pool)
        y = rf.ops.stem(*given, stride=stride, padding=padding)
    assert choice.implementation.name == "parts" or choice.implementation.name == "reference"
    assert "7 x 7 with stride 2" in dict(choice.refused)["cuda"]
    assert ran == []
    assert torch.equal(y, numerics.stem_oracle(*given, *case.geometry).to(HALF))
    with rf.backend("cuda"):
        x = torch.empty(1 << 21, 8, 1, 1, dtype=HALF, device="meta")
        weight = torch.empty(5, 8, dtype=HALF, device="meta")
        refused = dict(head_module.choose(x, weight).refused)
    assert "more than a launch" in refused["cuda"]
