"""`stem` in Triton: convolution, BatchNorm, ReLU and max pooling, from the image in one kernel.

A program walks down a strip of the pooled image, `COLUMNS` pooled pixels wide. A 3x3 window of
stride 2 takes three rows of the convolution, the last of which is the next window's first: it stays
in registers, so that no row is computed twice but the one above a strip. Of the three columns the
even one and the odd one behind it belong to the window's own pixel; the third is the odd one of its
neighbour on the left, fetched across the tile.

Both columns of a pooled pixel are made by one product: their windows overlap, so the tile of the
image holds what both read, and the weights stand in it twice, for the odd column shifted by a
stride. A row of the image's tile is a filter's row of taps times channels, beginning at a multiple
of four elements where the image is dense: with three channels there is no other way to wide loads.

Elements that belong to one column's window alone meet a zero weight in the other's. Since 0 * Inf
is NaN, pooled pixels that hold a NaN are computed again, column by column.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from . import _limits, _stem_tiles, _tiles
from ._dependent import ALONE, Flow, wait
from ._launch import fits_32_bits, most_registers, on_device, precision, traceable, writable
from ._stem_pack import lane_of, layout, pack
from ._tiles import cdiv


@triton.jit
def weight_tile(packed, r, first, filters, LANES: tl.constexpr, CHANNELS: tl.constexpr):
    """One row of the packed filters: [LANES, 2 CHANNELS]."""
    n = 2 * first + tl.arange(0, 2 * CHANNELS)
    lane = tl.arange(0, LANES)
    place = ((r * LANES + lane) * (2 * filters))[:, None] + n[None, :]
    return tl.load(packed + place, mask=(n < 2 * filters)[None, :], other=0.0)


@triton.jit
def image_tile(
    x, norm, u, column, height, width, x_c, x_h, x_w, only, S: tl.constexpr, C: tl.constexpr,
    STRIDE: tl.constexpr, PADDING: tl.constexpr, LANES: tl.constexpr, SHIFT: tl.constexpr,
    DENSE: tl.constexpr, NORM: tl.constexpr, EXACT: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """What a row of the filters reads of the image's row u: [COLUMNS, LANES], zero outside of it.

    EXACT leaves out what only the other column's window holds; `only` is this one's parity.
    """
    lane, tap, c = lane_of(LANES, SHIFT, C)
    end = tl.where((u >= 0) & (u < height), width, 0)  # a row outside of the image is empty
    if DENSE:
        # In elements, not pixels: loads are as wide as addresses and the image's width allow.
        place = (column * (2 * STRIDE * C))[:, None] + (lane - (PADDING * C + SHIFT))[None, :]
        seen = (place >= 0) & (place < end * C)
        pointers = x + u * x_h + place
    else:
        place = (column * (2 * STRIDE))[:, None] + (tap - PADDING)[None, :]
        seen = (place >= 0) & (place < end)
        pointers = x + u * x_h + place * x_w + (c * x_c)[None, :]
    if EXACT:
        s = tap - only * STRIDE
        seen = seen & ((s >= 0) & (s < S))[None, :]
    a = tl.load(pointers, mask=seen, other=0)
    if NORM:
        factor, added = tl.load(norm + c), tl.load(norm + C + c)
        v = tl.math.fma(a.to(tl.float32), factor[None, :], added[None, :])
        a = tl.where(seen, v, 0.0)
    return a.to(TYPE)


@triton.jit
def larger(x, y):
    """The maximum; NaN where one of them is, as in torch's pooling."""
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def rounded(y, out):
    """As `out` stores it; in e4m3 it saturates here, not left to the conversion. NaN stays."""
    if out.dtype.element_ty == tl.float8e4nv:
        y = tl.where(y > 448.0, 448.0, tl.where(y < -448.0, -448.0, y))
    return y.to(out.dtype.element_ty)


@triton.jit
def factors(scale, shift, channel, filters, out_factor):
    """Scale and shift of channels in units of the result: [1, CHANNELS] each."""
    known = channel < filters
    a = tl.load(scale + channel, mask=known, other=0.0) * out_factor
    b = tl.load(shift + channel, mask=known, other=0.0) * out_factor
    return a[None, :], b[None, :]


