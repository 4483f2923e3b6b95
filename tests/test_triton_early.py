"""Kernels that begin before the one ahead has ended: what they wait for, and who launches them so.

The gates' sentences, on kernels that ship and on planted ones, come from machine code for sm_90 and
sm_80 that was compiled without a GPU; the launches of a frozen ResNet-50 are recorded likewise.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from resnet_fused.triton import _limits, _tiles

pytest.importorskip("triton", reason="the kernels are Triton's, which is not installed")

ROOT = Path(__file__).resolve().parent.parent
KERNELS = {
    "conv_bn_act_kernel", "merge_kernel", "conv_chain_kernel", "stem_kernel", "mean_kernel",
    "head_kernel",
}  # fmt: skip
"""What an engine launches."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What tests/triton_early.py found, in one process without the interpreter."""
    kept = {n: v for n, v in os.environ.items() if n not in ("TRITON_INTERPRET", _limits.SWITCH)}
    cache = str(tmp_path_factory.mktemp("cache"))
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "triton_early.py")],
        capture_output=True,
        text=True,
        env={**kept, "TRITON_CACHE_DIR": cache, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def early() -> ModuleType:
    """tools/_triton_early.py, which reads text alone."""
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import _triton_early
    finally:
        sys.path.remove(str(ROOT / "tools"))
    return _triton_early


@pytest.mark.slow
def test_the_kernels_of_an_engine_wait_once_and_first(found: dict[str, Any]) -> None:
    shipped = found["shipped"]["90"]
    # The others are in the gates' sample.
    names = {"conv_bn_act_kernel", "merge_kernel", "mean_kernel", "head_kernel"}
    assert {one["kernel"] for one in shipped} == names
    for one in shipped:
        assert one["early"] and one["option"], one
        assert [one["waits"], one["triggers"]] == one["machine"] == [1, 1], one
        assert one["failures"] == [], one
        assert bool(one["prefetches"]) == bool(one["prefetch"]), one
    asked = {one["kernel"] for one in shipped if one["prefetch"]}
    assert asked == {"conv_bn_act_kernel", "head_kernel"}


@pytest.mark.slow
def test_an_older_gpu_gets_none_of_it(found: dict[str, Any]) -> None:
    shipped = found["shipped"]["80"]
    assert {one["kernel"] for one in shipped} == {"conv_bn_act_kernel", "merge_kernel"}
    for one in shipped:
        assert (one["early"], one["option"], one["prefetches"]) == (False, False, 0)
        assert [one["waits"], one["triggers"], *one["machine"]] == [0, 0, 0, 0]
        assert one["failures"] == []
    assert {one["reverse"] for one in shipped if one["kernel"] == "conv_bn_act_kernel"} == {True}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plant", "sentence"),
    [
        ("right", None),
        ("without_wait", "0 waits and 0 triggers in PTX, 0 and 0 in machine code, 1 of each"),
        ("behind_a_load", "before the wait: ld.global, LDG"),
        ("behind_a_store", "before the wait: st.global, STG"),
        ("in_some_programs", "1 ways around it"),
        ("behind_an_end", "before the wait: "),
        ("waits_twice", "2 waits and 2 triggers in PTX"),
    ],
)
def test_the_gate_catches_what_is_planted(
    found: dict[str, Any], plant: str, sentence: str | None
) -> None:
    said = found["plants"][plant]
    if sentence is None:
        assert said == []
        assert found["older"] == []
    else:
        assert len(said) == 1 and said[0].startswith("early begin: ") and sentence in said[0], said


