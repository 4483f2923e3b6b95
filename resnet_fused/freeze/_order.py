"""The rule that turns layers round: which of them walk the batch from its end.

What a step wrote last is still in the L2 cache when the next one begins. Where both walk the same
way, the next one asks for the oldest first, which is gone if more than the cache holds has passed
through since: so it walks the other way, and finds as much as is left. Results are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

import torch

from . import _chains
from ._ir import Graph

KINDS = ("conv_bn_act", "conv_chain")
"""Steps that can walk backwards."""

HELD = 0.75
"""The part of the L2 cache that holds what passes through it: of an H200's 50 MB, reads of up to
some 37 MB stay fast in tests that others report."""


def capacity(device: torch.device) -> int | None:
    """Bytes that the cache of a GPU holds; None of a CPU."""
    if device.type != "cuda":
        return None
    return int(HELD * torch.cuda.get_device_properties(device).L2_cache_size)


def turned(
    graph: Graph, examples: Sequence[torch.Tensor], dtype: torch.dtype, held: int
) -> tuple[Graph, list[tuple[str, bool, str]]]:
    """The graph with layers turned round behind steps that the cache does not hold.

    Args:
        graph: after all other rules.
        examples: of the inputs: their shapes decide.
        dtype: of the activations.
        held: bytes that the cache holds.

    Returns:
        The new graph; what was done (layers, whether any was turned, why).
    """
    shapes = _chains.shapes_of(graph, examples)
    narrow = _chains.narrow_values(graph)
    backwards: set[int] = set()
    moved: dict[int, int] = {}
    steps, names = [], []
    for step in graph.steps:
        source = step.inputs[0] if step.inputs else None
        large = source is not None and moved.get(source, 0) > held
        if step.kind in KINDS and large and source not in backwards:
            step = replace(step, options={**step.options, "reverse": True})
            backwards.update(step.outputs)
            names.append(step.name)
        passed = sum(
            prod(shapes.get(v, (0,))) * (1 if v in narrow else dtype.itemsize)
            for v in (*step.inputs, *step.outputs)
        )
        moved.update(dict.fromkeys(step.outputs, passed))
        steps.append(step)
    size = f"the {held / 1e6:.0f} MB that the cache holds"
    if not names:
        return graph, [("all layers", False, f"no step reads and writes more than {size}")]
    why = f"backwards, since the step ahead reads and writes more than {size}"
    return replace(graph, steps=tuple(steps)), [(name, True, why) for name in names]
