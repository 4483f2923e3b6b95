"""Admission: a GPU kernel that never passed on the GPU at hand is not picked by "auto".

What admits a kernel is a record of a passed run, shipped in `admitted.json` for the architecture
and the sources at hand; else the user's own file of verdicts (`_verdicts`); else a self-check in a
child process on the first call that could use the kernel (`_selfcheck`). docs/admission.md tells
users and contributors what that means for them.

Kernels enter themselves with `register`; an op's `supports` asks `refusal`, and its choice of a
configuration asks `verdict` which ones it may take.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from . import _extension, _platform, _selfcheck, _verdicts
from ._platform import Device, Gpu, platform_refusal, without_checks
from ._verdicts import path as cache_path

if TYPE_CHECKING:
    from . import backends

__all__ = [
    "Kernel",
    "Verdict",
    "cache_path",
    "forget",
    "generation",
    "kernels",
    "platform_refusal",
    "record",
    "refusal",
    "register",
    "source_hash",
    "timings",
    "verdict",
    "without_checks",
]

logger = logging.getLogger("resnet_fused")

PACKAGE = Path(__file__).resolve().parent
SHIPPED = PACKAGE / "admitted.json"
BINARY = "_C.abi3.so"
ATTEMPTS = 3  # self-checks that run out of time before what they reached is taken as final


@dataclass(frozen=True)
class Kernel:
    """A kernel that needs admission.

    Attributes:
        op: the op that it implements, "conv_bn_act".
        implementation: "triton" or "cuda", as in `backends`.
        sources: the files that decide what it computes: relative to the package, such as
            "triton/conv_bn_act.py", or in csrc/ of the checkout that the extension was built from.
        configurations: gives the names of its configurations, such as "128x128x64_4w3s", the most
            used first; or "module:function" of what gives them.
        check: "module:function", called in a child process as function(configuration, device); it
            raises unless the result on that device is right.
    """

    op: str
    implementation: str
    sources: tuple[str, ...]
    configurations: Callable[[], Sequence[str]] | str
    check: str

    @property
    def name(self) -> str:
        """As messages name it, "conv_bn_act.triton"."""
        return f"{self.op}.{self.implementation}"

    def list_configurations(self) -> tuple[str, ...]:
        """The names of its configurations."""
        given = self.configurations
        return tuple((_selfcheck.load(given) if isinstance(given, str) else given)())


class Verdict(NamedTuple):
    """Whether "auto" may take a kernel on a GPU.

    Attributes:
        reason: None if it may, else why not.
        configurations: those that it may take.
        source: who says so: "shipped", "cache", "self-check"; "not yet" where the next ordinary
            call asks again, "off" where self-checks are switched off, "unknown" for no such kernel.
        refused: (configuration, why) of the others, as far as something is known of them.
    """

    reason: str | None
    configurations: frozenset[str]
    source: str
    refused: tuple[tuple[str, str], ...] = ()


_Key = tuple[str, str, Gpu]

_kernels: dict[tuple[str, str], Kernel] = {}
_remembered: dict[_Key, Verdict] = {}
_pending: set[_Key] = set()  # asked for at a moment when no check could start
_generation = object()  # another one with every change
_checking = threading.Lock()
_checker: int | None = None  # the thread that holds it


def register(kernel: Kernel) -> None:
    """Enters a kernel; nothing is imported or read yet.

    Raises:
        TypeError: an attribute has another type.
        ValueError: the op has a kernel of this implementation already, or a name is malformed.
    """
    for name in ("op", "implementation", "check"):
        value = getattr(kernel, name)
        if not isinstance(value, str) or not value:
            raise TypeError(f"Kernel: {name} must be a non-empty string, got {value!r}")
    names = [("check", kernel.check)]
    if isinstance(kernel.configurations, str):
        names.append(("configurations", kernel.configurations))
    elif not callable(kernel.configurations):
        given = type(kernel.configurations).__name__
        raise TypeError(
            f"Kernel: configurations must be callable or 'module:function', got {given}"
        )
    for name, value in names:
        if len(value.split(":")) != 2 or not all(value.split(":")):
            raise ValueError(f"Kernel: {name} is {value!r}; accepted is 'module:function'")
    if isinstance(kernel.sources, str) or not kernel.sources:
        raise TypeError(f"Kernel: sources must be a tuple of file names, got {kernel.sources!r}")
    if (kernel.op, kernel.implementation) in _kernels:
        raise ValueError(f"admission has a kernel {kernel.name} already")
    _kernels[kernel.op, kernel.implementation] = kernel
    _changed()


def kernels() -> tuple[Kernel, ...]:
    """The registered kernels, in order of registration."""
    return tuple(_kernels.values())


def _changed() -> None:
    global _generation
    _generation = object()


def forget() -> None:
    """Forgets what this process found and warned about; the files stay."""
    _remembered.clear()
    _pending.clear()
    for cached in (_warn_once, source_hash, _shipped_records, _platform.platform_refusal):
        cached.cache_clear()
    _verdicts.forget_warnings()
    _changed()


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning("%s", message)


@functools.cache
def source_hash(kernel: Kernel) -> str:
    """SHA-256, in hexadecimal, over names and contents of a kernel's sources, in sorted order.

    What lies in csrc/ counts as it was when the extension was built, which is what runs; for a
    binary that does not tell, the binary itself counts.

    Raises:
        FileNotFoundError: a source is missing.
    """
    built = _extension.build_info().get("sources", {})
    total = hashlib.sha256()
    for name in sorted(kernel.sources):
        if name.startswith("csrc/"):
            digest = built.get(name) or _digest(PACKAGE / BINARY)
        else:
            digest = _digest(PACKAGE / name)
        total.update(f"{name}\0{digest}\n".encode())
    return total.hexdigest()


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def generation(index: int | None = None) -> Hashable:
    """What a remembered choice for a GPU depends on beside the call itself.

    It changes with every new verdict, and while a kernel waits for its self-check also with whether
    one may start now, so that no "not yet" outlives its reason.

    Args:
        index: of the GPU; None for the current one.
    """
    if index is None:
        index = _platform.current_device()
    if not _pending:
        return _generation, index
    return _generation, index, _platform.no_check_now()


def refusal(call: backends.Call, implementation: str) -> str | None:
    """Why "auto", or the backend asked for by name, may not take a kernel; for ops' `supports`.

    The machine must be fit for it in either case. Admission is asked only under "auto": who names a
    backend takes it as it is.

    Args:
        call: the facts of the call.
        implementation: "triton" or "cuda".

    Returns:
        None if it may serve the call, else the reason.
    """
    from . import backends  # it imports this module

    if call.device != "cuda":
        return f"x is on {call.device}"
    index = _platform.current_device() if call.index is None else call.index
    reason = platform_refusal(implementation, index)
    if reason is not None:
        _warn_once(f"{implementation} kernels are not used: {reason}")
        return reason
    if backends.requested()[0] != "auto":
        return None
    return verdict(call.op, implementation, index).reason


def verdict(op: str, implementation: str, device: Device = 0) -> Verdict:
    """Whether and in which configurations "auto" may take a kernel on a GPU.

    The first call for a kernel that no record speaks of runs its self-check, which takes seconds;
    threads that ask meanwhile wait for it.

    Args:
        op: "conv_bn_act".
        implementation: "triton" or "cuda".
        device: the index of the GPU, or "cpu" for kernels that run there.

    Raises:
        ValueError: RESNET_FUSED_SELFCHECK_SECONDS holds no number of seconds.
    """
    kernel = _kernels.get((op, implementation))
    if kernel is None:
        reason = f"not admitted: {op}.{implementation} is no registered kernel"
        return Verdict(reason, frozenset(), "unknown")
    key = (op, implementation, _platform.identify(device))
    known = _remembered.get(key)
    if known is not None:
        _pending.discard(key)
        return known
    try:
        configurations, digest = kernel.list_configurations(), source_hash(kernel)
    except Exception as error:
        # A Triton that can't even be imported refuses its kernels, not the library.
        reason = f"not admitted: {kernel.name} can't be described: {_selfcheck.text_of(error)}"
        return _remember(key, Verdict(reason, frozenset(), "unknown"))
    gpu = key[2]
    shipped = _shipped(kernel, digest, gpu)
    if shipped is not None:
        return _remember(key, shipped)
    stored = _verdicts.load(_file_key(kernel, digest, gpu)) or _verdicts.Stored({})
    results = {name: stored.results[name] for name in configurations if name in stored.results}
    if len(results) == len(configurations) or stored.unfinished >= ATTEMPTS:
        why = f"not reached by {stored.unfinished} self-checks, which ran out of time"
        return _remember(key, _decide(results, configurations, "cache", why))
    return _check(kernel, key, device, configurations, digest, stored)


def _check(
    kernel: Kernel,
    key: _Key,
    device: Device,
    configurations: tuple[str, ...],
    digest: str,
    stored: _verdicts.Stored,
) -> Verdict:
    """Runs the self-check of what no record speaks of, unless this is no moment for it."""
    global _checker
    limit = _selfcheck.time_limit()
    if limit == 0:
        reason = f"not admitted: no record for this GPU, and {_selfcheck.SECONDS} is 0"
        return Verdict(reason, frozenset(), "off")
    why = _platform.no_check_now()
    if why is None and _checker == threading.get_ident():
        why = "this thread is in a self-check"
    if why is not None:
        _pending.add(key)
        return Verdict(f"not admitted yet: {why}", frozenset(), "not yet")
    with _checking:
        if (known := _remembered.get(key)) is not None:
            return known
        _checker = threading.get_ident()
        try:
            found = _run(kernel, key[2], device, configurations, digest, stored, limit)
        finally:
            _checker = None
        return _remember(key, found)


def _run(
    kernel: Kernel,
    gpu: Gpu,
    device: Device,
    configurations: tuple[str, ...],
    digest: str,
    stored: _verdicts.Stored,
    limit: float,
) -> Verdict:
    left = [name for name in configurations if name not in stored.results]
    logger.info(
        "%s: self-check of %d configurations on %s, once, at most %g s",
        kernel.name, len(left), gpu.name, limit,
    )  # fmt: skip
    target = "cpu" if device == "cpu" else f"cuda:{device}"
    outcome = _selfcheck.run(
        kernel.check, left, target, limit=limit, uuid=_platform.uuid_of(device),
        children=_selfcheck.children(),
    )  # fmt: skip
    results = {**stored.results, **outcome.results}
    if outcome.results or outcome.late:
        about = {"op": kernel.op, "implementation": kernel.implementation, "hash": digest}
        kept = _verdicts.Stored(results, stored.unfinished + outcome.late)
        _verdicts.save(_file_key(kernel, digest, gpu), kept, {**about, "gpu": gpu._asdict()})
    found = _decide(results, configurations, "self-check", outcome.problem)
    if found.reason is None and found.refused:
        reasons = "; ".join(f"{name}: {why}" for name, why in found.refused)
        count = f"{len(found.refused)} of {len(configurations)}"
        logger.warning(
            "%s: %s configurations are not used on %s: %s", kernel.name, count, gpu.name, reasons
        )
    return found


def _decide(
    results: dict[str, str | None],
    configurations: Sequence[str],
    source: str,
    problem: str | None,
) -> Verdict:
    """The verdict on results; `problem` says why configurations are absent from them."""
    allowed = frozenset(name for name in configurations if results.get(name, "") is None)
    refused = tuple(
        (name, results.get(name) or problem or "not checked")
        for name in configurations
        if name not in allowed
    )
    if allowed:
        return Verdict(None, allowed, source, refused)
    if not configurations:
        return Verdict("not admitted: it has no configurations", allowed, source)
    # What a kernel did says more than that others were not reached.
    name, why = next((pair for pair in refused if pair[0] in results), refused[0])
    if name in results:
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        reason = f"not admitted: it failed its self-check on this GPU: {name}: {why}{more}"
    else:
        reason = f"not admitted: its self-check could not be made: {why}"
    return Verdict(reason, allowed, source, refused)


def _remember(key: _Key, found: Verdict) -> Verdict:
    _remembered[key] = found
    _pending.discard(key)
    _changed()
    if found.reason is not None:
        _warn_once(f"{key[0]}.{key[1]} kernels are not used: {found.reason}")
    return found


def _file_key(kernel: Kernel, digest: str, gpu: Gpu) -> str:
    parts = (kernel.op, kernel.implementation, digest, *gpu)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@functools.cache
def _shipped_records() -> tuple[dict[str, Any], ...]:
    try:
        records = json.loads(SHIPPED.read_text(encoding="utf-8"))["records"]
        return tuple(check_record(one) for one in records)
    except (OSError, ValueError, KeyError, TypeError) as error:
        _warn_once(f"{SHIPPED} can't be read and is ignored: {error}")
        return ()


def _records_of(kernel: Kernel, digest: str, gpu: Gpu) -> list[dict[str, Any]]:
    mine = (kernel.op, kernel.implementation, digest, gpu.capability)
    fields = ("op", "implementation", "hash", "arch")
    return [one for one in _shipped_records() if tuple(one[name] for name in fields) == mine]


def timings(op: str, implementation: str, index: int | None = None) -> dict[str, float]:
    """Layer -> the least microseconds that the package's own record knows of a kernel on a GPU."""
    kernel = _kernels.get((op, implementation))
    if kernel is None or not _shipped_records():
        return {}
    try:
        digest = source_hash(kernel)
    except OSError:  # no extension, and so no kernel
        return {}
    gpu = _platform.identify(_platform.current_device() if index is None else index)
    best: dict[str, float] = {}
    for one in _records_of(kernel, digest, gpu):
        for layer, us in one["timings"].items() if one["ok"] else ():
            best[layer] = min(us, best.get(layer, us))
    return best


