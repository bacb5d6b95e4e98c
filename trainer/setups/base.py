"""The `Setup` protocol: everything that a run needs before its first step.

`PackedSetup` (packed questions, toy LLaVA) and `ConversationSetup` (conversations, any other model) implement it.
"""

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
from trainer.head_choice import HeadChoice
from trainer.recipe import Recipe


@dataclass(frozen=True)
class MonitorBatch:
    """One batch of the images on which CKNNA is measured while a model trains.

    Attributes:
        inputs: arguments of the model's forward.
        visual: for each image, its row of the batch and the positions of its visual tokens, one tensor per patch grid.
        vfm_features: features of each VFM at these tokens, by name: [image][patch grid] (token, dim).
    """

    inputs: Mapping[str, Any]
    visual: Sequence[tuple[int, Sequence[Int[Tensor, " _token"]]]]
    vfm_features: Mapping[str, Sequence[Sequence[Float[Tensor, "_token _d"]]]]


@dataclass(frozen=True)
class MonitorBatches:
    """What CKNNA is measured on while a model trains: images of the validation split, the same at every evaluation.

    Attributes:
        vfm_fingerprint: the VFM's fingerprint; a list for several VFMs.
    """

    batches: Sequence[MonitorBatch]
    vfm_fingerprint: object


class Setup(Protocol):
    """Model, data and features of one run, made from its recipe.

    All that depends on the kind of training is in here; the Trainer knows nothing else of it.

    Attributes:
        model: the model with its alignment heads. Its forward takes what `collate` returns.
        processor: the model's processor.
        train: the training items; `collate` makes batches of them.
        val: the validation items, on which the model is evaluated while it trains.
        record: entries of training.json about model, data and VFMs.
        choice: the attention heads that are aligned, where single ones are.
        unit: what the items are called in messages, in the plural.
    """

    unit: ClassVar[str]

    @classmethod
    def from_recipe(cls, recipe: Recipe, checkpoint: Path | None = None) -> Setup:
        """Load data, model and features.

        The model's initial weights depend on the seed alone, never on the alignment.

        Args:
            checkpoint: the checkpoint from which the run is resumed, if it is.
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

    @property
    def choice(self) -> HeadChoice | None: ...

    def collate(self, items: list[Any], /) -> dict[str, Any]:
        """Return a batch of `items`, on the CPU."""
        ...

    def sampler(self, processes: int) -> Sampler[int]:
        """Return the order of the training items over the whole training, one optimizer step after another.

        Args:
            processes: number of ranks, which decides how many items an optimizer step has.
        """
        ...

    def warnings(self, processes: int) -> list[str]:
        """Return the warnings that are known before the first step, one sentence each."""
        ...

    def count_aligned(self, batch: dict[str, Any]) -> Tensor:
        """Return over how many items the alignment loss of `batch` is a mean.

        The items are visual tokens or, for the objective `relation`, images and tiles.
        """
        ...

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the groups of trained parameters for AdamW, with the learning rate and weight decay of each."""
        ...

    def evaluate(self, *, final: bool = False) -> Evaluation:
        """Evaluate the model on the validation split; on the test split if `final` is set and the run has one."""
        ...

    def monitor_batches(self) -> MonitorBatches:
        """Return the first images of the validation split, on which CKNNA is measured during training.

        Raises:
            WorkbenchError: CKNNA cannot be measured on them.
        """
        ...

    def check_frozen(self, state: Mapping[str, Tensor]) -> None:
        """Check that the frozen parts of the model and the VFMs still hold their original values.

        Args:
            state: all tensors of the transformers model, gathered if the model is sharded.

        Raises:
            WeightsError: a frozen parameter or a VFM has changed.
        """
        ...

    def write_extras(self, checkpoint: Path) -> None:
        """Write what resuming from `checkpoint` needs besides model, optimizer and the record of its sources."""
        ...
