"""Read a folder of the original code: settings, tensors under their original names, vision encoder, tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.convert.checkpoint import merge_lora, read_lora
from workbench.errors import ModelError, WeightsError, one_line
from workbench.models import did_you_mean
from workbench.weights.model_files import (
    adapter_only_message,
    find_part,
    has_model,
    is_lora_checkpoint,
    locate,
    read_json,
)
from workbench.weights.tensor_files import Tensors, read_model, read_tensors

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
VISION_ENCODERS = {  # known configurations, so that these need not be downloaded
    "openai/clip-vit-large-patch14-336": _CLIP_L | {"image_size": 336},
    "openai/clip-vit-large-patch14": _CLIP_L | {"image_size": 224},
}
# prefixes of the original names
VISION_ENCODER = "model.vision_tower.vision_tower.vision_model."
HEAD = "alignment_projector."
# suffixes of buffers that old versions stored, and that are computed from the configuration today
BUFFERS = ("rotary_emb.inv_freq", "embeddings.position_ids")


@dataclass(frozen=True)
class Source:
    """The content of an original folder.

    Attributes:
        config: the content of its config.json.
        tensors: under the original names.
        folders: where to look for the tokenizer, in order.
        head_trained: False if a LoRA training left the alignment head frozen at its initial values, None if that is
            unknown.
    """

    config: dict[str, Any]
    tensors: Tensors
    folders: tuple[Path, ...]
    head_trained: bool | None


def read_source(official: Path, base: str = "") -> Source:
    """Read a whole model, or merge a LoRA adapter or add a projector to its base language model.

    Args:
        base: folder or hub id of the base language model; by default the one that the folder names.

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
        read_model(official)  # raises the error that names what is missing
    adapter_base = read_json(official / "adapter_config.json").get("base_model_name_or_path") if lora else None
    folder = locate(base or adapter_base or config.get("_name_or_path") or "", "base language model", "--base")
    tensors = read_model(folder)
    # the VIRAL code writes copies of these beside non_lora_trainables.bin
    for stem in ("mm_projector", "alignment_projector"):
        if file := find_part(official, stem):
            tensors |= _original_names(read_tensors(file))
    head_trained: bool | None = None
    if lora:
        others_file = find_part(official, "non_lora_trainables") or official / "non_lora_trainables.bin"
        others = _original_names(read_tensors(others_file))
        head_trained = any(name.startswith(HEAD) for name in others)
        tensors |= others
        merge_lora(tensors, *read_lora(official))
    return Source(config, tensors, (official, folder), head_trained)


def check_supported(config: dict[str, Any], official: Path) -> None:
    """Refuse settings with which transformers' LLaVA would compute something else.

    Raises:
        ModelError: the message has the setting, its value and the supported values.
    """
    if "text_config" in config:
        raise ModelError(
            f"{official} is a transformers folder already: expected one of the original LLaVA or VIRAL code"
        )
    supported: dict[str, tuple[Any, ...]] = {
        "model_type": tuple(LANGUAGE_MODELS),
        "mm_projector_type": ("mlp2x_gelu",),
        "mm_vision_select_feature": ("patch", "cls_patch", None),
        "mm_patch_merge_type": ("flat", None),
        "image_aspect_ratio": ("pad", "square", None),
        "mm_use_im_start_end": (False, None),
        "residual": (False, None),
        "quantization_config": (None,),
    }
    for key, values in supported.items():
        if config.get(key) not in values:
            raise ModelError(
                f"{official} has {key}={config.get(key)!r}: expected {' or '.join(map(str, values))}, which"
                " transformers' LLaVA supports"
            )
    layers, sizes = config.get("target_layers"), [config.get(key, 1) for key in ("projector_dim", "z_dim")]
    sizes_valid = all(isinstance(size, int) and size > 0 for size in sizes)
    layers_valid = layers is None or (isinstance(layers, list) and layers)
    if not sizes_valid or not layers_valid:
        raise ModelError(
            f"{official} has target_layers={layers!r}, projector_dim and z_dim {sizes}: expected a list of layers and"
            " two sizes"
        )


def _original_names(tensors: Tensors) -> Tensors:
    """Return tensors of peft and of single-part files under the original names.

    These are, for example, `model.mm_projector.*`, `alignment_projector.*` and `lm_head.weight`.
    """
    plain = {name.removeprefix("base_model.model."): value for name, value in tensors.items()}
    return {f"model.{name}" if name.startswith("mm_projector.") else name: value for name, value in plain.items()}


def read_vision_encoder(tensors: Tensors, name: str) -> tuple[CLIPVisionConfig, dict[str, Any]]:
    """Return the configuration of the vision encoder, and its image_mean and image_std if it states them.

    Args:
        tensors: of the model; the weights of the vision encoder are added unless they are there already.
        name: folder or hub id of the vision encoder.

    Raises:
        ModelError: a vision encoder other than CLIP's.
        WeightsError: it is not within reach.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, CLIPVisionConfig

    has_weights = any(key.startswith(VISION_ENCODER) for key in tensors)
    if has_weights and name in VISION_ENCODERS and not Path(name).is_dir():
        return CLIPVisionConfig(**VISION_ENCODERS[name]), {}  # type: ignore[arg-type]
    folder = locate(name, "vision encoder", "--vision_tower")
    kind = read_json(folder / "config.json").get("model_type")
    if kind not in ("clip", "clip_vision_model"):
        raise ModelError(f"the vision encoder {folder} has model_type={kind!r}: expected clip or clip_vision_model")
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError, StrictDataclassError) as error:
        raise ModelError(
            f"{folder / 'config.json'} does not describe a CLIP vision encoder ({one_line(error, 200)})"
        ) from error
    if not has_weights:
        clip = read_model(folder)
        prefix = "vision_model."
        vision = {key.removeprefix(prefix): value for key, value in clip.items() if key.startswith(prefix)} or clip
        tensors |= {VISION_ENCODER + key: value for key, value in vision.items() if not key.endswith(BUFFERS)}
    file = folder / "preprocessor_config.json"
    settings = read_json(file) if file.exists() else {}
    normalization: dict[str, Any] = {key: settings[key] for key in ("image_mean", "image_std") if key in settings}
    return getattr(config, "vision_config", config), normalization


def read_tokenizer(folders: tuple[Path, ...], text: PretrainedConfig) -> PreTrainedTokenizerBase:
    """Return the first tokenizer in `folders`, with `<image>` added, and `<pad>` if it has no padding token.

    The original code tokenizes the text before and after an image separately, so a Llama tokenizer puts its space mark
    before both. The setting `legacy` does the same here.

    Raises:
        WeightsError: there is no tokenizer, or it cannot be loaded.
    """
    from transformers import AddedToken, AutoTokenizer

    files = ("tokenizer.json", "tokenizer.model", "vocab.json")
    folder = next((f for f in folders if any((f / file).exists() for file in files)), None)
    if folder is None:
        raise WeightsError(f"no tokenizer in {' or '.join(map(str, folders))}: expected one of {', '.join(files)}")
    llama = text.model_type == "llama"
    only_sentencepiece = not (folder / "tokenizer.json").exists() and (folder / "tokenizer.model").exists()
    if only_sentencepiece and find_spec("sentencepiece") is None:
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
        tokenizer.init_kwargs["legacy"] = True  # a Llama tokenizer uses the setting, but would not save it
    tokenizer.add_tokens(AddedToken("<image>", special=True, normalized=False), special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": AddedToken("<pad>", special=True, normalized=False)})
    return tokenizer
