"""Compile gates of the Triton kernels: what a GPU would compile, compiled without one and checked.

For each architecture, the calls of `_triton_cases` are compiled and their machine code is read:
no spills, registers and shared memory that fit, the architecture's best matrix instructions,
16-byte accesses where the operands allow them. `_triton_rules.GATES` holds every check with its
reason.

    python tools/triton_gates.py --archs "80;90"           a fixed sample: what CI runs
    python tools/triton_gates.py --archs "80;90" --all     everything
    python tools/triton_gates.py --all --ops stem,head     everything of these ops
    python tools/triton_gates.py --write                   docs/triton_resources.md anew

Exit code 0: every gate is passed; 1: one is not, or a variant does not compile.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import _triton_aot as aot
import _triton_cases as cases
import _triton_rules as rules
import torch
import triton

from resnet_fused.triton import _tiles

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "triton_resources.md"
TABLE_ARCHITECTURES = (80, 90)
DEFAULT_ARCHS = "80;90"
WORKERS = 2


@dataclass
class Result:
    """A variant and what became of it: its code, or why it did not compile."""

    recorded: cases.Recorded
    code: aot.Code | None
    error: str = ""

    @property
    def failures(self) -> list[str]:
        """The gates that it does not pass, as sentences."""
        if self.code is None:
            return [f"does not compile: {self.error}"]
        return rules.failures(self.recorded.variant, self.code)

    def summary(self) -> dict[str, Any]:
        """Everything about it, for JSON."""
        variant, code = self.recorded.variant, self.code or aot.Code(warps=1)
        architecture = aot.ARCHITECTURES[variant.capability]
        return {
            "arch": variant.capability,
            "kernel": variant.kernel,
            "cases": [call.name for call in self.recorded.calls],
            "registers": code.registers,
            "stack": code.stack,
            "shared": code.shared,
            "warps": code.warps,
            "blocks": code.blocks(architecture),
            "matrix": code.matrix(),
            "local": code.count("LDL|STL"),
            "local_in_loop": code.count("LDL|STL", loop=True),
            "async_copies": code.count("LDGSTS"),
            "wide_loads": code.wide("LDGSTS|LDG"),
            "loads": code.count("LDGSTS|LDG"),
            "wide_stores": code.wide("STG"),
            "stores": code.count("STG"),
            "failures": self.failures,
        }


def attempt(variant: aot.Variant) -> tuple[aot.Code | None, str]:
    """A variant's code, or an empty one and why there is none."""
    try:
        return aot.compile_variant(variant), ""
    except RuntimeError as error:
        return None, str(error)


def compiled(recorded: Sequence[cases.Recorded], workers: int = WORKERS) -> Iterator[Result]:
    """Compiles all of them, in their order; `workers` processes, 0 for this one."""
    variants = [entry.variant for entry in recorded]
    with _pool(workers) as pool:
        outcomes = pool.map(attempt, variants) if pool else map(attempt, variants)
        for entry, (code, error) in zip(recorded, outcomes, strict=True):
            yield Result(entry, code, error)


def _pool(workers: int) -> contextlib.AbstractContextManager[Any]:
    """Processes that inherit no threads; nothing for no workers."""
    if not workers:
        return contextlib.nullcontext()
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(workers, mp_context=context)


def architectures(text: str) -> list[int]:
    """Capabilities of "80;90a;120+PTX".

    Raises:
        ValueError: one of them is not known here.
    """
    parts = [part.strip() for part in re.split("[;,]", text) if part.strip()]
    numbers = [int(found[0]) if (found := re.match(r"\d+", part)) else None for part in parts]
    for part, number in zip(parts, numbers, strict=True):
        if number not in aot.ARCHITECTURES:
            known = ", ".join(map(str, aot.ARCHITECTURES))
            raise ValueError(f'--archs holds "{part}"; known are {known}, separated by semicolons')
    if not parts:
        raise ValueError('--archs is empty; give such as "80;90"')
    return list(dict.fromkeys(number for number in numbers if number is not None))


def known_ops(text: str | None) -> set[str] | None:
    """Ops of "stem,head"; None for None: all.

    Raises:
        ValueError: there are no such kernels.
    """
    if text is None:
        return None
    wanted = {part.strip() for part in text.split(",") if part.strip()}
    known = {call.op for call in cases.calls()}
    if not wanted or wanted - known:
        given = ", ".join(sorted(wanted - known)) or "nothing"
        raise ValueError(f"--ops names {given}; known are {', '.join(sorted(known))}")
    return wanted


