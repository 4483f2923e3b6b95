"""conv_bn_act_fp8's CUDA kernel as far as it goes without a GPU: arguments, choice, self-check.

What it computes is tested in the emulator (test_emulated_conv_fp8.py).
"""

from __future__ import annotations

import dataclasses
import importlib

import emulated
import pytest
import torch
from fp8_operands import E4M3, exact_operands, same_bits

import resnet_fused as rf
from resnet_fused import _extension, admission, backends
from resnet_fused.cases import ConvCase
from resnet_fused.ops import _cuda, _cuda_fp8, _cuda_plan
from resnet_fused.ops import _cuda_fp8_checks as checks
from resnet_fused.ops._library import overload

op = importlib.import_module("resnet_fused.ops.conv_bn_act_fp8")
OP = "conv_bn_act_fp8"
CASE = ConvCase("case", 2, 48, 7, 9, 80, 3, 3, padding=(1, 1), residual=True)

needs_kernel = pytest.mark.skipif(
    not _cuda_plan.exists(OP), reason="the extension was built without nvcc"
)


def by_emulator(*arguments, wish=None, **flow):
    """In the place of `_cuda_fp8.launch`."""
    settings = {} if wish is None or wish[0] < 0 else {"configuration": wish[0], "splits": wish[1]}
    *given, out, stride, padding, dilation, groups, act, residual_scale, out_scale, dtype = (
        arguments
    )
    geometry = (list(stride), list(padding), list(dilation), groups)
    with emulated.using(**settings):
        out.copy_(
            overload(OP, emulated.NAME)(*given, *geometry, act, residual_scale, out_scale, dtype)
        )


@needs_kernel
def test_configurations_have_names_of_their_own():
    names = _cuda_plan.configurations(OP)
    assert len(set(names)) == len(names) == 11
    assert all(name.startswith(_cuda_plan.TMA) for name in names)
    kernel = next(k for k in admission.kernels() if (k.op, k.implementation) == (OP, "cuda"))
    assert kernel.list_configurations() == names == checks.conv_bn_act_fp8_configurations()


# Arguments: refused in the order of the checks, on the CPU too.


def image(*shape, dtype=E4M3):
    return torch.zeros(shape).contiguous(memory_format=torch.channels_last).to(dtype)


SHARED = image(2, 32, 5, 5)


def arguments(**changes):
    made = {
        "x": image(2, 16, 5, 5), "weight": image(32, 16, 3, 3), "scale": torch.ones(32),
        "shift": torch.zeros(32), "residual": image(2, 32, 5, 5), "stride": [1, 1],
        "padding": [1, 1], "dilation": [1, 1], "groups": 1, "relu": True, "residual_factor": 0.5,
        "out_factor": 2.0, "dependent": False, "follows": False, "configuration": -1, "splits": 0,
        "out": image(2, 32, 5, 5),
    }  # fmt: skip
    return made | changes


BAD = [
    ({"x": image(2, 16, 5, 5, dtype=torch.float16)}, "x: expected float8_e4m3fn, got float16"),
    ({"weight": image(32, 16, 3, 3, dtype=torch.float32)}, "weight: expected float8_e4m3fn"),
    ({"x": image(2, 16, 5, 5)[0]}, "x: expected 4 dimensions"),
    ({"weight": image(32, 8, 3, 3)}, "weight: expected [K, 16/groups, R, S]"),
    ({"out": image(2, 32, 5, 4)}, "out: expected the convolution's shape [2, 32, 5, 5]"),
    ({"out": image(2, 32, 5, 5, dtype=torch.float64)}, "out: expected bfloat16, float16 or"),
    ({"residual": image(2, 32, 5, 4)}, "residual: expected out's shape"),
    ({"residual": image(2, 32, 5, 5, dtype=torch.int32)}, "residual: expected"),
    ({"stride": [0, 1]}, "stride: expected 1 to"),
    ({"groups": 3}, "weight: expected [K, 16/groups"),
    ({"scale": torch.ones(16)}, "scale: expected shape [32]"),
    ({"shift": torch.zeros(32).half()}, "shift: expected float32"),
    ({"out": SHARED, "residual": SHARED}, "out: it shares memory with residual"),
    ({}, "conv_bn_act_fp8_out: expected CUDA tensors"),
]  # fmt: skip


