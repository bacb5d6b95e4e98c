"""Folders as the original LLaVA-1.5 and VIRAL code writes them, made from raw tensors, against a forward pass written
out on those tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, AutoProcessor, LlamaTokenizer, PreTrainedTokenizerFast

from tests.conftest import run
from trainer.objectives import AlignmentHead
from workbench.capture.hidden_states import read
from workbench.cli import command
from workbench.convert.__main__ import main
from workbench.errors import DataError, ModelError, RunError, WeightsError, WorkbenchError
from workbench.files import HEAD_FILE
from workbench.mllm import MLLM

D, FFN, LAYERS, HEADS, KV, VOCAB = 32, 48, 3, 4, 2, 90
VD, VFFN, VLAYERS, VHEADS, PATCH, SIDE = 24, 40, 3, 4, 14, 56
THETA, EPS = 500.0, 1e-5
TOWER = "model.vision_tower.vision_tower.vision_model."
HIDDEN, Z = 20, 12
VISION = {
    "hidden_size": VD,
    "intermediate_size": VFFN,
    "num_hidden_layers": VLAYERS,
    "num_attention_heads": VHEADS,
    "patch_size": PATCH,
    "image_size": SIDE,
}
CONFIG: dict[str, Any] = {
    "_name_or_path": "lmsys/vicuna-7b-v1.5",
    "architectures": ["LlavaLlamaForCausalLM"],
    "model_type": "llava",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": D,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "rms_norm_eps": EPS,
    "rope_theta": THETA,
    "rope_scaling": None,
    "max_position_embeddings": 128,
    "vocab_size": VOCAB,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "image_aspect_ratio": "pad",
    "mm_hidden_size": VD,
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "use_mm_proj": True,
}
VIRAL = {
    "model_type": "llava_llama",
    "vra_loss": True,
    "target_layers": [2],
    "vra_target": "dinov2-vit-b",
    "vra_weight": 0.5,
    "projector_dim": HIDDEN,
    "z_dim": Z,
}
LORA = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "use_rslora": False,
    "bias": "none",
    "base_model_name_or_path": "lmsys/vicuna-7b-v1.5",
}


# --- the original layout, from raw tensors --------------------------------------------------------


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape) * (0.3 if len(shape) == 1 else 1.2 * shape[-1] ** -0.5)


def language_model(bias: bool = False) -> dict[str, Tensor]:
    raw = {
        "model.embed_tokens.weight": randn(VOCAB, D),
        "lm_head.weight": randn(VOCAB, D),
        "model.norm.weight": 1 + randn(D),
    }
    for i in range(LAYERS):
        at, kv = f"model.layers.{i}", KV * D // HEADS
        raw |= {f"{at}.input_layernorm.weight": 1 + randn(D), f"{at}.post_attention_layernorm.weight": 1 + randn(D)}
        raw |= {
            f"{at}.self_attn.{name}_proj.weight": randn(rows, D)
            for name, rows in (("q", D), ("k", kv), ("v", kv), ("o", D))
        }
        raw |= {
            f"{at}.self_attn.{name}_proj.bias": randn(rows) for name, rows in (("q", D), ("k", kv), ("v", kv)) if bias
        }
        raw |= {
            f"{at}.mlp.gate_proj.weight": randn(FFN, D),
            f"{at}.mlp.up_proj.weight": randn(FFN, D),
            f"{at}.mlp.down_proj.weight": randn(D, FFN),
        }
    return raw | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(D // HEADS // 2)}


def connector() -> dict[str, Tensor]:
    sizes = {"0.weight": (D, VD), "0.bias": (D,), "2.weight": (D, D), "2.bias": (D,)}
    return {f"model.mm_projector.{name}": randn(*shape) for name, shape in sizes.items()}


def tower() -> dict[str, Tensor]:
    raw = {"embeddings.class_embedding": randn(VD), "embeddings.patch_embedding.weight": randn(VD, 3, PATCH, PATCH)}
    raw["embeddings.position_embedding.weight"] = randn((SIDE // PATCH) ** 2 + 1, VD)
    raw["embeddings.position_ids"] = torch.arange((SIDE // PATCH) ** 2 + 1)[None]
    norms = ["pre_layrnorm", "post_layernorm"]
    for i in range(VLAYERS):
        at = f"encoder.layers.{i}"
        norms += [f"{at}.layer_norm1", f"{at}.layer_norm2"]
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            raw |= {f"{at}.self_attn.{name}.weight": randn(VD, VD), f"{at}.self_attn.{name}.bias": randn(VD)}
        raw |= {
            f"{at}.mlp.fc1.weight": randn(VFFN, VD),
            f"{at}.mlp.fc1.bias": randn(VFFN),
            f"{at}.mlp.fc2.weight": randn(VD, VFFN),
            f"{at}.mlp.fc2.bias": randn(VD),
        }
    for norm in norms:
        raw |= {f"{norm}.weight": 1 + randn(VD), f"{norm}.bias": randn(VD)}
    return {TOWER + name: value for name, value in raw.items()}


def projector(prefix: str = "alignment_projector.") -> dict[str, Tensor]:
    sizes = {
        "0.weight": (HIDDEN, D),
        "0.bias": (HIDDEN,),
        "2.weight": (HIDDEN, HIDDEN),
        "2.bias": (HIDDEN,),
        "4.weight": (Z, HIDDEN),
        "4.bias": (Z,),
    }
    return {f"{prefix}projector.{name}": randn(*shape) for name, shape in sizes.items()}


def whole(bias: bool = False) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return language_model(bias) | connector() | tower()


def words() -> list[str]:
    return [
        "<unk>",
        "<s>",
        "</s>",
        "USER:",
        "ASSISTANT:",
        "what",
        "is",
        "this",
        "?",
        *(f"w{i}" for i in range(VOCAB - 9)),
    ]


def tokenizer_files(folder: Path) -> None:
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words())}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def folder_of(
    folder: Path, tensors: dict[str, Tensor] | None, tokenizer: bool = True, tower: Path | None = None, **settings: Any
) -> Path:
    folder.mkdir(parents=True)
    tower = tower or tower_folder(folder.parent / "clip")
    (folder / "config.json").write_text(json.dumps(CONFIG | {"mm_vision_tower": str(tower)} | settings))
    if tensors is not None:
        save_file(tensors, folder / "model.safetensors")
    if tokenizer:
        tokenizer_files(folder)
    return folder


def tower_folder(folder: Path, tensors: dict[str, Tensor] | None = None) -> Path:
    """A CLIP folder as the hub has it: the text half is there too, and is not wanted."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(
        json.dumps({"model_type": "clip", "vision_config": VISION, "text_config": {"hidden_size": 8}})
    )
    if tensors:
        own = {
            name.removeprefix("model.vision_tower.vision_tower."): value
            for name, value in tensors.items()
            if name.startswith(TOWER)
        }
        save_file(
            own | {"logit_scale": torch.ones(()), "text_model.final_layer_norm.weight": torch.ones(8)},
            folder / "model.safetensors",
        )
    return folder


