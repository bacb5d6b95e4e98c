"""Build the toy LLaVA: a frozen pretrained vision encoder, a new projector and a small language model.

The language model is randomly initialized (a Qwen3 of a few layers) or pretrained.
"""

from __future__ import annotations

from copy import copy
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from trainer.build.language import copy_language_weights, language_config, language_tokenizer
from trainer.build.second_encoder import llava_class, second_encoder_config
from trainer.model_config import ModelConfig
from workbench.errors import ConfigError, one_line
from workbench.hashing import fingerprint, saved_tensors, tokenizer_settings
from workbench.mllm.load import SECOND_ENCODER
from workbench.mllm.residual import KEY
from workbench.vfm.base import IMAGENET
from workbench.weights.fetch import check_unchanged, load_tensors, load_weights, weights_folder
from workbench.weights.pretrained import call

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


def build_processor(config: ModelConfig, words: list[str]) -> LlavaProcessor:
    """Return a LlavaProcessor that resizes images to a square without keeping their aspect ratio.

    Args:
        words: the whole vocabulary, each word one token. It is ignored if the language model is pretrained, since that
            brings its own tokenizer.
    """
    if config.language:
        tokenizer, template = language_tokenizer(weights_folder(config.language))
    else:
        tokenizer, template = _word_tokenizer(words), CHAT_TEMPLATE
    size = {"height": config.image_size, "width": config.image_size}
    image_processor = CLIPImageProcessor(
        size=size, do_center_crop=False, image_mean=IMAGENET[0], image_std=IMAGENET[1], crop_size=size
    )
    return LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=encoder_config(config).patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def _word_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    special = ["<pad>", "<bos>", "<eos>", "<unk>", "<image>"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *words])}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )


def encoder_config(config: ModelConfig) -> PretrainedConfig:
    """Return the configuration of the complete pretrained vision encoder, with all its blocks.

    Raises:
        ConfigError: the weights are not those of a vision transformer.
    """
    folder = weights_folder(config.vision_encoder)
    expected = (
        f"model.vision_encoder is {config.vision_encoder}: expected the weights of a vision transformer, such as"
        " dinov2-small"
    )
    # transformers cannot read the configuration of other libraries' weights, such as timm's
    vision: PretrainedConfig = call(
        lambda: AutoConfig.from_pretrained(folder), lambda error: ConfigError(f"{expected} ({one_line(error, 100)})")
    )
    if not hasattr(vision, "patch_size"):
        raise ConfigError(expected)
    return vision


