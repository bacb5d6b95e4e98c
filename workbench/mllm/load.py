"""Read configurations and checkpoints of hub ids and folders.

Anything incomplete or unsafe is refused, with an error of one sentence.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, BitsAndBytesConfig, PretrainedConfig
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AutoHfQuantizer

from workbench.errors import ConfigError, ModelError, UnknownNameError, one_line
from workbench.mllm.generation import generation_of, repair_generation
from workbench.mllm.hub_files import no_weights, on_hub, unreadable, weights_of
from workbench.models import check_there, did_you_mean
from workbench.weights.model_files import SAFETENSORS, WeightFiles, check_folder
from workbench.weights.pretrained import call, hub_options
from workbench.weights.tensor_files import Tensors, read_model, shapes_of

# the maps that accelerate can compute
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
# options of BitsAndBytesConfig, by the value of load_in
QUANTIZED: Mapping[str, Mapping[str, Any]] = {
    "8bit": {"load_in_8bit": True},
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
}
SECOND_ENCODER = "viral_second_encoder"  # key in the config.json of a model that was trained with a second encoder
# whether transformers caps the logits of PaliGemma where config.json says so (`final_logit_softcapping`), since 5.23
CAPS_PALIGEMMA = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 23)
RECOMPUTED = ("position_ids", "inv_freq")  # buffers that old checkpoints store, but every model computes itself


def load_config(name: str, **options: Any) -> PretrainedConfig:
    """Return the configuration of a hub id or a folder.

    Args:
        options: of from_pretrained, such as revision.

    Raises:
        WeightsError: a folder that does not hold a model.
        ModelError: no such hub id or folder, a configuration or quantization that cannot be read here, or a model that
            only the trainer can run.
    """
    check_there(name)
    folder = Path(name)
    if folder.is_dir():
        check_folder(folder)

    def failed(error: Exception) -> ModelError:
        if "trust_remote_code" in str(error):
            return ModelError(
                f"model '{name}' brings code of its own: set trust_remote_code if you have read that code and trust it"
            )
        if isinstance(error, OSError) and not folder.is_dir():
            return ModelError(
                f"model '{name}' is neither a folder nor a hub id within reach"
                f" ({one_line(error, 120)}){did_you_mean(name)}"
            )
        return ModelError(
            f"model '{name}' has a config.json that transformers refuses ({one_line(error, 140)}): expected one that"
            " AutoConfig can read"
        )

    config: PretrainedConfig = call(lambda: AutoConfig.from_pretrained(name, **options), failed)
    check_encoders(name, config)
    check_cap(name, config)
    check_quantization(name, config)
    generation_of(name, **options)
    return config


def check_encoders(name: str, config: PretrainedConfig) -> None:
    """Check that the model sees through its own vision encoder only.

    Raises:
        ModelError: it was trained with a second encoder, which is not part of its folder.
    """
    second = getattr(config, SECOND_ENCODER, None)
    if second is None:
        return
    folders = [folder for folder in (Path(name), Path(name).parent) if (folder / "accuracy.parquet").exists()]
    scores = str(folders[0] / "accuracy.parquet") if folders else "accuracy.parquet, in the folder of its training"
    vfm = second["vfm"] if isinstance(second, dict) else "another network"
    raise ModelError(
        f"model '{name}' sees {vfm} beside its own vision encoder ({SECOND_ENCODER} in its config.json), so only the"
        f" trainer can run it: its accuracies are in {scores}"
    )


def check_cap(name: str, config: PretrainedConfig) -> None:
    """Check that the logits of a PaliGemma are capped where its configuration says so.

    Raises:
        ModelError: the installed transformers leaves out the cap, which PaliGemma 2 was trained with.
    """
    cap = getattr(config.get_text_config(), "final_logit_softcapping", None)
    if config.model_type == "paligemma" and cap is not None and not CAPS_PALIGEMMA:
        raise ModelError(
            f"model '{name}' caps its logits at {cap}, which transformers {transformers.__version__} leaves out:"
            " expected transformers 5.23 or later"
        )


def check_quantization(name: str, config: PretrainedConfig) -> None:
    """Check that quantized weights can be read here.

    Raises:
        ModelError: a quantization method that transformers does not know, or whose package is not installed.
    """
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    method = str(getattr(method, "value", method) or "an unnamed method")
    if not isinstance(settings, dict) or not any(known.startswith(method) for known in AUTO_QUANTIZER_MAPPING):
        raise ModelError(
            f"model '{name}' is quantized with {method}, which transformers does not know: expected its checkpoint in"
            " full precision"
        )

    def failed(error: Exception) -> ModelError:
        reason = one_line(error, 120)
        return ModelError(
            f"model '{name}' is quantized with {method}, which cannot be read here ({reason}): install what is missing,"
            " or use the checkpoint in full precision"
        )

    call(
        lambda: AutoHfQuantizer.from_config(dict(settings), pre_quantized=True).validate_environment(device_map=None),
        failed,
    )


def load_model(
    auto: Any, name: str, config: PretrainedConfig, *, strict: bool = True, revision: str | None = None, **options: Any
) -> Any:
    """Load a transformers model from a folder or a hub id, and check that all its tensors come from there.

    Safetensors are read by transformers. A pickle is read by `read_model`, which runs no code from it; its tensors stay
    mapped from the disk until the model takes them.

    Args:
        auto: an auto class, or the class of the model.
        strict: refuse a checkpoint with tensors that the model has no place for.
        options: of from_pretrained, such as dtype and device_map.

    Raises:
        ModelError, WeightsError: it cannot be loaded, or tensors are missing, left over or of another shape.
    """
    hub = {"revision": revision} | {key: options[key] for key in ("local_files_only",) if key in options}
    weights = weights_of(name, **hub)
    if weights is None:
        raise no_weights(name)
    _check_fit(auto, name, config, weights, strict=strict)
    if weights.pickled:
        if getattr(config, "auto_map", None):
            raise ModelError(
                f"model '{name}' has pickled weights and code of its own, which is unsafe: expected {SAFETENSORS}"
            )
        options = {key: value for key, value in options.items() if key not in ("trust_remote_code", "local_files_only")}
        model = _from_tensors(auto, name, config, read_model(weights.folder), strict=strict, **options)
        if model.can_generate():
            model.generation_config = generation_of(str(weights.folder)) or model.generation_config
    else:
        options |= {
            "config": config,
            "revision": revision,
            "use_safetensors": True,
            "output_loading_info": True,
            "ignore_mismatched_sizes": True,
        }
        model, report = call(lambda: auto.from_pretrained(name, **options), partial(unreadable, name))
        check_complete(name, report, strict=strict)
    repair_generation(name, model)
    return model


def placement(
    name: str, config: PretrainedConfig, device: str, device_map: str | Mapping[str, Any] | None, load_in: str | None
) -> dict[str, Any]:
    """Return the options of from_pretrained that place a model on devices and quantize it.

    They are empty for a model that is loaded as it is stored, and that can be moved to `device` as a whole.

    Args:
        device: of the whole model, unless `device_map` is given.
        device_map, load_in: as in `MLLM.load`.

    Raises:
        UnknownNameError: there is no such map or quantization.
        ConfigError: bitsandbytes is not installed, or the checkpoint is quantized already.
    """
    if isinstance(device_map, str) and device_map not in DEVICE_MAPS:
        raise UnknownNameError("device_map", device_map, DEVICE_MAPS)
    stored = getattr(config, "quantization_config", None)
    options: dict[str, Any] = {}
    if load_in is not None:
        if load_in not in QUANTIZED:
            raise UnknownNameError("load_in", load_in, QUANTIZED)
        if stored is not None:
            raise ConfigError(f"load_in is {load_in}, but model '{name}' is stored quantized: load it without load_in")
        if find_spec("bitsandbytes") is None:
            raise ConfigError(
                f"load_in is {load_in}, which needs bitsandbytes: run pip install 'viral-workbench[quantized]'"
            )
        options["quantization_config"] = BitsAndBytesConfig(**QUANTIZED[load_in])
    if device_map is not None:
        options["device_map"] = device_map
    elif load_in is not None or stored is not None:  # quantized weights cannot be moved afterwards
        options["device_map"] = {"": device}
    return options


def _from_tensors(
    auto: Any, name: str, config: PretrainedConfig, state: Tensors, *, strict: bool, **options: Any
) -> Any:
    """Return a model with the tensors `state`, checked as in `load_model`."""
    if hasattr(auto, "_model_mapping") and type(config) not in auto._model_mapping:
        raise ModelError(
            f"model '{name}' is a {config.model_type}, which {auto.__name__} does not know: expected a kind that it"
            " does"
        )
    cls = auto._model_mapping[type(config)] if hasattr(auto, "_model_mapping") else auto
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, report = call(
        lambda: cls.from_pretrained(None, config=config, state_dict=state, **options), partial(unreadable, name)
    )
    check_complete(name, report, strict=strict)
    return model


def check_weights(
    auto: Any, name: str, config: PretrainedConfig, *, strict: bool = True, revision: str | None = None
) -> WeightFiles | None:
    """Check that `load_model` would load the weights, by the names and shapes of their tensors only.

    Returns:
        The files of the weights, or None if they are still to be downloaded from the hub.

    Raises:
        ModelError, WeightsError: as `load_model`.
    """
    weights = weights_of(name, local_files_only=True, revision=revision)
    if weights is None:
        if hub_options(name) or not on_hub(name):
            raise no_weights(name)
        return None
    _check_fit(auto, name, config, weights, strict=strict)
    return weights


def _check_fit(auto: Any, name: str, config: PretrainedConfig, weights: WeightFiles, *, strict: bool) -> None:
    """Check that every tensor has a place and the right shape, before many gigabytes are read.

    Quantized models and models with code of their own are not checked here: only their code knows where tensors go.
    """
    if getattr(config, "quantization_config", None) is None and not getattr(config, "auto_map", None):
        _from_tensors(auto, name, config, shapes_of(weights), strict=strict, dtype=torch.float32, device_map="meta")


def check_complete(name: str, report: Any, *, strict: bool) -> None:
    """Check that every tensor of the model comes from the checkpoint, and that no tensor of the checkpoint is left.

    Args:
        report: the loading info of from_pretrained.
        strict: False accepts tensors of the checkpoint that the model has no place for.

    Raises:
        ModelError: tensors are missing, left over or of another shape; the first two are named.
    """
    extra = [key for key in report["unexpected_keys"] if not key.endswith(RECOMPUTED)]
    for kind, keys in (
        ("has other shapes for", report["mismatched_keys"]),
        ("lacks", report["missing_keys"]),
        ("has no place for", extra if strict else ()),
    ):
        if keys:
            names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in keys)
            whose = "the checkpoint" if kind != "has no place for" else "the model"
            raise ModelError(
                f"model '{name}' does not fit its checkpoint: {whose} {kind} {len(names)} tensors, first"
                f" {', '.join(names[:2])}"
            )
