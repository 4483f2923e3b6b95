"""The page of a benchmark: one HTML file that needs no other, made from the record alone.

Every number on it stands in a `<data>` element with the record's own value; what is counted from
the record (rows, wins) says so by its class. Sentences of the record are quoted as they are.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from resnet_fused.report import plot_data as data
from resnet_fused.report import plots
from resnet_fused.report.page import templates

SCHEMA = 2
UNITS = {
    "": 1.0, "s": 1.0, "ms": 1e-3, "%": 1e-2, "GiB": 2.0**30, "MiB": 2.0**20, "KiB": 2.0**10,
    "PFLOP/s": 1e15, "TFLOP/s": 1e12, "GFLOP/s": 1e9, "MFLOP/s": 1e6,
    "TB/s": 1e12, "GB/s": 1e9, "MB/s": 1e6,
}  # fmt: skip
_NONE = Markup('<span class="quiet">none</span>')
_FACTS = ("date", "commit", "command", "seconds", "stopped")

Draw = Callable[[dict[str, Any], str], bytes]


def render(record: dict[str, Any]) -> str:
    """Renders the page.

    Args:
        record: of `resnet-fused bench`, schema 2; plots and tables show what it holds, and say what
            it lacks.

    Returns:
        HTML text. Whatever the record holds (names, reasons, messages) is escaped.

    Raises:
        ValueError: the record is of another schema.
    """
    schema = record.get("schema") if isinstance(record, Mapping) else None
    if schema != SCHEMA:
        raise ValueError(f"record: expected one of schema {SCHEMA}, got schema {schema!r}")
    environment = templates()
    environment.filters |= {
        "shown": shown,
        "count": count,
        "gain": gain,
        "rate": rate,
        "value": _value,
    }
    return environment.get_template("bench.html").render(
        record={name: record.get(name) for name in _FACTS},
        subject=_subject(record),
        progress=_progress(record),
        cards=_cards(record),
        wrong=_wrong(record),
        failed=record.get("failed") or {},
        ceilings=record.get("ceilings") or {},
        busy=[row for row in data.rows(record) if (row.get("load") or {}).get("quiet") is False],
        levels=[_level(record, level) for level in data.LEVELS],
        waterfalls=_waterfalls(record),
        roofline=_image(plots.roofline, record),
        memory=_image(plots.memory, record),
        tables={
            name: _flat(record.get(name) or {})
            for name in ("machine", "versions", "settings", "sources")
        },
    )


def shown(value: Any, unit: str = "", digits: int | None = None) -> Markup:
    """A number of the record in a unit, in a `<data>` element that holds the number itself."""
    found = data.number(value)
    if found is None:
        return _NONE
    size = found / UNITS[unit]
    text = data.say(size) if digits is None else f"{size:,.{digits}f}"
    return Markup('<data value="{}">{}</data>').format(repr(value), text)


def rate(value: Any, kind: str) -> Markup:
    """A rate of the record in FLOP/s or bytes/s ("flops", "bandwidth"), in a fitting unit."""
    found = data.number(value)
    units = {"flops": data.FLOPS, "bandwidth": data.BYTES_A_SECOND}[kind]
    unit = data.scaled(found or 0.0, units)[1]
    return Markup("{} {}").format(shown(value, unit), unit)


def count(value: int) -> Markup:
    """How many of something the record holds."""
    return Markup('<data class="count" value="{0}">{0}</data>').format(value)


def gain(found: Mapping[str, Any] | None) -> Markup:
    """A ratio with its interval, coloured by the side of 1 that the whole interval lies on."""
    if not found or data.positive(found.get("median")) is None:
        return _NONE
    middle, low, high = (found.get(name) for name in ("median", "low", "high"))
    known_low, known_high = data.positive(low), data.positive(high)
    kind = "good" if known_low and known_low > 1 else "bad" if known_high and known_high < 1 else ""
    return Markup('<span class="gain {}">{}&times; <small>({} … {})</small></span>').format(
        kind, shown(middle, digits=2), shown(low, digits=2), shown(high, digits=2)
    )


def _value(value: Any) -> Any:
    """What a table of facts shows of a value: numbers as they are, texts quoted."""
    if value is None:
        return _NONE
    if isinstance(value, Markup):  # a list that `_flat` put together
        return value
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        return Markup('<data value="{}">{}</data>').format(repr(value), f"{value:,}")
    return str(value)


def _flat(facts: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    """A nested table as pairs of a dotted name and a value."""
    found: list[tuple[str, Any]] = []
    for name, value in facts.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{before}{name} ")
        elif isinstance(value, (list, tuple)) and any(isinstance(v, Mapping) for v in value):
            for each in value:
                found += _flat(each, f"{before}{name} ") if isinstance(each, Mapping) else []
        elif isinstance(value, (list, tuple)):
            found.append((before + name, Markup(", ").join(_value(v) for v in value) or _NONE))
        else:
            found.append((before + name, value))
    return found


def _subject(record: Mapping[str, Any]) -> str:
    """What was measured on: the GPUs' names where a row ran on one, else the processor's."""
    machine = record.get("machine") or {}
    devices = {data.about(row).get("device") for row in data.rows(record)}
    gpus = [str(gpu.get("name")) for gpu in machine.get("gpus") or []]
    if gpus and "cuda" in devices:
        return ", ".join(dict.fromkeys(gpus))
    return str(machine.get("cpu") or "an unnamed machine")


def _progress(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """How far a run came that did not end, or None for a complete one."""
    if record.get("complete", True):
        return None
    return {"reached": record.get("reached"), "of": record.get("of")}


def _cards(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The headline: each model's gain, and how many blocks and kernels are faster fused."""
    cards: list[dict[str, Any]] = []
    for row in data.rows(record, "model"):
        found = data.ratio(row, "fused")
        if found is None:
            continue
        rates = {
            name: rate
            for name, variant in data.variants(row).items()
            if not data.is_wrong(variant) and (rate := data.positive(variant.get("images_per_s")))
        }
        best = max(rates, key=lambda name: rates[name]) if rates else None
        cards.append({
            "about": _about(row), "ratio": found, "rate": rates.get("fused"), "best": best,
            "best_rate": rates.get(best), "busy": (row.get("load") or {}).get("quiet") is False,
        })  # fmt: skip
    for level in ("block", "kernel"):
        for _, rows in data.groups(data.rows(record, level)):
            pairs = [found for row in rows if (found := data.ratio(row, "fused"))]
            wins = sum((data.positive(pair.get("low")) or 0.0) > 1 for pair in pairs)
            cards.append({"about": _about(rows[0]), "level": level, "wins": wins, "of": len(rows)})
    return cards


