"""Tiny subjects for the tests of the benchmark's peers, built once, with two operand sets."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import torch

from resnet_fused.bench.peers import Peer, Prepared
from resnet_fused.bench.subject import Subject
from resnet_fused.bench.work import Work, build


def kernel(op: str, name: str, dtype: str = "float32", device: str = "cpu") -> Subject:
    return Subject("kernel", op, name, 2, dtype, device)


def block(op: str, name: str, dtype: str = "float32", device: str = "cpu") -> Subject:
    return Subject("block", op, name, 2, dtype, device, size=32)


def model(op: str, name: str = "resnet18", dtype: str = "float32", device: str = "cpu") -> Subject:
    # Of 32 pixels the last stage leaves one: gradients through BatchNorm of two values are noise.
    return Subject("model", op, name, 2, dtype, device, size=64 if op == "training" else 32)


CONV_ADD = kernel("conv_bn_act", "3x3_8_8_at8_add")
BLOCK = block("inference", "resnet18.layer1.0")


@functools.cache
def work_of(subject: Subject) -> Work:
    """The subject with its first two operand sets, which have weights of their own in a kernel."""
    work = build(subject)
    return dataclasses.replace(work, sets=work.sets[:2])


def swapped(work: Work) -> Work:
    """The same work with its second set in front: what judges an output of set 1."""
    return dataclasses.replace(work, sets=work.sets[::-1], reference=None)


def perturbed(work: Work) -> Work:
    """A work of which one output channel's weights are half as large again."""
    if work.module is not None:
        module = copy.deepcopy(work.module)
        convs = [m for m in module.modules() if isinstance(m, torch.nn.Conv2d)]
        with torch.no_grad():
            # In the last but one: behind the last there is an add, and perhaps nothing is left.
            convs[-2].weight[0] *= 1.5
            convs[-2].weight[1] *= -1.5
        return dataclasses.replace(work, module=module)
    sets: list[Any] = []
    for operands in work.sets:
        scale = operands.scale.clone()
        scale[0] *= 1.5
        sets.append(dataclasses.replace(operands, scale=scale))
    return dataclasses.replace(work, sets=sets)


def assert_right(peer: Peer, work: Work) -> list[str]:
    """Prepares, judges both operand sets, and returns the kernels' names."""
    prepared: Prepared = peer.prepare(work)
    try:
        first = work.judge(prepared.call(0))
        assert first.ok, f"{peer.name} on {work.subject.key}: {first.text}"
        second = swapped(work).judge(prepared.call(1))
        assert second.ok, f"{peer.name} on set 1 of {work.subject.key}: {second.text}"
        names = prepared.kernels()
    finally:
        prepared.close()
    assert names and all(isinstance(name, str) and name for name in names)
    return names


def assert_perturbed_is_wrong(peer: Peer, work: Work) -> None:
    """A peer with other weights is judged wrong."""
    prepared = peer.prepare(perturbed(work))
    try:
        found = work.judge(prepared.call(0))
    finally:
        prepared.close()
    assert not found.ok, f"{peer.name} on {work.subject.key} passed with other weights"
    assert found.worst > 1.0
