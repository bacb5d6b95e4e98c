"""What a run needs before its first step: one protocol, which packed questions (toy LLaVA) and conversations (any other
model) fulfil."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import Sampler

from trainer.aligned_model import Aligned
from trainer.evaluation import Evaluation
from trainer.recipe import Recipe


@dataclass(frozen=True)
class WatchedBatch:
    """Some images as the model receives them.

    Attributes:
        inputs: of the model's forward.
        places: for each image its row of the batch, and the positions of the visual tokens of each of its patch grids.
        patches: features of each VFM, [image][patch grid].
    """

    inputs: Mapping[str, Any]
    places: Sequence[tuple[int, Sequence[Int[Tensor, " token"]]]]
    patches: Mapping[str, Sequence[Sequence[Float[Tensor, "token d"]]]]


@dataclass(frozen=True)
class Watched:
    """What CKNNA is measured on while a model trains: batches of the validation split, the same at every evaluation.

    Attributes:
        fingerprint: of the VFMs: one, or a list.
    """

    batches: Sequence[WatchedBatch]
    fingerprint: object


class Setup(Protocol):
    """Model, data and features of one run, made from its recipe; the Trainer asks nothing else about the kind of
    training.

    Attributes:
        model: with its alignment heads; it takes what `collate` returns.
        processor: the model's.
        train: items by number, which `collate` makes batches of.
        val: the same, on which the model is watched.
        record: what training.json says of model, data and VFMs.
        unit: what the items are called.
    """

    unit: ClassVar[str]

    @classmethod
    def from_recipe(cls, recipe: Recipe, checkpoint: Path | None = None) -> Setup:
        """Load data, model and features. The model's initial weights depend on the seed alone, never on the alignment.

        Args:
            checkpoint: from which the run goes on.
        """
        ...

    @property
    def model(self) -> Aligned: ...

    @property
    def processor(self) -> Any: ...

    @property
    def train(self) -> Sized: ...

    @property
    def val(self) -> Sized: ...

    @property
    def record(self) -> dict[str, object]: ...

    def collate(self, items: list[Any], /) -> dict[str, Any]:
        """Return items as a batch, on the CPU."""
        ...

    def sampler(self, processes: int) -> Sampler[int]:
        """Return the order of the training items over the whole training in so many processes, one optimizer step after
        another."""
        ...

    def known(self, processes: int) -> list[str]:
        """Return the sentences that are warned of before the first step."""
        ...

    def aligned(self, batch: dict[str, Any]) -> Tensor:
        """Return what the alignment loss of a batch is a mean over: the number of its visual tokens or, for `relation`,
        of its images and tiles."""
        ...

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return AdamW's groups of the trained parameters, with learning rate and weight decay of each."""
        ...

    def evaluate(self, *, final: bool = False) -> Evaluation:
        """Evaluate the model on the validation split or, where the run has a test split and this evaluation is `final`,
        on that."""
        ...

    def watched(self) -> Watched:
        """Return the first images of the validation split, for CKNNA.

        Raises:
            WorkbenchError: it cannot be measured there.
        """
        ...

    def check_frozen(self, state: Mapping[str, Tensor]) -> None:
        """Check that training left alone what it should.

        Args:
            state: the tensors of the transformers model, whole.

        Raises:
            WeightsError: a frozen part of the model or a VFM no longer holds the values it began with.
        """
        ...

    def write_extras(self, checkpoint: Path) -> None:
        """Write into a checkpoint what going on from it needs besides model, optimizer and sources."""
        ...
