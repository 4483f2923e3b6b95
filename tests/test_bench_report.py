"""The page of a benchmark: every number is the record's, it stands alone, and a browser shows it.

The records are examples (`bench_records`): no machine measured them.
"""

from __future__ import annotations

import base64
import html.parser
import io
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bench_records
import chromium
import numpy
import pytest
from PIL import Image

from resnet_fused.report import bench_page

WIDTHS = (375, 1440)
Record = dict[str, Any]


def _png(pixels: numpy.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


UNIFORM = _png(numpy.full((200, 300, 3), 255, numpy.uint8))


def _small() -> Record:
    """A model and two kernels, one of them with a wrong peer."""
    model = bench_records.one_model()
    kernels = bench_records.example(levels=("kernel",), ops=("conv_bn_act",), device="cpu")
    return {**model, "rows": [*model["rows"], *kernels["rows"][1:3]]}


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of the text: pictures cost time."""
    picture = {"light": UNIFORM, "dark": UNIFORM}
    monkeypatch.setattr(bench_page, "_image", lambda draw, record: picture)


class _Page(html.parser.HTMLParser):
    """What a page says: its texts, its `<data>` elements, its links; fails on unbalanced tags."""

    void = frozenset({"meta", "img", "source", "br", "link"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.links: list[str] = []
        self.texts: list[str] = []
        self.numbers: list[tuple[str, str]] = []
        self.counts: list[tuple[str, str]] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        about = dict(attrs)
        self.links += [about[name] or "" for name in ("src", "srcset", "href") if name in about]
        self.texts += [about[name] or "" for name in ("alt", "title") if name in about]
        if tag not in self.void:
            self.open.append((tag, about))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        tag, about = self.open[-1] if self.open else ("", {})
        if tag == "data":
            into = self.counts if about.get("class") == "count" else self.numbers
            into.append((about["value"] or "", data))
        elif tag not in ("style", "script") and data.strip():
            self.texts.append(data)


def _leaves(value: Any) -> Iterator[Any]:
    """Every name and value of a record."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield name
            yield from _leaves(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _is_rounding(text: str, value: float) -> bool:
    """Whether a text is the value, in one of the page's units, to the digits that it shows."""
    digits = text.replace(",", "").lower()
    mantissa, _, exponent = digits.partition("e")
    after = len(mantissa.partition(".")[2])
    half = 0.5000001 * 10.0 ** (int(exponent or 0) - after)
    return any(
        abs(float(digits) - value / size) <= half for size in {*bench_page.UNITS.values(), 1.0}
    )


def _strange_numbers(page: str, record: Record) -> list[str]:
    """Numbers on a page that the record does not hold."""
    read, found = _Page(page), []
    leaves = list(_leaves(record))
    values = {float(v) for v in leaves if isinstance(v, (int, float)) and math.isfinite(v)}
    for value, text in read.numbers:
        if float(value) not in values or not _is_rounding(text, float(value)):
            found.append(f"{text} for {value}")
    quotes = sorted({v for v in leaves if isinstance(v, str)}, key=len, reverse=True)
    quoted = re.compile("|".join(re.escape(quote) for quote in quotes if re.search(r"\d", quote)))
    for text in read.texts:
        if re.search(r"\d", quoted.sub("", text)):
            found.append(text)
    rows = len(record["rows"])
    layers = max((len(row["limit"].get("layers", [])) for row in record["rows"]), default=0)
    found += [f"count {text}" for text, _ in read.counts if not 0 <= int(text) <= max(rows, layers)]
    return found


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("made", ["kernel", "model", "absent", "single", "long"])
def test_every_number_is_the_records(made: str) -> None:
    record = bench_records.EXTREMES[made]()
    record["settings"] |= {"batches": [17, 4097], "nothing": [], "deep": [{"a": 5}, {"a": None}]}
    page = bench_page.render(record)
    assert _strange_numbers(page, record) == []
    assert len(_Page(page).numbers) > 20
    text = " ".join(_Page(page).texts)
    assert not re.search(r"\b(nan|inf|None)\b|[<>]", text), text


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("as fast as eager", "1.37 times as fast as eager"),  # a typed number
        ("</h1>", ' <data value="1.37">1.37</data></h1>'),  # one that no record holds
        ("</h1>", ' <data value="412.5">4.13</data></h1>'),  # one of the record, misquoted
        ("</h1>", ' <data class="count" value="99">99</data></h1>'),  # more rows than there are
    ],
)
def test_the_check_of_numbers_bites(old: str, new: str) -> None:
    record = bench_records.one_kernel()
    page = bench_page.render(record)
    assert old in page
    assert len(_strange_numbers(page.replace(old, new, 1), record)) == 1


@pytest.mark.usefixtures("undrawn")
def test_the_page_stands_alone() -> None:
    page = bench_page.render(_small())
    links = _Page(page).links
    assert links
    assert all(link.startswith("data:image/png;base64,") for link in links)
    assert "default-src 'none'" in page
    assert not re.search(r"https?://|@import|url\(", page)


