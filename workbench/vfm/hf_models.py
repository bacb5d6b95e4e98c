"""VFMs whose network comes from transformers.

DINOv2 is here and not in timm because timm resamples its position embeddings with antialiasing, which changes the
features away from 518 pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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

UNUSED = ("mask_token", "pooler.dense")  # parts of a network that no feature passes through; a file may lack them


def _depth_config(**sizes: Any) -> PreTrainedConfig:
    return DepthAnythingConfig(backbone_config=Dinov2Config(**sizes, reshape_hidden_states=False))


@dataclass(frozen=True)
class Kind:
    """How one architecture of transformers is built and read.

    Attributes:
        model: the class whose `from_pretrained` reads the folder.
        prefix: number of tokens before the patches: class token, registers.
        block: hidden state whose patch tokens are the features; None is the last one, normalised.
        call: extra arguments of forward.
        config: makes a config from sizes; by default the model's own class.
        part: the vision encoder within the model.
        is_map: the network returns a map (image, d, gh, gw) instead of tokens, from images of one fixed size.
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
    """The part of a config that describes the vision encoder."""
    part = next((name for name in ("vision_config", "backbone_config") if name in config.sub_configs), None)
    return config if part is None else getattr(config, part)


def _build(kind: Kind, block: int | None, sizes: Mapping[str, Any], weights: str | None, **changed: Any) -> Network:
    """The network of `kind`: with `sizes`, which those in the file must equal, and random where `weights` is None."""
    if weights is None:
        model = kind.model((kind.config or kind.model.config_class)(**{**sizes, **changed}))
        network: Any = kind.part(model)
        found = fingerprint(saved_tensors(network))
    else:
        model, absent = _pretrained(kind, weights)
        network = kind.part(model)
        held = saved_tensors(network)
        for key in [key for key in held if absent and any(part in key for part in UNUSED)]:
            # drawn at random, and no feature passes through it: the fingerprint must not depend on it
            held.pop(key).zero_()
        expected = {
            key: value.float() if value.is_floating_point() else value for key, value in load_weights(weights).items()
        }
        check_unchanged(weights, held, expected)
        found = fingerprint(saved_tensors(network))
    config, nested = network.config, network is not model
    for key in ("hidden_size", "num_hidden_layers", "patch_size") if weights else ():
        if key in sizes and getattr(config, key) != sizes[key]:
            raise WeightsError(f"{weights}: {key} is {getattr(config, key)} in its config.json, expected {sizes[key]}")

    def features(pixels: Tensor) -> Tensor:
        output = network(pixel_values=pixels, output_hidden_states=block is not None or nested, **kind.call)
        if kind.is_map:
            return output.last_hidden_state
        if block is not None:
            tokens = output.hidden_states[block]
        elif nested:  # an encoder within a model returns its blocks without the norm
            tokens = network.layernorm(output.hidden_states[-1])
        else:
            tokens = output.last_hidden_state
        return on_grid(tokens, pixels)

    def on_grid(tokens: Tensor, pixels: Tensor) -> Tensor:
        rows, columns = pixels.shape[-2] // config.patch_size, pixels.shape[-1] // config.patch_size
        before = kind.prefix(config)
        if tokens.shape[1] != before + rows * columns:
            raise WeightsError(
                f"{weights} returned {tokens.shape[1]} tokens, expected {before} and {rows} x {columns} patches"
            )
        return tokens[:, before:].transpose(1, 2).unflatten(2, (rows, columns))

    def blocks(pixels: Tensor, layers: Sequence[int]) -> list[Tensor]:
        # hidden_states are not asked for: their last entry is normalised in some classes and not in others
        found: dict[int, Tensor] = {}
        handles = [stack[layer - 1].register_forward_hook(partial(_keep, found, layer)) for layer in set(layers)]
        try:
            network(pixel_values=pixels, **kind.call)
        finally:
            for handle in handles:
                handle.remove()
        maps = {
            layer: found[layer].permute(0, 3, 1, 2) if kind.is_map else on_grid(found[layer], pixels) for layer in found
        }
        return [maps[layer] for layer in layers]

    stack: Any = next(
        part for part in network.modules() if isinstance(part, nn.ModuleList) and len(part) == config.num_hidden_layers
    )
    return Network(network, features, found, blocks, len(stack))


