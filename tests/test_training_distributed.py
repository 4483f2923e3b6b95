"""SyncBatchNorm, DistributedDataParallel, fully_shard: processes against one."""

from __future__ import annotations

import copy

import pytest
import torch
import training_ranks as ranks
from torch import distributed as dist
from torch import multiprocessing as mp
from torch.testing import assert_close

import resnet_fused as rf
from resnet_fused import numerics

pytestmark = [
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()), reason="torch is built without gloo"
    ),
    pytest.mark.timeout(400),  # the first test starts the processes
]
F64 = torch.float64
SCENARIOS = ranks.scenarios()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Scenario -> what each rank returned."""
    folder = tmp_path_factory.mktemp("ranks")
    # One server imports torch, the ranks are its children.
    mp.get_context("forkserver").set_forkserver_preload(["training_ranks"])
    context = mp.start_processes(
        ranks.work, (str(folder),), nprocs=ranks.RANKS, join=False, start_method="forkserver"
    )
    try:
        for _ in range(2 * ranks.RANKS):
            if context.join(timeout=ranks.LIMIT):
                break
        else:
            pytest.fail("the processes did not end")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    found = {}
    for index, name in enumerate(SCENARIOS):
        found[name] = []
        for rank in range(ranks.RANKS):
            named, result = torch.load(folder / f"{index}.{rank}.pt", weights_only=False)
            assert named == name
            found[name].append(result)
    return found


def of(results, name):
    """A scenario's results, or its failure."""
    for rank, result in enumerate(results[name]):
        failed = isinstance(result, str) and "Traceback" in result
        assert not failed, f"rank {rank}: {result}"
    return results[name]


def joined(block, share, dtype=F64, change=""):
    """One process on the whole batch, PyTorch's own modules."""
    model = ranks.changes(rf.unfuse(ranks.made(block, dtype)), change)
    whole = ranks.Shares(share.images)
    return ranks.two_steps(model, ranks.batch(share.images, dtype), whole, 0)


def together(found):
    """The ranks' parts put together: outputs and input gradients joined, the others added up."""
    names = found[0]["grads"]
    return {
        "outs": [torch.cat(parts) for parts in zip(*[r["outs"] for r in found], strict=True)],
        "inputs": [torch.cat(parts) for parts in zip(*[r["inputs"] for r in found], strict=True)],
        "grads": {name: sum(r["grads"][name] for r in found) for name in names},
    }


def assert_joined(found, expected, **close):
    whole = together(found)
    for key in ("outs", "inputs", "grads"):
        assert_close(whole[key], expected[key], **close)
    for result in found:
        assert_close(result["buffers"], expected["buffers"], **close)


@pytest.mark.parametrize("name", [n for n in SCENARIOS if SCENARIOS[n][0] is ranks.sync])
def test_synchronised_ranks_are_one_process_on_the_joined_batch(results, name):
    block, split, dtype, *change = SCENARIOS[name][1]
    share = ranks.SPLITS[split]
    found = [result for result in of(results, name) if result is not None]
    assert len(found) == len(share.sizes)
    for backend in ranks.backends_here():
        mine = [result[backend] for result in found]
        expected = joined(block, share, dtype, *change)
        if dtype == F64:
            assert_joined(mine, expected, rtol=1e-12, atol=1e-12)
            continue
        oracle = joined(block, share, F64, *change)
        whole = together(mine)
        for ours, eager, exact in zip(whole["outs"], expected["outs"], oracle["outs"], strict=True):
            assert numerics.relative_check(ours, eager, exact)
        assert_joined(mine, expected, rtol=1e-4, atol=1e-4)


def test_gradients_of_gamma_and_beta_are_each_ranks_own(results):
    """DistributedDataParallel averages them afterwards, as it does with PyTorch's."""
    found = [result["reference"] for result in of(results, "sync bottleneck unequal")]
    for name, grad in found[0]["grads"].items():
        if "bn" in name:
            assert not torch.allclose(grad, found[1]["grads"][name]), name


def test_every_rank_has_the_same_statistics_bit_for_bit(results):
    for name in ("sync bottleneck unequal", "sync float32 unequal", "sync bottleneck one empty"):
        for backend in ranks.backends_here():
            first, *others = [result[backend]["buffers"] for result in of(results, name)]
            for other in others:
                assert all(torch.equal(first[key], other[key]) for key in first), name


def test_groups_of_a_subset(results):
    found = of(results, "subset")
    expected = joined("bottleneck", ranks.Shares(4))
    assert_joined(found[:2], expected, rtol=1e-12, atol=1e-12)
    assert_joined(found[2:], expected, rtol=1e-12, atol=1e-12)


def test_what_is_left_to_pytorch_says_what_pytorch_says(results):
    for text in of(results, "left to pytorch"):
        assert "SyncBatchNorm expected input tensor to be on GPU" in text


@pytest.mark.parametrize("name", [n for n in SCENARIOS if n.startswith("ddp")])
def test_distributed_data_parallel(results, name):
    for result in of(results, name):
        assert_close(result["fused"], result["plain"], rtol=1e-10, atol=1e-11)


def test_averaged_gradients_train_as_one_process_on_the_whole_batch(results):
    found = of(results, "average")
    for result in found:
        ours, theirs = result["fused"]["state"], result["plain"]["state"]
        assert_close(ours, theirs, rtol=1e-10, atol=1e-11)
    for step in range(2):
        losses = [result["fused"]["losses"][step] for result in found]
        assert_close(sum(losses) / ranks.RANKS, found[0]["plain"]["losses"][step])


@pytest.mark.parametrize("precision", ["float64", "bfloat16"])
def test_fully_shard_at_block_level(results, precision):
    exact = precision == "float64"
    close = {"rtol": 1e-10, "atol": 1e-11} if exact else {"rtol": 5e-2, "atol": 0.15}
    for result in of(results, f"fsdp {precision}"):
        ours, theirs = result["fused"], result["plain"]
        # Stem, two layers, three and the projection, in two steps: none is left to the modules.
        assert ours["ops"] == ["conv_bn_stats"] * 14
        assert_close(ours["losses"], theirs["losses"], **close, check_dtype=exact)
        assert_close(ours["eval"], theirs["eval"], **close, check_dtype=exact)
        if exact:
            assert_close(ours["state"], theirs["state"], **close)
        # Weights prepared for inference do not outlive a step, though their memory is the same.
        assert not torch.allclose(ours["eval"][0], ours["eval"][2])


def test_conversion_to_syncbatchnorm_keeps_a_model_fused():
    model = ranks.network()
    kinds = [type(m) for m in model]
    converted = ranks.synchronised(copy.deepcopy(model))
    assert [type(m) for m in converted] == kinds
    assert_close(converted(ranks.batch(3)), model(ranks.batch(3)))