def _wrong(record: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(key of the row, variant, what was wrong)."""
    return [
        (str(row.get("key")), name, str(variant["wrong"]))
        for row in data.rows(record)
        for name, variant in data.variants(row).items()
        if data.is_wrong(variant)
    ]


def _level(record: dict[str, Any], level: str) -> dict[str, Any]:
    """One level's part of the page: plots, tables, verdicts, what was left out."""
    rows = data.rows(record, level)
    parts = []
    for op in dict.fromkeys(data.about(row).get("op") for row in rows):
        own = [row for row in rows if data.about(row).get("op") == op]
        parts.append({
            "op": op,
            "image": _image(plots.peers, {**record, "rows": own}),
            "tables": [_table(members) for _, members in data.groups(own)],
            "rows": [_detail(row) for row in own],
            "omitted": data.omitted(own),
        })  # fmt: skip
    return {"name": level, "parts": parts}


def _table(rows: Sequence[data.Row]) -> dict[str, Any]:
    """Rows of one op, batch and dtype: a column a variant."""
    names = list(dict.fromkeys(name for row in rows for name in data.variants(row)))
    return {"about": _about(rows[0]), "names": names, "rows": [_detail(row) for row in rows]}


def _detail(row: data.Row) -> dict[str, Any]:
    """A row with all that the template asks for, None where the record lacks it."""
    fields = (
        "images_per_s", "median_s", "spread", "of_limit", "tflops", "gbs", "peak_memory_bytes",
        "prepare_s", "worst", "method", "process", "note",
    )  # fmt: skip
    found = {}
    for name, variant in (row.get("variants") or {}).items():
        own = variant or {}
        found[name] = {field: own.get(field) for field in fields} | {
            "wrong": str(own["wrong"]) if "wrong" in own else None,
            "ratio": data.ratio(row, name),
            "kernels": [str(kernel) for kernel in own.get("kernels") or []],
        }
    return {
        "about": _about(row),
        "key": str(row.get("key")), "variants": found, "verdicts": row.get("verdicts") or [],
        "limit_s": (row.get("limit") or {}).get("seconds"), "noise": row.get("noise"),
        "foreign": (row.get("load") or {}).get("foreign"),
        "clocks": _flat((row.get("load") or {}).get("clocks") or {}),
        "omitted": row.get("omitted") or {},
    }  # fmt: skip


def _about(row: data.Row) -> dict[str, Any]:
    return {name: data.about(row).get(name) for name in ("name", "op", "batch", "dtype")}


def _waterfalls(record: dict[str, Any]) -> list[dict[str, Any]]:
    """A waterfall and a table of layers, or kinds of kernels, for each row of level model."""
    found = []
    for row in data.rows(record, "model"):
        variants = data.variants(row)
        times = {n: own for n, v in variants.items() if (own := data.shares(v))}
        kernels = data.by_kernel(row)
        least = data.least(row, kernels)
        names = list(dict.fromkeys([*least, *(name for own in times.values() for name in own)]))
        found.append({
            "row": _detail(row),
            "image": _image(plots.waterfall, {**record, "rows": [row]}),
            "variants": list(times),
            "what": "kind of kernel" if kernels else "layer",
            "layers": [
                (name, least.get(name), [own.get(name) for own in times.values()])
                for name in names
            ],
        })  # fmt: skip
    return found


def _image(draw: Draw, record: dict[str, Any]) -> dict[str, str]:
    """Both themes' PNGs in base64, or why there is none."""
    try:
        return {
            theme: base64.b64encode(draw(record, theme)).decode() for theme in ("light", "dark")
        }
    except plots.NothingToDrawError as error:
        return {"why": str(error)}
