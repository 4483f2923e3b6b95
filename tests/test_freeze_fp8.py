"""Frozen engines in e4m3: what runs in it and what not, agreement, files, bad input."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from nets import images, stir, tiny_resnet
from test_freeze_gpu import StandIn, engine_of
from torch import nn
from torch.nn import functional
from torchvision.models import resnet as tv

import resnet_fused as rf
from resnet_fused import agreement
from resnet_fused.freeze import _fp8, _gpu, _rules, _served
from resnet_fused.freeze._calibrate import _largest
from resnet_fused.ops import _e4m3

X = images(4, 64)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_resnet()


@pytest.fixture(scope="module")
def calibration(model) -> rf.Fp8Calibration:
    return rf.calibrate_fp8(model, X)


def run(model, x=X):
    with torch.inference_mode():
        return model(x)


def off(found, expected) -> float:
    """The error's root mean square as a share of what is expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize(("block", "last"), [(tv.BasicBlock, "conv2"), (tv.Bottleneck, "conv3")])
def test_all_layers_but_the_first_and_the_last_run_in_e4m3(block, last):
    model = tiny_resnet(block)
    engine = rf.freeze(model, X, fp8=rf.calibrate_fp8(model, X))
    convs = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    rows = {row.layer: row for row in engine.report().rows}
    assert all(rows[name].pattern.endswith(" in e4m3") for name in convs[1:])
    assert rows["conv1"].pattern == "conv+bn+relu" and rows["maxpool"].pattern == "quantize"
    left = {note.layers: note.why for note in engine.report().left if note.rule == "fp8"}
    assert left == {
        "conv1": "the first convolution, which reads the image, stays in float32",
        "fc": "a linear layer stays in float32",
    }
    assert "in e4m3" in str(rf.explain(engine, X))
    kinds = [step.kind for step in engine._graph.steps]
    # One pass to e4m3: every other value is written in it by the layer that makes it.
    assert kinds.count("quantize") == 1 and kinds.count("conv_bn_act_fp8") == len(convs) - 1
    wide = [s.name for s in engine._graph.steps if s.options.get("out_dtype") == torch.float32]
    assert wide == [f"layer4.0.{last}"]  # which the pooling reads
    assert off(run(engine), run(model)) < 0.15


def with_a_stem(engine, monkeypatch):
    """The engine's graph where a kernel serves `stem` alone, and what the rule says."""
    monkeypatch.setattr(_served, "refusal", lambda op, *place: None if op == "stem" else "not now")
    return _rules.apply(_rules.DEVICE[:1], engine._graph, _rules.Place(X.device, X.dtype))


def program_of(graph, engine):
    return _gpu.Builder(_gpu.laid_out(graph), StandIn(), engine._free).build([X], True)[0]


@pytest.mark.parametrize("block", [tv.BasicBlock, tv.Bottleneck])
def test_a_stem_writes_e4m3_itself(block, monkeypatch):
    """Where one kernel serves it: no pass of its own is left."""
    model = tiny_resnet(block)
    calibration = rf.calibrate_fp8(model, X)
    engine = rf.freeze(model, X, fp8=calibration)
    expected = run(engine)
    graph, notes = with_a_stem(engine, monkeypatch)
    assert [step.kind for step in graph.steps].count("quantize") == 0
    stem = graph.steps[0]
    assert stem.options["out_scale"] == _e4m3.scale_of(calibration.largest["maxpool"])
    assert notes == [("stem", "conv1+maxpool", True, "conv+bn+relu+max_pool+quantize")]
    program = program_of(graph, engine)
    assert program.served[0][0] in ("parts", "reference")
    assert off(program([X]), expected) < 1e-3
    stem.options["out_scale"] *= 1.25  # it matters
    assert off(program_of(graph, engine)([X]), expected) > 0.02

    monkeypatch.setattr(_served, "no_e4m3", lambda device: "too old")
    graph, notes = with_a_stem(engine, monkeypatch)
    assert [step.kind for step in graph.steps][:2] == ["stem", "quantize"]
    assert ("stem", "conv1+maxpool in e4m3", False, "too old") in notes
    assert off(program_of(graph, engine)([X]), expected) < 1e-3