@triton.jit
def columns_of(acc, a, b, there, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr):
    """Scale times sums, and shift, of even and odd columns; zero where the row is not there."""
    even, odd = tl.split(tl.reshape(acc, (COLUMNS, CHANNELS, 2)))
    even, odd = tl.math.fma(even, a, b), tl.math.fma(odd, a, b)
    return tl.where(there, even, 0.0), tl.where(there, odd, 0.0)


@triton.jit
def windows(even, odd, exists, left, member, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr):
    """ReLU of the windows' maxima: even and odd columns, and the odd ones of the left neighbour."""
    neighbour = tl.broadcast_to(tl.maximum(member - 1, 0)[:, None], (COLUMNS, CHANNELS))
    odd = tl.where(exists[:, None], odd, 0.0)
    before = tl.where(left[:, None], tl.gather(odd, neighbour, 0), 0.0)
    best = larger(larger(even, odd), before)
    return tl.where(best < 0.0, 0.0, best)


@triton.jit
def store(
    out, best, image, p, column, channel, member, out_width, filters, out_n, out_c, out_h, out_w,
    HALO: tl.constexpr,
):  # fmt: skip
    """Stores a row of a strip."""
    stored = ((member >= HALO) & (column < out_width))[:, None] & (channel < filters)[None, :]
    target = out + image * out_n + p * out_h
    target += (column * out_w)[:, None] + (channel * out_c)[None, :]
    tl.store(target, rounded(best, out), mask=stored)


