"""The parts of gpu-check: the sanitizer's reports, the extension, the machine, time on CUDA."""

from __future__ import annotations

import contextlib
import itertools
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from gpu import device, environment, extension, sanitizer, speed  # noqa: E402

# compute-sanitizer's reports.

CLEAN = "========= COMPUTE-SANITIZER\npassed: x=y\n========= ERROR SUMMARY: 0 errors\n"
OURS = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 2 bytes
=========     at conv_bn_act_kernel+0x1d0
=========     by thread (0,0,0) in block (3,0,0)
=========
========= ERROR SUMMARY: 1 error
"""
THEIRS = OURS.replace("conv_bn_act_kernel", "void at::native::fill_kernel")
RACE = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at merge_kernel+0x10
=========     and Read access at merge_kernel+0x90 [16 hazards]
=========
========= Warning: Race reported between Write access at void at::native::sort+0x10
=========
========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)
"""


@pytest.mark.parametrize(
    ("tool", "text", "code", "ok", "said"),
    [
        ("memcheck", CLEAN, 0, True, ""),
        ("memcheck", CLEAN, 1, False, "exit code 1"),
        ("memcheck", "no such device", 255, False, "no summary, exit code 255"),
        ("memcheck", OURS, 0, False, "conv_bn_act_kernel+0x1d0"),
        ("memcheck", THEIRS, 0, False, "fill_kernel"),
        ("initcheck", THEIRS, 0, True, ""),
        ("initcheck", OURS, 0, False, "1 of them in our kernels"),
        ("initcheck", "========= ERROR SUMMARY: 3 errors", 0, False, "only 0 can be read"),
        ("racecheck", RACE, 0, False, "merge_kernel"),
        ("racecheck", RACE.replace("merge_kernel", "sort"), 0, True, ""),
        ("racecheck", "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)",
         0, True, ""),
    ],
)  # fmt: skip
def test_reports_of_the_sanitizer(tool, text, code, ok, said):
    found = sanitizer.verdict(tool, sanitizer.parse(tool, text), code)
    assert found["ok"] is ok and said in found.get("error", "")


def test_a_sanitizer_that_is_cut_keeps_what_it_saw(tmp_path):
    tool = tmp_path / "slow"
    tool.write_text("#!/bin/sh\ncat <<'E'\n" + OURS + "E\necho 'passed: a=b'\nsleep 60\n")
    tool.chmod(0o755)
    found = sanitizer.run_one(str(tool), "memcheck", "cpu", ["a=b", "c=d"], 1.0)
    assert found["ok"] is False and found["passed"] == 1
    tool.write_text("#!/bin/sh\necho 'passed: a=b'\nsleep 60\n")
    found = sanitizer.run_one(str(tool), "memcheck", "cpu", ["a=b", "c=d"], 1.0)
    assert found["ok"] is None and "1 of 2 checks" in found["skipped"] and found["cut"]


# The extension and the commit.


def test_where_the_extension_comes_from(tmp_path):
    root, beside = tmp_path / "root", tmp_path / "beside"
    (root / "resnet_fused").mkdir(parents=True)
    (root / "build" / "wheel").mkdir(parents=True)
    beside.mkdir()
    folder, said = extension.locate(root, beside)
    assert folder is None and said.startswith("none") and "BUILD=1" in said
    wheel = root / "build" / "wheel" / "resnet_fused-1-cp311-abi3-any.whl"
    wheel.write_bytes(b"no zip")
    assert "can't be unpacked" in extension.locate(root, beside)[1]
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("resnet_fused/_C.abi3.so", b"binary")
        archive.writestr("resnet_fused/__init__.py", "")
    folder, said = extension.locate(root, beside)
    assert folder == str(beside) and [p.name for p in beside.iterdir()] == ["_C.abi3.so"]
    assert not list((root / "resnet_fused").iterdir())
    (root / "resnet_fused" / "_C.abi3.so").touch()
    assert extension.locate(root, beside) == (None, "in place: resnet_fused/_C.abi3.so")
    assert extension.architecture((9, 0)) == "90a" and extension.architecture((8, 9)) == "89"


def test_a_build_that_fails_leaves_the_check_without(tmp_path, monkeypatch):
    stand_in = types.SimpleNamespace(
        find_nvcc=lambda: (types.SimpleNamespace(version="13.0"), None), find_cmake=lambda: "cmake"
    )
    monkeypatch.setitem(sys.modules, "toolchain", stand_in)
    (tmp_path / "resnet_fused").mkdir()
    (tmp_path / "setup.py").write_text("raise SystemExit('no compiler')")
    said = extension.locate(tmp_path, tmp_path, build=True, archs="90a")[1]
    assert said == "none: the build failed: no compiler"
    (tmp_path / "setup.py").write_text("import time; time.sleep(60)")
    assert "more than 1 s" in extension.locate(tmp_path, tmp_path, build=True, limit=1)[1]
    monkeypatch.setattr(stand_in, "find_nvcc", lambda: (None, "no nvcc"))
    assert "no nvcc" in extension.locate(tmp_path, tmp_path, build=True)[1]


