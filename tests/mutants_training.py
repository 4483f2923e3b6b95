"""Trials of training's passes for the faults of `mutants`: every way of walking and of summing."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import emulated
import emulated_finalize
import emulated_training
import mutants
import torch
from emulated import Schedule
from emulated_shapes import lay_out
from torch import Tensor

from resnet_fused import numerics
from resnet_fused.ops._library import overload

SHAPES = {"nhwc": (3, 24, 12, 16), "nchw": (2, 3, 30, 40), "sliced": (3, 5, 20, 16)}
"""More than two blocks of each group: 16 bytes of channels, one channel, three loops of pixels."""
WIDE = (2, 264, 5, 8)
"""Two groups of channels, the last of which is not full."""
SCHEDULES = (Schedule("eager", "forward"), Schedule("lazy", "reverse", seed=1))
LUCKY = tuple(Schedule("eager", "shuffled", seed=seed) for seed in range(6))
"""Who arrives last is a matter of luck."""


def _integers(shape: tuple[int, ...], most: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + most)
    return torch.randint(-most, most + 1, shape, generator=generator).float()


def _norm(channels: int, most: int) -> Tensor:
    """Scales that are powers of two, integers else: sums of a few hundred products are exact."""
    return torch.stack((2.0 ** _integers((channels,), 1), *_integers((3, channels), most)))


def operands(op: str, layout: str, dtype: torch.dtype, *, plain: bool = False) -> dict[str, Any]:
    """Arguments of an op by name, on integers, in the order of its schema.

    Args:
        op: a key of `emulated_training.OPERANDS`.
        layout: a key of `SHAPES`, or "wide".
        dtype: of the activations.
        plain: without what may be left out.
    """
    shape = WIDE if layout == "wide" else SHAPES[layout]
    form = "nhwc" if layout == "wide" else layout

    def values(most: int) -> Tensor:
        return lay_out(_integers(shape, most).to(dtype), form)

    channels = shape[1]
    norm, other = _norm(channels, 2), _norm(channels, 1)
    if "pool" in op:
        kernel, stride, padding = ([2, 3], [1, 2], [1, 1]) if plain else ([3, 3], [2, 2], [1, 1])
        window = {"kernel": kernel, "stride": stride, "padding": padding}
        if op == "bn_act_pool":
            return {"y": values(3), "norm": norm, **window}
        out, taps = numerics.bn_act_pool_oracle(values(3), norm, kernel, stride, padding)
        dout = lay_out(_integers(tuple(out.shape), 2).to(dtype), form)
        return {
            "dout": dout,
            "taps": lay_out(taps, "nchw" if form == "nchw" else "nhwc"),
            "y": values(3),
            "norm": norm,
            **window,
        }
    if op == "bn_backward_apply":
        return {"dz": values(3), "y": values(2), "coefficients": norm[:3].clone()}
    if op == "bn_add_act":
        residual = (None, None) if plain else (values(2), other)
        return {
            "y": values(3), "norm": norm, "residual": residual[0], "residual_norm": residual[1],
            "offset": 0, "act": "relu",
        }  # fmt: skip
    result = None if plain else values(4)
    residual = (None, None) if plain else (values(2), other)
    return {
        "dout": values(3), "out": result, "y": values(1), "norm": norm, "residual": residual[0],
        "residual_norm": residual[1], "act": "relu",
    }  # fmt: skip


def part(dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of bn_add_act with a shortcut in some of the channels."""
    given = operands("bn_add_act", "nhwc", dtype)
    residual = lay_out(_integers((3, 8, 12, 16), 2).to(dtype), "nhwc")
    return given | {"residual": residual, "residual_norm": None, "offset": 8}


