"""Shared by the tests of admission: a machine without records, and kernels that are stand-ins."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import standins

from resnet_fused import _selfcheck, _verdicts, admission


@pytest.fixture(autouse=True, name="calls")
def clean_machine(tmp_path, monkeypatch):
    """A machine without records; the file gets one line for each configuration that runs."""
    file = tmp_path / "calls"
    file.touch()
    monkeypatch.setenv(standins.CALLS, str(file))
    monkeypatch.setenv(_verdicts.FOLDER, str(tmp_path / "cache"))
    monkeypatch.setenv(_selfcheck.SECONDS, "20")
    monkeypatch.setattr(admission, "SHIPPED", tmp_path / "admitted.json")
    admission.SHIPPED.write_text('{"version": 1, "records": []}')
    monkeypatch.setattr(admission, "_kernels", {})
    (tmp_path / "kernel.py").write_text("# version 1")
    admission.forget()
    yield file
    admission.forget()


def ran(calls: Path) -> list[str]:
    return [line.split()[0] for line in calls.read_text().splitlines()]


def enter(calls: Path, *configurations: str, **changes) -> admission.Kernel:
    options = {
        "op": "standin", "implementation": "triton", "sources": (str(calls.parent / "kernel.py"),),
        "configurations": lambda: configurations, "check": "standins:check",
    }  # fmt: skip
    kernel = admission.Kernel(**{**options, **changes})
    admission.register(kernel)
    return kernel


def ask() -> admission.Verdict:
    return admission.verdict("standin", "triton", "cpu")


def ask_in_another_process() -> admission.Verdict:
    """What a later process finds: everything in memory is forgotten."""
    admission.forget()
    return ask()


def cache() -> Path:
    path = admission.cache_path()
    assert path is not None
    return path


def warnings(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