def test_the_commit_is_read_without_git(tmp_path):
    assert environment.commit(tmp_path) is None
    git = tmp_path / ".git"
    (git / "refs" / "heads").mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    (git / "packed-refs").write_text("# pack-refs\nabc refs/heads/main\n")
    assert environment.commit(tmp_path) == "abc"
    (git / "refs" / "heads" / "main").write_text("def\n")
    assert environment.commit(tmp_path) == "def"
    (git / "HEAD").write_text("123\n")
    assert environment.commit(tmp_path) == "123"


def test_what_nvidia_smi_says(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.smi() == "no nvidia-smi"
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '580.1, 1980 MHz, 3201 MHz, 1980 MHz, 90 W, 40, 0x0'\n")
    tool.chmod(0o755)
    found = environment.smi()
    assert found["driver_version"] == "580.1" and found["clocks.sm"] == "1980 MHz"


# What is done on CUDA, with stand-ins for it.


class Cuda:
    """Notes what is asked of torch.cuda, and lets time pass for replays."""

    def __init__(self, monkeypatch) -> None:
        self.calls: list[str] = []
        self.now = 0.0
        outer = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = outer.now

            def synchronize(self):
                outer.calls.append("wait")

            def elapsed_time(self, other):
                return 1e3 * (other.at - self.at)

        class Graph:
            def replay(self):
                outer.calls.append("replay")
                outer.now += 2e-3

        class Stream:
            def __init__(self, where=None):
                pass

            def wait_stream(self, other):
                outer.calls.append("wait_stream")

        @contextlib.contextmanager
        def inside(what, name):
            outer.calls.append(f"{name} begins")
            yield
            outer.calls.append(f"{name} ends")

        for name, value in {
            "Event": Event, "CUDAGraph": Graph, "Stream": Stream,
            "current_stream": lambda where=None: Stream(),
            "stream": lambda stream: inside(stream, "side"),
            "graph": lambda graph: inside(graph, "capture"),
            "synchronize": lambda where=None: outer.calls.append("synchronize"),
            "mem_get_info": lambda where=None: (3 << 30, 4 << 30),
            "get_device_properties": lambda where=None: types.SimpleNamespace(
                L2_cache_size=50 << 20
            ),
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)


def test_a_graph_is_warmed_up_on_a_side_stream_and_then_captured(monkeypatch):
    cuda = Cuda(monkeypatch)
    replay = device.capture(lambda: cuda.calls.append("call"), "cuda:0", warm_up=2)
    assert cuda.calls == [
        "wait_stream", "side begins", "call", "call", "side ends", "wait_stream", "synchronize",
        "capture begins", "call", "capture ends", "synchronize",
    ]  # fmt: skip
    replay()
    assert cuda.calls[-1] == "replay"
    assert device.free_bytes("cuda:0") == 3 << 30 and device.l2_bytes("cuda:0") == 50 << 20


def test_variants_are_timed_by_events_in_turns(monkeypatch):
    cuda = Cuda(monkeypatch)
    order: list[str] = []

    def variant(name: str, seconds: float):
        def call() -> None:
            order.append(name)
            cuda.now += seconds

        return call

    calls = {"a": variant("a", 4e-3), "b": variant("b", 2e-3), "quick": variant("quick", 1e-4)}
    timed = device.interleaved(calls, "cuda:0", rounds=7)
    assert len(timed.seconds["a"]) == 7
    assert timed.median("a") == pytest.approx(4e-3) and timed.ratio("a", "b")["median"] == (
        pytest.approx(2.0)
    )
    assert order.count("quick") == 1 + 7 * 10  # a sample lasts a millisecond
    runs = [name for name, _ in itertools.groupby(order[3:])]
    assert runs[:5] == ["a", "b", "quick", "b", "a"]  # the order is reversed from round to round
    assert timed.to_dict(per=2)["b"]["us"] == pytest.approx(1e3)
    assert timed.spread("b") == pytest.approx(0.0, abs=1e-9)


def test_bits_are_compared_and_nan_is_like_itself():
    nan = torch.tensor([float("nan"), 0.0])
    assert device.same_bits(nan, nan.clone())
    assert not device.same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))


def test_a_wrong_kernel_has_no_time(monkeypatch):
    def wrong(op, case, given, out, plan=None):
        out.zero_()

    monkeypatch.setattr(speed.operands, "launch", wrong)
    found = speed.time_layer("cpu", "1x1_256_64_at56", 1, 1e11, 1e10)
    assert found["ok"] is False and "us" not in found
