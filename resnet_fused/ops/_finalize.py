"""Whether a training node's convolution finalizes its BatchNorm as it ends: one op, or three.

Nodes ask here in their forward pass, and `explain` with them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .. import backends
from ._words import Word

OP = "conv_bn_stats_finalize"
CONVOLUTION = "conv_bn_stats"
ENVIRONMENT = "RESNET_FUSED_FINALIZE"


class Way(NamedTuple):
    """How a layer's BatchNorm gets its scale, shift and running statistics.

    Attributes:
        merged: whether by `OP`.
        why: one clause; "" where the convolution is none of CUDA's, and there is nothing to say.
    """

    merged: bool
    why: str

    @property
    def how(self) -> str:
        """For `explain`."""
        return f"one op ({OP})" if self.merged else "ops of their own"


_word = Word(ENVIRONMENT)
preferring = _word.preferring


def way(choice: backends.Choice, device: torch.device, dtype: torch.dtype) -> Way:
    """Which way layers take whose convolutions `choice` serves.

    The user's word comes first (`ENVIRONMENT`). The op has the launch of the convolution alone, so
    that wherever its kernel is admitted it is the better way. The reference of the one op is for
    those who ask for both: for the reference by name, and "always".

    Args:
        choice: of `CONVOLUTION`.
        device: of the tensors.
        dtype: of the activations.

    Raises:
        ValueError: the environment variable holds no word that is accepted.
    """
    word, name = _word(), choice.implementation.name
    if name == "reference" and word == "always" and backends.requested()[0] == name:
        return Way(True, f"{ENVIRONMENT} is {word}")
    if name != "cuda":
        return Way(False, "")
    if word == "never":
        return Way(False, f"{ENVIRONMENT} is {word}")
    found = backends.choose(backends.Call(OP, device.type, dtype, index=device.index))
    if found.implementation.name != "cuda":
        reasons = [reason for name, reason in found.refused if name == "cuda"]
        return Way(False, "; ".join(reasons) or found.why)
    return Way(True, "the blocks that merge the statistics do that as well")
