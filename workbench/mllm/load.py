"""Configurations and checkpoints of hub ids and folders: read, and refused in one sentence where they are not whole or
not safe."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, BitsAndBytesConfig, GenerationConfig, PretrainedConfig
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AutoHfQuantizer
from transformers.utils import cached_file

from workbench.errors import ConfigError, ModelError, UnknownNameError, one_line
from workbench.models import check_there, did_you_mean
from workbench.weights.model_files import (
    PICKLE,
    SAFETENSORS,
    Tensors,
    WeightFiles,
    check_folder,
    locate,
    read_model,
    shapes_of,
    weight_files,
)
from workbench.weights.pretrained import call, hub_options

log = logging.getLogger(__name__)
WEIGHTS = (SAFETENSORS, f"{SAFETENSORS}.index.json", PICKLE, f"{PICKLE}.index.json")  # in the order they are looked for
# numbers in generation_config.json
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
QUANTIZED: Mapping[str, Mapping[str, Any]] = {
    "8bit": {"load_in_8bit": True},
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
}
COUNTS = ("eos_token_id", "bos_token_id", "pad_token_id", "num_beams", "max_length", "max_new_tokens")
SECOND_ENCODER = "viral_second_encoder"  # in the config.json of a model that the trainer gave a second encoder
RECOMPUTED = ("position_ids", "inv_freq")  # buffers that old checkpoints carry and every model computes for itself


# --- configuration --------------------------------------------------------------------------------


def load_config(name: str, **options: Any) -> PretrainedConfig:
    """The configuration of a hub id or a folder.

    Raises:
        WeightsError: a folder that does not hold a model.
        ModelError: nothing of the kind there, a configuration or quantization that cannot be read here, or a model that
            runs in its training only.
    """
    check_there(name)
    folder = Path(name)
    if folder.is_dir():
        check_folder(folder)

    def failed(error: Exception) -> ModelError:
        if "trust_remote_code" in str(error):
            return ModelError(
                f"model '{name}' brings code of its own: expected trust_remote_code, if you have read it and trust it"
            )
        if isinstance(error, OSError) and not folder.is_dir():
            return ModelError(
                f"model '{name}' is neither a folder nor a hub id within reach"
                f" ({one_line(error, 120)}){did_you_mean(name)}"
            )
        return ModelError(f"model '{name}' has a config.json that transformers refuses ({one_line(error, 140)})")

    config: PretrainedConfig = call(lambda: AutoConfig.from_pretrained(name, **options), failed)
    check_encoders(name, config)
    check_quantization(name, config)
    generation_of(name, **options)
    return config


def check_encoders(name: str, config: PretrainedConfig) -> None:
    """See that what the model sees is what its vision encoder gives.

    Raises:
        ModelError: it was trained with a second encoder, which is no part of its folder.
    """
    second = getattr(config, SECOND_ENCODER, None)
    if second is None:
        return
    folders = [folder for folder in (Path(name), Path(name).parent) if (folder / "accuracy.parquet").exists()]
    scores = (
        f"are in {folders[0] / 'accuracy.parquet'}"
        if folders
        else "are in accuracy.parquet, in the folder of its training"
    )
    what = f"sees {second['vfm'] if isinstance(second, dict) else 'something'} beside its own vision encoder"
    raise ModelError(
        f"model '{name}' {what} ({SECOND_ENCODER} in its config.json) and can be run by the trainer alone: its"
        f" accuracies {scores}"
    )


def generation_of(name: str, **options: Any) -> GenerationConfig | None:
    """The settings of generation of a hub id or a folder, None where it has none of its own.

    Raises:
        ModelError: they cannot be read; transformers would go on without the tokens at which the model stops.
    """
    hub = {key: options[key] for key in ("revision", "local_files_only") if key in options}
    file = hub_file(name, "generation_config.json", **hub)
    if file is None:
        return None

    def failed(error: object) -> ModelError:
        return ModelError(
            f"model '{name}' has a generation_config.json that transformers refuses ({one_line(error, 140)}): mend or"
            " remove it"
        )

    config: GenerationConfig = call(lambda: GenerationConfig.from_pretrained(Path(file).parent), failed)
    for key in COUNTS:
        value = getattr(config, key, None)
        if not all(
            isinstance(part, int) for part in (value if isinstance(value, list) else [] if value is None else [value])
        ):
            raise failed(f"{key} is {value!r}, which is no number")
    return config


def check_quantization(name: str, config: PretrainedConfig) -> None:
    """See that quantized weights can be read here.

    Raises:
        ModelError: a method that transformers does not know, or whose package is not installed.
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
            f"model '{name}' is quantized with {method}, which cannot be read here ({reason}): install that, or take it"
            " in full precision"
        )

    call(
        lambda: AutoHfQuantizer.from_config(dict(settings), pre_quantized=True).validate_environment(device_map=None),
        failed,
    )


