"""What identifies a model: its tensors by name, its configuration, tokenizer and processor, and the libraries that
compute with it.

Every number is stored under a hash of all that it depends on. Here are the parts of that hash that belong to a model;
none of them depends on where a file lies, when it was written, or in how many pieces and in which order.
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

if TYPE_CHECKING:  # the versions of libraries are asked for where torch is not needed
    from torch import Tensor, nn

LIBRARIES = ("torch", "torchvision", "transformers", "tokenizers", "timm", "pillow", "numpy", "scipy", "scikit-learn")
"""Whose releases may change a number: kernels, models, text and pixel preprocessing, random streams, probes. Their
major and minor version is in every key; a patch release is in the record alone."""

SETTINGS_OF_A_PLACE = (
    "_name_or_path",
    "name_or_path",
    "processor_name_or_path",
    "transformers_version",
    "_commit_hash",
)
"""Keys of configurations that say where it came from, not what it is. (The version of transformers is in the key by
itself.)"""


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Hash names, dtypes, shapes and bytes of `tensors` to 16 hex digits of SHA-256; their order does not matter.

    transformers renames parameters between file and memory: of a model in memory, hash `saved_tensors`, so that it has
    the fingerprint of its file.
    """
    whole = hashlib.sha256()
    for name in sorted(tensors):
        whole.update(f"{name}|{digest(tensors[name])}\n".encode())
    return whole.hexdigest()[:16]


def digest(value: Tensor) -> str:
    """SHA-256 of dtype, shape and bytes of one tensor; contiguous tensors in main memory are not copied."""
    from torch import uint8

    value = value.detach().cpu().contiguous()
    known = hashlib.sha256(f"{value.dtype}|{tuple(value.shape)}|".encode())
    if value.numel():
        known.update(value.view(-1).view(uint8).numpy().data)
    return known.hexdigest()


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model under the names that its folder would have, without second names of tied ones; no tensor
    is copied where none is reshaped.

    A transformers model is renamed as `save_pretrained` does for one that was made from its configuration, however this
    one was loaded; any other module (timm's) has the names of its state dict.
    """
    from transformers import PreTrainedModel
    from transformers.core_model_loading import revert_weight_conversion

    state: dict[str, Tensor] = model.state_dict()
    if not isinstance(model, PreTrainedModel):
        return state
    for second, first in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if second in state and first in state and state[second].data_ptr() == state[first].data_ptr():
            del state[second]
    loaded = model.__dict__.pop("_weight_conversions", None)  # how its file named them, which may be an older layout
    try:
        return dict(revert_weight_conversion(model, state))
    finally:
        if loaded is not None:
            model._weight_conversions = loaded


# --- settings -------------------------------------------------------------------------------------


def settings_hash(*parts: object) -> str:
    """Hash plain values (mappings in any order of their keys) to 16 hex digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def without_place(value: Any) -> Any:
    """A nested configuration without the keys that say where it came from."""
    if isinstance(value, Mapping):
        return {str(key): without_place(part) for key, part in value.items() if key not in SETTINGS_OF_A_PLACE}
    return [without_place(part) for part in value] if isinstance(value, list | tuple) else value


def processor_fingerprint(processor: Any) -> str:
    """Of all that a processor does to text and images: its tokenizer, its settings, those of its image processor, and
    its chat template."""
    tokenizer, images = processor.tokenizer, processor.image_processor
    settings = {
        key: value
        for key, value in processor.to_dict().items()
        if key not in ("tokenizer", "chat_template", "image_processor")
    }
    code = [own for part in (processor, tokenizer, images) if (own := _code_of(part))]
    return settings_hash(
        tokenizer_settings(tokenizer),
        without_place(settings),
        without_place(images.to_dict()),
        processor.chat_template,
        code,
    )


def tokenizer_settings(tokenizer: Any) -> dict[str, Any]:
    """All by which a tokenizer turns text into tokens and back, but not how a batch was padded or cut last."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        core = json.loads(backend.to_str())
        core["truncation"] = core["padding"] = None  # what the last call left there
    else:
        core = {"vocabulary": tokenizer.get_vocab(), "sentencepiece": _sentencepiece(tokenizer)}
    added = {str(number): _added(token) for number, token in tokenizer.added_tokens_decoder.items()}
    plain = (
        "clean_up_tokenization_spaces",
        "split_special_tokens",
        "model_input_names",
        "add_bos_token",
        "add_eos_token",
        "add_prefix_space",
        "legacy",
    )
    named = {name: getattr(tokenizer, name, None) for name in plain}
    return {
        "core": core,
        "added": added,
        "special": tokenizer.special_tokens_map,
        "settings": named,
        "class": type(tokenizer).__name__,
    }


def _added(token: Any) -> list[object]:
    return [
        str(token),
        *(getattr(token, name, None) for name in ("single_word", "lstrip", "rstrip", "normalized", "special")),
    ]


def _sentencepiece(tokenizer: Any) -> str:
    """Hash of the model of a tokenizer that is not of the tokenizers library."""
    model = getattr(tokenizer, "sp_model", None)
    return hashlib.sha256(model.serialized_model_proto()).hexdigest() if model is not None else ""


def model_settings(model: Any) -> dict[str, Any]:
    """Configuration and generation settings of a transformers model, and the code that it brings, if it does."""
    generation = getattr(model, "generation_config", None)
    kept = (
        {}
        if generation is None
        else {key: value for key, value in generation.to_diff_dict().items() if key != "_from_model_config"}
    )
    return {
        "config": without_place(model.config.to_diff_dict()),
        "generation": without_place(kept),
        "code": _code_of(model),
    }


def _code_of(part: Any) -> str:
    """Hash of the file that defines the class of `part`, where it came with a model (trust_remote_code); the libraries'
    own have versions."""
    module = sys.modules.get(type(part).__module__)
    file = getattr(module, "__file__", None)
    if not type(part).__module__.startswith("transformers_modules") or file is None:
        return ""
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(file).parent.glob("*.py")))).hexdigest()


@cache
def libraries() -> dict[str, str]:
    """{library: "major.minor"} of all whose releases may change a number; "absent" where one is not installed."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = ".".join(version(name).split("+")[0].split(".")[:2])
        except PackageNotFoundError:
            found[name] = "absent"
    return found
