"""Which parameters of a model are trained, by part: vision encoder, connector, language model, LoRA."""

from __future__ import annotations

from typing import Any

from trainer.build.lora import add_lora
from trainer.recipe import ModelConfig
from workbench.mllm import MLLM
from workbench.mllm.family import family_of


def parts_of(model: Any) -> dict[str, str]:
    """Which part of a transformers model each parameter belongs to, by name: `tower`, `language`, or `connector` for
    all that is between them."""
    own = {id(p) for p in model.model.get_submodule(family_of(model.config).projector).parameters()}
    tower = {id(p) for p in model.get_encoder(modality="image").parameters()} - own
    language = {
        id(p)
        for module in (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
        for p in module.parameters()
    }
    return {
        name: "tower" if id(p) in tower else "language" if id(p) in language else "connector"
        for name, p in model.named_parameters()
    }


def choose_trained(mllm: MLLM, config: ModelConfig) -> dict[str, str]:
    """Let what the configuration trains require a gradient, nothing else; returns the part of each trained parameter by
    name."""
    parts = parts_of(mllm.model)
    trained = {
        "connector",
        *(["language"] if config.train == "all" else []),
        *(["tower"] if config.train_vision_encoder else []),
    }
    if config.train == "lora":
        add_lora(mllm.model, config.lora)
    for name, value in mllm.model.named_parameters():
        if name in parts:
            value.requires_grad_(parts[name] in trained)
    return {name: parts.get(name, "lora") for name, p in mllm.model.named_parameters() if p.requires_grad}


def checkpoint_activations(model: Any) -> None:
    """Let a transformers model compute its activations again in the backward pass; older versions call that by another
    name."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
