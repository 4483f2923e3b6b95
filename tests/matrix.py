"""The matrix op x implementation x case: its axes, and inputs for one cell."""

from __future__ import annotations

import dataclasses

import emulated
import pytest
import torch
from torch import Tensor

from resnet_fused import backends, cases, ops  # noqa: F401  (ops enter themselves)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
IDS = {d: str(d).removeprefix("torch.") for d in DTYPES}
ACTIVATION = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def cells(op: str, dtypes: tuple[torch.dtype, ...] = DTYPES) -> list[object]:
    """Every (implementation, dtype) of an op that this machine can run, as pytest parameters.

    `test_matrix_is_whole` holds what is left out to account.
    """
    return [
        pytest.param(entry, dtype, id=f"{entry.name}-{IDS[dtype]}", marks=_marks(entry))
        for entry in backends.implementations(op)
        for dtype in dtypes
        if entry.supports(backends.Call(op, "cpu", dtype)) is None
        or _runs_all_the_same(entry, dtype)
        or runs_interpreted(entry, dtype)
        or emulated.serves(entry, dtype)
    ]


def _marks(entry: backends.Implementation) -> list[pytest.MarkDecorator]:
    interpreted = [pytest.mark.interpreter] if entry.name == "triton" else []
    return interpreted + emulated.marks(entry)


def bound_options(entry: backends.Implementation, dtype: torch.dtype) -> dict[str, object]:
    """What of the error bound depends on the implementation."""
    tf32 = entry.name == emulated.NAME and dtype == torch.float32
    return {"rounding": entry.rounding, "tf32": tf32}


def runs_interpreted(entry: backends.Implementation, dtype: torch.dtype) -> bool:
    """Triton's kernels run here under TRITON_INTERPRET=1, where they are asked for by name."""
    with backends.backend("triton"):
        call = backends.Call(entry.op, "cpu", dtype)
        return entry.name == "triton" and entry.supports(call) is None


def _runs_all_the_same(entry: backends.Implementation, dtype: torch.dtype) -> bool:
    """oneDNN's emulated bfloat16: never chosen, because float32 is quicker, but other CPUs' way."""
    emulated = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (entry.op, entry.name, dtype) == ("conv_bn_act", "cpu", torch.bfloat16) and emulated


@dataclasses.dataclass
class Operands:
    """Arguments of conv_bn_act for one case."""

    x: Tensor
    weight: Tensor
    scale: Tensor
    shift: Tensor
    residual: Tensor | None

    def tuple(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        return self.x, self.weight, self.scale, self.shift, self.residual

    def to_layout(self, layout: str) -> Operands:
        form = ACTIVATION[layout]
        residual = self.residual
        return Operands(
            self.x.contiguous(memory_format=form),
            self.weight,
            self.scale,
            self.shift,
            residual if residual is None else residual.contiguous(memory_format=form),
        )


def random_operands(case: cases.ConvCase, dtype: torch.dtype) -> Operands:
    """Random inputs: gamma of both signs and one zero, a shift, a residual."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    scale = torch.randn(case.k, dtype=compute)
    scale[0] = 0
    return Operands(
        torch.randn(case.input_shape, dtype=torch.float64).to(dtype),
        torch.randn(case.weight_shape, dtype=torch.float64).to(dtype),
        scale,
        torch.randn(case.k, dtype=compute),
        torch.randn(case.output_shape).to(dtype) if case.residual else None,
    )


def geometry_args(case: cases.ConvCase) -> tuple[object, ...]:
    """The trailing positional arguments of the raw overloads."""
    return (
        list(case.stride),
        list(case.padding),
        list(case.dilation),
        case.groups,
        case.act,
    )
