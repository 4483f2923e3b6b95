"""Whole networks for some steps of training, each step from eager's state, beside float64.

A random ResNet's gradients are chaotic: two right implementations drift apart within a few steps.
So every step starts from the same parameters and running statistics, and errors are compared with
those that eager PyTorch makes in the same dtype.
"""

from __future__ import annotations

import copy
import os
import statistics

import pytest
import torch
from test_training_digits import train
from torch import Tensor, nn
from torch.nn import functional

import resnet_fused as rf
from resnet_fused import numerics

PROOF = os.environ.get("HYPOTHESIS_PROFILE") == "proof"
STEPS = 20 if PROOF else 4
SIDE = 64 if PROOF else 32
BATCH = 16 if PROOF else 8


def step(model: nn.Module, x: Tensor, labels: Tensor, dtype: torch.dtype) -> float:
    """One forward and backward pass; the gradients and running statistics stay in the model."""
    model.zero_grad()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is torch.bfloat16):
        scores = model(x.to(next(model.parameters()).dtype))
    # Outside of autocast: a loss rounded to 16 bits would hide what is compared.
    loss = functional.cross_entropy(
        scores.double() if dtype is torch.float64 else scores.float(), labels
    )
    loss.backward()
    return float(loss.detach())


def running(model: nn.Module) -> Tensor:
    """All running statistics, each beside its own size, as one vector."""
    parts = []
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            values = buffer.double()
            parts.append(values / values.abs().mean().clamp(min=1e-3))
    return torch.cat(parts)


def counters(model: nn.Module) -> list[int]:
    return [int(b) for name, b in model.named_buffers() if name.endswith("num_batches_tracked")]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("network", ["resnet18", "resnet50"])
def test_every_step_is_as_near_to_float64_as_eager(network, dtype):
    """Loss and running statistics of each step, from the same state."""
    torch.manual_seed(0)
    build = getattr(rf.models, network)
    eager = rf.unfuse(build(num_classes=10)).train().to(memory_format=torch.channels_last)
    fused = rf.fuse(copy.deepcopy(eager)).train()
    exact = copy.deepcopy(eager).double()
    optimizer = torch.optim.SGD(eager.parameters(), lr=0.05, momentum=0.9)
    losses: dict[str, list[float]] = {"eager": [], "fused": [], "exact": []}
    for index in range(STEPS):
        x = torch.randn(BATCH, 3, SIDE, SIDE).contiguous(memory_format=torch.channels_last)
        labels = torch.randint(0, 10, (BATCH,))
        state = eager.state_dict()
        fused.load_state_dict(state)
        exact.load_state_dict(state)
        losses["exact"].append(step(exact, x, labels, torch.float64))
        losses["fused"].append(step(fused, x, labels, dtype))
        losses["eager"].append(step(eager, x, labels, dtype))
        judged = numerics.relative_check(running(fused), running(eager), running(exact), dtype)
        assert judged.ratio <= numerics.END_TO_END_LIMIT, f"step {index}: {judged}"
        assert counters(fused) == counters(eager) == [index + 1] * len(counters(eager))
        optimizer.step()
    with rf.backends.recording() as routes:
        fused(x)
    assert {route.implementation for route in routes} == {"cpu"}
    beside, got, oracle = (
        torch.tensor(losses[key], dtype=torch.float64) for key in ("eager", "fused", "exact")
    )
    # A loss is one number, in which all errors mix by chance: `numerics.chance` knows how many.
    limit = numerics.END_TO_END_LIMIT * numerics.chance(STEPS)
    ratio = float((got - oracle).norm() / (beside - oracle).norm())
    assert ratio <= limit, f"losses: {ratio:.2f} of eager's error, {losses}"


@pytest.mark.slow
@pytest.mark.skipif(not PROOF, reason="six trainings: make proof")
def test_final_losses_lie_within_the_spread_of_seeds():
    """Three seeds eager, three fused, on real data: no shift that the seeds do not make."""
    final: dict[str, list[float]] = {"eager": [], "fused": []}
    for seed in range(3):
        torch.manual_seed(seed)
        fused = rf.models.cifar_resnet20(in_channels=1)
        eager = rf.unfuse(copy.deepcopy(fused))
        final["eager"].append(train(eager, seed)[0][-1])
        final["fused"].append(train(fused, seed)[0][-1])
    means = {name: statistics.mean(values) for name, values in final.items()}
    spread = max(statistics.stdev(values) for values in final.values())
    assert abs(means["fused"] - means["eager"]) <= 2 * spread, final
