"""What a self-check runs: each kernel on integers, where every bit of the result is known.

The functions run in the child process of `resnet_fused._selfcheck` and raise on the first result
that is wrong. Outputs lie between guard bands and hold NaN before the call, so that a store beside
its place shows, as does one that never came.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import numerics
from ..cases import BN_ACT_CASES, BnActCase, ConvCase

CONV_CASES = (
    # Two and a half tiles of 128 pixels, channels that no tile divides, a shortcut.
    ConvCase("3x3", 2, 96, 12, 13, 200, 3, 3, (1, 1), (1, 1), residual=True),
    ConvCase("1x1_stride2", 3, 192, 19, 15, 136, 1, 1, (2, 2), act="none"),
    ConvCase("groups", 2, 48, 9, 8, 96, 3, 3, (2, 1), (1, 1), (1, 2), 12),
    ConvCase("stem", 1, 3, 23, 21, 64, 7, 7, (2, 2), (3, 3)),
)
"""Odd sizes that leave every tile overhanging, and the reduction too."""

GUARD = 64  # elements on each side of an output
BN_ACT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def guarded(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """A buffer full of NaN, and the part of it between two guard bands as a dense NHWC tensor.

    Args:
        shape: [N, C, H, W] of the part.
        dtype: of both.
        device: of both.
    """
    n, c, h, w = shape
    size = n * c * h * w
    buffer = torch.full((size + 2 * GUARD,), float("nan"), dtype=dtype, device=device)
    return buffer, buffer[GUARD : GUARD + size].view(n, h, w, c).permute(0, 3, 1, 2)


def require_exact(what: str, buffer: Tensor, y: Tensor, expected: Tensor) -> None:
    """Compares an output of `guarded` with what is expected, bit for bit.

    Args:
        what: the case, for the message.
        buffer: what `y` lies in.
        y: the output [N, K, P, Q].
        expected: the same on the CPU; no NaN.

    Raises:
        ArithmeticError: an element differs, was not written, or a guard band was.
    """
    got, expected = _comparable(y), _comparable(expected)
    missing = int(got.isnan().sum())
    if missing:
        raise ArithmeticError(f"{what}: {missing} of {got.numel()} elements are NaN or not written")
    wrong = (got != expected).nonzero()
    if len(wrong):
        first = tuple(wrong[0].tolist())
        raise ArithmeticError(
            f"{what}: {len(wrong)} of {got.numel()} elements are wrong, the first at {first}: "
            f"{got[first].item()} in place of {expected[first].item()}"
        )
    bands = torch.cat([_comparable(part) for part in (buffer[:GUARD], buffer[-GUARD:])])
    if not bool(bands.isnan().all()):
        raise ArithmeticError(f"{what}: elements beside the output were written")


def _comparable(t: Tensor) -> Tensor:
    """On the CPU; e4m3 as float32, since torch compares no e4m3."""
    t = t.cpu()
    return t.float() if t.dtype is torch.float8_e4m3fn else t


def bn_act_configurations() -> tuple[str, ...]:
    """One: its launch picks among its three kernels by strides and pointers."""
    return ("default",)


def _lay_out(t: Tensor, case: BnActCase) -> Tensor:
    """The values [N, C, H, W] in the layout of the case; "expanded" repeats the first image."""
    n, c, h, w = t.shape
    if case.layout == "nchw":
        return t.contiguous()
    if case.layout == "sliced":
        wide = torch.full((n, c, h, 2 * w), float("nan"), dtype=t.dtype, device=t.device)
        wide[..., ::2] = t
        return wide[..., ::2]
    if case.layout == "expanded":
        return t[:1].expand(n, c, h, w)
    if case.layout == "unaligned":
        flat = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)[1:]
        return flat.view(n, h, w, c).permute(0, 3, 1, 2).copy_(t)
    return t.contiguous(memory_format=torch.channels_last)


def bn_act(configuration: str, device: str) -> None:
    """Checks the compiled `bn_act` on every case and dtype.

    Args:
        configuration: "default".
        device: "cuda:0", or "cpu" for the CPU's kernel.

    Raises:
        ArithmeticError: a result is wrong.
        ImportError: the compiled extension is missing.
        ValueError: another configuration.
    """
    from .. import _extension

    if configuration not in bn_act_configurations():
        raise ValueError(f"configuration is {configuration!r}; accepted is 'default'")
    if not _extension.available():
        raise ImportError(f"the compiled extension is missing: {_extension.why_not()}")
    for case in BN_ACT_CASES:
        for dtype in BN_ACT_DTYPES:
            check_bn_act(case, dtype, device, _native)


def _native(
    x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, out: Tensor, act: str
) -> None:
    torch.ops.resnet_fused.bn_act_out(x, scale, shift, residual, act == "relu", out)


def check_bn_act(
    case: BnActCase, dtype: torch.dtype, device: str, launch: Callable[..., None]
) -> None:
    """Checks one kernel of `bn_act` on one case, bit for bit.

    Args:
        case: the sizes and the layout.
        dtype: of x, the shortcut and the output.
        device: where it runs.
        launch: takes x, scale, shift, residual, out and act.

    Raises:
        ArithmeticError: the result is wrong.
    """
    generator = torch.Generator().manual_seed(0)
    conv = ConvCase(case.name, *case.shape, k=case.c, residual=case.residual)
    x, _, scale, shift, residual = numerics.exact_inputs(conv, dtype, generator)
    x = _lay_out(x.to(device), case)
    if residual is not None:
        residual = _lay_out(residual.to(device), case)
    buffer, out = guarded(case.shape, dtype, device)
    if case.layout == "nchw":
        out = buffer[GUARD:-GUARD].view(case.shape)
    launch(x, scale.to(device), shift.to(device), residual, out, case.act)
    terms = (x.cpu(), scale, shift, None if residual is None else residual.cpu())
    expected = numerics.bn_act_oracle(*terms, case.act).to(dtype)
    require_exact(f"{case.name}, {dtype}", buffer, out, expected)


def gradient_inputs(
    case: ConvCase, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """dy, y, x, weight, scale on which products and sums are exact, scale * dy included."""
    x, weight, scale, _, _ = numerics.exact_inputs(case, dtype, generator)
    dy = torch.randint(-4, 5, case.output_shape, generator=generator).to(dtype)
    y = torch.randint(-2, 3, case.output_shape, generator=generator).to(dtype)
    return dy, y if case.act == "relu" else None, x, weight, scale


def channels_last(t: Tensor | None, device: str) -> Tensor | None:
    """A tensor [N, C, H, W] on a device in channels_last; None stays None."""
    return None if t is None else t.to(device).contiguous(memory_format=torch.channels_last)
