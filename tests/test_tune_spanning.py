"""Tuning of stem and conv_chain: what is tried, what is kept, and who takes it."""

from __future__ import annotations

import dataclasses
import importlib

import pytest
import torch
from triton_trace import needs_interpreter

from resnet_fused import _extension, _tuned, _verdicts, backends
from resnet_fused.bench import tune, tune_spanning
from resnet_fused.bench.sampler import CpuSampler
from resnet_fused.bench.subject import Subject
from resnet_fused.bench.tune import Job, Settings, tune_one
from resnet_fused.bench.tune_kernels import (
    KERNELS,
    CudaKernel,
    Option,
    TritonKernel,
    key_of,
    outputs_of,
)
from resnet_fused.bench.work import Work, build
from resnet_fused.cases import RESNET50_CHAINS
from resnet_fused.models import get_model
from resnet_fused.ops import _chain_plan, _cuda_plan, _triton, _tuned_calls
from resnet_fused.triton import _chain_tiles, _limits, _stem_tiles
from resnet_fused.triton._tiles import Limits

NAMES = {
    "stem": ("7x7s2_3_16_at9", "7x7s2_3_16_at7x9_uint8"),
    "conv_chain": ("16_32_16_at3", "16_32_0_at4_proj16s2_front16_even"),
}  # fmt: skip
CELLS = [(op, name) for op, names in NAMES.items() for name in names]
H200 = Limits(132, 232448, 90)
CPU = torch.device("cpu")
chain = importlib.import_module("resnet_fused.ops.conv_chain")  # the package has the function


@pytest.fixture(autouse=True)
def history(tmp_path, monkeypatch):
    """A user without one."""
    monkeypatch.setenv(_verdicts.FOLDER, str(tmp_path))
    _tuned.forget()
    yield
    _tuned.forget()


def built(op: str, name: str) -> Work:
    made = build(Subject("kernel", op, name, 1, "float16", "cpu"))
    return dataclasses.replace(made, sets=made.sets[:1])


def keep(key: _tuned.Key, configuration: str, splits: int = 1, before: str = "the pick") -> None:
    kept = _tuned.Tuned(configuration, splits, 1.25, 1.2, 1.3, before)
    _tuned.save("cpu", [(key, kept)])


def arguments_of(work: Work) -> tuple:
    return tune_spanning.arguments(work)


def test_a_models_stem_and_chains_are_tuned_with_its_convolutions():
    network = get_model("resnet50")
    todo = tune.jobs(network, "cpu", batches=[32], dtypes=["bfloat16"])
    ops = [job.subject.op for job in todo]
    assert [op for place, op in enumerate(ops) if op != ops[place - 1]] == list(tune.INFERENCE)
    chains = {job.subject.name: job.layers for job in todo if job.subject.op == "conv_chain"}
    assert chains["64_256_64_at56"] == ("layer1.1.conv3",)
    assert len(chains["256_1024_256_at14"]) == 4
    cases = [job.subject.case for job in todo if job.subject.op == "conv_chain"]
    assert sum(not case.front for case in cases) == len(RESNET50_CHAINS)


def test_who_is_not_tuned_says_why():
    triton, cuda = KERNELS
    made = Subject("kernel", "stem", NAMES["stem"][0], 1, "float16", "cpu")
    assert "on cpu" in (triton.why_not(made) or "") or _limits.interpreted()
    assert "on cpu" in (cuda.why_not(made) or "")
    head = Subject("kernel", "head", "48_10_at4", 1, "float16", "cpu")
    assert triton.why_not(head) == "head's Triton kernel has one configuration"
    assert "on cpu" in (cuda.why_not(head) or "")


