"""conv_wgrad by TMA and wgmma, emulated: its configurations, shapes that try them, one call."""

from __future__ import annotations

import functools
import re

import dgrad_by_tma as by_tma

from resnet_fused.cases import ConvCase

OP = "conv_wgrad"

CASES = (
    # Tiles that are cut along every side, an odd number of steps.
    ConvCase("1x1", 2, 136, 9, 9, 72),
    ConvCase("3x3", 1, 72, 9, 9, 136, 3, 3, (1, 1), (1, 1)),
    ConvCase("3x3_wide", 1, 264, 11, 9, 72, 3, 3, (1, 1), (1, 1), act="none"),
    ConvCase("3x3_strided", 2, 64, 11, 13, 136, 3, 3, (2, 2), (1, 1)),
    ConvCase("1x1_strided", 3, 64, 13, 11, 200, 1, 1, (2, 2)),
    ConvCase("3x3_dilated", 1, 128, 9, 10, 8, 3, 3, (1, 1), (2, 2), (2, 2)),
    ConvCase("3x3_unpadded", 2, 24, 10, 9, 64, 3, 3, act="none"),
    ConvCase("5x2", 1, 16, 9, 8, 24, 5, 2, (2, 1), (2, 3), (1, 2)),
    # Several taps of the few channels that a stem of five would have.
    ConvCase("7x7", 1, 8, 21, 19, 64, 7, 7, (2, 2), (3, 3)),
    ConvCase("1x1_padded", 2, 8, 5, 6, 16, 1, 1, (1, 1), (2, 1)),
    ConvCase("groups", 2, 144, 6, 7, 128, 3, 3, (1, 1), (1, 1), groups=2),
    ConvCase("narrow_groups", 2, 24, 9, 8, 48, groups=3, act="none"),
    ConvCase("pixel", 1, 8, 1, 1, 16),
)

tiles = functools.partial(by_tma.tiles, OP)


def sharing(tile: dict) -> tuple[int, int]:
    """Blocks of a cluster that share dy and y, and that share x, as a configuration's name says."""
    found = dict.fromkeys("dx", 1)
    found |= {word[-1]: int(word[:-1]) for word in re.findall(r"(?<=_)\d[dx](?=_|$)", tile["name"])}
    return found["d"], found["x"]


run = functools.partial(by_tma.run, op=OP)
planned = functools.partial(by_tma.planned, op=OP)
expected = functools.partial(by_tma.expected, op=OP)
wrong = functools.partial(by_tma.wrong, op=OP)
trials = functools.partial(by_tma.trials, op=OP)
