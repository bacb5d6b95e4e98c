"""Recipes that finished trainings stored, read with today's keys; the only place that knows the old ones."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

RENAMED = MappingProxyType(
    {
        "model.tower": "model.vision_encoder",
        "model.tower_revision": "model.vision_encoder_revision",
        "model.tower_features": "model.vision_encoder_features",
        "model.train_tower": "model.train_vision_encoder",
        "alignment.centre": "alignment.center",
    }
)
"""Keys of recipes by their old names."""
LISTS = ("data.train", "alignment.layer", "alignment.vfm")  # a plain value once


def current_recipe(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stored recipe with today's keys; what has them already comes back as it is, and keys that are younger
    than the recipe stay away.

    `model.kind`, which was not stored once, followed from the other keys then: a model with a name is `pretrained`; one
    with a part that is a hub id or a folder, by its slash, is `assembled`; any other is `toy`. A recipe that starts
    from a folder names no `stage1`.
    """
    recipe: dict[str, Any] = {}
    for section, value in stored.items():
        recipe[section] = (
            {_name(section, key): _value(section, key, own) for key, own in value.items()}
            if isinstance(value, Mapping)
            else value
        )
        if section == "start" and "stage1" not in stored:
            recipe["stage1"] = None
    model = recipe.get("model")
    if isinstance(model, dict) and "kind" not in model:
        assembled = any("/" in str(model.get(part) or "") for part in ("vision_encoder", "language"))
        recipe["model"] = {"kind": "pretrained" if model.get("name") else "assembled" if assembled else "toy", **model}
    return recipe


def _name(section: str, key: str) -> str:
    return RENAMED.get(f"{section}.{key}", f"{section}.{key}").rpartition(".")[2]


def _value(section: str, key: str, value: Any) -> Any:
    return [value] if f"{section}.{_name(section, key)}" in LISTS and not isinstance(value, list) else value
