"""One command that a machine with a GPU runs in minutes: are the kernels right, and how fast.

    make gpu-check PYTHON=python3 MINUTES=8 OUT=folder

Six stages, the most telling first, each with its share of the time: the machine; every
configuration of every kernel on integers; random data against float64; compute-sanitizer; ten
layers of ResNet-50 against eager and cuDNN; the whole network. Everything that touches the GPU runs
in worker processes with time limits, so that a fault or a hang costs one step. The record is
written after every step: whatever was reached when the time ends is in it. docs/gpu_check.md tells
how to read it. Exit code 0: all that ran passed; 1: something is wrong; 2: no GPU or bad arguments.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

STARTED = time.monotonic()
FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
for _entry in (str(ROOT), str(FOLDER)):
    if _entry not in sys.path:
        sys.path.insert(0, _entry)

from gpu import (  # noqa: E402
    driven,
    environment,
    extension,
    one_launch,
    plan,
    plan_spanning,
    predicted,
    sanitizer,
    training_driver,
)
from gpu.pool import Pool, PoolError, Task  # noqa: E402
from gpu.record import Clock, Record  # noqa: E402
from gpu.worker import EXTENSION  # noqa: E402

STAGES = tuple(plan.SHARES)
WARM_PART = 0.4  # of the speed stage, for compiling; the timing itself is what it is for
MOST_PROCESSES = 8
DEFAULT_MINUTES = 8.0


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one line."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = _Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=_minutes, default=DEFAULT_MINUTES, help="for everything")
    parser.add_argument("--output", type=Path, help="folder of gpu-check.json")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda",
                        help="cpu: the same stages, tiny, in Triton's interpreter")  # fmt: skip
    parser.add_argument("--stages", type=_stages, default=STAGES,
                        help="names or letters a to f; the first always runs")  # fmt: skip
    parser.add_argument("--only", default="", help="only steps with a word that begins so")
    parser.add_argument("--processes", type=_processes, help="worker processes")
    parser.add_argument("--build", action="store_true", help="build the extension if it is missing")
    parser.add_argument("--commit", help="where there is no .git")
    parser.add_argument("--sanitizer", help="the compute-sanitizer to run")
    parser.add_argument("--predictions", type=Path, default=FOLDER / "predictions.json",
                        help="what the predictors, benchmarks/predict_*.py, write")  # fmt: skip
    return parser.parse_args(arguments)


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.1 <= value <= 600:
        raise argparse.ArgumentTypeError(f"got {text!r}; accepted are 0.1 to 600 minutes")
    return value


def _processes(text: str) -> int:
    if not (text.isdecimal() and 1 <= int(text) <= 64):
        raise argparse.ArgumentTypeError(f"got {text!r}; accepted are 1 to 64 processes")
    return int(text)


def _stages(text: str) -> tuple[str, ...]:
    letters: dict[str, str] = dict(zip("abcdef", STAGES, strict=True))
    chosen = {letters.get(word.strip(), word.strip()) for word in text.split(",") if word.strip()}
    unknown = sorted(chosen - set(STAGES))
    if unknown or not chosen:
        raise argparse.ArgumentTypeError(f"got {text!r}; accepted are {', '.join(STAGES)}")
    return tuple(name for name in STAGES if name in chosen or name == STAGES[0])


def why_no_gpu() -> str | None:
    """Why nothing can be checked on a GPU here, or None."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no GPU"
    return None


def say(line: str) -> None:
    """Prints at once: whoever watches may see the last lines only."""
    print(line, flush=True)


