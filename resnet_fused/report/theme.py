"""What all pictures share: two sets of colours, the look of an axis, a figure as PNG bytes."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path

WIDTH = 9.0  # inches
NOTE_SIZE = 8.5  # points
_RIGHT = 0.25  # inches
_LINE = 0.168  # inches, of a note's line


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


@dataclass(frozen=True)
class Space:
    """What one axis of a `sheet` needs.

    Attributes:
        note: the text between title and axis; its lines are counted.
        body: height of the axis itself in inches.
        below: inches for ticks, label and legend.
    """

    note: str
    body: float
    below: float = 0.52


def sheet(
    spaces: Sequence[Space], colours: Theme, *, left: float, footer: Sequence[str] = ()
) -> tuple[Figure, list[Axes]]:
    """A figure of axes below each other, every one at a place that its texts leave free.

    Args:
        spaces: of the axes, from the top.
        colours: of the theme.
        left: inches for the tick labels.
        footer: lines below all axes, see `wrap`.
    """
    wide = WIDTH - left - _RIGHT
    heights = [_above(space.note, wide) + space.body + space.below for space in spaces]
    height = sum(heights) + 0.15 + (0.2 + _LINE * len(footer)) * bool(footer)
    figure = Figure(figsize=(WIDTH, height), facecolor=colours.paper)
    FigureCanvasAgg(figure)
    axes, top = [], height - 0.05
    for space in spaces:
        top -= _above(space.note, wide) + space.body
        place = (left / WIDTH, top / height, wide / WIDTH, space.body / height)
        axes.append(figure.add_axes(place))
        style(axes[-1], colours)
        top -= space.below
    if footer:
        figure.text(
            0.2 / WIDTH, top / height, "\n".join(footer), fontsize=NOTE_SIZE, va="top",
            color=colours.quiet,
        )  # fmt: skip
    return figure, axes


def _above(note: str, wide: float) -> float:
    """Inches that title and note take."""
    return 0.38 + _LINE * len(wrap(note, wide))


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
    """A title, and below it a quiet note, within the width of an axis of a `sheet`."""
    wide = WIDTH * axis.get_position().width
    lines = wrap(note, wide)
    axis.set_title(
        fit(text, wide, 11, "bold"), loc="left", fontsize=11, fontweight="bold",
        color=colours.ink, pad=6 + 72 * _LINE * len(lines),
    )  # fmt: skip
    axis.annotate(
        "\n".join(lines), (0, 1), xycoords="axes fraction", xytext=(0, 5),
        textcoords="offset points", fontsize=NOTE_SIZE, color=colours.quiet, va="bottom",
    )  # fmt: skip


def width_of(text: str, size: float = NOTE_SIZE, weight: str = "normal") -> float:
    """Inches that a text takes at a font size in points."""
    font = FontProperties(size=size, weight=weight)
    return text_to_path.get_text_width_height_descent(text, font, ismath=False)[0] / 72


def wrap(text: str, inches: float) -> list[str]:
    """Lines of a text at the notes' size, each of them at most so wide."""
    if not text:
        return []
    characters = max(8, int(len(text) * inches / max(width_of(text), 1e-3)))
    lines = textwrap.wrap(text, characters)
    while characters > 8 and max(map(width_of, lines)) > inches:
        characters -= 1 + characters // 20
        lines = textwrap.wrap(text, characters)
    return lines


def fit(text: str, inches: float, size: float = NOTE_SIZE, weight: str = "normal") -> str:
    """The text, without its middle where it is wider."""
    length, shown = len(text), text
    while length > 3 and width_of(shown, size, weight) > inches:
        length = min(length - 1, int(length * inches / width_of(shown, size, weight)) + 1)
        shown = shorten(text, length)
    return shown


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
