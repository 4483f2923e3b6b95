"""The one place that turns MODEL and --weights into a network."""

from __future__ import annotations

import contextlib
import difflib
import functools
import http.client
import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused.bench import networks
from resnet_fused.cli._errors import UserError, user_errors
from resnet_fused.weights import MismatchError, Preprocessing, Weights, WeightsError
from resnet_fused.weights import load as fill
from resnet_fused.weights import read as read_file
from resnet_fused.weights.files import SUFFIXES

DOWNLOAD_ERRORS = (OSError, RuntimeError, http.client.HTTPException)


@dataclass(frozen=True)
class Network:
    """A network ready for inference.

    Attributes:
        name: as given.
        model: in evaluation mode, float32, on the CPU.
        weights: where its weights come from, in a few words.
        trained: False when they are random.
        categories: names of its classes.
        transform: an RGB image -> float32 [3, H, W], as these weights want it.
    """

    name: str
    model: nn.Module
    weights: str
    trained: bool
    categories: tuple[str, ...]
    transform: Callable[[Any], Tensor]


def load(name: str, weights: str | None = None, *, quiet: bool = True) -> Network:
    """Builds a network.

    Args:
        name: "resnet50" (torchvision's), "timm:NAME" or "rf:NAME" (resnet_fused.models).
        weights: a file, the name of published weights ("DEFAULT", "IMAGENET1K_V2", ...), or None
            for random ones, the same in each run.
        quiet: no progress bar for a download.

    Raises:
        UserError: an unknown name, weights that cannot be had or read or that are of another
            architecture; the message says which and what is accepted.
    """
    check_name(name)
    source, _, short = name.rpartition(":")
    if weights is not None and is_file(weights):
        found = read_weights(Path(weights))
        # A head of another size is a fine-tuned network, not another architecture.
        head = found.get("fc.weight")
        classes = {"num_classes": len(head)} if head is not None and head.dim() == 2 else {}
        with user_errors() if source == "rf" else contextlib.nullcontext():
            model = networks.build(name, **classes)
        place = filled(model, found, name)
        transform = _preset(found.preprocessing)
        return Network(name, model.eval(), place, True, _categories(model), transform)
    if weights is not None:
        zoo = {"": _Torchvision, "timm": _Timm, "rf": _Own}[source]()
        return zoo.published(name, short, weights, quiet)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = networks.build(name)
    return Network(name, model.eval(), "random (seed 0)", False, _categories(model), _preset())


def load_all(names: Sequence[str], weights: Sequence[str], *, quiet: bool = True) -> Network:
    """Builds one network, or an ensemble of several.

    Args:
        names: as for `load`.
        weights: one for all, or one for each in order.
        quiet: no progress bar for a download.

    Raises:
        UserError: as `load`; numbers that differ; networks that want other images or know other
            classes than the first.
    """
    if len(weights) == 1:
        weights = tuple(weights) * len(names)
    if len(weights) != len(names):
        raise UserError(
            f"--weights: got {len(weights)} for {len(names)} MODELs; give one, or one for each"
        )
    found = [load(name, own, quiet=quiet) for name, own in zip(names, weights, strict=True)]
    first = found[0]
    if len(found) == 1:
        return first
    for other in found[1:]:
        if other.categories != first.categories:
            raise UserError(f"--model: {other.name} and {first.name} know different classes")
        # Transforms say in their repr all that they do, and have no equality.
        if repr(other.transform) != repr(first.transform):
            raise UserError(
                f"--model: {other.name} wants its images prepared in another way than {first.name}"
            )
    from resnet_fused.models import Ensemble

    return Network(
        " + ".join(names), Ensemble(each.model for each in found).eval(),
        "; ".join(each.weights for each in found), all(each.trained for each in found),
        first.categories, first.transform,
    )  # fmt: skip


class _Torchvision:
    def enum(self, name: str) -> Any:
        from torchvision import models

        return models.get_model_weights(name)

    def trained(self, name: str, weights: Any, progress: bool) -> nn.Module:
        from torchvision import models

        return models.get_model(name, weights=weights, progress=progress)

    def published(self, full: str, name: str, weights: str, quiet: bool) -> Network:
        known = self.enum(name).__members__
        if weights not in known:
            raise UserError(
                f"--weights: {weights!r} is neither a file nor published weights of {full}; "
                f"accepted: a {', '.join(SUFFIXES)} file, or {', '.join(known)}"
                + _suggestion(weights, known)
            )
        chosen = known[weights]
        show = not quiet and sys.stderr.isatty()
        try:
            # torch announces a download on stdout, where only results belong.
            with contextlib.redirect_stdout(sys.stderr if show else io.StringIO()):
                model = self.trained(name, chosen, show)
        except DOWNLOAD_ERRORS as error:
            raise UserError(
                f"--weights: cannot download {chosen.name} of {full} ({error}); give a file "
                f"instead: --weights FILE (this one is {chosen.url})"
            ) from error
        return Network(
            full, model.eval(), f"torchvision's {type(chosen).__name__}.{chosen.name}", True,
            tuple(chosen.meta["categories"]), chosen.transforms(),
        )  # fmt: skip


