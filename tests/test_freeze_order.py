"""How an engine's kernels stand among each other: who begins early, and from which end.

Stand-ins take the launches; what is tested is what they are told. Whether that is right is a matter
of the kernels, which the emulator and the gates look at.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from nets import images, tiny_resnet
from torchvision.models import resnet as tv

import resnet_fused as rf
from resnet_fused import _tuned, backends
from resnet_fused.freeze import _gpu, _kernels
from resnet_fused.ops import _cuda, _triton
from resnet_fused.triton import _limits

ENTRIES = {entry.name: entry for entry in backends.implementations("conv_bn_act")}


class Stand:
    """Launches of one implementation: what each was told, and the reference's result."""

    def __init__(self, name: str, told: list[tuple[str, dict[str, Any]]]) -> None:
        self.name, self.told, self.copies = name, told, False

    def __call__(self, op: str, *arguments: Any, **how: Any) -> bool:
        x, weight, scale, shift, residual, out, *rest = arguments
        y = torch.ops.resnet_fused.conv_bn_act.reference(x, weight, scale, shift, residual, *rest)
        out.copy_(y)
        self.told.append((self.name, how))
        return self.copies


@pytest.fixture
def served(monkeypatch):
    """Makes the layers be served by turns by implementations; what each launch was told."""
    told: list[tuple[str, dict[str, Any]]] = []

    def by(*names: str) -> list[tuple[str, dict[str, Any]]]:
        seen: list[str] = []

        def chosen(step, args):
            seen.append(step.name)
            return backends.Choice(ENTRIES[names[(len(seen) - 1) % len(names)]], "stand-in")

        kind = _kernels.KINDS["conv_bn_act"]._replace(choose=chosen)
        monkeypatch.setitem(_kernels.KINDS, "conv_bn_act", kind)
        return told

    reference = torch.ops.resnet_fused.conv_bn_act.reference
    monkeypatch.setattr(_kernels, "overload", lambda op, name: reference)
    monkeypatch.setattr(_limits, "not_dependent", lambda device: None)
    monkeypatch.setattr(_cuda, "prepared", lambda op, *arguments: {"arrivals": len(arguments)})
    monkeypatch.setattr(_triton, "prepared", lambda op, *arguments: {})
    for name in ("cuda", "triton"):
        monkeypatch.setitem(_kernels._LAUNCHES, name, Stand(name, told))
    return by


def launched(told: list[tuple[str, dict[str, Any]]], **options: Any) -> list[tuple[str, bool]]:
    """(implementation, whether it follows) of one run of an engine's steps into its arena."""
    model, x = tiny_resnet(tv.BasicBlock), images()
    engine = rf.freeze(model, x)
    steps = _gpu.Steps(_gpu.laid_out(engine._graph), [x])
    told.clear()
    result = steps.run_in([x], steps.arena(x.device))
    with torch.inference_mode():
        assert torch.allclose(result, model(x), atol=1e-3)
    assert steps.compiles and steps.early
    return [(name, _follows(name, how)) for name, how in told]


def _follows(name: str, how: dict[str, Any]) -> bool:
    if name == "cuda":
        assert how["dependent"] is True and "arrivals" in how
        return how["follows"]
    assert how["flow"].dependent
    return how["flow"].follows


@pytest.mark.parametrize("names", [("cuda",), ("cuda", "triton"), ("triton", "cuda", "cuda")])
def test_kernels_of_both_kinds_follow_each_other(served, names):
    found = launched(served(*names))
    assert [name for name, _ in found] == [names[i % len(names)] for i in range(len(found))]
    # The stem's pooling, which is another library's, stands behind the first layer.
    assert [place for place, (_, follows) in enumerate(found) if not follows] == [0, 1]
    assert len(found) > 4


def test_behind_a_kernel_that_copies_its_result_none_follows(served, monkeypatch):
    told = served("cuda")
    stand = Stand("cuda", told)
    stand.copies = True
    monkeypatch.setitem(_kernels._LAUNCHES, "cuda", stand)
    assert not any(follows for _, follows in launched(told))


def test_what_the_user_switches_off_is_off_for_both_kinds(served, monkeypatch):
    told = served("cuda", "triton")
    monkeypatch.setattr(_limits, "not_dependent", lambda device: "RESNET_FUSED_PDL switches it off")
    model, x = tiny_resnet(tv.BasicBlock), images()
    steps = _gpu.Steps(_gpu.laid_out(rf.freeze(model, x)._graph), [x])
    told.clear()
    steps.run_in([x], steps.arena(x.device))
    for name, how in told:
        early = how["dependent"] or how["follows"] if name == "cuda" else any(how["flow"])
        assert not early
    whys = [why for name, why in steps.served.values() if name in ("cuda", "triton")]
    assert whys and all("when the step ahead has ended: RESNET_FUSED_PDL" in why for why in whys)


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_the_backward_walk_reaches_both_kinds(served, name):
    told = served(name)
    model, x = tiny_resnet(tv.BasicBlock), images()
    graph = _gpu.laid_out(rf.freeze(model, x)._graph)
    turned = []
    for place, step in enumerate(graph.steps):
        if step.kind == "conv_bn_act" and place % 2:
            step.options["reverse"] = True
            turned.append(step.name)
    steps = _gpu.Steps(graph, [x])
    told.clear()
    steps.run_in([x], steps.arena(x.device))
    assert sum(how.get("reverse", False) for _, how in told) == len(turned) > 0
    backwards = [
        graph.steps[at].name for at, (_, why) in steps.served.items() if "backwards" in why
    ]
    assert backwards == turned


def test_a_report_tells_what_tuning_chose(monkeypatch):
    kept = _tuned.Tuned("16x8_8w", 1, 1.2, 1.1, 1.3, "16x32_8w")
    monkeypatch.setattr(_tuned, "find", lambda name, *call: kept if name == "cuda" else None)
    entry = next(e for e in backends.implementations("head") if e.name == "cuda")
    kind = _kernels.KINDS["head"]._replace(choose=lambda *_: backends.Choice(entry, "stand-in"))
    monkeypatch.setitem(_kernels.KINDS, "head", kind)
    tensors = {"weight": torch.zeros(5, 8), "bias": torch.zeros(5)}
    step = _kernels.Step("head", "fc", (0,), (1,), tensors)
    made = functools.partial(_kernels.Kernel, step, [torch.zeros(2, 8, 3, 3)])
    assert "16x8_8w/1: tuned on this GPU: 1.20x" in made().why
    # It may not have been admitted since.
    monkeypatch.setattr(_kernels._admitted, "names", lambda *_: frozenset({"16x32_8w"}))
    assert "tuned" not in made().why
