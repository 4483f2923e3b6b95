"""The sources of training's passes over memory and of its ops on per-channel values."""

from __future__ import annotations


def of_pass(op: str) -> tuple[str, ...]:
    """Those of a pass of training.

    Args:
        op: its name.
    """
    return (
        "csrc/bindings/arguments.cpp",
        "csrc/bindings/arguments.h",
        "csrc/bindings/bn_training.cpp",
        "csrc/bindings/layout.cpp",
        "csrc/bindings/layout.h",
        "csrc/bindings/stable.h",
        "csrc/bindings/stream.cpp",
        "csrc/device/bn_act.h",
        "csrc/device/bn_training.h",
        "csrc/device/channel_sums.h",
        "csrc/device/channel_walk.h",
        "csrc/device/channel_walker.h",
        "csrc/device/pool_windows.h",
        "csrc/device/portable.h",
        "csrc/device/scalar.h",
        "csrc/device/vector.h",
        f"csrc/kernels/{op}_sm80.cuh",
        f"csrc/launch/{op}.cu",
        "csrc/launch/bn_act.h",
        "csrc/launch/bn_pass.h",
        "csrc/launch/bn_pass_launch.cuh",
        "csrc/launch/bn_pass_plan.cpp",
        "csrc/launch/bn_pass_walk.h",
        "csrc/launch/bn_training.h",
        "csrc/launch/flow.h",
        "csrc/launch/launch.h",
        "csrc/ptx/atomic.h",
        "csrc/ptx/barrier.h",
        "csrc/ptx/common.h",
        "csrc/ptx/memory.h",
        "csrc/ptx/shared.h",
        "csrc/ptx/types.h",
    )


def of_vectors(op: str, *more: str) -> tuple[str, ...]:
    """Those of an op of training on per-channel values.

    Args:
        op: its name.
        more: sources beside those that all of these ops have.
    """
    return (
        *more,
        "csrc/bindings/arguments.cpp",
        "csrc/bindings/arguments.h",
        "csrc/bindings/bn_finalize.cpp",
        "csrc/bindings/channel_values.h",
        "csrc/bindings/layout.cpp",
        "csrc/bindings/layout.h",
        "csrc/bindings/stable.h",
        "csrc/bindings/stream.cpp",
        "csrc/device/bn_act.h",
        "csrc/device/channel_value.h",
        "csrc/device/channel_vector.h",
        "csrc/device/portable.h",
        "csrc/device/scalar.h",
        f"csrc/kernels/{op}_sm80.cuh",
        f"csrc/launch/{op}.cu",
        "csrc/launch/bn_act.h",
        "csrc/launch/bn_finalize.h",
        "csrc/launch/bn_finalize_cuda.h",
        "csrc/launch/flow.h",
        "csrc/launch/launch.h",
        "csrc/ptx/common.h",
        "csrc/ptx/memory.h",
        "csrc/ptx/types.h",
    )