def llava_config(config: ModelConfig, processor: LlavaProcessor) -> LlavaConfig:
    """Return the configuration of the model that `build_llava` builds.

    Of the vision encoder it has only the blocks up to the last one whose features are used.

    Raises:
        ConfigError: the recipe names a block that the vision encoder does not have, or the image size is not a multiple
            of its patch size or too small.
    """
    vision = encoder_config(config)
    if max(config.vision_encoder_features) > vision.num_hidden_layers:
        raise ConfigError(
            f"model.vision_encoder_features is {config.vision_encoder_features}: expected 0 to"
            f" {vision.num_hidden_layers}, the blocks of {config.vision_encoder}"
        )
    if config.image_size % vision.patch_size:
        raise ConfigError(
            f"model.image_size is {config.image_size}: expected a multiple of {vision.patch_size}, the patch size of"
            f" {config.vision_encoder}"
        )
    # the projector's position code needs 3 patches per side: with fewer, some of its sines and cosines are constant
    if (side := config.image_size // vision.patch_size) < 3:
        raise ConfigError(
            f"model.image_size is {config.image_size}, {side} x {side} patches: expected at least"
            f" {3 * vision.patch_size}, 3 x 3 patches"
        )
    blocks = max(1, *config.vision_encoder_features)  # the output of later blocks is not used
    # these settings name blocks up to the last one, so they would not fit fewer blocks
    names_blocks = ("out_features", "out_indices", "stage_names")
    vision_settings = {name: value for name, value in vision.to_dict().items() if name not in names_blocks}
    vision = type(vision).from_dict(vision_settings | {"num_hidden_layers": blocks})
    tokenizer = processor.tokenizer
    text = language_config(weights_folder(config.language)) if config.language else _fresh_text(config, tokenizer)
    text.vocab_size = max(text.vocab_size, len(tokenizer))
    llava = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=processor.image_token_id,
        image_seq_length=(config.image_size // vision.patch_size) ** 2,
        vision_feature_layer=list(config.vision_encoder_features),
        vision_feature_select_strategy="default",
        tie_word_embeddings=text.tie_word_embeddings,
    )
    if config.second_encoder is not None:
        setattr(llava, SECOND_ENCODER, second_encoder_config(config.second_encoder))
    return llava


def build_llava(config: ModelConfig, processor: LlavaProcessor) -> tuple[LlavaForConditionalGeneration, dict[str, str]]:
    """Build the toy LLaVA that `config` describes, with its frozen parts marked as such.

    Returns:
        The model, and the fingerprint of each pretrained part: `tower` (vision encoder) and, if it is pretrained,
        `language`.

    Raises:
        ConfigError: see `llava_config`.
        WeightsError: a part does not hold its pretrained values after the model was built.
    """
    settings, tokenizer = llava_config(config, processor), processor.tokenizer
    llava = llava_class(settings)(settings)
    llava.config.architectures = ["LlavaForConditionalGeneration"]
    llava.generation_config.eos_token_id = tokenizer.eos_token_id
    llava.generation_config.pad_token_id = tokenizer.pad_token_id
    encoder = AutoModel.from_pretrained(weights_folder(config.vision_encoder), config=llava.config.vision_config)
    llava.model.vision_tower.load_state_dict(encoder.state_dict())
    parts = {
        "tower": check_unchanged(
            config.vision_encoder, saved_tensors(llava.model.vision_tower), load_weights(config.vision_encoder)
        )
    }
    if config.language:
        parts["language"] = copy_language_weights(llava, weights_folder(config.language))
    freeze(llava, config)
    return llava, parts


def freeze(llava: LlavaForConditionalGeneration, config: ModelConfig) -> None:
    """Freeze the vision encoder and, unless `model.train` is `all`, the weights of the language model."""
    llava.model.vision_tower.requires_grad_(False)
    if config.train != "all":
        llava.model.language_model.requires_grad_(False)
        llava.lm_head.requires_grad_(False)


def _fresh_text(config: ModelConfig, tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    """Return the configuration of a language model that is randomly initialized."""
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=config.width,
        intermediate_size=config.ffn,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        head_dim=config.width // config.heads,
        initializer_range=config.init,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def load_start(llava: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> str:
    """Copy the weights of the model in `folder`, the recipe's `start`, into `llava`; return the model's fingerprint.

    Raises:
        ConfigError: see `check_start`; or the model's file lacks a tensor.
    """
    check_start(llava, processor, folder)
    loaded: Any = llava_class(llava.config).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    stored, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise ConfigError(
            f"start is {folder}, whose model.safetensors lacks '{missing[0]}': expected the folder of a finished"
            " training"
        )
    llava.load_state_dict(stored.state_dict())
    return fingerprint(saved_tensors(stored))


def check_start(llava: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """Check that the model in `folder`, the recipe's `start`, can be loaded into `llava`.

    Args:
        llava: the model that the recipe describes. It may be on the meta device, as no tensor values are compared.

    Raises:
        ConfigError: the folder is not that of a finished training, or its model, tokenizer or second encoder is not the
            one that the recipe describes.
    """
    if not (folder / "model.safetensors").exists():
        raise ConfigError(f"start is {folder}: expected the folder of a finished training")
    load_tensors(folder / "model.safetensors")

    def failed(error: Exception) -> ConfigError:
        return ConfigError(
            f"start is {folder}, whose configuration or tokenizer cannot be read ({one_line(error, 120)})"
        )

    config = call(lambda: AutoConfig.from_pretrained(folder), failed)
    tokenizer = call(lambda: PreTrainedTokenizerFast.from_pretrained(folder), failed)
    if (architecture := (config.architectures or ["nothing"])[0]) != "LlavaForConditionalGeneration":
        raise ConfigError(
            f"start is {folder}, which holds {architecture}: expected a LlavaForConditionalGeneration, as this recipe"
            " describes"
        )
    if hasattr(config, KEY):
        raise ConfigError(
            f"start is {folder}, whose model has a residual ({KEY} in its config.json): expected a model trained"
            " without a residual"
        )
    stored_second, second = (getattr(each, SECOND_ENCODER, None) or {"vfm": "none"} for each in (config, llava.config))
    if any(stored_second.get(key) != value for key, value in second.items()):
        changed = " with other weights" * (stored_second["vfm"] == second["vfm"])
        raise ConfigError(
            f"start is {folder}, whose second encoder is {stored_second['vfm']}{changed}: expected {second['vfm']}, as"
            " model.second_encoder says"
        )
    if tokenizer.get_vocab() != processor.tokenizer.get_vocab():
        raise ConfigError(
            f"start is {folder}, whose vocabulary differs from that of this recipe's data: expected the same vocabulary"
        )
    if tokenizer_settings(tokenizer)["core"] != tokenizer_settings(processor.tokenizer)["core"]:
        raise ConfigError(
            f"start is {folder}, whose tokenizer has this recipe's vocabulary but splits text in another way: expected"
            " the same tokenizer"
        )
    with torch.device("meta"):
        stored = call(lambda: llava_class(config)(config), failed).state_dict()
    expected = llava.state_dict()
    wrong = sorted(
        name
        for name in stored.keys() | expected.keys()
        if name not in stored or name not in expected or stored[name].shape != expected[name].shape
    )
    if wrong:
        raise ConfigError(
            f"start is {folder}, whose tensor '{wrong[0]}' does not fit the model of this recipe: expected a model"
            " of the same sizes"
        )


@torch.inference_mode()
def connector_inputs(
    llava: LlavaForConditionalGeneration, processor: LlavaProcessor, images: list[Image.Image]
) -> Float[Tensor, "image token d"]:
    """Return the frozen vision encoder's features of `images`, as the projector receives them.

    A recorder in the projector's place reads them, so that they are what the projector receives at inference. The
    projector itself is not used, since a training step may be using it in another thread.
    """
    recorder, sharing = _Recorder(), copy(llava.model)
    sharing.__dict__["_modules"] = dict(llava.model._modules) | {"multi_modal_projector": recorder}
    llava.model.vision_tower.eval()  # a training step puts the whole model into training mode
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"].to(llava.device)
    sharing.get_image_features(pixel_values=pixels)
    assert recorder.features is not None
    return recorder.features


class _Recorder(nn.Module):
    """Stands in a projector's place and keeps what it receives."""

    features: Tensor | None = None

    def forward(self, features: Tensor) -> Tensor:
        self.features = features
        return features
