"""The one list of shapes, for tests and benchmarks alike.

`CONV_CASES`, `BN_ACT_CASES`, `POOL_CASES` and `CHAIN_CASES` are small and each is there for a
reason, named by its tags; `RESNET50_LAYERS` are the convolutions of ResNet-50 at 224x224 (He et
al., Deep Residual Learning for Image Recognition, 2015, table 1, with the stride on the 3x3 as
torchvision has it), `RESNET50_CHAINS` its pairs of 1x1 convolutions across a block's end.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ._stem_cases import HEAD_CASES as HEAD_CASES
from ._stem_cases import STEM_CASES as STEM_CASES
from ._stem_cases import HeadCase as HeadCase
from ._stem_cases import Pair
from ._stem_cases import StemCase as StemCase


@dataclass(frozen=True)
class ConvCase:
    """One call of ``conv_bn_act``: input [n, c, h, w], weight [k, c / groups, r, s].

    Attributes:
        name: unique, fit for a test's id.
        n: images.
        c: input channels.
        h: input height.
        w: input width.
        k: output channels.
        r: filter height.
        s: filter width.
        stride: (vertical, horizontal), as are padding and dilation.
        padding: zeros on each side.
        dilation: distance of two taps.
        groups: groups of channels.
        residual: whether a tensor of the output's shape is added before the activation.
        act: "relu" or "none".
        tags: what makes the case telling.
        count: how often a network has it; for `RESNET50_LAYERS`.
    """

    name: str
    n: int
    c: int
    h: int
    w: int
    k: int
    r: int = 1
    s: int = 1
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    residual: bool = False
    act: str = "relu"
    tags: tuple[str, ...] = ()
    count: int = 1

    @property
    def p(self) -> int:
        """Output height."""
        return (self.h + 2 * self.padding[0] - self.dilation[0] * (self.r - 1) - 1) // (
            self.stride[0]
        ) + 1

    @property
    def q(self) -> int:
        """Output width."""
        return (self.w + 2 * self.padding[1] - self.dilation[1] * (self.s - 1) - 1) // (
            self.stride[1]
        ) + 1

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        """[N, C, H, W]."""
        return self.n, self.c, self.h, self.w

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """[K, C / groups, R, S]."""
        return self.k, self.c // self.groups, self.r, self.s

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        """[N, K, P, Q]."""
        return self.n, self.k, self.p, self.q

    @property
    def geometry(self) -> dict[str, int | Pair]:
        """stride, padding, dilation and groups, as keyword arguments of a convolution."""
        return {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
        }

    @property
    def macs(self) -> int:
        """Multiply-adds of the convolution."""
        return self.n * self.k * self.p * self.q * (self.c // self.groups) * self.r * self.s

    def __str__(self) -> str:
        """The name: what pytest shows."""
        return self.name


@dataclass(frozen=True)
class BnActCase:
    """One call of ``bn_act`` on [n, c, h, w].

    ``layout`` is how the operands lie in memory: "nchw" or "nhwc" (dense), "sliced" (every other
    column of a larger tensor), "expanded" (one image, stride 0 over n) or "unaligned" (dense NHWC
    whose pointer is one element off 16 bytes).
    """

    name: str
    n: int
    c: int
    h: int
    w: int
    residual: bool = False
    act: str = "relu"
    layout: str = "nhwc"
    tags: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[N, C, H, W], of input, residual and output."""
        return self.n, self.c, self.h, self.w

    def __str__(self) -> str:
        """The name: what pytest shows."""
        return self.name


