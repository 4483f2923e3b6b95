"""The README and the docs: their code runs, their links lead somewhere, their commands exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import resnet_fused as rf

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[str]:
    return PYTHON.findall(page.read_text(encoding="utf-8"))


def stripped(text: str) -> str:
    return "\n".join(line.strip() for line in text.splitlines())


def run_blocks(page: Path, small: dict[str, str]) -> dict[str, Any]:
    """Runs a page's Python blocks one after the other in one namespace, on smaller inputs."""
    namespace: dict[str, Any] = {"__name__": page.stem}
    for number, code in enumerate(blocks(page)):
        for large, smaller in small.items():
            code = code.replace(large, smaller)
        exec(compile(code, f"{page.name} block {number}", "exec"), namespace)
    return namespace


def test_readme_example(capsys: pytest.CaptureFixture[str]) -> None:
    text = "".join(blocks(ROOT / "README.md"))
    assert text.count("3, 224, 224") == 1  # what the test makes smaller
    torch.manual_seed(0)
    names = run_blocks(ROOT / "README.md", {"3, 224, 224": "3, 64, 64"})
    with torch.inference_mode():
        expected = names["plain"].double()(names["x"].double())
    torch.testing.assert_close(names["scores"].double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(names["same"].double(), expected, rtol=1e-4, atol=1e-4)
    assert names["result"].ok
    printed = capsys.readouterr().out
    for layer in ("layer1.0.conv1", "layer4.2.conv3", "layer2.0.downsample.0"):
        assert printed.count(layer) >= 2, layer  # in explain's table and in verify's


def test_readme_example_is_short() -> None:
    lines = [line for line in blocks(ROOT / "README.md")[0].splitlines() if line.strip()]
    assert len(lines) <= 12


@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.name != "README.md" and blocks(p)], ids=lambda p: p.name
)
def test_code_in_docs_runs(page: Path) -> None:
    torch.manual_seed(0)
    run_blocks(page, {})


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_excerpts_are_in_the_files_they_name(page: Path) -> None:
    """A block opened with a language and a path is a part of that file."""
    excerpt = re.compile(r"^ *```\S+ (\S+)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
    found = excerpt.findall(page.read_text(encoding="utf-8"))
    assert found or page.name != "adding_an_op.md"
    for path, code in found:
        file = (ROOT / path).read_text(encoding="utf-8")
        assert stripped(code) in stripped(file), (path, code)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    headings = {
        re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-")
        for h in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }
    targets = re.findall(r"\[[^\]]+\]\(([^)\s]+)\)", text)
    for target in targets:
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        if path:
            assert (page.parent / path).exists(), target
        else:
            assert anchor in headings, target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_paths_in_backticks_exist(page: Path) -> None:
    """A file of the repository that a page names, such as `resnet_fused/ops/bn_act.py`."""
    pattern = re.compile(r"`((?:csrc|resnet_fused|tests|docs|tools|benchmarks)/[\w/.\-]+\.\w+)`")
    for path in pattern.findall(page.read_text(encoding="utf-8")):
        assert (ROOT / path).exists(), path


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for page in PAGES:
        for target in re.findall(r"\bmake ([a-z][\w-]*)", page.read_text(encoding="utf-8")):
            assert re.search(rf"^{target}\b.*:", makefile, re.MULTILINE), (page.name, target)


def test_commands_exist() -> None:
    from resnet_fused.cli import main

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^resnet-fused (\w+)", text, re.MULTILINE))
    assert named == set(main.list_commands(None))


def test_public_names_exist() -> None:
    """Every `rf.name` that a page mentions."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name in set(re.findall(r"\brf((?:\.[a-zA-Z]\w*)+)", text)):
            target: Any = rf
            for part in name.strip(".").split("."):
                assert hasattr(target, part), (page.name, f"rf{name}")
                target = getattr(target, part)


def test_networks_of_the_readme_are_the_table() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith("| networks |"))
    assert re.findall(r"`(\w*(?:resne|plain)\w+)`", row) == rf.models.list_models()
