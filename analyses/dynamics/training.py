"""Models of a training: its checkpoints, the model it started from, and their identity."""

from __future__ import annotations

from pathlib import Path

from analyses.dynamics.options import Config
from workbench.errors import RunError
from workbench.files import sha256
from workbench.mllm.residual import FILE as RESIDUAL_FILE
from workbench.models import did_you_mean
from workbench.training_folder import LOG_FILE, Checkpoint, checkpoints, training_log, training_record


def earlier_checkpoints(folder: Path) -> list[Checkpoint]:
    """Return the checkpoints from before the last step; the model at the last step is in the folder itself.

    Raises:
        RunError: the folder is not a finished training, or has no such checkpoints.
    """
    last = training_record(folder)["recipe"]["optim"]["steps"]
    earlier = [checkpoint for checkpoint in checkpoints(folder) if checkpoint.step < last]
    if not earlier:
        raise RunError(
            f"{folder} has no checkpoints from before its last step, {last}: expected folders checkpoint-STEP, which a"
            " recipe with keep_checkpoints: null keeps"
        )
    return earlier


def start_folder(folder: Path) -> Path | None:
    """Return the folder of the model that a training started from, or None if there is none.

    The recipe may name it relative to the folder in which the trainer was called, so all parent folders are tried.
    """
    start = training_record(folder)["recipe"].get("start")
    if not start:
        return None
    parents = [Path(), *folder.resolve().parents]
    return next((parent / start for parent in parents if (parent / start / "config.json").exists()), None)


def beside(config: Config, model: str) -> dict[str, str]:
    """Return the identity of the training log, of every checkpoint, and of the model that the training started from."""
    folder = Path(model)
    if not folder.is_dir():
        raise RunError(
            f"'{model}' is not a folder: expected the output_dir of a training, with its"
            f" checkpoints{did_you_mean(model)}"
        )
    steps = {f"step {checkpoint.step}": _identity(checkpoint.folder) for checkpoint in earlier_checkpoints(folder)}
    training_log(folder)  # raises if there is none
    start = start_folder(folder)
    return steps | {"log": sha256(folder / LOG_FILE), "start": "none" if start is None else _identity(start)}


MODEL_FILES = (
    "model*.safetensors*",
    RESIDUAL_FILE,
    "*config.json",
    "*.jinja",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*_tokens*.json",
)


def _identity(folder: Path) -> str:
    """Return the name and hash of every file that affects the answers: not the optimizer, alignment heads or log."""
    files = {file for pattern in MODEL_FILES for file in folder.glob(pattern)}
    return ", ".join(f"{file.name} {sha256(file)}" for file in sorted(files))
