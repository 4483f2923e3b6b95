"""BatchNorm's arithmetic on per-channel values by the emulated CUDA kernels, as `emulated`'s."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import emulated
import torch
from torch import Tensor

from resnet_fused import backends
from resnet_fused.ops import _library, _passes, _results

DTYPES = (torch.float32, torch.float64)
Values = tuple[int, bool]


def _values(t: Tensor | None) -> Values:
    """Address, and whether it is of doubles."""
    return emulated._address(t), t is not None and t.dtype is torch.float64


def _run(
    op: str, inputs: dict[str, Tensor | None], outputs: dict[str, Tensor], **options: Any
) -> None:
    """Runs a kernel on dense vectors by name; `total` and `tracked` are plain addresses."""
    tensors = inputs | outputs
    key = (op, *(None if t is None else (tuple(t.shape), t.dtype) for t in tensors.values()))
    plain = ("total", "tracked")
    report = getattr(emulated.load(), op)(
        emulated.settings(key, inputs, outputs),
        **{name: _values(t) for name, t in tensors.items() if name not in plain},
        **{name: emulated._address(tensors[name]) for name in plain if name in tensors},
        **options,
    )
    emulated.reported(report)


def bn_finalize(
    stats: Tensor,
    total: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    count: int,
    eps: float,
) -> Tensor:
    """The op, by the emulated kernel."""
    guarded = emulated.Guarded(stats.new_empty((4, stats.shape[1])))
    vectors = {"gamma": _passes.plain(gamma), "beta": _passes.plain(beta)}
    _run(
        "bn_finalize", {"stats": stats.contiguous(), "total": total, **vectors},
        {"norm": guarded.tensor}, channels=stats.shape[1], elements=count, eps=eps,
    )  # fmt: skip
    return guarded.result()


def bn_update_stats(
    stats: Tensor,
    total: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    count: int,
    momentum: float | None,
) -> None:
    """The op, by the emulated kernel in the place of the raw op's."""

    def raw(
        stats: Tensor, total: Tensor | None, mean: Tensor, variance: Tensor, count: int,
        factor: float | None, tracked: Tensor | None = None,
    ) -> None:  # fmt: skip
        running = {"running_mean": mean, "running_var": variance}
        guarded = {name: emulated.Guarded(t) for name, t in running.items()}
        for name, t in running.items():
            guarded[name].tensor.copy_(t)
        outputs = {name: one.tensor for name, one in guarded.items()}
        if tracked is not None:
            guarded["tracked"] = emulated.Guarded(tracked.view(1))
            guarded["tracked"].tensor.copy_(tracked)
            outputs["tracked"] = guarded["tracked"].tensor
            running["tracked"] = tracked.view(1)
        inputs = {"stats": stats, "total": total}
        if tracked is None:
            inputs["tracked"] = None
        is_long = tracked is not None and tracked.dtype is torch.int64
        _run(
            "bn_update_stats", inputs, outputs, tracked_is_long=is_long, channels=stats.shape[1],
            elements=count, factor=factor,
        )  # fmt: skip
        for name, t in running.items():
            t.copy_(guarded[name].result())

    before = _passes.passes.__dict__.get("bn_update_stats_out")
    _passes.passes.bn_update_stats_out = raw
    try:
        _passes.bn_update_stats(
            stats, total, running_mean, running_var, num_batches_tracked, count, momentum
        )
    finally:
        del _passes.passes.bn_update_stats_out
        if before is not None:
            _passes.passes.bn_update_stats_out = before


def bn_backward_finalize(
    sums: Tensor,
    all_sums: Tensor | None,
    total: Tensor | None,
    norm: Tensor,
    count: int,
    row: int,
    frozen: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op, by the emulated kernel."""
    names = ("coefficients", "dgamma", "dbeta")
    made = _results.FORMS["bn_backward_finalize"].empty(sums)
    guarded = {name: emulated.Guarded(t) for name, t in zip(names, made, strict=True)}
    inputs = {"sums": sums, "all_sums": sums if all_sums is None else all_sums, "total": total}
    _run(
        "bn_backward_finalize", inputs | {"norm": norm},
        {name: one.tensor for name, one in guarded.items()},
        channels=sums.shape[1], elements=count, row=row, frozen=frozen,
    )  # fmt: skip
    coefficients, dgamma, dbeta = (one.result() for one in guarded.values())
    return coefficients, dgamma, dbeta


BODIES: dict[str, Callable[..., Any]] = {
    "bn_finalize": bn_finalize,
    "bn_update_stats": bn_update_stats,
    "bn_backward_finalize": bn_backward_finalize,
}


def _register(op: str) -> None:
    module = "bn_finalize" if op == "bn_update_stats" else op
    ours = importlib.import_module(f"resnet_fused.ops.{module}")
    schema = ours.UPDATE_SCHEMA if op == "bn_update_stats" else ours.SCHEMA
    _library.define(f"{op}.{emulated.NAME}", schema, BODIES[op], _results.FORMS[op].empty)
    about, reason = "the CUDA kernel on the CPU", "the emulator serves the tests alone"
    backends.register(
        backends.Implementation(op, emulated.NAME, (), about, lambda call: reason, "fused")
    )
    emulated.DTYPES[op] = DTYPES


for _op in BODIES:
    _register(_op)
