"""Every fault that the emulator can plant in conv_bn_act_fp8 by TMA and wgmma is noticed."""

from __future__ import annotations

import functools

import emulated
import mutants
import pytest
from conv_fp8_by_tma import trials
from mutants import Mutant, Trial

from resnet_fused.cases import ConvCase

pytestmark = pytest.mark.emulated

CHUNKS = 4
ONE = (1, *emulated.H200[1:])
"""One block takes all tiles, so that every place of the ring is used again."""
TOGETHER, CHANNELS, TURNS = "tma_p128x128_6s", "tma_s192x128_4s", "tma_s128x64_6s_t"
BOTH = "tma_s64x64_12s_t_2c_2p"
# (configuration, case, places of the result's types): more steps than stages, three tiles and more;
# with the two ways to come by pixels, with and without a shortcut, of either width of the result.
WAYS = (
    (TURNS, ConvCase("turns", 2, 48, 12, 12, 80, 3, 3, (1, 1), (1, 1), residual=True), (0, 1)),
    (TOGETHER, ConvCase("dense", 3, 272, 12, 12, 144, residual=True), (0, 2)),
    (TOGETHER, ConvCase("strided", 2, 48, 15, 13, 144, 3, 3, (2, 2), (1, 1)), (0, 1)),
    (CHANNELS, ConvCase("wide", 2, 144, 14, 15, 144, 3, 1, (1, 1), (1, 0), residual=True), (0, 1)),
    # Four that share both: one tile of a cluster's four has neither pixels nor channels.
    (BOTH, ConvCase("both", 1, 48, 12, 12, 80, 3, 3, (1, 1), (1, 1), residual=True), (0,)),
    # Blocks that share filters: five tiles of pixels in three pairs; and those that share pixels.
    (CHANNELS + "_2c", ConvCase("shared", 6, 48, 12, 12, 80, 3, 3, (1, 1), (1, 1)), (0,)),
    (CHANNELS + "_2p", ConvCase("pixels", 4, 656, 12, 12, 144), (0,)),
    (CHANNELS + "_2p", ConvCase("taps", 4, 48, 12, 12, 144, 3, 3, (1, 1), (1, 1)), (0,)),
)
# What the maps, the plan and the launch do is the host's; here is what the kernel is made of.
FILES = {
    "conv_bn_act_sm90.cuh",
    "pipeline.h",
    "quantised_epilogue.h",
    "tap_steps.h",
    "warpgroup_epilogue.h",
    "warpgroup_tile.h",
}
# (file, the line's text, instruction, fault) -> why the fault does no harm there.
HARMLESS: dict[tuple[str, str, str, str], str] = {
    ("warpgroup_epilogue.h", "ptx::sync_warp();", "bar.warp.sync", "skip"): (
        "the warp meets again behind what one of its lanes did; fibers wait for each other at the "
        "next instruction of the warp in any case"
    ),
    (
        "pipeline.h",
        "ptx::mbarrier_arrive_relaxed_cluster(ptx::cluster_address(empty(at), threadIdx.x % 32));",
        "mapa",
        "wrong_lane",
    ): "two lanes tell two blocks: each tells the one that the other would have told",
}


@functools.cache
def found() -> dict[Mutant, list[Trial]]:
    """Every mutant, with the trials that reach it. Clean runs pass."""
    return mutants.reached(trials(WAYS, ONE))


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_every_fault_is_noticed(chunk):
    mutants.check(found(), HARMLESS, chunk, CHUNKS)


def test_every_file_takes_part_with_what_it_is_made_of():
    assert {key[0] for key in (mutant.key for mutant in found())} == FILES
    assert set(HARMLESS) <= {mutant.key for mutant in found()}
    planted = {(mutant.instruction, mutant.fault) for mutant in found()}
    for wanted in (
        ("wgmma.e4m3", "skip"), ("wgmma.e4m3", "stale_accumulator"), ("wgmma.b", "chunk_off"),
        ("wgmma.wait_group", "wait_one_fewer"), ("fence.proxy.async", "no_fence"),
        ("cp.async.bulk.wait_group.read", "skip"), ("bar.sync", "skip"),
        ("cp.async.bulk.tensor.tile.multicast", "row_off"), ("barrier.cluster.arrive", "skip"),
        ("cp.async.bulk.tensor.im2col.multicast", "coordinate_off"),
        ("mbarrier.arrive.relaxed.cluster", "skip"),
    ):  # fmt: skip
        assert wanted in planted
    assert len(found()) > 100
