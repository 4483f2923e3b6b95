"""The simulation of the batch's order: what it counts, and what docs/freeze.md says of it."""

from __future__ import annotations

import importlib
import itertools
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tool():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module("predict_order")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def pair(tool, lines: int):
    """A step that writes one value, an image a line, and one that reads it and writes another."""
    first, second = (tool.Span(i * lines * tool.LINE, tool.LINE) for i in range(2))
    return [tool.Walk((), (first,), False), tool.Walk((first,), (second,), False)]


def test_what_is_read_from_its_end_is_found(tool):
    """Of 64 lines a cache of 16: forwards all are gone, backwards the last ones are there."""
    walks, held = pair(tool, 64), 16 * tool.LINE
    moved = {
        order: tool.simulated(walks, order, 64, held) // tool.LINE
        for order in itertools.product((False, True), repeat=2)
    }
    # Written in the two steps, 128 lines; read again, 64 of which some are found: those that the
    # results of the same step have not pushed out.
    assert moved[False, False] == moved[True, True] == 128 + 64
    assert moved[False, True] == moved[True, False] == 128 + 64 - 8


def test_what_the_cache_holds_is_not_moved(tool):
    assert tool.simulated(pair(tool, 8), (False, False), 8, 16 * tool.LINE) == 0
    # A line less, and what is longest untouched is what comes next.
    assert tool.simulated(pair(tool, 8), (False, False), 8, 15 * tool.LINE) > 0


def test_the_rules_order_is_worth_its_while(tool):
    walks = tool.walks_of(32)
    forwards, rule, _ = (tool.simulated(walks, of, 32) for of in tool.orders_of(walks).values())
    assert rule < 0.95 * forwards
    assert any(walk.backwards for walk in walks)


def test_the_page_is_up_to_date(tool):
    """Its first line; the others take a minute, and say the same."""
    page = tool.predict_batch1.PAGE.read_text(encoding="utf-8")
    said = page.split(tool.BEGIN)[1].split(tool.END)[0].strip().splitlines()
    assert len(said) == 2 + len(tool.BATCHES)
    assert said[2] == tool.row(tool.BATCHES[0]), f"run python {tool.__file__} --write"
