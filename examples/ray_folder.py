"""The classes of every image in a folder of any size, by Ray Data: one engine a device.

    python examples/ray_folder.py /shared/photos /shared/results --gpus 8

Ray's tasks read, decode and crop images on all cores of all machines; a pool of actors, each with
one frozen engine, takes them batch after batch; the rows go to Parquet or JSON files as they are
made. Only the list of files has to fit into memory. A file that cannot be read is a row with an
error, and exit code 1 says that there was one. The folders have to be there for all machines.

Ray is installed by `pip install "ray[data]"`.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import nn
from torchvision.transforms import functional as F

import resnet_fused as rf
from resnet_fused.data import ImageError, find_images, load_image
from resnet_fused.data.images import IMAGENET_MEAN, IMAGENET_STD
from resnet_fused.data.stream import show
from resnet_fused.ops import stem_input_norm

Columns = dict[str, np.ndarray]


def decode(batch: Columns, size: int) -> Columns:
    """Paths -> pixels: a task of Ray.

    Args:
        batch: `path`, bytes.
        size: side of the crops in pixels; the shorter side is resized to 256 : 224 of it before.

    Returns:
        `image`, the path as text; `pixels`, uint8 [N, size, size, 3]; `error`, empty where there
        is none.
    """
    paths = [os.fsdecode(path) for path in batch["path"]]
    # A file that cannot be read keeps its row, so that every batch has one shape.
    pixels = np.zeros((len(paths), size, size, 3), np.uint8)
    errors = [_decode(path, row, size) for path, row in zip(paths, pixels, strict=True)]
    images = [show(path) for path in paths]
    return {"image": np.array(images, object), "pixels": pixels, "error": np.array(errors, object)}


def _decode(path: str, row: np.ndarray, size: int) -> str:
    """Fills a row; returns why that cannot be done, or nothing."""
    try:
        image = F.resize(load_image(path), [round(size * 256 / 224)], antialias=True)
        row[:] = np.asarray(F.center_crop(image, [size, size]))
    except ImageError as error:
        return show(str(error))
    except (ValueError, RuntimeError, MemoryError) as error:
        return f"image: '{show(path)}' cannot be cropped ({error or type(error).__name__})"
    return ""


class Predict:
    """Pixels -> classes, as an actor of Ray with an engine of its own.

    Args:
        model: torchvision's name, or "rf:cifar_resnet20".
        weights: a state_dict's file, or a name of torchvision's published weights.
        topk: classes of an image.
        batch_size: rows that the engine is made for.
        size: side of the images.
        dtype: "float32", "bfloat16" or "float16".
    """

    def __init__(
        self, model: str, weights: str, topk: int, batch_size: int, size: int, dtype: str
    ) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        network, self.categories = build(model, weights)
        network = network.eval().to(device, getattr(torch, dtype))
        example = torch.zeros(batch_size, 3, size, size, dtype=torch.uint8, device=device)
        self.topk = topk
        self.example = example.contiguous(memory_format=torch.channels_last)
        self.engine = rf.freeze(
            network.to(memory_format=torch.channels_last),
            self.example,
            input_norm=stem_input_norm(IMAGENET_MEAN, IMAGENET_STD),
        )

    def __call__(self, batch: Columns) -> Columns:
        """`Decode`'s columns -> a row for each class of an image, or one with its error."""
        # Ray's memory is read-only, and shared with others.
        pixels = torch.from_numpy(np.array(batch["pixels"])).to(self.example.device)
        x = pixels.permute(0, 3, 1, 2)
        with torch.inference_mode():
            probabilities = self._engine(x).float().softmax(1)
            best = probabilities.topk(min(self.topk, probabilities.shape[1]), 1)
            values, indices = best.values.tolist(), best.indices.tolist()
        rows: list[tuple[Any, ...]] = []
        for image, error, *row in zip(batch["image"], batch["error"], values, indices, strict=True):
            if error:
                rows.append((image, 0, -1, "", 0.0, error))
                continue
            for rank, (value, index) in enumerate(zip(*row, strict=True), start=1):
                rows.append((image, rank, index, self._label(index), value, ""))
        image, rank, index, label, probability, error = zip(*rows, strict=True)
        return {
            "image": np.array(image, object), "rank": np.array(rank, np.int64),
            "index": np.array(index, np.int64), "label": np.array(label, object),
            "probability": np.array(probability, np.float64), "error": np.array(error, object),
        }  # fmt: skip

    def _engine(self, x: torch.Tensor) -> torch.Tensor:
        """Scores [N, classes]. On a GPU of one shape alone: each would be captured anew."""
        if not x.is_cuda or len(x) == len(self.example):
            return self.engine(x)
        padded = torch.zeros_like(self.example)
        padded[: len(x)] = x
        return self.engine(padded)[: len(x)]

    def _label(self, index: int) -> str:
        return self.categories[index] if self.categories else f"class {index}"


