"""A LLaVA of released parts: a CLIP or SigLIP tower, a new connector, and a causal language model with `<image>` as one more token.

As in LLaVA-1.5 the connector gets the output of the tower's last but one block, and an image goes into the middle of a square of its mean colour.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
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

from trainer.config import ModelConfig
from trainer.language import FLATTEN, IMAGE, grown
from workbench.convert.build import CHAT_TEMPLATE, SYSTEM
from workbench.errors import ConfigError
from workbench.mllm import MLLM
from workbench.mllm.base import family_of
from workbench.weights import CATALOGUE, weights_folder

TOWERS = ("clip_vision_model", "siglip_vision_model")
UNREACHABLE = (OSError, ValueError, KeyError)


def build_from_parts(config: ModelConfig) -> MLLM:
    """The model that `config` describes, in float32; its connector is drawn from the seed that is set.

    Raises:
        ConfigError: a part that cannot be loaded, or that is no tower or no language model of a kind that fits.
    """
    assert config.language is not None
    tower, image_processor = _tower(config.tower)
    language, tokenizer = _language(weights_folder(config.language) if config.language in CATALOGUE else config.language)
    vision, text = tower.config, language.config
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
    with torch.device("meta"):  # the frame only: every part that holds weights takes its place below
        llava = LlavaForConditionalGeneration(settings)
    llava.model.vision_tower, llava.model.language_model, llava.lm_head = tower, language.model, language.lm_head
    llava.model.multi_modal_projector = LlavaMultiModalProjector(llava.config)
    llava.config.text_config, llava.config.vision_config = text, vision
    llava.generation_config = language.generation_config
    llava.generation_config.eos_token_id = llava.generation_config.eos_token_id or tokenizer.eos_token_id
    square = {"height": vision.image_size, "width": vision.image_size}
    pixels = {"image_mean": image_processor.image_mean, "image_std": image_processor.image_std, "resample": image_processor.resample}
    processor = LlavaProcessor(
        LlavaImageProcessor(do_pad=True, size=square, do_center_crop=False, crop_size=square, **pixels),
        tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(with_class),
        chat_template=_template(tokenizer),
    )
    return MLLM(llava, processor, family_of(llava.config), f"{config.tower} + {config.language}")


def _tower(name: str) -> tuple[Any, Any]:
    try:
        config = AutoConfig.from_pretrained(name)
        vision = getattr(config, "vision_config", config)
        if vision.model_type not in TOWERS:
            raise ConfigError(f"model.tower is {name}, a {vision.model_type}: expected a CLIP or SigLIP tower")
        tower = _whole("tower", name, type(AutoModel.from_config(vision)))
        return tower, AutoImageProcessor.from_pretrained(name)
    except UNREACHABLE as error:
        raise ConfigError(f"model.tower is {name}, which could not be loaded ({_line(error)}): expected a hub id within reach or a folder") from error


def _language(name: Any) -> tuple[Any, Any]:
    """The language model with rows for the image token, the mean of all rows, where its vocabulary has none to spare; and its tokenizer."""
    try:
        model = _whole("language", name, AutoModelForCausalLM)
        tokenizer = AutoTokenizer.from_pretrained(name, extra_special_tokens={"image_token": IMAGE})
    except UNREACHABLE as error:
        raise ConfigError(f"model.language is {name}, which could not be loaded ({_line(error)}): expected a hub id within reach or a folder") from error
    if tokenizer.eos_token is None or not tokenizer.is_fast:
        raise ConfigError(f"model.language is {name}: expected a fast tokenizer with an end token")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token  # never learnt, whatever it is: labels come from the text
    old = model.config.vocab_size
    if len(tokenizer) > old:
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64, mean_resizing=False)
        with torch.no_grad():
            for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
                layer.weight.copy_(grown(layer.weight[:old], len(layer.weight)))
    return model, tokenizer


def _whole(part: str, name: Any, cls: Any) -> Any:
    """A part in float32, all of whose tensors are in its file; transformers would draw the missing ones at random and only warn."""
    model, report = cls.from_pretrained(name, dtype=torch.float32, use_safetensors=True, output_loading_info=True)
    if missing := sorted(report["missing_keys"]):
        raise ConfigError(f"model.{part} is {name}, which lacks {len(missing)} tensors of a {type(model).__name__}, first {missing[0]}")
    return model


def _template(tokenizer: Any) -> str:
    """The language model's own conversation, with the image on a line before the question; Vicuna's, where it has none."""
    if isinstance(tokenizer.chat_template, str):
        return FLATTEN + tokenizer.chat_template
    return CHAT_TEMPLATE.replace("SYSTEM", SYSTEM.format(user="user"))


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]
