"""A LLaVA assembled from pretrained parts: a CLIP or SigLIP vision encoder, a new projector, and a causal language
model with `<image>` as one more token.

As in LLaVA-1.5 the connector gets the output of the vision encoder's last but one block, and an image goes into the
middle of a square of its mean color.
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

from trainer.build.language import FLATTEN, IMAGE, grown
from trainer.recipe import ModelConfig
from workbench.convert.build import CHAT_TEMPLATE, SYSTEM
from workbench.errors import ConfigError, ModelError, WeightsError, one_line
from workbench.mllm import MLLM
from workbench.mllm.family import family_of
from workbench.mllm.load import check_weights, load_config, load_model
from workbench.weights.catalogue import CATALOGUE
from workbench.weights.fetch import weights_folder
from workbench.weights.model_files import WeightFiles
from workbench.weights.pretrained import call, hub_options

IMAGE_AND_TEXT = ("clip", "siglip", "siglip2")
ENCODERS = ("clip_vision_model", "siglip_vision_model")
ROWS = 64  # a vocabulary that grows becomes a multiple of this


def describe_parts(config: ModelConfig) -> tuple[LlavaConfig, LlavaProcessor]:
    """Configuration and processor of the model that `config` describes; no weights are read.

    Raises:
        ConfigError: a part that is not there, or that is no vision encoder or no language model of a kind that fits.
    """
    vision, image_processor = _vision_encoder(config.vision_encoder, config.vision_encoder_revision)
    text, tokenizer = _language(config.language, config.language_revision)
    with_class = vision.model_type == "clip_vision_model"
    strategy: Literal["default", "full"] = "default" if with_class else "full"
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
        num_additional_image_tokens=int(with_class),
        chat_template=_template(tokenizer),
    )
    return settings, processor


def build_from_parts(config: ModelConfig) -> MLLM:
    """The model that `config` describes, in float32; its connector is drawn from the seed that is set.

    Raises:
        ConfigError: see `describe_parts`; or a part whose weights cannot be loaded.
    """
    settings, processor = describe_parts(config)
    with torch.device("meta"):  # the frame only: every part that holds weights takes its place below
        llava = LlavaForConditionalGeneration(settings)
    encoder = _whole(
        "vision_encoder", config.vision_encoder, type(llava.model.vision_tower), config.vision_encoder_revision
    )
    language = _whole("language", _source(config.language), AutoModelForCausalLM, config.language_revision)
    _grow(language, settings.get_text_config().vocab_size)
    llava.model.vision_tower, llava.model.language_model, llava.lm_head = encoder, language.model, language.lm_head
    llava.model.multi_modal_projector = LlavaMultiModalProjector(llava.config)
    llava.config.text_config, llava.config.vision_config = language.config, encoder.config
    llava.generation_config = language.generation_config
    llava.generation_config.eos_token_id = llava.generation_config.eos_token_id or processor.tokenizer.eos_token_id
    return MLLM(llava, processor, family_of(llava.config), f"{config.vision_encoder} + {config.language}")


def check_parts(config: ModelConfig) -> dict[str, WeightFiles | None]:
    """The files of each part's weights, whose tensors fit by their names and shapes; None where they are still to be
    fetched from the hub.

    Raises:
        ConfigError: `build_from_parts` could not load a part.
    """
    classes = {
        "vision_encoder": (config.vision_encoder, config.vision_encoder_revision, None),
        "language": (_source(config.language), config.language_revision, AutoModelForCausalLM),
    }
    found = {}
    for part, (name, revision, auto) in classes.items():
        with _named(part):
            settings = _settings(name, revision)
            found[part] = check_weights(
                auto or _encoder_class(settings), str(name), settings, strict=False, revision=revision
            )
    return found


@contextmanager
def _named(part: str) -> Iterator[None]:
    """Say which part of the model an error is about."""
    try:
        yield
    except (ModelError, WeightsError) as error:
        raise ConfigError(f"model.{part}: {error}") from error


def _settings(name: Any, revision: str | None) -> Any:
    """A part's configuration; of a CLIP or SigLIP of image and text, that of its vision encoder."""
    config = load_config(str(name), **hub_options(name, revision))
    return config.vision_config if config.model_type in IMAGE_AND_TEXT else config


def _encoder_class(settings: Any) -> Any:
    return AutoModel._model_mapping[type(settings)]  # type: ignore[attr-defined]


def _vision_encoder(name: str, revision: str | None) -> tuple[Any, Any]:
    """The vision encoder's configuration, and the image processor that belongs to it."""
    with _named("vision_encoder"):
        vision = _settings(name, revision)
        pixels = call(
            lambda: AutoImageProcessor.from_pretrained(name, **hub_options(name, revision)),
            partial(_lacks, name, "image processor"),
        )
    if vision.model_type not in ENCODERS:
        raise ConfigError(
            f"model.vision_encoder is {name}, a {vision.model_type}: expected a CLIP or SigLIP vision encoder"
        )
    return vision, pixels


def _language(name: str | None, revision: str | None) -> tuple[Any, Any]:
    """The language model's configuration, with rows for the image token where its vocabulary has none to spare; and its
    tokenizer."""
    where = _source(name)
    with _named("language"):
        config, special = _settings(where, revision), {"image_token": IMAGE}
        read = partial(
            AutoTokenizer.from_pretrained, where, extra_special_tokens=special, **hub_options(where, revision)
        )
        tokenizer = call(read, partial(_lacks, where, "tokenizer"))
    if not any(architecture.endswith("ForCausalLM") for architecture in config.architectures or ()):
        raise ConfigError(f"model.language is {name}, a {config.model_type}: expected a causal language model")
    if tokenizer.eos_token is None or not tokenizer.is_fast:
        raise ConfigError(f"model.language is {name}: expected a fast tokenizer with an end token")
    if tokenizer.pad_token is None:
        # never learnt, whatever it is: labels come from the text
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if len(tokenizer) > config.vocab_size:
        config.vocab_size = -(-len(tokenizer) // ROWS) * ROWS
    return config, tokenizer


def _source(name: str | None) -> Any:
    """Where the language model is: a folder of the catalogue, or what transformers finds by name."""
    return weights_folder(name) if name is not None and name in CATALOGUE else name


def _grow(language: Any, count: int) -> None:
    """Give the language model `count` rows; the new ones are the mean of the old."""
    old = language.config.vocab_size
    if count > old:
        language.resize_token_embeddings(count, mean_resizing=False)
        with torch.no_grad():
            for layer in (language.get_input_embeddings(), language.get_output_embeddings()):
                layer.weight.copy_(grown(layer.weight[:old], count))


def _whole(part: str, name: Any, auto: Any, revision: str | None) -> Any:
    """A part in float32, all of whose tensors are in its files; transformers would draw the missing ones at random and
    only warn."""
    with _named(part):
        return load_model(
            auto, str(name), _settings(name, revision), strict=False, dtype=torch.float32, **hub_options(name, revision)
        )


def _template(tokenizer: Any) -> str:
    """The language model's own conversation, with the image on a line before the question; Vicuna's, where it has
    none."""
    if isinstance(tokenizer.chat_template, str):
        return FLATTEN + tokenizer.chat_template
    return CHAT_TEMPLATE.replace("SYSTEM", SYSTEM.format(user="user"))


def _lacks(name: object, what: str, error: Exception) -> ModelError:
    return ModelError(
        f"model '{name}' has no {what} that could be loaded ({one_line(error, 140)}): expected its files beside the"
        " weights"
    )
