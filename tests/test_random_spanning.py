"""Random shapes, layouts and options of stem, head and conv_chain: within the bound, always.

25 shapes for each implementation and dtype in the suite (fewer where kernels are interpreted), 1000
in `make proof`.
"""

from __future__ import annotations

import os

import emulated
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from matrix import cells
from torch import Tensor

from resnet_fused import cases, numerics, ops
from resnet_fused.ops._library import overload
from resnet_fused.ops._selfchecks import _lay_out

PROOF = os.environ.get("HYPOTHESIS_PROFILE") == "proof"
PAIR = st.tuples(st.integers(1, 3), st.integers(1, 3))
INTERPRETED = 4  # shapes in the suite: a stem takes the interpreter a second


@st.composite
def stems(draw: st.DrawFn, name: str) -> cases.StemCase:
    """`name`: of the implementation, whose kernel is to be made for the shape."""
    cuda = name == emulated.NAME
    r, s = (7, 7) if cuda else (draw(st.integers(1, 7)), draw(st.integers(1, 7)))
    stride = (2, 2) if cuda else draw(PAIR)
    padding = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    h, w = draw(st.integers(1, 14)), draw(st.integers(1, 14))
    assume(h + 2 * padding[0] >= r and w + 2 * padding[1] >= s)
    pool = ((3, 3), (2, 2), (1, 1))
    channels = draw(st.integers(1, 4))
    if name == "triton":
        assume((s + stride[1]) * channels + 3 <= 64)
    elif not cuda and draw(st.booleans()):
        pool = ((draw(st.integers(1, 3)), 2), draw(PAIR), (0, 0))
        sides = [(n + 2 * p - k) // by + 1
                 for n, p, k, by in zip((h, w), padding, (r, s), stride, strict=True)]  # fmt: skip
        assume(sides[0] >= pool[0][0] and sides[1] >= 2)
    return cases.StemCase(
        "random", draw(st.integers(0, 2)), channels, h, w, draw(st.integers(1, 40)), r, s, stride,
        padding, pool, draw(st.sampled_from(["same", "uint8", "float32"])), draw(st.booleans()),
        draw(st.sampled_from(["nhwc", "nchw", "sliced"])),
    )  # fmt: skip


@st.composite
def heads(draw: st.DrawFn) -> cases.HeadCase:
    return cases.HeadCase(
        "random", draw(st.integers(0, 20)), draw(st.integers(1, 90)), draw(st.integers(1, 5)),
        draw(st.integers(1, 5)), draw(st.integers(1, 200)), draw(st.booleans()),
        draw(st.sampled_from(["nhwc", "nchw", "sliced"])),
    )  # fmt: skip


@st.composite
def chains(draw: st.DrawFn, name: str) -> cases.ChainCase:
    """`name`: of the implementation, whose kernel is to take the channels."""
    by, most = {"triton": (16, 4), emulated.NAME: (8, 6)}.get(name, (1, 24))
    channels = st.integers(1, most).map(lambda n: by * n)
    none = st.just(0)
    k, c, m = draw(channels), draw(channels), draw(st.one_of(none, channels))
    projected = draw(st.one_of(none, channels))
    front = draw(st.one_of(none, channels))
    return cases.ChainCase(
        "random", draw(st.integers(0, 3)), k, draw(st.integers(1, 7)), draw(st.integers(1, 7)), c,
        m, projected, draw(st.integers(1, 3)) if projected else 1, front,
        draw(st.integers(1, 2)),
    )  # fmt: skip


def fewer(test, name: str):
    """As many shapes as the profile says; fewer where each takes long."""
    return test if PROOF or name != "triton" else settings(max_examples=INTERPRETED)(test)


def within(out: Tensor, oracle: Tensor, bound: Tensor, case: object) -> None:
    check = numerics.check_bound(out, oracle, bound)
    assert check.ok, (case, check)


@pytest.mark.parametrize(("entry", "dtype"), cells("stem"))
def test_stem(entry, dtype):
    @given(case=stems(entry.name), seed=st.integers(0, 2**31))
    def look(case, seed):
        torch.manual_seed(seed)
        if case.images == "uint8":
            x = torch.randint(256, case.shape, dtype=torch.uint8)
        else:
            x = torch.randn(case.shape).to(torch.float32 if case.images == "float32" else dtype)
        norm = None
        if case.has_norm:
            norm = ops.stem_input_norm([0.4] * case.c, [0.2] * case.c, uint8=case.images == "uint8")
            norm = norm.to(numerics.accumulator_dtype(dtype))
        acc = numerics.accumulator_dtype(dtype)
        weight = (torch.randn(case.weight_shape) / (case.c * case.r * case.s) ** 0.5).to(dtype)
        scale, shift = (torch.randn(case.k).to(acc) for _ in range(2))
        if case.layout == "sliced" and x.dtype is torch.uint8:  # there is no NaN to lie between
            x = torch.stack((x, 255 - x), -1).flatten(3)[..., ::2]
        else:
            x = _lay_out(x, case)
        arguments = (x, weight, scale, shift, norm, *case.geometry)
        out = overload("stem", entry.name)(*arguments)
        oracle = numerics.stem_oracle(*arguments)
        within(out, oracle, numerics.stem_bound(*arguments, rounding=entry.rounding), case)

    fewer(look, entry.name)()


@pytest.mark.parametrize(("entry", "dtype"), cells("head"))
def test_head(entry, dtype):
    @given(case=heads(), seed=st.integers(0, 2**31))
    def look(case, seed):
        torch.manual_seed(seed)
        x = _lay_out(torch.randn(case.shape).to(dtype), case)
        weight = torch.randn(case.classes, case.c).to(dtype)
        bias = torch.randn(case.classes).to(dtype) if case.bias else None
        out = overload("head", entry.name)(x, weight, bias)
        oracle = numerics.head_oracle(x, weight, bias)
        within(out, oracle, numerics.head_bound(x, weight, bias), case)

    fewer(look, entry.name)()


@pytest.mark.parametrize(("entry", "dtype"), cells("conv_chain"))
def test_conv_chain(entry, dtype):
    @given(case=chains(entry.name), seed=st.integers(0, 2**31), back=st.booleans())
    def look(case, seed, back):
        operands = numerics.chain_operands(case, dtype, torch.Generator().manual_seed(seed))
        strides = case.projection_stride, case.out_stride
        if entry.name == "triton":
            assume(not (case.front and case.projected and case.m > 64))
        found = overload("conv_chain", entry.name)(*operands, *strides, back)
        oracle = numerics.conv_chain_oracle(operands, *strides)
        bound = numerics.conv_chain_bound(operands, *strides, rounding=entry.rounding)
        for out, exact, most in zip(found, oracle, bound, strict=True):
            if exact is not None:
                within(out, exact, most, case)

    fewer(look, entry.name)()