# --- weights --------------------------------------------------------------------------------------


def weights_of(name: str, **options: Any) -> WeightFiles | None:
    """The files that hold the weights of a folder or a hub id, fetched where the options allow it; None where they are
    not within reach.

    Raises:
        WeightsError: they are not whole.
    """
    if Path(name).is_dir():
        return weight_files(Path(name))
    for file in WEIGHTS:
        at = hub_file(name, file, **options)
        if at is not None and file.endswith(".json") and not options.get("local_files_only"):
            return weight_files(locate(name, "model", "a folder"))
        if at is not None:
            return weight_files(Path(at).parent)
    return None


def hub_file(name: str, file: str, **options: Any) -> str | None:
    """A file of a folder or a hub id, fetched where the options allow it; None where there is none."""
    kinds = ("missing_entries", "connection_errors", "gated_repo")
    quietly = {f"_raise_exceptions_for_{kind}": False for kind in kinds}

    def failed(error: Exception) -> ModelError:
        return ModelError(f"model '{name}' is neither a folder nor a hub id within reach ({one_line(error, 120)})")

    return call(lambda: cached_file(name, file, **quietly, **options), failed)


def load_model(
    auto: Any, name: str, config: PretrainedConfig, *, strict: bool = True, revision: str | None = None, **options: Any
) -> Any:
    """A transformers model with all its tensors from a folder or a hub id.

    Safetensors are read by transformers; a pickle is read here, with care, and its tensors are handed over as they lie
    mapped on the disk.

    Args:
        auto: an auto class, or the class of the model.
        strict: refuse tensors that the model has no place for.
        options: of from_pretrained, such as dtype and device_map.

    Raises:
        ModelError, WeightsError: it cannot be loaded, or tensors are missing, of another shape or left over.
    """
    hub = {"revision": revision} | {key: options[key] for key in ("local_files_only",) if key in options}
    weights = weights_of(name, **hub)
    if weights is None:
        raise no_weights(name)
    _check_fit(auto, name, config, weights, strict=strict)
    if weights.pickled:
        if getattr(config, "auto_map", None):
            raise ModelError(f"model '{name}' has pickled weights and code of its own: expected {SAFETENSORS}")
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
        model, report = call(lambda: auto.from_pretrained(name, **options), partial(_unreadable, name))
        check_complete(name, report, strict=strict)
    repair_generation(name, model)
    return model


