"""`head` in Triton: average pooling and the classifier.

Where one program's images are few bytes and all classes fit into its tile, it pools them as its
product reads them: one kernel. Else each block of classes would pool the same images again, so a
kernel that has a program for every image and 64 channels pools them first; the product then reads
activations of one pixel.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import _limits
from ._dependent import ALONE, Flow, prefetch, prefetched, wait
from ._launch import fits_32_bits, on_device, precision, traceable
from ._tiles import cdiv

IMAGES = 16
"""Rows of a product: the fewest that the tensor cores take."""

CLASSES = 32
"""Columns of a product behind the pooling."""

FEWEST = 8
"""Classes of a program at least: 1000 of them and 16 images make 125 programs, about as many as an
H200 has multiprocessors. The product is made for 16, the fewest columns that it takes."""

MOST_CLASSES = 128
MOST_BYTES = 128 * 1024
"""A program's classes and bytes of images, at most, where it pools by itself. At 28 bytes a clock
cycle that many take 3 us, about what a second launch does."""

DEPTH_BYTES = 512
"""Bytes of a step of the product behind the pooling, four times what other kernels take: its tiles
are small, so that latency counts, and a step of 4 KB each has little in flight."""

CHANNELS = 64
PIXELS = 64
"""The pooling's tile: 128 bytes a pixel in 16 bits, and a ResNet's 49 pixels at once."""


@triton.jit
def mean_kernel(
    x,  # [N, C, H, W], any strides
    mean,  # [N, C], contiguous
    channels,
    pixels,  # H W
    width,
    x_n,
    x_c,
    x_h,
    x_w,
    WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PDL: tl.constexpr = False,  # type: ignore[bad-function-definition]
):
    """The mean over the pixels of one image and some channels, always in the same order."""
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    blocks = tl.cdiv(channels, BLOCK_C)
    image = (tl.program_id(0) // blocks).to(index)
    channel = (tl.program_id(0) % blocks).to(index) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channel < channels
    wait(PDL)
    acc = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for first in range(0, pixels, BLOCK_P):
        pixel = first + tl.arange(0, BLOCK_P)
        place = ((pixel // width) * x_h + (pixel % width) * x_w)[:, None]
        source = x + image * x_n + place + (channel * x_c)[None, :]
        found = tl.load(source, mask=(pixel < pixels)[:, None] & known[None, :], other=0.0)
        acc += found.to(tl.float32)
    value = tl.sum(acc, 0) / pixels
    tl.store(mean + image * channels + channel, value.to(mean.dtype.element_ty), mask=known)


@triton.jit
def head_kernel(
    x,  # [N, C, H, W], any strides
    weight,  # [classes, C], any strides
    bias,  # [classes], contiguous; unused without HAS_BIAS
    out,  # [N, classes], contiguous
    images,
    channels,
    classes,
    pixels,  # H W
    width,
    x_n,
    x_c,
    x_h,
    x_w,
    weight_k,
    weight_c,
    HAS_BIAS: tl.constexpr,
    POOLED: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EACH: tl.constexpr,
    PDL: tl.constexpr = False,  # type: ignore[bad-function-definition]
    PREFETCH: tl.constexpr = 0,  # type: ignore[bad-function-definition]
):
    """Some images times EACH classes; with POOLED x has one pixel, its mean."""
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    blocks = tl.cdiv(classes, EACH)
    image = (tl.program_id(0) // blocks).to(index) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    label = ((tl.program_id(0) % blocks) * EACH + column).to(index)
    there = (image < images)[:, None]
    known = (label < classes) & (column < EACH)
    named = known[None, :]
    if PREFETCH:
        prefetch(weight, classes * weight_k, PREFETCH)
    wait(PDL)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, channels, BLOCK_K):
        channel = first + tl.arange(0, BLOCK_K)
        real = channel < channels
        source = x + (image * x_n)[:, None] + (channel * x_c)[None, :]
        seen = there & real[None, :]
        if POOLED:
            mean = tl.load(source, mask=seen, other=0.0)
        else:
            sums = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
            for pixel in range(pixels):
                place = (pixel // width) * x_h + (pixel % width) * x_w
                sums += tl.load(source + place, mask=seen, other=0.0).to(tl.float32)
            mean = (sums / pixels).to(x.dtype.element_ty)
        place = (label * weight_k)[None, :] + (channel * weight_c)[:, None]
        w = tl.load(weight + place, mask=named & real[:, None], other=0.0)
        acc = tl.dot(mean, w, acc, input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias + label, mask=known, other=0.0).to(tl.float32)[None, :]
    target = out + (image * classes)[:, None] + label[None, :]
    tl.store(target, acc.to(out.dtype.element_ty), mask=there & named)


def together(x: Tensor, classes: int) -> bool:
    """Whether one kernel pools and multiplies: see `MOST_BYTES`.

    Args:
        x: [N, C, H, W].
        classes: of the product.
    """
    each = min(IMAGES, x.shape[0]) * x.shape[1] * x.shape[2] * x.shape[3] * x.element_size()
    return classes <= MOST_CLASSES and each <= MOST_BYTES


def classes_each(images: int, classes: int, multiprocessors: int) -> int:
    """Classes of a program behind the pooling: as many as leave one for each multiprocessor.

    Args:
        images: of the call.
        classes: of the product.
        multiprocessors: of the GPU.
    """
    each = CLASSES
    while each > FEWEST and cdiv(images, IMAGES) * cdiv(classes, each) < multiprocessors:
        each //= 2
    return each


def launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, *, flow: Flow = ALONE
) -> None:
    """Writes linear(mean over height and width of x) into `out`.

    Args:
        x: [N, C, H, W] float32, bfloat16 or float16, any strides.
        weight: [classes, C], dtype of x, any strides.
        bias: [classes], likewise, or None.
        out: [N, classes], dtype of x, contiguous; overwritten.
        flow: how the launch stands among those around it.
    """
    if out.numel() == 0:
        return
    n, channels, height, width = x.shape
    classes = weight.shape[0]
    bias = None if bias is None else bias.contiguous()
    fused, limits = together(x, classes), _limits.limits(x.device)
    if fused:
        block = each = max(16, 1 << (classes - 1).bit_length())
        step = 128 // x.element_size()
    else:
        each = classes_each(n, classes, limits.multiprocessors)
        block = max(16, each)
        step = min(DEPTH_BYTES // x.element_size(), max(16, 1 << (channels - 1).bit_length()))
    programs = cdiv(n, IMAGES) * cdiv(classes, each)
    with on_device(out):
        if not fused:
            mean = x.new_empty((n, channels))
            traceable(mean_kernel, out)[(n * cdiv(channels, CHANNELS),)](
                x, mean, channels, height * width, width, *x.stride(), WIDE=not fits_32_bits(x),
                BLOCK_C=CHANNELS, BLOCK_P=PIXELS, num_warps=4, **flow.options(),
            )  # fmt: skip
            flow = flow.then()
            x, height, width = mean.view(n, channels, 1, 1), 1, 1
        traceable(head_kernel, out)[(programs,)](
            x, weight, out if bias is None else bias, out, n, channels, classes, height * width,
            width, *x.stride(), *weight.stride(), HAS_BIAS=bias is not None, POOLED=not fused,
            WIDE=not fits_32_bits(x, weight, out), PRECISION=precision(x.dtype),
            BLOCK_M=IMAGES, BLOCK_N=block, BLOCK_K=step, EACH=each, num_warps=4, num_stages=3,
            **flow.options(), **prefetched(flow, programs, limits, weight),
        )  # fmt: skip