def _keep(found: dict[int, Tensor], layer: int, module: nn.Module, inputs: object, output: Any) -> None:
    found[layer] = output[0] if isinstance(output, tuple) else output


def _pretrained(kind: Kind, weights: str) -> tuple[Any, list[str]]:
    """The model that the folder holds, in float32, and the names of its unused tensors that the file lacks."""
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
    absent = sorted(report["missing_keys"])
    if needed := [key for key in absent if not any(part in key for part in UNUSED)]:
        raise WeightsError(
            f"{weights}: {folder} lacks {len(needed)} tensors of {kind.model.__name__}, the first is '{needed[0]}'"
        )
    return model, absent


def entry_from_folder(name: str, weights: str, folder: Path) -> VFMEntry:
    """The entry of a folder in transformers' layout: architecture from config.json, normalisation from its image
    processor.

    Raises:
        WeightsError: an architecture that is not known to give patch features, or no normalisation.
    """

    def failed(error: Exception) -> WeightsError:
        return WeightsError(f"{name}: transformers does not know the model in {folder} ({one_line(error, 120)})")

    config = call(lambda: AutoConfig.from_pretrained(folder, trust_remote_code=False), failed)
    kind = KINDS.get(config.model_type.removesuffix("_vision_model"))
    if kind is None:
        hint = "; use mae-base, which masks nothing" if config.model_type == "vit_mae" else ""
        raise WeightsError(f"{name} is a '{config.model_type}' model: expected one of {', '.join(KINDS)}{hint}")
    vision = _vision(config)
    mean, std = _normalisation(name, folder)
    for key in ("image_size", "patch_size", "num_hidden_layers"):
        if not isinstance(value := getattr(vision, key, None), int) or value < 1:
            raise WeightsError(
                f"{name}: {folder / 'config.json'} has {key} {one_line(value, 40)}: expected a number from 1"
            )
    side, dim = vision.image_size // vision.patch_size, vision.output_channels if kind.is_map else vision.hidden_size
    return VFMEntry(
        *(name, weights, partial(_build, kind, kind.block, {}), vision.patch_size, dim, mean, std, (side, side)),
        note="Not in the catalogue: sizes and normalisation are read from the folder.",
        architecture=f"{config.model_type}, {vision.num_hidden_layers} blocks",
        checked="fingerprint at load",
        fixed=vision.image_size if kind.is_map else None,
    )


def _normalisation(name: str, folder: Path) -> tuple[Any, Any]:
    for file in ("preprocessor_config.json", "processor_config.json"):
        if (folder / file).exists():
            found = read_json(folder / file)
            found = found.get("image_processor", found)
            pair: list[Any] = [
                found.get(key) if isinstance(found, dict) else None for key in ("image_mean", "image_std")
            ]
            if all(
                isinstance(value, list) and len(value) == 3 and all(isinstance(part, int | float) for part in value)
                for value in pair
            ):
                return tuple(pair[0]), tuple(pair[1])
    raise WeightsError(
        f"{name}: {folder} says no normalisation: expected image_mean and image_std in preprocessor_config.json"
    )


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
    """Add one entry that only the hub or a folder of the user's own can fill."""
    side, chosen = grid or sizes["image_size"] // sizes["patch_size"], KINDS[kind]
    WEIGHTS.add(name, Weights(name, licence, hub=hub, note=note))
    dim, fixed = (256, sizes["image_size"]) if chosen.is_map else (sizes["hidden_size"], None)
    build = partial(_build, chosen, chosen.block, sizes)
    CATALOGUE.add(
        name,
        VFMEntry(
            name, name, build, sizes["patch_size"], dim, *norm, (side, side), note, architecture, UNCHECKED, fixed
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
        "The neck's output. The image is stretched to 1024 x 1024 (the paper pads and crops) and the 64 x 64 map"
        " resampled to the grid."
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
        "Last block, final norm; ImageNet normalisation as in its training code, whatever the folder's image processor"
        " says."
    ),
)
