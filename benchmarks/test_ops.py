"""pytest-benchmark entries: rf.ops over the layers of ResNet-50, gradients and bn_act included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from operands import layers, operands

import resnet_fused as rf
from resnet_fused.cases import ConvCase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
BATCH = {"cpu": 1, "cuda": 256}


def _measure(benchmark: Any, device: str, call: Callable[[], object]) -> None:
    def waited() -> None:
        call()
        if device == "cuda":
            torch.cuda.synchronize()

    with torch.inference_mode():
        benchmark.pedantic(waited, rounds=7, iterations=3, warmup_rounds=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", layers(1), ids=str)
def test_conv_bn_act(benchmark: Any, case: ConvCase, device: str, dtype: str) -> None:
    (case,) = (other for other in layers(BATCH[device]) if other.name == case.name)
    given = operands(case, DTYPES[dtype], device)
    benchmark.group = f"conv_bn_act {device} {dtype}"
    benchmark.extra_info |= {"gflop": 2e-9 * case.macs, "count": case.count}
    _measure(
        benchmark,
        device,
        lambda: rf.ops.conv_bn_act(
            given.x, given.weight, given.scale, given.shift, given.residual, act=case.act,
            **case.geometry,
        ),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", layers(1), ids=str)
def test_bn_act(benchmark: Any, case: ConvCase, device: str, dtype: str) -> None:
    (case,) = (other for other in layers(BATCH[device]) if other.name == case.name)
    given = operands(case, DTYPES[dtype], device)
    y = torch.randn(case.output_shape, device=device).to(DTYPES[dtype])
    y = y.to(memory_format=torch.channels_last)
    moved = (3 if case.residual else 2) * y.numel() * y.element_size()
    benchmark.group = f"bn_act {device} {dtype}"
    benchmark.extra_info |= {"gigabytes": 1e-9 * moved, "count": case.count}
    _measure(
        benchmark,
        device,
        lambda: rf.ops.bn_act(y, given.scale, given.shift, given.residual, act=case.act),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", layers(1), ids=str)
@pytest.mark.parametrize("op", ["conv_dgrad", "conv_wgrad"])
def test_gradients(benchmark: Any, op: str, case: ConvCase, device: str, dtype: str) -> None:
    (case,) = (other for other in layers(BATCH[device]) if other.name == case.name)
    given = operands(case, DTYPES[dtype], device)
    y = torch.randn(case.output_shape, device=device).to(DTYPES[dtype])
    y = y.to(memory_format=torch.channels_last)
    dy = torch.randn_like(y)
    benchmark.group = f"{op} {device} {dtype}"
    benchmark.extra_info |= {"gflop": 2e-9 * case.macs, "count": case.count}

    def call() -> torch.Tensor:
        if op == "conv_wgrad":
            return rf.ops.conv_wgrad(dy, given.x, given.weight, given.scale, y, **case.geometry)
        size = case.input_shape
        return rf.ops.conv_dgrad(dy, given.weight, given.scale, y, input_size=size, **case.geometry)

    _measure(benchmark, device, call)
