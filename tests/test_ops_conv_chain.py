"""conv_chain: every implementation against the oracle; layouts, bad input, what it refuses."""

from __future__ import annotations

import dataclasses
import importlib

import emulated
import pytest
import torch
from matrix import DTYPES, WHOLE, cells, lay_out

import resnet_fused as rf
from resnet_fused import backends, numerics
from resnet_fused.cases import CHAIN_CASES, RESNET50_CHAINS, ChainCase
from resnet_fused.numerics import ChainOperands
from resnet_fused.triton import _limits, _tiles

op = importlib.import_module("resnet_fused.ops.conv_chain")
"""The module: in the package its name is the function's."""
CELLS = [cell for cell in cells("conv_chain") if cell.values[0].name != "triton"]
"""Triton's kernel has tests of its own: test_triton_conv_chain.py."""
GRID = [
    pytest.param(*cell.values, case, id=f"{cell.id}-{case}", marks=cell.marks)
    for cell in CELLS
    for case in CHAIN_CASES
    if cell.values[0].name != emulated.NAME or emulated.takes_chain(case)
]
BY_NAME = {case.name: case for case in CHAIN_CASES}
CASE = BY_NAME["everything"]
PLAIN = BY_NAME["identity"]
H200 = _tiles.Limits(132, 232448, 90, "H200")


def overload(name):
    return getattr(torch.ops.resnet_fused.conv_chain, name)


def options(case: ChainCase) -> tuple[int, int, bool]:
    return case.projection_stride, case.out_stride, False


def keywords(operands: ChainOperands, case: ChainCase) -> dict[str, object]:
    """What the public function takes beside its first four arguments."""
    named = operands._asdict()
    given = {name: t for name, t in named.items() if t is not None}
    for name in ("x", "weight", "scale", "shift"):
        given.pop(name)
    return {**given, "projection_stride": case.projection_stride, "out_stride": case.out_stride}


def call(operands: ChainOperands, case: ChainCase, **changed: object):
    given = {**keywords(operands, case), **changed}
    first = [changed.pop(name, t) for name, t in zip(operands._fields[:4], operands, strict=False)]
    given = {name: value for name, value in given.items() if name not in operands._fields[:4]}
    return rf.ops.conv_chain(*first, **given)


def one_by_one(operands: ChainOperands, case: ChainCase):
    """What the chain stands for, by conv_bn_act."""
    o = operands
    t = o.x if o.front_weight is None else rf.ops.conv_bn_act(o.x, *o.front, padding=1)
    shortcut = o.residual
    if o.projected is not None:
        step = case.projection_stride
        shortcut = rf.ops.conv_bn_act(o.projected, *o.projection, stride=step, act="none")
    out = rf.ops.conv_bn_act(t, o.weight, o.scale, o.shift, shortcut)
    following = None if o.next_weight is None else rf.ops.conv_bn_act(out, *o.next)
    return out[:, :, :: case.out_stride, :: case.out_stride], following


def check(got, expected):
    for y, wanted in zip(got, expected, strict=True):
        if wanted is None:
            assert y is None or y.numel() == 0
        else:
            assert torch.equal(y, wanted)


@pytest.mark.op_matrix
@pytest.mark.parametrize(("entry", "dtype", "case"), GRID)
def test_exact_on_integers(entry, dtype, case):
    operands = numerics.chain_operands(case, dtype, exact=True)
    got = overload(entry.name)(*operands, *options(case))
    if entry.name == "parts":
        return check(got, one_by_one(operands, case))
    strides = case.projection_stride, case.out_stride
    check(got, numerics.conv_chain_expected(operands, dtype, *strides, rounding=entry.rounding))