@needs_kernel
@pytest.mark.parametrize(("changes", "said"), BAD, ids=[said for _, said in BAD])
def test_bad_arguments_are_named(changes, said):
    with pytest.raises(RuntimeError) as caught:
        torch.ops.resnet_fused.conv_bn_act_fp8_out(*arguments(**changes).values())
    assert said in str(caught.value)


def launch_arguments(operands, case, out):
    return (*operands.tuple(), out, *operands.options(case))


@needs_kernel
def test_each_argument_arrives_under_its_own_name(monkeypatch):
    operands = exact_operands(CASE).to_layout("nhwc")
    operands.weight = operands.weight.contiguous(memory_format=torch.channels_last)
    out = image(*CASE.output_shape)
    schema, got = torch._C._get_schema(f"resnet_fused::{OP}_out", ""), []
    monkeypatch.setattr(_cuda_plan, "raw", lambda op, part: lambda *given: got.extend(given))
    given = launch_arguments(operands, CASE, out)
    assert _cuda_fp8.launch(*given, wish=(2, 1), follows=True) is False
    named = {
        **{name: getattr(operands, name) for name in ("x", "weight", "scale", "shift", "residual")},
        "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1, "relu": True,
        "residual_factor": 0.5, "out_factor": 0.5, "dependent": False, "follows": True,
        "configuration": 2, "splits": 1, "out": out,
    }  # fmt: skip
    names = [argument.name for argument in schema.arguments]
    assert names == list(named) and len(names) == len(got)
    for name, value in zip(names, got, strict=True):
        same = value is named[name] if isinstance(value, torch.Tensor) else value == named[name]
        assert same, name


@needs_kernel
def test_what_lies_otherwise_is_copied(monkeypatch):
    """Operands before the launch, the result behind it; what follows waits for the copies."""
    operands = exact_operands(CASE)
    out, given = torch.empty(CASE.output_shape).to(E4M3), []

    def launched(*arguments):
        given.extend(arguments)
        arguments[-1].fill_(1.0)

    monkeypatch.setattr(_cuda_plan, "raw", lambda op, part: launched)
    call = launch_arguments(operands, CASE, out)
    assert _cuda_fp8.launch(*call, wish=(0, 1), follows=True) is True
    names = [one.name for one in torch._C._get_schema(f"resnet_fused::{OP}_out", "").arguments]
    assert given[names.index("follows")] is False
    images = [t for t in given if isinstance(t, torch.Tensor) and t.dim() == 4]
    assert len(images) == 4 and all(t.stride(1) == 1 for t in images)
    assert (out.float() == 1).all()


@needs_kernel
def test_a_plan_says_what_it_cannot_take():
    operands = exact_operands(CASE).to_layout("nhwc")
    geometry = (CASE.stride, CASE.padding, CASE.dilation, CASE.groups)

    def why(out_dtype=E4M3, about=emulated.H200, **changes):
        t = dataclasses.replace(operands, **changes)
        out = image(*CASE.output_shape, dtype=out_dtype)
        made = _cuda_fp8.problem_of((t.x, t.weight, t.residual), geometry, out, real=False)
        found = _cuda_plan.plan(made, about)
        return "" if found.configuration >= 0 else found.why

    assert why() == why(torch.bfloat16) == why(torch.float16) == why(residual=None) == ""
    assert "out: float32; float8_e4m3fn, bfloat16 and float16 are served" in why(torch.float32)
    wide = operands.residual.to(torch.bfloat16)
    assert "residual: bfloat16; float8_e4m3fn is served" in why(residual=wide)
    assert "for GPUs of capability 9.0" in why(about=emulated.A100)
    odd = why(x=image(2, 24, 7, 9), weight=image(80, 24, 3, 3))
    assert odd.startswith("no configuration serves it: x: strides")


# Who serves a call, and why not.


