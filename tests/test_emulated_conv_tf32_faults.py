"""Every fault that the emulator can plant in conv_bn_act on float32 by TMA and wgmma is noticed."""

from __future__ import annotations

import functools

import conv_by_tma
import emulated
import mutants
import pytest
import torch
from conv_tf32_operands import fractions, rounded
from mutants import Mutant, Trial
from test_emulated_conv_sm90_faults import FILES as FILES_OF_16_BITS
from test_emulated_conv_sm90_faults import HARMLESS

from resnet_fused.cases import ConvCase

pytestmark = pytest.mark.emulated

CHUNKS = 4
ONE = (1, *emulated.H200[1:])
"""One block takes all tiles, so that every place of the ring is used again."""
# (configuration, case): more steps than stages, three tiles and more; with the two ways to come by
# pixels, with and without a shortcut.
WAYS = (
    (
        "tma_tf32_s128x64_6s_t",
        ConvCase("turns", 2, 36, 12, 12, 72, 3, 3, (1, 1), (1, 1), residual=True),
    ),
    ("tma_tf32_s192x128_3s", ConvCase("dense", 4, 100, 12, 12, 136, residual=True)),
    ("tma_tf32_s128x64_6s_t", ConvCase("plain", 3, 68, 12, 11, 72)),
    # Blocks that share filters; five tiles of pixels in three pairs.
    ("tma_tf32_s192x128_3s_2c", ConvCase("shared", 6, 20, 12, 12, 72, 3, 3, (1, 1), (1, 1))),
    # Neighbouring channels share pixels: two tiles of a cluster's four, and two of two.
    ("tma_tf32_s128x64_6s_t_2c_4p", ConvCase("both", 4, 20, 12, 12, 72, 3, 3, (1, 1), (1, 1))),
    ("tma_tf32_s192x128_3s_2p", ConvCase("pixels", 4, 164, 12, 12, 136)),
    ("tma_tf32_s192x128_3s", ConvCase("strided", 2, 20, 15, 13, 136, 3, 3, (2, 2), (1, 1))),
)
# Where what is cut instead of rounded shows, bit by bit: each way of asking for an operand.
CUT = (
    ("tma_tf32_s128x64_6s_t", ConvCase("dense", 2, 20, 12, 12, 72, act="none")),
    ("tma_tf32_s192x128_3s", ConvCase("tap", 2, 20, 15, 13, 136, 1, 1, (2, 2), act="none")),
    ("tma_tf32_s192x128_3s_2c_2p", ConvCase("shared", 4, 20, 12, 12, 136, act="none")),
    (
        "tma_tf32_s192x128_3s_2c_2p",
        ConvCase("shared_tap", 4, 20, 15, 13, 136, 1, 1, (2, 2), act="none"),
    ),
)
FILES = FILES_OF_16_BITS | {"tf32_epilogue.h"}


def cut_trials() -> list[Trial]:
    """Calls that notice an operand that is not rounded."""
    made = []
    for name, case in CUT:
        for side in (0, 1):
            given = fractions(case, side)
            right = (rounded(given[0]), rounded(given[1]), *given[2:])
            wrong = mutants._bits(conv_by_tma.expected(case, right)[0].float())
            settings = {"schedule": mutants.HOSTILE[-1], "gpu": ONE, "splits": 1}
            label = f"{name} {case.name} side {side}"
            made.append(conv_by_tma.trial(label, name, case, given, wrong, settings))
    return made


@functools.cache
def found() -> dict[Mutant, list[Trial]]:
    """Every mutant, with the trials that reach it. Clean runs pass."""
    dtypes = (torch.float32, torch.float32)
    noisy = ("turns", "dense")
    plain = conv_by_tma.trials(WAYS, noisy=noisy, gpu=ONE, dtypes=dtypes)
    return mutants.reached([*plain, *cut_trials()])


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_every_fault_is_noticed(chunk):
    mutants.check(found(), HARMLESS, chunk, CHUNKS)


def test_every_file_takes_part_with_what_it_is_made_of():
    assert {key[0] for key in (mutant.key for mutant in found())} == FILES
    assert set(HARMLESS) <= {mutant.key for mutant in found()}
    planted = {(mutant.instruction, mutant.fault) for mutant in found()}
    for way in ("tile", "im2col", "tile.multicast", "im2col.multicast"):
        assert (f"cp.async.bulk.tensor.{way}", "truncate") in planted
    for wanted in (
        ("mbarrier.try_wait.parity", "skip"), ("fence.proxy.async", "no_fence"),
        ("wgmma.a", "stride_off"), ("wgmma.b", "chunk_off"), ("wgmma.wait_group", "wait_one_fewer"),
        ("cp.async.bulk.wait_group.read", "skip"), ("griddepcontrol.wait", "skip"),
        ("ld.shared", "row_off"), ("st.shared", "skip"), ("bar.sync", "skip"),
    ):  # fmt: skip
        assert wanted in planted
    assert len(found()) > 80
