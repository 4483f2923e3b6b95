"""The ceilings of a machine: what is multiplied, and that the fastest way counts."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from resnet_fused.bench import ceilings

CPU = torch.device("cpu")
SIDE = ceilings._SIDE["cpu"]


def test_both_ways_are_the_same_product():
    torch.manual_seed(0)
    with torch.inference_mode():
        matrices, convolution = [way() for way in ceilings._products(CPU, torch.float32, SIDE)]
    # A convolution takes its filters' rows, a product of matrices the second one's columns.
    torch.manual_seed(0)
    a = torch.randn(SIDE, SIDE)
    flat = convolution.permute(0, 2, 3, 1).reshape(SIDE, SIDE)
    assert_close(matrices, a @ a)
    assert_close(flat, a @ a.T, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("fastest", [0, 1])
def test_the_fastest_way_counts(monkeypatch, fastest):
    ways = [object(), object()]
    taken = {id(ways[fastest]): [9.0, 0.5, 0.25], id(ways[1 - fastest]): [9.0, 2.0, 1.0]}
    monkeypatch.setattr(ceilings, "_products", lambda *_: iter(ways))
    monkeypatch.setattr(
        ceilings, "_by_clock", lambda way: taken.get(id(way), [1.0, 4.0, 2.0]).pop(0)
    )
    found = ceilings.measure(CPU, torch.float32, repeats=2)
    assert found.flops == 2 * SIDE**3 / 0.25  # the first run, which warms up, is left out
    assert found.dtype == "float32"


def test_rates_are_of_this_machine():
    found = ceilings.measure(CPU, torch.float32, repeats=1)
    assert 1e8 < found.flops < 1e15 and 1e7 < found.bandwidth < 1e13
