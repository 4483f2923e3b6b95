"""rf.models against torchvision: structure, initial values, outputs, life of a network."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import resnet_fused as rf

pytestmark = pytest.mark.slow  # left out of `make quick`

torchvision = pytest.importorskip("torchvision", reason="the reference that these networks copy")

NAMES = [name for name, row in rf.models.ARCHITECTURES.items() if row.weights]
BLOCKS: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {
    "basic": (rf.nn.BasicBlock, torchvision.models.resnet.BasicBlock),
    "bottleneck": (rf.nn.Bottleneck, torchvision.models.resnet.Bottleneck),
}
# Small networks with every structural variant: (block, arguments of ResNet).
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "basic": ("basic", {}),
    "bottleneck": ("bottleneck", {}),
    "grouped": ("bottleneck", {"groups": 4, "width_per_group": 8}),
    "wide": ("bottleneck", {"width_per_group": 96}),
    "dilated_3_4": ("bottleneck", {"replace_stride_with_dilation": [False, True, True]}),
    "dilated_all": ("bottleneck", {"replace_stride_with_dilation": (True, True, True)}),
    "classes": ("basic", {"num_classes": 7}),
    "zero_init": ("bottleneck", {"zero_init_residual": True}),
    "eps": ("basic", {"norm_layer": lambda c: nn.BatchNorm2d(c, eps=0.25)}),
    "group_norm": ("basic", {"norm_layer": lambda c: nn.GroupNorm(8, c)}),
    "frozen": ("bottleneck", {"norm_layer": torchvision.ops.FrozenBatchNorm2d}),
}


def small_pair(variant: str, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """(ours, torchvision's), with as few blocks as show every kind of shortcut and dilation."""
    kind, arguments = VARIANTS[variant]
    ours, theirs = BLOCKS[kind]
    layers = [1, 1, 1, 2] if "replace_stride_with_dilation" in arguments else [1, 2, 1, 1]
    arguments = {"num_classes": 10, **arguments}
    torch.manual_seed(seed)
    net = rf.models.ResNet(ours, layers, **arguments)
    torch.manual_seed(seed)
    reference = torchvision.models.ResNet(theirs, layers, **arguments)
    return net, reference


def perturb(model: nn.Module, seed: int = 1) -> None:
    """Make every normalisation telling: gamma of both signs, a mean, a variance far from 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            state = dict(module.named_parameters(recurse=False))
            state |= dict(module.named_buffers(recurse=False))
            if isinstance(module, nn.Conv2d | nn.Linear) or "weight" not in state:
                continue
            shape = state["weight"].shape
            state["weight"].copy_(torch.rand(shape, generator=generator) * 1.2 - 0.2)
            state["bias"].copy_(torch.randn(shape, generator=generator) * 0.2)
            if "running_var" in state:
                state["running_mean"].copy_(torch.randn(shape, generator=generator) * 0.2)
                state["running_var"].copy_(torch.rand(shape, generator=generator) + 0.5)


def images(n: int = 2, size: int = 64, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(2)).to(dtype)


def leaves(model: nn.Module) -> list[tuple[str, str]]:
    """Names and descriptions (channels, stride, padding, dilation, groups, eps) of all leaves."""
    return [(name, repr(m)) for name, m in model.named_modules() if not list(m.children())]


class RandomDraws(TorchDispatchMode):
    """Records each random operation with its shape and arguments, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.draws: list[tuple[str, tuple[int, ...], tuple[Any, ...]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            arguments = (*args[1:], *sorted((kwargs or {}).items()))
            self.draws.append((str(func), tuple(args[0].shape), arguments))
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _keep_random_state() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield


# ------------------------------------------------------------------ the same network


def test_every_architecture_of_torchvision_is_here() -> None:
    families = ("resnet", "resnext", "wide_resnet")
    known = torchvision.models.list_models(module=torchvision.models)
    assert sorted(NAMES) == sorted(name for name in known if name.startswith(families))


@pytest.mark.parametrize("name", NAMES)
def test_structure_and_strict_loading_both_ways(name: str) -> None:
    with torch.device("meta"):
        ours = rf.models.get_model(name)
        theirs = torchvision.models.get_model(name)
    mine, reference = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(reference)
    assert [t.shape for t in mine.values()] == [t.shape for t in reference.values()]
    assert leaves(ours) == leaves(theirs)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    ours.load_state_dict(reference, strict=True, assign=True)
    theirs.load_state_dict(mine, strict=True, assign=True)


@pytest.mark.parametrize("name", NAMES)
def test_random_draws_are_those_of_torchvision(name: str) -> None:
    """The same operations on the same shapes in the same order: a seed gives the same weights."""
    draws = []
    for build in (rf.models.get_model, torchvision.models.get_model):
        with RandomDraws() as mode, torch.device("meta"):
            build(name, zero_init_residual=True)
        draws.append(mode.draws)
    assert len(draws[0]) > 40  # two for each convolution, two for the classifier
    assert draws[0] == draws[1]


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d"])
@pytest.mark.parametrize("zero_init_residual", [False, True])
def test_initial_values_are_bit_equal_to_torchvisions(name: str, zero_init_residual: bool) -> None:
    states = []
    for build in (rf.models.get_model, torchvision.models.get_model):
        torch.manual_seed(3)
        states.append(build(name, zero_init_residual=zero_init_residual).state_dict())
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key
    last_bn = "layer1.0.bn2.weight" if name == "resnet18" else "layer1.0.bn3.weight"
    assert bool((states[0][last_bn] == 0).all()) is zero_init_residual


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_have_torchvisions_structure_and_initial_values(variant: str) -> None:
    ours, theirs = small_pair(variant)
    assert leaves(ours) == leaves(theirs)
    reference = theirs.state_dict()
    assert list(ours.state_dict()) == list(reference)
    for key, value in ours.state_dict().items():
        assert torch.equal(value, reference[key]), key
    for attribute in ("inplanes", "dilation", "groups", "base_width"):
        assert getattr(ours, attribute) == getattr(theirs, attribute), attribute


@pytest.mark.parametrize("variant", VARIANTS)
def test_eval_outputs_in_float64(variant: str) -> None:
    """In float64 a wrong stride, eps or shortcut cannot hide behind rounding."""
    ours, theirs = small_pair(variant)
    perturb(theirs)
    ours.load_state_dict(theirs.state_dict())
    x = images(dtype=torch.float64)
    with torch.no_grad():
        got, expected = ours.double().eval()(x), theirs.double().eval()(x)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_eval_error_in_float32_is_that_of_torchvision(name: str) -> None:
    torch.manual_seed(4)
    theirs = torchvision.models.get_model(name)
    perturb(theirs)
    theirs.eval()
    ours = rf.models.get_model(name).eval()
    ours.load_state_dict(theirs.state_dict())
    x = images(n=4)
    # Fused layers work in channels_last whatever comes in, so eager is asked in that layout too.
    last = torch.channels_last
    with torch.no_grad():
        outputs = [ours(x), ours.to(memory_format=last)(x.to(memory_format=last))]
        eager = theirs.to(memory_format=last)(x.to(memory_format=last))
        oracle = theirs.double()(x.double())
    assert oracle.abs().max() > 1e-3
    eager_error = (eager - oracle).square().mean().sqrt()
    for y in outputs:
        assert (y - oracle).square().mean().sqrt() <= rf.numerics.END_TO_END_LIMIT * eager_error


@pytest.mark.parametrize("variant", ["basic", "bottleneck", "grouped", "dilated_all"])
def test_training_is_torchvisions(variant: str) -> None:
    """Output, gradients and statistics are the same, up to float64's roundings."""
    ours, theirs = small_pair(variant)
    perturb(theirs)
    ours.load_state_dict(theirs.state_dict())
    x = images(n=4, dtype=torch.float64)
    results = []
    for model in (ours, theirs):
        model.double().train()
        y = model(x)
        y.square().mean().backward()
        gradients = {n: p.grad for n, p in model.named_parameters()}
        results.append((y.detach(), gradients, dict(model.named_buffers())))
    (y, gradients, buffers), (expected, their_gradients, their_buffers) = results
    close = {"rtol": 1e-7, "atol": 1e-8}
    torch.testing.assert_close(y, expected, **close)
    assert gradients.keys() == their_gradients.keys()
    for name, gradient in gradients.items():
        assert gradient is not None, name
        torch.testing.assert_close(gradient, their_gradients[name], msg=name, **close)
    for name, buffer in buffers.items():
        torch.testing.assert_close(buffer, their_buffers[name], msg=name, **close)


@pytest.mark.parametrize("variant", ["basic", "frozen"])
def test_gradients_with_fixed_statistics_in_float64(variant: str) -> None:
    """Fine-tuning with frozen BatchNorm differentiates through the fused layers themselves."""
    ours, theirs = small_pair(variant)
    perturb(theirs)
    ours.load_state_dict(theirs.state_dict())
    gradients = []
    for model in (ours, theirs):
        model.double().eval()
        x = images(dtype=torch.float64).requires_grad_()
        model(x).square().mean().backward()
        gradients.append({"x": x.grad} | {n: p.grad for n, p in model.named_parameters()})
    for name, expected in gradients[1].items():
        assert expected is not None, name
        assert expected.abs().max() > 0, name
        torch.testing.assert_close(gradients[0][name], expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", ["resnet18", "wide_resnet50_2"])
def test_every_convolution_runs_fused_in_inference_and_training(name: str) -> None:
    model = rf.models.get_model(name).eval()
    with torch.no_grad():
        table = rf.explain(model, images(n=1, size=32))
    convs = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    assert [row.layer for row in table.rows] == convs
    assert "modules" not in table.counts()
    with torch.no_grad():
        training = rf.explain(model.train(), images(n=2, size=32))
    assert training.counts() == {"cpu": len(convs)}


def test_unfuse_gives_plain_modules_and_fuse_the_network_again() -> None:
    ours, theirs = small_pair("bottleneck")
    perturb(theirs)
    ours.load_state_dict(theirs.state_dict())
    x = images(n=1)
    plain = rf.unfuse(ours.eval())
    assert type(plain) is rf.models.PlainResNet
    with torch.no_grad():
        assert torch.equal(plain(x), theirs.eval()(x))  # eager, operation by operation
        assert rf.explain(plain, x).fused == 0
        again = rf.fuse(plain)
        assert type(again) is rf.models.ResNet
        assert torch.equal(again(x), ours(x))
    assert plain.conv1 is ours.conv1 is again.conv1


# ------------------------------------------------------------------ life of a network


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("kind", BLOCKS)
def test_deepcopy_and_pickle(kind: str, clone: Callable[[nn.Module], nn.Module]) -> None:
    model = rf.models.ResNet(BLOCKS[kind][0], [1, 1, 1, 1], num_classes=5)
    perturb(model)
    model.eval()
    x = images(n=1)
    with torch.no_grad():
        before = model(x)  # leaves prepared weights behind, which a copy may not trip over
        twin = clone(model)
        assert torch.equal(twin(x), before)
        twin.conv1.weight.mul_(2.0)  # the copy is its own: the original does not move
        twin.layer1[0].bn1.bias.add_(1.0)
        assert not torch.equal(twin(x), before)
        assert torch.equal(model(x), before)


def test_factories_pickle_by_name() -> None:
    for name in NAMES:
        factory = getattr(rf.models, name)
        assert factory.__name__ == name
        assert pickle.loads(pickle.dumps(factory)) is factory


def test_eval_train_eval_sees_new_statistics() -> None:
    model = rf.models.ResNet(rf.nn.BasicBlock, [1, 1, 1, 1], num_classes=5).eval()
    x = images(n=4)
    with torch.no_grad():
        before = model(x)
        model.train()(x + 1.0)
        after = model.eval()(x)
        expected = copy.deepcopy(model).double()(x.double())
    assert not torch.equal(after, before)
    torch.testing.assert_close(after.double(), expected, rtol=1e-3, atol=1e-4)


def test_num_classes_and_a_new_head() -> None:
    model = rf.models.resnet18(num_classes=11).eval()
    assert model.fc.out_features == 11
    assert model(images(n=1)).shape == (1, 11)
    model.fc = nn.Identity()
    assert model(images(n=1)).shape == (1, 512)


def test_empty_batch() -> None:
    model = rf.models.resnet18(num_classes=3).eval()
    with torch.no_grad():
        assert model(torch.empty(0, 3, 64, 64)).shape == (0, 3)


@pytest.mark.parametrize(
    ("flags", "size"), [([False, False, True], 4), ([False, True, True], 8), ([True] * 3, 16)]
)
def test_dilation_keeps_the_resolution(flags: list[bool], size: int) -> None:
    model = rf.models.resnet50(replace_stride_with_dilation=flags).eval()
    seen: list[torch.Size] = []
    model.layer4.register_forward_hook(lambda module, args, y: seen.append(y.shape))
    with torch.no_grad():
        model(images(n=1))
    assert seen == [(1, 2048, size, size)]
    assert model.layer4[1].conv2.dilation == (2 ** sum(flags),) * 2


def test_detection_backbone_of_torchvision_accepts_it() -> None:
    from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor

    model = rf.models.ResNet(rf.nn.Bottleneck, [1, 1, 1, 1])
    pyramid = _resnet_fpn_extractor(model, trainable_layers=3).eval()
    with torch.no_grad():
        maps = pyramid(images(n=1))
    assert [tuple(m.shape[1:]) for m in maps.values()] == [
        (256, 16, 16),
        (256, 8, 8),
        (256, 4, 4),
        (256, 2, 2),
        (256, 1, 1),
    ]


def test_feature_extraction_compile_and_export() -> None:
    from torchvision.models.feature_extraction import create_feature_extractor

    model = rf.models.ResNet(rf.nn.Bottleneck, [1, 1, 1, 1], num_classes=5)
    perturb(model)
    model.eval()
    x = images(n=2)
    with torch.no_grad():
        expected = model(x)
        stages = create_feature_extractor(model, {"layer2": "middle", "fc": "scores"})(x)
        assert stages["middle"].shape == (2, 512, 8, 8)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        exported = torch.export.export(model, (x,)).module()(x)
    for result in (stages["scores"], compiled, exported):
        torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-4)