def build(name: str, weights: str) -> tuple[nn.Module, tuple[str, ...]]:
    """A network, and the names of its classes where they are known."""
    if not os.path.exists(weights):
        found = torchvision.models.get_model_weights(name)[weights]
        model = torchvision.models.get_model(name, weights=found)
        return model, tuple(found.meta["categories"])
    state = torch.load(weights, map_location="cpu", weights_only=True)
    classes = len(state["fc.weight"])
    if name == "rf:cifar_resnet20":
        model = rf.models.cifar_resnet20(num_classes=classes)
    else:
        model = torchvision.models.get_model(name, weights=None, num_classes=classes)
    model.load_state_dict(state)
    return model, ()


def check_output(folder: str) -> None:
    """Ray adds files to a folder: results of two runs would mix.

    Raises:
        SystemExit: there is something in the folder, or it is a file.
    """
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        sys.exit(f"error: OUTPUT: '{folder}' is there; give an empty or a new folder")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", help="of images, with its subfolders")
    parser.add_argument("output", help="an empty or a new folder")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--weights", default="DEFAULT", help="a state_dict's file, or a name")
    parser.add_argument("--format", choices=("parquet", "json"), default="parquet")
    parser.add_argument("--topk", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--gpus", type=int, default=0, help="engines, each on a GPU; 0: the CPU")
    parser.add_argument("--engines", type=int, default=1, help="engines without a GPU")
    parser.add_argument("--engine-cpus", type=int, default=1, help="cores of such an engine")
    parser.add_argument("--cpus", type=int, help="cores for Ray, where it starts here")
    return parser.parse_args()


def main() -> int:
    """Starts Ray here, or joins the cluster of RAY_ADDRESS; returns the exit code."""
    given = arguments()
    # Other processes work in other folders.
    given.folder, given.output = os.path.abspath(given.folder), os.path.abspath(given.output)
    if os.path.exists(given.weights):
        given.weights = os.path.abspath(given.weights)
    try:
        files = find_images([given.folder])
    except ImageError as error:
        sys.exit(f"error: {error}")
    check_output(given.output)
    paths = [os.fsencode(entry.file) for entry in files if entry.error is None]
    errors = [entry.error for entry in files if entry.error is not None]
    if paths:
        errors += run(paths, given)
    for error in errors:
        print(f"skipped: {error}", file=sys.stderr)
    print(f"{len(files)} images, {len(errors)} of them skipped, results in {given.output}")
    return 1 if errors else 0


def run(paths: list[bytes], given: argparse.Namespace) -> list[str]:
    """Lets Ray do it; returns the errors."""
    import ray

    ray.init(num_cpus=given.cpus, include_dashboard=False)
    options = ("model", "weights", "topk", "batch_size", "size", "dtype")
    results = (
        # A task decodes four batches.
        ray.data.from_items(
            [{"path": path} for path in paths],
            override_num_blocks=-(-len(paths) // (4 * given.batch_size)),
        )
        .map_batches(
            decode, fn_kwargs={"size": given.size}, batch_size=given.batch_size,
            batch_format="numpy",
        )
        .map_batches(
            Predict, fn_constructor_kwargs={name: getattr(given, name) for name in options},
            batch_size=given.batch_size, batch_format="numpy",
            compute=ray.data.ActorPoolStrategy(size=given.gpus or given.engines),
            num_gpus=1 if given.gpus else None, num_cpus=1 if given.gpus else given.engine_cpus,
        )
    )  # fmt: skip
    if given.format == "parquet":
        results.write_parquet(given.output)
        written = ray.data.read_parquet(given.output)
    else:
        results.write_json(given.output)
        written = ray.data.read_json(given.output)
    # From what was written: nothing else would be proof that it is there.
    broken = written.filter(lambda row: bool(row["error"]))
    return [row["error"] for row in broken.iter_rows()]


if __name__ == "__main__":
    sys.exit(main())
