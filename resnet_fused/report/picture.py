"""The picture: error beside its bound, block by block against eager, and times."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from resnet_fused.report.theme import DARK, LIGHT, THEMES, Theme, style, to_png

__all__ = ["DARK", "LIGHT", "draw"]


def draw(content: dict[str, Any], theme: str = "light") -> bytes:
    """Draws the picture.

    Args:
        content: the record of `resnet-fused verify --json`.
        theme: "light" or "dark".

    Returns:
        A PNG file's bytes.
    """
    colours = THEMES[theme]
    timings = content["timings"]
    heights = [2.6, 2.6] + ([1.0 + 0.28 * sum(len(t["seconds"]) for t in timings)] * bool(timings))
    figure = Figure(figsize=(11, sum(heights) + 1.9), facecolor=colours.paper, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(h_pad=0.12, w_pad=0.12)  # type: ignore[union-attr]
    axes = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    verification = content["verification"]
    shape = " x ".join(map(str, verification["input_shape"]))
    figure.suptitle(
        f"{content['model']}, {verification['dtype']}, {shape}: "
        + ("every check passed" if verification["ok"] else "CHECKS FAILED"),
        x=0.01, ha="left", fontsize=15, fontweight="bold",
        color=colours.ink if verification["ok"] else colours.failed,
    )  # fmt: skip
    for axis in axes:
        style(axis, colours)
    _layers(axes[0], verification["layers"], colours)
    _blocks(axes[1], verification["blocks"], verification["end_to_end"], colours)
    if timings:
        _times(axes[2], timings, colours)
    return to_png(figure)


def _title(axis: Axes, text: str, note: str, colours: Theme) -> None:
    axis.set_title(text, loc="left", fontsize=11, fontweight="bold", color=colours.ink, pad=18)
    axis.text(
        0, 1.03, note, transform=axis.transAxes, fontsize=8.5, color=colours.quiet, va="bottom"
    )


def _limit(axis: Axes, at: float, text: str, colours: Theme) -> None:
    axis.axhline(at, color=colours.failed, linewidth=1.2, linestyle=(0, (5, 3)))
    axis.annotate(
        text, (1, at), xycoords=("axes fraction", "data"), xytext=(0, 3),
        textcoords="offset points", ha="right", va="bottom", fontsize=8, color=colours.failed,
    )  # fmt: skip


def _layers(axis: Axes, layers: list[dict[str, Any]], colours: Theme) -> None:
    """A bar a layer: the largest error as a share of what its roundings allow."""
    known = [layer["bound_use"] for layer in layers if layer["bound_use"] is not None]
    top = max(1.25, *(1.1 * value for value in known)) if known else 1.25
    # An error that is no number reaches the top, in the colour of failure.
    shares = [top if layer["bound_use"] is None else layer["bound_use"] for layer in layers]
    shades = [colours.fused if layer["ok"] else colours.failed for layer in layers]
    axis.bar(range(len(layers)), shares, color=shades, width=0.72)
    axis.set_ylim(0, top)
    axis.set_xlim(-0.8, len(layers) - 0.2)
    _name(axis, [layer["layer"] for layer in layers])
    _limit(axis, 1.0, "bound", colours)
    _title(
        axis, "Each layer: largest error as a share of its bound",
        "every layer on the input that the fused run gave it, against float64; 1 is what its "
        "roundings can add up to", colours,
    )  # fmt: skip


def _blocks(axis: Axes, blocks: list[dict[str, Any]], end: dict[str, Any], colours: Theme) -> None:
    """A dot a block, and one for the whole: rms error over that of the unfused modules."""
    rows = [(block["block"], block["ratio"], block["limit"], block["ok"]) for block in blocks]
    rows.append(("whole network", end["ratio"], end["limit"], end["ok"]))
    limits = [row[2] for row in rows]
    known = [row[1] for row in rows if row[1] is not None]
    top = 1.15 * max([*limits, *known, 1.0])
    for x, (_, ratio, limit, ok) in enumerate(rows):
        colour = colours.fused if ok else colours.failed
        value = top if ratio is None else ratio
        axis.vlines(x, 0, value, color=colour, linewidth=1.6, alpha=0.55)
        axis.plot(x, value, "D" if x == len(rows) - 1 else "o", color=colour, markersize=6)
        axis.hlines(limit, x - 0.38, x + 0.38, color=colours.failed, linewidth=1.4)
    axis.axhline(1.0, color=colours.eager, linewidth=1.1, linestyle=(0, (5, 3)))
    axis.set_ylim(0, top)
    axis.set_xlim(-0.8, len(rows) - 0.2)
    _name(axis, [row[0] for row in rows])
    _title(
        axis, "Each block: rms error as a multiple of eager PyTorch's",
        "both against float64, on the same input; below the dashed line the fused block is "
        "the more exact one; red ticks: what is allowed", colours,
    )  # fmt: skip


def _name(axis: Axes, names: list[str]) -> None:
    # Past some hundred names only every second, third, ... can be read.
    step = 1 + len(names) // 110
    axis.set_xticks(range(0, len(names), step), names[::step], rotation=90, fontsize=6.5)


def _times(axis: Axes, timings: list[dict[str, Any]], colours: Theme) -> None:
    """The medians as bars, every sample as a stroke, the gains at the right; an image each."""
    axis.grid(axis="y", visible=False)
    axis.grid(axis="x", color=colours.line, linewidth=0.7)
    medians = [s / t["batch"] for t in timings for s in t["median_s"].values()]
    # An outlier of a busy machine would press everything else against the left: it is cut off.
    end = 2.2e3 * max(medians)
    names, y, beyond = [], 0.0, 0
    for timing in timings:
        gains = {r["variant"]: r for r in timing["ratios"] if r["baseline"] == "eager"}
        for variant, samples in timing["seconds"].items():
            per_image = [1e3 * second / timing["batch"] for second in samples]
            beyond += sum(value > end for value in per_image)
            median = 1e3 * timing["median_s"][variant] / timing["batch"]
            shade = getattr(colours, variant, colours.bare)
            axis.barh(y, median, height=0.7, color=shade, alpha=0.85)
            axis.plot(
                per_image, [y] * len(samples), "|", color=colours.ink, markersize=9, alpha=0.6
            )
            gain = gains.get(variant)
            text = f"{median:.1f} ms"
            if gain:
                low, high = gain["low"], gain["high"]
                text = f"{gain['median']:.2f}x eager ({low:.2f} .. {high:.2f})   {text}"
            axis.text(
                1, y, text, transform=axis.get_yaxis_transform(), va="center", ha="right",
                fontsize=8.5, color=colours.ink,
                bbox={"facecolor": colours.paper, "edgecolor": "none", "pad": 1.5},
            )  # fmt: skip
            names.append((y, f"{variant}, batch {timing['batch']}"))
            y += 1
        y += 0.6
    axis.set_yticks([place for place, _ in names], [name for _, name in names], fontsize=8.5)
    axis.invert_yaxis()
    axis.set_xlim(0, end)
    axis.set_xlabel("milliseconds an image", fontsize=8.5, color=colours.quiet)
    note = "bars: medians; strokes: every sample; gains pair by pair, with their interval"
    if beyond:
        note += f"; slower samples beyond the right edge: {beyond}"
    refused = [timing["refusal"] for timing in timings if timing["refusal"]]
    _title(axis, "Time", note, colours)
    if refused:
        axis.annotate(
            f"NO VERDICT: {refused[0]}", (1, 1), xycoords="axes fraction", xytext=(0, 18),
            textcoords="offset points", fontsize=9, color=colours.failed, ha="right", va="bottom",
        )  # fmt: skip
