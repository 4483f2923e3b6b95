"""Image files as batches on a device: decoded in processes, copied while the GPU computes."""

from __future__ import annotations

import errno
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from resnet_fused.data.images import ImageError, load_image

ON_ERROR = ("skip", "stop")
# What a transform raises on an image that it cannot take; anything else is a defect of its own.
_TRANSFORM_ERRORS = (ValueError, RuntimeError, OSError, MemoryError)
_DEAD_WORKER = "DataLoader worker (pid"  # how torch's messages of a process that died begin
# What one meets who asks a dead process for the images that it had announced.
_CUT_OFF = (EOFError, ConnectionError, FileNotFoundError)

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class Entry:
    """One file of a batch.

    Attributes:
        file: its path, as it was given.
        error: why it could not be read or transformed, naming it; None where it could.
    """

    file: str
    error: str | None = None


@dataclass(frozen=True)
class Batch:
    """Some files, and the images of those that could be read.

    Attributes:
        entries: the files, in the order of the stream.
        images: [N, C, H, W] on the stream's device. Row i belongs to `files[i]`; rows behind those
            are filling, where the stream pads. None where no file could be read.
    """

    entries: tuple[Entry, ...]
    images: Tensor | None

    @property
    def files(self) -> tuple[str, ...]:
        """The files that could be read: one for each row, in order."""
        return tuple(entry.file for entry in self.entries if entry.error is None)

    @property
    def failures(self) -> tuple[Entry, ...]:
        """The files that could not be read."""
        return tuple(entry for entry in self.entries if entry.error is not None)


def find_images(
    paths: Sequence[str | os.PathLike[str]], suffixes: Sequence[str] | None = None
) -> list[Entry]:
    """The image files that paths name: a file itself, of a folder every image in it, recursively.

    Files of a folder come sorted by name, those of its subfolders after them. A file that is
    reached twice is taken once; a folder that links lead back to is walked once.

    Args:
        paths: files and folders.
        suffixes: of a folder's images, in lower case; None takes torchvision's IMG_EXTENSIONS. A
            file that is given itself may have any.

    Returns:
        One entry a file, without an error. A folder that cannot be read, or holds no image, is an
        entry with an error.

    Raises:
        ImageError: a path that does not exist.
    """
    if suffixes is None:
        from torchvision.datasets.folder import IMG_EXTENSIONS

        suffixes = IMG_EXTENSIONS
    found: dict[str, Entry] = {}
    walked: set[tuple[int, int]] = set()
    for path in [os.fspath(path) for path in paths]:
        if not os.path.isdir(path):
            if not os.path.lexists(path):
                raise ImageError(
                    f"image: no such file: '{show(path)}'; give image files or folders of them"
                )
            found.setdefault(os.path.abspath(path), Entry(path))
            continue
        before = len(found)
        again = _identity(path) in walked
        for entry in _walk(path, tuple(suffixes), walked):
            found.setdefault(os.path.abspath(entry.file), entry)
        if len(found) == before and not again:
            accepted = " ".join(suffixes)
            why = f"image: folder '{show(path)}' holds no image (looked for {accepted})"
            found.setdefault(os.path.abspath(path), Entry(path, why))
    return list(found.values())


def _identity(folder: str) -> tuple[int, int]:
    found = os.stat(folder)
    return found.st_dev, found.st_ino


def _walk(top: str, suffixes: tuple[str, ...], walked: set[tuple[int, int]]) -> Iterator[Entry]:
    problems: list[OSError] = []
    for folder, inner, names in os.walk(top, onerror=problems.append, followlinks=True):
        yield from _unreadable(problems)
        here = _identity(folder)
        if here in walked:
            inner.clear()
            continue
        walked.add(here)
        inner.sort()
        for name in sorted(names):
            file = os.path.join(folder, name)
            # A pipe or a device would block for ever; a dead link is named when it is read.
            usable = os.path.isfile(file) or not os.path.exists(file)
            if name.lower().endswith(suffixes) and usable:
                yield Entry(file)
    yield from _unreadable(problems)


def _unreadable(problems: list[OSError]) -> Iterator[Entry]:
    for problem in problems:
        folder = os.fspath(problem.filename)
        gone = problem.errno == errno.ENOENT
        why = "is gone" if gone else f"cannot be read ({problem.strerror})"
        yield Entry(folder, f"image: folder '{show(folder)}' {why}")
    problems.clear()


