"""What tuning found on this user's GPUs: configurations that beat the chooser's picks.

`resnet-fused tune` measures and keeps; the choosers of configurations ask `find` before they
predict. An entry holds for one GPU with its driver, torch and Triton, and for the sources of the
kernel that was measured: any other is passed over, and gone with the next tuning. Nothing here may
stop a model from running: a file that can't be read costs one warning.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import _platform, _verdicts, admission

FILE = "tuned.json"
VERSION = 1
KEPT = 4096  # entries, the newest

Key = tuple[Any, ...]
"""(implementation, op, dtype, x's shape, weight's shape, stride, padding, dilation, groups, third);
see `key`."""
KEY_LENGTH = 10


class Tuned(NamedTuple):
    """What a convolution takes in place of the chooser's pick.

    Attributes:
        configuration: its name, "128x64_4w4s".
        splits: parts of the reduction.
        gain: how many times faster than the pick, the median.
        low, high: the interval of the gain at 95%.
        before: the pick's name.
    """

    configuration: str
    splits: int
    gain: float
    low: float
    high: float
    before: str

    @property
    def why(self) -> str:
        """For `explain`."""
        return f"{self.configuration}/{self.splits}: tuned on this GPU: {self.gain:.2f}x"


_FIELDS: dict[str, type | tuple[type, ...]] = {
    "configuration": str, "splits": int, "gain": (int, float), "low": (int, float),
    "high": (int, float), "before": str,
}  # fmt: skip
_tables: dict[_platform.Device, dict[Key, Tuned]] = {}


def key(
    implementation: str,
    op: str,
    dtype: torch.dtype,
    x: Sequence[int],
    weight: Sequence[int],
    geometry: Sequence[Any],
    third: bool,
) -> Key:
    """What an entry is found by.

    Args:
        implementation: "triton" or "cuda".
        op: a convolution's, "conv_bn_act".
        dtype: of the activations.
        x: shape of the input or its gradient, [N, C, H, W].
        weight: shape of the weights or their gradient, [K, C/groups, R, S].
        geometry: stride, padding, dilation, groups; `ops._tuned_calls` says what else stands
            there for ops that are no convolution.
        third: whether there is a residual (conv_bn_act), a BatchNorm below (conv_bn_stats), or the
            result or raw output y (the gradients' ops).
    """
    pairs = (tuple(pair) for pair in geometry[:3])
    name = str(dtype).removeprefix("torch.")
    return implementation, op, name, tuple(x), tuple(weight), *pairs, geometry[3], third


def find(
    implementation: str,
    device: torch.device,
    op: str,
    dtype: torch.dtype,
    x: Sequence[int],
    weight: Sequence[int],
    geometry: Sequence[Any],
    third: bool,
) -> Tuned | None:
    """What tuning found for a call on a device, or None; the arguments are those of `key`."""
    table = _table(device)
    if not table:
        return None
    try:
        return table.get(key(implementation, op, dtype, x, weight, geometry, third))
    except TypeError:  # sizes that are symbols, while something is traced
        return None


def _table(device: torch.device) -> dict[Key, Tuned]:
    """The entries that hold on a device, read once."""
    if device.type == "cuda":
        place: _platform.Device = (
            _platform.current_device() if device.index is None else device.index
        )
    elif device.type == "cpu":  # Triton's interpreter
        place = "cpu"
    else:
        return {}
    found = _tables.get(place)
    if found is None:
        found = _tables[place] = load(place)
    return found


def forget() -> None:
    """Makes the next lookup read the file again."""
    _tables.clear()


def path() -> Path | None:
    """Where the file lies, beside admission's; None for a user without a home."""
    beside = _verdicts.path()
    return None if beside is None else beside.with_name(FILE)


def load(device: _platform.Device) -> dict[Key, Tuned]:
    """The entries of the user's file that hold on a device with the present kernels."""
    file = path()
    entries = {} if file is None else _read(file)
    if not entries:
        return {}
    gpu, hashes = _gpu(device), _hashes()
    return {
        _key_of(entry): Tuned(*(entry[name] for name in _FIELDS))
        for entry in entries.values()
        if entry["gpu"] == gpu and _present(entry, hashes)
    }


def save(device: _platform.Device, found: Iterable[tuple[Key, Tuned]]) -> None:
    """Adds entries to the file; those of changed kernels on this GPU go.

    Args:
        device: the index of the GPU that was tuned.
        found: the entries.

    Raises:
        OSError: the file can't be written, or the user has no home for it.
    """
    file = path()
    if file is None:
        raise OSError(f"no home folder; set {_verdicts.FOLDER} to a folder that can be written")
    gpu, hashes, now = _gpu(device), _hashes(), round(time.time(), 3)
    file.parent.mkdir(parents=True, exist_ok=True)
    with _verdicts._locked(file.with_suffix(".lock")):
        entries = {
            name: entry
            for name, entry in _read(file).items()
            if entry["gpu"] != gpu or _present(entry, hashes)
        }
        for one, tuned in found:
            entry = {
                "key": _plain(one), **tuned._asdict(), "gpu": gpu,
                "hash": hashes.get((one[1], one[0])), "when": now,
            }  # fmt: skip
            entries[_name(entry)] = entry
        newest = sorted(entries.items(), key=lambda item: item[1]["when"])[-KEPT:]
        _verdicts._replace(file, {"version": VERSION, "tuned": dict(newest)})
    forget()


def drop(device: _platform.Device, keys: Iterable[Key]) -> None:
    """Takes entries of a GPU out of the file: what was measured again and did not win.

    Raises:
        OSError: the file can't be written.
    """
    file = path()
    if file is None or not file.exists():
        return
    gpu = _gpu(device)
    gone = {_name({"key": _plain(one), "gpu": gpu}) for one in keys}
    with _verdicts._locked(file.with_suffix(".lock")):
        entries = _read(file)
        if gone & entries.keys():
            left = {name: entry for name, entry in entries.items() if name not in gone}
            _verdicts._replace(file, {"version": VERSION, "tuned": left})
    forget()


def remove(*, really: bool = True) -> int:
    """Removes the file; returns how many entries it held, of all GPUs.

    Args:
        really: False counts only.

    Raises:
        OSError: the file can't be removed.
    """
    file = path()
    if file is None or not file.exists():
        return 0
    count = len(_read(file))
    if really:
        file.unlink()
        forget()
    return count


def _gpu(device: _platform.Device) -> dict[str, Any]:
    return _platform.identify(device)._asdict()


def _hashes() -> dict[tuple[str, str], str]:
    """(op, implementation) -> hash of the kernel's sources; kernels without sources are absent."""
    found = {}
    for kernel in admission.kernels():
        try:
            found[kernel.op, kernel.implementation] = admission.source_hash(kernel)
        except OSError:  # no extension
            continue
    return found


def _present(entry: dict[str, Any], hashes: dict[tuple[str, str], str]) -> bool:
    implementation, op = entry["key"][:2]
    return entry["hash"] is not None and hashes.get((op, implementation)) == entry["hash"]


def _plain(one: Key) -> list[Any]:
    return [list(part) if isinstance(part, tuple) else part for part in one]


def _key_of(entry: dict[str, Any]) -> Key:
    return tuple(tuple(part) if isinstance(part, list) else part for part in entry["key"])


def _name(entry: dict[str, Any]) -> str:
    parts = json.dumps([entry["key"], entry["gpu"]], sort_keys=True)
    return hashlib.sha256(parts.encode()).hexdigest()


def _read(file: Path) -> dict[str, dict[str, Any]]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _verdicts._warn_once(f"{file} can't be read and is ignored: {error}")
        return {}
    entries = content.get("tuned") if isinstance(content, dict) else None
    if not isinstance(entries, dict) or content.get("version") != VERSION:
        _verdicts._warn_once(f"{file} is no file of this version's tuning and is ignored")
        return {}
    sound = {name: entry for name, entry in entries.items() if _is_entry(entry)}
    if len(sound) != len(entries):
        _verdicts._warn_once(f"{file}: {len(entries) - len(sound)} damaged entries are ignored")
    return sound


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("gpu"), dict):
        return False
    one = entry.get("key")
    if not isinstance(one, list) or len(one) != KEY_LENGTH or "hash" not in entry:
        return False
    return isinstance(entry.get("when"), (int, float)) and all(
        isinstance(entry.get(name), kind) for name, kind in _FIELDS.items()
    )