@pytest.mark.parametrize(("op", "name"), CELLS)
def test_an_entry_is_found_by_the_launch_that_it_was_measured_for(op, name):
    """The benchmark's key of a subject is the key of the launch with those operands."""
    work = built(op, name)
    key = key_of(work, "triton")
    given = arguments_of(work)
    if op == "conv_chain":
        case = _tuned_calls.case_of(given)
        found = _tuned_calls.chain_call(case, given[0].dtype)
        assert case == dataclasses.replace(work.case, name="")
        other = dataclasses.replace(case, m=case.m + 16)
    else:
        found = _tuned_calls.stem_call(*given[:2], *given[4:7], given[8])
        other = None
    assert key == _tuned.key("triton", op, *found) and len(key) == _tuned.KEY_LENGTH
    keep(key, "one")
    assert _tuned.find("triton", CPU, op, *found).configuration == "one"
    if other is not None:
        assert _tuned.find("triton", CPU, op, *_tuned_calls.chain_call(other, found[0])) is None


def test_bytes_and_floats_are_two_calls():
    keys = {key_of(built("stem", name), "triton") for name in (
        "7x7s2_3_16_at9", "7x7s2_3_16_at9_uint8", "7x7s2_3_16_at9_norm",
        "7x7s2_3_16_at9_float32_norm")}  # fmt: skip
    assert len(keys) == 4


@pytest.fixture
def on_an_h200(monkeypatch):
    """Triton's kernel of conv_chain is what serves, as on a GPU."""
    entry = next(e for e in backends.implementations("conv_chain") if e.name == "triton")
    monkeypatch.setattr(backends, "choose", lambda call: backends.Choice(entry, "stand-in"))
    monkeypatch.setattr(_limits, "limits", lambda device: H200)
    monkeypatch.setattr(_triton, "allowed", lambda op, device: None)


@pytest.mark.usefixtures("on_an_h200")
def test_a_graph_is_rewritten_by_what_was_measured_not_by_what_was_predicted():
    cases = {case.name: dataclasses.replace(case, n=32) for case in RESNET50_CHAINS}
    wins, loses = cases["layer1"], cases["layer3"]
    for case, expected in ((wins, True), (loses, False)):
        assert chain.serves(case, torch.bfloat16, CPU).wins is expected
        key = _tuned.key("triton", "conv_chain", *_tuned_calls.chain_call(case, torch.bfloat16))
        keep(key, _tuned_calls.PARTS if expected else _chain_tiles.CONFIGS[-1].name)
        found = chain.serves(case, torch.bfloat16, CPU)
        assert found.wins is not expected and "tuned on this GPU: 1.25x" in found.why
        assert found.reason is None and (found.gain > 0) is not expected
        # Another batch is another call.
        other = dataclasses.replace(case, n=31)
        assert "predicted" in chain.serves(other, torch.bfloat16, CPU).why


def test_the_gain_of_what_was_measured():
    found = _chain_plan.Prediction(chain=4.0 * 1480, parts=3.0 * 1480, config="")
    assert found.gain == pytest.approx(-1.0)
    assert found.measured(1.5) == pytest.approx(1.0)  # 2 us in place of the parts' 3
    assert found.measured(1.0) == 0.0
    faster = _chain_plan.Prediction(chain=2.0 * 1480, parts=3.0 * 1480, config="")
    assert faster.measured(2.0) == pytest.approx(2.0)


@pytest.mark.usefixtures("on_an_h200")
def test_a_call_goes_to_the_parts_where_those_won(monkeypatch):
    work = built("conv_chain", "64_256_64_at3")
    given = arguments_of(work)
    assert chain.choose(given).implementation.name == "triton"
    keep(key_of(work, "triton"), _tuned_calls.PARTS)
    refused, following = [], backends.next_choice
    monkeypatch.setattr(
        backends, "next_choice", lambda *given: refused.append(given[-1]) or following(*given)
    )
    assert chain.choose(given).implementation.name == "parts"
    assert refused == ["parts/1: tuned on this GPU: 1.25x"]
    with backends.backend("triton"):  # the user's word counts more
        chain.choose(given)
    assert len(refused) == 1