@pytest.mark.op_matrix
@pytest.mark.parametrize(("entry", "dtype", "case"), GRID)
def test_within_the_bound(entry, dtype, case):
    operands = numerics.chain_operands(case, dtype)
    strides = case.projection_stride, case.out_stride
    got = overload(entry.name)(*operands, *strides, False)
    oracle = numerics.conv_chain_oracle(operands, *strides)
    bound = numerics.conv_chain_bound(operands, *strides, rounding=entry.rounding)
    for y, expected, most in zip(got, oracle, bound, strict=True):
        if expected is not None:
            found = numerics.check_bound(y, expected, most)
            assert found.ok and not found.unchecked, found


def broken(operands: ChainOperands, case: ChainCase, what: str):
    """What a chain with a fault would give, each rounded as it is stored."""
    o, dtype = operands, operands.x.dtype
    if what == "no shortcut":
        o = o._replace(residual=torch.zeros_like(o.residual))
    elif what == "scale and shift swapped":
        o = o._replace(next_scale=o.next_shift, next_shift=o.next_scale)
    out, following = numerics.conv_chain_oracle(o, case.projection_stride)
    if what == "truncated":
        bits = out.to(torch.float32).view(torch.int32) & ~0xFFFF
        out = bits.view(torch.float32).double()
        following = numerics.conv_bn_act_oracle(out, *o.next)
    elif what == "out in half its digits":
        out = out.to(torch.float8_e4m3fn).double()
        following = numerics.conv_bn_act_oracle(out, *o.next)
    elif what == "a lost channel":
        following[:, 3] = 0
    return out.to(dtype), following.to(dtype)


@pytest.mark.parametrize(
    "what",
    ["no shortcut", "scale and shift swapped", "truncated", "out in half its digits",
     "a lost channel", "none"],
)  # fmt: skip
def test_the_bound_bites(what):
    case = dataclasses.replace(RESNET50_CHAINS[1], n=1, h=6, w=7)
    operands = numerics.chain_operands(case, torch.bfloat16)
    oracle, bound = numerics.conv_chain_oracle(operands), numerics.conv_chain_bound(operands)
    got = broken(operands, case, what)
    right = [
        numerics.check_bound(y, expected, most).ok
        for y, expected, most in zip(got, oracle, bound, strict=True)
    ]
    assert all(right) == (what == "none"), right


@pytest.mark.parametrize("layout", ["nchw", "nhwc", "sliced", "unaligned"])
@pytest.mark.parametrize("case", [PLAIN, CASE], ids=str)
def test_in_any_layout(case, layout):
    """Values as ever; results dense, in channels_last where x is, and as the fake says."""
    operands = numerics.chain_operands(case, torch.float32, exact=True)
    expected = numerics.conv_chain_expected(operands, torch.float32, *options(case)[:2])
    moved = ChainOperands(
        *(t if t is None or t.dim() == 1 else lay_out(t, layout) for t in operands)
    )
    got = call(moved, case)
    check(got, expected)
    form = torch.contiguous_format if layout in ("nchw", "sliced") else torch.channels_last
    assert all(t.is_contiguous(memory_format=form) for t in got)


@pytest.mark.parametrize("name", ["x", "weight", "residual", "next_weight", "scale", "next_shift"])
def test_nan_and_inf_come_through(name):
    operands = numerics.chain_operands(PLAIN, torch.float32)
    t = getattr(operands, name)
    t.view(-1)[3], t.view(-1)[7] = float("nan"), float("inf")
    for y, expected in zip(
        call(operands, PLAIN), numerics.conv_chain_oracle(operands), strict=True
    ):
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y.isinf(), expected.isinf())


def test_reverse_changes_nothing():
    operands = numerics.chain_operands(CASE, torch.float32)
    check(call(operands, CASE, reverse=True), call(operands, CASE))


@pytest.mark.parametrize("case", [PLAIN, CASE, BY_NAME["no_next"]], ids=str)
@pytest.mark.parametrize("name", ["parts", "reference"])
def test_opcheck(name, case):
    operands = numerics.chain_operands(case, torch.float32)
    torch.library.opcheck(overload(name), (*operands, *options(case)))


