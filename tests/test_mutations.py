"""Every fault that the emulator can plant in a kernel is noticed by some run."""

from __future__ import annotations

from pathlib import Path

import emulated
import mutants
import pytest

pytestmark = pytest.mark.emulated

CHUNKS = 4
OPS = tuple(mutants.TRIALS)
# (file, the line's text, instruction, fault) -> why the fault does no harm there.
HARMLESS: dict[tuple[str, str, str, str], str] = {}


@pytest.mark.parametrize("chunk", range(CHUNKS))
@pytest.mark.parametrize("op", OPS)
def test_every_fault_is_noticed(op, chunk):
    groups: dict[tuple[str, str, str, str], list[mutants.Mutant]] = {}
    for mutant in mutants.found(op):
        groups.setdefault(mutant.key, []).append(mutant)
    survivors, stale = [], []
    for key, group in list(groups.items())[chunk::CHUNKS]:
        alive = [m for m in group if mutants.noticed(m, mutants.found(op)[m]) is None]
        if key not in HARMLESS:
            survivors += alive
        elif not alive:
            stale.append(key)
    assert not survivors, "nothing notices these"
    assert not stale, "the table calls these harmless"


def test_the_table_of_harmless_faults_names_real_ones():
    known = {mutant.key for op in OPS for mutant in mutants.found(op)}
    assert set(HARMLESS) - known == set()
    assert all(len(reason) > 20 for reason in HARMLESS.values())


def test_every_kernel_file_takes_part_with_many_kinds_of_fault():
    reached = [mutant for op in OPS for mutant in mutants.found(op)]
    assert len({mutant.fault for mutant in reached}) >= 12
    device = {path.name for path in Path(mutants.ROOT, "csrc/kernels").glob("*_sm*.cuh")}
    ops = {name.rsplit("_", 1)[0] for name in device}
    assert ops == set(OPS) == set(emulated.DTYPES)