def show(path: str | os.PathLike[str]) -> str:
    r"""A path as text that any terminal and any JSON reader takes: strange bytes become \xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


class ImageStream:
    """Batches of images from files, for a network on one device.

    Files are read, decoded and transformed in worker processes, ahead of what is asked for. For a
    GPU the batches travel through pinned memory on a stream of their own, so that the next one is
    copied while this one is computed. Batches come in the order of the files, each as soon as it
    is there. A stream may be iterated several times, and starts from the first file each time.

        stream = rf_data.ImageStream(find_images(["photos"]), transform, device="cuda")
        for batch in stream:
            scores = engine(batch.images)[: len(batch.files)]

    Args:
        files: paths, or entries of `find_images`; an entry with an error stays one.
        transform: an RGB `PIL.Image` -> a tensor [C, H, W], of one shape for all images. It has to
            be picklable where processes are not forked.
        batch_size: files in a batch, at least 1; the last batch may hold fewer.
        workers: processes that decode; 0 decodes in this one, None takes `default_workers`.
        device: where the batches go.
        dtype: of the batches; None leaves what the transform gives.
        channels_last: the batches' memory format.
        pad: a batch with images always has `batch_size` rows (the first one repeated), because a
            network captured for one shape would be captured anew for another.
        on_error: "skip" reports a file that cannot be read as an entry with an error; "stop"
            raises at it, when all files before it have been given.

    Raises:
        ValueError: a batch_size, workers or on_error that is not accepted.
        ImageError: while iterating: a bad file with on_error="stop"; images of different shapes;
            a worker process that died, with the first file that is not done.
    """

    def __init__(
        self,
        files: Sequence[str | os.PathLike[str] | Entry],
        transform: Callable[[Image.Image], Tensor],
        *,
        batch_size: int = 32,
        workers: int | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        channels_last: bool = True,
        pad: bool = False,
        on_error: str = "skip",
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        if workers is not None and workers < 0:
            raise ValueError(f"workers: expected 0 processes or more, got {workers}")
        if on_error not in ON_ERROR:
            raise ValueError(f"on_error: expected one of {', '.join(ON_ERROR)}, got {on_error!r}")
        self.entries = tuple(f if isinstance(f, Entry) else Entry(os.fspath(f)) for f in files)
        self.transform = transform
        self.batch_size = batch_size
        self.device = torch.device(device)
        self.dtype = dtype
        self.channels_last = channels_last
        self.pad = pad
        self.on_error = on_error
        wanted = default_workers(self.device) if workers is None else workers
        # A worker without a batch would start for nothing.
        self.workers = min(wanted, len(self))

    def __len__(self) -> int:
        """How many batches."""
        return -(-len(self.entries) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Starts the workers at once, and gives the batches."""
        loader = DataLoader(
            _Files(self.entries, self.transform),
            batch_size=self.batch_size,
            num_workers=self.workers,
            collate_fn=_Collate(self.batch_size if self.pad else 0),
            worker_init_fn=in_worker,
            pin_memory=self.device.type == "cuda",
        )
        # Outside of the generator below, which would start them with the first `next` only.
        return self._batches(iter(loader))

    def _batches(self, loaded: Iterator[_Loaded]) -> Iterator[Batch]:
        try:
            for entries, images in self._on_device(self._watched(loaded)):
                bad = next((i for i, e in enumerate(entries) if e.error is not None), None)
                if self.on_error == "skip" or bad is None:
                    yield Batch(entries, images)
                    continue
                if bad:  # rows of files behind it are filling
                    whole = self.pad or images is None
                    yield Batch(entries[:bad], images if whole else images[:bad])
                raise ImageError(entries[bad].error)
        finally:
            end_workers(loaded)

    def _watched(self, loaded: Iterator[_Loaded]) -> Iterator[_Loaded]:
        """The batches of one shape; a dead worker becomes an error that says how far it came."""
        done, shape, first = 0, None, ""
        while True:
            try:
                made = next(loaded)
            except StopIteration:
                return
            except (RuntimeError, *_CUT_OFF) as error:
                if not isinstance(error, _CUT_OFF) and not is_dead_worker(error):
                    raise
                why = str(error).strip() or type(error).__name__
                raise ImageError(
                    f"workers: a decoding process died ({why}); nothing from "
                    f"'{show(self.entries[done].file)}' on is done; fewer workers need less memory"
                ) from error
            done += len(made.entries)
            for entry, other in zip(made.entries, made.shapes, strict=True):
                if other is None:
                    continue
                shape, first = shape or other, first or entry.file
                if other != shape:
                    raise ImageError(
                        "transform: expected images of one shape, got "
                        f"{list(shape)} of '{show(first)}' and {list(other)} of "
                        f"'{show(entry.file)}'"
                    )
            yield made

    def _on_device(
        self, batches: Iterator[_Loaded]
    ) -> Iterator[tuple[tuple[Entry, ...], Tensor | None]]:
        if self.device.type != "cuda":
            for made in batches:
                yield made.entries, None if made.images is None else self._move(made.images)
            return
        side = torch.cuda.Stream(self.device)

        def enqueue(made: _Loaded) -> tuple[_Loaded, Tensor | None, torch.cuda.Event | None]:
            if made.images is None:
                return made, None, None
            with torch.cuda.stream(side):
                images = self._move(made.images)
                ready = torch.cuda.Event()
                ready.record(side)
            return made, images, ready

        for made, images, ready in ahead(batches, enqueue):
            if images is not None and ready is not None:
                here = torch.cuda.current_stream(self.device)
                here.wait_event(ready)
                # Its memory belongs to the side stream, which must not take it back in between.
                images.record_stream(here)
            yield made.entries, images

    def _move(self, images: Tensor) -> Tensor:
        moved = images.to(self.device, non_blocking=True).to(self.dtype or images.dtype)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return moved.contiguous(memory_format=layout)


