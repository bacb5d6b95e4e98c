"""Time and peak memory of a training step with LoRA of rank 128 at the geometry of LLaVA-1.5-7B.

Compared are the baseline, VIRAL with cached features, and VIRAL with the VFM at every step. Steps are those of the
trainer's own loop, with loading, clipping, optimizer and schedule. The variants train the same model in turn, a few
steps at a time, so that a disturbance affects all of them. The time of a step is measured from the end of the previous
step to its own end, with the GPU synchronized.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from benchmarks.gpu import models
from benchmarks.gpu.harness import Bench
from trainer.aligned_model import AlignedMLLMForConditionalGeneration
from trainer.alignment import Alignment, attach_alignment
from trainer.alignment_config import AlignmentConfig
from trainer.build.lora import add_lora
from trainer.build.partition import checkpoint_activations
from trainer.dry_run.plan import Plan
from trainer.dry_run.sizes import sizes_of
from trainer.loop import AlignmentTrainer, build_trainer
from trainer.model_config import LoraConfig, ModelConfig
from trainer.recipe import MonitorConfig, OptimConfig, Recipe
from trainer.setups.conversation import ConversationSetup
from trainer.setups.conversation_data import Collator, ConversationSet
from trainer.targets.vfm_targets import Targets
from workbench.vfm import VFM

BASELINE, CACHED, COMPUTED = "baseline", "VIRAL, VFM cached", "VIRAL, VFM at every step"
GOAL = 1.03  # times the baseline's time
WITHIN = 0.1  # relative deviation of the peak memory from the dry run's estimate
ROUNDS, WARM_UP = 3, 2  # rounds over all variants (toy size: one); first steps of each turn that are not counted
WORDS = 120  # words of a conversation, in addition to its 576 visual tokens


class Remembered(Targets):
    """Targets from features in memory, in the form in which a feature store returns them."""

    def __init__(self, vfms: Sequence[VFM], features: Tensor) -> None:
        super().__init__(vfms)
        self._features = features

    def __call__(self, numbers: Sequence[int], images: Any, visual: Any) -> dict[str, list[list[Tensor]]]:
        return {name: [[self._features[number % len(self._features)]] for number in numbers] for name in self.dims}


class Model:
    """The model that all variants train, with its adapters, heads and data.

    Attributes:
        loading: median time between two steps of the last run, in ms.
    """

    def __init__(self, bench: Bench, dtype: torch.dtype) -> None:
        self.bench, self.toy, self.loading = bench, bench.toy, 0.0
        self.mllm = models.llava(bench.device, dtype, toy=bench.toy)
        self.mllm.model.requires_grad_(False)
        self.rank = 8 if bench.toy else 128
        add_lora(self.mllm.model, LoraConfig(rank=self.rank, alpha=2 * self.rank))
        self.mllm.projector.requires_grad_(True).float()
        for name, value in self.mllm.model.named_parameters():
            if "lora_" in name:
                value.data = value.data.float()
        self.trained = {
            name: "lora" if "lora_" in name else "connector"
            for name, p in self.mllm.model.named_parameters()
            if p.requires_grad
        }
        side = self.mllm.config.vision_config.image_size
        self.vfm = models.dino(bench.device, toy=bench.toy)
        self.tokens = self.mllm.config.image_seq_length
        layer = 2 if bench.toy else 16
        self.alignment = attach_alignment(
            self.mllm, layers=[layer], dims={self.vfm.name: self.vfm.dim}, hidden=32 if bench.toy else 2048
        )
        self.features = torch.randn(16, self.tokens, self.vfm.dim)
        self.data = ConversationSet(models.conversations(64, side=side, words=WORDS // 4 if bench.toy else WORDS))
        settings = AlignmentConfig(objective="cosine", layer=(layer,), hidden=32 if bench.toy else 2048)
        self.recipe = Recipe(
            output_dir=bench.folder / "run",
            log_every=20,
            eval_every=10_000,
            save_every=10_000,
            model=ModelConfig(name="random", train="lora", lora=LoraConfig(rank=self.rank, alpha=2 * self.rank)),
            optim=OptimConfig(steps=1, batch_size=8, warmup=0, learning_rate=1e-5, precision="bfloat16"),
            alignment=settings,
            monitor=MonitorConfig(cknna_images=0, head_steps=1),
        )

    def trainer(self, variant: str, *, batch: int, steps: int, checkpointing: bool) -> AlignmentTrainer:
        """Return a trainer of one variant that takes `steps` steps."""
        recipe = replace(
            self.recipe, optim=replace(self.recipe.optim, steps=steps, batch_size=batch, checkpointing=checkpointing)
        )
        alignment: Alignment | None = self.alignment
        targets: Targets | None
        if variant == BASELINE:
            recipe, alignment, targets = replace(recipe, alignment=AlignmentConfig()), None, None
        else:
            targets = Remembered([self.vfm], self.features) if variant == CACHED else Targets([self.vfm])
        module: Any = self.mllm.model
        if checkpointing:
            checkpoint_activations(module)
        else:
            (getattr(module, "activation_checkpointing_disable", None) or module.gradient_checkpointing_disable)()
        collate = Collator(self.mllm, self.data, None, targets)
        model = AlignedMLLMForConditionalGeneration(self.mllm, alignment)
        setup = ConversationSetup(
            recipe, model, self.mllm, self.data, self.data, None, collate, [], self.trained, "", [], {}
        )
        recipe.output_dir.mkdir(exist_ok=True)
        return build_trainer(recipe, setup)

    def steps(
        self, variant: str, *, batch: int, steps: int, checkpointing: bool = False
    ) -> tuple[list[float], int, int]:
        """Return the seconds of each step, the peak GPU memory in bytes, and the tokens of a sequence."""
        trainer = self.trainer(variant, batch=batch, steps=steps, checkpointing=checkpointing)
        clock = Clock(self.bench.device)
        trainer.add_callback(clock)
        forward = trainer.setup.model.forward
        try:
            trainer.train()
        finally:
            trainer.setup.model.forward = forward  # type: ignore[method-assign]
            trainer.accelerator.free_memory()
            trainer.optimizer = None
            self.mllm.model.zero_grad(set_to_none=True)
            self.alignment.zero_grad(set_to_none=True)
        self.loading = statistics.median(clock.loading[1:] or clock.loading) * 1000
        return clock.seconds, clock.peak, int(trainer.setup.collate([0])["input_ids"].shape[1])

    def halve(self) -> None:
        """Convert the frozen base to bfloat16."""
        for value in self.mllm.model.parameters():
            if not value.requires_grad:
                value.data = value.data.bfloat16()

    def estimate(self, batch: int, *, checkpointing: bool, sequence: int) -> int:
        """Return the dry run's estimate of the memory that such a training needs, in bytes, without the VFM."""
        recipe = replace(self.recipe, optim=replace(self.recipe.optim, batch_size=batch, checkpointing=checkpointing))
        sizes = sizes_of(self.mllm.model, self.alignment)
        return Plan(
            recipe, sizes, self.mllm.config, len(self.data), (self.tokens, self.tokens), sequence, 0, 0, 0
        ).memory("ddp", 1)