def shard(folder: Path, tensors: dict[str, Tensor], kind: str) -> None:
    stem, names = {"safetensors": "model", "bin": "pytorch_model"}[kind], sorted(tensors)
    files = {name: f"{stem}-0000{1 + i % 2}-of-00002.{kind}" for i, name in enumerate(names)}
    for file in set(files.values()):
        part = {name: tensors[name] for name in names if files[name] == file}
        save_file(part, folder / file) if kind == "safetensors" else torch.save(part, folder / file)
    (folder / f"{stem}.{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def lora_folder(
    root: Path,
    raw: dict[str, Tensor],
    trained: dict[str, Tensor],
    *,
    rslora: bool = False,
    named: str = "lora_A.weight",
) -> Path:
    """`root/base` with the language model and `root/lora` with what LoRA training writes; the tower lies in
    `root/tower`."""
    folder_of(
        root / "base",
        {name: value for name, value in raw.items() if "mm_projector" not in name and not name.startswith(TOWER)},
        model_type="llama",
    )
    official = folder_of(
        root / "lora", None, tokenizer=False, mm_vision_tower=str(tower_folder(root / "tower", raw)), **VIRAL
    )
    (official / "adapter_config.json").write_text(json.dumps(LORA | {"use_rslora": rslora}))
    adapter = {}
    for name, value in raw.items():
        if "model.layers." in name and name.endswith("_proj.weight"):
            at = f"base_model.model.{name.removesuffix('weight')}"
            adapter |= {
                f"{at}{named}": randn(4, value.shape[1]),
                f"{at}{named.replace('_A', '_B')}": 0.1 * randn(value.shape[0], 4),
            }
    save_file(adapter, official / "adapter_model.safetensors")
    others = {name: value for name, value in raw.items() if "mm_projector" in name} | trained
    torch.save(
        {f"base_model.model.{name}": value for name, value in others.items()}, official / "non_lora_trainables.bin"
    )
    return official


# --- the forward pass, written out ----------------------------------------------------------------


