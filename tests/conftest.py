"""Shared by all tests: seeds, and a clean environment."""

from __future__ import annotations

import pytest
import torch

from resnet_fused import backends


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