@pytest.mark.usefixtures("undrawn")
def test_the_page_says_what_the_record_holds() -> None:
    record = _small()
    record["rows"][0]["load"]["clocks"] = {"before": {"sm": 1234}}
    record["rows"][0]["variants"]["fused"]["note"] = "capture refused"
    said = " ".join(_Page(bench_page.render(record)).texts)
    row = record["rows"][0]
    for text in (
        "Benchmark on Example processor", record["command"], record["commit"], "AVX512",
        "wrong: no time", "max error 3.2x the bound", "tensorrt", "needs a build from source",
        *row["variants"], *row["verdicts"], "example_fused_kernel", "perf_counter",
        "0123456789abcdef", "before sm", "capture refused", "No block level in this record",
    ):  # fmt: skip
        assert text in said, text


@pytest.mark.usefixtures("undrawn")
def test_the_headline_is_the_records_ratio_and_a_count_of_wins() -> None:
    record = _small()
    ratio = next(r for r in record["rows"][0]["ratios"] if r["variant"] == "fused")
    for pair in (r for row in record["rows"][1:] for r in row["ratios"]):
        pair |= {"median": 1.1, "low": 0.9, "high": 1.2}
    winner = next(r for r in record["rows"][2]["ratios"] if r["variant"] == "fused")
    winner |= {"median": 2.0, "low": 1.9}
    page = bench_page.render(record)
    cards = page[page.index('<section class="cards">') : page.index("</section>") + 10]
    assert f'<data value="{ratio["median"]!r}">{ratio["median"]:.2f}</data>' in cards
    assert _Page(cards).counts == [("1", "1"), ("2", "2")]


@pytest.mark.usefixtures("undrawn")
def test_doubts_are_said_first() -> None:
    record = _small()
    record |= {"complete": False, "reached": 3, "of": 53, "stopped": "the device went away",
               "failed": {"kernel/x": "out of memory"}}  # fmt: skip
    record["rows"][0]["load"]["quiet"] = False
    page = bench_page.render(record)
    header = page[page.index("<header>") : page.index("</header>") + 9]
    head = " ".join(" ".join(_Page(header).texts).split())
    for text in ("cut short", "the device went away", "out of memory", "machine was busy",
                 "onednn was wrong"):  # fmt: skip
        assert text in head, text
    assert "no verdict, the machine was busy" in page
    assert "cut short" not in bench_page.render(_small())


@pytest.mark.usefixtures("undrawn")
def test_whatever_a_record_holds_is_escaped() -> None:
    record = bench_records.one_kernel()
    evil = "<script>alert(1)</script>"
    record |= {"command": evil, "commit": evil}
    row = record["rows"][0]
    row["subject"]["name"] = row["key"] = evil
    row["variants"][evil] = {"wrong": evil}
    row["omitted"][evil] = evil
    row["verdicts"] = [evil]
    page = bench_page.render(record)
    assert evil not in page
    assert page.count("<script>") == 1
    assert page.count("&lt;script&gt;") >= 8


def test_an_empty_record_says_why_each_part_is_empty() -> None:
    record = bench_records.record([])
    record |= {"machine": {}, "versions": {}, "ceilings": {}, "command": None}
    page = bench_page.render(record)
    said = " ".join(_Page(page).texts)
    assert "<figure>" not in page
    for text in (
        "no row of this record compares fused with eager",
        "No model level in this record: resnet-fused bench --level model",
        "No block level in this record: resnet-fused bench --level block",
        "No kernel level in this record: resnet-fused bench --level kernel",
        "FLOPs, bytes and a time", "no variant in this record has a peak", "has no machine",
        "has no versions", "has no ceilings", "does not say the command",
    ):  # fmt: skip
        assert text in said, text


@pytest.mark.parametrize("given", [{"schema": 1}, {}, None])
def test_another_schema_is_refused(given: Any) -> None:
    with pytest.raises(ValueError, match="record: expected one of schema 2, got schema"):
        bench_page.render(given)


