"""What freeze takes of a model, what it leaves to the modules, and that both are right."""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict

import pytest
import torch
from nets import images, stir, tiny_resnet
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet as tv

import resnet_fused as rf
from resnet_fused.freeze import _rules, _served, _trace


def run(model, *x):
    with torch.inference_mode():
        return model(*x)


def layer(c_in: int = 3, c_out: int = 8, **options) -> nn.Sequential:
    options = {"padding": 1, **options}
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, **options), nn.BatchNorm2d(c_out))


class Net(nn.Module):
    """A model whose forward is a function."""

    def __init__(self, forward, **children) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)
        self.body = forward

    def forward(self, x):
        return self.body(self, x)


def made(forward, **children) -> Net:
    torch.manual_seed(0)
    return stir(Net(forward, **children)).eval()


def check(model: nn.Module, x: torch.Tensor, **close) -> rf.Engine:
    """The engine gives what the model gives, for the example and for another shape."""
    kept = x.clone()
    engine = rf.freeze(model, x)
    for given in (x, torch.randn(3, *x.shape[1:-1], x.shape[-1] + 3)):
        expected, found = run(copy.deepcopy(model), given.clone()), run(engine, given)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, **close)
    assert torch.equal(x, kept)
    return engine


def kinds(engine: rf.Engine) -> list[str]:
    return [step.kind for step in engine._graph.steps]


def test_every_convolution_of_a_resnet_is_taken():
    engine = rf.freeze(tiny_resnet(), images())
    assert kinds(engine).count("conv_bn_act") == 17
    assert [k for k in kinds(engine) if k != "conv_bn_act"] == [
        "max_pool", "avg_pool", "flatten", "linear",
    ]  # fmt: skip
    patterns = {row.layer: row.pattern for row in engine.report().rows}
    assert patterns["conv1"] == "conv+bn+relu"
    assert patterns["layer1.0.conv3"] == "conv+bn+add+relu"
    assert patterns["layer1.0.downsample.0"] == "conv+bn"


def test_rules_say_what_they_did_and_did_not():
    notes = rf.freeze(tiny_resnet(), images()).report().notes
    assert {note.rule for note in notes} == {"conv_bn_act", "stem", "head", "conv_chain"}
    left = {note.rule: note.why for note in notes if not note.done}
    same = "on the CPU it is the same calls one after the other"
    assert left == dict.fromkeys(("stem", "head", "conv_chain"), same)


def test_stem_and_head_are_put_in_where_they_are_served(monkeypatch):
    monkeypatch.setattr(
        _served, "refusal", lambda op, *place: "not now" if op == "conv_chain" else None
    )
    graph = _trace.trace(rf.unfuse(tiny_resnet()), 1)
    place = _rules.Place(torch.device("cpu"), torch.float32)
    graph, _ = _rules.apply(_rules.PLAIN, graph, place)
    found, notes = _rules.apply(_rules.DEVICE, graph, place)
    assert [found.steps[0].kind, found.steps[-1].kind] == ["stem", "head"]
    assert found.steps[0].options["pool_kernel"] == [3, 3]
    assert [note.done for note in notes] == [True, True, False]
    assert len(found.steps) == len(graph.steps) - 3


@pytest.mark.parametrize("shape", [(2, 3, 9, 9), (1, 3, 16, 16)])
@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: F.relu(m.a(x) + m.b(x)),
        lambda m, x: m.a(x).add_(m.b(x)).relu_(),
        lambda m, x: torch.relu(torch.add(m.b(x), m.a(x))),
        lambda m, x: m.relu(m.a(x)) + m.b(x),
        lambda m, x: (lambda y: F.relu(y + y))(m.a(x)),
        lambda m, x: (lambda y: (y, F.relu(y)))(m.a(x)),
        lambda m, x: F.relu(m.a(x), True),
        lambda m, x: m.c(F.relu(m.a(x) + m.b(x).mean((2, 3), keepdim=True))),
        lambda m, x: {"a": m.a(x), "b": [m.b(x), x.shape[0]]},
        lambda m, x: m.a(x)[:, 2:5].flatten(1).view(x.size(0), -1) * 2.0,
        lambda m, x: m.c(m.relu(m.a(x)) * torch.sigmoid(m.b(x))),
    ],
)
def test_ways_to_write_a_block(forward, shape):
    model = made(forward, a=layer(), b=layer(), c=layer(8, 4), relu=nn.ReLU(inplace=True))
    engine = check(model, torch.randn(shape))
    assert "conv_bn_act" in kinds(engine)


def test_in_place_changes_reach_later_readers():
    def forward(m, x):
        y = m.a(x)
        z = m.c(y)  # reads y before the change
        m.relu(y)
        return y + z, y

    model = made(forward, a=layer(), c=layer(8, 8), relu=nn.ReLU(inplace=True))
    engine = check(model, torch.randn(2, 3, 9, 9))
    assert "module" not in kinds(engine)


