"""Random operands of a case, the kernels that run it, and its float64 oracle without cuDNN."""

from __future__ import annotations

import contextlib
import dataclasses
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpu.device import is_cuda
from resnet_fused import _extension, numerics
from resnet_fused.cases import CONV_CASES, RESNET50_LAYERS, ConvCase
from resnet_fused.ops import _cuda, _cuda_plan
from resnet_fused.ops._selfchecks import GUARD, guarded
from resnet_fused.triton import _launch, _limits, _tiles

MODES = {
    "bf16": (torch.bfloat16, False),
    "fp16": (torch.float16, False),
    "tf32": (torch.float32, True),
    "fp32": (torch.float32, False),
}
"""Name -> dtype, and whether torch's switch lets convolutions take TF32."""

DEPTH = {"bf16": 16, "fp16": 16, "tf32": 8, "fp32": 2}
"""Depth of the matrix instruction, for the bound of sums that are cut. Float32 without TF32 takes
three products of TF32 for each, of 8: a step for every 2 or 3."""

CUDA_MODES = ("bf16", "fp16", "tf32")
"""What the CUDA convolutions multiply; float32 without TF32 is PyTorch's."""

ON_THE_CPU = 3e7
"""Multiply-adds up to which the oracle is the CPU's, independent of the GPU."""


def modes(device: str) -> tuple[str, ...]:
    """The modes that a device can be judged in: Triton's interpreter is not right in bfloat16."""
    return tuple(MODES) if is_cuda(device) else ("fp16", "fp32")


def find(name: str, batch: int | None = None) -> ConvCase:
    """A case of the list, or a layer of ResNet-50 at a batch size."""
    for case in (*CONV_CASES, *RESNET50_LAYERS):
        if case.name == name:
            return case if batch is None else dataclasses.replace(case, n=batch)
    raise KeyError(f"no case is called {name!r}")


