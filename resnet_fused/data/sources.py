"""Labelled images to train on and to test with, by name: digits, CIFAR, folders, made-up ones."""

from __future__ import annotations

import csv
import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets
from torchvision.transforms import functional as F

from resnet_fused.data.images import IMAGENET_MEAN, IMAGENET_STD, load_image

SPLITS = ("train", "val")
CIFAR_ROOT = "data"  # torchvision's examples keep it there
SYNTHETIC_IMAGES = 51_200
DIGITS_TEST_SHARE = 0.2


class DataError(ValueError):
    """Data that cannot be used; the message names the folder or file, and what is accepted."""


class Images(Protocol):
    """Images and their classes, by number."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def __getitem__(self, index: int, /) -> tuple[Tensor, int]:
        """uint8 [C, H, W], and the number of its class; ImageError where it cannot be read."""
        ...


@dataclass(frozen=True)
class Source:
    """A data set.

    Attributes:
        name: as `open_source` was given it.
        train: to learn from.
        val: to test with; no image is in both.
        classes: their names, in the order of their numbers.
        mean: of each channel, of values from 0 to 1.
        std: their standard deviations.
        size: side of the images in pixels; None where they differ.
    """

    name: str
    train: Images
    val: Images
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int | None

    @property
    def channels(self) -> int:
        """Of the images: 3 for RGB, 1 for grey ones."""
        return len(self.mean)


class Stored:
    """Images that are in memory.

    Args:
        images: uint8 [N, C, H, W].
        labels: int64 [N].
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int, /) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])


class Files:
    """Images in files, decoded when they are asked for.

    Args:
        samples: path and class of each.
    """

    def __init__(self, samples: Sequence[tuple[str, int]]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int, /) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        return F.pil_to_tensor(load_image(path)), label


class Noise:
    """Images of noise, each the same whenever it is asked for: for speed, nothing is to be learnt.

    Args:
        count: of images.
        classes: of classes.
        size: of a side, pixels.
        channels: 3 or 1.
    """

    KEPT = 64  # different images: making noise is slower than decoding a photograph

    def __init__(self, count: int, classes: int, size: int, channels: int = 3) -> None:
        self.count, self.classes = count, classes
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randint(
            256, (self.KEPT, channels, size, size), dtype=torch.uint8, generator=generator
        )

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int, /) -> tuple[Tensor, int]:
        return self.images[index % self.KEPT], index % self.classes


def open_source(spec: str, *, size: int = 224, download: bool = False) -> Source:
    """Opens a data set.

    Args:
        spec: "digits" (scikit-learn's 1,797 scanned digits, 8x8, a fifth of them to test with),
            "cifar10" or "cifar100" (of the folder "data", or "cifar10:PATH"), "imagefolder:PATH"
            (PATH/train and PATH/val, each with a folder a class, or with images beside a file
            train.csv or val.csv of lines "file,class"), or "synthetic" (noise; "synthetic:100" has
            100 classes instead of 1000).
        size: side of synthetic images, pixels.
        download: fetch CIFAR where it is missing.

    Raises:
        DataError: an unknown name, a folder that is missing or not laid out like that, classes
            without images, labels that do not match; the message names it.
        ModuleNotFoundError: digits without scikit-learn.
    """
    kind, _, argument = spec.partition(":")
    openers: dict[str, Callable[[], Source]] = {
        "digits": lambda: _digits(spec, argument),
        "cifar10": lambda: _cifar(spec, datasets.CIFAR10, argument, download),
        "cifar100": lambda: _cifar(spec, datasets.CIFAR100, argument, download),
        "imagefolder": lambda: _folders(spec, argument),
        "synthetic": lambda: _synthetic(spec, argument, size),
    }
    if kind not in openers:
        raise DataError(
            f"data: {spec!r} is no data set; accepted: digits, cifar10[:PATH], cifar100[:PATH], "
            "imagefolder:PATH, synthetic[:CLASSES]"
        )
    return openers[kind]()


def _digits(spec: str, argument: str) -> Source:
    if argument:
        raise DataError(f"data: digits come with scikit-learn and have no path, got {spec!r}")
    train, val = _digits_split()
    values = train.images.double() / 255
    return Source(
        spec, train, val, tuple("0123456789"), (float(values.mean()),), (float(values.std()),), 8
    )


