"""Where the results of `predict` go: stdout, or a file that is whole or still named .partial."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from resnet_fused.bench.plain import plain
from resnet_fused.cli._errors import UserError
from resnet_fused.cli._output import check_folder, to_json, write_file

Record = dict[str, Any]
COLUMNS = ("image", "rank", "index", "label", "probability", "error")
# What results of one file have in common; `--resume` mixes no others into it.
SAME = ("model", "weights", "dtype")


def document(record: Record) -> str:
    """The only record of a run, as a JSON document."""
    return to_json(record)


def json_line(record: Record) -> str:
    """A record as one line of JSON."""
    return json.dumps(plain(record), allow_nan=False)


def table(record: Record) -> str:
    """The only record of a run for a reader: a line a class."""
    if "error" in record:
        return ""  # stderr has it
    return "\n".join(f"{p['probability']:7.2%}  {p['label']}" for p in record["predictions"])


def text_line(record: Record) -> str:
    """One of several records for a reader: the image, then its classes."""
    if "error" in record:
        return ""
    classes = ", ".join(f"{p['label']} {p['probability']:.1%}" for p in record["predictions"])
    return f"{record['image']}: {classes}"


def csv_rows(record: Record) -> str:
    """A row for each class of a record, or one with its error."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, restval="", extrasaction="ignore", lineterminator="\n")
    image = {"image": record["image"]}
    if "error" in record:
        writer.writerow(image | {"error": record["error"]})
    else:
        writer.writerows(image | plain(prediction) for prediction in record["predictions"])
    return buffer.getvalue().removesuffix("\n")


FORMATS: dict[str, tuple[str, Callable[[Record], str]]] = {
    ".jsonl": ("", json_line),
    ".csv": (",".join(COLUMNS) + "\n", csv_rows),
}
"""Suffix of a file -> its head, and how it holds a record."""


def check(path: Path, *, resume: bool) -> Path:
    """Whether results can go to a file, before any work is done for them.

    Args:
        path: the file.
        resume: go on with what an earlier run left.

    Returns:
        The name that the file has until it is whole.

    Raises:
        UserError: a suffix that is not accepted, a directory, no permission, or an unfinished file
            without `resume`.
    """
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        accepted = " or ".join(FORMATS)
        raise UserError(f"--output: '{path}' has the suffix '{suffix}'; accepted: {accepted}")
    if path.is_dir():
        raise UserError(f"--output: '{path}' is a directory; give a file")
    if resume and suffix != ".jsonl":
        raise UserError(f"--resume: '{path}' cannot be gone on with; accepted: a .jsonl file")
    check_folder(path.parent)
    partial = path.with_name(path.name + ".partial")
    if partial.exists() and not resume:
        raise UserError(
            f"--output: '{partial}' is there, from a run that was stopped or is not over; "
            "go on with it by --resume (.jsonl), or remove it"
        )
    return partial


class ResultFile:
    """Results on their way into a file.

    They are written to FILE.partial, batch after batch, and that becomes FILE in one step when all
    are there: an older FILE stays until then, and what was done before a crash stays as well.

    Args:
        path: FILE, of a suffix in `FORMATS`.
        resume: go on with what an earlier run left.
        common: values of this run for `SAME`.

    Attributes:
        done: images that need not be looked at again.
        partial: FILE.partial.
        is_whole: it has become FILE.

    Raises:
        UserError: as for `check`; results of another network to go on with.
    """

    def __init__(self, path: Path, *, resume: bool, common: Record) -> None:
        self.path = path
        self.partial = check(path, resume=resume)
        self.is_whole = False
        head, self._format = FORMATS[path.suffix.lower()]
        kept = self._kept(common) if resume else {}
        self.done = frozenset(kept)
        write_file(self.partial, head + "".join(line + "\n" for line in kept.values()))
        try:
            self._file: IO[str] = self.partial.open("a", encoding="utf-8", newline="")
        except OSError as error:
            raise self._cannot(error) from error

    def _kept(self, common: Record) -> dict[str, str]:
        """Image -> its line, of earlier results that are whole and no errors."""
        kept = {}
        for file in (self.path, self.partial):
            if not file.exists():
                continue
            for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
                try:
                    record = json.loads(line)
                    image = record["image"]
                except (ValueError, KeyError, TypeError):
                    continue  # the line in which a crash fell
                if "predictions" not in record:
                    continue
                for key in SAME:
                    if record.get(key) != common[key]:
                        raise UserError(
                            f"--resume: '{file}' has results of {key} {record.get(key)!r}, this "
                            f"run is of {common[key]!r}; give another --output"
                        )
                kept[image] = line
        return kept

    def write(self, record: Record) -> None:
        """Adds a record.

        Raises:
            UserError: the disk is full, or the like.
        """
        try:
            self._file.write(self._format(record) + "\n")
        except OSError as error:
            raise self._cannot(error) from error

    def flush(self) -> None:
        """What was added is in FILE.partial, whatever happens to this process."""
        try:
            self._file.flush()
        except OSError as error:
            raise self._cannot(error) from error

    def commit(self) -> None:
        """FILE.partial becomes FILE."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self.partial, self.path)
        except OSError as error:
            raise self._cannot(error) from error
        self.is_whole = True

    def leave(self, *, empty: bool) -> bool:
        """Closes the unfinished file; removes it where it holds nothing.

        Args:
            empty: this run added nothing.

        Returns:
            Whether it is still there.
        """
        with contextlib.suppress(OSError):  # on a full disk what fits is there
            self._file.close()
        if empty and not self.done:
            self.partial.unlink(missing_ok=True)
        return self.partial.exists()

    def _cannot(self, error: OSError) -> UserError:
        return UserError(f"--output: cannot write '{self.partial}': {error.strerror or error}")
