"""What all pictures share: two sets of colours, the look of an axis, a figure as PNG bytes."""

from __future__ import annotations

import io
import textwrap
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

WIDTH = 9.0  # inches
_CHARACTERS = 128  # of a note that fit into the width of an axis


@dataclass(frozen=True)
class Theme:
    """Colours: paper, ink, pale lines, and one colour a role (told apart by most eyes)."""

    paper: str
    ink: str
    quiet: str
    line: str
    fused: str
    eager: str
    bare: str
    failed: str


LIGHT = Theme(
    "#ffffff", "#1b2230", "#5d6778", "#dfe3ea", "#1565d8", "#d9822b", "#7a8699", "#c62840"
)
DARK = Theme("#12161d", "#e8ecf3", "#98a3b5", "#2b323e", "#5aa2ff", "#f0a24a", "#8f9bb0", "#ff6b7d")
THEMES = {"light": LIGHT, "dark": DARK}


def colours_of(theme: str) -> Theme:
    """The colours of a theme.

    Raises:
        ValueError: it is neither "light" nor "dark".
    """
    if theme not in THEMES:
        raise ValueError(f"theme: expected one of {', '.join(THEMES)}, got {theme!r}")
    return THEMES[theme]


def sheet(heights: list[float], colours: Theme, *, gap: float = 0.16) -> tuple[Figure, list[Axes]]:
    """A figure of axes below each other.

    Args:
        heights: of each axis with its texts, in inches.
        colours: of the theme.
        gap: inches around each axis.
    """
    size = (WIDTH, sum(heights) + 2 * gap)
    figure = Figure(figsize=size, facecolor=colours.paper, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(h_pad=gap / 2, w_pad=0.12)  # type: ignore[union-attr]
    axes = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for axis in axes:
        style(axis, colours)
    return figure, list(axes)


def style(axis: Axes, colours: Theme) -> None:
    """Pale lines, no box, quiet labels."""
    axis.set_facecolor(colours.paper)
    for side, spine in axis.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(colours.line)
    axis.tick_params(colors=colours.quiet, labelsize=8, length=0, which="both")
    axis.grid(axis="y", color=colours.line, linewidth=0.7)
    axis.set_axisbelow(True)


def entitle(axis: Axes, text: str, note: str, colours: Theme) -> None:
    """A title, and below it a quiet note, wrapped to the axis' width."""
    lines = textwrap.wrap(note, _CHARACTERS)
    axis.set_title(
        shorten(text, 84), loc="left", fontsize=11, fontweight="bold", color=colours.ink,
        pad=6 + 12 * len(lines),
    )  # fmt: skip
    axis.annotate(
        "\n".join(lines), (0, 1), xycoords="axes fraction", xytext=(0, 4),
        textcoords="offset points", fontsize=8.5, color=colours.quiet, va="bottom",
    )  # fmt: skip


def shorten(text: str, length: int) -> str:
    """The text, without its middle where it is longer than `length` characters."""
    if len(text) <= length:
        return text
    head = (length - 1) // 2
    return f"{text[:head]}\N{HORIZONTAL ELLIPSIS}{text[head + 1 - length :]}"


def to_png(figure: Figure, dpi: int = 130) -> bytes:
    """The figure as a PNG file's bytes: the same record draws the same bytes, whenever."""
    file = io.BytesIO()
    # Nothing of the clock in the file.
    figure.savefig(file, format="png", dpi=dpi, metadata={"Software": None})
    return file.getvalue()
