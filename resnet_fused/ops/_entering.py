"""Entering an op of inference that other ops can be put together to, where no kernel serves it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from .. import backends
from . import _cuda, _results, _triton
from ._library import define


def _supports_parts(call: backends.Call) -> str | None:
    """Serves wherever the parts do, unless the user asks for another device's backend."""
    wanted = backends.requested()[0]
    if wanted in ("cpu", "cuda") and wanted != call.device:
        return f"x is on {call.device}"
    return None


class Cuda(NamedTuple):
    """The CUDA kernel of an op.

    Attributes:
        kernel: what it is, for `explain`.
        supports: why it can't serve a call, or None.
        launch: launch(*operands, *results, *options, **how); how is what `_cuda.order` gives, or a
            wish. Whether it copied a result behind the kernel, or None.
        checks: the module of `resnet_fused.ops` that holds its self-check.
        first: whether it comes before Triton's, where no record says otherwise.
    """

    kernel: str
    supports: Callable[[backends.Call], str | None]
    launch: Callable[..., bool | None]
    checks: str
    first: bool = False


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
    cuda: Cuda | None = None,
) -> None:
    """Defines an op and its fake; enters its kernels, its parts and its reference.

    Args:
        op: its name.
        schema: arguments and results.
        reference: computes it in plain PyTorch.
        parts: computes it by other ops, each by the implementation that serves it.
        checks: the module of `resnet_fused.ops` that holds its kernel's self-check.
        kernel: what the Triton kernel is, for `explain`.
        by: likewise of the parts.
        roundings: of kernel, parts and reference, as `backends.Implementation` names them.
        cuda: its CUDA kernel, if it has one.
    """
    fake = _results.FORMS[op].empty
    define(f"{op}.parts", schema, parts, fake)
    define(f"{op}.reference", schema, reference, fake)
    _triton.declare(op, schema, fake, checks)
    plain = "plain PyTorch, any device and dtype"
    entries = [("triton", ("triton",), kernel, _triton.supports, roundings[0])]
    if cuda is not None:
        _cuda.declare(op, schema, fake, launch=cuda.launch, checks=cuda.checks)
        place = 0 if cuda.first else 1
        entries.insert(place, ("cuda", ("cuda",), cuda.kernel, cuda.supports, roundings[0]))
    for name, devices, about, supports, rounding in (
        *entries,
        ("parts", ("cpu", "cuda"), by, _supports_parts, roundings[1]),
        ("reference", ("reference",), plain, lambda call: None, roundings[2]),
    ):
        backends.register(backends.Implementation(op, name, devices, about, supports, rounding))
