"""Every fault that the emulator can plant in conv_bn_act by TMA and wgmma is noticed."""

from __future__ import annotations

import functools

import conv_by_tma
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
# pixels, with and without a shortcut.
WAYS = (
    ("tma_s128x64_6s_t", ConvCase("turns", 2, 40, 12, 12, 72, 3, 3, (1, 1), (1, 1), residual=True)),
    ("tma_p128x128_4s", ConvCase("dense", 2, 136, 12, 12, 136, residual=True)),
    ("tma_s128x64_6s_t", ConvCase("plain", 3, 72, 12, 11, 72)),
    # Blocks that share filters; five tiles of pixels in three pairs.
    ("tma_s192x128_4s_2c", ConvCase("shared", 6, 40, 12, 12, 72, 3, 3, (1, 1), (1, 1))),
    # Neighbouring channels share pixels: two tiles of a cluster's four, and two of two.
    ("tma_s128x64_7s_t_2c_4p", ConvCase("both", 4, 40, 12, 12, 72, 3, 3, (1, 1), (1, 1))),
    ("tma_s192x128_4s_2p", ConvCase("pixels", 4, 328, 12, 12, 136)),
    ("tma_p128x128_4s", ConvCase("strided", 2, 40, 15, 13, 136, 3, 3, (2, 2), (1, 1))),
)
# What the maps, the plan and the launch do is the host's; here is what the kernel is made of.
FILES = {
    "conv_bn_act_sm90.cuh",
    "pipeline.h",
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
    return mutants.reached(conv_by_tma.trials(WAYS, noisy=("turns", "dense"), gpu=ONE))


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
        ("wgmma.a", "stride_off"), ("wgmma.b", "chunk_off"), ("wgmma.wait_group", "wait_one_fewer"),
        ("cp.async.bulk.wait_group.read", "skip"), ("griddepcontrol.wait", "skip"),
        ("cp.async.bulk.tensor.im2col", "coordinate_off"), ("bar.sync", "skip"),
        ("cp.async.bulk.tensor.tile.multicast", "row_off"),
        ("cp.async.bulk.tensor.im2col.multicast", "coordinate_off"),
        ("barrier.cluster.arrive", "skip"),
        ("mbarrier.arrive.relaxed.cluster", "skip"), ("mbarrier.try_wait.parity.relaxed", "skip"),
    ):  # fmt: skip
        assert wanted in planted
    assert len(found()) > 80
