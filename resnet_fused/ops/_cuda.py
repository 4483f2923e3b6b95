"""The CUDA convolutions of the compiled extension as implementations of their ops.

`declare` enters one: its overload, its admission and what it serves. The kernels themselves are in
csrc/, and what a launch takes of them is decided in `_cuda_plan`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _extension, admission, backends
from . import _admitted, _cuda_chain_fp8, _cuda_fp8, _cuda_plan, _e4m3, _results
from ._cuda_sources import SOURCES
from ._library import define

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FP8 = frozenset({_cuda_fp8.OP, _cuda_chain_fp8.OP})
"""Ops whose operands are e4m3, which wgmma alone multiplies here."""
GRADIENTS = ("conv_dgrad", "conv_wgrad")
ORDERED = frozenset({"conv_bn_act", "conv_chain", "head", "stem", *FP8})
"""Ops whose kernels may begin before the one ahead has ended: those of a frozen engine."""
REVERSED = frozenset({"conv_bn_act"})
"""Ops whose kernels walk the batch backwards by an argument that the op itself has not."""
COUNTERS = 1 << 14
"""Tiles whose splits meet by counters that outlive a call: more than a chooser splits."""
Wish = tuple[int, int]
"""Index of a configuration, and splits."""


def supports(call: backends.Call) -> str | None:
    """Why the CUDA kernel can't serve a call, or None."""
    if call.device != "cuda":
        return f"x is on {call.device}"
    if call.dtype not in ((_e4m3.E4M3,) if call.op in FP8 else DTYPES):
        return f"no CUDA kernel for {call.dtype}"
    if call.dtype is torch.float32 and not _cuda_plan.tf32():
        return "float32 is multiplied in TF32, and torch.backends.cudnn.allow_tf32 is off"
    if call.scale_grad:
        return "the gradient of scale needs the convolution's own output"
    if not _extension.available():
        return f"the compiled extension is missing: {_extension.why_not()}"
    if not _extension.has_cuda_kernels():
        return "the extension was built without nvcc"
    if not _cuda_plan.exists(call.op):
        return f"the extension holds no CUDA kernel of {call.op}: build it again"
    device = torch.device("cuda" if call.index is None else f"cuda:{call.index}")
    if call.op in FP8 and torch.cuda.is_available():
        capability = _cuda_plan.gpu(device)[3]
        if capability != _cuda_plan.HOPPER:
            return f"wgmma is for GPUs of capability 9.0, this one has {capability / 10}"
    reason = admission.refusal(call, "cuda")
    # Looked at before the sizes are known: what is left may not take every call.
    partial = reason is None and call.op in GRADIENTS and not _cuda_plan.complete(call.op, device)
    return "some of its configurations were refused on this GPU" if partial else reason


def launch_conv_bn_act(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    out: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    act: str,
    *,
    wish: Wish | None = None,
    reverse: bool = False,
    dependent: bool = False,
    follows: bool = False,
    arrivals: Tensor | None = None,
) -> None:
    """Runs `conv_bn_act` into a given output.

    Args:
        x: [N, C, H, W].
        weight: [K, C/groups, R, S].
        scale: [K], float32.
        shift: [K], float32.
        residual: [N, K, P, Q], or None.
        out: [N, K, P, Q], any layout.
        stride: vertical, horizontal.
        padding: likewise.
        dilation: likewise.
        groups: number of groups.
        act: "relu" or "none".
        wish: a configuration and splits in place of a choice among the admitted ones.
        reverse: whether the last pixels come first.
        dependent: whether the kernel lets the next one begin before it has ended; `order` says
            where that is right, as of follows.
        follows: whether it may itself begin before the kernel ahead has ended.
        arrivals: int32 zeros, which the launch leaves as zeros: counters for the splits. Without
            them, or with too few, others are cleared ahead of the kernel.

    Raises:
        LookupError: no admitted configuration takes it.
        RuntimeError: the launch failed, or refused the wish.
    """
    geometry = (stride, padding, dilation, groups)
    given = (x, weight, residual)
    made = _cuda_plan.problem_of("conv_bn_act", given, geometry, out)
    image, filters, shortcut = made.operands
    # Behind a copy no kernel follows another: what it copies may be what is taken for constant.
    follows = follows and all(a is b for a, b in zip(given, made.operands, strict=True))
    _cuda_plan.raw("conv_bn_act", "out")(
        image, filters, scale, shift, shortcut, *made.geometry, act == "relu", _cuda_plan.tf32(),
        reverse, dependent, follows, arrivals, *(wish or _cuda_plan.wanted(made)), out,
    )  # fmt: skip


