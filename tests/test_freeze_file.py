"""Saved engines: what comes back, and what is refused."""

from __future__ import annotations

import copy
import json
import logging
import os
import pickle

import pytest
import torch
from nets import images, tiny_resnet
from torch import nn
from torchvision.models import resnet as tv

import resnet_fused as rf
from resnet_fused.freeze import _file

X = images()


@pytest.fixture(scope="module")
def engine() -> rf.Engine:
    torch.manual_seed(0)
    return rf.freeze(tiny_resnet(tv.BasicBlock), X, max_shapes=3)


def scores(engine: rf.Engine, x: torch.Tensor = X) -> torch.Tensor:
    with torch.inference_mode():
        return engine(x)


def changed(path, change) -> None:
    """Rewrites a file's text, with a hash that fits."""
    saved = torch.load(path, weights_only=True)
    plain = json.loads(saved["text"])
    change(plain, saved["tensors"])
    saved["text"] = json.dumps(plain)
    saved["hash"] = _file._digest(saved["text"], saved["tensors"])
    torch.save(saved, path)


def test_it_comes_back_the_same(engine, tmp_path):
    path = tmp_path / "engine.rf"
    engine.save(path)
    for loaded in (rf.load_engine(path), rf.Engine.load(str(path), device="cpu")):
        assert torch.equal(scores(loaded), scores(engine))
        assert loaded.report().notes == engine.report().notes
        assert repr(loaded) == repr(engine)
    assert [p.name for p in tmp_path.iterdir()] == ["engine.rf"]
    mode = os.umask(0)
    os.umask(mode)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mode


def test_what_a_function_computes_comes_back(tmp_path):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)

        def forward(self, x):
            y = torch.sigmoid(self.bn(self.conv(x)))
            return {"maps": y[:, 1:3, ...], "mean": (y.mean((2, 3)).to(torch.float64), x.shape[0])}

    engine = rf.freeze(Net().eval(), X)
    engine.save(tmp_path / "e")
    found, expected = scores(rf.load_engine(tmp_path / "e")), scores(engine)
    assert torch.equal(found["maps"], expected["maps"])
    assert torch.equal(found["mean"][0], expected["mean"][0]) and found["mean"][1] == len(X)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))])
def test_copies_and_pickles(engine, make):
    other = make(engine)
    assert other is not engine and torch.equal(scores(other), scores(engine))


@pytest.mark.parametrize(
    ("name", "value"), [("torch", "1.0"), ("architecture", "AVX9000"), ("resnet_fused", "99")]
)
def test_another_library_or_machine_means_a_rebuild(engine, tmp_path, caplog, name, value):
    path = tmp_path / "e"
    engine.save(path)
    changed(path, lambda plain, _: plain["made_with"].update({name: value}))
    with caplog.at_level(logging.INFO, "resnet_fused"):
        loaded = rf.load_engine(path)
    assert "built anew" in caplog.text and value in caplog.text
    assert torch.equal(scores(loaded), scores(engine))


def test_an_engine_of_a_gpu(engine, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("what is said where there is no GPU")
    path = tmp_path / "e"
    engine.save(path)
    changed(path, lambda plain, _: plain["made_with"].update(device="cuda", architecture="sm_90"))
    with pytest.raises(ValueError, match="made for cuda, and no GPU is here; give device='cpu'"):
        rf.load_engine(path)
    assert torch.equal(scores(rf.load_engine(path, device="cpu")), scores(engine))


def refusal(path) -> str | None:
    try:
        rf.load_engine(path)
    except ValueError as error:
        return str(error)
    return None


def test_a_damaged_file_is_refused_wherever_the_damage_is(engine, tmp_path):
    path = tmp_path / "e"
    engine.save(path)
    good = path.read_bytes()
    refused = 0
    for place in range(64, len(good), len(good) // 23):
        bad = bytearray(good)
        bad[place] ^= 0x10
        path.write_bytes(bytes(bad))
        message = refusal(path)
        if message is None:  # padding between the parts of the archive
            assert torch.equal(scores(rf.load_engine(path)), scores(engine)), place
        else:
            refused += 1
            assert "damaged" in message or "no saved engine" in message, message
    assert refused > 15
    for length in (0, 10, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(ValueError, match="no saved engine, or damaged"):
            rf.load_engine(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, t: p.update(version=2), "version 2"),
        (lambda p, t: p["steps"][-2].update(target="function os.system"), "os.system"),
        (lambda p, t: p["steps"][-2].update(target="method __reduce__"), "__reduce__"),
        (lambda p, t: p.update(dtype="load"), "torch.load"),
        (lambda p, t: p["steps"][0].update(kind="run"), "not known here: run"),
    ],
)
def test_a_file_that_names_what_it_may_not(engine, tmp_path, change, message):
    path = tmp_path / "e"
    engine.save(path)
    changed(path, change)
    with pytest.raises(ValueError, match=message):
        rf.load_engine(path)


def test_other_files(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(tiny_resnet(tv.BasicBlock).state_dict(), path)
    with pytest.raises(ValueError, match=r"no saved engine; accepted is what Engine\.save"):
        rf.load_engine(path)
    torch.save(nn.Linear(2, 2), path)
    with pytest.raises(ValueError, match="no saved engine, or damaged"):
        rf.load_engine(path)
    with pytest.raises(FileNotFoundError):
        rf.load_engine(tmp_path / "none")


def test_code_is_not_saved_and_nothing_is_written(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4)).eval()
    with pytest.raises(ValueError, match=r"save: 2 runs as a module \(a GroupNorm is called"):
        rf.freeze(model, X).save(tmp_path / "e")
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_the_old_file(engine, tmp_path, monkeypatch):
    path = tmp_path / "e"
    engine.save(path)
    good = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        engine.save(path)
    assert path.read_bytes() == good and [p.name for p in tmp_path.iterdir()] == ["e"]


def test_images_of_bytes_come_back(tmp_path):
    norm = rf.ops.stem_input_norm([0.4] * 3, [0.2] * 3)
    x = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    engine = rf.freeze(tiny_resnet(tv.BasicBlock), x, input_norm=norm)
    engine.save(tmp_path / "e")
    loaded = rf.load_engine(tmp_path / "e")
    assert torch.equal(scores(loaded, x), scores(engine, x)) and loaded.dtype == torch.float32
