"""Every fault that the emulator can plant in a kernel is noticed by some run."""

from __future__ import annotations

from pathlib import Path

import emulated
import mutants
import mutants_block_end  # noqa: F401  (it enters itself)
import mutants_bn_dgrad  # noqa: F401  (likewise)
import mutants_bn_dgrad_end  # noqa: F401  (likewise)
import mutants_grad1x1  # noqa: F401  (likewise)
import mutants_grad1x1_end  # noqa: F401  (likewise)
import mutants_training  # noqa: F401  (likewise)
import mutants_wgrad  # noqa: F401  (likewise)
import pytest

pytestmark = pytest.mark.emulated

CHUNKS = 4
OPS = tuple(mutants.TRIALS)
RESIDUAL = "ptx::cp_async<kChunkBytes>(buffer_.chunk_at(row, chunk), residual + offset, valid);"
HALO_ZEROS = "ptx::store_shared(zeros_ + thread_ * kChunkBytes, PixelUnit{});"
IMAGE_ZEROS = (
    "ptx::store_shared(ring + Shape::kZerosAt + thread_ * kChunkBytes, Vector<uint32_t>{});"
)
ZEROS = "if (thread_ < kZeroBytes / 4) ptx::store_shared(zeros() + thread_ * 4, uint32_t{0});"
FENCE = "ptx::fence_acq_rel_gpu();"
TWICE = "the atomic of acquire and release between the barriers is enough"
# (op, file, the line's text, instruction, fault) -> why the fault does no harm there.
HARMLESS: dict[tuple[str, str, str, str, str], str] = (
    {
        ("conv_bn_act", "conv_epilogue.h", RESIDUAL, "cp.async.cg", "ignore_predicate"): (
            "the shortcut beyond the tile's end is added to results that are never stored"
        ),
    }
    | {
        (op, file, line, "st.shared", "chunk_off"): (
            "every thread's zero lands where another thread's was meant to"
        )
        for op, file, line in (
            ("conv_chain", "chain_front.h", ZEROS),
            ("conv_bn_dgrad", "halo_loader.h", HALO_ZEROS),
            ("conv_bn_stats", "halo_loader.h", HALO_ZEROS),
            ("conv_bn_wgrad", "image_wgrad_loader.h", IMAGE_ZEROS),
            ("conv_bn_wgrad", "halo_wgrad_loader.h", HALO_ZEROS),
        )
    }
    | {
        (op, "split_reduction.h", FENCE, "fence.acq_rel", "no_fence"): TWICE
        for op in (
            "bn_add_act_conv_stats",
            "conv_bn_act",
            "conv_bn_dgrad",
            "conv_bn_stats",
            "conv_dgrad",
        )
    }
    | {
        (op, "merge_chunks.h", FENCE, "fence.acq_rel", "no_fence"): TWICE
        for op in ("bn_add_act_conv_stats", "conv_bn_dgrad", "conv_bn_dgrad_end", "conv_bn_stats")
    }
)


@pytest.mark.parametrize("chunk", range(CHUNKS))
@pytest.mark.parametrize("op", OPS)
def test_every_fault_is_noticed(op, chunk):
    groups: dict[tuple[str, str, str, str], list[mutants.Mutant]] = {}
    for mutant in mutants.found(op):
        groups.setdefault(mutant.key, []).append(mutant)
    survivors, stale = [], []
    for key, group in list(groups.items())[chunk::CHUNKS]:
        alive = [m for m in group if mutants.noticed(m, mutants.found(op)[m]) is None]
        if (op, *key) not in HARMLESS:
            survivors += alive
        elif not alive:
            stale.append(key)
    assert not survivors, "nothing notices these"
    assert not stale, "the table calls these harmless"


@pytest.mark.parametrize(
    ("alive", "harmless", "said"),
    [
        ((), (), None),
        ((0,), (0,), None),
        ((0,), (), "nothing notices these"),
        ((), (0,), "the table calls these harmless"),
        ((1,), (), None),  # of the other part
    ],
)
def test_a_fault_that_lives_is_said(monkeypatch, alive, harmless, said):
    found = {mutants.Mutant("tests/mutants.py", 1 + i, "x", str(i)): [] for i in range(2)}
    monkeypatch.setattr(mutants, "noticed", lambda m, _: None if int(m.fault) in alive else "seen")
    table = {mutant.key for mutant in found if int(mutant.fault) in harmless}
    if said is None:
        mutants.check(found, table, 0, 2)
        return
    with pytest.raises(AssertionError, match=said):
        mutants.check(found, table, 0, 2)


def test_the_table_of_harmless_faults_names_real_ones():
    known = {(op, *mutant.key) for op in OPS for mutant in mutants.found(op)}
    assert set(HARMLESS) - known == set()
    assert all(len(reason) > 20 for reason in HARMLESS.values())


def test_every_kernel_file_takes_part_with_many_kinds_of_fault():
    reached = [mutant for op in OPS for mutant in mutants.found(op)]
    assert len({mutant.fault for mutant in reached}) >= 12
    device = {path.name for path in Path(mutants.ROOT, "csrc/kernels").glob("*_sm*.cuh")}
    # What shares an op's kernel, or is one more of it, has a file of its own (*_faults.py); of what
    # measures the GPU itself the driver's tests plant them.
    kinds = {name.rsplit("_", 1)[0] for name in device if not name.startswith("ceilings")}
    more = ("_window", "_cluster", "_stream", "_merge", "_image", "_stem", "_stationary")
    ops = {next((k.removesuffix(m) for m in more if k.endswith(m)), k) for k in kinds}
    assert (
        ops
        == set(OPS)
        == set(emulated.DTYPES) - {"conv_bn_act_fp8", "conv_bn_stats_finalize", "conv_chain_fp8"}
        | {"network"}
    )
