"""Several networks that answer together ([He15], section 4.1 and Table 5).

[He15] is "Deep Residual Learning for Image Recognition", arXiv:1512.03385; its entry to ILSVRC 2015
is six networks of different depth.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Ensemble(nn.Module):
    """The mean of several networks' class probabilities.

    On a GPU each member runs on a stream of its own, so that small batches fill it. Members may be
    networks, frozen engines, or anything else that maps images to scores.

    Args:
        members: at least one; they keep their own modes and weights.

    Shapes:
        input as the members take it, [N, C, H, W]; output [N, num_classes]: the logarithm of the
        mean probability, float32 (float64 of such members), whose softmax is that mean.

    Raises:
        ValueError: no member.
        RuntimeError: in the forward, members of unlike numbers of classes.
    """

    def __init__(self, members: Iterable[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        if not len(self.members):
            raise ValueError("members: got none, accepted is at least one network")
        self._streams: list[torch.cuda.Stream] = []

    def __len__(self) -> int:
        """How many members there are."""
        return len(self.members)

    def forward(self, x: Tensor) -> Tensor:
        """The logarithm of the members' mean probability."""
        return self.combine(self.scores(x))

    def scores(self, x: Tensor) -> list[Tensor]:
        """Each member's own scores [N, num_classes], in order."""
        if x.device.type != "cuda" or len(self.members) == 1 or torch.compiler.is_compiling():
            return [member(x) for member in self.members]
        here = torch.cuda.current_stream(x.device)
        found = []
        for member, stream in zip(self.members, self._own_streams(x.device), strict=True):
            stream.wait_stream(here)
            with torch.cuda.stream(stream):
                scores = member(x)
            x.record_stream(stream)
            scores.record_stream(here)
            found.append(scores)
        for stream in self._own_streams(x.device):
            here.wait_stream(stream)
        return found

    @staticmethod
    def combine(scores: Iterable[Tensor]) -> Tensor:
        """The logarithm of the mean of the softmax of several scores.

        Args:
            scores: [N, num_classes] each.

        Raises:
            RuntimeError: unlike numbers of classes.
        """
        found = list(scores)
        classes = sorted({each.shape[-1] for each in found})
        if len(classes) > 1:
            raise RuntimeError(f"members: they have {' and '.join(map(str, classes))} classes")
        wide = [each if each.dtype == torch.float64 else each.float() for each in found]
        logs = torch.stack([each.log_softmax(-1) for each in wide])
        return logs.logsumexp(0) - math.log(len(found))

    def _own_streams(self, device: torch.device) -> list[torch.cuda.Stream]:
        if [stream.device for stream in self._streams] != [device] * len(self.members):
            self._streams = [torch.cuda.Stream(device) for _ in self.members]
        return self._streams

    def __getstate__(self) -> dict[str, object]:
        """Without streams, which belong to this process."""
        return {**self.__dict__, "_streams": []}
