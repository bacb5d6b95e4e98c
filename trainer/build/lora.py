"""Add low-rank adapters (LoRA, Hu et al. 2021) to the language model with peft, and merge them into plain weights."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from trainer.model_config import LoraConfig
from workbench.errors import ConfigError, UnknownNameError


def check_peft() -> None:
    """Check that peft is installed.

    Raises:
        ConfigError: peft is not installed.
    """
    if find_spec("peft") is None:
        raise ConfigError(
            "model.train is lora, which needs the package peft: install it with pip install 'viral-workbench[lora]'"
        )


def add_lora(model: PreTrainedModel, config: LoraConfig) -> None:
    """Add adapters to the language model in place; afterwards only they require a gradient.

    The model keeps its class and the paths of its modules (peft's wrapper class is not used).

    Raises:
        ConfigError: peft is not installed.
        UnknownNameError: no linear layer of the language model has the name of a target.
    """
    check_peft()
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    decoder: Any = model.get_decoder()
    decoder_path = next(name for name, module in model.named_modules() if module is decoder)
    linear = [f"{decoder_path}.{name}" for name, module in decoder.named_modules() if isinstance(module, nn.Linear)]
    for target in config.targets:
        if not any(name.split(".")[-1] == target for name in linear):
            raise UnknownNameError("model.lora.targets", target, {name.split(".")[-1] for name in linear})
    adapted = [name for name in linear if name.split(".")[-1] in config.targets]
    alpha: Any = config.alpha  # peft's annotation says int, but any number works
    adapter = PeftConfig(r=config.rank, lora_alpha=alpha, lora_dropout=config.dropout, target_modules=adapted)
    inject_adapter_in_model(adapter, model)


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """Return the layers that have an adapter, by name; an empty dictionary for a model without LoRA."""
    if find_spec("peft") is None:
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def merged_state(model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of `model` with its adapters merged: each adapted weight W becomes W + (alpha / rank) B A.

    The tensors have the names that they have in a model without LoRA. The model itself is not changed.

    Args:
        state: the tensors of `model`, adapters included.
    """
    state = dict(state)
    for name, layer in lora_layers(model).items():
        layer_tensors = {key: state.pop(key) for key in [key for key in state if key.startswith(f"{name}.")]}
        state |= {
            key.replace(f"{name}.base_layer.", f"{name}."): value
            for key, value in layer_tensors.items()
            if key.startswith(f"{name}.base_layer.")
        }
        lora_a, lora_b = (layer_tensors[f"{name}.lora_{factor}.default.weight"] for factor in "AB")
        delta = (lora_b @ lora_a) * layer.scaling["default"]
        # in float32, also where the frozen weight is stored in bfloat16
        merged = state[f"{name}.weight"].float() + delta.float()
        # move each merged matrix to the CPU at once: the training GPU may not have room for a second copy of all
        state[f"{name}.weight"] = merged.cpu()
    return state


def merge_lora(model: PreTrainedModel) -> None:
    """Merge each adapter into its layer, and replace the layer by a plain linear one, in place.

    A weight in bfloat16 is added up in float32 and then rounded once.
    """
    for name, layer in lora_layers(model).items():
        weight = layer.get_base_layer().weight
        stored = weight.dtype
        weight.data = weight.data.float()
        layer.merge()
        weight.data = weight.data.to(stored)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer.get_base_layer())
