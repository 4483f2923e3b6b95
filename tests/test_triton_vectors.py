"""Training's Triton kernels over per-channel values: float64 inside, rounded once."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from triton_trace import needs_interpreter

pytestmark = [
    *needs_interpreter,
    # NumPy's, about an empty batch's quotients.
    pytest.mark.filterwarnings("ignore:(invalid value|divide) :RuntimeWarning"),
]


def launch(op, *arguments):
    importlib.import_module(f"resnet_fused.triton.{op}").launch(*arguments)


def rows(*shape):
    return torch.full(shape, math.nan)


def same(got, expected):
    """Bit for bit, NaN for NaN."""
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@given(st.floats(-1e30, 1e30).filter(lambda x: x == 0 or abs(x) > 1e-30))
def test_three_float32_numbers_hold_a_float64_one(number):
    from resnet_fused.triton import _vectors

    assert sum(_vectors.parts_of(number)) == number


def vectors(channels) -> Iterator[tuple[Tensor | None, Tensor | None]]:
    yield torch.randn(channels), torch.randn(channels)
    yield None, None
    yield torch.randn(channels).bfloat16(), torch.randn(2 * channels, dtype=torch.float64)[::2]


@pytest.mark.parametrize("channels", [1, 65, 300])
@pytest.mark.parametrize("total", [None, 77.0, 0.0])
def test_finalize_is_float64_rounded_once(channels, total):
    from resnet_fused.ops._library import overload

    stats = torch.stack((torch.randn(channels), torch.rand(channels) * 100))
    everywhere = None if total is None else torch.tensor([total], dtype=torch.float64)
    for gamma, beta in vectors(channels):
        arguments = (stats, everywhere, gamma, beta)
        norm = rows(4, channels)
        launch("bn_finalize", *arguments, norm, 50, 1e-5)
        # The same operations in the same order, in NumPy's float64 and PyTorch's.
        same(norm, overload("bn_finalize", "reference")(*arguments, 50, 1e-5))


@pytest.mark.parametrize("momentum", [0.1, None, 0.0, 1.0])
@pytest.mark.parametrize("total", [None, 77.0, 0.0])
def test_running_statistics(momentum, total):
    from resnet_fused.ops._library import overload

    everywhere = None if total is None else torch.tensor([total], dtype=torch.float64)
    for channels, kind in ((1, torch.float32), (65, torch.float16), (1100, torch.float64)):
        stats = torch.stack((torch.randn(channels), torch.rand(channels) * 100))
        for count in (50, 0):
            for tracked in (torch.tensor(3), torch.tensor(2, dtype=torch.int32), None):
                start = torch.randn(2 * channels)[::2].to(kind), torch.rand(channels).to(kind)
                results = []
                for run in (launch, lambda op, *given: overload(op, "reference")(*given)):
                    state = [t.clone() for t in start]
                    state.append(None if tracked is None else tracked.clone())
                    run("bn_update_stats", stats, everywhere, *state, count, momentum)
                    results.append(state)
                for got, expected in zip(*results, strict=True):
                    assert got is expected is None or torch.equal(got, expected)


def test_coefficients_are_float64_rounded_once():
    from resnet_fused.ops._library import overload

    for channels in (1, 65, 300):
        sums, everywhere, norm = torch.randn(3, channels), torch.randn(3, channels), rows(4, 1)
        norm = torch.randn(4, channels)
        for all_sums, total in ((None, None), (everywhere, 99.0), (everywhere, 0.0)):
            total = None if total is None else torch.tensor([total], dtype=torch.float64)
            for row, frozen in ((1, False), (2, False), (2, True)):
                given = (sums, all_sums, total, norm)
                results = rows(3, channels), rows(channels), rows(channels)
                launch("bn_backward_finalize", *given, *results, 50, row, frozen)
                reference = overload("bn_backward_finalize", "reference")
                for got, right in zip(results, reference(*given, 50, row, frozen), strict=True):
                    same(got, right)
