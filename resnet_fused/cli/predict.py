"""`resnet-fused predict`: what is in a picture, or in every picture of a folder."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from resnet_fused.cli import _predictions
from resnet_fused.cli._errors import UserError, user_errors
from resnet_fused.cli._options import (
    check_environment,
    device_option,
    dtype_option,
    json_option,
    torch_device,
    torch_dtype,
)
from resnet_fused.cli._output import progress_bar

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from resnet_fused.cli._models import Network
    from resnet_fused.data import Batch, Entry, ImageStream, Pixels

# Small on the CPU, where a larger batch gains nothing and results come later.
BATCH_SIZES = {"cpu": 8, "cuda": 64}
NAMED = 20  # files that the summary of failures names; stderr had them all before


@click.command()
@click.argument(
    "paths", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="PATH..."
)
@click.option(
    "--model", "models", multiple=True, default=("resnet50",), show_default=True, metavar="MODEL",
    help="As for `explain`. Several answer together: the mean of their probabilities.",
)  # fmt: skip
@click.option(
    "--weights",
    multiple=True,
    default=("DEFAULT",),
    show_default=True,
    metavar="FILE|NAME",
    help="A .pth, .safetensors, .caffemodel or Detectron .pkl file, or published weights "
    "(IMAGENET1K_V2), downloaded.",
)
@click.option("--topk", type=click.IntRange(min=1), default=5, show_default=True, help="Classes.")
@click.option(
    "--batch-size", type=click.IntRange(min=1),
    help="Images at a time.  [default: 8 on the CPU, 64 on a GPU]",
)  # fmt: skip
@click.option(
    "--workers", type=click.IntRange(min=0),
    help="Processes that decode images; 0: none.  [default: by the cores]",
)  # fmt: skip
@click.option(
    "--on-error", type=click.Choice(["skip", "stop"]),
    help="An image that cannot be read: name it and go on, or stop there; what is before it is "
    "kept.  [default: stop for one image, skip for several and for folders]",
)  # fmt: skip
@click.option(
    "--output", type=click.Path(path_type=Path), metavar="FILE",
    help="Write results to a .jsonl or .csv file instead. It is FILE.partial until all are there.",
)  # fmt: skip
@click.option(
    "--resume", is_flag=True, help="Go on where an earlier run with the same --output stopped."
)
@device_option
@dtype_option
@json_option
@click.pass_context
def predict(
    ctx: click.Context, paths: tuple[Path, ...], models: tuple[str, ...],
    weights: tuple[str, ...], topk: int,
    batch_size: int | None, workers: int | None, on_error: str | None, output: Path | None,
    resume: bool, device: str, dtype: str, as_json: bool,
) -> None:  # fmt: skip
    """Name the most likely classes of images.

    A PATH is an image file, or a folder, whose images are taken with those of its subfolders. For
    several images results come in order, a line each (with --json a JSON object a line), and
    stderr says at the end how many images a second that was.

    Exits with 1 when images were skipped.
    """
    check_environment()
    where = torch_device(device)
    from resnet_fused.cli import _models
    from resnet_fused.data import ImageStream, as_pixels, find_images, load_image

    if resume and output is None:
        raise UserError("--resume: give the --output FILE of the run to go on with")
    if output is not None:
        _predictions.check(output, resume=resume)
    one = len(paths) == 1 and not paths[0].is_dir()
    on_error = on_error or ("stop" if one else "skip")
    with user_errors():
        entries = find_images(paths)
        if all(entry.error is not None for entry in entries):
            raise UserError(str(entries[0].error))
        # The picture first: nobody wants to learn after a download that its name was misspelt.
        if one and on_error == "stop":
            load_image(paths[0])
    network = _models.load_all(models, weights, quiet=as_json)
    common = {
        "model": network.name, "weights": network.weights, "device": str(where), "dtype": dtype
    }  # fmt: skip
    file = _predictions.ResultFile(output, resume=resume, common=common) if output else None
    shown = _printer(one, as_json) if as_json or file is None else None
    left = _without(entries, file.done if file else frozenset())
    pixels = as_pixels(network.transform)
    stream = ImageStream(
        left, pixels or network.transform, batch_size=batch_size or BATCH_SIZES[where.type],
        workers=0 if one and workers is None else workers, device=where,
        dtype=None if pixels else torch_dtype(dtype), pad=where.type == "cuda", on_error=on_error,
    )  # fmt: skip
    run = _Run(network, pixels, torch_dtype(dtype), common, topk, file, shown)
    # Lines on a terminal are progress enough.
    quiet = one or as_json or (shown is not None and sys.stdout.isatty())
    try:
        with _terminated(), progress_bar("predicting", quiet=quiet) as progress:
            run.through(stream, progress)
    finally:
        run.close(len(left))
    if not one:
        run.summary(len(entries) - len(left))
    ctx.exit(1 if run.failed else 0)


def _without(entries: Sequence[Entry], done: frozenset[str]) -> list[Entry]:
    from resnet_fused.data.stream import show

    return [entry for entry in entries if show(entry.file) not in done]


def _printer(one: bool, as_json: bool) -> Callable[[_predictions.Record], None]:
    """Prints a record on stdout."""
    # The stream of this moment: a progress bar puts another in its place, which leads to stderr.
    out = sys.stdout
    if one:
        text = _predictions.document if as_json else _predictions.table
    else:
        text = _predictions.json_line if as_json else _predictions.text_line

    def show(record: _predictions.Record) -> None:
        if line := text(record):
            click.echo(line, file=out)

    return show


@contextmanager
def _terminated() -> Iterator[None]:
    """SIGTERM ends the command as Ctrl-C does: what is done is kept."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclass
