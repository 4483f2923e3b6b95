"""Of two GPU kernels that may be used, records say which one is taken."""

from __future__ import annotations

import pytest
import torch

from resnet_fused import _extension, _platform, admission, backends, ops  # noqa: F401

CALL = backends.Call("conv_bn_act", "cuda", torch.bfloat16, index=0)
NOWHERE = _platform.Gpu("a GPU", "sm_90", None, torch.__version__, None, None)


@pytest.fixture(autouse=True)
def two_kernels(monkeypatch):
    """Both kernels may serve the call."""
    monkeypatch.setattr(_platform, "identify", lambda device: NOWHERE)
    monkeypatch.setattr(_platform, "current_device", lambda: 0)
    monkeypatch.setattr(admission, "source_hash", lambda kernel: f"hash of {kernel.name}")
    for entry in backends.implementations("conv_bn_act"):
        if entry.name in backends.GPU_BACKENDS:
            monkeypatch.setitem(entry.__dict__, "supports", lambda call: None)
    backends.forget_choices()
    yield
    backends.forget_choices()


def shipped(monkeypatch, *entries) -> None:
    """Records of (implementation, configuration, layer -> microseconds)."""
    records = tuple(
        {
            "op": "conv_bn_act", "implementation": name, "configuration": configuration,
            "ok": True, "hash": f"hash of conv_bn_act.{name}", "arch": "sm_90",
            "timings": timings, **changes,
        }
        for name, configuration, timings, changes in entries
    )  # fmt: skip
    monkeypatch.setattr(admission, "_shipped_records", lambda: records)


def chosen() -> tuple[str, str]:
    """The first choice, and the one after it was refused."""
    first = backends.choose(CALL)
    second = backends.next_choice(CALL, first, "why")
    return first.implementation.name, second.implementation.name


def test_without_records_triton_comes_first(monkeypatch):
    assert chosen() == ("triton", "cuda")
    shipped(monkeypatch, ("cuda", "a", {"3x3@256": 1.0}, {}))
    assert chosen() == ("triton", "cuda")


def test_the_faster_one_comes_first(monkeypatch):
    shipped(
        monkeypatch,
        ("triton", "a", {"3x3@256": 90.0, "1x1@256": 40.0}, {}),
        ("triton", "b", {"3x3@256": 80.0}, {}),
        ("cuda", "c", {"3x3@256": 60.0, "1x1@256": 45.0, "stem@1": 5.0}, {}),
    )
    assert admission.timings("conv_bn_act", "triton") == {"3x3@256": 80.0, "1x1@256": 40.0}
    assert admission.timings("conv_bn_act", "cuda", 0)["stem@1"] == 5.0
    assert chosen() == ("cuda", "triton")  # 80 * 40 > 60 * 45
    with backends.backend("triton"):
        assert backends.choose(CALL).implementation.name == "triton"


@pytest.mark.parametrize("change", [{"ok": False}, {"hash": "of other sources"}, {"arch": "sm_80"}])
def test_records_of_something_else_do_not_count(monkeypatch, change):
    shipped(
        monkeypatch,
        ("triton", "a", {"3x3@256": 90.0}, {}),
        ("cuda", "c", {"3x3@256": 60.0}, change),
    )
    assert admission.timings("conv_bn_act", "cuda") == {}
    assert chosen() == ("triton", "cuda")


def test_a_kernel_that_nobody_knows_has_no_timings(monkeypatch):
    shipped(monkeypatch, ("cuda", "c", {"3x3@256": 60.0}, {}))
    assert admission.timings("no_op", "cuda") == {}

    def missing(kernel):
        raise FileNotFoundError(kernel.name)

    monkeypatch.setattr(admission, "source_hash", missing)
    assert admission.timings("conv_bn_act", "cuda") == {}
    assert chosen() == ("triton", "cuda")