@dataclass(frozen=True)
class PoolCase:
    """One call of ``bn_act_pool`` on [n, c, h, w]; kernel, stride, padding: (vertical, horizontal).

    ``layout`` is as in `BnActCase`.
    """

    name: str
    n: int
    c: int
    h: int
    w: int
    kernel: Pair = (3, 3)
    stride: Pair = (2, 2)
    padding: Pair = (1, 1)
    layout: str = "nhwc"
    tags: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[N, C, H, W] of the input."""
        return self.n, self.c, self.h, self.w

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        """[N, C, P, Q]."""
        sizes = zip((self.h, self.w), self.kernel, self.stride, self.padding, strict=True)
        p, q = ((size + 2 * pad - kernel) // step + 1 for size, kernel, step, pad in sizes)
        return self.n, self.c, p, q

    @property
    def window(self) -> tuple[list[int], list[int], list[int]]:
        """Kernel, stride and padding as the overloads take them."""
        return list(self.kernel), list(self.stride), list(self.padding)

    def __str__(self) -> str:
        """The name: what pytest shows."""
        return self.name


@dataclass(frozen=True)
class ChainCase:
    """One call of ``conv_chain``: [n, k, h, w] -> out [n, c, h, w] -> next [n, m, h, w].

    Attributes:
        name: unique, fit for a test's id.
        n: images.
        k: channels that the first 1x1 convolution reads.
        h: height of its input.
        w: width of its input.
        c: channels of out.
        m: channels of next; 0 without.
        projected: channels of the tensor that the shortcut projects; 0 for an identity.
        projection_stride: of the projection.
        front: channels that the 3x3 convolution in front reads; 0 without one.
        out_stride: 1, or 2 where only the even pixels of out are stored.
        tags: what makes the case telling.
        count: how often a network has it; for `RESNET50_CHAINS`.
    """

    name: str
    n: int
    k: int
    h: int
    w: int
    c: int
    m: int = 0
    projected: int = 0
    projection_stride: int = 1
    front: int = 0
    out_stride: int = 1
    tags: tuple[str, ...] = ()
    count: int = 1

    @property
    def pixels(self) -> int:
        """Of all images."""
        return self.n * self.h * self.w

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        """Of x: what the front reads, else what the first 1x1 convolution does."""
        return self.n, self.front or self.k, self.h, self.w

    @property
    def projected_shape(self) -> tuple[int, int, int, int]:
        """Of the tensor that the shortcut projects: the smallest that has these outputs."""
        step = self.projection_stride
        sides = ((side - 1) * step + 1 for side in (self.h, self.w))
        return self.n, self.projected, *sides

    @property
    def stored_shape(self) -> tuple[int, int, int, int]:
        """Of out as it is stored."""
        return self.n, self.c, -(-self.h // self.out_stride), -(-self.w // self.out_stride)

    @property
    def parts(self) -> tuple[ConvCase, ...]:
        """The convolutions that it stands for: the front, the projection, first, next.

        The first one has the shortcut, and writes all of out; a next one reads it.
        """
        found = []
        if self.front:
            found.append(_square("front", self.n, self.front, self.h, self.k, 3))
            found[-1] = dataclasses.replace(found[-1], w=self.w)
        if self.projected:
            found.append(
                ConvCase(
                    "projection", *self.projected_shape, self.c,
                    stride=(self.projection_stride,) * 2, act="none",
                )
            )  # fmt: skip
        found.append(ConvCase("first", self.n, self.k, self.h, self.w, self.c, residual=True))
        if self.m:
            found.append(ConvCase("next", self.n, self.c, self.h, self.w, self.m))
        return tuple(found)

    @property
    def macs(self) -> int:
        """Multiply-adds of all of its convolutions."""
        return sum(part.macs for part in self.parts)

    def __str__(self) -> str:
        """The name: what pytest shows."""
        return self.name


def _square(
    name: str,
    n: int,
    c: int,
    size: int,
    k: int,
    r: int = 1,
    *,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    residual: bool = False,
    act: str = "relu",
    tags: tuple[str, ...] = (),
) -> ConvCase:
    """A square image and filter, padded so that stride 1 keeps the size."""
    pad = dilation * (r // 2)
    return ConvCase(
        name, n, c, size, size, k, r, r, (stride,) * 2, (pad,) * 2, (dilation,) * 2, groups,
        residual, act, tags,
    )  # fmt: skip


CONV_CASES: tuple[ConvCase, ...] = (
    _square("1x1", 2, 16, 7, 24, tags=("1x1",)),
    _square("1x1_residual", 2, 16, 7, 24, residual=True, tags=("1x1", "residual")),
    _square("1x1_stride2", 2, 16, 9, 32, stride=2, act="none", tags=("1x1", "strided", "shortcut")),
    _square("3x3", 2, 16, 8, 16, 3, tags=("3x3",)),
    _square("3x3_residual", 2, 16, 8, 16, 3, residual=True, tags=("3x3", "residual")),
    _square("3x3_no_act", 2, 8, 6, 16, 3, act="none", tags=("3x3",)),
    _square("3x3_residual_no_act", 1, 8, 6, 8, 3, residual=True, act="none", tags=("residual",)),
    _square("3x3_stride2", 2, 16, 9, 24, 3, stride=2, tags=("3x3", "strided")),
    _square("3x3_stride3", 1, 8, 11, 8, 3, stride=3, tags=("3x3", "strided")),
    _square("3x3_dilated2", 1, 16, 9, 16, 3, dilation=2, tags=("3x3", "dilated")),
    _square("3x3_dilated4_stride2", 1, 8, 13, 8, 3, stride=2, dilation=4, tags=("dilated",)),
    _square("3x3_groups4", 2, 32, 6, 32, 3, groups=4, residual=True, tags=("grouped",)),
    _square("1x1_groups2", 2, 16, 5, 24, groups=2, tags=("grouped", "1x1")),
    _square("3x3_depthwise", 2, 24, 6, 24, 3, groups=24, tags=("depthwise", "grouped")),
    _square("3x3_depthwise_x2", 1, 8, 6, 16, 3, stride=2, groups=8, tags=("depthwise", "strided")),
    _square("odd_channels", 2, 65, 5, 65, 3, residual=True, tags=("odd", "k65")),
    _square("odd_channels_1x1", 3, 65, 5, 33, tags=("odd", "1x1")),
    _square("k65", 1, 64, 4, 65, tags=("odd", "k65", "1x1")),
    _square("one_input_channel", 2, 1, 7, 16, 3, tags=("c1",)),
    _square("one_output_channel", 2, 16, 7, 1, residual=True, tags=("k1",)),
    _square("one_channel", 2, 1, 5, 1, 3, residual=True, tags=("c1", "k1")),
    _square("nc11", 4, 32, 1, 48, residual=True, tags=("nc11", "1x1_spatial")),
    _square("nc11_3x3", 2, 16, 1, 16, 3, tags=("nc11", "1x1_spatial", "3x3")),
    ConvCase("n1hw", 3, 1, 6, 10, 1, residual=True, tags=("n1hw", "c1", "k1")),
    ConvCase("to_1x1_spatial", 2, 8, 3, 3, 16, 3, 3, tags=("1x1_spatial", "no_padding")),
    _square("empty_batch", 0, 16, 7, 24, 3, residual=True, tags=("n0", "empty")),
    _square("stem", 1, 3, 30, 64, 7, stride=2, tags=("stem", "7x7", "strided")),
    _square("all_equal", 5, 5, 5, 5, 5, tags=("all_equal", "5x5")),
    _square("all_equal_1x1", 8, 8, 8, 8, residual=True, tags=("all_equal", "1x1")),
    ConvCase("1x7", 1, 12, 9, 7, 8, 1, 7, padding=(0, 3), tags=("rectangular",)),
    ConvCase(
        "uneven", 1, 8, 12, 7, 16, 3, 2, (2, 1), (1, 0), (1, 2), 2, tags=("rectangular", "grouped")
    ),
    _square("deep", 1, 512, 3, 16, 3, residual=True, tags=("deep", "3x3")),
    ConvCase("no_padding", 1, 8, 7, 9, 8, 3, 3, tags=("no_padding", "3x3")),
)

BN_ACT_CASES: tuple[BnActCase, ...] = (
    BnActCase("nhwc", 2, 16, 5, 7, tags=("nhwc",)),
    BnActCase("nhwc_residual", 2, 16, 5, 7, True, tags=("nhwc", "residual")),
    BnActCase("nchw", 2, 16, 5, 7, layout="nchw", tags=("nchw",)),
    BnActCase("nchw_residual", 2, 16, 5, 7, True, layout="nchw", tags=("nchw", "residual")),
    BnActCase("nhwc_no_act", 2, 8, 4, 4, True, "none", tags=("nhwc", "residual")),
    BnActCase("nchw_no_act", 2, 8, 4, 4, False, "none", "nchw", tags=("nchw",)),
    BnActCase("sliced", 2, 12, 4, 6, True, layout="sliced", tags=("strided", "residual")),
    BnActCase("expanded", 3, 8, 4, 4, layout="expanded", tags=("strided",)),
    BnActCase("unaligned", 2, 8, 4, 4, True, layout="unaligned", tags=("unaligned", "residual")),
    BnActCase("odd_nhwc", 2, 65, 3, 5, True, tags=("nhwc", "odd")),
    BnActCase("odd_nchw", 2, 65, 3, 5, True, layout="nchw", tags=("nchw", "odd")),
    BnActCase("one_channel", 3, 1, 6, 10, True, tags=("c1", "n1hw")),
    BnActCase("one_pixel", 5, 32, 1, 1, True, tags=("nc11",)),
    BnActCase("one_element", 1, 1, 1, 1, tags=("c1", "nc11")),
    BnActCase("empty_batch", 0, 16, 4, 4, True, tags=("n0", "empty")),
    BnActCase("all_equal", 4, 4, 4, 4, True, tags=("all_equal",)),
    BnActCase("long_rows", 1, 8, 64, 65, layout="nchw", tags=("nchw", "large")),
    BnActCase("many_channels", 1, 2048, 2, 2, True, tags=("nhwc", "large")),
)

POOL_CASES: tuple[PoolCase, ...] = (
    PoolCase("stem_even", 2, 16, 8, 6, tags=("stem",)),
    PoolCase("stem_odd", 2, 16, 7, 9, tags=("stem", "odd_size")),
    PoolCase("stem_nchw", 2, 12, 9, 8, layout="nchw", tags=("stem",)),
    PoolCase("sliced", 2, 8, 6, 6, layout="sliced", tags=("strided",)),
    PoolCase("unaligned", 1, 8, 7, 7, layout="unaligned", tags=("unaligned",)),
    PoolCase("disjoint", 2, 8, 6, 8, (2, 2), (2, 2), (0, 0), tags=("disjoint",)),
    PoolCase("every_pixel", 1, 8, 5, 6, (3, 3), (1, 1), (1, 1), tags=("overlapping",)),
    PoolCase("gaps", 1, 8, 8, 9, (2, 2), (3, 3), (0, 0), tags=("gaps",)),
    PoolCase("uneven", 2, 8, 7, 6, (3, 2), (2, 1), (1, 0), tags=("rectangular",)),
    PoolCase("one_window", 2, 8, 3, 3, (3, 3), (1, 1), (0, 0), tags=("1x1_spatial",)),
    PoolCase("one_pixel", 3, 16, 1, 1, tags=("nc11",)),
    PoolCase("most_taps", 1, 2, 15, 17, (15, 17), (1, 1), (7, 8), tags=("taps255",)),
    PoolCase("odd_channels", 2, 65, 5, 5, tags=("odd",)),
    PoolCase("one_channel", 2, 1, 6, 6, layout="nchw", tags=("c1",)),
    PoolCase("empty_batch", 0, 16, 8, 8, tags=("n0", "empty")),
)

CHAIN_CASES: tuple[ChainCase, ...] = (
    ChainCase("identity", 2, 16, 7, 9, 40, 24, tags=("residual", "next")),
    ChainCase("whole_tiles", 2, 64, 8, 8, 128, 64, tags=("residual", "next", "even")),
    ChainCase("projected", 2, 16, 7, 6, 40, 24, 24, tags=("projection", "next")),
    ChainCase("projected_stride2", 2, 16, 5, 6, 40, 16, 24, 2, tags=("projection", "strided")),
    ChainCase("even_pixels", 3, 24, 7, 8, 48, 32, out_stride=2, tags=("residual", "thinned")),
    ChainCase("no_next", 2, 16, 5, 7, 72, tags=("residual", "no_next")),
    ChainCase("front", 2, 16, 6, 7, 40, 16, front=16, tags=("residual", "front", "next")),
    ChainCase("front_wider", 2, 24, 5, 5, 64, front=40, tags=("front", "no_next")),
    ChainCase("front_projected", 1, 16, 6, 5, 40, 24, 16, 1, 16, tags=("front", "projection")),
    ChainCase("everything", 2, 16, 7, 5, 40, 16, 24, 2, 24, 2,
              tags=("front", "projection", "thinned", "strided")),
    ChainCase("odd_channels", 2, 17, 5, 5, 33, 19, tags=("odd", "residual")),
    ChainCase("one_channel", 2, 1, 4, 5, 1, 1, tags=("c1", "residual")),
    ChainCase("one_pixel", 3, 16, 1, 1, 32, 8, tags=("nc11", "residual")),
    ChainCase("one_pixel_front", 2, 8, 1, 1, 16, 8, 8, 1, 8, 2, tags=("nc11", "front")),
    ChainCase("empty_batch", 0, 16, 4, 4, 32, 16, 16, 1, 16, tags=("n0",)),
    ChainCase("all_equal", 5, 5, 5, 5, 5, 5, 5, 1, 5, tags=("all_equal", "front")),
)  # fmt: skip


def _resnet50() -> tuple[ConvCase, ...]:
    found: dict[ConvCase, int] = {}

    def add(c: int, size: int, k: int, r: int, stride: int, residual: bool = False) -> None:
        name = f"{r}x{r}{f's{stride}' if stride > 1 else ''}_{c}_{k}_at{size}"
        case = _square(name, 1, c, size, k, r, stride=stride, residual=residual, tags=("resnet50",))
        found[case] = found.get(case, 0) + 1

    add(3, 224, 64, 7, 2)
    channels, size = 64, 56
    for width, depth, first_stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(depth):
            stride = first_stride if block == 0 else 1
            add(channels, size, width, 1, 1)
            add(width, size, width, 3, stride)
            if block == 0 and stride == 2:
                add(channels, size, 4 * width, 1, 2)
            size //= stride
            add(width, size, 4 * width, 1, 1, residual=True)
            if block == 0 and stride == 1:
                # The projection of the first stage has the shape of a conv3; it is counted with it.
                add(channels, size, 4 * width, 1, 1, residual=True)
            channels = 4 * width
    return tuple(dataclasses.replace(case, count=count) for case, count in found.items())


RESNET50_LAYERS: tuple[ConvCase, ...] = _resnet50()
"""The 23 distinct convolutions of ResNet-50, one image of 224x224, in order of first use."""


def _resnet50_chains() -> tuple[ChainCase, ...]:
    found, below, stages = [], 64, ((64, 56, 3), (128, 28, 4), (256, 14, 6), (512, 7, 3))
    for stage, (k, size, depth) in enumerate(stages, 1):
        after = 0 if stage == 4 else 2 * k
        step = 1 if stage == 1 else 2
        first = ChainCase(f"layer{stage}_first", 1, k, size, size, 4 * k, k, below, step)
        middle = ChainCase(f"layer{stage}", 1, k, size, size, 4 * k, k, count=depth - 2)
        last = ChainCase(f"layer{stage}_last", 1, k, size, size, 4 * k, after)
        found += [first, middle, dataclasses.replace(last, out_stride=2 if after else 1)]
        below = 4 * k
    return tuple(dataclasses.replace(case, tags=("resnet50",)) for case in found)


RESNET50_CHAINS: tuple[ChainCase, ...] = _resnet50_chains()
"""Each block's last convolution with its shortcut and the next block's first one, as ResNet-50 has
them for one image of 224x224. The last block has no next; where a stage ends, the pixels of out
that the strided projection behind it reads are the even ones."""
