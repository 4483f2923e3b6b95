"""The page of one of the paper's experiments: verdict, table beside the paper's figures, curves.

It is made from the record that `resnet_fused.paper.run` returns, and from nothing else.
"""

from __future__ import annotations

import base64
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from resnet_fused.report.page import templates
from resnet_fused.report.theme import Theme, colours_of, to_png

_SHADES = ("#1565d8", "#d9822b", "#14804a", "#a13cb8", "#c62840", "#7a8699")
_DARK_SHADES = ("#5aa2ff", "#f0a24a", "#4cc38a", "#cf8be0", "#ff6b7d", "#98a3b5")


def render(record: dict[str, Any]) -> str:
    """Renders the page.

    Args:
        record: of `resnet_fused.paper.run`.

    Returns:
        HTML text that needs no other file; what the record holds is escaped.
    """
    environment = templates()
    pictures = {
        theme: base64.b64encode(draw(record, theme)).decode() for theme in ("light", "dark")
    }
    return environment.get_template("paper.html").render(
        r=record, pictures=pictures, told=_flat(record["scale"]["recipe"])
    )


def draw(record: dict[str, Any], theme: str = "light") -> bytes:
    """The picture: a PNG file's bytes.

    Args:
        record: of `resnet_fused.paper.run`.
        theme: "light" or "dark".
    """
    return to_png(figure(record["panels"], colours_of(theme), dark=theme == "dark"))


def figure(panels: list[dict[str, Any]], colours: Theme, *, dark: bool = False) -> Figure:
    """Axes beside each other, with one scale, so that heights can be compared.

    Args:
        panels: title, labels and lines of each.
        colours: of the theme.
        dark: brighter lines.
    """
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    made = Figure(figsize=(10, 1.0 + 3.4 * rows), layout="constrained", facecolor=colours.paper)
    axes = made.subplots(rows, columns, sharey=True, squeeze=False).flat
    shades = _DARK_SHADES if dark else _SHADES
    for axis, told in zip(axes, panels, strict=False):
        for line in told["lines"]:
            _line(axis, line, shades[line["colour"] % len(shades)])
        axis.set_title(told["title"], loc="left", fontsize=11, color=colours.ink)
        axis.set(xlabel=told["x"], ylabel=told["y"], ylim=(0, None))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_facecolor(colours.paper)
        axis.tick_params(colors=colours.quiet, labelleft=True)
        axis.grid(color=colours.line, linewidth=0.6)
        for label in (axis.xaxis.label, axis.yaxis.label):
            label.set_color(colours.ink)
        for spine in axis.spines.values():
            spine.set_color(colours.line)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(
                labelcolor=colours.ink, facecolor=colours.paper, edgecolor=colours.line, fontsize=9
            )
    for axis in list(axes)[len(panels) :]:
        axis.set_visible(False)
    return made


def _line(axis: Any, line: dict[str, Any], colour: str) -> None:
    points, dashed = line["points"], line["dashed"]
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    axis.plot(
        xs, ys, color=colour, linestyle="--" if dashed else "-", linewidth=1.0 if dashed else 2.2,
        marker="o" if len(points) < 30 and not dashed else None, markersize=3,
        label=line["label"] or None,
    )  # fmt: skip
    if points and len(points[0]) == 4:
        least, most = [p[2] for p in points], [p[3] for p in points]
        axis.fill_between(xs, least, most, color=colour, alpha=0.12, linewidth=0)


def _flat(value: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for key, item in value.items():
        if isinstance(item, dict):
            found += _flat(item, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", str(item)))
    return found
