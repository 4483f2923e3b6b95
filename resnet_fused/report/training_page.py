"""The page of a training run: its curves, beside those of others; where its time went.

It is made from a run's files alone (run.json, metrics.jsonl, timing.jsonl), so that it can be made
again, and says what they say.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from resnet_fused.report.page import templates
from resnet_fused.report.theme import Theme, colours_of, to_png

PHASES = ("data", "forward", "backward", "optimizer", "replay")
_STYLES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Run:
    """A run as its folder has it.

    Attributes:
        name: of the folder.
        told: run.json.
        train: metrics of steps, in order.
        test: metrics of tests, in order.
        timing: seconds of each stretch of steps.
    """

    name: str
    told: dict[str, Any]
    train: list[dict[str, Any]]
    test: list[dict[str, Any]]
    timing: list[dict[str, Any]]


def load(folder: Path) -> Run:
    """Reads a run's files.

    Raises:
        ValueError: the folder holds no run; the message names it.
    """
    try:
        told = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        metrics, timing = (_lines(folder / name) for name in ("metrics.jsonl", "timing.jsonl"))
    except (OSError, ValueError) as error:
        raise ValueError(f"'{folder}' holds no run that can be read ({error})") from error
    return Run(
        folder.name or str(folder), told,
        [line for line in metrics if line["kind"] == "train"],
        [line for line in metrics if line["kind"] == "test"],
        timing,
    )  # fmt: skip


def _lines(file: Path) -> list[dict[str, Any]]:
    # The last line of a run that is going on may not be whole.
    return [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1]]


def render(runs: Sequence[Run]) -> str:
    """Renders the page.

    Args:
        runs: the run itself, then those to show beside it.

    Returns:
        HTML text that needs no other file; what the runs' files hold is escaped.
    """
    environment = templates()
    environment.filters |= {"percent": _percent}
    pictures = {
        theme: base64.b64encode(to_png(figure(runs, colours_of(theme)))).decode()
        for theme in ("light", "dark")
    }
    return environment.get_template("training.html").render(
        run=runs[0],
        pictures=pictures,
        rows=[_row(run) for run in runs],
        phases=_phases(runs[0]),
        names=PHASES,
        told=_flat(runs[0].told),
    )


def figure(runs: Sequence[Run], colours: Theme) -> Figure:
    """Loss and error of each run over its epochs, and the learning rate.

    Args:
        runs: at most eight can be told apart.
        colours: of a theme.
    """
    made = Figure(figsize=(9, 7), layout="constrained", facecolor=colours.paper)
    loss, error, rate = made.subplots(3, 1, sharex=True, height_ratios=(3, 3, 1))
    shades = (colours.fused, colours.eager, colours.bare, colours.failed)
    for number, run in enumerate(runs):
        look = {"color": shades[number % 4], "linestyle": _STYLES[number // 4 % 4]}
        # Curves of equal runs lie upon each other: the first one shows on both sides.
        wide = {"linewidth": 1.2 if number else 3.5, "marker": "o", "markersize": 3}
        steps = [(_epoch(run, line["step"]), line) for line in run.train]
        loss.plot([x for x, _ in steps], [line["loss"] for _, line in steps],
                  linewidth=1, alpha=0.55, **look)  # fmt: skip
        tests = [(line["epoch"], line) for line in run.test]
        loss.plot([x for x, _ in tests], [line["loss"] for _, line in tests],
                  label=f"{run.name}, test", **wide, **look)  # fmt: skip
        error.plot([x for x, _ in tests], [100 * (1 - line["top1"]) for _, line in tests],
                   label=f"{run.name}, test", **wide, **look)  # fmt: skip
        known = [(x, line) for x, line in steps if "top1" in line]
        error.plot([x for x, _ in known], [100 * (1 - line["top1"]) for _, line in known],
                   linewidth=1, alpha=0.55, **look)  # fmt: skip
        rate.plot([x for x, _ in steps], [line["lr"] for _, line in steps], linewidth=1, **look)
    loss.set(ylabel="cross entropy", yscale="log")
    error.set(ylabel="top-1 error, %", ylim=(0, None))
    rate.set(ylabel="learning rate", xlabel="epoch")
    rate.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in (loss, error, rate):
        axis.set_facecolor(colours.paper)
        axis.tick_params(colors=colours.quiet)
        axis.grid(color=colours.line, linewidth=0.6)
        axis.xaxis.label.set_color(colours.ink)
        axis.yaxis.label.set_color(colours.ink)
        for spine in axis.spines.values():
            spine.set_color(colours.line)
    if any(run.test for run in runs):
        loss.legend(labelcolor=colours.ink, facecolor=colours.paper, edgecolor=colours.line)
    return made


def _epoch(run: Run, step: int) -> float:
    recipe = run.told["recipe"]
    return step / max(run.told["images"] // recipe["batch_size"], 1)


def _row(run: Run) -> dict[str, Any]:
    """A run in a line of the table."""
    best = max(run.test, key=lambda line: line["top1"], default=None)
    seconds = sum(line["seconds"] for line in run.timing)
    images = sum(line["seconds"] * line["images_per_second"] for line in run.timing)
    return {
        "name": run.name,
        "model": run.told["model"],
        "impl": run.told["impl"],
        "seed": run.told["seed"],
        "epochs": run.test[-1]["epoch"] if run.test else 0,
        "of": run.told["recipe"]["epochs"],
        "top1": run.test[-1]["top1"] if run.test else None,
        "best": best["top1"] if best else None,
        "best_epoch": best["epoch"] if best else None,
        "loss": run.train[-1]["loss"] if run.train else None,
        "rate": images / seconds if seconds else None,
    }


def _phases(run: Run) -> dict[str, float]:
    """Each phase's share of the time."""
    seconds = sum(line["seconds"] for line in run.timing)
    if not seconds:
        return {}
    return {name: sum(line.get(name, 0.0) for line in run.timing) / seconds for name in PHASES}


def _flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for key, item in value.items():
        if isinstance(item, dict):
            found += _flat(item, f"{prefix}{key}.")
        elif isinstance(item, list) and len(item) > 20:
            found.append((f"{prefix}{key}", f"{len(item)} of them"))
        else:
            found.append((f"{prefix}{key}", json.dumps(item, ensure_ascii=False)))
    return found


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{value:.2%}"
