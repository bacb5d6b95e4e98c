"""Read the files of a model folder without running code from them.

A pickle is read with `weights_only=True`, and refused if it needs more than that. Incomplete or damaged files are
refused, with an error of one sentence. Tensors stay mapped from the disk until they are used.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.errors import WeightsError, one_line
from workbench.weights.pretrained import call, hub_options

SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"
ADAPTER = "adapter_config.json"
INDEX = ".index.json"
_POINTER = b"version https://git-lfs.github.com/spec/"
_SMALL_FILES = ["*.json", "*.txt", "*.jinja", "tokenizer.model"]
# names of weight files that cannot be read here
_FOREIGN = ("*.gguf", "*.safetensors", "*.bin", "*.pth", "*.pt", "*.ckpt", "*.h5", "*.msgpack", "*.onnx")
_NOT_WEIGHTS = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt")


@dataclass(frozen=True)
class WeightFiles:
    """The files with the weights of a whole model.

    Attributes:
        files: in the order of their names.
        pickled: whether they are pickles (`.bin`) instead of safetensors.
    """

    folder: Path
    files: tuple[Path, ...]
    pickled: bool

    @property
    def bytes(self) -> int:
        """Return their size on the disk."""
        return sum(file.stat().st_size for file in self.files)


def check_folder(folder: Path) -> None:
    """Check that `folder` has a model's configuration, and that its small files are there and readable.

    Raises:
        WeightsError: there is no configuration, or only an adapter, or a file is a Git LFS pointer or a broken link.
    """
    if not (folder / "config.json").exists() and (folder / ADAPTER).exists():
        raise WeightsError(adapter_only_message(folder))
    _check_file(folder / "config.json")
    for pattern in ("*.json", "*.jinja", "*.txt", "tokenizer.model"):
        for file in folder.glob(pattern):
            _check_file(file)
    read_json(folder / "config.json")


def weight_files(folder: Path) -> WeightFiles:
    """Return the files with the weights in `folder`, one or several shards; safetensors are preferred to pickles.

    Raises:
        WeightsError: there are no weights, or an adapter is beside them, or a file is missing, cut, a Git LFS pointer
            or a broken link.
    """
    weights = _weight_files(folder)
    if (folder / ADAPTER).exists() and list(folder.glob("adapter_model*")):
        raise WeightsError(
            f"folder {folder} holds a whole model and an adapter ({ADAPTER}), which transformers would add: move the"
            " adapter's files elsewhere, or merge it into the model"
        )
    return weights


def _weight_files(folder: Path) -> WeightFiles:
    """Do what `weight_files` does, but for the adapter beside the weights."""
    for name in (SAFETENSORS, PICKLE):
        whole, index = folder / name, folder / f"{name}{INDEX}"
        if _is_there(whole):
            _check_weights(whole)
            return WeightFiles(folder, (whole,), name == PICKLE)
        if _is_there(index):
            shards = shards_of(index)
            files = tuple(folder / file for file in sorted(set(shards.values())))
            for file in files:
                _check_weights(file)
                if file.suffix == ".safetensors":
                    expected = {key for key, shard in shards.items() if shard == file.name}
                    if missing := expected - tensor_entries(file).keys():
                        raise WeightsError(
                            f"{index} names {count_and_names(missing)} that {file.name} does not hold: download both"
                            " again"
                        )
            return WeightFiles(folder, files, name == PICKLE)
    if (folder / ADAPTER).exists():
        raise WeightsError(adapter_only_message(folder))
    raise WeightsError(_no_weights(folder))


def _is_there(file: Path) -> bool:
    """Return whether there is a file of this name, even if it is a broken link."""
    return file.exists() or file.is_symlink()


def _no_weights(folder: Path) -> str:
    """Return the message for a folder without weights that can be read."""
    expected = f"expected {SAFETENSORS} or {PICKLE}, whole or in shards with an index"
    files = [file.name for pattern in _FOREIGN for file in sorted(folder.glob(pattern))]
    others = [name for name in files if name not in _NOT_WEIGHTS]
    if not others:
        return f"folder {folder} holds no weights: {expected}"
    if others[0].endswith(".gguf"):
        return (
            f"folder {folder} holds its weights as GGUF only ({others[0]}), which is not read: expected the"
            f" {SAFETENSORS} that it was converted from"
        )
    if "-of-" in others[0]:
        return (
            f"folder {folder} holds shards ({others[0]} ...) without their index: expected {SAFETENSORS}{INDEX} or"
            f" {PICKLE}{INDEX} beside them"
        )
    return f"folder {folder} holds no weights that are read, only {', '.join(others[:3])}: {expected}"


def is_lora_checkpoint(folder: Path) -> bool:
    """Return whether this is a checkpoint-N folder of a LoRA training with the original code.

    Such a folder has the adapter, but not the other weights that were trained.
    """
    return (
        (folder / ADAPTER).exists()
        and (folder / "trainer_state.json").exists()
        and not find_part(folder, "non_lora_trainables")
    )


def adapter_only_message(folder: Path) -> str:
    """Return the message for a folder with an adapter but no model: which folder is needed, or what to run."""
    if is_lora_checkpoint(folder):
        return (
            f"folder {folder} is a checkpoint within a LoRA training, without the projector: give python -m"
            " workbench.convert the training's own folder, which has non_lora_trainables.bin and config.json"
        )
    base = _base_of(folder)
    if find_part(folder, "non_lora_trainables"):
        return (
            f"folder {folder} holds an adapter of the original LLaVA code, not a model: run python -m workbench.convert"
            f" {folder} OUT --base {base or 'BASE'}"
        )
    if base and _is_local(base):
        merge = f"PeftModel.from_pretrained(base, '{folder.name}').merge_and_unload().save_pretrained(OUT)"
        return (
            f"folder {folder} holds an adapter of {base}, not a model: merge it into that model with peft, {merge}, and"
            " give OUT"
        )
    whose = base or "a model that it does not name"
    return (
        f"folder {folder} holds an adapter of {whose}, not a model: expected the folder of the merged model (peft's"
        " merge_and_unload)"
    )


def _base_of(folder: Path) -> str:
    """Return the base model that an adapter's folder names, or "" if it names none."""
    try:
        return str(read_json(folder / ADAPTER).get("base_model_name_or_path") or "")
    except WeightsError:
        return ""