def default_workers(device: str | torch.device = "cpu") -> int:
    """Decoding processes for a network on this device, by the cores that this process may use.

    A GPU waits for decoding: all cores but one. On the CPU the network itself wants the cores, and
    one image costs it many times what decoding costs: a quarter of them, at least one.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    if torch.device(device).type == "cuda":
        return max(1, min(cores - 1, 32))
    return max(1, cores // 4)


def ahead(items: Iterable[T], prepare: Callable[[T], U], depth: int = 2) -> Iterator[U]:
    """Runs `prepare` on each item in a thread, up to `depth` items before they are asked for.

    Args:
        items: drawn from in that thread.
        prepare: what to do with each of them.
        depth: how many results may wait.

    Yields:
        Its results, in order. An exception of either is raised where its result would stand.
    """
    results: queue.Queue[tuple[U | None, BaseException | None, bool]] = queue.Queue(depth)
    stopped = threading.Event()

    def put(value: U | None, error: BaseException | None, last: bool) -> None:
        while not stopped.is_set():
            try:
                results.put((value, error, last), timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put(prepare(item), None, False)
                if stopped.is_set():
                    return
            put(None, None, True)
        except BaseException as error:  # raised again where the result is asked for
            put(None, error, True)

    # A daemon: a program that ends does not wait for an image.
    threading.Thread(target=work, name="resnet_fused-ahead", daemon=True).start()
    try:
        while True:
            value, error, last = results.get()
            if error is not None:
                raise error
            if last:
                return
            yield value  # type: ignore[misc]
    finally:
        stopped.set()


@dataclass
class _Loaded:
    """What a worker sends for a batch."""

    entries: tuple[Entry, ...]
    shapes: tuple[tuple[int, ...] | None, ...]  # of each entry's image
    images: Tensor | None  # also None where the shapes differ

    def pin_memory(self) -> _Loaded:
        """DataLoader's way to ask for pinned memory of a class that it does not know."""
        pinned = None if self.images is None else self.images.pin_memory()
        return _Loaded(self.entries, self.shapes, pinned)


class _Files(Dataset[tuple[Entry, Any]]):
    """File number i, decoded and transformed, or why not."""

    def __init__(self, entries: tuple[Entry, ...], transform: Callable[[Any], Tensor]) -> None:
        self.entries = entries
        self.transform = transform

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> tuple[Entry, Tensor | None]:
        entry = self.entries[index]
        if entry.error is not None:
            return entry, None
        try:
            picture = load_image(entry.file)
        except ImageError as error:
            return Entry(entry.file, show(str(error))), None
        try:
            return entry, self.transform(picture)
        except _TRANSFORM_ERRORS as error:
            why = (str(error).strip() or type(error).__name__).partition("\n")[0]
            size = f"{picture.width}x{picture.height}"
            name = show(entry.file)
            return Entry(
                entry.file, f"image: '{name}' ({size}) cannot be transformed ({why})"
            ), None


class _Collate:
    """Decoded files -> `_Loaded`."""

    def __init__(self, rows: int) -> None:
        self.rows = rows  # to pad to

    def __call__(self, items: list[tuple[Entry, Tensor | None]]) -> _Loaded:
        entries = tuple(entry for entry, _ in items)
        shapes = tuple(None if image is None else tuple(image.shape) for _, image in items)
        images = [image for _, image in items if image is not None]
        if len({shape for shape in shapes if shape is not None}) != 1:
            return _Loaded(entries, shapes, None)
        images += [images[0]] * (self.rows - len(images))
        return _Loaded(entries, shapes, torch.stack(images))


def end_workers(loaded: Iterator[Any]) -> None:
    """Ends the workers now.

    As long as they are known to torch, its handler of SIGCHLD raises for one that died, whatever
    the main thread does at the moment. Left to the garbage collector, that may be long after.
    """
    end = getattr(loaded, "_shutdown_workers", None)  # without workers there is none
    if end is not None:
        try:
            end()
        except RuntimeError as error:
            if not is_dead_worker(error):
                raise


def is_dead_worker(error: BaseException) -> bool:
    """Whether an error is torch's word for a decoding process that died.

    torch raises it in the main thread, at whatever that does at the moment: around a loop over a
    stream it may come from anywhere.
    """
    return isinstance(error, RuntimeError) and str(error).startswith(_DEAD_WORKER)


def in_worker(_: int) -> None:
    """What a decoding process does first."""
    # Ctrl-C reaches the whole process group; the parent ends its workers, without their tracebacks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a forked process has its parent's handler
