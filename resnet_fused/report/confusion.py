"""The picture of a confusion matrix: which class is taken for which."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure

from resnet_fused.report.theme import colours_of, to_png

NAMED = 40  # more classes than that have no room for their names
COUNTED = 16  # nor for their numbers


def draw(counts: Sequence[Sequence[int]], classes: Sequence[str], theme: str = "light") -> bytes:
    """Draws it, a row a class, as shares of the row.

    Args:
        counts: images of a row's class that were taken for a column's.
        classes: their names.
        theme: "light" or "dark".

    Returns:
        A PNG file's bytes.

    Raises:
        ValueError: `counts` is not as many rows and columns as there are classes.
    """
    matrix = np.asarray(counts, dtype=float)
    count = len(classes)
    if matrix.shape != (count, count):
        raise ValueError(f"counts: expected [{count}, {count}], got {list(matrix.shape)}")
    colours = colours_of(theme)
    sums = matrix.sum(1, keepdims=True)
    shares = np.divide(matrix, sums, out=np.zeros_like(matrix), where=sums > 0)
    side = min(3.5 + 0.3 * count, 12.0)
    figure = Figure(figsize=(side + 1.2, side), layout="constrained", facecolor=colours.paper)
    axis = figure.subplots()
    shade = LinearSegmentedColormap.from_list("share", [colours.paper, colours.fused])
    # Errors are few beside what is right: a logarithm shows both.
    image = axis.imshow(np.maximum(shares, 1e-3), cmap=shade, norm=LogNorm(1e-3, 1.0))
    bar = figure.colorbar(image, ax=axis, shrink=0.8)
    bar.set_label("share of the row's images", color=colours.ink)
    bar.ax.tick_params(colors=colours.quiet)
    if count <= NAMED:
        axis.set_xticks(range(count), classes, rotation=90)
        axis.set_yticks(range(count), classes)
    if count <= COUNTED:
        for row, column in zip(*np.nonzero(matrix), strict=True):
            dark = shares[row, column] > 0.1
            axis.text(
                column, row, f"{matrix[row, column]:.0f}", ha="center", va="center",
                fontsize=8, color=colours.paper if dark else colours.ink,
            )  # fmt: skip
    axis.set_xlabel("taken for", color=colours.ink)
    axis.set_ylabel("class", color=colours.ink)
    axis.tick_params(colors=colours.quiet)
    for spine in axis.spines.values():
        spine.set_color(colours.line)
    return to_png(figure)
