"""VFMs whose network comes from timm."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.naflexvit import checkpoint_filter_fn as naflex_from_radio
from torch import Tensor, nn

from workbench.errors import UnknownNameError, WeightsError, one_line
from workbench.hashing import fingerprint
from workbench.vfm.base import CATALOGUE, CLIP, HALF, IMAGENET, Network, VFMEntry
from workbench.weights.catalogue import CATALOGUE as WEIGHTS
from workbench.weights.catalogue import Weights
from workbench.weights.fetch import check_unchanged, load_weights
from workbench.weights.pretrained import call

State = dict[str, Tensor]


def _build(
    architecture: str, stage: int, norm: bool, options: Mapping[str, Any], weights: str | None, **changed: Any
) -> Network:
    """Build a network of timm whose features are the map of one stage.

    Args:
        architecture: timm's name.
        stage: its index in `forward_intermediates`.
        norm: apply the final norm.
        options: of timm.create_model.
        weights: name of the weights, or None for random ones.
        changed: other options, in tests.
    """
    network: Any = timm.create_model(architecture, pretrained=False, **{**options, **changed})
    return _network(network, stage, norm, weights, load_weights(weights) if weights else {})


def _network(network: nn.Module, stage: int, norm: bool, weights: str | None, state: State) -> Network:
    """Load all tensors of `network` from `state`, unless `weights` is None, and wrap it.

    Raises:
        WeightsError: `state` lacks a tensor, or has one that the network lacks and that is not of a classifier.
    """
    if weights is None:
        weights_fingerprint = fingerprint(network.state_dict())
    else:
        needed = network.state_dict()
        expected = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
        missing = sorted(set(needed) - set(expected))
        classifier = ("head", "classifier", "fc", "fc_norm")
        unknown = sorted(key for key in set(expected) - set(needed) if key.split(".")[0] not in classifier)
        if missing or unknown:
            raise WeightsError(
                f"{weights}: the file {f'lacks {missing[0]!r}' if missing else f'has an unknown {unknown[0]!r}'}:"
                " expected timm's own layout"
            )
        network.load_state_dict({key: expected[key] for key in needed})
        weights_fingerprint = check_unchanged(weights, network.state_dict(), expected)

    def features(pixels: Tensor) -> Tensor:
        return network.forward_intermediates(
            pixels, indices=[stage], norm=norm, output_fmt="NCHW", intermediates_only=True
        )[0]  # type: ignore[operator]

    def blocks(pixels: Tensor, layers: Sequence[int]) -> list[Tensor]:
        wanted = sorted({layer - 1 for layer in layers})
        maps = network.forward_intermediates(
            pixels, indices=wanted, norm=False, output_fmt="NCHW", intermediates_only=True
        )  # type: ignore[operator]
        return [maps[wanted.index(layer - 1)] for layer in layers]

    return Network(network, features, weights_fingerprint, blocks, len(network.feature_info))  # type: ignore[arg-type]


def _radio(layer_scale: bool, weights: str | None, **changed: Any) -> Network:
    """Build RADIO's ViT-B/16 from NVIDIA's own file, without running the repository's code.

    Features are the output of the last block, which no norm follows.

    Args:
        layer_scale: whether the blocks have layer scale; read from the file if there are weights.
        weights: name of the weights, or None for random ones.
        changed: other options of timm.create_model, in tests.
    """
    # 0 means no layer scale; timm ignores a None
    options: dict[str, Any] = {"num_classes": 0, "init_values": 1e-5 if layer_scale else 0.0}
    raw, prefix = (load_weights(weights), "radio_model.") if weights else ({}, "")
    if weights:
        parts = ("model.patch_generator.", "model.blocks.", "input_conditioner.", "summary_idxs")
        known = tuple(f"{prefix}{part}" for part in parts)
        unknown = sorted(key for key in raw if key.startswith(prefix) and not key.startswith(known))
        tokens = raw.get(f"{prefix}model.patch_generator.cls_token.token")
        if tokens is None or unknown:
            raise WeightsError(
                f"{weights}: the file {f'has an unknown {unknown[0]!r}' if unknown else 'has no class tokens'}:"
                " expected NVIDIA's layout of RADIO"
            )
        for name, expected in zip(("mean", "std"), CLIP, strict=True):
            stored = raw.get(f"{prefix}input_conditioner.norm_{name}")
            if stored is not None and not torch.allclose(stored.flatten().float(), torch.tensor(expected), atol=1e-4):
                raise WeightsError(
                    f"{weights}: its file normalizes with {name} {stored.flatten().tolist()}: expected {list(expected)}"
                )
        # NVIDIA's files use either name for layer scale
        scaled = any("gamma" in key or "grandma" in key for key in raw)
        options |= {"reg_tokens": tokens.shape[0] - 1, "init_values": 1e-5 if scaled else 0.0}
    network: Any = timm.create_model("naflexvit_base_patch16_radio_v3", pretrained=False, **{**options, **changed})
    return _network(network, -1, False, weights, naflex_from_radio(raw, network) if weights else {})


# --- any model of timm, and folders in its layout -------------------------------------------------


def entry_from_name(name: str) -> VFMEntry:
    """Return the entry of `timm:NAME`, such as `timm:vit_base_patch16_224.augreg_in21k`.

    Its weights are downloaded when they are first needed.

    Raises:
        UnknownNameError: timm has no such model.
        WeightsError: it has no weights on the hub.
    """
    timm_name = name.removeprefix("timm:")
    config = timm.models.get_pretrained_cfg(timm_name) if timm.is_model(timm_name) else None
    if config is None:
        every = timm.list_models(pretrained=True)
        raise UnknownNameError(
            "timm model",
            timm_name,
            difflib.get_close_matches(timm_name, every, n=5) or every[:5],
            also="or another of timm.list_models()",
        )
    if not config.hf_hub_id:
        raise WeightsError(f"{name} has no weights on the hub: expected another of timm.list_models(pretrained=True)")
    if name not in WEIGHTS:
        license_text = config.license or f"see https://huggingface.co/{config.hf_hub_id}"
        WEIGHTS.add(name, Weights(name, licence=license_text, hub=config.hf_hub_id))
    return _entry(name, name, config.architecture or timm_name, config.to_dict(), {})


def entry_from_folder(name: str, weights: str, folder: Path, config: Mapping[str, Any]) -> VFMEntry:
    """Return the entry of a folder in timm's layout.

    Its config.json has `architecture`, and `pretrained_cfg` with mean, std and input_size.

    Args:
        name: of the entry.
        weights: name of the weights.
        config: the content of config.json.

    Raises:
        UnknownNameError: timm has no such architecture.
        WeightsError: there is no normalization, or timm cannot build the network.
    """
    architecture, pretrained = str(config["architecture"]), config.get("pretrained_cfg", {})
    if not timm.is_model(architecture):
        raise UnknownNameError(
            "timm model", architecture, difflib.get_close_matches(architecture, timm.list_models(), n=5)
        )
    triples = (
        [pretrained.get(key) for key in ("mean", "std", "input_size")] if isinstance(pretrained, Mapping) else [None]
    )
    if not all(
        isinstance(value, list | tuple) and len(value) == 3 and all(isinstance(part, int | float) for part in value)
        for value in triples
    ):
        raise WeightsError(
            f"{name}: {folder} has no normalization: expected mean, std and input_size in pretrained_cfg of config.json"
        )
    arguments = config.get("model_args") or {}
    if not isinstance(arguments, Mapping):
        raise WeightsError(
            f"{name}: {folder / 'config.json'} has model_args {one_line(arguments, 60)}: expected a mapping from names"
            " to values"
        )
    return _entry(name, weights, architecture, pretrained, arguments)


def _entry(
    name: str, weights: str, architecture: str, config: Mapping[str, Any], arguments: Mapping[str, Any]
) -> VFMEntry:
    """Return the entry whose features are the last stage of `architecture`, at any image size that it takes.

    Args:
        name: of the entry.
        weights: name of the weights.
        config: timm's pretrained_cfg, with mean, std and input_size.
        arguments: of timm.create_model.
    """
    options = {**arguments, "num_classes": 0}

    def failed(error: Exception) -> WeightsError:
        return WeightsError(
            f"{name}: timm cannot build {architecture} with {one_line(dict(arguments), 60)} ({one_line(error, 100)})"
        )

    side, dynamic = config["input_size"][-1], True
    with torch.device("meta"):
        try:
            network: Any = timm.create_model(architecture, pretrained=False, **options, dynamic_img_size=True)
            options["dynamic_img_size"] = True
        # Models without this option raise errors of any type; they take any size as they are, or only one.
        except Exception:  # noqa: BLE001
            network = call(lambda: timm.create_model(architecture, pretrained=False, **options), failed)
            dynamic = not config.get("fixed_input_size", False)
    if not hasattr(network, "forward_intermediates"):
        raise WeightsError(
            f"{name}: timm gives no feature maps of {architecture}: expected a model with forward_intermediates()"
        )
    strides, dim = [stage["reduction"] for stage in network.feature_info], network.feature_info[-1]["num_chs"]
    is_vit = len(set(strides)) == 1 and len(strides) > 1  # all blocks have one stride, and a norm follows the last
    return VFMEntry(
        name=name,
        weights=weights,
        build=partial(_build, architecture, -1, is_vit, options),
        stride=strides[-1],
        dim=dim,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        default_grid=(side // strides[-1], side // strides[-1]),
        note="Not in the catalogue: the last stage; sizes and normalization are timm's.",
        architecture=architecture,
        checked="fingerprint at load",
        fixed=None if dynamic else side,
    )


# --- the catalogue --------------------------------------------------------------------------------


def _add(
    name: str,
    hub: str,
    licence: str,
    build: Callable[..., Network],
    norm: tuple[Any, Any],
    side: int,
    architecture: str,
    note: str,
) -> None:
    """Add a ViT-B/16 whose weights are on the hub, or in a folder below $VIRAL_WEIGHTS."""
    WEIGHTS.add(name, Weights(name, licence, hub=hub, note=note))
    CATALOGUE.add(
        name,
        VFMEntry(
            name, name, build, 16, 768, *norm, (side, side), note, architecture, "random weights, same architecture"
        ),
    )


CATALOGUE.add(
    "efficientnet-lite0",
    VFMEntry(
        "efficientnet-lite0",
        "efficientnet-lite0",
        partial(_build, "tf_efficientnet_lite0", 3, False, {}),
        16,
        112,
        *HALF,
        (14, 14),
        "Stage with stride 16 of an ImageNet classifier; convolutional, so its features carry no position.",
        "EfficientNet-Lite0",
        "real weights, classify photographs",
    ),
)
_add(
    "radio-v2.5-base",
    "nvidia/RADIO-B",
    "NVIDIA Source Code License NC (non-commercial)",
    partial(_radio, False),
    CLIP,
    48,
    "ViT-B/16, cropped positions",
    "Last block. Class tokens and layer scale are read from the file; NVIDIA's code is not run.",
)
_add(
    "radio-v3-base",
    "nvidia/C-RADIOv3-B",
    "NVIDIA Open Model License",
    partial(_radio, True),
    CLIP,
    32,
    "ViT-B/16, cropped positions, 7 more prefix tokens",
    "Last block. NVIDIA's code is not run.",
)
_add(
    "mae-base",
    "timm/vit_base_patch16_224.mae",
    "CC-BY-NC-4.0 (non-commercial)",
    partial(_build, "vit_base_patch16_224", -1, True, {"num_classes": 0, "dynamic_img_size": True}),
    IMAGENET,
    14,
    "ViT-B/16",
    "Encoder, last block, final norm; nothing is masked. Positions resampled as timm does, with antialiasing, away from"
    " 14 x 14.",
)
