"""How commands write: JSON, files that are whole or absent, and a progress bar on stderr."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from resnet_fused.bench.plain import plain
from resnet_fused.cli._errors import UserError

Progress = Callable[[int, int, str], None]


def to_json(value: Any) -> str:
    """Strict JSON text."""
    return json.dumps(plain(value), indent=2, allow_nan=False)


def echo_json(value: Any) -> None:
    """Prints a value as JSON on stdout."""
    click.echo(to_json(value))


def write_file(path: Path, content: str | bytes) -> None:
    """Writes a file by way of a temporary one beside it: nobody sees half of it.

    Raises:
        UserError: the folder or the file cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        # mkstemp makes files that only their owner may read; a report is to be shown.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except OSError as error:
        if temporary:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise UserError(f"cannot write '{path}': {error.strerror or error}") from error


def check_folder(folder: Path) -> None:
    """Fails before the work is done if its results could not be written.

    Raises:
        UserError: the folder is a file, or cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: cannot make folder '{folder}': {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"--output: no permission to write into '{folder}'")


@contextmanager
def progress_bar(title: str, *, quiet: bool) -> Iterator[Progress]:
    """A bar on stderr, if stderr is a terminal and `quiet` is false.

    Args:
        title: what the bar is for.
        quiet: no bar.

    Yields:
        A function of (done, total, what is being done).
    """
    if quiet or not sys.stderr.isatty():
        yield lambda done, total, what: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn(f"{title:12}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(), TextColumn("{task.fields[what]}", style="dim"),
    )  # fmt: skip
    # No refreshing thread: it would run inside what is being timed.
    bar = Progress(*columns, console=Console(stderr=True), auto_refresh=False)
    with bar:
        task = bar.add_task(title, total=1, what="")

        def show(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, what=what, refresh=True)

        yield show


def table(headers: list[str], rows: list[list[str]], right: frozenset[int] = frozenset()) -> str:
    """A plain table, its columns as wide as their widest cell.

    Args:
        headers: of the columns.
        rows: their cells.
        right: the columns to align at the right.
    """
    lines = [headers, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headers))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