def see(raw: dict[str, Tensor], pixels: Tensor, *, class_token: bool = False) -> Tensor:
    """CLIP up to the last block but one, with or without the class token."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (VD,), raw[f"{TOWER}{name}.weight"], raw[f"{TOWER}{name}.bias"], 1e-5)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ raw[f"{TOWER}{name}.weight"].T + raw[f"{TOWER}{name}.bias"]

    patches = (
        F.conv2d(pixels, raw[f"{TOWER}embeddings.patch_embedding.weight"], stride=PATCH).flatten(2).transpose(1, 2)
    )
    x = torch.cat([raw[f"{TOWER}embeddings.class_embedding"].expand(len(patches), 1, VD), patches], 1)
    x = norm(x + raw[f"{TOWER}embeddings.position_embedding.weight"], "pre_layrnorm")
    for i in range(VLAYERS - 1):
        at = f"encoder.layers.{i}"
        h = norm(x, f"{at}.layer_norm1")
        q, k, v = (linear(h, f"{at}.self_attn.{n}_proj").unflatten(-1, (VHEADS, -1)).transpose(1, 2) for n in "qkv")
        weights = (q @ k.mT * (VD // VHEADS) ** -0.5).softmax(-1)
        x = x + linear((weights @ v).transpose(1, 2).flatten(2), f"{at}.self_attn.out_proj")
        h = linear(norm(x, f"{at}.layer_norm2"), f"{at}.mlp.fc1")
        x = x + linear(h * torch.sigmoid(1.702 * h), f"{at}.mlp.fc2")
    return x if class_token else x[:, 1:]


def answer(raw: dict[str, Tensor], ids: Tensor, pixels: Tensor, image_id: int) -> Tensor:
    """Logits of one sequence whose image tokens are replaced by the projected picture."""
    name = "model.mm_projector."
    picture = (
        F.gelu(see(raw, pixels) @ raw[f"{name}0.weight"].T + raw[f"{name}0.bias"]) @ raw[f"{name}2.weight"].T
        + raw[f"{name}2.bias"]
    )
    x = raw["model.embed_tokens.weight"][ids.clamp(max=VOCAB - 1)]
    x[ids == image_id] = picture[0]
    size, dim = len(ids), D // HEADS
    angle = torch.arange(size)[:, None] / THETA ** (torch.arange(0, dim, 2) / dim)
    cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)
    hidden = torch.full((size, size), -torch.inf).triu(1)

    def norm(x: Tensor, weight: str) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + EPS).rsqrt() * raw[weight]

    def turn(x: Tensor) -> Tensor:
        return x * cos + torch.cat([-x[..., dim // 2 :], x[..., : dim // 2]], -1) * sin

    for i in range(LAYERS):
        at = f"model.layers.{i}"
        h = norm(x, f"{at}.input_layernorm.weight")
        q, k, v = (
            h @ raw[f"{at}.self_attn.{n}_proj.weight"].T + raw.get(f"{at}.self_attn.{n}_proj.bias", torch.zeros(()))
            for n in "qkv"
        )
        q, k, v = (part.unflatten(-1, (-1, dim)).transpose(0, 1) for part in (q, k, v))
        k, v = k.repeat_interleave(HEADS // KV, 0), v.repeat_interleave(HEADS // KV, 0)
        mixed = ((turn(q) @ turn(k).mT * dim**-0.5 + hidden).softmax(-1) @ v).transpose(0, 1).flatten(1)
        x = x + mixed @ raw[f"{at}.self_attn.o_proj.weight"].T
        h = norm(x, f"{at}.post_attention_layernorm.weight")
        x = (
            x
            + (F.silu(h @ raw[f"{at}.mlp.gate_proj.weight"].T) * (h @ raw[f"{at}.mlp.up_proj.weight"].T))
            @ raw[f"{at}.mlp.down_proj.weight"].T
        )
    return norm(x, "model.norm.weight") @ raw["lm_head.weight"].T


def check_logits(out: Path, raw: dict[str, Tensor]) -> None:
    """The converted folder, loaded by transformers alone, gives the logits of the raw tensors."""
    model = AutoModelForImageTextToText.from_pretrained(out, dtype="auto", use_safetensors=True).eval()
    processor = AutoProcessor.from_pretrained(out)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 100, 3), dtype=np.uint8))
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is this ? w3 w70"}]}],
        add_generation_prompt=True,
    )
    inputs = processor(images=picture, text=prompt, return_tensors="pt")
    ids = inputs["input_ids"][0]
    assert (ids == processor.image_token_id).sum() == (SIDE // PATCH) ** 2
    with torch.inference_mode():
        logits = model(**inputs).logits[0]
    expected = answer(raw, ids, inputs["pixel_values"], processor.image_token_id)
    assert expected.std() > 0.3
    torch.testing.assert_close(logits[:, :VOCAB], expected, atol=1e-5, rtol=1e-5)
    assert not (logits.argmax(-1) >= VOCAB).any(), "an added token is never the likeliest"


# --- what is converted ----------------------------------------------------------------------------


def test_a_whole_folder_by_the_real_command(tmp_path: Path) -> None:
    raw = whole()
    official = folder_of(tmp_path / "llava-v1.5", raw)
    done = run("workbench.convert", str(official), str(tmp_path / "out"))
    assert "llama LLaVA" in done.stdout
    assert "dropped" not in done.stdout
    check_logits(tmp_path / "out", raw)
    assert not (tmp_path / "out" / HEAD_FILE).exists()
    assert not (tmp_path / "out" / "alignment.json").exists()


def test_the_folder_passes_the_validation_at_load_and_pads_as_it_was_trained(tmp_path: Path) -> None:
    main([str(folder_of(tmp_path / "official", whole())), str(tmp_path / "out")])
    mllm = MLLM.load(str(tmp_path / "out"))
    assert (
        mllm.prompt("what is this ?")
        == "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful,"
        " detailed, and polite answers to the user's questions. USER: <image>\nwhat is this ? ASSISTANT:"
    )
    images = mllm.processor.image_processor
    assert images.do_pad
    assert not images.do_center_crop
    wide = Image.new("RGB", (112, 56), (255, 255, 255))
    pixels = images(wide, return_tensors="pt")["pixel_values"][0]
    assert pixels.shape == (3, SIDE, SIDE)
    assert pixels[:, :13].abs().max() < 0.05
    assert pixels[:, 16:40].min() > 1.9
    assert mllm.model.generation_config.eos_token_id == 2
    assert mllm.generate(mllm.encode([wide], ["what is this ?"]), max_new_tokens=2)


def test_the_class_token_is_a_visual_token_without_a_place(tmp_path: Path) -> None:
    """`cls_patch`: what CLIP puts out for the class stands before the patches; computed from the raw tensors, then
    found in the model."""
    raw = whole()
    main([str(folder_of(tmp_path / "official", raw, mm_vision_select_feature="cls_patch")), str(tmp_path / "out")])
    mllm = MLLM.load(str(tmp_path / "out"))
    batch = mllm.encode([Image.new("RGB", (112, 56), (200, 90, 30))], ["what is this ?"])
    (first, patches), patch_grid = mllm.visual_tokens(batch)[0], SIDE // PATCH
    assert first.grid is None
    assert len(first.index) == 1
    assert patches.grid == (patch_grid, patch_grid)
    assert int(patches.index[0]) == int(first.index[0]) + 1
    name = "model.mm_projector."
    features = see(raw, batch.inputs["pixel_values"], class_token=True)
    expected = (
        F.gelu(features @ raw[f"{name}0.weight"].T + raw[f"{name}0.bias"]) @ raw[f"{name}2.weight"].T
        + raw[f"{name}2.bias"]
    )
    (activations,) = read(mllm, batch, layers=[0])
    torch.testing.assert_close(activations.values[0], expected[0], atol=1e-5, rtol=1e-5)
    with pytest.raises(DataError, match="gives visual tokens without a grid"):
        mllm.token_grids(batch)


def test_square_images_are_cropped_in_the_centre(tmp_path: Path) -> None:
    raw = whole()
    main([str(folder_of(tmp_path / "official", raw, image_aspect_ratio="square")), str(tmp_path / "out")])
    images = AutoProcessor.from_pretrained(tmp_path / "out").image_processor
    assert images.do_center_crop
    assert images.size["shortest_edge"] == SIDE
    assert images.crop_size["height"] == SIDE
    check_logits(tmp_path / "out", raw)


@pytest.mark.parametrize("several", [False, True])
def test_viral_folder_with_its_head(tmp_path: Path, several: bool, capsys: pytest.CaptureFixture[str]) -> None:
    raw = whole()
    heads = [projector(f"alignment_projector.{i}.") for i in range(2)] if several else [projector()]
    encoder = {
        "alignment_encoder.cls_token": randn(1, 1, 8),
        "alignment_encoder.blocks.0.attn.qkv.weight": randn(24, 8),
    }
    settings = VIRAL | ({"use_multiple_projectors": True, "target_layers": [1, 2]} if several else {})
    folder_of(tmp_path / "viral", raw | encoder | {k: v for head in heads for k, v in head.items()}, **settings)
    main([str(tmp_path / "viral"), str(tmp_path / "out")])
    assert "dropped 2 tensors alignment_encoder.*" in capsys.readouterr().out
    check_logits(tmp_path / "out", raw)
    assert json.loads((tmp_path / "out" / "alignment.json").read_text()) == {
        "layers": settings["target_layers"],
        "vfm": "dinov2-vit-b",
        "objective": "cosine",
        "weight": 0.5,
        "heads": len(heads),
        "head_trained": None,
    }
    ours = torch.nn.ModuleList([AlignmentHead(D, HIDDEN, Z) for _ in heads]) if several else AlignmentHead(D, HIDDEN, Z)
    ours.load_state_dict(load_file(tmp_path / "out" / HEAD_FILE))
    x = randn(7, D)
    for i, head in enumerate(heads):
        at = f"alignment_projector.{i}." if several else "alignment_projector."
        w = {name.removeprefix(f"{at}projector."): value for name, value in head.items()}
        expected = (
            F.silu(F.silu(x @ w["0.weight"].T + w["0.bias"]) @ w["2.weight"].T + w["2.bias"]) @ w["4.weight"].T
            + w["4.bias"]
        )
        torch.testing.assert_close((ours[i] if several else ours)(x), expected, atol=1e-5, rtol=1e-5)  # type: ignore[index, operator]


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards(tmp_path: Path, kind: str) -> None:
    raw = whole()
    official = folder_of(tmp_path / "official", None)
    shard(official, raw, kind)
    main([str(official), str(tmp_path / "out")])
    check_logits(tmp_path / "out", raw)


def test_safetensors_come_before_pickles_and_old_pickles_are_read(tmp_path: Path) -> None:
    raw = whole()
    official = folder_of(tmp_path / "official", raw)
    (official / "pytorch_model.bin").write_bytes(b"never opened")
    main([str(official), str(tmp_path / "out")])
    check_logits(tmp_path / "out", raw)
    old = folder_of(tmp_path / "old", None)
    torch.save(raw, old / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    main([str(old), str(tmp_path / "out2")])
    check_logits(tmp_path / "out2", raw)


@pytest.mark.parametrize("setting", ["config", "option"])
def test_a_tower_outside_the_checkpoint(tmp_path: Path, setting: str) -> None:
    raw = whole()
    outside = tower_folder(tmp_path / "clip-weights", raw)
    (outside / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25], "crop_size": 224})
    )
    own = {name: value for name, value in raw.items() if not name.startswith(TOWER)}
    named = str(outside) if setting == "config" else "openai/clip-vit-large-patch14-336"
    folder_of(tmp_path / "official", own, mm_vision_tower=named)
    main(
        [
            str(tmp_path / "official"),
            str(tmp_path / "out"),
            *(["--vision_tower", str(outside)] if setting == "option" else []),
        ]
    )
    check_logits(tmp_path / "out", raw)
    assert list(AutoProcessor.from_pretrained(tmp_path / "out").image_processor.image_std) == [0.25, 0.25, 0.25]


@pytest.mark.parametrize(("rslora", "named"), [(False, "lora_A.weight"), (True, "lora_A.default.weight")])
def test_lora_with_non_lora_trainables(tmp_path: Path, rslora: bool, named: str) -> None:
    raw = whole()
    official = lora_folder(tmp_path, raw, projector(), rslora=rslora, named=named)
    adapter, factor = load_file(official / "adapter_model.safetensors"), 8 / 2 if rslora else 8 / 4
    if rslora:  # the other kind of file for both
        torch.save(adapter, official / "adapter_model.bin")
        save_file(torch.load(official / "non_lora_trainables.bin"), official / "non_lora_trainables.safetensors")
        (official / "adapter_model.safetensors").unlink()
        (official / "non_lora_trainables.bin").unlink()
    main([str(official), str(tmp_path / "out"), "--base", str(tmp_path / "base")])
    for name in list(adapter):
        if ".lora_A." in name:
            target = name.removeprefix("base_model.model.").split(".lora_A.")[0] + ".weight"
            raw[target] = raw[target] + factor * (adapter[name.replace("lora_A", "lora_B")] @ adapter[name])
    check_logits(tmp_path / "out", raw)
    assert (tmp_path / "out" / HEAD_FILE).exists()
    assert json.loads((tmp_path / "out" / "alignment.json").read_text())["head_trained"] is True


def test_a_head_that_lora_left_frozen_is_said_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The original code freezes the projector under LoRA; it then lies in a file of its own, not among the trained
    tensors."""
    official = lora_folder(tmp_path, whole(), {})
    head = projector()
    torch.save(head, official / "alignment_projector.bin")
    main([str(official), str(tmp_path / "out"), "--base", str(tmp_path / "base")])
    assert "it was frozen while LoRA was trained" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "alignment.json").read_text())["head_trained"] is False
    assert torch.equal(load_file(tmp_path / "out" / HEAD_FILE)["4.bias"], head["alignment_projector.projector.4.bias"])
    (official / "alignment_projector.bin").unlink()
    main([str(official), str(tmp_path / "without"), "--base", str(tmp_path / "base")])
    assert "no alignment head" in capsys.readouterr().out
    assert not (tmp_path / "without" / HEAD_FILE).exists()


