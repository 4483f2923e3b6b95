"""A network trained on real data, eager and fused: the same accuracy, curves in one picture."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional

import resnet_fused as rf

EPOCHS = 12
BATCH = 64
ENOUGH = 0.97


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's 1,797 scanned digits, 8x8: images and labels to train on, and to test with."""
    data = load_digits()
    parts = train_test_split(
        data.images, data.target, test_size=0.2, random_state=0, stratify=data.target
    )
    train_x, test_x, train_y, test_y = (torch.from_numpy(part) for part in parts)
    mean, std = train_x.mean(), train_x.std()
    images = [((t - mean) / std).float().unsqueeze(1) for t in (train_x, test_x)]
    return images[0], train_y.long(), images[1], test_y.long()


def train(model: nn.Module, seed: int) -> tuple[list[float], list[float]]:
    """Trains with SGD and a cosine schedule; the loss of each epoch and the test accuracy."""
    train_x, train_y, test_x, test_y = digits()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True
    )
    steps = EPOCHS * (len(train_x) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    losses, accuracies = [], []
    for _ in range(EPOCHS):
        model.train()
        total = 0.0
        order = torch.randperm(len(train_x), generator=generator)
        batches = order[: len(order) // BATCH * BATCH].view(-1, BATCH)
        for chosen in batches:
            # Shifted by up to a pixel: 1,437 images are few.
            shift = torch.randint(-1, 2, (2,), generator=generator).tolist()
            images = torch.roll(train_x[chosen], shift, (2, 3))
            loss = functional.cross_entropy(model(images), train_y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        losses.append(total / len(batches))
        model.eval()
        with torch.no_grad():
            right = (model(test_x).argmax(1) == test_y).float().mean()
        accuracies.append(float(right))
    return losses, accuracies


def curves(path: str, runs: dict[str, tuple[list[float], list[float]]]) -> None:
    """Loss and error of every run, over the epochs, into one picture."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, (losses, accuracies)), style in zip(runs.items(), ("-", "--"), strict=True):
        epochs = range(1, len(losses) + 1)
        left.plot(epochs, losses, style, label=name)
        right.plot(epochs, [100 * (1 - a) for a in accuracies], style, label=name)
    left.set(xlabel="epoch", ylabel="training loss", yscale="log")
    right.set(xlabel="epoch", ylabel="test error, %")
    left.legend()
    figure.suptitle("cifar_resnet20 on scikit-learn's digits")
    figure.savefig(path, dpi=110)


@pytest.mark.slow
def test_digits_are_learnt_alike(tmp_path):
    """The same seed, eager and fused: both learn, and the curves lie on each other at first."""
    torch.manual_seed(0)
    fused = rf.models.cifar_resnet20(in_channels=1)
    eager = rf.unfuse(copy.deepcopy(fused))
    images = torch.randn(4, 1, 8, 8)
    taken = rf.explain(copy.deepcopy(fused).train(), images).counts()
    assert taken == {"cpu": 19}, "the fused network would train on PyTorch's own modules"
    runs = {"eager": train(eager, 1), "fused": train(fused, 1)}
    curves(str(tmp_path / "digits.png"), runs)
    assert (tmp_path / "digits.png").stat().st_size > 10_000
    for name, (losses, accuracies) in runs.items():
        assert accuracies[-1] >= ENOUGH, f"{name}: {accuracies}"
        assert losses[-1] < 0.1 * losses[0], f"{name}: {losses}"
    first = [losses[0] for losses, _ in runs.values()]
    assert abs(first[0] - first[1]) < 0.05 * first[0]
