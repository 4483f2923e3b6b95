"""Every fault that the emulator can plant in a network's kernel by clusters is noticed."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import emulated_network
import mutants
import pytest
import torch
from emulated import Schedule
from mutants import Mutant, Trial

pytestmark = pytest.mark.emulated

CHUNKS = 3
FILES = {"network_walk.h", "split_cluster.h", "quad_epilogue.h"}
# (file, the line's text, instruction, fault) -> why the fault does no harm there.
HARMLESS: dict[tuple[str, str, str, str], str] = {}


def trials() -> Iterator[Trial]:
    """Parts of 2, 4 and 8 in tiles of both sizes, more of them than blocks; a layer's sums come
    over those of the one beside it, which no meeting of all blocks keeps apart.
    """
    for number, (made, splits, pixels, blocks, cluster) in enumerate(
        (
            (emulated_network.stage(torch.bfloat16, exact=True, images=1),
             (1, 4, 2, 1, 2, 4, 1), (32, 64, 32, 64, 32, 32, 64), 8, 8),
            (emulated_network.shares(torch.float16), (4, 8, 2), (32, 64, 32), 8, 8),
            (emulated_network.shares(torch.bfloat16), (2, 4, 2), (64, 32, 64), 4, 4),
        )
    ):  # fmt: skip
        x, layers = made
        expected = emulated_network.one_by_one(x, layers, splits)

        def wrong(got: Any, expected: dict[str, torch.Tensor] = expected) -> str | None:
            names = (name for name in got if not torch.equal(got[name], expected[name]))
            return next((f"{name}: other bits" for name in names), None)

        def call(made=made, splits=splits, pixels=pixels, blocks=blocks, cluster=cluster) -> Any:
            network = emulated_network.Network(*made)
            return network.run(splits, blocks, pixels=pixels, cluster=cluster)[0]

        schedule = (
            Schedule("random", "shuffled", seed=2),
            Schedule("lazy", "reverse", seed=1),
            Schedule("eager", "forward"),
        )[number]
        yield Trial(
            f"{blocks} blocks in clusters of {cluster}, {schedule}",
            call,
            (x,),
            wrong,
            {"schedule": schedule},
        )


@functools.cache
def found() -> dict[Mutant, list[Trial]]:
    """Every mutant, with the trials that reach it. Clean runs pass."""
    return mutants.reached(trials(), tuple(FILES))


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_every_fault_is_noticed(chunk):
    mutants.check(found(), HARMLESS, chunk, CHUNKS)


def test_every_file_takes_part_with_what_it_is_made_of():
    assert {mutant.key[0] for mutant in found()} == FILES
    assert set(HARMLESS) <= {mutant.key for mutant in found()}
    planted = {(mutant.instruction, mutant.fault) for mutant in found()}
    for wanted in (
        ("barrier.cluster.arrive", "skip"), ("barrier.cluster.wait", "skip"),
        ("ld.shared::cluster", "row_off"), ("ld.shared::cluster", "chunk_off"),
        ("mapa", "wrong_lane"), ("st.shared", "skip"), ("bar.sync", "skip"),
        ("ld.acquire", "no_fence"), ("red.release", "no_fence"),
    ):  # fmt: skip
        assert any(i.startswith(wanted[0]) and f == wanted[1] for i, f in planted), wanted
