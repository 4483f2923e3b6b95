"""Two records side by side: what became faster, what slower, what cannot be said; and the gate.

Samples of two runs are no pairs, so the interval of a ratio of medians is put together from the
order-statistics intervals of both. Whatever a whole machine does between two runs (its clocks, its
neighbours) moves eager PyTorch as well, which was timed in turns with everything else: a verdict
is given only when the ratio itself and the ratio beside eager's agree on it.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from resnet_fused.bench import record as records
from resnet_fused.bench.load import Load
from resnet_fused.bench.old_record import OLD_SCHEMA, from_schema_1
from resnet_fused.bench.timing import median_interval

ALWAYS = ("fused", "triton", "cuda")  # ours that are timed whoever is asked for
OURS = (*ALWAYS, "frozen", "parts")  # the variants that the gate guards
BASELINE = "eager"
AGAIN = "fused_again"  # the noise floor's second run of the same thing: never compared
# Of each record's median; both hold together with probability 0.95 at least (Bonferroni).
CONFIDENCE = 0.975
# What six samples reach on either side, the fewest that a budget leaves.
LEAST_CONFIDENCE = 0.93

FASTER, SLOWER, SAME = "faster", "slower", "the same"
NO_VERDICT, NOT_COMPARABLE = "no verdict", "not comparable"
WRONG, GONE, NEW = "wrong", "only in A", "only in B"
VERDICTS = (FASTER, SLOWER, SAME)

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Estimate:
    """A ratio, above 1 where B is better, and the interval that holds it with `confidence`."""

    median: float
    low: float
    high: float
    confidence: float

    def __str__(self) -> str:
        return f"{self.median:.3f}x ({self.low:.3f} .. {self.high:.3f} at {self.confidence:.0%})"

    def off(self) -> float:
        """How far from 1 the interval reaches, as a fraction."""
        return max(abs(1 - self.low), abs(self.high - 1))


@dataclass(frozen=True)
class Change:
    """One variant of one row in both records.

    Attributes:
        key: of the row in B, or in A where B lacks it.
        variant: its name.
        verdict: one of the words at the top of this file.
        text: the verdict as a sentence's part, with its reason.
        a_s, b_s: medians in seconds a call; None where there is none.
        ratio: A's median over B's: above 1, B is faster.
        beside_eager: B's gain over eager over A's gain, from pairs; None where eager is missing.
        noise: what two runs of one thing may differ by, as a fraction: the larger of both records'.
    """

    key: str
    variant: str
    verdict: str
    text: str
    a_s: float | None = None
    b_s: float | None = None
    ratio: Estimate | None = None
    beside_eager: Estimate | None = None
    noise: float | None = None

    @property
    def ours(self) -> bool:
        """Whether this is one of this package's own variants."""
        return self.variant in OURS

    @property
    def slowdown(self) -> float:
        """By what fraction B is slower at least, as both estimates say; 0 when it may not be."""
        found = [e.high for e in (self.ratio, self.beside_eager) if e is not None]
        return max(0.0, 1 / max(found) - 1) if found else 0.0


@dataclass(frozen=True)
class Comparison:
    """Everything that two records say about each other.

    Attributes:
        a, b: what the records are: file, commit, date, machine.
        changes: one for each row and variant.
        only_a, only_b: keys of rows that the other record lacks.
        notes: what else differs (versions, driver), in sentences.
    """

    a: Mapping[str, Any]
    b: Mapping[str, Any]
    changes: tuple[Change, ...]
    only_a: tuple[str, ...] = ()
    only_b: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def judged(self) -> list[Change]:
        """Our variants on which a verdict could be given."""
        return [change for change in self.changes if change.ours and change.verdict in VERDICTS]

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Gate:
    """The outcome of a regression gate.

    Attributes:
        limit: the slowdown that is let through, as a fraction, beside the noise.
        failures: what it does not let through, in sentences.
        judged: how many of our variants had a verdict.
        unjudged: those that had none, and why.
    """

    limit: float
    failures: tuple[str, ...]
    judged: int
    unjudged: tuple[str, ...] = field(default=())

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        """The fields and the outcome, for JSON."""
        return {**asdict(self), "ok": self.ok}


