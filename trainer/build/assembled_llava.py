"""Assemble a LLaVA from a pretrained CLIP or SigLIP vision encoder, a new projector and a pretrained language model.

The language model's vocabulary gets `<image>` as one more token. As in LLaVA-1.5, the projector receives the output of
the vision encoder's second-to-last block, and an image that is not square is padded to a centered square with its mean
color.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.llava.image_processing_llava import LlavaImageProcessor
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from trainer.build.language import FLATTEN_CONTENT, IMAGE, append_mean_rows
from trainer.model_config import ModelConfig
from workbench.convert.build import CHAT_TEMPLATE, SYSTEM
from workbench.errors import ConfigError, ModelError, WeightsError, one_line
from workbench.mllm import MLLM
from workbench.mllm.family import family_of
from workbench.mllm.load import check_weights, load_config, load_model
from workbench.weights.catalogue import CATALOGUE
from workbench.weights.fetch import weights_folder
from workbench.weights.model_files import WeightFiles
from workbench.weights.pretrained import call, hub_options

IMAGE_AND_TEXT = ("clip", "siglip", "siglip2")  # models of which only the vision encoder is used
ENCODERS = ("clip_vision_model", "siglip_vision_model")
VOCAB_MULTIPLE = 64  # a vocabulary that has to grow is padded to a multiple of this


def describe_parts(config: ModelConfig) -> tuple[LlavaConfig, LlavaProcessor]:
    """Return the configuration and the processor of the model that `config` describes, without reading any weights.

    Raises:
        ConfigError: a part cannot be found, or is not a vision encoder or language model that can be used here.
    """
    vision, image_processor = _load_vision_config(config.vision_encoder, config.vision_encoder_revision)
    text, tokenizer = _load_language_config(config.language, config.language_revision)
    has_class_token = vision.model_type == "clip_vision_model"
    strategy: Literal["default", "full"] = "default" if has_class_token else "full"
    settings = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    settings.architectures = ["LlavaForConditionalGeneration"]
    square = {"height": vision.image_size, "width": vision.image_size}
    pixels = {
        "image_mean": image_processor.image_mean,
        "image_std": image_processor.image_std,
        "resample": image_processor.resample,
    }
    processor = LlavaProcessor(
        LlavaImageProcessor(do_pad=True, size=square, do_center_crop=False, crop_size=square, **pixels),
        tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(has_class_token),
        chat_template=_chat_template(tokenizer),
    )
    return settings, processor


def build_from_parts(config: ModelConfig) -> MLLM:
    """Build the model that `config` describes, in float32; its projector is drawn from torch's current random state.

    Raises:
        ConfigError: see `describe_parts`; or the weights of a part cannot be loaded.
    """
    settings, processor = describe_parts(config)
    with torch.device("meta"):  # structure only: each part that holds weights is put in below
        llava = LlavaForConditionalGeneration(settings)
    encoder = _load_part(
        "vision_encoder", config.vision_encoder, type(llava.model.vision_tower), config.vision_encoder_revision
    )
    language = _load_part("language", _language_source(config.language), AutoModelForCausalLM, config.language_revision)
    _extend_vocabulary(language, settings.get_text_config().vocab_size)
    llava.model.vision_tower, llava.model.language_model, llava.lm_head = encoder, language.model, language.lm_head
    llava.model.multi_modal_projector = LlavaMultiModalProjector(llava.config)
    llava.config.text_config, llava.config.vision_config = language.config, encoder.config
    llava.generation_config = language.generation_config
    llava.generation_config.eos_token_id = llava.generation_config.eos_token_id or processor.tokenizer.eos_token_id
    return MLLM(llava, processor, family_of(llava.config), f"{config.vision_encoder} + {config.language}")


def check_parts(config: ModelConfig) -> dict[str, WeightFiles | None]:
    """Check that each part's weights fit by tensor names and shapes, and return their files.

    Returns:
        The weight files of each part; None for a part that has yet to be downloaded from the hub.

    Raises:
        ConfigError: `build_from_parts` could not load a part.
    """
    classes = {
        "vision_encoder": (config.vision_encoder, config.vision_encoder_revision, None),
        "language": (_language_source(config.language), config.language_revision, AutoModelForCausalLM),
    }
    weight_files = {}
    for part, (name, revision, auto) in classes.items():
        with _name_part_in_errors(part):
            settings = _load_part_config(name, revision)
            weight_files[part] = check_weights(
                auto or _encoder_class(settings), str(name), settings, strict=False, revision=revision
            )
    return weight_files


@contextmanager
def _name_part_in_errors(part: str) -> Iterator[None]:
    """Prefix errors with the recipe key of the part they are about."""
    try:
        yield
    except (ModelError, WeightsError) as error:
        raise ConfigError(f"model.{part}: {error}") from error


def _load_part_config(name: Any, revision: str | None) -> Any:
    """Return the configuration of a part; for a CLIP or SigLIP with a text encoder, only that of its vision encoder."""
    config = load_config(str(name), **hub_options(name, revision))
    return config.vision_config if config.model_type in IMAGE_AND_TEXT else config


def _encoder_class(settings: Any) -> Any:
    return AutoModel._model_mapping[type(settings)]  # type: ignore[attr-defined]


def _load_vision_config(name: str, revision: str | None) -> tuple[Any, Any]:
    """Return the vision encoder's configuration and image processor."""
    with _name_part_in_errors("vision_encoder"):
        vision = _load_part_config(name, revision)
        image_processor = call(
            lambda: AutoImageProcessor.from_pretrained(name, **hub_options(name, revision)),
            partial(_missing_file_error, name, "image processor"),
        )
    if vision.model_type not in ENCODERS:
        raise ConfigError(
            f"model.vision_encoder is {name}, a {vision.model_type}: expected a CLIP or SigLIP vision encoder"
        )
    return vision, image_processor


