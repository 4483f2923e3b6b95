"""The emulator in the place of a GPU: the CUDA convolutions' launches, on CPU tensors."""

from __future__ import annotations

import emulated
import pytest
import torch

from resnet_fused.ops import _cuda, _cuda_plan

H200 = (132, 232448, 233472)


def _settings(wish: tuple[int, int] | None) -> dict[str, int]:
    """Of the emulator: "as it chooses itself" is one that serves the call, drawn from its key."""
    if wish is None or wish[0] < 0:
        return {}
    return {"configuration": wish[0], "splits": wish[1]}


def _lists(geometry) -> tuple:
    return (*(list(one) for one in geometry[:3]), geometry[3])


def forward(x, weight, scale, shift, residual, out, *rest, wish=None):
    """In the place of `_cuda.launch_conv_bn_act`."""
    with emulated.using(**_settings(wish)):
        y = emulated.convolution(
            "conv_bn_act", x, weight, scale, shift, residual, *_lists(rest[:4]), rest[4]
        )
    out.copy_(y)


def dgrad(dy, y, weight, scale, out, *geometry, wish=None):
    """In the place of `_cuda.launch_conv_dgrad`."""
    with emulated.using(**_settings(wish)):
        size = list(out.shape)
        dx = emulated.convolution("conv_dgrad", dy, y, weight, scale, size, True, *_lists(geometry))
    out.copy_(dx)


def wgrad(dy, y, x, scale, out, *geometry, wish=None):
    """In the place of `_cuda.launch_conv_wgrad`."""
    like = torch.empty_like(out)
    with emulated.using(**_settings(wish)):
        dweight = emulated.convolution("conv_wgrad", dy, y, x, like, scale, *_lists(geometry))
    out.copy_(dweight)


def emulate_launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces the launches until the test ends; the list fills with the ops that they ran."""
    ran: list[str] = []
    for op, body in (("conv_bn_act", forward), ("conv_dgrad", dgrad), ("conv_wgrad", wgrad)):

        def launch(*given, op=op, body=body, **more):
            ran.append(op)
            body(*given, **more)

        monkeypatch.setattr(_cuda, f"launch_{op}", launch)
    monkeypatch.setattr(_cuda_plan, "gpu", lambda device: H200)
    return ran