def load(path: Path | str) -> dict[str, Any]:
    """Reads a record of this package, one of a whole model from before schema 2 included.

    Args:
        path: a JSON file.

    Returns:
        A record of schema 2, or what an older one says in its words.

    Raises:
        ValueError: no such file, no JSON, no record; the message names the file.
    """
    file = Path(path)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise ValueError(f"{file}: is no JSON ({error})") from error
    is_old = isinstance(content, dict) and content.get("schema") == OLD_SCHEMA
    if is_old and content.get("kind") == "model":
        try:
            return from_schema_1(content)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}: a record of schema 1 lacks {error}") from error
    found = records.read(file)
    _check_medians(file, found)
    return found


def _check_medians(file: Path, found: Row) -> None:
    """A median that is not that of its samples: somebody changed one of the two by hand."""
    for row in found["rows"]:
        for name, variant in row["variants"].items():
            samples, median = variant.get("samples_s"), variant.get("median_s")
            if not samples or median is None:
                continue
            if not math.isclose(median, statistics.median(samples), rel_tol=1e-6):
                raise ValueError(
                    f"{file}: {row['key']}: median_s of {name} is not the median of its samples_s"
                )


def compare(
    a: Mapping[str, Any], b: Mapping[str, Any], *, force: bool = False,
    only: Callable[[str], bool] = lambda key: True,
) -> Comparison:  # fmt: skip
    """Compares two records row by row and variant by variant.

    Args:
        a: the older record, as `load` returns it.
        b: the newer one.
        force: compare across machines and dtypes too, which by itself is only said.
        only: which keys count.

    Returns:
        The changes in B's order, rows that only A holds behind them.
    """
    old = {row["key"]: row for row in a["rows"] if only(row["key"])}
    new = {row["key"]: row for row in b["rows"] if only(row["key"])}
    pairs = [(old[key], row) for key, row in new.items() if key in old]
    taken = {row["key"] for _, row in pairs}
    other_dtype = _same_but_dtype(
        [row for key, row in old.items() if key not in taken],
        [row for key, row in new.items() if key not in taken],
    )
    pairs += other_dtype
    left = {row["key"] for row, _ in pairs}
    right = {row["key"] for _, row in pairs}
    only_a = tuple(key for key in old if key not in left)
    only_b = tuple(key for key in new if key not in right)
    changes: list[Change] = []
    for before, after in pairs:
        why_not = None if force else _not_comparable(a, b, before, after)
        changes += _row_changes(before, after, why_not)
    for key in only_a:
        changes += [
            Change(key, name, GONE, "only in A: the row is not in B", _median(variant), None)
            for name, variant in _variants(old[key]).items()
        ]
    return Comparison(
        _about(a), _about(b), tuple(changes), only_a, only_b, tuple(_notes(a, b))
    )  # fmt: skip


def gate(found: Comparison, limit: float) -> Gate:
    """Judges a comparison: our variants may not become slower, wrong, or disappear.

    Args:
        found: what `compare` returned.
        limit: the slowdown that is let through beside the noise of both records, as a fraction.

    Returns:
        The outcome. With nothing to judge it fails too: such a gate guards nothing.

    Raises:
        ValueError: limit is negative or not finite.
    """
    if not (math.isfinite(limit) and limit >= 0):
        raise ValueError(f"gate: expected a fraction of 0 or more, got {limit}")
    failures, unjudged = [], []
    for change in found.changes:
        name = f"{change.key}: {change.variant}"
        if not change.ours:
            continue
        if change.verdict in (WRONG, GONE):
            failures.append(f"{name} {change.text}")
        elif change.verdict in (NO_VERDICT, NOT_COMPARABLE):
            unjudged.append(f"{name}: {change.text}")
        elif change.slowdown > limit + (change.noise or 0.0):
            failures.append(
                f"{name} is at least {change.slowdown:.1%} slower, above the gate of {limit:.1%} "
                f"plus a noise of {change.noise or 0.0:.1%}"
            )
    if not found.judged and not failures:
        failures.append("nothing could be judged, so the gate guards nothing")
    return Gate(limit, tuple(failures), len(found.judged), tuple(unjudged))


