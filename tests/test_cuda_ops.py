"""The CUDA convolutions as implementations of their ops; the emulator stands in for a GPU."""

from __future__ import annotations

import cuda_standins
import pytest
import torch

import resnet_fused as rf
from resnet_fused import _extension, backends, cases, numerics, ops  # noqa: F401

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(
        not _extension.has_cuda_kernels(), reason="the extension was built without nvcc"
    ),
]
DTYPE = torch.float16


@pytest.fixture
def ran(monkeypatch):
    """The CUDA kernels serve calls on the CPU; the ops that were launched."""
    for op in ("conv_bn_act", "conv_dgrad", "conv_wgrad"):
        for entry in backends.implementations(op):
            if entry.name == "cuda":
                monkeypatch.setitem(entry.__dict__, "supports", lambda call: None)
    backends.forget_choices()
    yield cuda_standins.emulate_launches(monkeypatch)
    backends.forget_choices()


def exact(case: cases.ConvCase, layout: torch.memory_format):
    generator = torch.Generator().manual_seed(0)
    x, weight, scale, shift, residual = numerics.exact_inputs(case, DTYPE, generator)
    residual = None if residual is None else residual.contiguous(memory_format=layout)
    return x.contiguous(memory_format=layout), weight, scale, shift, residual


CASE = cases.ConvCase("3x3", 2, 16, 6, 5, 24, 3, 3, (2, 1), (1, 1), residual=True)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_forward_and_gradients_are_the_references(layout, ran):
    given = exact(CASE, layout)
    results = {}
    for backend in ("cuda", "reference"):
        x, weight, residual = (given[i].clone().requires_grad_() for i in (0, 1, 4))
        with rf.backend(backend):
            y = rf.ops.conv_bn_act(x, weight, given[2], given[3], residual, **CASE.geometry)
            dy = torch.ones_like(y)
            y.backward(dy)
        results[backend] = (y.detach(), x.grad, weight.grad, residual.grad)
    assert ran == ["conv_bn_act", "conv_dgrad", "conv_wgrad"]
    for mine, theirs in zip(results["cuda"], results["reference"], strict=True):
        assert mine.stride() == theirs.stride()
        assert torch.equal(mine, theirs)


def test_every_layer_of_a_model_is_told_with_its_configuration(ran):
    torch.manual_seed(0)
    fused = rf.fuse(rf.nn.ConvBNAct(16, 24, 3, padding=1)).eval().to(DTYPE)
    x = torch.randn(2, 16, 7, 7).to(DTYPE)
    with torch.no_grad(), rf.backend("cuda"):
        table = rf.explain(fused, x)
    assert [row.implementation for row in table.rows] == ["cuda"] == ["cuda"] * len(ran)
    why = table.rows[0].why
    assert "least predicted time" in why and "x is copied to channels_last" in why