class Clock(TrainerCallback):
    """Measure the time of each step and the peak GPU memory; prevent saving and evaluation."""

    def __init__(self, device: str) -> None:
        self.cuda, self.seconds, self.peak, self._last = device == "cuda", list[float](), 0, 0.0
        self.loading: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        self._last = time.perf_counter()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Record the time that loading the batch took."""
        self.loading.append(time.perf_counter() - self._last)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Record the time of the step, and prevent anything from being written."""
        if self.cuda:
            torch.cuda.synchronize()
            self.peak = torch.cuda.max_memory_allocated()
        self.seconds.append(time.perf_counter() - self._last)
        control.should_save = control.should_evaluate = control.should_log = False
        self._last = time.perf_counter()


def run(bench: Bench) -> None:
    """Measure times with a base in bfloat16."""
    with bench.guard("model"):
        model = Model(bench, torch.float32)
        model.halve()
        _times(bench, model)


def memory(bench: Bench) -> None:
    """Measure memory with a base in float32, as in the recipes, and in bfloat16."""
    with bench.guard("model"):
        model = Model(bench, torch.float32)
        _memory(bench, model, "float32 base", CACHED)
        model.halve()
        _memory(bench, model, "bfloat16 base", CACHED)


def _times(bench: Bench, model: Model) -> None:
    """Measure the median step of each variant, and its ratio to the baseline's."""
    batch, steps = (2, 3) if bench.toy else (8, 8)
    seconds: dict[str, list[float]] = {name: [] for name in (BASELINE, CACHED, COMPUTED)}
    loading: dict[str, float] = {}
    sequence = 0
    for turn in range(1 if bench.toy else ROUNDS):
        names = list(seconds)
        for name in names[turn:] + names[:turn]:
            if not bench.time_for("training step", 2 if bench.toy else 20, f"{name}, round {turn + 1}"):
                break
            taken, _, sequence = model.steps(name, batch=batch, steps=steps, checkpointing=True)
            seconds[name] += taken[WARM_UP:]
            loading[name] = model.loading
    for name, steps_of_variant in seconds.items():
        if not (steps_of_variant and seconds[BASELINE]):
            continue
        median = statistics.median(steps_of_variant)
        figures = {
            "ms": median * 1000,
            "of that loading": loading[name],
            "steps": len(steps_of_variant),
            "tokens": batch * sequence,
        }
        if name == BASELINE:
            bench.add("training step", figures, setting=name)
            continue
        ratio = median / statistics.median(seconds[BASELINE])
        tolerance, passed = (f"ratio <= {GOAL}", ratio <= GOAL) if name == CACHED and not bench.toy else (None, None)
        bench.add("training step", {**figures, "ratio": ratio}, setting=name, tolerance=tolerance, passed=passed)


def _memory(bench: Bench, model: Model, base: str, variant: str) -> None:
    """Measure the peak by micro-batch, with and without checkpointing, until one does not fit."""
    with bench.guard("peak memory", setting=base):
        model.steps(
            variant, batch=1, steps=1, checkpointing=True
        )  # frees what an earlier run that did not fit still holds
    for checkpointing in (True, False):
        for batch in (1, 2) if bench.toy else (1, 2, 4, 8, 16):
            setting = f"{base}, batch {batch}, {'' if checkpointing else 'no '}checkpointing"
            if not bench.time_for("peak memory", 12 if not bench.toy else 1, setting):
                return
            full = True
            with bench.guard("peak memory", setting=setting, full_is_fine=True):
                taken, peak, sequence = model.steps(variant, batch=batch, steps=3, checkpointing=checkpointing)
                full = False
                figures = {"GB": peak / 1e9} if bench.device == "cuda" else {}
                figures["ms"] = taken[-1] * 1000
                if base == "float32 base":
                    estimate = model.estimate(batch, checkpointing=checkpointing, sequence=sequence)
                    figures["dry run's GB"] = estimate / 1e9
                goal = base == "float32 base" and bench.device == "cuda" and not bench.toy
                passed = abs(peak - figures["dry run's GB"] * 1e9) <= WITHIN * peak if goal else None
                bench.add(
                    "peak memory",
                    figures,
                    setting=setting,
                    tolerance=f"within {WITHIN:.0%}" if goal else None,
                    passed=passed,
                )
            if full:
                break
