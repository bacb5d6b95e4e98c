"""Runs folders made by hand, with known answers and scores, for tests of what is shown of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from trainer import read_recipe
from trainer.evaluation import ANSWERS
from workbench.scoring.tables import accuracy_by_type
from workbench.training_folder import MEAN
from workbench.yaml_config import as_mapping

TYPES = ("colour", "count")


@cache
def _recipe(name: str, seed: int) -> dict[str, Any]:
    return as_mapping(read_recipe(name, seed=seed))


def recipe(name: str, seed: int, **alignment: object) -> dict[str, Any]:
    """A recipe of the package, as a training stores it."""
    own = deepcopy(_recipe(name, seed))
    return {**own, "alignment": own["alignment"] | alignment}


def train(
    root: Path,
    name: str,
    *,
    right: Sequence[bool],
    seed: int = 0,
    aligned: bool = False,
    steps: int = 3,
    created: str = "2026-01-01T00:00:00+00:00",
    finished: bool = True,
    **more: object,
) -> Path:
    """Write what a training would: question i is of type i % 2, about image i // 2, and answered as `right` says."""
    folder = root / name
    folder.mkdir(parents=True)
    settings = recipe("scarce_viral" if aligned else "scarce_baseline", seed, **more)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
    curves = {"lm_loss": np.linspace(2, 1, steps), "accuracy/mean": np.linspace(0.3, 0.6, steps)}
    pd.DataFrame({"step": range(1, steps + 1)} | curves).to_parquet(folder / "training.parquet")
    if not finished:
        return folder
    rows = []
    for i, ok in enumerate(right):
        given, p = ("red", 0.9) if ok else ("blue", 0.1)
        rows.append((f"q{i:03}", f"image{i // 2:03}", TYPES[i % 2], f"what {i} ?", "red", given, p, bool(ok), 0.25))
    answers = pd.DataFrame(rows, columns=ANSWERS)
    answers.to_parquet(folder / "evaluation.parquet")
    pd.DataFrame(accuracy_by_type(answers, seed=0)).to_parquet(folder / "accuracy.parquet")
    record = {"recipe": settings, "test": "same", "data": "d", "items": 300, "created": created, "seconds": 9.0}
    (folder / "training.json").write_text(json.dumps(record))
    return folder


def spoil_rows(file: Path) -> None:
    """Change the rows of a parquet file, and leave its end, which has the columns, as it is."""
    content = file.read_bytes()
    end = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    file.write_bytes(content[:8] + bytes(byte ^ 0x5A for byte in content[8:end]) + content[end:])


def cknna(
    root: Path,
    model: str,
    values: Mapping[int, Sequence[float]],
    *,
    key: str = "",
    created: str = "2026-02-01",
    tokens: int = 64,
    **config: object,
) -> Path:
    """Write a stored CKNNA run: {layer: score of each image}, of images of `tokens` visual tokens."""
    key = key or f"{abs(hash((model, str(values), str(config)))):012x}"[:12]
    folder = root / f"cknna-{key}"
    folder.mkdir()
    images = [f"image{i:03}" for i in range(len(next(iter(values.values()))))]
    target = {"vfm": "dinov2-small", "target": "dinov2-small"}
    parts = [{"layer": layer, "image_id": images, "score": scores, **target} for layer, scores in values.items()]
    per_image = pd.concat([pd.DataFrame(part) for part in parts])
    rows = [
        {
            "layer": layer,
            **target,
            "vfm_layer": None,
            "metric": "cknna",
            "score": np.mean(v),
            "low": np.mean(v) - 0.01,
            "high": np.mean(v) + 0.01,
            "null_mean": 0.1,
            "null_q95": 0.14,
            "p": 0.01,
            "n_images": len(v),
            "n": tokens,
            "k": 10,
            "dim": 10,
            "pooling": "within",
            "seed": 0,
        }
        for layer, v in values.items()
    ]
    per_image.to_parquet(folder / "per_image.parquet", index=False)
    pd.DataFrame(rows).to_parquet(folder / "scores.parquet", index=False)
    record = {"analysis": "cknna", "version": 3, "label": model, "model": f"/elsewhere/{model}", "data": "shapes:val"}
    record |= {"data_fingerprint": "f", "config": {"data": "shapes:val", "limit": len(images), **config}, "seed": 0}
    record |= {"key": key, "tables": ["per_image", "scores"], "created": created, "seconds": 2.0, "argv": ["python"]}
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def patching(root: Path, model: str, source: str, layers: Sequence[int] = (0, 1), *, wrong: int = 3) -> Path:
    """Write a stored run of patching: with the tokens of `source`, the first `wrong` of 10 answers are wrong."""
    places = [{"kind": "patched", "site": str(layer), "layer": layer} for layer in layers]
    drop = {"source": source, "score": wrong / 10}
    config = {"source": f"runs/{source}"}
    return _intervention(root / f"patching-{model}-{source}", model, places, wrong, config, **drop)


