"""The plots of a benchmark: nothing empty, nothing cut off, no text on another, whatever is drawn.

The records are examples (`bench_records`): no machine measured them.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from typing import Any

import bench_records
import numpy
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image

from resnet_fused.report import plot_data, plot_layers, plot_peers, plot_roofline, plots
from resnet_fused.report.theme import DARK, LIGHT, THEMES, colours_of, fit, width_of, wrap

FIGURES: dict[str, Callable[..., Figure]] = {
    "roofline": plot_roofline.figure,
    "waterfall": plot_layers.figure,
    "peers": plot_peers.figure,
    "memory": plot_peers.memory_figure,
}
LEAST_INK = 1e-4  # of an axis, in a colour of the data: less than one row's two marks

Record = dict[str, Any]


def _drawn(
    figure: Figure, monkeypatch: pytest.MonkeyPatch, dpi: int = 80
) -> tuple[numpy.ndarray, list[tuple[str, Bbox]]]:
    """The figure's pixels, and each text that was drawn with its box in them."""
    texts, draw = [], Text.draw

    def noting(self: Text, renderer: Any, *rest: Any, **options: Any) -> None:
        if self.get_visible() and self.get_text().strip():
            texts.append((self.get_text(), Text.get_window_extent(self, renderer)))
        draw(self, renderer, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Text, "draw", noting)
        figure.set_dpi(dpi)
        figure.canvas.draw()
    return numpy.asarray(figure.canvas.buffer_rgba())[..., :3], texts


def _text_faults(figure: Figure, texts: list[tuple[str, Bbox]]) -> list[str]:
    """Texts that reach outside of the figure, and pairs that overlap, half a pixel allowed."""
    wide, high = figure.bbox.width + 0.5, figure.bbox.height + 0.5
    found = [
        f"outside: {text!r} {box.extents.round()}"
        for text, box in texts
        if box.x0 < -0.5 or box.y0 < -0.5 or box.x1 > wide or box.y1 > high
    ]
    boxes = numpy.array([box.extents for _, box in texts])
    for (i, (one, _)), (j, (other, _)) in itertools.combinations(enumerate(texts), 2):
        across = min(boxes[i, 2], boxes[j, 2]) - max(boxes[i, 0], boxes[j, 0])
        along = min(boxes[i, 3], boxes[j, 3]) - max(boxes[i, 1], boxes[j, 1])
        if across > 0.5 and along > 0.5:
            found.append(f"overlap: {one!r} and {other!r}")
    return found


def _ink(axis: Axes, pixels: numpy.ndarray, theme: str = "light") -> float:
    """The fraction of an axis' pixels that have a colour of the data, and not the paper's."""
    colours, box = THEMES[theme], axis.bbox.extents.round().astype(int)
    high = pixels.shape[0]
    inside = pixels[high - box[3] : high - box[1], box[0] : box[2]].astype(int)
    marked = numpy.zeros(inside.shape[:2], bool)
    # The edges of a roofline's dark line pass through the grey of the bars.
    bars = (colours.bare,) if axis.patches or axis.get_xscale() == "linear" else ()
    for colour in (colours.fused, colours.eager, *bars):
        shade = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        marked |= numpy.abs(inside - shade).sum(-1) < 60
    return float(marked.mean())


def _faults(figure: Figure, monkeypatch: pytest.MonkeyPatch, theme: str = "light") -> list[str]:
    pixels, texts = _drawn(figure, monkeypatch)
    empty = [
        f"empty: {axis.get_title(loc='left')}"
        for axis in figure.axes
        if _ink(axis, pixels, theme) < LEAST_INK
    ]
    return _text_faults(figure, texts) + empty


