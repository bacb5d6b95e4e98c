"""Generation settings of a checkpoint: read, checked, and repaired where transformers could not save them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from workbench.errors import ModelError, one_line
from workbench.mllm.hub_files import hub_file
from workbench.weights.pretrained import call

log = logging.getLogger(__name__)
# entries of generation_config.json that must be integers
INTEGERS = ("eos_token_id", "bos_token_id", "pad_token_id", "num_beams", "max_length", "max_new_tokens")

# Whatever the checkpoint says: without a cache, a later token would read the image again without its edit; with beams
# or several sequences the rows of a batch would not be its samples; the others are other ways to decode, or a limit.
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "use_cache": True,
    "return_dict_in_generate": False,
    "prompt_lookup_num_tokens": None,
    "penalty_alpha": None,
    "dola_layers": None,
    "token_healing": None,
    "max_time": None,
}


def generation_of(name: str, **options: Any) -> GenerationConfig | None:
    """Return the generation settings of a hub id or a folder, or None if it has no generation_config.json.

    Raises:
        ModelError: they cannot be read. Transformers would go on without the tokens at which the model stops.
    """
    hub = {key: options[key] for key in ("revision", "local_files_only") if key in options}
    file = hub_file(name, "generation_config.json", **hub)
    if file is None:
        return None

    def failed(error: object) -> ModelError:
        return ModelError(
            f"model '{name}' has a generation_config.json that transformers refuses ({one_line(error, 140)}): repair or"
            " remove it"
        )

    config: GenerationConfig = call(lambda: GenerationConfig.from_pretrained(Path(file).parent), failed)
    for key in INTEGERS:
        value = getattr(config, key, None)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(number, int) for number in values):
            raise failed(f"{key} is {value!r}, not an integer")
    return config


def repair_generation(name: str, model: Any) -> None:
    """Unset generation settings that contradict one another, which transformers would refuse to save.

    An example is Vicuna's temperature without sampling. No answer changes, since answers are greedy here.
    """
    if not model.can_generate():
        return
    model.generation_config, unset = _valid(model.generation_config)
    if unset:
        log.warning(
            "%s: generation settings left out because they contradict one another: %s (no answer changes, since answers"
            " are greedy here)",
            name,
            ", ".join(unset),
        )


def _valid(config: GenerationConfig) -> tuple[GenerationConfig, list[str]]:
    """Return the configuration without settings that contradict others, and the names of these settings.

    The settings that enable others (do_sample, num_beams) are tried first.
    """
    if _can_be_saved(config):
        return config, []
    values, defaults = config.to_dict(), GenerationConfig().to_dict()
    changed = [key for key in values if values[key] != defaults.get(key) and not key.endswith("token_id")]
    switches = [key for key in ("do_sample", "num_beams") if key in changed]
    valid, unset = {key: value for key, value in values.items() if key not in changed}, []
    for key in [*switches, *(key for key in changed if key not in switches)]:
        if _can_be_saved(GenerationConfig.from_dict(valid | {key: values[key]})):
            valid[key] = values[key]
        else:
            unset.append(key)
    return GenerationConfig.from_dict(valid), unset


def _can_be_saved(config: GenerationConfig) -> bool:
    try:
        config.validate(strict=True)
    except (ValueError, TypeError, AttributeError):
        return False
    return True
