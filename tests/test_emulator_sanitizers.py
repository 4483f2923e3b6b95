"""The emulator's fibers under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.

The emulator's own checks are off, so that what is found is the sanitizer's finding.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import emulated
import pytest

pytestmark = pytest.mark.emulated

PROBES = emulated.builder.ROOT / "tests" / "emulator"

SOUND = (
    "copy",
    "overwrite",
    "producer",
    "grid",
    "last_block",
    "flag",
    "fenced_flag",
    "order",
    "meetings",
)
RACES = (
    ("copy_no_barrier", "the copy", "the copy's reader"),
    ("producer_late", "producer_late", "producer_late's reader"),
    ("two_writers", "two_writers", "two_writers"),
)


def probe(variant: str, name: str, order: int) -> subprocess.CompletedProcess[str]:
    """Runs a probe in a program that was built with a sanitizer."""
    reason = emulated.why_not("probes", variant)
    if reason:
        pytest.skip(f"{reason} (tools/emulated.py --variant {variant})")
    path = emulated.builder.output("probes", variant)
    return subprocess.run(
        [path, name, str(order)], capture_output=True, text=True, timeout=120, check=False
    )


def place(mark: str) -> str:
    """ "file:line" of the line that carries a mark."""
    for path in [*sorted(PROBES.glob("*.cpp")), PROBES / "program" / "main.cpp"]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if line.endswith(f"// <- {mark}"):
                return f"{Path(path).name}:{number}"
    raise AssertionError(f"no line is marked '{mark}'")


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("name", SOUND)
@pytest.mark.parametrize("variant", ["asan", "tsan"])
def test_a_sound_kernel_is_clean(variant, name, order):
    run = probe(variant, name, order)
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.parametrize(
    ("name", "access"), [("store_behind", "WRITE of size 4"), ("copy_behind", "READ of size 4")]
)
def test_an_access_out_of_bounds_is_named_with_the_kernel_s_line(name, access):
    run = probe("asan", {"copy_behind": "copy_from_behind"}.get(name, name), 0)
    assert run.returncode not in (0, 2)
    assert "AddressSanitizer: heap-buffer-overflow" in run.stderr
    assert access in run.stderr
    assert f"{place(name)}\n" in run.stderr


# In reverse the flag's reader comes first, and reads nothing.
@pytest.mark.parametrize(
    ("name", "one", "other", "order"),
    [
        *((*race, order) for race in RACES for order in (0, 1)),
        ("flag_without_order", "no order, the store", "no order, the load", 0),
        *(("meetings_no_release", "said", "heard", order) for order in (0, 1)),
    ],
)
def test_a_race_is_named_with_both_lines(name, one, other, order):
    run = probe("tsan", name, order)
    assert run.returncode not in (0, 2)
    assert "ThreadSanitizer: data race" in run.stderr
    for mark in (one, other):
        assert f"{place(mark)} (" in run.stderr


@pytest.mark.parametrize("order", [0, 1])
def test_a_grid_without_its_barrier_races(order):
    assert "data race" in probe("tsan", "grid_no_barrier", order).stderr


@pytest.mark.parametrize("variant", ["asan", "tsan"])
def test_an_error_leaves_nothing_behind(variant):
    """Fibers that are left hanging are no finding of a sanitizer."""
    for name, kind in (("crossed_barriers", "deadlock"), ("leaves_early", "divergence")):
        run = probe(variant, name, 0)
        assert run.returncode == 2
        assert run.stderr.startswith(f"{kind}: ")
        assert len(run.stderr.splitlines()) == 1