class Read(nn.Module):
    """Its pooled image is read as it is, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn = nn.Conv2d(3, 16, 7, 2, 3), nn.BatchNorm2d(16)
        self.pool, self.relu = nn.MaxPool2d(3, 2, 1), nn.ReLU()
        self.second, self.bn2 = nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)

    def forward(self, x):
        x = self.pool(self.relu(self.bn(self.first(x))))
        return self.relu(self.bn2(self.second(x))), x


def test_a_pooled_image_that_others_read_is_quantised_apart(monkeypatch):
    model = stir(Read()).eval()
    engine = rf.freeze(model, X, fp8=rf.calibrate_fp8(model, X))
    graph, _ = with_a_stem(engine, monkeypatch)
    assert [step.kind for step in graph.steps] == ["stem", "quantize", "conv_bn_act_fp8"]
    assert "out_scale" not in graph.steps[0].options
    assert program_of(graph, engine)([X])[1].dtype == torch.float32


def test_each_layer_is_what_its_scales_say(model, calibration):
    """The first layers by hand, from the model's own modules."""
    engine = rf.freeze(model, X, fp8=calibration)
    steps = {step.name: step for step in engine._graph.steps if step.kind == "conv_bn_act_fp8"}
    with torch.no_grad():
        pooled = model.maxpool(model.relu(model.bn1(model.conv1(X))))
        first = model.layer1[0]
        exact = functional.relu(first.bn1(first.conv1(pooled)))
    scales = {name: _e4m3.scale_of(value) for name, value in calibration.largest.items()}
    assert scales["maxpool"] == pytest.approx(float(pooled.abs().max()) / 448, rel=1e-5)
    assert scales["layer1.0.conv1"] == pytest.approx(float(exact.abs().max()) / 448, rel=1e-4)
    step = steps["layer1.0.conv1"]
    x = rf.ops.quantize_e4m3(pooled, scales["maxpool"])
    o, t = step.options, step.tensors
    y = rf.ops.conv_bn_act_fp8(
        x, t["weight"], t["scale"], t["shift"], out_scale=o["out_scale"], act=o["act"],
    )  # fmt: skip
    assert o["out_scale"] == scales["layer1.0.conv1"]
    assert off(y.float() * o["out_scale"], exact) < 0.06
    last = steps["layer1.0.conv3"].options
    assert last["residual_scale"] == scales["layer1.0.downsample.0"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_calibration_serves_other_dtypes_and_shapes(model, calibration, dtype):
    narrow = copy.deepcopy(model).to(dtype)
    engine = rf.freeze(narrow, X.to(dtype), fp8=calibration)
    for x in (X, X[:1], images(2, 47), images(2, 47)):
        y = run(engine, x.to(dtype))
        assert y.dtype == dtype and off(y, run(model, x)) < 0.2


def test_programs_of_a_gpu_write_e4m3_into_their_arena(model, calibration):
    engine, driver = engine_of(model, X, fp8=calibration)
    expected = run(rf.freeze(model, X, fp8=calibration))
    for _ in range(2):
        torch.testing.assert_close(run(engine), expected, rtol=1e-3, atol=1e-3)
    assert driver.replayed == 2


def test_images_of_bytes_and_percentiles(model):
    norm = rf.ops.stem_input_norm([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    x = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    whole = rf.calibrate_fp8(model, x, input_norm=norm)
    engine = rf.freeze(model, x, input_norm=norm, fp8=whole)
    assert off(run(engine, x), run(rf.freeze(model, x, input_norm=norm), x)) < 0.15
    batches = rf.calibrate_fp8(model, iter([x[:2], x[2:], x[:0]]), input_norm=norm)
    assert batches.images == 3 and batches.largest == pytest.approx(whole.largest, rel=1e-4)
    part = rf.calibrate_fp8(model, x, input_norm=norm, percentile=99.0)
    assert all(part.largest[name] <= value for name, value in whole.largest.items())
    assert part.largest["maxpool"] < whole.largest["maxpool"]
    ramp = torch.arange(-1000, 0).float()
    assert [_largest(ramp, p, "") for p in (100.0, 99.0, 50.0, 1e-9)] == [1000, 990, 500, 1]


def test_files(model, calibration, tmp_path):
    calibration.save(tmp_path / "scales.json")
    assert rf.Fp8Calibration.load(tmp_path / "scales.json") == calibration
    engine = rf.freeze(model, X, fp8=calibration)
    engine.save(tmp_path / "engine")
    for other in (rf.load_engine(tmp_path / "engine"), copy.deepcopy(engine)):
        assert torch.equal(run(other), run(engine))
        assert other.report().notes == engine.report().notes
    held = engine._builder.constants() / rf.freeze(model, X)._builder.constants()
    assert held < 0.5  # a byte a weight, where the packed ones have four


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"format": "x"}', None, {"version": 2}, {"largest": {"a": float("nan")}}],
)
def test_a_file_that_is_no_calibration_is_refused(calibration, tmp_path, content):
    path = tmp_path / "scales.json"
    calibration.save(path)
    if isinstance(content, dict):
        content = json.dumps({**json.loads(path.read_text()), **content})
    path.write_text("\ufffd" if content is None else content)
    with pytest.raises(ValueError, match=r"scales.json is no fp8 calibration of version 1"):
        rf.Fp8Calibration.load(path)


class Odd(nn.Module):
    """A layer called twice, a broadcast shortcut, a value that is read as it is, a bare conv."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
        self.again, self.bn2 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.point, self.bn3 = nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)
        self.bare = nn.Conv2d(16, 5, 1)

    def forward(self, x):
        x = torch.relu(self.bn(self.first(x)))
        y = torch.relu(self.bn2(self.again(x)))
        z = torch.relu(self.bn2(self.again(y)))
        z = self.bn3(self.point(z)) + z.mean((2, 3), keepdim=True)
        return self.bare(z + y), y


def test_what_does_not_fit_stays_as_it_is():
    model, x = stir(Odd()).eval(), images(2, 12)
    calibration = rf.calibrate_fp8(model, x)
    assert calibration.wide == {"point": "its shortcut is broadcast: added apart"}
    assert {"again", "again (call 2)"} <= calibration.largest.keys()
    engine = rf.freeze(model, x, fp8=calibration)
    patterns = [(row.layer, row.pattern) for row in engine.report().rows]
    assert patterns == [
        ("first", "conv+bn+relu"), ("first", "quantize"), ("again", "conv+bn+relu in e4m3"),
        ("again", "quantize"), ("again", "conv+bn+relu in e4m3"), ("point", "conv+bn+add"),
        ("bare", "conv"),
    ]  # fmt: skip
    for found, expected in zip(run(engine, x), run(model, x), strict=True):
        assert off(found, expected) < 0.1


def test_the_first_convolution_may_read_what_was_made_of_the_image(model):
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, x):
            return self.net((x - 0.5) / 0.25)

    net = Normed().eval()
    engine = rf.freeze(net, X, fp8=rf.calibrate_fp8(net, X))
    left = [note.layers for note in engine.report().left if note.rule == "fp8"]
    assert left == ["net.conv1", "net.fc"]


def test_nan_in_an_image_comes_out(model, calibration):
    x = X.clone()
    x[1, 0, 5, 5] = float("nan")
    y = run(rf.freeze(model, X, fp8=calibration), x)
    assert y[1].isnan().all() and y[[0, 2, 3]].isfinite().all()


def test_another_model_s_calibration_is_refused(model, calibration):
    other = tiny_resnet(tv.BasicBlock)
    with pytest.raises(ValueError, match="fp8 is a calibration of another model: it knows nothing"):
        rf.freeze(other, X, fp8=rf.Fp8Calibration({}, 1))
    engine = rf.freeze(model, X, fp8=calibration)
    weights = nn.Conv2d(3, 4, 3)
    single = nn.Sequential(weights, nn.BatchNorm2d(4)).eval()
    with pytest.raises(ValueError, match=r"no layer of the model can run in e4m3 \(0: the first"):
        rf.freeze(single, X, fp8=rf.calibrate_fp8(single, X))
    assert engine.report().rows


def test_weights_that_are_not_finite_stay_wide(model, calibration):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.layer4[0].conv2.weight[0, 0, 0, 0] = float("inf")
    engine = rf.freeze(broken, X, fp8=calibration)
    why = {note.layers: note.why for note in engine.report().left if note.rule == "fp8"}
    assert "weight holds NaN or Inf" in why["layer4.0.conv2"]


class Branches(nn.Module):
    """What torch.fx cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.bn(self.conv(x))
        return y if float(y.sum()) > 0 else -y


BAD = {
    "no module": (lambda m: (3, X), TypeError, "calibrate_fp8: model must be an nn.Module"),
    "no tensor": (lambda m: (m, 3), TypeError, "images must be a tensor or batches of them, got"),
    "a list": (lambda m: (m, [1]), TypeError, "images hold a int; accepted are tensors"),
    "no images": (lambda m: (m, X[:0]), ValueError, "images is empty; give at least one image"),
    "no batches": (lambda m: (m, []), ValueError, "images is empty"),
    "3-D": (lambda m: (m, X[0]), ValueError, r"images have shape \(3, 64, 64\); accepted is \[N"),
    "dtype": (lambda m: (m, X.half()), ValueError, "images have dtype torch.float16 and the model"),
    "float64": (lambda m: (copy.deepcopy(m).double(), X.double()), ValueError, "torch.float64; ac"),
    "mixed": (lambda m: (m, [X, X.half()]), ValueError, "a batch of images is torch.float16 on cp"),
    "channels": (lambda m: (m, [X, X[:, :2]]), ValueError, "with 2 channels, the first"),
    "training": (lambda m: (copy.deepcopy(m).train(), X), ValueError, "in training mode; accepted"),
    "NaN": (lambda m: (m, X / 0), ValueError, "calibrate_fp8: an image holds NaN or Inf"),
    "modules": (lambda m: (Branches().eval(), X), ValueError, "Branches can't be frozen but as"),
    "no layers": (lambda m: (nn.Sequential(nn.ReLU()), X), ValueError, "no convolution with a"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_of_a_calibration_is_named(model, name):
    make, error, message = BAD[name]
    given, x = make(model)
    given = given.eval() if name == "no layers" else given
    with pytest.raises(error, match=message):
        rf.calibrate_fp8(given, x)


@pytest.mark.parametrize("percentile", [0.0, 100.1, float("nan")])
def test_bad_percentiles_are_named(model, percentile):
    with pytest.raises(ValueError, match="percentile is .*; accepted is above 0, at most 100"):
        rf.calibrate_fp8(model, X, percentile=percentile)


def test_nan_that_arises_inside_is_named(model):
    broken = copy.deepcopy(model)
    broken.layer2[0].bn1.bias.data[3] = float("inf")
    with pytest.raises(ValueError, match=r"what layer2.0.conv1 gives holds NaN or Inf"):
        rf.calibrate_fp8(broken, X)


def test_bad_input_of_freeze_is_named(model, calibration):
    with pytest.raises(TypeError, match=r"fp8 must be an Fp8Calibration, got dict"):
        rf.freeze(model, X, fp8={})
    with pytest.raises(ValueError, match=r"goes with a model in float32, bfloat16 or float16"):
        rf.freeze(copy.deepcopy(model).double(), X.double(), fp8=calibration)
    with pytest.raises(ValueError, match="fp8: Branches runs as its modules do"):
        rf.freeze(Branches().eval(), X, fp8=calibration)


def test_a_shortcut_that_becomes_broadcast_is_refused(model, calibration):
    from resnet_fused.freeze import _kernels

    engine = rf.freeze(model, X, fp8=calibration)
    step = next(s for s in engine._graph.steps if len(s.inputs) == 2)
    x = torch.zeros(1, 64, 4, 4).to(_e4m3.E4M3)
    with pytest.raises(ValueError, match=r"layer1.0.conv3 in e4m3 got a shortcut \(1, 256, 1, 1\)"):
        _kernels.Kernel(step, [x, torch.zeros(1, 256, 1, 1).to(_e4m3.E4M3)])


def test_planted_faults_show(model, calibration, monkeypatch):
    """Scales that are mixed up must not pass for quantisation's own error."""
    right, expected = off(run(rf.freeze(model, X, fp8=calibration)), run(model)), run(model)
    layer = _fp8._Rewriting._layer

    def planted(**changes):
        def wrong(self, at, step, narrow):
            made = layer(self, at, step, narrow)
            for name, factor in changes.items():
                made.options[name] *= factor
            return made

        monkeypatch.setattr(_fp8._Rewriting, "_layer", wrong)
        return off(run(rf.freeze(model, X, fp8=calibration)), expected)

    assert planted(residual_scale=2.0) > 2 * right
    assert planted(out_scale=1.25) > 2 * right


def agreement_of(same: int, count: int, required: float = 0.99) -> agreement.Fp8Verification:
    first = agreement.Agreement("fp8", "bfloat16", count, same, *interval(same, count))
    return agreement.Fp8Verification((first,), required, 1, (), {}, 1)


def interval(same: int, count: int) -> tuple[float, float]:
    from scipy.stats import beta

    low = beta.ppf(0.025, same, count - same + 1) if same else 0.0
    return low, beta.ppf(0.975, same + 1, count - same) if same < count else 1.0


def test_it_fails_where_the_images_show_that_too_few_agree():
    assert agreement_of(10, 10).ok and agreement_of(9, 10).ok
    assert not agreement_of(900, 1000).ok
    (said,) = agreement_of(900, 1000).failures
    assert said.startswith("fp8 has the top class of bfloat16 on 90.00% of 1000 images, at most 91")
