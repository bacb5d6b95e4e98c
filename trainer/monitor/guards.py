"""Checks that stop a run: the loss must be finite, and images, targets and visual tokens must match in number."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from workbench.errors import DataError, RunError
from workbench.files import atomic_file


def stop_unless_finite(
    value: Tensor, parts: Mapping[str, Tensor], batch: Mapping[str, Any] | Sequence[Any], folder: Path, step: int
) -> None:
    """Stop the run if a loss or gradient norm is not finite, before it could spoil the model and its checkpoints.

    Args:
        value: the loss or the norm.
        parts: the terms that `value` is made of, or `value` itself, by name; for the message.
        batch: the model's inputs, saved as safetensors if `value` is not finite.
        folder: where they are saved.
        step: number of the current optimizer step, from 1.

    Raises:
        RunError: `value` is not finite; the message names the value, the step and the file.
    """
    if torch.isfinite(value):
        return
    bad = [f"{name} is {part.item()}" for name, part in parts.items() if not torch.isfinite(part)] or [
        f"the loss is {value.item()}"
    ]
    file = folder / f"not_finite-step-{step}.safetensors"
    reason = f"{', '.join(bad)} at step {step}"
    with atomic_file(file) as partial:
        save_file(dict(_tensors(batch)), partial, metadata={"step": str(step), "why": reason})
    raise RunError(
        f"{reason}: training stopped before a checkpoint could store it; its batch is in {file}, and earlier"
        " checkpoints are unchanged"
    )


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a nested batch with its dotted name."""
    if isinstance(value, Tensor):
        # a copy, since a safetensors file refuses tensors that share memory
        yield name, value.detach().cpu().clone(memory_format=torch.contiguous_format)
    elif isinstance(value, Mapping | list | tuple):
        for key, part in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _tensors(part, f"{name}.{key}" if name else str(key))


def check_token_counts(
    collator: Callable[[list[Any]], dict[str, Any]], image_token: int
) -> Callable[[list[Any]], dict[str, Any]]:
    """Return `collator` with a check that texts, images and alignment targets have the same number of visual tokens.

    For conversations, each image and tile is compared with its target; that the visual tokens fit the text is checked
    by `MLLM.visual_tokens`.

    Raises:
        DataError: the numbers differ; raised when the returned function is called. No sample is ever left out.
    """

    def checked(items: list[Any]) -> dict[str, Any]:
        batch = collator(items)
        targets = {f"target {name}": values for name, values in batch.get("targets", {}).items()}
        if "visual" in batch:
            in_text = [[len(tile.index) for tile in sample] for sample in batch["visual"]]
            others = {name: [[len(tile) for tile in sample] for sample in values] for name, values in targets.items()}
        else:
            in_text = [[count] for count in (batch["input_ids"] == image_token).sum(1).tolist()]
            features = {"image": batch["connector_inputs"]} | targets
            others = {name: [[len(row)] for row in values] for name, values in features.items()}
        for name, counts in others.items():
            for row, (text_counts, other_counts) in enumerate(zip(in_text, counts, strict=True)):
                if text_counts != other_counts:
                    n_text, n_other = (" + ".join(map(str, value)) or "no" for value in (text_counts, other_counts))
                    raise DataError(
                        f"sample {row} of a batch has {n_text} visual tokens in its text and {n_other} of its {name}:"
                        " expected as many"
                    )
        return batch

    return checked
