"""`resnet-fused train` and `evaluate` as a user calls them."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import train_runs as runs
from command import as_json, run
from safetensors.torch import load_file, save_file

from resnet_fused.train import journal

WHOLE = os.environ.get("HYPOTHESIS_PROFILE") == "proof"
MODEL = "rf:cifar_resnet20"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return runs.picture_folder(tmp_path_factory.mktemp("pictures"))


def arguments(folder, output, *more):
    return [
        "train", MODEL, "--data", f"imagefolder:{folder}", "--recipe", "digits", "--output", output,
        "--set", "size=16", "--batch-size", 4, "--epochs", 2, "--workers", 0, *more,
    ]  # fmt: skip


def test_options_are_short_for_entries_of_the_recipe():
    from resnet_fused.cli.train import _short

    given = {"epochs": 3, "batch_size": None, "lr": 0.2, "capture": True}
    assert _short(given) == ["epochs=3", "optimizer.lr=0.2", "capture=true"]
    assert _short({**given, "capture": False}) == ["epochs=3", "optimizer.lr=0.2"]


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """A run's folder, and what it printed."""
    output = tmp_path_factory.mktemp("runs") / "one"
    return output, as_json(*arguments(folder, output))


def test_a_folder_of_images_trains(trained):
    output, record = trained
    assert (record["step"], record["steps"], record["test"]["images"]) == (6, 6, 6)
    assert record["signal"] is None
    names = {path.name for path in output.iterdir()}
    assert names == {
        "best.safetensors", "checkpoints", "metrics.jsonl", "model.safetensors", "report.html",
        "run.json", "tensorboard", "timing.jsonl",
    }  # fmt: skip
    assert any((output / "tensorboard").iterdir())


def test_the_event_files_hold_what_the_lines_say(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained[0] / "tensorboard"))
    events.Reload()
    lines = journal.read(trained[0], journal.METRICS)
    found = {event.step: event.value for event in events.Scalars("test/top1")}
    expected = {line["step"]: line["top1"] for line in lines if line["kind"] == "test"}
    assert found == pytest.approx(expected)
    assert "time/images_per_second" in events.Tags()["scalars"]


def test_its_page_stands_alone_and_says_what_came_of_it(trained):
    html = (trained[0] / "report.html").read_text()
    assert 'src="http' not in html
    assert html.count("data:image/png;base64,") == 2
    assert f"{trained[1]['test']['top1']:.2%}" in html
    assert "recipe.optimizer.lr" in html


def test_a_second_run_is_told_from_the_first(folder, trained):
    result = run(*arguments(folder, trained[0]), code=2)
    assert "holds a run; --resume goes on with it" in result.stderr
    result = run(*arguments(folder, trained[0], "--lr", 0.2, "--resume"), code=2)
    assert "is another run: recipe.optimizer.lr was 0.1, now is 0.2" in result.stderr
    other = trained[0].parent / "other"
    other.mkdir()
    (other / "mine.txt").write_text("precious")
    result = run(*arguments(folder, other, "--resume"), code=2)
    assert "holds other files" in result.stderr
    assert [path.name for path in other.iterdir()] == ["mine.txt"]


def test_a_run_that_has_ended_is_shown_again(folder, trained):
    before = (trained[0] / "metrics.jsonl").read_bytes()
    record = as_json(*arguments(folder, trained[0], "--resume"))
    assert record["test"] == trained[1]["test"]
    assert (trained[0] / "metrics.jsonl").read_bytes() == before


def test_runs_are_shown_beside_each_other(folder, trained, tmp_path):
    run(*arguments(folder, tmp_path / "two", "--impl", "eager", "--beside", trained[0],
                   "--epochs", 1, "--no-tensorboard"))  # fmt: skip
    html = (tmp_path / "two" / "report.html").read_text()
    assert "<td>one</td>" in html
    assert "<td>eager</td>" in html


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--data", "digit"], ["'digit' is no data set", "digits"]),
        (["--recipe", "none"], ["'none' is neither a file nor one of", "imagenet"]),
        (["--set", "epoch=1"], ["there is no entry 'epoch'"]),
        (["--batch-size", "4000"], ["batch_size is 4000", "12 images"]),
        (["--weights", "/no/such.pth"], ["no such file"]),
        (["--device", "cuda:7"], ["--device"]),
    ],
)
def test_what_cannot_be_used_is_named_before_anything_is_written(folder, tmp_path, changes, words):
    result = run(*arguments(folder, tmp_path / "run"), *changes, code=2)
    assert result.stderr.startswith("error: ")
    assert all(word in result.stderr for word in words), result.stderr
    assert not (tmp_path / "run").exists()


