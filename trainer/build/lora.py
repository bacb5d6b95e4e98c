"""Low-rank adapters (LoRA, Hu et al. 2021) on the language model, through peft, and plain weights again out of them."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from trainer.recipe import LoraConfig
from workbench.errors import ConfigError, UnknownNameError


def check_peft() -> None:
    """See that peft is installed."""
    if find_spec("peft") is None:
        raise ConfigError(
            "model.train is lora: expected the package peft, which pip install 'viral-workbench[lora]' brings"
        )


def add_lora(model: PreTrainedModel, config: LoraConfig) -> None:
    """Put adapters into the language model, in place; only they require a gradient then, and the class and its paths
    stay what they were.

    Raises:
        ConfigError: peft is not installed.
        UnknownNameError: a target that no linear layer of the language model is called.
    """
    check_peft()
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    decoder: Any = model.get_decoder()
    below = next(name for name, part in model.named_modules() if part is decoder)
    linear = [f"{below}.{name}" for name, part in decoder.named_modules() if isinstance(part, nn.Linear)]
    for target in config.targets:
        if not any(name.split(".")[-1] == target for name in linear):
            raise UnknownNameError("model.lora.targets", target, {name.split(".")[-1] for name in linear})
    chosen = [name for name in linear if name.split(".")[-1] in config.targets]
    # peft's annotation says int; any number works
    alpha: Any = config.alpha
    adapter = PeftConfig(r=config.rank, lora_alpha=alpha, lora_dropout=config.dropout, target_modules=chosen)
    inject_adapter_in_model(adapter, model)


def adapters(model: nn.Module) -> dict[str, Any]:
    """The layers that have an adapter, by name; none for a model without LoRA."""
    if find_spec("peft") is None:
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: part for name, part in model.named_modules() if isinstance(part, BaseTunerLayer)}


def merged_state(model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `model`, whose `state` is given, as if it had never had adapters: W + (alpha / rank) B A where it
    has one."""
    state = dict(state)
    for name, layer in adapters(model).items():
        own = {key: state.pop(key) for key in [key for key in state if key.startswith(f"{name}.")]}
        state |= {
            key.replace(f"{name}.base_layer.", f"{name}."): value
            for key, value in own.items()
            if key.startswith(f"{name}.base_layer.")
        }
        delta = (own[f"{name}.lora_B.default.weight"] @ own[f"{name}.lora_A.default.weight"]) * layer.scaling["default"]
        merged = state[f"{name}.weight"] + delta.to(state[f"{name}.weight"])
        # one matrix at a time: a GPU that trains the model may have no room for it twice
        state[f"{name}.weight"] = merged.cpu()
    return state


def merge(model: PreTrainedModel) -> None:
    """Put plain linear layers in the adapters' place, in place."""
    for name, layer in adapters(model).items():
        layer.merge()
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer.get_base_layer())
