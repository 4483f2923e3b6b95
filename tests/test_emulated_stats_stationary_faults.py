"""Every fault that the emulator can plant in conv_bn_stats whose filters stay is noticed.

What it shares with the kernel that brings them is in tests/test_emulated_stats_sm90_faults.py.
"""

from __future__ import annotations

import functools

import emulated
import mutants
import pytest
from mutants import Mutant, Trial
from test_emulated_stats_sm90_faults import ONE, trials

from resnet_fused.cases import ConvCase

pytestmark = pytest.mark.emulated

CHUNKS = 2
KERNEL = "conv_bn_stats_stationary_sm90.cuh"
# Several tiles of each consumer, both halves of the channels, in two columns; more steps than
# stages, so that a parity may be taken for another one's; taps beside the image, and a half of the
# channels that is cut.
MANY = ConvCase("many", 2, 136, 13, 15, 136)
DEEP = ConvCase("deep", 2, 264, 13, 15, 136)
TAPS = ConvCase("taps", 2, 40, 13, 17, 72, 1, 3, (1, 1), (0, 1))
TWO = (2, *emulated.H200[1:])
WAYS = (
    ("tma_stay128x128_8s", MANY, ONE, False),
    ("tma_stay128x128_4s", TAPS, TWO, True),
    ("tma_stay128x128_4s", DEEP, TWO, True),
)
HALVES = "channel_halves.h"
FILES = (KERNEL, HALVES, "transform_ring.h", "walk_moments.h", "pipeline.h", "tap_steps.h")
HARMLESS: dict[tuple[str, str, str, str], str] = {
    ("walk_moments.h", "ptx::sync_warp();", "bar.warp.sync", "skip"): (
        "the warp meets again behind what one of its lanes did"
    ),
    (KERNEL, "wait_for_ahead(conv.dependent);", "griddepcontrol.wait", "skip"): (
        "it is never launched ahead of another's end"
    ),
}


@functools.cache
def found() -> dict[Mutant, list[Trial]]:
    """Every mutant of those files, with the trials that reach it. Clean runs pass."""
    return mutants.reached(trials(WAYS), FILES)


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_every_fault_is_noticed(chunk):
    mutants.check(found(), HARMLESS, chunk, CHUNKS)


def test_every_file_takes_part_with_what_it_is_made_of():
    assert {mutant.key[0] for mutant in found()} == set(FILES)
    assert set(HARMLESS) <= {mutant.key for mutant in found()}
    own = (KERNEL, HALVES)
    planted = {(mutant.instruction, mutant.fault) for mutant in found() if mutant.key[0] in own}
    for wanted in (
        ("mbarrier.init", "wrong_count"), ("fence.mbarrier_init", "no_fence"),
        ("mbarrier.arrive.expect_tx", "wrong_bytes"), ("mbarrier.try_wait.parity", "skip"),
        ("wgmma.fence", "skip"), ("wgmma.commit_group", "skip"), ("wgmma.wait_group", "skip"),
        ("griddepcontrol.wait", "skip"), ("bar.sync 0", "skip"),
    ):  # fmt: skip
        assert wanted in planted, planted
