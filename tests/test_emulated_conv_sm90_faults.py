"""Every fault that the emulator can plant in conv_bn_act by TMA and wgmma is noticed."""

from __future__ import annotations

import functools

import conv_by_tma
import emulated
import mutants
import pytest
from conv_by_tma import DTYPES, OP, operands, tiles
from mutants import HOSTILE, Mutant, Trial

from resnet_fused.cases import ConvCase
from resnet_fused.ops._library import overload

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
    ("tma_p128x128_4s", ConvCase("strided", 2, 40, 15, 13, 136, 3, 3, (2, 2), (1, 1))),
)
# What the maps, the plan and the launch do is the host's; here is what the kernel is made of.
FILES = {
    "conv_bn_act_sm90.cuh",
    "pipeline.h",
    "warpgroup_epilogue.h",
    "warpgroup_tile.h",
}
# (file, the line's text, instruction, fault) -> why the fault does no harm there.
HARMLESS: dict[tuple[str, str, str, str], str] = {
    ("warpgroup_epilogue.h", "ptx::sync_warp();", "bar.warp.sync", "skip"): (
        "the warp meets again behind what one of its lanes did; fibers wait for each other at the "
        "next instruction of the warp in any case"
    ),
}


def trials() -> list[Trial]:
    """Calls that notice faults: on integers under hostile schedules, and one on noise."""
    made = []
    index = {tile["name"]: i for i, tile in tiles().items()}
    for name, case in WAYS:
        for exact in (True, False) if case.name in ("turns", "dense") else (True,):
            dtype = DTYPES[0] if exact else DTYPES[1]
            given = operands(case, dtype, exact=exact)
            oracle, bound = conv_by_tma.expected(case, given)
            wrong = mutants._bits(oracle.to(dtype)) if exact else mutants._bound(oracle, bound)
            geometry = (list(case.stride), list(case.padding), list(case.dilation), case.groups)
            for schedule in HOSTILE if exact else HOSTILE[-1:]:
                made.append(
                    Trial(
                        f"{name} {case.name} exact={exact} {schedule}",
                        functools.partial(
                            overload(OP, emulated.NAME), *given, *geometry, case.act
                        ),
                        given,
                        wrong,
                        {
                            "schedule": schedule, "configuration": index[name], "splits": 1,
                            "gpu": ONE, "reverse": False, "kept": False,
                        },
                    )
                )  # fmt: skip
    return made


@functools.cache
def found() -> dict[Mutant, list[Trial]]:
    """Every mutant, with the trials that reach it. Clean runs pass."""
    reached: dict[Mutant, list[Trial]] = {}
    for trial in trials():
        for site in trial.run()["sites"]:
            for fault in site["faults"]:
                mutant = Mutant(site["file"], site["line"], site["instruction"], fault)
                reached.setdefault(mutant, []).append(trial)
    return dict(sorted(reached.items()))


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_every_fault_is_noticed(chunk):
    survivors, stale = [], []
    for mutant in list(found())[chunk::CHUNKS]:
        alive = mutants.noticed(mutant, found()[mutant]) is None
        if alive and mutant.key not in HARMLESS:
            survivors.append(mutant)
        if not alive and mutant.key in HARMLESS:
            stale.append(mutant.key)
    assert not survivors, "nothing notices these"
    assert not stale, "the table calls these harmless"


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
    ):  # fmt: skip
        assert wanted in planted
    assert len(found()) > 80
