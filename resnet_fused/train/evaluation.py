"""How often a network is right: top-1, top-5, each class, which it takes for which."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

TOP = 5


@dataclass(frozen=True)
class Score:
    """What came of a pass over labelled images.

    Attributes:
        confusion: int64 [classes, classes]: images of a row's class that were taken for a column's.
        top5: images whose class was among the five likeliest.
        loss: sum of their cross entropies.
    """

    confusion: Tensor
    top5: int
    loss: float

    @property
    def images(self) -> int:
        """How many there were."""
        return int(self.confusion.sum())

    @property
    def right(self) -> int:
        """Images whose class was the likeliest."""
        return int(self.confusion.diagonal().sum())

    def record(self) -> dict[str, float | int | None]:
        """Shares of the images; top5 is None where there are no more than five classes.

        Raises:
            ValueError: there were none.
        """
        count = self.images
        if not count:
            raise ValueError("data: no image could be read")
        return {
            "images": count,
            "top1": self.right / count,
            "top5": self.top5 / count if len(self.confusion) > TOP else None,
            "loss": self.loss / count,
        }


class Scores:
    """Adds up what a network says of batches, where its results are.

    Args:
        classes: how many there are.
        device: of the results.
    """

    def __init__(self, classes: int, device: torch.device) -> None:
        self.classes = classes
        self._confusion = torch.zeros(classes * classes, dtype=torch.int64, device=device)
        self._others = torch.zeros(2, dtype=torch.float64, device=device)  # top-5, loss

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Counts a batch.

        Args:
            logits: [N, classes], or their mean over crops.
            labels: int64 [N].
        """
        scores = logits.float()
        best = scores.topk(min(TOP, self.classes), 1).indices
        places = labels * self.classes + best[:, 0]
        self._confusion += torch.bincount(places, minlength=self.classes**2)
        hits = (best == labels.unsqueeze(1)).any(1).sum()
        loss = functional.cross_entropy(scores.double(), labels, reduction="sum")
        self._others += torch.stack([hits.double(), loss])

    def result(self, total: Callable[[Tensor], Tensor] = lambda value: value) -> Score:
        """What came of all batches.

        Args:
            total: the sum of a tensor over all processes.
        """
        confusion = total(self._confusion.clone()).view(self.classes, self.classes).cpu()
        top5, loss = total(self._others.clone()).tolist()
        return Score(confusion, int(top5), loss)


def evaluate(
    forward: Callable[[Tensor], Tensor], batches: Iterable[Any], classes: int,
    device: torch.device, total: Callable[[Tensor], Tensor] = lambda value: value,
    seen: Callable[[int], None] = lambda images: None, ended: Callable[[], None] = lambda: None,
) -> tuple[Score, list[str]]:  # fmt: skip
    """Runs a network over labelled images.

    Args:
        forward: uint8 images [N, C, H, W] on the device -> logits [N, classes].
        batches: of `resnet_fused.data.loading.on_device`.
        classes: how many there are.
        device: where it computes.
        total: as of `Scores.result`.
        seen: called with the number of each batch's images.
        ended: called behind the last batch, before anything is added up over processes.

    Returns:
        The score, and a message on each image that could not be read; those are not counted.
    """
    scores = Scores(classes, device)
    problems: list[str] = []
    with torch.no_grad():
        for images, labels, left in batches:
            problems += left
            seen(len(labels) + len(left))
            if images is None:
                continue
            scores.add(forward(images), labels)
        ended()
    return scores.result(total), problems
