"""conv_chain's CUDA kernel as far as it goes without a GPU: arguments, plans, choice, self-check.

What it computes is tested in the emulator (test_emulated_chain.py).
"""

from __future__ import annotations

import dataclasses
import importlib

import emulated
import pytest
import torch

import resnet_fused as rf
from resnet_fused import _extension, admission, backends, numerics
from resnet_fused.cases import RESNET50_CHAINS, ChainCase
from resnet_fused.ops import _chain_plan, _cuda, _cuda_chain, _cuda_plan
from resnet_fused.ops import _cuda_chain_checks as checks
from resnet_fused.ops._results import FORMS

op = importlib.import_module("resnet_fused.ops.conv_chain")
OP = "conv_chain"
HALF = torch.float16
CASE = ChainCase("case", 2, 16, 7, 9, 40, 24)
PROJECTED = dataclasses.replace(CASE, projected=24, projection_stride=2, out_stride=2)
FRONT = dataclasses.replace(CASE, front=24)

needs_kernel = pytest.mark.skipif(
    not _cuda_plan.exists(OP), reason="the extension was built without nvcc"
)


def operands_of(case, dtype=HALF, layout=torch.channels_last):
    made = numerics.chain_operands(case, dtype, torch.Generator().manual_seed(0), exact=True)
    return numerics.ChainOperands(
        *(t if t is None or t.dim() == 1 else t.contiguous(memory_format=layout) for t in made)
    )


def options(case):
    return case.projection_stride, case.out_stride, False


def by_emulator(*arguments, wish=None):
    """In the place of `_cuda_chain.launch`."""
    names = FORMS[OP].operands
    out, following, *rest = arguments[len(names) :]
    settings = {} if wish is None or wish[0] < 0 else {"configuration": wish[0], "splits": wish[1]}
    with emulated.using(**settings):
        got = emulated.conv_chain(*arguments[: len(names)], *rest)
    for target, result in zip((out, following), got, strict=True):
        target.copy_(result)


# Plans.


@needs_kernel
def test_configurations_have_names_of_their_own():
    names = _cuda_plan.configurations(OP)
    assert len(set(names)) == len(names) == 26
    kernel = next(k for k in admission.kernels() if (k.op, k.implementation) == (OP, "cuda"))
    assert kernel.list_configurations() == names == checks.conv_chain_configurations()


@needs_kernel
def test_predictions_are_in_the_launches_own_cycles():
    without_tma = emulated.H200[:3]
    layer1 = dataclasses.replace(RESNET50_CHAINS[1], n=256)
    found = _chain_plan.predict_cuda(layer1, torch.bfloat16, without_tma)
    assert not isinstance(found, str)
    assert found.config == "128x64_4w3s" and found.gain > 20
    # Memory alone: 103 MB of x, 411 of the shortcut, of out and 103 of next, at 4.3 TB/s.
    assert found.chain / _chain_plan.CLOCK > 1.02e9 / 4.3e12
    # The projection's source takes the shortcut's place.
    first = dataclasses.replace(RESNET50_CHAINS[0], n=256)
    other = _chain_plan.predict_cuda(first, torch.bfloat16, without_tma)
    assert not isinstance(other, str) and other.gain > found.gain
    # With the 3x3 in front what that writes is neither written nor read.
    behind = dataclasses.replace(layer1, front=64)
    front = _chain_plan.predict_cuda(behind, torch.bfloat16, without_tma)
    assert not isinstance(front, str) and front.gain > found.gain + 50
    assert front.config == "256x64_8w3s_front64"
    assert front.chain / _chain_plan.CLOCK > 1.02e9 / 4.3e12
    names = frozenset({"64x64_4w3s"})
    left = _chain_plan.predict_cuda(layer1, torch.bfloat16, without_tma, names)
    assert not isinstance(left, str) and left.config == "64x64_4w3s"
    nothing = _chain_plan.predict_cuda(layer1, torch.bfloat16, without_tma, frozenset())
    by_tma = _chain_plan.predict_cuda(first, torch.bfloat16, emulated.H200)
    assert not isinstance(by_tma, str) and by_tma.config == "tma_128x64_3s_k64_d64_2c"
    assert by_tma.chain < other.chain
    # In the second stage two blocks share the filters.
    layer2 = next(case for case in RESNET50_CHAINS if case.name == "layer2")
    cut = [
        _chain_plan.predict_cuda(
            dataclasses.replace(layer2, n=256, front=front), torch.bfloat16, emulated.H200
        )
        for front in (0, 128)
    ]
    assert [one.config for one in cut] == [
        "tma_128x128_3s_k128_2c", "tma_win128x128_7s_front128_2c",
    ]  # fmt: skip
    assert cut[1].gain > cut[0].gain + 10
    assert nothing == "no admitted configuration serves it: none was admitted"


