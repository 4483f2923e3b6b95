"""gpu-check's steps of stem, head, conv_chain and the engine, by Triton's interpreter."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from triton_trace import needs_interpreter

import resnet_fused as rf
from resnet_fused import admission, backends
from resnet_fused.bench.spanning_kernels import KINDS
from resnet_fused.ops import _admitted
from resnet_fused.triton import _chain_tiles, _stem_tiles

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_check  # noqa: E402
from gpu import frozen, plan, plan_spanning, spanning  # noqa: E402

CHAIN = _chain_tiles.CONFIGS[0].name
STEM = "32x32_8w2s"
RATES = {"flops": 1e12, "bandwidth": 1e11}


def kernels(*implementations: str) -> list[dict]:
    """As the environment stage lists them; a second implementation is one like the first."""
    return [
        {
            "op": kernel.op, "implementation": one, "check": kernel.check, "problem": None,
            "hash": "0" * 64, "configurations": list(kernel.list_configurations()),
        }
        for kernel in admission.kernels()
        if kernel.implementation == "triton"
        for one in implementations
    ]  # fmt: skip


def test_the_plan_holds_every_configuration_mode_layer_and_engine():
    names = [task.name for task in plan.bounds("cuda:0", kernels("triton"))]
    assert len(names) == len(set(names))
    for mode in ("bf16", "fp16", "tf32", "fp32"):
        for op, one in (("stem", _stem_tiles.TILES), ("conv_chain", _chain_tiles.CONFIGS)):
            assert {f"{op} {mode} {config.name}" for config in one} < set(names)
        assert {f"head {mode} default", f"head {mode} cases"} < set(names)
    engines = {f"frozen {n} {m} {k}" for n in ("resnet18", "resnet50") for m in ("bf16", "fp16")
               for k in range(len(frozen.SHAPES))}  # fmt: skip
    assert engines | {"frozen threads", "frozen bytes"} < set(names)
    assert {n for n, *_ in frozen.SHAPES} >= {1, 3} and (97, 131) in {s[1:] for s in frozen.SHAPES}
    layers = [name for name in names if name.startswith("conv_chain layer ")]
    assert "conv_chain layer 64_256_64_at56" in layers and len(layers) == 21
    assert {"stem large", "conv_chain large", "head repeats 2048_1000_at7"} < set(names)
    # What tells most comes before a few hundred small cases.
    assert max(map(names.index, engines)) < names.index("large bn_act")


def test_another_implementation_gets_the_same_steps():
    """Nothing names Triton: what admission lists is looked at."""
    one = {t.name for t in plan.bounds("cuda:0", kernels("triton"))}
    both = {t.name: t for t in plan.bounds("cuda:0", kernels("triton", "cuda"))}
    more = set(both) - one
    assert {name.split()[0] for name in more} == {"stem.cuda", "head.cuda", "conv_chain.cuda"}
    assert len(more) == sum(name.split()[0] in KINDS for name in one)
    assert all(both[name].arguments["implementation"] == "cuda" for name in more)
    assert both[f"stem.cuda bf16 {STEM}"].about == {"op": "stem", "implementation": "cuda"}
    timed = plan_spanning.timings(RATES, kernels("triton", "cuda"), "cuda:0")
    first = next(t for t in timed if t.name == "conv_chain 64_256_64_at56@256")
    assert set(first.arguments["kernels"]) == {"triton", "cuda"}
    assert len(first.arguments["kernels"]["cuda"]) == len(_chain_tiles.CONFIGS)
    assert {t.about["op"] for t in timed} == {"stem", "head", "conv_chain"}
    later = next(t for t in timed if t.name == "conv_chain 64_256_64_at56@1")
    assert later.arguments["kernels"] == {"triton": [], "cuda": []}


def test_without_its_kernels_no_step_is_planned():
    assert not any("stem" in t.name for t in plan.bounds("cuda:0") if t.name[:4] == "stem")
    assert plan_spanning.timings(RATES, [], "cuda:0") == []


def test_times_go_to_the_configuration_that_took_them():
    """So that a record can say which of two implementations is faster."""
    check = gpu_check.Check.__new__(gpu_check.Check)
    keys = [("stem", "triton", STEM), ("stem", "cuda", STEM), ("conv_bn_act", "triton", STEM)]
    check._entries = {key: {"timings": {}} for key in keys}
    timed = plan_spanning.timings(RATES, kernels("triton"), "cuda:0")
    task = next(task for task in timed if task.about["op"] == "stem")
    us = {"triton": {"us": 3.0}, f"triton {STEM}": {"us": 2.0}, f"cuda {STEM}": {"us": 5.0},
          "parts": {"us": 9.0}}  # fmt: skip
    check._note_timings(task, {"ok": True, "us": us})
    layer = task.about["layer"]
    assert [check._entries[key]["timings"] for key in keys] == [{layer: 2.0}, {layer: 5.0}, {}]
    assert "stem " not in layer and gpu_check.speed_line({"ok": True, "us": us, "ratios": {}})


def test_what_passed_is_admitted(tmp_path, monkeypatch, capsys):
    """By the same table as every other kernel: tools/admit.py knows none by name."""
    spec = importlib.util.spec_from_file_location("admit", ROOT / "tools" / "admit.py")
    admit = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(admit)
    known = {k.op: k for k in admission.kernels() if k.implementation == "triton" and k.op in KINDS}
    assert known.keys() == KINDS.keys()
    entries = [
        {
            "op": op, "implementation": "triton", "configuration": name, "arch": "cpu",
            "ok": name != CHAIN, "hash": admission.source_hash(kernel), "timings": {"a@1": 2.0},
        }
        for op, kernel in known.items()
        for name in kernel.list_configurations()
    ]  # fmt: skip
    old = {**entries[0], "configuration": "old", "hash": "0" * 64}
    file, shipped = tmp_path / "gpu-check.json", tmp_path / "admitted.json"
    file.write_text(json.dumps({"admission": [*entries, old]}))
    assert admit.main([str(file), "--output", str(shipped)]) == 1  # for the old sources
    assert "old" in capsys.readouterr().err
    monkeypatch.setattr(admission, "SHIPPED", shipped)
    admission.forget()
    try:
        for op, kernel in known.items():
            found = admission.verdict(op, "triton", "cpu")
            assert found.source == "shipped" and found.reason is None
            assert found.configurations == frozenset(kernel.list_configurations()) - {CHAIN}
    finally:
        admission.forget()


def test_one_configuration_alone_may_be_chosen(monkeypatch):
    device = torch.device("cpu")
    with spanning.only("stem", "triton", STEM):
        assert _admitted.names("stem", "triton", device) == {STEM}
        assert _admitted.names("stem", "cuda", device) is None
        assert _admitted.names("conv_bn_act", "triton", device) is None
    assert _admitted.names("stem", "triton", device) is None


def test_without_a_gpu_cuda_is_skipped_with_the_reason():
    skipped = {"ok": None, "skipped": "the CUDA convolutions need a GPU"}
    assert spanning.configuration("cpu", "stem", STEM, "fp16", "cuda") == skipped
    assert spanning.layer("cpu", "head", "48_10_at4", 1, "cuda") == skipped


class TestInterpreted:
    """The steps themselves."""

    pytestmark = needs_interpreter

    @pytest.mark.parametrize(
        ("op", "name"), [("stem", STEM), ("head", "default"), ("conv_chain", CHAIN)]
    )
    def test_a_configuration_passes_in_the_modes_that_it_takes(self, op, name, monkeypatch):
        few = spanning._few(spanning.cases_of(op, name), "cpu")[:1]
        monkeypatch.setattr(spanning, "_few", lambda cases, device: few)
        found = spanning.configuration("cpu", op, name, "fp16")
        assert found["ok"] and found["cases"] == 1 and 0 < found["truncate"] < 1
        assert found["configuration"] == name
        wide = spanning.configuration("cpu", op, name, "fp32")
        if op == "head":
            assert wide["ok"] and wide["truncate"] < 1
        else:
            assert wide["ok"] is None and "no case fits: " in wide["skipped"]

    @pytest.mark.parametrize("fault", ["value", "band", "bits"])
    def test_a_faulty_launch_fails(self, fault, monkeypatch):
        right, count = spanning.LAUNCHES["triton"], [0]

        def wrong(op, *arguments):
            right(op, *arguments)
            out, count[0] = arguments[3], count[0] + 1
            if fault == "value":
                out[0, 0] *= 1.01
            elif fault == "band":
                out.as_strided((1,), (1,), out.storage_offset() - 1).fill_(0)
            elif count[0] == 2:
                out[-1, -1] = torch.nextafter(out[-1, -1], torch.zeros(()).half())

        monkeypatch.setitem(spanning.LAUNCHES, "triton", wrong)
        found = spanning.configuration("cpu", "head", "default", "fp16")
        said = {"value": "beyond the bound", "band": "beside it", "bits": "other bits"}
        assert found["ok"] is False and said[fault] in found["error"]
        if fault != "bits":
            found = spanning.layer("cpu", "head", "48_10_at4", 1)
            assert found["ok"] is False

    @pytest.mark.parametrize(("op", "place"), [("head", "inf_weight"), ("conv_chain", "nan_x")])
    def test_nan_and_inf_go_where_the_oracle_has_them(self, op, place, monkeypatch):
        assert spanning.special("cpu", op, place, "fp16")["ok"]
        right = spanning.LAUNCHES["triton"]

        def lossy(op, *arguments):
            right(op, *arguments)
            for t in arguments:
                if isinstance(t, torch.Tensor) and t.isnan().any() and t is not arguments[0]:
                    t.nan_to_num_(0.0)

        monkeypatch.setitem(spanning.LAUNCHES, "triton", lossy)
        assert spanning.special("cpu", op, "nan_x", "fp16")["ok"] is False

    @pytest.mark.parametrize(("op", "name"), [(o, n) for o, ns in spanning.TINY.items()
                                              for n in ns[-1:] if o != "stem"])  # fmt: skip
    def test_a_layer_passes(self, op, name):
        found = spanning.layer("cpu", op, name, 1)
        assert found["ok"] and 0 < found["worst"] <= 1

    def test_the_public_op_on_what_no_kernel_takes(self):
        """odd_channels and one_channel: the parts serve them."""
        found = spanning.public("cpu", "conv_chain", "fp16")
        assert found["ok"] and 0 < found["truncate"] < 1

    def test_a_call_is_timed_by_every_way_and_a_wrong_one_has_no_time(self, monkeypatch):
        name = "48_10_at4"
        found = spanning.time("cpu", "head", name, 1, {"triton": ["default"]}, RATES)
        assert found["ok"] and set(found["us"]) == {"triton", "triton default", "parts", "eager"}
        assert found["best"].startswith("triton") and found["of_floor"] > 0
        assert set(found["ratios"]) == {"parts_over_best", "eager_over_best"}
        monkeypatch.setattr(
            spanning, "_by_parts", lambda op, case: lambda o: o.x.new_zeros(len(o.x), case.classes)
        )
        wrong = spanning.time("cpu", "head", name, 1, {"triton": []})
        assert wrong["ok"] is False and "parts" in wrong["error"] and "us" not in wrong

    def test_more_elements_than_an_index_holds(self):
        found = spanning.large("cpu", "conv_chain")
        assert found["ok"] and found["images"] == 5


class TestEngine:
    """The engine's steps, its graphs by a stand-in."""

    pytestmark = needs_interpreter

    def test_the_engine_passes(self):
        found = frozen.check("cpu", "resnet18", "fp16")
        assert found["ok"] and set(found["served"]) <= {"triton", "torch"} and found["ratios"]

    @pytest.mark.parametrize("fault", ["stale", "numbers", "leak"])
    def test_an_engine_that_errs_fails(self, fault, monkeypatch):
        class Wrong(nn.Module):
            def __init__(self, model) -> None:
                super().__init__()
                self.model, self.first = model, None

            def report(self):
                return rf.freeze(
                    self.model, frozen.images((1, 8, 8), "cpu", torch.half, 0)
                ).report()

            def forward(self, x):
                y = self.model(x)
                self.first = y if self.first is None else self.first
                if fault == "stale":
                    return self.first
                if fault == "leak":
                    return y + (x.isnan().any() * 1.0).half()
                return y * 1.05

        monkeypatch.setattr(frozen, "engine_of", lambda model, x: Wrong(model))
        with backends.backend("reference"):
            found = frozen.check("cpu", "resnet18", "fp16", implementation="reference")
        said = {"stale": "times eager's", "numbers": "times eager's", "leak": "changed another"}
        assert found["ok"] is False and said[fault] in found["error"]

    def test_bytes_threads_and_times(self):
        assert frozen.bytes_of("cpu", "resnet18")["ok"]
        found = frozen.inference("cpu", "resnet18", 1, 2)
        assert found["ok"] and set(found["us"]) == {"eager", "fused", "frozen"}
        assert "frozen" in gpu_check.network_line(found)