def _shipped(kernel: Kernel, digest: str, gpu: Gpu) -> Verdict | None:
    """What the package's own record says of a kernel on this architecture, or None."""
    found = _records_of(kernel, digest, gpu)
    if not found:
        return None
    allowed = frozenset(one["configuration"] for one in found if one["ok"])
    refused = tuple(
        (one["configuration"], f"failed on {gpu.capability} when it was recorded")
        for one in found
        if not one["ok"]
    )
    reason = None if allowed else f"not admitted: every configuration {refused[0][1]}"
    return Verdict(reason, allowed, "shipped", refused)


RECORD_FIELDS: dict[str, type | tuple[type, ...]] = {
    "op": str, "implementation": str, "configuration": str, "ok": bool, "hash": str, "arch": str,
    "timings": dict,
}  # fmt: skip


def check_record(one: Any) -> dict[str, Any]:
    """One entry of a gpu-check, with the fields of RECORD_FIELDS and none beside them.

    Raises:
        ValueError: it is no such entry.
    """
    if not isinstance(one, dict):
        raise ValueError(f"an entry must be an object, got {type(one).__name__}")
    for name, kind in RECORD_FIELDS.items():
        if name == "timings" and name not in one:
            continue
        if not isinstance(one.get(name), kind):
            expected = getattr(kind, "__name__", kind)
            raise ValueError(f"{name}: expected {expected}, got {one.get(name)!r} in {one}")
    return {name: one.get(name, {}) for name in RECORD_FIELDS}