def test_the_loader_alone_is_measured_and_writes_nothing(folder):
    line = ["train", MODEL, "--data", f"imagefolder:{folder}", "--recipe", "digits",
            "--set", "size=16", "--batch-size", 4, "--epochs", 3, "--workers", 1]  # fmt: skip
    record = as_json(*line, "--loader-only", 0.01)
    assert record["images"] % 4 == 0
    assert record["images_per_second"] == pytest.approx(record["images"] / record["seconds"])
    assert record["workers"] == 1
    assert "images/s from the loader alone" in run(*line, "--loader-only", 0).stdout
    assert "--output" in run(*line, code=2).stderr


def test_an_unknown_model_is_named(tmp_path):
    result = run("train", "resnet51", "--data", "digits", "--output", tmp_path / "run", code=2)
    assert "resnet50" in result.stderr


def test_an_image_that_cannot_be_read_stops_or_is_skipped(tmp_path):
    folder = runs.picture_folder(tmp_path / "data")
    (folder / "train" / "dog" / "3.png").write_bytes(b"no picture")
    (folder / "val" / "cat" / "1.png").write_bytes(b"no picture")
    result = run(*arguments(folder, tmp_path / "stop"), code=2)
    assert "train/dog/3.png" in result.stderr
    result = run(*arguments(folder, tmp_path / "skip", "--on-error", "skip", "--workers", 1))
    assert "skipped: image: " in result.stderr
    assert "dog/3.png" in result.stderr
    assert "val/cat/1.png" in result.stderr
    assert "of 5 images" in result.stdout


def test_weights_to_begin_with(folder, trained, tmp_path):
    weights = trained[0] / "model.safetensors"
    more = ("--weights", weights, "--epochs", 1, "--lr", 1e-9)
    run(*arguments(folder, tmp_path / "same", *more))
    begun, first = (
        load_file(path / "model.safetensors") for path in (tmp_path / "same", trained[0])
    )
    assert torch.allclose(begun["conv1.weight"], first["conv1.weight"], atol=1e-6)
    state = load_file(weights)
    state["fc.weight"], state["fc.bias"] = torch.zeros(7, 64), torch.zeros(7)
    save_file(state, tmp_path / "seven.safetensors")
    more = ("--weights", tmp_path / "seven.safetensors", "--epochs", 1)
    result = run(*arguments(folder, tmp_path / "run", *more), code=2)
    assert "classifier of 7 classes, the data has 2; --new-head" in result.stderr
    assert not (tmp_path / "run").exists()
    run(*arguments(folder, tmp_path / "run", *more, "--new-head"))
    del state["layer1.0.conv1.weight"]
    save_file(state, tmp_path / "less.safetensors")
    more = ("--weights", tmp_path / "less.safetensors", "--new-head")
    result = run(*arguments(folder, tmp_path / "more", *more), code=2)
    assert "is of another network" in result.stderr


