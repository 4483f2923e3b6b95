"""What `make conformance` builds for a GPU, by an nvcc that stands in."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import emulated
import pytest

sys.path.append(str(emulated.TOOLS))
import conformance

ROOT = emulated.TOOLS.parent
# Says its version, notes how it was called, and makes what -o names.
STAND_IN = """#!/bin/sh
[ "$1" = --version ] && echo "V13.0.88" && exit
echo "$*" >>{calls}
for to; do :; done
echo made >"$to"
"""


def test_the_program_is_built_once_for_each_state_of_the_sources(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    root, calls, nvcc = tmp_path / "root", tmp_path / "calls", tmp_path / "nvcc"
    for room in ("driver", "launch", "ptx"):
        shutil.copytree(ROOT / "csrc" / room, root / "csrc" / room)
    nvcc.write_text(STAND_IN.format(calls=calls))
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDACXX", str(nvcc))
    monkeypatch.delenv("RESNET_FUSED_NO_CUDA", raising=False)
    monkeypatch.setattr(conformance, "ROOT", root)
    first = conformance.build_for("90a")
    asked = calls.read_text()
    assert first.is_file()
    assert "arch=compute_90a,code=sm_90a" in asked and "conformance_wgmma.cu" in asked
    assert conformance.build_for("90a") == first and calls.read_text() == asked
    assert conformance.build_for("80") != first
    with (root / "csrc" / "ptx" / "tma.h").open("a") as header:
        header.write("\n")
    assert conformance.build_for("90a") != first
