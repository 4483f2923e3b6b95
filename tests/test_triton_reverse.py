"""What an engine's launches have beside their operands: the batch backwards, filters packed before.

In Triton's interpreter. Programs that begin early are compiled ones: tests/test_triton_early.py.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from matrix import geometry_args, random_operands
from test_triton_kernels import BY_NAME, GROUPED, Poisoned, plan, poisoned_workspace
from test_triton_stem import made
from triton_trace import Programs, needs_interpreter

from resnet_fused import cases
from resnet_fused.cases import STEM_CASES
from resnet_fused.triton import _tiles

pytestmark = needs_interpreter

SMALL = _tiles.BY_NAME["32x64_4w4s"]
LONG = cases.ConvCase("long", 2, 40, 7, 6, 70, residual=True)
"""Three rows of tiles, the last one partly empty, two columns, and two images."""


def convolved(case, plan, *, reverse, out=None):
    from resnet_fused.triton import conv_bn_act

    torch.manual_seed(0)
    operands = random_operands(case, torch.float16)
    poisoned = out or Poisoned(case.output_shape, torch.float16)
    with poisoned_workspace():
        conv_bn_act.launch(
            *operands.tuple(), poisoned.out, *geometry_args(case), plan=plan, reverse=reverse
        )
    poisoned.check_guards()
    return poisoned.out


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(
    "case", [LONG, BY_NAME["even_3x3"], dataclasses.replace(GROUPED, n=1)], ids=str
)
def test_backwards_gives_the_same_bits(case, splits):
    each = plan(SMALL, splits)
    forwards, backwards = (convolved(case, each, reverse=reverse) for reverse in (False, True))
    assert not forwards.isnan().any()
    assert torch.equal(forwards, backwards)


@pytest.mark.parametrize("reverse", [False, True])
def test_the_first_program_takes_the_other_end(monkeypatch, reverse):
    from resnet_fused.triton import conv_bn_act

    def first(grid):
        return [(0, 0, 0)]

    kernel = Programs(conv_bn_act.conv_bn_act_kernel, first)
    monkeypatch.setattr(conv_bn_act, "conv_bn_act_kernel", kernel)
    out = convolved(LONG, plan(SMALL), reverse=reverse)
    pixels = (~out.isnan()).permute(0, 2, 3, 1).reshape(-1, LONG.k).nonzero()
    low, high = pixels[:, 0].min().item(), pixels[:, 0].max().item()
    assert (low, high) == ((64, 83) if reverse else (0, 31))


def test_a_stem_with_filters_packed_before():
    """By what the first call's filters were, and with no other kernel launched."""
    from resnet_fused.triton import stem

    case = next(case for case in STEM_CASES if case.name == "usual")
    given, expected, out = made(dataclasses.replace(case, n=1, h=18, w=20))
    prepared = stem.prepare(*given, *case.geometry)
    given[1].zero_()
    stem.launch(*given, out, *case.geometry, **prepared)
    assert torch.equal(out, expected)
