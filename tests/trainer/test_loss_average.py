"""What the language-model loss is a mean over: with answers of different lengths, the two ways differ as they must."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.students import VIRAL, world
from tests.trainer.test_student import recipe_of, trainer_of
from trainer.setups.conversation import ConversationSetup

PARTS = [[0], [1, 2, 4], [5]]  # 0 has two answers, the others have one


@pytest.mark.slow
@pytest.mark.parametrize("average", ["batch", "microbatch"])
def test_the_loss_of_a_step_is_the_mean_that_the_recipe_names(average: str, tmp_path: Path) -> None:
    """Against the loss of each answer token, from transformers' logits, and the gradient of its mean by hand."""
    recipe = recipe_of([*world(tmp_path)[1], *VIRAL, "--optim.loss_average", average], objective="none")
    setup = ConversationSetup.from_recipe(recipe)
    trainer, model = trainer_of(setup, recipe, tmp_path / "out"), setup.model.train()
    collated = [setup.collate(part) for part in PARTS]
    tokens = []  # of each micro-batch, the loss of each answer token
    for batch in collated:
        inputs = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask", "pixel_values")}
        logits = setup.mllm.model(**inputs).logits[:, :-1].double()
        labels = batch["labels"][:, 1:]
        losses = torch.nn.functional.cross_entropy(logits.mT, labels, reduction="none", ignore_index=-100)
        tokens.append(losses[labels != -100])
    counts = [len(part) for part in tokens]
    assert len(set(counts)) > 1
    by_token, by_batch = torch.cat(tokens).mean(), torch.stack([part.mean() for part in tokens]).mean()
    # sum_b (1 / B - n_b / n) m_b: exactly what the weights of the micro-batches differ by
    shift = sum((1 / 3 - n / sum(counts)) * part.mean() for n, part in zip(counts, tokens, strict=True))
    torch.testing.assert_close(by_batch - by_token, shift)
    assert abs(shift.item()) > 1e-3
    expected = by_token if average == "batch" else by_batch
    expected.backward()
    parameters = [p for p in model.parameters() if p.requires_grad]
    wanted = [p.grad.clone() for p in parameters if p.grad is not None]
    model.zero_grad()
    batches, items = trainer.get_batch_samples(iter(collated), len(PARTS), torch.device("cpu"))
    for batch in batches:
        trainer.compute_loss(model, batch, num_items_in_batch=items).backward()
    assert trainer._loss_sums["lm_loss"].item() == pytest.approx(expected.item(), abs=1e-5)
    found = [p.grad for p in parameters if p.grad is not None]
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)


@pytest.mark.slow
def test_a_forward_pass_without_an_answer_does_not_count(tmp_path: Path) -> None:
    """max_length can cut off every answer of one."""
    recipe = recipe_of([*world(tmp_path)[1], *VIRAL, "--optim.loss_average", "microbatch"], objective="none")
    setup = ConversationSetup.from_recipe(recipe)
    trainer = trainer_of(setup, recipe, tmp_path / "out")
    collated = [setup.collate([n]) for n in (1, 2, 4)]
    collated[1]["labels"][:] = -100
    collated[1]["answers"] = collated[1]["answers"][:0]
    batches, items = trainer.get_batch_samples(iter(collated), 3, torch.device("cpu"))
    losses = [trainer.compute_loss(setup.model.train(), batch, num_items_in_batch=items).item() for batch in batches]
    alone = [setup.model(**batch).lm_loss.item() for batch in batches]
    assert losses == pytest.approx([alone[0] / 2, 0, alone[2] / 2], abs=1e-6)
