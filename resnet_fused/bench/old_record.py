"""Records of whole models from before schema 2, in its words."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from resnet_fused.bench.networks import canonical
from resnet_fused.bench.subject import Subject

OLD_SCHEMA = 1


def from_schema_1(old: Mapping[str, Any]) -> dict[str, Any]:
    """The rows of a record of schema 1; the bare oneDNN calls have their present name.

    Args:
        old: what `resnet-fused bench MODEL` wrote then.

    Returns:
        What schema 2 has of it: no limits, kernels, memory or noise.

    Raises:
        KeyError, TypeError, AttributeError: it lacks a field.
    """
    settings, rows = old["settings"], []
    for result in old["results"]:
        subject = Subject(
            level="model", op="inference", name=canonical(old["model"]), batch=result["batch"],
            dtype=result["dtype"], device=settings["device"].partition(":")[0],
            size=settings["size"],
        )  # fmt: skip
        new = {name: "onednn" if name == "bare" else name for name in result["seconds"]}
        rows.append(
            {
                "key": subject.key,
                "subject": subject.to_dict(),
                "variants": {
                    new[name]: {
                        "samples_s": samples,
                        "median_s": statistics.median(samples),
                        "images_per_s": result["batch"] / statistics.median(samples),
                    }
                    for name, samples in result["seconds"].items()
                },
                "omitted": {new.get(n, n): why for n, why in result["omitted"].items()},
                "ratios": [
                    {**ratio, "baseline": new[ratio["baseline"]], "variant": new[ratio["variant"]]}
                    for ratio in result["ratios"]
                ],
                "noise": None,
                "load": result["load"],
                "verdicts": result["verdicts"],
            }
        )
    return {**{k: v for k, v in old.items() if k != "results"}, "rows": rows, "complete": True}
