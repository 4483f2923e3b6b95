"""Random calls of the emulated kernels: shape, layouts, dtype, values, configuration, schedule.

A draw is a pure function of its number, so a failure comes back when the number is run again.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random

import emulated
import torch
from emulated import Schedule
from matrix import bound_options, geometry_args
from torch import Tensor

from resnet_fused import backends, cases, numerics
from resnet_fused.ops._library import overload

ROUNDINGS = ("nearest", "toward_zero")
SCHEDULES = tuple(
    dataclasses.replace(schedule, rounding=rounding)
    for schedule, rounding in itertools.product(emulated.SCHEDULES, ROUNDINGS)
)


OPS = ("conv_bn_act", "conv_dgrad", "conv_wgrad")


@dataclasses.dataclass(frozen=True)
class Draw:
    """One call of a convolution's kernel: what runs, on what, and how.

    Attributes:
        number: which draw it is.
        op: one of `OPS`.
        case: sizes and options.
        dtype: of activations and weights.
        layouts: of x, weight, the output's gradient, and of the residual or y.
        exact: integers, held to every bit; else noise, held to the bound.
        configuration: index in the kernel's table.
        splits: of the reduction; 0 leaves them to the chooser.
        schedule: of the emulator.
    """

    number: int
    op: str
    case: cases.ConvCase
    dtype: torch.dtype
    layouts: tuple[str, str, str, str]
    exact: bool
    configuration: int
    splits: int
    schedule: Schedule


@functools.cache
def tiles(op: str) -> list[dict]:
    """The table of configurations of an op's kernel."""
    return getattr(emulated.load(), f"{op}_configurations")()


@functools.cache
def pairs(op: str) -> tuple[tuple[int, Schedule], ...]:
    """Every configuration of an op's kernel with every schedule, in a fixed mixed order.

    But for those by TMA, which take few of these calls: tests/test_emulated_conv_sm90.py is theirs.
    """
    free = [index for index, tile in enumerate(tiles(op)) if not tile["tma"]]
    made = list(itertools.product(free, SCHEDULES))
    random.Random(0).shuffle(made)
    return tuple(made)