@triton.jit
def separately(
    x, norm, packed, scale, shift, out_factor, p, first, column, height, width, conv_height,
    filters, x_c, x_h, x_w, R: tl.constexpr, S: tl.constexpr, C: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE: tl.constexpr, PADDING_H: tl.constexpr,
    PADDING: tl.constexpr, LANES: tl.constexpr, SHIFT: tl.constexpr, DENSE: tl.constexpr,
    NORM: tl.constexpr, PRECISION: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The largest of the three rows of window p, the two columns by products of their own."""
    a, b = factors(scale, shift, first + tl.arange(0, CHANNELS), filters, out_factor)
    best_even = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    best_odd = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    for step in range(6):
        only = step % 2
        q = 2 * p - 1 + step // 2
        acc = tl.zeros((COLUMNS, 2 * CHANNELS), tl.float32)
        for r in tl.range(R, num_stages=1):
            w = weight_tile(packed, r, first, filters, LANES, CHANNELS)
            t = image_tile(
                x, norm, q * STRIDE_H - PADDING_H + r, column, height, width, x_c, x_h, x_w, only,
                S, C, STRIDE, PADDING, LANES, SHIFT, DENSE, NORM, True, w.dtype,
            )  # fmt: skip
            acc = tl.dot(t, w, acc, input_precision=PRECISION)
        there = (q >= 0) & (q < conv_height)
        even, odd = columns_of(acc, a, b, there, COLUMNS, CHANNELS)
        best_even = tl.where(only == 0, larger(best_even, even), best_even)
        best_odd = tl.where(only == 1, larger(best_odd, odd), best_odd)
    return best_even, best_odd


@triton.jit(do_not_specialize=["height", "conv_height", "conv_width", "out_height", "out_width"])
def stem_kernel(
    x,  # [N, C, H, W], any strides
    packed,  # [R, LANES, 2 K] by `pack_kernel`
    scale,  # [K] float32
    shift,  # [K] float32
    norm,  # [2, C] float32; unused without NORM
    out,  # [N, K, P', Q'], any strides
    out_factor,  # one over what a stored 1 of out is worth
    height,
    width,
    conv_height,  # P
    conv_width,  # Q
    out_height,  # P'
    out_width,  # Q'
    filters,
    strips,  # a row of the pooled image has
    segments,  # a column has, of `rows` pooled rows
    rows,
    x_n,
    x_c,
    x_h,
    x_w,
    out_n,
    out_c,
    out_h,
    out_w,
    R: tl.constexpr,
    S: tl.constexpr,
    C: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING: tl.constexpr,
    LANES: tl.constexpr,
    SHIFT: tl.constexpr,
    DENSE: tl.constexpr,
    NORM: tl.constexpr,
    HALO: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PDL: tl.constexpr = False,  # type: ignore[bad-function-definition]
):
    """One strip of one image, for some of the channels."""
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    blocks = tl.cdiv(filters, CHANNELS)
    first = (tl.program_id(0) % blocks) * CHANNELS
    strip = tl.program_id(0) // blocks
    segment = strip // strips
    image = (segment // segments).to(index)
    begin = (segment % segments) * rows
    end = tl.minimum(begin + rows, out_height)
    member = tl.arange(0, COLUMNS)
    # With HALO the first pixel of a strip is there for its odd column alone.
    column = ((strip % strips) * (COLUMNS - HALO) + member - HALO).to(index)
    exists = (2 * column + 1 >= 0) & (2 * column + 1 < conv_width)
    wait(PDL)  # before the filters too: `pack_kernel` may be the one ahead
    filter_rows = ()
    for r in tl.static_range(R):
        tile = weight_tile(packed, r, first, filters, LANES, CHANNELS)
        filter_rows = filter_rows + (tile,)  # noqa: RUF005 (Triton unpacks no tuples)
    channel = first + tl.arange(0, CHANNELS)
    a, b = factors(scale, shift, channel, filters, out_factor)
    x += image * x_n
    left = member > 0
    lost = tl.zeros((COLUMNS,), tl.int32)
    zero = tl.full((), 0, index)  # makes rows as wide as offsets
    # Where there is no pixel zeros stand for it: ReLU comes last. So may rounding: the largest is
    # the same, and what is kept for the next row takes half of the registers.
    above_even = rounded(tl.zeros((COLUMNS, CHANNELS), tl.float32), out)
    above_odd = rounded(tl.zeros((COLUMNS, CHANNELS), tl.float32), out)
    for q in range(2 * begin - 1, 2 * end):
        acc = tl.zeros((COLUMNS, 2 * CHANNELS), tl.float32)
        for r in tl.static_range(R):
            u = zero + (q * STRIDE_H - PADDING_H + r)
            t = image_tile(
                x, norm, u, column, height, width, x_c, x_h, x_w, 0, S, C, STRIDE, PADDING, LANES,
                SHIFT, DENSE, NORM, False, packed.dtype.element_ty,
            )  # fmt: skip
            acc = tl.dot(t, filter_rows[r], acc, input_precision=PRECISION)
        there = (q >= 0) & (q < conv_height)
        even, odd = columns_of(acc, a, b, there, COLUMNS, CHANNELS)
        best_even = larger(above_even.to(tl.float32), even)
        best_odd = larger(above_odd.to(tl.float32), odd)
        fresh = q % 2 != 0  # the last row of a window is the first of the next
        above_even = rounded(tl.where(fresh, even, best_even), out)
        above_odd = rounded(tl.where(fresh, odd, best_odd), out)
        if fresh & (q > 2 * begin):
            best = windows(best_even, best_odd, exists, left, member, COLUMNS, CHANNELS)
            lost = tl.maximum(lost, tl.max((best != best).to(tl.int32), 1))
            store(
                out, best, image, zero + q // 2, column, channel, member, out_width, filters, out_n,
                out_c, out_h, out_w, HALO,
            )  # fmt: skip
    if tl.max(lost, 0) > 0:
        # Behind the loop, whose registers are free by now.
        for p in range(begin, end):
            best_even, best_odd = separately(
                x, norm, packed, scale, shift, out_factor, zero + p, first, column, height, width,
                conv_height, filters, x_c, x_h, x_w, R, S, C, STRIDE_H, STRIDE, PADDING_H, PADDING,
                LANES, SHIFT, DENSE, NORM, PRECISION, COLUMNS, CHANNELS,
            )  # fmt: skip
            best = windows(best_even, best_odd, exists, left, member, COLUMNS, CHANNELS)
            store(
                out, best, image, zero + p, column, channel, member, out_width, filters, out_n,
                out_c, out_h, out_w, HALO,
            )  # fmt: skip


def _sizes(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int],
    window: tuple[Sequence[int], ...],
) -> _stem_tiles.Sizes:  # fmt: skip
    """The call's sizes.

    Raises:
        LookupError: the kernel is not made for it.
    """
    sizes = _stem_tiles.sizes_of(
        x.shape, weight, stride, padding, window, precision(weight.dtype), _stem_tiles.is_dense(x)
    )
    if isinstance(sizes, str):
        raise LookupError(sizes)
    return sizes


def prepare(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    input_norm: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    pool_kernel: Sequence[int],
    pool_stride: Sequence[int],
    pool_padding: Sequence[int],
    out_scale: float | None = None,
) -> dict[str, Tensor]:
    """Makes what many calls with the same weight can share: `launch`'s argument `packed`.

    Args:
        x: as `launch`'s, like all others.
        weight: see x.
        scale: see x.
        shift: see x.
        input_norm: see x.
        stride: see x.
        padding: see x.
        pool_kernel: see x.
        pool_stride: see x.
        pool_padding: see x.
        out_scale: see x; it changes nothing.

    Raises:
        LookupError: the kernel is not made for this call.
    """
    window = (pool_kernel, pool_stride, pool_padding)
    return {"packed": pack(weight, stride, _sizes(x, weight, stride, padding, window))}


def launch(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    input_norm: Tensor | None,
    out: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    pool_kernel: Sequence[int],
    pool_stride: Sequence[int],
    pool_padding: Sequence[int],
    out_scale: float | None = None,
    *,
    plan: _stem_tiles.Plan | None = None,
    allowed: frozenset[str] | None = None,
    packed: Tensor | None = None,
    flow: Flow = ALONE,
) -> None:
    """Writes maxpool(relu(scale * conv(v, weight) + shift)) into `out`; v is x or a x + b.

    Args:
        x: [N, C, H, W] uint8, float32 or the weight's dtype, any strides.
        weight: [K, C, R, S] float32, bfloat16 or float16, any strides.
        scale: [K] float32.
        shift: [K] float32.
        input_norm: [2, C] float32, contiguous, or None.
        out: [N, K, P, Q], dtype of the weight, or float8_e4m3fn with `out_scale`, any layout
            without overlaps; overwritten.
        stride: of the convolution (vertical, horizontal), as are all that follow.
        padding: see stride.
        pool_kernel: (3, 3).
        pool_stride: (2, 2).
        pool_padding: (1, 1).
        out_scale: what a stored 1 of the result is worth; None: 1.
        plan: configuration to use instead of the chosen one.
        allowed: names of the configurations to choose among; None for all.
        packed: what `prepare` made of the weight for such a call; None makes it here.
        flow: how the launch stands among those around it.

    Raises:
        LookupError: the kernel is not made for this call, or no configuration is left for it.
    """
    if out.numel() == 0:
        return
    sizes = _sizes(x, weight, stride, padding, (pool_kernel, pool_stride, pool_padding))
    limits = _limits.limits(out.device)
    if out_scale is not None and limits.capability < _tiles.E4M3_CAPABILITY:
        raise LookupError(f"sm_{limits.capability} has no conversion to e4m3")
    found = plan or _stem_tiles.choose(sizes, limits, allowed)
    if isinstance(found, str):
        raise LookupError(found)
    tile, rows = found.tile, found.rows
    filters, _, r, s = weight.shape
    target = writable(out)
    strips, halo = _stem_tiles.strips_of(sizes, tile)
    segments = cdiv(sizes.rows, rows)
    blocks = cdiv(filters, tile.channels)
    if packed is None:
        packed = pack(weight, stride, sizes)
        flow = flow._replace(follows=False)
    conv = [
        (size + 2 * pad - taps) // step + 1
        for size, pad, taps, step in zip(x.shape[2:], padding, (r, s), stride, strict=True)
    ]
    with on_device(out):
        traceable(stem_kernel, out)[(x.shape[0] * segments * strips * blocks,)](
            x, packed, scale, shift, scale if input_norm is None else input_norm, target,
            1.0 if out_scale is None else 1.0 / out_scale, x.shape[2], x.shape[3], *conv,
            *out.shape[2:], filters, strips, segments, rows, *x.stride(), *target.stride(),
            **layout(weight, stride, sizes),
            CHANNELS=tile.channels, R=r, STRIDE_H=stride[0], PADDING_H=padding[0],
            PADDING=padding[1], DENSE=sizes.dense,
            NORM=input_norm is not None, HALO=halo, WIDE=not fits_32_bits(x, target),
            PRECISION=sizes.precision, COLUMNS=tile.columns, num_warps=tile.warps,
            num_stages=tile.stages, maxnreg=most_registers(out.device), **flow.options(),
        )  # fmt: skip
        if target is not out:
            out.copy_(target)
