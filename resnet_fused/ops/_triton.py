"""Triton's overloads of the ops, defined when the first one is asked for.

Importing Triton takes a second, and is in vain where no GPU is. Each body allocates its output and
has a kernel of `resnet_fused.triton` write into it; as `torch.library.triton_op` they show Inductor
the kernel itself. Kernels in Triton's interpreter can't be traced: ordinary ops hold those.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _tuned, admission, backends
from ..triton import _limits, _tiles
from . import _admitted, _results, _tuned_calls
from ._library import NAMESPACE, define

INTERPRETED = (torch.float32, torch.float16)
COMPILED = (torch.float32, torch.bfloat16, torch.float16)
FP8 = frozenset({"conv_bn_act_fp8"})
"""Ops whose operands are e4m3."""
WITHOUT_TILES = frozenset(
    {
        "bn_act",
        "bn_act_pool",
        "bn_act_pool_backward",
        "bn_add_act",
        "bn_add_act_backward",
        "bn_backward_apply",
        "bn_backward_finalize",
        "bn_finalize",
        "bn_update_stats",
        "head",
    }
)
"""Ops whose kernels have one configuration, no table of tiles."""
WITH_REASONS = frozenset(
    {
        "bn_add_act_conv_stats",
        "conv_bn_act",
        "conv_bn_dgrad_end",
        "conv_bn_grad1x1",
        "conv_bn_grad1x1_end",
        "conv_chain",
        "stem",
        *FP8,
    }
)
"""Ops that ask their kernel about each call's sizes, and go another way where it can't take it."""
ORDERED = frozenset({"conv_bn_act", "conv_chain", "head", "stem", *FP8})
"""Ops whose kernels may begin before the one ahead has ended: those of a frozen engine."""
REVERSED = frozenset({"conv_bn_act"})
"""Ops whose kernels walk the batch backwards by an argument that the op itself has not."""
E4M3_ONLY = (torch.float8_e4m3fn,)
SOURCES = (
    "triton/_bn.py",
    "triton/_dependent.py",
    "triton/_dgrad.py",
    "triton/_elementwise.py",
    "triton/_gemm.py",
    "triton/_implicit.py",
    "triton/_launch.py",
    "triton/_tiles.py",
    "triton/_vectors.py",
    "triton/_wgrad.py",
)
BESIDE = {
    "bn_add_act_conv_stats": ("triton/_block_end.py", "triton/conv_bn_stats.py"),
    "conv_bn_act_fp8": ("triton/conv_bn_act.py",),
    "conv_bn_dgrad": ("triton/_traffic.py", "triton/conv_dgrad.py"),
    "conv_bn_dgrad_end": (
        "triton/_traffic.py",
        "triton/conv_bn_dgrad.py",
        "triton/conv_dgrad.py",
    ),
    "conv_bn_grad1x1": ("triton/_grad1x1.py",),
    "conv_bn_grad1x1_end": (
        "triton/_grad1x1.py",
        "triton/_grad1x1_end.py",
        "triton/_traffic.py",
        "triton/conv_bn_dgrad.py",
        "triton/conv_bn_dgrad_end.py",
        "triton/conv_bn_grad1x1.py",
        "triton/conv_dgrad.py",
    ),
    "conv_bn_wgrad": ("triton/conv_wgrad.py",),
    "conv_chain": ("triton/_chain_tiles.py",),
    "conv_dgrad": ("triton/_traffic.py",),
    "stem": ("triton/_stem_pack.py", "triton/_stem_tiles.py"),
}
"""Ops whose kernels take sizes from another file than their own."""


def supports(call: backends.Call) -> str | None:
    """Why Triton's kernel can't serve a call, or None."""
    if not _limits.installed():
        return "the triton package is not installed"
    if call.device == "cpu" and _limits.interpreted():
        if backends.requested()[0] != "triton":
            return "Triton's interpreter is taken only when asked for by name"
        if call.dtype not in (E4M3_ONLY if call.op in FP8 else INTERPRETED):
            return f"Triton's interpreter is not right in {call.dtype}"
    elif call.device != "cuda":
        return f"x is on {call.device}"
    elif call.dtype not in (E4M3_ONLY if call.op in FP8 else COMPILED):
        return f"no Triton kernel for {call.dtype}"
    if call.scale_grad:
        return "the gradient of scale needs the convolution's own output"
    if call.device != "cuda":
        return None
    reason = _too_old(call) if call.op in FP8 else None
    reason = reason or admission.refusal(call, "triton")
    # Looked at before the sizes are known: what is left may not take every call.
    blind = call.op not in (*WITH_REASONS, *WITHOUT_TILES)
    if reason is None and blind and not complete(call.op, _device(call)):
        return "some of its configurations were refused on this GPU"
    return reason


def _too_old(call: backends.Call) -> str | None:
    """That a GPU multiplies no e4m3, or None; also where there is none to ask."""
    if not torch.cuda.is_available():
        return None
    capability = _limits.limits(_device(call)).capability
    if capability >= _tiles.E4M3_CAPABILITY:
        return None
    return f"sm_{capability} multiplies no e4m3, sm_{_tiles.E4M3_CAPABILITY} is the first that does"


def _device(call: backends.Call) -> torch.device:
    return torch.device("cuda" if call.index is None else f"cuda:{call.index}")


def allowed(op: str, device: torch.device) -> frozenset[str] | None:
    """Configurations that were admitted on a device; None where the user's word is enough."""
    return _admitted.names(op, "triton", device)


