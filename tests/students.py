"""A small world for models of tests/tiny.py to train on: pictures of one colour and conversations about them in words
that they know."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf
from PIL import Image
from safetensors.torch import load_file

from tests.tiny import WORDS, _tokenizer, build

FLAGS = [
    "--log_every",
    "1",
    "--eval_every",
    "4",
    "--save_every",
    "2",
    "--optim.steps",
    "4",
    "--optim.batch_size",
    "2",
    "--optim.warmup",
    "1",
]
VIRAL = [
    "--alignment.objective",
    "cosine",
    "--alignment.layer",
    "2",
    "--alignment.hidden",
    "8",
    "--alignment.vfm",
    "efficientnet-lite0",
]


def noise_image(seed: int, width: int = 90, height: int = 60) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def square_image(seed: int) -> Image.Image:
    return noise_image(seed, 112, 112)


def rows(images: int = 8, texts: int = 2) -> list[dict[str, Any]]:
    """Conversations of one or two turns, some about two images, and some about none."""
    found: list[dict[str, Any]] = []
    for n in range(images):
        names = [f"coco/{n}.png"] + ([f"gqa/{n}.png"] if n % 4 == 3 else [])
        said = [("human", "<image>\n" * len(names) + "what is this ?"), ("gpt", "a red cat" if n % 2 else "a blue dog")]
        if n % 3 == 0:
            said += [("human", "what color ?"), ("gpt", "red" if n % 2 else "blue")]
        found.append(
            {
                "id": n,
                "image": names if len(names) > 1 else names[0],
                "conversations": [{"from": a, "value": b} for a, b in said],
            }
        )
    for n in range(texts):
        found.append(
            {
                "id": f"t{n}",
                "conversations": [
                    {"from": "human", "value": "one of the two ?"},
                    {"from": "gpt", "value": "one" if n else "two"},
                ],
            }
        )
    return found


def write(folder: Path, given: list[dict[str, Any]] | None = None) -> Path:
    """A LLaVA JSON file with its images below `folder`."""
    given = rows() if given is None else given
    folder.mkdir(parents=True, exist_ok=True)
    for number, row in enumerate(given):
        for name in [row["image"]] if isinstance(row.get("image"), str) else row.get("image", []):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            noise_image(number + 100 * name.startswith("gqa")).save(folder / name)
    (folder / "mix.json").write_text(json.dumps(given))
    return folder / "mix.json"


def world(root: Path, family: str = "llava") -> tuple[Path, list[str]]:
    """A small model of a family, and the flags that train it on a small world."""
    model, file = build(family, root / family), write(root / "world")
    return model, [
        "--model.name",
        str(model),
        "--data.train",
        f"llava_json:{file}",
        "--data.val",
        f"llava_json:{file}",
        *FLAGS,
    ]


def pickled(folder: Path, shards: int = 1) -> None:
    """Weights as torch.save writes them, whole or in shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    names = {n: f"pytorch_model-{n + 1:05}-of-{shards:05}.bin" for n in range(shards)}
    where = {key: names[n % shards] for n, key in enumerate(sorted(tensors))}
    for name in names.values():
        torch.save({key: tensors[key] for key in where if where[key] == name}, folder / name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


class Bomb:
    """Unpickled without care, this makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


# --- released parts, in their real size, with weights of zeros that take no room on the disk ------


def write_sparse(folder: Path, model: torch.nn.Module) -> None:
    """Write a model.safetensors for a model on meta: a header with every tensor, and a hole in place of their
    values."""
    entries, at = {}, 0
    for name, value in model.state_dict().items():
        entries[name] = {"dtype": "F16", "shape": list(value.shape), "data_offsets": [at, at := at + 2 * value.numel()]}
    header = json.dumps(entries).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + at)


CLIP = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
SIGLIP2 = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 16,
}
VICUNA = {7: (4096, 11008, 32, 32), 13: (5120, 13824, 40, 40)}  # width, feed-forward, layers, heads


def configs(root: Path) -> dict[str, Path]:
    """Folders of each part that a recipe names, by hub id: configuration, holes in place of weights, and a small
    tokenizer or the image processor."""
    found = {}
    clip = (
        tf.CLIPConfig(vision_config=CLIP),
        tf.CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
    )
    siglip = tf.SiglipConfig(vision_config=SIGLIP2), tf.SiglipImageProcessor(size={"height": 384, "width": 384})
    towers = {"openai/clip-vit-large-patch14-336": clip, "google/siglip2-so400m-patch16-384": siglip}
    # <image> is one more than there are rows
    vicuna = _tokenizer(words=[*WORDS, *(f"word{n}" for n in range(32000 - len(_tokenizer())))])
    languages: dict[str, tuple[Any, Any]] = {}
    for billions, (width, ffn, layers, heads) in VICUNA.items():
        sizes = {
            "hidden_size": width,
            "intermediate_size": ffn,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "vocab_size": 32000,
        }
        languages[f"lmsys/vicuna-{billions}b-v1.5"] = (
            tf.LlamaConfig(**sizes, architectures=["LlamaForCausalLM"]),
            vicuna,
        )
    sizes = {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    }
    qwen = tf.Qwen2Config(**sizes, vocab_size=152064, tie_word_embeddings=False, architectures=["Qwen2ForCausalLM"])
    languages["Qwen/Qwen2.5-7B-Instruct"] = qwen, _tokenizer()
    for name, saved in (towers | languages).items():
        found[name] = root / name
        for part in saved:
            part.save_pretrained(found[name])
        with torch.device("meta"):
            write_sparse(
                found[name], (tf.AutoModel if name in towers else tf.AutoModelForCausalLM).from_config(saved[0])
            )
    return found