# What a browser sees.


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Browser]:
    found = chromium.path()
    if found is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with chromium.Browser(found, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole page of a small record, with its pictures."""
    page = tmp_path_factory.mktemp("page") / "bench.html"
    page.write_text(bench_page.render(_small()), encoding="utf-8")
    return page


MEASURE = """(async () => {
  for (const fold of document.querySelectorAll("details")) fold.open = true;
  const images = [];
  for (const image of document.images) {
    await image.decode().catch(() => {});
    const box = image.getBoundingClientRect();
    let shades = 0;
    if (image.naturalWidth) {
      const canvas = document.createElement("canvas");
      canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
      const brush = canvas.getContext("2d");
      brush.drawImage(image, 0, 0);
      const all = brush.getImageData(0, 0, canvas.width, canvas.height).data;
      shades = new Set(new Uint32Array(all.buffer)).size;
    }
    images.push({alt: image.alt, wide: image.naturalWidth, shades, shown: box.width * box.height,
                 box: [box.left + scrollX, box.top + scrollY, box.width, box.height]});
  }
  const beyond = [...document.querySelectorAll("main *")].filter(element =>
    element.getBoundingClientRect().right > innerWidth + 1 && !element.closest(".scroll, .plot"));
  return {inner: innerWidth, scroll: document.documentElement.scrollWidth, images,
          beyond: beyond.map(element => element.outerHTML.slice(0, 80)),
          fetched: performance.getEntriesByType("resource").map(entry => entry.name)
                   .filter(name => !name.startsWith("data:"))};
})()"""


def _problems(
    browser: chromium.Browser, page: Path, width: int, height: int | None = None, **how: Any
) -> tuple[list[str], numpy.ndarray]:
    """What is wrong with a page at a width, and its screenshot (the first `height` pixels)."""
    browser.open(page, width, **how)
    seen = browser.evaluate(MEASURE)
    shot = numpy.asarray(Image.open(io.BytesIO(browser.screenshot(height))).convert("RGB"))
    found = [f"beyond the edge: {element}" for element in seen["beyond"]]
    found += [f"fetched: {name}" for name in seen["fetched"]]
    if seen["scroll"] > seen["inner"]:
        found.append(f"overflow: {seen['scroll']} px in {seen['inner']}")
    for image in seen["images"]:
        left, top, wide, high = (round(value) for value in image["box"])
        pixels = shot[top + 2 : top + high - 2, max(0, left) + 2 : left + wide - 2]
        if not image["wide"]:
            found.append(f"no picture: {image['alt']}")
        elif image["shades"] < 20:
            found.append(f"uniform: {image['alt']}")
        elif not pixels.size or pixels.std() < 1:
            found.append(f"not shown: {image['alt']}")
    if not seen["images"]:
        found.append("no pictures at all")
    return found, shot


@pytest.mark.parametrize("width", WIDTHS)
def test_a_browser_shows_the_page_whole(browser: chromium.Browser, drawn: Path, width: int) -> None:
    found, shot = _problems(browser, drawn, width, dark=width < 600)
    assert found == []
    assert shot.shape[1] == width
    # Dark paper where the system is dark.
    assert bool(shot.mean() < 100) is (width < 600)


def test_the_page_prints_whole(browser: chromium.Browser, drawn: Path) -> None:
    found, _ = _problems(browser, drawn, 794, media="print")
    assert found == []


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("width", WIDTHS)
def test_no_name_is_too_long_for_the_page(
    browser: chromium.Browser, width: int, tmp_path: Path
) -> None:
    page = tmp_path / "long.html"
    page.write_text(bench_page.render(bench_records.long()), encoding="utf-8")
    found, _ = _problems(browser, page, width, 900)
    assert [problem for problem in found if not problem.startswith("uniform")] == []


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("</header>", '<div style="width:3000px">wide</div></header>', "overflow"),
        ("</header>", '<p style="margin-left:2000px">x</p></header>', "beyond the edge"),
        (UNIFORM, "bm9uZQ==", "no picture"),
        ("", "", "uniform"),  # the white picture that stands for all of them here
    ],
)
def test_the_browsers_check_bites(
    browser: chromium.Browser, old: str, new: str, said: str, tmp_path: Path
) -> None:
    page = tmp_path / "planted.html"
    page.write_text(
        bench_page.render(bench_records.one_kernel()).replace(old, new), encoding="utf-8"
    )
    found, _ = _problems(browser, page, 375)
    assert any(problem.startswith(said) for problem in found), found


def test_a_picture_that_is_not_shown_is_noticed(
    browser: chromium.Browser, drawn: Path, tmp_path: Path
) -> None:
    page = tmp_path / "hidden.html"
    text = drawn.read_text(encoding="utf-8")
    page.write_text(text.replace("<img ", '<img style="opacity:0" '), encoding="utf-8")
    found, _ = _problems(browser, page, 1440)
    assert found
    assert all(problem.startswith("not shown") for problem in found)


@pytest.mark.usefixtures("undrawn")
def test_a_click_sorts_a_table(browser: chromium.Browser, tmp_path: Path) -> None:
    page = tmp_path / "sorted.html"
    made = bench_records.example(levels=("kernel",), ops=("conv_bn_act",))
    page.write_text(bench_page.render(made), encoding="utf-8")
    browser.open(page, 1440)
    column = """[...document.querySelector("table.sorted").tBodies[0].rows]
      .map(row => Number(row.cells[1].querySelector("data").value))"""
    before = browser.evaluate(column)
    click = 'document.querySelectorAll("table.sorted thead th")[1].click()'
    browser.evaluate(click)
    assert browser.evaluate(column) == sorted(before) != before
    browser.evaluate(click)
    assert browser.evaluate(column) == sorted(before, reverse=True)
