"""Bars against the peers, and peak memory: a panel a row, or a strip of dots for many rows."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from resnet_fused.report import plot_data as data
from resnet_fused.report.theme import (
    NOTE_SIZE,
    WIDTH,
    Space,
    Theme,
    entitle,
    fit,
    sheet,
    shorten,
    width_of,
    wrap,
)

MOST_BARS = {"model": 130, "block": 60, "kernel": 60}  # beyond: dots, a strip a variant
MOST_ROWS = 12  # of the memory plot
_BAR = 0.25  # inches
_NOTE_LINES = 24
_NAME = 1.9  # inches of a variant's name


@dataclass(frozen=True)
class Bar:
    """One variant of one row: how long the bar is (None: none), its interval, and what it says."""

    name: str
    length: float | None
    text: str
    ends: tuple[float, float] | None = None
    failed: bool = False


@dataclass(frozen=True)
class Panel:
    """A row with its bars, or a group of rows as strips."""

    title: str
    note: str
    unit: str
    bars: tuple[Bar, ...] = ()
    rows: tuple[data.Row, ...] = ()

    @property
    def space(self) -> Space:
        """What it takes on the sheet."""
        lines = max(2, len(self.bars) or len(_names(self.rows)))
        return Space(self.note, lines * (_BAR if self.bars else 0.36))


def figure(record: data.Record, colours: Theme) -> Figure:
    """The bars against the peers as a figure.

    Raises:
        NothingToDrawError: the record has no rows, or no variant in any of them.
    """
    rows = [row for row in data.rows(record) if data.variants(row)]
    panels = [panel for level in data.LEVELS for panel in _of_level(rows, level)]
    if not panels:
        raise data.NothingToDrawError("no row of this record has a variant: resnet-fused bench")
    return _figure(panels, _omissions(rows), colours)


def memory_figure(record: data.Record, colours: Theme) -> Figure:
    """Peak memory as a figure.

    Raises:
        NothingToDrawError: no variant of the record has a peak.
    """
    for level in data.LEVELS:
        rows = [row for row in data.rows(record, level) if max(_peaks(row), default=0) > 0]
        if rows:
            break
    else:
        raise data.NothingToDrawError("no variant in this record has a peak of memory")
    shown = sorted(rows, key=lambda row: -max(_peaks(row)))[:MOST_ROWS]
    note = "what a call had in use at its peak, above what was in use before it"
    if len(shown) < len(rows):
        note += f"; the {len(shown)} largest of {len(rows)} rows"
    panels = []
    for row in shown:
        unit = data.scaled(max(_peaks(row)), data.BYTES)[1]
        panels.append(Panel(data.title(row), note, unit, _memory_bars(row, unit)))
    return _figure(panels, [], colours)


def _of_level(rows: list[data.Row], level: str) -> list[Panel]:
    own = [row for row in rows if data.about(row).get("level") == level]
    if sum(len(data.variants(row)) for row in own) > MOST_BARS[level]:
        return [
            Panel(text, _strip_note(members), "times as fast as eager", (), tuple(members))
            for text, members in data.groups(own)
        ]
    if level == "model":
        note = "median of the samples; in brackets the gain over eager and its interval"
        return [Panel(data.title(row), note, "images/s", _image_bars(row)) for row in own]
    note = "how many times as fast as eager, pair by pair; strokes: the interval of the median"
    return [Panel(data.title(row), note, "times as fast as eager", _ratio_bars(row)) for row in own]


def _strip_note(rows: list[data.Row]) -> str:
    wrong = sum(data.is_wrong(v) for row in rows for v in data.variants(row).values())
    note = f"each dot one of {len(rows)} rows with its interval; upright stroke: their median"
    return note + (f"; wrong, so without a time: {wrong}" if wrong else "")


def _times(found: data.Row | None) -> str:
    if found is None:
        return ""
    middle, low, high = data.interval(found)
    return f"{middle:.2f}x ({low:.2f} .. {high:.2f})"


def _image_bars(row: data.Row) -> tuple[Bar, ...]:
    bars = []
    for name, variant in data.variants(row).items():
        rate = None if data.is_wrong(variant) else data.positive(variant.get("images_per_s"))
        gain = _times(data.ratio(row, name))
        text = f"{data.say(rate)} images/s" + (f"   [{gain}]" if gain else "")
        bars.append(Bar(name, rate, text) if rate else _no_bar(name, variant))
    return _sorted(bars)


def _ratio_bars(row: data.Row) -> tuple[Bar, ...]:
    bars = []
    for name, variant in data.variants(row).items():
        found = None if data.is_wrong(variant) else data.ratio(row, name)
        if name == "eager" and data.seconds(variant):
            bars.append(Bar(name, 1.0, "the baseline"))
        elif found is not None:
            middle, low, high = data.interval(found)
            bars.append(Bar(name, middle, _times(found), (low, high)))
        else:
            bars.append(_no_bar(name, variant))
    return _sorted(bars)


def _no_bar(name: str, variant: data.Row) -> Bar:
    if data.is_wrong(variant):
        return Bar(name, None, f"wrong: no time ({variant['wrong']})", failed=True)
    return Bar(name, None, "no number in this record")


def _sorted(bars: list[Bar]) -> tuple[Bar, ...]:
    return tuple(sorted(bars, key=lambda bar: -(bar.length or 0.0)))


def _peaks(row: data.Row) -> list[float]:
    peaks = (data.positive(v.get("peak_memory_bytes")) for v in data.variants(row).values())
    return [peak for peak in peaks if peak]


def _memory_bars(row: data.Row, unit: str) -> tuple[Bar, ...]:
    bars, size = [], {name: size for size, name in data.BYTES}[unit]
    for name, variant in data.variants(row).items():
        peak = data.number(variant.get("peak_memory_bytes"))
        if peak is None or peak < 0:
            bars.append(_no_bar(name, variant))
        else:
            bars.append(Bar(name, peak / size, data.say(peak, ((size, unit),))))
    return tuple(sorted(bars, key=lambda bar: bar.length or float("inf")))


def _omissions(rows: list[data.Row]) -> list[str]:
    """Lines that say which variants were left out, and why."""
    lines: list[str] = []
    for why, names in data.omitted(rows).items():
        if len(lines) >= _NOTE_LINES:
            return [*lines[:_NOTE_LINES], "and more: the record has all of them"]
        who = shorten(", ".join(names), 200)
        lines += wrap(f"left out: {who}: {shorten(why, 300)}", WIDTH - 0.5)
    return lines


def _figure(panels: list[Panel], lines: list[str], colours: Theme) -> Figure:
    names = [name for panel in panels for name in _labels(panel)]
    left = 0.2 + max(map(width_of, names))
    made, axes = sheet([panel.space for panel in panels], colours, left=left, footer=lines)
    for axis, panel in zip(axes, panels, strict=True):
        axis.grid(visible=False, axis="y")
        axis.grid(axis="x", color=colours.line, linewidth=0.6)
        if panel.bars:
            _draw_bars(axis, panel, colours)
        else:
            _draw_strips(axis, panel, colours)
        labels = _labels(panel)
        axis.set_yticks(range(len(labels)), labels, fontsize=8.5, color=colours.ink)
        axis.set_ylim(len(labels) - 0.4, -0.6)
        axis.set_xlabel(panel.unit, fontsize=8.5, color=colours.quiet)
        entitle(axis, panel.title, panel.note, colours)
    return made


def _labels(panel: Panel) -> list[str]:
    names = [bar.name for bar in panel.bars] or _names(panel.rows)
    return [fit(name, _NAME) for name in names]


def _shade(name: str, colours: Theme) -> str:
    return {"eager": colours.eager, "fused": colours.fused}.get(name, colours.bare)


def _draw_bars(axis: Axes, panel: Panel, colours: Theme) -> None:
    wide = WIDTH * axis.get_position().width - 0.15
    end = 0.0
    for y, bar in enumerate(panel.bars):
        if bar.length is not None:
            axis.barh(y, bar.length, height=0.7, color=_shade(bar.name, colours))
        if bar.length is not None and bar.ends is not None:
            span = [[max(0.0, bar.length - bar.ends[0])], [max(0.0, bar.ends[1] - bar.length)]]
            axis.errorbar(
                bar.length, y, xerr=span, fmt="none", ecolor=colours.ink, elinewidth=1.1, capsize=3
            )
        at, text = max(bar.length or 0.0, bar.ends[1] if bar.ends else 0.0), fit(bar.text, wide)
        axis.annotate(
            text, (at, y), xytext=(6, 0), textcoords="offset points", va="center",
            fontsize=NOTE_SIZE, color=colours.failed if bar.failed else colours.ink,
        )  # fmt: skip
        # Each text has its room beyond its bar.
        end = max(end, 1.02 * at, at / max(0.25, 1 - width_of(text) / wide))
    if panel.unit.startswith("times"):
        axis.axvline(1.0, color=colours.eager, linewidth=1.1, linestyle=(0, (5, 3)), zorder=0)
        end = max(end, 1.1)
    axis.set_xlim(0, end or 1.0)
    axis.xaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 2.5, 5, 10)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def _names(rows: tuple[data.Row, ...]) -> list[str]:
    found = dict.fromkeys(name for row in rows for name in data.variants(row))
    return [name for name in found if name != "eager"]


def _draw_strips(axis: Axes, panel: Panel, colours: Theme) -> None:
    names, values = _names(panel.rows), [1.0]
    for y, name in enumerate(names):
        found = [
            data.interval(pair)
            for row in panel.rows
            if not data.is_wrong(data.variants(row).get(name, {}))
            and (pair := data.ratio(row, name))
        ]
        if not found:
            axis.annotate(
                "no ratio to eager in this record", (0, y), xytext=(6, 0),
                xycoords=axis.get_yaxis_transform(), textcoords="offset points", va="center",
                fontsize=8.5, color=colours.quiet,
            )  # fmt: skip
            continue
        shade = _shade(name, colours)
        middles, lows, highs = zip(*found, strict=True)
        # The rows' own order, from top to bottom, keeps dots of equal ratio apart.
        steps = [y - 0.32 + 0.64 * (i + 0.5) / len(found) for i in range(len(found))]
        axis.hlines(steps, lows, highs, color=shade, linewidth=0.7, alpha=0.7)
        axis.plot(middles, steps, "o", color=shade, markersize=3.2, alpha=0.85)
        axis.vlines(median(middles), y - 0.4, y + 0.4, color=colours.ink, linewidth=1.6)
        values += [*lows, *highs]
    axis.axvline(1.0, color=colours.eager, linewidth=1.2, linestyle=(0, (5, 3)), zorder=0)
    axis.set_xscale("log")
    axis.set_xlim(min(values) / 1.15, max(values) * 1.15)
    reach = max(values) / min(values)
    subs = (1,) if reach > 1000 else (1, 2, 5) if reach > 20 else (1, 1.5, 2, 3, 5, 7)
    axis.xaxis.set_major_locator(LogLocator(subs=subs))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
