"""Checks that stop a run.

The loss must be finite, it must depend on the images, and images, targets and visual tokens must match in number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from jaxtyping import Bool
from safetensors.torch import save_file
from torch import Tensor, nn

from trainer import distributed
from workbench.errors import DataError, RunError
from workbench.files import atomic_file
from workbench.mllm.conversation import IGNORED
from workbench.mllm.family import family_of


class FiniteCheck:
    """Stops a run whose loss or gradient norm is not finite, before a checkpoint could store what it did to the model.

    The host does not wait for the GPU: a value is only looked at one optimizer step later, or when something is about
    to be logged, evaluated or saved.

    Args:
        folder: where the batch of a value that is not finite is saved.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._values: list[_Value] = []

    def add(
        self, value: Tensor, terms: Mapping[str, Tensor], batch: Mapping[str, Any] | Sequence[Any], step: int
    ) -> None:
        """Add a value of the current step, and check those of earlier steps.

        Args:
            value: the loss or the norm.
            terms: what `value` is the sum of, or `value` itself, by name; for the message.
            batch: the model's inputs, saved as safetensors if `value` is not finite.
            step: number of the current optimizer step, from 1.

        Raises:
            RunError: an earlier value is not finite.
        """
        self.check(before=step)
        finite = torch.isfinite(value.detach()).to("cpu", non_blocking=True)
        copied = torch.cuda.Event() if value.is_cuda else None
        if copied is not None:
            copied.record()
        self._values.append(_Value(finite, copied, {n: term.detach() for n, term in terms.items()}, batch, step))

    def check(self, before: int | None = None) -> None:
        """Check the values of the steps before `before`, by default all.

        Raises:
            RunError: one is not finite; the message names it, its step and the file with its batch.
        """
        while self._values and (before is None or self._values[0].step < before):
            value = self._values.pop(0)
            if not value.finite():
                self._values = []
                self._stop(value)

    def _stop(self, value: _Value) -> NoReturn:
        bad = [f"{name} is {term.item()}" for name, term in value.terms.items() if not torch.isfinite(term)]
        reason = f"{', '.join(bad or ['the loss is not finite'])} at step {value.step}"
        file = self.folder / f"not_finite-step-{value.step}.safetensors"
        with atomic_file(file) as partial:
            save_file(dict(_tensors(value.batch)), partial, metadata={"step": str(value.step), "why": reason})
        raise RunError(
            f"{reason}: training stopped before a checkpoint could store it; its batch is in {file}, and earlier"
            " checkpoints are unchanged"
        )


@dataclass(frozen=True)
class _Value:
    """A value that waits for its check.

    Attributes:
        is_finite: on the CPU, where it may still be arriving.
        copied: happens when it has arrived; None if it was on the CPU from the start.
    """

    is_finite: Bool[Tensor, ""]
    copied: torch.cuda.Event | None
    terms: Mapping[str, Tensor]
    batch: Mapping[str, Any] | Sequence[Any]
    step: int

    def finite(self) -> bool:
        if self.copied is not None:
            self.copied.synchronize()
        return bool(self.is_finite)


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a nested batch with its dotted name."""
    if isinstance(value, Tensor):
        # a copy, since a safetensors file refuses tensors that share memory
        yield name, value.detach().cpu().clone(memory_format=torch.contiguous_format)
    elif isinstance(value, Mapping | list | tuple):
        for key, part in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _tensors(part, f"{name}.{key}" if name else str(key))


class ImageCheck:
    """Stops a run whose language-model loss does not depend on the images, once, at its first batch with an image.

    transformers ignores arguments that a model does not know. A model whose features come in such an argument trains
    without an error and answers as if it were blind, so this asks for the gradient of the loss at the projector's
    output, by a backward pass that leaves no gradient in a parameter. Where FSDP or ZeRO-3 shards the weights, a second
    backward pass is not possible, and nothing is checked; nor where nothing up to the projector's output is trained.

    Args:
        model: the transformers model.
    """

    def __init__(self, model: Any) -> None:
        self._image_token: int = model.config.image_token_id
        self._outputs: list[Tensor] = []  # of the projector, in the latest forward pass
        self._hook = None
        if not distributed.is_sharded():
            projector = model.model.get_submodule(family_of(model.config).projector)
            self._hook = projector.register_forward_hook(self._record)

    def _record(self, projector: nn.Module, _: object, output: Tensor) -> None:
        if projector.training:
            self._outputs.append(output)

    def check(self, lm_loss: Tensor, batch: Mapping[str, Any], step: int) -> None:
        """Check the forward pass of `batch`, before its backward pass.

        Raises:
            RunError: an answer follows an image, but the projector was not used or its output has no gradient.
        """
        outputs, self._outputs = self._outputs, []
        if self._hook is None or not _has_answer_after_image(batch, self._image_token):
            return
        trained = [output for output in outputs if output.requires_grad]
        if trained or not outputs:
            gradients = torch.autograd.grad(lm_loss, trained, retain_graph=True, allow_unused=True) if trained else ()
            if not any(gradient is not None and gradient.any() for gradient in gradients):
                if trained and not lm_loss.item():
                    return  # every answer is certain, so that no gradient says nothing of the images
                raise RunError(
                    f"the language-model loss of step {step} does not depend on the images of its batch: expected a"
                    " gradient at the projector's output; check the version of transformers and what changes the model"
                )
        self._hook.remove()
        self._hook = None


def _has_answer_after_image(batch: Mapping[str, Any], image_token: int) -> bool:
    """Return whether in some row a token that counts in the loss comes after a visual token."""
    after_image = batch["input_ids"].eq(image_token).cumsum(1) > 0
    return bool((after_image & batch["labels"].ne(IGNORED)).any())


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
