"""Nodes of training by the CUDA kernels, emulated: steps of blocks, beside eager, against float64.

The kernels' own tests hold each op to its bound; here is what a node hands from one to the next.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
from pathlib import Path

import emulated
import pytest
import torch
from torch import nn
from training_nets import gradient_like, norms, projection

import resnet_fused as rf
from resnet_fused import backends, numerics
from resnet_fused.ops import (
    _block_end,
    _cuda_plan,
    _end_gradient,
    _finalize,
    _grad1x1,
    _training,
)

pytestmark = pytest.mark.emulated

for _path in sorted(Path(__file__).parent.glob("emulated_*.py")):
    importlib.import_module(_path.stem)  # they enter their ops

KNOBS = (_block_end, _end_gradient, _finalize, _grad1x1)
DTYPES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def ran(monkeypatch):
    """`rf.backend("cuda")` takes the emulated kernels under that name; the ops that nodes run."""
    emulated.load()
    for op, entries in backends._registry.items():
        found = [entry for entry in entries if entry.name == emulated.NAME]
        ours = [
            dataclasses.replace(entry, name="cuda", backends=("cuda",), supports=lambda call: None)
            for entry in found
        ]
        rest = [entry for entry in entries if entry.name not in ("cuda", emulated.NAME)]
        monkeypatch.setitem(backends._registry, op, ours + rest)
    names, real = [], _training.overload

    def overload(op, name):
        def run(*arguments):
            names.append((op, name))
            return real(op, emulated.NAME if name == "cuda" else name)(*arguments)

        return run

    monkeypatch.setattr(_training, "overload", overload)
    monkeypatch.setattr(_cuda_plan, "gpu", lambda device: emulated.H200)
    backends.forget_choices()
    yield names
    backends.forget_choices()


def bottleneck(stride=1):
    return rf.nn.Bottleneck(32, 8, stride, projection(32, 32, stride) if stride > 1 else None)


MODELS = {
    "identity": bottleneck,
    "projected": lambda: bottleneck(2),
    "basic": lambda: rf.nn.BasicBlock(32, 32),
    "row": lambda: nn.Sequential(bottleneck(2), bottleneck(), bottleneck()),
    "stem": lambda: rf.nn.Stem(32, 16),
}


def made(name, dtype):
    """Plain modules in training mode, whose numbers are the dtype's, and an input."""
    torch.manual_seed(3)
    model = rf.unfuse(MODELS[name]()).train()
    with torch.no_grad():
        for bn in norms(model):
            bn.weight.uniform_(0.5, 1.5)
            bn.bias.normal_(0, 0.2)
        for p in model.parameters():
            p.copy_(p.to(dtype))
    x = torch.randn(2, 32, 9, 11).to(dtype).contiguous(memory_format=torch.channels_last)
    return model, x


def step(model, x, word=None, grad=None):
    """Output, gradients and buffers of a step of a copy; with a word by the emulated kernels."""
    model, x = copy.deepcopy(model), x.detach().clone(memory_format=torch.preserve_format)
    x.requires_grad_()
    used = set()
    with contextlib.ExitStack() as stack:
        run = model
        if word is not None:
            run = rf.fuse(model)
            stack.enter_context(rf.backend("cuda"))
            for knob in KNOBS:
                stack.enter_context(knob.preferring(word))
            routes = stack.enter_context(backends.recording())
        out = run(x)
        out.backward(gradient_like(out) if grad is None else grad.to(out))
        if word is not None:
            used = {route.implementation for route in routes}
            assert used == {"cuda"}, routes
    grads = {"x": x.grad, **{name: p.grad for name, p in model.named_parameters()}}
    return {"out": out.detach(), **grads}, dict(model.named_buffers())


def judged(ours, baseline, oracle):
    for key, value in ours.items():
        check = numerics.gradient_check(value, baseline[key], oracle[key])
        assert check.ratio <= numerics.chance(value.numel()) * check.limit, (key, check)


