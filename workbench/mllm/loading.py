"""Configurations, processors and checkpoints of hub ids and folders: read, and refused in one sentence where they are not whole or not safe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoProcessor, PretrainedConfig

from workbench.errors import ModelError

RECOMPUTED = ("position_ids", "inv_freq")  # buffers that old checkpoints carry and every model computes for itself


def load_config(name: str, **options: Any) -> PretrainedConfig:
    """The configuration of a hub id or a folder.

    Raises:
        ModelError: nothing of the kind there, or pickled weights beside it.
    """
    _check_folder(Path(name))
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise ModelError(f"model '{name}' brings code of its own: expected trust_remote_code, if you have read it and trust it") from error
        raise ModelError(f"model '{name}' is neither a folder nor a hub id within reach ({first_line(error)})") from error
    return config


def load_processor(name: str, **options: Any) -> Any:
    """The processor of a hub id or a folder.

    Raises:
        ModelError: it is not there, or lacks one of its parts.
    """
    try:
        processor = AutoProcessor.from_pretrained(name, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"model '{name}' has no processor that could be loaded ({first_line(error)})") from error
    if missing := [part for part in ("tokenizer", "image_processor") if not hasattr(processor, part)]:
        raise ModelError(f"model '{name}' has a {type(processor).__name__} without {missing[0]}: expected a processor of text and images")
    return processor


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        return
    if not (folder / "config.json").exists():
        raise ModelError(f"folder {folder} holds no model: expected a config.json and model.safetensors there")
    if not list(folder.glob("*.safetensors")) and list(folder.glob("*.bin")):
        raise ModelError(f"folder {folder} holds pickled weights (*.bin), which can run code when they are read: expected model.safetensors")


def check_complete(name: str, report: Any, *, strict: bool) -> None:
    """See that every tensor of the model came from the checkpoint, and every tensor of the checkpoint went into the model."""
    extra = [key for key in report["unexpected_keys"] if not key.endswith(RECOMPUTED)]
    for kind, keys in (("lacks", report["missing_keys"]), ("has other shapes for", report["mismatched_keys"]), ("has no place for", extra if strict else ())):
        if keys:
            names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in keys)
            whose = "the checkpoint" if kind != "has no place for" else "the model"
            raise ModelError(f"model '{name}' does not fit its checkpoint: {whose} {kind} {len(names)} tensors, first {', '.join(names[:3])}")


def first_line(error: BaseException) -> str:
    """What went wrong, short enough for a sentence."""
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
