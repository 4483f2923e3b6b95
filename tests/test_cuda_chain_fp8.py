"""conv_chain_fp8's CUDA kernel as far as it goes without a GPU: arguments, choice, self-check.

What it computes is tested in the emulator (test_emulated_chain_fp8.py).
"""

from __future__ import annotations

import dataclasses
import importlib

import emulated
import emulated_chains_fp8 as chains
import pytest
import torch
from emulated_fp8 import conv_chain_fp8
from fp8_operands import E4M3

import resnet_fused as rf
from resnet_fused import admission, backends, numerics
from resnet_fused.cases import RESNET50_CHAINS, ChainCase
from resnet_fused.ops import _chain_plan, _cuda, _cuda_chain_fp8, _cuda_plan
from resnet_fused.ops import _cuda_chain_fp8_checks as checks
from resnet_fused.ops._results import FORMS

op = importlib.import_module("resnet_fused.ops.conv_chain_fp8")
OP = "conv_chain_fp8"
CASE = ChainCase("case", 2, 48, 7, 9, 80, 48)

needs_kernel = pytest.mark.skipif(
    not _cuda_plan.exists(OP), reason="the extension was built without nvcc"
)


def options(case):
    return case.projection_stride, case.out_stride, *checks.SCALES


def by_emulator(*arguments, wish=None, **flow):
    """In the place of `_cuda_chain_fp8.launch`."""
    count = len(FORMS[OP].operands)
    out, following, *rest = arguments[count:]
    settings = {} if wish is None or wish[0] < 0 else {"configuration": wish[0], "splits": wish[1]}
    with emulated.using(**settings):
        got = conv_chain_fp8(*arguments[:count], *rest)
    for target, result in zip((out, following), got, strict=True):
        target.copy_(result)


@needs_kernel
def test_configurations_have_names_of_their_own():
    names = _cuda_plan.configurations(OP)
    assert len(set(names)) == len(names) == 5
    assert all(name.startswith(_cuda_plan.TMA) for name in names)
    kernel = next(k for k in admission.kernels() if (k.op, k.implementation) == (OP, "cuda"))
    assert kernel.list_configurations() == names == checks.conv_chain_fp8_configurations()


@needs_kernel
def test_predictions_are_beside_conv_bn_act_fp8():
    """A chain in e4m3 takes less than its parts in that, and than the chain in 16 bits."""
    for number, config in ((0, "tma_128x64_6s_k64_d64"), (1, "tma_128x64_8s_k64")):
        case = dataclasses.replace(RESNET50_CHAINS[number], n=256)
        found = _chain_plan.predict_cuda(case, E4M3, emulated.H200)
        wide = _chain_plan.predict_cuda(case, torch.bfloat16, emulated.H200)
        assert not isinstance(found, str) and not isinstance(wide, str)
        assert found.config == config and found.gain > 20
        assert 0.45 * wide.chain < found.chain < 0.75 * wide.chain
    refused = _chain_plan.predict_cuda(case, E4M3, emulated.A100)
    assert "for GPUs of capability 9.0" in str(refused)


# Arguments: refused in the order of the checks, on the CPU too.


def image(*shape, dtype=E4M3):
    return torch.zeros(shape).contiguous(memory_format=torch.channels_last).to(dtype)


def arguments(**changes):
    made = {
        "x": image(2, 16, 5, 5), "weight": image(32, 16, 1, 1), "scale": torch.ones(32),
        "shift": torch.zeros(32), "residual": image(2, 32, 5, 5), "projected": None,
        "projection_weight": None, "projection_scale": None, "projection_shift": None,
        "next_weight": image(16, 32, 1, 1), "next_scale": torch.ones(16),
        "next_shift": torch.zeros(16), "front_weight": None, "front_scale": None,
        "front_shift": None, "projection_stride": 1, "out_stride": 1, "residual_factor": 0.5,
        "projection_factor": 2.0, "out_factor": 0.5, "next_factor": 1.0, "dependent": False,
        "follows": True, "configuration": -1, "splits": 0, "out": image(2, 32, 5, 5),
        "following": image(2, 16, 5, 5),
    }  # fmt: skip
    return made | changes


SHARED = image(2, 32, 5, 5)
BAD = [
    ({"x": image(2, 16, 5, 5, dtype=torch.half)}, "x: expected float8_e4m3fn, got float16"),
    ({"weight": image(32, 16, 1, 1, dtype=torch.half)}, "weight: expected x's dtype"),
    ({"weight": image(32, 8, 1, 1)}, "weight: expected [K, 16, 1, 1]"),
    ({"residual": image(2, 32, 5, 4)}, "residual: expected the output's shape"),
    ({"residual": None}, "residual, projected: expected one of them, got neither"),
    ({"out": image(2, 32, 5, 5, dtype=torch.half)}, "out: expected x's dtype"),
    ({"following": image(2, 16, 5, 4)}, "following: expected next's shape"),
    ({"out_stride": 3}, "out_stride: expected 1 to 2"),
    ({"scale": torch.ones(16)}, "scale: expected shape [32]"),
    ({"next_shift": None}, "next_scale, next_shift: expected with next_weight"),
    ({"out": SHARED, "residual": SHARED}, "out: it shares memory with residual"),
    ({}, "conv_chain_fp8_out: expected CUDA tensors"),
]


@needs_kernel
@pytest.mark.parametrize(("changes", "said"), BAD, ids=[said for _, said in BAD])
def test_bad_arguments_are_named(changes, said):
    with pytest.raises(RuntimeError) as caught:
        torch.ops.resnet_fused.conv_chain_fp8_out(*arguments(**changes).values())
    assert said in str(caught.value)


