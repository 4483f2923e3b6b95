"""What is predicted of the frozen engine follows from the code as it is, and is written down."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tool():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module("predict_engine")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def test_the_page_and_the_record_are_up_to_date(tool):
    page = tool.rates.PAGE.read_text(encoding="utf-8")
    assert f"{tool.BEGIN}\n{tool.table()}\n{tool.END}" in page, (
        f"run python {tool.__file__} --write"
    )
    record = json.loads(tool.rates.RECORD.read_text(encoding="utf-8"))
    assert record["spanning"] == tool.rows()
    assert record["engine"] == [tool.engine(batch) for batch in tool.rates.BATCHES]


def test_a_chain_stands_for_what_it_saves(tool):
    """The engine's time is the sum of its parts less what the chosen chains save, one an end."""
    for batch in tool.rates.BATCHES:
        chains = tool.chosen(batch)
        one = tool.engine(batch)
        assert len(chains) == one["chains"] <= 16
        saved = sum(gain for _, _, gain in chains)
        assert all(gain > 0 for _, _, gain in chains)
        assert one["without_chains_us"] - one["us"] == pytest.approx(saved, abs=0.11)
        rows = {(row["op"], row["layer"]): row for row in tool.rows() if row["batch"] == batch}
        for case, us, gain in chains:
            row = rows["conv_chain", tool.name_of(case)]
            assert row["us"] == pytest.approx(us, abs=0.01)
            assert row["parts_us"] - row["us"] == pytest.approx(gain, abs=0.02)
            # Of the two cuts of an end the better one.
            other = rows.get(("conv_chain", tool.name_of(case).replace("_front64", "")), row)
            assert gain >= other["parts_us"] - other["us"] - 0.02


def test_no_prediction_beats_memory(tool):
    for row in tool.rows():
        case = tool.KINDS[row["op"]]
        made = importlib.import_module("resnet_fused.bench.names").case_of(
            case.form, row["layer"], row["batch"]
        )
        least = case.cost(made, tool.DTYPE).bytes / tool.rates.MEMORY * 1e6
        assert row["us"] > 0.999 * least
