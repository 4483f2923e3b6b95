"""Shared by all tests: seeds, and a clean environment."""

from __future__ import annotations

import os
import re

import emulated
import emulated_block_end  # noqa: F401  (likewise)
import emulated_bn_dgrad  # noqa: F401  (it enters itself)
import emulated_bn_dgrad_end  # noqa: F401  (likewise)
import emulated_finalize  # noqa: F401  (likewise)
import emulated_fp8  # noqa: F401
import emulated_grad1x1  # noqa: F401  (likewise)
import emulated_grad1x1_end  # noqa: F401  (likewise)
import emulated_stats  # noqa: F401
import emulated_stats_finalize  # noqa: F401
import emulated_training  # noqa: F401  (likewise)
import emulated_wgrad  # noqa: F401  (likewise)
import pytest
import torch
from hypothesis import HealthCheck, settings

from resnet_fused import backends
from resnet_fused.nn import _training_route
from resnet_fused.triton import _limits

# With one thread PyTorch keeps small convolutions from oneDNN, and other layers take other ways.
torch.set_num_threads(max(2, torch.get_num_threads()))

# The autouse fixtures below are the same for every example.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
settings.register_profile("default", max_examples=25, derandomize=True, **_COMMON)
settings.register_profile("proof", max_examples=1000, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


# Half of the interpreter's time goes into these; here in float16 and bit for bit, in `make proof`
# in every way.
LARGE = re.compile(r"triton-.*(stem|deep|odd_channels|all_equal)")
# Training's kernels have tests of their own, of every configuration: of its matrix the interpreter
# runs these in CI's time, the rest in `make proof`.
TRAINING = re.compile(
    r"(exact_on_integers\[triton-float16-(3x3_stride2|3x3_groups4|odd_channels_1x1|empty_batch)"
    r"|within_the_bound\[triton-float32-(3x3_residual|1x1_stride2|nchw_residual|odd_nhwc)"
    r"|(within_the_bound|apply|add_act_backward)\[triton-float16-(nhwc_residual|unaligned|empty_b)"
    r"|any_layout\[triton-float16-3x3_groups4-sliced|another_layout\[triton-float16"
    r"|(nan|torch_does).*\[triton-float16-\w+-nan|kink.*\[triton|centred\[triton"
    r"|opcheck\[(bn_update|bn_act_pool-)"
    r"|(is_exact|pool_backward)\[triton-float16-(stem_odd|stem_nchw|sliced|uneven|gaps|empty_batch)"
    r"|hard_values\[triton-float32-(apart|outlier|constant)-1000|repeats|fake_says.*sliced"
    r"|finalize.*\[triton-float32-(65|pix)|bn_update_stats\[triton-float32-running_dtype0"
    r"|empty_batch_(is_counted|has_finite)|no_pixels)"
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what this process can't run: interpreted and emulated kernels."""
    _leave_out_interpreted(config, items)
    marked = [item for item in items if item.get_closest_marker("emulated")]
    reason = emulated.why_not() if marked else None
    if reason and emulated.required():
        raise pytest.UsageError(f"{emulated.REQUIRED} is set, and {reason}")
    if reason:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


def _leave_out_interpreted(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Triton decides once in a process whether its kernels are interpreted."""
    whole = os.environ.get("HYPOTHESIS_PROFILE") == "proof"
    left = []
    for item in list(items):
        if not item.get_closest_marker("interpreter"):
            continue
        if not _limits.interpreted():
            item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1: make interpreter"))
        elif not whole and _is_left_out(item):
            left.append(item)
    if left:
        items[:] = [item for item in items if item not in left]
        config.hook.pytest_deselected(items=left)


def _is_left_out(item: pytest.Item) -> bool:
    if "test_ops_training_" in item.nodeid:
        return not TRAINING.search(item.name)
    return bool(LARGE.search(item.name)) and not _is_sampled(item.name)


def _is_sampled(name: str) -> bool:
    return name.startswith("test_exact") and "triton-float16" in name


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_backend_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(backends.ENVIRONMENT, raising=False)
    backends.forget_choices()


@pytest.fixture(autouse=True)
def _training_nodes_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' layers are small: test_training_sizes.py looks at who gets a node by itself."""
    monkeypatch.setattr(_training_route, "FEWEST_ELEMENTS", 0)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
