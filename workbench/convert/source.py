"""What lies in a folder of the original code: settings, tensors under their original names, vision tower, tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.convert.checkpoint import merge_lora, read_lora
from workbench.errors import ModelError, WeightsError
from workbench.models import did_you_mean
from workbench.weights.model_files import (
    Tensors,
    adapter_only_message,
    find_part,
    has_model,
    is_lora_checkpoint,
    locate,
    read_json,
    read_model,
    read_tensors,
)

if TYPE_CHECKING:
    from transformers import CLIPVisionConfig, PretrainedConfig, PreTrainedTokenizerBase

LANGUAGE_MODELS = {"llava": "llama", "llava_llama": "llama", "llava_qwen": "qwen2", "llava_qwen2": "qwen2"}
_CLIP_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
}
TOWERS = {
    "openai/clip-vit-large-patch14-336": _CLIP_L | {"image_size": 336},
    "openai/clip-vit-large-patch14": _CLIP_L | {"image_size": 224},
}
TOWER = "model.vision_tower.vision_tower.vision_model."
HEAD = "alignment_projector."
# stored by old versions, computed from the configuration today
BUFFERS = ("rotary_emb.inv_freq", "embeddings.position_ids")


@dataclass(frozen=True)
class Source:
    """What the original folder holds, under the original names.

    Attributes:
        folders: where to look for the tokenizer, in order.
        head_trained: False where a LoRA run left the head frozen at its first values, None where the folder does not
            tell.
    """

    config: dict[str, Any]
    tensors: Tensors
    folders: tuple[Path, ...]
    head_trained: bool | None


def read_source(official: Path, base: str = "") -> Source:
    """Read a whole model, or put LoRA factors and a connector on their base language model.

    Raises:
        ModelError: an architecture or a setting that is not supported.
        WeightsError: files are missing, damaged or refused.
    """
    if not official.is_dir():
        raise WeightsError(
            f"{official} is not a folder: expected a checkpoint folder of the original LLaVA or VIRAL"
            f" code{did_you_mean(str(official))}"
        )
    if is_lora_checkpoint(official):
        raise WeightsError(adapter_only_message(official))
    config = read_json(official / "config.json")
    check_supported(config, official)
    lora = (official / "adapter_config.json").exists()
    if not lora and has_model(official):
        return Source(config, read_model(official), (official,), None)
    if not lora and find_part(official, "mm_projector") is None:
        read_model(official)  # says what is missing
    named = read_json(official / "adapter_config.json").get("base_model_name_or_path") if lora else None
    folder = locate(base or named or config.get("_name_or_path") or "", "base language model", "--base")
    tensors = read_model(folder)
    # copies that the VIRAL code writes beside non_lora_trainables.bin
    for stem in ("mm_projector", "alignment_projector"):
        if file := find_part(official, stem):
            tensors |= _original_names(read_tensors(file))
    trained: bool | None = None
    if lora:
        others = _original_names(
            read_tensors(find_part(official, "non_lora_trainables") or official / "non_lora_trainables.bin")
        )
        trained = any(name.startswith(HEAD) for name in others)
        tensors |= others
        merge_lora(tensors, *read_lora(official))
    return Source(config, tensors, (official, folder), trained)


def check_supported(config: dict[str, Any], official: Path) -> None:
    """Refuse what transformers' LLaVA would compute differently.

    Raises:
        ModelError: names the setting, its value and what is supported.
    """
    if "text_config" in config:
        raise ModelError(
            f"{official} is a transformers folder already: expected one of the original LLaVA or VIRAL code"
        )
    wanted: dict[str, tuple[Any, ...]] = {
        "model_type": tuple(LANGUAGE_MODELS),
        "mm_projector_type": ("mlp2x_gelu",),
        "mm_vision_select_feature": ("patch", "cls_patch", None),
        "mm_patch_merge_type": ("flat", None),
        "image_aspect_ratio": ("pad", "square", None),
        "mm_use_im_start_end": (False, None),
        "residual": (False, None),
        "quantization_config": (None,),
    }
    for key, values in wanted.items():
        if config.get(key) not in values:
            raise ModelError(
                f"{official} has {key}={config.get(key)!r}: expected {' or '.join(map(str, values))}, which"
                " transformers' LLaVA can express"
            )
    layers, sizes = config.get("target_layers"), [config.get(key, 1) for key in ("projector_dim", "z_dim")]
    if not all(isinstance(size, int) and size > 0 for size in sizes) or not (
        layers is None or (isinstance(layers, list) and layers)
    ):
        raise ModelError(
            f"{official} has target_layers={layers!r}, projector_dim and z_dim {sizes}: expected a list of layers and"
            " two sizes"
        )


def _original_names(tensors: Tensors) -> Tensors:
    """Undo the prefixes that peft and single-part files have: `model.mm_projector.*`, `alignment_projector.*`,
    `lm_head.weight`."""
    plain = {name.removeprefix("base_model.model."): value for name, value in tensors.items()}
    return {f"model.{name}" if name.startswith("mm_projector.") else name: value for name, value in plain.items()}


def read_tower(tensors: Tensors, name: str) -> tuple[CLIPVisionConfig, dict[str, Any]]:
    """Return the tower's configuration and its pixel mean and deviation; adds its weights to `tensors` unless they are
    there.

    Raises:
        ModelError: a tower other than CLIP's.
        WeightsError: the tower is not within reach.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, CLIPVisionConfig

    own = any(key.startswith(TOWER) for key in tensors)
    if own and name in TOWERS and not Path(name).is_dir():
        return CLIPVisionConfig(**TOWERS[name]), {}  # type: ignore[arg-type]
    folder = locate(name, "vision tower", "--vision_tower")
    kind = read_json(folder / "config.json").get("model_type")
    if kind not in ("clip", "clip_vision_model"):
        raise ModelError(f"the vision tower {folder} has model_type={kind!r}: expected clip or clip_vision_model")
    try:
        whole = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError, StrictDataclassError) as error:
        raise ModelError(
            f"{folder / 'config.json'} does not describe a CLIP tower ({' '.join(str(error).split())[:200]})"
        ) from error
    if not own:
        found = read_model(folder)
        part = {
            key.removeprefix("vision_model."): value for key, value in found.items() if key.startswith("vision_model.")
        } or found
        tensors |= {TOWER + key: value for key, value in part.items() if not key.endswith(BUFFERS)}
    pixels = read_json(folder / "preprocessor_config.json") if (folder / "preprocessor_config.json").exists() else {}
    return getattr(whole, "vision_config", whole), {
        key: pixels[key] for key in ("image_mean", "image_std") if key in pixels
    }


