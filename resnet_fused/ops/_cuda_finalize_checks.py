"""Self-check of `conv_bn_stats_finalize` in CUDA, a configuration at a time.

As of `conv_bn_stats`: on integers every bit of the output is known. Scale, shift and the running
statistics are held to their bounds, of the mean and M2 that the kernel itself has found.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import numerics
from . import _cuda_finalize, _cuda_stats_checks
from ._cuda_checks import _names, by_the_extension
from ._finalize import OP
from ._selfchecks import GUARD, guarded

EPS = 0.25
COUNTED = 3
WAYS = ((0.5, False), (None, False), (0.25, True))
"""Momentum, and whether gamma and beta are left out."""

conv_bn_stats_finalize_configurations = functools.partial(_names, OP)


def _require(what: str, found: Tensor, oracle: Tensor, bound: Tensor) -> None:
    check = numerics.check_bound(found.cpu(), oracle, bound)
    if not check.ok:
        raise ArithmeticError(f"{what} are wrong: {check}")


def _vectors(k: int, momentum: float | None, bare: bool) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(k)
    gamma, beta, mean = (torch.randn(k, generator=generator) for _ in range(3))
    return {
        "gamma": None if bare else gamma,
        "beta": None if bare else beta,
        "running_mean": mean,
        "running_var": torch.rand(k, generator=generator).double(),
        "num_batches_tracked": torch.tensor(COUNTED) if momentum is None else None,
    }


def _check_rows(measured: Tensor, rows: Tensor, vectors: dict[str, Tensor | None], m: int) -> None:
    """Scale, shift, mean and invstd of m elements a channel."""
    gamma, beta = vectors["gamma"], vectors["beta"]
    oracle = numerics.bn_finalize_oracle(measured, None, gamma, beta, m, EPS, scale=rows[0])
    _require("scale and shift", rows, oracle, numerics.bn_finalize_bound(oracle, measured, beta))


def _check_running(
    measured: Tensor,
    kept: Tensor,
    before: dict[str, Tensor | None],
    after: dict[str, Tensor | None],
    m: int,
    momentum: float | None,
) -> None:
    """What was updated in place, and what was kept of it."""
    mean, var = before["running_mean"], before["running_var"]
    assert mean is not None
    assert var is not None
    counted, tracked = None, after["num_batches_tracked"]
    if tracked is not None:
        counted = COUNTED + 1
        if tracked.item() != counted:
            raise ArithmeticError(f"it counted {tracked.item()}, not {counted}")
    oracle = numerics.bn_update_stats_oracle(measured, None, mean, var, counted, m, momentum)
    for i, (name, old) in enumerate((("running_mean", mean), ("running_var", var))):
        now = after[name]
        assert now is not None
        bound = numerics.bn_update_stats_bound(oracle, mean, var, now.dtype)[i]
        _require("running statistics", now, oracle[i], bound)
        if not torch.equal(kept[i].cpu(), old.double()):
            raise ArithmeticError("the running statistics were kept wrong")


def finalized(launch: Callable[..., None], device: str) -> Callable[..., None]:
    """A launch as of `conv_bn_stats`, by one that finalizes, whose further results it checks.

    Each call takes the next one of `WAYS`.

    Args:
        launch: as `_cuda_finalize.launch`.
        device: of the tensors.

    Raises:
        ArithmeticError: by what it gives, where a result is wrong.
    """
    ways = itertools.cycle(WAYS)

    def run(
        x: Tensor, norm: Tensor | None, weight: Tensor, y: Tensor, stats: Tensor, *geometry: Any,
        wish: tuple[int, int],
    ) -> None:  # fmt: skip
        momentum, bare = next(ways)
        k = y.shape[1]
        before = _vectors(k, momentum, bare)
        after = {n: None if t is None else t.clone().to(device) for n, t in before.items()}
        band, _ = guarded((1, 4, 1, k), torch.float32, device)
        rows = band[GUARD:-GUARD].view(4, k)
        kept = torch.zeros((2, k), dtype=torch.float64, device=device)
        launch(
            x, norm, weight, *after.values(), y, stats, rows, kept, *geometry, EPS, momentum,
            wish=wish,
        )  # fmt: skip
        measured, m = stats.cpu(), y.numel() // k
        _check_rows(measured, rows.cpu(), before, m)
        _check_running(measured, kept, before, after, m, momentum)
        bands = torch.cat([band[:GUARD], band[-GUARD:]]).cpu()
        if not bool(bands.isnan().all()):
            raise ArithmeticError("elements beside scale and shift were written")

    return run


def conv_bn_stats_finalize(configuration: str, device: str) -> None:
    """Checks one configuration, on the cases of `conv_bn_stats`.

    Args:
        configuration: "128x64_4w4s".
        device: "cuda:0".

    Raises:
        ArithmeticError: a result is wrong.
        ImportError: the extension has no such kernel.
        ValueError: another configuration.
    """
    launch = finalized(_cuda_finalize.launch, device)
    by_the_extension(OP, configuration, device, _cuda_stats_checks.check, launch)
