"""fuse and unfuse: whole models, shared children, everything that users do with a model."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import timm
import torch
import torchvision
from nets import images, stir, tiny_resnet
from torch import nn
from torch.nn.utils import prune
from torch.testing import assert_close
from torchvision.models import detection, resnet
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FrozenBatchNorm2d

import resnet_fused as rf
from resnet_fused.nn import _blocks

CLOSE = {"rtol": 2e-4, "atol": 2e-4}


def outputs(model, x):
    with torch.no_grad():
        return model(x)


def implementations(model, x):
    with torch.no_grad():
        return {row.layer: row.implementation for row in rf.explain(model, x).rows}


NETWORKS = {
    "resnet18": lambda: torchvision.models.resnet18(num_classes=5),
    "resnet34": lambda: torchvision.models.resnet34(num_classes=5),
    "resnet50": lambda: torchvision.models.resnet50(num_classes=5),
    "resnext50": lambda: torchvision.models.resnext50_32x4d(num_classes=5),
    "wide_resnet50": lambda: torchvision.models.wide_resnet50_2(num_classes=5),
    "dilated": lambda: tiny_resnet(replace_stride_with_dilation=[False, True, True]),
    "frozen": lambda: tiny_resnet(norm_layer=FrozenBatchNorm2d),
    "timm resnet18": lambda: timm.create_model("resnet18", num_classes=5),
    "timm resnet50": lambda: timm.create_model("resnet50", num_classes=5),
    "timm deep stem": lambda: timm.create_model("resnet26d", num_classes=5),
    "timm features": lambda: timm.create_model("resnet18", features_only=True),
    "rf.models": lambda: rf.models.resnet18(num_classes=5),
    "vgg11_bn": lambda: torchvision.models.vgg11_bn(num_classes=5).features,
    "mobilenet_v2": lambda: torchvision.models.mobilenet_v2(num_classes=5),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_same_numbers_same_keys_and_back(name):
    plain = stir(NETWORKS[name]()).eval()
    x = images(2, 64)
    expected = outputs(rf.unfuse(plain), x)
    fused = rf.fuse(plain)
    assert_close(outputs(fused, x), expected, **CLOSE)
    assert list(fused.state_dict()) == list(plain.state_dict())
    fused.load_state_dict(plain.state_dict(), strict=True)
    plain.load_state_dict(fused.state_dict(), strict=True)
    by = implementations(fused, x)
    assert sum(v == "cpu" for v in by.values()) > 0.8 * len(by), by
    back = rf.unfuse(fused)
    assert not any(isinstance(m, _blocks.Fused) for m in back.modules())
    assert_close(outputs(back, x), expected, rtol=0, atol=0)
    assert {type(m) for m in back.modules()} == {type(m) for m in rf.unfuse(plain).modules()}


def test_every_convolution_of_resnet50_is_fused():
    fused = rf.fuse(stir(torchvision.models.resnet50()).eval())
    by = implementations(fused, images(2, 64))
    assert len(by) == 53
    assert set(by.values()) == {"cpu"}


def test_children_are_the_very_same_and_the_argument_stays_usable():
    plain = tiny_resnet()
    kinds = [type(m) for m in plain.modules()]
    fused = rf.fuse(plain)
    assert [type(m) for m in plain.modules()] == kinds
    assert fused is not plain
    assert type(fused) is not type(plain)
    assert isinstance(fused, resnet.ResNet)
    for (name, theirs), (_, ours) in zip(plain.named_modules(), fused.named_modules(), strict=True):
        if isinstance(theirs, nn.Conv2d | nn.BatchNorm2d | nn.Linear):
            assert ours is theirs, name
    assert [id(p) for p in fused.parameters()] == [id(p) for p in plain.parameters()]


def test_inplace_changes_the_model_itself():
    plain = tiny_resnet()
    x = images()
    expected = outputs(plain, x)
    blocks = list(plain.layer1)
    fused = rf.fuse(plain, inplace=True)
    assert fused is plain
    assert fused.layer1[0] is blocks[0]
    assert isinstance(fused.layer1[0], _blocks.FusedBlock)
    assert_close(outputs(fused, x), expected, **CLOSE)
    assert rf.unfuse(fused, inplace=True) is plain
    assert_close(outputs(plain, x), expected, rtol=0, atol=0)


def test_fuse_twice_is_fuse_once():
    fused = rf.fuse(tiny_resnet())
    assert rf.fuse(fused) is fused


def test_a_shared_block_stays_shared():
    block = resnet.BasicBlock(8, 8)
    fused = rf.fuse(nn.Sequential(block, block).eval())
    assert fused[0] is fused[1]
    assert isinstance(fused[0], _blocks.FusedBlock)


def test_an_optimiser_made_before_still_trains_it():
    plain = tiny_resnet().train()
    optimiser = torch.optim.SGD(plain.parameters(), lr=0.1)
    fused = rf.fuse(plain)
    x = images(4)
    before = outputs(fused.eval(), x)
    fused.train()
    fused(x).square().mean().backward()
    optimiser.step()
    fused.eval()
    after = outputs(fused, x)
    assert (after - before).abs().max() > 1e-3
    assert_close(after, outputs(plain.eval(), x), **CLOSE)


@pytest.mark.parametrize("side", ["plain", "fused"])
def test_to_reaches_both_sides(side):
    plain = tiny_resnet()
    fused = rf.fuse(plain)
    x = images()
    outputs(fused, x)
    (plain if side == "plain" else fused).double()
    expected = outputs(plain, x.double())
    assert expected.dtype == torch.float64
    assert_close(outputs(fused, x.double()), expected)
    (plain if side == "plain" else fused).float()
    assert_close(outputs(fused, x), outputs(plain, x), **CLOSE)


def test_detection_backbone_with_frozen_batchnorm():
    model = detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, min_size=64, max_size=64, num_classes=3
    )
    # torchvision freezes only with pretrained weights; build the same backbone frozen.
    backbone = detection.backbone_utils.resnet_fpn_backbone(
        backbone_name="resnet50", weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=3
    )
    model.backbone = backbone
    stir(model).eval()
    fused = rf.fuse(model)
    x = images(2, 64)
    expected, ours = outputs(model.backbone, x), outputs(fused.backbone, x)
    for key in expected:
        assert_close(ours[key], expected[key], rtol=1e-3, atol=1e-3)
    by = implementations(fused.backbone, x)
    body = {k: v for k, v in by.items() if k.startswith("body")}
    assert len(body) == 53
    assert set(body.values()) == {"cpu"}
    assert len(outputs(fused, [x[0]])) == 1


def test_feature_extraction_by_fx():
    plain = tiny_resnet()
    fused = rf.fuse(plain)
    nodes = {"layer1": "a", "layer4": "b", "avgpool": "c"}
    x = images()
    expected = outputs(create_feature_extractor(plain, nodes), x)
    extractor = create_feature_extractor(fused, nodes)
    ours = outputs(extractor, x)
    for key, value in expected.items():
        assert_close(ours[key], value, **CLOSE)
    assert any(isinstance(m, _blocks.FusedBlock) for m in extractor.modules())
    with torch.no_grad(), rf.backends.recording() as routes:
        extractor(x)
    assert {r.implementation for r in routes} == {"cpu"}


@pytest.mark.parametrize("training", [False, True])
def test_compiled_whole(training):
    plain = tiny_resnet(resnet.BasicBlock).train(training)
    fused = copy.deepcopy(rf.fuse(plain))
    x = images()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(training):
        assert_close(compiled(x), plain(x), **CLOSE)


def test_exported_program_needs_no_resnet_fused():
    plain = tiny_resnet()
    x = images()
    program = torch.export.export(rf.fuse(plain), (x,))
    assert_close(program.module()(x), plain(x), **CLOSE)
    targets = {str(node.target) for node in program.graph.nodes}
    assert not any("resnet_fused" in target for target in targets)


def test_jit_trace():
    plain = tiny_resnet()
    x = images()
    with torch.no_grad():
        traced = torch.jit.trace(rf.fuse(plain), x)
        assert_close(traced(x), plain(x), **CLOSE)


def test_functional_call_sees_the_swapped_parameters():
    plain = tiny_resnet()
    fused = rf.fuse(plain)
    x = images()
    outputs(fused, x)
    other = {name: value * 1.5 for name, value in plain.named_parameters()}
    with torch.no_grad():
        ours = torch.func.functional_call(fused, other, (x,))
        assert_close(ours, torch.func.functional_call(plain, other, (x,)), rtol=1e-3, atol=1e-3)
    assert_close(outputs(fused, x), outputs(plain, x), **CLOSE)


def test_vmap_over_models_falls_back():
    plain = tiny_resnet(resnet.BasicBlock)
    fused = rf.fuse(plain)
    x = images(3)

    def one(image):
        return fused(image[None])[0]

    with torch.no_grad():
        assert_close(torch.vmap(one)(x), plain(x), **CLOSE)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_whole_and_independent(how):
    fused = rf.fuse(tiny_resnet())
    x = images()
    expected = outputs(fused, x)
    outputs(fused, x)  # packed by now
    if how == "deepcopy":
        twin = copy.deepcopy(fused)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(fused))
    else:
        buffer = io.BytesIO()
        torch.save(fused, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert type(twin) is type(fused)
    assert_close(outputs(twin, x), expected)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert outputs(twin, x).abs().max() == 0
    assert_close(outputs(fused, x), expected)


def test_a_hook_on_a_child_fires_and_its_layer_falls_back():
    plain = tiny_resnet()
    fused = rf.fuse(plain)
    x = images()
    seen = []
    handle = plain.layer2[0].conv2.register_forward_hook(lambda m, i, o: seen.append(o) or o * 2)
    by = implementations(fused, x)
    assert by["layer2.0.conv2"] == "modules"
    assert by["layer2.0.conv1"] == by["layer2.0.conv3"] == "cpu"
    assert len(seen) == 1
    assert_close(outputs(fused, x), outputs(plain, x), **CLOSE)
    handle.remove()
    assert implementations(fused, x)["layer2.0.conv2"] == "cpu"


def test_a_hook_on_the_shared_relu_fires_as_often_as_before():
    plain = tiny_resnet()
    fused = rf.fuse(plain)
    counts = []
    for model in (plain, fused):
        calls = []
        handle = model.layer1[0].relu.register_forward_hook(lambda m, i, o, c=calls: c.append(1))
        outputs(model, images())
        handle.remove()
        counts.append(len(calls))
    assert counts == [3, 3]


def test_a_hook_on_a_block_and_on_the_model_fires():
    fused = rf.fuse(tiny_resnet())
    seen = []
    fused.layer1[0].register_forward_hook(lambda m, i, o: seen.append("block"))
    fused.register_forward_pre_hook(lambda m, i: seen.append("model"))
    outputs(fused, images())
    assert seen == ["model", "block"]


def test_pruned_and_parametrized_weights_are_used():
    plain = tiny_resnet()
    prune.l1_unstructured(plain.layer1[0].conv1, "weight", amount=0.5)
    nn.utils.parametrizations.weight_norm(plain.layer1[0].conv2)
    fused = rf.fuse(plain)
    x = images()
    with torch.no_grad():
        plain.layer1[0].conv1.weight_orig.mul_(3)
        plain.layer1[0].conv2.parametrizations.weight.original0.mul_(2)
    expected = outputs(plain, x)
    assert_close(outputs(fused, x), expected, **CLOSE)
    by = implementations(fused, x)
    assert by["layer1.0.conv1"] == by["layer1.0.conv2"] == "modules"


def test_subclasses_and_replaced_forwards_are_left_alone():
    class Doubled(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) * 2

    plain = tiny_resnet()
    plain.layer1[0].conv1 = stir(Doubled(64, 64, 1, bias=False))
    block = plain.layer2[0]
    block.forward = lambda x: resnet.Bottleneck.forward(block, x) + 1
    conv3 = plain.layer3[0].conv3
    conv3.forward = lambda x: nn.Conv2d.forward(conv3, x) * 3
    fused = rf.fuse(plain)
    x = images()
    assert_close(outputs(fused, x), outputs(plain, x), **CLOSE)
    by = implementations(fused, x)
    assert by["layer1.0.conv1"] == by["layer2.0.conv1"] == by["layer3.0.conv3"] == "modules"


def test_odd_batchnorms():
    odd = {
        "affine=False": nn.BatchNorm2d(8, affine=False),
        "no statistics": nn.BatchNorm2d(8, track_running_stats=False),
        "momentum None": nn.BatchNorm2d(8, momentum=None),
        "eps": nn.BatchNorm2d(8, eps=0.5),
        "group norm": nn.GroupNorm(2, 8),
        "sync": nn.SyncBatchNorm(8),
    }
    for name, bn in odd.items():
        plain = stir(nn.Sequential(nn.Conv2d(3, 8, 3, bias=True), bn, nn.ReLU())).eval()
        fused = rf.fuse(plain)
        x = images()
        assert_close(outputs(fused, x), outputs(plain, x), msg=name, **CLOSE)
        by = implementations(fused, x)
        assert by["0"] == ("modules" if name in ("no statistics", "group norm") else "cpu"), name


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_training_is_the_plain_models(backend):
    """In float64 by the CPU's kernels; bit for bit where, as for Triton here, none serves."""
    plain = tiny_resnet().double().train()
    twin = copy.deepcopy(plain)
    fused = rf.fuse(twin)
    x = images(4, dtype=torch.float64)
    exact = {"rtol": 0, "atol": 0} if backend == "triton" else {"rtol": 1e-7, "atol": 1e-8}
    with rf.backend(backend):
        ours = fused(x)
        ours.square().mean().backward()
        rows = rf.explain(copy.deepcopy(fused), x).rows
    theirs = plain(x)
    theirs.square().mean().backward()
    assert_close(ours, theirs, **exact)
    for (name, a), b in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert_close(a.grad, b.grad, msg=name, **exact)
    for a, b in zip(fused.buffers(), plain.buffers(), strict=True):
        assert_close(a, b, **exact)
    implementation = "modules" if backend == "triton" else "cpu"
    assert {row.implementation for row in rows} == {implementation}
    assert all("training" in row.why for row in rows)


