"""The numbers of a GPU that plans depend on, as they pass between Python and the extension."""

from __future__ import annotations

import contextlib

import pytest
import torch
from test_cuda_convolutions import H200, forward_problem, image

from resnet_fused import _extension
from resnet_fused.ops import _cuda_plan

pytestmark = pytest.mark.skipif(
    not _extension.has_cuda_kernels(), reason="the extension was built without nvcc"
)

POINT = ((1, 1), (0, 0), (1, 1), 1)


def test_a_plan_takes_as_many_clusters_as_the_driver_says():
    index = _cuda_plan.configurations("conv_bn_act").index("tma_s224x64_4s_t_4p")
    made = forward_problem(image(64, 512, 28, 28), image(1024, 512, 1, 1), POINT)
    unasked, none, all_, few = (
        _cuda_plan.plan(made, (*H200, 90, *clusters), index).cycles
        for clusters in ((), (0, 0), (33, 16), (11, 5))
    )
    assert all_ <= unasked == none
    assert few > 1.5 * unasked, "a third of the blocks"
    with pytest.raises(RuntimeError, match=r"gpu: expected 3, 4 or 6 integers .* 90, 33\]"):
        _cuda_plan.plan(made, (*H200, 90, 33))
    with pytest.raises(RuntimeError, match="clusters of 8: expected a positive 32-bit integer"):
        _cuda_plan.plan(made, (*H200, 90, 33, -1))


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said where there is no driver")
def test_a_gpu_that_is_not_there_is_named():
    with pytest.raises(RuntimeError, match="cannot ask the driver about device 0"):
        torch.ops.resnet_fused.conv_gpu(0)
    with pytest.raises(RuntimeError, match="device 64: expected 0 to 63"):
        torch.ops.resnet_fused.conv_gpu(64)


def test_python_takes_what_the_extension_says(monkeypatch):
    entered = []

    def inside(index):
        entered.append(index)
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.cuda, "device", inside)
    monkeypatch.setattr(torch.ops.resnet_fused, "conv_gpu", lambda index: [*H200, 90, 33, index])
    _cuda_plan._gpu.cache_clear()
    try:
        assert _cuda_plan.gpu(torch.device("cuda", 1)) == (*H200, 90, 33, 1)
    finally:
        _cuda_plan._gpu.cache_clear()
    assert entered == [1], "the driver is asked about that GPU"
