"""`resnet-fused paper` on real images, at lengths that say nothing: everything but the verdicts."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import paper_runs
import pytest
import torch
import train_runs
from command import as_json, run
from PIL import Image
from training_nets import BACKEND, assert_same, steps

import resnet_fused as rf
from resnet_fused.paper import EXPERIMENTS
from resnet_fused.paper.runs import RESULT
from resnet_fused.report import paper_page
from resnet_fused.train.loop import Trainer

PROOF = os.environ.get("HYPOTHESIS_PROFILE") == "proof"
SHORT = [word for change in paper_runs.SHORT for word in ("--set", change)]
DIGITS = ["--depths", "8,14", "--seeds", 2, *SHORT]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder that all experiments on digits share, and how often each run was trained."""
    return tmp_path_factory.mktemp("paper")


@pytest.fixture(scope="module")
def records(shared):
    """What each experiment printed."""
    return {
        name: as_json("paper", name, "--output", shared, *DIGITS) for name in EXPERIMENTS
    }  # fmt: skip


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_writes_its_record_picture_and_page(records, shared, name):
    record = records[name]
    assert record == json.loads((shared / f"{name}.json").read_text())
    assert record["experiment"] == name and record["verdict"]
    assert record["scale"]["depths"] == [8, 14] and record["scale"]["seeds"] == 2
    seeds = {run["seed"] for run in record["runs"]}
    assert seeds == {0, 1} and all(run["steps"] == 5 for run in record["runs"])
    assert all(0 <= run["train_error"] <= 1 for run in record["runs"])
    assert all(len(row) == len(record["columns"]) for row in record["rows"])
    page = (shared / f"{name}.html").read_text()
    assert record["title"].replace("'", "&#39;") in page and "arXiv:1512.03385" in page
    assert all(check["claim"].replace("'", "&#39;") in page for check in record["checks"])
    image = Image.open(io.BytesIO((shared / f"{name}.png").read_bytes()))
    assert image.size[0] > 900 and image.getextrema() != ((255, 255),) * 3
    assert paper_page.draw(record, "dark") != paper_page.draw(record)


def test_networks_that_experiments_share_are_trained_once(records, shared):
    folders = {path.name for path in (shared / "runs").iterdir()}
    names = {run["variant"] for record in records.values() for run in record["runs"]}
    assert folders == {f"{name}-seed{seed}" for name in names for seed in (0, 1)}
    before = {path: path.stat().st_mtime_ns for path in shared.rglob("metrics.jsonl")}
    again = as_json("paper", "degradation", "--output", shared, *DIGITS)
    assert again["runs"] == records["degradation"]["runs"]
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_errors_are_those_of_the_weights(records, shared):
    job = paper_runs.job(shared)
    networks = {v.name: v for e in EXPERIMENTS.values() for v in e.variants(job.scale)}
    from safetensors.torch import load_file

    for record in records["gradient-paths"]["runs"][:3]:
        model = networks[record["variant"]].build(job.scale, job.source)
        model.load_state_dict(load_file(shared / record["folder"] / "model.safetensors"))
        images, labels = job.source.train.images, job.source.train.labels
        mean, std = job.source.mean[0], job.source.std[0]
        with torch.no_grad():
            scores = rf.unfuse(model).eval()((images / 255 - mean) / std)
        wrong = float((scores.argmax(1) != labels).double().mean())
        # The fused layers round otherwise: an image on the edge may change sides.
        assert record["train_error"] == pytest.approx(wrong, abs=2.5 / len(labels))
        assert record["parameters"] == sum(p.numel() for p in model.parameters())


def test_deviations_are_those_of_the_layers(records, shared):
    job = paper_runs.job(shared)
    responses = records["responses"]
    deviations = responses["values"]["deviations"]
    assert {name: len(own[0]) for name, own in deviations.items()} == {
        "plain8": 7, "plain14": 13, "resnet8": 7, "resnet14": 13,
    }  # fmt: skip
    network = next(v for v in EXPERIMENTS["responses"].variants(job.scale) if v.name == "resnet8")
    model = rf.unfuse(network.build(job.scale, job.source)).eval()
    from safetensors.torch import load_file

    model.load_state_dict(load_file(shared / "runs" / "resnet8-seed1" / "model.safetensors"))
    x = (job.source.val.images / 255 - job.source.mean[0]) / job.source.std[0]
    with torch.no_grad():
        first = model.bn1(model.conv1(x))
    assert deviations["resnet8"][1][0] == pytest.approx(float(first.std(correction=0)), rel=1e-4)


