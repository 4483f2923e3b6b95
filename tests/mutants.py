"""Faults that the emulator plants in the kernels, and the runs that are to notice them.

The kernels hold no trace of this: a clean run reports each call of an instruction and what could go
wrong there, and a mutant is one such fault. It is noticed when the emulator reports an error, when
guard bands or inputs have changed, or when the numbers are wrong.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import emulated
import torch
from emulated import Schedule
from emulated_shapes import lay_out
from matrix import geometry_args
from torch import Tensor

from resnet_fused import cases, numerics
from resnet_fused.ops._library import overload

ROOT = Path(__file__).resolve().parent.parent


class Mutant(NamedTuple):
    """One fault at one call: end of the file's path, line, instruction, name of the fault."""

    file: str
    line: int
    instruction: str
    fault: str

    @property
    def text(self) -> str:
        """The line of the call: what stays when lines above it come and go."""
        return (ROOT / self.file).read_text().splitlines()[self.line - 1].strip()

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What the table of harmless faults names it by."""
        return Path(self.file).name, self.text, self.instruction, self.fault


@dataclasses.dataclass(frozen=True)
class Trial:
    """A call that may notice faults.

    Attributes:
        name: for messages.
        op: what is called.
        arguments: makes the operands, always the same ones.
        wrong: says what is wrong with an output, or None.
        settings: of `emulated.using`.
    """

    name: str
    op: str
    arguments: Callable[[], tuple[Any, ...]]
    wrong: Callable[[Tensor], str | None]
    settings: dict[str, Any]

    def run(self, **planted: Any) -> dict[str, Any]:
        """Runs it.

        Returns:
            The report.

        Raises:
            Exception: an error of the emulator, a changed guard band or input, wrong numbers.
        """
        arguments = self.arguments()
        before = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
        with emulated.using(**self.settings, **planted) as runs:
            y = overload(self.op, emulated.NAME)(*arguments)
        for now, old in zip(arguments, before, strict=True):
            same = not isinstance(now, Tensor) or torch.equal(now, old)
            assert same, "an input was written"
        reason = self.wrong(y)
        assert reason is None, reason
        return runs.reports[-1]


def _bits(expected: Tensor) -> Callable[[Tensor], str | None]:
    def wrong(y: Tensor) -> str | None:
        return None if torch.equal(y, expected) else "the bits are wrong"

    return wrong


def _bound(oracle: Tensor, bound: Tensor) -> Callable[[Tensor], str | None]:
    def wrong(y: Tensor) -> str | None:
        check = numerics.check_bound(y, oracle, bound)
        return None if check.ok else str(check)

    return wrong


def _noise(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=generator).to(dtype)


def bn_act_trials() -> Iterator[Trial]:
    """Each kernel of bn_act, on integers and on noise."""
    for layout in ("nhwc", "nchw", "sliced"):
        for exact in (True, False):
            generator = torch.Generator().manual_seed(1)
            case = cases.BnActCase("mutants", 3, 24, 5, 8, True)
            dtype = torch.bfloat16 if exact else torch.float16
            x, residual = (_noise(generator, case.shape, dtype) for _ in range(2))
            scale, shift = (_noise(generator, (case.c,), torch.float32) for _ in range(2))
            if exact:
                x, scale, shift, residual = ((2 * t).round() for t in (x, scale, shift, residual))
            inputs = (lay_out(x, layout), scale, shift, lay_out(residual, layout))
            oracle = numerics.bn_act_oracle(*inputs, "relu")
            yield Trial(
                f"bn_act {layout} {'integers' if exact else 'noise'}",
                "bn_act",
                lambda inputs=inputs: (*inputs, "relu"),
                _bits(oracle.to(dtype))
                if exact
                else _bound(oracle, numerics.bn_act_bound(*inputs, oracle)),
                {"schedule": Schedule()},
            )


CONV = cases.ConvCase("mutants", 2, 48, 6, 7, 40, 3, 3, padding=(1, 1), residual=True)
ODD = cases.ConvCase("mutants_odd", 2, 5, 6, 7, 20, 3, 3, padding=(1, 1), residual=True)
# Hazards show under lazy copies and unlike orders; values need one schedule alone.
HOSTILE = (
    Schedule("lazy", "reverse", seed=1),
    Schedule("random", "shuffled", seed=2),
    Schedule("eager", "forward"),
)


def conv_bn_act_trials() -> Iterator[Trial]:
    """Every way of reading, writing and splitting of conv_bn_act."""
    tiles = emulated.load().conv_bn_act_configurations()
    small = {tile["wide"]: i for i, tile in enumerate(tiles) if tile["m"] == 64}
    ways = [
        (CONV, "nhwc", torch.bfloat16, small[True], 1),
        (CONV, "nhwc", torch.bfloat16, small[True], 3),
        (CONV, "nhwc", torch.float32, small[True], 1),
        (ODD, "nchw", torch.bfloat16, small[False], 1),
        (ODD, "nchw", torch.float32, small[False], 1),
        (ODD, "nchw", torch.float32, small[False], 2),
    ]
    for (case, layout, dtype, configuration, splits), exact in (
        (way, exact) for way in ways for exact in (True, False)
    ):
        generator = torch.Generator().manual_seed(1)
        made = numerics.exact_inputs(case, dtype, generator)
        if not exact:
            shapes = (case.input_shape, case.weight_shape, (case.k,), (case.k,), case.output_shape)
            made = numerics.ExactInputs(
                *(
                    _noise(generator, shape, torch.float32 if len(shape) == 1 else dtype)
                    for shape in shapes
                )
            )
        inputs = tuple(t if t.dim() == 1 else lay_out(t, layout) for t in made)
        oracle = numerics.conv_bn_act_oracle(*inputs, **case.geometry, act=case.act)
        bound = numerics.conv_bn_act_bound(
            *inputs, oracle, **case.geometry, tf32=dtype == torch.float32
        )
        for schedule in HOSTILE if exact else HOSTILE[-1:]:
            yield Trial(
                f"conv_bn_act {layout} {dtype} splits={splits} exact={exact} {schedule}",
                "conv_bn_act",
                lambda inputs=inputs, case=case: (*inputs, *geometry_args(case)),
                _bits(oracle.to(dtype)) if exact else _bound(oracle, bound),
                {"schedule": schedule, "configuration": configuration, "splits": splits},
            )


TRIALS = {"bn_act": bn_act_trials, "conv_bn_act": conv_bn_act_trials}


@functools.cache
def found(op: str) -> dict[Mutant, list[Trial]]:
    """Every mutant of an op's kernels, with the trials that reach it. Clean runs pass."""
    reached: dict[Mutant, list[Trial]] = {}
    for trial in TRIALS[op]():
        for site in trial.run()["sites"]:
            for fault in site["faults"]:
                mutant = Mutant(site["file"], site["line"], site["instruction"], fault)
                reached.setdefault(mutant, []).append(trial)
    return dict(sorted(reached.items()))


def noticed(mutant: Mutant, trials: list[Trial]) -> str | None:
    """The words of the first trial that notices a mutant, or None."""
    for trial in trials:
        try:
            report = trial.run(fault=tuple(mutant))
        except (emulated.load().Error, AssertionError) as error:
            return f"{trial.name}: {error}"
        hits = [site["hits"] for site in report["sites"] if site["hits"]]
        assert hits, f"{mutant} was never planted"
    return None
