"""Turns records of gpu-checks into resnet_fused/admitted.json, which the package ships.

    python tools/admit.py benchmarks/results/*/gpu-check*.json

Each file holds a list of entries, or an object whose "admission" is that list; an entry has op,
implementation, configuration, ok, hash (of the kernel's sources), arch ("sm_90") and timings. Only
entries for the present sources are taken; each other one is named with the reason, and the exit
code is 1 if there are any. Entries that admitted.json already holds stay while their sources are
the present ones; of two for the same configuration and architecture the one given later counts.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import resnet_fused.ops  # noqa: F401  (importing it enters the kernels)
from resnet_fused import admission


def entries_of(file: Path) -> list[Any]:
    """The entries that a file holds.

    Raises:
        SystemExit: it can't be read or holds none.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {file}: {error}") from error
    if isinstance(content, dict):
        content = content.get("admission")
    if not isinstance(content, list):
        raise SystemExit(
            f'error: {file}: expected a list of entries or an object with one as "admission"'
        )
    return content


def main(arguments: list[str] | None = None) -> int:
    """Reads the files named on the command line; 1 if an entry was refused."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, help="records of gpu-checks")
    parser.add_argument("--output", type=Path, default=admission.SHIPPED, help="file to write")
    chosen = parser.parse_args(arguments)
    known = []
    if chosen.output.exists():
        known = json.loads(chosen.output.read_text(encoding="utf-8"))["records"]
    refused = []
    try:
        content, dropped = admission.record(known)
        for file in chosen.files:
            found, reasons = admission.record([*content["records"], *entries_of(file)])
            content = found
            refused += [f"{file}: {reason}" for reason in reasons]
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    chosen.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for line in dropped:
        print(f"dropped from {chosen.output}: {line}")
    for line in refused:
        print(f"refused: {line}", file=sys.stderr)
    print(f"{chosen.output}: {len(content['records'])} records")
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
