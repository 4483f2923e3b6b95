"""compute-sanitizer over the driver: the CUDA kernels without torch, whose own kernels stay out."""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu import command, sanitizer
from gpu.pool import ROOT

NAME = "resnet_fused_driver"
A_1X1 = ("--r", "1", "--s", "1", "--padding", "0")
STEM = ("--c", "3", "--r", "7", "--s", "7", "--stride", "2", "--padding", "3")
BLOCK_END = ("--op", "bn_add_act_conv_stats", *A_1X1)
GRAD1X1 = ("--op", "conv_bn_grad1x1", *A_1X1)
TRAINING: tuple[tuple[str, ...], ...] = (
    ("--op", "conv_bn_stats", "--normed", "--splits", "2", "--c", "64"),
    ("--op", "conv_bn_stats", "--normed", "--c", "3", "--k", "5", "--layout", "nchw"),
    ("--op", "conv_bn_stats", *STEM, "--k", "64", "--configuration", "image_128x64_4w7s"),
    ("--op", "conv_bn_stats", "--finalize", "--normed", "--k", "72", "--tracked", "int64"),
    ("--op", "conv_bn_stats", "--finalize", "--splits", "2", "--tracked", "int32", "--cumulative"),
    (*BLOCK_END, "--splits", "2", "--c", "64"),
    (*BLOCK_END, "--normed", "--c", "40", "--k", "136", "--dtype", "float16"),
    ("--op", "conv_bn_dgrad", "--affine", "--normed", "--addend", "1", "--splits", "2"),
    ("--op", "conv_bn_dgrad", "--affine", "--stride", "2", "--addend", "2"),
    ("--op", "conv_bn_dgrad", "--normed", "--c", "5", "--k", "3", "--layout", "nchw"),
    ("--op", "conv_bn_dgrad_end", "--affine", "--residual", "--addend", "1", "--splits", "2"),
    ("--op", "conv_bn_dgrad_end", "--affine", *A_1X1, "--addend", "1", "--dtype", "float16"),
    ("--op", "conv_bn_dgrad_end", "--residual", "--c", "5", "--k", "3", "--layout", "nchw"),
    ("--op", "conv_bn_wgrad", "--affine", "--normed", "--splits", "2", "--float-weight"),
    ("--op", "conv_bn_wgrad", "--affine", "--c", "3", "--k", "5", "--layout", "nchw"),
    ("--op", "conv_bn_wgrad", *STEM, "--k", "64", "--configuration", "image_64x224_4w3s"),
    (*GRAD1X1, "--affine", "--normed", "--addend", "1", "--float-weight", "--splits", "2"),
    (*GRAD1X1, "--affine", "--addend", "2", "--c", "72", "--k", "40", "--dtype", "float16"),
    ("--op", "bn_add_act", "--residual", "--normed"),
    ("--op", "bn_add_act", "--residual", "--part", "8", "--layout", "nchw"),
    ("--op", "bn_add_act_backward", "--residual", "--normed", "--h", "40", "--w", "40"),
    ("--op", "bn_add_act_backward", "--c", "21", "--dtype", "float16"),
    ("--op", "bn_backward_apply", "--dtype", "float32"),
    ("--op", "bn_act_pool", "--stride", "2"),
    ("--op", "bn_act_pool", "--r", "2", "--s", "5", "--layout", "nchw"),
    ("--op", "bn_act_pool_backward", "--stride", "2", "--h", "40", "--w", "40"),
    ("--op", "bn_finalize", "--dtype", "float32", "--c", "300", "--total"),
    ("--op", "bn_update_stats", "--dtype", "float32", "--tracked", "int64", "--cumulative"),
    ("--op", "bn_backward_finalize", "--dtype", "float64", "--residual"),
)
"""Those of training with batch statistics."""
FRONT = ("--front", "64", "--c", "64", "--k", "128")
NETWORK = ("--op", "network", "--c", "64", "--k", "64", "--depths", "1", "--splits", "2")
CALLS: tuple[tuple[str, ...], ...] = (
    ("--op", "conv_bn_act", "--residual"),
    ("--op", "conv_bn_act", "--splits", "2", "--c", "128"),
    ("--op", "conv_bn_act", "--c", "3", "--r", "7", "--s", "7", "--padding", "3", "--stride", "2"),
    ("--op", "conv_bn_act", "--dtype", "float32"),
    ("--op", "conv_bn_act", "--groups", "4", "--c", "64", "--k", "64"),
    ("--op", "conv_dgrad", "--stride", "2"),
    ("--op", "conv_dgrad", "--splits", "2", "--k", "128"),
    ("--op", "conv_dgrad", "--c", "5", "--act", "none"),
    ("--op", "conv_wgrad", "--splits", "2"),
    ("--op", "conv_wgrad", "--c", "3", "--r", "7", "--s", "7", "--padding", "3", "--stride", "2"),
    ("--op", "bn_act", "--residual"),
    ("--op", "conv_chain", "--k", "80", "--configuration", "64x64_4w3s"),
    ("--op", "conv_chain", *FRONT, "--configuration", "64x64_4w3s_front64"),
    ("--op", "stem", *STEM, "--configuration", "28x64_4w"),
    ("--op", "head", "--c", "200", "--k", "45", "--h", "7", "--w", "7"),
    (*NETWORK, "--cluster", "1"),
    *TRAINING,
)
"""Small ones that take every way of loading, splitting and storing."""
FP8 = ("--op", "conv_bn_act_fp8")
WINDOWS_FP8 = (*FP8, "--c", "64", "--k", "64", "--configuration", "tma_win96x64_2w")
CHAIN_FP8 = ("--op", "conv_chain_fp8", "--quantised")
FLOAT32 = ("--dtype", "float32")
BY_64 = ("--c", "64", "--k", "64")
GRAD1X1_END = (*A_1X1, "--affine", "--addend")
STRIDED_CHAIN = ("--k", "208", "--next", "128", "--projected", "256", "--stride", "2")
WIDE_FRONT = ("--front", "128", "--c", "128", "--k", "256", "--next", "128")
BY_TMA: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("conv_bn_act", "tma_p128x128_4s", ("--residual", "--stride", "2")),
    ("conv_bn_act", "tma_s128x64_6s_t", ("--residual",)),
    ("conv_bn_act", "tma_p128x256_3s_2c", ("--k", "264", "--data", "normals")),
    ("conv_bn_act", "tma_s192x128_4s_2p", (*A_1X1, "--k", "136")),
    ("conv_bn_act", "tma_s128x64_7s_t_2c_4p", ("--residual",)),
    ("conv_bn_act", "tma_win96x64_2w", ("--residual",)),
    ("conv_bn_act", "tma_tf32_s128x64_6s_t", ("--residual", *FLOAT32)),
    ("conv_bn_act", "tma_tf32_s192x128_3s_2c_2p", ("--k", "136", *FLOAT32, "--data", "normals")),
    ("conv_bn_act", "tma_cluster56x64_6s", ("--splits", "4")),
    ("stem", "tma_32x64_8s", STEM),
    ("conv_chain", "tma_128x64_4s_k64", ("--k", "80")),
    ("conv_chain", "tma_128x128_4s_k64_2c", ("--k", "80", "--next", "128")),
    ("conv_chain", "tma_128x256_2s_k128_2c", ("--k", "208", "--next", "256", "--out-stride", "2")),
    ("conv_chain", "tma_128x128_2s_k128_d256_2c", STRIDED_CHAIN),
    ("conv_chain", "tma_win128x64_3s_front64", ("--k", "128", "--front", "64")),
    ("conv_chain", "tma_win128x128_7s_front128_2c", WIDE_FRONT),
    ("conv_dgrad", "tma_p128x64_5s", ("--stride", "2")),
    ("conv_dgrad", "tma_p128x128_4s_2c_2p", ("--c", "136", "--stride", "2")),
    ("conv_wgrad", "tma_64x128_6s", ()),
    ("conv_wgrad", "tma_128x256_3s_2x", ("--k", "136", "--splits", "2")),
    ("conv_bn_stats", "tma_s128x64_6s_t", ("--normed", "--stride", "2")),
    ("conv_bn_stats", "tma_stay128x128_4s", (*A_1X1, "--normed", "--k", "136")),
    ("conv_bn_stats", "tma_win96x64_2w", ("--normed",)),
    ("conv_bn_stats", "tma_image64x64_8s", STEM),
    ("conv_bn_stats", "tma_win192x64_2w_6s", ("--c", "192", "--normed")),
    ("conv_bn_stats", "tma_win96x64_2w", ("--finalize", "--tracked", "int64", "--cumulative")),
    ("bn_add_act_conv_stats", "tma_s64x128_6s", (*A_1X1, "--c", "72", "--k", "136")),
    ("bn_add_act_conv_stats", "tma_s128x256_3s", (*A_1X1, "--normed", "--k", "200")),
    ("conv_bn_dgrad", "tma_p128x64_4s", ("--affine", "--normed", "--stride", "2")),
    ("conv_bn_dgrad", "tma_p128x64_4s_2p", ("--c", "136", "--affine", "--normed")),
    ("conv_bn_dgrad", "tma_p128x128_3s_2c", (*A_1X1, "--affine", "--normed", "--addend", "1")),
    ("conv_bn_dgrad", "tma_p128x64_4s", (*A_1X1, "--affine", "--normed", "--addend", "2")),
    ("conv_bn_dgrad", "tma_win96x64_2w", ("--affine", "--normed", "--addend", "1")),
    ("conv_bn_dgrad", "tma_win192x64_2w_6s", ("--k", "192", "--affine", "--normed")),
    ("conv_bn_dgrad_end", "tma_p128x64_4s", ("--affine", "--residual", "--stride", "2")),
    ("conv_bn_dgrad_end", "tma_p128x64_4s_2p", (*A_1X1, "--c", "136", "--affine", "--residual")),
    ("conv_bn_dgrad_end", "tma_p128x128_3s_2c", (*A_1X1, "--affine", "--addend", "2")),
    ("conv_bn_wgrad", "tma_64x128_6s", ("--affine", "--normed", "--stride", "2")),
    ("conv_bn_wgrad", "tma_128x256_3s_2d_2x", ("--affine", "--k", "136", "--splits", "2")),
    ("conv_bn_wgrad", "tma_win64x576_3s", ("--affine", "--normed", "--splits", "2")),
    ("conv_bn_grad1x1", "tma_64x64_6s", (*A_1X1, "--affine", "--normed", "--addend", "1")),
    ("conv_bn_grad1x1_end", "tma_64x128_4s", (*GRAD1X1_END, "1", "--c", "136", "--residual")),
    ("conv_bn_grad1x1_end", "tma_128x128_4s", (*GRAD1X1_END, "2", "--k", "120", "--float-weight")),
)
SM90A_CALLS: tuple[tuple[str, ...], ...] = (
    *(("--op", op, *BY_64, "--configuration", tile, *more) for op, tile, more in BY_TMA),
    (*NETWORK, "--cluster", "8", "--blocks", "8", "--h", "5", "--w", "5"),
    (*FP8, "--quantised", "--residual"),
    (*WINDOWS_FP8, "--quantised", "--residual"),
    (*FP8, "--residual", "--stride", "2", "--data", "normals"),
    (*FP8, "--quantised", "--r", "1", "--s", "1", "--padding", "0", "--c", "256", "--k", "144"),
    (*FP8, "--quantised", "--residual", "--configuration", "tma_s192x128_4s_2c"),
    (*FP8, "--residual", "--k", "144", "--configuration", "tma_s192x128_4s_2p"),
    (*FP8, "--quantised", "--residual", "--k", "144", "--configuration", "tma_s64x64_12s_t_2c_2p"),
    (*FP8, "--k", "272", "--configuration", "tma_s64x128_8s_2c_2p"),
    (*FP8, "--quantised", "--stride", "2", "--configuration", "tma_s128x128_6s_2c_2p"),
    (*CHAIN_FP8, "--c", "64", "--k", "256", "--next", "64"),
    (*CHAIN_FP8, "--c", "48", "--k", "80", "--next", "48", "--projected", "48"),
    (*CHAIN_FP8, "--c", "128", "--k", "208", "--next", "128", "--data", "normals"),
    (*CHAIN_FP8, "--c", "64", "--k", "144", "--next", "112", "--out-stride", "2"),
    (*CHAIN_FP8, "--c", "112", "--k", "208", "--configuration", "tma_128x128_6s_k128_2c"),
)
"""Those of kernels for sm_90a alone: elsewhere the driver has no plan for them."""

