"""Random shapes of the emulated kernels: 1,000 in `make proof`, a tenth of them here."""

from __future__ import annotations

import os
import random

import emulated
import emulated_shapes
import mutants
import pytest
import torch

from resnet_fused import numerics
from resnet_fused.ops._library import overload

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


# The kernels of bn_act, by a line that only they run: channels as columns, as rows, any strides.
BN_ACT = {
    "load_channels(scale_table": ("nhwc",),
    "row_scale = ": ("nchw",),
    "x_offset": ("sliced", "expanded", "unaligned"),
}


@pytest.mark.parametrize("line", BN_ACT)
def test_random_shapes_of_bn_act(line):
    """Each kernel under every schedule."""
    for number, schedule in enumerate(emulated.SCHEDULES * (10 if WHOLE else 1)):
        rng = random.Random(f"{line} {number}")
        dtype = rng.choice(emulated.DTYPES["bn_act"])
        step = 8 if line != "x_offset" else 1
        c, w = (step * rng.randint(1, 40), step * rng.randint(1, 5))
        shape = (rng.randint(2, 4), c + (c == 1), rng.randint(2, 9), w + (w == 1))
        generator = torch.Generator().manual_seed(number)
        x, residual = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        scale, shift = torch.randn(2, shape[1], generator=generator, dtype=compute).unbind()
        layout = rng.choice(BN_ACT[line])
        inputs = (
            emulated_shapes.lay_out(x, layout),
            scale.clone(),
            shift.clone(),
            rng.choice((None, emulated_shapes.lay_out(residual, layout))),
        )
        act = rng.choice(("relu", "none"))
        with emulated.using(schedule=schedule) as runs:
            y = overload("bn_act", emulated.NAME)(*inputs, act)
        oracle = numerics.bn_act_oracle(*inputs, act)
        check = numerics.check_bound(y, oracle, numerics.bn_act_bound(*inputs, oracle))
        assert check.ok, (shape, dtype, layout, schedule, check)
        ran = {mutants.Mutant(s["file"], s["line"], "", "").text for s in runs.reports[-1]["sites"]}
        assert any(line in text for text in ran), (shape, layout)


def test_every_configuration_meets_every_schedule():
    """In the thousand: pairs are taken in turn, and `run` asserts that the pair is what ran."""
    drawn = [emulated_shapes.draw(number) for number in range(1000)]
    assert len(emulated_shapes.SCHEDULES) == 3 * 3 * 2
    for op in emulated_shapes.OPS:
        tiles = emulated_shapes.tiles(op)
        met = {(d.configuration, d.schedule) for d in drawn if d.op == op}
        free = sum(not tile["tma"] for tile in tiles)
        assert len(met) == free * len(emulated_shapes.SCHEDULES)
        kinds = {(d.dtype, tiles[d.configuration]["wide"]) for d in drawn if d.op == op}
        assert kinds == {(t, wide) for t in emulated.DTYPES[op] for wide in (False, True)}
