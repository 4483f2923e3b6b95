"""Entering an op of inference that other ops can be put together to, where no kernel serves it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import backends
from . import _cuda_stem, _results, _triton
from ._library import define


def _supports_parts(call: backends.Call) -> str | None:
    """Serves wherever the parts do, unless the user asks for another device's backend."""
    wanted = backends.requested()[0]
    if wanted in ("cpu", "cuda") and wanted != call.device:
        return f"x is on {call.device}"
    return None


def enter(
    op: str,
    schema: str,
    reference: Callable[..., Any],
    parts: Callable[..., Any],
    checks: str,
    *,
    kernel: str,
    by: str,
    roundings: tuple[str, str, str],
    cuda: str | None = None,
) -> None:
    """Defines an op and its fake; enters its GPU kernels, its parts and its reference.

    Args:
        op: its name.
        schema: arguments and results.
        reference: computes it in plain PyTorch.
        parts: computes it by other ops, each by the implementation that serves it.
        checks: the module of `resnet_fused.ops` that holds its kernel's self-check.
        kernel: what the Triton kernel is, for `explain`.
        by: likewise of the parts.
        roundings: of kernel, parts and reference, as `backends.Implementation` names them.
        cuda: what the CUDA kernel is, likewise; it comes first. None: there is none.
    """
    fake = _results.FORMS[op].empty
    define(f"{op}.parts", schema, parts, fake)
    define(f"{op}.reference", schema, reference, fake)
    _triton.declare(op, schema, fake, checks)
    plain = "plain PyTorch, any device and dtype"
    if cuda is not None:
        _cuda_stem.declare(op, schema, fake)
        backends.register(
            backends.Implementation(op, "cuda", ("cuda",), cuda, _cuda_stem.supports, roundings[0])
        )
    for name, devices, about, supports, rounding in (
        ("triton", ("triton",), kernel, _triton.supports, roundings[0]),
        ("parts", ("cpu", "cuda"), by, _supports_parts, roundings[1]),
        ("reference", ("reference",), plain, lambda call: None, roundings[2]),
    ):
        backends.register(backends.Implementation(op, name, devices, about, supports, rounding))
