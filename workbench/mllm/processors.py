"""Read the processors of hub ids and folders, and compare them with the model's configuration.

Settings that old processors lack are taken from the configuration.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoProcessor, PretrainedConfig

from workbench.errors import ModelError, one_line
from workbench.mllm.hub_files import hub_file
from workbench.weights.pretrained import call

if TYPE_CHECKING:
    from workbench.mllm.family import Family, Setting

log = logging.getLogger(__name__)
FILE = "processor_config.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
FIRST_TOKENS = {  # tokens before the patches, by `model_type` of the vision encoder
    **dict.fromkeys(("clip_vision_model", "dinov2", "vit", "intern_vit"), 1),
    **dict.fromkeys(("siglip_vision_model", "siglip2_vision_model"), 0),
}
# vision encoders that also take images of other sizes than `image_size` of their configuration
ANY_SIZE = ("dinov2", "dinov2_with_registers", "pixtral")


def load_processor(name: str, family: Family, config: PretrainedConfig, *, check: bool = True, **options: Any) -> Any:
    """Return the processor of a hub id or a folder, with settings that it lacks taken from the model's `config`.

    Args:
        check: compare it with `config`.
        options: of from_pretrained, such as revision.

    Raises:
        ModelError: there is no processor, it has no tokenizer or no image processor, or it disagrees with the model
            about patches, images or numbers of tokens.
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
            f"model '{name}' has a {type(processor).__name__} without {missing[0]}: expected a processor for text and"
            " images"
        )
    _complete(name, family, processor, config, options)
    if check:
        check_agreement(name, family, config, processor)
    return processor


def _complete(name: str, family: Family, processor: Any, config: PretrainedConfig, options: dict[str, Any]) -> None:
    """Set settings that processor_config.json lacks in old revisions and fine-tunes, such as LLaVA's patch_size."""
    stored = _stored_settings(name, options)
    lacking = {
        key: model_value
        for key, processor_value, model_value in family.shared_settings(config, processor)
        if hasattr(processor, key)
        and stored.get(key) is None
        and model_value is not None
        and processor_value != model_value
    }
    for key, value in lacking.items():
        setattr(processor, key, value)
    if lacking:
        values = ", ".join(f"{key} {value}" for key, value in lacking.items())
        log.warning("%s: its %s lacks %s; taken from its config.json: %s", name, FILE, ", ".join(lacking), values)


def _stored_settings(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return the content of the processor's own file; empty if there is no such file or it cannot be read."""
    hub = {key: options[key] for key in ("revision", "local_files_only") if key in options}
    file = hub_file(name, FILE, **hub)
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8")) if file is not None else {}
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def check_agreement(name: str, family: Family, config: PretrainedConfig, processor: Any) -> None:
    """Check that processor and model agree about patches, images and numbers of visual tokens.

    Raises:
        ModelError: they do not; the message has both values.
    """
    settings = (*family.shared_settings(config, processor), *_image_token(config, processor))
    for setting, processor_value, model_value in settings:
        if processor_value is not None and model_value is not None and processor_value != model_value:
            raise ModelError(
                f"model '{name}' has two values of {setting}, {one_line(processor_value, 50)} in its processor and"
                f" {one_line(model_value, 50)} in its config.json: expected them to be equal; the processor may be"
                " another model's"
            )


def _image_token(config: PretrainedConfig, processor: Any) -> Iterable[Setting]:
    """Yield the id of the visual token if processor and model disagree about it.

    A processor may know a second id, such as that of Gemma's mark that begins an image; one must be the model's.
    """
    model_id = getattr(config, "image_token_id", None)
    ids = [getattr(part, "image_token_id", None) for part in (processor, processor.tokenizer)]
    ids = [token for token in ids if token is not None]
    if ids and model_id not in ids:
        yield "the image token", ids[0], model_id


# --- what families compare ------------------------------------------------------------------------


def side_of(value: Any) -> int | None:
    """Return the side in pixels of a square given as a number or as a list; None if it is not square."""
    if isinstance(value, list | tuple):
        return value[0] if value and all(part == value[0] for part in value) else None
    return value if isinstance(value, int) else None


def pixels_of(images: Any) -> tuple[int, int] | None:
    """Return height and width in pixels of an image processor's output; None if that depends on the image."""
    crop = getattr(images, "do_center_crop", None) and getattr(images, "crop_size", None)
    size = crop or (getattr(images, "do_resize", True) and getattr(images, "size", None)) or {}
    height, width = _get(size, "height"), _get(size, "width")
    return (height, width) if height and width else None


def _get(size: Any, key: str) -> Any:
    return size.get(key) if isinstance(size, dict) else getattr(size, key, None)


def image_size(config: PretrainedConfig, processor: Any) -> Iterable[Setting]:
    """Yield the size of images, if the vision encoder takes only one size."""
    vision = config.vision_config
    side = side_of(getattr(vision, "image_size", None))
    if side and vision.model_type not in ANY_SIZE and (pixels := pixels_of(processor.image_processor)) is not None:
        yield "the image size", f"{pixels[0]} x {pixels[1]}", f"{side} x {side}"


def patches_of(config: PretrainedConfig) -> int | None:
    """Return the number of patches of one image or tile; None if the configuration does not say it."""
    vision = config.vision_config
    size, patch = side_of(getattr(vision, "image_size", None)), side_of(getattr(vision, "patch_size", None))
    return (size // patch) ** 2 if size and patch else None


def llava_settings(config: PretrainedConfig, processor: Any) -> Iterable[Setting]:
    """Yield the settings of LLaVA, LLaVA-NeXT and LLaVA-OneVision, whose processor counts patches."""
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
    """Yield the settings of Qwen-VL, whose image processor cuts patches and merges them."""
    images, vision = processor.image_processor, config.vision_config
    for processor_key, model_key in (
        ("patch_size", "patch_size"),
        ("merge_size", "spatial_merge_size"),
        ("temporal_patch_size", "temporal_patch_size"),
    ):
        yield processor_key, getattr(images, processor_key, None), getattr(vision, model_key, None)


def internvl_settings(config: PretrainedConfig, processor: Any) -> Iterable[Setting]:
    """Yield the settings of InternVL: tiles of one size, whose patches a pixel shuffle merges."""
    yield from image_size(config, processor)
    patches, ratio = patches_of(config), getattr(config, "downsample_ratio", None)
    if patches and ratio:
        yield "image_seq_length", processor.image_seq_length, round(patches * ratio**2)


def smolvlm_settings(config: PretrainedConfig, processor: Any) -> Iterable[Setting]:
    """Yield the settings of SmolVLM and Idefics3: those of InternVL under other names."""
    side, patches = side_of(config.vision_config.image_size), patches_of(config)
    yield "the image size", _get(getattr(processor.image_processor, "max_image_size", None), "longest_edge"), side
    if patches:
        yield "image_seq_len", processor.image_seq_len, patches // config.scale_factor**2


def gemma3_settings(config: PretrainedConfig, processor: Any) -> Iterable[Setting]:
    """Yield the settings of Gemma 3: one image of one size, whose patches are pooled."""
    yield from image_size(config, processor)
    yield "image_seq_length", processor.image_seq_length, config.mm_tokens_per_image


def paligemma_settings(config: PretrainedConfig, processor: Any) -> Iterable[Setting]:
    """Yield the settings of PaliGemma: one image of one size, one token for each patch."""
    yield from image_size(config, processor)
    yield "image_seq_length", processor.image_seq_length, patches_of(config)