@needs_kernel
def test_each_argument_arrives_under_its_own_name(monkeypatch):
    case = dataclasses.replace(CASE, projected=16)
    operands = chains.operands_of(case)
    results = image(*case.stored_shape), image(case.n, case.m, case.h, case.w)
    schema, got = torch._C._get_schema(f"resnet_fused::{OP}_out", ""), []
    monkeypatch.setattr(_cuda_plan, "raw", lambda op, part: lambda *given: got.extend(given))
    given = (*operands, *results, *options(case))
    assert _cuda_chain_fp8.launch(*given, wish=(3, 1), follows=True) is False
    residual, out, following, _ = checks.SCALES
    named = {
        **operands._asdict(), "projection_stride": 1, "out_stride": 1,
        "residual_factor": residual, "projection_factor": 1 / residual, "out_factor": 1 / out,
        "next_factor": 1 / following, "dependent": False, "follows": True, "configuration": 3,
        "splits": 1, "out": results[0], "following": results[1],
    }  # fmt: skip
    names = [argument.name for argument in schema.arguments]
    assert names == list(named) and len(names) == len(got)
    for name, value in zip(names, got, strict=True):
        same = value is named[name] if isinstance(value, torch.Tensor) else value == named[name]
        assert same, name


@needs_kernel
def test_what_lies_otherwise_is_copied(monkeypatch):
    """Operands before the launch, results behind it; what follows waits for the copies."""
    operands = numerics.ChainOperands(
        *(t if t is None or t.dim() == 1 else t.contiguous() for t in chains.operands_of(CASE))
    )
    out, following = (torch.empty(2, count, 7, 9).to(E4M3) for count in (CASE.c, CASE.m))
    given = []

    def launched(*arguments):
        given.extend(arguments)
        for result in arguments[-2:]:
            result.fill_(1.0)

    monkeypatch.setattr(_cuda_plan, "raw", lambda op, part: launched)
    call = (*operands, out, following, *options(CASE))
    assert _cuda_chain_fp8.launch(*call, wish=(0, 1), follows=True) is True
    names = [one.name for one in torch._C._get_schema(f"resnet_fused::{OP}_out", "").arguments]
    assert given[names.index("follows")] is False
    images = [t for t in given if isinstance(t, torch.Tensor) and t.dim() == 4]
    assert len(images) == 6 and all(t.stride(1) == 1 for t in images)
    assert (out.float() == 1).all() and (following.float() == 1).all()


# Who serves a call, and why not.


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


def named_call(operands, case):
    """Arguments of the public op."""
    given = operands._asdict()
    first = [given.pop(name) for name in ("x", "weight", "scale", "shift")]
    names = ("residual_scale", "out_scale", "next_out_scale", "front_out_scale")
    scales = dict(zip(names, checks.SCALES, strict=True))
    return first, given | scales | {"out_stride": case.out_stride}


@needs_kernel
@pytest.mark.emulated
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_the_op_takes_it_by_name(layout, served):
    operands = numerics.ChainOperands(
        *(
            t if t is None or t.dim() == 1 else t.contiguous(memory_format=layout)
            for t in chains.operands_of(CASE)
        )
    )
    first, rest = named_call(operands, CASE)
    with rf.backend("cuda"):
        got = rf.ops.conv_chain_fp8(*first, **rest)
    assert served == [OP] and not chains.wrong(got, operands, CASE)


@needs_kernel
def test_what_it_cant_take_goes_to_the_next_one_with_the_reason(served):
    case = dataclasses.replace(CASE, k=40)
    operands = checks.operands_of(case)
    choice = op.choose((*operands, *options(case)))
    assert choice.implementation.name == "parts" and not served
    assert "x cannot be moved 16 bytes at a time" in dict(choice.refused)["cuda"]


def test_it_stands_before_its_parts():
    names = [entry.name for entry in backends.implementations(OP)]
    assert names[:3] == ["cuda", "parts", "reference"]


# The self-check, on the emulator.


@needs_kernel
@pytest.mark.emulated
def test_the_self_check_passes_right_kernels_and_no_wrong_ones(monkeypatch):
    cases_of = checks.cases_of  # as many tiles as the last one's take minutes here
    monkeypatch.setattr(checks, "cases_of", lambda name: cases_of(name)[:-1])
    for name in checks.conv_chain_fp8_configurations():
        checks.check(name, "cpu", by_emulator, emulated.H200)

    def wrong(*arguments, **more):
        by_emulator(*arguments, **more)
        last = arguments[len(FORMS[OP].operands) + 1]
        last[-1, -1, -1, -1] = 3.0 if last[-1, -1, -1, -1] != 3.0 else 5.0

    with pytest.raises(ArithmeticError, match="next: 1 of .* elements are wrong"):
        checks.check(name, "cpu", wrong, emulated.H200)
    with pytest.raises(ArithmeticError, match="NaN or not written"):
        checks.check(name, "cpu", lambda *_, **__: None, emulated.H200)
    with pytest.raises(ValueError, match="accepted are 'tma_128x64_8s_k64'"):
        checks.check("1x1", "cpu", by_emulator, emulated.H200)
    checks.check(name, "cpu", wrong, emulated.A100)  # no plan takes it there


def test_every_result_of_the_self_check_is_seen():
    """Its results are not all saturated, and not all zeros."""
    for case in checks.cases_of("tma_128x64_8s_k64")[:-1]:
        operands = checks.operands_of(case, torch.Generator().manual_seed(7))
        strides = case.projection_stride, case.out_stride
        for y in numerics.conv_chain_fp8_expected(operands, *strides, checks.SCALES):
            assert len(y.float().unique()) > 8