def test_a_connector_alone_goes_on_its_base(tmp_path: Path) -> None:
    raw = whole()
    base = {name: value for name, value in raw.items() if "mm_projector" not in name}
    folder_of(tmp_path / "base", base, model_type="llama")
    official = folder_of(tmp_path / "official", None, tokenizer=False, _name_or_path=str(tmp_path / "base"))
    torch.save({name: value for name, value in raw.items() if "mm_projector" in name}, official / "mm_projector.bin")
    main([str(official), str(tmp_path / "out")])
    check_logits(tmp_path / "out", raw)


def test_qwen_language_model(tmp_path: Path) -> None:
    raw = whole(bias=True)
    official = folder_of(
        tmp_path / "official",
        raw,
        model_type="llava_qwen2",
        architectures=["LlavaQwen2ForCausalLM"],
        use_sliding_window=False,
    )
    main([str(official), str(tmp_path / "out")])
    check_logits(tmp_path / "out", raw)
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "out").config.text_config.model_type == "qwen2"


def test_tied_embeddings_and_a_vocabulary_with_room(tmp_path: Path) -> None:
    """Rows beyond the tokenizer's length are there already, so that nothing is added."""
    raw = whole()  # its lm_head.weight is not the model's: the original code ties it to the embedding
    official = folder_of(tmp_path / "official", raw, tokenizer=False, tie_word_embeddings=True)
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words()[: VOCAB - 6])}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(official)
    main([str(official), str(tmp_path / "out")])
    check_logits(tmp_path / "out", raw | {"lm_head.weight": raw["model.embed_tokens.weight"]})
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert model.config.text_config.vocab_size == VOCAB
    assert model.config.image_token_id == VOCAB - 6


