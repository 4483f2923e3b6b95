"""`conv_chain` in Triton: the products of a tile of pixels follow each other in registers.

    t    = x, or relu(front_scale * conv3x3(x, front_weight) + front_shift)
    out  = relu(scale * (t weight) + shift + shortcut), a chunk of channels at a time
    next = relu(next_scale * (out next_weight) + next_shift)

A program holds a tile of pixels with all channels of t. Each chunk of `out` is finished, rounded,
stored, and multiplied on into the sums of `next`, which take it from registers: `out` is written
once and read by none of it. Pixels of 1x1 convolutions need no neighbours, so nothing is computed
twice; the front reads its nine taps where they lie.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import _chain_tiles, _limits, _tiles
from ._dependent import ALONE, Flow, prefetch, prefetched, wait
from ._gemm import pixel_of
from ._launch import (
    fits_32_bits,
    most_registers,
    on_device,
    precision,
    readable,
    traceable,
    writable,
)


@triton.jit
def activated_sums(acc, scale, shift, channel, known, EVEN: tl.constexpr):
    """act(scale * acc + shift) without the activation: [M, channels] float32."""
    if EVEN:
        a, b = tl.load(scale + channel), tl.load(shift + channel)
    else:
        # Zero where a channel is not there.
        a = tl.load(scale + channel, mask=known, other=0.0)
        b = tl.load(shift + channel, mask=known, other=0.0)
    return acc * a[None, :] + b[None, :]


@triton.jit
def weights_of(weight, filter, step, channel, known, there, EVEN: tl.constexpr):
    """[channels, filters] of a weight [filters, channels], zero where either is not there."""
    place = weight + filter[None, :] * step + channel[:, None]
    if EVEN:
        return tl.load(place)
    return tl.load(place, mask=known[None, :] & there[:, None], other=0.0)


@triton.jit
def front_sums(
    x,  # [N, B, H, W], channels adjacent
    front_weight,  # [K, B, 3, 3], channels adjacent
    base,  # [BLOCK_M] offset of each pixel
    p,  # [BLOCK_M] its row
    q,  # [BLOCK_M] its column
    k,  # [BLOCK_K]
    there,  # [BLOCK_K] which of them exist
    below,  # B
    height,
    width,
    x_h,
    x_w,
    front_k,
    front_r,
    front_s,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Sums of a 3x3 convolution, stride 1, padding 1: [BLOCK_M, BLOCK_K] float32.

    One loop over taps and channels, which can be pipelined; taps innermost, whose lines are nearly
    the same.
    """
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for step in range(9 * tl.cdiv(below, BLOCK_B)):
        tap = step % 9
        b = (step // 9) * BLOCK_B + tl.arange(0, BLOCK_B)
        r = tap // 3 - 1
        s = tap % 3 - 1
        row, column = p + r, q + s
        seen = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        seen = seen[:, None]
        if not EVEN:
            seen = seen & (b < below)[None, :]
        offset = base + r * x_h + s * x_w
        taps = tl.load(x + offset[:, None] + b[None, :], mask=seen, other=0.0)
        start = front_weight + (r + 1) * front_r + (s + 1) * front_s
        weights = weights_of(start, k, front_k, b, there, b < below, EVEN)
        acc = tl.dot(taps, weights, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["pixels", "height", "width"])
def conv_chain_kernel(
    x,  # [N, K, H, W], with a front [N, B, H, W]; channels adjacent, as of all activations
    weight,  # [C, K, 1, 1], channels adjacent, as of all weights
    scale,  # [C] float32, as are all scales and shifts
    shift,  # [C]
    residual,  # [N, C, H, W]; unused with PROJECTED
    projected,  # [N, D, P, Q]; unused without PROJECTED
    projection_weight,  # [C, D, 1, 1]
    projection_scale,  # [C]
    projection_shift,  # [C]
    next_weight,  # [M, C, 1, 1]; unused without NEXT
    next_scale,  # [M]
    next_shift,  # [M]
    front_weight,  # [K, B, 3, 3]; unused without FRONT
    front_scale,  # [K]
    front_shift,  # [K]
    out,  # [N, C, ceil(H / OUT_STRIDE), ceil(W / OUT_STRIDE)]
    following,  # [N, M, H, W]
    pixels,  # N H W
    height,
    width,
    inner,  # K
    channels,  # C
    depth,  # D
    filters,  # M
    below,  # B
    projection_stride,
    x_n,
    x_h,
    x_w,
    weight_k,
    residual_n,
    residual_h,
    residual_w,
    projected_n,
    projected_h,
    projected_w,
    projection_k,
    next_k,
    front_k,
    front_r,
    front_s,
    out_n,
    out_h,
    out_w,
    following_n,
    following_h,
    following_w,
    PROJECTED: tl.constexpr,
    NEXT: tl.constexpr,
    FRONT: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    REVERSE: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr = False,  # type: ignore[bad-function-definition]
    PREFETCH: tl.constexpr = 0,  # type: ignore[bad-function-definition]
):
    """One tile of pixels: BLOCK_N channels of out at a time, NEXT channels of next.

    PROJECTED, NEXT and FRONT are blocks of channels, 0 where there is none of it.
    """
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    tile = tl.program_id(0)
    if REVERSE:
        tile = tl.num_programs(0) - 1 - tile
    pixel = tile.to(index) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = pixel < pixels
    # Rows behind the last pixel repeat it, and are not stored.
    image, p, q = pixel_of(tl.minimum(pixel, pixels - 1), height, width)
    k = tl.arange(0, BLOCK_K)
    there = k < inner
    row = image * x_n + p * x_h + q * x_w
    if PREFETCH:
        prefetch(weight, channels * weight_k, PREFETCH)
        if FRONT:
            prefetch(front_weight, inner * front_k, PREFETCH)
        if PROJECTED:
            prefetch(projection_weight, channels * projection_k, PREFETCH)
        if NEXT:
            prefetch(next_weight, filters * next_k, PREFETCH)
    wait(PDL)
    if FRONT:
        sums = front_sums(
            x, front_weight, row, p, q, k, there, below, height, width, x_h, x_w, front_k, front_r,
            front_s, PRECISION, EVEN, BLOCK_M, BLOCK_K, FRONT,
        )  # fmt: skip
        sums = activated_sums(sums, front_scale, front_shift, k, there, EVEN)
        sums = tl.where(sums < 0.0, 0.0, sums)
        if not EVEN:
            # Where no channel is, an infinite input may have made a NaN.
            sums = tl.where(there[None, :], sums, 0.0)
        t = sums.to(x.dtype.element_ty)
    elif EVEN:
        t = tl.load(x + row[:, None] + k[None, :])
    else:
        t = tl.load(x + row[:, None] + k[None, :], mask=there[None, :], other=0.0)
    d, source = k, t
    if PROJECTED:
        d = tl.arange(0, PROJECTED)
        row = image * projected_n + p * projection_stride * projected_h
        row += q * projection_stride * projected_w
        if EVEN:
            source = tl.load(projected + row[:, None] + d[None, :])
        else:
            source = tl.load(
                projected + row[:, None] + d[None, :], mask=(d < depth)[None, :], other=0.0
            )
    shortcut = image * residual_n + p * residual_h + q * residual_w
    place = image * out_n + (p // OUT_STRIDE) * out_h + (q // OUT_STRIDE) * out_w
    stored = inside
    if OUT_STRIDE > 1:
        stored = stored & (p % OUT_STRIDE == 0) & (q % OUT_STRIDE == 0)
    m = tl.arange(0, NEXT if NEXT else 16)
    wanted = m < filters
    acc = tl.zeros((BLOCK_M, NEXT if NEXT else 16), tl.float32)
    for first in range(0, channels, BLOCK_N):
        c = first + tl.arange(0, BLOCK_N)
        known = c < channels
        weights = weights_of(weight, c, weight_k, k, known, there, EVEN)
        y = tl.dot(t, weights, input_precision=PRECISION)
        y = activated_sums(y, scale, shift, c, known, EVEN)
        if PROJECTED:
            weights = weights_of(projection_weight, c, projection_k, d, known, d < depth, EVEN)
            z = tl.dot(source, weights, input_precision=PRECISION)
            y += activated_sums(z, projection_scale, projection_shift, c, known, EVEN)
        elif EVEN:
            y += tl.load(residual + shortcut[:, None] + c[None, :]).to(tl.float32)
        else:
            y += tl.load(
                residual + shortcut[:, None] + c[None, :], mask=known[None, :], other=0.0
            ).to(tl.float32)
        # NaN compares false and stays, as in torch.
        y = tl.where(y < 0.0, 0.0, y)
        if not EVEN:
            y = tl.where(known[None, :], y, 0.0)
        rounded = y.to(out.dtype.element_ty)
        kept = stored[:, None]
        if not EVEN:
            kept = kept & known[None, :]
        tl.store(out + place[:, None] + c[None, :], rounded, mask=kept)
        if NEXT:
            weights = weights_of(next_weight, m, next_k, c, wanted, known, EVEN)
            acc = tl.dot(rounded, weights, acc, input_precision=PRECISION)
    if NEXT:
        y = activated_sums(acc, next_scale, next_shift, m, wanted, EVEN)
        y = tl.where(y < 0.0, 0.0, y)
        place = image * following_n + p * following_h + q * following_w
        kept = inside[:, None]
        if not EVEN:
            kept = kept & wanted[None, :]
        target = following + place[:, None] + m[None, :]
        tl.store(target, y.to(following.dtype.element_ty), mask=kept)


def launch(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    projected: Tensor | None,
    projection_weight: Tensor | None,
    projection_scale: Tensor | None,
    projection_shift: Tensor | None,
    next_weight: Tensor | None,
    next_scale: Tensor | None,
    next_shift: Tensor | None,
    front_weight: Tensor | None,
    front_scale: Tensor | None,
    front_shift: Tensor | None,
    out: Tensor,
    following: Tensor,
    projection_stride: int,
    out_stride: int,
    reverse: bool,
    *,
    config: _chain_tiles.Config | None = None,
    allowed: frozenset[str] | None = None,
    flow: Flow = ALONE,
) -> None:
    """Writes a block's last convolution and the next block's first into `out` and `following`.

    Args:
        x: [N, K, H, W] float32, bfloat16 or float16; with a front [N, B, H, W]. Copied to
            channels_last first if it is not `readable`, as are all activations and weights; the
            results by a copy afterwards.
        weight: [C, K, 1, 1], dtype of x, as are all activations and weights.
        scale: [C] float32, dense, as are all scales and shifts.
        shift: [C].
        residual: [N, C, H, W], or None with projected.
        projected: [N, D, P, Q], or None without.
        projection_weight: [C, D, 1, 1]; its scale and shift [C].
        projection_scale: see projection_weight, as projection_shift.
        projection_shift: see projection_scale.
        next_weight: [M, C, 1, 1] or None; its scale and shift [M].
        next_scale: see next_weight, as next_shift.
        next_shift: see next_scale.
        front_weight: [K, B, 3, 3] or None; its scale and shift [K].
        front_scale: see front_weight, as front_shift.
        front_shift: see front_scale.
        out: [N, C, ceil(H / out_stride), ceil(W / out_stride)], any layout without overlaps;
            overwritten.
        following: [N, M, H, W], likewise; empty without next_weight.
        projection_stride: of the projection.
        out_stride: 1 or 2.
        reverse: whether the last pixels come first.
        config: configuration to use instead of the chosen one.
        allowed: names of the configurations to choose among; None for all.
        flow: how the launch stands among those around it.

    Raises:
        LookupError: no configuration takes the call; see `_chain_tiles.choose`.
    """
    if x.numel() == 0:
        return
    sizes = _chain_tiles.sizes_of(
        x, weight, projected, next_weight, front_weight, out_stride, precision(x.dtype)
    )
    found = config or _chain_tiles.choose(sizes, _limits.limits(x.device), allowed)
    if isinstance(found, str):
        raise LookupError(found)
    tensors = (x, residual, projected), (weight, projection_weight, next_weight, front_weight)
    vectors = (
        scale, shift, projection_scale, projection_shift, next_scale, next_shift, front_scale,
        front_shift,
    )  # fmt: skip
    plan, options = found.plan(sizes), (projection_stride, reverse, flow)
    _run(plan, sizes, *tensors, vectors, out, following, *options)


Tensors = tuple[Tensor | None, ...]


def _run(
    plan: dict[str, Any],
    sizes: _chain_tiles.Sizes,
    activations: Tensors,
    weights: Tensors,
    vectors: Tensors,
    out: Tensor,
    following: Tensor,
    projection_stride: int,
    reverse: bool,
    flow: Flow,
) -> None:
    """Launches the kernel; of each group of operands the first stands for those not there."""
    x, shortcut, source = _filled(activations)
    height, width = x.shape[2:]
    x, shortcut, source = readable(x), readable(shortcut), readable(source)
    weight, projection, after, front = map(readable, _filled(weights))
    scale, shift, p_scale, p_shift, n_scale, n_shift, f_scale, f_shift = _filled(vectors)
    target, last = writable(out), writable(following)
    grid = (_tiles.cdiv(sizes.pixels, plan["BLOCK_M"]),)
    limits = _limits.limits(x.device)
    with on_device(out):
        traceable(conv_chain_kernel, out)[grid](
            x, weight, scale, shift, shortcut, source, projection, p_scale, p_shift, after,
            n_scale, n_shift, front, f_scale, f_shift, target, last,
            sizes.pixels, height, width, sizes.k, sizes.c, sizes.projected, sizes.m, sizes.front,
            projection_stride, *_steps(x), weight.stride(0), *_steps(shortcut), *_steps(source),
            projection.stride(0), after.stride(0), front.stride(0), *front.stride()[2:],
            *_steps(target), *_steps(last),
            REVERSE=reverse, WIDE=not fits_32_bits(x, shortcut, source, target, last), **plan,
            maxnreg=most_registers(out.device), **flow.options(),
            **prefetched(flow, grid[0], limits, weight, projection, after, front),
        )  # fmt: skip
        _copied(target, out)
        _copied(last, following)


def _filled(operands: Tensors) -> list[Tensor]:
    """The operands, those that are not there as the first one: the kernel does not read them."""
    first = operands[0]
    assert first is not None
    return [first if t is None else t for t in operands]


def _copied(source: Tensor, target: Tensor) -> None:
    """Takes a result to where it belongs, if it was written elsewhere."""
    if source is not target:
        target.copy_(source)


def _steps(t: Tensor) -> tuple[int, int, int]:
    """Elements between the images, rows and columns of [N, C, H, W]."""
    return t.stride(0), t.stride(2), t.stride(3)