def _same_but_dtype(old: Sequence[Row], new: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Rows without a partner that differ from just one other in nothing but the dtype."""

    def rest(row: Row) -> str:
        about = {key: value for key, value in row["subject"].items() if key != "dtype"}
        return json.dumps(about, sort_keys=True)

    def alone(rows: Sequence[Row]) -> dict[str, Row]:
        names = [rest(row) for row in rows]
        return {n: row for n, row in zip(names, rows, strict=True) if names.count(n) == 1}

    before, after = alone(old), alone(new)
    return [(before[name], row) for name, row in after.items() if name in before]


def _not_comparable(a: Row, b: Row, before: Row, after: Row) -> str | None:
    """Why two rows say nothing about each other, or None."""
    one, two = before["subject"], after["subject"]
    for name in ("dtype", "device", "size", "seed"):
        if one.get(name) != two.get(name):
            return f"other {name}: {one.get(name)} against {two.get(name)}"
    mine, yours = (_place(record["machine"], one["device"]) for record in (a, b))
    for name, value in mine.items():
        if value != yours[name]:
            return f"other machine, {name}: {value} against {yours[name]}"
    return None


def _place(machine: Row, device: str) -> dict[str, Any]:
    """What a time depends on, of the processor or the GPU that it was taken on."""
    if device.startswith("cuda"):
        index = int(device.partition(":")[2] or 0)
        gpus = machine.get("gpus") or []
        gpu = gpus[index] if index < len(gpus) else {}
        return {"GPU": gpu.get("name"), "capability": gpu.get("capability")}
    names = {"cpu": "CPU", "cpu_capability": "vector units", "threads": "threads"}
    return {word: machine.get(name) for name, word in names.items()}


def _row_changes(before: Row, after: Row, why_not: str | None) -> list[Change]:
    old, new = _variants(before), _variants(after)
    changes = []
    for name in [*old, *(other for other in new if other not in old)]:
        change = _presence(before, after, name) or (
            Change(
                after["key"], name, NOT_COMPARABLE, f"not comparable: {why_not}",
                _median(old[name]), _median(new[name]),
            )
            if why_not is not None
            else _judged(before, after, name)
        )  # fmt: skip
        changes.append(change)
    return changes


def _presence(before: Row, after: Row, name: str) -> Change | None:
    """The change of a variant that has no time on one side, or None."""
    old, new = _variants(before).get(name), _variants(after).get(name)
    a_s, b_s, key = _median(old), _median(new), after["key"]
    if new is not None and "wrong" in new:
        again = " (as in A)" if old is not None and "wrong" in old else ""
        return Change(key, name, WRONG, f"is wrong{again}: {new['wrong']}", a_s, None)
    if b_s is None:
        why = after.get("omitted", {}).get(name, "it is not in B")
        return Change(key, name, GONE, f"only in A: {why}", a_s, None)
    if a_s is None:
        was = "it was wrong in A" if old is not None and "wrong" in old else "it is not in A"
        return Change(key, name, NEW, f"only in B: {was}", None, b_s)
    return None


def _judged(before: Row, after: Row, name: str) -> Change:
    old, new = _samples(before, name), _samples(after, name)
    ratio, gains = ratio_of_medians(old, new), None
    if name != BASELINE:
        one, two = _pairs(before, name), _pairs(after, name)
        gains = ratio_of_medians(two, one) if one and two else None
    noise = max(_noise(before, name), _noise(after, name))
    change = Change(
        after["key"], name, NO_VERDICT, "", _median(_variants(before)[name]),
        _median(_variants(after)[name]), ratio, gains, noise,
    )  # fmt: skip
    why_not = _refusal(before, "A") or _refusal(after, "B")
    if why_not is None and ratio.confidence < LEAST_CONFIDENCE:
        why_not = f"{len(old)} and {len(new)} samples are too few"
    if why_not is not None:
        return _with(change, NO_VERDICT, f"no verdict: {why_not}")
    estimates = [ratio] if gains is None else [ratio, gains]
    if min(e.low for e in estimates) > 1 + noise:
        return _with(change, FASTER, FASTER)
    if change.slowdown > noise:
        return _with(change, SLOWER, SLOWER)
    within = max(noise, min(e.off() for e in estimates))
    return _with(change, SAME, f"the same within {within:.1%}")


def _with(change: Change, verdict: str, text: str) -> Change:
    return Change(**{**vars(change), "verdict": verdict, "text": text})


def ratio_of_medians(old: Sequence[float], new: Sequence[float]) -> Estimate:
    """The ratio of the medians of two independent series, old over new.

    Its interval goes from the least to the greatest ratio of what the medians' own intervals hold
    (`timing.median_interval`); it misses with at most the sum of both probabilities.

    Args:
        old: positive values, at least one.
        new: the same of the other run.
    """
    low_a, high_a, sure_a = median_interval(sorted(old), CONFIDENCE)
    low_b, high_b, sure_b = median_interval(sorted(new), CONFIDENCE)
    middle = statistics.median(old) / statistics.median(new)
    sure = max(0.0, sure_a + sure_b - 1)
    return Estimate(middle, low_a / high_b, high_a / low_b, sure)


def _variants(row: Row) -> dict[str, Row]:
    return {name: variant for name, variant in row["variants"].items() if name != AGAIN}


def _samples(row: Row, name: str) -> list[float]:
    variant = row["variants"].get(name) or {}
    return list(variant.get("samples_s") or ())


def _pairs(row: Row, name: str) -> list[float]:
    """Eager's time over this variant's, round by round; empty where they were not in turns."""
    eager, mine = _samples(row, BASELINE), _samples(row, name)
    return [e / m for e, m in zip(eager, mine, strict=True)] if len(eager) == len(mine) else []


def _median(variant: Row | None) -> float | None:
    samples = (variant or {}).get("samples_s")
    return statistics.median(samples) if samples else None


def _noise(row: Row, name: str) -> float:
    """What was measured for the row, or how far this variant's samples spread where nothing was."""
    if row.get("noise") is not None:
        return abs(row["noise"])
    samples = _samples(row, name)
    if len(samples) < 2:
        return 0.0  # too few for a verdict anyway
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return (high - low) / middle


def refusal(row: Row) -> str | None:
    """Why the load of the machine forbids a verdict on a row of a record, or None.

    A replayed CUDA graph does not wait for the CPU, whoever else uses that.
    """
    about = row.get("load")
    timed = [one for one in row["variants"].values() if one.get("samples_s")]
    if not about or about.get("quiet", True):
        return None
    if timed and all(one.get("method") == "cuda_graph" for one in timed):
        return None
    fields = ("foreign", "own", "cores", "seconds", "limit")
    why = Load(**{name: about[name] for name in fields if name in about}).refusal
    return why or "the machine was busy"


def _refusal(row: Row, which: str) -> str | None:
    why = refusal(row)
    return None if why is None else f"in {which}, {why}"


def _about(record: Row) -> dict[str, Any]:
    machine = record.get("machine") or {}
    return {
        "commit": record.get("commit"),
        "date": record.get("date"),
        "cpu": machine.get("cpu"),
        "gpus": [gpu.get("name") for gpu in machine.get("gpus") or []],
        "rows": len(record["rows"]),
        "complete": record.get("complete", True),
    }


def _notes(a: Row, b: Row) -> list[str]:
    """What differs and does not forbid a comparison, and what was not reached."""
    notes = []
    old, new = a.get("versions") or {}, b.get("versions") or {}
    for name in [*old, *(other for other in new if other not in old)]:
        if name in old and name in new and old[name] != new[name]:
            notes.append(f"{name}: {old[name]} in A, {new[name]} in B")
    kernels = [record.get("sources") or {} for record in (a, b)]
    changed = [name for name, known in kernels[0].items() if kernels[1].get(name, known) != known]
    if changed:
        notes.append(f"sources changed: {', '.join(changed)}")
    machines = [record.get("machine") or {} for record in (a, b)]
    drivers = [machine.get("driver") for machine in machines]
    if drivers[0] != drivers[1]:
        notes.append(f"driver: {drivers[0]} in A, {drivers[1]} in B")
    for which, record in (("A", a), ("B", b)):
        if not record.get("complete", True):
            notes.append(
                f"{which} is not complete: {record.get('reached')} of {record.get('of')} rows"
            )
    return notes
