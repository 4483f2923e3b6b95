"""README's numbers, made from the newest records in benchmarks/results and never typed.

    python tools/readme_numbers.py           # writes the marked block of README.md
    python tools/readme_numbers.py --check   # exit code 1 if the block is not what it would write

A line of the table is filled from the newest record that holds it, of the machine on which the
newest record of all was taken. What no record holds stays empty, and so does everything that was
measured while other programs used the machine.
"""

from __future__ import annotations

import argparse
import datetime
import difflib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from resnet_fused.bench import compare
from resnet_fused.bench.load import Load
from resnet_fused.bench.timing import Ratio, Timings

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- numbers: begin -->", "<!-- numbers: end -->"
MODEL, SIZE, OURS, ENGINE = "resnet50", 224, "fused", "frozen"
COMPILED = "inductor"  # of all modes of torch.compile the fastest is taken
KINDS = {"bench": 2, "model": 1}  # the records' kinds and the newest schema of each
MODES = {
    "inference": "inference",
    "training": "training step",
    "training_frozen": "training step, BatchNorm fixed",
    "train": "training step with autocast and optimizer",
}


@dataclass(frozen=True)
class Line:
    """A line of the table: what is to be measured on which kind of device, and which of ours."""

    device: str
    op: str
    batch: int
    dtype: str
    ours: str = OURS

    @property
    def mode(self) -> str:
        """The first cell."""
        return MODES[self.op] + ("" if self.ours == OURS else f", {self.ours}")

    def matches(self, subject: Mapping[str, Any]) -> bool:
        """Whether a row's subject is this."""
        wanted = {"level": "model", "name": MODEL, "size": SIZE, **vars(self)}
        return all(subject.get(name) == wanted[name] for name in wanted if name != "ours")

    def usable(self, row: Mapping[str, Any] | None) -> bool:
        """Whether a row has a time of ours that was taken on a quiet machine."""
        if row is None or not row["variants"].get(self.ours, {}).get("samples_s"):
            return False
        return compare.refusal(row) is None


LINES = (
    *(
        Line("cpu", "inference", b, d, ours)
        for d in ("float32", "bfloat16")
        for ours in (OURS, ENGINE)
        for b in (1, 8)
    ),
    *(
        Line("cuda", "inference", b, "bfloat16", ours)
        for ours in (OURS, ENGINE)
        for b in (1, 32, 256)
    ),
    Line("cuda", "training", 256, "bfloat16"),
    Line("cuda", "train", 256, "bfloat16"),
)
TITLES = {"cpu": "On the CPU", "cuda": "On one GPU"}
COLUMNS = ("mode", "batch", "dtype", "images/s", "over eager", "over torch.compile",
           "over the fastest other")  # fmt: skip
HEADER = (f"| {' | '.join(COLUMNS)} |", "| --- " * len(COLUMNS) + "|")


@dataclass(frozen=True)
class Source:
    """A record, where it lies, and when it was taken."""

    path: Path
    date: datetime.datetime
    content: Mapping[str, Any]

    def row(self, line: Line) -> Mapping[str, Any] | None:
        """The row of a line, or None."""
        found = (row for row in self.content["rows"] if line.matches(row["subject"]))
        return next(found, None)

    def machine(self, device: str) -> str:
        """The processor or GPU that its rows of a device were taken on."""
        about = self.content["machine"]
        if device == "cpu":
            return f"{about['cpu']}, {about['threads']} threads"
        return ", ".join(gpu["name"] for gpu in about["gpus"][:1])


