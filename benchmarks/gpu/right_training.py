"""Compare a few steps of the trainer with those on the CPU, and a resumed run with an uninterrupted one.

The runs are separate processes, because the one on the CPU must not see the GPU. They use `build_trainer` and the
Trainer's loop, with data, cache, clipping, optimizer and checkpoints, but without the command line and the model card.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.gpu import models
from benchmarks.gpu.harness import Apart, Bench, apart
from trainer.alignment_config import AlignmentConfig
from trainer.model_config import LoraConfig, ModelConfig
from trainer.recipe import DataConfig, MonitorConfig, OptimConfig, Recipe

STEPS, CUT = 6, 3
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.03}  # relative to the loss, or to 0.1 if the loss is smaller
LOSSES = ("lm_loss", "alignment_loss")


def model_data_vfm(folder: Path) -> tuple[Path, str, str]:
    """Write a model, a data set and a VFM into `folder` and return how a recipe names them."""
    small = models.tiny_llava()
    small.model.save_pretrained(folder / "model")
    small.processor.save_pretrained(folder / "model")
    rows = []
    for number, conversation in enumerate(models.conversations(10, side=64, words=9).conversations):
        name = f"{number}.png"
        conversation.images[0].save(folder / name)
        (question, answer) = conversation.turns[0]
        rows.append({"id": number, "image": name, "conversations": _turns(f"<image>\n{question}", answer)})
    rows += [{"id": "text", "conversations": _turns("what is this ?", "a red cat")} for _ in range(2)]
    (folder / "data.json").write_text(json.dumps(rows))
    return folder / "model", f"llava_json:{folder / 'data.json'}", str(models.save_dino(folder / "vfm"))


def _turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def recipes(folder: Path) -> dict[str, Recipe]:
    """Return the recipes that are compared, by name."""
    model, data, vfm = model_data_vfm(folder)
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
    """Compare the losses of every recipe with those on the CPU in float32; then check resuming."""
    for name, recipe in apart(recipes, bench.folder).items():
        setting = recipe.optim.precision
        if not bench.time_for(name, 20, setting=setting):
            return
        if recipe.model.train != "lora":  # its dropout draws other numbers on a GPU
            with bench.guard(name, setting=setting):
                exact = replace(recipe, optim=replace(recipe.optim, precision="float32"))
                on_cpu = Apart(trained, replace(exact, output_dir=bench.folder / f"{name} cpu"), cuda=False)
                on_device = apart(trained, replace(recipe, output_dir=bench.folder / f"{name} device"))
                wanted = on_cpu.result()
                for loss in LOSSES:
                    steps = zip(on_device["losses"], wanted["losses"], strict=True)
                    pairs = [(a[loss], b[loss]) for a, b in steps if loss in b]
                    if pairs:
                        error = max(abs(a - b) / max(abs(b), 0.1) for a, b in pairs)
                        bench.error(
                            f"{name}: {loss} of {len(pairs)} steps", error, TOLERANCES[setting], setting=setting
                        )
        if name in ("VIRAL, VFM cached", "VIRAL, LoRA, bfloat16"):
            with bench.guard(f"{name}, resumed", setting=setting):
                _resumed(bench, name, recipe)


def _resumed(bench: Bench, name: str, recipe: Recipe) -> None:
    """Check that a resumed run is equal to the bit to an uninterrupted one, with deterministic algorithms."""
    folders = [bench.folder / f"{name} {what}" for what in ("whole", "cut")]
    first = Apart(trained, replace(recipe, output_dir=folders[0]), True)
    apart(trained, replace(recipe, output_dir=folders[1]), True, CUT)
    whole, resumed = first.result(), apart(trained, replace(recipe, output_dir=folders[1]), True, None, True)
    difference = max(
        (abs(a[loss] - b[loss]) for a, b in zip(whole["losses"], resumed["losses"], strict=True) for loss in a),
        default=float("nan"),
    )
    weights_equal = whole["weights"] == resumed["weights"]
    figures = {"weights equal": weights_equal, "largest difference of a loss": difference}
    bench.add(
        f"{name}, resumed after step {CUT} of {STEPS}",
        figures,
        setting=f"{recipe.optim.precision}, deterministic",
        tolerance="to the bit",
        passed=weights_equal and difference == 0,
    )


def trained(
    recipe: Recipe, deterministic: bool = False, stop: int | None = None, resume: bool = False
) -> dict[str, Any]:
    """Train in this process.

    Args:
        deterministic: use deterministic algorithms.
        stop: end the run after this step and its checkpoint.
        resume: start from the checkpoint of step `CUT`.

    Returns:
        `losses` of each step, and `weights`, the fingerprint of the trained parameters.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch
    from transformers import TrainerCallback, TrainerState

    from trainer.loop import build_trainer
    from trainer.monitor.progress import Progress
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
    # neither a log nor an evaluation: they need pyarrow and scipy, and the losses are read from the Trainer
    trainer.remove_callback(Progress)
    trainer.evaluated_at = recipe.optim.steps
    checkpoint = recipe.output_dir / f"checkpoint-{CUT}"
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")) if resume else None
    trainer.run(checkpoint if resume else None, state)
    rows = [row for row in trainer.state.log_history if "lm_loss" in row]
    moved = {name: value.detach() for name, value in trainer.setup.model.named_parameters() if value.requires_grad}
    return {
        "losses": [{loss: row[loss] for loss in LOSSES if loss in row} for row in rows],
        "weights": fingerprint(moved),
    }