class _Own(_Torchvision):
    def enum(self, name: str) -> Any:
        from resnet_fused import models

        return models.get_model_weights(name)

    def trained(self, name: str, weights: Any, progress: bool) -> nn.Module:
        from resnet_fused import models

        return models.get_model(name, weights=weights, progress=progress)


class _Timm:
    def published(self, full: str, name: str, weights: str, quiet: bool) -> Network:
        import timm

        tags = timm.list_pretrained(f"{name}.*")
        names = ["DEFAULT", *(tag.partition(".")[2] for tag in tags)]
        if weights not in names:
            raise UserError(
                f"--weights: {weights!r} is neither a file nor published weights of {full}; "
                f"accepted: a {', '.join(SUFFIXES)} file, or {', '.join(names)}"
            )
        chosen = name if weights == "DEFAULT" else f"{name}.{weights}"
        try:
            model = timm.create_model(chosen, pretrained=True)
        except (*DOWNLOAD_ERRORS, ValueError) as error:
            raise UserError(
                f"--weights: cannot download {weights} of {full} ({error}); "
                "give a file instead: --weights FILE"
            ) from error
        config = timm.data.resolve_model_data_config(model)
        transform = timm.data.create_transform(**config, is_training=False)
        return Network(full, model.eval(), f"timm's {chosen}", True, _categories(model), transform)


def _suggestion(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def check_name(full: str) -> None:
    """Refuses what names no network.

    Raises:
        UserError: unknown source or name; with the nearest names that there are.
    """
    source, _, short = full.rpartition(":")
    if source not in networks.SOURCES:
        raise UserError(
            f"MODEL: unknown source {source!r} in {full!r}; accepted: timm:, rf: or none"
        )
    known = networks.names(source)
    if short in known:
        return
    prefix = f"{source}:" if source else ""
    zoo = {"": "torchvision", "timm": "timm", "rf": "resnet_fused.models"}[source]
    hint = _suggestion(short, known).replace("did you mean ", f"did you mean {prefix}")
    raise UserError(
        f"MODEL: {zoo} has no {short!r}{hint}"
        + ("" if hint else "; accepted: a torchvision name such as resnet50, timm:NAME or rf:NAME")
    )


def is_file(weights: str) -> bool:
    """Whether --weights names a file, not published weights."""
    # The suffix counts as well: a misspelt path is a missing file, not a misspelt name.
    return os.path.exists(weights) or os.sep in weights or weights.lower().endswith(tuple(SUFFIXES))


def _preset(preprocessing: Preprocessing | None = None) -> Callable[[Any], Tensor]:
    from resnet_fused.data import preprocess

    if preprocessing is None:
        return preprocess
    return functools.partial(preprocess, mean=preprocessing.mean, std=preprocessing.std)


def _categories(model: nn.Module) -> tuple[str, ...]:
    """ImageNet's class names for a network of 1000 classes, else their numbers."""
    from torchvision.models import ResNet50_Weights

    names = ResNet50_Weights.IMAGENET1K_V1.meta["categories"]
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    classes = layers[-1].out_features if layers else len(names)
    return tuple(names) if classes == len(names) else tuple(f"class {i}" for i in range(classes))


def read_weights(path: Path) -> Weights:
    """Reads a file of weights in any format of `resnet_fused.weights`.

    A folder that `train` wrote as a checkpoint gives its weights, or their average if it has one.

    Raises:
        UserError: no such file, a directory, a broken file, or one that holds something else.
    """
    if path.is_dir() and (found := _checkpoint(path)) is not None:
        return Weights(found, "checkpoint", str(path))
    try:
        return read_file(path)
    except WeightsError as error:
        raise UserError(f"--weights: {error}") from error


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Reads weights for a network of today's: v1.5, for images as torchvision normalises them.

    Raises:
        UserError: as `read_weights`, and weights that want another network or other images.
    """
    found = read_weights(path)
    if found.preprocessing is not None:
        raise UserError(
            f"--weights: '{path}' is for images as {found.format} prepared them, which `predict`, "
            "`verify` and `evaluate MODEL` do; accepted here: a state_dict saved by torch.save, or "
            ".safetensors"
        )
    return dict(found)


def filled(model: nn.Module, weights: Weights, name: str) -> str:
    """Fills a network, and sets its strides and pooling as the weights want them.

    Args:
        model: of `networks.build`.
        weights: of `read_weights`.
        name: of the model, for messages.

    Returns:
        Where the weights come from, in a few words.

    Raises:
        UserError: weights of another network.
    """
    try:
        loaded = fill(model, weights, adapt=True)
    except MismatchError as error:
        raise UserError(
            f"--weights: '{weights.source}' is not a state_dict of {name} ({error.details}); "
            "give weights of this architecture, or the MODEL that they belong to"
        ) from error
    version = f" ({loaded.format}, {loaded.version})" if loaded.version else ""
    return f"from '{weights.source}'{version}"


def _checkpoint(folder: Path) -> dict[str, Tensor] | None:
    """The weights of a checkpoint of `train`; None where the folder is none."""
    from resnet_fused.train import checkpoint

    if not (folder / checkpoint.MANIFEST).exists():
        return None
    try:
        found = checkpoint.read(folder)
    except checkpoint.CheckpointError as error:
        raise UserError(f"--weights: {error}") from error
    return dict(found.model if found.ema is None else found.ema)
