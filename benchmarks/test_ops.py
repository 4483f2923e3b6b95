"""pytest-benchmark entries: ops, blocks and networks, by eager and fused, as subjects and peers.

The very computations of `resnet-fused bench`, judged before they are timed, for those who compare
commits with pytest-benchmark. A ratio of two variants is to be taken from `resnet-fused bench`,
which runs them in turns.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from resnet_fused.bench import subject as subjects_
from resnet_fused.bench.peers import PEERS, NoPeerError
from resnet_fused.bench.subject import LEVELS, OPS, Subject, subjects
from resnet_fused.bench.work import Work, build

MODEL = "resnet50"
DTYPES = ("float32", "bfloat16")
BATCH = {"cpu": 1, "cuda": 256}
VARIANTS = ("eager", "fused")
ROUNDS = {"kernel": (7, 3), "block": (7, 1), "model": (5, 1)}  # rounds, calls in each


def chosen() -> list[Subject]:
    """The ops, blocks and modes of one network, in both dtypes, on what there is."""
    found = []
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for level in LEVELS:
            found += subjects(
                level, device, model=MODEL, batches=[BATCH[device]], dtypes=DTYPES, ops=OPS[level]
            )
    return [s for s in found if s.level != "kernel" or s.name in kernels(s.op)]


@functools.cache
def kernels(op: str) -> frozenset[str]:
    return frozenset(subjects_.kernel_names(op, MODEL))


@functools.lru_cache(maxsize=1)  # the variants of a subject follow each other
def built(subject: Subject) -> Work:
    return build(subject)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("subject", chosen(), ids=lambda s: f"{s.device}/{s.key}")
def test_subject(benchmark: Any, subject: Subject, variant: str) -> None:
    peer = PEERS[variant]
    if (why := peer.why_not(subject)) is not None:
        pytest.skip(why)
    work = built(subject)
    try:
        with work.mode():
            prepared = peer.prepare(work)
    except NoPeerError as error:
        pytest.skip(str(error))
    rounds, calls = ROUNDS[subject.level]
    count = 0

    def call() -> None:
        nonlocal count
        prepared.call(count % len(work.sets))
        count += 1
        if subject.device == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{subject.device}/{subject.key}"
    benchmark.extra_info |= subject.to_dict()
    try:
        with work.mode():
            judgement = work.judge(prepared.call(0))
            assert judgement.ok, judgement.text  # what is wrong has no time
            benchmark.pedantic(call, rounds=rounds, iterations=calls, warmup_rounds=2)
    finally:
        prepared.close()
