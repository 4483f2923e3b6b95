"""Every fault that the emulator can plant in what conv_bn_dgrad in slices adds is noticed.

The ends of tiles are tests/test_emulated_bn_dgrad_window_faults.py's.
"""

from __future__ import annotations

import functools

import mutants
import pytest
from mutants import Mutant, Trial
from test_emulated_bn_dgrad_stream import SMALL, WIDE, deep
from test_emulated_bn_dgrad_window_faults import trials

pytestmark = pytest.mark.emulated

CHUNKS = 3
# (configuration, case, what takes part, on noise too): several tiles of each consumer, an even and
# an odd number of slices, windows of two parts and of three; both rings are passed many times.
TRIALS = (
    (SMALL, deep("all", 4, 14, 10, 192), "all", True),
    (WIDE, deep("layer", 3, 17, 15, 128, 128), "layer", False),
    (SMALL, deep("plain", 3, 17, 11, 128), "plain", False),
)
FILES = (
    "affine_stream.h", "affine_window.h", "conv_bn_dgrad_stream_sm90.cuh",
    "conv_bn_dgrad_window_sm90.cuh", "streamed_filters.h", "transform_ring.h",
)  # fmt: skip
# (file, the line's text, instruction, fault) -> why the fault does no harm there.
HARMLESS: dict[tuple[str, str, str, str], str] = {}


@functools.cache
def found() -> dict[Mutant, list[Trial]]:
    """Every mutant of those files, with the trials that reach it. Clean runs pass."""
    return mutants.reached(trials(TRIALS), FILES)


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_every_fault_is_noticed(chunk):
    mutants.check(found(), HARMLESS, chunk, CHUNKS)


def test_every_file_takes_part_with_what_it_is_made_of():
    assert {key[0] for key in (mutant.key for mutant in found())} == set(FILES)
    assert set(HARMLESS) <= {mutant.key for mutant in found()}
    planted = {(mutant.instruction, mutant.fault) for mutant in found()}
    for wanted in (
        ("fence.proxy.async", "no_fence"), ("mbarrier.init", "wrong_count"),
        ("wgmma.wait_group", "wait_one_fewer"), ("st.shared", "skip"),
        ("cp.async.bulk.tensor.im2col", "coordinate_off"), ("wgmma.fence", "skip"),
        ("cp.async.bulk.tensor.tile", "coordinate_off"), ("mbarrier.arrive", "skip"),
    ):  # fmt: skip
        assert wanted in planted, planted