def line(result: Result) -> str:
    """One row of what is printed."""
    entry, code = result.recorded, result.code or aot.Code()
    matrix = ",".join(code.matrix()) or "-"
    return (
        f"{entry.variant.capability:>4} {code.registers:>4} {code.stack:>5} {code.shared:>6} "
        f"{matrix:>7}  {entry.variant.kernel.removesuffix('_kernel')}: {entry.calls[0].name}"
    )


def check(
    numbers: Sequence[int],
    everything: bool,
    workers: int,
    quiet: bool,
    ops: set[str] | None = None,
) -> tuple[list[Result], dict[str, Any]]:
    """Compiles and prints; all results and what adds up to them."""
    begin, results = time.perf_counter(), []
    counts = {"variants": 0, "left_out": 0, "refused_calls": 0, "failed": 0}
    if not quiet:
        print(f"{'arch':>4} {'regs':>4} {'stack':>5} {'shared':>6} {'matrix':>7}  kernel: case")
    for number in numbers:
        calls = [call for call in cases.calls() if ops is None or call.op in ops]
        recorded, refused = cases.record(calls, number)
        chosen = [entry for entry in recorded if everything or entry.sample]
        counts["left_out"] += len(recorded) - len(chosen)
        counts["refused_calls"] += len(refused)
        for result in compiled(chosen, workers):
            results.append(result)
            found = result.failures
            counts["failed"] += bool(found)
            if not quiet:
                print(line(result), flush=True)
            for sentence in found:
                where = sys.stderr if quiet else sys.stdout
                print(f"FAILED {result.recorded.name}: {sentence}", file=where, flush=True)
    counts["variants"] = len(results)
    return results, {**counts, "seconds": round(time.perf_counter() - begin, 1)}


def row_of(call: cases.Call, side: int) -> tuple[str, str, str]:
    """The row of the table that a call's matrix kernel belongs to: op, configuration, operands."""
    kind = cases.CLASSES[call.type] + (", groups" if side > 1 else "")
    return call.op, call.tile or "", kind


def table_calls() -> list[cases.Call]:
    """The calls whose code the table is made of: every configuration, one after the other."""
    return [
        call
        for call in cases.calls()
        if call.tile
        and call.shape.name in cases.TABLE_SHAPES
        and (call.op in cases.CONVOLUTIONS or call.type == "bf16")
    ]


def table_variants(number: int) -> list[cases.Recorded]:
    """The matrix kernels that an architecture compiles for the table."""
    recorded = cases.record(table_calls(), number)[0]
    return [entry for entry in recorded if rules.RULES[entry.variant.kernel].matrix]


def rows(numbers: Sequence[int] = TABLE_ARCHITECTURES) -> list[tuple[str, str, str]]:
    """Names of the table's rows: whatever the chooser offers on one of the architectures."""
    found: dict[tuple[str, str, str], None] = {}
    for number in numbers:
        for entry in table_variants(number):
            found |= {row_of(call, entry.side): None for call in entry.calls}
    order = [tile.name for tile in _tiles.TILES]
    return sorted(found, key=lambda row: (cases.TABLE_OPS.index(row[0]), order.index(row[1])))


def _cells(results: Sequence[Result], number: int) -> list[str]:
    """Registers, spilled bytes, shared memory, matrix instructions and blocks of one row."""
    codes = [result.code for result in results if result.code]
    if not codes:
        return ["-"] * 5 if not results else ["does not compile", *["-"] * 4]
    kinds = sorted({kind for code in codes for kind in code.matrix()})
    blocks = [code.blocks(aot.ARCHITECTURES[number]) for code in codes]
    few, many = min(blocks), max(blocks)
    return [
        str(max(code.registers for code in codes)),
        str(max(code.stack for code in codes)),
        f"{max(code.shared for code in codes) / 1024:.0f}",
        " ".join(kinds) or "none",
        str(few) if few == many else f"{few}-{many}",
    ]


