"""Faults that the emulator plants in the kernels, and the runs that are to notice them.

The kernels hold no trace of this: a clean run reports each call of an instruction and what could go
wrong there, and a mutant is one such fault. It is noticed when the emulator reports an error, when
guard bands or inputs have changed, or when the numbers are wrong.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import emulated
import emulated_network
import emulated_shapes
import torch
from emulated import Schedule
from emulated_shapes import lay_out
from torch import Tensor

from resnet_fused import cases, numerics
from resnet_fused.ops._library import overload
from resnet_fused.ops._training_checks_stats import exact_operands

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
        call: runs the kernel.
        inputs: the tensors that it must not change.
        wrong: says what is wrong with an output or a tuple of them, or None.
        settings: of `emulated.using`.
    """

    name: str
    call: Callable[[], Any]
    inputs: tuple[Tensor | None, ...]
    wrong: Callable[[Any], str | None]
    settings: dict[str, Any]

    def run(self, **planted: Any) -> dict[str, Any]:
        """Runs it.

        Returns:
            The report.

        Raises:
            Exception: an error of the emulator, a changed guard band or input, wrong numbers.
        """
        before = [None if t is None else t.clone() for t in self.inputs]
        with emulated.using(**self.settings, **planted) as runs:
            y = self.call()
        for now, old in zip(self.inputs, before, strict=True):
            assert now is None or torch.equal(now, old), "an input was written"
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
                lambda inputs=inputs: overload("bn_act", emulated.NAME)(*inputs, "relu"),
                inputs,
                _bits(oracle.to(dtype))
                if exact
                else _bound(oracle, numerics.bn_act_bound(*inputs, oracle)),
                {"schedule": Schedule()},
            )


# Its steps divide by the stages, so that the epilogue begins where the parts have met.
CONV = cases.ConvCase("mutants", 3, 56, 6, 7, 40, 3, 3, padding=(1, 1), residual=True)
ODD = cases.ConvCase("mutants_odd", 3, 5, 6, 7, 20, 3, 3, padding=(1, 1), residual=True)
# Sums of one term: no average hides an operand that was cut instead of rounded.
SHALLOW = cases.ConvCase("mutants_shallow", 1, 24, 8, 8, 24, groups=24)
# Hazards show under lazy copies and unlike orders; values need one schedule alone.
HOSTILE = (
    Schedule("lazy", "reverse", seed=1),
    Schedule("random", "shuffled", seed=2),
    Schedule("eager", "forward"),
)


def conv_trials(op: str) -> Iterator[Trial]:
    """Every way of reading, writing and splitting of a convolution's kernel."""
    tiles = emulated_shapes.tiles(op)

    def smallest(wide: bool) -> int:
        sizes = {i: tile["m"] * tile["n"] for i, tile in enumerate(tiles) if tile["wide"] == wide}
        return min(sizes, key=lambda i: (not tiles[i]["float32"], sizes[i]))

    ways = itertools.product((True, False), (torch.bfloat16, torch.float32), (1, 2), (True, False))
    for wide, dtype, splits, exact in ways:
        case = CONV if wide else ODD
        yield from _conv_trial(op, case, dtype, exact, smallest(wide), splits)
    # The epilogue writes at once where there is no shortcut to wait for.
    plain = dataclasses.replace(ODD, residual=False)
    yield from _conv_trial(op, plain, torch.bfloat16, True, smallest(False), 2)
    shallow = dataclasses.replace(SHALLOW, h=1, w=1) if op == "conv_wgrad" else SHALLOW
    yield from _conv_trial(op, shallow, torch.float32, False, smallest(False), 1)


def _conv_trial(
    op: str, case: cases.ConvCase, dtype: torch.dtype, exact: bool, configuration: int, splits: int
) -> Iterator[Trial]:
    layout = "nhwc" if emulated_shapes.tiles(op)[configuration]["wide"] else "nchw"
    layouts = (layout, layout, layout, layout)
    d = emulated_shapes.Draw(1, op, case, dtype, layouts, exact, configuration, splits, HOSTILE[-1])
    inputs = emulated_shapes.operands(d)
    oracle, bound = emulated_shapes.expected(op, case, inputs)
    schedules = HOSTILE if exact else HOSTILE[-1:]
    if splits > 1 and exact:  # who arrives when is a matter of luck
        schedules += tuple(Schedule("eager", "shuffled", seed=seed) for seed in range(8))
    for schedule in schedules:
        yield Trial(
            f"{op} {case.name} {layout} {dtype} splits={splits} exact={exact} {schedule}",
            lambda: emulated_shapes.call(op, case, inputs),
            inputs,
            _bits(oracle.to(dtype)) if exact else _bound(oracle, bound),
            {
                "schedule": schedule,
                "configuration": configuration,
                "splits": splits,
                # Parts of one tile meet in memory: they run side by side.
                "resident_blocks": 2 * splits,
            },
        )


