"""The pictures of a benchmark, each drawn from a record of schema 2 alone, as PNG bytes."""

from __future__ import annotations

from typing import Any

from resnet_fused.report import plot_layers, plot_peers, plot_roofline
from resnet_fused.report.plot_data import NothingToDrawError
from resnet_fused.report.theme import colours_of, to_png

__all__ = ["NothingToDrawError", "memory", "peers", "roofline", "waterfall"]


def roofline(record: dict[str, Any], theme: str = "light") -> bytes:
    """FLOP/s against FLOP/byte, log-log, under the ceilings measured in the same run.

    Args:
        record: of `resnet-fused bench`, schema 2. Numbers may be missing, None or NaN.
        theme: "light" or "dark".

    Returns:
        A PNG file's bytes: a panel a level, each row (and each layer of one model) eager and fused.

    Raises:
        NothingToDrawError: the record lacks what the picture shows; the message says what.
        ValueError: an unknown theme.
    """
    return to_png(plot_roofline.figure(record, colours_of(theme)))


def waterfall(record: dict[str, Any], theme: str = "light") -> bytes:
    """A step's milliseconds, layer after layer, eager beside fused.

    Args:
        record: as for `roofline`.
        theme: "light" or "dark".

    Returns:
        A PNG file's bytes: a panel for each row of level model. Where no variant of a row has times
        by layer, its limit's layers stand there, and the title says so.

    Raises:
        NothingToDrawError: as for `roofline`.
        ValueError: an unknown theme.
    """
    return to_png(plot_layers.figure(record, colours_of(theme)))


def peers(record: dict[str, Any], theme: str = "light") -> bytes:
    """Every variant beside the others: images/s of models, the ratio over eager of all else.

    Args:
        record: as for `roofline`.
        theme: "light" or "dark".

    Returns:
        A PNG file's bytes: bars with intervals where the rows are few, else a dot a row for each
        variant; wrong variants named without a time, those left out listed below with the reason.

    Raises:
        NothingToDrawError: as for `roofline`.
        ValueError: an unknown theme.
    """
    return to_png(plot_peers.figure(record, colours_of(theme)))


def memory(record: dict[str, Any], theme: str = "light") -> bytes:
    """Peak memory of each variant.

    Args:
        record: as for `roofline`.
        theme: "light" or "dark".

    Returns:
        A PNG file's bytes: a panel a row of the highest level that has such numbers.

    Raises:
        NothingToDrawError: as for `roofline`.
        ValueError: an unknown theme.
    """
    return to_png(plot_peers.memory_figure(record, colours_of(theme)))
