"""Every fault that the emulator can plant in what finalizes a BatchNorm behind its convolution.

How columns of tiles meet is tests/test_emulated_stats_sm90_faults.py's; the meeting of the columns
themselves is here.
"""

from __future__ import annotations

import functools

import emulated
import mutants
import pytest
import torch
from emulated import Schedule
from matrix import conv_arguments
from mutants import HOSTILE, Mutant, Trial
from test_emulated_stats_finalize import EPS, FEW, ONE, index_of, operands, running_of

from resnet_fused.cases import ConvCase
from resnet_fused.ops import _finalize
from resnet_fused.ops._library import overload

pytestmark = pytest.mark.emulated

CHUNKS = 2
OP = _finalize.OP
# Two columns of tiles by mma.sync, of which one is cut, and as many of wgmma's.
TWO = ConvCase("two", 2, 16, 7, 6, 72, 3, 3, (1, 1), (1, 1))
WAYS = (
    ("64x64_4w4s", TWO, emulated.H200, True),
    ("halo_64x64_4w4s", TWO, emulated.H200, True),
    ("image_128x64_4w7s", ConvCase("stem", 1, 3, 13, 15, 72, 7, 7, (2, 2), (3, 3)), FEW, False),
    ("tma_s128x64_6s_t", ConvCase("turns", 2, 40, 13, 15, 72, 3, 3, (1, 1), (1, 1)), ONE, True),
)
VECTORS = (
    ("cumulative", torch.tensor(3), torch.float64, None),
    ("int32", torch.tensor(3, dtype=torch.int32), torch.float32, None),
    ("given", None, torch.float32, 0.25),
)
FILES = ("finish_channels.h", "channel_norm.h", "channel_value.h", "merge_chunks.h")
FENCE = "ptx::fence_acq_rel_gpu();"
# (file, the line's text, instruction, fault) -> why the fault does no harm there.
HARMLESS: dict[tuple[str, str, str, str], str] = {
    ("merge_chunks.h", FENCE, "fence.acq_rel", "no_fence"): (
        "the counter's addition releases and acquires as well"
    ),
}


def call(given, running, geometry, momentum):
    """All results, and what was updated in place."""
    mine = [None if t is None else t.clone() for t in running]
    found = overload(OP, emulated.NAME)(*given, *mine, *geometry, EPS, momentum)
    return (*found, *(t for t in mine if t is not None))


@functools.cache
def trials() -> tuple[Trial, ...]:
    """Whose bits are the three ops'; who arrives when is a matter of luck."""
    made = []
    for name, case, gpu, normed in WAYS:
        given, geometry = operands(case, normed), conv_arguments(case)
        for what, tracked, dtype, momentum in VECTORS:
            running = running_of(case.k, tracked, dtype)
            settings = {
                "configuration": index_of(name), "splits": 1, "gpu": gpu, "resident_blocks": 4,
            }  # fmt: skip
            with emulated.using(schedule=Schedule(), **settings):
                wanted = call(given, running, geometry, momentum)

            def wrong(got, wanted=wanted):
                same = all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
                return None if same else "the bits are wrong"

            luck = tuple(Schedule("eager", "shuffled", seed=seed) for seed in range(4))
            for schedule in (*HOSTILE, *luck):
                made.append(
                    Trial(
                        f"{name} {what} {schedule}",
                        functools.partial(call, given, running, geometry, momentum),
                        tuple(t for t in (*given, *running) if t is not None),
                        wrong,
                        {"schedule": schedule, **settings},
                    )
                )
    return tuple(made)


@functools.cache
def found() -> dict[Mutant, list[Trial]]:
    """Every mutant of those files, with the trials that reach it. Clean runs pass."""
    return mutants.reached(list(trials()), FILES)


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_every_fault_is_noticed(chunk):
    mutants.check(found(), HARMLESS, chunk, CHUNKS)


def test_every_file_takes_part_with_what_it_is_made_of():
    assert {key[0] for key in (mutant.key for mutant in found())} == set(FILES)
    assert set(HARMLESS) <= {mutant.key for mutant in found()}
    planted = {(mutant.instruction, mutant.fault) for mutant in found()}
    for wanted in (
        ("ld.global", "chunk_off"), ("st.global", "skip"), ("st.global", "row_off"),
        ("atom.acq_rel.add.u32", "no_fence"), ("bar.sync 0", "skip"),
    ):  # fmt: skip
        assert wanted in planted, planted