def complete(op: str, device: torch.device) -> bool:
    """Whether every configuration may be used, so that any call finds one."""
    names = allowed(op, device)
    return names is None or len(names) == len(_tiles.TILES)


def unfit(
    x: Tensor, weight: Tensor, output_shape: Sequence[int], groups: int, op: str = "conv_bn_act"
) -> str | None:
    """Why no admitted configuration can take this very call of conv_bn_act, or None.

    Only a GPU on which some configuration has been refused can come to this.
    """
    if complete(op, x.device):
        return None
    names = allowed(op, x.device)
    from ..triton import conv_bn_act

    out = torch.empty(tuple(output_shape), device="meta")
    try:
        product = conv_bn_act.product_of(x, weight, out, groups)
        _tiles.choose(product, _limits.limits(x.device), names)
    except LookupError as error:
        return str(error)
    return None


def detail(
    x: Tensor, weight: Tensor, residual: Tensor | None, geometry: Sequence[Any]
) -> str | None:
    """For `explain`: that tuning chose the configuration of this very call; None if it did not."""
    call = (x.dtype, x.shape, weight.shape, geometry[:4], residual is not None)
    return tuned("conv_bn_act", x.device, *call)


def tuned(op: str, device: torch.device, *call: Any) -> str | None:
    """What `explain` says of a call whose configuration tuning chose; None of any other.

    Args:
        op: a convolution's.
        device: of the tensors.
        call: dtype, x's shape, weight's shape, geometry, third, as of `_tuned.key`.
    """
    found = _tuned.find("triton", device, op, *call)
    names = allowed(op, device)
    if found is None or (names is not None and found.configuration not in names):
        return None
    return found.why


def _launch(op: str, *arguments: Any, **how: Any) -> None:
    """A kernel's launch, with the admitted configurations where it has several.

    Args:
        op: its name.
        arguments: of the launch.
        how: what `order` and `prepared` gave.
    """
    launch = importlib.import_module(f"resnet_fused.triton.{op}").launch
    if op not in WITHOUT_TILES:
        names = allowed(op, arguments[0].device)
        how |= _tuned_calls.options(op, arguments, names)
    launch(*arguments, **how)


def order(op: str, *, early: bool, follows: bool, reverse: bool) -> dict[str, Any]:
    """How a launch of `ORDERED` stands among others, as arguments of `_launch`.

    Args:
        op: its name.
        early: whether it waits for the kernel ahead itself, and lets the next one begin early:
            only where `_limits.not_dependent` gives no reason against it.
        follows: whether the kernel ahead is such a one too.
        reverse: whether the last pixels come first, for an op whose schema does not say so.
    """
    from ..triton._dependent import Flow

    found: dict[str, Any] = {"flow": Flow(early, follows)}
    return {**found, "reverse": True} if reverse and op in REVERSED else found


def prepared(op: str, *arguments: Any) -> dict[str, Any]:
    """What calls with the same constants can share, as arguments of `_launch`; often nothing.

    Args:
        op: its name.
        arguments: those of its launch, but for the results.
    """
    module = importlib.import_module(f"resnet_fused.triton.{op}")
    prepare = getattr(module, "prepare", None)
    return {} if prepare is None else prepare(*arguments)


_BODIES = {op: _results.body(op, functools.partial(_launch, op)) for op in _results.FORMS}
_declared: dict[str, tuple[str, Callable[..., Any], tuple[str, ...]]] = {}


def declare(
    op: str,
    schema: str,
    fake: Callable[..., Any],
    checks: str = "_triton_checks",
    mutates: tuple[str, ...] = (),
) -> None:
    """Notes the schema and the fake of an op that has a Triton kernel, and enters the kernel.

    Args:
        op: its name.
        schema: arguments and results.
        fake: makes empty results.
        checks: the module of `resnet_fused.ops` that holds its self-check.
        mutates: arguments that it writes into.
    """
    _declared[op] = schema, fake, mutates
    admission.register(
        admission.Kernel(
            op,
            "triton",
            (f"triton/{op}.py", *BESIDE.get(op, ()), *SOURCES),
            f"resnet_fused.ops.{checks}:{op}_configurations",
            f"resnet_fused.ops.{checks}:{op}",
        )
    )


@functools.cache
def load() -> None:
    """Defines `torch.ops.resnet_fused.<op>.triton` for every declared op.

    Raises:
        ImportError: Triton can't be imported.
    """
    import triton  # noqa: F401

    for op, (schema, fake, mutates) in _declared.items():
        if _limits.interpreted():
            define(f"{op}.triton", schema, _BODIES[op], fake)
        else:
            torch.library.triton_op(
                f"{NAMESPACE}::{op}.triton", _BODIES[op], mutates_args=mutates, schema=schema
            )
