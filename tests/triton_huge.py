"""Kernels on tensors of more than 2^31 elements, over memory that is reserved and never filled.

Of each kernel the last program runs: it has the largest offsets. What it reads is filled, all else
is zero, and what it writes must be right, bit for bit. Memory around is unmapped so far that an
offset which wrapped in 32 bits is a fault.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from guarded_memory import unreserved
from matrix import geometry_args
from torch import Tensor
from triton_trace import Programs, last_program

from resnet_fused import cases, numerics
from resnet_fused.triton import _tiles

HALF = torch.float16
TILE = _tiles.BY_NAME["128x64_4w4s"]
STEP = 64  # elements of 16 bits in one step of a reduction
MANY, MORE = 32784, 65556
"""Channels whose product is beyond 2^31; the last tile of 64 has 16 and 20 of them."""
IMAGES = 70001  # beyond 65,535 as well

CASES = {
    "x": cases.ConvCase("x", IMAGES, 64, 22, 22, 8, 2, 2, (11, 11)),
    "out": cases.ConvCase("out", IMAGES, 8, 22, 22, 64, residual=True),
    # In two parts, merged into a huge result.
    "merged": cases.ConvCase("merged", IMAGES, 128, 22, 22, 64, residual=True),
    # The last of four phases of the stride.
    "dx": cases.ConvCase("dx", IMAGES, 64, 22, 22, 8, 2, 2, (2, 2)),
    "dy": cases.ConvCase("dy", IMAGES, 8, 22, 22, 64, 3, 3, padding=(1, 1)),
}


def plan(splits: int = 1) -> _tiles.Plan:
    return _tiles.Plan(TILE, splits, False, "for the test")


def integers(*shape: int) -> Tensor:
    return torch.randint(-4, 5, shape).half()


def powers(size: int) -> Tensor:
    """A scale that keeps sums of integers exact."""
    return torch.ldexp(torch.ones(size), torch.randint(-3, 2, (size,)))


def parts(length: int) -> tuple[int, int]:
    """Into how many parts a long reduction is cut, and where the last one begins."""
    steps = _tiles.cdiv(length, STEP)
    each = _tiles.cdiv(steps, _tiles.MAX_SPLITS)
    splits = _tiles.cdiv(steps, each)
    return splits, (splits - 1) * each * STEP


def filled(shape: Sequence[int], last: Tensor) -> Tensor:
    """Huge and zero but for the last image."""
    t = unreserved(shape)
    t[-1] = last[0]
    return t


def _narrow(arguments: dict[str, Any]) -> None:
    assert arguments["WIDE"]
    arguments["WIDE"] = False


def _leave(_: dict[str, Any]) -> None:
    pass


@contextmanager
def last_programs(module: Any, narrow: str, notes: dict[str, Any] | None = None) -> Iterator[None]:
    """The last program of each launch, with a workspace that takes no memory.

    Args:
        module: of the op.
        narrow: name of the kernel that computes offsets in 32 bits all the same; "-" for none.
        notes: gets each launch's arguments.
    """

    def programs(kernel: Any, _: Tensor) -> Programs:
        change = _narrow if kernel.fn.__name__ == narrow else _leave

        def look(arguments: dict[str, Any]) -> None:
            change(arguments)
            if notes is not None:
                notes.update(arguments)

        return Programs(kernel, last_program, look)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "traceable", programs)
        patch.setattr(torch, "empty", _workspace)
        yield


def _workspace(*shape: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    return unreserved(shape[0] if isinstance(shape[0], Sequence) else shape, dtype, "nchw")


def check(got: Tensor, expected: Tensor) -> None:
    assert torch.equal(got, expected.to(got.dtype)), (got, expected)
    assert got.count_nonzero()


def last_pixels(image: Tensor, count: int) -> Tensor:
    """[1, C, H, W] -> [count, C]."""
    return image[0].permute(1, 2, 0).reshape(-1, image.shape[1])[-count:]


def huge(op: str, which: str, narrow: str) -> None:
    """The last programs of a call with one or more huge tensors.

    Args:
        op: the op.
        which: of the operands is huge.
        narrow: see `last_programs`.
    """
    _HUGE[op, which](op, which, narrow)


def _conv_bn_act(_: str, which: str, narrow: str) -> None:
    from resnet_fused.triton import conv_bn_act

    case = CASES[which]
    splits = 2 if which == "merged" else 1
    small = numerics.exact_inputs(dataclasses.replace(case, n=1), HALF)
    small.x[:, : case.c - case.c // splits] = 0  # but for the last part of the reduction
    x, out = filled(case.input_shape, small.x), unreserved(case.output_shape)
    residual = None if small.residual is None else filled(case.output_shape, small.residual)
    assert max(x.numel(), out.numel()) > 2**31
    weight = small.weight.contiguous(memory_format=torch.channels_last)
    with last_programs(conv_bn_act, narrow):
        conv_bn_act.launch(
            x, weight, small.scale, small.shift, residual, out, *geometry_args(case),
            plan=plan(splits),
        )  # fmt: skip
    oracle = numerics.conv_bn_act_oracle(*small, stride=case.stride)
    # Both the last tile and the merge's, which is smaller, hold these; their images are the last.
    pixels = min(
        case.p * case.q, (case.n * case.p * case.q - 1) % (16 if splits > 1 else TILE.m) + 1
    )
    check(last_pixels(out[-1:], pixels), last_pixels(oracle, pixels))


def _weights_forward(_: str, which: str, narrow: str) -> None:
    from resnet_fused.triton import conv_bn_act

    splits, first = parts(MANY)
    weight = unreserved((MORE, MANY, 1, 1))
    weight[-20:, first:] = integers(20, MANY - first, 1, 1)
    x = torch.zeros(1, MANY, 1, 1, dtype=HALF)
    x[:, first:] = integers(1, MANY - first, 1, 1)
    scale, shift = powers(MORE), integers(MORE).float()
    out = torch.zeros(1, MORE, 1, 1, dtype=HALF)
    with last_programs(conv_bn_act, narrow):
        conv_bn_act.launch(
            x, weight, scale, shift, None, out, (1, 1), (0, 0), (1, 1), 1, "none",
            plan=plan(splits),
        )  # fmt: skip
    sums = weight[-20:, first:, 0, 0].double() @ x[0, first:, 0, 0].double()
    check(out[0, -20:, 0, 0], scale[-20:] * sums + shift[-20:])


def _dgrad(_: str, which: str, narrow: str) -> None:
    from resnet_fused.triton import conv_dgrad

    case = CASES[which]
    one = dataclasses.replace(case, n=1)
    _, weight, scale, _, _ = numerics.exact_inputs(one, HALF)
    dy, y = integers(*one.output_shape), integers(*one.output_shape)
    dx = unreserved(case.input_shape)
    operands = filled(case.output_shape, dy), filled(case.output_shape, y)
    assert max(dx.numel(), operands[0].numel()) > 2**31
    weight = weight.contiguous(memory_format=torch.channels_last)
    with last_programs(conv_dgrad, narrow):
        conv_dgrad.launch(*operands, weight, scale, dx, *geometry_args(case)[:-1], plan=plan())
    oracle, _ = numerics.conv_gradients_oracle(
        dy, y, torch.zeros(one.input_shape), weight, scale, **case.geometry
    )
    # Pixels of the last phase.
    got, expected = (
        t[:, :, case.stride[0] - 1 :: case.stride[0], case.stride[1] - 1 :: case.stride[1]]
        for t in (dx[-1:], oracle)
    )
    image = got.shape[2] * got.shape[3]
    pixels = min(image, (case.n * image - 1) % TILE.m + 1)
    check(last_pixels(got, pixels), last_pixels(expected, pixels))


def _weights_dgrad(_: str, which: str, narrow: str) -> None:
    from resnet_fused.triton import conv_dgrad

    splits, first = parts(MORE)
    weight = unreserved((MORE, MANY, 1, 1))
    weight[first:, -16:] = integers(MORE - first, 16, 1, 1)
    dy = torch.zeros(1, MORE, 1, 1, dtype=HALF)
    dy[:, first:] = integers(1, MORE - first, 1, 1)
    scale, dx = powers(MORE), torch.zeros(1, MANY, 1, 1, dtype=HALF)
    with last_programs(conv_dgrad, narrow):
        conv_dgrad.launch(dy, None, weight, scale, dx, (1, 1), (0, 0), (1, 1), 1, plan=plan(splits))
    scaled = (scale.double() * dy[0, :, 0, 0])[first:]
    check(dx[0, -16:, 0, 0], scaled @ weight[first:, -16:, 0, 0].double())


def _wgrad(_: str, which: str, narrow: str) -> None:
    """1x1 images; dy and y or x huge by many channels, or dweight by those of both."""
    from resnet_fused.triton import conv_wgrad

    n, k, c = {"dy": (IMAGES, MANY, 8), "x": (IMAGES, 8, MANY), "dweight": (3, MORE, MANY)}[which]
    splits, first = parts(n)
    rows, columns = min(k, (k - 1) % TILE.m + 1), min(c, (c - 1) % TILE.n + 1)
    if splits > 1:
        rows = 1  # the merge's last program has no more
    dy, y, x = (unreserved((n, channels, 1, 1)) for channels in (k, k, c))
    dweight = unreserved((k, c, 1, 1))
    for t, channels in ((dy, rows), (y, rows), (x, columns)):
        t[first:, -channels:] = integers(n - first, channels, 1, 1)
    assert max(t.numel() for t in (dy, x, dweight)) > 2**31
    scale = powers(k)
    with last_programs(conv_wgrad, narrow):
        conv_wgrad.launch(dy, y, x, scale, dweight, (1, 1), (0, 0), (1, 1), 1, plan=plan(splits))
    passed = torch.where(y[first:, -rows:, 0, 0] <= 0, 0, dy[first:, -rows:, 0, 0]).double()
    sums = passed.T @ x[first:, -columns:, 0, 0].double()
    check(dweight[-rows:, -columns:, 0, 0], scale[-rows:, None] * sums)


def _bn_act(_: str, which: str, narrow: str) -> None:
    from resnet_fused.triton import bn_act

    shape = (IMAGES, 64, 22, 22)
    layout = "nhwc" if which == "nhwc" else "nchw"
    if which == "sliced":
        x = unreserved((*shape[:3], 2 * shape[3]), HALF, layout)[..., ::2]
    else:
        x = unreserved(shape, HALF, layout)
    residual, out = (unreserved(shape, HALF, layout) for _ in range(2))
    x[-1], residual[-1] = integers(*shape[1:]), integers(*shape[1:])
    scale, shift = powers(shape[1]), integers(shape[1]).float()
    notes: dict[str, Any] = {}
    with last_programs(bn_act, narrow, notes):
        bn_act.launch(x, scale, shift, residual, out, "relu")
    expected = numerics.bn_act_oracle(x[-1:], scale, shift, residual[-1:], "relu")
    # By channel a row of the tile is a pixel, else a plane.
    form = (0, 2, 3, 1) if notes["BY_CHANNEL"] else (0, 1, 2, 3)
    flat = 3 if notes["BY_CHANNEL"] else 2
    rows = (notes["rows"] - 1) % notes["BLOCK_M"] + 1
    got, expected = (t.permute(form).flatten(0, flat - 1)[-rows:] for t in (out[-1:], expected))
    check(got, expected)


_HUGE: dict[tuple[str, str], Callable[[str, str, str], None]] = {
    ("conv_bn_act", "x"): _conv_bn_act,
    ("conv_bn_act", "out"): _conv_bn_act,
    ("conv_bn_act", "merged"): _conv_bn_act,
    ("conv_bn_act", "weight"): _weights_forward,
    ("conv_dgrad", "dx"): _dgrad,
    ("conv_dgrad", "dy"): _dgrad,
    ("conv_dgrad", "weight"): _weights_dgrad,
    ("conv_wgrad", "dy"): _wgrad,
    ("conv_wgrad", "x"): _wgrad,
    ("conv_wgrad", "dweight"): _wgrad,
    ("bn_act", "nhwc"): _bn_act,
    ("bn_act", "nchw"): _bn_act,
    ("bn_act", "sliced"): _bn_act,
}

PARTS = 3
RESULT = (2**20 + 7, 1040)
"""A result with fewer than 2^31 elements, of which two parts' sums are more."""