# Arguments: refused in the order of the checks, on the CPU too.


def image(*shape, dtype=HALF):
    return torch.zeros(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


def arguments(**changes):
    made = {
        "x": image(2, 16, 5, 5), "weight": image(24, 16, 1, 1), "scale": torch.ones(24),
        "shift": torch.zeros(24), "residual": image(2, 24, 5, 5), "projected": None,
        "projection_weight": None, "projection_scale": None, "projection_shift": None,
        "next_weight": image(8, 24, 1, 1), "next_scale": torch.ones(8),
        "next_shift": torch.zeros(8), "front_weight": None, "front_scale": None,
        "front_shift": None, "projection_stride": 1, "out_stride": 1, "reverse": False,
        "dependent": False, "follows": True, "configuration": -1, "splits": 0,
        "out": image(2, 24, 5, 5), "following": image(2, 8, 5, 5),
    }  # fmt: skip
    return made | changes


PROJECTION = {
    "residual": None, "projected": image(2, 8, 9, 9), "projection_weight": image(24, 8, 1, 1),
    "projection_scale": torch.ones(24), "projection_shift": torch.zeros(24),
    "projection_stride": 2,
}  # fmt: skip
IN_FRONT = {
    "x": image(2, 8, 5, 5), "front_weight": image(16, 8, 3, 3), "front_scale": torch.ones(16),
    "front_shift": torch.zeros(16),
}  # fmt: skip
SHARED = image(2, 24, 5, 5)
BAD = [
    ({"x": torch.zeros(2, 16, 5).half()}, "x: expected 4 dimensions"),
    ({"x": image(2, 16, 5, 5, dtype=torch.float64)}, "got float64"),
    ({"weight": image(24, 16, 1, 1, dtype=torch.bfloat16)}, "weight: expected x's dtype"),
    ({"weight": image(24, 8, 1, 1)}, "weight: expected [K, 16, 1, 1]"),
    ({"weight": image(24, 16, 3, 3)}, "weight: expected [K, 16, 1, 1]"),
    ({"residual": image(2, 24, 5, 4)}, "residual: expected the output's shape [2, 24, 5, 5]"),
    ({"residual": None}, "residual, projected: expected one of them, got neither"),
    (PROJECTION | {"residual": image(2, 24, 5, 5)}, "expected one of them, got both"),
    (PROJECTION | {"projection_weight": None}, "projected, projection_weight: expected both"),
    (PROJECTION | {"projection_stride": 1}, "got what makes [2, 24, 9, 9]"),
    (PROJECTION | {"projection_stride": 0}, "projection_stride: expected 1 to"),
    (PROJECTION | {"projection_shift": None}, "projection_scale, projection_shift: expected with"),
    (PROJECTION | {"projection_weight": image(24, 9, 1, 1)}, "projection_weight: expected [K, 8"),
    ({"next_weight": image(8, 16, 1, 1)}, "next_weight: expected [K, 24, 1, 1]"),
    ({"next_scale": None}, "next_scale, next_shift: expected with next_weight"),
    (IN_FRONT | {"front_weight": image(16, 8, 1, 1)}, "front_weight: expected [K, 8, 3, 3]"),
    (IN_FRONT | {"front_weight": image(24, 8, 3, 3)}, "weight: expected [K, 24, 1, 1]"),
    (IN_FRONT | {"front_shift": None}, "front_scale, front_shift: expected with front_weight"),
    (IN_FRONT | {"front_scale": torch.ones(8)}, "front_scale: expected shape [16]"),
    ({"front_scale": torch.ones(16)}, "front_scale, front_shift: expected with front_weight"),
    ({"out_stride": 3}, "out_stride: expected 1 to 2, got 3"),
    ({"out_stride": 2}, "out: expected the stored pixels [2, 24, 3, 3]"),
    ({"following": image(2, 24, 5, 5)}, "following: expected next's shape [2, 8, 5, 5]"),
    ({"scale": torch.ones(7)}, "scale: expected shape [24]"),
    ({"next_shift": torch.zeros(8).half()}, "next_shift: expected float32"),
    ({"out": SHARED, "residual": SHARED}, "out: it shares memory with residual"),
    ({"following": SHARED[:, :8], "out": SHARED}, "out: it shares memory with following"),
    ({}, "conv_chain_out: expected CUDA tensors"),
    (PROJECTION, "conv_chain_out: expected CUDA tensors"),
    (IN_FRONT, "conv_chain_out: expected CUDA tensors"),
]  # fmt: skip


@needs_kernel
@pytest.mark.parametrize(("changes", "said"), BAD, ids=[said for _, said in BAD])
def test_bad_arguments_are_named(changes, said):
    given = arguments(**changes)
    with pytest.raises(RuntimeError) as caught:
        torch.ops.resnet_fused.conv_chain_out(*given.values())
    assert said in str(caught.value)


@needs_kernel
@pytest.mark.parametrize("case", [CASE, PROJECTED, FRONT], ids=["residual", "projected", "front"])
def test_each_argument_arrives_under_its_own_name(case, monkeypatch):
    operands = operands_of(case)
    out, following = (torch.empty_like(t) for t in FORMS[OP].empty(*operands, *options(case)))
    schema, got = torch._C._get_schema(f"resnet_fused::{OP}_out", ""), []
    monkeypatch.setattr(_cuda_plan, "raw", lambda op, part: lambda *given: got.extend(given))
    given = (*operands, out, following, *options(case))
    assert _cuda_chain.launch(*given, wish=(2, 1), follows=True) is False
    named = operands._asdict() | {
        "out": out, "following": following, "configuration": 2, "splits": 1,
        "projection_stride": case.projection_stride, "out_stride": case.out_stride,
        "reverse": False, "dependent": False, "follows": True,
    }  # fmt: skip
    names = [argument.name for argument in schema.arguments]
    assert len(names) == len(got)
    for name, value in zip(names, got, strict=True):
        same = value is named[name] if isinstance(value, torch.Tensor) else value == named[name]
        assert same, name


@needs_kernel
def test_what_lies_otherwise_is_copied(monkeypatch):
    """Operands before the launch, results behind it."""
    operands = operands_of(CASE, layout=torch.contiguous_format)
    out, following = FORMS[OP].empty(*operands, *options(CASE))
    assert out.is_contiguous()
    given: list[object] = []

    def launched(*arguments):
        given.extend(arguments)
        arguments[-2].fill_(1.0)
        arguments[-1].fill_(2.0)

    monkeypatch.setattr(_cuda_plan, "raw", lambda op, part: launched)
    results = (out, following)
    copied = _cuda_chain.launch(*operands, *results, *options(CASE), wish=(0, 1), follows=True)
    names = [one.name for one in torch._C._get_schema(f"resnet_fused::{OP}_out", "").arguments]
    # Neither this kernel nor the next one begins before a copy has ended.
    assert copied is True and given[names.index("follows")] is False
    images = [t for t in given if isinstance(t, torch.Tensor) and t.dim() == 4]
    assert len(images) == 6 and all(t.stride(1) == 1 for t in images)
    assert (out == 1).all() and (following == 2).all()


# Who serves a call, and why not.


@pytest.fixture
def fit_gpu(monkeypatch):
    """A machine on which nothing but the op's own conditions speak against the kernel."""
    monkeypatch.setattr(admission, "refusal", lambda call, implementation: None)
    monkeypatch.setattr(_extension, "has_cuda_kernels", lambda: True)
    monkeypatch.setattr(_cuda_plan, "exists", lambda op: True)


def test_what_the_kernel_serves(fit_gpu, monkeypatch):
    def refused(dtype):
        return _cuda_chain.supports(backends.Call(OP, "cuda", dtype, index=0)) or ""

    assert refused(torch.bfloat16) == refused(HALF) == ""
    assert "sums in float32 can't be multiplied on" in refused(torch.float32)
    assert "no CUDA kernel for torch.float64" in refused(torch.float64)
    assert _cuda_chain.supports(backends.Call(OP, "cpu", HALF)) == "x is on cpu"
    monkeypatch.setattr(admission, "refusal", lambda call, implementation: "not admitted: why")
    assert refused(HALF) == "not admitted: why"


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
    monkeypatch.setattr(_cuda_chain, "launch", launch)
    monkeypatch.setattr(_cuda_plan, "gpu", lambda device: emulated.H200)
    backends.forget_choices()
    yield ran
    backends.forget_choices()


def call(operands, case):
    named = operands._asdict()
    more = {name: t for name, t in list(named.items())[4:] if t is not None}
    strides = {"projection_stride": case.projection_stride, "out_stride": case.out_stride}
    return rf.ops.conv_chain(*list(named.values())[:4], **more, **strides)


@needs_kernel
@pytest.mark.emulated
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("case", [CASE, PROJECTED, FRONT], ids=["residual", "projected", "front"])
def test_the_op_takes_it_by_name(case, layout, served):
    operands = operands_of(case, layout=layout)
    with rf.backend("cuda"):
        choice = op.choose((*operands, *options(case)))
        got = call(operands, case)
    assert choice.implementation.name == "cuda" and served == [OP]
    assert "hand-written CUDA" in choice.implementation.about
    wanted = numerics.conv_chain_expected(operands, HALF, *options(case)[:2])
    for y, expected in zip(got, wanted, strict=True):
        assert torch.equal(y, expected.to(HALF))
        assert y.is_contiguous(memory_format=layout)


@needs_kernel
@pytest.mark.emulated
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"k": 136, "front": 16}, "136 channels of the convolution in front, at most 128 fit"),
        ({"w": 2000, "front": 16}, "bytes of shared memory, 232448 are there"),
        ({"k": 17}, "x cannot be moved 16 bytes at a time"),
        ({"m": 264}, "264 channels of next, at most 256 fit"),
        ({"k": 2048}, "bytes of shared memory, 232448 are there"),
    ],
)
def test_what_it_cant_take_goes_to_the_parts_with_the_reason(changes, said, served):
    case = dataclasses.replace(CASE, n=1, **{"h": 3, "w": 3, **changes})
    operands = operands_of(case)
    choice = op.choose((*operands, *options(case)))
    assert choice.implementation.name == "parts"
    assert said in dict(choice.refused)["cuda"]
    assert not served


