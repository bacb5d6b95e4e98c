"""Files of a model on the hub or in a folder."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from workbench.errors import ModelError, one_line
from workbench.mllm.residual import FILE as RESIDUAL
from workbench.weights.model_files import PICKLE, SAFETENSORS, WeightFiles, locate, weight_files
from workbench.weights.pretrained import call

WEIGHTS = (SAFETENSORS, f"{SAFETENSORS}.index.json", PICKLE, f"{PICKLE}.index.json")  # the first that exists is read


def weights_of(name: str, **options: Any) -> WeightFiles | None:
    """Return the files with the weights of a folder or a hub id, or None if they are not within reach.

    Args:
        options: of transformers' cached_file. Files are downloaded unless `local_files_only` is set.

    Raises:
        WeightsError: the weights are incomplete.
    """
    if Path(name).is_dir():
        return weight_files(Path(name))
    for file in WEIGHTS:
        path = hub_file(name, file, **options)
        if path is not None and file.endswith(".json") and not options.get("local_files_only"):
            return weight_files(locate(name, "model", "a folder"))
        if path is not None:
            return weight_files(Path(path).parent)
    return None


def loaded_files(name: str, revision: str | None) -> tuple[Path, ...]:
    """Return the files whose tensors are those of a loaded model, adapters of a residual included."""
    weights = weights_of(name, local_files_only=True, revision=revision)
    if weights is None:
        return ()
    residual = weights.folder / RESIDUAL
    return (*weights.files, *([residual] if residual.exists() else []))


def hub_file(name: str, file: str, **options: Any) -> str | None:
    """Return the path of a file of a folder or a hub id, or None if there is no such file.

    Args:
        options: of transformers' cached_file. The file is downloaded unless `local_files_only` is set.

    Raises:
        ModelError: the hub id cannot be reached.
    """
    kinds = ("missing_entries", "connection_errors", "gated_repo")
    quietly = {f"_raise_exceptions_for_{kind}": False for kind in kinds}

    def failed(error: Exception) -> ModelError:
        return ModelError(f"model '{name}' is neither a folder nor a hub id within reach ({one_line(error, 120)})")

    return call(lambda: cached_file(name, file, **quietly, **options), failed)


def on_hub(name: str) -> bool:
    """Return whether a hub id has weights in a format that can be read here."""
    from huggingface_hub import list_repo_files

    return bool({*WEIGHTS} & {*call(lambda: list_repo_files(name), partial(unreadable, name))})


def no_weights(name: str) -> ModelError:
    """Return the error for a model without weights within reach."""
    return ModelError(
        f"model '{name}' has no weights within reach: expected {SAFETENSORS} or {PICKLE}, in a folder, on the hub or in"
        " its cache"
    )


def unreadable(name: str, error: Exception) -> ModelError:
    """Return the error for a model that transformers cannot load."""
    return ModelError(f"model '{name}' could not be loaded ({one_line(error, 140)})")
