"""The files of a model's folder: read without running code from them, and refused in one sentence where they are not
whole.

A pickle is read with `weights_only=True` and refused if it needs more. Tensors stay mapped from disk until they are
used.
"""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from workbench.errors import WeightsError, one_line
from workbench.weights.pretrained import call, hub_options

Tensors = dict[str, Tensor]
SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"
ADAPTER = "adapter_config.json"
_INDEX = ".index.json"
_POINTER = b"version https://git-lfs.github.com/spec/"
_SMALL_FILES = ["*.json", "*.txt", "*.jinja", "tokenizer.model"]
# weights under names that are not read
_FOREIGN = ("*.gguf", "*.safetensors", "*.bin", "*.pth", "*.pt", "*.ckpt", "*.h5", "*.msgpack", "*.onnx")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "BOOL": torch.bool,
    "U8": torch.uint8,
} | {
    **{f"I{bits}": getattr(torch, f"int{bits}") for bits in (8, 16, 32, 64)},
    **{
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "U16": torch.uint16,
        "U32": torch.uint32,
        "U64": torch.uint64,
    },
}  # what safetensors calls them
_NO_WEIGHTS = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt")


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold a whole model's weights.

    Attributes:
        files: in the order of their names.
        pickled: they are `.bin`, which is read with care, and not safetensors.
    """

    folder: Path
    files: tuple[Path, ...]
    pickled: bool

    @property
    def bytes(self) -> int:
        """Their size on the disk."""
        return sum(file.stat().st_size for file in self.files)


def check_folder(folder: Path) -> None:
    """See that `folder` holds a model's configuration, and that none of its small files is a Git LFS pointer or a link
    to nothing.

    Raises:
        WeightsError: it does not, or it holds an adapter alone.
    """
    if not (folder / "config.json").exists() and (folder / ADAPTER).exists():
        raise WeightsError(adapter_alone(folder))
    _check_file(folder / "config.json")
    for pattern in ("*.json", "*.jinja", "*.txt", "tokenizer.model"):
        for file in folder.glob(pattern):
            _check_file(file)
    read_json(folder / "config.json")


def weight_files(folder: Path) -> WeightFiles:
    """The weights in `folder`, in one file or in shards; safetensors come before pickles.

    Raises:
        WeightsError: there are none, or a file is missing, cut, a Git LFS pointer or a link to nothing; or an adapter
            lies beside them.
    """
    weights = _weight_files(folder)
    if (folder / ADAPTER).exists() and list(folder.glob("adapter_model*")):
        raise WeightsError(
            f"folder {folder} holds a whole model and an adapter ({ADAPTER}) beside it: expected one of them, since"
            " transformers would add the adapter; move the adapter's files elsewhere for the model without it"
        )
    return weights


def _weight_files(folder: Path) -> WeightFiles:
    for name in (SAFETENSORS, PICKLE):
        whole, index = folder / name, folder / f"{name}{_INDEX}"
        if _is_there(whole):
            _check_weights(whole)
            return WeightFiles(folder, (whole,), name == PICKLE)
        if _is_there(index):
            named = shards_of(index)
            files = tuple(folder / file for file in sorted(set(named.values())))
            for file in files:
                _check_weights(file)
                if file.suffix == ".safetensors" and (
                    absent := {key for key, own in named.items() if own == file.name} - _header(file).keys()
                ):
                    raise WeightsError(f"{index} names {listed(absent)} that {file.name} does not hold")
            return WeightFiles(folder, files, name == PICKLE)
    if (folder / ADAPTER).exists():
        raise WeightsError(adapter_alone(folder))
    raise WeightsError(_no_weights(folder))


def _is_there(file: Path) -> bool:
    return file.exists() or file.is_symlink()


def _no_weights(folder: Path) -> str:
    expected = f"expected {SAFETENSORS} or {PICKLE}, whole or in shards with an index"
    other = [file.name for pattern in _FOREIGN for file in sorted(folder.glob(pattern)) if file.name not in _NO_WEIGHTS]
    if not other:
        return f"folder {folder} holds no weights: {expected}"
    if other[0].endswith(".gguf"):
        return (
            f"folder {folder} holds its weights as GGUF only ({other[0]}), which is not read: expected the"
            f" {SAFETENSORS} that it was converted from"
        )
    if "-of-" in other[0]:
        return (
            f"folder {folder} holds shards ({other[0]} ...) without their index: expected {SAFETENSORS}{_INDEX} or"
            f" {PICKLE}{_INDEX} beside them"
        )
    return f"folder {folder} holds no weights that are read, only {', '.join(other[:3])}: {expected}"


def is_within_training(folder: Path) -> bool:
    """Whether this is a checkpoint-N folder of a LoRA training with the original code, which lacks all that is not an
    adapter."""
    return (
        (folder / ADAPTER).exists()
        and (folder / "trainer_state.json").exists()
        and not find_part(folder, "non_lora_trainables")
    )


def adapter_alone(folder: Path) -> str:
    """What to do with a folder that holds an adapter and no model: which folder is wanted, or what to run where its
    base is on this machine."""
    if is_within_training(folder):
        return (
            f"folder {folder} is a checkpoint within a LoRA training, without the connector: expected the training's"
            " own folder, which has non_lora_trainables.bin and config.json, for python -m workbench.convert"
        )
    base = _base_of(folder)
    if find_part(folder, "non_lora_trainables"):
        return (
            f"folder {folder} holds an adapter of the original LLaVA code, not a model: run python -m workbench.convert"
            f" {folder} OUT --base {base or 'BASE'}"
        )
    if base and _at_hand(base):
        first = f"PeftModel.from_pretrained(base, '{folder.name}').merge_and_unload().save_pretrained(OUT)"
        return (
            f"folder {folder} holds an adapter of {base}, not a model: merge it into that with peft, {first}, and"
            " give OUT"
        )
    whose = base or "a model it does not name"
    return (
        f"folder {folder} holds an adapter of {whose}, not a model: expected the folder of the merged model (peft's"
        " merge_and_unload)"
    )


def _base_of(folder: Path) -> str:
    try:
        return str(read_json(folder / ADAPTER).get("base_model_name_or_path") or "")
    except WeightsError:
        return ""


def _at_hand(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    try:
        return Path(name).is_dir() or isinstance(try_to_load_from_cache(name, "config.json"), str)
    except ValueError:  # no hub id
        return False


def _check_file(file: Path) -> None:
    """See that `file` is a file and no pointer to one."""
    if file.is_symlink() and not file.exists():
        raise WeightsError(
            f"{file} is a link to {file.readlink()}, which is not there: expected the file itself; copy the folder with"
            " its links followed"
        )
    if not file.exists():
        raise WeightsError(f"folder {file.parent} holds no model: expected a {file.name} and {SAFETENSORS} there")
    if not file.is_file():
        raise WeightsError(f"{file} is a folder: expected a file")
    _check_pointer(file)


def _check_pointer(file: Path) -> None:
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
    """See that one file of weights is whole; of pickles, only that they are there: they are checked when they are
    read."""
    if not _is_there(file):
        raise WeightsError(f"shard {file} is missing: expected it beside its index")
    _check_file(file)
    if not file.stat().st_size:
        raise WeightsError(f"{file} is empty: expected weights; download it again")
    if file.suffix == ".safetensors":
        _header(file)


def _header(file: Path) -> dict[str, Any]:
    """The entry of each tensor in a safetensors file, whose length must be what they add up to.

    Raises:
        WeightsError: it is cut, or something else under this name.
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
            f"{file} is not a safetensors file, but a damaged one or of another kind, and is not opened: download it"
            " again"
        ) from error
    if size < expected:
        raise WeightsError(
            f"{file} is cut, with {size:,} of {expected:,} bytes: expected a whole safetensors file; download it again"
        )
    return dict(entries)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        WeightsError: no such file, or something else in it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise WeightsError(f"folder {path.parent} holds no {path.name}") from error
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not valid JSON ({one_line(error, 80)})") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds {type(content).__name__}, expected an object with keys and values")
    return content


