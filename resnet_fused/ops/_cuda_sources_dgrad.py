"""What decides the window kernel of `conv_bn_dgrad` for sm_90a, beside its other kernels."""

from __future__ import annotations

BN_DGRAD_WINDOWS = (
    "csrc/device/affine_window.h",
    "csrc/device/bn_dgrad_window.h",
    "csrc/device/bn_dgrad_window_end.h",
    "csrc/device/channel_lanes.h",
    "csrc/device/conv_window.h",
    "csrc/device/transform_ring.h",
    "csrc/device/window_epilogue.h",
    "csrc/device/window_load.h",
    "csrc/kernels/conv_bn_act_window_sm90.cuh",
    "csrc/kernels/conv_bn_dgrad_window_sm90.cuh",
    "csrc/launch/conv_bn_act_window.cpp",
    "csrc/launch/conv_bn_act_window.h",
    "csrc/launch/conv_bn_dgrad_window.cpp",
    "csrc/launch/conv_bn_dgrad_window.h",
    "csrc/launch/conv_bn_dgrad_window_bfloat16.cu",
    "csrc/launch/conv_bn_dgrad_window_float16.cu",
    "csrc/launch/conv_bn_dgrad_window_launch.cuh",
    "csrc/launch/conv_bn_dgrad_window_tiles.h",
    "csrc/launch/conv_window_tiles.h",
    "csrc/launch/step_transform.h",
    "csrc/launch/window_rates.h",
    "csrc/launch/window_request.h",
)
