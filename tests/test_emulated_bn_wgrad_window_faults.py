"""Every fault that the emulator can plant in conv_bn_wgrad's window kernel is noticed."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import emulated
import emulated_shapes
import mutants
import mutants_wgrad
import pytest
import torch
from mutants import Mutant, Trial

from resnet_fused import numerics
from resnet_fused.cases import ConvCase
from resnet_fused.ops._library import overload
from resnet_fused.ops._training_checks_wgrad import expected_wgrad

pytestmark = pytest.mark.emulated

CHUNKS = 3
OP = "conv_bn_wgrad"
NAME = "tma_win64x576_3s"
# Two parts of more steps than stages, the last of which ends behind the last pixel; windows of two
# requests.
CASE = ConvCase("steps", 2, 64, 6, 66, 64, 3, 3, (1, 1), (1, 1))
SPLITS = 2
FILES = {
    "affine_channels.h",
    "conv_bn_wgrad_window_sm90.cuh",
    "conv_wgrad_merge_sm80.cuh",
    "pipeline.h",
    "transform_ring.h",
    "walked_channels.h",
    "warpgroup_epilogue.h",
    "warpgroup_tile.h",
    "wgrad_parts.h",
}


def trials() -> Iterator[Trial]:
    """On integers every bit under hostile schedules, on noise the bound."""
    index = next(i for i, t in enumerate(emulated_shapes.tiles(OP)) if t["name"] == NAME)
    for exact in (True, False):
        dtype = torch.bfloat16 if exact else torch.float16
        given = mutants_wgrad.operands(CASE, dtype, "nhwc", exact=exact, affine=True, norm=True)
        weight = torch.zeros(CASE.weight_shape)
        if exact:
            wrong = mutants._bits(expected_wgrad(given, CASE).float())
        else:
            oracle = numerics.conv_bn_wgrad_oracle(*given, weight, **CASE.geometry)
            bound = numerics.conv_bn_wgrad_bound(*given, weight, oracle, **CASE.geometry)
            wrong = mutants._bound(oracle, bound)
        for schedule in mutants.HOSTILE if exact else mutants.HOSTILE[-1:]:
            call = functools.partial(
                overload(OP, emulated.NAME), *given, weight,
                *emulated_shapes.geometry_args(CASE)[:4],
            )  # fmt: skip
            settings = {"schedule": schedule, "configuration": index, "splits": SPLITS}
            yield Trial(f"{exact=} {schedule}", call, given, wrong, settings)


@functools.cache
def found() -> dict[Mutant, list[Trial]]:
    """Every mutant, with the trials that reach it. Clean runs pass."""
    return mutants.reached(trials())


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_every_fault_is_noticed(chunk):
    mutants.check(found(), (), chunk, CHUNKS)


def test_every_file_takes_part():
    assert {key[0] for key in (mutant.key for mutant in found())} == FILES
    assert len(found()) > 50
