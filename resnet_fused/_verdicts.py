"""The user's file of verdicts: what self-checks found on this user's GPUs.

Nothing here may stop a model from running: a file that can't be read or written costs one warning,
and the verdicts are found anew by the next process.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

logger = logging.getLogger("resnet_fused")

FOLDER = "RESNET_FUSED_CACHE"
FILE = "admission.json"
VERSION = 1
KEPT = 256  # verdicts, the newest: edited kernels leave old ones behind
LOCK_SECONDS = 2.0


class Stored(NamedTuple):
    """What is known of one kernel on one GPU.

    Attributes:
        results: configuration -> None where it passed, else why it did not. Configurations that no
            check has reached are absent.
        unfinished: how many self-checks ran out of time before all configurations were reached.
    """

    results: dict[str, str | None]
    unfinished: int = 0


def path() -> Path | None:
    """Where the file lies, or None for a user without a home.

    `RESNET_FUSED_CACHE` names the folder itself; otherwise it is `resnet_fused` in the user's cache
    folder, which on Linux is `XDG_CACHE_HOME`, or `~/.cache`.
    """
    given = os.environ.get(FOLDER)
    if given:
        return Path(given).expanduser() / FILE
    folder = _user_folder()
    return folder / FILE if folder.is_absolute() else None  # "~" where nobody has a home


def _user_folder() -> Path:
    try:
        import platformdirs
    except ImportError:  # gpu-check runs a checkout where nothing was installed
        base = os.environ.get("XDG_CACHE_HOME", "")
        # The XDG specification: a path that is not absolute is ignored.
        return Path(base if os.path.isabs(base) else os.path.expanduser("~/.cache"), "resnet_fused")
    return platformdirs.user_cache_path("resnet_fused", appauthor=False)


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning("%s", message)


def forget_warnings() -> None:
    """Makes every warning be given again."""
    _warn_once.cache_clear()


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("results"), dict):
        return False
    reasons = entry["results"].values()
    return (
        all(reason is None or isinstance(reason, str) for reason in reasons)
        and isinstance(entry.get("unfinished"), int)
        and isinstance(entry.get("when"), int | float)
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _warn_once(f"{file} can't be read and is ignored: {error}")
        return {}
    if not isinstance(content, dict) or not isinstance(content.get("verdicts"), dict):
        _warn_once(f"{file} holds no verdicts and is ignored; delete it")
        return {}
    if content.get("version") != VERSION:
        logger.info("%s is of another version and is ignored", file)
        return {}
    entries = content["verdicts"]
    sound = {key: entry for key, entry in entries.items() if _is_entry(entry)}
    if len(sound) != len(entries):
        _warn_once(f"{file}: {len(entries) - len(sound)} damaged entries are ignored")
    return sound


def load(key: str) -> Stored | None:
    """What the file says under a key, or None."""
    file = path()
    entry = None if file is None else _read(file).get(key)
    return None if entry is None else Stored(dict(entry["results"]), entry["unfinished"])


def save(key: str, stored: Stored, about: dict[str, Any]) -> None:
    """Adds a verdict to the file; what other processes add at the same time stays.

    Args:
        key: of the kernel, its sources and the GPU.
        stored: the verdict.
        about: the same key for people to read: op, GPU, versions.
    """
    file = path()
    if file is None:
        _warn_once(f"verdicts on kernels are not kept: no home folder; set {FOLDER}")
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _locked(file.with_suffix(".lock")):
            entries = _read(file)
            entries[key] = {**about, **stored._asdict(), "when": round(time.time(), 3)}
            newest = sorted(entries.items(), key=lambda item: item[1]["when"])[-KEPT:]
            _replace(file, {"version": VERSION, "verdicts": dict(newest)})
    except OSError as error:
        _warn_once(
            f"verdicts on kernels are not kept, each process checks again: {error}; "
            f"set {FOLDER} to a folder that can be written"
        )


def _replace(file: Path, content: dict[str, Any]) -> None:
    """Writes a file as a whole: readers see the old one or the new one."""
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(content, stream, indent=1)
        os.replace(name, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Holds a lock between processes, for as long as it takes to read, merge and write.

    Where it can't be had (a file system without locks, no fcntl) the block runs all the same: a
    verdict that is lost is found again, a model that waits for ever is not.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with file.open("a") as stream:
        until = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < until:
                    time.sleep(0.01)
                    continue
                logger.info("%s is held by another process; going on without it", file)
            except OSError as error:
                logger.info("%s can't be locked (%s); going on without it", file, error)
            break
        yield  # closing the file gives the lock back
