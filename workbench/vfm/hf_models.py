"""VFMs whose network comes from transformers.

DINOv2 is here and not in timm_models.py because timm resamples its position embeddings with antialiasing, which changes
the features of images of other sizes than 518 pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    CLIPVisionModel,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersModel,
    DINOv3ViTModel,
    IJepaModel,
    PreTrainedConfig,
    SamVisionModel,
    SiglipVisionModel,
    ViTModel,
)

from workbench.errors import WeightsError, one_line
from workbench.hashing import fingerprint, saved_tensors
from workbench.vfm.base import CATALOGUE, CLIP, HALF, IMAGENET, Network, VFMEntry
from workbench.weights.catalogue import CATALOGUE as WEIGHTS
from workbench.weights.catalogue import Weights
from workbench.weights.fetch import check_unchanged, load_weights, weights_folder
from workbench.weights.model_files import read_json
from workbench.weights.pretrained import call

UNUSED = ("mask_token", "pooler.dense")  # parts of a network that do not affect the features; a file may lack them


def _depth_config(**sizes: Any) -> PreTrainedConfig:
    return DepthAnythingConfig(backbone_config=Dinov2Config(**sizes, reshape_hidden_states=False))


@dataclass(frozen=True)
class Kind:
    """How one architecture of transformers is built and read.

    Attributes:
        model: the class whose `from_pretrained` reads the folder.
        prefix: config -> number of tokens before the patches (class token, registers).
        block: index of the hidden state whose patch tokens are the features; None for the last one after the norm.
        call: extra arguments of forward.
        config: makes a config from sizes; by default the config class of the model.
        part: model -> the vision encoder within it.
        is_map: whether the network returns a map (image, d, gh, gw) instead of tokens, from images of one fixed size.
    """

    model: Any
    prefix: Callable[[Any], int] = lambda config: 1
    block: int | None = None
    call: Mapping[str, Any] = field(default_factory=dict)
    config: Callable[..., PreTrainedConfig] | None = None
    part: Callable[[Any], nn.Module] = lambda model: model
    is_map: bool = False


INTERPOLATE = {"interpolate_pos_encoding": True}
KINDS = {
    "dinov2": Kind(Dinov2Model),
    "dinov2_with_registers": Kind(Dinov2WithRegistersModel, lambda config: 1 + config.num_register_tokens),
    "dinov3_vit": Kind(DINOv3ViTModel, lambda config: 1 + config.num_register_tokens),
    "clip": Kind(CLIPVisionModel, block=-2, call=INTERPOLATE),
    "siglip": Kind(SiglipVisionModel, lambda config: 0, call=INTERPOLATE),
    "vit": Kind(ViTModel, call=INTERPOLATE),
    "ijepa": Kind(IJepaModel, lambda config: 0, call=INTERPOLATE),
    "depth_anything": Kind(DepthAnythingForDepthEstimation, config=_depth_config, part=lambda model: model.backbone),
    "sam": Kind(SamVisionModel, is_map=True),
}


def _vision(config: Any) -> Any:
    """Return the part of a config that describes the vision encoder."""
    part = next((name for name in ("vision_config", "backbone_config") if name in config.sub_configs), None)
    return config if part is None else getattr(config, part)


def _build(kind: Kind, block: int | None, sizes: Mapping[str, Any], weights: str | None, **changed: Any) -> Network:
    """Build a network.

    Args:
        kind: its architecture.
        block: as `Kind.block`.
        sizes: that the config must have; those in the folder are compared with them.
        weights: name of the weights, or None for random ones.
        changed: other sizes, with random weights only.

    Raises:
        WeightsError: the weights do not fit.
    """
    if weights is None:
        model = kind.model((kind.config or kind.model.config_class)(**{**sizes, **changed}))
        network: Any = kind.part(model)
    else:
        model, missing = _pretrained(kind, weights)
        network = kind.part(model)
        tensors = saved_tensors(network)
        for key in [key for key in tensors if missing and any(part in key for part in UNUSED)]:
            # it was initialized at random and does not affect the features, so the fingerprint must not depend on it
            tensors.pop(key).zero_()
        expected = {
            key: value.float() if value.is_floating_point() else value for key, value in load_weights(weights).items()
        }
        check_unchanged(weights, tensors, expected)
    config, nested = network.config, network is not model
    for key in ("hidden_size", "num_hidden_layers", "patch_size") if weights else ():
        if key in sizes and getattr(config, key) != sizes[key]:
            raise WeightsError(f"{weights}: {key} is {getattr(config, key)} in its config.json: expected {sizes[key]}")

    def features(pixels: Tensor) -> Tensor:
        output = network(pixel_values=pixels, output_hidden_states=block is not None or nested, **kind.call)
        if kind.is_map:
            return output.last_hidden_state
        if block is not None:
            tokens = output.hidden_states[block]
        elif nested:  # an encoder within a model returns the blocks' outputs without the final norm
            tokens = network.layernorm(output.hidden_states[-1])
        else:
            tokens = output.last_hidden_state
        return on_grid(tokens, pixels)

    def on_grid(tokens: Tensor, pixels: Tensor) -> Tensor:
        rows, columns = pixels.shape[-2] // config.patch_size, pixels.shape[-1] // config.patch_size
        prefix = kind.prefix(config)
        if tokens.shape[1] != prefix + rows * columns:
            raise WeightsError(
                f"{weights} returned {tokens.shape[1]} tokens: expected {prefix} and {rows} x {columns} patches"
            )
        return tokens[:, prefix:].transpose(1, 2).unflatten(2, (rows, columns))

    def blocks(pixels: Tensor, layers: Sequence[int]) -> list[Tensor]:
        # hooks, not output_hidden_states: the last of these is after the norm in some classes and before it in others
        outputs: dict[int, Tensor] = {}
        handles = [stack[layer - 1].register_forward_hook(partial(_keep, outputs, layer)) for layer in set(layers)]
        try:
            network(pixel_values=pixels, **kind.call)
        finally:
            for handle in handles:
                handle.remove()
        maps = {
            layer: output.permute(0, 3, 1, 2) if kind.is_map else on_grid(output, pixels)
            for layer, output in outputs.items()
        }
        return [maps[layer] for layer in layers]

    stack: Any = next(
        part for part in network.modules() if isinstance(part, nn.ModuleList) and len(part) == config.num_hidden_layers
    )
    return Network(network, features, fingerprint(saved_tensors(network)), blocks, len(stack))


def _keep(outputs: dict[int, Tensor], layer: int, module: nn.Module, inputs: object, output: Any) -> None:
    """Store the output of a block (a forward hook)."""
    outputs[layer] = output[0] if isinstance(output, tuple) else output


def _pretrained(kind: Kind, weights: str) -> tuple[Any, list[str]]:
    """Return the model in the folder of `weights`, in float32, and the names of UNUSED tensors that its file lacks."""
    folder = weights_folder(weights)
    options: Any = {
        "dtype": torch.float32,
        "use_safetensors": True,
        "trust_remote_code": False,
        "output_loading_info": True,
    }

    def failed(error: Exception) -> WeightsError:
        return WeightsError(f"{weights}: {folder} does not load as {kind.model.__name__} ({one_line(error)})")

    model, report = call(lambda: kind.model.from_pretrained(folder, **options), failed)
    missing = sorted(report["missing_keys"])
    if needed := [key for key in missing if not any(part in key for part in UNUSED)]:
        raise WeightsError(
            f"{weights}: {folder} lacks {len(needed)} tensors of {kind.model.__name__}, the first is '{needed[0]}':"
            " expected all of them"
        )
    return model, missing


def entry_from_folder(name: str, weights: str, folder: Path) -> VFMEntry:
    """Return the entry of a folder in transformers' layout.

    The architecture is read from config.json, the normalization from the settings of the image processor.

    Args:
        name: of the entry.
        weights: name of the weights.

    Raises:
        WeightsError: an architecture whose patch features are not known here, or no normalization.
    """

    def failed(error: Exception) -> WeightsError:
        return WeightsError(f"{name}: transformers does not know the model in {folder} ({one_line(error, 120)})")

    config = call(lambda: AutoConfig.from_pretrained(folder, trust_remote_code=False), failed)
    kind = KINDS.get(config.model_type.removesuffix("_vision_model"))
    if kind is None:
        hint = "; use mae-base, which masks nothing" if config.model_type == "vit_mae" else ""
        raise WeightsError(f"{name} is a '{config.model_type}' model: expected one of {', '.join(KINDS)}{hint}")
    vision = _vision(config)
    mean, std = _normalization(name, folder)
    for key in ("image_size", "patch_size", "num_hidden_layers"):
        if not isinstance(value := getattr(vision, key, None), int) or value < 1:
            raise WeightsError(
                f"{name}: {folder / 'config.json'} has {key} {one_line(value, 40)}: expected an integer of at least 1"
            )
    side, dim = vision.image_size // vision.patch_size, vision.output_channels if kind.is_map else vision.hidden_size
    return VFMEntry(
        *(name, weights, partial(_build, kind, kind.block, {}), vision.patch_size, dim, mean, std, (side, side)),
        note="Not in the catalogue: sizes and normalization are read from the folder.",
        architecture=f"{config.model_type}, {vision.num_hidden_layers} blocks",
        checked="fingerprint at load",
        fixed=vision.image_size if kind.is_map else None,
        padded=kind.is_map,
    )


def _normalization(name: str, folder: Path) -> tuple[Any, Any]:
    """Return mean and standard deviation of RGB from the image processor's file."""
    for file in ("preprocessor_config.json", "processor_config.json"):
        if (folder / file).exists():
            settings: Any = read_json(folder / file)
            settings = settings.get("image_processor", settings)
            if not isinstance(settings, dict):
                continue
            factor = 1 if settings.get("do_rescale") is False else settings.get("rescale_factor") or 1 / 255
            if not isinstance(factor, int | float) or abs(255 * factor - 1) > 1e-3:
                raise WeightsError(
                    f"{name}: {folder / file} has rescale_factor {one_line(factor, 20)} (1 without do_rescale):"
                    " expected 1/255, since a VFM's pixels are scaled to 0..1 here"
                )
            if settings.get("do_normalize") is False:
                return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
            mean, std = _three_numbers(settings.get("image_mean")), _three_numbers(settings.get("image_std"))
            if mean and std:
                return mean, std
    raise WeightsError(
        f"{name}: {folder} has no normalization: expected image_mean and image_std in preprocessor_config.json"
    )


