"""Every fault that the emulator can plant in what conv_bn_stats by windows adds is noticed.

Its main loop is conv_bn_act's, whose faults are tests/test_emulated_conv_window_faults.py's; how
parts meet is tests/test_emulated_stats_sm90_faults.py's.
"""

from __future__ import annotations

import functools

import emulated
import mutants
import pytest
from mutants import Mutant
from test_emulated_conv_window import conv3x3
from test_emulated_stats_sm90_faults import trials

pytestmark = pytest.mark.emulated

CHUNKS = 3
ONE, MANY = (1, *emulated.H200[1:]), (40, *emulated.H200[1:])
# (configuration, case, GPU, whether x is read through a BatchNorm): a block with several tiles of
# each consumer; runs in two chunks, of two columns.
SEVERAL = conv3x3("several", 3, 12, 11)
WAYS = (
    ("tma_win96x64_2w", SEVERAL, ONE, False),
    ("tma_win96x64_2w", SEVERAL, ONE, True),
    ("tma_win96x64_2w", conv3x3("chunks", 2, 62, 61, 128), MANY, True),
)
FILES = (
    "conv_bn_stats_window_sm90.cuh", "transform_ring.h", "walk_moments.h", "window_epilogue.h",
    "window_moments.h", "channel_lanes.h",
)  # fmt: skip
# (file, the line's text, instruction, fault) -> why the fault does no harm there.
KERNEL = "conv_bn_stats_window_sm90.cuh"
HARMLESS: dict[tuple[str, str, str, str], str] = {
    (KERNEL, line, "griddepcontrol.wait", "skip"): "it is never launched ahead of another's end"
    for line in (
        "run_roles<true>(conv.dependent, produce, consume, [&](uint32_t thread) {",
        "run_roles(conv.dependent, produce, consume);",
    )
}


@functools.cache
def found() -> dict[Mutant, list[mutants.Trial]]:
    """Every mutant of those files, with the trials that reach it. Clean runs pass."""
    return mutants.reached(trials(WAYS), FILES)


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_every_fault_is_noticed(chunk):
    mutants.check(found(), HARMLESS, chunk, CHUNKS)


def test_every_file_takes_part_with_what_it_is_made_of():
    assert {key[0] for key in (mutant.key for mutant in found())} == set(FILES)
    assert set(HARMLESS) <= {mutant.key for mutant in found()}
    planted = {(mutant.instruction, mutant.fault) for mutant in found()}
    for wanted in (
        ("fence.proxy.async", "no_fence"), ("vote.sync.ballot", "skip"), ("bar.sync", "skip"),
        ("mbarrier.init", "wrong_count"), ("mbarrier.arrive", "skip"), ("st.shared", "skip"),
        ("shfl.sync.bfly", "wrong_lane"),
    ):  # fmt: skip
        assert wanted in planted, planted