@pytest.mark.parametrize("case", CHAIN_CASES, ids=str)
def test_the_fake_says_what_comes(case):
    form = torch.channels_last
    for layout in (torch.contiguous_format, form):
        operands = numerics.chain_operands(case, torch.float32)
        operands = operands._replace(x=operands.x.contiguous(memory_format=layout))
        got = overload("parts")(*operands, *options(case))
        with torch._subclasses.fake_tensor.FakeTensorMode() as mode:
            moved = [t if t is None else mode.from_tensor(t) for t in operands]
            fake = overload("parts")(*moved, *options(case))
        for real, said in zip(got, fake, strict=True):
            assert (real.shape, real.stride(), real.dtype) == (
                said.shape, said.stride(), said.dtype
            )  # fmt: skip


def test_it_compiles_in_one_graph():
    operands = numerics.chain_operands(PLAIN, torch.float32)
    compiled = torch.compile(lambda o: call(o, PLAIN), fullgraph=True, backend="aot_eager")
    check(compiled(operands), overload("reference")(*operands, 1, 1, False))


def test_autocast_casts_activations_and_weights():
    operands = numerics.chain_operands(CASE, torch.float32, exact=True)
    with torch.autocast("cpu", torch.bfloat16):
        out, following = call(operands, CASE)
    assert out.dtype is following.dtype is torch.bfloat16


@pytest.mark.parametrize("name", ["x", "weight", "scale", "projected", "next_weight"])
def test_a_gradient_is_refused(name):
    operands = numerics.chain_operands(CASE, torch.float32)
    getattr(operands, name).requires_grad_()
    with pytest.raises(RuntimeError, match="conv_chain has no derivative"):
        call(operands, CASE)
    with torch.no_grad():
        call(operands, CASE)


