"""The bound tier: random data against float64, element by element."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import resnet_fused as rf
from gpu import operands
from gpu.device import is_cuda
from gpu.operands import MODES, find
from resnet_fused import backends, numerics
from resnet_fused.cases import BN_ACT_CASES, BnActCase
from resnet_fused.ops._selfchecks import _lay_out, _native, guarded

SPECIAL_CASES = ("1x1", "3x3_residual", "3x3_groups4", "stem", "odd_channels")
PLACES = ("nan_x", "inf_x", "nan_weight", "nan_residual", "inf_shift", "nan_dy", "nan_y")
LAYOUTS = ("nchw", "sliced_channels", "sliced_columns", "unaligned", "expanded")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def conv(
    device: str,
    op: str,
    case: str,
    mode: str,
    batch: int | None = None,
    special: str = "",
    implementation: str = "triton",
) -> dict[str, Any]:
    """One op in the configuration that "auto" would choose.

    Args:
        device: where.
        op: "conv_bn_act", "conv_dgrad" or "conv_wgrad".
        case: its name.
        mode: of `MODES`.
        batch: images; None for the case's own.
        special: of `PLACES`, where a NaN or an infinity goes.
        implementation: "triton" or "cuda".
    """
    why = operands.why_no_cuda(device) if implementation == "cuda" else None
    if why is not None:
        return {"ok": None, "skipped": why}
    dtype, allowed = MODES[mode]
    made = find(case, batch)
    made = operands.shrunk(made, device) if batch is not None else made
    given = operands.make(made, dtype, device)
    if special:
        place(given, special)
    with operands.tf32(allowed):
        buffer, out = operands.poisoned(op, made, dtype, device)
        found: dict[str, Any] = {}
        if out.numel() and given.dy.numel():
            found["plan"] = operands.title(operands.plan_of(op, made, given, implementation))
            found["configuration"] = found["plan"].partition("/")[0]
        operands.launch(op, made, given, out, implementation=implementation)
        found |= operands.judge(op, made, given, out, mode)
    if not operands.bands_hold(buffer):
        found |= {"ok": False, "error": f"{op}: elements beside the output were written"}
    return found


def place(given: operands.Operands, special: str) -> None:
    """Puts a NaN or an infinity into one operand, in the middle and at both ends."""
    kind, _, name = special.partition("_")
    target = getattr(given, name)
    if target is None or not target.numel():
        return
    shape = target.shape
    value = math.nan if kind == "nan" else math.inf
    for part in (0, 0.5, 1):
        index = tuple(min(size - 1, int(part * size)) for size in shape)
        target[index] = -value if part == 1 else value


def _laid_out(t: Tensor, layout: str) -> Tensor:
    """The same values [N, C, H, W] in another place; "expanded" repeats the first image."""
    n, c, h, w = t.shape
    if layout == "sliced_channels":
        wide = torch.full((n, c + 3, h, w), math.nan, dtype=t.dtype, device=t.device)
        wide = wide.contiguous(memory_format=torch.channels_last)
        wide[:, 2 : 2 + c] = t
        return wide[:, 2 : 2 + c]
    kinds = {"sliced_columns": "sliced", "unaligned": "unaligned", "expanded": "expanded"}
    return _lay_out(t, BnActCase("", n, c, h, w, layout=kinds.get(layout, layout)))


def layout(device: str, case: str, mode: str, layout: str) -> dict[str, Any]:
    """The public op on operands that are not plain channels_last; the gradients too."""
    dtype, allowed = MODES[mode]
    made = find(case)
    given = operands.make(made, dtype, device)
    given.x = _laid_out(given.x, layout)
    given.dy = _laid_out(given.dy, layout)
    if layout == "nchw":
        given.weight = given.weight.contiguous()
    if given.residual is not None:
        given.residual = _laid_out(given.residual, layout)
    with operands.tf32(allowed), rf.backend("triton"):
        for op in ("conv_bn_act", "conv_dgrad", "conv_wgrad"):
            call = backends.Call(op, device.partition(":")[0], dtype)
            served = backends.choose(call).implementation.name
            if served != "triton":
                return {"ok": False, "error": f"{op} was served by {served}"}
        terms = (given.x, given.weight, given.scale, given.shift, given.residual)
        y = rf.ops.conv_bn_act(*terms, **made.geometry, act=made.act)
        result = {"conv_bn_act": y}
        more = {"y": given.y, **made.geometry}
        result["conv_dgrad"] = rf.ops.conv_dgrad(
            given.dy, given.weight, given.scale, input_size=made.input_shape, **more
        )
        result["conv_wgrad"] = rf.ops.conv_wgrad(
            given.dy, given.x, given.weight, given.scale, **more
        )
        found: dict[str, Any] = {"ok": True}
        for op, out in result.items():
            judged = operands.judge(op, made, given, out, mode)
            found[op] = judged["truncate"]
            if not judged["ok"]:
                return {**found, "ok": False, "error": judged["error"]}
    return found


def _bn_act_launch(implementation: str) -> Callable[..., None] | None:
    if implementation == "cuda":
        from resnet_fused import _extension

        return _native if _extension.available() else None
    return operands.kernel_of("bn_act").launch


def bn_act(device: str, implementation: str, dtype: str, large: bool = False) -> dict[str, Any]:
    """`bn_act` on every case's sizes and layouts, or on one large activation.

    Args:
        device: where.
        implementation: "triton" or "cuda".
        dtype: of `DTYPES`.
        large: one activation of ResNet-50's first stage in place of the cases.
    """
    from resnet_fused import _extension

    launch = _bn_act_launch(implementation)
    if launch is None:
        return {"ok": None, "skipped": f"no extension: {_extension.why_not()}"}
    if is_cuda(device) and implementation == "cuda" and not _extension.has_cuda_kernels():
        return {"ok": None, "skipped": "the extension was built without nvcc"}
    cases = BN_ACT_CASES
    if large:
        n, size = (64, 56) if is_cuda(device) else (2, 6)
        cases = (BnActCase("large", n, 256, size, size, True),)
    worst, failed = 0.0, ""
    generator = torch.Generator().manual_seed(1)
    for case in cases:
        check = _one_bn_act(case, DTYPES[dtype], device, launch, generator)
        worst = max(worst, check.worst)
        if not check.ok:
            failed = failed or f"{case.name}: {check}"
    found: dict[str, Any] = {"ok": not failed, "worst": worst, "cases": len(cases)}
    return {**found, "error": failed} if failed else found


def _one_bn_act(
    case: BnActCase,
    dtype: torch.dtype,
    device: str,
    launch: Callable[..., None],
    generator: torch.Generator,
) -> numerics.BoundCheck:
    def image() -> Tensor:
        made = torch.randn(case.shape, generator=generator).to(device, dtype)
        return _lay_out(made, case)

    x, residual = image(), image() if case.residual else None
    scale, shift = (torch.randn(case.c, generator=generator).to(device) for _ in range(2))
    _, out = guarded(case.shape, dtype, device)
    if case.layout == "nchw":
        out = torch.full(case.shape, math.nan, dtype=dtype, device=device)
    launch(x, scale, shift, residual, out, case.act)
    oracle = numerics.bn_act_oracle(x, scale, shift, residual, case.act)
    bound = numerics.bn_act_bound(x, scale, shift, residual, oracle)
    return numerics.check_bound(out, oracle, bound)