class _Run:
    """One pass over a stream: engine, results, and where the time went."""

    network: Network
    pixels: Pixels | None
    dtype: torch.dtype
    common: dict[str, Any]
    topk: int
    file: _predictions.ResultFile | None
    shown: Callable[[_predictions.Record], None] | None
    engine: nn.Module | None = None
    done: int = 0
    failed: list[str] = field(default_factory=list)
    seconds: float = 0.0
    preparing: float = 0.0
    waiting: float = 0.0
    computing: float = 0.0

    def through(self, stream: ImageStream, progress: Callable[[int, int, str], None]) -> None:
        """Predicts every image of the stream."""
        from resnet_fused.data import ImageError
        from resnet_fused.data.stream import is_dead_worker

        total = len(stream.entries)
        start = time.perf_counter()
        batches = iter(stream)
        try:
            while True:
                asked = time.perf_counter()
                batch = next(batches, None)
                self.waiting += time.perf_counter() - asked
                if batch is None:
                    break
                self._one(batch)
                self.seconds = time.perf_counter() - start
                rate = f"{self.done / self.seconds:.1f} images/s"
                progress(self.done + len(self.failed), total, rate)
        except ImageError as error:
            raise UserError(str(error)) from error
        except RuntimeError as error:
            if not is_dead_worker(error):
                raise
            raise UserError(f"a decoding process died ({str(error).strip()})") from error
        self.seconds = time.perf_counter() - start
        if self.file is not None:
            self.file.commit()

    def _one(self, batch: Batch) -> None:
        from resnet_fused.data.stream import show

        found = iter(self._classes(batch))
        for entry in batch.entries:
            record = {"image": show(entry.file), **self.common}
            if entry.error is not None:
                print(f"skipped: {entry.error}", file=sys.stderr)
                self.failed.append(record["image"])
                self._put(record | {"error": entry.error})
            else:
                self.done += 1
                self._put(record | {"predictions": next(found)})
        if self.file is not None:
            self.file.flush()

    def _put(self, record: _predictions.Record) -> None:
        if self.file is not None:
            self.file.write(record)
        if self.shown is not None:
            self.shown(record)

    def _classes(self, batch: Batch) -> list[list[dict[str, Any]]]:
        """The best classes of each image that could be read."""
        import torch

        if batch.images is None:
            return []
        start = time.perf_counter()
        if self.engine is None:
            self.engine = _engine(self.network.model, batch.images, self.dtype, self.pixels)
            self.preparing = time.perf_counter() - start
            start = time.perf_counter()
        with torch.inference_mode():
            logits = self.engine(batch.images)[: len(batch.files)]
            best = logits.float().softmax(1).topk(min(self.topk, logits.shape[1]), 1)
            values, indices = best.values.tolist(), best.indices.tolist()
        self.computing += time.perf_counter() - start
        return [
            [
                {"rank": rank, "index": index, "label": self.network.categories[index],
                 "probability": value}
                for rank, (value, index) in enumerate(zip(*row, strict=True), start=1)
            ]
            for row in zip(values, indices, strict=True)
        ]  # fmt: skip

    def close(self, total: int) -> None:
        """Says what is kept of a run that did not come to its end."""
        if self.file is None or self.file.is_whole:
            return
        count = self.done + len(self.failed)
        if self.file.leave(empty=count == 0):
            again = "; --resume goes on" if self.file.path.suffix.lower() == ".jsonl" else ""
            print(f"{count} of {total} images are in '{self.file.partial}'{again}", file=sys.stderr)

    def summary(self, before: int) -> None:
        """Where the time went, and what is missing."""
        rate = self.done / self.seconds if self.seconds else 0.0
        lines = [
            f"{self.done} images in {self.seconds:.2f} s: {rate:.1f} images/s end to end "
            f"(preparing the network {self.preparing:.2f} s, waiting for images "
            f"{self.waiting:.2f} s, network {self.computing:.2f} s)"
        ]
        if before:
            lines.append(f"{before} images were there from an earlier run")
        if self.failed:
            more = len(self.failed) - NAMED
            names = ", ".join(self.failed[:NAMED]) + (f", and {more} more" if more > 0 else "")
            lines.append(f"{len(self.failed)} skipped: {names}")
        print("\n".join(lines), file=sys.stderr)


def _engine(
    model: nn.Module, example: Tensor, dtype: torch.dtype, pixels: Pixels | None
) -> nn.Module:
    import torch

    import resnet_fused as rf

    placed = model.to(example.device, dtype).to(memory_format=torch.channels_last)
    norm = pixels and pixels.input_norm
    if isinstance(placed, rf.models.Ensemble):
        return rf.models.Ensemble(
            rf.freeze(member, example, input_norm=norm) for member in placed.members
        )
    return rf.freeze(placed, example, input_norm=norm)
