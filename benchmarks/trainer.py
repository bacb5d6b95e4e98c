"""Time of a training step: baseline, VIRAL with cached or computed features, and padded rows, in one run.

python -m benchmarks.trainer            # the toy LLaVA of the recipes, about 4 minutes on 2 cores
python -m benchmarks.trainer --small    # a small model, to check that it works
python -m benchmarks.trainer --smol     # SmolLM2-135M as in scarce_smol_baseline.yaml but in float32, about 3 minutes

With `--smol`, the baseline is compared with one that predicts at every position of its large vocabulary, and drops all
predictions but those of the answers.

A step consists of fetching the batch, forward, backward, clipping and optimizer, through `AlignmentTrainer`. In every
round each variant takes one step, in rotating order, so that a busy moment affects all of them. A ratio compares two
steps of the same round; its interval is that of the median over rounds (95 %, bootstrap). CPU time is printed next to
wall time, because other programs on the machine disturb it less.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import bootstrap
from torch import Tensor, nn
from transformers import TrainingArguments

from trainer.aligned_model import AlignedForConditionalGeneration, AlignedOutput
from trainer.alignment_config import AlignmentConfig
from trainer.loop import AlignmentTrainer
from trainer.model_config import ModelConfig
from trainer.objectives import cosine_loss
from trainer.recipe import DataConfig, OptimConfig, Recipe
from trainer.setups.packed import PackedSetup
from trainer.setups.packing import Packing
from workbench.cli import parse
from workbench.mllm.conversation import IGNORED
from workbench.package_files import RECIPES

WARM_UP = 3  # rounds
BASELINE = "baseline"
CACHED = "VIRAL, VFM from the cache"
COMPUTED = "VIRAL, VFM at every step"
EVERY = "VIRAL from the cache, head on all positions"
PADDED = "baseline, padded rows under a mask"
EVERYWHERE = "baseline, predictions at all positions"
HEAD, HEAD_EVERY = "head and its loss, visual positions", "head and its loss, all positions"

Times = np.ndarray  # wall seconds, CPU seconds of this process


def clocks() -> Times:
    """Return the present value of both clocks."""
    return np.array([time.perf_counter(), time.process_time()])


class EveryPosition(nn.Module):
    """An alignment head that runs on all positions of layer l, of which the visual ones are selected afterwards."""

    def __init__(self, head: nn.Module, model: Any, layer: int) -> None:
        super().__init__()
        self.head, self.hidden, self.visual = head, torch.empty(0), torch.empty(0)
        model.register_forward_pre_hook(self._see_tokens, with_kwargs=True)
        model.base.model.language_model.layers[layer - 1].register_forward_hook(
            lambda _, __, output: setattr(self, "hidden", output)
        )

    def _see_tokens(self, model: Any, _: object, inputs: dict[str, Tensor]) -> None:
        self.visual = Packing.of(inputs["segments"]).flat(inputs["input_ids"]) == model.config.image_token_id

    def forward(self, visual: Tensor) -> Tensor:
        return self.head(self.hidden)[self.visual]


class Padded(AlignedForConditionalGeneration):
    """The plain reference for packing: rows are padded to the longest of the batch, under a mask (b, 1, s, s)."""

    def __init__(self, model: AlignedForConditionalGeneration) -> None:
        super().__init__(model.base)
        self.base.set_attn_implementation({"text_config": "sdpa"})

    def forward(
        self, input_ids, labels, position_ids, segments, connector_inputs, num_items_in_batch=None, **_
    ) -> AlignedOutput:
        """Return the language-model loss alone, with questions separated by the mask."""
        query, key = segments[:, :, None], segments[:, None]
        earlier, itself = (torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool) for _ in range(2))
        seen = (earlier.tril() & ((key == 0) | (key == query)) & (query >= 0)) | (itself.tril() & itself.triu())
        projected = self.base.model.multi_modal_projector(connector_inputs)
        embedded = self.base.get_input_embeddings()(input_ids)
        embedded[input_ids == self.base.config.image_token_id] = projected.flatten(0, 1)
        inputs = {"inputs_embeds": embedded, "attention_mask": seen[:, None], "position_ids": position_ids}
        logits = self.base(**inputs, use_cache=False).logits
        answers = labels != IGNORED
        losses = nn.functional.cross_entropy(logits[answers].float(), labels[answers], reduction="sum")
        return AlignedOutput(losses / num_items_in_batch, None, logits)


def predict_everywhere(base: nn.Module) -> None:
    """Make the model compute its predictions at every position before it returns those that are asked for."""
    forward = base.forward

    def everywhere(*, logits_to_keep: Tensor, **inputs: Any) -> Any:
        output = forward(**inputs)
        output.logits = output.logits[:, logits_to_keep]
        return output

    base.forward = everywhere


class Variant:
    """A model in training that takes one step at a time."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        rounds: int,
        *,
        compute_vfm: bool = False,
        every_position: bool = False,
        padded: bool = False,
        everywhere: bool = False,
    ) -> None:
        self.recipe, self.setup = recipe, PackedSetup.from_recipe(recipe)
        if padded:
            self.setup = replace(self.setup, model=Padded(self.setup.model))
        model, train = self.setup.model, self.setup.train
        if compute_vfm:  # of the VFM only: the encoder's features, which a baseline needs too, stay cached
            train.targets = PackedSetup.from_recipe(
                replace(recipe, data=replace(recipe.data, features="compute"))
            ).train.targets
        if everywhere:
            predict_everywhere(model.base)
        if every_position:
            model.alignment.heads[0] = EveryPosition(model.alignment.heads[0], model, recipe.alignment.layer[0])
        optim = recipe.optim
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=rounds,
            per_device_train_batch_size=optim.batch_size,
            learning_rate=optim.learning_rate,
            max_grad_norm=optim.max_grad_norm,
            remove_unused_columns=False,
            label_names=["labels"],
            report_to=[],
            seed=recipe.seed,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        self.trainer = AlignmentTrainer(recipe=recipe, setup=self.setup, watched=(None, []), args=arguments)
        self.trainer.create_optimizer_and_scheduler(rounds)
        self.batches = self._batches()
        self.batch: dict[str, Any] = {}
        self.losses: list[Tensor] = []

    def _batches(self) -> Iterator[dict[str, Any]]:
        while True:
            yield from self.trainer.get_train_dataloader()

    def step(self) -> Times:
        """Take one training step and return its times."""
        start = clocks()
        (self.batch,), answers = self.trainer.get_batch_samples(self.batches, 1, self.trainer.args.device)
        model = self.setup.model
        self.trainer.current_gradient_accumulation_steps = 1
        self.losses.append(self.trainer.training_step(model, self.batch, answers))
        nn.utils.clip_grad_norm_(model.parameters(), self.recipe.optim.max_grad_norm)
        self.trainer.optimizer.step()
        self.trainer.lr_scheduler.step()
        model.zero_grad()
        return clocks() - start


