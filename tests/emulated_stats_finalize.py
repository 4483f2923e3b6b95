"""`conv_bn_stats_finalize` by the emulated CUDA kernels: the launch of `emulated_stats`' op."""

from __future__ import annotations

from typing import Any

import emulated
import emulated_stats
import torch
from torch import Tensor

from resnet_fused import backends
from resnet_fused.ops import _finalize, _library, _passes, _results
from resnet_fused.ops.conv_bn_stats_finalize import SCHEMA

OP = _finalize.OP
DTYPES = emulated_stats.DTYPES
FORM = _results.FORMS[OP]


def _in_place(tensors: dict[str, Tensor | None]) -> dict[str, emulated.Guarded]:
    """What a launch updates, by name: copies of what is there, between guard bands."""
    made = {}
    for name, t in tensors.items():
        if t is not None:
            made[name] = emulated.Guarded(t.view(-1))
            made[name].tensor.copy_(t.view(-1))
    return made


def _values(t: Tensor | None) -> tuple[int, bool]:
    """Address, and whether it is of doubles."""
    return emulated._address(t), t is not None and t.dtype is torch.float64


def finalized(
    x: Tensor, norm: Tensor | None, weight: Tensor, gamma: Tensor | None, beta: Tensor | None,
    read: _passes.Running, results: tuple[Tensor, ...], *options: Any,
) -> dict[str, Tensor]:  # fmt: skip
    """The launch, of vectors as it takes them; what it wrote, by name."""
    *geometry, eps, _ = options
    updated = dict(zip(("running_mean", "running_var", "tracked"), read.tensors, strict=True))
    guarded = dict(zip(("y", "stats", "rows", "kept"), map(emulated.Guarded, results), strict=True))
    if updated["running_mean"] is None:
        guarded.pop("kept")
    guarded |= _in_place(updated)
    written = {name: one.tensor for name, one in guarded.items()}
    problem = emulated_stats.problem_of(x, norm, weight, written["y"], written["stats"], *geometry)
    tracked = written.get("tracked")
    problem = problem.finalizing(
        norm=emulated._address(written["rows"]),
        kept=emulated._address(written.get("kept")),
        gamma=_values(gamma),
        beta=_values(beta),
        eps=eps,
        running_mean=_values(written.get("running_mean")),
        running_var=_values(written.get("running_var")),
        tracked=emulated._address(tracked),
        tracked_is_long=tracked is not None and tracked.dtype is torch.int64,
        factor=read.factor,
    )
    layout = [(tuple(t.shape), emulated._strides(t)) for t in (x, weight, written["y"])]
    facts = [None if t is None else t.dtype for t in (gamma, beta, *read.tensors)]
    key = (OP, x.dtype, *layout, *geometry, norm is None, x.data_ptr() % 16, *facts)
    inputs = {"x": x, "norm": norm, "weight": weight, "gamma": gamma, "beta": beta}
    found = emulated._run_planned(emulated_stats.OP, problem, key, inputs, guarded)
    return dict(zip(guarded, found, strict=True))


def conv_bn_stats_finalize(*arguments: Any) -> tuple[Tensor, ...]:
    """The op, by the emulated kernel, in the order of its schema."""
    x, norm, weight, gamma, beta, *running = arguments[: FORM.options]
    options = arguments[FORM.options :]
    results = FORM.empty(*arguments)
    if not results[0].numel():
        return _library.overload(OP, "reference")(*arguments)
    read = _passes.Running.of(*running, options[-1])
    vectors = (_passes.plain(gamma), _passes.plain(beta))
    found = finalized(x, norm, weight, *vectors, read, results, *options)
    for name, t in zip(("running_mean", "running_var", "tracked"), read.tensors, strict=True):
        if t is not None:
            t.copy_(found[name].view(t.shape))
    read.write_back()
    return found["y"], found["stats"], found["rows"], found.get("kept", results[3])


def _register() -> None:
    _library.define(f"{OP}.{emulated.NAME}", SCHEMA, conv_bn_stats_finalize, FORM.empty)
    about, reason = "the CUDA kernels on the CPU", "the emulator serves the tests alone"
    backends.register(
        backends.Implementation(OP, emulated.NAME, (), about, lambda call: reason, "fused")
    )
    emulated.DTYPES[OP] = DTYPES


_register()
