"""What decides the kernels of convolutions that measure what they store, beside what all share."""

from __future__ import annotations

MEASURING = (
    "csrc/device/conv_loader.h",
    "csrc/device/gradient_epilogue.h",
    "csrc/device/gradient_mask.h",
    "csrc/device/merge_chunks.h",
    "csrc/device/merge_moments.h",
    "csrc/device/normed_operand.h",
    "csrc/device/split_reduction.h",
    "csrc/device/stats_epilogue.h",
    "csrc/device/stats_finish.h",
    "csrc/device/stats_geometry.h",
    "csrc/device/tile_chunks.h",
    "csrc/launch/conv_bn_stats.h",
    "csrc/launch/conv_bn_stats_arguments.cpp",
    "csrc/launch/conv_bn_stats_arguments.h",
    "csrc/launch/conv_operands.cpp",
    "csrc/launch/conv_stats_rates.h",
)
"""Of mma.sync's, on sm_80 and later."""

BLOCK_END = (
    "csrc/bindings/bn_add_act_conv_stats.cpp",
    "csrc/device/block_end_geometry.h",
    "csrc/device/block_end_loader.h",
    "csrc/device/gradient_geometry.h",
    "csrc/device/pair.h",
    "csrc/kernels/bn_add_act_conv_stats_sm80.cuh",
    "csrc/launch/bn_add_act_conv_stats.h",
    "csrc/launch/bn_add_act_conv_stats_arguments.cpp",
    "csrc/launch/bn_add_act_conv_stats_arguments.h",
    "csrc/launch/bn_add_act_conv_stats_bfloat16.cu",
    "csrc/launch/bn_add_act_conv_stats_float16.cu",
    "csrc/launch/bn_add_act_conv_stats_float32.cu",
    "csrc/launch/bn_add_act_conv_stats_launch.cuh",
    "csrc/launch/bn_add_act_conv_stats_plan.cpp",
    "csrc/launch/bn_add_act_conv_stats_tiles.h",
    "csrc/launch/pixel_rows.h",
)
"""Of `bn_add_act_conv_stats` alone."""
