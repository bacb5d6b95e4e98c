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
    """The feature map of one stage; random weights where `weights` is None."""
    network: Any = timm.create_model(architecture, pretrained=False, **{**options, **changed})
    return _network(network, stage, norm, weights, load_weights(weights) if weights else {})


def _network(network: nn.Module, stage: int, norm: bool, weights: str | None, state: State) -> Network:
    """Load `state` into `network`: all its tensors, and nothing is left over but a classifier that it does not have."""
    if weights is None:
        found = fingerprint(network.state_dict())
    else:
        own = network.state_dict()
        expected = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
        missing = sorted(set(own) - set(expected))
        beyond = sorted(
            key for key in set(expected) - set(own) if key.split(".")[0] not in ("head", "classifier", "fc", "fc_norm")
        )
        if missing or beyond:
            raise WeightsError(
                f"{weights}: the file {f'lacks {missing[0]!r}' if missing else f'has an unknown {beyond[0]!r}'}:"
                " expected timm's own layout"
            )
        network.load_state_dict({key: expected[key] for key in own})
        found = check_unchanged(weights, network.state_dict(), expected)

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

    return Network(network, features, found, blocks, len(network.feature_info))  # type: ignore[arg-type]


def _radio(layer_scale: bool, weights: str | None, **changed: Any) -> Network:
    """RADIO's ViT-B/16 from NVIDIA's own file, without the repository's code; features are the last block's, which has
    no norm after it."""
    # 0 is no layer scale; timm drops a None
    options: dict[str, Any] = {"num_classes": 0, "init_values": 1e-5 if layer_scale else 0.0}
    raw, at = (load_weights(weights), "radio_model.") if weights else ({}, "")
    if weights:
        known = (f"{at}model.patch_generator.", f"{at}model.blocks.", f"{at}input_conditioner.", f"{at}summary_idxs")
        beyond = sorted(key for key in raw if key.startswith(at) and not key.startswith(known))
        tokens = raw.get(f"{at}model.patch_generator.cls_token.token")
        if tokens is None or beyond:
            raise WeightsError(
                f"{weights}: the file {f'has an unknown {beyond[0]!r}' if beyond else 'has no class tokens'}: expected"
                " NVIDIA's layout of RADIO"
            )
        for name, ours in zip(("mean", "std"), CLIP, strict=True):
            theirs = raw.get(f"{at}input_conditioner.norm_{name}")
            if theirs is not None and not torch.allclose(theirs.flatten().float(), torch.tensor(ours), atol=1e-4):
                raise WeightsError(
                    f"{weights}: its file normalises with {name} {theirs.flatten().tolist()}, expected {list(ours)}"
                )
        # NVIDIA's files use either name for layer scale
        scaled = any("gamma" in key or "grandma" in key for key in raw)
        options |= {"reg_tokens": tokens.shape[0] - 1, "init_values": 1e-5 if scaled else 0.0}
    network: Any = timm.create_model("naflexvit_base_patch16_radio_v3", pretrained=False, **{**options, **changed})
    return _network(network, -1, False, weights, naflex_from_radio(raw, network) if weights else {})


# --- any model of timm, and folders in its layout -------------------------------------------------


def entry_from_name(name: str) -> VFMEntry:
    """The entry of `timm:NAME`, such as `timm:vit_base_patch16_224.augreg_in21k`; its weights are fetched when they are
    needed.

    Raises:
        UnknownNameError: timm has no such model.
        WeightsError: it has no weights on the hub.
    """
    wanted = name.removeprefix("timm:")
    config = timm.models.get_pretrained_cfg(wanted) if timm.is_model(wanted) else None
    if config is None:
        every = timm.list_models(pretrained=True)
        raise UnknownNameError(
            "timm model",
            wanted,
            difflib.get_close_matches(wanted, every, n=5) or every[:5],
            also="or another of timm.list_models()",
        )
    if not config.hf_hub_id:
        raise WeightsError(f"{name} has no weights on the hub: expected another of timm.list_models(pretrained=True)")
    if name not in WEIGHTS:
        WEIGHTS.add(
            name,
            Weights(
                name, licence=config.license or f"see https://huggingface.co/{config.hf_hub_id}", hub=config.hf_hub_id
            ),
        )
    return _entry(name, name, config.architecture or wanted, config.to_dict(), {})


def entry_from_folder(name: str, weights: str, folder: Path, config: Mapping[str, Any]) -> VFMEntry:
    """The entry of a folder in timm's layout: config.json with `architecture`, and `pretrained_cfg` with mean, std and
    input_size."""
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
            f"{name}: {folder} says no normalisation: expected mean, std and input_size in pretrained_cfg of"
            " config.json"
        )
    arguments = config.get("model_args") or {}
    if not isinstance(arguments, Mapping):
        raise WeightsError(
            f"{name}: {folder / 'config.json'} has model_args {one_line(arguments, 60)}: expected names and values"
        )
    return _entry(name, weights, architecture, pretrained, arguments)


def _entry(
    name: str, weights: str, architecture: str, config: Mapping[str, Any], arguments: Mapping[str, Any]
) -> VFMEntry:
    """The last stage of `architecture`, at any size that it takes."""
    options = {**arguments, "num_classes": 0}

    def failed(error: Exception) -> WeightsError:
        return WeightsError(
            f"{name}: timm makes no {architecture} with {one_line(dict(arguments), 60)} ({one_line(error, 100)})"
        )

    side, dynamic = config["input_size"][-1], True
    with torch.device("meta"):
        try:
            network: Any = timm.create_model(architecture, pretrained=False, **options, dynamic_img_size=True)
            options["dynamic_img_size"] = True
        # of whatever type, as timm's models raise it: a network that takes any size as it is, or one size only
        except Exception:
            network = call(lambda: timm.create_model(architecture, pretrained=False, **options), failed)
            dynamic = not config.get("fixed_input_size", False)
    if not hasattr(network, "forward_intermediates"):
        raise WeightsError(
            f"{name}: timm gives no feature maps of {architecture}: expected a model with forward_intermediates"
        )
    strides, dim = [stage["reduction"] for stage in network.feature_info], network.feature_info[-1]["num_chs"]
    flat = len(set(strides)) == 1 and len(strides) > 1  # a ViT: all blocks alike, and a norm after the last
    return VFMEntry(
        *(
            name,
            weights,
            partial(_build, architecture, -1, flat, options),
            strides[-1],
            dim,
            tuple(config["mean"]),
            tuple(config["std"]),
        ),
        default_grid=(side // strides[-1], side // strides[-1]),
        note="Not in the catalogue: the last stage; sizes and normalisation are timm's.",
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
    """Add a ViT-B/16 that only the hub or a folder of the user's own can fill."""
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
