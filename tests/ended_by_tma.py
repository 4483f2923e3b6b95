"""`conv_bn_dgrad_end` by TMA and wgmma, emulated: what takes part in it, one call of it."""

from __future__ import annotations

from typing import Any

import emulated
import torch
from test_emulated_bn_dgrad_end import call as _call
from test_emulated_bn_dgrad_end import laid_out, problem
from torch import Tensor

from resnet_fused.cases import ConvCase
from resnet_fused.ops import _training_checks_dgrad_end as checks

OP = "conv_bn_dgrad_end"
DTYPES = (torch.bfloat16, torch.float16)
FEW = (2, *emulated.H200[1:])
"""So few multiprocessors that blocks stay for several tiles."""
WAYS: dict[str, dict[str, Any]] = {
    "all": {},
    "plain": {"affine": False, "addend": 0, "projected": False},
    "affine": {"addend": 0, "projected": False},
    "identity": {"projected": False},
    "projected": {"affine": False, "addend": 0},
}
"""What of the op takes part."""


def operands(
    case: ConvCase, dtype: torch.dtype, *, exact: bool = True, seed: int = 3, **way: Any
) -> checks.Operands:
    """In channels_last: integers on which every sum is exact, or noise."""
    generator = torch.Generator().manual_seed(seed)
    made = checks.exact_operands(case, dtype, generator, **way)
    if not exact:
        made = checks.Operands(
            *(None if t is None else torch.randn(t.shape, generator=generator).to(t) for t in made)
        )
    return laid_out(made)


def call(
    case: ConvCase, given: checks.Operands, step: int = 1, **settings: Any
) -> tuple[Tensor, Tensor, dict]:
    """dz of the block below, its sums, and the report; settings are those of `emulated.using`."""
    return _call(case, given, step, **{"splits": 1, **settings})


def wrong(
    case: ConvCase, given: checks.Operands, dx: Tensor, sums: Tensor, step: int = 1
) -> str | None:
    """What is wrong with exact results, or None."""
    wanted, reduced = checks.expected_end(given, case, step)
    if not torch.equal(dx, wanted):
        return f"{(dx != wanted).sum()} of {dx.numel()} elements differ"
    if torch.signbit(dx[given.out <= 0]).any():
        return "a masked element is minus zero"
    return None if torch.equal(sums, reduced) else f"{(sums != reduced).sum()} sums differ"


def require(
    case: ConvCase, given: checks.Operands, dx: Tensor, sums: Tensor, step: int = 1
) -> None:
    """Every bit of both results."""
    found = wrong(case, given, dx, sums, step)
    assert found is None, found


def tiles() -> dict[int, dict]:
    """The configurations by TMA, by index."""
    table = emulated.load().conv_bn_dgrad_end_configurations()
    return {i: tile for i, tile in enumerate(table) if tile["tma"]}


def planned(
    case: ConvCase,
    way: Any = "all",
    gpu: tuple[int, ...] = emulated.H200,
    configuration: int = -1,
    splits: int = 0,
    **more: Any,
) -> dict[str, Any]:
    """What would be launched; ValueError says why nothing can be."""
    made = problem(case, way=WAYS[way] if isinstance(way, str) else way, **more)
    return emulated.load().conv_bn_dgrad_end_plan(made, gpu, configuration, splits)
