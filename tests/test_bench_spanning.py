"""stem, head and conv_chain as subjects of the benchmark: names, operands, judgement, rivals."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch
from triton_trace import needs_interpreter

import resnet_fused as rf
from resnet_fused.bench import limits, names, record, subject, work
from resnet_fused.bench.peers import PEERS, joining
from resnet_fused.bench.spanning_kernels import KINDS
from resnet_fused.cases import (
    CHAIN_CASES,
    HEAD_CASES,
    RESNET50_CHAINS,
    STEM_CASES,
    ChainCase,
    ConvCase,
)

NAMES = {
    "stem": ("7x7s2_3_16_at20", "7x7s2_3_16_at20x17_uint8", "3x3s1_4_8_at9_float32_norm"),
    "head": ("48_10_at4", "48_200_at3x5_nobias"),
    "conv_chain": (
        "16_32_24_at6", "16_40_0_at5x7_proj24s2_front16_even", "16_40_16_at5_proj24_front24",
    ),
}  # fmt: skip
CELLS = [(op, name) for op in KINDS for name in NAMES[op]]
SHAPES = {  # what the engine has for one image of 224x224: names by hand
    "stem": {"7x7s2_3_64_at224", "7x7s2_3_64_at224_uint8"},
    "head": {"2048_1000_at7"},
}


def built(op: str, name: str, dtype: str, sets: int = 1) -> work.Work:
    made = work.build(subject.Subject("kernel", op, name, 3, dtype, "cpu"))
    return dataclasses.replace(made, sets=made.sets[:sets])


def bare(case: ChainCase) -> ChainCase:
    return dataclasses.replace(case, name="", tags=(), count=1)


@pytest.mark.parametrize(("op", "found"), SHAPES.items())
def test_a_networks_ends_are_found(op, found):
    assert set(subject.kernel_names(op, "resnet50")) == found


def test_a_networks_chains_are_found_with_and_without_what_stands_in_front():
    """By walking the model: those of the list that the predictions and tests use."""
    chains = [case for _, case in KINDS["conv_chain"].cases(subject.layers("resnet50"))]
    plain = [bare(case) for case in chains if not case.front]
    assert set(plain) == {bare(case) for case in RESNET50_CHAINS}
    assert len(plain) == 16
    for case in chains:
        if case.front:
            assert dataclasses.replace(bare(case), front=0) in plain and case.front == case.k
    # A strided 3x3 is none of a chain's: three stages begin with one.
    assert len(chains) - len(plain) == 16 - 3
    assert subject.kernel_names("conv_chain", "resnet18") == {}
    grouped = [case for _, case in KINDS["conv_chain"].cases(subject.layers("resnext50_32x4d"))]
    assert grouped and not any(case.front for case in grouped)


def test_every_case_has_a_name_or_none_says_why():
    told = 0
    for case in (*STEM_CASES, *HEAD_CASES, *CHAIN_CASES):
        try:
            name = names.name_of(case)
        except ValueError:  # see below
            continue
        told += 1
        again = names.case_of(type(case), name, case.n)
        assert dataclasses.replace(again, name=case.name, tags=case.tags) == case
        larger = names.case_of(type(case), name, 7)
        assert larger.n == 7
    assert told > 20
    for op in KINDS:
        with pytest.raises(ValueError, match="accepted is a "):
            built(op, "3x3_16_16_at8_add", "float32")


def test_a_case_that_a_name_would_change_has_none():
    other = next(case for case in STEM_CASES if case.name == "other_pool")
    with pytest.raises(ValueError, match="case other_pool is no stem"):
        names.name_of(other)
    with pytest.raises(ValueError, match="is no chain"):
        names.name_of(ChainCase("three", 1, 16, 6, 6, 32, out_stride=3))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("op", "name"), CELLS)
def test_eager_ours_and_the_rivals_are_right_and_a_wrong_one_is_not(op, name, dtype):
    made = built(op, name, dtype, 2)
    rivals = [p for p in ("onednn", "eager_nchw") if PEERS[p].why_not(made.subject) is None]
    outs = {}
    for peer in ("eager", "fused", "parts", *rivals):
        prepared = PEERS[peer].prepare(made)
        outs[peer] = prepared.call(0)
        judged = made.judge(outs[peer])
        assert judged.ok, f"{peer}: {judged.text}"
        assert not made.judge(prepared.call(1)).ok, peer  # the other set's
    assert ("onednn" in outs) is (op != "head")
    named = KINDS[op].named(outs["fused"])
    assert len(named) == (2 if made.case.__class__ is ChainCase and made.case.m else 1)
    for key, t in named.items():
        wrong = t.clone()
        wrong[0, 0] += 0.25 * float(t.abs().max())
        for other in (wrong, torch.zeros_like(t), t[1:]):
            spoilt = tuple((named | {key: other}).values())
            judged = made.judge(spoilt if len(spoilt) > 1 else spoilt[0])
            assert not judged.ok
            assert judged.text.startswith(key)


def test_every_part_of_a_chain_is_seen():
    """The operands are such that leaving out a part gives another result."""
    made = built("conv_chain", "16_40_16_at5_proj24_front24", "bfloat16")
    given, run = made.sets[0], KINDS["conv_chain"].ours(made.case)
    assert made.judge(run(given)).ok
    for field in dataclasses.fields(given):
        t = getattr(given, field.name)
        if t is not None:
            other = dataclasses.replace(given, **{field.name: t * 0.5})
            assert not made.judge(run(other)).ok, field.name
    assert made.judge(run(given)[0]).text == "it lacks next"


def test_bytes_without_their_normalisation_are_wrong():
    made = built("stem", "7x7s2_3_16_at20x17_uint8", "bfloat16")
    given, run = made.sets[0], KINDS["stem"].ours(made.case)
    assert given.x.dtype is torch.uint8 and int(given.x.max()) > 200
    other = dataclasses.replace(given, norm=given.norm * torch.tensor([[1.0], [0.0]]))
    assert made.judge(run(given)).ok and not made.judge(run(other)).ok


@pytest.mark.parametrize(("op", "name"), CELLS)
def test_the_limit_is_below_eagers_passes(op, name):
    (layer,) = limits.layers_of(built(op, name, "bfloat16"))
    eager = sum(cost.bytes for cost in layer.eager)
    assert 0 < layer.fused[0].bytes < eager
    assert layer.fused[0].flops == sum(cost.flops for cost in layer.eager)


def test_eagers_passes_by_hand():
    """A chain without next: conv3 reads and writes, BatchNorm, add and ReLU go over out again."""
    (layer,) = limits.layers_of(built("conv_chain", "16_32_0_at6", "float32"))
    pixels, itemsize = 3 * 36, 4
    conv = pixels * (16 + 32) + 16 * 32
    after = (2 + 3 + 2) * pixels * 32
    assert sum(cost.bytes for cost in layer.eager) == (conv + after) * itemsize
    (layer,) = limits.layers_of(built("stem", "7x7s2_3_16_at20", "float32"))
    image, conv, pooled = 3 * 3 * 400, 3 * 16 * 100, 3 * 16 * 25
    moved = image + 16 * 147 + conv + 2 * conv + 2 * conv + conv + pooled
    assert sum(cost.bytes for cost in layer.eager) == moved * itemsize


def test_a_record_may_hold_every_op():
    """The schema lists the ops that subjects have."""
    (ops,) = re.findall(r'"op": \{"enum": (\[[^]]*\])', record.SCHEMA_FILE.read_text())
    assert set(json.loads(ops)) == {*subject.KERNEL_OPS, *subject.MODEL_OPS}


def test_who_joins_on_a_gpu(monkeypatch):
    """Nobody is asked for what it has no call of: each says so, none breaks."""
    known = {
        "stem": {"cudnn", "parts", "inductor"}, "head": {"parts", "inductor"},
        "conv_chain": {"cudnn", "parts", "inductor"},
    }  # fmt: skip
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    for op, name in CELLS:
        for dtype in ("float16", "float32"):
            made = subject.Subject("kernel", op, name, 1, dtype, "cuda")
            joined, omitted = joining(made)
            there = {peer.name for peer in joined}
            assert {"eager", "eager_nchw", "fused", *known[op]} <= there
            assert {"frozen", "apex", "onnxruntime", "cudnn_graph"} <= set(omitted)
    assert PEERS["parts"].why_not(subject.Subject("kernel", "bn_act", "8_at4", 1, "float32", "cpu"))


def test_a_chain_has_a_shortcut_and_apex_is_asked_of_convolutions_alone():
    about = subject.Subject("kernel", "conv_chain", "16_32_24_at6", 1, "float16", "cuda").call
    assert about.residual and about.act == "relu" and about.op == "conv_chain"
    assert not subject.Subject("kernel", "head", "48_10_at4", 1, "float16", "cuda").call.residual
    for op, name in (("bn_act", "16_at8"), ("stem", "7x7s2_3_16_at20")):
        made = subject.Subject("kernel", op, name, 1, "float16", "cuda")
        assert f"has no {op}" in PEERS["apex"].why_not(made)
    assert isinstance(
        subject.Subject("kernel", "conv_bn_act", "1x1_8_8_at4", 1, "float16", "cpu").case, ConvCase
    )


class TestInterpreted:
    """Triton's kernels on the subjects' own operands."""

    pytestmark = needs_interpreter

    @pytest.mark.parametrize(
        ("op", "name"),
        [("stem", "7x7s2_3_16_at12"), ("stem", "7x7s2_3_16_at9x11_uint8"), ("head", "48_10_at4"),
         ("conv_chain", "16_32_16_at4"), ("conv_chain", "16_32_0_at4_proj16s2_front16_even")],
    )  # fmt: skip
    def test_they_are_right(self, op, name):
        made = built(op, name, "float16")
        with made.mode(), rf.backend("triton"), rf.backends.recording():
            out = KINDS[op].ours(made.case)(made.sets[0])
        judged = made.judge(out)
        assert judged.ok, judged.text
