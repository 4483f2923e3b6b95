"""Bytes by the profiler: its table, and the command with a program in its place."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import traffic  # noqa: E402

HEAD = '"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'
OTHER = '"0","1","kernel","other","byte","1"'
NCU = """#!/bin/sh
case "$*" in *"--cache-control none"*"--clock-control none"*) ;; *) exit 9;; esac
case "$*" in *"--step eager"*) each=1,000,000;; *) each={fused};; esac
echo '==PROF== Connected to process 1'
echo 'layers served by: {served}'
echo '{head}'
for id in 0 1; do
  for metric in dram__bytes_read.sum dram__bytes_write.sum; do
    echo "\\"$id\\",\\"1\\",\\"kernel(int, float)\\",\\"$metric\\",\\"byte\\",\\"$each\\""
  done
done
"""


def stand_in(folder: Path, text: str) -> str:
    made = folder / "ncu"
    made.write_text(text)
    made.chmod(0o755)
    return str(made)


@pytest.mark.parametrize(("fused", "code"), [("470,000", 0), ("600,000", 1)])
def test_the_share_of_eagers_bytes_is_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fused: str, code: int
) -> None:
    ncu = stand_in(tmp_path, NCU.format(fused=fused, head=HEAD, served='{"cuda": 52, "triton": 1}'))
    file = tmp_path / "traffic.json"
    assert traffic.main(["--ncu", ncu, "--batch", "2", "--output", str(file)]) == code
    said = capsys.readouterr().out
    share = float(fused.replace(",", "")) / 1e6
    assert "| eager | 2 | 1.0 | 1.0 | 2.0 |" in said
    assert f"fused moves {share:.3f} of eager's bytes" in said
    assert "in   2 of kernel(int, float)" in said
    assert "convolutions of the fused one: 52 by cuda, 1 by triton" in said
    found = json.loads(file.read_text())
    assert found["ratio"] == pytest.approx(share) and found["batch"] == 2
    assert found["variants"]["eager"]["names"] == {"kernel(int, float)": [2, 4e6]}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("#!/bin/sh\necho ERR_NVGPUCTRPERM; exit 1", "exit code 1: ERR_NVGPUCTRPERM"),
        ("#!/bin/sh\necho '==PROF== nothing'", "it printed no table"),
        (f"#!/bin/sh\necho '{HEAD}'\necho '{OTHER}'", "none of dram__"),
        (
            NCU.format(fused="1", head=HEAD, served="{}").replace('"byte', '"Mbyte'),
            "is in Mbyte, not in byte",
        ),
        (
            NCU.format(fused="1", head=HEAD, served='{"modules": 53}'),
            "no kernel of resnet_fused served a layer ({'modules': 53})",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    assert traffic.main(["--ncu", stand_in(tmp_path, text)]) == 2
    assert said in capsys.readouterr().err


def test_an_absent_profiler_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert traffic.main(["--ncu", "no-such-ncu"]) == 2
    assert capsys.readouterr().err == "error: --ncu: 'no-such-ncu' is not found\n"