def test_half_precision_stays_and_the_connector_follows(tmp_path: Path) -> None:
    raw = {name: value.to(torch.bfloat16) if "mm_projector" not in name else value for name, value in whole().items()}
    main([str(folder_of(tmp_path / "official", raw)), str(tmp_path / "out")])
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {value.dtype for value in written.values()} == {torch.bfloat16}
    embedding = next(value for name, value in written.items() if name.endswith("embed_tokens.weight"))
    assert torch.equal(embedding[:VOCAB], raw["model.embed_tokens.weight"])
    assert len(embedding) == 128
    torch.testing.assert_close(
        embedding[VOCAB].float(), raw["model.embed_tokens.weight"].float().mean(0), atol=1e-2, rtol=1e-2
    )


def test_text_around_an_image_is_tokenized_like_in_the_original_code(tmp_path: Path) -> None:
    """There the two sides are tokenized on their own, so that a Llama tokenizer's space mark stands before the second
    one too."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{i:02X}>" for i in range(256)),
        "▁",
        *"abcdefghijklmnopqrstuvwxyzAERSTNIU.:?'",
    ]
    original = LlamaTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], add_bos_token=True)
    raw = whole()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        raw[name] = randn(len(pieces), D)
    official = folder_of(tmp_path / "official", raw, tokenizer=False, vocab_size=len(pieces))
    original.save_pretrained(official)
    main([str(official), str(tmp_path / "out")])
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    before, after = "a chat. USER: ", "\nwhat? ASSISTANT:"
    ids = processor.tokenizer(f"{before}<image>{after}")["input_ids"]
    assert LlamaTokenizer.from_pretrained(tmp_path / "out")(f"{before}<image>{after}")["input_ids"] == ids, (
        "by its own class, too, which rebuilds itself"
    )
    assert ids == [*original(before)["input_ids"], processor.image_token_id, *original(after)["input_ids"][1:]]
    assert original.convert_ids_to_tokens(ids[ids.index(processor.image_token_id) + 1 :][:2]) == ["▁", "<0x0A>"]


# --- what is refused ------------------------------------------------------------------------------


class Bomb:
    """Unpickled without care, this writes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.mark,)


