"""Choose which parameters of a model are trained, by part: vision encoder, projector, language model, LoRA.

Stored records call the vision encoder `tower` and the projector `connector`.
"""

from __future__ import annotations

from typing import Any

from trainer.build.lora import add_lora
from trainer.model_config import ModelConfig
from workbench.mllm import MLLM
from workbench.mllm.family import family_of


def parts_of(model: Any) -> dict[str, str]:
    """Return the part of a transformers model that each of its parameters belongs to, by the parameter's name.

    The parts are `tower` (vision encoder), `language` (with the input and output embeddings), and `connector`
    (projector, and everything else that is in neither of the two).
    """
    projector = {id(p) for p in model.model.get_submodule(family_of(model.config).projector).parameters()}
    # some families have the projector inside the vision encoder
    vision_encoder = {id(p) for p in model.get_encoder(modality="image").parameters()} - projector
    language = {
        id(p)
        for module in (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
        for p in module.parameters()
    }
    return {
        name: "tower" if id(p) in vision_encoder else "language" if id(p) in language else "connector"
        for name, p in model.named_parameters()
    }


def choose_trained(mllm: MLLM, config: ModelConfig) -> dict[str, str]:
    """Let exactly the parameters that `config` trains require a gradient; add LoRA if `config` asks for it.

    Returns:
        The part of each trained parameter, by the parameter's name; see `parts_of`, with `lora` for adapters.
    """
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


def checkpoint_activations(model: Any, *, reentrant: bool = False) -> None:
    """Make a transformers model recompute its activations in the backward pass, which saves memory.

    Args:
        reentrant: of torch's checkpoint function.
    """
    # the method's name depends on the version of transformers
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