def head_step(variant: Variant, every: bool) -> Times:
    """Time the head, its loss and their gradients alone, on hidden states with the shape of the last batch."""
    model, batch = variant.setup.model, variant.batch
    hidden = torch.randn(*batch["input_ids"].shape, model.config.text_config.hidden_size, requires_grad=True)
    head, visual, (target,) = (
        model.alignment.heads[0],
        batch["input_ids"] == model.config.image_token_id,
        batch["targets"].values(),
    )
    start = clocks()
    predicted = head(hidden)[visual] if every else head(hidden[visual])
    cosine_loss(predicted, target.flatten(0, 1)).backward()
    taken = clocks() - start
    model.zero_grad()
    return taken


def main(argv: list[str]) -> None:
    """Print the median time of each variant, and the median of its ratios with its interval."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.trainer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--small", action="store_true", help="a small model and 4 rounds")
    kinds.add_argument("--smol", action="store_true", help="SmolLM2-135M and 10 rounds")
    given = parser.parse_args(argv)
    if given.smol:
        compare_predictions()
    else:
        compare(small=given.small)


def compare_predictions() -> None:
    """Compare predictions at the answers with predictions at all positions, with a pretrained language model."""
    rounds = 10
    recipe = parse(
        Recipe,
        ["--data.limit_train", "60", "--data.limit_val", "1"],
        prog="trainer",
        recipe=RECIPES.find("scarce_smol_baseline"),
    )
    with tempfile.TemporaryDirectory() as folder:
        variants = {
            name: Variant(recipe, Path(folder), rounds + WARM_UP, everywhere=name == EVERYWHERE)
            for name in (BASELINE, EVERYWHERE)
        }
        times = take_turns(variants, rounds)
    report(variants, times, ((BASELINE, BASELINE), (EVERYWHERE, BASELINE)), EVERYWHERE)


def compare(*, small: bool) -> None:
    """Compare the variants of the toy LLaVA."""
    rounds = 4 if small else 150
    recipe = Recipe(
        model=ModelConfig(layers=2, width=32, ffn=64) if small else ModelConfig(),
        data=DataConfig(limit_train=8 if small else 256, limit_val=1),
        optim=OptimConfig(batch_size=4 if small else 8, learning_rate=5e-4),
        alignment=AlignmentConfig(objective="cosine", layer=(1,) if small else (3,)),
    )
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            BASELINE: {},
            CACHED: {},
            COMPUTED: {"compute_vfm": True},
            EVERY: {"every_position": True},
            PADDED: {"padded": True},
        }
        variants = {}
        for name, extra in settings.items():
            is_baseline = name in (BASELINE, PADDED)
            variant_recipe = replace(recipe, alignment=AlignmentConfig()) if is_baseline else recipe
            variants[name] = Variant(variant_recipe, Path(folder), rounds + WARM_UP, **extra)
        times = take_turns(variants, rounds, head=True)
    pairs = (
        (BASELINE, BASELINE),
        (PADDED, BASELINE),
        (CACHED, BASELINE),
        (COMPUTED, BASELINE),
        (EVERY, BASELINE),
        (EVERY, CACHED),
        (HEAD, HEAD),
        (HEAD_EVERY, HEAD),
    )
    report(variants, times, pairs, PADDED)


def take_turns(variants: Mapping[str, Variant], rounds: int, *, head: bool = False) -> dict[str, Times]:
    """Return the times (round, clock) of each variant and, if asked for, of the head alone."""
    names = list(variants)
    times: dict[str, list[Times]] = {name: [] for name in [*names, *((HEAD, HEAD_EVERY) if head else ())]}
    for turn in range(rounds + WARM_UP):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            times[name].append(variants[name].step())
        if head:
            for name in (HEAD, HEAD_EVERY) if turn % 2 else (HEAD_EVERY, HEAD):
                times[name].append(head_step(variants[CACHED], name == HEAD_EVERY))
    return {name: np.array(steps)[WARM_UP:] for name, steps in times.items()}


def report(
    variants: Mapping[str, Variant], seconds: Mapping[str, Times], pairs: Sequence[tuple[str, str]], same: str
) -> None:
    """Print the median times, their ratios, and how far the losses of the variant `same` are from the baseline's."""
    first = variants[BASELINE]
    print(
        f"batch {first.recipe.optim.batch_size}, {first.batch['input_ids'].shape[1]} positions of which"
        f" {first.setup.train.inputs.shape[1]} visual, float32, {torch.get_num_threads()} threads,"
        f" {len(seconds[BASELINE])} rounds; medians [95 %]"
    )
    losses = list(zip(first.losses, variants[same].losses, strict=True))
    largest = max(float((a - b).abs()) for a, b in losses)
    print(f"largest difference of a loss between {BASELINE} and {same}, over {len(losses)} steps: {largest:.1e}")
    for name, against in pairs:
        elapsed, cpu = np.median(seconds[name], axis=0) * 1000
        print(f"{name:43} {elapsed:8.1f} ms, CPU {cpu:8.1f} ms", end="" if name != against else "\n")
        if name != against:
            ratios = seconds[name] / seconds[against]
            low, high = bootstrap(
                (ratios,), np.median, n_resamples=2000, method="percentile", rng=0
            ).confidence_interval
            wall, cpu_only = (
                f"x{a:.3f} [{b:.3f}, {c:.3f}]" for a, b, c in zip(np.median(ratios, axis=0), low, high, strict=True)
            )
            print(f"  {wall}, CPU {cpu_only} of {against}")


if __name__ == "__main__":
    main(sys.argv[1:])
