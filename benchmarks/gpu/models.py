"""Models and data of the benchmark, with random weights: small models for comparisons, and released geometries."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from workbench.data.base import Conversation, Sample
from workbench.data.conversations import ConversationDataset
from workbench.mllm import FAMILIES, MLLM
from workbench.vfm import VFM
from workbench.vfm.base import IMAGENET, VFMEntry
from workbench.vfm.hf_models import KINDS, _build
from workbench.weights.remembered import LoadedFrom

CONFIGS = Path(__file__).parent / "configs"
WORDS = tuple(
    [
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
)
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}User : {% for p in m['content'] %}{% if p['type'] == 'image'"
    " %}<image>{% else %} {{ p['text'] }}{% endif %}{% endfor %} Assistant :{% else %} {{ m['content'][0]['text'] }}"
    " <eos>\n{% endif %}{% endfor %}"
)
TINY = {
    "text_config": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "vision_config": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 56,
    },
}
TOY = {  # smaller sizes for the released geometries
    "text_config": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    },
    "vision_config": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 112,
    },
}
TOY_DINO = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


class RandomMLLM(MLLM):
    """A model with random weights that are not hashed: hashing 14 GB would take longer than what is measured."""

    def _fingerprint(self, source: LoadedFrom) -> str:
        return ""


# --- LLaVA ----------------------------------------------------------------------------------------


def config(**changed: Any) -> tf.LlavaConfig:
    """Return the configuration of LLaVA-1.5-7B, with values of its sections replaced by `changed`."""
    content = json.loads((CONFIGS / "llava-1.5-7b.json").read_text())
    for section, sizes in changed.items():
        content[section] |= sizes
    side = content["vision_config"]["image_size"] // content["vision_config"]["patch_size"]
    return tf.LlavaConfig.from_dict(content | {"image_seq_length": side * side})


def small_vocabulary(settings: tf.LlavaConfig, tokens: int) -> tf.LlavaConfig:
    """Return the configuration with a vocabulary of this many tokens, the last of which stands for the image."""
    settings.text_config.vocab_size = tokens
    settings.image_token_index = settings.image_token_id = tokens - 1
    return settings


def processor(settings: tf.LlavaConfig) -> tf.LlavaProcessor:
    """Return a processor with CLIP's image processor and a word-level tokenizer.

    The tokenizer has as many words as Vicuna has tokens, and the image token of the configuration.
    """
    first = {word: number for number, word in enumerate(("<pad>", "<bos>", "<eos>", "<unk>", *WORDS))}
    words = first | {f"w{number}": number for number in range(len(first), settings.image_token_id)}
    core = Tokenizer(models.WordLevel(words | {"<image>": settings.image_token_id}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=core, extra_special_tokens={"image_token": "<image>"}, **named
    )
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    side = settings.vision_config.image_size
    pixels = tf.CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    patches = {
        "patch_size": settings.vision_config.patch_size,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }
    return tf.LlavaProcessor(pixels, tokenizer, **patches, chat_template=TEMPLATE)


def tiny_llava() -> MLLM:
    """Return a LLaVA with 16 visual tokens and 4 blocks, on the CPU in float32; the same at every call.

    Its weights are so large that the output depends on the image.
    """
    settings = small_vocabulary(config(**TINY), len(WORDS) + 5)
    settings.text_config.bos_token_id, settings.text_config.eos_token_id, settings.text_config.pad_token_id = 1, 2, 0
    torch.manual_seed(0)
    model = tf.LlavaForConditionalGeneration(settings)
    with torch.no_grad():
        for part in model.modules():  # the usual standard deviation of 0.02 makes a small model nearly blind
            if isinstance(part, nn.Linear | nn.Conv2d | nn.Embedding):
                part.weight.normal_(0, 1.0 if isinstance(part, nn.Embedding) else part.weight[0].numel() ** -0.5)
    model.config.architectures = ["LlavaForConditionalGeneration"]
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
    return MLLM(model, processor(settings), FAMILIES.get("llava"), "small LLaVA")


def llava(device: str, dtype: torch.dtype, *, toy: bool) -> MLLM:
    """Return a LLaVA of the 7B geometry, created on its device; or its toy size."""
    settings = small_vocabulary(config(**TOY), 500) if toy else config()
    torch.manual_seed(0)
    with torch.device(device), default_dtype(dtype):
        model = tf.LlavaForConditionalGeneration(settings)
    model.config.architectures = ["LlavaForConditionalGeneration"]
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return RandomMLLM(
        model,
        processor(settings),
        FAMILIES.get("llava"),
        "LLaVA of the toy size" if toy else "LLaVA-1.5-7B, random weights",
    )


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Create new parameters with another dtype inside the context."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# --- DINOv2 ---------------------------------------------------------------------------------------


def dino(device: str, *, toy: bool) -> VFM:
    """Return a DINOv2-B/14 in float32, or its toy size."""
    sizes = json.loads((CONFIGS / "dinov2-base.json").read_text()) | (TOY_DINO if toy else {})
    sizes = {name: value for name, value in sizes.items() if name not in ("architectures", "model_type")}
    torch.manual_seed(1)
    network = _build(KINDS["dinov2"], None, sizes, None)
    entry = VFMEntry(
        "dinov2", "", lambda _: network, 14, sizes["hidden_size"], *IMAGENET, (16, 16), "", "DINOv2", "random weights"
    )
    return VFM(entry, device)


def save_dino(folder: Path) -> Path:
    """Save a small DINOv2 as a folder that a recipe can name."""
    content = json.loads((CONFIGS / "dinov2-base.json").read_text()) | TOY_DINO
    torch.manual_seed(1)
    tf.Dinov2Model(tf.Dinov2Config.from_dict(content)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": IMAGENET[0], "image_std": IMAGENET[1]}))
    return folder


# --- data -----------------------------------------------------------------------------------------


def image(seed: int, side: int = 64) -> Image.Image:
    """Return an image of colored blobs; noise would be almost uniform after resizing."""
    coarse = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((side * 4 // 3, side), Image.Resampling.BICUBIC)


def text(words: int, seed: int, *, vocabulary: Sequence[str] = WORDS[:18]) -> str:
    """Return a text of this many random words."""
    return " ".join(np.random.default_rng([7, seed]).choice(list(vocabulary), words))


def conversations(count: int, *, side: int, words: int, name: str = "conversations") -> ConversationDataset:
    """Return conversations of one turn about one image each; question and answer have `words` words together."""
    images = [image(number, side) for number in range(count)]
    question_words = words // 3
    made = [
        Conversation(
            f"{n}", ((text(question_words, 2 * n), text(words - question_words, 2 * n + 1)),), (lambda n=n: images[n],)
        )  # type: ignore[misc]
        for n in range(count)
    ]
    return ConversationDataset(name, made, f"{name}-{count}-{side}-{words}")


def questions(count: int, *, side: int, options: Sequence[Sequence[str]] = (("red", "blue"),)) -> list[list[Sample]]:
    """Return images with one question each, whose options are those of `options` in turn."""
    samples = []
    for n in range(count):
        choice = tuple(options[n % len(options)])
        samples.append(
            [Sample(f"{n}", f"{n}", lambda n=n: image(n, side), text(6, n) + " ?", choice[0], choice, "color")]
        )
    return samples
