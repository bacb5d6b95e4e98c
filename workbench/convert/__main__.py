"""Convert a checkpoint folder of the original LLaVA-1.5 or VIRAL code to a transformers LLaVA folder.

The alignment head, if there is one, is stored in a file beside the model.

python -m workbench.convert checkpoints/llava-v1.5-7b models/llava15
python -m workbench.convert checkpoints/viral-7b-lora models/viral --base lmsys/vicuna-7b-v1.5
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from workbench.cli import command, parse
from workbench.errors import ConfigError, RunError
from workbench.files import HEAD_FILE, atomic_folder

if TYPE_CHECKING:
    from workbench.convert.source import Source

ALIGNMENT_FILE = "alignment.json"
OBJECTIVES = {"direct": "cosine", "similarity": "relation"}  # the original code's names and ours
# tensors that the model does not use: the weights of a VFM, and the decoders of the ROSS baseline
UNUSED = ("alignment_encoder.", "model.denoiser.", "model.pixel_decoder.")


@dataclass(frozen=True)
class ConvertConfig:
    """The options of `python -m workbench.convert`."""

    official_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OFFICIAL_DIR")]
    """A folder that the original code wrote: a whole model, LoRA with non_lora_trainables.bin, or only a projector
    (mm_projector.bin)."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """The folder to write, new or empty."""
    vision_tower: str = ""
    """Folder or hub id of the CLIP vision encoder, needed if the checkpoint does not hold it; by default
    mm_vision_tower of its config.json."""
    base: str = ""
    """Folder or hub id of the base language model, needed for LoRA or a projector; by default the one that the folder
    names."""


def convert(official: Path, out: Path, *, vision_tower: str = "", base: str = "") -> str:
    """Convert the folder `official` to the new folder `out`, and return a summary of a few lines.

    All tensors of the model get the dtype of the token embeddings, as in the original code. After an error, nothing is
    written.

    Args:
        vision_tower, base: as in `ConvertConfig`.

    Raises:
        ModelError: a model that transformers' LLaVA cannot represent.
        WeightsError: files are missing, damaged or refused, or tensors do not fit config.json.
        RunError: `out` has content already, or cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out} is there already: expected a new or an empty folder")

    from safetensors.torch import save_file  # slow to import, so after the first check

    from workbench.convert import build
    from workbench.convert.checkpoint import check_tensors
    from workbench.convert.source import BUFFERS, HEAD, read_source, read_tokenizer, read_vision_encoder

    source = read_source(official, base)
    config, tensors = source.config, source.tensors
    dropped = Counter(
        prefix
        for name in list(tensors)
        for prefix in UNUSED
        if name.startswith(prefix) and tensors.pop(name) is not None
    )
    tied = config.get("tie_word_embeddings")
    for name in list(tensors):
        if name.endswith(BUFFERS) or (name == "lm_head.weight" and tied):
            del tensors[name]
    head = {name: tensors.pop(name) for name in list(tensors) if name.startswith(HEAD)}

    vision, normalization = read_vision_encoder(tensors, vision_tower or str(config.get("mm_vision_tower") or ""))
    settings = build.llava_config(config, vision)
    check_tensors(
        tensors | head,
        build.expected_tensors(settings) | build.expected_head(config, settings.text_config.hidden_size, head),
        str(official),
    )
    tokenizer = read_tokenizer(source.folders, settings.text_config)
    build.extend_vocabulary(tensors, settings, tokenizer)
    model = build.build_model(settings, tensors, tokenizer)
    processor = build.build_processor(config, settings, tokenizer, normalization)
    alignment = describe_alignment(source, bool(head))
    with atomic_folder(out) as partial:
        model.save_pretrained(partial, max_shard_size="5GB")
        processor.save_pretrained(partial)
        if head:
            save_file({build.head_name(name): value.contiguous() for name, value in head.items()}, partial / HEAD_FILE)
        if alignment:
            (partial / ALIGNMENT_FILE).write_text(json.dumps(alignment, indent=2))
    return "\n".join(_summary(out, model, alignment, dropped))


def _summary(out: Path, model: Any, alignment: dict[str, Any], dropped: Counter[str]) -> list[str]:
    """Return the lines that say what was converted, and which tensors were dropped."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    lines = [f"{out}: {model.config.text_config.model_type} LLaVA, {parameters:,} parameters in {model.dtype}"]
    if alignment and not alignment["heads"]:
        lines.append("no alignment head: the model was trained with one, but the folder does not hold it")
    elif alignment:
        frozen = "; it was frozen while LoRA was trained" if alignment["head_trained"] is False else ""
        lines.append(f"{HEAD_FILE}: layers {alignment['layers']}, {alignment['vfm']}{frozen}")
    return lines + [
        f"dropped {count} tensors {prefix}*, which the model does not use" for prefix, count in dropped.items()
    ]


def describe_alignment(source: Source, head: bool) -> dict[str, Any]:
    """Return what was aligned with what, for alignment.json; empty for a model that was trained without alignment.

    Layers are numbered as everywhere here: 0 is the input of the first block, l the output of block l.

    Args:
        head: whether the folder holds an alignment head.
    """
    config = source.config
    if not head and not config.get("vra_loss"):
        return {}
    layers = config.get("target_layers")
    return {
        "layers": layers,
        "vfm": config.get("vra_target"),
        "objective": OBJECTIVES.get(config.get("alignment_loss", "direct"), config.get("alignment_loss")),
        "weight": config.get("vra_weight"),
        "heads": (len(layers or (15, 16)) if config.get("use_multiple_projectors") else 1) if head else 0,
        "head_trained": source.head_trained if head else None,
    }


def main(argv: list[str]) -> None:
    """Convert one folder and print a summary."""
    if not argv:
        raise ConfigError("no folder given: expected python -m workbench.convert OFFICIAL_DIR OUT")
    config = parse(ConvertConfig, argv, prog="python -m workbench.convert", description=__doc__ or "")
    print(convert(config.official_dir, config.out, vision_tower=config.vision_tower, base=config.base))


if __name__ == "__main__":
    command(main)