def placement(
    name: str, config: PretrainedConfig, device: str, device_map: str | Mapping[str, Any] | None, load_in: str | None
) -> dict[str, Any]:
    """Return the options of from_pretrained that say where a model's parts go and how they are quantized; none for one
    that is loaded as it is stored and moved as a whole.

    Raises:
        ConfigError: no such map or way to quantize, bitsandbytes is not installed, or the checkpoint is quantized
            already.
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
                f"load_in is {load_in}, which needs bitsandbytes: expected pip install 'viral-workbench[quantized]'"
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
    if hasattr(auto, "_model_mapping") and type(config) not in auto._model_mapping:
        raise ModelError(
            f"model '{name}' is a {config.model_type}, which {auto.__name__} does not know: expected one that it does"
        )
    cls = auto._model_mapping[type(config)] if hasattr(auto, "_model_mapping") else auto
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, report = call(
        lambda: cls.from_pretrained(None, config=config, state_dict=state, **options), partial(_unreadable, name)
    )
    check_complete(name, report, strict=strict)
    return model


def check_weights(
    auto: Any, name: str, config: PretrainedConfig, *, strict: bool = True, revision: str | None = None
) -> WeightFiles | None:
    """See that `load_model` would load the weights of a folder or a hub id, by the names and shapes of their tensors;
    their values are not read.

    Returns:
        Their files, or None for those of a hub id that are still to be fetched.

    Raises:
        ModelError, WeightsError: as `load_model`.
    """
    weights = weights_of(name, local_files_only=True, revision=revision)
    if weights is None:
        if hub_options(name) or not _on_hub(name):
            raise no_weights(name)
        return None
    _check_fit(auto, name, config, weights, strict=strict)
    return weights


def _check_fit(auto: Any, name: str, config: PretrainedConfig, weights: WeightFiles, *, strict: bool) -> None:
    """See that every tensor has a place and the right shape, before 14 GB are read; not of what only its own code or a
    quantizer knows to place."""
    if getattr(config, "quantization_config", None) is None and not getattr(config, "auto_map", None):
        _from_tensors(auto, name, config, shapes_of(weights), strict=strict, dtype=torch.float32, device_map="meta")


def _on_hub(name: str) -> bool:
    """Whether a hub id within reach has weights that are read."""
    from huggingface_hub import list_repo_files

    return bool({*WEIGHTS} & {*call(lambda: list_repo_files(name), partial(_unreadable, name))})


def no_weights(name: str) -> ModelError:
    """For a model whose weights cannot be had."""
    return ModelError(
        f"model '{name}' has no weights within reach: expected {SAFETENSORS} or {PICKLE}, in a folder, on the hub or in"
        " its cache"
    )


def _unreadable(name: str, error: Exception) -> ModelError:
    return ModelError(f"model '{name}' could not be loaded ({one_line(error, 140)})")


def check_complete(name: str, report: Any, *, strict: bool) -> None:
    """See that every tensor of the model came from the checkpoint, and every tensor of the checkpoint went into the
    model."""
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


def repair_generation(name: str, model: Any) -> None:
    """Unset settings of generation that contradict one another, such as Vicuna's temperature without sampling, which
    transformers would refuse to save.

    Nothing that is generated here changes: answers are greedy.
    """
    defaults = GenerationConfig().to_dict()
    config = model.config
    misplaced = [
        key
        for key in defaults
        if key != "use_cache" and key not in config.__dataclass_fields__ and vars(config).get(key) is not None
    ]
    for key in misplaced:
        delattr(config, key)
    unset: list[str] = []
    if model.can_generate():
        model.generation_config, unset = _valid(model.generation_config)
    if misplaced or unset:
        names = ", ".join([*misplaced, *unset])
        log.warning(
            "%s: settings of generation left out, since they contradict one another or could not be saved: %s (answers"
            " are greedy here)",
            name,
            names,
        )


def _valid(config: GenerationConfig) -> tuple[GenerationConfig, list[str]]:
    """As much of the configuration as does not contradict itself, what switches other settings on first; and the names
    of the rest."""
    if _saves(config):
        return config, []
    values, defaults = config.to_dict(), GenerationConfig().to_dict()
    changed = [key for key in values if values[key] != defaults.get(key) and not key.endswith("token_id")]
    switches = [key for key in ("do_sample", "num_beams") if key in changed]
    valid, unset = {key: value for key, value in values.items() if key not in changed}, []
    for key in [*switches, *(key for key in changed if key not in switches)]:
        if _saves(GenerationConfig.from_dict(valid | {key: values[key]})):
            valid[key] = values[key]
        else:
            unset.append(key)
    return GenerationConfig.from_dict(valid), unset


def _saves(config: GenerationConfig) -> bool:
    try:
        config.validate(strict=True)
    except (ValueError, TypeError, AttributeError):
        return False
    return True