def read_tokenizer(folders: tuple[Path, ...], text: PretrainedConfig) -> PreTrainedTokenizerBase:
    """The first folder's tokenizer, with `<image>` in its vocabulary, and `<pad>` if it pads with nothing yet.

    The original code tokenizes the text before and after an image separately, so that a Llama tokenizer puts its space
    mark before both: `legacy` does that.

    Raises:
        WeightsError: there is none, or it cannot be loaded.
    """
    from transformers import AddedToken, AutoTokenizer

    files = ("tokenizer.json", "tokenizer.model", "vocab.json")
    folder = next((f for f in folders if any((f / file).exists() for file in files)), None)
    if folder is None:
        raise WeightsError(f"no tokenizer in {' or '.join(map(str, folders))}: expected one of {', '.join(files)}")
    llama = text.model_type == "llama"
    if (
        not (folder / "tokenizer.json").exists()
        and (folder / "tokenizer.model").exists()
        and find_spec("sentencepiece") is None
    ):
        raise WeightsError(
            f"{folder / 'tokenizer.model'} needs the package sentencepiece: pip install sentencepiece, or put its"
            " tokenizer.json beside it"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, config=text, **({"legacy": True} if llama else {}))
    except Exception as error:  # transformers raises many unrelated types here
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise WeightsError(f"the tokenizer in {folder} could not be loaded ({reason[0][:200]})") from error
    if llama:
        tokenizer.init_kwargs["legacy"] = True  # a Llama tokenizer takes the setting for itself and would not write it
    tokenizer.add_tokens(AddedToken("<image>", special=True, normalized=False), special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": AddedToken("<pad>", special=True, normalized=False)})
    return tokenizer
