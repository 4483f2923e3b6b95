"""The words that bulk copies and mbarriers are tried on: geometries within the tensor maps' rules.

The order of the words is that of csrc/driver/conformance_{tma,cluster}.cu.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]

PARAMETERS = 32
TENSOR = 2048  # words of a case's tensor
BOX = 2048  # words of shared memory


@dataclass(frozen=True)
class Geometry:
    """A tensor, a box of it and where that begins; innermost dimension first.

    Attributes:
        rank: dimensions in use of the five.
        element_bytes: 1, 2 or 4.
        sizes: of the tensor.
        box: of the box, in elements; im2col: the first alone, channels.
        steps: element strides.
        at: the box's first element.
        swizzle: bytes of its span, or 0.
        pixels: of an im2col column, or 0.
        lower: im2col's corner {W, H, D}.
        upper: the opposite one.
        offsets: {W, H} of im2col.
    """

    rank: int
    element_bytes: int
    sizes: tuple[int, ...]
    box: tuple[int, ...]
    steps: tuple[int, ...]
    at: tuple[int, ...]
    swizzle: int
    pixels: int = 0
    lower: tuple[int, ...] = (0, 0, 0)
    upper: tuple[int, ...] = (0, 0, 0)
    offsets: tuple[int, ...] = (0, 0)

    @property
    def row_bytes(self) -> int:
        """Of a row of the tensor, padded to the 16 bytes that strides are multiples of."""
        return -(-self.sizes[0] * self.element_bytes // 16) * 16

    @property
    def tensor_bytes(self) -> int:
        """Of the whole tensor."""
        return self.row_bytes * int(np.prod(self.sizes[1 : self.rank], dtype=np.int64))

    @property
    def counts(self) -> tuple[int, ...]:
        """Elements of the box that are copied, by dimension."""
        if self.pixels:
            return self.box[0], self.pixels
        rest = (-(-b // s) for b, s in zip(self.box[1 : self.rank], self.steps[1:], strict=False))
        return (self.box[0], *rest)

    @property
    def box_bytes(self) -> int:
        """Of shared memory."""
        return self.element_bytes * int(np.prod(self.counts, dtype=np.int64))

    @property
    def share(self) -> float:
        """About how much of the box lies inside of the tensor."""
        found = 1.0
        for d in range(self.rank):
            count, step, first = 1, self.steps[d], self.at[d]
            if not self.pixels or d == 0:
                count = self.counts[d]
            elif d < self.rank - 1:
                first, last = self.lower[d - 1], self.sizes[d] - 1 + self.upper[d - 1]
                count = (last - first) // step + 1
                first += (*self.offsets, 0)[d - 1]
            place = first + step * np.arange(count)
            found *= float(((place >= 0) & (place < self.sizes[d])).mean())
        return found

    def words(self) -> Words:
        """As the kernels read it."""
        found: list[int] = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            found += value if isinstance(value, tuple) else (value,)
        assert len(found) == PARAMETERS
        return np.array(found, np.int32).view(np.uint32)


def read_geometry(words: Words) -> Geometry:
    """The inverse of `Geometry.words`."""
    values = words[:PARAMETERS].view(np.int32).tolist()
    lengths = {"sizes": 5, "box": 5, "steps": 5, "at": 5, "lower": 3, "upper": 3, "offsets": 2}
    found = {}
    for field in dataclasses.fields(Geometry):
        count = lengths.get(field.name, 1)
        part, values = values[:count], values[count:]
        found[field.name] = tuple(part) if field.name in lengths else part[0]
    return Geometry(**found)


def _padded(values: list[int], filler: int, count: int = 5) -> tuple[int, ...]:
    return (*values, *[filler] * (count - len(values)))


def _row(rng: np.random.Generator, element: int) -> tuple[int, int, int]:
    """Element bytes, any where 0 are given, elements of the box's row, swizzle."""
    element = element or int(rng.choice([1, 2, 4]))
    swizzle = int(rng.choice([0, 32, 64, 128, 128]))
    row = swizzle or 16 * int(rng.integers(1, 17))
    return element, row // element, swizzle


