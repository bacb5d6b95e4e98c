"""Processors of hub ids and folders: read, completed from the model's configuration where old ones lack a setting, and
compared with it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoProcessor, PretrainedConfig

from workbench.errors import ModelError, one_line
from workbench.mllm.load import hub_file
from workbench.weights.pretrained import call

if TYPE_CHECKING:
    from workbench.mllm.family import Family, Setting

log = logging.getLogger(__name__)
FILE = "processor_config.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
FIRST_TOKENS = {  # tokens before the patches, by the kind of vision encoder
    **dict.fromkeys(("clip_vision_model", "dinov2", "vit", "intern_vit"), 1),
    **dict.fromkeys(("siglip_vision_model", "siglip2_vision_model"), 0),
}
# vision encoders that take images of other sizes than their configuration says
ANY_SIZE = ("dinov2", "dinov2_with_registers", "pixtral")


def load_processor(name: str, family: Family, config: PretrainedConfig, *, check: bool = True, **options: Any) -> Any:
    """The processor of a hub id or a folder, with what it lacks taken from the model's `config`.

    Args:
        check: compare it with `config`.

    Raises:
        ModelError: it is not there, lacks one of its parts, or means other patches, images or numbers of tokens than
            the model.
    """

    def failed(error: Exception) -> ModelError:
        folder = Path(name)
        if folder.is_dir() and not any((folder / file).exists() for file in TOKENIZERS):
            return ModelError(
                f"model '{name}' has no tokenizer: expected {', '.join(TOKENIZERS[:-1])} or {TOKENIZERS[-1]} in its"
                " folder"
            )
        return ModelError(
            f"model '{name}' has no processor that could be loaded ({one_line(error, 140)}): expected its tokenizer and"
            f" {FILE}"
        )

    processor = call(lambda: AutoProcessor.from_pretrained(name, **options), failed)
    if missing := [part for part in ("tokenizer", "image_processor") if not hasattr(processor, part)]:
        raise ModelError(
            f"model '{name}' has a {type(processor).__name__} without {missing[0]}: expected a processor of text and"
            " images"
        )
    _complete(name, family, processor, config, options)
    if check:
        check_agreement(name, family, config, processor)
    return processor


def _complete(name: str, family: Family, processor: Any, config: PretrainedConfig, options: dict[str, Any]) -> None:
    """Set what old revisions and fine-tunes do not say in their processor_config.json, such as LLaVA's patch_size."""
    written = _written(name, options)
    lacking = {
        key: theirs
        for key, ours, theirs in family.shared_settings(config, processor)
        if hasattr(processor, key) and written.get(key) is None and theirs is not None and ours != theirs
    }
    for key, value in lacking.items():
        setattr(processor, key, value)
    if lacking:
        values = ", ".join(f"{key} {value}" for key, value in lacking.items())
        log.warning(
            "%s: its %s does not say %s; taken from its config.json: %s", name, FILE, ", ".join(lacking), values
        )


