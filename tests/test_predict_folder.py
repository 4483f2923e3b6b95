"""`resnet-fused predict` on several images: order, what is broken, what a stopped run leaves."""

from __future__ import annotations

import contextlib
import csv
import errno
import functools
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from command import as_json, run
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

import resnet_fused as rf
from resnet_fused.cli import _models, main
from resnet_fused.data import load_image, preprocess

command = sys.modules["resnet_fused.cli.predict"]  # the package's name is the click command's
CLASSES = 7


def tiny(image: Image.Image) -> Tensor:
    """The image's colours as [3, 8, 8]."""
    return pil_to_tensor(image.resize((8, 8))).float() / 255


@pytest.fixture(autouse=True)
def network(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A network of two layers in place of resnet50."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, CLASSES),
    ).eval()  # fmt: skip
    with torch.no_grad():
        model[-1].weight *= 20  # predictions that differ from image to image

    def load(name: str, weights: str, *, quiet: bool) -> _models.Network:
        labels = tuple(f"class {i}" for i in range(CLASSES))
        return _models.Network(name, model, weights, True, labels, tiny)

    monkeypatch.setattr(_models, "load", load)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven images: 0.png .. 4.png, sub/5.png and sub/6.png."""
    made = tmp_path / "images"
    (made / "sub").mkdir(parents=True)
    for i in range(7):
        colour = (40 * i, 255 - 30 * i, (90 * i) % 256)
        Image.new("RGB", (20, 10), colour).save(made / ("sub" if i > 4 else ".") / f"{i}.png")
    return made


@pytest.fixture
def broken(folder: Path) -> Path:
    """The same folder; its third image is none."""
    (folder / "2.png").write_bytes(b"no image")
    return folder


def interrupted(code: int, *arguments: object) -> Result:
    """A command that does not end by itself."""
    result = CliRunner().invoke(main, ["predict", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def order(records: list[dict[str, Any]]) -> list[str]:
    return [Path(record["image"]).name for record in records]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_line_an_image_as_each_alone_would_have_it(folder: Path, workers: int) -> None:
    result = run("predict", folder, "--json", "--batch-size", 3, "--workers", workers)
    found = lines(result.stdout)
    assert order(found) == [f"{i}.png" for i in range(7)]
    assert len({tuple(p["index"] for p in record["predictions"]) for record in found}) > 1
    for record in found:
        alone = as_json("predict", record["image"])
        assert record.keys() == alone.keys() and record["model"] == alone["model"]
        for many, one in zip(record["predictions"], alone["predictions"], strict=True):
            assert (many["rank"], many["label"]) == (one["rank"], one["label"])
            assert many["probability"] == pytest.approx(one["probability"], rel=1e-5)
    (summary,) = result.stderr.splitlines()
    assert summary.startswith("7 images in ") and "images/s end to end" in summary
    assert "waiting for images" in summary


def test_the_numbers_are_the_networks(folder: Path, network: nn.Module) -> None:
    found = lines(run("predict", folder, "--json", "--topk", 99, "--workers", 0).stdout)
    for record in found:
        with torch.inference_mode(), Image.open(record["image"]) as image:
            expected = network(tiny(image)[None])[0].softmax(0)
        assert len(record["predictions"]) == CLASSES  # more than there are cannot be had
        got = torch.zeros(CLASSES)
        for prediction in record["predictions"]:
            got[prediction["index"]] = prediction["probability"]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_images_travel_as_bytes(
    folder: Path, network: nn.Module, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    transform = functools.partial(preprocess, size=8)
    labels = tuple(f"class {i}" for i in range(CLASSES))
    known = _models.Network("seven", network, "random", True, labels, transform)
    monkeypatch.setattr(_models, "load", lambda *_, **__: known)
    given = []

    def freeze(model: nn.Module, example: Tensor, **options: Any) -> nn.Module:
        given.append(example.dtype)
        return frozen(model, example, **options)

    frozen = rf.freeze
    monkeypatch.setattr(rf, "freeze", freeze)
    options = ("--json", "--topk", CLASSES, "--workers", 0, "--dtype", dtype)
    found = lines(run("predict", folder, *options).stdout)
    assert given == [torch.uint8] and len(found) == 7
    network.float()
    for record in found:
        with torch.inference_mode():
            expected = network(transform(load_image(record["image"]))[None])[0].softmax(0)
        for prediction in record["predictions"]:
            wanted = expected[prediction["index"]].item()
            rounding = 1e-4 if dtype == "float32" else 0.1
            assert prediction["probability"] == pytest.approx(wanted, rel=rounding, abs=rounding)


def test_lines_for_a_reader(folder: Path) -> None:
    shown = run("predict", folder, "--topk", 2, "--workers", 0).stdout.splitlines()
    assert len(shown) == 7
    assert shown[0].startswith(f"{folder / '0.png'}: class ") and shown[0].count("%") == 2
    several = run("predict", folder / "1.png", folder / "0.png", "--topk", 1, "--workers", 0)
    assert [line.partition(":")[0][-5:] for line in several.stdout.splitlines()] == [
        "1.png", "0.png",
    ]  # fmt: skip


def test_a_broken_image_is_named_and_skipped(broken: Path) -> None:
    result = run("predict", broken, "--json", "--batch-size", 2, "--workers", 0, code=1)
    found = lines(result.stdout)
    assert order(found) == [f"{i}.png" for i in range(7)]
    assert ["error" in record for record in found] == [i == 2 for i in range(7)]
    assert "2.png' is not an image" in found[2]["error"]
    notes = result.stderr.splitlines()
    assert notes[0].startswith("skipped: image: '") and "2.png' is not" in notes[0]
    assert notes[1].startswith("6 images in")
    assert notes[2] == f"1 skipped: {broken / '2.png'}"
    text = run("predict", broken, "--workers", 0, code=1).stdout
    assert len(text.splitlines()) == 6


def test_a_broken_image_stops_and_keeps_what_is_before(broken: Path, tmp_path: Path) -> None:
    for size in (1, 2, 7):
        result = run("predict", broken, "--json", "--on-error", "stop", "--batch-size", size,
                     "--workers", 0, code=2)  # fmt: skip
        assert order(lines(result.stdout)) == ["0.png", "1.png"]
        (error,) = result.stderr.splitlines()
        assert error.startswith("error: image: '") and "2.png' is not an image" in error
    out = tmp_path / "r.jsonl"
    out.write_text("older results\n")
    result = run("predict", broken, "--on-error", "stop", "--output", out, "--workers", 0, code=2)
    assert out.read_text() == "older results\n"
    partial = tmp_path / "r.jsonl.partial"
    assert order(lines(partial.read_text())) == ["0.png", "1.png"]
    assert f"2 of 7 images are in '{partial}'; --resume goes on" in result.stderr


def test_one_image_stops_unless_asked(broken: Path) -> None:
    bad = broken / "2.png"
    assert "is not an image" in run("predict", bad, code=2).stderr
    found = json.loads(run("predict", bad, "--on-error", "skip", "--json", code=1).stdout)
    assert "is not an image" in found["error"]
    # Several are a job that one of them does not end.
    run("predict", bad, broken / "0.png", "--workers", 0, code=1)


def test_results_in_files(broken: Path, tmp_path: Path) -> None:
    shown = lines(run("predict", broken, "--json", "--workers", 0, code=1).stdout)
    out = tmp_path / "new" / "r.jsonl"
    both = run("predict", broken, "--json", "--output", out, "--workers", 0, code=1)
    assert lines(both.stdout) == lines(out.read_text()) == shown
    table = tmp_path / "r.csv"
    quiet = run("predict", broken, "--output", table, "--topk", 2, "--workers", 0, code=1)
    assert quiet.stdout == ""
    rows = list(csv.DictReader(io.StringIO(table.read_text())))
    assert [Path(row["image"]).name[0] for row in rows] == list("0011233445566")
    for row in rows:
        (record,) = [r for r in shown if r["image"] == row["image"]]
        if "error" in record:
            assert row["error"] == record["error"] and row["rank"] == ""
            continue
        prediction = record["predictions"][int(row["rank"]) - 1]
        assert row["error"] == "" and row["label"] == prediction["label"]
        assert float(row["probability"]) == prediction["probability"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "new", "r.csv"]


class Stops(nn.Module):
    """An engine that lets something happen at its third batch; counts the images before."""

    def __init__(self, model: nn.Module, what: Callable[[], object]) -> None:
        super().__init__()
        self.model, self.what, self.images, self.batches = model, what, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        self.batches += 1
        if self.batches == 3:
            self.what()
        self.images += len(x)
        return self.model(x)


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("what", "code"),
    [(interrupt, 130), (lambda: os.kill(os.getpid(), signal.SIGTERM), 128 + signal.SIGTERM)],
    ids=["ctrl-c", "sigterm"],
)
def test_a_stopped_run_goes_on_where_it_stopped(
    broken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: nn.Module,
    what: Callable[[], object], code: int,
) -> None:  # fmt: skip
    out, partial = tmp_path / "r.jsonl", tmp_path / "r.jsonl.partial"
    call = [broken, "--output", out, "--batch-size", 2]
    engine = Stops(network, what)
    monkeypatch.setattr(command, "_engine", lambda *_: engine)
    before = signal.getsignal(signal.SIGTERM)
    stopped = interrupted(code, *call)
    assert signal.getsignal(signal.SIGTERM) is before
    assert f"4 of 7 images are in '{partial}'; --resume goes on" in stopped.stderr
    assert not out.exists()
    assert order(lines(partial.read_text())) == ["0.png", "1.png", "2.png", "3.png"]
    assert "is there, from a run that was stopped" in interrupted(2, *call).stderr
    with partial.open("a") as file:
        file.write('{"image": "cut sho')  # as a power cut leaves it

    again = Stops(network, lambda: None)
    monkeypatch.setattr(command, "_engine", lambda *_: again)
    result = interrupted(1, *call, "--resume")
    assert again.images == 3  # 4.png, 5.png, 6.png; 2.png was tried again and is still broken
    assert "3 images were there from an earlier run" in result.stderr
    found = lines(out.read_text())
    assert sorted(order(found)) == [f"{i}.png" for i in range(7)] and not partial.exists()
    whole = lines(run("predict", broken, "--json", code=1).stdout)
    assert {r["image"]: "error" in r for r in found} == {r["image"]: "error" in r for r in whole}
    # All is there: nothing but the broken one is looked at.
    third = Stops(network, lambda: None)
    monkeypatch.setattr(command, "_engine", lambda *_: third)
    interrupted(1, *call, "--resume")
    assert third.batches == 0 and sorted(order(lines(out.read_text()))) == sorted(order(found))


def test_a_run_that_did_nothing_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_engine", lambda *_: interrupt())
    assert "of 7" not in interrupted(130, folder, "--output", tmp_path / "r.csv").stderr
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_results_of_two_networks_do_not_mix(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    run("predict", folder, "--output", out, "--workers", 0)
    kept = out.read_text()
    line = run("predict", folder, "--output", out, "--resume", "--model", "resnet18", code=2).stderr
    assert "has results of model 'resnet50', this run is of 'resnet18'" in line
    assert out.read_text() == kept and not (tmp_path / "r.jsonl.partial").exists()


def test_a_full_disk_is_an_error_in_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any) -> None:
        raise self._cannot(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))

    monkeypatch.setattr("resnet_fused.cli._predictions.ResultFile.flush", full)
    result = interrupted(2, folder, "--output", tmp_path / "r.csv", "--workers", 0)
    assert "cannot write" in result.stderr and "No space left" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["absent"], ["no such file: 'absent'"]),
        (["images", "absent"], ["no such file: 'absent'"]),
        (["empty"], ["folder 'empty' holds no image (looked for .jpg"]),
        (["images", "--on-error", "ignore"], ["--on-error", "skip", "stop"]),
        (["images", "--workers", "-1"], ["--workers", "-1"]),
        (["images", "--batch-size", "0"], ["--batch-size", "0"]),
        (["images", "--output", "r.txt"], ["--output", "'.txt'", ".jsonl or .csv"]),
        (["images", "--output", "images.csv"], ["--output", "is a directory"]),
        (["images", "--output", "r.csv", "--resume"], ["--resume", "r.csv", ".jsonl"]),
        (["images", "--resume"], ["--resume", "--output FILE"]),
        ([], ["PATH"]),
    ],
)
def test_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str],
    parts: list[str],
) -> None:  # fmt: skip
    (tmp_path / "empty").mkdir()
    (tmp_path / "images.csv").mkdir()
    monkeypatch.chdir(tmp_path)
    # Before anything is loaded: a download for a misspelt option would be in vain.
    monkeypatch.setattr(_models, "load", lambda *_, **__: pytest.fail("a network was loaded"))
    result = run("predict", *arguments, code=2)
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and all(part in line for part in parts), line
    assert result.stdout == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "images", "images.csv"]


def test_an_empty_folder_among_others_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = run("predict", tmp_path / "empty", folder, "--workers", 0, code=1)
    assert len(result.stdout.splitlines()) == 7 and "empty' holds no image" in result.stderr


def test_twice_the_same_image_is_one(folder: Path) -> None:
    shown = run("predict", folder / "sub" / "5.png", folder, folder / "sub", "--workers", 0).stdout
    names = [line.partition(":")[0][-5:] for line in shown.splitlines()]
    assert names == ["5.png", "0.png", "1.png", "2.png", "3.png", "4.png", "6.png"]


def test_strange_bytes_in_a_name(folder: Path, tmp_path: Path) -> None:
    strange = os.fsdecode(b"caf\xe9.png")
    (folder / "1.png").rename(tmp_path / strange)
    out = tmp_path / "r.jsonl"
    result = run("predict", tmp_path / strange, folder / "0.png", "--output", out, "--workers", 0)
    assert order(lines(out.read_text())) == ["caf\\xe9.png", "0.png"]
    assert "2 images" in result.stderr
    again = run("predict", tmp_path / strange, folder / "0.png", "--output", out, "--resume")
    assert "2 images were there" in again.stderr


@pytest.mark.parametrize("form", ["cmyk", "palette", "alpha", "sixteen", "gif", "turned"])
def test_any_kind_of_image_is_as_it_is_alone(folder: Path, tmp_path: Path, form: str) -> None:
    image = Image.new("RGB", (20, 10), (200, 30, 90))
    image.paste((0, 250, 0), (0, 0, 10, 5))
    file = tmp_path / f"odd.{'gif' if form == 'gif' else 'jpg' if form == 'cmyk' else 'png'}"
    if form == "gif":
        image.save(file, save_all=True, append_images=[Image.new("RGB", (20, 10))])
    elif form == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(file, exif=exif)
    elif form == "sixteen":
        Image.new("I;16", (20, 10), 20000).save(file)
    else:
        image.convert({"cmyk": "CMYK", "palette": "P", "alpha": "RGBA"}[form]).save(file)
    alone = as_json("predict", file)["predictions"]
    many = lines(run("predict", folder / "0.png", file, "--json", "--workers", 0).stdout)
    assert [p["index"] for p in many[1]["predictions"]] == [p["index"] for p in alone]


def test_data_stays_on_stdout_under_a_progress_bar(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, seen = io.StringIO(), []

    @contextlib.contextmanager
    def bar(title: str, *, quiet: bool) -> Iterator[Callable[..., None]]:
        assert not quiet  # stdout is no terminal here
        # As rich does on a terminal: what is printed goes above the bar, to stderr.
        monkeypatch.setattr(sys, "stdout", taken)
        yield lambda done, total, what: seen.append((done, total))

    monkeypatch.setattr(command, "progress_bar", bar)
    result = run("predict", folder, "--batch-size", 3, "--workers", 0)
    assert len(result.stdout.splitlines()) == 7 and taken.getvalue() == ""
    assert seen == [(3, 7), (6, 7), (7, 7)]


def test_results_come_as_they_are_made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[int] = []
    printer = command._printer

    def watched(one: bool, as_json: bool) -> Callable[[Any], None]:
        inner = printer(one, as_json)
        return lambda record: (inner(record), shown.append(1))[0]

    def engine(model: nn.Module, x: Tensor, *_: Any) -> Callable[[Tensor], Tensor]:
        return lambda x: (computed.append(len(shown)), model(x))[1]

    computed: list[int] = []
    monkeypatch.setattr(command, "_printer", watched)
    monkeypatch.setattr(command, "_engine", engine)
    run("predict", folder, "--batch-size", 2, "--workers", 0)
    assert computed == [0, 2, 4, 6]  # what was shown when each batch began