# One more chunk of tiles than one: 64 tiles of 64 pixels, and a few.
CHUNKS = cases.ConvCase("mutants_chunks", 1, 8, 66, 67, 40)


# Of images by their rows: two blocks for three tiles of either column.
STEM = cases.ConvCase("mutants_stem", 2, 3, 7, 69, 72, 7, 7, (2, 2), (3, 3))
ALONE = (1, *emulated.H200[1:])
KINDS = ("wide", "window", "image")


def stats_trials() -> Iterator[Trial]:
    """Every way of reading, splitting and merging of conv_bn_stats' kernel."""
    tiles = emulated_shapes.tiles("conv_bn_stats")
    wide, narrow, window, image = (
        max(i for i, t in enumerate(tiles) if not t["tma"] and kind == {k for k in KINDS if t[k]})
        for kind in ({"wide"}, set(), {"wide", "window"}, {"image"})
    )
    dtypes = (torch.bfloat16, torch.float32)
    runs = [
        (case, index, dtype, splits, exact, prologue)
        for (case, index), dtype, splits, (exact, prologue) in itertools.product(
            ((CONV, wide), (ODD, narrow), (CONV, window)),
            dtypes,
            (1, 2),
            ((True, True), (False, True), (True, False)),
        )
    ]
    runs.append((SHALLOW, narrow, torch.float32, 1, False, False))
    runs.append((CHUNKS, narrow, torch.bfloat16, 1, True, False))
    runs += [(STEM, image, torch.bfloat16, 1, exact, False) for exact in (True, False)]
    for case, index, dtype, splits, exact, prologue in runs:
        generator = torch.Generator().manual_seed(5)
        x, norm, weight = exact_operands(case, dtype, generator)
        norm[2:] = 0  # not NaN, which no comparison finds unchanged
        if not exact:
            x, weight = (_noise(generator, tuple(t.shape), dtype) for t in (x, weight))
        layout = "nhwc" if tiles[index]["wide"] else "nchw"
        inputs = (lay_out(x, layout), norm if prologue else None, lay_out(weight, layout))
        schedules = HOSTILE if exact else HOSTILE[-1:]
        if splits > 1 and exact:  # who arrives when is a matter of luck
            schedules += tuple(Schedule("eager", "shuffled", seed=seed) for seed in range(8))
        for schedule in schedules:
            yield Trial(
                f"{case.name} {dtype} {index}/{splits} exact={exact} {prologue} {schedule}",
                functools.partial(
                    overload("conv_bn_stats", emulated.NAME),
                    *inputs, *emulated_shapes.geometry_args(case)[:4],
                ),
                inputs,
                _measured(case, inputs, exact),
                {
                    "schedule": schedule,
                    "configuration": index,
                    "splits": splits,
                    "resident_blocks": 2 * splits,
                    "gpu": ALONE if index == image else emulated.H200,
                },
            )  # fmt: skip


def _measured(
    case: cases.ConvCase, inputs: tuple[Tensor | None, ...], exact: bool
) -> Callable[[tuple[Tensor, Tensor]], str | None]:
    """What is wrong with a raw output and its statistics."""
    oracle = numerics.conv_bn_stats_oracle(*inputs, **case.geometry)
    tf32 = inputs[0] is not None and inputs[0].dtype == torch.float32
    bound = numerics.conv_bn_stats_bound(*inputs, oracle, **case.geometry, tf32=tf32)

    def wrong(got: tuple[Tensor, Tensor]) -> str | None:
        y, stats = got
        reason = (_bits(oracle.to(y.dtype)) if exact else _bound(oracle, bound))(y)
        wanted = numerics.stats_oracle(y)
        return reason or _bound(wanted, numerics.stats_bound(y, wanted))(stats)

    return wrong


