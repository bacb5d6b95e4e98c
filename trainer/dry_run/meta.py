"""A recipe's model on torch's meta device: tensors have shapes but no storage, so a 13B model is checked in seconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration, PretrainedConfig

from trainer.alignment import Alignment, attach
from trainer.build.assembled_llava import check_parts, describe_parts
from trainer.build.second_encoder import pad_for_second_encoder
from trainer.head_choice import candidates
from trainer.masking import attach_mask
from trainer.model_config import ModelConfig
from trainer.recipe import Recipe
from workbench.errors import ConfigError, one_line
from workbench.mllm import VisualTokens
from workbench.mllm.base import WeightlessMLLM
from workbench.mllm.family import family_of
from workbench.mllm.generation import generation_of
from workbench.mllm.load import check_weights, load_config
from workbench.mllm.processors import load_processor
from workbench.mllm.residual import Residual, attach_residual
from workbench.vfm import find_vfm
from workbench.weights.model_files import WeightFiles
from workbench.weights.pretrained import call, hub_options


def on_meta(cls: Any, config: PretrainedConfig) -> Any:
    """Build a transformers model without storage; `cls` is its class, or an auto class that finds it.

    Raises:
        ConfigError: transformers cannot build a model from this configuration.
    """

    def failed(error: Exception) -> ConfigError:
        return ConfigError(
            f"a {type(config).__name__.removesuffix('Config')} cannot be made from this configuration"
            f" ({one_line(error)})"
        )

    with torch.device("meta"):
        model = call(lambda: cls.from_config(config) if hasattr(cls, "from_config") else cls(config), failed)
    model.config.architectures = [type(model).__name__]  # `family_of` needs it
    return model.float()


def outline(config: ModelConfig) -> WeightlessMLLM:
    """Build a pretrained or an assembled model from its configuration, without weights, and load its processor.

    The files of its weights are checked by `check_files`.

    Raises:
        ConfigError, ModelError: the configuration or the processor does not exist, or is not of a supported kind.
    """
    settings: PretrainedConfig
    if config.name is None:
        settings, processor = describe_parts(config)
        model, name = on_meta(LlavaForConditionalGeneration, settings), f"{config.vision_encoder} + {config.language}"
    else:
        name, options = config.name, hub_options(config.name, config.revision)
        settings = load_config(name, **options)
        processor = load_processor(name, family_of(settings), settings, **options)
        model = on_meta(AutoModelForImageTextToText, settings)
        # the generation config names the tokens that end an answer
        model.generation_config = generation_of(name, **options) or model.generation_config
    return WeightlessMLLM(model, processor, family_of(model.config), name)


def check_files(config: ModelConfig) -> dict[str, WeightFiles | None]:
    """Check the weight files of a pretrained model, or of each part of an assembled one, without loading them.

    Names and shapes of the tensors are compared with the configuration.

    Returns:
        The files of each part; None where they are still on the hub.

    Raises:
        WorkbenchError: the files could not be loaded when training begins.
    """
    if config.name is None:
        return check_parts(config)
    settings = load_config(config.name, **hub_options(config.name, config.revision))
    return {"model": check_weights(AutoModelForImageTextToText, config.name, settings, revision=config.revision)}


@dataclass(frozen=True)
class Attached:
    """What `attach_on_meta` added to a model, and the shapes that it found.

    Attributes:
        alignment: the alignment heads, if any.
        residual: the residual, if any.
        widths: number of values for each visual token of features that may be cached: `tower` for those that the
            projector receives from the vision encoder, and each VFM by its name.
        projector_values: number of values that the projector receives for all images of the sample.
        not_run: the parts that could not run on the meta device, with the reason.
    """

    alignment: Alignment | None
    residual: Residual | None
    widths: dict[str, int]
    projector_values: int
    not_run: tuple[str, ...]


@torch.no_grad()
def attach_on_meta(
    recipe: Recipe,
    model: Any,
    vision: Mapping[str, Any],
    visual: Sequence[VisualTokens],
    placeholders: int,
    length: int,
) -> Attached:
    """Attach heads and residual to a model on meta, and run every part of it once to check that all shapes fit.

    Vision encoder with projector, language model, and heads run one after another, because combining them needs the
    values of the input ids, which meta tensors do not have. A vision encoder that itself needs values is not run; the
    widths of the projector's matrices are compared instead.

    Args:
        recipe: of the run.
        model: the transformers model on meta.
        vision: the processor's tensors for the images of one sample.
        visual: the visual tokens of these images.
        placeholders: number of positions that the images take in the sequence.
        length: of the sequence, in tokens.

    Raises:
        ConfigError: the model does not have an aligned layer, or vision encoder and projector return another number or
            width of visual tokens than the language model takes.
    """
    settings, text, not_run = recipe.alignment, model.config.get_text_config(), []
    settings.check_layers(text.num_hidden_layers)
    family = family_of(model.config)
    projector, projector_inputs = model.model.get_submodule(family.projector), []
    second_width = find_vfm(recipe.model.second_encoder).dim if recipe.model.second_encoder is not None else 0

    def record_input(_: nn.Module, args: tuple[Tensor]) -> Tensor | None:
        projector_inputs.append(args[0])
        return pad_for_second_encoder(projector, args[0]) if second_width else None

    handle = projector.register_forward_pre_hook(record_input)
    inputs = {
        name: value.to("meta") if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in vision.items()
    }
    features: list[Tensor] = []

    def misfit(error: Exception) -> ConfigError:
        return ConfigError(
            f"an image of {placeholders} visual tokens does not fit through vision encoder and projector"
            f" ({one_line(error)})"
        )

    try:
        reason = call(lambda: _run(lambda: features.extend(model.get_image_features(**inputs).pooler_output)), misfit)
    finally:
        handle.remove()
    if reason is None:
        shape = (sum(len(tokens) for tokens in features), features[0].shape[-1])
        width = projector_inputs[0].shape[-1] * family.rows_per_token(model.config)
    else:
        not_run.append(f"vision encoder and projector, only their widths were compared ({reason})")
        matrices = [module for module in projector.modules() if isinstance(module, nn.Linear)]
        shape, width = (placeholders, matrices[-1].out_features), matrices[0].in_features - second_width
    if shape != (placeholders, text.hidden_size):
        raise ConfigError(
            f"vision encoder and projector return {shape[0]} visual tokens of width {shape[1]}: expected"
            f" {placeholders} of width {text.hidden_size}, which the language model takes"
        )
    widths = {"tower": width}
    dims = {"encoder": width, "projector": text.hidden_size}
    if settings.target == "vfm" and settings.aligned:
        widths |= {name: find_vfm(name, teacher_norm=settings.teacher_norm).dim for name in settings.vfm}
        dims |= widths
    if second_width:  # its features are cached once if it is also the target, unless the target has other normalization
        name = str(recipe.model.second_encoder)
        widths[name if settings.teacher_norm == "own" else f"second encoder {name}"] = second_width
    names = settings.vfm if settings.target == "vfm" else (settings.target,)
    dims = {name: dims[name] for name in names} if settings.aligned else {}
    with torch.device("meta"):
        residual = (
            None
            if settings.residual == "none"
            else attach_residual(model, settings.residual, sorted(settings.layer), width)
        )
        # which heads will be chosen depends on the weights, but not the sizes
        chosen = candidates(model, settings)[: settings.selection.heads] if settings.chooses_heads else None
        alignment = attach(model, settings, dims, chosen)
        if settings.mask:
            attach_mask(model, settings.mask)
    if residual is not None:
        not_run.append("language model and heads (a residual needs the whole model at once)")
    elif reason := _run(lambda: _run_language_model(model, alignment, dims, visual, length)):
        not_run.append(f"language model and heads ({reason})")
    values = projector_inputs[0].numel() if projector_inputs else width * placeholders
    return Attached(alignment, residual, widths, values, tuple(not_run))


def _run_language_model(
    model: Any, alignment: Alignment | None, dims: Mapping[str, int], visual: Sequence[VisualTokens], length: int
) -> None:
    """Run the language model once on a sequence, and the heads on its visual tokens."""
    decoder = model.get_decoder()
    decoder = getattr(decoder, "model", decoder)
    # without a mask transformers would make one, for which it reads values
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device="meta")
    decoder(
        inputs_embeds=torch.empty(1, length, model.config.get_text_config().hidden_size, device="meta"),
        attention_mask=mask,
        use_cache=False,
    )
    if alignment is not None:
        tokens = sum(len(part.index) for part in visual)
        alignment.loss({name: torch.empty(tokens, dim, device="meta") for name, dim in dims.items()}, [visual])


def _run(action: Callable[[], None]) -> str | None:
    """Run an action; return None, or the reason if the meta device cannot run it.

    Raises:
        RuntimeError: any other error, such as shapes that do not fit.
    """
    try:
        action()
    except RuntimeError as error:
        if (
            not isinstance(error, NotImplementedError)
            and "on device meta" not in str(error)
            and "device cpu" not in str(error)
        ):
            raise
        return _line(error).split(". ")[0]
    return None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:120]
