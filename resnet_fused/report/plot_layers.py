"""The waterfall: a step's milliseconds, each layer beginning where the one before it ended."""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from resnet_fused.report import plot_data as data
from resnet_fused.report.theme import Space, Theme, entitle, fit, sheet, shorten, width_of

LEGIBLE = 64  # lines of one panel
_LINE = 0.15  # inches
_NAME = 34  # characters
LIMIT, PREDICTED = "limit", "predicted"

Times = dict[str, dict[str, float | None]]  # variant -> layer -> seconds


@dataclass(frozen=True)
class Panel:
    """One model row: a line a layer (or block, or stage), a bar a variant in it."""

    title: str
    note: str
    names: list[str]
    times: Times


def figure(record: data.Record, colours: Theme) -> Figure:
    """The plot as a figure, a panel for each row of level model.

    Raises:
        NothingToDrawError: there is no such row, or none has times by layer or a limit's layers.
    """
    models = data.rows(record, "model")
    if not models:
        raise data.NothingToDrawError(
            "no model level in this record: resnet-fused bench --level model"
        )
    lines = max(12, 2 * LEGIBLE // len(models))
    panels = [panel for row in models if (panel := _panel(row, min(LEGIBLE, lines)))]
    if not panels:
        raise data.NothingToDrawError(
            "no model row of this record has times by layer, nor a limit by layer"
        )
    longest = max(width_of(shorten(name, _NAME), 7) for panel in panels for name in panel.names)
    spaces = [Space(panel.note, _LINE * max(6, len(panel.names))) for panel in panels]
    made, axes = sheet(spaces, colours, left=0.2 + min(2.4, longest))
    for axis, panel in zip(axes, panels, strict=True):
        _draw(axis, panel, colours)
    return made


def _panel(row: data.Row, most: int) -> Panel | None:
    """What is drawn of a row, in at most `most` lines, or None where there is nothing."""
    found = data.variants(row)
    kernels = data.by_kernel(row)
    least = {name: data.number(time) for name, time in data.least(row, kernels).items()}
    times = {name: own for name, variant in found.items() if (own := data.shares(variant))}
    known = _in_order({**times, PREDICTED: least}) if kernels else list(least)
    what = "kind of kernel" if kernels else "layer"
    text, note = f"{data.title(row)}: a step by {what}", ""
    if times:
        # Two variants can be told apart line by line; more could not.
        chosen = [name for name in ("eager", "fused") if name in times] or list(times)[:1]
        times = {name: times[name] for name in chosen}
        for name in ("eager", "fused"):
            if name not in times:
                note += f"no times by {what} of {name} in this record; "
        note += f"each bar begins where the {what} before it ended; from one pass under a profiler"
        if kernels and least:
            times[PREDICTED] = least
            note += "; predicted: the least time of ours by the roofline"
    elif least:
        text = f"{data.title(row)}: the limit by layer, no variant has times"
        note = "the least time by the roofline, not a measurement"
        times = {LIMIT: least}
    else:
        return None
    names = list(dict.fromkeys([*known, *(name for own in times.values() for name in own)]))
    unknown = sum(time is None for own in times.values() for time in own.values())
    if unknown:
        note += f"; without a number: {unknown}"
    names, times, summed = _coarser(names, times, most)
    return Panel(text, note + summed, names, times)


def _in_order(times: Times) -> list[str]:
    """The kinds of kernels of all variants, each behind those that any variant has before it."""
    names: list[str] = []
    for own in times.values():
        place = 0
        for name in own:
            if name in names:
                place = names.index(name) + 1
            else:
                names.insert(place, name)
                place += 1
    return names


def _coarser(names: list[str], times: Times, most: int) -> tuple[list[str], Times, str]:
    """Sums layers into blocks, blocks into stages, until at most `most` lines are left."""
    what = ""
    for parts, said in ((99, ""), (2, "; summed by block"), (1, "; summed by stage")):
        label, what = {name: ".".join(name.split(".")[:parts]) for name in names}, said
        lines = list(dict.fromkeys(label.values()))
        if len(lines) <= most:
            break
    else:
        label = {name: names[i - i % -(-len(names) // most)] for i, name in enumerate(names)}
        lines, what = list(dict.fromkeys(label.values())), "; neighbours summed under the first"
    summed: Times = {}
    for variant, own in times.items():
        summed[variant] = dict.fromkeys(lines, 0.0)
        for name, seconds in own.items():
            summed[variant][label[name]] = (summed[variant][label[name]] or 0.0) + (seconds or 0.0)
    return lines, summed, what


def _draw(axis: Axes, panel: Panel, colours: Theme) -> None:
    axis.grid(visible=False, axis="y")
    axis.grid(axis="x", color=colours.line, linewidth=0.6)
    shades = {"eager": colours.eager, "fused": colours.fused}
    share = 0.84 / len(panel.times)
    for index, (variant, times) in enumerate(panel.times.items()):
        spans = [1e3 * (times.get(name) or 0.0) for name in panel.names]
        starts = [sum(spans[:i]) for i in range(len(spans))]
        places = [i - 0.42 + share * (index + 0.5) for i in range(len(spans))]
        shade = shades.get(variant, colours.bare)
        axis.barh(places, spans, left=starts, height=share, color=shade)
        # The stair: where one layer hands over to the next.
        axis.vlines(starts[1:], places[:-1], places[1:], color=shade, linewidth=0.6)
    _bands(axis, panel.names, colours)
    axis.set_yticks(
        range(len(panel.names)), [fit(shorten(name, _NAME), 2.4, 7) for name in panel.names]
    )
    axis.tick_params(axis="y", labelsize=7)
    axis.set_ylim(len(panel.names) - 0.4, -0.6)
    axis.set_xlim(left=0)
    axis.xaxis.set_major_locator(MaxNLocator(7, steps=(1, 2, 2.5, 5, 10)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_xlabel("milliseconds from the step's beginning", fontsize=8.5, color=colours.quiet)
    entitle(axis, panel.title, panel.note, colours)
    handles = [Patch(color=shades.get(name, colours.bare), label=name) for name in panel.times]
    axis.legend(
        handles=handles, loc="upper right", frameon=False, fontsize=8.5, labelcolor=colours.ink
    )


def _bands(axis: Axes, names: list[str], colours: Theme) -> None:
    """Every second stage lies on a pale band."""
    stages = [name.split(".")[0] for name in names]
    order = list(dict.fromkeys(stages))
    for stage in order[1::2]:
        lines = [i for i, own in enumerate(stages) if own == stage]
        axis.axhspan(
            min(lines) - 0.5,
            max(lines) + 0.5,
            color=colours.line,
            alpha=0.45,
            zorder=0,
            linewidth=0,
        )
