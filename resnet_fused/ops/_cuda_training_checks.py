"""Self-checks of training's CUDA passes: those of the Triton kernels, through the raw ops.

They run in the child process of `resnet_fused._selfcheck`, and as the first stage of `gpu-check`.
"""

from __future__ import annotations

from . import _cuda_passes
from . import _training_checks_elementwise as checks
from ._training_checks_elementwise import (
    bn_act_pool_backward_configurations,
    bn_act_pool_configurations,
    bn_add_act_backward_configurations,
    bn_add_act_configurations,
    bn_backward_apply_configurations,
    bn_backward_finalize_configurations,
    bn_finalize_configurations,
    bn_update_stats_configurations,
)

__all__ = [
    "bn_act_pool",
    "bn_act_pool_backward",
    "bn_act_pool_backward_configurations",
    "bn_act_pool_configurations",
    "bn_add_act",
    "bn_add_act_backward",
    "bn_add_act_backward_configurations",
    "bn_add_act_configurations",
    "bn_backward_apply",
    "bn_backward_apply_configurations",
    "bn_backward_finalize",
    "bn_backward_finalize_configurations",
    "bn_finalize",
    "bn_finalize_configurations",
    "bn_update_stats",
    "bn_update_stats_configurations",
]


def _check(op: str, configuration: str, device: str) -> None:
    if not _cuda_passes.exists(op):
        raise ImportError(f"the extension holds no CUDA kernel of {op}")
    with checks.launching(_cuda_passes.launch):
        getattr(checks, op)(configuration, device)


def bn_add_act(configuration: str, device: str) -> None:
    """Checks `bn_add_act` on every case and kind of shortcut.

    Args:
        configuration: "default": its launch picks among its kernels by strides and pointers.
        device: "cuda:0", or "cpu" for the CPU's kernel.

    Raises:
        ArithmeticError: a result is wrong.
        ImportError: the extension has no such kernel.
        ValueError: another configuration.
    """
    _check("bn_add_act", configuration, device)


def bn_add_act_backward(configuration: str, device: str) -> None:
    """Checks `bn_add_act_backward`; arguments and errors as `bn_add_act`'s."""
    _check("bn_add_act_backward", configuration, device)


def bn_backward_apply(configuration: str, device: str) -> None:
    """Checks `bn_backward_apply`; arguments and errors as `bn_add_act`'s."""
    _check("bn_backward_apply", configuration, device)


def bn_act_pool(configuration: str, device: str) -> None:
    """Checks `bn_act_pool`; arguments and errors as `bn_add_act`'s."""
    _check("bn_act_pool", configuration, device)


def bn_act_pool_backward(configuration: str, device: str) -> None:
    """Checks `bn_act_pool_backward`; arguments and errors as `bn_add_act`'s."""
    _check("bn_act_pool_backward", configuration, device)


def bn_finalize(configuration: str, device: str) -> None:
    """Checks `bn_finalize`; arguments and errors as `bn_add_act`'s."""
    _check("bn_finalize", configuration, device)


def bn_update_stats(configuration: str, device: str) -> None:
    """Checks `bn_update_stats`; arguments and errors as `bn_add_act`'s."""
    _check("bn_update_stats", configuration, device)


def bn_backward_finalize(configuration: str, device: str) -> None:
    """Checks `bn_backward_finalize`; arguments and errors as `bn_add_act`'s."""
    _check("bn_backward_finalize", configuration, device)
