"""Batches prepared in a thread are those of an iterator, in its order, and a training with them is the same."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.right_training import recipes
from trainer.loop import build_trainer
from trainer.prefetch import Prefetched
from trainer.recipe import Recipe
from trainer.setups.conversation import ConversationSetup
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