def _is_local(name: str) -> bool:
    """Return whether a model is a folder, or a hub id in the local cache."""
    from huggingface_hub import try_to_load_from_cache

    try:
        return Path(name).is_dir() or isinstance(try_to_load_from_cache(name, "config.json"), str)
    except ValueError:  # not a valid hub id
        return False


def _check_file(file: Path) -> None:
    """Check that `file` is a file, and neither a broken link nor a Git LFS pointer."""
    if file.is_symlink() and not file.exists():
        raise WeightsError(
            f"{file} is a link to {file.readlink()}, which is not there: copy the folder again with the files that its"
            " links point to (cp -rL)"
        )
    if not file.exists():
        raise WeightsError(f"folder {file.parent} holds no model: expected {file.name} and {SAFETENSORS} in it")
    if not file.is_file():
        raise WeightsError(f"{file} is a folder: expected a file")
    _check_pointer(file)


def _check_pointer(file: Path) -> None:
    """Refuse a Git LFS pointer."""
    if not file.is_file():
        return
    with file.open("rb") as opened:
        start = opened.read(len(_POINTER))
    if start == _POINTER:
        raise WeightsError(
            f"{file} is a Git LFS pointer, not the file it stands for: run git lfs pull in {file.parent}, or download"
            " the file again"
        )


def _check_weights(file: Path) -> None:
    """Check that one file of weights is there and, if it is a safetensors file, complete.

    Pickles are checked when they are read.
    """
    if not _is_there(file):
        raise WeightsError(f"shard {file} is missing: expected it beside its index")
    _check_file(file)
    if not file.stat().st_size:
        raise WeightsError(f"{file} is empty: expected weights; download it again")
    if file.suffix == ".safetensors":
        tensor_entries(file)