def _width(rng: np.random.Generator, row: int) -> int:
    """A size of dimension 0, mostly one that fills a good part of a row."""
    return int(rng.integers(1, 2 * row) if rng.random() < 0.2 else rng.integers(row // 2, 2 * row))


def _worth(rng: np.random.Generator, geometry: Geometry, most: int) -> bool:
    """Whether it fits, and mostly: whether there is much to be seen."""
    if geometry.tensor_bytes > 4 * TENSOR or geometry.box_bytes > most:
        return False
    return geometry.share > 0.25 or rng.random() < 0.02


def _start(rng: np.random.Generator, size: int, before: int) -> int:
    """Mostly inside of a dimension; up to `before` ahead of it; now and then far away."""
    if rng.random() < 0.03:
        return int(rng.integers(-3 * size, 3 * size + 1))
    return int(rng.integers(-before, max(size - 1, 1)))


def tiled(
    rng: np.random.Generator, rank: int, most: int, stepped: bool, element_bytes: int = 0
) -> Geometry:
    """A box of a tensor of up to 8 KB that may hang over on every side.

    Args:
        rng: of everything.
        rank: 1 to 5.
        most: bytes of the box.
        stepped: with element strides other than 1.
        element_bytes: 1, 2 or 4; 0 for any of them.
    """
    while True:
        element, row, swizzle = _row(rng, element_bytes)
        sizes = [_width(rng, row), *rng.integers(2, 9, rank - 1).tolist()]
        steps = [1, *(rng.integers(1, 4, rank - 1) if stepped else np.ones(rank - 1, int)).tolist()]
        box = [row, *(int(rng.integers(1, 5 * s)) for s in steps[1:])]
        at = [_start(rng, sizes[0], row // 2), *(_start(rng, n, 2) for n in sizes[1:])]
        found = Geometry(
            rank,
            element,
            _padded(sizes, 1),
            _padded(box, 1),
            _padded(steps, 1),
            _padded(at, 0),
            swizzle,
        )
        if _worth(rng, found, most):
            return found


def im2col(
    rng: np.random.Generator, rank: int, most: int, stored: bool = False, element_bytes: int = 0
) -> Geometry:
    """A column of pixels of a tensor of up to 8 KB: any corners, strides, offsets and start.

    Args:
        rng: of everything.
        rank: 3 to 5.
        most: bytes of the column.
        stored: with no offsets, and no strides other than 1.
        element_bytes: 1, 2 or 4; 0 for any of them.
    """
    spatial = rank - 2
    while True:
        element, row, swizzle = _row(rng, element_bytes)
        space = rng.integers(1, 9, spatial)
        lower, upper = rng.integers(-2, 2, spatial), rng.integers(-2, 2, spatial)
        steps = rng.integers(1, 2 if stored else 4, spatial)
        reach = (space - 1 + upper - lower) // steps  # the last position of each walk
        if (space + upper - lower < 1).any():
            continue
        images = int(rng.integers(1, 4))
        start = lower + steps * rng.integers(0, reach + 1)
        sizes = [_width(rng, row), *space.tolist(), images]
        at = [_start(rng, row, 4), *start.tolist(), _start(rng, images, 1)]
        if stored and rng.random() < 0.5:  # from the tensor's first element on
            at = [0, *lower.tolist(), 0]
        found = Geometry(
            rank,
            element,
            _padded(sizes, 1),
            _padded([row], 1),
            _padded([1, *steps.tolist(), 1], 1),
            _padded(at, 0),
            swizzle,
            int(rng.integers(1, 64)),
            _padded(lower.tolist(), 0, 3),
            _padded(upper.tolist(), 0, 3),
            _padded(rng.integers(0, 1 if stored else 4, min(spatial, 2)).tolist(), 0, 2),
        )
        if _worth(rng, found, most):
            return found


def _with_tensors(rng: np.random.Generator, geometries: list[Geometry]) -> Words:
    parameters = np.stack([geometry.words() for geometry in geometries])
    tensors = rng.integers(0, 1 << 32, (len(geometries), TENSOR), dtype=np.uint32)
    return np.concatenate([parameters, tensors], axis=1)


def _with_floats(rng: np.random.Generator, geometries: list[Geometry]) -> Words:
    """Tensors of float32: any number, ties between two of TF32 among them, infinities, NaN."""
    found = _with_tensors(rng, geometries)
    words = found[:, PARAMETERS:]
    tied = rng.random(words.shape) < 0.1
    words[tied] = words[tied] & ~np.uint32(0x1FFF) | np.uint32(0x1000)
    beyond = words >> 23 & 255 == 255  # of NaN the usual one alone
    words[beyond] &= np.uint32(0xFFC00000)
    return found


def mbarriers(rng: np.random.Generator, cases: int) -> Words:
    """Arrivals of each lane, their sum, bytes."""
    arrivals = rng.integers(1, 5, (cases, 32), dtype=np.uint32)
    bytes_ = rng.integers(1, 1 << 12, (cases, 1), dtype=np.uint32)
    sums = arrivals.sum(1, dtype=np.uint32)[:, None]
    return np.concatenate([arrivals, sums, bytes_, np.zeros((cases, 2), np.uint32)], axis=1)


def bulk_copies(rng: np.random.Generator, cases: int) -> Words:
    """Words, and in units of 16 bytes where the copy begins, where it goes, how long it is."""
    data = rng.integers(0, 1 << 32, (cases, 512), dtype=np.uint32)
    length = rng.integers(1, 65, (cases, 1))
    ends = rng.integers(0, 129 - length, (cases, 2))
    units = np.concatenate([ends, length, np.zeros((cases, 1), int)], axis=1)
    return np.concatenate([data, units.astype(np.uint32)], axis=1)


def exchanges(rng: np.random.Generator, cases: int, words: int) -> Words:
    """Four blocks of 32 lanes: values of `words` words, where each goes, which one each reads."""
    lanes = 128
    values = rng.integers(0, 1 << 32, (cases, lanes * words), dtype=np.uint32)
    to = np.argsort(rng.random((cases, lanes)), axis=1)
    found = rng.integers(0, lanes, (cases, lanes))
    return np.concatenate([values, to, found], axis=1).astype(np.uint32)


def handed(rng: np.random.Generator, cases: int) -> Words:
    """Words of two blocks' lanes, and whose word of the other block each reads."""
    words = rng.integers(0, 1 << 32, (cases, 64), np.uint32)
    return np.concatenate([words, rng.integers(0, 32, (cases, 64), np.uint32)], axis=1)


def copies(rng: np.random.Generator, cases: int) -> dict[str, Words]:
    """Inputs of every kernel of csrc/driver/conformance_{tma,cluster}.cu, by its name.

    Args:
        rng: of everything.
        cases: of each kernel.
    """
    whole, half = 4 * BOX, 2 * BOX
    fresh, floats = rng.spawn(2)

    def ranks(first: int) -> list[int]:
        return [first + i % (6 - first) for i in range(cases)]

    return {
        "tma_load": _with_tensors(rng, [tiled(rng, rank, whole, True) for rank in ranks(1)]),
        "tma_load_im2col": _with_tensors(rng, [im2col(rng, rank, whole) for rank in ranks(3)]),
        "tma_load_tf32": _with_floats(
            floats, [tiled(floats, rank, whole, True, 4) for rank in ranks(1)]
        ),
        "tma_load_im2col_tf32": _with_floats(
            floats, [im2col(floats, rank, whole, element_bytes=4) for rank in ranks(3)]
        ),
        "tma_store": _with_tensors(rng, [tiled(rng, rank, whole, False) for rank in ranks(1)]),
        "tma_store_im2col": _with_tensors(
            rng, [im2col(fresh, rank, whole, True) for rank in ranks(3)]
        ),
        "tma_load_multicast": _with_tensors(rng, [tiled(rng, 4, half, True) for _ in range(cases)]),
        "tma_load_im2col_multicast": _with_tensors(
            rng, [im2col(rng, 4, half) for _ in range(cases)]
        ),
        "bulk_copy": bulk_copies(rng, cases),
        "mbarrier": mbarriers(rng, cases),
        **{f"shared_cluster_{4 * words}": exchanges(fresh, cases, words) for words in (1, 2, 4)},
        "mbarrier_cluster": handed(fresh, cases),
    }