def shrunk(case: ConvCase, device: str) -> ConvCase:
    """The case itself on a GPU; a tiny one like it where Triton's interpreter runs."""
    if is_cuda(device):
        return case
    stride = case.stride[0]
    size = min(case.h, 4 * stride + case.r // 2)
    return dataclasses.replace(
        case, n=min(case.n, 2), c=min(case.c, 24), k=min(case.k, 24), h=size, w=size
    )


@dataclass
class Operands:
    """One call's tensors on the device; dy and y for the gradients."""

    x: Tensor
    weight: Tensor
    scale: Tensor
    shift: Tensor
    residual: Tensor | None
    dy: Tensor
    y: Tensor | None

    def to(self, device: str) -> Operands:
        """The same on another device."""
        values = (getattr(self, f.name) for f in dataclasses.fields(self))
        return Operands(*(None if t is None else t.to(device) for t in values))


def make(case: ConvCase, dtype: torch.dtype, device: str, salt: str = "") -> Operands:
    """Random operands in channels_last, made on the CPU: the same in each run and everywhere."""
    seed = zlib.crc32(f"{case.name}{case.n}{dtype}{salt}".encode())
    generator = torch.Generator().manual_seed(seed)

    def image(*shape: int) -> Tensor:
        made = torch.randn(shape, generator=generator).to(device, dtype)
        return made.contiguous(memory_format=torch.channels_last)

    fan_in = max(1, case.c // case.groups * case.r * case.s)
    scale = (0.5 + torch.rand(case.k, generator=generator)) * torch.where(
        torch.rand(case.k, generator=generator) < 0.2, -1.0, 1.0
    )
    return Operands(
        image(*case.input_shape),
        (image(*case.weight_shape) / fan_in**0.5).contiguous(memory_format=torch.channels_last),
        scale.to(device),
        torch.randn(case.k, generator=generator).to(device),
        image(*case.output_shape) if case.residual else None,
        image(*case.output_shape),
        image(*case.output_shape) if case.act == "relu" else None,
    )


@contextlib.contextmanager
def precise() -> Iterator[None]:
    """Nothing of cuDNN, nothing in TF32: what an oracle may be computed with."""
    with torch.backends.cudnn.flags(enabled=False, allow_tf32=False):
        yield


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Torch's switch for TF32 in convolutions, which the kernels obey."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def geometry(case: ConvCase) -> tuple[Any, ...]:
    """Positional arguments of a launch: stride, padding, dilation, groups."""
    return case.stride, case.padding, case.dilation, case.groups


def kernel_of(op: str) -> Any:
    """The module that holds a Triton kernel."""
    from importlib import import_module

    return import_module(f"resnet_fused.triton.{op}")


def product_of(op: str, case: ConvCase, given: Operands) -> _tiles.Product:
    """The product that an op's configuration is chosen for; in the current TF32 mode."""
    kernel = kernel_of(op)
    if op == "conv_bn_act":
        out = torch.empty(case.output_shape, device="meta")
        return kernel.product_of(given.x, given.weight, out, case.groups)
    if op == "conv_dgrad":
        return kernel.product_of(given.x, given.weight, case.stride, case.groups)
    return kernel.product_of(given.dy, given.weight, case.groups)


def why_no_cuda(device: str) -> str | None:
    """Why the CUDA convolutions can't run here, or None."""
    if not is_cuda(device):
        return "the CUDA convolutions need a GPU"
    if not _extension.available():
        return f"no extension: {_extension.why_not()}"
    if not _extension.has_cuda_kernels():
        return "the extension was built without nvcc"
    return None


def cuda_problem(op: str, case: ConvCase, given: Operands, out: Tensor) -> _cuda_plan.Problem:
    """What the plan of a CUDA convolution depends on."""
    operands = {
        "conv_bn_act": (given.x, given.weight, given.residual),
        "conv_dgrad": (given.dy, given.y, given.weight),
        "conv_wgrad": (given.dy, given.y, given.x),
    }[op]
    return _cuda_plan.problem_of(op, operands, geometry(case), out, real=False)


def plan_of(
    op: str, case: ConvCase, given: Operands, implementation: str = "triton", wish: int = -1
) -> Any:
    """What "auto" would choose, or a plan of the CUDA kernel's configuration of index `wish`."""
    if implementation == "triton":
        return _launch.plan_of(product_of(op, case, given), given.x.device, None)
    dtype = given.dy.dtype if op != "conv_bn_act" else given.x.dtype
    out = torch.empty(output_shape(op, case), dtype=dtype, device="meta")
    out = out.contiguous(memory_format=torch.channels_last)
    about = _cuda_plan.gpu(given.dy.device)
    return _cuda_plan.plan(cuda_problem(op, case, given, out), about, wish)


def title(plan: Any) -> str:
    """A plan's name, and the splits of its reduction: "64x64_4w4s/2"."""
    return plan.name if isinstance(plan, _tiles.Plan) else f"{plan.name}/{plan.splits}"


def output_shape(op: str, case: ConvCase) -> tuple[int, int, int, int]:
    """Of the op's result."""
    shapes = {"conv_bn_act": case.output_shape, "conv_dgrad": case.input_shape}
    return shapes.get(op, case.weight_shape)


def launch(
    op: str,
    case: ConvCase,
    given: Operands,
    out: Tensor,
    plan: Any = None,
    implementation: str = "triton",
) -> None:
    """Runs an op's Triton or CUDA kernel, as planned or as it chooses itself."""
    more: dict[str, Any] = {"plan": plan}
    run = kernel_of(op).launch if implementation == "triton" else getattr(_cuda, f"launch_{op}")
    if implementation == "cuda":
        # Of all configurations: what is not admitted yet is just what is looked at.
        more = {"wish": (-1, 0) if plan is None else (plan.configuration, plan.splits)}
    if op == "conv_bn_act":
        vectors = (given.scale, given.shift, given.residual)
        run(given.x, given.weight, *vectors, out, *geometry(case), case.act, **more)
    elif op == "conv_dgrad":
        run(given.dy, given.y, given.weight, given.scale, out, *geometry(case), **more)
    else:
        run(given.dy, given.y, given.x, given.scale, out, *geometry(case), **more)


def poisoned(op: str, case: ConvCase, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """A result full of NaN between two guard bands, and the buffer that it lies in."""
    buffer, out = guarded(output_shape(op, case), dtype, device)
    return buffer, out


def bands_hold(buffer: Tensor) -> bool:
    """Whether nothing was written beside the result."""
    return bool(torch.cat([buffer[:GUARD], buffer[-GUARD:]]).isnan().all())


def oracle_and_bounds(
    op: str, case: ConvCase, given: Operands, mode: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """The op in float64, and the bounds for sums that are rounded to nearest and that are cut.

    Args:
        op: "conv_bn_act", "conv_dgrad" or "conv_wgrad".
        case: its geometry.
        given: operands on the device that is to compute them.
        mode: of `MODES`.
    """
    options = {"tf32": mode == "tf32", "k": DEPTH[mode], **case.geometry}
    with precise():
        if op == "conv_bn_act":
            terms = (given.x, given.weight, given.scale, given.shift, given.residual)
            oracle = numerics.conv_bn_act_oracle(*terms, **case.geometry, act=case.act)
            return oracle, {
                sums: numerics.conv_bn_act_bound(*terms, oracle, accumulation=sums, **options)
                for sums in numerics.ACCUMULATIONS
            }
        index = 0 if op == "conv_dgrad" else 1
        terms = (given.dy, given.y, given.x, given.weight, given.scale)
        both = numerics.conv_gradients_oracle(*terms, **case.geometry)
        return both[index], {
            sums: numerics.conv_gradients_bound(*terms, both, accumulation=sums, **options)[index]
            for sums in numerics.ACCUMULATIONS
        }


def judge(op: str, case: ConvCase, given: Operands, out: Tensor, mode: str) -> dict[str, Any]:
    """Every element of a result against its bound; what is cut at each step decides.

    Returns:
        "ok", the worst error/bound for either kind of sum, and where the oracle was computed.
    """
    where = str(out.device) if case.macs > ON_THE_CPU else "cpu"
    oracle, bounds = oracle_and_bounds(op, case, given.to(where), mode)
    found: dict[str, Any] = {"oracle": where if where == "cpu" else "gpu, float64 without cuDNN"}
    y = out.to(where)
    for sums, bound in bounds.items():
        check = numerics.check_bound(y, oracle, bound)
        found[sums] = check.worst
        if sums == "truncate":
            found["ok"] = check.ok
            if not check.ok:
                found["error"] = f"{op}: {check}"
    return found


def mode_of(dtype: torch.dtype) -> str:
    """The mode of a dtype under the current switch."""
    if dtype is torch.float32:
        return "tf32" if torch.backends.cudnn.allow_tf32 else "fp32"
    return "bf16" if dtype is torch.bfloat16 else "fp16"


def limits_of(device: str) -> _tiles.Limits:
    """What the chooser knows of the device."""
    return _limits.limits(torch.device(device))
