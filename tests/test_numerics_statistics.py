"""The bound of BatchNorm's statistics: tiles in closed form pass, poorer sums do not."""

from __future__ import annotations

import math

import pytest
import torch
from matrix import SPREADS, random_layer, spread_values
from torch import Tensor

from resnet_fused import cases, numerics

CASES = {case.name: case for case in cases.CONV_CASES}
judge = numerics.check_bound


def tiles_of(y: Tensor, tile: int = 128) -> list[tuple[int, Tensor, Tensor]]:
    """Count, mean and M2 of each tile, two passes in float32."""
    found = []
    for part in y.flatten().split(tile):
        mean = part.sum() / len(part)
        found.append((len(part), mean, (part - mean).square().sum()))
    return found


def closed_form(y: Tensor) -> Tensor:
    """What kernels are asked for."""
    parts = tiles_of(y)
    n = torch.tensor([float(part[0]) for part in parts], dtype=torch.float64)
    means, m2 = (torch.stack([part[i] for part in parts]).double() for i in (1, 2))
    mean = means[0] + (n * (means - means[0])).sum() / n.sum()
    total = m2.sum() + (n * (means - mean).square()).sum()
    return torch.stack((mean, total)).float().view(2, 1)


def one_after_the_other(y: Tensor) -> Tensor:
    """Chan's merge in float32, tile after tile."""
    count, mean, m2 = tiles_of(y, 8)[0]
    for n, other, square in tiles_of(y, 8)[1:]:
        d = other - mean
        mean = mean + d * (n / (count + n))
        m2 = m2 + square + d * d * (count * n / (count + n))
        count += n
    return torch.stack((mean, m2)).view(2, 1)


def raw_moments(y: Tensor) -> Tensor:
    """E[y^2] - E[y]^2 of float64 sums, each stored in float32."""
    m = y.numel()
    mean, square = (y.double().sum() / m).float(), (y.double().square().sum() / m).float()
    return torch.stack((mean, (square - mean * mean) * m)).view(2, 1)


@pytest.mark.parametrize("kappa", [0.0, 1.0, 1e3, 1e4])
@pytest.mark.parametrize("kind", SPREADS)
def test_tiles_in_closed_form_are_within_the_statistics_bound(kind: str, kappa: float) -> None:
    y = spread_values(kind, kappa)
    oracle = numerics.stats_oracle(y)
    found = judge(closed_form(y), oracle, numerics.stats_bound(y, oracle, tiles=32))
    assert found, found


def test_poor_statistics_are_beyond_the_bound() -> None:
    y = spread_values("even", 1e3)
    oracle = numerics.stats_oracle(y)
    bound = numerics.stats_bound(y, oracle, tiles=32)
    assert not judge(raw_moments(y), oracle, bound)
    ramp = spread_values("ramp", 1e3, 16384)
    oracle = numerics.stats_oracle(ramp)
    bound = numerics.stats_bound(ramp, oracle, tiles=2048)
    assert not judge(one_after_the_other(ramp), oracle, bound)
    # one tile, whose bound is the widest
    y = spread_values("even", 1e3)
    oracle = numerics.stats_oracle(y)
    assert not judge(raw_moments(y), oracle, numerics.stats_bound(y, oracle))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_statistics_of_the_unrounded_sums_are_beyond_the_bound(dtype: torch.dtype) -> None:
    case = CASES["3x3"]
    layer = random_layer(case, dtype)
    wide = numerics.conv_bn_stats_oracle(layer.x, layer.norm, layer.weight, **case.geometry)
    y = wide.to(dtype)
    oracle = numerics.stats_oracle(y)
    bound = numerics.stats_bound(y, oracle)
    assert judge(oracle.float(), oracle, bound)
    assert not judge(numerics.stats_oracle(wide).float(), oracle, bound)


def test_statistics_of_nothing_are_zeros_and_nan_stays() -> None:
    empty = torch.zeros(0, 3, 2, 2)
    assert torch.equal(numerics.stats_oracle(empty), torch.zeros(2, 3, dtype=torch.float64))
    y = torch.randn(2, 3, 2, 2)
    y[0, 1] = math.nan
    oracle = numerics.stats_oracle(y)
    bound = numerics.stats_bound(y, oracle)
    assert judge(oracle.float(), oracle, bound)
    assert not judge(oracle.float().nan_to_num(0.0), oracle, bound)