ONE = {"conv_bn_stats", "bn_finalize", "bn_update_stats", "conv_bn_dgrad", "conv_bn_wgrad"}
MERGED = {"conv_bn_stats_finalize", "conv_bn_grad1x1"}


@pytest.mark.parametrize("word", ["always", "never"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["identity", "projected", "basic", "stem"])
def test_a_step_is_as_near_to_float64_as_eager(ran, name, dtype, word):
    model, x = made(name, dtype)
    oracle, buffers = step(copy.deepcopy(model).double(), x.double())
    model = model.to(dtype)
    eager, _ = step(model, x)
    ours, mine = step(model, x, word)
    assert {implementation for _, implementation in ran} == {"cuda"}
    names = {op for op, _ in ran}
    assert "bn_backward_apply" not in names  # kernels apply BatchNorm as they read
    assert (names >= ONE) is (word == "never") or name in ("basic", "stem")
    assert not names & MERGED if word == "never" else "conv_bn_stats_finalize" in names
    judged(ours, eager, oracle)
    for key, value in mine.items():
        torch.testing.assert_close(value.double(), buffers[key].double(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_by_kernels_that_span_blocks_is_as_near_as_without(ran, dtype):
    """Masks of a whole row hang on single bits: eager's are others than ours."""
    model, x = made("row", dtype)
    oracle, _ = step(copy.deepcopy(model).double(), x.double())
    model = model.to(dtype)
    plain, _ = step(model, x, "never")
    ran.clear()
    ours, _ = step(model, x, "always")
    names = [op for op, _ in ran]
    assert {"bn_add_act_conv_stats", "conv_bn_grad1x1"} <= set(names), names
    assert any(name.startswith("conv_bn_") and name.endswith("_end") for name in names), names
    judged(ours, plain, oracle)


def test_a_fault_in_a_kernel_shows():
    model, x = made("identity", torch.bfloat16)
    oracle, _ = step(copy.deepcopy(model).double(), x.double())
    model = model.bfloat16()
    eager, _ = step(model, x)
    with emulated.using(schedule=emulated.Schedule()) as runs:
        step(model, x, "never")
    site = next(
        (site["file"], site["line"], site["instruction"], "stale_accumulator")
        for report in runs.reports
        for site in report["sites"]
        if "stale_accumulator" in site["faults"]
    )
    with emulated.using(schedule=emulated.Schedule(), fault=site):
        ours, _ = step(model, x, "never")
    checks = [numerics.gradient_check(ours[key], eager[key], oracle[key]) for key in ours]
    assert any(check.ratio > 2 * check.limit for check in checks)


@pytest.mark.parametrize("place", ["x", "grad"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_where_eager_has_it(place, value):
    model, x = made("projected", torch.bfloat16)
    model = model.bfloat16()
    with torch.no_grad():
        grad = gradient_like(model(x))
    (x if place == "x" else grad)[0, 3, 1, 1] = value
    eager, theirs = step(model, x, grad=grad)
    ours, mine = step(model, x, "never", grad=grad)
    for key, t in eager.items():
        assert torch.equal(ours[key].isfinite(), t.isfinite()), key
    for key, t in theirs.items():
        assert torch.equal(mine[key].isfinite(), t.isfinite()), key


@pytest.mark.parametrize("lay_out", ["nchw", "sliced", "expanded"])
def test_any_layout_is_taken(lay_out):
    model, x = made("identity", torch.bfloat16)
    given = {
        "nchw": x.contiguous(),
        "sliced": torch.cat([x, x], 1)[:, :32],
        "expanded": x[:1].expand(2, 32, 9, 11),
    }[lay_out]
    oracle, _ = step(copy.deepcopy(model).double(), given.double())
    model = model.bfloat16()
    eager, _ = step(model, given)
    ours, _ = step(model, given, "never")
    judged(ours, eager, oracle)


def test_bad_calls_are_refused_as_by_torch():
    model, x = made("projected", torch.bfloat16)
    fused = rf.fuse(model.bfloat16())
    with rf.backend("cuda"):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            fused(x[:1, :, :1, :1])
        with pytest.raises(RuntimeError):
            fused(x[:, :16])