@pytest.mark.slow
def test_a_frozen_resnet50_of_one_image_in_70_kernels(found: dict[str, Any]) -> None:
    """As docs/freeze.md says, and by the very launches."""
    first, again, _ = found["engine"]
    predicted = found["predicted"]
    assert [one["kernel"] for one in first] == ["pack_kernel", *(one["kernel"] for one in again)]
    assert {one["kernel"] for one in again} == KERNELS
    assert len(again) == sum(kernels for _, kernels, _ in predicted) == 70
    assert all(one["early"] for one in again)
    # The stem's kernel follows a copy of the caller's image.
    assert [one["option"] for one in again] == [False] + [True] * 69
    # Which of two kernels a step's programs are of: not the merge, and of a head the product.
    own = [one for one in again if one["kernel"] not in ("merge_kernel", "mean_kernel")]
    assert [one["programs"] for one in own] == [programs for _, _, programs in predicted]
    # No tensor of one image is too much for the cache.
    assert not any(one["reverse"] for one in again)
    matrix = [one for one in own if one["kernel"] != "stem_kernel"]
    assert all(one["prefetch"] for one in matrix)


@pytest.mark.slow
def test_one_image_fills_the_gpu_where_a_split_is_worth_its_merge(found: dict[str, Any]) -> None:
    few = [(name, programs) for name, _, programs in found["predicted"] if programs < 98]
    assert min(programs for _, programs in few) == 49
    chains, layers = few[:3], few[3:]
    # Chains are cut where they save launches, which is in the first stage alone.
    assert [name.split(".")[0] for name, _ in chains] == ["layer1"] * 3
    assert not any("+" in name for name, _, _ in found["predicted"][5:-1])
    # Half of the GPU: two parts each would take longer, by the chooser's own numbers.
    assert len(layers) == 6
    limits = _tiles.Limits(132, 232448, 90)
    for rows, columns, depth in ((784, 128, 512), (49, 2048, 512)):
        product = _tiles.Product(rows, columns, 1, depth, 1, 2)
        ways = {}
        for cost, tile, splits, _ in _tiles.candidates(product, limits):
            ways.setdefault(splits, []).append((cost, tile.name))
        assert min(ways[1]) < min(ways[2])


@pytest.mark.slow
def test_behind_a_foreign_kernel_the_next_one_waits_to_begin(found: dict[str, Any]) -> None:
    """What another library launches may have ended before what it did not wait for."""
    _, again, why = found["foreign"]
    whole = found["engine"][1]
    place = next(at for at, one in enumerate(again) if at and not one["option"])
    # layer2.0.downsample.0 is gone, and layer2.0.conv3 follows it; nothing else is different.
    assert [one["option"] for one in again].count(False) == 2
    assert len(again) > place + 2
    assert whole[place]["programs"] == 104 and again[place]["kernel"] == "conv_bn_act_kernel"
    assert [one["reverse"] for one in again].count(True) == 1 and again[-1]["reverse"]
    said = {one["step"]: one["why"] for one in why}
    assert "begins before the step ahead has ended" in said["layer2.0.conv3"]
    assert said["layer2.0.downsample.0"] == "asked for"
    assert said["layer2.2.conv1"].endswith("the batch backwards")


PTX = """
.visible .entry kernel(
)
{{
	@%p1 bra $L__BB0_2;
	prefetch.global.L2 [%rd6]; mov.u32 %r1, 0;
$L__BB0_2:
	{ahead}
	griddepcontrol.wait ;  // ld.global in a comment
	griddepcontrol.launch_dependents ;
	ld.global.v4.b32 {{ %r1, %r2, %r3, %r4 }}, [ %rd1 + 0 ];
$L__BB0_3:
	@%p2 cp.async.cg.shared.global [ %r2 + 0 ], [ %rd6 + 0 ], 0x10, 0x10;
	@%p3 bra $L__BB0_3;
	{behind}
	ret;
}}
"""


