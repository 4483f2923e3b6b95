"""What tuning found for ops that span layers: how a call is found by, and how it is launched.

An entry's configuration is one of the kernel's, or "parts": on this GPU the ops that the op stands
for are faster, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _tuned, backends
from ..cases import ChainCase
from ..triton import _chain_tiles, _limits, _stem_tiles
from ..triton._launch import precision
from ..triton._tiles import cdiv

PARTS = "parts"
Found = tuple[torch.dtype, Sequence[int], Sequence[int], tuple[Any, ...], bool]
"""dtype, x's shape, weight's shape, geometry, third: as `_tuned.find` takes them."""


def stem_call(
    x: Tensor, weight: Tensor, input_norm: Tensor | None, stride: Sequence[int],
    padding: Sequence[int], pool_stride: Sequence[int],
) -> Found:  # fmt: skip
    """What a call of `stem` is found by: in the place of groups stand the bytes of an image's
    element, and third is whether the images are normalised.
    """  # noqa: D205
    geometry = (stride, padding, pool_stride, x.element_size())
    return weight.dtype, x.shape, weight.shape, geometry, input_norm is not None


def head_call(x: Tensor, weight: Tensor, bias: Tensor | None) -> Found:
    """What a call of `head` is found by; third is whether there is a bias."""
    return x.dtype, x.shape, weight.shape, ((1, 1), (0, 0), (1, 1), 1), bias is not None


def chain_call(case: ChainCase, dtype: torch.dtype) -> Found:
    """What a call of `conv_chain` is found by.

    As geometry stand the channels of next and of what is projected, the projection's stride and
    out's, the channels of the front and 0, and 1; third is whether there is a projection.
    """
    geometry = (
        (case.m, case.projected), (case.projection_stride, case.out_stride), (case.front, 0), 1,
    )  # fmt: skip
    return dtype, case.input_shape, (case.c, case.k, 1, 1), geometry, case.projected > 0


def case_of(arguments: Sequence[Any]) -> ChainCase:
    """The sizes of a call of `conv_chain`, whose last three arguments are its options."""
    x, weight, projected, following, front = (arguments[place] for place in (0, 1, 5, 9, 12))
    n, _, h, w = x.shape
    return ChainCase(
        "", n, weight.shape[1], h, w, weight.shape[0],
        0 if following is None else following.shape[0],
        0 if projected is None else projected.shape[1], arguments[-3],
        0 if front is None else x.shape[1], arguments[-2],
    )  # fmt: skip


def of_chain(
    implementation: str, case: ChainCase, dtype: torch.dtype, device: torch.device
) -> _tuned.Tuned | None:
    """What tuning found for a chain on a device, where nobody asks for a backend by name."""
    if backends.requested()[0] != "auto":
        return None
    return _tuned.find(implementation, device, "conv_chain", *chain_call(case, dtype))


def parts_win(implementation: str, arguments: Sequence[Any]) -> str | None:
    """That the parts were faster than a kernel for this very call of `conv_chain`, or None."""
    x = arguments[0]
    found = of_chain(implementation, case_of(arguments), x.dtype, x.device)
    return found.why if found is not None and found.configuration == PARTS else None


def why(
    implementation: str, op: str, arguments: Sequence[Any], allowed: frozenset[str] | None
) -> str | None:
    """For `explain`: that tuning chose the configuration of a call; None if it did not.

    Args:
        implementation: "triton" or "cuda".
        op: its name.
        arguments: checked, in the schema's order.
        allowed: names of the configurations that were admitted; None for all.
    """
    if op not in CALLS:
        return None
    found = _tuned.find(implementation, arguments[1].device, op, *CALLS[op](arguments))
    if found is None or found.configuration == PARTS:
        return None
    return found.why if allowed is None or found.configuration in allowed else None


def options(op: str, arguments: Sequence[Any], allowed: frozenset[str] | None) -> dict[str, Any]:
    """Keyword arguments of a launch: what tuning found, else those that may be chosen among.

    Args:
        op: of a Triton kernel with several configurations.
        arguments: of its launch.
        allowed: names of those that were admitted; None for all.
    """
    way = _WAYS.get(op)
    return (way and way(arguments, allowed)) or {"allowed": allowed}


def _usable(
    found: _tuned.Tuned | None, known: dict[str, Any], allowed: frozenset[str] | None
) -> Any:
    """The configuration of an entry, if there is one that may be used."""
    if found is None or (allowed is not None and found.configuration not in allowed):
        return None
    return known.get(found.configuration)


def _stem(arguments: Sequence[Any], allowed: frozenset[str] | None) -> dict[str, Any] | None:
    x, weight, _, _, norm, out, stride, padding, *pool = arguments[:11]
    found = _tuned.find(
        "triton", out.device, "stem", *stem_call(x, weight, norm, stride, padding, pool[1])
    )
    tile = _usable(found, _stem_tiles.BY_NAME, allowed)
    if tile is None or found is None:
        return None
    sizes = _stem_tiles.sizes_of(
        x.shape, weight, stride, padding, pool, precision(weight.dtype), _stem_tiles.is_dense(x)
    )
    if isinstance(sizes, str) or not _stem_tiles.fits(sizes, tile, _limits.limits(out.device)):
        return None
    rows = cdiv(sizes.rows, max(1, min(found.splits, sizes.rows)))
    return {"plan": _stem_tiles.Plan(tile, rows, found.why)}


def _chain(arguments: Sequence[Any], allowed: frozenset[str] | None) -> dict[str, Any] | None:
    x = arguments[0]
    found = _tuned.find("triton", x.device, "conv_chain", *chain_call(case_of(arguments), x.dtype))
    config = _usable(found, _chain_tiles.BY_NAME, allowed)
    if config is None:
        return None
    sizes = _chain_tiles.sizes_of(
        x, arguments[1], arguments[5], arguments[9], arguments[12], arguments[-2],
        precision(x.dtype),
    )  # fmt: skip
    if _chain_tiles.unfit(config, sizes, _limits.limits(x.device)) is not None:
        return None
    return {"config": config}


CALLS: dict[str, Callable[[Sequence[Any]], Found]] = {
    "stem": lambda given: stem_call(given[0], given[1], given[4], given[5], given[6], given[8]),
    "head": lambda given: head_call(given[0], given[1], given[2]),
    "conv_chain": lambda given: chain_call(case_of(given), given[0].dtype),
}
"""Op -> what a call with such arguments, in the schema's order, is found by."""

_WAYS = {"stem": _stem, "conv_chain": _chain}