BAD = {
    "x as a list": ({"x": [1]}, TypeError, "x must be a Tensor, got list"),
    "weight's dtype": ({"weight": torch.zeros(40, 16, 1, 1).half()}, TypeError, "weight has dtype"),
    "weight's channels": (
        {"weight": torch.zeros(40, 17, 1, 1)}, ValueError, r"weight has shape .*16 channels"
    ),
    "a 3x3 weight": ({"weight": torch.zeros(40, 16, 3, 3)}, ValueError, r"16, 1, 1\] is accepted"),
    "no filters": ({"weight": torch.zeros(0, 16, 1, 1)}, ValueError, r"\[1 or more, 16, 1, 1\]"),
    "scale's length": ({"scale": torch.zeros(39)}, ValueError, r"scale has shape \(39,\)"),
    "next_scale's length": ({"next_scale": torch.zeros(3)}, ValueError, "next_scale has shape"),
    "a next without scale": (
        {"next_scale": None}, ValueError, "next_weight, next_shift came without next_scale"
    ),
    "next_weight's channels": (
        {"next_weight": torch.zeros(24, 41, 1, 1)}, ValueError, "out has 40 channels"
    ),
    "no shortcut": ({"residual": None}, ValueError, "neither was given"),
    "two shortcuts": (
        {"projected": torch.zeros(2, 8, 7, 9), "projection_weight": torch.zeros(40, 8, 1, 1),
         "projection_scale": torch.zeros(40), "projection_shift": torch.zeros(40)},
        ValueError, "both were given",
    ),
    "a projection without weight": (
        {"residual": None, "projected": torch.zeros(2, 8, 7, 9)},
        ValueError, "projected came without projection_weight, projection_scale",
    ),
    "a projection of another size": (
        {"residual": None, "projected": torch.zeros(2, 8, 7, 9), "projection_stride": 2,
         "projection_weight": torch.zeros(40, 8, 1, 1), "projection_scale": torch.zeros(40),
         "projection_shift": torch.zeros(40)},
        ValueError, r"projection_stride=2 make \(2, 40, 4, 5\); the output's \(2, 40, 7, 9\)",
    ),
    "residual's shape": ({"residual": torch.zeros(2, 40, 7, 8)}, ValueError, "residual has shape"),
    "out_stride 3": ({"out_stride": 3}, ValueError, "out_stride is 3; 1 or 2 is accepted"),
    "out_stride True": ({"out_stride": True}, ValueError, "out_stride is True; 1 or 2"),
    "projection_stride 0": (
        {"projection_stride": 0}, ValueError, "projection_stride is 0; 1 or more is accepted"
    ),
    "reverse 1": ({"reverse": 1}, TypeError, "reverse must be a bool, got int"),
    "x of 3 dimensions": ({"x": torch.zeros(16, 7, 9)}, ValueError, "x must have 4 dimensions"),
    "x of integers": ({"x": torch.zeros(2, 16, 7, 9).int()}, TypeError, "x has dtype torch.int32"),
    "another device": (
        {"next_weight": torch.zeros(24, 40, 1, 1, device="meta")}, ValueError, "is on meta, x on"
    ),
    "front_weight 1x1": (
        {"front_weight": torch.zeros(16, 16, 1, 1), "front_scale": torch.zeros(16),
         "front_shift": torch.zeros(16)},
        ValueError, r"front_weight has shape .*\[1 or more, 16, 3, 3\] is accepted",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    changed, error, message = BAD[name]
    operands = numerics.chain_operands(PLAIN, torch.float32)
    with pytest.raises(error, match=f"conv_chain: .*{message}|conv_chain: {message}"):
        call(operands, PLAIN, **changed)


@pytest.mark.parametrize("word", ["auto", "cpu", "reference"])
def test_who_serves(word):
    operands = numerics.chain_operands(PLAIN, torch.float32)
    with rf.backend(word):
        arguments = (*operands, 1, 1, False)
        name = op.choose(arguments).implementation.name
        got = call(operands, PLAIN)
    assert name == ("reference" if word == "reference" else "parts")
    check(got, overload(name)(*arguments))


def test_parts_stay_on_their_device():
    entry = next(e for e in backends.implementations("conv_chain") if e.name == "parts")
    for word, device, served in (
        ("auto", "cuda", True), ("cpu", "cuda", False), ("cuda", "cpu", False), ("cpu", "cpu", True)
    ):  # fmt: skip
        with rf.backend(word):
            reason = entry.supports(backends.Call("conv_chain", device, torch.float32))
        assert (reason is None) == served


def test_whoever_rewrites_a_graph_is_told(monkeypatch):
    """By the prediction where a kernel serves; with a reason where none does."""
    layer1, layer3 = (dataclasses.replace(RESNET50_CHAINS[i], n=256) for i in (1, 7))
    found = op.serves(layer1, torch.bfloat16, torch.device("cpu"))
    assert found == (found.reason, False, f"no kernel: {found.reason}", 0.0) and found.reason
    choice = next(e for e in backends.implementations("conv_chain") if e.name == "triton")
    monkeypatch.setattr(op.backends, "choose", lambda call: backends.Choice(choice, "stand-in"))
    monkeypatch.setattr(_limits, "limits", lambda device: H200)
    monkeypatch.setattr(op._admitted, "names", lambda *_: None)
    device = torch.device("cuda")
    good = op.serves(layer1, torch.bfloat16, device)
    assert good.reason is None and good.wins and good.gain > 50 and "by its parts" in good.why
    poor = op.serves(layer3, torch.bfloat16, device)
    assert poor.reason is None and not poor.wins and poor.gain < 0
    wide = op.serves(dataclasses.replace(layer3, k=512), torch.bfloat16, device)
    assert wide.reason is not None and not wide.wins and "512 channels" in wide.reason


@pytest.mark.skipif(not WHOLE, reason="make proof: 250 repetitions of every dtype")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_each_time(dtype):
    operands = numerics.chain_operands(CASE, dtype)
    first = call(operands, CASE)
    for _ in range(250):
        check(call(operands, CASE), first)
