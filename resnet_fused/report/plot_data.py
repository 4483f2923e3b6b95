"""Reads a benchmark's record for the plots: numbers that may be missing, names, groups of rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]
Row = Mapping[str, Any]

LEVELS = ("model", "block", "kernel")
AGAIN = "fused_again"  # the same variant once more: it shows the noise, it is no peer


class NothingToDrawError(ValueError):
    """A record that lacks what a plot shows; the message says what."""


def number(value: Any) -> float | None:
    """The value as a finite float, or None: absent, NaN, infinite or no number at all."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def positive(value: Any) -> float | None:
    """The value where it is a finite number above zero, else None."""
    found = number(value)
    return found if found is not None and found > 0 else None


def rows(record: Record, level: str | None = None) -> list[Row]:
    """The record's rows, of one level or all."""
    found = record.get("rows") or []
    return [row for row in found if level is None or about(row).get("level") == level]


def about(row: Row) -> Mapping[str, Any]:
    """A row's subject."""
    return row.get("subject") or {}


def variants(row: Row) -> dict[str, Mapping[str, Any]]:
    """A row's variants: eager and fused first, the repeated one left out."""
    found = row.get("variants") or {}
    first = [name for name in ("eager", "fused") if name in found]
    return {name: found[name] or {} for name in dict.fromkeys([*first, *found]) if name != AGAIN}


def title(row: Row) -> str:
    """A row in words: resnet50 inference, batch 8, float32."""
    name = f"{about(row).get('name', 'unnamed')} {about(row).get('op', '')}".strip()
    return f"{name}, {condition(row)}"


def condition(row: Row) -> str:
    """A row's batch and dtype in words: batch 8, float32."""
    text = f"batch {about(row).get('batch', '?')}, {about(row).get('dtype', 'no dtype')}"
    size = about(row).get("size", 224)
    usual = about(row).get("level") == "kernel" or size == 224
    return text if usual else f"{text}, {size} px"


def ratio(row: Row, variant: str, baseline: str = "eager") -> Mapping[str, Any] | None:
    """The record's ratio of a pair of variants if it holds one with a finite median."""
    for found in row.get("ratios") or []:
        if (found.get("baseline"), found.get("variant")) == (baseline, variant):
            return found if positive(found.get("median")) else None
    return None


def interval(found: Mapping[str, Any]) -> tuple[float, float, float]:
    """A ratio's median, low and high; an end that is missing falls together with the median."""
    median = positive(found.get("median")) or math.nan
    low, high = positive(found.get("low")), positive(found.get("high"))
    return median, median if low is None else low, median if high is None else high


def is_wrong(variant: Mapping[str, Any]) -> bool:
    """Whether the variant was judged wrong, so that it has no time."""
    return "wrong" in variant


def shares(variant: Mapping[str, Any]) -> dict[str, float | None]:
    """What a variant's step was made of: seconds by layer, or by kind of kernel; else empty."""
    found = variant.get("layer_s") or variant.get("op_s") or {}
    return {} if is_wrong(variant) else {str(name): number(time) for name, time in found.items()}


def least(row: Row, by_kernel: bool) -> dict[str, Any]:
    """The roofline's seconds by layer, or by kind of kernel, where the record has them."""
    limit = row.get("limit") or {}
    if by_kernel:
        return dict(limit.get("ops") or {})
    return {str(la.get("name")): la.get("seconds") for la in limit.get("layers") or []}


def by_kernel(row: Row) -> bool:
    """Whether a row's steps are told apart by kind of kernel, as a training step's are."""
    return any(variant.get("op_s") for variant in variants(row).values())


def seconds(variant: Mapping[str, Any]) -> float | None:
    """The median time of a call in seconds, or None."""
    return None if is_wrong(variant) else positive(variant.get("median_s"))


def flop_rate(row: Row, name: str) -> float | None:
    """FLOP/s that a variant reached: the row's FLOPs in its median time."""
    variant = variants(row).get(name, {})
    time, flops = seconds(variant), positive((row.get("limit") or {}).get("flops"))
    return flops / time if time and flops else None


def groups(found: Iterable[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Rows of one level, op, batch and dtype together, with a title for each group."""
    together: dict[tuple[Any, ...], list[Row]] = {}
    for row in found:
        who = tuple(about(row).get(name) for name in ("level", "op", "batch", "dtype"))
        together.setdefault(who, []).append(row)
    for (level, op, _, _), members in together.items():
        yield f"{level} {op}, {condition(members[0])}", members


def omitted(found: Iterable[Row]) -> dict[str, list[str]]:
    """Reason -> names of the variants that were left out for it, in some row."""
    reasons: dict[str, list[str]] = {}
    for row in found:
        for name, why in (row.get("omitted") or {}).items():
            names = reasons.setdefault(str(why), [])
            if name not in names:
                names.append(name)
    return reasons


def scaled(value: float, units: Sequence[tuple[float, str]]) -> tuple[float, str]:
    """The value in the largest unit that leaves at least 1, with that unit's name.

    Args:
        value: in the base unit.
        units: (size in base units, name), the largest first; the last takes what is left.
    """
    for size, unit in units[:-1]:
        if abs(value) >= size:
            return value / size, unit
    return value / units[-1][0], units[-1][1]


FLOPS = ((1e15, "PFLOP/s"), (1e12, "TFLOP/s"), (1e9, "GFLOP/s"), (1e6, "MFLOP/s"))
BYTES_A_SECOND = ((1e12, "TB/s"), (1e9, "GB/s"), (1e6, "MB/s"))
BYTES = ((2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"))


def say(value: float | None, units: Sequence[tuple[float, str]] = ((1.0, ""),)) -> str:
    """The value with three significant digits, or all of its whole ones, and a fitting unit."""
    if value is None:
        return "none"
    size, unit = scaled(value, units)
    # An exponent only for what no reader wants as zeros.
    whole = math.floor(math.log10(abs(size))) if size else 0
    text = f"{size:.2e}" if whole < -5 else f"{size:,.{max(0, 2 - whole)}f}"
    return f"{text} {unit}".rstrip()