def test_an_ensemble_s_members_come_in_one_after_the_other(records):
    record = records["ensemble"]
    alone, together = record["values"]["alone"], record["values"]["together"]
    assert len(alone) == len(together) == 4 and together[0] == alone[0]
    assert [row[1] for row in record["rows"]] == [
        "ResNet-8 #0", "ResNet-14 #0", "ResNet-8 #1", "ResNet-14 #1"
    ]  # fmt: skip
    errors = [run["test_error"] for run in record["runs"]]
    assert alone == pytest.approx([errors[0], errors[2], errors[1], errors[3]], abs=1.5 / 360)


# ------------------------------------------------------------------ stopping and going on


class Killed(Exception):
    """Stands for a kill -9."""


def test_an_experiment_that_was_killed_goes_on_bit_for_bit(tmp_path, monkeypatch):
    more = ["--depths", "8", "--seeds", 2, *SHORT]
    whole = as_json("paper", "degradation", "--output", tmp_path / "whole", *more)
    take, count = Trainer._step, 0

    def stepping(self, batches):
        nonlocal count
        count += 1
        if count in (4, 12):
            raise Killed
        take(self, batches)

    monkeypatch.setattr(Trainer, "_step", stepping)
    for _ in range(2):
        with pytest.raises(Killed):
            run("paper", "degradation", "--output", tmp_path / "parts", *more)
    parts = as_json("paper", "degradation", "--output", tmp_path / "parts", *more)
    assert parts["runs"] == whole["runs"] and parts["panels"] == whole["panels"]
    for file in (tmp_path / "whole").rglob("*.safetensors"):
        if "checkpoints" not in file.parts:
            other = tmp_path / "parts" / file.relative_to(tmp_path / "whole")
            assert other.read_bytes() == file.read_bytes()


def test_a_signal_ends_it_and_the_same_command_goes_on(tmp_path, monkeypatch):
    take = Trainer._step

    def stepping(self, batches):
        take(self, batches)
        if self.state.step == 2 and self.settings.model == "paper:resnet8":
            os.kill(os.getpid(), signal.SIGTERM)

    more = ["--depths", "8", "--seeds", 1, *SHORT]
    monkeypatch.setattr(Trainer, "_step", stepping)
    stopped = run("paper", "degradation", "--output", tmp_path / "one", *more, code=143)
    assert "stopped by signal 15" in stopped.stderr
    assert not (tmp_path / "one" / "degradation.json").exists()
    assert (tmp_path / "one" / "runs" / "plain8-seed0" / RESULT).exists()
    monkeypatch.undo()
    said = run("paper", "degradation", "--output", tmp_path / "one", *more).stdout
    assert "plain-8" in said and "One depth alone" in said and "degradation.html" in said


def test_a_folder_of_other_runs_is_refused(shared, records):
    refused = run(
        "paper", "degradation", "--output", shared, *DIGITS, "--set", "optimizer.lr=0.2", code=2
    )
    assert "another run" in refused.stderr and "optimizer.lr" in refused.stderr


# ------------------------------------------------------------------ other data


def test_photographs_in_folders(tmp_path):
    folder = train_runs.picture_folder(tmp_path / "data", each=8)
    record = as_json(
        "paper", "responses", "--data", f"imagefolder:{folder}", "--output", tmp_path / "out",
        "--depths", "18", "--set", "iterations=2", "--set", "batch_size=8", "--workers", 0,
    )  # fmt: skip
    assert [run["variant"] for run in record["runs"]] == ["plain18", "resnet18"]
    # Table 1's counts, without the 998 classes that are not there.
    assert record["runs"][0]["parameters"] == 11_689_512 - 998 * 513 - 172_032 - 2 * 896


def test_cifar_s_files(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, _ in (*CIFAR10.train_list, *CIFAR10.test_list):
        data = rng.integers(0, 256, (4, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": [1, 2, 3, 4]}))
    names = {"label_names": [f"kind {i}" for i in range(10)]}
    (folder / CIFAR10.meta["filename"]).write_bytes(pickle.dumps(names))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    record = as_json(
        "paper", "bottleneck", "--data", f"cifar10:{tmp_path}", "--output", tmp_path / "out",
        "--depths", "8", "--set", "iterations=2", "--set", "batch_size=4",
    )  # fmt: skip
    assert [run["variant"] for run in record["runs"]] == ["resnet8", "bottleneck11"]
    assert record["images"] == {"train": 20, "test": 4}


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["depths"], ["no 'depths'", "degradation", "gradient-paths"]),
        (["depth", "--data", "mnist"], ["'mnist'", "digits", "imagefolder"]),
        (["depth", "--scale", "big"], ["'big'", "tiny, small, full"]),
        (["depth", "--depths", "21"], ["got 21", "6n + 2"]),
        (["depth", "--data", "imagefolder:x", "--depths", "20"], ["no such folder"]),
        (["depth", "--set", "lr=1"], ["no entry 'lr'"]),
        (["depth", "--data", "digits:x"], ["digits come with scikit-learn"]),
    ],
)
def test_bad_input_says_what_there_is(tmp_path, arguments, words):
    refused = run("paper", *arguments, "--output", tmp_path / "none", code=2)
    assert all(word in refused.stderr for word in words), refused.stderr
    assert not (tmp_path / "none").exists()


