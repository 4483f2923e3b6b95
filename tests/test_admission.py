"""Admission: records, the user's file, self-checks of stand-ins, and when none may start."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import types

import pytest
import torch
from admitting import (
    ask,
    ask_in_another_process,
    cache,
    clean_machine,  # noqa: F401  (a fixture for every test)
    enter,
    ran,
    warnings,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import resnet_fused as rf
from resnet_fused import _platform, _selfcheck, admission, backends

GPU = _platform.Gpu("NVIDIA Stand-in", "sm_90", "13000 580.65.06", "2.15.0", "13.2", "3.9.0")


def test_one_check_admits_what_passes(calls, caplog):
    enter(calls, "right1", "wrong", "faults", "right2")
    found = ask()
    assert found.reason is None and found.source == "self-check"
    assert found.configurations == {"right1", "right2"}
    assert dict(found.refused) == {
        "wrong": "ArithmeticError: 3 of 8 elements are wrong",
        "faults": "the process ended in it: SIGSEGV",
    }
    assert ask() is found
    assert ran(calls) == ["right1", "wrong", "faults", "right2"]
    assert len(warnings(caplog)) == 1 and "2 of 4 configurations are not used" in caplog.text


def test_none_that_passes_refuses_the_kernel(calls, caplog):
    enter(calls, "refuses", "wrong")
    found = ask()
    assert found.configurations == frozenset() and found.reason is not None
    assert found.reason.startswith("not admitted: it failed its self-check on this GPU: refuses: ")
    assert "out of resource" in found.reason and "(and 1 more)" in found.reason
    ask()
    assert len(warnings(caplog)) == 1


def test_a_later_process_starts_no_check(calls):
    enter(calls, "right", "wrong")
    first = ask()
    before = ran(calls)
    again = ask_in_another_process()
    assert again == first._replace(source="cache")
    assert ran(calls) == before


def test_what_was_not_reached_is_checked_by_a_later_process(calls, monkeypatch):
    names = [f"slow{number}" for number in range(6)]
    enter(calls, *names)
    monkeypatch.setenv(_selfcheck.SECONDS, "2")
    first = ask()
    assert first.reason is None and 0 < len(first.configurations) < 6
    assert {why for _, why in first.refused} == {"not reached within the 2 s of the self-check"}
    monkeypatch.setenv(_selfcheck.SECONDS, "20")
    assert ask_in_another_process().configurations == set(names)
    passed = [name for name in ran(calls) if name in first.configurations]
    assert len(passed) == len(first.configurations), "what passed is not run again"


def test_checks_that_never_finish_are_given_up(calls, monkeypatch):
    enter(calls, "right")
    late = _selfcheck.Outcome({}, "not reached", late=True)
    started = []
    monkeypatch.setattr(_selfcheck, "run", lambda *args, **options: started.append(1) or late)
    for _ in range(admission.ATTEMPTS):
        assert ask_in_another_process().source == "self-check"
    found = ask_in_another_process()
    assert found.source == "cache" and found.reason is not None
    assert "not reached by 3 self-checks" in found.reason
    assert len(started) == admission.ATTEMPTS


def test_a_problem_of_the_machine_is_no_verdict_on_the_kernel(calls, monkeypatch):
    enter(calls, "right")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "")
        found = ask()
        assert found.reason is not None and "sys.executable is empty" in found.reason
        assert ask() is found
    assert not cache().exists()
    assert ask_in_another_process().reason is None


def test_zero_seconds_switch_it_off(calls, monkeypatch):
    enter(calls, "right")
    monkeypatch.setenv(_selfcheck.SECONDS, "0")
    found = ask()
    assert (found.reason, found.source) == (
        "not admitted: no record for this GPU, and RESNET_FUSED_SELFCHECK_SECONDS is 0", "off",
    )  # fmt: skip
    assert ran(calls) == [] and not cache().exists()


@contextlib.contextmanager
def patched(module, **values):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setattr(module, name, value)
        yield


def true() -> bool:
    return True


def in_vmap(found: list) -> None:
    torch.func.vmap(lambda x: (found.append(ask()), x)[1])(torch.ones(2))


def in_grad(found: list) -> None:
    torch.func.grad(lambda x: (found.append(ask()), x)[1])(torch.ones(()))


def in_jit_trace(found: list) -> None:
    torch.jit.trace(lambda x: (found.append(ask()), x + 1)[1], torch.ones(2), check_trace=False)


def in_make_fx(found: list) -> None:
    make_fx(lambda x: (found.append(ask()), x + 1)[1])(torch.ones(2))


def in_fx(found: list) -> None:
    class Module(torch.nn.Module):
        def forward(self, x):
            found.append(ask())
            return x

    torch.fx.symbolic_trace(Module())


def in_fake_mode(found: list) -> None:
    with FakeTensorMode():
        found.append(ask())


def in_compile(found: list) -> None:
    with patched(torch.compiler, is_compiling=true):
        found.append(ask())


def in_capture(found: list) -> None:
    with patched(torch.cuda, is_initialized=true, is_current_stream_capturing=true):
        found.append(ask())


def in_bad_fork(found: list) -> None:
    with patched(torch.cuda, _is_in_bad_fork=true):
        found.append(ask())


def in_two_ranks(found: list) -> None:
    two = {"is_available": true, "is_initialized": true, "get_world_size": lambda: 2}
    with patched(torch.distributed, **two):
        found.append(ask())


def in_worker(found: list) -> None:
    with patched(torch.utils.data, get_worker_info=lambda: types.SimpleNamespace(id=0)):
        found.append(ask())


def in_block(found: list) -> None:
    with admission.without_checks("the user is in a hurry"):
        found.append(ask())


@pytest.mark.parametrize(
    ("situation", "why"),
    [
        (in_vmap, "traced"), (in_grad, "traced"), (in_jit_trace, "traced"), (in_make_fx, "traced"),
        (in_fx, "traced"), (in_fake_mode, "traced"), (in_compile, "traced"),
        (in_capture, "a CUDA graph is being captured"), (in_bad_fork, "forked after CUDA"),
        (in_two_ranks, "one of 2 ranks"), (in_worker, "worker of a DataLoader"),
        (in_block, "the user is in a hurry"),
    ],
)  # fmt: skip
def test_no_moment_for_a_check(situation, why, calls):
    enter(calls, "right")
    found: list[admission.Verdict] = []
    situation(found)
    assert found[0].source == "not yet" and not found[0].configurations
    assert found[0].reason is not None and found[0].reason.startswith("not admitted yet: ")
    assert why in found[0].reason
    assert ran(calls) == [] and not cache().exists()
    # Not remembered: the next ordinary call checks. What is on record is told at any moment.
    assert ask().reason is None
    found.clear()
    situation(found)
    assert found[0].reason is None
    assert ran(calls) == ["right"]


def test_one_rank_is_no_reason(calls):
    enter(calls, "right")
    one = {"is_available": true, "is_initialized": true, "get_world_size": lambda: 1}
    with patched(torch.distributed, **one):
        assert ask().reason is None


def test_threads_wait_for_the_one_that_checks(calls):
    enter(calls, "slow")
    found: list[admission.Verdict] = []
    threads = [threading.Thread(target=lambda: found.append(ask())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [one.reason for one in found] == [None] * 8
    assert ran(calls) == ["slow"]


def test_a_log_handler_that_runs_a_model_does_not_deadlock(calls):
    found = []

    class Handler(logging.Handler):
        def emit(self, record):
            found.append(ask())

    enter(calls, "right")
    handler = Handler()
    admission.logger.addHandler(handler)
    admission.logger.setLevel(logging.INFO)
    try:
        assert ask().reason is None
    finally:
        admission.logger.removeHandler(handler)
        admission.logger.setLevel(logging.NOTSET)
    assert found[0].reason == "not admitted yet: this thread is in a self-check"


@pytest.fixture
def gpu_call(calls, monkeypatch):
    """A call of the stand-in op on a GPU; its checks run on the CPU."""
    run = _selfcheck.run

    def on_cpu(check, names, device, **options):
        assert device == "cuda:0"
        return run(check, names, "cpu", **options)

    monkeypatch.setattr(_selfcheck, "run", on_cpu)
    monkeypatch.setattr(_platform, "identify", lambda device: GPU)
    monkeypatch.setattr(_platform, "uuid_of", lambda device: None)
    monkeypatch.setattr(admission, "platform_refusal", lambda implementation, device: None)
    monkeypatch.setattr(backends, "_registry", {})
    for name, supports in (
        ("triton", lambda call: admission.refusal(call, "triton")),
        ("reference", lambda call: None),
    ):
        backends.register(
            backends.Implementation("standin", name, (name,), "a stand-in", supports, "fused")
        )
    yield backends.Call("standin", "cuda", torch.float32)
    backends.forget_choices()


def chosen(call: backends.Call) -> str:
    return backends.choose(call).implementation.name


def test_a_choice_made_when_none_may_check_is_not_remembered(calls, gpu_call):
    enter(calls, "right")
    with patched(torch.cuda, _is_in_bad_fork=true):
        first = backends.choose(gpu_call)
        assert first.implementation.name == "reference"
        assert "forked after CUDA" in dict(first.refused)["triton"]
        with admission.without_checks("for another reason"):
            assert "for another reason" in dict(backends.choose(gpu_call).refused)["triton"]
        assert chosen(gpu_call) == "reference"
    assert ran(calls) == []
    assert chosen(gpu_call) == "triton"
    assert ran(calls) == ["right"]
    assert chosen(gpu_call) == "triton"  # the first one that is made after the verdict
    before = backends._choose.cache_info().misses
    assert chosen(gpu_call) == "triton"
    with patched(torch.cuda, _is_in_bad_fork=true):
        assert chosen(gpu_call) == "triton"
    assert backends._choose.cache_info().misses == before, "an admitted choice is remembered"


def test_a_refused_kernel_leaves_the_call_to_the_next(calls, gpu_call):
    enter(calls, "wrong")
    choice = backends.choose(gpu_call)
    assert choice.implementation.name == "reference"
    assert "wrong: ArithmeticError" in dict(choice.refused)["triton"]


def test_the_users_word_needs_no_admission(calls, gpu_call, monkeypatch, caplog):
    enter(calls, "right")
    with rf.backend("triton"):
        assert chosen(gpu_call) == "triton"
    assert ran(calls) == []
    monkeypatch.setattr(admission, "platform_refusal", lambda *args: "the driver is too old")
    backends.forget_choices()
    with rf.backend("triton"):
        assert chosen(gpu_call) == "reference"
    assert "the driver is too old" in caplog.text


def test_a_platform_refusal_is_warned_about_once(calls, gpu_call, monkeypatch, caplog):
    monkeypatch.setattr(admission, "platform_refusal", lambda *args: "the driver is too old")
    for dtype in (torch.float32, torch.float16):
        assert chosen(gpu_call._replace(dtype=dtype)) == "reference"
    assert warnings(caplog) == ["triton kernels are not used: the driver is too old"]


def test_a_call_on_the_cpu_asks_nothing(calls, gpu_call):
    enter(calls, "right")
    choice = backends.choose(gpu_call._replace(device="cpu"))
    assert dict(choice.refused)["triton"] == "x is on cpu"
    assert ran(calls) == []


def test_kernels_that_cannot_be_described(calls):
    enter(calls, configurations="standins:no_configurations")
    found = ask()
    assert found.reason is not None and "cannot import name 'triton'" in found.reason
    assert admission.verdict("standin", "cuda", "cpu").source == "unknown"
    enter(calls, op="empty")
    empty = admission.verdict("empty", "triton", "cpu")
    assert empty.reason == "not admitted: it has no configurations"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"op": ""}, "op must be a non-empty string, got ''"),
        ({"check": "no_colon"}, "check is 'no_colon'; accepted is 'module:function'"),
        ({"configurations": "a:b:c"}, "configurations is 'a:b:c'"),
        ({"configurations": ("a",)}, "configurations must be callable .* got tuple"),
        ({"sources": "kernel.py"}, "sources must be a tuple of file names, got 'kernel.py'"),
        ({"sources": ()}, "sources must be a tuple"),
    ],
)
def test_bad_kernels_are_refused(changes, message, calls):
    with pytest.raises((TypeError, ValueError), match=message):
        enter(calls, **changes)


def test_a_kernel_is_registered_once(calls):
    enter(calls, "right")
    with pytest.raises(ValueError, match="a kernel standin.triton already"):
        enter(calls, "right")