def sources(folder: Path) -> list[Source]:
    """The records of benchmarks in a folder, the newest first; other JSON files are passed by.

    Raises:
        ValueError: a record that cannot be read, or one without a date.
    """
    found = []
    for path in sorted(folder.rglob("*.json")):
        try:
            head = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: is no JSON ({error})") from error
        if not isinstance(head, dict) or head.get("kind") not in KINDS:
            continue
        content = compare.load(path)
        try:
            date = datetime.datetime.fromisoformat(content["date"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: has no date ({error})") from error
        if date.tzinfo is None:
            date = date.replace(tzinfo=datetime.UTC)
        found.append(Source(path, date, content))
    return sorted(found, key=lambda source: (source.date, str(source.path)), reverse=True)


def block(folder: Path, base: Path) -> str:
    """The text between the marks.

    Args:
        folder: of the records.
        base: what the paths of records are told from.
    """
    every = sources(folder)
    parts = [
        "Written by `tools/readme_numbers.py` from the records in `benchmarks/results`. ResNet-50 "
        "on images of\n224x224, fused, and as the engine of `rf.freeze` (frozen), beside others "
        "timed in turns with it:\nmedian ratios of neighbouring runs, with their interval. Empty: "
        "not measured yet."
    ]
    for device, title in TITLES.items():
        lines = [line for line in LINES if line.device == device]
        holding = [s for s in every if any(line.usable(s.row(line)) for line in lines)]
        machine = holding[0].machine(device) if holding else None
        holding = [s for s in holding if s.machine(device) == machine]
        rows, used = [], []
        for line in lines:
            taken = next((s for s in holding if line.usable(s.row(line))), None)
            row = taken.row(line) if taken else None
            rows.append(_cells(line, row))
            if taken and taken not in used:
                used.append(taken)
        parts.append(f"**{title}**" + (f": {machine}" if machine else ""))
        parts.append("\n".join([*HEADER, *rows]))
        if used:
            used.sort(key=every.index)
            parts.append("\n".join(_origin(source, base) for source in used))
    return "\n\n".join(parts)


def _cells(line: Line, row: Mapping[str, Any] | None) -> str:
    """One line of the table, its last cells empty where there is nothing to say."""
    cells = [line.mode, str(line.batch), line.dtype]
    if row is None:
        return "| " + " | ".join(cells) + " | | | | |"
    timings = _timings(row, line.ours)
    speed = line.batch / timings.median(line.ours)
    others = [n for n in timings.seconds if n not in (*compare.OURS, compare.BASELINE)]
    fastest = sorted(others, key=timings.median)
    compiled = [name for name in fastest if name.startswith(COMPILED)]
    cells.append(f"{speed:,.1f}" if speed < 1000 else f"{speed:,.0f}")
    eager = compare.BASELINE if compare.BASELINE in timings.seconds else None
    cells.append(_ratio(timings, eager, line.ours))
    cells.append(_ratio(timings, compiled[0] if compiled else None, line.ours))
    cells.append(_ratio(timings, fastest[0] if fastest else None, line.ours, named=True))
    return " ".join(f"| {cell}" if cell else "|" for cell in cells) + " |"


def _timings(row: Mapping[str, Any], ours: str) -> Timings:
    """The samples of a row's variants, as many of each as there are pairs with ours."""
    rounds = len(row["variants"][ours]["samples_s"])
    seconds = {
        name: tuple(variant["samples_s"])
        for name, variant in row["variants"].items()
        if name != compare.AGAIN and len(variant.get("samples_s") or ()) == rounds
    }
    return Timings(seconds, Load(0.0, 0.0, 1, 0.0))  # the load was looked at before


def _ratio(timings: Timings, baseline: str | None, ours: str, *, named: bool = False) -> str:
    if baseline is None:
        return ""
    ratio: Ratio = timings.ratio(baseline, ours)
    text = f"{ratio.median:.2f}x ({ratio.low:.2f} .. {ratio.high:.2f})"
    return f"{text} {baseline}" if named else text


def _origin(source: Source, base: Path) -> str:
    """Where a record lies, and what it was taken with."""
    content = source.content
    path = Path(os.path.relpath(source.path, base)).as_posix()
    versions = content.get("versions") or {}
    commit = content.get("commit") or "unknown"
    return (
        f"- [{path}]({path}): {source.date:%Y-%m-%d}, commit {commit[:10]}"
        f"{'+' if commit.endswith('+') else ''}, torch {versions.get('torch', 'unknown')}"
    )


def replaced(page: str, text: str) -> str:
    """A page with this text between its marks.

    Raises:
        ValueError: the marks are not there, not once each, or in the wrong order.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ValueError(f"expected {BEGIN!r} and behind it {END!r}, once each")
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes or checks the block; 1 if a check failed, 2 if there is something amiss."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing, exit code 1 if stale")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    chosen = parser.parse_args(arguments)
    try:
        page = chosen.readme.read_text(encoding="utf-8")
        new = replaced(page, block(chosen.results, chosen.readme.resolve().parent))
    except (OSError, ValueError) as error:
        print(f"error: {chosen.readme}: {error}", file=sys.stderr)
        return 2
    if chosen.check:
        lines = difflib.unified_diff(
            page.splitlines(), new.splitlines(), "README as it is", "from the records", lineterm=""
        )
        difference = "\n".join(lines)
        print(difference or f"{chosen.readme.name} is what the records say")
        return 1 if difference else 0
    beside = chosen.readme.with_name(f".{chosen.readme.name}.{os.getpid()}")
    beside.write_text(new, encoding="utf-8")
    os.replace(beside, chosen.readme)
    return 0


if __name__ == "__main__":
    sys.exit(main())