def start(folder, output, *more):
    """The command in a process of its own."""
    line = [sys.executable, "-m", "resnet_fused", *arguments(folder, output, *more)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        list(map(str, line)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment,
    )  # fmt: skip


MANY = ("--epochs", 8, "--log-every", 1, "--save-every", 2, "--no-tensorboard", "--json")


def seen(output, lines, process):
    """Waits until so many lines are written, or the process has ended."""
    file = output / "metrics.jsonl"
    while process.poll() is None:
        if file.exists() and file.read_bytes().count(b"\n") >= lines:
            return
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kill_9_at_any_moment_changes_nothing(folder, tmp_path):
    """Ten times in `make proof`, twice here."""
    whole = start(folder, tmp_path / "whole", *MANY)
    assert whole.wait(timeout=120) == 0, whole.stderr.read()
    moments = random.Random(0)
    parts, killed = tmp_path / "parts", 0
    for number in range(10 if WHOLE else 2):
        process = start(folder, parts, *MANY, "--resume")
        seen(parts, 3 * number + moments.randint(1, 3), process)
        time.sleep(moments.random() * 0.05)
        process.kill()
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
    assert killed >= (5 if WHOLE else 1), "it was over before it was killed"
    last = start(folder, parts, *MANY, "--resume")
    assert last.wait(timeout=120) == 0, last.stderr.read()
    first = (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert (parts / "metrics.jsonl").read_bytes() == first
    ours, theirs = (load_file(path / "model.safetensors") for path in (parts, tmp_path / "whole"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.slow
def test_sigterm_saves_and_says_how_to_go_on(folder, tmp_path):
    process = start(folder, tmp_path / "run", *MANY[:-1])
    seen(tmp_path / "run", 3, process)
    process.terminate()
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 143, stderr
    assert "stopped by signal 15" in stderr
    assert "--resume goes on" in stderr
    assert any((tmp_path / "run" / "checkpoints").iterdir())


def test_a_run_is_evaluated(trained, tmp_path):
    record = as_json("evaluate", trained[0], "--confusion", tmp_path / "confusion.png")
    assert record["top1"] == trained[1]["test"]["top1"]
    assert record["loss"] == pytest.approx(trained[1]["test"]["loss"], rel=1e-2, abs=1e-3)
    assert [row["class"] for row in record["classes"]] == ["cat", "dog"]
    assert sum(map(sum, record["confusion"])) == record["images"] == 6
    assert (tmp_path / "confusion.png").read_bytes().startswith(b"\x89PNG")
    table = run("evaluate", trained[0], "--per-class", "--crops", 10, "--resize", 20).stdout
    assert "10" not in table.splitlines()[0].split("of")[0]
    assert {line.split()[0] for line in table.splitlines()[1:]} == {"class", "cat", "dog"}


def test_any_file_of_weights_is_evaluated(trained, folder, tmp_path):
    state = load_file(trained[0] / "model.safetensors")
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}},
               tmp_path / "weights.pth")  # fmt: skip
    data = ("--data", f"imagefolder:{folder}", "--size", 16, "--resize", 16)
    record = as_json("evaluate", MODEL, "--weights", tmp_path / "weights.pth", *data)
    assert record["top1"] == trained[1]["test"]["top1"]
    last = max((trained[0] / "checkpoints").iterdir())
    record = as_json("evaluate", MODEL, "--weights", last, *data)
    assert record["top1"] == trained[1]["test"]["top1"]
    broken = tmp_path / "broken"
    shutil.copytree(last, broken)
    (broken / "model.safetensors").write_bytes(b"")
    result = run("evaluate", MODEL, "--weights", broken, *data, code=2)
    assert "cut short or was changed" in result.stderr


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([MODEL], ["--data and --weights"]),
        (["tests"], ["holds no run"]),
        ([MODEL, "--data", "synthetic:5", "--weights", "RUN"], ["2 classes", "the data has 5"]),
        ([MODEL, "--data", "digits", "--weights", "RUN"], ["another network", "conv1.weight"]),
        (["RUN", "--data", "digits"], ["other classes"]),
        (["RUN", "--size", "30", "--resize", "20"], ["resize"]),
    ],
)
def test_what_cannot_be_evaluated_is_named(trained, given, words):
    names = {"RUN": trained[0]}
    if "--weights" in given:
        names = {"RUN": trained[0] / "model.safetensors"}
    result = run("evaluate", *[names.get(word, word) for word in given], code=2)
    assert all(word in result.stderr for word in words), result.stderr


def test_a_record_is_strict_json(trained):
    for name in (journal.METRICS, journal.TIMING):
        for line in (trained[0] / name).read_text().splitlines():
            json.loads(line, parse_constant=lambda word: pytest.fail(word))
