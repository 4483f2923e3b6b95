"""Shared by all tests: seeds, and a clean environment."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

from resnet_fused import backends

# The autouse fixtures below are the same for every example.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
settings.register_profile("default", max_examples=25, derandomize=True, **_COMMON)
settings.register_profile("proof", max_examples=1000, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_backend_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(backends.ENVIRONMENT, raising=False)
    backends.forget_choices()


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
