"""Checkpoints that are whole or not there: a folder each, written beside its place and renamed.

    checkpoints/step-00000120/model.safetensors    the weights; ema.safetensors their average
                              state.pt             optimizer, scaler, counters: tensors and numbers
                              manifest.json        bytes and SHA-256 of the others, written last

Reading runs no code of a file's: safetensors, and `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("resnet_fused.train")

FOLDER = "checkpoints"
PREFIX = "step-"
MANIFEST = "manifest.json"
MODEL, EMA, STATE = "model.safetensors", "ema.safetensors", "state.pt"
FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; the message names it and says what is wrong."""


@dataclass(frozen=True)
class Checkpoint:
    """What a run goes on from.

    Attributes:
        step: steps that were taken.
        model: state_dict.
        ema: of the weights' average; None where none is kept.
        state: everything else, tensors and plain values.
        path: its folder; None before it is written.
    """

    step: int
    model: Mapping[str, Tensor]
    ema: Mapping[str, Tensor] | None
    state: Mapping[str, Any]
    path: Path | None = None


def save(run: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Writes a checkpoint, then removes all but the last ones.

    Args:
        run: folder of the run.
        checkpoint: tensors anywhere; they are written contiguous, from the CPU.
        keep: how many to keep, at least 1.

    Returns:
        Its folder.

    Raises:
        CheckpointError: the disk is full, or the folder cannot be written. Nothing that was there
            is touched.
    """
    folder = run / FOLDER
    place = folder / f"{PREFIX}{checkpoint.step:08d}"
    temporary = folder / f".{place.name}.{os.getpid()}"
    writers: dict[str, Callable[[Path], None]] = {
        MODEL: lambda file: _save_tensors(checkpoint.model, file),
        STATE: lambda file: torch.save(dict(checkpoint.state), file),
    }
    if checkpoint.ema is not None:
        average = checkpoint.ema
        writers[EMA] = lambda file: _save_tensors(average, file)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        manifest: dict[str, Any] = {"format": FORMAT, "step": checkpoint.step, "files": {}}
        for name, write in writers.items():
            write(temporary / name)
            _sync(temporary / name)
            manifest["files"][name] = _facts(temporary / name)
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        _sync(temporary / MANIFEST)
        _sync(temporary)
        # A folder of this step is from before an interruption, and is the same or broken.
        shutil.rmtree(place, ignore_errors=True)
        os.rename(temporary, place)
        _sync(folder)
    except (OSError, RuntimeError) as error:
        # torch and safetensors turn a full disk into errors of their own.
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"checkpoint: '{place}' cannot be written ({_reason(error)}); {_newest_text(run)}"
        ) from error
    for old in _folders(run)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    for left in folder.glob(f".{PREFIX}*"):
        shutil.rmtree(left, ignore_errors=True)  # of a process that was killed
    return place


def newest(run: Path) -> Checkpoint | None:
    """The last checkpoint of a run that is whole; broken ones are named in the log.

    Args:
        run: folder of the run.

    Raises:
        CheckpointError: there are some, and none of them can be used.
    """
    broken = []
    for folder in _folders(run):
        try:
            return read(folder)
        except CheckpointError as error:
            logger.warning("%s; the one before it is taken", error)
            broken.append(str(error))
    if broken:
        raise CheckpointError(f"{broken[0]}; none of {len(broken)} checkpoints can be used")
    return None


def read(folder: Path) -> Checkpoint:
    """Reads a checkpoint and checks it against its manifest.

    Raises:
        CheckpointError: it is cut short, was changed, or is of another format.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise CheckpointError(
                f"checkpoint: '{folder}' has format {manifest['format']}, known is {FORMAT}"
            )
        for name, facts in manifest["files"].items():
            if _facts(folder / name) != facts:
                raise CheckpointError(
                    f"checkpoint: '{folder / name}' is cut short or was changed: it is not what "
                    "its manifest says"
                )
        from safetensors.torch import load_file

        ema = load_file(folder / EMA) if EMA in manifest["files"] else None
        state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
        return Checkpoint(manifest["step"], load_file(folder / MODEL), ema, state, folder)
    except CheckpointError:
        raise
    except Exception as error:
        # Of a broken file the readers raise nearly anything; all of it means the same here.
        raise CheckpointError(
            f"checkpoint: '{folder}' cannot be read ({_reason(error)})"
        ) from error


def write_weights(path: Path, state: Mapping[str, Tensor]) -> None:
    """Writes a state_dict as safetensors, whole or not at all.

    Raises:
        CheckpointError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        _save_tensors(state, temporary)
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise CheckpointError(f"'{path}' cannot be written ({_reason(error)})") from error


def _save_tensors(state: Mapping[str, Tensor], file: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # safetensors knows neither channels_last nor two names of one tensor.
    plain = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in state.items()
    }
    try:
        save_file(plain, file)
    except SafetensorError as error:
        raise RuntimeError(str(error)) from error


def _folders(run: Path) -> list[Path]:
    """The checkpoints of a run, the newest first."""
    return sorted((run / FOLDER).glob(f"{PREFIX}*"), reverse=True)


def _newest_text(run: Path) -> str:
    left = _folders(run)
    return f"the last one is '{left[0]}'" if left else "there is none"


def _facts(file: Path) -> dict[str, Any]:
    with open(file, "rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}


def _sync(path: Path) -> None:
    """Everything of a file, or a folder's list of names, reaches the disk."""
    with _opened(path) as handle:
        os.fsync(handle)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    handle = os.open(path, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).strip().partition("\n")[0] or type(error).__name__