def test_an_entry_that_does_not_fit_is_passed_over():
    names = frozenset({_chain_tiles.CONFIGS[0].name})
    work = built("conv_chain", "16_32_16_at3")
    launched = [*arguments_of(work)[:15], *outputs_of(work), *arguments_of(work)[15:]]
    nothing = {"allowed": names}
    assert _tuned_calls.options("conv_chain", launched, names) == nothing
    for configuration in ("gone", _chain_tiles.CONFIGS[1].name, _tuned_calls.PARTS):
        keep(key_of(work, "triton"), configuration)
        assert _tuned_calls.options("conv_chain", launched, names) == nothing
    keep(key_of(work, "triton"), _chain_tiles.CONFIGS[0].name)
    assert _tuned_calls.options("conv_chain", launched, names) == {
        "config": _chain_tiles.CONFIGS[0]
    }
    assert _tuned_calls.options("conv_bn_act", launched, names) == nothing


def test_a_stems_strips_are_those_that_were_timed():
    work = built("stem", "7x7s2_3_16_at30")
    given = arguments_of(work)
    launched = [*given[:5], *outputs_of(work), *given[5:]]
    tile = _stem_tiles.BY_NAME["32x32_8w2s"]
    keep(key_of(work, "triton"), tile.name, 3)
    found = _tuned_calls.options("stem", launched, None)["plan"]
    assert (found.tile, found.rows) == (tile, 3)  # 8 pooled rows in three strips
    keep(key_of(work, "triton"), tile.name, 99)
    assert _tuned_calls.options("stem", launched, None)["plan"].rows == 1


class TestCuda:
    """The CUDA kernels' options, plans of which need no GPU."""

    pytestmark = pytest.mark.skipif(
        not _extension.has_cuda_kernels(), reason="the extension was built without nvcc"
    )
    CELLS = (("stem", NAMES["stem"][1]), ("head", "48_10_at4"), ("conv_chain", "16_32_16_at3"))
    H200 = (132, 232448, 233472)  # of no known capability

    @pytest.fixture(autouse=True)
    def h200(self, monkeypatch):
        monkeypatch.setattr(_cuda_plan, "gpu", lambda device: self.H200)

    @pytest.mark.parametrize(("op", "name"), CELLS)
    def test_every_configuration_is_an_option(self, op, name):
        pick, others = CudaKernel().options(built(op, name))
        names = [one.name for one in (pick, *others)]
        assert len(set(names)) == len(names)
        found = {one.configuration for one in (pick, *others)} - {_tuned_calls.PARTS}
        known = {one for one in _cuda_plan.configurations(op) if _cuda_plan.runs(one, self.H200)}
        assert found <= known and len(found) > 1 and (op == "conv_chain" or found == known)
        parts = [one for one in (pick, *others) if one.configuration == _tuned_calls.PARTS]
        assert [one.wish for one in parts] == ["parts"] * (op == "conv_chain")
        for one in (pick, *others):
            assert one in parts or one.wish == (
                _cuda_plan.configurations(op).index(one.configuration), one.splits
            )  # fmt: skip

    @pytest.mark.parametrize(("op", "name"), CELLS)
    def test_what_is_kept_is_launched(self, op, name, monkeypatch):
        work, kernel = built(op, name), CudaKernel()
        _, others = kernel.options(work)
        other = next(one for one in others if one.configuration != _tuned_calls.PARTS)
        raw, asked = _cuda_plan.raw, []

        def recorded(op, part):
            return raw(op, part) if part != "out" else lambda *given: asked.append(given)

        monkeypatch.setattr(_cuda_plan, "raw", recorded)
        given, outs = arguments_of(work), outputs_of(work)
        wish = (-4, -3) if op == "conv_chain" else (-3, -2)  # in front of the results
        kernel.launch(work, 0, outs, other)  # as tuning times it
        kernel.launch(work, 0, outs, Option("", 1))  # as the op itself does
        keep(key_of(work, "triton"), other.configuration, other.splits)  # another kernel's
        kernel.launch(work, 0, outs, Option("", 1))
        keep(key_of(work, "cuda"), other.configuration, other.splits)
        kernel.launch(work, 0, outs, Option("", 1))
        assert [tuple(one[place] for place in wish) for one in asked] == [
            other.wish, (-1, 0), (-1, 0), other.wish
        ]  # fmt: skip
        said = _tuned_calls.why("cuda", op, given, None)
        assert said == f"{other.name}: tuned on this GPU: 1.25x"
        assert _tuned_calls.why("cuda", op, given, frozenset()) is None
        keep(key_of(work, "cuda"), "gone")
        kernel.launch(work, 0, outs, Option("", 1))
        assert tuple(asked[-1][place] for place in wish) == (-1, 0)

    def test_a_graph_is_rewritten_by_what_was_measured(self, monkeypatch):
        entry = next(e for e in backends.implementations("conv_chain") if e.name == "cuda")
        monkeypatch.setattr(backends, "choose", lambda call: backends.Choice(entry, "stand-in"))
        case = dataclasses.replace(RESNET50_CHAINS[1], n=32)
        before = chain.serves(case, torch.bfloat16, CPU)
        call = _tuned_calls.chain_call(case, torch.bfloat16)
        after = _tuned_calls.PARTS if before.wins else _cuda_plan.configurations("conv_chain")[0]
        keep(_tuned.key("triton", "conv_chain", *call), after)
        assert chain.serves(case, torch.bfloat16, CPU) == before  # of another kernel
        keep(_tuned.key("cuda", "conv_chain", *call), after)
        found = chain.serves(case, torch.bfloat16, CPU)
        assert found.wins is not before.wins and "tuned on this GPU: 1.25x" in found.why


