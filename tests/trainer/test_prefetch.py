"""Batches prepared in a thread are those of an iterator, in its order, and a training with them is the same."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.right_training import recipes
from tests.trainer.small import TINY
from trainer.build.toy_llava import connector_inputs
from trainer.loop import build_trainer
from trainer.prefetch import Prefetched
from trainer.recipe import Recipe
from trainer.setups.conversation import ConversationSetup
from trainer.setups.packed import PackedSetup
from workbench.errors import DataError
from workbench.hashing import fingerprint


@pytest.mark.parametrize("ahead", [1, 3])
def test_items_come_in_order_and_ahead_of_their_use(ahead: int) -> None:
    prepared: list[tuple[int, bool]] = []

    def numbers() -> Iterator[int]:
        for number in range(6):
            prepared.append((number, threading.current_thread() is threading.main_thread()))
            yield number

    items = Prefetched(numbers(), ahead)
    assert next(items) == 0
    items.wait()
    assert prepared == [(number, number == 0) for number in range(1 + ahead)]
    assert list(items) == [1, 2, 3, 4, 5]
    with pytest.raises(StopIteration):
        next(items)


def test_an_error_comes_with_its_item() -> None:
    def broken() -> Iterator[int]:
        yield 0
        yield 1
        raise DataError("row 2 is broken")

    items = Prefetched(broken(), 2)
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(DataError, match=r"^row 2 is broken$"):
        next(items)


def weights(recipe: Recipe, folder: Path, *, prefetching: bool) -> tuple[str, list[dict[str, Any]]]:
    """Train and return the fingerprint of the trained weights, and the log without times."""
    recipe = replace(recipe, output_dir=folder, eval_every=2)
    folder.mkdir()
    trainer = build_trainer(recipe, ConversationSetup.from_recipe(recipe))
    trainer.prefetching = prefetching
    trainer.run()
    moved = {name: value.detach() for name, value in trainer.setup.model.named_parameters() if value.requires_grad}
    return fingerprint(moved), [{**row, "seconds": 0} for row in trainer.state.log_history]


@pytest.mark.slow
def test_a_training_with_prefetched_batches_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, with accumulation, dropout, the VFM at every step, and evaluations and checkpoints in between."""
    monkeypatch.setenv("VIRAL_CACHE", str(tmp_path / "cache"))
    made = recipes(tmp_path)
    computed = made["VIRAL, VFM at every step"]
    lora = replace(computed, model=made["VIRAL, LoRA, bfloat16"].model)
    for number, recipe in enumerate((computed, lora)):
        plain = weights(recipe, tmp_path / f"plain-{number}", prefetching=False)
        assert plain == weights(recipe, tmp_path / f"prefetched-{number}", prefetching=True)


def test_features_of_the_next_batch_do_not_meet_the_projector_that_trains() -> None:
    """A training step runs the projector while a thread computes the next batch's features with the same model."""
    ready = PackedSetup.from_recipe(TINY)
    llava = ready.model.base
    projector, images = llava.model.multi_modal_projector, [scene[0].image for scene in ready.train.data.scenes[:3]]
    undisturbed = connector_inputs(llava, ready.processor, images)
    trained = torch.zeros_like(undisturbed)
    callers: list[threading.Thread] = []

    def train_meanwhile(*_: object) -> None:
        step = threading.Thread(target=lambda: projector(trained))
        step.start()
        step.join()

    handles = [
        projector.register_forward_hook(lambda *_: callers.append(threading.current_thread())),
        llava.model.vision_tower.register_forward_hook(train_meanwhile),
    ]
    features = connector_inputs(llava, ready.processor, images)
    for handle in handles:
        handle.remove()
    assert torch.equal(features, undisturbed)
    # a residual, for one, takes its features from the latest pass through the projector
    assert len(callers) == 1
    assert callers[0] is not threading.current_thread()
