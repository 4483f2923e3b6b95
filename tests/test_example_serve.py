"""The example for Ray Data: its two steps here, and the whole where Ray is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import resnet_fused as rf
from resnet_fused.data import crops, photographs, preprocess

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "examples" / "ray_folder.py"
SIZE, CLASSES = 32, 7


@pytest.fixture(scope="module")
def example() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("ray_folder", SCRIPT)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a cifar_resnet20, random; BatchNorm is calibrated, for answers that differ by image."""
    torch.manual_seed(0)
    net = rf.unfuse(rf.models.cifar_resnet20(num_classes=CLASSES))
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        net.train()(crops(16, SIZE))
    file = tmp_path_factory.mktemp("weights") / "w.pth"
    torch.save(net.state_dict(), file)
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Nine images, one in a subfolder; 4.png is cut short, and one name is no UTF-8."""
    made = tmp_path / "images"
    (made / "sub").mkdir(parents=True)
    for i in range(9):
        picture = photographs()[i % 2].rotate(20 * i).resize((60, 50))
        picture.save(made / ("sub" if i == 8 else ".") / f"{i}.png")
    whole = (made / "4.png").read_bytes()
    (made / "4.png").write_bytes(whole[: len(whole) // 2])
    (made / "7.png").rename(made / os.fsdecode(b"7\xe9.png"))
    return made


def paths(folder: Path) -> np.ndarray:
    return np.array([os.fsencode(p) for p in sorted(folder.rglob("*.png"))], object)


@pytest.fixture(scope="module")
def engine(example: ModuleType, weights: Path) -> Any:
    """The actor, as Ray would make it."""
    return example.Predict("rf:cifar_resnet20", str(weights), 3, 4, SIZE, "float32")


def expected(folder: Path, weights: Path) -> dict[str, torch.Tensor]:
    """Probabilities by PyTorch's modules and this package's own preprocessing."""
    net = rf.unfuse(rf.models.cifar_resnet20(num_classes=CLASSES)).eval()
    net.load_state_dict(torch.load(weights))
    found = {}
    for file in folder.rglob("*.png"):
        if file.name == "4.png":
            continue
        with Image.open(file) as image, torch.inference_mode():
            x = preprocess(image.convert("RGB"), SIZE)[None]
            found[example_name(file)] = net(x)[0].softmax(0)
    return found


def example_name(file: Path) -> str:
    return os.fsencode(file).decode("utf-8", "backslashreplace")


def check(rows: list[dict[str, Any]], folder: Path, weights: Path, topk: int) -> None:
    """Every image has its classes, with the right numbers, and the broken one its error."""
    truth = expected(folder, weights)
    broken = [row for row in rows if row["error"]]
    assert [Path(row["image"]).name for row in broken] == ["4.png"]
    assert "is corrupt or cut short" in broken[0]["error"]
    good = [row for row in rows if not row["error"]]
    assert {row["image"] for row in good} == truth.keys() and len(good) == topk * len(truth)
    for row in good:
        assert row["label"] == f"class {row['index']}"
        assert row["probability"] == pytest.approx(
            truth[row["image"]][row["index"]].item(), abs=1e-4
        )
    for image, probabilities in truth.items():
        ranked = sorted((row["rank"], row["index"]) for row in good if row["image"] == image)
        assert [rank for rank, _ in ranked] == list(range(1, topk + 1))
        best = probabilities[[index for _, index in ranked]]
        torch.testing.assert_close(best, probabilities.topk(topk).values, rtol=0, atol=1e-4)
    spread = torch.stack(list(truth.values())).std(0).max()
    assert spread > 1e-2  # else an image's numbers could stand for another's


def test_decode_and_predict(example: ModuleType, engine: Any, folder: Path, weights: Path) -> None:
    rows: list[dict[str, Any]] = []
    for part in np.array_split(paths(folder), 3):  # of three rows: fewer than the engine's four
        batch = example.decode({"path": part}, SIZE)
        assert batch["pixels"].shape == (3, SIZE, SIZE, 3) and batch["pixels"].dtype == np.uint8
        batch["pixels"].setflags(write=False)  # as Ray's memory is
        made = engine(batch)
        rows += [dict(zip(made, row, strict=True)) for row in zip(*made.values(), strict=True)]
    check(rows, folder, weights, 3)


def test_a_batch_that_holds_no_image(example: ModuleType, engine: Any, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    made = engine(example.decode({"path": paths(tmp_path)}, SIZE))
    assert list(made["rank"]) == [0] and "is not an image" in made["error"][0]


def test_more_classes_than_there_are(
    example: ModuleType, engine: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "topk", 99)
    made = engine(example.decode({"path": paths(folder)[:1]}, SIZE))
    assert list(made["rank"]) == list(range(1, CLASSES + 1))
    assert sum(made["probability"]) == pytest.approx(1)


def script(*arguments: object) -> subprocess.CompletedProcess[str]:
    # Ray's processes take their modules from where this one has them.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
                   "RAY_USAGE_STATS_ENABLED": "0"}  # fmt: skip
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        capture_output=True, text=True, env=environment, timeout=170,
    )  # fmt: skip


def test_bad_folders_are_refused(
    example: ModuleType, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(example, "run", lambda *_: pytest.fail("Ray was started"))
    (tmp_path / "empty").mkdir()
    for given, said in (
        ([tmp_path / "absent", tmp_path / "out"], "no such file"),
        ([folder, folder], "OUTPUT: '.*images' is there; give an empty or a new folder"),
        ([folder, folder / "1.png"], "OUTPUT: .* is there"),
    ):
        monkeypatch.setattr(sys, "argv", ["ray_folder.py", *map(str, given)])
        with pytest.raises(SystemExit, match=said):
            example.main()
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path / "empty"), str(tmp_path / "out")])
    assert example.main() == 1
    assert "empty' holds no image" in capsys.readouterr().err


def test_paths_hold_in_processes_elsewhere(
    example: ModuleType, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(example, "run", lambda *given: asked.extend(given) or [])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.pth").touch()
    monkeypatch.setattr(sys, "argv", ["x", "images", "out", "--weights", "w.pth"])
    assert example.main() == 0
    found, given = asked
    assert set(found) == set(paths(folder))
    assert (given.weights, given.output) == (str(tmp_path / "w.pth"), str(tmp_path / "out"))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray: requirements/dev")
@pytest.mark.parametrize("form", ["parquet", "json"])
def test_with_ray(folder: Path, weights: Path, tmp_path: Path, form: str) -> None:
    out = tmp_path / "out"
    done = script(folder, out, "--model", "rf:cifar_resnet20", "--weights", weights, "--topk", 2,
                  "--size", SIZE, "--batch-size", 4, "--format", form, "--cpus", 3)  # fmt: skip
    assert done.returncode == 1, done.stderr  # for the one that is broken
    assert "9 images, 1 of them skipped" in done.stdout
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("skipped: ")]
    assert "4.png' is corrupt or cut short" in said
    if form == "json":
        texts = [file.read_text().splitlines() for file in sorted(out.rglob("*.json"))]
        rows = [json.loads(line) for lines in texts for line in lines]
    else:
        rows = importlib.import_module("pyarrow.parquet").read_table(out).to_pylist()
    check(rows, folder, weights, 2)
