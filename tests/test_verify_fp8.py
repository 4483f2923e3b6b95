"""Top classes of an engine in e4m3 beside 16 bits and float32, on digits; the command."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from command import as_json, run
from PIL import Image
from scipy.stats import binomtest
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

import resnet_fused as rf
from resnet_fused.agreement import Agreement, verify_fp8
from resnet_fused.cli import _fp8 as _cli
from resnet_fused.freeze import _fp8

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """scikit-learn's 1,797 scanned digits, 8x8, and what they are."""
    data = load_digits()
    images = torch.from_numpy((data.images - data.images.mean()) / data.images.std())
    return images.float().unsqueeze(1), torch.from_numpy(data.target).long()


@pytest.fixture(scope="module")
def model(digits) -> nn.Module:
    """cifar_resnet20 after six passes over 1,437 of them."""
    torch.manual_seed(0)
    net = rf.models.cifar_resnet20(in_channels=1)
    images, labels = digits[0][:1437], digits[1][:1437]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for _ in range(6):
        for chosen in torch.randperm(len(images)).split(64)[:-1]:
            loss = functional.cross_entropy(net(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net.eval()


@pytest.fixture(scope="module")
def calibration(model, digits) -> rf.Fp8Calibration:
    return rf.calibrate_fp8(model, digits[0][:128])


def test_digits_keep_their_class(model, digits, calibration):
    images, labels = digits[0][1437:], digits[1][1437:]
    with torch.no_grad():
        right = float((model(images).argmax(1) == labels).float().mean())
    assert right > 0.85, "top classes of an untrained network would mean little"
    done: list[int] = []
    found = verify_fp8(model, images.split(100), calibration, required=0.97, progress=done.append)
    assert found.ok and bool(found) and done == [100, 200, 300, 360]
    assert found.layers == 18 and found.implementations == {"reference": 18}
    assert [layer for layer, _ in found.wide] == ["conv1", "fc"]
    names = [(one.first, one.second) for one in found.agreements]
    assert names == [("fp8", "bfloat16"), ("fp8", "float32"), ("bfloat16", "float32")]
    for one in found.agreements:
        assert one.images == 360 and one.share > 0.95
        interval = binomtest(one.same, one.images).proportion_ci(method="exact")
        assert (one.low, one.high) == (interval.low, interval.high)
        assert one.low < one.share <= one.high
    # Each count is that of the engines themselves.
    with torch.inference_mode():
        narrow = rf.freeze(model, images, fp8=calibration)(images)
        exact = model(images)
    same = int((narrow.argmax(1) == exact.argmax(1)).sum())
    assert abs(found.agreements[1].same - same) <= 4
    assert "18 layers in e4m3 (18 by reference), calibrated on 128 images" in str(found)
    assert "of 360 images" in str(found) and found.to_dict()["agreements"][0]["share"] > 0.95


def test_a_fault_fails(model, digits, calibration, monkeypatch):
    layer = _fp8._Rewriting._layer

    def wrong(self, at, step, narrow):
        made = layer(self, at, step, narrow)
        made.tensors["scale"] = made.tensors["scale"].roll(1)
        return made

    monkeypatch.setattr(_fp8._Rewriting, "_layer", wrong)
    found = verify_fp8(model, [digits[0][1437:]], calibration)
    assert not found.ok and found.agreements[2].share > 0.95
    assert found.failures[0].startswith("fp8 has the top class of bfloat16 on ")


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        ([], {}, "batches hold no images"),
        ([torch.randn(0, 1, 8, 8)], {}, "batches hold no images"),
        ([torch.randn(2, 1, 8, 8)], {"dtype": torch.float32}, "dtype is torch.float32; accepted"),
        ([torch.randn(2, 1, 8, 8)], {"required": 1.5}, "required is 1.5; accepted is 0 to 1"),
    ],
)
def test_bad_input_is_named(model, calibration, batches, options, message):
    with pytest.raises(ValueError, match=message):
        verify_fp8(model, batches, calibration, **options)


def test_a_network_without_scores_is_named(calibration, model):
    maps = nn.Sequential(model.conv1, model.bn1, nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16)).eval()
    x = torch.randn(2, 1, 8, 8)
    with pytest.raises(ValueError, match=r"the model gives \(2, 16, 6, 6\); accepted are scores"):
        verify_fp8(maps, [x], rf.calibrate_fp8(maps, x))


def test_ends_of_an_interval():
    one = Agreement("fp8", "bfloat16", 10, 10, 0.69, 1.0)
    assert str(one) == "fp8 as bfloat16: 10 of 10 images, 100.00% (69.00% to 100.00%)"
    assert math.isclose(one.share, 1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Five pictures of the digits 0 to 4, and a file that is none."""
    found = tmp_path_factory.mktemp("pictures")
    for place in range(5):
        pixels = torch.from_numpy(load_digits().images[place] * 15).byte()
        Image.fromarray(pixels.numpy()).convert("RGB").resize((64, 64)).save(found / f"{place}.png")
    (found / "broken.png").write_text("no picture")
    return found


def test_the_command(folder):
    arguments = "verify", "resnet18", "--fp8", "--images", folder, "--batch", 2
    found = as_json(*arguments, "--agreement", 0)
    assert found["fp8"]["ok"] and found["fp8"]["failures"] == []
    assert found["fp8"]["calibrated_on"] == 1 and found["fp8"]["layers"] == 19
    first = found["fp8"]["agreements"][0]
    assert (first["first"], first["second"], first["images"]) == ("fp8", "bfloat16", 4)
    assert 0 <= first["low"] <= first["share"] <= first["high"] <= 1
    assert len(found["skipped"]) == 1 and "broken.png" in found["skipped"][0]
    assert found["timing"] is None


def test_the_command_times_both_engines(folder, monkeypatch, capsys):
    monkeypatch.setattr(_cli, "ROUNDS", 2)
    images = "--images", folder / "0.png", "--images", folder / "1.png"
    record = as_json("verify", "resnet18", "--fp8", "--time", *images, "--batch", 2)
    found = record["timing"]
    assert found["batch"] == 2 and set(found["images_per_s"]) == {"bfloat16", "fp8"}
    for name, rate in found["images_per_s"].items():
        assert len(found["seconds"][name]) == 2
        assert math.isclose(rate, 2 / found["median_s"][name])
    (ratio,) = found["ratios"]
    assert (ratio["baseline"], ratio["variant"]) == ("bfloat16", "fp8")
    assert len(found["verdicts"]) == 1 and "fp8" in found["verdicts"][0]
    _cli.show(record)
    said = capsys.readouterr().out
    assert "batch 2: " in said and " images/s in fp8" in said and found["verdicts"][0] in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--fp8",), "--fp8: give the --images to compare on"),
        (("--fp8", "--images", "/no/such"), "no such file: '/no/such'"),
        (("--fp8", "--output", "build", "--images", "."), "--output: not with --fp8"),
    ],
)
def test_the_command_names_what_is_wrong(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in run("verify", "resnet18", *arguments, code=2).stderr


def test_the_command_needs_two_images(folder):
    done = run("verify", "resnet18", "--fp8", "--images", folder / "0.png", code=2)
    assert "--fp8 needs two images or more, one to calibrate on" in done.stderr
