"""What is predicted of the engine by the CUDA kernels follows from their plans, and is written."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import re
import sys
from pathlib import Path

import pytest
import torch

from resnet_fused.ops import _cuda_plan

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(
    not _cuda_plan.exists("conv_chain"), reason="the extension was built without nvcc"
)


@pytest.fixture(scope="module")
def tool():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module("predict_cuda_engine")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def test_the_page_is_up_to_date(tool):
    page = tool.rates.PAGE.read_text(encoding="utf-8")
    assert f"{tool.BEGIN}\n{tool.text()}\n{tool.END}" in page, f"run python {tool.__file__} --write"


def test_what_more_is_allowed_takes_no_longer(tool):
    for batch in tool.AIMS:
        times = [tool.engine(batch, allowed) for _, allowed in tool.STEPS]
        assert times[0].chains == 0
        assert all(later.us <= before.us for before, later in itertools.pairwise(times))


def test_every_convolution_is_in_one_launch(tool):
    """Launches add up to the engine, and none beats memory or the tensor cores."""
    for batch in tool.AIMS:
        launches = tool.launches(batch)
        total, kernels, chains = tool.engine(batch, tool.STEPS[-1][1])
        assert sum(one.count for one in launches) == kernels - 1 - tool.head_kernels(batch)
        named = sum(one.count for one in launches if one.name.startswith("chain"))
        assert named == chains
        work = sum(one.count * one.us for one in launches)
        ends = tool.stem_us(batch) + tool.head_us(batch)
        assert work + ends == pytest.approx(total, rel=1e-9)
        assert all(one.us > one.least > 0 for one in launches)
        lost = [one.lost for one in launches]
        assert lost == sorted(lost, reverse=True)


def test_early_launches_take_less_and_chains_save_launches(tool):
    """As docs/freeze.md counts them; the engine's own launches are counted with the same."""
    assert pytest.approx(1e6 * tool.rates.LAUNCH) == tool.ORDINARY
    found = [tool.engine(1, allowed) for _, allowed in tool.STEPS]
    assert found[0].kernels == len(tool.NETWORK) + tool.head_kernels(1)
    assert found[-1].kernels < found[0].kernels
    for one in found:
        assert one.us - one.early == pytest.approx(one.kernels * (tool.ORDINARY - tool.EARLY))


def test_the_page_of_the_one_launch_says_the_same(tool):
    ordinary, early, launch = re.findall(r"(?<![.\d])(\d+) us", tool.one_image())
    said = " ".join((ROOT / "docs" / "network.md").read_text(encoding="utf-8").split())
    assert f"It is predicted to take {launch} us and a launch;" in said
    assert f"{ordinary} us with ordinary launches, {early} begun early" in said


def test_what_the_page_says_of_the_plan_in_words(tool):
    """One by one the aim is out of reach, with chains not; all of layer 2's ends are in some."""
    aim = 1e6 * tool.AIMS[256]
    times = [tool.engine(256, allowed).us for _, allowed in tool.STEPS]
    assert times[0] > aim and times[2] > aim > times[3]
    planned = [rate for rate in (*tool.PLANNED, tool.PLANNED_LAST[1]) if rate is not None]
    assert planned == sorted(planned) and len(tool.PLANNED) == len(tool.STEPS)
    met = [
        us <= 1e6 * 256 / rate
        for us, rate in zip(times, tool.PLANNED, strict=True)
        if rate is not None
    ]
    assert not any(met)
    second = [cut.case for cut in tool.cuts(256, tool.STEPS[-1][1]) if cut.case.k == 128]
    assert [(case.m, case.projected) for case in second] == [
        (128, 256),
        (128, 0),
        (128, 0),
        (256, 0),
    ]


@pytest.mark.parametrize("batch", [32, 256])
def test_the_order_is_simulated_for_the_engine_that_is_predicted(tool, batch):
    """Its steps are the launches that are counted, and turning them round moves less."""
    whole = tool.engine(batch, tool.STEPS[-1][1])
    walks = tool.predict_order.walks_of(batch, tool.serves)
    assert len(walks) == whole.kernels - tool.head_kernels(batch) + 1
    assert walks != tool.predict_order.walks_of(batch)  # Triton's engine is another one
    found = tool.ordered(batch)
    assert found.moved < found.forwards
    assert found.us == pytest.approx(
        whole.us - 1e6 * (found.forwards - found.moved) / tool.rates.MEMORY
    )


def test_depths_follow_from_one_another(tool):
    """ResNet-50 is the engine above; basic blocks have no chain, a deeper network takes longer."""
    for batch in tool.DEPTHS_AT:
        found = [tool.engine(batch, tool.STEPS[-1][1], tool.layers(name)) for name in tool.DEPTHS]
        assert found[2] == tool.engine(batch, tool.STEPS[-1][1])
        assert [one.chains > 0 for one in found] == [False, False, True, True, True]
        assert [one.us for one in found] == sorted(one.us for one in found)
    deep = tool.cuts(256, tool.STEPS[-1][1], tool.layers("resnet152"))
    assert all(cut.case.k in (64, 128) for cut in deep)


def test_a_convolution_is_predicted_as_its_plan_says(tool):
    case = dataclasses.replace(tool.NETWORK[5].case, n=32)
    shorter = dataclasses.replace(case, n=16)
    assert 0 < tool.conv_us(shorter) < tool.conv_us(case) < 2 * tool.conv_us(shorter)


def test_a_shortcut_counts_where_there_is_no_memory(tool):
    """A plan of operands without memory is that of tensors, which read the shortcut."""

    def cycles(device: str, shortcut: bool) -> float:
        def image(*shape: int) -> torch.Tensor:
            made = torch.zeros(shape, dtype=torch.bfloat16, device=device)
            return made.contiguous(memory_format=torch.channels_last)

        out = image(1, 1024, 14, 14)
        operands = image(1, 256, 14, 14), image(1024, 256, 1, 1), out if shortcut else None
        geometry = ((1, 1), (0, 0), (1, 1), 1)
        made = _cuda_plan.problem_of("conv_bn_act", operands, geometry, image(*out.shape))
        return _cuda_plan.plan(made, tool.WITH_TMA[:3]).cycles

    assert cycles("meta", False) < cycles("meta", True) == cycles("cpu", True)
