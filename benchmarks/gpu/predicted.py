"""What was predicted of a call beside what was measured: of the implementation that was measured.

The predictors, benchmarks/predict_*.py, write the rows of benchmarks/predictions.json: those of
Triton's kernels by their tiles, those of CUDA's by the plan that picks the configuration. Where a
call has no row, that is said.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

CUDA = ("cuda_inference", "cuda_training")
"""Parts of the file, one a predictor of the CUDA kernels."""
CHOSEN = ("ours", "triton", "cuda", "frozen")
"""Variants that take what the chooser picks, which is what is predicted."""
DRIVER = "driver "
"""How the names of the driver's timed calls begin, the op behind it."""


def key(op: str, implementation: str, call: str) -> str:
    """The name of a row.

    Args:
        op: of the call.
        implementation: "triton" or "cuda".
        call: LAYER@BATCH.
    """
    return f"{op}.{implementation} {call}"


def read(file: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """The rows by their `key`; none where there is no file, and a line where it can't be read."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        found = {
            key(row.get("op", "conv_bn_act"), "triton", f"{row['layer']}@{row['batch']}"): row
            for row in (*content["layers"], *content.get("spanning", ()))
        }
        for row in (row for part in CUDA for row in content.get(part, ())):
            found[key(row["op"], "cuda", f"{row['layer']}@{row['batch']}")] = row
        engines = content.get("engine", ())
        return found | {key("frozen", "triton", f"@{row['batch']}"): row for row in engines}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        say(f"no predictions: {file} can't be read: {type(error).__name__}: {error}")
        return {}


def beside(
    name: str, about: Mapping[str, Any], one: Mapping[str, Any], rows: Mapping[str, Any]
) -> dict[str, Any]:
    """Of each variant that a chooser picked: what was predicted, and the measured time over it.

    Args:
        name: of the step.
        about: its task's "op" and "layer".
        one: what it found: "us" of variants, or "microseconds" of a call of the driver.
        rows: as `read` gives them.

    Returns:
        Variant -> "implementation", "plan" and "us" as predicted, "measured_over_predicted", and
        "measured_plan" where another one was measured; or "missing", in words.
    """
    if not rows:
        return {}
    if name.startswith(DRIVER):
        op, call = name.removeprefix(DRIVER), "driver"
        call = next((k.split(" ", 1)[1] for k in rows if k.startswith(f"{op}.cuda driver@")), call)
        measured = {"cuda": one["microseconds"]} if "microseconds" in one else {}
    else:
        op = "frozen" if name.startswith("frozen@") else about.get("op", "conv_bn_act")
        call = name.removeprefix("frozen") if op == "frozen" else about.get("layer")
        times = one.get("us") or {}
        measured = {variant: times[variant]["us"] for variant in CHOSEN if variant in times}
    if call is None:
        return {}
    return {variant: _beside(op, call, variant, us, one, rows) for variant, us in measured.items()}


def _beside(
    op: str, call: str, variant: str, us: float, one: Mapping[str, Any], rows: Mapping[str, Any]
) -> dict[str, Any]:
    kind = "cuda" if variant == "cuda" else "triton"
    row = rows.get(key(op, kind, call))
    if row is None:
        return {"implementation": kind, "missing": f"no prediction of {op} {call} by {kind}"}
    found = {
        "implementation": kind, "plan": row.get("plan", ""), "us": row["us"],
        "measured_over_predicted": us / row["us"],
    }  # fmt: skip
    taken = (one.get("plans") or {}).get(variant, {}).get("name") or one.get("plan", "")
    if found["plan"] and taken and not taken.startswith(found["plan"].partition("/")[0]):
        found["measured_plan"] = taken
    return found


def line(found: Mapping[str, Mapping[str, Any]]) -> str:
    """In a few words: ", predicted 12.1 us tma_win96x64_2w/1 (cuda): 1.20x"."""
    said = []
    for one in found.values():
        if "missing" in one:
            said.append(one["missing"])
            continue
        other = f", measured {one['measured_plan']}" if "measured_plan" in one else ""
        title = f" {one['plan']}" if one["plan"] else ""
        times = one["measured_over_predicted"]
        said.append(
            f"predicted {one['us']:.1f} us{title} ({one['implementation']}): {times:.2f}x{other}"
        )
    return "".join(f", {text}" for text in said)
