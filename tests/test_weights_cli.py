"""`--weights FILE` of the commands, with files that bring a preprocessing and strides of their own.

The network is small: what builds one by name is replaced.
"""

from __future__ import annotations

import importlib
import pickle
from pathlib import Path

import pytest
import torch
import train_runs as runs
import weight_files as files
from command import as_json, run
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as F

from resnet_fused.bench import networks
from resnet_fused.cli import _models
from resnet_fused.data import as_pixels, images
from resnet_fused.train import views

LAYERS = [
    # Logits of a size at which a softmax still has more than one class.
    layer._replace(blobs=tuple(blob / 2000 for blob in layer.blobs))
    if layer.type == "InnerProduct"
    else layer
    for layer in files.caffe_layers()
]
MODEL = "resnet50"
# The package has the command by that name.
subjects = importlib.import_module("resnet_fused.cli._subjects")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "build", lambda name, **_: files.network())


@pytest.fixture
def caffemodel(tmp_path: Path) -> Path:
    return files.write(tmp_path, "n.caffemodel", files.by_hand(LAYERS).raw)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    noise = files.images(1, 300)[0, :, :, :260]
    Image.fromarray(noise.permute(1, 2, 0).numpy()).save(tmp_path / "noise.png")
    return tmp_path / "noise.png"


def centre(picture: Path) -> Tensor:
    """uint8 [1, 3, 224, 224]."""
    image = Image.open(picture)
    return F.pil_to_tensor(images.crop(image))[None]


def test_predict_prepares_images_as_caffe_did(caffemodel: Path, picture: Path) -> None:
    found = as_json("predict", picture, "--model", MODEL, "--weights", caffemodel)
    expected = files.caffe_forward(LAYERS, centre(picture))[0].softmax(0)
    assert expected.max() < 0.99
    assert found["weights"] == f"from '{caffemodel}' (caffe, v1)"
    assert [entry["index"] for entry in found["predictions"]] == expected.argsort(
        descending=True
    ).tolist()
    for entry in found["predictions"]:
        assert entry["probability"] == pytest.approx(expected[entry["index"]].item(), rel=1e-3)


def test_the_transform_is_the_preset_with_another_mean(caffemodel: Path, picture: Path) -> None:
    network = _models.load(MODEL, str(caffemodel))
    image = Image.open(picture)
    expected = centre(picture)[0].double() - torch.tensor(files.MEAN_BGR[::-1]).view(3, 1, 1)
    torch.testing.assert_close(network.transform(image).double(), expected, rtol=0, atol=1e-3)
    # Taken apart it is the same: bytes, and a normalisation for the first kernel.
    pixels = as_pixels(network.transform)
    assert pixels is not None
    assert torch.equal(pixels(image), centre(picture)[0])
    scale, shift = pixels.input_norm
    torch.testing.assert_close(scale, torch.ones(3))
    torch.testing.assert_close(shift, -torch.tensor(files.MEAN_BGR[::-1]))


@pytest.mark.parametrize("form", ["caffe", "detectron"])
def test_evaluate_prepares_images_so_too(tmp_path: Path, caffemodel: Path, form: str) -> None:
    file, mean = caffemodel, files.MEAN_BGR
    if form == "detectron":
        mean = files.DETECTRON_MEAN_BGR
        file = files.write(tmp_path, "R.pkl", pickle.dumps(files.detectron_blobs()))
    names = tuple("abcde")
    folder = runs.picture_folder(tmp_path / "data", names, 1)
    options = {
        "model": MODEL, "weights": str(file), "data": f"imagefolder:{folder}", "size": 32,
        "resize": 32, "download": False, "as_json": True,
    }  # fmt: skip
    subject = subjects._named(options)
    assert subject.mean == pytest.approx([value / 255 for value in mean[::-1]])
    assert subject.std == pytest.approx([1 / 255] * 3)
    # What the network is given, byte for byte, and what Caffe makes of it.
    x = files.images(3, 32)
    looks = views.Views(32, 32)
    forward = views.View(
        subject.model, looks, subject.channels, subject.mean, subject.std, torch.device("cpu")
    )
    expected = files.caffe_forward(LAYERS if form == "caffe" else files.caffe_layers(), x, mean)
    scale = expected.abs().max().item()
    torch.testing.assert_close(forward(x).double(), expected, rtol=1e-4, atol=1e-5 * scale)
    record = as_json("evaluate", MODEL, "--weights", file, "--data", f"imagefolder:{folder}",
                     "--size", 32, "--resize", 32)  # fmt: skip
    assert record["weights"] == f"from '{file}' ({form}, v1)"
    assert len(record["classes"]) == len(names)


def test_verify_takes_them(caffemodel: Path, picture: Path) -> None:
    found = as_json("verify", MODEL, "--weights", caffemodel, "--images", picture, "--size", 64,
                    "--batch", 1)  # fmt: skip
    assert found["verification"]["ok"]
    assert found["calibration"] is None


def test_train_refuses_images_that_it_would_not_make(caffemodel: Path, tmp_path: Path) -> None:
    folder = runs.picture_folder(tmp_path / "data", tuple("abcde"), 1)
    result = run(
        "train", MODEL, "--data", f"imagefolder:{folder}", "--weights", caffemodel, "--output",
        tmp_path / "run", "--batch-size", 4, code=2,
    )  # fmt: skip
    assert "is for images as caffe prepared them" in result.stderr
    assert not (tmp_path / "run").exists()


def test_errors_are_one_line(tmp_path: Path, caffemodel: Path, picture: Path) -> None:
    def said(file: Path) -> str:
        result = run("predict", picture, "--model", MODEL, "--weights", file, code=2)
        (line,) = result.stderr.splitlines()
        assert line.startswith("error: --weights: ")
        return line

    cut = files.write(tmp_path, "cut.caffemodel", caffemodel.read_bytes()[:5000])
    assert "is corrupt or no file of weights (protobuf: " in said(cut)
    less = files.write(tmp_path, "less.caffemodel", files.by_hand(LAYERS[:-1]).raw)
    line = said(less)
    assert "is not a state_dict of resnet50 (2 tensors are missing: fc.weight, fc.bias)" in line
    assert "is an HDF5 file" in said(files.write(tmp_path, "n.caffemodel.h5", b"\x89HDF\r\n\x1a\n"))
    evil = files.write(tmp_path, "evil.pkl", pickle.dumps({"blobs": {"conv1_w": print}}))
    assert "is refused: it asks for builtins.print" in said(evil)
    assert "no such file" in said(tmp_path / "absent.caffemodel")
