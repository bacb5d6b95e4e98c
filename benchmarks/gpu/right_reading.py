"""Compare readings and interventions on the device, in float32 and bfloat16, with those on the CPU in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import models
from benchmarks.gpu.harness import Bench
from workbench.capture.attention import attention, gradient_attention, rollout
from workbench.capture.edit import edit
from workbench.capture.hidden_states import read
from workbench.capture.knockout import knockout
from workbench.lens import lens_of
from workbench.mllm import MLLM, Batch
from workbench.scoring.quiz import Quiz

TOLERANCES = {"float32": 1e-4, "bfloat16": 0.06}  # relative
QUESTIONS = ("what is this ?", "what color is the cat left of the dog ?", "is this a cat ?")
OPTIONS = (("red", "blue"), ("red cat", "blue"), ("yes", "no"))


def encoded(mllm: MLLM) -> Batch:
    """Encode three prompts of unequal length, with one, two and one image."""
    images = [[models.image(0)], [models.image(1), models.image(2)], [models.image(3)]]
    return mllm.encode(images, QUESTIONS)


def mixed(mllm: MLLM) -> Batch:
    """Encode a prompt with an image and one without."""
    return mllm.encode([[models.image(0)], []], QUESTIONS[:2])


def roll(values: Tensor, _: int) -> Tensor:
    """An edit that moves the tokens to other places and halves them."""
    return values.roll(3, 0) * 0.5


def edited_at(site: Any) -> Callable[[MLLM], Tensor]:
    """Return a function that computes the logits after an edit at one site."""
    return lambda mllm: edit(mllm, encoded(mllm), at=site, fn=roll)


def one_prompt(mllm: MLLM) -> Batch:
    """Encode a single prompt, which needs no mask, so that other kernels run."""
    return mllm.encode([models.image(0)], QUESTIONS[:1])


def _quiz(mllm: MLLM, change: bool) -> Tensor:
    quiz = Quiz(mllm, models.questions(6, side=64), 4)
    return quiz.logprobs(2, roll) if change else quiz.logprobs()


READINGS: dict[str, Callable[[MLLM], Tensor | Sequence[Tensor]]] = {
    "hidden states of all layers": lambda m: [sample.values for sample in read(m, encoded(m))],
    "hidden states, all tokens, with a text alone": lambda m: [
        sample.values for sample in read(m, mixed(m), tokens="all")
    ],
    "the vision encoder's features": lambda m: [
        sample.encoder_features for sample in read(m, encoded(m), layers=[0], encoder=True)
    ],
    "attention rows": lambda m: list(attention(m, encoded(m), rows=[[-1, -5]] * 3)),
    "attention rows of one prompt": lambda m: list(attention(m, one_prompt(m), rows=[[-1, 4, 9]])),
    "gradient times attention": lambda m: list(gradient_attention(m, encoded(m), rows=[-1] * 3)),
    "attention rollout": lambda m: rollout(m, encoded(m), rows=[-1] * 3, chunk=7),
    "edit at the vision encoder": edited_at("encoder"),
    "edit at the projector": edited_at("projector"),
    "edit at layer 2": edited_at(2),
    "knockout of blocks 2 and 3": lambda m: knockout(m, encoded(m), blocks=[2, 3]),
    "knockout in one prompt": lambda m: knockout(m, one_prompt(m), blocks=[1, 2]),
    "whole-option scores": lambda m: Quiz(m, models.questions(6, side=64, options=OPTIONS), 4).likelihoods(),
    "answers to questions": lambda m: _quiz(m, False),
    "answers to questions, edited at layer 2": lambda m: _quiz(m, True),
    "knockout in questions": lambda m: Quiz(m, models.questions(6, side=64), 4).knocked_out([2]),
    "logit lens": lambda m: lens_of(m, one_prompt(m))(read(m, one_prompt(m), layers=[2])[0].values).cpu(),
}
SPLIT = (  # readings that are repeated with the model split between GPU and CPU
    "hidden states of all layers",
    "attention rows",
    "knockout of blocks 2 and 3",
    "whole-option scores",
    "answers to questions, edited at layer 2",
)


def run(bench: Bench) -> None:
    """Compare every reading, and greedy answers."""
    small = models.tiny_llava()
    reference = at(small, "cpu", torch.float64)
    compared = {"float32": at(small, bench.device, torch.float32), "bfloat16": at(small, bench.device, torch.bfloat16)}
    for what, reading in READINGS.items():
        with bench.guard(what):
            wanted = reading(reference)
            for setting, mllm in compared.items():
                with bench.guard(what, setting=setting):
                    bench.error(what, relative(reading(mllm), wanted), TOLERANCES[setting], setting=setting)
    with bench.guard("greedy answers, float32"):
        expected, answers = (
            mllm.generate(encoded(mllm), max_new_tokens=8) for mllm in (reference, compared["float32"])
        )
        bench.add("greedy answers", {"equal": answers == expected}, setting="float32", passed=answers == expected)
    if bench.device == "cuda":
        with bench.guard("device_map"):
            _split_model(bench, small, reference)


def at(mllm: MLLM, device: str, dtype: torch.dtype) -> MLLM:
    """Return a copy of a model on another device, with another dtype."""
    return MLLM(copy.deepcopy(mllm.model).to(device, dtype), mllm.processor, mllm.family, mllm.name)


def _split_model(bench: Bench, small: MLLM, reference: MLLM) -> None:
    """Compare some readings with all blocks after the second on the CPU, as `device_map` places what does not fit."""
    from accelerate import dispatch_model

    mllm = MLLM(copy.deepcopy(small.model), small.processor, small.family, "divided")
    names = {f"model.language_model.layers.{n}": "cpu" if n > 1 else 0 for n in range(mllm.n_layers)}
    names |= {f"model.language_model.{part}": 0 for part in ("embed_tokens", "norm", "rotary_emb")}
    mllm.model = dispatch_model(
        mllm.model, names | {"model.vision_tower": 0, "model.multi_modal_projector": 0, "lm_head": 0}, main_device=0
    )
    for what in SPLIT:
        with bench.guard(what, setting="device_map"):
            error = relative(READINGS[what](mllm), READINGS[what](reference))
            bench.error(what, error, TOLERANCES["float32"], setting="device_map")


def relative(values: Any, wanted: Any) -> float:
    """Return the largest ||values - wanted|| / ||wanted|| over pairs of tensors.

    NaN if shapes or the places of infinite values differ.
    """
    pairs = [(values, wanted)] if isinstance(values, Tensor) else list(zip(values, wanted, strict=True))
    errors = []
    for value, expected in pairs:
        if value.shape != expected.shape:
            return float("nan")
        value, expected = value.detach().cpu().double(), expected.detach().cpu().double()
        infinite = torch.isinf(expected)
        if not torch.equal(infinite, torch.isinf(value)):
            return float("nan")
        value, expected = value.masked_fill(infinite, 0), expected.masked_fill(infinite, 0)
        errors.append(float((value - expected).norm() / expected.norm().clamp_min(1e-30)))
    return max(errors, key=lambda error: float("inf") if error != error else error)
