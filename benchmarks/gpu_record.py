"""One command on a machine with a GPU: is it right, how fast, and everything in one archive.

    make gpu-record PYTHON=python3 BUDGET_MIN=8 OUT=folder

Steps, the most telling first, each with its share of the time: the machine; the PTX layer on the
hardware against the emulator; every configuration on integers; random data against float64;
compute-sanitizer; the ceilings of the plans; a network in one launch; tuned configurations; the
benchmark; its page. All that touches the GPU runs in child processes with time limits. It ends by
itself within the budget; what it reached lies in gpu-record.tar.gz, written after every step, and
docs/gpu_record.md reads it. Exit codes: 0 passed; 1 something is wrong; 2 no GPU or bad arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

STARTED = time.monotonic()
FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
for _entry in (str(ROOT), str(FOLDER)):
    if _entry not in sys.path:
        sys.path.insert(0, _entry)

import gpu_check  # noqa: E402
from gpu import command, driver, environment, extension, parts, recorded, sanitizer  # noqa: E402
from gpu.record import Clock, Record, one_line, write_atomically  # noqa: E402
from gpu.worker import EXTENSION  # noqa: E402

SHARES = {
    "environment": 25.0,
    "conformance": 45.0,
    "exact": 70.0,
    "bounds": 70.0,
    "sanitizer": 50.0,
    "ceilings": 12.0,
    "one_launch": 40.0,
    "tuning": 55.0,
    "bench": 120.0,
    "page": 15.0,
}
"""Step -> its share of the time. What a step does not need goes to those behind it."""

NAME = "gpu-record"
WRITTEN = (
    f"{NAME}.json", f"{NAME}.tar.gz", "conformance.json", "tune.json", "bench.json", "bench.html",
    "bench-part.json",
)  # fmt: skip
LEAST_S = 8.0  # no child is started with less: importing torch takes most of it
MOST_RESTARTS = 4
DEFAULT_MINUTES = 8.0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = gpu_check._Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--budget-min", dest="minutes", type=gpu_check._minutes,
                        default=DEFAULT_MINUTES, help="for everything")  # fmt: skip
    parser.add_argument("--output", type=command.path, default=ROOT / "build" / NAME, help="folder")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda",
                        help="cpu: the same steps, tiny, with stand-ins")  # fmt: skip
    parser.add_argument("--steps", type=_steps, default=tuple(SHARES),
                        help="some of them; the first always runs")  # fmt: skip
    parser.add_argument("--only", default="", help="of the checks, those with a word so begun")
    parser.add_argument("--processes", type=gpu_check._processes, help="worker processes")
    parser.add_argument("--build", action="store_true",
                        help="build extension and driver where they are missing")  # fmt: skip
    parser.add_argument("--driver", type=Path, help="a resnet_fused_driver that was carried")
    parser.add_argument("--sanitizer", help="the compute-sanitizer to run")
    parser.add_argument("--conformance", help="a program in the place of tools/conformance.py")
    parser.add_argument("--results", type=command.path, help="where GPU/DATE-COMMIT.json goes")
    parser.add_argument("--peers", type=recorded.peer_names, default=(), help="that prepare long")
    parser.add_argument("--commit", help="where there is no .git")
    chosen = parser.parse_args(arguments)
    if chosen.driver is not None and driver.find(chosen.driver) is None:
        parser.error(f"--driver: got '{chosen.driver}'; accepted is a program")
    try:
        chosen.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output: '{chosen.output}' can't be made: {error.strerror}")
    for name in WRITTEN:  # of an earlier run
        (chosen.output / name).unlink(missing_ok=True)
    chosen.stages = ()  # of gpu_check: its stages are steps here
    return chosen


def _steps(text: str) -> tuple[str, ...]:
    names = {word.strip() for word in text.split(",") if word.strip()}
    if names - set(SHARES) or not names:
        raise argparse.ArgumentTypeError(f"got {text!r}; accepted are {', '.join(SHARES)}")
    return tuple(name for name in SHARES if name in names or name == "environment")


class Recording(gpu_check.Check):
    """One run: gpu_check's stages and further steps under one clock, in one record.

    Args:
        options: the command line's.
        clock: of the whole run.
        record: what it writes.
        gpu: what `probe` found.
        extra: environment variables of every child process.
        scratch: a folder for logs and what passes between steps.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        clock: Clock,
        record: Record,
        gpu: Mapping[str, Any],
        extra: Mapping[str, str],
        scratch: Path,
    ) -> None:
        super().__init__(
            options, clock, record, "cuda:0" if options.device == "cuda" else "cpu", extra
        )
        self.shares = {name: SHARES[name] for name in options.steps}
        self.gpu, self.scratch, self.logs = gpu, scratch, scratch / "logs"
        self.logs.mkdir(exist_ok=True)
        self._building: command.Child | None = None
        self._parts = parts.Parts(
            shlex.join(["gpu_record.py", *sys.argv[1:]]), record.content["commit"]
        )

    def run(self) -> None:
        """Runs the steps in order; the archive is whole after each."""
        if {"sanitizer", "ceilings", "one_launch"} & self.shares.keys():
            self._begin_building()
        for name in self.shares:
            self._one(name, self.clock.deadline(name, self.shares))
            self.archive()

    def _one(self, name: str, until: float) -> None:
        if self.clock.left <= 0:
            self.record.begin(name, 1)
            self.record.end("the time was over")
            return
        try:
            getattr(self, name)(until)
        except gpu_check.PoolError as error:
            self.record.fail(f"{name}: {error}")
            self.record.end(str(error))
        except Exception as error:  # a step's own defect shall not cost the others
            self.record.fail(f"{name}: {type(error).__name__}: {error}")
            if self.record._open is not None:
                self.record.end("it broke")

    def close(self) -> None:
        """Ends every child."""
        super().close()
        command.end_all()

    # The steps.

    def conformance(self, until: float) -> None:
        """The PTX layer, instruction by instruction, on the hardware against the emulator."""
        self.record.begin("conformance", 1)
        words, why = self._conformance_command()
        if words is None:
            self.record.step("conformance", {"ok": None, "skipped": f"not run: {why}"})
            self.record.end()
            return
        file = self.options.output / "conformance.json"
        limit = until - self.clock.now()
        ran = command.run([*words, "--json", str(file)], limit, self.logs / "conformance.log")
        found: dict[str, Any] = {"code": ran.code, "seconds": ran.seconds}
        content = parts.read(file)
        if content is not None:
            outcomes = content.get("outcomes", [])
            wrong = [one for one in outcomes if one["wrong"]]
            found |= {"comparisons": len(outcomes), "wrong": len(wrong)}
            found |= {"rounding": content.get("rounding")}
        if ran.code is None:
            why = f"cut after {limit:.0f} s"
            self.record.step("conformance", {**found, "ok": None, "skipped": why})
            self.record.end("its time was over")
            return
        found["ok"] = ran.code == 0
        if not found["ok"]:
            found |= {"error": one_line(ran.tail[-400:]), "tail": ran.tail}
        self.record.step("conformance", found, f"{found.get('comparisons', 0)} comparisons")
        self.record.end()

    def _conformance_command(self) -> tuple[list[str] | None, str]:
        """What to run, or None and why nothing can be."""
        if self.options.conformance:
            return [self.options.conformance], ""
        if self.device == "cpu":
            return None, "there is no hardware; `make conformance` holds the emulator to itself"
        toolchain = _toolchain()
        nvcc, why = toolchain.find_nvcc()
        if nvcc is None:
            return None, why or "no nvcc"
        if shutil.which("nvidia-smi") is None:
            return None, "no nvidia-smi, which tells the architecture"
        if toolchain.find_cxx() is None:
            return None, "no C++ compiler for the emulator"
        tool = str(ROOT / "tools" / "conformance.py")
        return [sys.executable, tool, "--require-gpu"], ""

    def _begin_building(self) -> None:
        """The driver is built beside what needs no quiet machine."""
        wanted = self.options.build and self.device != "cpu"
        if wanted and driver.find(self.options.driver) is None:
            archs = extension.architecture(tuple(self.gpu["capability"]))
            jobs = max(2, (os.cpu_count() or 2) // 2)
            self._building = driver.build(archs, self.logs / "driver.log", jobs)

    def sanitizer(self, until: float) -> None:
        """compute-sanitizer over the driver without torch, else over gpu_check's program."""
        tool, why = sanitizer.available(self.options.sanitizer)
        program = self._driver(until) if tool is not None else None
        if tool is not None and program is None:
            # A GPU that the tool can't look at is no failure there either.
            with driver.excusing(self.record):
                super().sanitizer(until)
            return
        tools = sanitizer.TOOLS
        self.record.begin("sanitizer", len(tools))
        if tool is None:
            for name in tools:
                self.record.step(name, {"ok": False, "error": why})
            self.record.end()
            return
        cut: list[str] = []

        def report(name: str, one: dict[str, Any]) -> None:
            if one.pop("cut", False):
                cut.append(name)
            self.record.step(name, one, f"{one['passed']} of {one['checks']} calls")

        assert program is not None
        left = lambda: until - self.clock.now()  # noqa: E731
        calls = driver.calls_for(self.gpu["capability"])
        driver.run(tool, program, left, report, self.logs, tools, self.extra, calls)
        self.record.end(f"no time for {', '.join(cut)}" if cut else None)

    def _driver(self, until: float) -> Path | None:
        """The driver; one that is being built is waited for."""
        if self._building is not None:
            ran = self._building.wait(0.4 * (until - self.clock.now()))
            self._building = None
            self.record.content["driver"] = (
                "built now" if ran.code == 0 else f"not built: {one_line(ran.tail[-300:])}"
            )
        found = driver.find(self.options.driver)
        self.record.content.setdefault(
            "driver", str(found) if found else "none, none was asked for"
        )
        return found

    def _order(self, seconds: float, output: Path, cache: str, **more: Any) -> list[str]:
        order = {
            "device": self.options.device, "seconds": seconds, "output": str(output),
            "admission": str(self.record.file), "scratch": str(self.scratch), **more,
        }  # fmt: skip
        return [sys.executable, "-m", "gpu.recorded", cache, json.dumps(order)]

    def _environment(self, cache: str) -> dict[str, str]:
        """Of a child that may write into a user's cache: one of its own."""
        return {**self.extra, "RESNET_FUSED_CACHE": str(self.scratch / f"cache-{cache}")}

    def tuning(self, until: float) -> None:
        """Configurations against the chooser's picks, on the heaviest layers."""
        self.record.begin("tuning", 0)
        super().close()  # the checks' processes hold memory of the GPU
        file = self.options.output / "tune.json"
        limit = until - self.clock.now()
        if limit < LEAST_S:
            self.record.end("no time was left for it")
            return
        words = self._order(limit - LEAST_S / 2, file, "tune")
        ran = command.run(words, limit, self.logs / "tuning.log", self._environment("tune"))
        content = parts.read(file)
        layers = content["layers"] if content is not None else []
        self.record.more(len(layers))
        for layer in layers:
            wrong = "; ".join(f"{name}: {text}" for name, text in layer["wrong"].items())
            broken = wrong or layer["problem"]
            gain = layer["gain"]
            text = f"{layer['before']} -> {layer['after'] or 'the same'}"
            if gain:
                text += f", {layer['best']} {gain['median']:.3f}x ({gain['low']:.3f} ..)"
            found = {**layer, "ok": not broken, **({"error": broken} if broken else {})}
            self.record.step(f"{layer['key']} {layer['implementation']}", found, text)
        for name, why in (content or {}).get("omitted", {}).items():
            self.record.more(1)
            self.record.step(name, {"ok": None, "skipped": why})
        self._ended("tuning", ran, content is not None and content["complete"])

    def _ended(self, name: str, ran: command.Ran, complete: bool) -> None:
        """Closes a step that was a child."""
        if ran.code not in (0, None):
            self.record.more(1)
            error = f"it ended with exit code {ran.code}: {one_line(ran.tail[-400:])}"
            self.record.step(f"{name} itself", {"ok": False, "error": error, "tail": ran.tail})
        self.record.end(None if complete else "its time was over")

    def bench(self, until: float) -> None:
        """The benchmark; a process that is lost costs the row that it was at."""
        self.record.begin("bench", 0)
        super().close()  # the checks' processes hold memory of the GPU
        # In the output: were this process killed, what was reached would lie there.
        keys, part = self.scratch / "keys.json", self.options.output / "bench-part.json"
        one, restarts = self._parts, 0
        while one.left and restarts <= MOST_RESTARTS:
            limit = until - self.clock.now()
            if limit < LEAST_S:
                break
            part.unlink(missing_ok=True)
            words = self._order(
                limit - LEAST_S / 2, part, "bench",
                skip=one.done, keys=str(keys), command=one._command, peers=self.options.peers,
            )  # fmt: skip
            log = self.logs / f"bench-{restarts}.log"
            ran = command.run(words, limit, log, self._environment("bench"))
            told = parts.read(keys)
            if told is None:
                self._ended("bench", ran, False)
                return
            if not one.keys:
                one.keys = told["keys"]
                self.record.more(len(one.keys))
            found = parts.read(part)
            lost = ran.code not in (0, None)
            blame = f"its process ended: {one_line(ran.tail[-200:])}" if lost else None
            self._rows(*one.add(found, blame))
            part.unlink(missing_ok=True)
            if not (lost or (found is not None and found.get("stopped"))):
                break
            restarts += 1
        for key, why in ((one.record or {}).get("failed") or {}).items():
            if key not in one.blamed:  # too little memory, say: it ended no process
                self.record.step(key, {"ok": None, "skipped": why})
        self.record.end(None if not one.left else "its time was over")

    def _rows(self, rows: Sequence[Mapping[str, Any]], blamed: str) -> None:
        """Enters rows and the subject that ended a process; writes the benchmark's record."""
        for row in rows:
            wrong = parts.wrong_of_ours(row)
            found: dict[str, Any] = {"ok": not wrong, **({"error": wrong} if wrong else {})}
            self.record.step(row["key"], found, parts.line(row))
        if blamed:
            self.record.step(blamed, {"ok": False, "error": self._parts.blamed[blamed]})
        if self._parts.record is not None:
            write_atomically(self.options.output / "bench.json", self._parts.record)
            write_atomically(self.result_file(), self._parts.record)

    def result_file(self) -> Path:
        """Where the benchmark's record lies among other machines'."""
        given = self.options.results
        if given is None:
            given = FOLDER if self.device != "cpu" else self.options.output
            given = given / "results"
        slug = re.sub(r"[^a-z0-9]+", "-", str(self.gpu["name"]).lower()).strip("-") or "gpu"
        commit = (self.record.content["commit"] or "unknown")[:12]
        return given / slug / f"{self.record.content['date'][:10]}-{commit}.json"

    def page(self, until: float) -> None:
        """The benchmark's page."""
        self.record.begin("page", 1)
        source, html = self.options.output / "bench.json", self.options.output / "bench.html"
        if self._parts.record is None:
            self.record.step("page", {"ok": None, "skipped": "there is no row to show"})
            self.record.end()
            return
        words = [sys.executable, "-m", "gpu.recorded", "page", str(source), str(html)]
        limit = until - self.clock.now()
        ran = command.run(words, limit, self.logs / "page.log", self.extra)
        found: dict[str, Any] = {"ok": ran.code == 0, "seconds": ran.seconds}
        if "No module named" in ran.text:  # matplotlib or jinja2: the record is there without them
            found |= {"ok": None, "skipped": one_line(ran.tail[-200:])}
        elif ran.code is None:
            found |= {"ok": None, "skipped": f"cut after {limit:.0f} s"}
        elif ran.code:
            found |= {"error": one_line(ran.tail[-400:])}
        self.record.step("page", found)
        self.record.end("its time was over" if ran.code is None else None)

    def archive(self) -> None:
        """Everything in one file: records, page, logs."""
        self.record.write()
        out: Path = self.options.output
        file = out / f"{NAME}.tar.gz"
        files = [(path.name, path) for path in sorted(out.iterdir()) if path.is_file()]
        files += [(f"logs/{path.name}", path) for path in sorted(self.logs.iterdir())]
        result = self.result_file()
        if result.exists():
            files.append((f"benchmarks/results/{result.parent.name}/{result.name}", result))
        beside = out / f".{file.name}.{os.getpid()}"
        with contextlib.suppress(OSError):
            with tarfile.open(beside, "w:gz") as made:
                for name, path in files:
                    if path.name in (file.name, beside.name):
                        continue
                    data = path.read_bytes()  # a log may grow meanwhile
                    about = tarfile.TarInfo(f"{NAME}/{name}")
                    about.size, about.mtime = len(data), int(path.stat().st_mtime)
                    made.addfile(about, io.BytesIO(data))
            beside.replace(file)


def _toolchain() -> Any:
    """tools/toolchain.py, without leaving its folder on the path: names there are in use here."""
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import toolchain
    finally:
        sys.path.remove(str(ROOT / "tools"))
    return toolchain


def probe(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """What a child process sees: {"name", "capability"}, or {"why"} there is nothing."""
    words = [sys.executable, "-m", "gpu.recorded", "probe", options.device]
    ran = command.run(words, 150, scratch / "probe.log")
    lines = [line for line in ran.text.splitlines() if line.startswith("{")]
    if ran.code != 0 or not lines:
        said = "no answer within 150 s" if ran.code is None else one_line(ran.tail)
        return {"why": f"a process that asks torch for the GPU failed: {said}"}
    return json.loads(lines[-1])


def _watch(recording: Recording, clock: Clock) -> threading.Timer:
    """Ends the process when its time is over, whatever it waits for; the archive is whole."""

    def end() -> None:
        recording.close()
        recording.record.content["watchdog"] = "the time was over while something still ran"
        recording.archive()
        gpu_check.say(f"{recording.record.file}: cut by the clock")
        os._exit(0 if recording.record.ok else 1)

    timer = threading.Timer(clock.left + 4, end)
    timer.daemon = True
    timer.start()
    return timer


def main(arguments: Sequence[str] | None = None, started: float | None = None) -> int:
    """Runs everything; returns the exit code."""
    options = parse(arguments)
    clock = Clock(options.minutes, started=started)
    signal.signal(signal.SIGTERM, gpu_check._stop)
    with tempfile.TemporaryDirectory(prefix=f"{NAME}-") as folder:
        scratch = Path(folder)
        gpu = probe(options, scratch)
        if "why" in gpu:
            print(f"error: {gpu['why']}; --device cpu tries the steps without one", file=sys.stderr)
            return 2
        extra = gpu_check.child_environment(options, scratch)
        beside_folder = scratch / "extension"
        beside_folder.mkdir()
        archs = extension.architecture(tuple(gpu["capability"])) if gpu["capability"] else None
        beside, sentence = extension.locate(
            ROOT, beside_folder, build=options.build, archs=archs,
            limit=min(240.0, 0.35 * clock.left),
        )  # fmt: skip
        if beside is not None:
            extra[EXTENSION] = beside
        about = {
            "kind": NAME, "commit": options.commit or environment.commit(ROOT),
            "device": options.device, "gpu": gpu["name"], "minutes": options.minutes,
            "steps_asked": list(options.steps), "only": options.only, "extension": sentence,
        }  # fmt: skip
        record = Record(options.output / f"{NAME}.json", about, clock, gpu_check.say)
        gpu_check.say(f"{NAME} on {gpu['name']}, {options.minutes:g} min; extension {sentence}")
        recording = Recording(options, clock, record, gpu, extra, scratch)
        timer = _watch(recording, clock)
        try:
            recording.run()
            record.finish()
        finally:
            timer.cancel()
            recording.close()
            recording.archive()
    failed = sum(stage["failed"] for stage in record.content["stages"].values())
    state = "complete" if record.content["complete"] else "cut: see each step"
    gpu_check.say(f"{record.file}: {'passed' if record.ok else f'{failed} failed'}, {state}")
    return 0 if record.ok else 1


if __name__ == "__main__":
    sys.exit(main(started=STARTED))
