"""The report: a real small run is drawn and rendered, then each thing that can go wrong in it."""

from __future__ import annotations

import copy
import html.parser
import io
import math
from typing import Any

import numpy
import pytest
from PIL import Image

from resnet_fused.cli._output import plain
from resnet_fused.report import draw, render
from resnet_fused.report.picture import DARK, LIGHT


def _layer(name: str, use: float | None, ok: bool = True) -> dict[str, Any]:
    return {
        "layer": name, "pattern": "conv+bn+relu", "implementation": "cpu", "rounding": "folded",
        "shape": [2, 8, 4, 4], "error": use, "bound_use": use, "beyond": int(not ok), "ok": ok,
    }  # fmt: skip


def _timing(batch: int, refusal: str | None = None) -> dict[str, Any]:
    ratio = {
        "baseline": "eager", "variant": "fused", "median": 1.25, "low": 1.2, "high": 1.31,
        "confidence": 0.96, "rounds": 3,
    }  # fmt: skip
    return {
        "batch": batch,
        "dtype": "float32",
        "seconds": {"eager": [0.5, 0.52, 0.51], "fused": [0.4, 0.41, 0.43]},
        "median_s": {"eager": 0.51, "fused": 0.41},
        "spread": {"eager": 0.02, "fused": None},
        "images_per_s": {"eager": batch / 0.51, "fused": batch / 0.41},
        "ratios": [ratio],
        "verdicts": ["fused is at least 1.00x as fast as eager"],
        "omitted": {"bare": "no oneDNN <here>"},
        "prediction": {"eager_s": 0.3, "fused_s": 0.2, "gain": 1.5},
        "load": {"foreign": 0.012, "cores": 2},
        "refusal": refusal,
    }


@pytest.fixture
def content() -> dict[str, Any]:
    """A record as `verify --json` writes it, with a name that would break careless HTML."""
    return {
        "model": "resnet18",
        "weights": "random (seed 0)",
        "calibration": "The weights are random. BatchNorm was calibrated.",
        "images": "2 crops of <b>bold</b>.jpg",
        "device": "cpu",
        "date": "2026-01-02T03:04:05+00:00",
        "commit": None,
        "versions": {"torch": "2.13.0", "timm": None},
        "machine": {
            "cpu": "A processor", "cores": 2, "cpu_capability": "AVX2", "threads": 2,
            "memory_gib": 8.0, "gpus": [],
        },
        "verification": {
            "ok": True,
            "failures": [],
            "dtype": "float32",
            "input_shape": [2, 3, 32, 32],
            "layers": [_layer("conv1", 0.25), _layer("layer1.0.conv1", 0.5)],
            "blocks": [
                {"block": "layer1.0", "fused_rms": 1e-7, "eager_rms": 2e-7, "ratio": 0.5,
                 "limit": 1.5, "ok": True}
            ],
            "end_to_end": {
                "fused_rms": 1e-6, "eager_rms": 1e-6, "ratio": 1.0, "fused_max": 2e-6,
                "eager_max": 2e-6, "limit": 3.0, "top1_agree": None, "ok": True,
            },
            "not_judged": [],
        },
        "explanation": {
            "backend": "auto",
            "source": "default",
            "counts": {"cpu": 2},
            "rows": [
                {"layer": "conv1", "pattern": "conv+bn+relu", "implementation": "cpu", "why": "ok"}
            ],
        },
        "timings": [_timing(1), _timing(8)],
        "report": None,
    }  # fmt: skip


class _Balanced(html.parser.HTMLParser):
    """Fails on tags that are not closed in order."""

    void = frozenset({"meta", "img", "source", "br", "link"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "srcset", "href")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def _parsed(page: str) -> _Balanced:
    parser = _Balanced()
    parser.feed(page)
    assert parser.open == []
    return parser


def _pixels(png: bytes) -> numpy.ndarray:
    return numpy.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def _shade(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def _holds(png: bytes, colour: str) -> bool:
    return bool((_pixels(png) == _shade(colour)).all(-1).any())


def test_the_page_stands_alone_and_is_well_formed(content: dict[str, Any]) -> None:
    page = render(content)
    parser = _parsed(page)
    assert len(parser.links) == 2
    assert all(link.startswith("data:image/png;base64,") for link in parser.links)
    assert "<script" not in page


def test_the_page_says_what_was_found(content: dict[str, Any]) -> None:
    page = render(content)
    for text in (
        "every check passed", "BatchNorm was calibrated", "0.50", "layer1.0.conv1",
        "1.25 \N{MULTIPLICATION SIGN}",
        "A processor", "timm not installed", "commit unknown", "fused is at least 1.00x",
    ):  # fmt: skip
        assert text in page, text
    assert "<b>bold</b>" not in page
    assert "&lt;b&gt;bold&lt;/b&gt;" in page
    assert "no oneDNN &lt;here&gt;" in page


def test_a_failure_is_shown(content: dict[str, Any]) -> None:
    verification = content["verification"]
    verification |= {"ok": False, "failures": ["layer conv1 is off by 3"]}
    verification["layers"][0] = _layer("conv1", 3.0, ok=False)
    page = render(content)
    assert "1 checks failed" in page
    assert "layer conv1 is off by 3" in page
    before = copy.deepcopy(content)
    before["verification"]["layers"][0] = _layer("conv1", 3.0, ok=True)
    failed = (_pixels(draw(content)) == _shade(LIGHT.failed)).all(-1).sum()
    assert failed > 1.5 * (_pixels(draw(before)) == _shade(LIGHT.failed)).all(-1).sum()


def test_a_refused_verdict_is_shown(content: dict[str, Any]) -> None:
    quiet = draw(content)
    content["timings"] = [_timing(1, refusal="other programs used 40% of the cores"), _timing(8)]
    assert "no verdict" in render(content)
    assert (_pixels(draw(content)) == _shade(LIGHT.failed)).all(-1).sum() > (
        _pixels(quiet) == _shade(LIGHT.failed)
    ).all(-1).sum()


def test_numbers_that_are_none_are_drawn_and_named(content: dict[str, Any]) -> None:
    verification = content["verification"]
    verification["layers"][0] = _layer("conv1", math.nan, ok=False)
    verification["blocks"][0] |= {"ratio": math.inf, "ok": False}
    verification["end_to_end"] |= {"ratio": math.nan, "ok": False}
    page = render(plain(content))
    _parsed(page)
    assert page.count("none") >= 3
    assert ">nan" not in page.lower()


def test_no_layers_no_timings(content: dict[str, Any]) -> None:
    content["timings"] = []
    content["verification"] |= {"layers": [], "blocks": []}
    content["explanation"] |= {"rows": [], "counts": {}}
    _parsed(render(content))


def test_both_themes_are_drawn_and_repeat(content: dict[str, Any]) -> None:
    light, dark = draw(content, "light"), draw(content, "dark")
    assert _holds(light, LIGHT.paper)
    assert not _holds(light, DARK.paper)
    assert _holds(dark, DARK.paper)
    assert not _holds(dark, LIGHT.paper)
    assert draw(content, "light") == light


def test_the_picture_grows_with_what_it_shows(content: dict[str, Any]) -> None:
    tall = _pixels(draw(content)).shape
    content["timings"] = []
    assert _pixels(draw(content)).shape[0] < tall[0]
