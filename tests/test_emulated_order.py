"""How launches of the CUDA kernels stand among others: their walk, and what they ask for early."""

from __future__ import annotations

import emulated
import pytest
import torch
from emulated_shapes import lay_out

from resnet_fused import numerics
from resnet_fused.ops._library import overload

pytestmark = pytest.mark.emulated

PREFETCH, TRIGGER, WAIT = (
    "prefetch.global.L2", "griddepcontrol.launch_dependents", "griddepcontrol.wait",
)  # fmt: skip


def conv(**settings):
    """A 1x1 convolution of 4 x 64 pixels, tiles of 64; its result, and the oracle's."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(-4, 5, (4, 64, 8, 8), generator=generator).to(torch.bfloat16)
    weight = torch.randint(-4, 5, (64, 64, 1, 1), generator=generator).to(torch.bfloat16)
    x, weight = lay_out(x, "nhwc"), lay_out(weight, "nhwc")
    vectors = torch.ones(64), torch.zeros(64)
    geometry = ([1, 1], [0, 0], [1, 1], 1)
    index = [tile["m"] for tile in emulated.load().conv_bn_act_configurations()].index(64)
    given = (x, weight, *vectors, None, *geometry, "relu")
    with emulated.using(configuration=index, schedule=emulated.Schedule(), **settings) as runs:
        y = overload("conv_bn_act", emulated.NAME)(*given)
    oracle = numerics.conv_bn_act_oracle(*given[:5], act="relu").to(torch.bfloat16)
    return y, oracle, runs.reports[-1]


def images_that_are_there(y: torch.Tensor) -> list[int]:
    return [n for n in range(len(y)) if not y[n].isnan().any()]


@pytest.mark.parametrize(("reverse", "there"), [(False, [0]), (True, [3])])
def test_the_first_block_takes_the_last_image_of_a_backward_walk(reverse, there):
    y, oracle, report = conv(reverse=reverse, splits=1, blocks=(0, 0))
    assert report["plan"]["blocks"] == 4
    assert images_that_are_there(y) == there
    assert torch.equal(y[there], oracle[there])
    whole, _, _ = conv(reverse=reverse, splits=1)
    assert torch.equal(whole, oracle)


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("reverse", [True, False])
def test_splits_meet_by_counters_of_either_kind_in_either_walk(kept, reverse):
    y, oracle, _ = conv(reverse=reverse, kept=kept, splits=2, resident_blocks=2)
    assert torch.equal(y, oracle)


@pytest.mark.parametrize(
    ("flow", "kept", "triggers", "asks"),
    [
        ((True, True), True, True, True),
        ((True, False), True, True, False),
        ((False, False), True, False, False),
        # The counters are cleared ahead: no kernel of this package stands there.
        ((True, True), False, True, False),
    ],
)
def test_what_a_launch_does_depends_on_how_it_stands(flow, kept, triggers, asks):
    y, oracle, report = conv(reverse=False, flow=flow, kept=kept, splits=2)
    assert torch.equal(y, oracle)
    found = {site["instruction"] for site in report["sites"]}
    assert WAIT in found
    assert (TRIGGER in found, PREFETCH in found) == (triggers, asks)


@pytest.mark.parametrize("op", ["stem", "head", "bn_act"])
def test_a_kernel_that_stands_alone_lets_none_begin(op):
    generator = torch.Generator().manual_seed(2)
    vectors = torch.ones(8), torch.zeros(8)
    if op == "stem":
        x = torch.randn(1, 3, 20, 20, generator=generator)
        pairs = ([2, 2], [3, 3], [3, 3], [2, 2], [1, 1])
        weight = torch.randn(8, 3, 7, 7, generator=generator).half()
        given = (x, weight, *vectors, None, *pairs)
    elif op == "head":
        x = torch.randn(2, 64, 2, 2, generator=generator).half()
        given = (x, torch.randn(8, 64, generator=generator).half(), None)
    else:
        x = torch.randn(2, 8, 3, 3, generator=generator).half()
        given = (x, *vectors, None, "relu")
    results = []
    for flow in ((True, True), (False, False)):
        with emulated.using(flow=flow, schedule=emulated.Schedule()) as runs:
            results.append(overload(op, emulated.NAME)(*given))
        found = {site["instruction"] for site in runs.reports[-1]["sites"]}
        assert WAIT in found and (TRIGGER in found) is flow[0]
        assert (PREFETCH in found) is (flow[0] and op == "head")
    assert torch.equal(*results)