def read_tensors(path: Path) -> Tensors:
    """Map the tensors of one safetensors file or pickle (`.bin`) into memory.

    Raises:
        WeightsError: the file is damaged, is not what its name says, or holds anything but named tensors.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise WeightsError(
                f"{path} is not a safetensors file ({one_line(error, 80)}); a file of another kind under this name is"
                " not opened"
            ) from error
    try:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            # the format before torch 1.6 cannot be mapped
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} was refused: it holds more than plain tensors, and opening it could run code; expected a state"
            " dict"
        ) from error
    except FileNotFoundError as error:
        raise WeightsError(f"folder {path.parent} holds no {path.name}") from error
    except Exception as error:  # torch raises many unrelated types on damaged files
        raise WeightsError(
            f"{path} could not be read ({type(error).__name__}); expected a state dict written by torch.save"
        ) from error
    if not isinstance(found, Mapping) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items()
    ):
        raise WeightsError(f"{path} was refused: expected a state dict of names and tensors")
    return dict(found)


def shapes_of(weights: WeightFiles) -> Tensors:
    """Every tensor of a model without its values, on meta: from the headers of safetensors, or from pickles, which are
    read with care.

    Raises:
        WeightsError: a file is not what its name says.
    """
    found: Tensors = {}
    for file in weights.files:
        if weights.pickled:
            found |= {name: value.to("meta") for name, value in read_tensors(file).items()}
            continue
        for name, entry in _header(file).items():
            if entry["dtype"] not in _DTYPES:
                raise WeightsError(f"{file} holds '{name}' as {entry['dtype']}: expected numbers that torch knows")
            found[name] = torch.empty(entry["shape"], dtype=_DTYPES[entry["dtype"]], device="meta")
    return found


def find_part(folder: Path, stem: str) -> Path | None:
    """`stem.safetensors` or else `stem.bin` in `folder`, or None."""
    return next((file for file in (folder / f"{stem}.safetensors", folder / f"{stem}.bin") if file.exists()), None)


def has_model(folder: Path) -> bool:
    """Whether `folder` holds a whole model's weights, in one file or in shards."""
    return any(_is_there(folder / f"{name}{end}") for name in (SAFETENSORS, PICKLE) for end in ("", _INDEX))