@pytest.fixture
def fit_gpu(monkeypatch):
    """A machine on which nothing but the op's own conditions speak against the kernel."""
    monkeypatch.setattr(admission, "refusal", lambda call, implementation: None)
    monkeypatch.setattr(_extension, "has_cuda_kernels", lambda: True)
    monkeypatch.setattr(_cuda_plan, "exists", lambda op: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def test_what_the_kernel_serves(fit_gpu, monkeypatch):
    monkeypatch.setattr(_cuda_plan, "gpu", lambda device: emulated.H200)
    assert _cuda.supports(backends.Call(OP, "cuda", E4M3, index=0)) is None
    assert "no CUDA kernel for" in str(_cuda.supports(backends.Call(OP, "cuda", torch.half)))
    assert "no CUDA kernel for" in str(_cuda.supports(backends.Call("conv_bn_act", "cuda", E4M3)))
    assert _cuda.supports(backends.Call(OP, "cpu", E4M3)) == "x is on cpu"
    monkeypatch.setattr(_cuda_plan, "gpu", lambda device: (108, 166912, 167936, 89))
    said = _cuda.supports(backends.Call(OP, "cuda", E4M3, index=0))
    assert said == "wgmma is for GPUs of capability 9.0, this one has 8.9"


@pytest.fixture
def served(monkeypatch):
    """The CUDA kernel serves calls on the CPU, launched in the emulator; what was launched."""
    ran = []

    def launch(*arguments, **more):
        ran.append(OP)
        by_emulator(*arguments, **more)

    entry = next(e for e in backends.implementations(OP) if e.name == "cuda")
    monkeypatch.setitem(entry.__dict__, "supports", lambda call: None)
    monkeypatch.setitem(_cuda._launches, OP, launch)
    monkeypatch.setattr(_cuda_plan, "gpu", lambda device: emulated.H200)
    backends.forget_choices()
    yield ran
    backends.forget_choices()


@needs_kernel
@pytest.mark.emulated
@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
def test_the_op_takes_it_by_name(layout, served):
    operands = exact_operands(CASE).to_layout(layout)
    with rf.backend("cuda"):
        y = rf.ops.conv_bn_act_fp8(*operands.tuple(), **operands.scales(), **CASE.geometry)
    assert served == [OP] and same_bits(y, operands.expected(CASE))


@needs_kernel
def test_what_it_cant_take_goes_to_the_next_one_with_the_reason(served):
    odd = dataclasses.replace(CASE, c=24, residual=False)
    operands = exact_operands(odd).to_layout("nhwc")
    weight = operands.weight.contiguous(memory_format=torch.channels_last)
    choice = op.choose(operands.x, weight, None, operands.options(odd))
    assert choice.implementation.name == "reference" and not served
    assert "x: strides[0] is 24" in dict(choice.refused)["cuda"]


def test_it_stands_behind_triton_and_before_plain_pytorch():
    names = [entry.name for entry in backends.implementations(OP)]
    assert names[:3] == ["triton", "cuda", "reference"]


# The self-check, on the emulator.


@needs_kernel
@pytest.mark.emulated
def test_the_self_check_passes_right_kernels_and_no_wrong_ones(monkeypatch):
    for name in checks.conv_bn_act_fp8_configurations():
        checks.check(name, "cpu", by_emulator, emulated.H200)
    monkeypatch.setattr(checks, "OUTS", (torch.float16,))

    def wrong(*arguments, **more):
        by_emulator(*arguments, **more)
        arguments[5][-1, -1, -1, -1] += 1

    with pytest.raises(ArithmeticError, match="1 of .* elements are wrong"):
        checks.check(name, "cpu", wrong, emulated.H200)
    with pytest.raises(ArithmeticError, match="NaN or not written"):
        checks.check(name, "cpu", lambda *_, **__: None, emulated.H200)
    with pytest.raises(ValueError, match="accepted are 'tma_p128x128_6s'"):
        checks.check("1x1", "cpu", by_emulator, emulated.H200)
    checks.check(name, "cpu", wrong, emulated.A100)  # no plan takes it there