def test_it_stands_behind_triton_and_before_the_parts():
    names = [entry.name for entry in backends.implementations(OP)]
    assert names[:3] == ["triton", "cuda", "parts"]


@needs_kernel
def test_whoever_rewrites_a_graph_is_told(monkeypatch):
    entry = next(e for e in backends.implementations(OP) if e.name == "cuda")
    monkeypatch.setattr(op.backends, "choose", lambda call: backends.Choice(entry, "stand-in"))
    monkeypatch.setattr(_cuda_plan, "gpu", lambda device: emulated.H200)
    monkeypatch.setattr(op._admitted, "names", lambda *_: None)
    device = torch.device("cuda")
    good = op.serves(dataclasses.replace(RESNET50_CHAINS[1], n=256), torch.bfloat16, device)
    assert good.reason is None and good.wins and good.gain > 20 and "by its parts" in good.why
    layer1 = dataclasses.replace(RESNET50_CHAINS[1], n=256, front=64)
    front = op.serves(layer1, torch.bfloat16, device)
    assert front.reason is None and front.wins and front.gain > good.gain + 50
    wide = op.serves(dataclasses.replace(layer1, h=1, w=2000), torch.bfloat16, device)
    assert "bytes of shared memory" in str(wide.reason) and not wide.wins
    # Of layer 2: the first block with its projection and behind it, and the last one.
    first, last = (dataclasses.replace(RESNET50_CHAINS[i], n=256) for i in (3, 5))
    behind = dataclasses.replace(first, projected=0, projection_stride=1)
    whole, rest, end = (op.serves(one, torch.bfloat16, device) for one in (first, behind, last))
    assert whole.wins and "tma_128x128_2s_k128_d256_2c" in whole.why
    assert rest.wins and 40 < rest.gain < whole.gain
    assert end.wins and end.gain > 50 and "tma_128x256_2s_k128_2c" in end.why


# The self-check, on the emulator.


@needs_kernel
@pytest.mark.emulated
def test_the_self_check_passes_right_kernels_and_no_wrong_ones(monkeypatch):
    monkeypatch.setattr(checks, "DTYPES", (HALF,))
    name = "64x64_4w3s"
    checks.check(name, "cpu", by_emulator, emulated.H200)
    for place, what in ((15, "out"), (16, "next")):

        def wrong(*arguments, place=place, **more):
            by_emulator(*arguments, **more)
            if arguments[place].numel():
                arguments[place][-1, -1, -1, -1] += 1

        with pytest.raises(ArithmeticError, match=f"{what}: 1 of .* elements are wrong"):
            checks.check(name, "cpu", wrong, emulated.H200)
    with pytest.raises(ArithmeticError, match="NaN or not written"):
        checks.check(name, "cpu", lambda *_, **__: None, emulated.H200)
    with pytest.raises(ValueError, match="accepted are '128x64_4w3s'"):
        checks.check("1x1", "cpu", by_emulator, emulated.H200)
    with pytest.raises(ArithmeticError, match="no case of the self-check fits"):
        checks.check(name, "cpu", by_emulator, (132, 1024, 2048))
