"""The trained model as a plain transformers folder, with what belongs to it beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig

from trainer.aligned_model import Aligned
from trainer.build.lora import lora_layers, merged_state
from workbench.errors import RunError
from workbench.files import HEAD_FILE
from workbench.mllm.residual import FILE as RESIDUAL_FILE
from workbench.mllm.residual import save_residual

# in a checkpoint of a LoRA run: what is trained, exactly; its model.safetensors is merged
LORA_FILE = "trained.safetensors"


def save_model(model: Aligned, processor: Any, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Write a plain transformers folder, LoRA merged, with the alignment heads and the residual's adapters beside it.

    Args:
        state: the model's tensors, gathered, where its own parameters are only this process's part of them.
    """
    for config in (model.config, *(getattr(model.config, key, None) for key in model.config.sub_configs)):
        if config is not None:
            config._name_or_path = ""  # where the weights were in this machine's cache is nobody else's business
    state = dict(model.state_dict() if state is None else state)
    names: dict[int, str] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        state[name] = state[names.setdefault(id(value), name)]  # tied tensors, gathered one by one, are one again
    base = part(state, "base.")
    if lora_layers(model.base):
        model.base.save_pretrained(folder, state_dict=merged_state(model.base, base))
        save_file({name: base[name].detach().contiguous() for name in _trained(model.base)}, folder / LORA_FILE)
    else:
        model.base.save_pretrained(folder, state_dict=base)
    processor.save_pretrained(folder)
    if _heads(model) is not None:
        assert model.alignment is not None
        save_file(
            part(state, "alignment.heads.0." if len(model.alignment.heads) == 1 else "alignment.heads."),
            folder / HEAD_FILE,
        )
    if model.residual is not None:
        save_residual(model.residual, folder, part(state, "residual.adapters."))


def part(state: Mapping[str, Tensor], below: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `below`, without it."""
    return {name.removeprefix(below): value for name, value in state.items() if name.startswith(below)}


def load_model(model: Aligned, folder: Path) -> None:
    """Put back, in place, what `save_model` wrote.

    Through from_pretrained: a folder has the hub's key layout, which a plain load with strict=False drops in silence.

    Raises:
        RunError: a folder with another architecture, or a LoRA folder with other tensors than the model trains.
    """
    found = (AutoConfig.from_pretrained(folder).architectures or ["nothing"])[0]
    if found != type(model.base).__name__:
        raise RunError(
            f"checkpoint {folder} holds {found}: expected {type(model.base).__name__}, the model of this recipe"
        )
    if lora_layers(model.base):
        _load_trained(model.base, load_file(folder / LORA_FILE))
    else:
        model.base.load_state_dict(type(model.base).from_pretrained(folder, dtype=torch.float32).state_dict())
    if (heads := _heads(model)) is not None:
        heads.load_state_dict(load_file(folder / HEAD_FILE))
    if model.residual is not None and len(model.residual.adapters):
        model.residual.adapters.load_state_dict(load_file(folder / RESIDUAL_FILE))


def _heads(model: Aligned) -> torch.nn.Module | None:
    """What HEAD_FILE holds: one head by itself (`0.weight`), several by number (`1.0.weight`), layer by layer, within a
    layer VFM by VFM."""
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
        raise RunError(
            f"the checkpoint holds other trained tensors than this recipe has, first {min(own.keys() ^ saved.keys())}"
        )
    for name, value in own.items():
        value.copy_(saved[name])
