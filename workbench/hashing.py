"""Hash what identifies a model: its tensors, configuration, tokenizer and processor, and the libraries' versions.

Every result is stored under a hash of everything that it depends on. This module computes the parts of the hash that
belong to a model. They do not depend on where its files are, when they were written, or how many shards they have.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `libraries` is called where torch is not needed
    from torch import Tensor, nn

LIBRARIES = ("torch", "torchvision", "transformers", "tokenizers", "timm", "pillow", "numpy", "scipy", "scikit-learn")
"""Libraries whose releases may change a result: kernels, models, preprocessing, random numbers, probes.

Their major and minor versions are part of every key; the patch version is in the record only."""

PROVENANCE_KEYS = (
    "_name_or_path",
    "name_or_path",
    "processor_name_or_path",
    "transformers_version",
    "_commit_hash",
)
"""Keys of a configuration that say where a model came from, not what it computes.

(`LIBRARIES` has the version of transformers.)"""


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Hash names, dtypes, shapes and bytes of `tensors` to 16 hex digits of SHA-256; their order does not matter.

    transformers renames parameters when it loads a file. For a model in memory, pass `saved_tensors(model)`, which
    gives the same fingerprint as the file.
    """
    whole = hashlib.sha256()
    for name in sorted(tensors):
        whole.update(f"{name}|{digest(tensors[name])}\n".encode())
    return whole.hexdigest()[:16]


def digest(value: Tensor) -> str:
    """Return the SHA-256 of dtype, shape and bytes of a tensor; a contiguous tensor on the CPU is not copied."""
    from torch import uint8

    value = value.detach().cpu().contiguous()
    sha = hashlib.sha256(f"{value.dtype}|{tuple(value.shape)}|".encode())
    if value.numel():
        sha.update(value.view(-1).view(uint8).numpy().data)
    return sha.hexdigest()


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a model under the names that they would have in its saved folder.

    Of tied tensors only the first name is returned. Tensors are copied only where saving reshapes them. For a
    transformers model the names are those that `save_pretrained` gives to a model made from its configuration, whatever
    file this one was loaded from; any other module (timm's) has the names of its state dict.
    """
    from transformers import PreTrainedModel
    from transformers.core_model_loading import revert_weight_conversion

    state: dict[str, Tensor] = model.state_dict()
    if not isinstance(model, PreTrainedModel):
        return state
    for second, first in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if second in state and first in state and state[second].data_ptr() == state[first].data_ptr():
            del state[second]
    loaded = model.__dict__.pop("_weight_conversions", None)  # the names in its file, which may be of an older layout
    try:
        return dict(revert_weight_conversion(model, state))
    finally:
        if loaded is not None:
            model._weight_conversions = loaded


# --- settings -------------------------------------------------------------------------------------


def settings_hash(*parts: object) -> str:
    """Hash plain values to 16 hex digits; the order of the keys of a mapping does not matter."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def without_provenance(value: Any) -> Any:
    """Return a nested configuration without PROVENANCE_KEYS."""
    if isinstance(value, Mapping):
        return {str(key): without_provenance(part) for key, part in value.items() if key not in PROVENANCE_KEYS}
    return [without_provenance(part) for part in value] if isinstance(value, list | tuple) else value


def processor_fingerprint(processor: Any) -> str:
    """Hash everything that decides what a processor does to text and images.

    These are its settings, its tokenizer, its image processor, its chat template, and code that came with the model.
    """
    tokenizer, images = processor.tokenizer, processor.image_processor
    settings = {
        key: value
        for key, value in processor.to_dict().items()
        if key not in ("tokenizer", "chat_template", "image_processor")
    }
    code = [code_hash for part in (processor, tokenizer, images) if (code_hash := _code_of(part))]
    return settings_hash(
        tokenizer_settings(tokenizer),
        without_provenance(settings),
        without_provenance(images.to_dict()),
        processor.chat_template,
        code,
    )


def tokenizer_settings(tokenizer: Any) -> dict[str, Any]:
    """Return every setting that decides how a tokenizer encodes and decodes text.

    The padding and truncation of its last call are left out.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        core = json.loads(backend.to_str())
        core["truncation"] = core["padding"] = None  # set by the last call
    else:
        core = {"vocabulary": tokenizer.get_vocab(), "sentencepiece": _sentencepiece(tokenizer)}
    added_tokens = {str(number): _added(token) for number, token in tokenizer.added_tokens_decoder.items()}
    names = (
        "clean_up_tokenization_spaces",
        "split_special_tokens",
        "model_input_names",
        "add_bos_token",
        "add_eos_token",
        "add_prefix_space",
        "legacy",
    )
    settings = {name: getattr(tokenizer, name, None) for name in names}
    return {
        "core": core,
        "added": added_tokens,
        "special": tokenizer.special_tokens_map,
        "settings": settings,
        "class": type(tokenizer).__name__,
    }


def _added(token: Any) -> list[object]:
    return [
        str(token),
        *(getattr(token, name, None) for name in ("single_word", "lstrip", "rstrip", "normalized", "special")),
    ]


def _sentencepiece(tokenizer: Any) -> str:
    """Return the hash of the sentencepiece model of a slow tokenizer, or "" if it has none."""
    model = getattr(tokenizer, "sp_model", None)
    return hashlib.sha256(model.serialized_model_proto()).hexdigest() if model is not None else ""


def model_settings(model: Any) -> dict[str, Any]:
    """Return the configuration and generation settings of a transformers model, and the hash of code it came with."""
    generation_config = getattr(model, "generation_config", None)
    generation = {} if generation_config is None else generation_config.to_diff_dict()
    generation.pop("_from_model_config", None)
    return {
        "config": without_provenance(model.config.to_diff_dict()),
        "generation": without_provenance(generation),
        "code": _code_of(model),
    }


def _code_of(part: Any) -> str:
    """Return the hash of the code that defines the class of `part` if it came with a model (trust_remote_code).

    For a class of an installed library it is "": `libraries` has the library's version.
    """
    module = sys.modules.get(type(part).__module__)
    file = getattr(module, "__file__", None)
    if not type(part).__module__.startswith("transformers_modules") or file is None:
        return ""
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(file).parent.glob("*.py")))).hexdigest()


@cache
def libraries() -> dict[str, str]:
    """Return {library: "major.minor"} for LIBRARIES; a library that is not installed is "absent"."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = ".".join(version(name).split("+")[0].split(".")[:2])
        except PackageNotFoundError:
            versions[name] = "absent"
    return versions