def test_depths_that_no_network_for_photographs_has(tmp_path):
    folder = train_runs.picture_folder(tmp_path / "data")
    refused = run(
        "paper", "depth", "--data", f"imagefolder:{folder}", "--depths", "20", "--output",
        tmp_path / "out", code=2,
    )  # fmt: skip
    assert "accepted for photographs are 18, 34, 50" in refused.stderr


def test_one_class_and_broken_images_are_named(tmp_path):
    one = train_runs.picture_folder(tmp_path / "one", classes=("cat",))
    more = ["--depths", "18", "--set", "iterations=1", "--set", "batch_size=4", "--workers", 0]
    out = ["--output", tmp_path / "out"]
    refused = run("paper", "depth", "--data", f"imagefolder:{one}", *more, *out, code=2)
    assert "one class alone, 'cat'" in refused.stderr and not (tmp_path / "out").exists()
    two = train_runs.picture_folder(tmp_path / "two")
    for file in (two / "train").rglob("*.png"):
        file.write_bytes(b"no image")
    refused = run("paper", "depth", "--data", f"imagefolder:{two}", *more, *out, code=2)
    assert ".png" in refused.stderr


def test_without_a_name_it_lists_them():
    listed = run("paper").stdout
    assert all(name in listed for name in EXPERIMENTS)
    record = as_json("paper")
    assert list(record["experiments"]) == list(EXPERIMENTS)
    assert record["scales"] == ["tiny", "small", "full"]


# ------------------------------------------------------------------ fused is eager


def variants_of_all(job):
    found = {v.name: v for e in EXPERIMENTS.values() for v in e.variants(job.scale)}
    return found.values()


def test_fused_and_eager_take_the_same_step(tmp_path):
    job = paper_runs.job(tmp_path, depths=(8,))
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    for variant in variants_of_all(job):
        torch.manual_seed(3)
        plain = rf.unfuse(variant.build(job.scale, job.source)).double().train()
        assert_same(*steps(copy.deepcopy(plain), x, BACKEND), tolerance=1e-10)


@pytest.mark.skipif(not PROOF, reason="trains for minutes: in the proof profile")
@pytest.mark.timeout(3000)
def test_fused_and_eager_come_to_the_same_errors(tmp_path):
    more = ["--depths", "20", "--seeds", 3, "--set", "iterations=200", "--set",
            "schedule.milestone_steps=[100, 150]"]  # fmt: skip
    errors = {}
    for impl, backend in (("fused", BACKEND), ("eager", "auto")):
        with rf.backend(backend):
            record = as_json(
                "paper", "degradation", "--impl", impl, "--output", tmp_path / impl, *more
            )
        for entry in record["runs"]:
            errors.setdefault((entry["variant"], impl), []).append(entry["test_error"])
    for variant in ("plain20", "resnet20"):
        ours, theirs = (np.array(errors[variant, impl]) for impl in ("fused", "eager"))
        spread = max(ours.std(ddof=1), theirs.std(ddof=1), 1 / 360)
        assert abs(ours.mean() - theirs.mean()) <= 2 * spread


@pytest.mark.skipif(not PROOF, reason="two processes start torch twice: in the proof profile")
@pytest.mark.timeout(600)
def test_two_processes_come_to_what_one_does(tmp_path):
    more = ["--depths", "8", "--seeds", "1", "--set", "sync_batchnorm=true",
            *map(str, SHORT)]  # fmt: skip
    base = ["paper", "degradation", *more, "--json", "--output"]
    alone = json.loads(subprocess.run(
        [sys.executable, "-m", "resnet_fused", *base, str(tmp_path / "one")],
        capture_output=True, text=True, check=True,
    ).stdout)  # fmt: skip
    both = json.loads(subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "-m", "resnet_fused", *base, str(tmp_path / "two")],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1],
    ).stdout)  # fmt: skip
    assert both["processes"] == 2
    for a, b in zip(alone["runs"], both["runs"], strict=True):
        assert a["test_error"] == pytest.approx(b["test_error"], abs=3 / 360)
