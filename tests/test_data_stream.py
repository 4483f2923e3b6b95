"""Streams of image files: every file once, in order, in its own row, whatever else is broken."""

from __future__ import annotations

import itertools
import os
import pickle
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from resnet_fused.data import Entry, ImageError, ImageStream, default_workers, find_images, stream
from resnet_fused.data.stream import ahead, show


def levels(image: Image.Image) -> Tensor:
    """The colour of an image's corner, as [3, 2, 2]: small, and other for every test image."""
    corner = torch.tensor(image.getpixel((0, 0)), dtype=torch.float32)
    return corner[:, None, None].expand(3, 2, 2).contiguous()


def as_large_as_it_is(image: Image.Image) -> Tensor:
    return torch.zeros(3, image.height, image.width)


def refusing(image: Image.Image) -> Tensor:
    if image.getpixel((0, 0))[0] == 2:
        raise ValueError("no twos\nand more")
    return levels(image)


def broken(image: Image.Image) -> Tensor:
    raise TypeError("a defect of the transform")


def killing(image: Image.Image) -> Tensor:
    if image.getpixel((0, 0))[0] == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return levels(image)


def paint(file: Path, level: int) -> Path:
    Image.new("RGB", (30, 40), (level, 2 * level, 7)).save(file, "PNG")
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten images 0.png .. 9.png; number 3 is cut short."""
    made = tmp_path / "images"
    made.mkdir()
    for level in range(10):
        paint(made / f"{level}.png", level)
    whole = (made / "3.png").read_bytes()
    (made / "3.png").write_bytes(whole[: len(whole) // 2])
    return made


def rows(batches: Iterator[stream.Batch]) -> dict[str, float]:
    """Each file's name -> the red level in its row."""
    found = {}
    for batch in batches:
        for index, file in enumerate(batch.files):
            assert batch.images is not None
            found[Path(file).name] = batch.images[index, 0, 0, 0].item()
    return found


def until_it_stops(made: Iterator[stream.Batch]) -> tuple[list[stream.Batch], ImageError]:
    """The batches of a stream that ends with an error, and that error."""
    batches = []
    try:
        for batch in made:
            batches.append(batch)
    except ImageError as error:
        return batches, error
    raise AssertionError("the stream came to its end")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("pad", [False, True])
def test_every_file_is_in_its_own_row(folder: Path, workers: int, pad: bool) -> None:
    made = ImageStream(find_images([folder]), levels, batch_size=4, workers=workers, pad=pad)
    assert len(made) == 3
    batches = list(made)
    names = [[Path(e.file).name for e in batch.entries] for batch in batches]
    assert list(itertools.chain(*names)) == [f"{i}.png" for i in range(10)]
    assert rows(iter(batches)) == {f"{i}.png": i for i in range(10) if i != 3}
    (failure,) = [failure for batch in batches for failure in batch.failures]
    assert Path(failure.file).name == "3.png"
    assert "3.png' is corrupt or cut short" in str(failure.error)
    assert [len(b.images) for b in batches] == ([4, 4, 4] if pad else [3, 4, 2])
    assert rows(iter(made)) == rows(iter(batches))  # and once more from the start


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("size", [2, 3, 5])
def test_stop_gives_all_that_is_before(folder: Path, size: int, pad: bool) -> None:
    made = iter(ImageStream(find_images([folder]), levels, batch_size=size, workers=0, pad=pad,
                            on_error="stop"))  # fmt: skip
    batches, error = until_it_stops(made)
    assert "3.png' is corrupt" in str(error)
    assert rows(iter(batches)) == {"0.png": 0, "1.png": 1, "2.png": 2}
    for batch in batches:
        assert not batch.failures and batch.images is not None
        assert len(batch.images) == (size if pad else len(batch.files))


