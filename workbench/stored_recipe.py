"""Read the recipe of a finished training with the current keys; only this module knows the old keys."""

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
"""The current names of renamed keys, by their old names."""
ADDED: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "alignment": {"selection": {"heads": 4, "k": 10, "images": 32}, "mask": 0.0, "final_norm": False},
        "optim": {"frozen_precision": "float32", "loss_average": "batch"},
    }
)
"""Keys that older recipes lack, by section, with the value that those trainings had."""
LISTS = ("data.train", "alignment.layer", "alignment.vfm")  # lists that used to be single values


def current_recipe(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stored recipe with the current names of its keys, and with the keys of `ADDED` in the sections it has.

    Old recipes have no `model.kind`. It follows from their other keys: a model with a name is `pretrained`; a model
    whose vision encoder or language model contains a slash (a hub id or a folder) is `assembled`; any other is `toy`.
    An old recipe with the key `start` gets the `stage1` None.
    """
    recipe: dict[str, Any] = {}
    for section, content in stored.items():
        if isinstance(content, Mapping):
            current = {_name(section, key): _value(section, key, value) for key, value in content.items()}
            recipe[section] = current | {
                key: dict(value) if isinstance(value, Mapping) else value
                for key, value in ADDED.get(section, {}).items()
                if key not in current
            }
        else:
            recipe[section] = content
        if section == "start" and "stage1" not in stored:
            recipe["stage1"] = None
    model = recipe.get("model")
    if isinstance(model, dict) and "kind" not in model:
        assembled = any("/" in str(model.get(part) or "") for part in ("vision_encoder", "language"))
        recipe["model"] = {"kind": "pretrained" if model.get("name") else "assembled" if assembled else "toy", **model}
    return recipe


def _name(section: str, key: str) -> str:
    """Return the current name of a key, without its section."""
    return RENAMED.get(f"{section}.{key}", f"{section}.{key}").rpartition(".")[2]


def _value(section: str, key: str, value: Any) -> Any:
    """Return a value as it is stored today, as a list where it used to be a single value."""
    return [value] if f"{section}.{_name(section, key)}" in LISTS and not isinstance(value, list) else value