def without(raw: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: value for name, value in raw.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: without(raw, "model.norm.weight"), r"it misses 1 tensor \(model.norm.weight\)$"),
        (
            lambda raw: {name: value for name, value in raw.items() if not name.startswith("model.layers.1.")},
            (
                r"it misses 9 tensors \(model.layers.1.input_layernorm.weight, model.layers.1.mlp.down_proj.weight,"
                r" model.layers.1.mlp.gate_proj.weight, ...\)$"
            ),
        ),
        (
            lambda raw: raw | {"model.layers.3.mlp.up_proj.weight": randn(2, 2)},
            r"it has 1 tensor \(model.layers.3.mlp.up_proj.weight\) too many$",
        ),
        (
            lambda raw: raw | {"model.mm_projector.4.weight": randn(D, D)},
            r"it has 1 tensor \(model.mm_projector.4.weight\) too many$",
        ),
        (
            lambda raw: raw | {"lm_head.weight": randn(VOCAB + 1, D), "model.norm.weight": randn(D + 1)},
            (
                r"it has 2 tensors \(lm_head.weight, model.norm.weight\) of another shape \('.+' is \(\d+.*\) instead"
                r" of \(\d+.*\)\)$"
            ),
        ),
        (
            lambda raw: without(raw, "lm_head.weight") | {"head": randn(2)},
            r"it misses 1 tensor \(lm_head.weight\), and it has 1 tensor \(head\) too many$",
        ),
        (
            lambda raw: raw | {"model.norm.weight": torch.ones(D, dtype=torch.int8)},
            "it has 1 tensor .model.norm.weight. that hold integers, as a quantized model",
        ),
        (
            lambda raw: raw | without(projector(), "alignment_projector.projector.2.bias"),
            "it misses 1 tensor .alignment_projector.projector.2.bias.$",
        ),
        (
            lambda raw: raw | projector("alignment_projector.0."),
            "it misses 6 tensors .+ and it has 6 tensors .+ too many$",
        ),
    ],
)
def test_tensors_that_do_not_fit(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str
) -> None:
    refuse(
        folder_of(tmp_path / "official", change(whole()), **VIRAL),
        tmp_path / "out",
        WeightsError,
        f"does not fit its config.json: {message}",
    )


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"model_type": "llava_mpt"},
            ModelError,
            "has model_type='llava_mpt': expected llava or llava_llama or llava_qwen or llava_qwen2",
        ),
        ({"mm_projector_type": "linear"}, ModelError, "has mm_projector_type='linear': expected mlp2x_gelu"),
        (
            {"mm_patch_merge_type": "spatial_unpad"},
            ModelError,
            "has mm_patch_merge_type='spatial_unpad': expected flat",
        ),
        ({"image_aspect_ratio": "anyres"}, ModelError, "has image_aspect_ratio='anyres': expected pad or square"),
        ({"residual": True}, ModelError, "has residual=True: expected False"),
        ({"text_config": {}}, ModelError, "is a transformers folder already"),
        (
            {"target_layers": 16},
            ModelError,
            r"has target_layers=16, projector_dim and z_dim \[1, 1\]: expected a list of layers and two sizes",
        ),
        ({"hidden_size": 33}, ModelError, "config.json does not describe a llama language model .*33"),
        ({"mm_vision_select_layer": -9}, ModelError, "has mm_vision_select_layer=-9: the vision encoder has 3 layers"),
        (
            {"mm_vision_tower": None},
            WeightsError,
            "does not say which vision encoder it belongs to: give a folder or hub id with --vision_tower",
        ),
    ],
)
def test_settings_that_are_not_supported(
    tmp_path: Path, settings: dict[str, Any], error: type[WorkbenchError], message: str
) -> None:
    refuse(folder_of(tmp_path / "official", whole(), **settings), tmp_path / "out", error, message)