def read_model(folder: Path) -> Tensors:
    """The tensors of a model folder; safetensors are preferred to pickles, and shards are joined by their index.

    Raises:
        WeightsError: no weights, a missing shard, or a tensor that the index names and its shard lacks.
    """
    weights = weight_files(folder)
    found: Tensors = {}
    for file in weights.files:
        found |= read_tensors(file)
    index = folder / f"{PICKLE if weights.pickled else SAFETENSORS}{_INDEX}"
    if not (folder / index.name.removesuffix(_INDEX)).exists() and (absent := shards_of(index).keys() - found.keys()):
        raise WeightsError(f"{index} names {listed(absent)} that its shards do not hold")
    return found


def shards_of(index: Path) -> dict[str, str]:
    """The file of each tensor, by an index of shards.

    Raises:
        WeightsError: the index has another shape, or names a file that is not there or not beside it.
    """
    _check_file(index)
    named = read_json(index).get("weight_map")
    if (
        not isinstance(named, dict)
        or not named
        or not all(isinstance(file, str) and Path(file).name == file for file in named.values())
    ):
        raise WeightsError(
            f"{index} is not an index of shards: expected a weight_map from tensor names to files beside it"
        )
    for file in sorted(set(named.values())):
        if not _is_there(index.parent / file):
            raise WeightsError(
                f"shard {index.parent / file} is missing: {index.name} says that it holds"
                f" {sum(f == file for f in named.values())} tensors"
            )
    return named


def locate(name: str, what: str, option: str) -> Path:
    """The folder of `name`: a local one, or a hub id's snapshot (pickles are fetched only where there are no
    safetensors).

    Raises:
        WeightsError: neither; says how to give a local folder.
    """
    if not name:
        raise WeightsError(f"the folder does not say which {what} it belongs to: give a folder or hub id with {option}")
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    def failed(error: Exception) -> WeightsError:
        reason = type(error).__name__  # the client's own words name caches and retries
        return WeightsError(
            f"{what} '{name}' is neither a folder nor a hub id within reach ({reason}); give a local folder with"
            f" {option}"
        )

    def fetched(*weights: str) -> Path:
        return Path(
            call(lambda: snapshot_download(name, allow_patterns=[*_SMALL_FILES, *weights], **hub_options(name)), failed)
        )

    folder = fetched("model*.safetensors")
    return folder if has_model(folder) else fetched("pytorch_model*.bin")


def listed(names: Set[str] | Mapping[str, object]) -> str:
    """The count and the first three names, such as "5 tensors (a, b, c, ...)"."""
    first = ", ".join(sorted(names)[:3])
    return f"{len(names)} tensor{'s' * (len(names) != 1)} ({first}{', ...' * (len(names) > 3)})"
