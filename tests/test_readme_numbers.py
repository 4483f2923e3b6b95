"""README's numbers come from records, are empty without one, and cannot be typed."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import bench_records
import pytest

ROOT = Path(__file__).resolve().parent.parent
EMPTY = "| | | | |"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    path = ROOT / "tools" / "readme_numbers.py"
    spec = importlib.util.spec_from_file_location("readme_numbers", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def write(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    """Writes an example record of models into a folder; its date and machine can be changed."""
    device = changes.pop("device", "cpu")
    foreign, seed = changes.pop("foreign", 0.01), changes.pop("seed", 0)
    made = bench_records.example(seed, device=device, levels=("model",), foreign=foreign)
    made |= changes
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(made))
    return made


def lines_of(text: str, start: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(start)]


def test_the_readme_is_up_to_date(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["--check"]) == 0, f"run python tools/readme_numbers.py\n{capsys.readouterr()}"


def test_a_typed_number_is_noticed(tool: ModuleType, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    page = f"# Title\n\n{tool.BEGIN}\n{tool.END}\n\nafter\n"
    readme.write_text(page)
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "results")
    where = ["--readme", str(readme), "--results", str(tmp_path / "results")]
    assert tool.main([*where, "--check"]) == 1
    assert readme.read_text() == page  # a check writes nothing
    assert tool.main(where) == 0
    assert tool.main([*where, "--check"]) == 0
    right = readme.read_text()
    assert right.startswith("# Title\n") and right.endswith("\nafter\n")
    first = lines_of(right, "| inference | 1 | float32")[0]
    images = first.split("|")[4].strip()
    readme.write_text(right.replace(f"| {images} |", "| 99.9 |", 1))
    assert tool.main([*where, "--check"]) == 1


def test_without_records_every_cell_is_empty(tool: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "gpu-check.json").write_text('{"schema": 1, "kind": "gpu-check"}')
    text = tool.block(tmp_path, tmp_path)
    rows = [r for r in text.splitlines() if r.startswith(("| inference", "| training"))]
    assert len(rows) == len(tool.LINES)
    assert all(row.endswith(EMPTY) for row in rows)
    assert "x (" not in text


def test_a_record_fills_its_lines(tool: ModuleType, tmp_path: Path) -> None:
    made = write(tmp_path, "gpu/new.json", device="cuda")
    text = tool.block(tmp_path, tmp_path)
    assert "**On one GPU**: Example GPU" in text
    assert "[gpu/new.json](gpu/new.json): 2000-01-01, commit 0000000000, torch 2.15.0" in text
    (line,) = lines_of(text, "| inference | 256 |")
    row = next(r for r in made["rows"] if r["key"] == "model/inference/resnet50/b256/bfloat16")
    cells = [cell.strip() for cell in line.split("|")]
    assert cells[4] == f"{256 / row['variants']['fused']['median_s']:,.0f}"
    ratio = next(r for r in row["ratios"] if (r["baseline"], r["variant"]) == ("eager", "fused"))
    assert cells[5] == f"{ratio['median']:.2f}x ({ratio['low']:.2f} .. {ratio['high']:.2f})"
    medians = {n: v["median_s"] for n, v in row["variants"].items()
               if n not in ("eager", "fused", "fused_again", "triton", "cuda")}  # fmt: skip
    assert cells[7].endswith(min(medians, key=medians.__getitem__))
    compiled = min(s for n, s in medians.items() if n.startswith("inductor"))
    shown = float(cells[6].partition("x")[0])
    assert shown == pytest.approx(compiled / row["variants"]["fused"]["median_s"], rel=0.05)
    assert lines_of(text, "| inference | 1 | float32")[0].endswith(EMPTY)  # no record of a CPU


def test_the_engine_has_lines_of_its_own(tool: ModuleType, tmp_path: Path) -> None:
    made = write(tmp_path, "new.json", device="cuda")
    before = tool.block(tmp_path, tmp_path)
    assert all(row.endswith(EMPTY) for row in lines_of(before, "| inference, frozen |"))
    row = next(r for r in made["rows"] if r["key"] == "model/inference/resnet50/b256/bfloat16")
    fused = row["variants"]["fused"]
    row["variants"]["frozen"] = fused | {
        "samples_s": [s / 2 for s in fused["samples_s"]], "median_s": fused["median_s"] / 2,
    }  # fmt: skip
    (tmp_path / "new.json").write_text(json.dumps(made))
    text = tool.block(tmp_path, tmp_path)
    (plain,), (line,) = (lines_of(text, f"| inference{way} | 256 |") for way in ("", ", frozen"))
    assert plain == lines_of(before, "| inference | 256 |")[0]
    speeds = [float(one.split("|")[4].replace(",", "")) for one in (plain, line)]
    assert speeds[1] == pytest.approx(2 * speeds[0], rel=0.01)
    assert len(lines_of(text, "| training step")) == 2


def test_the_newest_record_counts_and_an_older_one_fills_what_it_lacks(
    tool: ModuleType, tmp_path: Path
) -> None:
    write(tmp_path, "old.json", seed=1, date="2001-01-01T00:00:00+00:00")
    new = write(tmp_path, "new.json", seed=2, date="2002-01-01T00:00:00+00:00")
    whole = tool.block(tmp_path, tmp_path)
    assert "new.json" in whole and "old.json" not in whole
    new["rows"] = [row for row in new["rows"] if row["subject"]["batch"] == 8]
    new |= {"reached": len(new["rows"]), "of": len(new["rows"])}
    (tmp_path / "new.json").write_text(json.dumps(new))
    mixed = tool.block(tmp_path, tmp_path)
    assert mixed.index("new.json") < mixed.index("old.json")
    one, eight = (f"| inference | {batch} | float32" for batch in (1, 8))
    assert lines_of(mixed, eight) == lines_of(whole, eight)
    assert lines_of(mixed, one) != lines_of(whole, one)


def test_another_machine_fills_nothing(tool: ModuleType, tmp_path: Path) -> None:
    machine = {**bench_records.example(levels=(), device="cpu")["machine"], "cpu": "Elsewhere"}
    write(tmp_path, "old.json", date="2001-01-01T00:00:00+00:00", machine=machine)
    new = write(tmp_path, "new.json", date="2002-01-01T00:00:00+00:00")
    new["rows"] = [row for row in new["rows"] if row["subject"]["batch"] == 8]
    new |= {"reached": len(new["rows"]), "of": len(new["rows"])}
    (tmp_path / "new.json").write_text(json.dumps(new))
    text = tool.block(tmp_path, tmp_path)
    assert "Elsewhere" not in text
    assert lines_of(text, "| inference | 1 | float32")[0].endswith(EMPTY)


def test_what_was_measured_on_a_busy_machine_stays_empty(tool: ModuleType, tmp_path: Path) -> None:
    write(tmp_path, "busy.json", foreign=0.2)
    rows = lines_of(tool.block(tmp_path, tmp_path), "| inference")
    assert all(row.endswith(EMPTY) for row in rows)


@pytest.mark.parametrize(
    "page", ["nothing", "{0}{0}{1}", "{1} {0}", "{0}"], ids=["none", "twice", "turned", "open"]
)
def test_marks_that_are_wrong(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], page: str
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(page.format(tool.BEGIN, tool.END))
    assert tool.main(["--readme", str(readme)]) == 2
    assert "expected '<!-- numbers: begin -->'" in capsys.readouterr().err
    assert readme.read_text() == page.format(tool.BEGIN, tool.END)


@pytest.mark.parametrize("content", ["{", '{"kind": "bench", "schema": 9}', '{"kind": "model"}'])
def test_a_broken_record_is_named(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    (tmp_path / "broken.json").write_text(content)
    assert tool.main(["--results", str(tmp_path), "--check"]) == 2
    assert "broken.json" in capsys.readouterr().err
