"""A recipe's model on the meta device: every tensor has its shape and none has storage, so that one of 13B is looked at
in seconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration, PretrainedConfig

from trainer.alignment import Alignment, attach_alignment
from trainer.build.assembled_llava import check_parts, describe_parts
from trainer.build.second_encoder import pad_for_second_encoder
from trainer.recipe import ModelConfig, Recipe
from workbench.errors import ConfigError, one_line
from workbench.mllm import VisualTokens
from workbench.mllm.base import WeightlessMLLM
from workbench.mllm.family import family_of
from workbench.mllm.load import check_weights, generation_of, load_config
from workbench.mllm.processors import load_processor
from workbench.mllm.residual import Residual, attach_residual
from workbench.vfm import find_vfm
from workbench.weights.model_files import WeightFiles
from workbench.weights.pretrained import call, hub_options


def on_meta(cls: Any, config: PretrainedConfig) -> Any:
    """A transformers model without storage: `cls` is its class, or an auto class that finds it."""

    def failed(error: Exception) -> ConfigError:
        return ConfigError(
            f"a {type(config).__name__.removesuffix('Config')} cannot be made from this configuration"
            f" ({one_line(error)})"
        )

    with torch.device("meta"):
        model = call(lambda: cls.from_config(config) if hasattr(cls, "from_config") else cls(config), failed)
    model.config.architectures = [type(model).__name__]  # by which its family is known
    return model.float()


def outline(config: ModelConfig) -> WeightlessMLLM:
    """A pretrained or an assembled model from its configuration, and with its processor; its weights are looked at in
    `check_files`.

    Raises:
        ConfigError, ModelError: a configuration or a processor that is not there or of no kind that fits.
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
        # it names the tokens that end an answer
        model.generation_config = generation_of(name, **options) or model.generation_config
    return WeightlessMLLM(model, processor, family_of(model.config), name)


def check_files(config: ModelConfig) -> dict[str, WeightFiles | None]:
    """The files of the weights of a pretrained model, or of each part of an assembled one, by names and shapes of their
    tensors; None: still on the hub.

    Raises:
        WorkbenchError: they could not be loaded when training begins.
    """
    if config.name is None:
        return check_parts(config)
    settings = load_config(config.name, **hub_options(config.name, config.revision))
    return {"model": check_weights(AutoModelForImageTextToText, config.name, settings, revision=config.revision)}


@dataclass(frozen=True)
class Attached:
    """What `attach` put on a model and saw of its shapes.

    Attributes:
        widths: of what may be cached: `tower` for what the connector receives from it for one visual token, and each
            VFM.
        tower_values: numbers that the connector receives for the images of the sample.
        not_run: what meta could not run, with the reason.
    """

    alignment: Alignment | None
    residual: Residual | None
    widths: dict[str, int]
    tower_values: int
    not_run: tuple[str, ...]


@torch.no_grad()
def attach(
    recipe: Recipe,
    model: Any,
    vision: Mapping[str, Any],
    places: Sequence[VisualTokens],
    placeholders: int,
    length: int,
) -> Attached:
    """Put heads and residual on a model on meta and run tower, connector, language model and heads once each, so that
    every shape is seen to fit.

    They run one after another, since which positions hold the image is a matter of values, which meta tensors do not
    have. A vision encoder that asks for values itself is not run: the widths of its connector's matrices are compared
    instead.

    Args:
        vision: what the processor made of one sample's images.
        places: where their visual tokens are, in a sequence of `length` tokens, `placeholders` of which are the
            image's.

    Raises:
        ConfigError: an aligned layer that the model does not have, or a vision encoder that gives other tokens than the
            language model has places for.
    """
    settings, text, not_run = recipe.alignment, model.config.get_text_config(), []
    settings.check_layers(text.num_hidden_layers)
    family = family_of(model.config)
    connector, seen = model.model.get_submodule(family.projector), []
    second = find_vfm(recipe.model.second_encoder).dim if recipe.model.second_encoder is not None else 0

    def keep(_: nn.Module, args: tuple[Tensor]) -> Tensor | None:
        seen.append(args[0])
        return pad_for_second_encoder(connector, args[0]) if second else None

    handle = connector.register_forward_pre_hook(keep)
    inputs = {
        name: value.to("meta") if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in vision.items()
    }
    features: list[Tensor] = []

    def misfit(error: Exception) -> ConfigError:
        return ConfigError(
            f"an image of {placeholders} visual tokens does not fit through tower and connector ({one_line(error)})"
        )

    try:
        said = call(lambda: _run(lambda: features.extend(model.get_image_features(**inputs).pooler_output)), misfit)
    finally:
        handle.remove()
    if said is None:
        found = (sum(len(own) for own in features), features[0].shape[-1])
        width = seen[0].shape[-1] * family.rows_per_token(model.config)
    else:
        not_run.append(f"tower and connector, of which widths alone were compared ({said})")
        matrices = [module for module in connector.modules() if isinstance(module, nn.Linear)]
        found, width = (placeholders, matrices[-1].out_features), matrices[0].in_features - second
    if found != (placeholders, text.hidden_size):
        raise ConfigError(
            f"the vision encoder gives visual tokens {found}: expected {(placeholders, text.hidden_size)}"
        )
    widths = {"tower": width}
    dims = {"encoder": width, "projector": text.hidden_size}
    if settings.target == "vfm" and settings.aligned:
        widths |= {name: find_vfm(name, teacher_norm=settings.teacher_norm).dim for name in settings.vfm}
        dims |= widths
    if second:  # a target of the same name has the same features, unless its images are normalized otherwise
        name = str(recipe.model.second_encoder)
        widths[name if settings.teacher_norm == "own" else f"second encoder {name}"] = second
    names = settings.vfm if settings.target == "vfm" else (settings.target,)
    dims = {name: dims[name] for name in names} if settings.aligned else {}
    with torch.device("meta"):
        residual = (
            None
            if settings.residual == "none"
            else attach_residual(model, settings.residual, sorted(settings.layer), width)
        )
        alignment = None
        if settings.objective != "none":
            options: dict[str, Any] = {
                "objective": settings.objective,
                "heads": settings.heads,
                "where": settings.where,
                "hidden": settings.hidden,
            }
            alignment = attach_alignment(model, layers=settings.layer, dims=dims, **options)
    if residual is not None:
        not_run.append("language model and heads (a residual needs the whole model at once)")
    elif said := _run(lambda: _language(model, alignment, dims, places, length)):
        not_run.append(f"language model and heads ({said})")
    return Attached(alignment, residual, widths, seen[0].numel() if seen else width * placeholders, tuple(not_run))


def _language(
    model: Any, alignment: Alignment | None, dims: Mapping[str, int], places: Sequence[VisualTokens], length: int
) -> None:
    """One pass of the language model over a sequence, and one of the heads over its visual tokens."""
    decoder = model.get_decoder()
    decoder = getattr(decoder, "model", decoder)
    # a mask of its own would be looked at
    seen_by_all = torch.ones(1, 1, length, length, dtype=torch.bool, device="meta")
    decoder(
        inputs_embeds=torch.empty(1, length, model.config.get_text_config().hidden_size, device="meta"),
        attention_mask=seen_by_all,
        use_cache=False,
    )
    if alignment is not None:
        tokens = sum(len(part.index) for part in places)
        alignment.loss({name: torch.empty(tokens, dim, device="meta") for name, dim in dims.items()}, [places])


def _run(action: Callable[[], None]) -> str | None:
    """None once it has run; or why meta could not run it, where that is not the shapes' fault."""
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