@functools.cache
def _digits_split() -> tuple[Stored, Stored]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    # Values from 0 to 16; 15 is the largest whole factor that keeps them bytes.
    images = torch.from_numpy((data.images * 15).astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(data.target).long()
    parts = train_test_split(
        np.arange(len(labels)), test_size=DIGITS_TEST_SHARE, random_state=0, stratify=data.target
    )
    chosen = [torch.from_numpy(np.sort(part)) for part in parts]
    train, val = (Stored(images[part], labels[part]) for part in chosen)
    return train, val


# Of the training images, values from 0 to 1.
_CIFAR = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


def _cifar(spec: str, made: type[datasets.CIFAR10], argument: str, download: bool) -> Source:
    root = argument or CIFAR_ROOT
    kind = spec.partition(":")[0]
    parts = []
    for train in (True, False):
        try:
            part = made(root, train=train, download=download)
        except (OSError, RuntimeError) as error:
            how = "" if download else f"; --download fetches it, or give {kind}:PATH"
            raise DataError(f"data: {kind} cannot be read from '{root}' ({error}){how}") from error
        images = torch.from_numpy(np.asarray(part.data)).permute(0, 3, 1, 2).contiguous()
        parts.append(Stored(images, torch.tensor(part.targets)))
    return Source(spec, parts[0], parts[1], tuple(part.classes), *_CIFAR[kind], 32)


def _synthetic(spec: str, argument: str, size: int) -> Source:
    if argument and not (argument.isdecimal() and int(argument) > 0):
        raise DataError(f"data: {spec!r}: expected a number of classes behind the colon")
    classes = int(argument or 1000)
    train, val = (Noise(count, classes, size) for count in (SYNTHETIC_IMAGES, 1024))
    names = tuple(f"class {i}" for i in range(classes))
    return Source(spec, train, val, names, IMAGENET_MEAN, IMAGENET_STD, size)


def _folders(spec: str, argument: str) -> Source:
    if not argument:
        raise DataError("data: imagefolder needs a path: imagefolder:PATH, with PATH/train in it")
    top = Path(argument)
    if not top.is_dir():
        raise DataError(f"data: no such folder: '{top}'")
    missing = [name for name in SPLITS if not (top / name).is_dir()]
    if missing:
        raise DataError(
            f"data: '{top}' has no folder {' and no '.join(repr(name) for name in missing)}; "
            "accepted is a folder that holds train and val"
        )
    train, classes = _split(top, "train", None)
    val, _ = _split(top, "val", classes)
    return Source(spec, train, val, classes, IMAGENET_MEAN, IMAGENET_STD, None)


def _split(top: Path, name: str, classes: tuple[str, ...] | None) -> tuple[Files, tuple[str, ...]]:
    """One of the two parts, and its classes: those given, where the other part was before."""
    folder, labels = top / name, top / f"{name}.csv"
    if labels.exists():
        pairs = _labelled(folder, labels)
        found = tuple(sorted({label for _, label in pairs}))
    else:
        inner = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
        if not inner:
            raise DataError(
                f"data: '{folder}' has no folder of a class, and there is no '{labels}' that "
                "names the classes of its images"
            )
        pairs = [(file, label) for label in inner for file in _images(folder / label)]
        empty = sorted(set(inner) - {label for _, label in pairs})
        if empty:
            raise DataError(f"data: no image in the class {_some(empty)} of '{folder}'")
        found = tuple(inner)
    if classes is not None and (unknown := sorted(set(found) - set(classes))):
        raise DataError(f"data: '{folder}' has the class {_some(unknown)}, which train has not")
    numbers = {label: i for i, label in enumerate(classes or found)}
    return Files([(file, numbers[label]) for file, label in pairs]), classes or found


def _images(folder: Path) -> list[str]:
    """The images of a folder and its subfolders, sorted."""
    suffixes = datasets.folder.IMG_EXTENSIONS
    return sorted(
        os.path.join(where, name)
        for where, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name.lower().endswith(suffixes)
    )


def _labelled(folder: Path, labels: Path) -> list[tuple[str, str]]:
    """Files and their classes, as a file of lines "file,class" has them."""
    try:
        with open(labels, newline="", encoding="utf-8") as lines:
            rows = [row for row in csv.reader(lines) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"data: '{labels}' cannot be read ({error})") from error
    if rows and [cell.strip().lower() for cell in rows[0]] == ["file", "class"]:
        del rows[0]
    found: dict[str, str] = {}
    for number, row in enumerate(rows, 1):
        if len(row) != 2 or not all(cell.strip() for cell in row):
            raise DataError(f"data: '{labels}', entry {number}: expected file,class, got {row}")
        file = os.path.join(folder, row[0].strip())
        if found.setdefault(file, row[1].strip()) != row[1].strip():
            raise DataError(f"data: '{labels}' gives '{row[0].strip()}' two classes")
    there = set(_images(folder))
    if gone := sorted(set(found) - there):
        raise DataError(f"data: '{labels}' names {_some(gone)}, which is not there")
    if left := sorted(there - set(found)):
        raise DataError(f"data: '{labels}' has no class for {_some(left)}")
    if not found:
        raise DataError(f"data: '{labels}' names no image")
    return sorted(found.items())


def _some(names: Sequence[str], most: int = 3) -> str:
    shown = ", ".join(repr(name) for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
