"""Small models of every family, built from config with the real processor classes, and saved as a user's folder would
be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = [
    "what",
    "is",
    "this",
    "?",
    "a",
    "red",
    "blue",
    "cat",
    "dog",
    "yes",
    "no",
    "left",
    "right",
    "one",
    "two",
    "of",
    "the",
    "color",
    "User",
    "Assistant",
    ":",
]
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TEMPLATE = (
    "{{% for m in messages %}}{{% if m['role'] == 'user' %}}User : {{% for p in m['content'] %}}{{% if p['type'] =="
    " 'image' %}}{image}{{% else %}} {{{{ p['text'] }}}}{{% endif %}}{{% endfor %}} Assistant :{{% else %}} {{{{"
    " m['content'][0]['text'] }}}} <eos>\n{{% endif %}}{{% endfor %}}"
)

PATCHES = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}

BUILDERS: dict[str, Callable[[], tuple[Any, Any]]] = {}


def build(name: str, folder: Path) -> Path:
    """Save a small model of family `name` with its processor."""
    torch.manual_seed(0)
    model, processor = BUILDERS[name]()
    randomize(model).eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Draw all parameters of a fresh model such that no part of it is the identity, and return the model.

    A fresh norm has weight 1, so that applying it twice, or leaving it out after another one, changes nothing; a fresh
    bias, gate or position embedding of 0 changes nothing wherever it is added. Weights of matrices become large enough
    for the output to depend on the image: the usual standard deviation of 0.02 leaves a small model nearly blind.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(value: torch.Tensor, std: float) -> torch.Tensor:
        return std * torch.randn(value.shape, generator=generator)

    seen: set[int] = set()
    for module in model.modules():
        for name, value in module.named_parameters(recurse=False):
            if id(value) in seen:  # tied to another one
                continue
            seen.add(id(value))
            if isinstance(module, torch.nn.Embedding):
                value.copy_(noise(value, 1.0))
            elif name == "weight" and isinstance(module, torch.nn.Linear | torch.nn.Conv2d | torch.nn.Conv3d):
                value.copy_(noise(value, value[0].numel() ** -0.5))
            elif value.ndim > 1:  # position and class embeddings, newlines, projections that are bare parameters
                value.copy_(noise(value, value.shape[-1] ** -0.5))
            else:  # weights of norms (around 1, or 0 where the norm adds 1), layer scales, gates, logit scales, biases
                value.add_(noise(value, 0.1 if name.endswith("bias") else 0.3))
    return model


def _tokenizer(*special: str, bos: bool = False, words: Sequence[str] = WORDS, **named: str) -> Any:
    """One token a word; with `bos` the tokenizer begins every text with one, as many released ones do."""
    tokens = ["<pad>", "<bos>", "<eos>", "<unk>", *special]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*tokens, *words])}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 1)]
        )
    usual = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=core, extra_special_tokens=named or {}, **usual)
    tokenizer.add_tokens(list(special), special_tokens=True)
    return tokenizer


def _add(name: str) -> Callable[[Callable[[], tuple[Any, Any]]], Callable[[], tuple[Any, Any]]]:
    def keep(builder: Callable[[], tuple[Any, Any]]) -> Callable[[], tuple[Any, Any]]:
        BUILDERS[name] = builder
        return builder

    return keep


def _text(cls: Any, tokenizer: Any, **more: Any) -> Any:
    return cls(**SIZES | {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | more)


@_add("llava")
def _llava() -> tuple[Any, Any]:
    tokenizer = _tokenizer("<image>")
    images = tf.CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    processor = tf.LlavaProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE.format(image="<image>"),
    )
    vision = tf.CLIPVisionConfig(**VISION, image_size=56, patch_size=14)
    config = tf.LlavaConfig(
        vision_config=vision, text_config=_text(tf.LlamaConfig, tokenizer), image_token_index=processor.image_token_id
    )
    return tf.LlavaForConditionalGeneration(config), processor


@_add("llava_padded")
def _llava_padded() -> tuple[Any, Any]:
    """As the original code trains LLaVA-1.5: the image in the middle of a square."""
    model, processor = _llava()
    size = {"height": 56, "width": 56}
    processor.image_processor = tf.LlavaImageProcessor(do_pad=True, do_center_crop=False, size=size, crop_size=size)
    return model, processor


@_add("llava_siglip")
def _llava_siglip() -> tuple[Any, Any]:
    """A tower whose patches do not divide the image: the last pixels belong to no token. Its tokenizer begins every
    text with BOS, its template does not."""
    tokenizer = _tokenizer("<image>", bos=True)
    images = tf.SiglipImageProcessor(size={"height": 66, "width": 66})
    processor = tf.LlavaProcessor(
        images, tokenizer, **PATCHES | {"vision_feature_select_strategy": "full", "num_additional_image_tokens": 0}
    )
    processor.chat_template = TEMPLATE.format(image="<image>")
    vision = tf.SiglipVisionConfig(**VISION, image_size=66, patch_size=14, vision_use_head=False)
    settings = {
        "vision_feature_select_strategy": "full",
        "vision_feature_layer": -1,
        "image_token_index": processor.image_token_id,
    }
    return (
        tf.LlavaForConditionalGeneration(
            tf.LlavaConfig(vision_config=vision, text_config=_text(tf.LlamaConfig, tokenizer), **settings)
        ),
        processor,
    )


@_add("llava_next")
def _llava_next() -> tuple[Any, Any]:
    tokenizer = _tokenizer("<image>")
    pinpoints = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
    images = tf.LlavaNextImageProcessor(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, image_grid_pinpoints=pinpoints
    )
    processor = tf.LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE.format(image="<image>"),
    )
    vision = tf.CLIPVisionConfig(**VISION, image_size=56, patch_size=14)
    config = tf.LlavaNextConfig(
        vision_config=vision,
        text_config=_text(tf.MistralConfig, tokenizer),
        image_token_index=processor.image_token_id,
        image_grid_pinpoints=pinpoints,
    )
    return tf.LlavaNextForConditionalGeneration(config), processor


@_add("llava_onevision")
def _llava_onevision() -> tuple[Any, Any]:
    tokenizer = _tokenizer("<image>", "<video>")
    pinpoints = [[60 * i, 60 * j] for i in range(1, 5) for j in range(1, 5)]
    images = tf.LlavaOnevisionImageProcessor(size={"height": 60, "width": 60}, image_grid_pinpoints=pinpoints)
    video = tf.LlavaOnevisionVideoProcessor(size={"height": 60, "width": 60})
    processor = tf.LlavaOnevisionProcessor(
        images,
        tokenizer,
        video,
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE.format(image="<image>"),
        vision_aspect_ratio="anyres_max_2",
    )
    vision = tf.SiglipVisionConfig(**VISION, image_size=60, patch_size=14, vision_use_head=False)
    config = tf.LlavaOnevisionConfig(
        vision_config=vision,
        text_config=_text(tf.Qwen2Config, tokenizer),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pinpoints,
        vision_aspect_ratio="anyres_max_2",
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    return tf.LlavaOnevisionForConditionalGeneration(config), processor


QWEN = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def _qwen(tokenizer: Any) -> dict[str, int]:
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    return dict(zip(names, tokenizer.convert_tokens_to_ids(list(QWEN)), strict=True))


def _qwen_processor(cls: Any, tokenizer: Any, patch: int, video: Any) -> Any:
    images = tf.Qwen2VLImageProcessor(
        patch_size=patch, size={"shortest_edge": 4 * 4 * patch * patch, "longest_edge": 40 * 4 * patch * patch}
    )
    return cls(
        images, tokenizer, video, chat_template=TEMPLATE.format(image="".join((QWEN[0], " ", QWEN[2], " ", QWEN[1])))
    )


@_add("qwen2_vl")
def _qwen2_vl() -> tuple[Any, Any]:
    tokenizer = _tokenizer(*QWEN)
    text = SIZES | {
        "vocab_size": len(tokenizer),
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
    }
    vision = {"embed_dim": 32, "hidden_size": 32, "depth": 2, "num_heads": 2, "patch_size": 14, "mlp_ratio": 2}
    model = tf.Qwen2VLForConditionalGeneration(
        tf.Qwen2VLConfig(text_config=text, vision_config=vision, **_qwen(tokenizer))
    )
    return model, _qwen_processor(tf.Qwen2VLProcessor, tokenizer, 14, tf.Qwen2VLVideoProcessor())


@_add("qwen2_5_vl")
def _qwen2_5_vl() -> tuple[Any, Any]:
    tokenizer = _tokenizer(*QWEN)
    text = SIZES | {
        "vocab_size": len(tokenizer),
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
    }
    vision = {
        "hidden_size": 32,
        "out_hidden_size": 32,
        "intermediate_size": 48,
        "depth": 2,
        "num_heads": 2,
        "patch_size": 14,
        "window_size": 56,
    }
    vision |= {"fullatt_block_indexes": [1]}
    model = tf.Qwen2_5_VLForConditionalGeneration(
        tf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **_qwen(tokenizer))
    )
    return model, _qwen_processor(tf.Qwen2_5_VLProcessor, tokenizer, 14, tf.Qwen2VLVideoProcessor())


@_add("qwen3_vl")
def _qwen3_vl() -> tuple[Any, Any]:
    tokenizer = _tokenizer(*QWEN)
    text = SIZES | {
        "vocab_size": len(tokenizer),
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4},
    }
    vision = {
        "hidden_size": 32,
        "out_hidden_size": 32,
        "intermediate_size": 48,
        "depth": 3,
        "num_heads": 2,
        "patch_size": 16,
        "deepstack_visual_indexes": [0, 1],
    }
    vision |= {"num_position_embeddings": 64}
    model = tf.Qwen3VLForConditionalGeneration(
        tf.Qwen3VLConfig(text_config=text, vision_config=vision, **_qwen(tokenizer))
    )
    return model, _qwen_processor(tf.Qwen3VLProcessor, tokenizer, 16, tf.Qwen3VLVideoProcessor())


@_add("internvl")
def _internvl() -> tuple[Any, Any]:
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = _tokenizer(*named.values(), **named)
    images = tf.GotOcr2ImageProcessor(
        size={"height": 112, "width": 112}, crop_to_patches=True, min_patches=1, max_patches=6
    )
    processor = tf.InternVLProcessor(
        images,
        tokenizer,
        tf.InternVLVideoProcessor(),
        image_seq_length=16,
        chat_template=TEMPLATE.format(image="<IMG_CONTEXT>"),
    )
    vision = tf.InternVLVisionConfig(**VISION, image_size=[112, 112], patch_size=[14, 14])
    config = tf.InternVLConfig(
        vision_config=vision,
        text_config=_text(tf.Qwen2Config, tokenizer),
        image_token_id=processor.image_token_id,
        image_seq_length=16,
    )
    return tf.InternVLForConditionalGeneration(config), processor


def _idefics_processor(cls: Any, images: Any, **video: Any) -> tuple[Any, Any]:
    marks = [f"<row_{r}_col_{c}>" for r in range(1, 5) for c in range(1, 5)]
    named = {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
    }
    tokenizer = _tokenizer(*named.values(), *marks, bos=True, **named)
    return (
        cls(
            images,
            tokenizer,
            image_seq_len=16,
            chat_template="{{ bos_token }}" + TEMPLATE.format(image="<image>"),
            **video,
        ),
        tokenizer,
    )


@_add("smolvlm")
def _smolvlm() -> tuple[Any, Any]:
    images = tf.SmolVLMImageProcessor(size={"longest_edge": 256}, max_image_size={"longest_edge": 112})
    processor, tokenizer = _idefics_processor(tf.SmolVLMProcessor, images, video_processor=tf.SmolVLMVideoProcessor())
    vision = tf.SmolVLMVisionConfig(**VISION, image_size=112, patch_size=14)
    config = tf.SmolVLMConfig(
        vision_config=vision,
        text_config=_text(tf.LlamaConfig, tokenizer),
        image_token_id=processor.image_token_id,
        scale_factor=2,
    )
    return tf.SmolVLMForConditionalGeneration(config), processor


@_add("idefics3")
def _idefics3() -> tuple[Any, Any]:
    images = tf.Idefics3ImageProcessor(size={"longest_edge": 256}, max_image_size={"longest_edge": 112})
    processor, tokenizer = _idefics_processor(tf.Idefics3Processor, images)
    vision = tf.Idefics3VisionConfig(**VISION, image_size=112, patch_size=14)
    config = tf.Idefics3Config(
        vision_config=vision,
        text_config=_text(tf.LlamaConfig, tokenizer),
        image_token_id=processor.image_token_id,
        scale_factor=2,
    )
    return tf.Idefics3ForConditionalGeneration(config), processor


@_add("paligemma")
def _paligemma() -> tuple[Any, Any]:
    tokenizer = _tokenizer("<image>")
    images = tf.SiglipImageProcessor(size={"height": 56, "width": 56})
    images.image_seq_length = 16
    processor = tf.PaliGemmaProcessor(images, tokenizer)
    vision = tf.SiglipVisionConfig(**VISION, image_size=56, patch_size=14, vision_use_head=False)
    vision.projection_dim = 32
    text = _text(tf.GemmaConfig, processor.tokenizer, head_dim=8)
    config = tf.PaliGemmaConfig(
        vision_config=vision, text_config=text, image_token_index=processor.image_token_id, projection_dim=32
    )
    return tf.PaliGemmaForConditionalGeneration(config), processor


@_add("gemma3")
def _gemma3() -> tuple[Any, Any]:
    named = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer = _tokenizer(*named.values(), bos=True, **named)
    images = tf.Gemma3ImageProcessor(size={"height": 112, "width": 112}, do_pan_and_scan=False)
    processor = tf.Gemma3Processor(
        images,
        tokenizer,
        image_seq_length=16,
        chat_template="{{ bos_token }}" + TEMPLATE.format(image="<start_of_image>"),
    )
    vision = tf.SiglipVisionConfig(**VISION, image_size=112, patch_size=14, vision_use_head=False)
    text = _text(
        tf.Gemma3TextConfig,
        tokenizer,
        head_dim=8,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    ids = {
        f"{kind}_token_index": tokenizer.convert_tokens_to_ids(named[f"{kind}_token"])
        for kind in ("image", "boi", "eoi")
    }
    config = tf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=16, **ids)
    return tf.Gemma3ForConditionalGeneration(config), processor
