"""compute-sanitizer over one configuration of every kernel, on the exact tier's small shapes."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu.pool import ROOT, environment, kill
from gpu.record import one_line

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
KERNELS = (
    "conv_bn_", "conv_chain_", "conv_dgrad_", "conv_wgrad_", "bn_act_", "bn_add_act_",
    "bn_backward_", "bn_finalize_", "bn_update_stats_", "stem_kernel", "stem_wgmma_kernel",
    "pack_kernel", "head_kernel", "head_linear_kernel", "mean_kernel", "network_kernel",
    "network_cluster_kernel",
    "merge_kernel", "merge_chunks_kernel", "merge_moments_kernel", "sums_kernel",
    "ceilings_",
)  # fmt: skip
"""What is ours in a report: parts of the names of our kernels, Triton's and CUDA's."""

STRICT = ("memcheck", "synccheck")
"""Tools that have to be silent altogether; of the others PyTorch's own kernels are no matter."""

PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/cuda/bin")


def find(given: str | None = None) -> str | None:
    """The tool: as given, on the PATH, or where CUDA is usually installed."""
    if given:
        return shutil.which(given)
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=":".join(PLACES)
    )


def parse(tool: str, text: str) -> dict[str, Any]:
    """What a report says.

    Args:
        tool: of `TOOLS`.
        text: everything that the tool and the program printed.

    Returns:
        "total" of the tool's own summary (None if it gave none), "ours" (reports that name one of
        our kernels), "warnings" of racecheck, and the "first" report of ours, else of anybody.
    """
    summary = re.search(r"ERROR SUMMARY: (\d+) error", text)
    hazards = re.search(r"RACECHECK SUMMARY: (\d+) hazards? displayed(?: \((\d+) error)?", text)
    warned = re.search(r"RACECHECK SUMMARY:.*?(\d+) warning", text)
    total = None
    if tool == "racecheck" and hazards:
        total = int(hazards.group(2) if hazards.group(2) is not None else hazards.group(1))
    elif summary:
        total = int(summary.group(1))
    reports = _reports(text)
    if tool == "racecheck":
        reports = [one for one in reports if "Warning:" not in one]
    ours = [one for one in reports if any(name in one for name in KERNELS)]
    found: dict[str, Any] = {"total": total, "ours": len(ours), "reports": len(reports)}
    if warned:
        found["warnings"] = int(warned.group(1))
    if ours or reports:
        found["first"] = one_line((ours or reports)[0])
    return found


def _reports(text: str) -> list[str]:
    """The tool's reports: runs of lines behind "=========", parted by one that holds no more."""
    found: list[str] = []
    lines: list[str] = []
    for line in [*text.splitlines(), "========="]:
        mark, _, said = line.partition("=========")
        if mark.strip() or not line.startswith("========="):
            continue
        if said.strip():
            # The header and the summaries stand beside reports without a line between them.
            if not re.match(r"COMPUTE-SANITIZER|[A-Z ]*SUMMARY:|Target application", said.strip()):
                lines.append(said.strip())
            continue
        if lines:
            found.append(" ".join(lines))
        lines = []
    return found


def verdict(tool: str, found: Mapping[str, Any], code: int) -> dict[str, Any]:
    """Whether a run passed: the program ended well, and nothing is reported that matters."""
    total, ours = found["total"], found["ours"]
    error = None
    if total is None and not ours:
        error = f"no summary, exit code {code}"
    elif ours or total is None or (tool in STRICT and total):
        error = f"{total} reported, {ours} of them in our kernels: {found.get('first', '')}"
    elif total > found["reports"]:
        error = f"{total} reported, of which only {found['reports']} can be read"
    elif code:
        error = f"the program ended with exit code {code}"
    return {**found, "ok": error is None, **({"error": error} if error else {})}


def command(sanitizer: str, tool: str, device: str, checks: Sequence[str]) -> list[str]:
    """The command line of one run; `checks` are "module:function configuration" pairs."""
    # API calls that fail are probes of the libraries; what matters of them shows in the results.
    quiet = ["--report-api-errors", "no"] if tool == "memcheck" else []
    return [
        sanitizer, "--tool", tool, *quiet, "--print-limit", "10000",
        sys.executable, "-m", "gpu.sanitized", device, *checks,
    ]  # fmt: skip


def run_one(
    sanitizer: str, tool: str, device: str, checks: Sequence[str], limit: float, extra: Any = None
) -> dict[str, Any]:
    """Runs the program under one tool, at most `limit` seconds."""
    # Blocks of PyTorch's allocator would hide an access beyond a tensor, and what is not written.
    env = environment({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", **(extra or {})})
    start = time.monotonic()
    with tempfile.TemporaryFile() as log:  # a file keeps what was said before a cut
        try:
            process = subprocess.Popen(
                command(sanitizer, tool, device, checks), cwd=ROOT, env=env,
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return {"ok": False, "error": f"{sanitizer} can't be started: {error}"}
        try:
            code: int | None = process.wait(max(1.0, limit))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            kill(process)
        log.seek(0)
        text = log.read().decode(errors="replace")
    found = parse(tool, text)
    passed = len(re.findall(r"^passed: ", text, re.MULTILINE))
    found |= {"checks": list(checks), "passed": passed}
    found["seconds"] = round(time.monotonic() - start, 2)
    if code is None and not found["ours"]:
        reached = f"{passed} of {len(checks)} checks"
        return {**found, "ok": None, "cut": True, "skipped": f"cut after {limit:.0f} s, {reached}"}
    found |= verdict(tool, found, -1 if code is None else code)
    if not found["ok"]:
        found["tail"] = text[-1500:]
    return found


def run(
    sanitizer: str,
    device: str,
    checks: Sequence[str],
    limit: float,
    report: Callable[[str, dict[str, Any]], None],
    extra: Mapping[str, str] | None = None,
    tools: Sequence[str] = TOOLS,
) -> None:
    """Runs every tool, all at once, each in a process of its own, and reports as they end."""
    lock = threading.Lock()

    def work(tool: str) -> None:
        found = run_one(sanitizer, tool, device, checks, limit, extra)
        with lock:
            report(tool, found)

    threads = [threading.Thread(target=work, args=(tool,)) for tool in tools]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def available(given: str | None) -> tuple[str | None, str]:
    """The tool, or why there is none."""
    found = find(given)
    if found is not None:
        return str(Path(found).resolve()), ""
    what = given or "compute-sanitizer"
    return None, f"{what} is not found on the PATH, nor in {', '.join(PLACES)}"
