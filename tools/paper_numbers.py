"""The measured part of docs/paper.md, made from the records beside it and never typed.

    python tools/paper_numbers.py           # writes the marked block of docs/paper.md
    python tools/paper_numbers.py --check   # exit code 1 if the block is not what it would write

The records are what `resnet-fused paper` wrote, in docs/paper/*.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from resnet_fused.paper import EXPERIMENTS

DOCS = Path(__file__).resolve().parent.parent / "docs"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def block(folder: Path) -> str:
    """All records of a folder, in the order of the experiments.

    Raises:
        ValueError: there are none.
    """
    records = [json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("*.json")]
    if not records:
        raise ValueError(f"no record in '{folder}'")
    order = list(EXPERIMENTS)
    records.sort(key=lambda r: (order.index(r["experiment"]), r["scale"]["scale"]))
    return "\n\n".join(part(record) for record in records)


def part(record: dict[str, Any]) -> str:
    """One record as text: what it was, its table, its checks, its verdict."""
    scale, machine = record["scale"], record["machine"]
    header = [f"| {' | '.join(record['columns'])} |", "| --- " * len(record["columns"]) + "|"]
    rows = [f"| {' | '.join(row)} |" for row in record["rows"]]
    marks = {True: "yes", False: "no", None: "cannot be judged"}
    checks = [f"- {c['claim']}: **{marks[c['holds']]}** ({c['numbers']})" for c in record["checks"]]
    seeds = f"{scale['seeds']} seeds" if scale["seeds"] > 1 else "one seed"
    return "\n".join([
        f"### {record['title']}",
        "",
        f"{record['source']} of the paper. `{record['command']}`: {scale['data']}, {seeds}, commit "
        f"{(record['commit'] or 'unknown')[:10]}, torch {record['torch']}, {machine['cpu']}, "
        f"{machine['threads']} threads; the steps took {record['step_seconds'] / 60:.1f} minutes.",
        "",
        *header, *rows,
        "",
        *checks,
        "",
        record["verdict"],
    ])  # fmt: skip


def replaced(page: str, text: str) -> str:
    """A page with this text between its marks."""
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"expected {BEGIN!r} and {END!r}, once each")
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}"


@click.command()
@click.option("--check", is_flag=True, help="Write nothing; exit code 1 if the block is stale.")
def main(check: bool) -> None:
    """Write or check the measured part of docs/paper.md."""
    page = DOCS / "paper.md"
    old = page.read_text(encoding="utf-8")
    new = replaced(old, block(DOCS / "paper"))
    if not check:
        page.write_text(new, encoding="utf-8")
    elif new != old:
        raise SystemExit("docs/paper.md is not what its records say: run tools/paper_numbers.py")


if __name__ == "__main__":
    main()
