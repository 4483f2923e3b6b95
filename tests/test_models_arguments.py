"""The arguments of rf.models' factories: trained weights, and bad input."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import resnet_fused as rf

torchvision = pytest.importorskip("torchvision", reason="the weights are torchvision's")

NAMES = [name for name, row in rf.models.ARCHITECTURES.items() if row.weights]


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Answers torchvision's downloads with a state_dict of its own ResNet-18; records them."""
    seen: list[tuple[str, dict[str, Any]]] = []

    def download(url: str, **options: Any) -> dict[str, Tensor]:
        seen.append((url, options))
        torch.manual_seed(5)
        return torchvision.models.resnet18().state_dict()

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    return seen


@pytest.mark.parametrize(
    "weights",
    [
        "DEFAULT",
        "IMAGENET1K_V1",
        "ResNet18_Weights.DEFAULT",
        torchvision.models.ResNet18_Weights.DEFAULT,
    ],
    ids=str,
)
def test_weights_come_from_torchvision(weights: Any, downloads: list[Any]) -> None:
    ours = rf.models.resnet18(weights=weights, progress=False)
    theirs = torchvision.models.resnet18(weights=weights, progress=False)
    assert downloads[0] == downloads[1]  # the same address, checked against the same hash
    assert downloads[0][1] == {"progress": False, "check_hash": True}
    assert downloads[0][0].startswith("https://download.pytorch.org/models/resnet18")
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key


@pytest.mark.parametrize("name", NAMES)
def test_weights_enum_is_that_of_torchvision(name: str) -> None:
    assert rf.models.get_model_weights(name) is torchvision.models.get_model_weights(name)


@pytest.mark.parametrize("name", NAMES)
def test_unknown_weights_name_lists_the_accepted_ones(name: str, downloads: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"weights: .*'IMAGENET_V9'.*accepted") as caught:
        rf.models.get_model(name, weights="IMAGENET_V9")
    for accepted in torchvision.models.get_model_weights(name).__members__:
        assert repr(accepted) in str(caught.value)
    assert not downloads


def test_weights_of_another_network_or_type(downloads: list[Any]) -> None:
    other = torchvision.models.ResNet50_Weights.DEFAULT
    with pytest.raises(
        TypeError, match=r"weights: resnet18 got ResNet50_Weights.*ResNet18_Weights"
    ):
        rf.models.resnet18(weights=other)
    with pytest.raises(ValueError, match=r"weights: .*'ResNet50_Weights.DEFAULT'"):
        rf.models.resnet18(weights="ResNet50_Weights.DEFAULT")
    with pytest.raises(TypeError, match="weights: resnet18 got True"):
        rf.models.resnet18(weights=True)
    assert not downloads


def test_num_classes_against_weights(downloads: list[Any]) -> None:
    with pytest.raises(ValueError, match="num_classes: resnet18 got 10, these weights have 1000"):
        rf.models.resnet18(weights="DEFAULT", num_classes=10)
    assert not downloads
    assert rf.models.resnet18(weights="DEFAULT", num_classes=1000).fc.out_features == 1000


def test_torchvision_is_needed_for_weights_only() -> None:
    program = """
import sys
sys.modules["torchvision"] = None  # importing it raises
import torch
import resnet_fused as rf
with torch.device("meta"):
    rf.models.resnet50()
try:
    rf.models.resnet50(weights="DEFAULT")
except ImportError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("weights: resnet50")
    assert "pip install torchvision" in done.stdout


@pytest.mark.parametrize("flags", [[True], [False] * 4, "no", 3, [2, 0, 0], [None] * 3])
def test_bad_replace_stride_with_dilation(flags: Any) -> None:
    with pytest.raises(ValueError, match=r"replace_stride_with_dilation: got .*three booleans"):
        rf.models.resnet50(replace_stride_with_dilation=flags)


@pytest.mark.parametrize("argument", ["num_classes", "groups", "width_per_group"])
@pytest.mark.parametrize("value", [0, -1, 2.5, "8", True])
def test_bad_counts(argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{argument}: got {value!r}, accepted"):
        rf.models.resnet50(**{argument: value})


@pytest.mark.parametrize("layers", [[1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1.0]])
def test_bad_layers(layers: Any) -> None:
    with pytest.raises(ValueError, match=r"layers: got .*four block counts"):
        rf.models.ResNet(rf.nn.BasicBlock, layers)


@pytest.mark.parametrize("arguments", [{"groups": 2}, {"width_per_group": 128}])
def test_basic_block_refuses_groups_and_width(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="groups"):
        rf.models.resnet18(**arguments)


def test_basic_block_refuses_dilation() -> None:
    with pytest.raises((ValueError, NotImplementedError), match=r"(?i)dilation"):
        rf.models.resnet18(replace_stride_with_dilation=[False, False, True])


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("resnext50_32x4d", {"groups": 1}, "groups: resnext50_32x4d got 1, .* 32"),
        ("resnext101_64x4d", {"width_per_group": 8}, "width_per_group: .* got 8, .* 4"),
        ("wide_resnet50_2", {"width_per_group": 64}, "width_per_group: .* got 64, .* 128"),
    ],
)
def test_networks_own_values_cannot_be_overridden(
    name: str, arguments: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        rf.models.get_model(name, **arguments)


@pytest.mark.parametrize("call", [rf.models.get_model, rf.models.get_model_weights])
def test_unknown_network(call: Callable[[str], Any]) -> None:
    with pytest.raises(
        ValueError, match=r"name: got 'resnet51', accepted are resnet18, .*cifar_plain110$"
    ):
        call("resnet51")


def test_state_dict_of_another_network_names_the_keys() -> None:
    with torch.device("meta"):
        ours, other = rf.models.resnet34(), rf.models.resnet50()
    with pytest.raises(RuntimeError, match=r"layer1\.0\.conv3\.weight"):
        ours.load_state_dict(other.state_dict(), assign=True)