def _load_language_config(name: str | None, revision: str | None) -> tuple[Any, Any]:
    """Return the language model's configuration and its tokenizer, to which the image token is added.

    Where the vocabulary has no spare row for the image token, the configuration has a larger one.
    """
    source = _language_source(name)
    with _name_part_in_errors("language"):
        config, special = _load_part_config(source, revision), {"image_token": IMAGE}
        load_tokenizer = partial(
            AutoTokenizer.from_pretrained, source, extra_special_tokens=special, **hub_options(source, revision)
        )
        tokenizer = call(load_tokenizer, partial(_missing_file_error, source, "tokenizer"))
    if not any(architecture.endswith("ForCausalLM") for architecture in config.architectures or ()):
        raise ConfigError(f"model.language is {name}, a {config.model_type}: expected a causal language model")
    if tokenizer.eos_token is None or not tokenizer.is_fast:
        raise ConfigError(f"model.language is {name}: expected a fast tokenizer with an end-of-sequence token")
    if tokenizer.pad_token is None:
        # any token will do: padding is never a label, since labels are made from the text
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if len(tokenizer) > config.vocab_size:
        config.vocab_size = -(-len(tokenizer) // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    return config, tokenizer


def _language_source(name: str | None) -> Any:
    """Return the folder of a language model in the weights catalogue; any other name as it is, for transformers."""
    return weights_folder(name) if name is not None and name in CATALOGUE else name


def _extend_vocabulary(language: Any, vocab_size: int) -> None:
    """Extend input and output embeddings to `vocab_size` rows; each new row is the mean of the old ones."""
    old_size = language.config.vocab_size
    if vocab_size > old_size:
        language.resize_token_embeddings(vocab_size, mean_resizing=False)
        with torch.no_grad():
            for layer in (language.get_input_embeddings(), language.get_output_embeddings()):
                layer.weight.copy_(append_mean_rows(layer.weight[:old_size], vocab_size))


def _load_part(part: str, name: Any, auto: Any, revision: str | None) -> Any:
    """Load a part in float32, and fail if its files lack a tensor (transformers would only warn and draw it at random).

    Raises:
        ConfigError: the part cannot be loaded, or its files lack a tensor.
    """
    with _name_part_in_errors(part):
        settings = _load_part_config(name, revision)
        return load_model(auto, str(name), settings, strict=False, dtype=torch.float32, **hub_options(name, revision))


def _chat_template(tokenizer: Any) -> str:
    """Return the language model's own chat template, with the image on a line before the question, or else Vicuna's."""
    if isinstance(tokenizer.chat_template, str):
        return FLATTEN_CONTENT + tokenizer.chat_template
    return CHAT_TEMPLATE.replace("SYSTEM", SYSTEM.format(user="user"))


def _missing_file_error(name: object, what: str, error: Exception) -> ModelError:
    return ModelError(
        f"the {what} of model '{name}' cannot be loaded ({one_line(error, 140)}): expected its files beside the weights"
    )