def _three_numbers(value: Any) -> tuple[Any, ...] | None:
    """Return a list of three numbers as a tuple, and None for anything else."""
    if isinstance(value, list) and len(value) == 3 and all(isinstance(part, int | float) for part in value):
        return tuple(value)
    return None


# --- the catalogue --------------------------------------------------------------------------------

UNCHECKED = "random weights, same architecture"
NC = "CC-BY-NC-4.0 (non-commercial)"
DINOV3 = "DINOv3 License (gated: accept it on the hub)"


def _sizes(width: int, blocks: int, heads: int, patch: int, image: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "patch_size": patch,
        "image_size": image,
        **more,
    }


SMALL, BASE, LARGE, GIANT = (384, 12, 6), (768, 12, 12), (1024, 24, 16), (1536, 40, 24)
_LETTERS = {"small": "S", "base": "B", "large": "L", "giant": "g"}

for _name, _block, _note, _checked in (
    (
        *("dinov2-small", 8, "Output of block 8: the last blocks of this copy look fine-tuned for saliency."),
        "real weights, their final norm against the package's own graph",
    ),
    (
        *("dinov2-small:final", None, "Final norm; one direction carries 41 % of within-image variance in this copy."),
        "real weights, against the package's own graph",
    ),
):
    _build_small = partial(_build, KINDS["dinov2"], _block, _sizes(*SMALL, 14, 518))
    CATALOGUE.add(
        _name, VFMEntry(_name, "dinov2-small", _build_small, 14, 384, *IMAGENET, (16, 16), _note, "ViT-S/14", _checked)
    )