def _case(rng: random.Random, step: int) -> cases.ConvCase:
    """Sizes with channels in multiples of `step`; small, but beyond a tile now and then."""
    while True:
        groups = rng.choice((1, 1, 1, 2, 3))
        k = rng.choice((rng.randint(1, 24), rng.randint(25, 140)))
        case = cases.ConvCase(
            "random",
            rng.randint(1, 3),
            groups * step * rng.randint(1, 40 // step if step > 1 else 20),
            rng.randint(1, 12),
            rng.randint(1, 12),
            groups * (k + -k % step),
            rng.choice((1, 1, 2, 3, 3, 4)),
            rng.choice((1, 1, 2, 3, 3, 4)),
            (rng.randint(1, 3), rng.randint(1, 3)),
            (rng.randint(0, 3), rng.randint(0, 3)),
            (rng.randint(1, 2), rng.randint(1, 2)),
            groups,
            rng.random() < 0.5,
            rng.choice(("relu", "none")),
        )
        if case.p > 0 and case.q > 0 and case.macs < 2_000_000:
            return case


def draw(number: int) -> Draw:
    """The call of that number; consecutive numbers go through the ops and their `pairs`."""
    rng = random.Random(number)
    op = OPS[number % len(OPS)]
    configuration, schedule = pairs(op)[number // len(OPS) % len(pairs(op))]
    tile = tiles(op)[configuration]
    dtype = rng.choice([d for d in emulated.DTYPES[op] if d != torch.float32 or tile["float32"]])
    step = 16 // torch.empty((), dtype=dtype).element_size() if tile["wide"] else 1
    read = ("nhwc", "padded") if tile["wide"] else ("nchw", "nhwc", "sliced", "unaligned")
    # The shortcut is read in the epilogue, which takes any strides; y is an operand.
    last = ("nchw", "nhwc", "sliced", "expanded") if op == "conv_bn_act" else read
    return Draw(
        number,
        op,
        _case(rng, step),
        dtype,
        (rng.choice(read), rng.choice(read), rng.choice(read), rng.choice(last)),
        rng.random() < 0.5,
        configuration,
        rng.choice((0, 1, 2, 3)),
        schedule,
    )


def lay_out(t: Tensor, layout: str) -> Tensor:
    """The same values [N, C, H, W] laid out in memory as the word says."""
    n, c, h, w = t.shape
    if layout == "nchw":
        return t.contiguous()
    if layout == "nhwc":
        # Not .contiguous(): with one channel or pixel it would leave the strides as they are.
        return torch.empty(n, h, w, c, dtype=t.dtype).permute(0, 3, 1, 2).copy_(t)
    if layout == "padded":  # the channels of a wider tensor; pixels stay 16-byte aligned
        room = 16 // t.element_size()
        wide = torch.full((n, h, w, c + 2 * room), float("nan"), dtype=t.dtype)
        return wide[..., room : room + c].permute(0, 3, 1, 2).copy_(t)
    if layout == "sliced":
        wide = torch.full((n, c, h, 2 * w), float("nan"), dtype=t.dtype)
        return wide[..., ::2].copy_(t)
    if layout == "expanded":
        return t[:, :, :1].expand(n, c, h, w)
    assert layout == "unaligned", layout
    flat = torch.empty(t.numel() + 1, dtype=t.dtype)[1:]
    return flat.view(n, h, w, c).permute(0, 3, 1, 2).copy_(t)


def operands(d: Draw) -> tuple[Tensor | None, ...]:
    """What the oracles take: x, weight, scale, shift, residual; or dy, y, x, weight, scale."""
    generator = torch.Generator().manual_seed(d.number)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    case, dtype = d.case, d.dtype
    made = numerics.exact_inputs(case, dtype, generator)
    x, weight, scale, shift, residual = made
    dy, y = (torch.randint(-4, 5, case.output_shape, generator=generator) for _ in range(2))
    if not d.exact:
        x, weight = noise(*case.input_shape), noise(*case.weight_shape)
        scale, shift, dy, y = noise(case.k), noise(case.k), noise(*dy.shape), noise(*dy.shape)
        residual = noise(*dy.shape) if case.residual else None
    x, weight, dy = (
        lay_out(t.to(dtype), layout) for t, layout in zip((x, weight, dy), d.layouts, strict=False)
    )
    if d.op == "conv_bn_act":
        shortcut = None if residual is None else lay_out(residual.to(dtype), d.layouts[3])
        return x, weight, scale, shift, shortcut
    return dy, lay_out(y.to(dtype), d.layouts[3]) if case.act == "relu" else None, x, weight, scale


def call(op: str, case: cases.ConvCase, inputs: tuple[Tensor | None, ...]) -> Tensor:
    """Calls an op's emulated kernel on what `operands` returns."""
    run = overload(op, emulated.NAME)
    geometry = geometry_args(case)
    if op == "conv_bn_act":
        return run(*inputs, *geometry)
    dy, y, x, weight, scale = inputs
    assert x is not None
    if op == "conv_dgrad":
        return run(dy, y, weight, scale, list(x.shape), x.stride(1) == 1, *geometry[:4])
    return run(dy, y, x, weight, scale, *geometry[:4])


def run(d: Draw) -> tuple[Tensor, dict]:
    """The emulated kernel's output and its report.

    Raises:
        AssertionError: another configuration ran.
    """
    with emulated.using(
        schedule=dataclasses.replace(d.schedule, seed=d.number),
        configuration=d.configuration,
        splits=d.splits,
    ) as runs:
        y = call(d.op, d.case, operands(d))
    assert runs.reports[-1]["plan"]["configuration"] == d.configuration
    return y, runs.reports[-1]


def wrong(d: Draw, got: Tensor) -> str | None:
    """What is wrong with the output, or None: every bit on integers, the bound on noise."""
    oracle, bound = expected(
        d.op, d.case, operands(d), "nearest" if d.schedule.rounding == "nearest" else "truncate"
    )
    if d.exact:
        bad = (got != oracle.to(d.dtype)).sum().item()
        return f"{bad} of {got.numel()} elements differ" if bad else None
    check = numerics.check_bound(got, oracle, bound)
    return None if check.ok else str(check)


def expected(
    op: str, case: cases.ConvCase, inputs: tuple[Tensor | None, ...], accumulation: str = "nearest"
) -> tuple[Tensor, Tensor]:
    """The oracle in float64, and how far each element may be from it."""
    first = inputs[0]
    assert first is not None
    entry = next(e for e in backends.implementations(op) if e.name == emulated.NAME)
    options = bound_options(entry, first.dtype) | {
        "accumulation": accumulation,
        "k": 8 if first.dtype == torch.float32 else 16,
    }
    if op == "conv_bn_act":
        oracle = numerics.conv_bn_act_oracle(*inputs, **case.geometry, act=case.act)
        return oracle, numerics.conv_bn_act_bound(*inputs, oracle, **case.geometry, **options)
    oracles = numerics.conv_gradients_oracle(*inputs, **case.geometry)
    bounds = numerics.conv_gradients_bound(*inputs, oracles, **case.geometry, **options)
    index = ("conv_dgrad", "conv_wgrad").index(op)
    return oracles[index], bounds[index]