def sums(op: str, narrow: str) -> None:
    """A call whose tensors' offsets fit into 32 bits, and those of its partial sums do not.

    Args:
        op: the op.
        narrow: name of the kernel whose 64-bit types become 32-bit ones; "-" for none.
    """
    with pytest.MonkeyPatch.context() as patch:
        lines = inspect.getsourcelines

        def planted(fn: Any) -> tuple[list[str], int]:
            found, first = lines(fn)
            if getattr(fn, "__name__", "") == narrow:
                assert any("tl.int64" in line for line in found)
                found = [line.replace("tl.int64", "tl.int32") for line in found]
            return found, first

        patch.setattr(inspect, "getsourcelines", planted)
        _SUMS[op]()


def _sums_forward() -> None:
    from resnet_fused.triton import conv_bn_act

    (n, k), c = RESULT, PARTS * STEP
    x, out = unreserved((n, c, 1, 1)), unreserved((n, k, 1, 1))
    weight = integers(k, c, 1, 1)
    x[-7:, -STEP:] = integers(7, STEP, 1, 1)
    scale, shift = powers(k), integers(k).float()
    with last_programs(conv_bn_act, "-"):
        conv_bn_act.launch(
            x, weight, scale, shift, None, out, (1, 1), (0, 0), (1, 1), 1, "none",
            plan=plan(PARTS),
        )  # fmt: skip
    result = x[-7:, :, 0, 0].double() @ weight[-16:, :, 0, 0].double().T
    check(out[-7:, -16:, 0, 0], result * scale[-16:] + shift[-16:])


