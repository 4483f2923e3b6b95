"""What `stem`'s and `head`'s Triton kernels touch in memory, and 64-bit offsets."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from triton_trace import needs_interpreter, watch

from resnet_fused import numerics, roofline
from resnet_fused.cases import HEAD_CASES, STEM_CASES
from resnet_fused.ops._selfchecks import _lay_out
from resnet_fused.triton import _launch, _stem_tiles, head, stem

pytestmark = needs_interpreter

ALLOWED = 1.1  # times the roofline's bytes
OWN = ("packed", "mean")
"""Workspaces: the packed filters and the pooled images."""


def touched(launches) -> tuple[int, int]:
    """Bytes of the call's tensors, each once; and of the kernels' own workspaces."""
    seen: dict[int, tuple[int, bool]] = {}
    for launch in launches:
        for name, access in launch.accesses.items():
            if access.unique:
                most, own = seen.get(access.start, (0, False))
                seen[access.start] = max(most, access.unique), own or name in OWN
    sums = [sum(size for size, own in seen.values() if own is wanted) for wanted in (False, True)]
    return sums[0], sums[1]


def made(case):
    """Exact operands in the case's layout, and an empty result."""
    given = numerics.exact_stem_inputs(case, torch.float16, torch.Generator().manual_seed(0))
    expected = numerics.stem_oracle(*given, *case.geometry).half()
    out = torch.full_like(expected, float("nan")).contiguous(memory_format=torch.channels_last)
    return (_lay_out(given[0], case), *given[1:]), expected, out


@pytest.mark.parametrize("name", ["usual", "bytes"])
def test_stem_moves_every_byte_once(name):
    case = next(case for case in STEM_CASES if case.name == name)
    case = dataclasses.replace(case, n=1, h=34, w=64)
    given, expected, out = made(case)
    with watch() as launches:
        stem.launch(*given, out, *case.geometry)
    assert torch.equal(out, expected)
    found, own = touched(launches)
    cost = roofline.stem_cost(case, torch.float16).bytes
    assert 0.85 * cost <= found <= ALLOWED * cost
    assert own == 7 * 32 * 2 * case.k * 2


@pytest.mark.parametrize("name", ["classes10", "classes200"])
def test_head_moves_every_byte_once(name):
    case = next(case for case in HEAD_CASES if case.name == name)
    x = _lay_out(torch.randn(case.shape).half(), case)
    weight, bias = torch.randn(case.classes, case.c).half(), torch.randn(case.classes).half()
    out = torch.empty(case.n, case.classes, dtype=torch.float16)
    with watch() as launches:
        head.launch(x, weight, bias, out)
    found, own = touched(launches)
    cost = roofline.head_cost(case.shape, case.classes, torch.float16).bytes
    assert 0.85 * cost <= found <= ALLOWED * cost
    assert own == (0 if head.together(x, case.classes) else case.n * case.c * 2)
    assert len(launches) == (1 if name == "classes10" else 2)


def test_wide_offsets_change_nothing(monkeypatch):
    case = dataclasses.replace(STEM_CASES[0], n=1)
    given, expected, out = made(case)
    monkeypatch.setattr(stem, "fits_32_bits", lambda *tensors: False)
    stem.launch(*given, out, *case.geometry)
    assert torch.equal(out, expected)
    x, weight = torch.ones(2, 40, 2, 2).half(), torch.ones(3, 40).half()
    monkeypatch.setattr(head, "fits_32_bits", lambda *tensors: False)
    logits = torch.empty(2, 3).half()
    head.launch(x, weight, None, logits)
    assert torch.equal(logits, torch.full((2, 3), 40.0).half())


@pytest.mark.parametrize("tile", _stem_tiles.TILES, ids=lambda tile: tile.name)
def test_odd_images_of_bytes(tile):
    """33x131, from segments of several lengths: the same bits from each."""
    case = dataclasses.replace(STEM_CASES[1], n=1, h=33, w=131, k=16)
    given, expected, out = made(case)
    for rows in (2, 9):
        out.fill_(float("nan"))
        plan = _stem_tiles.Plan(tile, rows, "the test asks for it")
        stem.launch(*given, out, *case.geometry, plan=plan)
        assert torch.equal(out, expected)


def test_a_call_that_the_kernel_is_not_made_for_raises():
    case = next(case for case in STEM_CASES if case.name == "other_pool")
    given, _, out = made(case)
    with pytest.raises(LookupError, match="pooling"):
        stem.launch(*given, out, *case.geometry)
    assert out.isnan().all()
    assert _launch.fits_32_bits(out)