def test_a_batch_of_broken_files_holds_no_images(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.jpg").write_bytes(b"no image")
    (batch,) = ImageStream(find_images([tmp_path]), levels, workers=0, pad=True)
    assert batch.images is None and batch.files == () and len(batch.failures) == 3


def test_dtype_and_layout(folder: Path) -> None:
    for channels_last in (True, False):
        (batch,) = ImageStream([folder / "1.png", folder / "2.png"], levels, workers=0,
                               dtype=torch.bfloat16, channels_last=channels_last)  # fmt: skip
        assert batch.images is not None and batch.images.dtype == torch.bfloat16
        layout = torch.channels_last if channels_last else torch.contiguous_format
        assert batch.images.is_contiguous(memory_format=layout)


def test_files_that_vanish_or_have_no_permission(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = find_images([folder])
    (folder / "1.png").unlink()
    opened = Image.open

    def guarded(file: Any) -> Image.Image:  # a test may run as root, who may read everything
        if Path(file).name == "4.png":
            raise PermissionError
        return opened(file)

    monkeypatch.setattr(Image, "open", guarded)
    (batch,) = ImageStream(files, levels, workers=0)
    errors = {Path(f.file).name: str(f.error) for f in batch.failures}
    assert errors.keys() == {"1.png", "3.png", "4.png"}
    assert "no such file" in errors["1.png"] and "no permission" in errors["4.png"]


def test_an_image_bomb_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)
    (batch,) = ImageStream([folder / "1.png"], levels, workers=0)
    assert "decompression bomb" in str(batch.failures[0].error)


def test_images_that_a_transform_refuses_are_named(folder: Path) -> None:
    (batch,) = ImageStream(find_images([folder]), refusing, workers=0)
    errors = [str(failure.error) for failure in batch.failures]
    assert len(errors) == 2 and errors[0].endswith("2.png' (30x40) cannot be transformed (no twos)")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_defect_of_a_transform_is_no_broken_image(folder: Path, workers: int) -> None:
    with pytest.raises(TypeError, match="a defect of the transform"):
        list(ImageStream(find_images([folder]), broken, workers=workers))


@pytest.mark.parametrize("size", [1, 2])
def test_images_of_two_shapes(tmp_path: Path, size: int) -> None:
    Image.new("RGB", (3, 4)).save(tmp_path / "a.png")
    Image.new("RGB", (5, 6)).save(tmp_path / "b.png")
    made = ImageStream(find_images([tmp_path]), as_large_as_it_is, batch_size=size, workers=0)
    match = r"one shape, got \[3, 4, 3\] of '.*a\.png' and \[3, 6, 5\] of '.*b\.png'"
    with pytest.raises(ImageError, match=match):
        list(made)


def test_a_worker_that_dies_is_no_end_of_the_stream(folder: Path) -> None:
    made = ImageStream(find_images([folder]), killing, batch_size=2, workers=1)
    batches, error = until_it_stops(iter(made))
    # What the message calls not done has not been given, and nothing before it is missing.
    said = re.search(r"a decoding process died .* '.*(0|2|4)\.png' on is done", str(error))
    assert said, error
    assert rows(iter(batches)) == {f"{i}.png": i for i in range(int(said[1])) if i != 3}


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"workers": -1}, "workers: expected 0 processes or more, got -1"),
        ({"on_error": "ignore"}, "on_error: expected one of skip, stop, got 'ignore'"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ImageStream([], levels, **arguments)


def test_no_files() -> None:
    assert list(ImageStream([], levels)) == []


def test_workers(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16), raising=False)
    assert default_workers("cpu") == 4 and default_workers("cuda:1") == 15
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(1), raising=False)
    assert default_workers("cpu") == default_workers("cuda") == 1
    made = ImageStream(find_images([folder]), levels, batch_size=5, workers=50)
    assert made.workers == len(made) == 2


def test_what_a_worker_gets_can_be_pickled(folder: Path) -> None:
    files = stream._Files(tuple(find_images([folder])), levels)
    again = pickle.loads(pickle.dumps(files))
    assert torch.equal(again[7][1], files[7][1])


# find_images


def names(entries: list[Entry], top: Path) -> list[str]:
    return [os.path.relpath(entry.file, top) for entry in entries]


def test_folders_are_walked_in_order(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.webp", "sub/z.png", "sub/deep/q.tiff", "another/c.bmp", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")  # reading it would wait for ever
    (tmp_path / "dead.png").symlink_to("nowhere.png")
    found = find_images([tmp_path])
    assert all(entry.error is None for entry in found)
    expected = ["a.webp", "b.JPG", "dead.png", "another/c.bmp", "sub/z.png", "sub/deep/q.tiff"]
    assert names(found, tmp_path) == expected
    assert names(find_images([tmp_path], (".txt",)), tmp_path) == ["notes.txt"]


