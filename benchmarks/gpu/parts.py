"""The benchmark's record out of several processes': what ends one costs a row, not the rest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read(file: Path) -> dict[str, Any] | None:
    """A JSON object, or None where none is whole."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


class Parts:
    """Records that together are one.

    Args:
        command: what was typed.
        commit: of the checkout where there is no .git.
    """

    def __init__(self, command: str, commit: str | None) -> None:
        self._command, self._commit = command, commit
        self.keys: list[str] = []
        self.done = 0
        self.record: dict[str, Any] | None = None
        self.blamed: dict[str, str] = {}

    @property
    def left(self) -> bool:
        """Whether anything is still to be measured."""
        return not self.keys or self.done < len(self.keys)

    def add(
        self, part: Mapping[str, Any] | None, blame: str | None
    ) -> tuple[list[dict[str, Any]], str]:
        """Enters what one process has reached.

        Args:
            part: its record, None if it wrote none.
            blame: how it ended, if the subject that it was busy with is to blame for that.

        Returns:
            The new rows, and the key of the subject that is to blame, "" for none.
        """
        rows = list((part or {}).get("rows", []))
        if part is not None:
            blame = part.get("stopped") or blame
            if self.record is None:
                self.record = {**part, "rows": []}
            self.record["rows"] += rows
            self.record["seconds"] = self.record["seconds"] + (
                part["seconds"] if self.done else 0.0
            )
            failed = {**self.record.get("failed", {}), **part.get("failed", {})}
            if failed:
                self.record["failed"] = failed
            self.done += part["reached"]
        blamed = ""
        if blame is not None and self.done < len(self.keys):
            blamed = self.keys[self.done]
            self.blamed[blamed] = blame
            self.done += 1
        if self.record is not None:
            self._finish(self.record)
        return rows, blamed

    def _finish(self, record: dict[str, Any]) -> None:
        record.pop("stopped", None)
        if self.blamed:
            record["failed"] = {**record.get("failed", {}), **self.blamed}
        record |= {
            "of": len(self.keys), "reached": self.done, "command": self._command,
            "complete": self.done == len(self.keys) and not record.get("failed"),
            "commit": record.get("commit") or self._commit,
        }  # fmt: skip


def wrong_of_ours(row: Mapping[str, Any]) -> str:
    """Which variants of ours a row says are wrong, or have crashed; "" for none."""
    from resnet_fused.bench.compare import OURS

    wrong = {name: one["wrong"] for name, one in row["variants"].items() if "wrong" in one}
    crashed = {name: row["omitted"][name] for name in row.get("crashed", ())}
    return "; ".join(
        f"{name}: {why}"
        for name, why in {**wrong, **crashed}.items()
        if name.removesuffix("_again") in OURS
    )


def line(row: Mapping[str, Any]) -> str:
    """A row in a few words."""
    times = ", ".join(
        f"{name} {1e3 * variant['median_s']:.3f} ms"
        for name, variant in row["variants"].items()
        if "median_s" in variant and name != "fused_again"
    )
    gains = [
        f"{one['variant']} {one['median']:.2f}x over eager ({one['low']:.2f} .. {one['high']:.2f})"
        for one in row["ratios"]
        if one["baseline"] == "eager" and one["variant"] in ("fused", "frozen")
    ]
    return "; ".join([*gains, times])
