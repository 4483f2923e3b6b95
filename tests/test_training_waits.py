"""No training node makes the host wait for a GPU, or copies from it: a graph could hold neither."""

from __future__ import annotations

from typing import Any

import graph_standins
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import resnet_fused as rf
from resnet_fused import _platform
from resnet_fused.nn import _training as node
from resnet_fused.nn import _training_route
from resnet_fused.ops import _passes
from resnet_fused.train.step import Step

NETWORKS = {
    "bottlenecks": lambda: rf.models.resnet50(num_classes=4),
    "basic blocks": lambda: rf.models.resnet18(num_classes=4),
    "padded shortcuts": lambda: rf.models.cifar_resnet20(),
}


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_no_op_of_a_step_waits(backend, momentum):
    with rf.backend(backend):
        model = rf.models.resnet18(num_classes=4).train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = momentum
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, fused=True)
        scaler = torch.amp.GradScaler("cpu")
        step = Step(model, F.cross_entropy, optimizer, scaler, clip_norm=1.0)
        x, labels = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
        step(x, labels)
        with graph_standins.NoWaiting() as seen:
            step(x, labels)
    ours = {name for name in seen.names if name.startswith("resnet_fused::")}
    assert {"resnet_fused::conv_bn_stats", "resnet_fused::conv_bn_wgrad"} <= ours


class Copies(TorchDispatchMode):
    """Notes what goes from one device to another, and what asks for a value."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        self.names.add(name)
        given = [t for t in [*args, out] if isinstance(t, torch.Tensor)]
        crosses = name in ("aten::_to_copy", "aten::copy_") and len({t.device for t in given}) > 1
        if crosses or name in graph_standins.WAITS:
            self.found.append(name)
        return out


class Context:
    """What autograd gives a node, whose engine would want a real GPU."""

    def __init__(self, count: int) -> None:
        self.needs_input_grad = (False,) + (True,) * count
        self.saved_tensors: tuple[torch.Tensor | None, ...] = ()

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
        self.saved_tensors = tensors


def forward_and_backward(*given: Any) -> torch.Tensor:
    """In the place of a node's `apply`."""
    context = Context(len(given) - 1)
    out = node._Node.forward(context, *given)
    node._Backward(context).run(torch.empty_like(out))
    return out


def on_a_fake_gpu(monkeypatch: pytest.MonkeyPatch, network: str) -> Copies:
    """A step's nodes on fake tensors of a GPU, by the references."""
    monkeypatch.setattr(_platform, "current_device", lambda: 0)
    monkeypatch.setattr(node._Node, "apply", forward_and_backward)
    # Who takes a node is not asked here: a fake tensor is none of those that do.
    monkeypatch.setattr(_training_route, "_tensors_reason", lambda *given: None)
    monkeypatch.setattr(_training_route, "call_reason", lambda *given: None)
    with FakeTensorMode(), rf.backend("reference"):
        with torch.device("cuda"):
            model = NETWORKS[network]().train()
        x = torch.empty(2, 3, 32, 32, device="cuda")
        with Copies() as seen:
            model(x)
    return seen


@pytest.mark.parametrize("network", NETWORKS)
def test_nothing_of_a_node_crosses_between_host_and_gpu(monkeypatch, network):
    seen = on_a_fake_gpu(monkeypatch, network)
    assert seen.found == []
    ours = {name for name in seen.names if name.startswith("resnet_fused::")}
    assert {"resnet_fused::bn_update_stats", "resnet_fused::bn_backward_finalize"} <= ours


def test_a_copy_from_the_host_would_be_seen(monkeypatch):
    real = node.frozen_rows

    def crossing(bn, like):
        torch.zeros(()).to(like.device)
        return real(bn, like)

    monkeypatch.setattr(node._Forward, "update", lambda self: crossing(*first(self)))
    assert "aten::_to_copy" in on_a_fake_gpu(monkeypatch, "basic blocks").found


def first(state: Any) -> tuple[nn.Module, torch.Tensor]:
    return state.plan.layers[0].bn, state.raw[0]


def test_joined_statistics_bring_their_count_without_a_copy(monkeypatch):
    from torch.distributed import _functional_collectives as collectives

    monkeypatch.setattr(collectives, "wait_tensor", lambda t: t)
    for name in ("all_gather_single", "all_gather_tensor"):
        if hasattr(collectives, name):
            monkeypatch.setattr(collectives, name, lambda t, dim, group: torch.cat((t, t)))
    count = (5 << 20) + 7  # more than a float32 counts
    with FakeTensorMode(), torch.device("cuda"):
        stats = torch.empty(2, 3)
        with Copies() as seen:
            node._processes.gathered(stats, count, None)
    assert seen.found == []
    assert "aten::lift_fresh" not in seen.names
    joined, total = node._processes.gathered(torch.ones(2, 3), count, None)
    assert total.item() == 2 * count
    assert joined.shape == (2, 3)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_counter_of_any_dtype_is_counted_on_the_device(monkeypatch, dtype, momentum):
    def raw(stats, total, mean, variance, count, factor, tracked):
        """As the kernel does: it counts, and averages by the count where there is no factor."""
        assert factor == momentum
        assert tracked.dtype in (torch.int64, torch.int32)
        tracked.add_(1)
        share = 1 / tracked.double() if factor is None else factor
        mean.lerp_(stats[0].to(mean.dtype), torch.as_tensor(share, dtype=mean.dtype))

    monkeypatch.setattr(_passes.passes, "bn_update_stats_out", raw, raising=False)
    mean, tracked = torch.zeros(2), torch.tensor(3, dtype=dtype)
    with graph_standins.NoWaiting():
        _passes.bn_update_stats(
            torch.ones(2, 2), None, mean, torch.ones(2), tracked, 9, momentum
        )  # fmt: skip
    assert tracked.item() == 4
    assert tracked.dtype is dtype
    assert mean.tolist() == [0.25 if momentum is None else pytest.approx(0.1)] * 2
