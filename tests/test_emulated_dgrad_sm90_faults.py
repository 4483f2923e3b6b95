"""Every fault that the emulator can plant in conv_dgrad by TMA and wgmma is noticed."""

from __future__ import annotations

import functools

import dgrad_by_tma
import emulated
import mutants
import pytest
from mutants import Mutant, Trial

from resnet_fused.cases import ConvCase

pytestmark = pytest.mark.emulated

CHUNKS = 4
ONE = (1, *emulated.H200[1:])
"""One block takes all tiles, so that every place of the ring is used again."""
# (configuration, case): more steps than stages, three tiles and more; with the two ways to come by
# pixels, with and without a mask; steps of an even and of an odd number.
WAYS = (
    ("tma_p128x64_5s", ConvCase("taps", 2, 72, 12, 12, 40, 3, 3, (1, 1), (1, 1))),
    ("tma_p128x128_4s", ConvCase("dense", 3, 136, 12, 12, 136)),
    ("tma_p128x64_5s", ConvCase("plain", 3, 72, 12, 11, 72, act="none")),
    ("tma_p128x64_5s", ConvCase("by_2", 2, 72, 13, 12, 40, 3, 3, (2, 2), (1, 1))),
    # Blocks that share both sides, or filters: five tiles of pixels in three pairs.
    ("tma_p128x128_4s_2c_2p", ConvCase("both", 4, 136, 12, 12, 264)),
    ("tma_p128x256_2s_2c", ConvCase("filters", 4, 72, 12, 12, 200)),
)
# What the maps, the plan and the launch do is the host's; here is what the kernel is made of.
FILES = {
    "conv_dgrad_sm90.cuh",
    "masked_operand.h",
    "phase_place.h",
    "pipeline.h",
    "tap_steps.h",
    "turned_products.h",
    "turned_ring.h",
    "warpgroup_epilogue.h",
    "warpgroup_tile.h",
}
# (file, the line's text, instruction, fault) -> why the fault does no harm there.
HARMLESS: dict[tuple[str, str, str, str], str] = {
    ("warpgroup_epilogue.h", "ptx::sync_warp();", "bar.warp.sync", "skip"): (
        "the warp meets again behind what one of its lanes did; fibers wait for each other at the "
        "next instruction of the warp in any case"
    ),
}


@functools.cache
def found() -> dict[Mutant, list[Trial]]:
    """Every mutant, with the trials that reach it. Clean runs pass."""
    return mutants.reached(dgrad_by_tma.trials(WAYS, noisy=("taps", "plain"), gpu=ONE))


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_every_fault_is_noticed(chunk):
    mutants.check(found(), HARMLESS, chunk, CHUNKS)


def test_every_file_takes_part_with_what_it_is_made_of():
    assert {key[0] for key in (mutant.key for mutant in found())} == FILES
    assert set(HARMLESS) <= {mutant.key for mutant in found()}
    planted = {(mutant.instruction, mutant.fault) for mutant in found()}
    for wanted in (
        ("mbarrier.try_wait.parity", "skip"), ("fence.proxy.async", "no_fence"),
        ("fence.mbarrier_init", "no_fence"), ("mbarrier.arrive.expect_tx", "wrong_bytes"),
        ("wgmma.b", "stride_off"), ("wgmma.b", "chunk_off"),
        ("wgmma.wait_group", "wait_one_fewer"), ("bar.sync", "skip"),
        ("cp.async.bulk.wait_group.read", "skip"),
        ("cp.async.bulk.tensor.im2col", "coordinate_off"),
    ):  # fmt: skip
        assert wanted in planted, wanted
    assert len(found()) > 60
