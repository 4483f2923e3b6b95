"""Every fault that the emulator can plant in a block's end by TMA and wgmma is noticed.

What it shares with conv_bn_act and conv_bn_stats for sm_90a is in the tests of theirs.
"""

from __future__ import annotations

import functools

import emulated
import mutants
import pytest
import torch
from emulated import Schedule
from mutants import HOSTILE, Mutant, Trial
from mutants_block_end import OP, _judged, _operands
from test_emulated_block_end_sm90 import tiles

from resnet_fused.cases import ConvCase
from resnet_fused.ops._library import overload

pytestmark = pytest.mark.emulated

CHUNKS = 4
STEPS = "block_end_steps.h"
# Several tiles of a block; more steps than stages, so that a parity may be taken for another one's;
# both halves of a warpgroup's channels, the second one cut; two columns, which share the storing.
DEEP = ConvCase("deep", 2, 264, 13, 15, 200)
COLUMNS = ConvCase("columns", 2, 136, 13, 15, 136)
TWO, ONE = ((count, *emulated.H200[1:]) for count in (2, 1))
WAYS = (
    ("tma_s128x256_3s", DEEP, ONE, True),
    ("tma_s128x128_4s", COLUMNS, TWO, False),
    ("tma_s64x128_6s", COLUMNS, TWO, True),
)
FILES = (
    STEPS, "channel_halves.h", "transform_ring.h", "walk_moments.h", "pipeline.h", "tap_steps.h",
    "normed_rows.h",
)  # fmt: skip
HARMLESS: dict[tuple[str, str, str, str], str] = {
    ("walk_moments.h", "ptx::sync_warp();", "bar.warp.sync", "skip"): (
        "the warp meets again behind what one of its lanes did"
    ),
}


def trials() -> list[Trial]:
    """On integers, under hostile schedules; who arrives when is a matter of luck."""
    made = []
    for name, case, gpu, projected in WAYS:
        given = _operands(case, torch.bfloat16, True, projected)
        luck = tuple(Schedule("eager", "shuffled", seed=seed) for seed in range(3))
        for schedule in (*HOSTILE, *luck):
            made.append(
                Trial(
                    f"{name} {case.name} {projected} {schedule}",
                    functools.partial(overload(OP, emulated.NAME), *given),
                    given,
                    _judged(given, True),
                    {
                        "schedule": schedule, "configuration": tiles()[name]["index"],
                        "splits": 1, "gpu": gpu, "resident_blocks": 4,
                    },
                )
            )  # fmt: skip
    return made


@functools.cache
def found() -> dict[Mutant, list[Trial]]:
    """Every mutant of those files, with the trials that reach it. Clean runs pass."""
    return mutants.reached(trials(), FILES)


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_every_fault_is_noticed(chunk):
    mutants.check(found(), HARMLESS, chunk, CHUNKS)


def test_every_file_takes_part_with_what_it_is_made_of():
    assert {mutant.key[0] for mutant in found()} == set(FILES)
    assert set(HARMLESS) <= {mutant.key for mutant in found()}
    planted = {(mutant.instruction, mutant.fault) for mutant in found() if mutant.key[0] == STEPS}
    for wanted in (
        ("cp.async.bulk.tensor.store", "coordinate_off"), ("ld.shared", "row_off"),
        ("cp.async.bulk.commit_group", "skip"), ("cp.async.bulk.wait_group.read", "skip"),
        ("cp.async.bulk.wait_group.read", "wait_one_fewer"),
    ):  # fmt: skip
        assert wanted in planted, planted