class Check(driven.Driven):
    """One run: its stages share a clock, a record and the worker processes.

    Args:
        options: the command line's.
        clock: of the whole run.
        record: what it writes.
        device: "cuda:0" or "cpu".
        extra: environment variables of every child process.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        clock: Clock,
        record: Record,
        device: str,
        extra: Mapping[str, str],
    ) -> None:
        self.options, self.clock, self.record = options, clock, record
        self.device, self.extra = device, dict(extra)
        self.shares = {name: plan.SHARES[name] for name in options.stages}
        self.kernels: list[dict[str, Any]] = []
        self.rates: dict[str, Any] | None = None
        self.arch = "cpu"
        self._pool: Pool | None = None
        self._entries: dict[tuple[str, str, str], dict[str, Any]] = {}

    def run(self) -> None:
        """Runs the stages in order."""
        try:
            for name in self.shares:
                if self.clock.left <= 0:
                    self.record.begin(name, 1)
                    self.record.end("the time was over")
                    continue
                until = self.clock.deadline(name, self.shares)
                try:
                    getattr(self, name)(until)
                except PoolError as error:
                    self.record.fail(f"{name}: {error}")
                    self.record.end(str(error))
                    return
        finally:
            self.close()

    def close(self) -> None:
        """Ends the worker processes."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()

    def pool(self, count: int | None = None) -> Pool:
        """The worker processes; another number of them replaces those that there are."""
        if self._pool is None or count not in (None, self._pool.count):
            self.close()
            cores = os.cpu_count() or 2
            usual = 2 if self.device == "cpu" else min(MOST_PROCESSES, max(2, cores // 2))
            number = count or self.options.processes or usual
            self._pool = Pool(number, self.device, self.clock.end, self.extra)
        return self._pool

    def tasks(self, tasks: Sequence[Task]) -> list[Task]:
        """Those that the user asked for."""
        return plan.matching(tasks, self.options.only)

    def environment(self, until: float) -> None:
        """The machine, the kernels and their sources, the ceilings."""
        names = ("machine", "kernels", "ceilings")
        steps = [Task(name, f"gpu.environment:{name}", seconds=60) for name in names]
        self.record.begin("environment", len(steps))
        found: dict[str, dict[str, Any]] = {}

        def report(task: Task, one: dict[str, Any]) -> None:
            found[task.name] = one
            line = ""
            if task.name == "ceilings" and one.get("ok"):
                line = f"{one['flops'] / 1e12:.0f} TFLOP/s, {one['bandwidth'] / 1e12:.2f} TB/s"
            self.record.step(task.name, one, line)

        pool = self.pool()
        for step in steps:  # one after the other: the ceilings want a quiet machine
            pool.run([step], max(until, self.clock.now() + min(160, self.clock.left)), report)
        self.record.end()
        self.rates = found.get("ceilings") if found.get("ceilings", {}).get("ok") else None
        self.arch = found.get("machine", {}).get("identity", {}).get("capability", "unknown")
        listed = found.get("kernels", {}).get("kernels", [])
        for kernel in listed:
            if kernel["problem"]:
                say(f"skip {kernel['op']}.{kernel['implementation']}: {kernel['problem']}"[:200])
        self.kernels = [kernel for kernel in listed if not kernel["problem"]]

    def exact(self, until: float) -> None:
        """Every configuration of every kernel on integers: what admits it."""
        tasks = self.tasks(plan.exact(self.kernels))

        def report(task: Task, one: dict[str, Any]) -> None:
            kernel, name = task.about["kernel"], task.about["configuration"]
            if one["ok"] is None:  # too little memory, say: nothing is known of the kernel
                self.record.step(task.name, one)
                return
            entry = {
                "op": kernel["op"], "implementation": kernel["implementation"],
                "configuration": name, "ok": bool(one["ok"]), "hash": kernel["hash"],
                "arch": self.arch, "timings": {}, "seconds": one.get("seconds"),
            }  # fmt: skip
            if one.get("error"):
                entry["error"] = one["error"]
            self._entries[kernel["op"], kernel["implementation"], name] = entry
            self.record.content["admission"].append(entry)
            self.record.step(task.name, one)

        self._stage("exact", tasks, until, report)

    def bounds(self, until: float) -> None:
        """Random data against float64, and everything that a result may not depend on."""
        worst: dict[str, float] = {}

        def report(task: Task, one: dict[str, Any]) -> None:
            self._blame(task, one)
            if "op" in task.about and isinstance(one.get("truncate"), (int, float)):
                key = " ".join(task.name.split()[:2])
                worst[key] = max(worst.get(key, 0.0), one["truncate"])
            self.record.step(task.name, one)

        self._stage("bounds", self.tasks(plan.bounds(self.device, self.kernels)), until, report)
        self.record.content["worst_error_over_bound"] = worst
        text = ", ".join(f"{key} {value:.3f}" for key, value in sorted(worst.items()))
        say(f"   worst error/bound: {text or 'nothing judged'}")

    def sanitizer(self, until: float) -> None:
        """compute-sanitizer's four tools over one configuration of every kernel."""
        tools = [t for t in sanitizer.TOOLS if plan.matching([Task(t, "")], self.options.only)]
        self.record.begin("sanitizer", len(tools))
        tool, why = sanitizer.available(self.options.sanitizer)
        checks = plan.sanitized(self.kernels, self.options.only)
        if tool is None or not checks:
            for name in tools:
                self.record.step(name, {"ok": False, "error": why or "no kernel can run here"})
            self.record.end()
            return
        cut: list[str] = []

        def report(name: str, one: dict[str, Any]) -> None:
            if one.pop("cut", False):
                cut.append(name)
            self.record.step(name, one, f"{one.get('total')} reported, {one.get('ours')} ours")

        limit = until - self.clock.now()
        sanitizer.run(tool, self.device, checks, limit, report, self.extra, tools)
        self.record.end(f"no time for {', '.join(cut)}" if cut else None)

    def speed(self, until: float) -> None:
        """Ten layers: compiled and checked in parallel, then timed one by one."""
        if self.rates is None:
            self.record.begin("speed", 1)
            self.record.end("the ceilings were not measured")
            return
        rows = predicted.read(self.options.predictions, say)
        every = plan.timings(self.rates, self._cuda_configurations())
        every[10:10] = plan_spanning.timings(self.rates, self.kernels, self.device)
        timed = self.tasks(every)
        layers = {task.about.get("layer") for task in timed}
        tuned = any("tuning" in task.name for task in timed)
        warm = [
            task
            for task in plan.warm(tuned and self.device != "cpu")
            if f"{task.arguments['layer']}@{task.arguments['batch']}" in layers
        ]
        self.record.begin("speed", len(warm) + len(timed))

        def compiled(task: Task, one: dict[str, Any]) -> None:
            self._blame(task, one)
            self.record.step(task.name, one)

        def measured(task: Task, one: dict[str, Any]) -> None:
            one["predicted"] = predicted.beside(task.name, task.about, one, rows)
            self._note_timings(task, one)
            self.record.step(task.name, one, speed_line(one) + predicted.line(one["predicted"]))

        half = self.clock.now() + WARM_PART * (until - self.clock.now())
        self.pool().run(warm, half, compiled)
        self.record.content["clocks_before"] = self._clocks()
        done = self.pool(1).run(timed, until, measured)
        self.record.content["clocks_after"] = self._clocks()
        self.record.end(None if done == len(timed) else self.pool().why_cut())

    def network(self, until: float) -> None:
        """The whole ResNet-50, one process alone on the GPU."""

        rows = predicted.read(self.options.predictions, say)

        def report(task: Task, one: dict[str, Any]) -> None:
            one["predicted"] = predicted.beside(task.name, task.about, one, rows)
            self.record.step(task.name, one, network_line(one) + predicted.line(one["predicted"]))

        self.pool(1)
        self._stage("network", self.tasks(plan.network(self.device)), until, report)

    def _stage(self, name: str, tasks: Sequence[Task], until: float, report: Any) -> None:
        self.record.begin(name, len(tasks))
        done = self.pool().run(tasks, until, report)
        self.record.end(None if done == len(tasks) else self.pool().why_cut())

    def _cuda_configurations(self) -> list[str]:
        """Of the CUDA convolution, if it can run here."""
        key = ("conv_bn_act", "cuda")
        found = [k for k in self.kernels if (k["op"], k["implementation"]) == key]
        return list(found[0]["configurations"]) if found else []

    def _clocks(self) -> Any:
        return environment.smi() if self.device != "cpu" else None

    def _blame(self, task: Task, one: Mapping[str, Any]) -> None:
        """A configuration that errs on random data is not admitted, whatever integers showed."""
        kind = task.about.get("implementation", "triton")
        key = (task.about.get("op", ""), kind, one.get("configuration", ""))
        if one.get("ok") is False and key in self._entries:
            self._entries[key]["ok"] = False
            self._entries[key].setdefault("error", f"{task.name}: {one.get('error')}")

    def _note_timings(self, task: Task, one: Mapping[str, Any]) -> None:
        """Enters microseconds into the configurations' entries."""
        op = task.about.get("op", "conv_bn_act")
        for variant, found in (one.get("us") or {}).items() if "layer" in task.about else ():
            kind, name = plan.kernel_and_configuration(variant, one)
            entry = self._entries.get((op, kind, name))
            if entry is not None and one.get("ok"):
                entry["timings"][task.about["layer"]] = round(found["us"], 2)


def speed_line(one: Mapping[str, Any]) -> str:
    """A timing in a few words."""
    if not one.get("ok"):
        return ""
    if "moved" in one:
        return training_driver.line(one)
    ratios = " ".join(f"{name} {r['median']:.2f}x" for name, r in one.get("ratios", {}).items())
    if "plan" not in one:
        return " ".join([*(f"{n} {v['us']:.1f} us" for n, v in one["us"].items()), ratios])
    us = {name: value["us"] for name, value in one["us"].items() if name != "ours_again"}
    best = min((n for n in us if n not in ("eager", "cudnn")), key=us.__getitem__)
    tuned = f", best {best} {us[best]:.1f}" if best != "ours" else ""
    omitted = f", without {', '.join(one['omitted'])}" if one["omitted"] else ""
    return (
        f"{us['ours']:.1f} us {one['plan']}, {100 * one['of_floor']:.0f}% of the floor's rate, "
        f"{ratios}{tuned}{omitted}"
    )


def network_line(one: Mapping[str, Any]) -> str:
    """A network's timing in a few words."""
    if "kept" in one or "ratio" not in one:
        return one_launch.line(one) if {"gain", "kept"} & one.keys() else ""
    rates = ", ".join(f"{name} {value:.0f}/s" for name, value in one["images_per_s"].items())
    ratio = one["ratio"]
    return f"{ratio['median']:.3f}x ({ratio['low']:.3f} .. {ratio['high']:.3f}); {rates}"


def _folder(options: argparse.Namespace, gpu: str) -> Path:
    if options.output is not None:
        return options.output
    slug = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return FOLDER / "results" / (slug or "gpu")


def _watch(check: Check, record: Record, clock: Clock) -> threading.Timer:
    """Ends the process when its time is over, whatever it waits for."""

    def end() -> None:
        check.close()
        record.content["watchdog"] = "the time was over while something still ran"
        record.write()
        say(f"{record.file}: cut by the clock")
        os._exit(0 if record.ok else 1)

    timer = threading.Timer(clock.left + 2, end)
    timer.daemon = True
    timer.start()
    return timer


def _stop(number: int, frame: object) -> NoReturn:
    raise SystemExit(f"stopped by {signal.Signals(number).name}")


def child_environment(options: argparse.Namespace, scratch: Path) -> dict[str, str]:
    """What child processes get beside this process's environment."""
    extra = {"TRITON_INTERPRET": "1"} if options.device == "cpu" else {}
    home = Path(os.environ.get("TRITON_HOME") or Path.home())
    if "TRITON_CACHE_DIR" not in os.environ and not os.access(home, os.W_OK):
        extra["TRITON_CACHE_DIR"] = str(scratch / "triton")
    return extra


def main(arguments: Sequence[str] | None = None, started: float | None = None) -> int:
    """Runs the check; returns the exit code."""
    options = parse(arguments)
    clock = Clock(options.minutes, started=started)
    gpu, archs, device = "cpu", None, "cpu"
    if options.device == "cuda":
        why = why_no_gpu()
        if why is not None:
            print(f"error: {why}; --device cpu tries the stages without one", file=sys.stderr)
            return 2
        import torch

        about = torch.cuda.get_device_properties(0)
        gpu, device = about.name, "cuda:0"
        archs = extension.architecture((about.major, about.minor))
    signal.signal(signal.SIGTERM, _stop)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        scratch = Path(folder)
        extra = child_environment(options, scratch)
        beside, sentence = extension.locate(
            ROOT, scratch, build=options.build, archs=archs, limit=min(240.0, 0.4 * clock.left)
        )
        if beside is not None:
            extra[EXTENSION] = beside
        about = {
            "commit": options.commit or environment.commit(ROOT), "device": device, "gpu": gpu,
            "minutes": options.minutes, "stages_asked": list(options.stages),
            "only": options.only, "extension": sentence,
        }  # fmt: skip
        record = Record(_folder(options, gpu) / "gpu-check.json", about, clock, say)
        say(f"gpu-check on {gpu}, {options.minutes:g} minutes; extension {sentence}")
        check = Check(options, clock, record, device, extra)
        timer = _watch(check, record, clock)
        try:
            check.run()
            record.finish()
        finally:
            timer.cancel()
            check.close()
            record.write()
    failed = sum(stage["failed"] for stage in record.content["stages"].values())
    state = "complete" if record.content["complete"] else "cut: see each stage"
    say(f"{record.file}: {'passed' if record.ok else f'{failed} steps failed'}, {state}")
    return 0 if record.ok else 1


if __name__ == "__main__":
    sys.exit(main(started=STARTED))
