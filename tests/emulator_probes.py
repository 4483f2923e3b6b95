"""The probes of tests/emulator: tiny kernels with one hazard, or one known cost, each.

A mark behind a line of theirs (`// <- name`) is what an error must name.
"""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from types import ModuleType
from typing import Any

import emulated
import pytest

FOLDER = Path(__file__).resolve().parent / "emulator"
ASYNCHRONY = {"eager": 0, "lazy": 1, "random": 2}
ORDER = {"forward": 0, "reverse": 1, "shuffled": 2}
SCHEDULES = list(itertools.product(ASYNCHRONY.values(), ORDER.values()))


def load() -> ModuleType:
    """The module of probes, as tools/emulated.py has built it."""
    path = emulated.builder.output("_probes")
    if not path.is_file():
        pytest.fail(f"{path} is missing: run tools/emulated.py")
    spec = importlib.util.spec_from_file_location("_probes", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def marked(name: str) -> tuple[str, int]:
    """The file and line that carry a mark, of which there must be one alone."""
    found = [
        (path.name, number)
        for path in sorted(FOLDER.glob("*.cpp"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if line.endswith(f"// <- {name}")
    ]
    assert len(found) == 1, f"marked '{name}': {found or 'no line'}"
    return found[0]


def error_of(probes: ModuleType, name: str, **settings: Any) -> Any:
    """The error of a probe, which must have one."""
    with pytest.raises(probes.Error) as raised:
        probes.run(name, **settings)
    return raised.value


def noticed(probes: ModuleType, name: str, **settings: Any) -> str | None:
    """The kind of a probe's error, if it has one."""
    try:
        probes.run(name, **settings)
    except probes.Error as error:
        return error.kind
    return None


def plantable(probes: ModuleType, name: str, **settings: Any) -> list[tuple[str, int, str, str]]:
    """Every fault of every site that a clean run reaches."""
    sites = probes.run(name, **settings)["sites"]
    return [(s["file"], s["line"], s["instruction"], f) for s in sites for f in s["faults"]]
