"""What a checkpoint holds: a plain transformers folder, LoRA merged, with the heads, the residual's adapters and, for LoRA, the trained tensors beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig

from trainer.lora import adapters, merged_state
from trainer.model import Aligned
from workbench.errors import RunError
from workbench.files import HEAD_FILE
from workbench.mllm.residual import FILE as RESIDUAL_FILE
from workbench.mllm.residual import save_residual

LORA_FILE = "trained.safetensors"  # in a checkpoint of a LoRA run: what is trained, exactly; its model.safetensors is merged


def save_model(model: Aligned, processor: Any, folder: Path) -> None:
    """Write a plain transformers folder, LoRA merged, with the alignment heads and the residual's adapters beside it."""
    if adapters(model.student):
        model.student.save_pretrained(folder, state_dict=merged_state(model.student))
        save_file(_trained(model.student), folder / LORA_FILE)
    else:
        model.student.save_pretrained(folder)
    processor.save_pretrained(folder)
    if (heads := _heads(model)) is not None:
        save_file(heads.state_dict(), folder / HEAD_FILE)
    if model.residual is not None:
        save_residual(model.residual, folder)


def load_model(model: Aligned, folder: Path) -> None:
    """Put back, in place, what `save_model` wrote.

    Through from_pretrained: a folder has the hub's key layout, which a plain load with strict=False drops in silence.

    Raises:
        RunError: a folder with another architecture, or a LoRA folder with other tensors than the model trains.
    """
    found = (AutoConfig.from_pretrained(folder).architectures or ["nothing"])[0]
    if found != type(model.student).__name__:
        raise RunError(f"checkpoint {folder} holds {found}: expected {type(model.student).__name__}, the model of this recipe")
    if adapters(model.student):
        _load_trained(model.student, load_file(folder / LORA_FILE))
    else:
        model.student.load_state_dict(type(model.student).from_pretrained(folder, dtype=torch.float32).state_dict())
    if (heads := _heads(model)) is not None:
        heads.load_state_dict(load_file(folder / HEAD_FILE))
    if model.residual is not None and len(model.residual.adapters):
        model.residual.adapters.load_state_dict(load_file(folder / RESIDUAL_FILE))


def _heads(model: Aligned) -> torch.nn.Module | None:
    """What HEAD_FILE holds: one head by itself (`0.weight`), several by number (`1.0.weight`), layer by layer, within a layer VFM by VFM."""
    if model.alignment is None or not len(model.alignment.heads):
        return None
    return model.alignment.heads[0] if len(model.alignment.heads) == 1 else model.alignment.heads


def _trained(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}


def _load_trained(model: torch.nn.Module, saved: dict[str, Tensor]) -> None:
    """Put back what `_trained` gave; the rest is as the recipe builds it.

    Raises:
        RunError: other tensors than this recipe trains.
    """
    own = _trained(model)
    if own.keys() != saved.keys():
        raise RunError(f"the checkpoint holds other trained tensors than this recipe has, first {min(own.keys() ^ saved.keys())}")
    for name, value in own.items():
        value.copy_(saved[name])
