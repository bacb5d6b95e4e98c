"""What stops a run: a loss that is not finite, images and visual tokens that do not match."""

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
    """See that a loss or the norm of a gradient is finite, so that no checkpoint has what it would make of the model.

    Args:
        parts: what it is, or is made of, by name, for the message.
        batch: what the model was given, saved as safetensors where the value is not finite.
        step: the optimiser step that is being made, from 1.

    Raises:
        RunError: names the value, the step and the file.
    """
    if torch.isfinite(value):
        return
    bad = [f"{name} is {part.item()}" for name, part in parts.items() if not torch.isfinite(part)] or [
        f"the loss is {value.item()}"
    ]
    file = folder / f"not_finite-step-{step}.safetensors"
    said = f"{', '.join(bad)} at step {step}"
    with atomic_file(file) as partial:
        save_file(dict(_tensors(batch)), partial, metadata={"step": str(step), "why": said})
    raise RunError(
        f"{said}: training stopped before a checkpoint has it; its batch is in {file}, and the checkpoints before are"
        " as they were"
    )


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a nested batch by its dotted name."""
    if isinstance(value, Tensor):
        yield name, value.detach().cpu().clone(memory_format=torch.contiguous_format)  # a file holds no tensor twice
    elif isinstance(value, Mapping | list | tuple):
        for key, part in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _tensors(part, f"{name}.{key}" if name else str(key))


def counted(collator: Callable[[list[Any]], dict[str, Any]], image_token: int) -> Callable[[list[Any]], dict[str, Any]]:
    """`collator`, whose batches are checked: as many visual tokens in each text as the image and every target have.

    Of conversations every image and tile is compared with its target; that they fit the text is what
    `MLLM.visual_tokens` sees to.

    Raises:
        DataError: from the returned function, with both counts. A sample is never left out.
    """

    def checked(items: list[Any]) -> dict[str, Any]:
        batch = collator(items)
        targets = {f"target {name}": values for name, values in batch.get("targets", {}).items()}
        if "visual" in batch:
            found = [[len(part.index) for part in sample] for sample in batch["visual"]]
            others = {name: [[len(part) for part in sample] for sample in values] for name, values in targets.items()}
        else:
            found = [[count] for count in (batch["input_ids"] == image_token).sum(1).tolist()]
            others = {
                name: [[len(row)] for row in values]
                for name, values in ({"image": batch["connector_inputs"]} | targets).items()
            }
        for name, counts in others.items():
            for row, (own, other) in enumerate(zip(found, counts, strict=True)):
                if own != other:
                    said, had = (" + ".join(map(str, value)) or "no" for value in (own, other))
                    raise DataError(
                        f"sample {row} of a batch has {said} visual tokens in its text and {had} of its {name}:"
                        " expected as many"
                    )
        return batch

    return checked