def test_pickles_are_refused_and_never_run(tmp_path: Path) -> None:
    raw, mark = whole(), tmp_path / "mark"
    official = folder_of(tmp_path / "official", None)
    torch.save(raw | {"extra": Bomb(mark)}, official / "pytorch_model.bin")
    refuse(
        official,
        tmp_path / "out",
        WeightsError,
        "pytorch_model.bin was refused: it holds more than plain tensors, and opening it could run code",
    )
    torch.save([1, 2], official / "pytorch_model.bin")
    refuse(
        official,
        tmp_path / "out",
        WeightsError,
        "pytorch_model.bin was refused: expected a state dict of names and tensors",
    )
    (official / "pytorch_model.bin").write_bytes(b"PK nothing")
    refuse(official, tmp_path / "out", WeightsError, "pytorch_model.bin (could not be read|was refused)")
    torch.save(raw | {"extra": Bomb(mark)}, official / "model.safetensors")
    refuse(official, tmp_path / "out", WeightsError, "model.safetensors is not a safetensors file")
    lora = lora_folder(tmp_path / "l", raw, {})
    torch.save({"extra": Bomb(mark)}, lora / "non_lora_trainables.bin")
    refuse(
        lora,
        tmp_path / "out",
        WeightsError,
        "non_lora_trainables.bin was refused",
        "--base",
        str(tmp_path / "l" / "base"),
    )
    assert not mark.exists()


