"""How often a network in e4m3 names the same class as in 16 bits, on images."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .freeze import Engine, Fp8Calibration, freeze

CONFIDENCE = 0.95
PAIRS = (("fp8", "wide"), ("fp8", "float32"), ("wide", "float32"))


@dataclass(frozen=True)
class Agreement:
    """Two networks on the same images.

    Attributes:
        first: "fp8" or the 16-bit dtype's name.
        second: likewise, or "float32".
        images: how many there were.
        same: for how many both had their largest score in the same place.
        low: lower end of the 95% interval of the share (Clopper and Pearson).
        high: upper end.
    """

    first: str
    second: str
    images: int
    same: int
    low: float
    high: float

    @property
    def share(self) -> float:
        """Same / images."""
        return self.same / self.images

    def __str__(self) -> str:
        """One line."""
        return (
            f"{self.first} as {self.second}: {self.same} of {self.images} images, "
            f"{self.share:.2%} ({self.low:.2%} to {self.high:.2%})"
        )


@dataclass(frozen=True)
class Fp8Verification:
    """What `verify_fp8` found.

    Attributes:
        agreements: fp8 with the 16-bit engine; both with float32.
        required: the share of the first one that is asked for.
        layers: how many layers ran in e4m3.
        wide: (layer, why) of those that did not.
        implementations: who ran the layers in e4m3 -> how many of them.
        calibrated_on: images of the calibration.
    """

    agreements: tuple[Agreement, ...]
    required: float
    layers: int
    wide: tuple[tuple[str, str], ...]
    implementations: dict[str, int]
    calibrated_on: int

    @property
    def ok(self) -> bool:
        """Whether the images leave it possible that the share is what is required."""
        return self.agreements[0].high >= self.required

    def __bool__(self) -> bool:
        """The same as ``ok``."""
        return self.ok

    @property
    def failures(self) -> list[str]:
        """One sentence, or none."""
        first = self.agreements[0]
        if self.ok:
            return []
        return [
            f"fp8 has the top class of {first.second} on {first.share:.2%} of {first.images} "
            f"images, at most {first.high:.2%} with 95% confidence; {self.required:.2%} is required"
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        found = asdict(self)
        for plain, one in zip(found["agreements"], self.agreements, strict=True):
            plain["share"] = one.share
        return {"ok": self.ok, "failures": self.failures, **found}

    def __str__(self) -> str:
        by = ", ".join(f"{count} by {name}" for name, count in self.implementations.items())
        lines = [f"{self.layers} layers in e4m3 ({by}), calibrated on {self.calibrated_on} images"]
        lines += [f"not {layer}: {why}" for layer, why in self.wide]
        lines += [f"top class, {one}" for one in self.agreements]
        return "\n".join([*lines, *(self.failures or ["ok"])])


def verify_fp8(
    model: nn.Module,
    batches: Iterable[Tensor],
    calibration: Fp8Calibration,
    *,
    dtype: torch.dtype = torch.bfloat16,
    required: float = 0.99,
    progress: Callable[[int], None] | None = None,
) -> Fp8Verification:
    """Compares the top class of an engine in e4m3 with that of engines in 16 bits and float32.

    Args:
        model: a classifier in float32, in evaluation mode.
        batches: images [N, C, H, W] in float32 on the model's device; several batches. Others than
            those of the calibration.
        calibration: of this model, in any dtype.
        dtype: bfloat16 or float16: of what is not e4m3, and of the engine beside it.
        required: the check fails where the images show, with 95% confidence, that a smaller share
            of them agrees.
        progress: called with the number of images done after each batch.

    Returns:
        The agreements with their intervals.

    Raises:
        TypeError: model or calibration is something else.
        ValueError: there are no images; the model gives no vector of scores an image; dtype or
            required is not accepted; and what `rf.freeze` raises.
    """
    from scipy.stats import binomtest

    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"verify_fp8: dtype is {dtype}; accepted are bfloat16 and float16")
    if not 0.0 <= required <= 1.0:
        raise ValueError(f"verify_fp8: required is {required!r}; accepted is 0 to 1")
    made: dict[str, Engine] = {}
    same, count = dict.fromkeys(PAIRS, 0), 0
    for x in batches:
        if not len(x):
            continue
        made = made or engines(model, x, calibration, dtype)
        top = {name: _top(engine, x) for name, engine in made.items()}
        for pair in PAIRS:
            same[pair] += int((top[pair[0]] == top[pair[1]]).sum())
        count += len(x)
        if progress is not None:
            progress(count)
    if not count:
        raise ValueError("verify_fp8: batches hold no images; give at least one")
    names = {"wide": str(dtype).removeprefix("torch.")}
    found = []
    for first, second in PAIRS:
        both = same[first, second]
        interval = binomtest(both, count).proportion_ci(CONFIDENCE, method="exact")
        pair = names.get(first, first), names.get(second, second)
        found.append(Agreement(*pair, count, both, float(interval.low), float(interval.high)))
    report = made["fp8"].report()
    rows = [row for row in report.rows if row.pattern.endswith(" in e4m3")]
    served: dict[str, int] = {}
    for row in rows:
        served[row.implementation] = served.get(row.implementation, 0) + 1
    wide = tuple((note.layers, note.why) for note in report.left if note.rule == "fp8")
    return Fp8Verification(tuple(found), required, len(rows), wide, served, calibration.images)


def engines(
    model: nn.Module, x: Tensor, calibration: Fp8Calibration, dtype: torch.dtype
) -> dict[str, Engine]:
    """The engines of one model that are compared.

    Args:
        model: in float32, in evaluation mode.
        x: images in float32.
        calibration: of this model.
        dtype: of what is not e4m3.

    Returns:
        "fp8", "wide" (all of it in `dtype`) and "float32".

    Raises:
        ValueError: and what else `rf.freeze` raises.
    """
    narrow = copy.deepcopy(model).to(dtype)
    return {
        "fp8": freeze(narrow, x.to(dtype), fp8=calibration),
        "wide": freeze(narrow, x.to(dtype)),
        "float32": freeze(model, x),
    }


def _top(engine: Engine, x: Tensor) -> Tensor:
    with torch.inference_mode():
        scores = engine(x.to(engine.dtype))
    if not isinstance(scores, Tensor) or scores.dim() != 2 or len(scores) != len(x):
        given = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(
            f"verify_fp8: the model gives {given}; accepted are scores [N, classes], one an image"
        )
    return scores.argmax(1)