def table(results: Sequence[Result], numbers: Sequence[int] = TABLE_ARCHITECTURES) -> str:
    """The text of docs/triton_resources.md."""
    by_row: dict[tuple[str, str, str], dict[int, list[Result]]] = {}
    for result in results:
        entry = result.recorded
        for row in {row_of(call, entry.side) for call in entry.calls}:
            by_row.setdefault(row, {}).setdefault(entry.variant.capability, []).append(result)
    head = ["op", "configuration", "operands"]
    for number in numbers:
        head += [f"sm_{number} registers", "spilled B", "shared KB", "instructions", "blocks"]
    lines = [HEADER.format(versions=_versions(), archs=" and ".join(f"sm_{n}" for n in numbers))]
    lines += [f"| {' | '.join(head)} |", f"| {' | '.join(['---'] * len(head))} |"]
    for row in rows(numbers):
        cells = [cell for number in numbers for cell in _cells(by_row[row].get(number, []), number)]
        lines.append(f"| {' | '.join((*row, *cells))} |")
    lines += ["", "## The gates", ""]
    lines += [f"- **{gate.name}**: {gate.reason}." for gate in rules.GATES]
    return "\n".join(lines) + "\n"


HEADER = """# Resources of the Triton kernels

Made by `python tools/triton_gates.py --write` with {versions}; another compiler gives
other numbers. Nothing here ran: it is read from machine code for {archs} that was compiled without
a GPU.

A row is a configuration (rows x columns of the result, warps, stages) of one op for one kind of
operands; `groups` stands for narrow groups side by side in a tile. Each number is the largest over
the shapes that the row is compiled for, `blocks` the fewest to most blocks that fit on a
multiprocessor by registers, shared memory and threads. A dash: the chooser does not offer the
configuration there. HMMA is mma.sync, HGMMA wgmma. Convolutions of the forward pass add a shortcut
where the shape has one; the backward ones read ReLU's mask. The conv_bn ops of training are
compiled with everything that they can read along: BatchNorm and ReLU of the input, BatchNorm's
backward, the mask and the shortcut's gradient.
"""


def _versions() -> str:
    from triton import knobs

    return f"Triton {triton.__version__} and ptxas {knobs.nvidia.ptxas.version}"


def write(workers: int) -> int:
    """Compiles every configuration and writes the table; 0 unless something does not compile."""
    results: list[Result] = []
    for number in TABLE_ARCHITECTURES:
        results += compiled(table_variants(number), workers)
    TABLE.write_text(table(results), encoding="utf-8")
    bad = [result for result in results if result.code is None]
    for result in bad:
        print(f"FAILED {result.recorded.name}: {result.failures[0]}")
    print(f"{TABLE.relative_to(ROOT)}: {len(rows())} rows from {len(results)} variants")
    return 1 if bad else 0


def main(arguments: list[str] | None = None) -> int:
    """Runs the gates or writes the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--archs", default=DEFAULT_ARCHS, help='such as "80;86;90;100;120"')
    parser.add_argument("--all", action="store_true", help="every variant, not CI's sample")
    parser.add_argument("--ops", help="these alone, such as stem,head")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--write", action="store_true", help=f"make docs/{TABLE.name} anew")
    parser.add_argument(
        "--workers", type=int, default=WORKERS, choices=(0, 1, 2), help="processes; 0: this one"
    )
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on"):
        parser.error("TRITON_INTERPRET is set; unset it: interpreted kernels can't be compiled")
    # Where `make clean` finds it; a second run compiles nothing that it knows.
    os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / "build" / "triton-gates"))
    if options.write:
        return write(options.workers)
    try:
        numbers = architectures(options.archs)
        ops = known_ops(options.ops)
    except ValueError as error:
        parser.error(str(error))
    results, counts = check(numbers, options.all, options.workers, options.json, ops)
    if options.json:
        versions = {"triton": triton.__version__, "torch": torch.__version__}
        everything = {**versions, **counts, "results": [result.summary() for result in results]}
        print(json.dumps(everything, indent=1))
    else:
        print(
            f"Triton gates: {counts['variants']} variants, {counts['failed']} failed, "
            f"{counts['left_out']} left out of the sample (--all compiles them), "
            f"{counts['refused_calls']} calls not offered by the chooser; {counts['seconds']} s"
        )
    return 1 if counts["failed"] or not results else 0


if __name__ == "__main__":
    sys.exit(main())
