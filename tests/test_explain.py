"""explain: its table is what really ran, counted by the dispatcher, layer by layer."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
import torchvision
from nets import images, stir, tiny_resnet
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import resnet

import resnet_fused as rf


class Launches(TorchDispatchMode):
    """What the dispatcher ran: our ops, and PyTorch's convolutions and BatchNorms."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    def count(self, *parts):
        return sum(any(part in name for part in parts) for name in self.names)


def launches(model, x):
    with torch.no_grad(), Launches() as seen:
        model(x)
    return seen


MODELS = {
    "fused": lambda: rf.fuse(tiny_resnet()),
    "basic blocks": lambda: rf.fuse(tiny_resnet(resnet.BasicBlock)),
    "plain": tiny_resnet,
    "one hook": lambda: _hooked(rf.fuse(tiny_resnet())),
    "training": lambda: rf.fuse(tiny_resnet()).train(),
}


def _hooked(model):
    model.layer1[0].conv2.register_forward_hook(lambda m, i, o: None)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_the_table_is_what_ran(name):
    model = MODELS[name]()
    x = images(2)
    with torch.no_grad():
        model(x)
        counts = rf.explain(model, x).counts()
    seen = launches(model, x)
    plain = counts.get("modules", 0)
    ours = seen.count("mkldnn._convolution_pointwise", "resnet_fused.conv_bn_stats.cpu")
    assert ours == counts.get("cpu", 0)
    assert seen.count("aten.convolution") == plain
    assert seen.count("batch_norm") == plain
    assert sum(counts.values()) == sum(isinstance(m, nn.Conv2d) for m in model.modules())


def test_each_layer_runs_what_its_row_says():
    """One layer at a time: only the row's own op is seen while that layer runs."""
    model = rf.fuse(tiny_resnet())
    x = images(1)
    with torch.no_grad():
        rows = {row.layer: row for row in rf.explain(model, x).rows}
        with rf.backends.recording(keep=True) as routes:
            model(x)
    names = {id(m): name for name, m in model.named_modules()}
    assert len(routes) == len(rows)
    for route in routes:
        row = rows[names[id(route.conv)]]
        layer = rf.nn.Sequential(route.conv, route.bn, *([route.act] if route.act else []))
        seen = launches(layer.eval(), route.x)
        ran = seen.count("mkldnn._convolution_pointwise")
        assert ran == (row.implementation == "cpu"), row
        assert seen.count("batch_norm") == 0, row


@pytest.fixture
def two_threads():
    """With one, PyTorch keeps 1x1 convolutions of few images from oneDNN, and so do we."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(
    ("backend", "expected"), [("reference", "reference"), ("cpu", "cpu"), ("auto", "cpu")]
)
def test_the_backend_shows(backend, expected):
    model = rf.fuse(tiny_resnet())
    with torch.no_grad(), rf.backend(backend):
        explanation = rf.explain(model, images())
    assert set(explanation.counts()) == {expected}
    assert explanation.backend == backend


def test_reasons_are_told():
    model = rf.fuse(tiny_resnet())
    x = images()
    assert all("gradient is wanted" in row.why for row in rf.explain(model, x).rows)
    with torch.no_grad():
        for row in rf.explain(model, x).rows:
            assert "not triton: x is on cpu" in row.why
            assert "not cuda: x is on cpu" in row.why
    with torch.no_grad(), rf.backend("triton"):
        assert all("but: x is on cpu" in row.why for row in rf.explain(model, x).rows)
    with torch.no_grad():
        half = rf.explain(model.half(), x.half())
    assert all("float16" in row.why for row in half.rows)


def test_convolutions_without_batchnorm_are_listed_too():
    model = stir(torchvision.models.vgg11_bn(num_classes=2)).eval()
    model.features[0] = nn.Conv2d(3, 64, 3, padding=1)
    fused = rf.fuse(nn.Sequential(nn.Conv2d(3, 3, 1), model.features).eval())
    with torch.no_grad():
        explanation = rf.explain(fused, images(1, 32))
    first = explanation.rows[0]
    assert (first.layer, first.implementation) == ("0", "modules")
    assert explanation.fused == len(explanation.rows) - 1


def test_text_and_json():
    model = rf.fuse(tiny_resnet())
    with torch.no_grad():
        explanation = rf.explain(model, images())
    text = str(explanation)
    assert "layer4.0.conv3" in text
    assert "conv+bn+add+relu" in text
    assert f"{len(explanation.rows)} of {len(explanation.rows)} convolutions fused" in text
    data = json.loads(json.dumps(explanation.to_dict()))
    assert Counter(row["implementation"] for row in data["rows"]) == Counter(data["counts"])


def test_bad_model():
    with pytest.raises(TypeError, match=r"explain: model must be an nn\.Module, got str"):
        rf.explain("resnet50", images())