class TestInterpreted:
    """The options by Triton's interpreter."""

    pytestmark = needs_interpreter

    @pytest.mark.parametrize(("op", "name"), [CELLS[0], *CELLS[2:]])
    def test_each_option_is_right_and_what_is_kept_is_launched(self, op, name, monkeypatch):
        work, kernel = built(op, name), TritonKernel()
        with backends.backend("triton"):
            pick, others = kernel.options(work)
            names = [one.name for one in others]
            assert pick.name not in names and len(set(names)) == len(names)
            parts = [one for one in others if one.configuration == _tuned_calls.PARTS]
            assert bool(parts) is (op == "conv_chain")
            other = next((o for o in others if o.configuration != "parts"), pick)
            for option in (other, *parts):
                outs = outputs_of(work)
                for out in outs:
                    out.fill_(float("nan"))
                kernel.launch(work, 0, outs, option)
                judged = work.judge(outs if len(outs) > 1 else outs[0])
                assert judged.ok, f"{option.name}: {judged.text}"
            keep(key_of(work, "triton"), other.configuration, other.splits)
            asked = []
            find = _tuned.find
            monkeypatch.setattr(
                _tuned, "find", lambda *call: asked.append(find(*call)) or asked[-1]
            )
            outs = outputs_of(work)
            kernel.launch(work, 0, outs, Option("", 1))  # as the op itself does
        assert [one.configuration for one in asked] == [other.configuration]
        assert work.judge(outs if len(outs) > 1 else outs[0]).ok

    def test_a_wrong_configuration_is_no_winner(self):
        class Wrong(TritonKernel):
            def launch(self, work, i, outs, option):
                super().launch(work, i, outs, option)
                outs[1].mul_(1.02)

        def sampler(call, work):
            return CpuSampler(call, len(work.sets), work.mode)

        name = NAMES["conv_chain"][0]
        job = Job(Subject("kernel", "conv_chain", name, 1, "float16", "cpu"), ())
        with backends.backend("triton"):
            found = tune_one(
                job, Wrong(), Settings(rounds=2, screening=1, most=1), samplers=sampler
            )
        assert found.problem is not None and "next: " in found.problem
