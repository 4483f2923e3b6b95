"""The paper's blocks and networks: its Tables 1 and 6, its shortcuts, in inference and training.

[He15] is "Deep Residual Learning for Image Recognition", arXiv:1512.03385. Training of the blocks
is in test_training_blocks.py, over the same cases as all others.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from nets import stir
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from training_nets import BACKEND, CASES, assert_same, build, steps

import resnet_fused as rf
from resnet_fused import numerics
from resnet_fused.bench import nodes

OWN = [name for name in CASES if name.startswith(("rf ", "residual "))]


def on_meta(name, **arguments):
    with torch.device("meta"):
        return rf.models.get_model(name, **arguments)


def multiply_adds(model, size=224):
    x = torch.empty(1, 3, size, size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        rf.unfuse(model).eval()(x)
    return counter.get_total_flops() / 2


# [He15], Table 1: billions of multiply-adds; and what counting layer by layer gives.
TABLE_1 = {
    "resnet18": (1.8, 1.795, "A"),
    "resnet34": (3.6, 3.644, "A"),
    "resnet50": (3.8, 3.858, "B"),
    "resnet101": (7.6, 7.570, "B"),
    "resnet152": (11.3, 11.282, "B"),
    "plain18": (1.8, 1.795, "none"),
    "plain34": (3.6, 3.644, "none"),
}


@pytest.mark.parametrize("name", TABLE_1)
def test_multiply_adds_of_table_1(name):
    published, counted, shortcut = TABLE_1[name]
    found = multiply_adds(on_meta(name, version="v1", shortcut=shortcut)) / 1e9
    assert found == pytest.approx(counted, abs=5e-4)
    assert found == pytest.approx(published, rel=0.02)


def test_the_stride_of_v1_5_costs_more():
    v1, v1_5 = (multiply_adds(on_meta("resnet50", version=v)) for v in ("v1", "v1.5"))
    # Twelve of the sixteen blocks are the same; 3x3s of four times the pixels in three others.
    assert v1_5 / 1e9 == pytest.approx(4.089, abs=5e-4) and v1 < v1_5


# [He15], Table 6: millions of parameters.
TABLE_6 = {20: 0.27, 32: 0.46, 44: 0.66, 56: 0.85, 110: 1.7, 1202: 19.4}


@pytest.mark.parametrize("depth", TABLE_6)
def test_parameters_and_layers_of_table_6(depth):
    net = on_meta(f"cifar_resnet{depth}")
    # Option A has no parameters, so that the plain network has as many.
    nets = [net, on_meta(f"cifar_plain{depth}")] if depth < 1202 else [net]
    for made in nets:
        count = sum(p.numel() for p in made.parameters()) / 1e6
        assert count == pytest.approx(TABLE_6[depth], rel=0.02)
        layers = [m for m in made.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        assert len(layers) == depth


@pytest.mark.parametrize("name", ["plain18", "cifar_plain20"])
def test_plain_networks_have_no_shortcut_and_all_else_equal(name):
    residual = name.replace("plain", "resnet")
    plain, other = on_meta(name), on_meta(residual, shortcut="A")
    shapes = [{k: v.shape for k, v in net.state_dict().items()} for net in (plain, other)]
    assert shapes[0] == shapes[1]
    blocks = [m for m in plain.modules() if isinstance(m, rf.nn.BasicBlock)]
    assert len(blocks) in (8, 9) and not any(block.residual for block in blocks)


def projections(net):
    names = [n for n, m in net.named_modules() if n.endswith("downsample")]
    found = [type(net.get_submodule(n)) for n in names]
    return found.count(nn.Sequential), found.count(rf.nn.PaddedShortcut)


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("resnet34", {"A": (0, 3), "B": (3, 0), "C": (16, 0), "none": (0, 0)}),
        ("resnet50", {"A": (0, 4), "B": (4, 0), "C": (16, 0), "none": (0, 0)}),
        ("cifar_resnet20", {"A": (0, 2), "B": (2, 0), "C": (9, 0), "none": (0, 0)}),
    ],
)
def test_shortcuts_of_each_option(name, counts):
    for option, expected in counts.items():
        assert projections(on_meta(name, shortcut=option)) == expected, option


def test_versions_differ_in_the_place_of_the_stride():
    for version, places in (("v1", [2, 1, 1]), ("v1.5", [1, 2, 1])):
        block = on_meta("resnet50", version=version).layer2[0]
        assert [c.stride[0] for c in (block.conv1, block.conv2, block.conv3)] == places
        assert on_meta("resnet18", version=version).layer2[0].conv1.stride[0] == 2


@pytest.mark.parametrize("name", ["cifar_resnet20", "cifar_plain20", "resnet18", "plain18"])
def test_weights_are_drawn_as_he_et_al_do(name):
    torch.manual_seed(0)
    net = rf.models.get_model(name)
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 20_000:
            window = module.kernel_size[0] * module.kernel_size[1]
            fan = window * (module.in_channels if "cifar" in name else module.out_channels)
            assert float(module.weight.detach().std()) == pytest.approx((2 / fan) ** 0.5, rel=0.03)


# ------------------------------------------------------------------ fused and plain are the same


@pytest.mark.parametrize("name", OWN)
def test_blocks_in_inference(name):
    plain, x = build(name, torch.float32)
    fused = rf.fuse(plain.eval())
    assert type(fused) is not type(plain) and type(rf.unfuse(fused)) is type(plain)
    with torch.no_grad():
        oracle = copy.deepcopy(plain).double()(x.double())
        with rf.backends.recording() as routes:
            y = fused(x)
    assert {route.implementation for route in routes} == {"cpu"}
    assert (routes[-1].pattern == "conv+bn+add+relu") == fused.residual
    layers = len(fused.steps) + isinstance(fused.downsample, nn.Sequential)
    assert len(routes) == layers
    scale = float(oracle.abs().max())
    assert float((y - oracle).abs().max()) <= 64 * numerics.unit_roundoff(x.dtype) * scale


@pytest.mark.parametrize("name", OWN)
def test_blocks_are_saved_and_copied(name):
    plain, x = build(name)
    fused = rf.fuse(plain).eval()
    with torch.no_grad():
        expected = fused(x)
        for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
            assert torch.equal(other(x), expected)


SMALL = {
    "plain18": {"num_classes": 7},
    "cifar_plain20": {},
    "cifar_resnet20": {"shortcut": "C"},
    "cifar_resnet32": {"shortcut": "B"},
}


@pytest.mark.parametrize("name", SMALL)
def test_networks_train_as_their_modules_do(name):
    torch.manual_seed(1)
    fused = stir(rf.models.get_model(name, **SMALL[name])).double().train()
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    assert_same(*steps(rf.unfuse(fused), x, BACKEND), tolerance=1e-10)


@pytest.mark.parametrize("name", [*SMALL, "plain34", "cifar_plain56"])
@pytest.mark.parametrize("train", [False, True])
def test_explain_has_no_layer_on_the_fallback(name, train):
    net = rf.models.get_model(name, **SMALL.get(name, {})).train(train)
    x = torch.randn(2, 3, 32, 32)
    asked = rf.backend(BACKEND if train else "auto")
    with asked, torch.set_grad_enabled(train), rf.backends.recording() as routes:
        net(x)
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert {id(route.conv) for route in routes} == {id(conv) for conv in convs}
    others = {route.why for route in routes if route.implementation not in ("cpu", BACKEND)}
    assert not others


@pytest.mark.parametrize(
    ("name", "options"),
    [("cifar_plain20", {}), ("plain18", {}), ("resnet18", {"shortcut": "A"}),
     ("cifar_resnet20", {"shortcut": "C"}), ("resnet50", {"version": "v1"})],
)  # fmt: skip
def test_engines_of_them(name, options):
    torch.manual_seed(2)
    net = stir(rf.models.get_model(name, num_classes=7, **options)).eval()
    x = torch.randn(2, 3, 32, 32)
    engine = rf.freeze(net, x)
    with torch.no_grad():
        expected = rf.unfuse(net).double()(x.double())
        scale = float(expected.abs().max())
        assert float((engine(x) - expected).abs().max()) <= 1e-4 * scale


def test_the_bench_knows_a_plain_network_s_kernels():
    found, residual = (
        nodes.nodes(on_meta(name, **more).train(), (2, 3, 64, 64), torch.float32, folds=True)
        for name, more in (("plain18", {}), ("resnet18", {"shortcut": "A"}))
    )
    counts = [sum(len(node.kernels) for node in every) for every in (found, residual)]
    moved = [sum(k.cost.bytes for n in every for k in n.kernels) for every in (found, residual)]
    assert counts[0] == counts[1] and moved[0] < moved[1]


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: rf.models.resnet18(version="v2"), r"version: got 'v2', accepted are v1, v1.5"),
        (lambda: rf.models.resnet18(shortcut="D"), "shortcut: got 'D', accepted are A, B, C, none"),
        (lambda: rf.models.plain18(shortcut="B"), "plain18 got 'B', the network's own is none"),
        (lambda: rf.models.cifar_plain20(shortcut="A"), "cifar_plain20 got 'A'"),
        (lambda: rf.models.cifar_resnet20(shortcut="x"), "shortcut: got 'x'"),
        (lambda: rf.models.plain34(weights="DEFAULT"), "nobody has published any of plain34"),
        (lambda: rf.models.resnet50(weights="DEFAULT", version="v1"), "version 'v1.5'"),
        (lambda: rf.models.get_model("resnet19"), "accepted are resnet18"),
        (lambda: rf.models.get_model_weights("cifar_resnet20"), "nobody has published any"),
        (lambda: rf.nn.BasicBlock(4, 4, 1, nn.Identity(), residual=False), "needs residual=True"),
        (lambda: rf.nn.ResidualBlock(4, []), "at least one layer"),
        (lambda: rf.nn.ResidualBlock(4, [4], [3, 3]), "as many as layers"),
        (lambda: rf.nn.ResidualBlock(4, [4], 2), "kernel_size is 2; odd ones"),
        (lambda: rf.nn.ResidualBlock(4, [4], strided=1), "strided is 1; 0 to 0"),
        (lambda: rf.nn.ResidualBlock(4, [3], shortcut="A"), "at least in_channels=4"),
        (lambda: rf.nn.make_shortcut("E", 4, 4), "shortcut: got 'E'"),
    ],
)  # fmt: skip
def test_bad_input_is_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()