def _add(
    name: str,
    hub: str,
    licence: str,
    kind: str,
    sizes: dict[str, Any],
    norm: tuple[Any, Any],
    architecture: str,
    *,
    note: str = "Last block, final norm.",
    grid: int | None = None,
) -> None:
    """Add an entry whose weights are on the hub, or in a folder below $VIRAL_WEIGHTS."""
    side, chosen = grid or sizes["image_size"] // sizes["patch_size"], KINDS[kind]
    WEIGHTS.add(name, Weights(name, licence, hub=hub, note=note))
    dim, fixed = (256, sizes["image_size"]) if chosen.is_map else (sizes["hidden_size"], None)
    build = partial(_build, chosen, chosen.block, sizes)
    CATALOGUE.add(
        name,
        VFMEntry(
            *(name, name, build, sizes["patch_size"], dim, *norm, (side, side), note, architecture, UNCHECKED, fixed),
            padded=chosen.is_map,
        ),
    )


for _size, _shape in (("base", BASE), ("large", LARGE), ("giant", GIANT)):
    _dino = _sizes(*_shape, 14, 518, use_swiglu_ffn=_size == "giant")
    _add(
        f"dinov2-{_size}",
        f"facebook/dinov2-{_size}",
        "Apache-2.0",
        "dinov2",
        _dino,
        IMAGENET,
        f"ViT-{_LETTERS[_size]}/14",
        grid=16,
    )
