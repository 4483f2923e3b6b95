"""The matrix op x implementation x case: its axes, and inputs for one cell."""

from __future__ import annotations

import dataclasses
import os

import emulated
import pytest
import torch
import triton_trace  # noqa: F401  (interpreted multiply-adds round once)
from torch import Tensor

from resnet_fused import backends, cases, ops  # noqa: F401  (ops enter themselves)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FUSED = DTYPES[:3]
"""Where multiply-adds are fused by contract; in float64 they may be or not."""
IDS = {d: str(d).removeprefix("torch.") for d in (*DTYPES, torch.float8_e4m3fn)}
LAYOUTS = ("nchw", "nhwc", "sliced", "unaligned")
WHOLE = os.environ.get("HYPOTHESIS_PROFILE") == "proof"
"""Whether every test runs on every case (`make proof`), not on a sample that CI has time for."""
SAMPLE = frozenset(
    {
        "1x1", "1x1_stride2", "3x3_residual", "3x3_stride2", "3x3_stride3", "3x3_dilated4_stride2",
        "3x3_groups4", "3x3_depthwise_x2", "odd_channels", "k65", "one_channel", "nc11_3x3",
        "empty_batch", "stem", "uneven",
    }
)  # fmt: skip
EXACT = DTYPES if WHOLE else DTYPES[:3]
"""For integers on convolutions: float64 is held to account by the gradients' tests."""
SAMPLED_CASES = [case for case in cases.CONV_CASES if WHOLE or case.name in SAMPLE]
"""For what comes on top of the exact tier, which always goes through all cases."""
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


def lay_out(t: Tensor, layout: str) -> Tensor:
    """The same values [N, C, H, W] in the layout of the case."""
    n, c, h, w = t.shape
    if layout == "nchw":
        return t.contiguous()
    if layout == "nhwc":
        return t.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        big = torch.full((n, c, h, 2 * w), float("nan"), dtype=t.dtype)
        big[..., ::2] = t
        return big[..., ::2]
    if layout == "expanded":
        return t[:1].expand(n, c, h, w)
    assert layout == "unaligned", layout
    flat = torch.empty(t.numel() + 1, dtype=t.dtype)[1:]
    nhwc = flat.view(n, h, w, c).permute(0, 3, 1, 2)
    return nhwc.copy_(t)


def geometry_args(case: cases.ConvCase) -> tuple[object, ...]:
    """The trailing positional arguments of the raw overloads."""
    return (
        list(case.stride),
        list(case.padding),
        list(case.dilation),
        case.groups,
        case.act,
    )


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of per-channel values beside activations of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def norm_values(channels: int, dtype: torch.dtype, *, exact: bool = False) -> Tensor:
    """Scale, shift, mean, invstd [4, C]: scales of both signs, one zero; exact: small integers."""
    if exact:
        scale = torch.tensor([0.5, 1.0, 2.0])[torch.randint(0, 3, (channels,))]
        scale = scale * (torch.randint(0, 2, (channels,)) * 2 - 1)
        shift, mean = (torch.randint(-3, 4, (channels,)).float() for _ in range(2))
        invstd = torch.ones(channels)
    else:
        scale, shift, mean, invstd = torch.randn(4, channels, dtype=torch.float64)
        invstd = invstd.abs() + 0.5
    scale = scale.clone()
    scale[0] = 0
    return torch.stack((scale, shift, mean, invstd)).to(compute_dtype(dtype))


@dataclasses.dataclass
class Layer:
    """A convolution between two live BatchNorms, and what flows back through it.

    dz, y: [N, K, P, Q]; coefficients: [3, K]; x: [N, C, H, W], the raw output below; norm: [4, C];
    addend: of every second pixel of x.
    """

    x: Tensor
    norm: Tensor
    weight: Tensor
    dz: Tensor
    y: Tensor
    coefficients: Tensor
    addend: Tensor

    def lay_out(self, layout: str) -> Layer:
        """The same values; activations in another layout."""
        names = ("x", "dz", "y", "addend")
        return dataclasses.replace(self, **{n: lay_out(getattr(self, n), layout) for n in names})


def random_layer(case: cases.ConvCase, dtype: torch.dtype, *, exact: bool = False) -> Layer:
    """Random values of a layer; integers on which every sum is exact if asked for."""

    def values(*shape: int, most: int = 4) -> Tensor:
        if exact:
            return torch.randint(-most, most + 1, shape).to(dtype)
        return torch.randn(shape, dtype=torch.float64).to(dtype)

    n, c, h, w = case.input_shape
    coefficients = norm_values(case.k, dtype, exact=exact)[:3]
    return Layer(
        values(n, c, h, w),
        norm_values(c, dtype, exact=exact),
        values(*case.weight_shape),
        values(*case.output_shape),
        values(*case.output_shape),
        coefficients,
        values(n, c, (h + 1) // 2, (w + 1) // 2),
    )


def conv_arguments(case: cases.ConvCase) -> tuple[object, ...]:
    """stride, padding, dilation, groups, as the raw overloads of training take them."""
    return geometry_args(case)[:4]


SPREADS = ("even", "ramp", "drift", "apart", "outlier", "constant")


def spread_values(kind: str, kappa: float, rows: int = 4096) -> Tensor:
    """Float32 [rows, 1, 1, 1] of mean kappa and, at "even", std 1, in the order of the tiles."""
    y = torch.randn(rows, dtype=torch.float64)
    place = torch.arange(rows) / rows
    if kind == "ramp":
        y += 4 * kappa**0.5 * (place - 0.5)
    elif kind == "drift":
        y += torch.randn(rows).cumsum(0) / 32
    elif kind == "apart":
        y += 8.0 * (place > 0.5)
    elif kind == "outlier":
        y[0] = -3e4
        y[1] = 1e4
    elif kind == "constant":
        y = torch.full_like(y, 0.7)
    return (y + kappa).float().view(-1, 1, 1, 1)


def kink_values(dtype: torch.dtype, channels: int = 48) -> tuple[Tensor, Tensor]:
    """Values next to the place where scale * y + shift changes its sign: [7, C, 1, 1], [4, C].

    Computed as a product and a sum some would come out on the other side.
    """
    norm = norm_values(channels, dtype)
    norm[0, 0] = 1
    y = (-norm[1].double() / norm[0].double()).to(dtype)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    steps = torch.arange(-3, 4).to(bits).view(-1, 1)
    near = (y.view(bits) + steps).view(dtype)
    return near.view(7, channels, 1, 1), norm


def repeats(entry: backends.Implementation) -> int:
    """How often a call is made again to see that its bits stay: most for the C++ kernels."""
    return {"cpu": 250, "triton": 1}.get(entry.name, 3)