def _launch_gradient(
    op: str,
    operands: Sequence[Tensor | None],
    scale: Tensor,
    out: Tensor,
    geometry: Sequence[Any],
    wish: Wish | None,
) -> None:
    made = _cuda_plan.problem_of(op, operands, geometry, out)
    _cuda_plan.raw(op, "out")(
        *made.operands, scale, *made.geometry, _cuda_plan.tf32(),
        *(wish or _cuda_plan.wanted(made)), out,
    )  # fmt: skip


def launch_conv_dgrad(
    dy: Tensor,
    y: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    out: Tensor,
    *geometry: Any,
    wish: Wish | None = None,
) -> None:
    """Runs `conv_dgrad` into `out` [N, C, H, W]; `geometry` is stride, padding, dilation, groups.

    `wish` and errors are those of `launch_conv_bn_act`.
    """
    _launch_gradient("conv_dgrad", (dy, y, weight), scale, out, geometry, wish)


def launch_conv_wgrad(
    dy: Tensor,
    y: Tensor | None,
    x: Tensor,
    scale: Tensor,
    out: Tensor,
    *geometry: Any,
    wish: Wish | None = None,
) -> None:
    """Runs `conv_wgrad` into `out` [K, C/groups, R, S]; likewise."""
    _launch_gradient("conv_wgrad", (dy, y, x), scale, out, geometry, wish)


_launches: dict[str, Callable[..., bool | None]] = {}


def order(op: str, *, early: bool, follows: bool, reverse: bool) -> dict[str, Any]:
    """How a launch of `ORDERED` stands among others, as arguments of `_launch`.

    csrc/launch/flow.h has the rules; they are those of Triton's kernels, so that both kinds may
    follow each other.

    Args:
        op: its name.
        early: whether it waits for the kernel ahead itself, and lets the next one begin early:
            only where `triton._limits.not_dependent` gives no reason against it.
        follows: whether the kernel ahead is such a one too.
        reverse: whether the last pixels come first, for an op whose schema does not say so.
    """
    found = {"dependent": early, "follows": early and follows}
    return {**found, "reverse": True} if reverse and op in REVERSED else found


def prepared(op: str, *arguments: Any) -> dict[str, Any]:
    """What calls with the same sizes can share, one after the other, as arguments of `_launch`.

    Args:
        op: of `ORDERED`.
        arguments: of the op's schema.
    """
    if op != "conv_bn_act":
        return {}
    x, weight, _, _, residual, *geometry, _ = arguments
    like = [None if t is None else t.to("meta") for t in arguments[:5]]
    out = _results.FORMS[op].empty(*like, *arguments[5:])
    made = _cuda_plan.problem_of(op, (x, weight, residual), geometry, out, real=False)
    names = _admitted.names(op, "cuda", x.device)
    plan = _cuda_plan.tuned(made, x.device) or _cuda_plan.choose(
        made, _cuda_plan.gpu(x.device), names
    )
    if plan.workspace_bytes == 0:
        return {}
    return {"arrivals": torch.zeros(COUNTERS, dtype=torch.int32, device=x.device)}


def _launch(op: str, *arguments: Any, **how: Any) -> bool | None:
    launches = {
        "conv_bn_act": launch_conv_bn_act,
        "conv_dgrad": launch_conv_dgrad,
        "conv_wgrad": launch_conv_wgrad,
    }
    return (launches.get(op) or _launches[op])(*arguments, **how)


def declare(
    op: str,
    schema: str,
    fake: Callable[..., Any],
    *,
    launch: Callable[..., None] | None = None,
    checks: str = "_cuda_checks",
) -> None:
    """Defines `torch.ops.resnet_fused.<op>.cuda` and enters the kernel for admission.

    Args:
        op: a key of `_cuda_sources.SOURCES`.
        schema: of the op.
        fake: shape, dtype and strides of its result.
        launch: of an op that is none of this module's: launch(*operands, *results, *options).
        checks: the module of `resnet_fused.ops` that holds its self-check.
    """
    if launch is not None:
        _launches[op] = launch
    define(f"{op}.cuda", schema, _results.body(op, functools.partial(_launch, op)), fake)
    admission.register(
        admission.Kernel(
            op,
            "cuda",
            SOURCES[op],
            f"resnet_fused.ops.{checks}:{op}_configurations",
            f"resnet_fused.ops.{checks}:{op}",
        )
    )
