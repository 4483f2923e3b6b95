"""Every fault that the emulator can plant in conv_wgrad by TMA and wgmma is noticed."""

from __future__ import annotations

import functools

import emulated
import mutants
import pytest
import wgrad_by_tma
from mutants import Mutant, Trial

from resnet_fused.cases import ConvCase

pytestmark = pytest.mark.emulated

CHUNKS = 4
# (configuration, case): more steps than stages, in two parts; with the two ways to come by pixels,
# with and without a mask; warpgroups along the output channels and along the columns.
WAYS = (
    ("tma_64x128_6s", ConvCase("taps", 4, 72, 26, 24, 72, 3, 3, (2, 1), (1, 1))),
    ("tma_128x64_5s", ConvCase("dense", 3, 72, 17, 17, 136)),
    ("tma_128x128_4s", ConvCase("plain", 3, 136, 15, 15, 136, act="none")),
    # Clusters that share dy and y, x, or both; the last one of pixels that are gathered.
    ("tma_128x256_3s_2d", ConvCase("left", 3, 264, 17, 17, 72)),
    ("tma_128x256_3s_2x", ConvCase("right", 3, 72, 17, 17, 136)),
    ("tma_128x256_3s_2d_2x", ConvCase("both", 4, 72, 26, 24, 136, 3, 3, (2, 1), (1, 1))),
)
# What the maps, the plan and the launch do is the host's; here is what the kernel is made of.
FILES = {
    "conv_wgrad_merge_sm80.cuh",
    "conv_wgrad_sm90.cuh",
    "pipeline.h",
    "turned_products.h",
    "warpgroup_epilogue.h",
    "warpgroup_tile.h",
    "turned_ring.h",
    "wgrad_parts.h",
    "wgrad_steps.h",
}
# (file, the line's text, instruction, fault) -> why the fault does no harm there.
HARMLESS: dict[tuple[str, str, str, str], str] = {}


@functools.cache
def found() -> dict[Mutant, list[Trial]]:
    """Every mutant, with the trials that reach it. Clean runs pass."""
    return mutants.reached(
        wgrad_by_tma.trials(WAYS, noisy=("dense", "plain"), gpu=emulated.H200, splits=2)
    )


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_every_fault_is_noticed(chunk):
    mutants.check(found(), HARMLESS, chunk, CHUNKS)


def test_every_file_takes_part_with_what_it_is_made_of():
    assert {key[0] for key in (mutant.key for mutant in found())} == FILES
    assert set(HARMLESS) <= {mutant.key for mutant in found()}
    planted = {(mutant.instruction, mutant.fault) for mutant in found()}
    for wanted in (
        ("mbarrier.try_wait.parity", "skip"), ("fence.mbarrier_init", "no_fence"),
        ("mbarrier.arrive.expect_tx", "wrong_bytes"), ("wgmma.b", "stride_off"),
        ("wgmma.b", "chunk_off"), ("wgmma.wait_group", "wait_one_fewer"), ("bar.sync 0", "skip"),
        ("cp.async.bulk.tensor.im2col", "coordinate_off"),
        ("cp.async.bulk.tensor.tile", "coordinate_off"),
        ("mbarrier.arrive.cluster", "skip"), ("mbarrier.try_wait.parity.cluster", "skip"),
        ("mbarrier.arrive.relaxed.cluster", "skip"), ("mapa", "wrong_lane"),
        ("mbarrier.try_wait.parity.relaxed", "skip"), ("barrier.cluster.arrive", "skip"),
        ("cp.async.bulk.tensor.im2col.multicast", "coordinate_off"),
        ("cp.async.bulk.tensor.tile.multicast", "coordinate_off"),
    ):  # fmt: skip
        assert wanted in planted, wanted
    assert len(found()) > 50
