"""The ways to compute a benchmark's subject: this package's, and those of everybody else.

Each joins where it can; why one does not is part of the result. A peer imports what it needs when
it is asked to prepare, so that a missing package costs one row and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from resnet_fused.bench.peers._base import NoPeerError, Peer, Prepared
from resnet_fused.bench.peers.apex import Apex
from resnet_fused.bench.peers.compiled import Inductor
from resnet_fused.bench.peers.cudnn import Cudnn
from resnet_fused.bench.peers.cudnn_graph import CudnnGraph
from resnet_fused.bench.peers.eager import Eager
from resnet_fused.bench.peers.frozen import Frozen
from resnet_fused.bench.peers.fused import Fused, Parts
from resnet_fused.bench.peers.onednn import OneDnn, bare_onednn
from resnet_fused.bench.peers.onnx_runtime import OnnxRuntime
from resnet_fused.bench.peers.open_vino import OpenVino
from resnet_fused.bench.peers.tensorrt import TensorRt
from resnet_fused.bench.peers.timm import Timm

if TYPE_CHECKING:
    from resnet_fused.bench.subject import Subject

__all__ = ["PEERS", "NoPeerError", "Peer", "Prepared", "bare_onednn", "joining"]

_ALL: tuple[Peer, ...] = (
    Eager("eager_nchw", torch.contiguous_format),
    Eager("eager", torch.channels_last),
    Fused("fused"),
    Frozen(),
    Fused("triton"),
    Fused("cuda"),
    Parts(),
    OneDnn(),
    Inductor("inductor", 180.0),
    Inductor("inductor_max_autotune", 600.0, mode="max-autotune-no-cudagraphs"),
    Inductor("inductor_freezing", 300.0, freezing=True),
    Cudnn(),
    CudnnGraph(),
    Timm(),
    OnnxRuntime(),
    OpenVino(),
    TensorRt(),
    Apex(),
)
PEERS: dict[str, Peer] = {peer.name: peer for peer in _ALL}
"""All of them by name, in the order of a report."""


def joining(
    subject: Subject, names: Sequence[str] | None = None
) -> tuple[list[Peer], dict[str, str]]:
    """Who takes a subject, and why the others do not.

    Args:
        subject: what is to be timed.
        names: of `PEERS`; None asks all of them.

    Returns:
        (those that join, in the order of `PEERS`; name -> why not, of the rest that was asked).

    Raises:
        ValueError: a name of no peer.
    """
    unknown = [name for name in names or () if name not in PEERS]
    if unknown:
        raise ValueError(
            f"peers holds {', '.join(map(repr, unknown))}; accepted are {', '.join(PEERS)}"
        )
    joined, omitted = [], {}
    for name, peer in PEERS.items():
        if names is not None and name not in names:
            continue
        reason = peer.why_not(subject)
        if reason is None:
            joined.append(peer)
        else:
            omitted[name] = reason
    return joined, omitted
