"""Peers that behave as a test wants: right, slow, wrong, failing, crashing, hanging, talking."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from resnet_fused.bench.judging import eager_kernel
from resnet_fused.bench.peers import NoPeerError, Prepared
from resnet_fused.bench.subject import Subject
from resnet_fused.bench.work import Work

QUICK_S, SLOW_S = 0.004, 0.04
Call = Callable[[int], Any]


def _right(work: Work) -> Call:
    if work.module is not None:
        return lambda i: work.run(work.module, i)
    return lambda i: eager_kernel(work, i)


def _sleeping(work: Work, seconds: float) -> Call:
    call = _right(work)

    def sleep(i: int) -> Any:
        time.sleep(seconds)
        return call(i)

    return sleep


def _wrong(work: Work) -> Call:
    call = _right(work)

    def one_off(i: int) -> Any:
        # A single element, neither in the first nor in the last image.
        y = call(i).clone()
        y[1, 0, 0, 0] += 1.0
        return y

    return one_off


def _raises(work: Work) -> Call:
    def call(i: int) -> Any:
        raise RuntimeError("planted\nin two lines")

    return call


def _refuses(work: Work) -> Call:
    raise NoPeerError("it needs a thing that is not here")


def _breaks(work: Work) -> Call:
    raise OSError("no space left")


def _crashes(work: Work) -> Call:
    def call(i: int) -> Any:
        print("last words", flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)

    return call


def _later(work: Work, what: Callable[[], Any]) -> Call:
    """Right in its first three calls: judged, measured, warmed up; then something happens."""
    call, left = _right(work), [3]

    def later(i: int) -> Any:
        left[0] -= 1
        if left[0] < 0:
            what()
        return call(i)

    return later


def _die() -> None:
    os._exit(3)


def _fail() -> None:
    raise RuntimeError("planted in a sample")


def _prints(work: Work) -> Call:
    call = _right(work)

    def talk(i: int) -> Any:
        print('{"seconds": 1e-9}')
        sys.stdout.flush()
        return call(i)

    return talk


def _hangs(work: Work) -> Call:
    time.sleep(600)
    raise AssertionError("nobody has ended it")


BEHAVIOURS: dict[str, Callable[[Work], Call]] = {
    "right": _right,
    "quick": lambda work: _sleeping(work, QUICK_S),
    "slow": lambda work: _sleeping(work, SLOW_S),
    "wrong": _wrong,
    "raises": _raises,
    "refuses": _refuses,
    "breaks": _breaks,
    "crashes": _crashes,
    "dies_later": lambda work: _later(work, _die),
    "fails_later": lambda work: _later(work, _fail),
    "hangs_later": lambda work: _later(work, lambda: time.sleep(600)),
    "hangs": _hangs,
    "prints": _prints,
}


@dataclass
class StandIn:
    """A peer of one behaviour, under whatever name."""

    behaviour: str
    name: str
    isolated: bool = False
    limit_s: float = 60.0
    absent: str | None = None

    @property
    def path(self) -> str:
        """Where a child process finds it."""
        return f"bench_standins:PEERS.{self.behaviour}"

    def why_not(self, subject: Subject) -> str | None:
        return self.absent

    def prepare(self, work: Work) -> Prepared:
        return Prepared(BEHAVIOURS[self.behaviour](work), lambda: [f"kernel_of_{self.behaviour}"])


PEERS = {name: StandIn(name, name) for name in BEHAVIOURS}