for _size, _shape in (("small", SMALL), ("base", BASE), ("large", LARGE), ("giant", GIANT)):
    _dino = _sizes(*_shape, 14, 518, use_swiglu_ffn=_size == "giant", num_register_tokens=4)
    _hub = f"facebook/dinov2-with-registers-{_size}"
    _text = f"ViT-{_LETTERS[_size]}/14, 4 registers"
    _add(f"dinov2-{_size}-registers", _hub, "Apache-2.0", "dinov2_with_registers", _dino, IMAGENET, _text, grid=16)
for _size, _shape in (("small", SMALL), ("base", BASE), ("large", LARGE)):
    _dino = _sizes(*_shape, 16, 224, intermediate_size=4 * _shape[0], num_register_tokens=4)
    _hub, _text = f"facebook/dinov3-vit{_size[0]}16-pretrain-lvd1689m", f"ViT-{_LETTERS[_size]}/16, rotary, 4 registers"
    _add(f"dinov3-{_size}", _hub, DINOV3, "dinov3_vit", _dino, IMAGENET, _text)
for _size, _shape, _licence in (("small", SMALL, "Apache-2.0"), ("base", BASE, NC), ("large", LARGE, NC)):
    _hub = f"depth-anything/Depth-Anything-V2-{_size.capitalize()}-hf"
    _text = f"DINOv2 ViT-{_LETTERS[_size]}/14 encoder"
    _note = "The encoder's last block after its norm; the depth head is not used."
    _add(
        f"depth-anything-v2-{_size}",
        _hub,
        _licence,
        "depth_anything",
        _sizes(*_shape, 14, 518),
        IMAGENET,
        _text,
        note=_note,
    )
_add(
    "clip-large-336",
    "openai/clip-vit-large-patch14-336",
    "MIT (openai/CLIP; the hub page names none)",
    "clip",
    _sizes(*LARGE, 14, 336, intermediate_size=4096),
    CLIP,
    "ViT-L/14",
    note="Output of the last block but one, as LLaVA reads it; positions interpolated away from 24 x 24.",
)
_add(
    "siglip2-so400m-384",
    "google/siglip2-so400m-patch14-384",
    "Apache-2.0",
    "siglip",
    _sizes(1152, 27, 16, 14, 384, intermediate_size=4304),
    HALF,
    "ViT-SO400M/14",
    note="Last block, final norm; positions interpolated away from 27 x 27.",
)
_add(
    "sam-base",
    "facebook/sam-vit-base",
    "Apache-2.0",
    "sam",
    _sizes(*BASE, 16, 1024),
    IMAGENET,
    "ViT-B/16, windowed, convolutional neck",
    note=(
        "The neck's output. The image has 16 pixels per patch of the grid, and zeros around it up to 1024 x 1024, as in"
        " the paper."
    ),
)
CATALOGUE.add(
    "sam-base:stretched",
    replace(
        CATALOGUE.get("sam-base"),
        name="sam-base:stretched",
        padded=False,
        note="The neck's output. The image is stretched to 1024 x 1024, and the 64 x 64 map resampled to the grid.",
    ),
)
_add(
    "ijepa-huge",
    "facebook/ijepa_vith14_1k",
    NC,
    "ijepa",
    _sizes(1280, 32, 16, 14, 224, intermediate_size=5120, layer_norm_eps=1e-6),
    IMAGENET,
    "ViT-H/14",
    note=(
        "Last block, final norm; ImageNet normalization as in its training code, whatever the folder's image processor"
        " says."
    ),
)