def test_a_file_is_taken_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = paint(tmp_path / "a.png", 1)
    paint(tmp_path / "odd.name", 2)  # given itself, a file may be called anything
    (tmp_path / "sub").mkdir()
    paint(tmp_path / "sub" / "b.png", 3)
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    found = find_images([file, "odd.name", tmp_path, "a.png", "sub", tmp_path / "sub" / ".."])
    assert names(found, tmp_path) == ["a.png", "odd.name", "sub/b.png"]
    assert all(entry.error is None for entry in found)


def test_missing_and_empty_and_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImageError, match=r"no such file: '.*absent'; give image files or folders"):
        find_images([tmp_path / "absent"])
    (tmp_path / "empty").mkdir()
    (only,) = find_images([tmp_path / "empty"])
    assert "empty' holds no image (looked for .jpg .jpeg .png" in str(only.error)
    paint(tmp_path / "a.png", 1)
    (tmp_path / "locked").mkdir()
    listed = os.scandir

    def guarded(path: Any) -> Any:  # a test may run as root, who may read everything
        if os.fspath(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return listed(path)

    monkeypatch.setattr(os, "scandir", guarded)
    found = find_images([tmp_path])
    assert [entry.error for entry in found if entry.error is None] == [None]
    (locked,) = [entry for entry in found if entry.error is not None]
    assert "locked' cannot be read (Permission denied)" in str(locked.error)


def test_strange_bytes_in_a_name(tmp_path: Path) -> None:
    strange = os.fsencode(tmp_path) + b"/caf\xe9.png"
    paint(tmp_path / "a.png", 6).rename(os.fsdecode(strange))
    (tmp_path / os.fsdecode(b"bad\xff.png")).write_bytes(b"no image")
    (batch,) = ImageStream(find_images([tmp_path]), levels, workers=0)
    assert show(batch.files[0]).endswith("caf\\xe9.png")
    assert "bad\\xff.png' is not an image" in str(batch.failures[0].error)
    str(batch.failures[0].error).encode()
    assert show("Zürich.png") == "Zürich.png"


# What a GPU's stream does, with stand-ins for CUDA's streams


def test_ahead_runs_ahead_in_order() -> None:
    started, go = [], threading.Event()

    def prepare(item: int) -> int:
        started.append(item)
        if len(started) == 3:
            go.set()
        return item * item

    made = ahead(range(5), prepare, depth=2)
    assert next(made) == 0
    assert go.wait(10)  # two more were prepared without being asked for
    assert list(made) == [1, 4, 9, 16]


def test_ahead_raises_in_its_place_and_stops() -> None:
    def items() -> Iterator[int]:
        yield from (1, 2)
        raise KeyError("lost")

    made = ahead(items(), lambda item: item)
    assert [next(made), next(made)] == [1, 2]
    with pytest.raises(KeyError, match="lost"):
        next(made)
    before = threading.active_count()
    endless = ahead(iter(int, 1), lambda item: item)
    next(endless)
    endless.close()
    until = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < until:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_a_batch_is_used_after_its_copy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Stream:
        def __init__(self, name: Any = None) -> None:
            self.name = name if isinstance(name, str) else "side"

        def wait_event(self, event: Event) -> None:
            log.append(f"{self.name} waits for {event.after}")

        def __enter__(self) -> None:
            log.append("on side")

        def __exit__(self, *_: object) -> None:
            log.append("off side")

    class Event:
        def record(self, on: Stream) -> None:
            assert on.name == "side"
            self.after = next(line for line in reversed(log) if line.startswith("copy"))

    class Rows:
        def record_stream(self, on: Stream) -> None:
            log.append(f"kept for {on.name}")

    def move(self: ImageStream, images: Any) -> Rows:
        log.append(f"copy {images}")
        return Rows()

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", lambda on: on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("main"))
    monkeypatch.setattr(ImageStream, "_move", move)
    made = ImageStream([folder / "1.png"], levels, device="cuda:0")
    loaded = [stream._Loaded((), (), images) for images in ("A", None)]
    given = list(made._on_device(iter(loaded)))
    assert isinstance(given[0][1], Rows) and given[1][1] is None
    assert log == ["on side", "copy A", "off side", "main waits for copy A", "kept for main"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(folder: Path) -> None:
    made = ImageStream(find_images([folder]), levels, batch_size=2, workers=2, device="cuda",
                       pad=True)  # fmt: skip
    found: dict[str, float] = {}
    for batch in made:
        if batch.images is not None:
            assert batch.images.is_cuda and len(batch.images) == 2
        found |= rows(iter([batch]))
    assert found == {f"{i}.png": i for i in range(10) if i != 3}
