"""`verify` passes an honest model, leaves it alone, and fails for a fault in any layer."""

from __future__ import annotations

import copy
import json
import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

import resnet_fused as rf
from resnet_fused.calibrate import calibrate_batchnorm
from resnet_fused.nn import _blocks, _prepared, _route
from resnet_fused.verify import Verification, verify

pytestmark = pytest.mark.slow  # left out of `make quick`


def projection(c: int, k: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c, k, 1, stride, bias=False), nn.BatchNorm2d(k))


def network() -> nn.Sequential:
    """A ResNet in small: stem, both kinds of blocks, identity and projection shortcuts."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, 8, 7, 2, 3, bias=False),
            bn1=nn.BatchNorm2d(8),
            relu=nn.ReLU(),
            maxpool=nn.MaxPool2d(3, 2, 1),
            basic=BasicBlock(8, 8),
            basic_down=BasicBlock(8, 12, 2, projection(8, 12, 2)),
            bottleneck_down=Bottleneck(12, 4, 2, projection(12, 16, 2)),
            bottleneck=Bottleneck(16, 4),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            fc=nn.Linear(16, 10),
        )
    )


CONVS = tuple(name for name, m in network().named_modules() if isinstance(m, nn.Conv2d))
LAST = tuple(n for n in CONVS if n in ("basic.conv2", "basic_down.conv2") or n.endswith("conv3"))


def images(n: int = 3, size: int = 48) -> Tensor:
    return 2 * torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(7))


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(11)
    net = network()
    calibrate_batchnorm(net, images(8), seed=3)
    return rf.fuse(net.eval())


@pytest.fixture(params=["auto", "reference"])
def backend(request: pytest.FixtureRequest) -> Any:
    with rf.backend(request.param):
        yield request.param


def plant_affine(
    monkeypatch: pytest.MonkeyPatch,
    target: nn.Module,
    fault: Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]],
) -> None:
    """Replaces the scale and shift of one layer, as a faulty derivation would."""
    honest = _prepared.affine

    def affine(conv: nn.Conv2d, bn: nn.Module, compute: torch.dtype) -> tuple[Tensor, Tensor]:
        scale, shift = honest(conv, bn, compute)
        return fault(bn, scale, shift) if conv is target else (scale, shift)

    monkeypatch.setattr(_prepared, "affine", affine)


def wrong_eps(eps: float) -> Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]:
    def fault(bn: nn.Module, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        wrong = scale * ((bn.running_var + bn.eps) / (bn.running_var + eps)).sqrt()
        return wrong, bn.bias - bn.running_mean * wrong

    return fault


def swapped_mean(bn: nn.Module, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    order = torch.arange(len(scale))
    # Channels whose gamma is not 0, where a mean matters.
    a, b = scale.abs().argsort(descending=True)[:2].tolist()
    order[a], order[b] = b, a
    return scale, bn.bias - bn.running_mean[order] * scale


def failing_layers(found: Verification) -> set[str]:
    return {check.layer for check in found.layers if not check.ok}


def test_the_network_holds_every_kind_of_layer(model: nn.Sequential) -> None:
    found = verify(model, images())
    assert {check.layer for check in found.layers} == set(CONVS)
    assert {check.pattern for check in found.layers} == {
        "conv+bn", "conv+bn+relu", "conv+bn+add+relu",
    }  # fmt: skip
    assert {check.layer for check in found.layers if "add" in check.pattern} == set(LAST)
    assert [check.block for check in found.blocks] == [
        "conv1", "basic", "basic_down", "bottleneck_down", "bottleneck",
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_an_honest_model_passes(model: nn.Sequential, backend: str, dtype: torch.dtype) -> None:
    found = verify(model.to(dtype), images().to(dtype))
    assert found.ok and found and not found.failures, str(found)
    assert all(0 < check.bound_use <= 1 for check in found.layers)
    assert not any(check.implementation == "modules" for check in found.layers)
    assert all(check.eager_rms > 0 and check.fused_rms > 0 for check in found.blocks)
    assert found.end_to_end.top1_agree is not None and found.dtype == str(dtype).split(".")[1]


@pytest.mark.parametrize("eps", [0.0, 1e-3])
@pytest.mark.parametrize("layer", CONVS)
def test_a_wrong_eps_in_any_layer_fails(
    model: nn.Sequential, monkeypatch: pytest.MonkeyPatch, backend: str, layer: str, eps: float
) -> None:
    plant_affine(monkeypatch, model.get_submodule(layer), wrong_eps(eps))
    found = verify(model, images())
    assert not found.ok and found.failures, str(found)
    if eps == 1e-3:
        assert failing_layers(found) == {layer}


@pytest.mark.parametrize("layer", CONVS)
def test_a_swapped_mean_in_any_layer_fails(
    model: nn.Sequential, monkeypatch: pytest.MonkeyPatch, backend: str, layer: str
) -> None:
    plant_affine(monkeypatch, model.get_submodule(layer), swapped_mean)
    found = verify(model, images())
    assert not found.ok and failing_layers(found) == {layer}
    assert any(f"layer {layer} " in line for line in found.failures)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layer", LAST)
def test_a_residual_that_the_op_drops_fails(
    model: nn.Sequential, monkeypatch: pytest.MonkeyPatch, backend: str, layer: str,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    target = model.to(dtype).get_submodule(layer)
    onednn, op, wide = _route._onednn, _route._by_op, _route.onednn.run_in_float32

    def without(x: Tensor, conv: nn.Module, bn: nn.Module, residual: Any, *rest: Any) -> Tensor:
        return onednn(x, conv, bn, None if conv is target else residual, *rest)

    def op_without(
        name: str, x: Tensor, conv: nn.Module, bn: nn.Module, residual: Any, *rest: Any
    ) -> Tensor:
        return op(name, x, conv, bn, None if conv is target else residual, *rest)

    def wide_without(folded: Any, x: Tensor, residual: Any, relu: bool) -> Tensor:
        kept = target.__dict__.get(_prepared.ATTRIBUTE)
        ours = kept is not None and kept.entry is not None and kept.entry.value is folded
        return wide(folded, x, None if ours else residual, relu)

    monkeypatch.setattr(_route.onednn, "run_in_float32", wide_without)
    monkeypatch.setattr(_route, "_onednn", without)
    monkeypatch.setattr(_route, "_by_op", op_without)
    found = verify(model, images().to(dtype))
    assert failing_layers(found) == {layer}
    assert layer.split(".")[0] in {check.block for check in found.blocks if not check.ok}


@pytest.mark.parametrize("layer", LAST)
def test_a_residual_that_the_block_drops_fails(
    model: nn.Sequential, monkeypatch: pytest.MonkeyPatch, backend: str, layer: str
) -> None:
    target, honest = model.get_submodule(layer), _blocks.conv_bn

    def without(x: Tensor, conv: nn.Module, bn: Any, act: Any = None, r: Any = None, **kw: Any):
        return honest(x, conv, bn, act, None if conv is target else r, **kw)

    monkeypatch.setattr(_blocks, "conv_bn", without)
    found = verify(model, images())
    assert not found.ok
    assert [check.block for check in found.blocks if not check.ok] == [layer.split(".")[0]]
    assert any(line.startswith(f"block {layer.split('.')[0]} has") for line in found.failures)


def test_a_fault_in_16_bits_fails(model: nn.Sequential, monkeypatch: pytest.MonkeyPatch) -> None:
    model.bfloat16()
    plant_affine(monkeypatch, model.get_submodule("basic.conv1"), swapped_mean)
    assert failing_layers(verify(model, images().bfloat16())) == {"basic.conv1"}


def test_a_stale_cache_fails(model: nn.Sequential) -> None:
    x = images()
    with torch.no_grad():
        model(x)
    bn = model.get_submodule("basic.bn1")
    assert isinstance(bn, nn.BatchNorm2d)
    bn.weight.data.mul_(1.01)
    found = verify(model, x)
    if any(check.implementation == "cpu" for check in found.layers):
        assert failing_layers(found) == {"basic.conv1"}
    rf.refresh(model)
    assert verify(model, x)


def state(model: nn.Module) -> dict[str, Any]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "tensors": {name: (id(t), t.detach().clone()) for name, t in tensors.items()},
        "versions": {name: t._version for name, t in tensors.items()},
        "grads": {name: (p.grad, p.requires_grad) for name, p in model.named_parameters()},
        "training": {name: m.training for name, m in model.named_modules()},
        "types": {name: type(m) for name, m in model.named_modules()},
        "hooks": {name: (len(m._forward_hooks), len(m._forward_pre_hooks))
                  for name, m in model.named_modules()},
    }  # fmt: skip


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_alone(model: nn.Sequential, training: bool, fused: bool) -> None:
    net: nn.Module = model if fused else rf.unfuse(model)
    net.train(training)
    net.get_submodule("basic.bn2").train(not training)
    net.get_submodule("fc").requires_grad_(False)
    net(images()).sum().backward()
    x = images().requires_grad_()
    before, rng = state(net), torch.get_rng_state()
    assert verify(net, x)
    after = state(net)
    for key in ("versions", "grads", "training", "types", "hooks"):
        assert after[key] == before[key], key
    for name, (identity, values) in before["tensors"].items():
        assert after["tensors"][name][0] == identity
        assert torch.equal(after["tensors"][name][1], values), name
    assert x.grad is None and torch.equal(rng, torch.get_rng_state())


def test_the_model_is_left_alone_after_an_error(model: nn.Sequential) -> None:
    model.train()
    before = state(model)
    with pytest.raises(RuntimeError):
        verify(model, torch.randn(2, 5, 32, 32))
    after = state(model)
    assert after["training"] == before["training"] and after["hooks"] == before["hooks"]


def test_progress_goes_from_none_to_all(model: nn.Sequential) -> None:
    calls: list[tuple[int, int, str]] = []
    verify(model, images(), progress=lambda *call: calls.append(call))
    done = [call[0] for call in calls]
    assert done == sorted(done) and done[0] == 0 and calls[-1][:2] == (done[-1],) * 2
    assert len({call[1] for call in calls}) == 1
    assert {f"layer {name}" for name in CONVS} <= {call[2] for call in calls}


def test_first_images_only(model: nn.Sequential) -> None:
    found = verify(model, images(4), images=1)
    assert found.ok and found.images == 1 and "the first 1 of 4 images" in str(found)
    assert all(check.shape[0] == 1 for check in found.layers)
    whole = verify(model, images(4))
    assert whole.images == 4 and whole.end_to_end == found.end_to_end
    with pytest.raises(ValueError, match="images is 0"):
        verify(model, images(), images=0)


def test_json_and_table(model: nn.Sequential) -> None:
    found = verify(model, images())
    record = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert record["ok"] is True and record["failures"] == []
    assert [row["layer"] for row in record["layers"]] == [check.layer for check in found.layers]
    assert record["end_to_end"]["ratio"] == pytest.approx(found.end_to_end.ratio)
    text = str(found)
    assert all(f"{name} " in text for name in CONVS) and text.splitlines()[-1].startswith("ok: ")


def test_nan_in_the_input_stays_where_it_is(
    model: nn.Sequential, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = images()
    x[1, 0, 10, 10] = math.nan
    x[2, 1, 3, 3] = math.inf
    assert verify(model, x).ok, str(verify(model, x))
    honest = _route._fused

    def drops(x: Tensor, *rest: Any) -> Tensor:
        # In place: the tensor that was recorded loses its NaN as well.
        return honest(x, *rest).nan_to_num_(0.0)

    monkeypatch.setattr(_route, "_fused", drops)
    found = verify(model, x)
    assert not found.ok and any(check.bound_use == math.inf for check in found.layers)


def test_layers_that_run_as_modules_are_judged_too(model: nn.Sequential) -> None:
    model.get_submodule("basic.conv1").register_forward_hook(lambda m, a, y: None)
    found = verify(model, images())
    hooked = next(check for check in found.layers if check.layer == "basic.conv1")
    assert hooked.implementation == "modules" and hooked.ok and found.ok
    assert 0 < hooked.bound_use <= 1
    model.get_submodule("basic_down.bn1").track_running_stats = False
    assert verify(model, images()).ok


def test_autocast(model: nn.Sequential) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found = verify(model, images())
    assert found.ok, str(found)


def test_outputs_that_are_no_vectors(model: nn.Sequential) -> None:
    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = model

        def forward(self, x: Tensor) -> dict[str, Any]:
            stem = self.body.maxpool(self.body.relu(self.body.bn1(self.body.conv1(x))))
            return {"a": self.body.basic(stem), "b": [self.body.basic_down(stem)]}

    found = verify(Features(), images())
    assert found.ok and found.end_to_end.top1_agree is None
    assert {check.block for check in found.blocks} == {"body.basic", "body.basic_down"}


def test_a_real_resnet() -> None:
    torch.manual_seed(0)
    net = torchvision.models.resnet18(num_classes=10)
    x = images(2, 64)
    assert "gamma is 0 or less in" in calibrate_batchnorm(net, x)
    found = verify(net, x)
    assert found.ok and len(found.layers) == 20 and len(found.blocks) == 9, str(found)


def test_bad_arguments_are_named(model: nn.Sequential) -> None:
    x = images()
    with pytest.raises(TypeError, match="model is a str"):
        verify("resnet50", x)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"x is torch\.int64"):
        verify(model, x.long())
    with pytest.raises(TypeError, match=r"x is torch\.float64, the precision of the oracle"):
        verify(copy.deepcopy(model).double(), x.double())
    with pytest.raises(TypeError, match="x is list"):
        verify(model, [x])  # type: ignore[arg-type]
    for bad in (x[0], x[:0]):
        with pytest.raises(ValueError, match=r"x has shape .*accepted is \[N, C, H, W\]"):
            verify(model, bad)
    with pytest.raises(ValueError, match=r"x is torch\.bfloat16 and the model's .*float32"):
        verify(model, x.bfloat16())
    with pytest.raises(ValueError, match="nothing to verify"):
        verify(nn.Conv2d(3, 4, 1), x)


def test_calibration_makes_statistics_of_the_images() -> None:
    torch.manual_seed(1)
    net, x = network().train(), images(8)
    net.get_submodule("basic").eval()
    modes = [m.training for m in net.modules()]
    rng = torch.get_rng_state()
    twin = copy.deepcopy(net)
    sentence = calibrate_batchnorm(net, x, seed=5)
    assert [m.training for m in net.modules()] == modes
    assert torch.equal(rng, torch.get_rng_state())
    bn = net.get_submodule("bn1")
    assert isinstance(bn, nn.BatchNorm2d) and bn.momentum == 0.1
    with torch.no_grad():
        y = net.get_submodule("conv1")(x)
    torch.testing.assert_close(bn.running_mean, y.mean((0, 2, 3)))
    torch.testing.assert_close(bn.running_var, y.var((0, 2, 3)), rtol=1e-4, atol=1e-6)
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        assert (norm.weight < 0).any() and (norm.weight == 0).any() and (norm.weight > 0).any()
    below = sum(int((m.weight <= 0).sum()) for m in norms)
    assert f"gamma is 0 or less in {below} of" in sentence and "8 images" in sentence
    assert calibrate_batchnorm(twin, x, seed=5) == sentence
    for a, b in zip(net.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    calibrate_batchnorm(twin, x, seed=6)
    assert not torch.equal(twin.get_submodule("bn1").weight, bn.weight)
    with pytest.raises(ValueError, match="no BatchNorm"):
        calibrate_batchnorm(nn.Conv2d(3, 4, 1), x)
    with pytest.raises(TypeError, match="model is a int"):
        calibrate_batchnorm(3, x)  # type: ignore[arg-type]
