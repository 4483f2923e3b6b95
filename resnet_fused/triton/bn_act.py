"""`bn_act` in Triton: scale, shift, shortcut and ReLU in one pass over an activation.

A tile is rows x columns of the activation, columns along memory: channels of a pixel where channels
are adjacent (NHWC), else pixels of a channel (NCHW).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import _tiles
from ._elementwise import offsets
from ._launch import begins_at_a_piece, fits_32_bits, on_device, traceable

ELEMENTS = 4096
"""Elements of a tile: 32 a thread, four 16-byte loads of 16-bit values in flight a tensor."""
ELEMENTS_OFF = 2048
"""The same where an address is no multiple of 16 bytes: each element then needs a pointer of its
own, and those of 32 elements of three tensors are more than a thread's registers hold."""
MAX_COLUMNS = 1024
WARPS = 4
CONFIGURATION = f"{ELEMENTS}_{WARPS}w"


@triton.jit(do_not_specialize=["height", "width"])
def bn_act_kernel(
    x,  # [N, C, H, W], any strides
    scale,  # [C] float32
    shift,  # [C] float32
    residual,  # [N, C, H, W], any strides; unused without HAS_RESIDUAL
    out,  # [N, C, H, W], any strides
    rows,  # N H W by channel, else N C
    columns,  # C by channel, else H W
    height,
    width,
    channels,
    x_n,
    x_c,
    x_h,
    x_w,
    residual_n,
    residual_c,
    residual_h,
    residual_w,
    out_n,
    out_c,
    out_h,
    out_w,
    BY_CHANNEL: tl.constexpr,
    DENSE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile: act(scale * x + shift [+ residual]) in float32, rounded once as it is stored."""
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    tiles_n = tl.cdiv(columns, BLOCK_N)
    row = (tl.program_id(0) // tiles_n).to(index) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (tl.program_id(0) % tiles_n).to(index) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    down, along = offsets(
        row, column, height, width, channels, x_n, x_c, x_h, x_w, BY_CHANNEL, DENSE
    )
    value = tl.load(x + down[:, None] + along[None, :], mask=inside, other=0.0).to(tl.float32)
    if BY_CHANNEL:
        a = tl.load(scale + column, mask=column < columns, other=0.0)[None, :]
        b = tl.load(shift + column, mask=column < columns, other=0.0)[None, :]
    else:
        a = tl.load(scale + row % channels, mask=row < rows, other=0.0)[:, None]
        b = tl.load(shift + row % channels, mask=row < rows, other=0.0)[:, None]
    y = value * a + b
    if HAS_RESIDUAL:
        down, along = offsets(
            row, column, height, width, channels, residual_n, residual_c, residual_h, residual_w,
            BY_CHANNEL, DENSE,
        )  # fmt: skip
        added = tl.load(residual + down[:, None] + along[None, :], mask=inside, other=0.0)
        y += added.to(tl.float32)
    if RELU:
        # NaN compares false and stays, as in torch.
        y = tl.where(y < 0.0, 0.0, y)
    down, along = offsets(
        row, column, height, width, channels, out_n, out_c, out_h, out_w, BY_CHANNEL, DENSE
    )
    target = out + down[:, None] + along[None, :]
    tl.store(target, y.to(out.dtype.element_ty), mask=inside)


def launch(
    x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, out: Tensor, act: str
) -> None:
    """Writes act(scale * x + shift [+ residual]) into `out`.

    Args:
        x: [N, C, H, W] float32, bfloat16 or float16, any layout.
        scale: [C] float32.
        shift: [C] float32.
        residual: shape and dtype of x, any layout, or None.
        out: shape and dtype of x, any layout without overlaps; overwritten.
        act: "relu" or "none".
    """
    if x.numel() == 0:
        return
    n, channels, height, width = x.shape
    by_channel = out.stride(1) == 1 and channels > 1
    rows, columns = (n * height * width, channels) if by_channel else (n * channels, height * width)
    shortcut = x if residual is None else residual
    dense = all(height == 1 or t.stride(2) == width * t.stride(3) for t in (x, shortcut, out))
    block_n = min(MAX_COLUMNS, max(16, 1 << (columns - 1).bit_length()))
    aligned = all(begins_at_a_piece(t) for t in (x, shortcut, out))
    block_m = (ELEMENTS if aligned else ELEMENTS_OFF) // block_n
    grid = (_tiles.cdiv(rows, block_m) * _tiles.cdiv(columns, block_n),)
    with on_device(out):
        traceable(bn_act_kernel, out)[grid](
            x, scale, shift, shortcut, out, rows, columns, height, width, channels,
            *x.stride(), *shortcut.stride(), *out.stride(),
            BY_CHANNEL=by_channel, DENSE=dense, HAS_RESIDUAL=residual is not None,
            RELU=act == "relu", WIDE=not fits_32_bits(x, shortcut, out),
            BLOCK_M=block_m, BLOCK_N=block_n, num_warps=WARPS,
        )  # fmt: skip