def test_frozen_batchnorm_fine_tuning_gradients():
    plain = tiny_resnet().train()
    for m in plain.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
    x = images(2)
    fused = rf.fuse(plain)
    grads = []
    for model in (plain, fused):
        for p in plain.parameters():
            p.grad = None
        model(x).square().mean().backward()
        grads.append([p.grad.clone() for p in plain.parameters()])
    for theirs, ours, (name, p) in zip(*grads, plain.named_parameters(), strict=True):
        assert_close(ours, theirs, rtol=5e-3, atol=1e-4, msg=name)
        assert ours.stride() == p.stride(), name
    assert {row.implementation for row in rf.explain(fused, x).rows} <= {"split", "reference"}


def test_autocast_gives_eagers_dtype_and_numbers():
    plain = tiny_resnet()
    fused = rf.fuse(plain)
    x = images()
    exact = outputs(copy.deepcopy(plain).double(), x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs, ours = outputs(plain, x), outputs(fused, x)
    assert ours.dtype == theirs.dtype
    error, eagers = ((y.double() - exact).norm() for y in (ours, theirs))
    assert error <= 1.25 * eagers


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_layout_is_kept(layout):
    block = stir(resnet.Bottleneck(16, 4)).eval()
    fused = rf.fuse(block)
    x = torch.randn(2, 16, 6, 6).contiguous(memory_format=layout)
    ours, theirs = outputs(fused, x), outputs(block, x)
    assert ours.stride() == theirs.stride()


def test_the_input_and_the_shortcut_are_never_written():
    fused = rf.fuse(stir(nn.Sequential(resnet.BasicBlock(8, 8), resnet.BasicBlock(8, 8))).eval())
    x = images(2, 16)[:, :1].repeat(1, 8, 1, 1).contiguous(memory_format=torch.channels_last)
    before = x.clone()
    kept = []
    fused[0].register_forward_hook(lambda m, i, o: kept.append((o, o.clone())))
    outputs(fused, x)
    assert torch.equal(x, before)
    assert torch.equal(*kept[0])


@pytest.mark.parametrize("bad", [None, "resnet50", torch.ones(1), [nn.Conv2d(1, 1, 1)]])
def test_bad_models_are_named(bad):
    for function in (rf.fuse, rf.unfuse):
        with pytest.raises(TypeError, match=r"model must be an nn.Module, got"):
            function(bad)


def test_wrong_inputs_raise_as_in_torch():
    plain = tiny_resnet()
    fused = rf.fuse(plain)
    for x in (torch.randn(1, 4, 32, 32), torch.randn(1, 3, 32, 32).double(), torch.ones(2)):
        with pytest.raises(RuntimeError) as theirs:
            plain(x)
        with pytest.raises(RuntimeError) as ours:
            fused(x)
        assert str(ours.value) == str(theirs.value)


def test_empty_batch_and_single_pixel():
    plain = tiny_resnet()
    fused = rf.fuse(plain)
    assert outputs(fused, torch.randn(0, 3, 32, 32)).shape == (0, 7)
    x = torch.randn(1, 3, 1, 1)
    assert_close(outputs(fused, x), outputs(plain, x), **CLOSE)


def test_a_convolution_that_pytorch_keeps_from_onednn_is_kept_too():
    fused = rf.fuse(stir(torchvision.models.resnet18(num_classes=5)).eval())
    x = images(1, 64)
    with torch.no_grad():
        rows = rf.explain(fused, x).rows
    small = [row for row in rows if row.implementation == "split"]
    assert {row.implementation for row in rows} == {"cpu", "split"}
    assert all("this small" in row.why for row in small)
    plain = rf.unfuse(fused)
    exact = outputs(copy.deepcopy(plain).double(), x.double())
    ours, theirs = ((outputs(m, x) - exact).norm() for m in (fused, plain))
    assert ours <= 1.5 * theirs


def test_nothing_to_fuse_is_said(caplog):
    with caplog.at_level("WARNING", logger="resnet_fused"):
        model = nn.Sequential(nn.Linear(2, 2))
        assert rf.fuse(model) is model
    assert "holds no block" in caplog.text


def test_the_package_is_pickled_by_its_name() -> None:
    """As plain modules are by cloudpickle, which sends along what a script's functions name."""
    assert pickle.loads(pickle.dumps(rf)) is rf
