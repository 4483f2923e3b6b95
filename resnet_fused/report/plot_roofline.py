"""The roofline plot: arithmetic intensity against rate, before and after fusion."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from resnet_fused.report import plot_data as data
from resnet_fused.report.theme import Space, Theme, entitle, fit, sheet, shorten

MARKED = 5  # points that get a letter
_LETTERS = "abcde"
_DASHES = ("-", (0, (6, 2)), (0, (2, 2)), (0, (6, 2, 1, 2)))
# Where a letter may stand beside its point, in points: the first free place is taken.
_PLACES = ((7, 0), (-7, 0), (0, 8), (0, -8), (7, 7), (-7, 7), (7, -7), (-7, -7), (13, 0), (0, 15))

Spot = tuple[float, float]  # FLOP/byte, FLOP/s


@dataclass(frozen=True)
class Point:
    """One row or layer: where it stands eager and fused (None: not timed), and under which roof."""

    name: str
    before: Spot | None
    after: Spot | None
    dtype: str
    whole: bool = False


def figure(record: data.Record, colours: Theme) -> Figure:
    """The plot as a figure, a panel for each level that has points.

    Raises:
        NothingToDrawError: no row has FLOPs, bytes and a time.
    """
    panels = [(text, points) for text, points in _panels(record) if points]
    if not panels:
        raise data.NothingToDrawError(
            "no row of this record has FLOPs, bytes and a time: "
            "resnet-fused bench --level kernel (or block, model) measures them"
        )
    notes = [_note(record, points) for _, points in panels]
    made, axes = sheet([Space(note, 3.9, 0.95) for note in notes], colours, left=1.05)
    for axis, (text, points), note in zip(axes, panels, notes, strict=True):
        roofs = _roofs(record, points)
        _limits(axis, points, roofs)
        _draw_roofs(axis, roofs, colours)
        _draw_points(axis, points, colours)
        _letters(axis, _farthest(points, dict(roofs)), colours)
        _legend(axis, roofs, points, colours)
        entitle(axis, text, note, colours)
    return made


def _panels(record: data.Record) -> Iterator[tuple[str, list[Point]]]:
    for level in ("kernel", "block"):
        found = [_of_row(row) for row in data.rows(record, level)]
        yield f"Roofline: every {level} before and after fusion", list(_placed(found))
    models = data.rows(record, "model")
    wholes = list(_placed(_of_row(row, whole=True) for row in models))
    with_layers = [row for row in models if any(_layer_times(row).values())]
    if with_layers:
        # One step's layers are enough points: the largest batch in inference, else in training.
        told = max(with_layers, key=_telling)
        layers = list(_placed(_of_layers(told)))
        yield f"Roofline: whole models, and the layers of {data.title(told)}", layers + wholes
    else:
        yield "Roofline: whole models before and after fusion", wholes


def _telling(row: data.Row) -> tuple[bool, float]:
    about = data.about(row)
    return about.get("op") == "inference", data.number(about.get("batch")) or 0.0


def _placed(points: Iterable[Point]) -> Iterator[Point]:
    return (point for point in points if point.before or point.after)


def _spot(flops: Any, moved: Any, seconds: Any) -> Spot | None:
    """A place in the plot, or None where a number is missing (or zero: a log scale has none)."""
    work, traffic, time = data.positive(flops), data.positive(moved), data.positive(seconds)
    return (work / traffic, work / time) if work and traffic and time else None


def _of_row(row: data.Row, *, whole: bool = False) -> Point:
    limit, found = row.get("limit") or {}, data.variants(row)
    flops = limit.get("flops")
    eager, fused = (data.seconds(found.get(name, {})) for name in ("eager", "fused"))
    about = data.about(row)
    return Point(
        f"{about.get('name', '?')} {about.get('op', '')}" if not whole else data.title(row),
        _spot(flops, limit.get("eager_bytes"), eager),
        _spot(flops, limit.get("bytes"), fused),
        str(about.get("dtype")),
        whole,
    )


def _layer_times(row: data.Row) -> dict[str, dict[str, Any]]:
    found = data.variants(row)
    return {name: found.get(name, {}).get("layer_s") or {} for name in ("eager", "fused")}


def _of_layers(row: data.Row) -> Iterator[Point]:
    times, dtype = _layer_times(row), str(data.about(row).get("dtype"))
    for layer in (row.get("limit") or {}).get("layers") or []:
        name, flops, moved = layer.get("name"), layer.get("flops"), layer.get("bytes")
        before = layer.get("eager_bytes", moved)
        yield Point(
            str(name),
            _spot(flops, before, times["eager"].get(name)),
            _spot(flops, moved, times["fused"].get(name)),
            dtype,
        )


def _roofs(record: data.Record, points: list[Point]) -> list[tuple[str, Spot]]:
    """Of each dtype that the points have: (dtype, (FLOP/s, bytes/s))."""
    found = []
    for dtype, rates in (record.get("ceilings") or {}).items():
        peak, band = (data.positive((rates or {}).get(name)) for name in ("flops", "bandwidth"))
        if peak and band and any(point.dtype == dtype for point in points):
            found.append((dtype, (peak, band)))
    return found


def _limits(axis: Axes, points: list[Point], roofs: list[tuple[str, Spot]]) -> None:
    spots = [spot for point in points for spot in (point.before, point.after) if spot]
    spots += [(peak / band, peak) for _, (peak, band) in roofs]
    axis.set_xscale("log")
    axis.set_yscale("log")
    for one, index, set_limits in ((axis.xaxis, 0, axis.set_xlim), (axis.yaxis, 1, axis.set_ylim)):
        values = [spot[index] for spot in spots]
        low, high = min(values) / 2, max(values) * 2
        if high < 20 * low:  # so that labelled ticks fall into the range
            low, high = low / 2, high * 2
        set_limits(low, high)
        one.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 500 * low else (1,), numticks=20))
        one.set_minor_formatter(NullFormatter())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))


def _tick(rate: float) -> str:
    size, unit = data.scaled(rate, data.FLOPS)
    return f"{size:,g} {unit}"


def _draw_roofs(axis: Axes, roofs: list[tuple[str, Spot]], colours: Theme) -> None:
    left, right = axis.get_xlim()
    axis.grid(axis="both", color=colours.line, linewidth=0.6)
    for index, (_, (peak, band)) in enumerate(roofs):
        x = numpy.array([left, peak / band, right * 2])
        y = numpy.minimum(peak, band * x)
        dashes = _DASHES[index % len(_DASHES)]
        axis.plot(x, y, color=colours.ink, linewidth=1.6, linestyle=dashes, label="_roof")
    axis.set_xlim(left, right)
    axis.set_xlabel("FLOP/byte", fontsize=8.5, color=colours.quiet)


def _draw_points(axis: Axes, points: list[Point], colours: Theme) -> None:
    """Hollow before, filled after, a thin line from one to the other."""
    lines = [(point.before, point.after) for point in points if point.before and point.after]
    axis.add_collection(
        LineCollection(lines, colors=colours.quiet, linewidths=0.6, alpha=0.55), autolim=False
    )
    crowd = 5.5 if len(points) <= 80 else 4.0
    for whole, marker, size in ((False, "o", crowd), (True, "D", 7.0)):
        own = [point for point in points if point.whole is whole]
        before = [point.before for point in own if point.before]
        after = [point.after for point in own if point.after]
        look: dict[str, Any] = {"marker": marker, "linestyle": "none", "markersize": size}
        if before:
            axis.plot(
                *zip(*before, strict=True), **look, markeredgecolor=colours.eager,
                markerfacecolor="none", markeredgewidth=1.2,
            )  # fmt: skip
        if after:
            axis.plot(
                *zip(*after, strict=True), **look, markerfacecolor=colours.fused,
                markeredgecolor=colours.paper, markeredgewidth=0.5,
            )  # fmt: skip


def _farthest(points: list[Point], roofs: dict[str, Spot]) -> list[Point]:
    """The fused points that reach the least share of their roof, where there is a choice."""
    shares = []
    for point in points:
        if point.after and not point.whole and point.dtype in roofs:
            peak, band = roofs[point.dtype]
            shares.append((point.after[1] / min(peak, band * point.after[0]), point))
    shares.sort(key=lambda pair: pair[0])
    return [point for _, point in shares[:MARKED]] if len(shares) > MARKED else []


def _note(record: data.Record, points: list[Point]) -> str:
    note = "hollow: eager, each operation a pass over memory; filled: fused; a line joins the two"
    roofs = _roofs(record, points)
    if not roofs:
        note += "; this record has no ceilings"
    names = [
        f"{letter} {shorten(point.name, 44)}".replace(" ", "\N{NO-BREAK SPACE}")
        for letter, point in zip(_LETTERS, _farthest(points, dict(roofs)), strict=False)
    ]
    return note + (f". Farthest below the ceiling: {', '.join(names)}" if names else "")


def _legend(axis: Axes, roofs: list[tuple[str, Spot]], points: list[Point], colours: Theme) -> None:
    """Below the axis, where no point can lie under it."""
    hollow: dict[str, Any] = {"linestyle": "none", "markerfacecolor": "none", "markersize": 6}
    handles = [
        Line2D([], [], marker="o", **hollow, markeredgecolor=colours.eager, label="eager"),
        Line2D([], [], marker="o", linestyle="none", color=colours.fused, label="fused"),
    ]
    if any(point.whole for point in points):
        handles.append(
            Line2D([], [], marker="D", **hollow, markeredgecolor=colours.quiet, label="whole model")
        )
    for index, (dtype, (peak, band)) in enumerate(roofs[: len(_DASHES)]):
        rates = f"{data.say(peak, data.FLOPS)}, {data.say(band, data.BYTES_A_SECOND)}"
        text = f"{fit(dtype, 1.2)}: {rates}"
        handles.append(Line2D([], [], color=colours.ink, linestyle=_DASHES[index], label=text))
    columns = min(4 if len(roofs) < 2 else 3, len(handles))
    axis.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.125), ncols=columns,
        frameon=False, fontsize=8.5, labelcolor=colours.ink, borderaxespad=0,
    )  # fmt: skip


def _letters(axis: Axes, farthest: list[Point], colours: Theme) -> None:
    """A letter beside each of these points, in the first of `_PLACES` that no letter has taken."""
    taken: list[Any] = []
    for letter, point in zip(_LETTERS, farthest, strict=False):
        for place in _PLACES:
            text = axis.annotate(
                letter, point.after or (1.0, 1.0), xytext=place, textcoords="offset points",
                ha="center", va="center", fontsize=8.5, fontweight="bold", color=colours.ink,
                path_effects=[withStroke(linewidth=2, foreground=colours.paper)],
            )  # fmt: skip
            box = text.get_window_extent()
            inside = axis.bbox.contains(box.x0, box.y0) and axis.bbox.contains(box.x1, box.y1)
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            text.remove()
