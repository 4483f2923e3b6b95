"""Every fault that the emulator can plant in conv_bn_wgrad by TMA and wgmma is noticed."""

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

CHUNKS = 4
OP = "conv_bn_wgrad"
# (configuration, case, whether x is read through a BatchNorm): two parts of more steps than stages,
# the last of which are cut; both ways to come by pixels; warpgroups along the columns, and along
# the output channels.
TAPS = ConvCase("taps", 4, 72, 26, 24, 72, 3, 3, (2, 1), (1, 1))
DENSE = ConvCase("dense", 3, 72, 17, 17, 136)
# Two tiles along each side, for clusters.
WIDE = ConvCase("wide", 3, 264, 17, 17, 136)
WAYS = (
    ("tma_64x128_6s", TAPS, False),
    ("tma_128x64_5s", DENSE, False),
    ("tma_64x128_6s", TAPS, True),
    ("tma_128x64_5s", DENSE, True),
    ("tma_128x256_3s_2d_2x", WIDE, False),
)
FILES = {
    "affine_channels.h",
    "conv_wgrad_merge_sm80.cuh",
    "conv_wgrad_sm90.cuh",
    "normed_rows.h",
    "pipeline.h",
    "transform_ring.h",
    "turned_products.h",
    "warpgroup_epilogue.h",
    "warpgroup_tile.h",
    "turned_ring.h",
    "wgrad_parts.h",
    "wgrad_steps.h",
}


def trials() -> Iterator[Trial]:
    """On integers every bit under hostile schedules, on noise the bound."""
    index = {tile["name"]: i for i, tile in enumerate(emulated_shapes.tiles(OP))}
    for (name, case, normed), exact in ((way, exact) for way in WAYS for exact in (True, False)):
        dtype = torch.bfloat16 if exact else torch.float16
        given = mutants_wgrad.operands(case, dtype, "nhwc", exact=exact, affine=True, norm=normed)
        weight = torch.zeros(case.weight_shape)
        if exact:
            wrong = mutants._bits(expected_wgrad(given, case).float())
        else:
            oracle = numerics.conv_bn_wgrad_oracle(*given, weight, **case.geometry)
            bound = numerics.conv_bn_wgrad_bound(*given, weight, oracle, **case.geometry)
            wrong = mutants._bound(oracle, bound)
        for schedule in mutants.HOSTILE if exact else mutants.HOSTILE[-1:]:
            call = functools.partial(
                overload(OP, emulated.NAME), *given, weight,
                *emulated_shapes.geometry_args(case)[:4],
            )  # fmt: skip
            settings = {"schedule": schedule, "configuration": index[name], "splits": 2}
            yield Trial(
                f"{name} {case.name} {normed=} {exact=} {schedule}", call, given, wrong, settings
            )


@functools.cache
def found() -> dict[Mutant, list[Trial]]:
    """Every mutant, with the trials that reach it. Clean runs pass."""
    return mutants.reached(trials())


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_every_fault_is_noticed(chunk):
    mutants.check(found(), (), chunk, CHUNKS)


def test_every_file_takes_part():
    assert {key[0] for key in (mutant.key for mutant in found())} == FILES
    planted = {(mutant.key[0], mutant.instruction, mutant.fault) for mutant in found()}
    for wanted in (
        ("transform_ring.h", "fence.proxy.async", "no_fence"),
        ("transform_ring.h", "mbarrier.init", "wrong_count"),
        ("transform_ring.h", "mbarrier.arrive", "skip"),
        ("transform_ring.h", "mbarrier.try_wait.parity", "skip"),
        ("transform_ring.h", "bar.warp.sync", "skip"),
        ("transform_ring.h", "st.shared", "skip"),
    ):
        assert wanted in planted, wanted
    assert len(found()) > 50