# Two tiles of the smallest configuration, steps and rows that are cut, both ways to a shortcut.
CHAIN = cases.ChainCase("chain", 2, 40, 6, 7, 104, 40)
CHAINS = (
    CHAIN,
    dataclasses.replace(CHAIN, name="chain_projected", projected=72, projection_stride=2),
    dataclasses.replace(CHAIN, name="chain_thinned", n=1, m=0, out_stride=2),
    # More in front than lies in shared memory at a time, and channels that fill no step.
    dataclasses.replace(CHAIN, name="chain_front", front=72),
)


def chain_trials() -> Iterator[Trial]:
    """Every way through the kernel of conv_chain, and its configurations of each number of rows."""
    tiles = emulated_shapes.tiles("conv_chain")

    def taking(case: cases.ChainCase) -> tuple[int, int]:
        """Of the configurations made for such chains, one of few rows a warp and one of many."""
        fit = [i for i, tile in enumerate(tiles) if ("_front" in tile["name"]) == (case.front > 0)]
        narrow = min(fit, key=lambda i: tiles[i]["shared_bytes"])
        return narrow, min(fit, key=lambda i: -tiles[i]["m"] // tiles[i]["warps"])

    runs = itertools.product(CHAINS, (torch.bfloat16, torch.float16), (True, False), (0, 1))
    for case, dtype, exact, which in runs:
        configuration = taking(case)[which]
        generator = torch.Generator().manual_seed(3)
        made = numerics.chain_operands(case, dtype, generator, exact=exact)
        operands = [t if t is None or t.dim() == 1 else lay_out(t, "nhwc") for t in made]
        inputs = numerics.ChainOperands(*operands)
        strides = case.projection_stride, case.out_stride
        results = numerics.conv_chain_expected(inputs, dtype, *strides)
        oracles = numerics.conv_chain_oracle(inputs, *strides)
        bounds = numerics.conv_chain_bound(inputs, *strides)
        checks = [
            None if oracle is None else _bits(result.to(dtype)) if exact else _bound(oracle, bound)
            for result, oracle, bound in zip(results, oracles, bounds, strict=True)
        ]

        def wrong(got: Any, checks: list[Any] = checks) -> str | None:
            found = [check(y) for y, check in zip(got, checks, strict=True) if check is not None]
            return next((reason for reason in found if reason is not None), None)

        for schedule in HOSTILE if exact else HOSTILE[-1:]:
            yield Trial(
                f"{case.name} {dtype} {configuration} exact={exact} {schedule}",
                lambda inputs=inputs, strides=strides: overload("conv_chain", emulated.NAME)(
                    *inputs, *strides, True
                ),
                tuple(inputs),
                wrong,
                {"schedule": schedule, "configuration": configuration, "splits": 1},
            )


# Two tiles, the last of which overhangs, and a multiprocessor that goes through all of them.
STEMS = (
    cases.StemCase("mutants", 2, 3, 10, 62, 64, images="uint8"),
    cases.StemCase("mutants_odd", 1, 3, 13, 60, 68, images="float32", normed=True, layout="nchw"),
    cases.StemCase("mutants_plain", 1, 4, 11, 61, 12, layout="unaligned"),
)


def stem_trials() -> Iterator[Trial]:
    """Every way of reading and writing of the stem's kernel, on integers and on noise."""
    for case, exact in itertools.product(STEMS, (True, False)):
        dtype = torch.bfloat16 if exact else torch.float16
        generator = torch.Generator().manual_seed(3)
        x, weight, scale, shift, norm = numerics.exact_stem_inputs(case, dtype, generator)
        if exact:  # sums of more bits than bfloat16 has
            weight = 9 * weight
        else:
            weight, scale = _noise(generator, weight.shape, dtype), scale * 1.37
        inputs = (lay_out(x, case.layout), weight, scale, shift, norm)
        oracle = numerics.stem_oracle(*inputs, *case.geometry)
        bound = numerics.stem_bound(*inputs, *case.geometry)
        for schedule, index in itertools.product(HOSTILE if exact else HOSTILE[-1:], (2, 1)):
            if index == 1 and schedule is not HOSTILE[-1]:
                continue
            yield Trial(
                f"stem {case.name} exact={exact} {index} {schedule}",
                lambda inputs=inputs, case=case: overload("stem", emulated.NAME)(
                    *inputs, *case.geometry
                ),
                inputs,
                _bits(oracle.to(dtype)) if exact else _bound(oracle, bound),
                {
                    "schedule": schedule,
                    "configuration": index,
                    "splits": 2,
                    "gpu": (1, *emulated.H200[1:]),
                },
            )


def head_trials() -> Iterator[Trial]:
    """Every way of reading of the head's kernels; more steps than warps share them."""
    for layout, exact, index in itertools.product(("nhwc", "nchw"), (True, False), (0, 2)):
        generator = torch.Generator().manual_seed(4)
        dtype = torch.bfloat16 if exact else torch.float16
        shape, classes = ((18, 328, 3, 3), 37) if layout == "nhwc" else ((3, 299, 2, 4), 11)
        x, weight = (_noise(generator, size, dtype) for size in (shape, (classes, shape[1])))
        bias = _noise(generator, (classes,), dtype)
        if exact:  # every pixel of a channel the same integer: the mean is that
            x = (8 * x[:, :, :1, :1]).round().expand(shape)
            weight, bias = ((4 * t).round() for t in (weight, bias))
        inputs = (lay_out(x, layout), weight, bias)
        oracle = numerics.head_oracle(*inputs)
        yield Trial(
            f"head {layout} exact={exact} {index}",
            lambda inputs=inputs: overload("head", emulated.NAME)(*inputs),
            inputs,
            _bits(oracle.to(dtype)) if exact else _bound(oracle, numerics.head_bound(*inputs)),
            {"schedule": HOSTILE[index % 3], "configuration": index, "splits": 1},
        )


def network_trials() -> Iterator[Trial]:
    """A stage whose blocks meet, split tiles, and walk more than one tile of a layer."""
    splits = (1, 1, 3, 1, 2, 2, 1)
    x, layers = emulated_network.stage(torch.bfloat16, exact=True, images=1)
    expected = emulated_network.one_by_one(x, layers, splits)

    def wrong(got: Any) -> str | None:
        return next(
            (f"{name}: other bits" for name in got if not torch.equal(got[name], expected[name])),
            None,
        )

    for schedule, blocks in zip(HOSTILE, (3, 4, 2), strict=True):
        yield Trial(
            f"network {schedule} on {blocks} blocks",
            lambda blocks=blocks: emulated_network.Network(x, layers).run(splits, blocks)[0],
            (x,),
            wrong,
            {"schedule": schedule},
        )


TRIALS = {
    "bn_act": bn_act_trials,
    "conv_bn_stats": stats_trials,
    "conv_chain": chain_trials,
    "stem": stem_trials,
    "head": head_trials,
    "network": network_trials,
} | {op: functools.partial(conv_trials, op) for op in emulated_shapes.OPS}


# Of kernels that are made of others' parts, the files that are their own.
OWN = {"network": ("network_walk.h", "grid_barrier.h", "split_shares.h", "quad_epilogue.h")}


@functools.cache
def found(op: str) -> dict[Mutant, list[Trial]]:
    """Every mutant of an op's kernels, with the trials that reach it. Clean runs pass."""
    return reached(TRIALS[op](), OWN.get(op, ""))


def reached(
    trials: Iterable[Trial], files: str | tuple[str, ...] = ""
) -> dict[Mutant, list[Trial]]:
    """Every mutant that trials reach, with those that do. Clean runs pass.

    Args:
        trials: of one op.
        files: how the names of the files end that count; "" for all.
    """
    made: dict[Mutant, list[Trial]] = {}
    for trial in trials:
        for site in trial.run()["sites"]:
            if not site["file"].endswith(files):
                continue
            for fault in site["faults"]:
                mutant = Mutant(site["file"], site["line"], site["instruction"], fault)
                made.setdefault(mutant, []).append(trial)
    return dict(sorted(made.items()))


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


def check(
    found: dict[Mutant, list[Trial]], harmless: Collection[Any], chunk: int, chunks: int
) -> None:
    """Plants one part of the faults, each on its own.

    Args:
        found: every mutant, with the trials that reach it.
        harmless: keys of those that change nothing that a trial could see.
        chunk: the part's number.
        chunks: how many parts there are.

    Raises:
        AssertionError: nothing notices one that is not called harmless, or something notices one
            that is.
    """
    taken = list(found)[chunk::chunks]
    alive = {mutant for mutant in taken if noticed(mutant, found[mutant]) is None}
    known = {mutant for mutant in taken if mutant.key in harmless}
    assert not alive - known, "nothing notices these"
    assert not known - alive, "the table calls these harmless"
