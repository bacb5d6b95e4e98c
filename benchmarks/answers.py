"""Time of asking a benchmark's questions, compared with a plain loop over rows in the same run, at equal answers.

python -m benchmarks.answers --model runs/baseline runs/viral --rows 1000

The plain loop does what a user would write with transformers alone: processor, `model.generate` and decoding for each
row, and one forward pass for each option. It is timed on every tenth row.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from workbench.benchmarks.asking import PromptOptions, ask
from workbench.cli import command, parse
from workbench.data import Sample, load_data
from workbench.mllm import MLLM
from workbench.scoring.quiz import Quiz

NEW_TOKENS = 16


@dataclass(frozen=True)
class Options:
    """What is asked."""

    model: tuple[str, ...] = ()
    """Folders or hub ids of models."""
    data: str = "shapes:val"
    """Data set with options."""
    rows: int = 1000
    """Number of questions."""
    batch_size: int = 32
    """Images, and sequences, in one forward pass."""


def plain_answers(mllm: MLLM, samples: Sequence[Sample]) -> list[str]:
    """Generate one answer after another, as with transformers alone."""
    answers = []
    for sample in samples:
        inputs = mllm.processor(images=sample.image, text=mllm.prompt(sample.question), return_tensors="pt")
        with torch.inference_mode():
            ids = mllm.model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        answers.append(mllm.processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return answers


def plain_choices(mllm: MLLM, samples: Sequence[Sample]) -> list[str]:
    """Choose the likeliest option of each question, with one forward pass for each option."""
    choices = []
    for sample in samples:
        scores = []
        for option in sample.options:
            text = mllm.prompt(sample.question)
            inputs = mllm.processor(images=sample.image, text=text, return_tensors="pt")
            tokens = torch.tensor([mllm.answer_ids(option)])
            inputs["input_ids"] = torch.cat([inputs["input_ids"], tokens], dim=1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            with torch.inference_mode():
                logits = mllm.model(**inputs).logits[0, -tokens.shape[1] - 1 : -1].log_softmax(-1)
            scores.append(float(logits.gather(1, tokens.T).sum()))
        choices.append(sample.options[scores.index(max(scores))])
    return choices


def ours(ask_quiz: Callable[[Quiz], list[str]], mllm: MLLM, scenes: Sequence[list[Sample]], size: int) -> list[str]:
    """Ask all questions in batches of images."""
    answers = []
    for start in range(0, len(scenes), size):
        answers += ask_quiz(Quiz(mllm, scenes[start : start + size], size))
    return answers


def _generated(quiz: Quiz) -> list[str]:
    return quiz.answers(max_new_tokens=NEW_TOKENS)


def _chosen(quiz: Quiz) -> list[str]:
    numbers = quiz.likelihoods().argmax(1).tolist()
    return [sample.options[number] for sample, number in zip(quiz.samples, numbers, strict=True)]


def _seconds(run: Callable[[], list[str]]) -> tuple[float, list[str]]:
    began = time.perf_counter()
    answers = run()
    return time.perf_counter() - began, answers


def main(argv: Sequence[str]) -> None:
    """Print milliseconds for each row, the ratio to the plain loop, and how many answers are equal."""
    options = parse(Options, argv, prog="python -m benchmarks.answers", description=str(__doc__))
    print("model | decoding | rows | ms a row, plain | ms a row | ratio | equal answers")
    for name in options.model:
        mllm = MLLM.load(name, device="cpu")
        scenes, count = [], 0
        for scene in ask(PromptOptions(), mllm, load_data(options.data)).worded:
            if count < options.rows:
                scenes.append(scene[: options.rows - count])
                count += len(scenes[-1])
        samples = [sample for scene in scenes for sample in scene]
        few = samples[::10]
        for decoding, plain, fast in (
            ("greedy", plain_answers, _generated),
            ("likelihood", plain_choices, _chosen),
        ):
            plain_time, reference = _seconds(partial(plain, mllm, few))
            fast_time, answers = _seconds(partial(ours, fast, mllm, scenes, options.batch_size))
            by_row, fast_row = 1000 * plain_time / len(few), 1000 * fast_time / len(samples)
            equal = sum(a == b for a, b in zip(reference, answers[::10], strict=True))
            columns = (
                mllm.name,
                decoding,
                len(samples),
                f"{by_row:.1f}",
                f"{fast_row:.1f}",
                f"{by_row / fast_row:.1f}",
            )
            print(*columns, f"{equal} of {len(few)}", sep=" | ")


if __name__ == "__main__":
    command(main)