CEILINGS = ("--op", "ceilings")
"""The call that measures; without repeats a little of everything, judged."""
REFUSED = re.compile(r"[Dd]evice not supported|not supported on th(is|e) (device|GPU|platform)")
"""What compute-sanitizer says where a virtual machine keeps it from the GPU."""


def calls_for(capability: Sequence[int] | None) -> tuple[tuple[str, ...], ...]:
    """What is run on a GPU of a compute capability, such as [9, 0]; both kinds in turns."""
    if tuple(capability or ()) != (9, 0):
        return CALLS
    turns = itertools.chain.from_iterable(itertools.zip_longest(CALLS, SM90A_CALLS))
    return *(call for call in turns if call is not None), CEILINGS


def find(given: Path | None) -> Path | None:
    """The driver as given, or the newest one that was built or carried in build/driver-*."""
    if given is not None:
        found = shutil.which(given)
        return command.path(found) if found else None
    built = [path for path in ROOT.glob(f"build/driver-*/{NAME}") if shutil.which(path)]
    return max(built, key=lambda path: path.stat().st_mtime, default=None)


def called(words: Sequence[str], given: str | None, limit: float) -> dict[str, Any]:
    """One call of the driver: its record with "ok", and "error" or "skipped" with the reason.

    Args:
        words: its options.
        given: the driver; None for what lies in build/driver-*.
        limit: seconds.
    """
    program = find(None if given is None else Path(given))
    if program is None:
        return {"ok": None, "skipped": f"no {NAME}; tools/driver.py builds one"}
    about = " ".join(words)
    try:  # in this process's group: who ends the one ends the other
        ran = subprocess.run(
            [str(program), *words], capture_output=True, text=True, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired:
        return {"ok": False, "error": f"{about}: no end within {limit:g} s"}
    lines = [line for line in ran.stdout.splitlines() if line.startswith("{")]
    found: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    if ran.returncode != 0 or not lines:
        text = f"{about}: exit code {ran.returncode}: {ran.stderr[-400:]}"
        return {**found, "ok": False, "error": text}
    return {**found, "ok": True}


def build(archs: str, log: Path, jobs: int) -> command.Child:
    """Begins to build it."""
    tool = str(ROOT / "tools" / "driver.py")
    return command.Child([sys.executable, tool, "--archs", archs, "--jobs", str(jobs)], log)


def refused(text: str) -> str | None:
    """The line in which a sanitizer says that it can't look at this GPU, or None."""
    lines = [line.strip("= ") for line in text.splitlines() if REFUSED.search(line)]
    return lines[0] if lines else None


def judge(tool: str, ran: Sequence[command.Ran], calls: int) -> dict[str, Any]:
    """What all runs of one tool say together.

    Args:
        tool: of `sanitizer.TOOLS`.
        ran: its runs, one a call of the driver, as far as they were reached.
        calls: how many there are.
    """
    found: dict[str, Any] = {"program": NAME, "checks": calls, "passed": 0, "ours": 0, "total": 0}
    for one in ran:
        said = refused(one.text)
        if said is not None:
            return {**found, "ok": None, "refused": True, "skipped": f"refused: {said}"}
        if one.code is None:
            continue
        seen = sanitizer.parse(tool, one.text)
        # All kernels here are ours, whatever the report calls them.
        seen["ours"] = seen["reports"]
        verdict = sanitizer.verdict(tool, seen, one.code)
        found["total"] += seen["total"] or 0
        found["ours"] += seen["ours"]
        if not verdict["ok"]:
            return {**found, "ok": False, "error": verdict["error"], "tail": one.tail}
        found["passed"] += 1
    if found["passed"] < calls:
        text = f"its time was over, {found['passed']} of {calls} calls passed"
        return {**found, "ok": None, "cut": True, "skipped": text}
    return {**found, "ok": True}


def run(
    tool_path: str,
    program: Path,
    until: Callable[[], float],
    report: Callable[[str, dict[str, Any]], None],
    logs: Path,
    tools: Sequence[str] = sanitizer.TOOLS,
    extra: Mapping[str, str] | None = None,
    calls: Sequence[Sequence[str]] = CALLS,
) -> None:
    """Runs every tool over every call, the tools at once and each over as many calls as half of
    the cores take, and reports as they end.

    Args:
        tool_path: compute-sanitizer.
        program: the driver.
        until: gives the seconds that are left.
        report: called with a tool's name and what it found.
        logs: folder of the logs.
        tools: which.
        extra: environment variables.
        calls: of the driver.
    """
    lock = threading.Lock()

    def work(tool: str) -> None:
        stop = threading.Event()

        def one(number: int) -> command.Ran | None:
            if until() <= 0 or stop.is_set():
                return None
            words = [tool_path, "--tool", tool, "--print-limit", "10000", str(program)]
            log = logs / f"{tool}-{number}.log"
            ran = command.run([*words, *calls[number]], until(), log, extra)
            if refused(ran.text):
                stop.set()
            return ran

        jobs = max(1, (os.cpu_count() or 1) // (2 * len(tools)))
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            ran = [found for found in pool.map(one, range(len(calls))) if found is not None]
        with lock:
            report(tool, judge(tool, ran, len(calls)))

    threads = [threading.Thread(target=work, args=(tool,)) for tool in tools]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@contextlib.contextmanager
def excusing(record: Any) -> Iterator[None]:
    """Within the block a sanitizer that the GPU refuses is skipped, not failed."""
    whole = record.step

    def step(name: str, found: Mapping[str, Any], line: str = "") -> None:
        said = refused(str(found.get("tail", "")))
        if said is not None:
            found = {**found, "ok": None, "refused": True, "skipped": f"refused: {said}"}
            found.pop("error", None)
        whole(name, found, line)

    record.step = step
    try:
        yield
    finally:
        del record.step
