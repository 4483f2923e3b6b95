"""Batches to train on: each image and each step can be made again, by any process, at any time.

An epoch's order depends on the seed and the epoch, an image's augmentation on the seed, the epoch
and the image. No generator's state lives in a worker, so that a run that goes on in the middle of
an epoch, with another number of workers, sees what it would have seen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from resnet_fused.data.augment import Transform
from resnet_fused.data.images import ImageError
from resnet_fused.data.sources import Images
from resnet_fused.data.stream import ahead, end_workers, in_worker, is_dead_worker

ON_ERROR = ("replace", "leave out")
Key = tuple[int, int]
"""An epoch, and the number of an image."""
Item = tuple[Tensor | None, int, list[str]]
Batch = tuple[Tensor | None, Tensor, list[str]]


def seed_of(*numbers: int) -> int:
    """A seed of 63 bits from several numbers; similar ones give unlike seeds."""
    words = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return int(words[0]) >> 1


@contextlib.contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """The generator of the CPU begins anew, and is as before behind this."""
    generator = torch.default_generator
    before = generator.get_state()
    # torch.manual_seed would seed each kind of device, and remember to where there is none.
    generator.manual_seed(seed_of(*numbers))
    try:
        yield
    finally:
        generator.set_state(before)


class Samples(Dataset[Any]):
    """Images as a network is to see them in an epoch.

    Args:
        images: what there is.
        transform: uint8 [C, H, W] -> uint8 of the network's size.
        seed: of the run.
        on_error: where an image cannot be read, "replace" takes the one behind it in its place,
            "leave out" makes the batch smaller. The message comes with the batch.
    """

    def __init__(
        self, images: Images, transform: Transform, seed: int = 0, on_error: str = "leave out"
    ) -> None:
        self.images, self.transform, self.seed = images, transform, seed
        self.on_error = on_error

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Key, /) -> Item:
        """An image, its class, and a message on each that could not be read."""
        epoch, index = key
        problems: list[str] = []
        for further in range(len(self.images)):
            at = (index + further) % len(self.images)
            try:
                image, label = self.images[at]
            except ImageError as error:
                problems.append(str(error))
                if self.on_error == "leave out":
                    break
                continue
            with seeded(self.seed, epoch, at):
                return self.transform(image), label, problems
        return None, -1, problems


def order_of(count: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch's images: a permutation."""
    generator = torch.Generator().manual_seed(seed_of(seed, epoch))
    return torch.randperm(count, generator=generator)


class Steps(Sampler[list[Key]]):
    """One rank's images of each step, from a step to the end of the run.

    All ranks together take a step's images in the order in which one process alone would: results
    do not depend on how many there are. What an epoch has behind its last whole batch is left out.

    Args:
        count: of the images.
        batch: images of a step, of all ranks together.
        steps: of the run.
        seed: of the run.
        rank: this process's number.
        world: how many there are.
        first: step to begin with.
    """

    def __init__(
        self, count: int, batch: int, steps: int, seed: int,
        rank: int = 0, world: int = 1, first: int = 0,
    ) -> None:  # fmt: skip
        self.count, self.batch, self.steps, self.seed = count, batch, steps, seed
        self.rank, self.world, self.first = rank, world, first
        self.each = batch // world

    @property
    def in_epoch(self) -> int:
        """Steps of an epoch."""
        return self.count // self.batch

    def __len__(self) -> int:
        return self.steps - self.first

    def __iter__(self) -> Iterator[list[Key]]:
        order, known = torch.empty(0), -1
        for step in range(self.first, self.steps):
            epoch, at = divmod(step, self.in_epoch)
            if epoch != known:
                order, known = order_of(self.count, self.seed, epoch), epoch
            begin = at * self.batch + self.rank * self.each
            yield [(epoch, index) for index in order[begin : begin + self.each].tolist()]


def shares(count: int, batch: int, rank: int = 0, world: int = 1) -> list[list[Key]]:
    """One rank's images of a pass over all of them, in batches; ranks may have unlike many."""
    indices = range(rank, count, world)
    return [
        [(0, index) for index in indices[begin : begin + batch]]
        for begin in range(0, len(indices), batch)
    ]


def loader(
    samples: Samples, batches: Sampler[list[Key]] | Sequence[list[Key]], *,
    workers: int = 0, pin: bool = False,
) -> DataLoader[Any]:  # fmt: skip
    """Batches of images, classes, and messages on what could not be read.

    Args:
        samples: what to take them from.
        batches: which ones.
        workers: processes that decode; 0: none.
        pin: copy to memory from which a GPU can copy by itself.
    """
    return DataLoader(
        samples, batch_sampler=batches, num_workers=workers, pin_memory=pin,
        collate_fn=_collate, prefetch_factor=4 if workers else None, worker_init_fn=in_worker,
    )  # fmt: skip


def on_device(batches: DataLoader[Any], device: torch.device) -> Generator[Batch, None, None]:
    """The loader's batches, on the device; for a GPU the next ones are copied meanwhile.

    Args:
        batches: of `loader`, with pinned memory for a GPU.
        device: where they go.

    Yields:
        Images or None, classes, messages.

    Raises:
        ImageError: a decoding process died.
    """
    loaded = iter(batches)
    try:
        if device.type == "cuda":
            yield from _copied(loaded, device)
        else:
            yield from loaded
    except RuntimeError as error:
        if not is_dead_worker(error):
            raise
        raise ImageError(
            f"workers: a decoding process died ({str(error).strip()}); fewer need less memory"
        ) from error
    finally:
        end_workers(loaded)


def _copied(loaded: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    side = torch.cuda.Stream(device)

    def enqueue(batch: Batch) -> tuple[Batch, torch.cuda.Event]:
        images, labels, problems = batch
        with torch.cuda.stream(side):
            moved = None if images is None else images.to(device, non_blocking=True)
            copied = moved, labels.to(device, non_blocking=True), problems
            ready = torch.cuda.Event()
            ready.record(side)
        return copied, ready

    for (images, labels, problems), ready in ahead(loaded, enqueue):
        here = torch.cuda.current_stream(device)
        here.wait_event(ready)
        for tensor in (images, labels):
            if tensor is not None:
                # Its memory belongs to the side stream, which must not take it back in between.
                tensor.record_stream(here)
        yield images, labels, problems


def _collate(items: Sequence[Item]) -> Batch:
    """Images [N, C, H, W], or None where none could be read; classes [N]; messages."""
    found = [(image, label) for image, label, _ in items if image is not None]
    problems = [problem for _, _, some in items for problem in some]
    images = torch.stack([image for image, _ in found]) if found else None
    return images, torch.tensor([label for _, label in found], dtype=torch.int64), problems