def record(entries: Iterable[Any]) -> tuple[dict[str, Any], list[str]]:
    """What `admitted.json` holds, made of the entries of gpu-checks.

    Args:
        entries: objects with op, implementation, configuration, ok, hash, arch ("sm_90") and
            timings (name -> microseconds); of two for the same the later counts.

    Returns:
        The content of the file, and for each entry that was left out why: of an unknown kernel or
        configuration, or of other sources than the present ones.

    Raises:
        ValueError: an entry is malformed.
    """
    kept: dict[tuple[str, ...], dict[str, Any]] = {}
    refused = []
    for one in map(check_record, entries):
        label = f"{one['op']}.{one['implementation']} {one['configuration']} {one['arch']}"
        kernel = _kernels.get((one["op"], one["implementation"]))
        if kernel is None:
            refused.append(f"{label}: no such kernel")
        elif one["configuration"] not in kernel.list_configurations():
            refused.append(f"{label}: the kernel has no such configuration")
        elif one["hash"] != source_hash(kernel):
            refused.append(
                f"{label}: recorded for sources {one['hash'][:12]}, "
                f"the present ones are {source_hash(kernel)[:12]}"
            )
        else:
            fields = ("op", "implementation", "arch", "configuration")
            kept[tuple(one[name] for name in fields)] = one
    return {"version": 1, "records": [kept[key] for key in sorted(kept)]}, refused


def _after_fork() -> None:
    # A thread that held it does not exist here.
    global _checking, _checker
    _checking, _checker = threading.Lock(), None


with contextlib.suppress(AttributeError):  # Windows does not fork
    os.register_at_fork(after_in_child=_after_fork)