def tensor_entries(file: Path) -> dict[str, Any]:
    """Return the entry of each tensor in the header of a safetensors file.

    Raises:
        WeightsError: the file is shorter than its header says, or it is not a safetensors file.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            if length > min(size, 100_000_000):
                raise ValueError("no header")
            entries = json.loads(opened.read(length))
        entries.pop("__metadata__", None)
        expected = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, struct.error, AttributeError, TypeError, LookupError) as error:
        raise WeightsError(
            f"{file} is not a safetensors file, but a damaged one or one of another kind, and was not opened: download"
            " it again"
        ) from error
    if size < expected:
        raise WeightsError(f"{file} is cut, with {size:,} of {expected:,} bytes: download it again")
    return dict(entries)


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        WeightsError: there is no such file, or it holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise WeightsError(f"folder {path.parent} holds no {path.name}: expected that file in it") from error
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not valid JSON ({one_line(error, 80)}): expected a JSON object") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a JSON {type(content).__name__}: expected an object with keys and values")
    return content


def find_part(folder: Path, stem: str) -> Path | None:
    """Return `stem.safetensors` in `folder`, else `stem.bin`, else None."""
    return next((file for file in (folder / f"{stem}.safetensors", folder / f"{stem}.bin") if file.exists()), None)


def has_model(folder: Path) -> bool:
    """Return whether `folder` holds the weights of a whole model, in one file or in shards."""
    return any(_is_there(folder / f"{name}{end}") for name in (SAFETENSORS, PICKLE) for end in ("", INDEX))


def shards_of(index: Path) -> dict[str, str]:
    """Return the name of the file with each tensor, from an index of shards.

    Raises:
        WeightsError: it is not such an index, or it names a file that is missing or not beside it.
    """
    _check_file(index)
    shards = read_json(index).get("weight_map")
    if (
        not isinstance(shards, dict)
        or not shards
        or not all(isinstance(file, str) and Path(file).name == file for file in shards.values())
    ):
        raise WeightsError(
            f"{index} is not an index of shards: expected a weight_map from tensor names to files beside it"
        )
    for file in sorted(set(shards.values())):
        if not _is_there(index.parent / file):
            count = sum(shard == file for shard in shards.values())
            raise WeightsError(
                f"shard {index.parent / file} is missing: {index.name} says that it holds {count} tensors"
            )
    return shards


def locate(name: str, what: str, option: str) -> Path:
    """Return the folder of a local model, or download a hub id and return its snapshot.

    Pickles are downloaded only if there are no safetensors.

    Args:
        name: folder or hub id.
        what: what it is, for the error, such as "base language model".
        option: with which the user can give a local folder.

    Raises:
        WeightsError: neither a folder nor a hub id within reach.
    """
    if not name:
        raise WeightsError(f"the folder does not say which {what} it belongs to: give a folder or hub id with {option}")
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    def failed(error: Exception) -> WeightsError:
        reason = type(error).__name__  # the client's own message is about caches and retries
        return WeightsError(
            f"{what} '{name}' is neither a folder nor a hub id within reach ({reason}); give a local folder with"
            f" {option}"
        )

    def downloaded(*weights: str) -> Path:
        patterns = [*_SMALL_FILES, *weights]
        return Path(call(lambda: snapshot_download(name, allow_patterns=patterns, **hub_options(name)), failed))

    folder = downloaded("model*.safetensors")
    return folder if has_model(folder) else downloaded("pytorch_model*.bin")


def count_and_names(names: Set[str] | Mapping[str, object]) -> str:
    """Return the number of tensors and their first three names, such as "5 tensors (a, b, c, ...)"."""
    first = ", ".join(sorted(names)[:3])
    return f"{len(names)} tensor{'s' * (len(names) != 1)} ({first}{', ...' * (len(names) > 3)})"