def _written(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """What the processor's own file says; nothing where there is none."""
    hub = {key: options[key] for key in ("revision", "local_files_only") if key in options}
    file = hub_file(name, FILE, **hub)
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8")) if file is not None else {}
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def check_agreement(name: str, family: Family, config: PretrainedConfig, processor: Any) -> None:
    """See that processor and model mean the same patches, images and numbers of visual tokens.

    Raises:
        ModelError: they do not; both values are named.
    """
    for what, ours, theirs in (*family.shared_settings(config, processor), *_image_token(config, processor)):
        if ours is not None and theirs is not None and ours != theirs:
            values = f"{one_line(ours, 50)} in its processor and {one_line(theirs, 50)} in its config.json"
            raise ModelError(
                f"model '{name}' has two values of {what}, {values}: expected one; the processor may be another model's"
            )


def _image_token(config: PretrainedConfig, processor: Any) -> Iterable[Setting]:
    """The id of the visual token, of which a processor may know another one too, such as Gemma's mark that begins an
    image."""
    theirs = getattr(config, "image_token_id", None)
    known = [getattr(part, "image_token_id", None) for part in (processor, processor.tokenizer)]
    known = [token for token in known if token is not None]
    if known and theirs not in known:
        yield "the image token", known[0], theirs


# --- what families compare ------------------------------------------------------------------------


def side_of(value: Any) -> int | None:
    """The side in pixels of a square, however it is written."""
    if isinstance(value, list | tuple):
        return value[0] if value and all(part == value[0] for part in value) else None
    return value if isinstance(value, int) else None


def pixels_of(images: Any) -> tuple[int, int] | None:
    """Height and width of what an image processor makes of every image; None where that depends on the image."""
    crops = getattr(images, "do_center_crop", None) and getattr(images, "crop_size", None)
    size = crops or (getattr(images, "do_resize", True) and getattr(images, "size", None)) or {}
    height, width = _get(size, "height"), _get(size, "width")
    return (height, width) if height and width else None


def _get(size: Any, key: str) -> Any:
    return size.get(key) if isinstance(size, dict) else getattr(size, key, None)


def image_size(config: PretrainedConfig, processor: Any) -> Iterable[Setting]:
    """The size of images, for vision encoders that take one only."""
    vision = config.vision_config
    side = side_of(getattr(vision, "image_size", None))
    if side and vision.model_type not in ANY_SIZE and (pixels := pixels_of(processor.image_processor)) is not None:
        yield "the image size", f"{pixels[0]} x {pixels[1]}", f"{side} x {side}"


def patches_of(config: PretrainedConfig) -> int | None:
    """Patches of one image or tile."""
    vision = config.vision_config
    size, patch = side_of(getattr(vision, "image_size", None)), side_of(getattr(vision, "patch_size", None))
    return (size // patch) ** 2 if size and patch else None


def llava_settings(config: PretrainedConfig, processor: Any) -> Iterable[Setting]:
    """LLaVA, LLaVA-NeXT and LLaVA-OneVision: a processor that counts patches."""
    vision, patches = config.vision_config, patches_of(config)
    first = FIRST_TOKENS.get(vision.model_type)
    yield "patch_size", getattr(processor, "patch_size", None), side_of(getattr(vision, "patch_size", None))
    yield from image_size(config, processor)
    for key in ("vision_feature_select_strategy", "vision_aspect_ratio"):
        yield key, getattr(processor, key, None), getattr(config, key, None)
    yield "num_additional_image_tokens", getattr(processor, "num_additional_image_tokens", None), first
    if patches is not None and first is not None:
        yield "num_image_tokens", getattr(processor, "num_image_tokens", None), patches + first
    pinpoints = "image_grid_pinpoints"
    yield (
        pinpoints,
        _sizes(getattr(processor.image_processor, pinpoints, None)),
        _sizes(getattr(config, pinpoints, None)),
    )


def _sizes(pinpoints: Any) -> list[list[int]] | None:
    return None if pinpoints is None else sorted(list(size) for size in pinpoints)


def merged_settings(config: PretrainedConfig, processor: Any) -> Iterable[Setting]:
    """Qwen-VL: an image processor that cuts patches, and merges them."""
    images, vision = processor.image_processor, config.vision_config
    for ours, theirs in (
        ("patch_size", "patch_size"),
        ("merge_size", "spatial_merge_size"),
        ("temporal_patch_size", "temporal_patch_size"),
    ):
        yield ours, getattr(images, ours, None), getattr(vision, theirs, None)


def internvl_settings(config: PretrainedConfig, processor: Any) -> Iterable[Setting]:
    """InternVL: tiles of one size, whose patches a pixel shuffle merges."""
    yield from image_size(config, processor)
    patches, ratio = patches_of(config), getattr(config, "downsample_ratio", None)
    if patches and ratio:
        yield "image_seq_length", processor.image_seq_length, round(patches * ratio**2)


def smolvlm_settings(config: PretrainedConfig, processor: Any) -> Iterable[Setting]:
    """SmolVLM and Idefics3: as InternVL, with names of their own."""
    side, patches = side_of(config.vision_config.image_size), patches_of(config)
    yield "the image size", _get(getattr(processor.image_processor, "max_image_size", None), "longest_edge"), side
    if patches:
        yield "image_seq_len", processor.image_seq_len, patches // config.scale_factor**2


def gemma3_settings(config: PretrainedConfig, processor: Any) -> Iterable[Setting]:
    """Gemma 3: one image of one size, pooled."""
    yield from image_size(config, processor)
    yield "image_seq_length", processor.image_seq_length, config.mm_tokens_per_image


def paligemma_settings(config: PretrainedConfig, processor: Any) -> Iterable[Setting]:
    """PaliGemma: one image of one size, a token for each patch."""
    yield from image_size(config, processor)
    yield "image_seq_length", processor.image_seq_length, patches_of(config)
