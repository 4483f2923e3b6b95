"""conv_chain_fp8: the same bytes as its convolutions one by one, layouts, bad input."""

from __future__ import annotations

import itertools

import pytest
import torch
from fp8_operands import E4M3, same_bits

import resnet_fused as rf
from resnet_fused import numerics
from resnet_fused.cases import CHAIN_CASES, ChainCase

BY_NAME = {case.name: case for case in CHAIN_CASES}
EVERYTHING = BY_NAME["everything"]
SCALES = {
    "residual_scale": 0.5, "out_scale": 2.0, "next_out_scale": 16.0, "front_out_scale": 0.25,
}  # fmt: skip


def operands(case: ChainCase, *, exact: bool, layout: torch.memory_format | None = None):
    """Of conv_chain, activations and filters in e4m3."""
    generator = torch.Generator().manual_seed(CHAIN_CASES.index(case))
    made = numerics.chain_operands(case, torch.float32, generator, exact=exact)
    form = layout or torch.contiguous_format
    return {
        name: t if t is None or t.dim() == 1 else t.to(E4M3).contiguous(memory_format=form)
        for name, t in made._asdict().items()
    }


def call(given, case, **changed):
    first = [given[name] for name in ("x", "weight", "scale", "shift")]
    rest = {name: t for name, t in given.items() if name not in ("x", "weight", "scale", "shift")}
    steps = {"projection_stride": case.projection_stride, "out_stride": case.out_stride}
    return rf.ops.conv_chain_fp8(*first, **{**rest, **steps, **SCALES, **changed})


def one_by_one(given, case):
    """What the chain stands for, by conv_bn_act_fp8; each with its bound's check."""
    found = []

    def conv(x, layer, residual=None, **how):
        tensors = [given[f"{layer}{name}"] for name in ("weight", "scale", "shift")]
        y = rf.ops.conv_bn_act_fp8(x, *tensors, residual, **how)
        found.append(y)
        return y

    t, shortcut = given["x"], given["residual"]
    if given["front_weight"] is not None:
        t = conv(t, "front_", padding=1, out_scale=SCALES["front_out_scale"])
    if given["projected"] is not None:
        shortcut = conv(
            given["projected"], "projection_", stride=case.projection_stride, act="none",
            out_scale=SCALES["residual_scale"],
        )  # fmt: skip
    scales = {name: SCALES[name] for name in ("residual_scale", "out_scale")}
    out = conv(t, "", shortcut, **scales)
    after = None
    if given["next_weight"] is not None:
        after = conv(out, "next_", out_scale=SCALES["next_out_scale"])
    return out[:, :, :: case.out_stride, :: case.out_stride], after


@pytest.mark.parametrize("case", CHAIN_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("exact", [True, False])
def test_it_gives_what_its_convolutions_give(case, exact):
    layouts = torch.contiguous_format, torch.channels_last
    for layout, backend in itertools.product(layouts, ("auto", "reference")):
        given = operands(case, exact=exact, layout=layout)
        with rf.backend(backend):
            out, after = call(given, case)
            expected, following = one_by_one(given, case)
        assert same_bits(out, expected)
        assert (after is None) == (following is None)
        assert after is None or same_bits(after, following)


def test_what_is_rounded_between_them_matters():
    """Out is multiplied on as it is stored, and so is what the front made, and the projection."""
    given = operands(EVERYTHING, exact=False)
    out, after = call(given, EVERYTHING)
    for name in SCALES:
        changed = call(given, EVERYTHING, **{name: SCALES[name] * 1.25})
        same = [same_bits(a, b) for a, b in zip(changed, (out, after), strict=True)]
        assert same == [name == "next_out_scale", False], name


def test_fakes_and_tracing_agree():
    for case, layout in itertools.product(
        (EVERYTHING, BY_NAME["no_next"]), (torch.contiguous_format, torch.channels_last)
    ):
        given = operands(case, exact=True, layout=layout)
        steps = case.projection_stride, case.out_stride
        arguments = (*given.values(), *steps, *SCALES.values())
        for name in ("parts", "reference"):
            op = getattr(torch.ops.resnet_fused.conv_chain_fp8, name)
            torch.library.opcheck(op, arguments, test_utils=("test_faketensor",))


BAD = (
    ({"residual": None}, ValueError, "neither was given"),
    ({"x": torch.zeros(2, 16, 7, 9)}, TypeError, "x has dtype torch.float32"),
    ({"weight": torch.zeros(40, 8, 1, 1).to(E4M3)}, ValueError, "weight has shape"),
    ({"residual": torch.zeros(2, 40, 7, 8).to(E4M3)}, ValueError, "residual has shape"),
    ({"next_scale": None}, ValueError, "of next's arguments all or none"),
    ({"scale": torch.ones(39)}, ValueError, "scale has shape"),
    ({"front_weight": torch.zeros(16, 16, 3, 3).to(E4M3)}, ValueError, "of front's arguments"),
)


@pytest.mark.parametrize(("changes", "error", "said"), BAD, ids=[said for *_, said in BAD])
def test_bad_input_is_named(changes, error, said):
    case = BY_NAME["identity"]
    with pytest.raises(error, match=said):
        call({**operands(case, exact=True), **changes}, case)


def test_bad_options_are_named():
    case = BY_NAME["identity"]
    given = operands(case, exact=True)
    for changed, said in (
        ({"out_stride": 3}, "out_stride is 3; 1 or 2 is accepted"),
        ({"out_scale": 0.0}, "out_scale is 0.0"),
        ({"next_out_scale": float("nan")}, "next_out_scale is nan"),
    ):
        with pytest.raises(ValueError, match=said):
            call(given, case, **changed)
