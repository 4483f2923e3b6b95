"""How large an experiment is: networks, seeds, recipe, by data and scale (scales.toml)."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

from resnet_fused.train import recipe as recipes

SCALES = ("tiny", "small", "full")
DEEP = 100
"""Layers from which on `deep_changes` hold: [He15] section 4.2 warms 110 layers up."""


class ScaleError(ValueError):
    """No such data or scale; the message lists what there is."""


@dataclass(frozen=True)
class Scale:
    """The size of an experiment.

    Attributes:
        data: as `resnet_fused.data.sources.open_source` takes it.
        name: of `SCALES`.
        family: "cifar", the networks of [He15] section 4.2, or "imagenet", those of Table 1.
        depths: layers of the networks, rising.
        seeds: how often each network is trained.
        recipe: what decides what is learnt.
        deep: the same for networks of more than `DEEP` layers.
    """

    data: str
    name: str
    family: Literal["cifar", "imagenet"]
    depths: tuple[int, ...]
    seeds: int
    recipe: recipes.Recipe
    deep: recipes.Recipe

    def recipe_of(self, depth: int) -> recipes.Recipe:
        """The recipe of a network of so many layers."""
        return self.deep if depth > DEEP else self.recipe

    def record(self) -> dict[str, Any]:
        """Plain values, for a report."""
        return {
            "data": self.data, "scale": self.name, "family": self.family,
            "depths": list(self.depths), "seeds": self.seeds,
            "recipe": self.recipe.model_dump(mode="json"),
        }  # fmt: skip


def kinds() -> list[str]:
    """The kinds of data that experiments run on."""
    return list(_table())


def scale_of(
    data: str, name: str, *, seeds: int | None = None, depths: tuple[int, ...] = (),
    changes: tuple[str, ...] = (),
) -> Scale:  # fmt: skip
    """Looks a scale up.

    Args:
        data: "digits", "cifar10", "cifar10:PATH" or "imagefolder:PATH".
        name: of `SCALES`.
        seeds: another number of seeds.
        depths: other networks.
        changes: "entry=value" of the recipe, after the scale's own.

    Raises:
        ScaleError: there is none for such data, or of this name.
        RecipeError: a change that the recipe does not take.
    """
    table = _table()
    kind = data.partition(":")[0]
    if kind not in table:
        raise ScaleError(
            f"--data: no experiment runs on {data!r}; accepted: digits, cifar10[:PATH], "
            "imagefolder:PATH"
        )
    if name not in table[kind]:
        raise ScaleError(f"--scale: there is no {name!r}; accepted: {', '.join(SCALES)}")
    row = table[kind][name]
    own = (*row["changes"], *changes)
    made = recipes.read(row["recipe"], own)
    deep = recipes.read(row["recipe"], (*own, *row.get("deep_changes", ())))
    chosen = tuple(sorted(set(depths or row["depths"])))
    return Scale(data, name, row["family"], chosen, seeds or row["seeds"], made, deep)


def _table() -> dict[str, Any]:
    text = (resources.files("resnet_fused.paper") / "scales.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)
