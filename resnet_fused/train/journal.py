"""What a run writes down: metrics.jsonl, timing.jsonl, TensorBoard's event files.

A line of metrics.jsonl follows from data, recipe and seed alone, so that two runs can be compared
byte by byte; how long something took stands in timing.jsonl. A run that goes on cuts both where its
checkpoint stands, and writes the lines behind that again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from resnet_fused.bench.plain import plain

logger = logging.getLogger("resnet_fused.train")

METRICS, TIMING, EVENTS = "metrics.jsonl", "timing.jsonl", "tensorboard"
Value = float | int | str | None


class Journal:
    """The files of one run, open for more.

    Args:
        run: its folder.
        places: bytes of each file to keep, as `places()` gave them; missing ones: none.
        step: where the run goes on.
        tensorboard: write event files too, where the package is installed.
    """

    def __init__(
        self, run: Path, places: Mapping[str, int], step: int, *, tensorboard: bool = True
    ) -> None:
        self._files = {}
        for name in (METRICS, TIMING):
            file = open(run / name, "ab")  # noqa: SIM115
            file.truncate(places.get(name, 0))
            file.seek(0, 2)
            self._files[name] = file
        self._events: Any = _writer(run / EVENTS, step) if tensorboard else None

    def places(self) -> dict[str, int]:
        """How long each file is, everything so far included."""
        for file in self._files.values():
            file.flush()
        return {name: file.tell() for name, file in self._files.items()}

    def write(self, name: str, record: Mapping[str, Value]) -> None:
        """Adds a line to METRICS or TIMING, and each number to TensorBoard.

        Args:
            name: of the file.
            record: with "kind" and "step". What is NaN or infinite is null in the file.
        """
        line = json.dumps(plain(dict(record)), allow_nan=False)
        self._files[name].write(line.encode() + b"\n")
        self._files[name].flush()
        if self._events is None:
            return
        for key, value in record.items():
            if key not in ("kind", "step") and isinstance(value, int | float):
                self._events.add_scalar(f"{record['kind']}/{key}", value, record["step"])

    def close(self) -> None:
        """Ends it."""
        for file in self._files.values():
            file.close()
        if self._events is not None:
            self._events.close()


def _writer(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        logger.warning("no event files: tensorboard is not installed (%s)", error)
        return None
    return SummaryWriter(str(folder), purge_step=step)


def read(run: Path, name: str) -> list[dict[str, Any]]:
    """The lines of a file; of a run that was cut off, those that are whole.

    Raises:
        FileNotFoundError: no such file.
    """
    lines = (run / name).read_bytes().split(b"\n")
    return [json.loads(line) for line in lines[:-1]]
