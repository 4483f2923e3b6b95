"""What a peer is, and the few questions that every one of them asks of a subject."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from resnet_fused.bench.subject import Subject
    from resnet_fused.bench.work import Work


class NoPeerError(ValueError):
    """A peer cannot compute this subject here; the message says why."""


def _nothing() -> None:
    pass


@dataclass
class Prepared:
    """A subject in a peer's hands, ready to be timed.

    Attributes:
        call: runs the subject on operand set i; the output has the eager module's form, so that
            `Work.judge` can judge it.
        kernels: names of what one call runs, asked for after the timing.
        close: gives back processes, sessions and files.
    """

    call: Callable[[int], Any]
    kernels: Callable[[], list[str]]
    close: Callable[[], None] = _nothing


class Peer(Protocol):
    """One way to compute a subject.

    Attributes:
        name: in records and reports.
        isolated: prepared and run in a process of its own.
        limit_s: seconds that preparing may take.
    """

    name: str
    isolated: bool
    limit_s: float

    def why_not(self, subject: Subject) -> str | None:
        """Why it cannot join, or None; cheap, and imports nothing heavy."""

    def prepare(self, work: Work) -> Prepared:
        """Builds the call.

        Raises:
            NoPeerError: it cannot after all.
        """


def first_reason(*reasons: str | None) -> str | None:
    """The first that is one."""
    return next((reason for reason in reasons if reason is not None), None)


def for_device(subject: Subject, device: str) -> str | None:
    """Why a peer of one kind of device cannot take a subject."""
    if subject.device == device:
        return None
    names = {"cpu": "for the CPU", "cuda": "for a GPU"}
    return f"{names[device]}, the subject is on {subject.device}"


def for_ops(subject: Subject, ops: dict[str, Sequence[str]]) -> str | None:
    """Why a peer that knows these ops of these levels cannot take a subject."""
    known = ops.get(subject.level, ())
    if subject.op in known:
        return None
    return f"has no {subject.op} of a {subject.level}"


def for_dtypes(subject: Subject, dtypes: Sequence[str], why: str = "") -> str | None:
    """Why a peer that computes in these dtypes cannot take a subject."""
    if subject.dtype in dtypes:
        return None
    return f"computes in {' and '.join(dtypes)}, not {subject.dtype}{why and f' ({why})'}"


def installed(module: str, package: str) -> str | None:
    """Why a module cannot be imported, with what installs it; nothing is imported.

    Args:
        module: top-level name.
        package: what pip calls it, or a phrase on how to get it where pip has no wheel.
    """
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        found = None
    if found is not None:
        return None
    return f"not installed: {package if ' ' in package else f'pip install {package}'}"


def for_capability(subject: Subject, major: int, minor: int = 0) -> str | None:
    """Why a peer for GPUs of at least this compute capability cannot take a subject."""
    if subject.device != "cuda":
        return None
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    found = torch.cuda.get_device_capability()
    if found >= (major, minor):
        return None
    return f"needs compute capability {major}.{minor}, this GPU has {found[0]}.{found[1]}"


def first_line(error: BaseException) -> str:
    """The type and first line of an error, for a reason that fits into a table."""
    line = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line.strip()[:300]}" if line else type(error).__name__
