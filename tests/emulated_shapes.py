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


@dataclasses.dataclass(frozen=True)
class Draw:
    """One call of conv_bn_act: what runs, on what, and how.

    Attributes:
        number: which draw it is.
        case: sizes and options.
        dtype: of activations and weights.
        layouts: of x, weight and residual.
        exact: integers, held to every bit; else noise, held to the bound.
        configuration: index in the kernel's table.
        splits: of the reduction; 0 leaves them to the chooser.
        schedule: of the emulator.
    """

    number: int
    case: cases.ConvCase
    dtype: torch.dtype
    layouts: tuple[str, str, str]
    exact: bool
    configuration: int
    splits: int
    schedule: Schedule


@functools.cache
def pairs() -> tuple[tuple[int, Schedule], ...]:
    """Every configuration of conv_bn_act with every schedule, in a fixed mixed order."""
    count = len(emulated.load().conv_bn_act_configurations())
    made = list(itertools.product(range(count), SCHEDULES))
    random.Random(0).shuffle(made)
    return tuple(made)


def _output(size: int, taps: int, stride: int, padding: int, dilation: int) -> int:
    return (size + 2 * padding - dilation * (taps - 1) - 1) // stride + 1


def _case(rng: random.Random, step: int) -> cases.ConvCase:
    """Sizes with channels in multiples of `step`; small, but beyond a tile now and then."""
    while True:
        groups = rng.choice((1, 1, 1, 2, 3))
        case = cases.ConvCase(
            "random",
            rng.randint(1, 3),
            groups * step * rng.randint(1, 40 // step if step > 1 else 20),
            rng.randint(1, 12),
            rng.randint(1, 12),
            groups * rng.choice((rng.randint(1, 24), rng.randint(25, 140))),
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
    """The call of that number; consecutive numbers go through `pairs`."""
    rng = random.Random(number)
    configuration, schedule = pairs()[number % len(pairs())]
    tile = emulated.load().conv_bn_act_configurations()[configuration]
    dtypes = [d for d in emulated.DTYPES["conv_bn_act"] if d != torch.float32 or tile["float32"]]
    dtype = rng.choice(dtypes)
    step = 16 // torch.empty((), dtype=dtype).element_size() if tile["wide"] else 1
    read = ("nhwc", "padded") if tile["wide"] else ("nchw", "nhwc", "sliced", "unaligned")
    return Draw(
        number,
        _case(rng, step),
        dtype,
        (rng.choice(read), rng.choice(read), rng.choice(("nchw", "nhwc", "sliced", "expanded"))),
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


def operands(d: Draw) -> numerics.ExactInputs:
    """x, weight, scale, shift, residual."""
    generator = torch.Generator().manual_seed(d.number)
    if d.exact:
        made = numerics.exact_inputs(d.case, d.dtype, generator)
    else:

        def noise(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        made = numerics.ExactInputs(
            noise(*d.case.input_shape).to(d.dtype),
            noise(*d.case.weight_shape).to(d.dtype),
            noise(d.case.k),
            noise(d.case.k),
            noise(*d.case.output_shape).to(d.dtype) if d.case.residual else None,
        )
    tensors = zip((made.x, made.weight, made.residual), d.layouts, strict=True)
    x, weight, residual = (t if t is None else lay_out(t, layout) for t, layout in tensors)
    assert x is not None
    assert weight is not None
    return numerics.ExactInputs(x, weight, made.scale, made.shift, residual)


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
        call = overload("conv_bn_act", emulated.NAME)
        y = call(*operands(d), *geometry_args(d.case))
    assert runs.reports[-1]["plan"]["configuration"] == d.configuration
    return y, runs.reports[-1]


def wrong(d: Draw, y: Tensor) -> str | None:
    """What is wrong with the output, or None: every bit on integers, the bound on noise."""
    inputs = operands(d)
    oracle = numerics.conv_bn_act_oracle(*inputs, **d.case.geometry, act=d.case.act)
    if d.exact:
        bad = (y != oracle.to(d.dtype)).sum().item()
        return f"{bad} of {y.numel()} elements differ" if bad else None
    entry = next(e for e in backends.implementations("conv_bn_act") if e.name == emulated.NAME)
    bound = numerics.conv_bn_act_bound(
        *inputs,
        oracle,
        **d.case.geometry,
        **bound_options(entry, d.dtype),
        accumulation="nearest" if d.schedule.rounding == "nearest" else "truncate",
        k=8 if d.dtype == torch.float32 else 16,
    )
    check = numerics.check_bound(y, oracle, bound)
    return None if check.ok else str(check)
