"""Several processes: what one alone would do, stopped and gone on with together."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time

import psutil
import pytest
import torch
import train_ranks as ranks
import train_runs as runs
from safetensors.torch import load_file
from torch import distributed as dist
from torch import multiprocessing as mp
from torch.testing import assert_close

from resnet_fused.train import checkpoint, journal
from resnet_fused.train.loop import FINAL

pytestmark = [
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()), reason="torch is built without gloo"
    ),
    pytest.mark.timeout(400),  # the first test starts the processes
]


@pytest.fixture(scope="module", params=[2, 3])
def results(request, tmp_path_factory):
    """How many processes, their folder, scenario -> what each of them returned."""
    world = request.param
    folder = tmp_path_factory.mktemp(f"world{world}")
    mp.get_context("forkserver").set_forkserver_preload(["train_ranks"])
    context = mp.start_processes(
        ranks.work, (world, str(folder)), nprocs=world, join=False, start_method="forkserver"
    )
    try:
        for _ in range(2 * world):
            if context.join(timeout=ranks.LIMIT):
                break
        else:
            pytest.fail("the processes did not end")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    found = {
        name: [torch.load(folder / f"{name}.{rank}.pt") for rank in range(world)]
        for name in ranks.SCENARIOS
    }
    return world, folder, found


def of(results, name):
    for rank, result in enumerate(results[2][name]):
        failed = isinstance(result, str) and "Traceback" in result
        assert not failed, f"rank {rank}: {result}"
    return results[1] / name


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process with all images of each step."""
    folder = tmp_path_factory.mktemp("alone")
    runs.train(folder, runs.settings(runs.recipe(sync_batchnorm=True)))
    return folder


def compare(folder, alone):
    """The same steps, but for the order in which float32 sums are added."""
    ours, theirs = (journal.read(run, journal.METRICS) for run in (folder, alone))
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for our, their in zip(ours, theirs, strict=True):
        assert our["loss"] == pytest.approx(their["loss"], rel=1e-3)
        assert our["lr" if "lr" in our else "images"] == their["lr" if "lr" in their else "images"]
    state, expected = load_file(folder / FINAL), load_file(alone / FINAL)
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        assert_close(state[key], value, rtol=2e-3, atol=2e-4, msg=lambda text, key=key: key + text)


def test_several_are_one_with_all_images(results, alone):
    compare(of(results, "plain"), alone)


def test_so_are_several_that_share_the_weights(results, alone):
    folder = of(results, "fsdp")
    compare(folder / "whole", alone)
    whole, parts = (load_file(folder / name / FINAL) for name in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    metrics = [(folder / name / journal.METRICS).read_bytes() for name in ("whole", "parts")]
    assert metrics[0] == metrics[1]


def test_interrupted_they_go_on_bit_for_bit(results):
    folder = of(results, "resumed")
    metrics = [(folder / name / journal.METRICS).read_bytes() for name in ("whole", "parts")]
    assert metrics[0] == metrics[1]
    whole, parts = (load_file(folder / name / FINAL) for name in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_a_signal_to_one_ends_all_behind_the_same_step(results):
    folder = of(results, "stopped")
    assert results[2]["stopped"] == [3] * results[0]
    assert checkpoint.newest(folder).step == 3


def test_no_number_in_one_ends_all(results):
    of(results, "poisoned")
    for text in results[2]["poisoned"]:
        assert text.startswith("TrainingError: the loss is NaN or Inf at step 1 of 12"), text


def command(world, *arguments, port=None):
    """`resnet-fused train` under torchrun."""
    where = ["--master-port", str(port)] if port else ["--standalone"]
    return [
        sys.executable, "-m", "torch.distributed.run", *where, "--nproc-per-node", str(world),
        "-m", "resnet_fused", "train", *map(str, arguments),
    ]  # fmt: skip


def test_the_same_command_under_torchrun(tmp_path):
    arguments = [
        "rf:cifar_resnet20", "--data", f"imagefolder:{runs.picture_folder(tmp_path / 'data')}",
        "--recipe", "digits", "--set", "size=16", "--batch-size", 4, "--epochs", 1,
        "--output", tmp_path / "run", "--workers", 0, "--no-tensorboard", "--json",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command(2, *arguments), capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert (record["step"], record["test"]["images"]) == (3, 6)
    assert (tmp_path / "run" / "report.html").exists()


def kill_a_rank(agent, run, lines):
    """Waits for so many lines of metrics, then kills one of torchrun's processes."""
    file = run / "metrics.jsonl"
    while agent.poll() is None:
        if file.exists() and file.read_bytes().count(b"\n") >= lines:
            break
        time.sleep(0.02)
    ranks_of_it = psutil.Process(agent.pid).children()
    victim = max(ranks_of_it, key=lambda process: process.pid)
    victim.kill()


@pytest.mark.slow
@pytest.mark.parametrize("restarts", [0, 1])
def test_a_rank_that_dies_ends_all_or_all_begin_again(tmp_path, restarts):
    folder = runs.picture_folder(tmp_path / "data")
    arguments = [
        "rf:cifar_resnet20", "--data", f"imagefolder:{folder}", "--recipe", "digits",
        "--set", "size=16", "--batch-size", 4, "--epochs", 6, "--workers", 0, "--no-tensorboard",
        "--save-every", 2, "--log-every", 1, "--resume", "--timeout", 60,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    line = command(2, *arguments, "--output", tmp_path / "run")
    line[3:3] = ["--max-restarts", str(restarts)]
    with subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as agent:
        kill_a_rank(agent, tmp_path / "run", 4)
        _, stderr = agent.communicate(timeout=200)
    if not restarts:
        assert agent.returncode != 0
        assert checkpoint.newest(tmp_path / "run") is not None
        assert not (tmp_path / "run" / FINAL).exists()
        return
    assert agent.returncode == 0, stderr
    done = subprocess.run(
        command(2, *arguments, "--output", tmp_path / "whole"),
        capture_output=True, text=True, timeout=200, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    metrics = [(tmp_path / name / journal.METRICS).read_bytes() for name in ("run", "whole")]
    assert metrics[0] == metrics[1]


def test_a_port_in_use_is_named(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        environment = {
            **os.environ, "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1]),
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", "resnet_fused", "train", "rf:cifar_resnet20", "--data", "digits",
             "--output", str(tmp_path / "run"), "--timeout", "20"],
            capture_output=True, text=True, timeout=120, env=environment,
        )  # fmt: skip
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: processes: 2 did not meet at 127.0.0.1:"), done.stderr
    assert "port in use" in last
    assert not (tmp_path / "run").exists()
