"""Released weights: each format, written by other means, against its framework's arithmetic."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
import weight_files as files
from safetensors.torch import save_file
from torch import Tensor, nn

import resnet_fused as rf

LAYERS = files.caffe_layers()
BLOBS = files.detectron_blobs()


def images_for(loaded: rf.weights.Loaded | rf.weights.Weights, images: Tensor) -> Tensor:
    """uint8 RGB -> float64, as the weights want it."""
    rows = loaded.preprocessing.mean, loaded.preprocessing.std
    mean, std = (torch.tensor(row, dtype=torch.float64).view(1, 3, 1, 1) for row in rows)
    return (images.double() / 255 - mean) / std


def agrees(model: nn.Module, loaded: rf.weights.Loaded, expected: Tensor) -> None:
    with torch.no_grad():
        found = model(images_for(loaded, files.images()))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())


@pytest.mark.parametrize("writer", ["protobuf", "by hand", "double", "v1", "chunks"])
@pytest.mark.parametrize("factor", [1.0, 999.98])
def test_caffe_computes_what_caffe_does(tmp_path: Path, writer: str, factor: float) -> None:
    layers = files.caffe_layers(factor=factor)
    content = {
        "protobuf": lambda: files.by_protobuf(layers),
        "by hand": lambda: files.by_hand(layers).raw,
        "double": lambda: files.by_protobuf(layers, double=True),
        "v1": lambda: files.by_hand(layers, v1=True).raw,
        "chunks": lambda: files.by_hand(layers, chunks=3).raw,
    }[writer]()
    model = files.network().double()
    loaded = rf.weights.load(model, files.write(tmp_path, "n.caffemodel", content), adapt=True)
    assert (loaded.format, loaded.version) == ("caffe", "v1")
    assert not loaded.missing
    assert not loaded.unused
    agrees(model, loaded, files.caffe_forward(layers, files.images()))


def test_both_writers_write_the_same_file() -> None:
    # Up to what one has and the other leaves out: a layer without weights, bottoms, phases.
    one, other = (
        rf.weights.caffe._messages()["NetParameter"].FromString(content)
        for content in (files.by_protobuf(LAYERS), files.by_hand(LAYERS).raw)
    )
    named = [layer for layer in one.layer if layer.blobs]
    assert [layer.name for layer in named] == [layer.name for layer in other.layer]
    assert all(a.blobs == b.blobs for a, b in zip(named, other.layer, strict=True))


def test_a_factor_of_zero_makes_the_statistics_zero(tmp_path: Path) -> None:
    layers = [
        layer._replace(blobs=(*layer.blobs[:2], np.float32([0])))
        if layer.name == "bn2b_branch2a"
        else layer
        for layer in LAYERS
    ]
    file = files.write(tmp_path, "n.caffemodel", files.by_hand(layers).raw)
    model = files.network().double()
    loaded = rf.weights.load(model, file, adapt=True)
    assert not model.layer1[1].bn1.running_var.any()
    agrees(model, loaded, files.caffe_forward(layers, files.images()))


def test_an_eps_of_its_own(tmp_path: Path) -> None:
    file = files.write(tmp_path, "n.caffemodel", files.by_hand(LAYERS, eps=1e-2).raw)
    model = files.network().double()
    loaded = rf.weights.load(model, file, adapt=True)
    agrees(model, loaded, files.caffe_forward(LAYERS, files.images(), eps=1e-2))
    # Caffe's own eps, written out, changes nothing.
    same = files.write(tmp_path, "same.caffemodel", files.by_hand(LAYERS, eps=1e-5).raw)
    plain = files.write(tmp_path, "plain.caffemodel", files.by_hand(LAYERS).raw)
    one, other = rf.weights.read(same), rf.weights.read(plain)
    assert all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("protocol", ["python 2", 2, 4, 5])
def test_detectron_computes_what_caffe_does(
    tmp_path: Path, protocol: str | int, affine: bool
) -> None:
    blobs = files.detectron_blobs(affine=affine)
    if protocol == "python 2":
        content = files.python2_pickle(blobs)
    else:
        content = pickle.dumps(blobs if protocol == 4 else {"blobs": blobs, "cfg": "x"}, protocol)
    model = files.network().double()
    loaded = rf.weights.load(model, files.write(tmp_path, "R-14.pkl", content), adapt=True)
    assert (loaded.format, loaded.version) == ("detectron", "v1")
    agrees(model, loaded, files.caffe_forward(LAYERS, files.images(), files.DETECTRON_MEAN_BGR))


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f4"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_detectron_arrays_of_any_kind(tmp_path: Path, dtype: str, order: Any) -> None:
    blobs = {name: np.array(blob, dtype, order=order) for name, blob in BLOBS.items()}
    found = rf.weights.read(files.write(tmp_path, "n.pkl", pickle.dumps(blobs, 2)))
    weight = found["layer1.0.conv2.weight"].numpy()
    assert weight.dtype == np.float32
    np.testing.assert_array_equal(weight, blobs["res2_0_branch2b_w"].astype(np.float32))
    assert found["bn1.bias"].shape == (4,)


def test_caffe2_names_of_statistics(tmp_path: Path) -> None:
    ends = {"gamma": "s", "beta": "b", "running_mean": "rm", "running_var": "riv"}
    blobs = {}
    for name, blob in BLOBS.items():
        place, _, part = name.rpartition("_bn_")
        blobs[f"{place}_bn_{ends[part]}" if place else name] = blob
    blobs["res2_0_branch2a_w_momentum"] = BLOBS["res2_0_branch2a_w"]
    other = rf.weights.read(files.write(tmp_path, "2.pkl", pickle.dumps(BLOBS)))
    found = rf.weights.read(files.write(tmp_path, "1.pkl", pickle.dumps(blobs)))
    assert list(found) == list(other)
    assert found.foreign == ()  # the optimiser's are none of the network
    assert all(torch.equal(found[name], other[name]) for name in other)


def test_a_resnext_of_facebook_has_its_strides_in_the_3x3(tmp_path: Path) -> None:
    blobs = dict(BLOBS)
    for name, blob in BLOBS.items():
        if name.endswith("branch2b_w"):
            blobs[name] = blob[:, ::2]
    found = rf.weights.read(files.write(tmp_path, "X.pkl", pickle.dumps({"blobs": blobs})))
    assert found.architecture.version == "v1.5"
    assert not found.architecture.pool_ceil_mode
    assert found.preprocessing.std == pytest.approx((0.229, 0.224, 0.225))
    assert found.preprocessing.mean == pytest.approx((0.485, 0.456, 0.406))


def test_images_are_rgb_bytes_less_a_mean(tmp_path: Path) -> None:
    file = files.write(tmp_path, "n.caffemodel", files.by_hand(LAYERS).raw)
    found = rf.weights.read(file)
    assert torch.equal(found["conv1.weight"], torch.from_numpy(LAYERS[0].blobs[0]).flip(1))
    red = torch.tensor([200, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1)
    expected = torch.tensor([200 - 123.15163, -115.90288, -103.06262], dtype=torch.float64)
    torch.testing.assert_close(images_for(found, red).flatten(), expected, rtol=0, atol=1e-4)


# The model

STATE = {name: torch.randn_like(value) if value.is_floating_point() else value
         for name, value in files.network(1).state_dict().items()}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "wrap"),
    [
        ("n.pth", lambda state: state),
        ("n.tar", lambda state: {"epoch": 3, "state_dict": state, "optimizer": {"lr": 0.1}}),
        ("n.bin", lambda state: {"model_state_dict": state, "step": 7}),
        ("n.pt", lambda state: {"model": {f"module.{key}": v for key, v in state.items()}}),
        ("n.ckpt", lambda state: {"state_dict": {f"model.{k}": v for k, v in state.items()}}),
        ("n", lambda state: {f"module._orig_mod.{key}": v for key, v in state.items()}),
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_torch_files(tmp_path: Path, name: str, wrap: Any, legacy: bool) -> None:
    torch.save(wrap(STATE), tmp_path / name, _use_new_zipfile_serialization=not legacy)
    model = files.network()
    loaded = rf.weights.load(model, tmp_path / name)
    assert (loaded.format, loaded.version, loaded.preprocessing) == ("torch", None, None)
    assert all(torch.equal(value, STATE[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["n.safetensors", "n"])
def test_safetensors(tmp_path: Path, name: str) -> None:
    save_file(STATE, tmp_path / name)
    model = files.network()
    assert rf.weights.load(model, tmp_path / name).format == "safetensors"
    assert all(torch.equal(value, STATE[key]) for key, value in model.state_dict().items())
    found = rf.weights.read(tmp_path / name, format="safetensors")
    assert model.load_state_dict(found).missing_keys == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_become_the_models(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in STATE.items()}
    torch.save(state, tmp_path / "n.pth")
    model = files.network()
    rf.weights.load(model, tmp_path / "n.pth")
    for key, value in model.state_dict().items():
        assert value.dtype == STATE[key].dtype
        assert torch.equal(value, state[key].to(value.dtype)), key


def test_torchvisions_and_timms_resnets_are_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = timm.create_model("resnet18", num_classes=3).eval()
    save_file(theirs.state_dict(), tmp_path / "timm.safetensors")
    plain = torchvision.models.resnet18(num_classes=3).eval()
    own = rf.models.resnet18(num_classes=3).eval()
    x = torch.randn(1, 3, 64, 64)
    for model in (plain, own):
        rf.weights.load(model, tmp_path / "timm.safetensors")
        with torch.no_grad():
            torch.testing.assert_close(model(x), theirs(x), rtol=1e-4, atol=1e-4)


def test_files_without_counters_are_old_ones(tmp_path: Path) -> None:
    state = {key: value for key, value in STATE.items() if "num_batches" not in key}
    torch.save(state, tmp_path / "n.pth")
    assert rf.weights.load(files.network(), tmp_path / "n.pth").missing == ()


def test_a_fused_model_in_channels_last_takes_them_at_once(tmp_path: Path) -> None:
    file = files.write(tmp_path, "n.caffemodel", files.by_hand(LAYERS).raw)
    plain = files.network()
    fused = rf.fuse(plain).to(memory_format=torch.channels_last)
    with torch.no_grad():
        fused(torch.randn(2, 3, 37, 37))  # prepares weights that are soon old
        loaded = rf.weights.load(fused, file, adapt=True)
        x = images_for(loaded, files.images()).float()
        found = fused(x.contiguous(memory_format=torch.channels_last))
    assert fused.layer1[0].conv2.weight.is_contiguous(memory_format=torch.channels_last)
    expected = files.caffe_forward(LAYERS, files.images())
    torch.testing.assert_close(
        found.double(), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item()
    )


def test_strides_are_refused_or_set(tmp_path: Path) -> None:
    file = files.write(tmp_path, "n.caffemodel", files.by_hand(LAYERS).raw)
    model = files.network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(rf.weights.WeightsError, match=r"v1 network.*layer2\.0: .*adapt=True"):
        rf.weights.load(model, file)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.layer2[0].conv2.stride == (2, 2)

    model.layer2[0].conv1.stride, model.layer2[0].conv2.stride = (2, 2), (1, 1)
    loaded = rf.weights.load(model, file)
    assert loaded.adapted == ()
    assert loaded.differs == ("maxpool: padding=0, ceil_mode=True",)
    assert model.maxpool.padding == 1

    loaded = rf.weights.load(model, file, adapt=True)
    assert loaded.adapted == ("maxpool: padding=0, ceil_mode=True",)
    assert loaded.differs == ()


def test_eps_is_refused_or_set(tmp_path: Path) -> None:
    file = files.write(tmp_path, "n.caffemodel", files.by_hand(LAYERS).raw)
    model = files.network().double()
    rf.weights.load(model, file, adapt=True)
    model.bn1.eps = 1e-3
    with pytest.raises(rf.weights.WeightsError, match="eps of 1 BatchNorms: 1e-05"):
        rf.weights.load(model, file)
    loaded = rf.weights.load(model, file, adapt=True)
    agrees(model, loaded, files.caffe_forward(LAYERS, files.images()))


def test_frozen_batchnorm_is_filled_too(tmp_path: Path) -> None:
    file = files.write(tmp_path, "n.pkl", pickle.dumps(BLOBS))
    model = files.network()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                frozen = torchvision.ops.FrozenBatchNorm2d(child.num_features, eps=1e-3)
                setattr(module, name, frozen)
    loaded = rf.weights.load(model.double(), file, adapt=True)
    agrees(model, loaded, files.caffe_forward(LAYERS, files.images(), files.DETECTRON_MEAN_BGR))


@pytest.mark.parametrize("name", ["resnet50", "resnet101", "resnet152"])
def test_every_layer_of_the_release_has_its_place(tmp_path: Path, name: str) -> None:
    with torch.device("meta"):
        own = rf.models.get_model(name)
    depths = [len(stage) for stage in (own.layer1, own.layer2, own.layer3, own.layer4)]
    file = files.write(tmp_path, "n.caffemodel", files.by_hand(files.named_layers(depths)).raw)
    found = rf.weights.read(file)
    assert {key for key in own.state_dict() if not key.endswith("num_batches_tracked")} == {*found}
    assert found.foreign == ()
    with pytest.raises(ValueError, match="meta device"):
        rf.weights.load(own, file)


def test_the_factories_networks_are_adapted(tmp_path: Path) -> None:
    file = files.write(tmp_path, "n.caffemodel", files.by_hand(LAYERS).raw)
    own = rf.models.resnet50()
    with pytest.raises(rf.weights.MismatchError) as caught:
        rf.weights.load(own, file, adapt=True)
    assert own.layer3[0].conv2.stride == (2, 2)  # nothing is set either
    assert own.version == "v1.5"
    assert "layer4.2.bn3.running_var" in caught.value.missing
    assert "layer1.0.conv1.weight" in caught.value.misshapen
    wanted = rf.weights.read(file).architecture
    # Its own tensors, in a file that says how they were trained.
    same = rf.weights.Weights(own.state_dict(), "caffe", "same", architecture=wanted)
    loaded = rf.weights.load(own, same, adapt=True)
    pool = "maxpool: padding=0, ceil_mode=True"
    strides = tuple(f"layer{stage}.0: stride (2, 2) in conv1" for stage in (2, 3, 4))
    assert loaded.adapted == (*strides, pool)
    assert own.version == "v1"
    built = rf.models.resnet50(version="v1")
    assert rf.weights.load(built, same).differs == (pool,)
    strided = [m.stride for m in own.modules() if isinstance(m, nn.Conv2d)]
    assert strided == [m.stride for m in built.modules() if isinstance(m, nn.Conv2d)]


MEASURE = """
import sys
import resnet_fused.weights.files as files
def memory(what):  # getrusage would give the largest of the parent's, too
    rows = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(rows[what].split()[0]) * 1024
files.read(sys.argv[1])  # what is imported and made once
before = memory("VmRSS")
found = files.read(sys.argv[2])
print(memory("VmHWM") - before, sum(value.nbytes for value in found.values()))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize("form", ["caffemodel", "pkl"])
def test_reading_takes_twice_the_file(tmp_path: Path, form: str) -> None:
    def content(out: int, of: int) -> bytes:
        if form == "caffemodel":
            return files.by_hand(files.named_layers([3, 4, 6, 3], out, of)).raw
        blobs = {f"res2_{block}_branch2a_w": np.ones((out, of, 1, 1)) for block in range(50)}
        for block in range(50):
            for part in "sb":
                blobs[f"res2_{block}_branch2a_bn_{part}"] = np.ones(out)
        return files.python2_pickle(blobs)

    small = files.write(tmp_path, f"small.{form}", content(1, 1))
    large = files.write(tmp_path, f"large.{form}", content(500, 1000))  # of about 100 MB
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, small, large], capture_output=True, text=True, check=True
    )
    peak, held = map(int, run.stdout.split())
    assert held > 64 << 20
    assert held < peak < 2.25 * large.stat().st_size
