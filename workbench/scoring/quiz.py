"""Questions with options put to a model, as it is and with its visual tokens changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import LogitsProcessor

from workbench.capture.edit import Site, check_site, edit, editing
from workbench.capture.hidden_states import check_layers
from workbench.capture.knockout import knockout
from workbench.data.base import Sample
from workbench.mllm.base import MLLM
from workbench.mllm.family import Batch
from workbench.mllm.logits import logits_at_end, positions_to_keep
from workbench.scoring.options import Options
from workbench.scoring.prefixes import Change as Change
from workbench.scoring.prefixes import Memory, Prefixes, can_share
from workbench.scoring.questions import Scene, encoder_features


class Quiz:
    """Images with their questions, encoded once and asked again under each intervention.

    An option is scored by the log-probability of all its tokens (`scoring.options`). Where the family allows it
    (`Family.shares_prefix`), an image and the text before it go through the language model once for all questions about
    the image, and each question and each option continues from there. This is the same computation in another order,
    not an approximation; `tests/analyses/test_permutation.py` compares both.

    Args:
        mllm: the model.
        scenes: questions by image.
        batch_size: sequences in one forward pass.
        features: what the projector receives for each image, if it is already known.
        first: number of the first image; a `Change` receives image numbers that start here.
        images: False asks the questions without any image.

    Attributes:
        samples: all questions.
        image_numbers: (question,), which of these images each question is about, from 0.
    """

    def __init__(
        self,
        mllm: MLLM,
        scenes: Sequence[Scene],
        batch_size: int,
        *,
        features: Sequence[Tensor] | None = None,
        first: int = 0,
        images: bool = True,
    ) -> None:
        self.mllm, self.batch_size, self.first = mllm, batch_size, first
        self.samples = [sample for scene in scenes for sample in scene]
        self.image_numbers = torch.tensor([number for number, scene in enumerate(scenes) for _ in scene])
        self._images = images
        self._prompts = [self._encoded(chunk) for chunk in _chunks(self.samples, batch_size)]
        shared = self._shared_prefixes(scenes, features) if images and can_share(mllm) else None
        self._prefixes: Prefixes | None = shared[0] if shared else None
        self._tails = shared[1] if shared else []

    def logprobs(self, at: Site | None = None, change: Change | None = None) -> Float[Tensor, "question option"]:
        """Return the log-probability of each option among the options of its question.

        It is -inf where a question has fewer options.

        Args:
            at: the site of the intervention: "encoder", "projector" or a layer number.
            change: what is done to the visual tokens there.

        Raises:
            ConfigError, ModelError: see `capture.edit`.
        """
        return self.likelihoods(at, change).log_softmax(-1)

    def likelihoods(self, at: Site | None = None, change: Change | None = None) -> Float[Tensor, "question option"]:
        """Return the log-probability of each option, the sum over its tokens; otherwise as `logprobs`."""
        if at is not None:
            check_site(self.mllm, at)
        return self._summed(self._logits(at, change))

    def knocked_out(self, blocks: Sequence[int]) -> Float[Tensor, "question option"]:
        """Return `logprobs` when no text token attends to the visual tokens in `blocks` (1 to L).

        See `capture.knockout`.
        """
        blocks = check_layers(self.mllm, blocks, first=1)
        return self._summed(self._logits(None, None, blocks)).log_softmax(-1)

    def answers(
        self,
        at: Site | None = None,
        change: Change | None = None,
        *,
        max_new_tokens: int = 16,
        sampler: Callable[[Sequence[Sample]], LogitsProcessor] | None = None,
    ) -> list[str]:
        """Return the answers that the model generates, greedy unless a `sampler` draws them.

        Args:
            at, change: the intervention, as in `logprobs`; it acts on the prompt.
            max_new_tokens: tokens at which an answer is cut.
            sampler: makes what draws the tokens of some questions (`scoring.sampling`).

        Raises:
            ConfigError, ModelError: see `capture.edit`.
        """
        if at is not None:
            check_site(self.mllm, at)
        answers: list[str] = []
        chunks = _chunks(self.samples, self.batch_size)
        with self.mllm.lock, torch.inference_mode():
            memory = self._prefixes and self._prefixes.memory(at, change)
            for number, chunk in enumerate(chunks):
                draw, start = sampler and sampler(chunk), number * self.batch_size
                images = self.image_numbers[start : start + len(chunk)]
                if self._prefixes is not None:
                    tails = self._tails[start : start + len(chunk)]
                    answers += self._prefixes.generate(memory or [], images, tails, max_new_tokens, draw)
                    continue
                batch = self._prompts[number]
                if at is None or change is None:
                    answers += self.mllm.generate(batch, max_new_tokens=max_new_tokens, sampler=draw)
                else:
                    with editing(self.mllm, batch, at=at, fn=self._of_batch(change, images)):
                        answers += self.mllm.generate(batch, max_new_tokens=max_new_tokens, sampler=draw)
        return answers

    def scored(self, before: Float[Tensor, "question option"], after: Float[Tensor, "question option"]) -> pd.DataFrame:
        """Return one row per question: id, image_id, category, chance, correct_before, correct_after, kl (nats).

        Args:
            before: log-probabilities of the options without the intervention.
            after: those with it.
        """
        answers = torch.tensor([sample.options.index(sample.answer) for sample in self.samples])
        names = {
            "id": [s.id for s in self.samples],
            "image_id": [s.image_id for s in self.samples],
            "category": [s.category for s in self.samples],
            "chance": [s.chance for s in self.samples],
        }
        correct = {
            "correct_before": (before.argmax(1) == answers).numpy(),
            "correct_after": (after.argmax(1) == answers).numpy(),
        }
        return pd.DataFrame(names | correct | {"kl": kl_divergence(before, after).numpy()})

    @cached_property
    def options(self) -> Options:
        """The tokens of the options.

        Raises:
            DataError: two options of a question have the same tokens.
        """
        return Options(self.mllm, self.samples)

    def _encoded(self, samples: Sequence[Sample]) -> Batch:
        images = [[sample.image] if self._images else [] for sample in samples]
        return self.mllm.encode(images, [sample.question for sample in samples])

    # --- logits of all continuations --------------------------------------------------------------

    def _summed(self, logits: Iterator[tuple[int, Float[Tensor, "row keep vocab"]]]) -> Tensor:
        """Return the log-probability of every option from the logits of all continuations."""
        sums = self.options.empty()
        for first, batch in logits:
            self.options.add(sums, first, batch)
        return sums

    def _logits(
        self, at: Site | None, change: Change | None, blocks: Sequence[int] = ()
    ) -> Iterator[tuple[int, Float[Tensor, "row keep vocab"]]]:
        """Yield the number of the first continuation of each batch and the logits at its last positions.

        Args:
            at: the site of the intervention.
            change: what is done to the visual tokens there.
            blocks: blocks in which the text after the image does not attend to the visual tokens.
        """
        if self._prefixes is not None:
            return self._from_prefixes(self._prefixes, at, change, blocks)
        return self._from_whole_prompts(at, change, blocks)

    def _from_prefixes(
        self, prefixes: Prefixes, at: Site | None, change: Change | None, blocks: Sequence[int] = ()
    ) -> Iterator[tuple[int, Float[Tensor, "row keep vocab"]]]:
        """Continue each prompt and option from the prefix of its image."""
        with self.mllm.lock, torch.inference_mode():
            memory: Memory = prefixes.memory(at, change)
            for number, chunk in enumerate(_chunks(self.options.continuations, self.batch_size)):
                tails = [torch.cat([self._tails[c.question], torch.tensor(c.tokens, dtype=torch.long)]) for c in chunk]
                images = self.image_numbers[[c.question for c in chunk]]
                keep = 1 + max(len(c.tokens) for c in chunk)
                logits = prefixes.logits(memory, images, tails, keep=keep, blocks=blocks)
                yield number * self.batch_size, logits

    def _from_whole_prompts(
        self, at: Site | None, change: Change | None, blocks: Sequence[int] = ()
    ) -> Iterator[tuple[int, Float[Tensor, "row keep vocab"]]]:
        """Run each prompt and option through the model as a whole; works for any family."""
        for number, (batch, keep, images) in enumerate(self._whole):
            if blocks:
                logits = knockout(self.mllm, batch, blocks=blocks, keep=keep)
            elif at is not None and change is not None:
                logits = edit(self.mllm, batch, at=at, fn=self._of_batch(change, images), keep=keep)
            else:
                with self.mllm.lock, torch.inference_mode():
                    output = self.mllm.model(
                        **batch.inputs, use_cache=False, logits_to_keep=positions_to_keep(batch, keep)
                    )
                    logits = logits_at_end(output.logits, batch, keep).cpu()
            yield number * self.batch_size, logits

    @cached_property
    def _whole(self) -> list[tuple[Batch, int, Tensor]]:
        """For each batch of continuations: prompts with the beginning of an option, positions to keep, images."""
        batches = []
        questions = [continuation.question for continuation in self.options.continuations]
        alone = questions == list(range(len(self.samples)))  # one for each question, so the batches are the same
        for number, chunk in enumerate(_chunks(self.options.continuations, self.batch_size)):
            samples = [self.samples[continuation.question] for continuation in chunk]
            prompts = self._prompts[number] if alone else self._encoded(samples)
            batch = self.mllm.continued(prompts, [continuation.tokens for continuation in chunk])
            keep = 1 + max(len(continuation.tokens) for continuation in chunk)
            batches.append((batch, keep, self.image_numbers[[continuation.question for continuation in chunk]]))
        return batches

    def _of_batch(self, change: Change, images: Tensor) -> Change:
        """Return `change` for `capture.edit`, which passes the number of a sample within its batch."""
        return partial(_change_sample, change=change, images=[self.first + int(number) for number in images])

    def _shared_prefixes(
        self, scenes: Sequence[Scene], features: Sequence[Tensor] | None
    ) -> tuple[Prefixes, list[Tensor]] | None:
        """Return what the prompts about an image have in common, up to the last visual token, and what follows it.

        Returns:
            None where the prompts about an image differ there, or the visual tokens of the images are not all at the
            same positions.
        """
        prompts, positions = [], []
        for batch in self._prompts:
            for row, parts in enumerate(self.mllm.visual_tokens(batch)):
                real = batch.inputs["attention_mask"][row].nonzero().flatten()
                pad = int(real[0])
                prompts.append(batch.inputs["input_ids"][row, real].cpu())
                positions.append(torch.cat([part.index for part in parts]).cpu() - pad)
        visual = positions[0]
        cut = int(visual.max()) + 1
        starts = [prompts[int((self.image_numbers == number).nonzero()[0])][:cut] for number in range(len(scenes))]
        if not all(torch.equal(index, visual) for index in positions):
            return None
        numbers = self.image_numbers.tolist()
        if any(not torch.equal(prompt[:cut], starts[n]) for prompt, n in zip(prompts, numbers, strict=True)):
            return None
        if features is None:
            features = encoder_features(self.mllm, scenes, self.batch_size)
        prefixes = Prefixes(self.mllm, torch.stack(list(features)), torch.stack(starts), visual, self.first)
        return prefixes, [prompt[cut:] for prompt in prompts]


def _chunks(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _change_sample(
    values: Float[Tensor, "token d"], sample: int, *, change: Change, images: list[int]
) -> Float[Tensor, "token d"]:
    return change(values, images[sample])


def kl_divergence(
    before: Float[Tensor, "question option"], after: Float[Tensor, "question option"]
) -> Float[Tensor, " question"]:
    """Return KL(before || after) in nats of log-probabilities that are -inf at the same places; 0 where equal."""
    terms = before.exp() * (before - after)
    return terms.masked_fill(before == -torch.inf, 0).sum(-1).clamp(min=0)
