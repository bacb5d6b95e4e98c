"""A recipe that trains in a second: a toy LLaVA of three blocks on eight images."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from trainer.alignment_config import AlignmentConfig
from trainer.model_config import ModelConfig
from trainer.recipe import DataConfig, Recipe

TINY = Recipe(model=ModelConfig(layers=3, width=32, ffn=64), data=DataConfig(limit_train=8, limit_val=4))


def tiny(**settings: Any) -> Recipe:
    return replace(TINY, alignment=AlignmentConfig(**({"objective": "cosine", "layer": (2,), "hidden": 16} | settings)))
