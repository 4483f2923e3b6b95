"""Checkpoints: whole or not there, the last ones kept, broken ones passed over."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys

import pytest
import torch

from resnet_fused.train import checkpoint
from resnet_fused.train.checkpoint import Checkpoint, CheckpointError


def some(step: int, *, ema: bool = False) -> Checkpoint:
    model = {"weight": torch.full((2, 3, 4, 4), float(step)).to(memory_format=torch.channels_last)}
    return Checkpoint(
        step,
        model,
        {"weight": model["weight"] / 2} if ema else None,
        {"optimizer": {"state": {0: torch.arange(step)}}, "counters": {"sums": [[1.5, 2.0]]}},
    )


def steps(run):
    return [checkpoint.read(folder).step for folder in checkpoint._folders(run)]


def test_what_is_saved_comes_back(tmp_path):
    checkpoint.save(tmp_path, some(3, ema=True), keep=2)
    found = checkpoint.newest(tmp_path)
    assert found.step == 3
    assert torch.equal(found.model["weight"], some(3).model["weight"])
    assert torch.equal(found.ema["weight"], torch.full((2, 3, 4, 4), 1.5))
    assert found.state["counters"] == {"sums": [[1.5, 2.0]]}
    assert torch.equal(found.state["optimizer"]["state"][0], torch.arange(3))
    assert checkpoint.newest(tmp_path / "none") is None


def test_only_the_last_ones_are_kept_and_nothing_half_written(tmp_path):
    left = tmp_path / checkpoint.FOLDER / f".{checkpoint.PREFIX}00000001.77"
    left.mkdir(parents=True)
    for step in (1, 2, 3, 4, 10):
        checkpoint.save(tmp_path, some(step), keep=3)
    assert steps(tmp_path) == [10, 4, 3]
    assert not left.exists()
    assert all(not path.name.startswith(".") for path in (tmp_path / checkpoint.FOLDER).iterdir())


@pytest.mark.parametrize("name", [checkpoint.MODEL, checkpoint.STATE, checkpoint.MANIFEST])
@pytest.mark.parametrize("harm", ["cut", "changed", "gone"])
def test_a_broken_one_is_named_and_the_one_before_it_taken(tmp_path, caplog, name, harm):
    for step in (1, 2):
        checkpoint.save(tmp_path, some(step), keep=3)
    file = tmp_path / checkpoint.FOLDER / f"{checkpoint.PREFIX}00000002" / name
    content = file.read_bytes()
    if harm == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif harm == "changed":
        middle = len(content) // 2
        file.write_bytes(content[:middle] + b"\x00\xff\x00\xff" + content[middle + 4 :])
    else:
        file.unlink()
    with caplog.at_level(logging.WARNING):
        assert checkpoint.newest(tmp_path).step == 1
    assert f"{checkpoint.PREFIX}00000002" in caplog.text
    assert "the one before it is taken" in caplog.text


def test_when_all_are_broken_it_says_so(tmp_path):
    checkpoint.save(tmp_path, some(1), keep=3)
    (checkpoint._folders(tmp_path)[0] / checkpoint.MODEL).write_bytes(b"")
    with pytest.raises(CheckpointError, match="none of 1 checkpoints can be used"):
        checkpoint.newest(tmp_path)


def test_one_of_another_format_is_refused(tmp_path):
    checkpoint.save(tmp_path, some(1), keep=3)
    file = checkpoint._folders(tmp_path)[0] / checkpoint.MANIFEST
    manifest = json.loads(file.read_text())
    file.write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(CheckpointError, match="format 99, known is 1"):
        checkpoint.read(file.parent)


def test_a_file_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    checkpoint.save(tmp_path, some(1), keep=3)
    folder = checkpoint._folders(tmp_path)[0]
    torch.save({"counters": Evil()}, folder / checkpoint.STATE)
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    manifest["files"][checkpoint.STATE] = checkpoint._facts(folder / checkpoint.STATE)
    (folder / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.read(folder)
    assert not (tmp_path / "ran").exists()


FULL = """
import resource, signal, sys, torch
from pathlib import Path
from resnet_fused.train import checkpoint
run = Path(sys.argv[1])
checkpoint.save(run, checkpoint.Checkpoint(1, {"w": torch.ones(10)}, None, {"a": 1}), 3)
# A file may grow no further than this, as on a disk that is full.
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
big = torch.ones(1_000_000)
where = sys.argv[2]
made = checkpoint.Checkpoint(
    2, {"w": big if where == "model" else big[:9]}, None, {"a": big if where == "state" else 1}
)
try:
    checkpoint.save(run, made, 1)
except checkpoint.CheckpointError as error:
    print(error)
else:
    sys.exit("it was saved")
"""


@pytest.mark.parametrize("where", ["model", "state"])
def test_a_full_disk_costs_nothing_that_was_there(tmp_path, where):
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path), where], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "cannot be written" in done.stdout
    assert f"the last one is '{tmp_path / checkpoint.FOLDER / 'step-00000001'}'" in done.stdout
    assert steps(tmp_path) == [1]
    assert [path.name for path in (tmp_path / checkpoint.FOLDER).iterdir()] == ["step-00000001"]


def test_weights_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    from safetensors.torch import load_file

    file = tmp_path / "model.safetensors"
    checkpoint.write_weights(file, {"w": torch.ones(3)})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_sync", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        checkpoint.write_weights(file, {"w": torch.zeros(3)})
    assert torch.equal(load_file(file)["w"], torch.ones(3))
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    shutil.rmtree(tmp_path / "gone", ignore_errors=True)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="cannot be written"):
        checkpoint.write_weights(tmp_path / "gone" / "model.safetensors", {"w": torch.ones(3)})