def test_files_that_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    refuse(tmp_path / "nowhere", out, WeightsError, "nowhere is not a folder")
    official = folder_of(tmp_path / "official", None)
    refuse(official, out, WeightsError, "holds no weights: expected model.safetensors or pytorch_model.bin")
    shard(official, whole(), "safetensors")
    (official / "model-00002-of-00002.safetensors").unlink()
    refuse(
        official, out, WeightsError, "shard .*model-00002-of-00002.safetensors is missing: .* that it holds 45 tensors"
    )
    (official / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"lm_head.weight": "../../secret"}})
    )
    refuse(
        official,
        out,
        WeightsError,
        "is not an index of shards: expected a weight_map from tensor names to files beside it",
    )
    (official / "config.json").write_text("{")
    refuse(official, out, WeightsError, "config.json is not valid JSON")
    (official / "config.json").unlink()
    refuse(official, out, WeightsError, "holds no config.json")
    no_words = folder_of(tmp_path / "no-words", whole(), tokenizer=False)
    refuse(
        no_words,
        out,
        WeightsError,
        "no tokenizer in .*no-words: expected one of tokenizer.json, tokenizer.model, vocab.json",
    )
    (no_words / "tokenizer.model").write_bytes(b"unknown")
    with monkeypatch.context() as patch:
        patch.setattr("workbench.convert.source.find_spec", lambda _: None)
        refuse(
            no_words,
            out,
            WeightsError,
            "tokenizer.model needs the package sentencepiece: pip install sentencepiece, or put its tokenizer.json"
            " beside it",
        )
    (no_words / "tokenizer.json").write_text("{}")
    refuse(no_words, out, WeightsError, "the tokenizer in .*no-words could not be loaded")
    own = {name: value for name, value in whole().items() if not name.startswith(TOWER)}
    no_tower = folder_of(tmp_path / "no-tower", own, mm_vision_tower="openai/clip-vit-large-patch14-336")
    refuse(
        no_tower,
        out,
        WeightsError,
        "vision encoder 'openai/clip-vit-large-patch14-336' is neither a folder .*; give a local folder with"
        " --vision_tower$",
    )
    other = tower_folder(tmp_path / "siglip")
    (other / "config.json").write_text(json.dumps({"model_type": "siglip_vision_model"}))
    refuse(
        no_tower,
        out,
        ModelError,
        "has model_type='siglip_vision_model': expected clip or clip_vision_model",
        "--vision_tower",
        str(other),
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "asks for use_dora=True: expected plain LoRA or rslora, with one rank"),
        ({"rank_pattern": {"q_proj": 8}}, "asks for rank_pattern={'q_proj': 8}"),
        ({"init_lora_weights": "pissa"}, "asks for init_lora_weights='pissa'"),
        ({"r": 0}, "has r=0 and lora_alpha=8: expected two numbers, r at least 1"),
        ({"r": 3}, "holds tensors without the rank r=3 of adapter_config.json: 42 tensors"),
    ],
)
def test_lora_variants_that_are_not_supported(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    official = lora_folder(tmp_path, whole(), {})
    (official / "adapter_config.json").write_text(json.dumps(LORA | settings))
    refuse(official, tmp_path / "out", WeightsError, message, "--base", str(tmp_path / "base"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda a, key: without(a, f"{key}.lora_B.weight"),
            "holds only one of lora_A and lora_B for 1 tensor .model.layers.0.mlp.up_proj.weight.$",
        ),
        (
            lambda a, key: a | {f"{key}.lora_B.weight": randn(FFN + 1, 4)},
            r"lora_B \(49, 4\) times lora_A \(4, 32\) does not fit 'model.layers.0.mlp.up_proj",
        ),
        (
            lambda a, key: a | {f"{key}.bias": randn(3)},
            "adapter tensor 'base_model.model.model.layers.0.mlp.up_proj.bias' is not one of LoRA's",
        ),
        (
            lambda a, key: a | {f"{key}x.lora_{w}.weight": randn(4, 4) for w in "AB"},
            "changes 1 tensor .*up_projx.weight. that the base does not hold",
        ),
    ],
)
def test_lora_factors_that_do_not_fit(tmp_path: Path, change: Callable[..., dict[str, Tensor]], message: str) -> None:
    official = lora_folder(tmp_path, whole(), {})
    file = official / "adapter_model.safetensors"
    save_file(
        change(
            {name: value.clone() for name, value in load_file(file).items()},
            "base_model.model.model.layers.0.mlp.up_proj",
        ),
        file,
    )
    refuse(official, tmp_path / "out", WeightsError, message, "--base", str(tmp_path / "base"))


def test_a_base_out_of_reach_is_named(tmp_path: Path) -> None:
    official = lora_folder(tmp_path, whole(), {})
    refuse(
        official,
        tmp_path / "out",
        WeightsError,
        "base language model 'lmsys/vicuna-7b-v1.5' is neither a folder .*; give a local folder with --base$",
    )
    refuse(
        official, tmp_path / "out", WeightsError, "base language model './typo' is neither a folder", "--base", "./typo"
    )


def test_a_taken_folder_is_left_alone(tmp_path: Path) -> None:
    official = folder_of(tmp_path / "official", whole())
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("mine")
    with pytest.raises(RunError, match="taken is there already: expected a new or an empty folder"):
        main([str(official), str(tmp_path / "taken")])
    (tmp_path / "empty").mkdir()
    main([str(official), str(tmp_path / "empty")])
    assert [file.name for file in (tmp_path / "taken").iterdir()] == ["mine"]
    assert (tmp_path / "empty" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "error: no folder given: expected python -m workbench.convert OFFICIAL_DIR OUT\n"),
        (["a", "b", "--bse", "c"], "error: unknown option '--bse': did you mean '--base'?\n"),
        (["a", "b"], "error: a is not a folder: expected a checkpoint folder of the original LLaVA or VIRAL code\n"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["convert", *words])
    with pytest.raises(SystemExit) as stop:
        command(main)
    assert stop.value.code == 2
    assert capsys.readouterr().err == message
    assert not list(tmp_path.iterdir())


def refuse(official: Path, out: Path, error: type[WorkbenchError], message: str, *options: str) -> None:
    """One sentence, and nothing written."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(error, match=message) as caught:
        main([str(official), str(out), *options])
    assert "\n" not in str(caught.value)
    assert sorted(out.parent.iterdir()) == before
