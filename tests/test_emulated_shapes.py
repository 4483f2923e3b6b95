"""Random shapes of the emulated kernels: 1,000 in `make proof`, a tenth of them here."""

from __future__ import annotations

import os

import emulated
import emulated_shapes
import pytest

pytestmark = pytest.mark.emulated

WHOLE = os.environ.get("HYPOTHESIS_PROFILE") == "proof"
COUNT = 1000 if WHOLE else 100
CHUNKS = 20


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_shapes(chunk):
    """Exact on integers, within the bound on noise; configuration and schedule are drawn too."""
    failures = []
    for number in range(chunk, COUNT, CHUNKS):
        drawn = emulated_shapes.draw(number)
        try:
            y, _ = emulated_shapes.run(drawn)
        except (emulated.load().Error, AssertionError) as error:
            failures.append((drawn, str(error)))
            continue
        reason = emulated_shapes.wrong(drawn, y)
        if reason:
            failures.append((drawn, reason))
    assert not failures, f"{len(failures)} failed, first {failures[0]}"


def test_every_configuration_meets_every_schedule():
    """In the thousand: pairs are taken in turn, and `run` asserts that the pair is what ran."""
    drawn = [emulated_shapes.draw(number) for number in range(1000)]
    assert len(emulated_shapes.SCHEDULES) == 3 * 3 * 2
    for op in emulated_shapes.OPS:
        tiles = emulated_shapes.tiles(op)
        met = {(d.configuration, d.schedule) for d in drawn if d.op == op}
        assert len(met) == len(tiles) * len(emulated_shapes.SCHEDULES)
        kinds = {(d.dtype, tiles[d.configuration]["wide"]) for d in drawn if d.op == op}
        assert kinds == {(t, wide) for t in emulated.DTYPES[op] for wide in (False, True)}