def expected(op: str, given: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Every bit of an op's results."""
    if op == "bn_add_act":
        return (numerics.bn_add_act_oracle(*given.values()).to(dtype),)
    if op == "bn_backward_apply":
        return (numerics.bn_backward_apply_oracle(*given.values()).to(dtype),)
    if op == "bn_act_pool":
        out, taps = numerics.bn_act_pool_oracle(*given.values())
        return out.to(dtype), taps
    if op == "bn_act_pool_backward":
        dh, _ = numerics.bn_act_pool_backward_oracle(*given.values())
        dz = dh.to(dtype)
        return dz, numerics.reductions_oracle(dz, (given["y"], given["norm"])).float()
    norm, out = given["norm"], given["out"]
    result = numerics.normalised(given["y"], norm) if out is None else out
    dz = torch.where(result <= 0, 0, given["dout"])
    branches = [(given["y"], norm)]
    if given["residual"] is not None:
        branches.append((given["residual"], given["residual_norm"]))
    return dz, numerics.reductions_oracle(dz, *branches).float()


def _wrong(op: str, given: dict[str, Any], dtype: torch.dtype) -> Callable[[Any], str | None]:
    wanted = expected(op, given, dtype)

    def wrong(got: Any) -> str | None:
        results = got if isinstance(got, tuple) else (got,)
        alike = [torch.equal(a, b) for a, b in zip(results, wanted, strict=True)]
        return None if all(alike) else "the bits are wrong"

    return wrong


def trials(op: str) -> Iterator[mutants.Trial]:
    """Every way of reading and writing, and of meeting where an op sums."""
    dtypes = {"nhwc": torch.bfloat16, "nchw": torch.float16, "sliced": torch.float32}
    ways = [*itertools.product(SHAPES, (False, True)), ("wide", False)]
    for layout, plain in ways:
        if op == "bn_backward_apply" and plain:
            continue
        dtype = dtypes.get(layout, torch.float16)
        given = operands(op, layout, dtype, plain=plain)
        yield from _trials(op, f"{layout} plain={plain}", given, dtype)
    if op == "bn_add_act":
        yield from _trials(op, "part", part(torch.bfloat16), torch.bfloat16)


def _trials(
    op: str, name: str, given: dict[str, Any], dtype: torch.dtype
) -> Iterator[mutants.Trial]:
    inputs = tuple(t for t in given.values() if isinstance(t, Tensor))
    wrong = _wrong(op, given, dtype)
    summed = op in emulated_training.SUMMED
    for schedule in (*SCHEDULES, *LUCKY) if summed else SCHEDULES[:1]:
        yield mutants.Trial(
            f"{op} {name} {schedule}",
            lambda: overload(op, emulated.NAME)(*given.values()),
            inputs,
            wrong,
            {"schedule": schedule, "resident_blocks": 64 if summed else 1},
        )


TOTAL = torch.tensor([9.0], dtype=torch.float64)


def _vectors(op: str, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of an op on per-channel values, whose results are exact; more than two blocks."""
    channels = 300
    stats, gamma, beta = _integers((2, channels), 3), _integers((channels,), 2), _norm(channels, 1)
    stats[1] = 8 * (4.0 ** (torch.arange(channels) % 3) - 1)
    vectors = {"stats": stats.to(dtype), "total": TOTAL - 1}
    if op == "bn_finalize":
        given = {"gamma": gamma.to(dtype), "beta": beta[1].double(), "count": 3, "eps": 1.0}
        return vectors | given
    if op == "bn_update_stats":
        running = {"running_mean": beta[1].to(dtype), "running_var": beta[2].double()}
        counted = {"num_batches_tracked": torch.tensor(3), "count": 3, "momentum": None}
        return vectors | {"total": TOTAL.clone()} | running | counted
    sums, everywhere = _integers((3, channels), 3), _integers((3, channels), 2)
    return {
        "sums": sums.to(dtype), "all_sums": everywhere.to(dtype), "total": TOTAL - 1,
        "norm": _norm(channels, 1).to(dtype), "count": 3, "row": 2, "frozen": False,
    }  # fmt: skip


def vector_trials(op: str) -> Iterator[mutants.Trial]:
    """On integers: what the reference gives, bit for bit."""
    for dtype in (torch.float32, torch.float64):
        given = _vectors(op, dtype)
        inputs = tuple(t for t in given.values() if isinstance(t, Tensor))
        if op != "bn_update_stats":

            def call(given: dict[str, Any] = given, name: str = emulated.NAME) -> Any:
                return overload(op, name)(*given.values())
        else:

            def call(given: dict[str, Any] = given, name: str = emulated.NAME) -> Any:
                copies = [t.clone() if isinstance(t, Tensor) else t for t in given.values()]
                overload(op, name)(*copies)
                return tuple(copies[2:5])

        wanted = call(name="reference")

        def wrong(got: Any, wanted: Any = wanted) -> str | None:
            pairs = zip(*(t if isinstance(t, tuple) else (t,) for t in (got, wanted)), strict=True)
            return None if all(torch.equal(a, b) for a, b in pairs) else "the bits are wrong"

        yield mutants.Trial(f"{op} {dtype}", call, inputs, wrong, {"schedule": SCHEDULES[0]})


mutants.TRIALS.update((op, functools.partial(vector_trials, op)) for op in emulated_finalize.BODIES)
mutants.TRIALS.update((op, functools.partial(trials, op)) for op in emulated_training.OPERANDS)