def knockout(root: Path, model: str, blocks: Sequence[tuple[int, int]], *, width: int) -> Path:
    """Write a stored run of knockout in windows from the first to the last block: 3 of 10 answers are wrong."""
    places = [{"kind": "knockout", "site": f"{a}-{b}", "first": a, "last": b} for a, b in blocks]
    return _intervention(root / f"knockout-{model}-{width}", model, places, 3, {"width": [width]})


def _intervention(
    folder: Path,
    model: str,
    places: Sequence[Mapping[str, object]],
    wrong: int,
    config: Mapping[str, object],
    **scored: object,
) -> Path:
    """Write a stored run of an intervention: at each of its places, the first `wrong` of 10 answers are wrong."""
    images = [f"image{i:03}" for i in range(10)]
    asked = {"id": [f"q{i}" for i in range(10)], "image_id": images, "category": "colour"}
    asked |= {"correct_before": True, "correct_after": [i >= wrong for i in range(10)]}
    scored |= {"accuracy_drop": wrong / 10, "low": wrong / 10 - 0.1, "high": wrong / 10 + 0.1}
    scored |= {"category": MEAN, "n_images": 10, "n": 10}
    samples = pd.concat([pd.DataFrame({**place, **asked}) for place in places])
    scores = pd.DataFrame([{**place, **scored} for place in places])
    return _stored(folder, model, config, samples=samples, scores=scores)


def lens(root: Path, model: str, kinds: Sequence[str] = ("class",)) -> Path:
    """Write a stored run of the logit lens; without the kind "colour", of data whose objects have no colors."""
    images, rows, parts = [f"image{i:03}" for i in range(10)], [], []
    for layer, kind in product(range(3), kinds):
        place = {"layer": layer, "kind": kind, "measure": "first", "cells": "object"}
        rows.append(place | {"score": 0.5, "low": 0.4, "high": 0.6, "null_mean": 0.1, "n_images": 10, "n": 100})
        parts.append(pd.DataFrame(place | {"image_id": images, "value": np.linspace(0, 1, 10)}))
    return _stored(root / f"logit_lens-{model}", model, {}, per_image=pd.concat(parts), scores=pd.DataFrame(rows))


def _stored(folder: Path, model: str, config: Mapping[str, object], **tables: pd.DataFrame) -> Path:
    """Write these tables and a record of the analysis that the folder's name begins with."""
    folder.mkdir()
    for name, table in tables.items():
        table.to_parquet(folder / f"{name}.parquet", index=False)
    record = {"analysis": folder.name.partition("-")[0], "version": 1, "label": model, "model": f"/elsewhere/{model}"}
    record |= {"data": "shapes:val", "data_fingerprint": "f", "config": {"limit": 10, **config}, "seed": 0}
    record |= {"key": folder.name, "tables": list(tables), "created": "2026-02-01", "argv": ["python"]}
    (folder / "run.json").write_text(json.dumps(record))
    return folder