@pytest.mark.parametrize("made", bench_records.EXTREMES)
@pytest.mark.parametrize("name", FIGURES)
def test_nothing_is_empty_cut_or_overlaid(
    name: str, made: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = bench_records.EXTREMES[made]()
    if name == "waterfall" and made == "kernel":
        with pytest.raises(plots.NothingToDrawError, match="no model level in this record"):
            FIGURES[name](record, LIGHT)
        return
    figure = FIGURES[name](record, LIGHT)
    assert figure.axes
    assert _faults(figure, monkeypatch) == []


def test_the_checks_of_a_figure_bite(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plot without its points, a label outside, a label on a label."""
    with monkeypatch.context() as patch:
        patch.setattr(plot_roofline, "_draw_points", lambda *arguments: None)
        bare = plot_roofline.figure(bench_records.one_kernel(), LIGHT)
        assert [fault[:6] for fault in _faults(bare, monkeypatch)] == ["empty:"]
    figure = plot_roofline.figure(bench_records.one_kernel(), LIGHT)
    figure.text(0.95, 0.5, "a label that leaves the figure")
    assert [fault[:8] for fault in _faults(figure, monkeypatch)] == ["outside:"]
    figure = plot_peers.memory_figure(bench_records.one_kernel(), LIGHT)
    title = figure.axes[0].get_window_extent()
    figure.text(title.x0 / figure.bbox.width, 0.5, "a label that covers what the bars say")
    assert any(fault.startswith("overlap:") for fault in _faults(figure, monkeypatch))


def _png(record: Record, name: str, theme: str) -> numpy.ndarray:
    made = getattr(plots, name)(record, theme)
    image = Image.open(io.BytesIO(made))
    assert image.format == "PNG"
    return numpy.asarray(image.convert("RGB"))


@pytest.mark.parametrize("name", FIGURES)
def test_a_png_has_the_colours_of_its_theme(name: str) -> None:
    theme = "dark" if name in ("roofline", "peers") else "light"
    pixels = _png(bench_records.one_model(), name, theme)
    paper = [int(THEMES[theme].paper[i : i + 2], 16) for i in (1, 3, 5)]
    background = (pixels == paper).all(-1).mean()
    assert 0.4 < background < 0.995, background


def test_a_record_draws_the_same_bytes_again() -> None:
    assert plots.memory(bench_records.one_kernel(), "light") == plots.memory(
        bench_records.one_kernel()
    )
    assert plots.memory(bench_records.one_kernel(), "dark") != plots.memory(
        bench_records.one_kernel()
    )


def test_a_theme_that_is_none_is_named() -> None:
    with pytest.raises(ValueError, match="theme: expected one of light, dark, got 'sepia'"):
        plots.memory(bench_records.one_kernel(), "sepia")
    assert colours_of("dark") is DARK


def test_an_empty_record_says_what_it_lacks() -> None:
    empty = bench_records.record([])
    for name, text in (
        ("roofline", "--level kernel"), ("waterfall", "--level model"), ("peers", "has a variant"),
        ("memory", "peak of memory"),
    ):  # fmt: skip
        with pytest.raises(plots.NothingToDrawError, match=text):
            getattr(plots, name)(empty)


def _words(figure: Figure) -> str:
    texts = [text.get_text() for text in figure.findobj(Text)]
    return "\n".join(texts)


def test_what_is_wrong_or_left_out_is_named() -> None:
    record = bench_records.one_kernel()
    record["rows"][0]["variants"]["cudnn"] = {"wrong": "max error 3.2x the bound"}
    words = _words(plot_peers.figure(record, LIGHT))
    assert "wrong: no time (max error 3.2x the bound)" in words
    assert "left out: tensorrt: not installed" in words


def test_the_bars_say_the_records_numbers() -> None:
    row = bench_records.one_model()["rows"][0]
    words = _words(plot_peers.figure(bench_records.one_model(), LIGHT))
    assert plot_data.AGAIN not in words
    for name, variant in row["variants"].items():
        if name != plot_data.AGAIN:
            assert f"{plot_data.say(variant['images_per_s'])} images/s" in words
    kernel = bench_records.one_kernel()["rows"][0]
    words = _words(plot_peers.figure(bench_records.one_kernel(), LIGHT))
    pair = plot_data.ratio(kernel, "fused")
    assert pair is not None
    assert f"{pair['median']:.2f}x ({pair['low']:.2f} .. {pair['high']:.2f})" in words


def test_the_roofline_has_two_places_for_every_row_and_layer() -> None:
    made = bench_records.example(levels=("kernel", "model"), batches=(256,))
    kernels, models = plot_roofline.figure(made, LIGHT).axes

    def places(axis: Axes) -> int:
        marks = [line for line in axis.lines if line.get_marker() in ("o", "D")]
        return sum(len(line.get_xdata()) for line in marks)

    assert places(kernels) == 2 * 69
    assert places(models) == 2 * (54 + 2)  # the layers of the one in inference, and both wholes
    row = made["rows"][0]
    eager = row["variants"]["eager"]["median_s"]
    x, y = next(line for line in kernels.lines if line.get_marker() == "o").get_data()
    assert x[0] == pytest.approx(row["limit"]["flops"] / row["limit"]["eager_bytes"])
    assert y[0] == pytest.approx(row["limit"]["flops"] / eager)


def test_the_waterfall_ends_where_the_layers_do() -> None:
    row = bench_records.one_model()["rows"][0]
    axis = plot_layers.figure(bench_records.one_model(), LIGHT).axes[0]
    assert len(axis.get_yticks()) == 54
    ends = {1e3 * sum(row["variants"][name]["layer_s"].values()) for name in ("eager", "fused")}
    reached = [bar.get_x() + bar.get_width() for bar in axis.patches]
    assert max(reached) == pytest.approx(max(ends))
    assert min(abs(end - min(ends)) for end in reached) < 1e-9 * max(ends)


def test_the_waterfall_falls_back_to_the_limit_and_says_so() -> None:
    record = bench_records.one_model()
    for variant in record["rows"][0]["variants"].values():
        variant.pop("layer_s", None)
    figure = plot_layers.figure(record, LIGHT)
    assert "the limit by layer, no variant has times" in figure.axes[0].get_title(loc="left")
    assert "not a measurement" in _words(figure)


@pytest.mark.parametrize(
    ("value", "said"),
    [(None, "none"), (0, "0.00"), (1234.5, "1,234"), (12.345, "12.3"), (0.01234, "0.0123"),
     (2.5e-9, "2.50e-09"), (-3.14159, "-3.14")],
)  # fmt: skip
def test_numbers_keep_three_digits(value: float | None, said: str) -> None:
    assert plot_data.say(value) == said


def test_units_are_the_largest_that_leave_a_one() -> None:
    assert plot_data.say(7.9e14, plot_data.FLOPS) == "790 TFLOP/s"
    assert plot_data.say(2.0**30, plot_data.BYTES) == "1.00 GiB"
    assert plot_data.say(5.0, plot_data.BYTES) == "0.00488 KiB"


def test_texts_fit_where_they_shall() -> None:
    long = "W" * 300 + " " + "i" * 300
    assert width_of(fit(long, 2.0)) <= 2.0
    assert all(width_of(line) <= 3.0 for line in wrap(long, 3.0))
    assert fit("short", 2.0) == "short"
    assert wrap("", 3.0) == []
