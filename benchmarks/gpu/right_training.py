"""The trainer on the device: a few steps against the CPU's, and a run that was interrupted against one that was not.

The runs are processes of their own, since the CPU's must not see the GPU. They go through `build_trainer` and the
Trainer's loop, with data, cache, clipping, optimizer and checkpoints, and leave out the command line and the model
card.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.gpu import models
from benchmarks.gpu.harness import Apart, Bench, apart
from trainer.recipe import AlignmentConfig, DataConfig, LoraConfig, ModelConfig, MonitorConfig, OptimConfig, Recipe

STEPS, CUT = 6, 3
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.03}  # of a loss, relative to it or to 0.1
LOSSES = ("lm_loss", "alignment_loss")


def world(folder: Path) -> tuple[Path, str, str]:
    """A model, a data set and a VFM on disk."""
    small = models.tiny_llava()
    small.model.save_pretrained(folder / "model")
    small.processor.save_pretrained(folder / "model")
    rows = []
    for number, own in enumerate(models.conversations(10, side=64, words=9).conversations):
        name = f"{number}.png"
        own.images[0].save(folder / name)
        (question, answer) = own.turns[0]
        said = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        rows.append({"id": number, "image": name, "conversations": said})
    rows += [
        {
            "id": "text",
            "conversations": [{"from": "human", "value": "what is this ?"}, {"from": "gpt", "value": "a red cat"}],
        }
        for _ in range(2)
    ]
    (folder / "data.json").write_text(json.dumps(rows))
    return folder / "model", f"llava_json:{folder / 'data.json'}", str(models.save_dino(folder / "vfm"))


def recipes(folder: Path) -> dict[str, Recipe]:
    """What is compared, by name."""
    model, data, vfm = world(folder)
    viral = AlignmentConfig(objective="cosine", layer=(2,), hidden=16, vfm=(vfm,))
    plain = Recipe(
        output_dir=folder / "run",
        log_every=1,
        eval_every=100,
        save_every=CUT,
        model=ModelConfig(name=str(model)),
        data=DataConfig(train=(data,), val=data, features="compute"),
        optim=OptimConfig(steps=STEPS, batch_size=2, accumulation=2, warmup=1, learning_rate=1e-3),
        monitor=MonitorConfig(cknna_images=0),
    )
    cached = replace(plain, alignment=viral, data=replace(plain.data, features="cache"))
    lora = replace(cached.model, train="lora", lora=LoraConfig(rank=4, dropout=0.1))
    return {
        "baseline": plain,
        "VIRAL, VFM at every step": replace(plain, alignment=viral),
        "VIRAL, VFM cached": cached,
        "VIRAL, relation, checkpointing": replace(
            cached, alignment=replace(viral, objective="relation"), optim=replace(plain.optim, checkpointing=True)
        ),
        "VIRAL, bfloat16": replace(cached, optim=replace(plain.optim, precision="bfloat16")),
        "VIRAL, LoRA, bfloat16": replace(cached, model=lora, optim=replace(plain.optim, precision="bfloat16")),
    }


def run(bench: Bench) -> None:
    """Losses of every recipe against the CPU's in float32; then resuming."""
    for name, recipe in apart(recipes, bench.folder).items():
        setting = recipe.optim.precision
        if not bench.time_for(name, 20, setting=setting):
            return
        if recipe.model.train != "lora":  # whose dropout draws other numbers on a GPU
            with bench.guard(name, setting=setting):
                exact = replace(recipe, optim=replace(recipe.optim, precision="float32"))
                on_cpu = Apart(trained, replace(exact, output_dir=bench.folder / f"{name} cpu"), cuda=False)
                found = apart(trained, replace(recipe, output_dir=bench.folder / f"{name} device"))
                wanted = on_cpu.result()
                for loss in LOSSES:
                    pairs = [
                        (a[loss], b[loss]) for a, b in zip(found["losses"], wanted["losses"], strict=True) if loss in b
                    ]
                    if pairs:
                        error = max(abs(a - b) / max(abs(b), 0.1) for a, b in pairs)
                        bench.error(
                            f"{name}: {loss} of {len(pairs)} steps", error, TOLERANCES[setting], setting=setting
                        )
        if name in ("VIRAL, VFM cached", "VIRAL, LoRA, bfloat16"):
            with bench.guard(f"{name}, resumed", setting=setting):
                _resumed(bench, name, recipe)


def _resumed(bench: Bench, name: str, recipe: Recipe) -> None:
    """Equal to the bit with deterministic algorithms."""
    folders = [bench.folder / f"{name} {what}" for what in ("whole", "cut")]
    first = Apart(trained, replace(recipe, output_dir=folders[0]), True)
    apart(trained, replace(recipe, output_dir=folders[1]), True, CUT)
    whole, resumed = first.result(), apart(trained, replace(recipe, output_dir=folders[1]), True, None, True)
    away = max(
        (abs(a[loss] - b[loss]) for a, b in zip(whole["losses"], resumed["losses"], strict=True) for loss in a),
        default=float("nan"),
    )
    same = whole["weights"] == resumed["weights"] and away == 0
    figures = {"weights equal": whole["weights"] == resumed["weights"], "largest difference of a loss": away}
    bench.add(
        f"{name}, resumed after step {CUT} of {STEPS}",
        figures,
        setting=f"{recipe.optim.precision}, deterministic",
        tolerance="to the bit",
        passed=same,
    )


def trained(
    recipe: Recipe, deterministic: bool = False, stop: int | None = None, resume: bool = False
) -> dict[str, Any]:
    """Train in this process, whose seed and device are its own; returns the losses of each step and the fingerprint of
    what is trained.

    Args:
        stop: the step after whose checkpoint the run is left.
        resume: from that checkpoint.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch
    from transformers import TrainerCallback, TrainerState

    from trainer.loop import build_trainer
    from trainer.setups.conversation import ConversationSetup
    from workbench.hashing import fingerprint

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if deterministic:
        torch.use_deterministic_algorithms(True)

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if stop is not None and state.global_step >= stop:
                control.should_training_stop = control.should_save = True
            control.should_evaluate = False

    recipe.output_dir.mkdir(exist_ok=True)
    trainer = build_trainer(recipe, ConversationSetup.from_recipe(recipe))
    trainer.add_callback(Stop())
    checkpoint = recipe.output_dir / f"checkpoint-{CUT}"
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")) if resume else None
    trainer.run(str(checkpoint) if resume else None, state)
    rows = [row for row in trainer.state.log_history if "lm_loss" in row]
    moved = {name: value.detach() for name, value in trainer.setup.model.named_parameters() if value.requires_grad}
    return {
        "losses": [{loss: row[loss] for loss in LOSSES if loss in row} for row in rows],
        "weights": fingerprint(moved),
    }
