"""Write the trained model as a plain transformers folder, with alignment heads and residual in files of their own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig

from trainer.aligned_model import Aligned
from trainer.build.frozen_precision import in_float32
from trainer.build.lora import lora_layers, merged_state
from workbench.errors import RunError
from workbench.files import HEAD_FILE
from workbench.mllm.residual import FILE as RESIDUAL_FILE
from workbench.mllm.residual import save_residual

# in checkpoints of a LoRA run: the trained tensors as they are (model.safetensors has them merged, which rounds)
LORA_FILE = "trained.safetensors"


def save_model(model: Aligned, processor: Any, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Write a plain transformers folder with LoRA merged, and the alignment heads and residual adapters beside it.

    Args:
        state: all tensors of the model. Needed for a sharded model, whose own parameters are only this rank's shards.
    """
    for config in (model.config, *(getattr(model.config, key, None) for key in model.config.sub_configs)):
        if config is not None:
            config._name_or_path = ""  # a path in the cache of this machine means nothing elsewhere
    state = dict(model.state_dict() if state is None else state)
    first_names: dict[int, str] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        # gathering makes copies of tied tensors; make them one tensor again
        state[name] = state[first_names.setdefault(id(value), name)]
    base = in_float32(tensors_below(state, "base."))
    if lora_layers(model.base):
        model.base.save_pretrained(folder, state_dict=merged_state(model.base, base))
        save_file({name: base[name].detach().contiguous() for name in _trained(model.base)}, folder / LORA_FILE)
    else:
        model.base.save_pretrained(folder, state_dict=base)
    processor.save_pretrained(folder)
    if _stored_heads(model) is not None:
        assert model.alignment is not None
        prefix = "alignment.heads.0." if len(model.alignment.heads) == 1 else "alignment.heads."
        save_file(tensors_below(state, prefix), folder / HEAD_FILE)
    if model.residual is not None:
        save_residual(model.residual, folder, tensors_below(state, "residual.adapters."))


def tensors_below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `prefix`, by their names without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def load_model(model: Aligned, folder: Path) -> None:
    """Load what `save_model` wrote into `model`, in place.

    The tensors are read with from_pretrained, since transformers stores them under other names than those in memory,
    and a plain load with strict=False would silently skip them.

    Raises:
        RunError: the folder holds another architecture, or its trained tensors are not those that this recipe trains.
    """
    architecture = (AutoConfig.from_pretrained(folder).architectures or ["nothing"])[0]
    if architecture != type(model.base).__name__:
        raise RunError(
            f"checkpoint {folder} holds {architecture}: expected {type(model.base).__name__}, the model of this recipe"
        )
    if lora_layers(model.base):
        _load_trained(model.base, load_file(folder / LORA_FILE))
    else:
        model.base.load_state_dict(type(model.base).from_pretrained(folder, dtype=torch.float32).state_dict())
    if (heads := _stored_heads(model)) is not None:
        heads.load_state_dict(load_file(folder / HEAD_FILE))
    if model.residual is not None and len(model.residual.adapters):
        model.residual.adapters.load_state_dict(load_file(folder / RESIDUAL_FILE))


def _stored_heads(model: Aligned) -> torch.nn.Module | None:
    """Return the module whose tensors HEAD_FILE holds; None if there are no heads.

    A single head is stored by itself (`0.weight`), several by number (`1.0.weight`): layer by layer, and within a layer
    VFM by VFM.
    """
    if model.alignment is None or not len(model.alignment.heads):
        return None
    return model.alignment.heads[0] if len(model.alignment.heads) == 1 else model.alignment.heads


def _trained(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}


def _load_trained(model: torch.nn.Module, saved: dict[str, Tensor]) -> None:
    """Load the trained tensors of a LoRA run; all others are what the recipe builds.

    Raises:
        RunError: the stored tensors are not those that this recipe trains.
    """
    trained = _trained(model)
    if trained.keys() != saved.keys():
        raise RunError(
            f"tensor '{min(trained.keys() ^ saved.keys())}' is trained by this recipe or stored in the checkpoint, but"
            " not both: expected a checkpoint with the tensors that this recipe trains"
        )
    for name, value in trained.items():
        value.copy_(saved[name])
