"""The shapes of `stem` and `head`; `resnet_fused.cases` is where they are taken from."""

from __future__ import annotations

from dataclasses import dataclass

Pair = tuple[int, int]


@dataclass(frozen=True)
class StemCase:
    """One call of ``stem``: images [n, c, h, w], weight [k, c, r, s].

    ``images`` is their dtype: "uint8", "float32" or "same", the weight's; bytes have an
    ``input_norm``, others where ``normed`` says so. ``layout`` is as in `BnActCase`.
    """

    name: str
    n: int
    c: int
    h: int
    w: int
    k: int
    r: int = 7
    s: int = 7
    stride: Pair = (2, 2)
    padding: Pair = (3, 3)
    pool: tuple[Pair, Pair, Pair] = ((3, 3), (2, 2), (1, 1))
    images: str = "same"
    normed: bool = False
    layout: str = "nhwc"
    tags: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[N, C, H, W] of the images."""
        return self.n, self.c, self.h, self.w

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """[K, C, R, S]."""
        return self.k, self.c, self.r, self.s

    @property
    def has_norm(self) -> bool:
        """Whether there is an ``input_norm``."""
        return self.normed or self.images == "uint8"

    @property
    def geometry(self) -> tuple[list[int], ...]:
        """stride, padding, and the pooling's kernel, stride, padding, as the overloads take it."""
        return list(self.stride), list(self.padding), *(list(part) for part in self.pool)

    def __str__(self) -> str:
        """The name: what pytest shows."""
        return self.name


@dataclass(frozen=True)
class HeadCase:
    """One call of ``head`` on [n, c, h, w]; ``layout`` is as in `BnActCase`."""

    name: str
    n: int
    c: int
    h: int
    w: int
    classes: int
    bias: bool = True
    layout: str = "nhwc"
    tags: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[N, C, H, W]."""
        return self.n, self.c, self.h, self.w

    def __str__(self) -> str:
        """The name: what pytest shows."""
        return self.name


STEM_CASES: tuple[StemCase, ...] = (
    StemCase("usual", 2, 3, 18, 20, 64, tags=("stem",)),
    StemCase("bytes", 1, 3, 20, 19, 64, images="uint8", tags=("uint8",)),
    StemCase("bytes_nchw", 2, 3, 13, 16, 24, images="uint8", layout="nchw", tags=("uint8",)),
    StemCase("float_images", 1, 3, 14, 16, 16, images="float32", normed=True, layout="nchw"),
    StemCase("odd_size", 1, 3, 21, 23, 40, layout="sliced", tags=("odd", "strided")),
    StemCase("two_strips", 1, 3, 6, 264, 8, layout="unaligned", tags=("wide", "unaligned")),
    StemCase("one_channel", 2, 1, 9, 10, 16, 3, 3, (1, 1), (1, 1), tags=("c1", "3x3")),
    StemCase("one_pixel", 3, 3, 1, 1, 8, tags=("nc11",)),
    StemCase("no_padding", 1, 4, 15, 12, 8, 5, 3, (1, 2), (0, 0), tags=("rectangular",)),
    StemCase("other_pool", 1, 3, 16, 16, 8, pool=((2, 3), (2, 1), (0, 1)), tags=("pool",)),
    StemCase("empty_batch", 0, 3, 16, 16, 8, tags=("n0", "empty")),
)

HEAD_CASES: tuple[HeadCase, ...] = (
    HeadCase("classes10", 3, 64, 4, 4, 10, tags=("one_kernel",)),
    HeadCase("classes200", 3, 40, 4, 4, 200, tags=("two_kernels",)),
    HeadCase("no_bias", 17, 16, 2, 2, 33, bias=False, tags=("images17",)),
    HeadCase("nchw", 2, 24, 4, 4, 7, layout="nchw"),
    HeadCase("sliced", 2, 130, 4, 4, 150, layout="sliced", tags=("strided",)),
    HeadCase("one_pixel", 2, 65, 1, 1, 5, tags=("nc11", "odd")),
    HeadCase("one_class", 1, 8, 2, 4, 1, tags=("k1",)),
    HeadCase("empty_batch", 0, 16, 4, 4, 10, tags=("n0", "empty")),
)
