"""Every fault that the emulator can plant in what conv_bn_stats in slices adds is noticed.

What is measured and how parts meet is tests/test_emulated_stats_window_faults.py's and
tests/test_emulated_stats_sm90_faults.py's.
"""

from __future__ import annotations

import functools

import emulated
import mutants
import pytest
from mutants import Mutant
from test_emulated_stats_sm90_faults import trials
from test_emulated_stats_stream import deep

pytestmark = pytest.mark.emulated

CHUNKS = 3
ONE = (1, *emulated.H200[1:])
# (configuration, case, GPU, whether x is read through a BatchNorm): a block with several tiles of
# each consumer, an even and an odd number of slices; both rings are passed many times.
SEVERAL = deep("several", 4, 14, 11, 192)
WAYS = (
    ("tma_win192x64_2w_6s", SEVERAL, ONE, False),
    ("tma_win192x64_2w_6s", SEVERAL, ONE, True),
    ("tma_win256x64_2w_6s", deep("columns", 3, 17, 15, 128, 128), ONE, True),
)
KERNEL = "conv_bn_stats_stream_sm90.cuh"
FILES = (KERNEL, "streamed_filters.h", "transform_ring.h")
# (file, the line's text, instruction, fault) -> why the fault does no harm there.
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
        ("fence.proxy.async", "no_fence"), ("wgmma.fence", "skip"),
        ("wgmma.wait_group", "skip"), ("mbarrier.arrive", "skip"), ("st.shared", "skip"),
        ("mbarrier.init", "wrong_count"), ("mbarrier.arrive", "wrong_count"),
        ("mbarrier.try_wait.parity", "wrong_parity"),
        ("cp.async.bulk.tensor.tile", "coordinate_off"), ("wgmma.commit_group", "skip"),
    ):  # fmt: skip
        assert wanted in planted, planted