def _sums_dgrad() -> None:
    from resnet_fused.triton import conv_dgrad

    (n, c), k = RESULT, PARTS * STEP
    dy, dx = unreserved((n, k, 1, 1)), unreserved((n, c, 1, 1))
    weight, scale = integers(k, c, 1, 1), powers(k)
    dy[-7:, -STEP:] = integers(7, STEP, 1, 1)
    with last_programs(conv_dgrad, "-"):
        conv_dgrad.launch(dy, None, weight, scale, dx, (1, 1), (0, 0), (1, 1), 1, plan=plan(PARTS))
    check(
        dx[-7:, -16:, 0, 0],
        (scale * dy[-7:, :, 0, 0].double()) @ weight[:, -16:, 0, 0].double(),
    )


def _sums_wgrad() -> None:
    from resnet_fused.triton import conv_wgrad

    (k, c), n = RESULT, PARTS * STEP
    k, c = k // 32 + 8, 32 * c + 16
    dy, x = unreserved((n, k, 1, 1)), unreserved((n, c, 1, 1))
    dweight, scale = unreserved((k, c, 1, 1)), powers(k)
    rows, columns = slice(-1, None), slice(-(c % STEP), None)
    dy[-STEP:, rows] = integers(STEP, 1, 1, 1)
    x[-STEP:, columns] = integers(STEP, c % STEP, 1, 1)
    with last_programs(conv_wgrad, "-"):
        conv_wgrad.launch(dy, None, x, scale, dweight, (1, 1), (0, 0), (1, 1), 1, plan=plan(PARTS))
    result = dy[:, rows, 0, 0].double().T @ x[:, columns, 0, 0].double()
    check(dweight[rows, columns, 0, 0], scale[rows, None] * result)


_SUMS = {
    "conv_bn_act": _sums_forward,
    "conv_dgrad": _sums_dgrad,
    "conv_wgrad": _sums_wgrad,
}