@pytest.mark.parametrize(
    ("ahead", "behind", "wrong"),
    [
        ("ld.param.b64 %rd1, [kernel_param_0];", "", {}),
        ("ld.shared.b32 %r1, [%r2];", "st.global.b32 [%rd2], %r1;", {}),
        ("@%p1 ld.global.b16 { %rs1 }, [ %rd1 + 0 ];", "", {"ahead": ("ld.global",)}),
        ("ld.global.L1::evict_last.v2.b32 { %r1, %r2 }, [ %rd1 ];", "",
         {"ahead": ("ld.global.L1::evict_last.v2.b32",)}),
        ("cp.async.ca.shared.global [%r1], [%rd1], 4;", "", {"ahead": ("cp.async.ca",)}),
        ("cp.async.bulk.tensor.2d [%r1], [%rd1];", "", {"ahead": ("cp.async.bulk",)}),
        ("atom.global.add.u32 %r1, [%rd1], 1;", "", {"ahead": ("atom",)}),
        ("@%p1 ret;", "", {"ahead": ("ret",)}),
        ("@%p1 bra $L__BB0_3;", "", {"around": 1}),
        ("@!%p1 bra.uni $L__BB0_3;", "", {"around": 1}),
        ("", "ld.global.L1::no_allocate.nc.b32 %r1, [%rd1];", {"read_only": 1}),
        ("", "griddepcontrol.wait;", {"waits": 2}),
        ("", "griddepcontrol.launch_dependents;", {"triggers": 2}),
    ],
)  # fmt: skip
def test_ptx_is_read_line_by_line(early: ModuleType, ahead: str, behind: str, wrong: Any) -> None:
    seen = early.dependence(PTX.format(ahead=ahead, behind=behind))
    right = early.Dependence(1, 1)
    for name in ("waits", "triggers", "around", "read_only"):
        assert getattr(seen, name) == wrong.get(name, getattr(right, name)), name
    assert [one.split(".")[0] for one in seen.ahead] == [
        one.split(".")[0] for one in wrong.get("ahead", ())
    ]


def test_ptx_without_a_wait(early: ModuleType) -> None:
    text = PTX.format(ahead="", behind="").replace("griddepcontrol", "membar")
    assert early.dependence(text) == early.Dependence()


@pytest.mark.parametrize(
    ("capability", "switch", "interpreted", "reason"),
    [
        (90, None, False, None),
        (100, "1", False, None),
        (89, None, False, "sm_89 cannot, sm_90 is the first that can"),
        (90, "0", False, "RESNET_FUSED_PDL switches it off"),
        (90, "off", False, "RESNET_FUSED_PDL switches it off"),
        (90, None, True, "Triton's interpreter runs one kernel after the other"),
    ],
)
def test_who_may_begin_early(monkeypatch, capability, switch, interpreted, reason) -> None:
    monkeypatch.delenv(_limits.SWITCH, raising=False)
    if switch is not None:
        monkeypatch.setenv(_limits.SWITCH, switch)
    monkeypatch.setattr(_limits, "interpreted", lambda: interpreted)
    limits = _tiles.Limits(132, 232448, capability)
    monkeypatch.setattr(_limits, "limits", lambda device: limits)
    assert _limits.not_dependent(torch.device("meta")) == reason


def test_what_a_launch_says_of_its_place() -> None:
    from resnet_fused.triton._dependent import ALONE, LANES, Flow, prefetched

    assert ALONE.options() == {} and ALONE.then() == ALONE
    assert Flow(True).options() == {"PDL": True, "launch_pdl": False}
    assert Flow(True).then() == Flow(True, True)
    assert Flow(True, True).options() == {"PDL": True, "launch_pdl": True}
    limits = _tiles.Limits(132, 232448, 90)
    dense = torch.empty(64, 3, 3, 32, device="meta").permute(0, 3, 1, 2)
    many = {"PREFETCH": LANES}
    assert prefetched(Flow(True), 264, limits, dense) == many
    assert prefetched(Flow(True), 265, limits, dense) == {}  # two waves
    assert prefetched(ALONE, 98, limits, dense) == {}
    for other in (dense[::2], dense[:, :16], dense[:, :, 1:], dense[:1, :16]):
        assert prefetched(Flow(True), 98, limits, dense, other) == {}, other.shape
    # A filter's step decides how much is asked for: of a single one it may be anything.
    assert prefetched(Flow(True), 98, limits, torch.empty(1, 64).as_strided((1, 64), (9, 1))) == {}
    assert prefetched(Flow(True), 98, limits, dense[:5]) == many