def test_a_change_of_the_input_reaches_later_readers_and_not_the_caller():
    def forward(m, x):
        before = m.a(x)
        x += 1.0
        return before + m.b(x)

    check(made(forward, a=layer(), b=layer()), torch.randn(2, 3, 9, 9))


def view_written(m, x):
    y = m.a(x)
    z = y.flatten(1)
    y.relu_()
    return z


def by_value(m, x):
    return m.a(x) if x.sum() > 1e9 else m.b(x)


def out_given(m, x):
    y = m.a(x)
    torch.relu(y, out=y) if False else y[:, 0].zero_()
    return y


@pytest.mark.parametrize("forward", [view_written, by_value, out_given])
def test_what_cannot_be_taken_runs_as_the_modules_do(forward, caplog):
    model = made(forward, a=layer(), b=layer())
    with caplog.at_level(logging.WARNING, "resnet_fused"):
        engine = check(model, torch.randn(2, 3, 9, 9))
    assert kinds(engine) == ["module"]
    (note,) = engine.report().left
    assert note.rule == "trace" and note.why in caplog.text and note.why in str(engine.report())


def test_a_trace_that_lies_is_not_taken():
    """Code that runs while tracing leaves a constant behind."""

    def forward(m, x):
        m.calls = getattr(m, "calls", 0) + 1
        return m.a(x) * float(m.calls)

    model = made(forward, a=layer())
    engine = rf.freeze(model, torch.randn(1, 3, 8, 8))
    assert kinds(engine) == ["module"]
    assert "another result" in engine.report().left[0].why


def test_layers_with_hooks_run_as_they_are_and_the_rest_is_fused():
    model, seen = tiny_resnet(tv.BasicBlock), []
    model.layer2[0].conv1.register_forward_hook(lambda m, given, y: seen.append(y.shape))
    model.layer3.register_forward_hook(lambda m, given, y: y * 2)
    expected = run(model, images())
    x = images()
    engine, expected = rf.freeze(model, x), run(model, x)
    seen.clear()
    torch.testing.assert_close(run(engine, x), expected, rtol=1e-4, atol=1e-4)
    assert len(seen) == 1
    left = {row.layer: row.why for row in engine.report().rows if row.implementation == "modules"}
    assert set(left) == {"layer2.0.conv1", "layer3"}
    assert all("hook" in why for why in left.values())
    assert kinds(engine).count("conv_bn_act") > 5


def test_batch_statistics_stay_the_modules():
    model = made(lambda m, x: F.relu(m.a(x)), a=layer())
    model.a[1] = nn.BatchNorm2d(8, track_running_stats=False).eval()
    engine = check(model, torch.randn(4, 3, 8, 8))
    assert kinds(engine) == ["conv", "module", "relu"]
    assert any("no running statistics" in note.why for note in engine.report().left)


def test_lone_layers_and_other_modules():
    model = nn.Sequential(
        nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3), nn.SiLU(inplace=True), nn.Dropout(),
        nn.Conv2d(8, 8, 3, padding="same"), nn.BatchNorm2d(8), nn.GroupNorm(2, 8), nn.Identity(),
        nn.AdaptiveAvgPool2d((2, 3)), nn.Flatten(), nn.Linear(48, 5),
    )  # fmt: skip
    engine = check(stir(model).eval(), torch.randn(2, 3, 12, 12))
    assert kinds(engine) == [
        "bn", "conv", "call", "module", "bn", "module", "avg_pool", "flatten", "linear",
    ]  # fmt: skip


def test_two_inputs_and_defaults():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = layer()

        def forward(self, x, y, scale: float = 2.0, mask=None):
            return F.relu(self.a(x) + self.a(y)) * scale

    model = stir(Two()).eval()
    x, y = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    engine = rf.freeze(model, (x, y))
    torch.testing.assert_close(run(engine, x, y), run(model, x, y), rtol=1e-4, atol=1e-4)
    with pytest.raises(TypeError, match="1 arguments; accepted are 2"):
        engine(x)


def test_outputs_keep_their_structure():
    from torchvision.models._utils import IntermediateLayerGetter

    model = IntermediateLayerGetter(tiny_resnet(), {"layer1": "low", "layer4": "high"}).eval()
    engine = check(rf.fuse(model), images())
    out = run(engine, images())
    assert type(out) is OrderedDict and list(out) == ["low", "high"]
    assert kinds(engine).count("conv_bn_act") == 17


@pytest.mark.parametrize(("name", "fused"), [("resnet18d", 22), ("resnetv2_50", 0)])
def test_timms_networks(name, fused):
    timm = pytest.importorskip("timm")
    model = stir(timm.create_model(name, num_classes=5)).eval()
    engine = check(model, images(1, 48))
    assert kinds(engine).count("conv_bn_act") >= fused and "module" not in kinds(engine)


def test_backend_of_the_moment_is_kept():
    with rf.backend("reference"):
        engine = rf.freeze(tiny_resnet(), images())
    assert {row.implementation for row in engine.report().rows} == {"reference", "torch"}
    x = images()
    torch.testing.assert_close(run(engine, x), run(tiny_resnet(), x), rtol=1e-4, atol=1e-4)
