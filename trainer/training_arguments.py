"""The arguments of transformers' Trainer that a recipe becomes."""

from __future__ import annotations

import torch
from transformers import TrainingArguments

from trainer import distributed
from trainer.recipe import Recipe


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """Return the arguments for the present number of processes and strategy.

    With ZeRO-3, transformers shards every model that is loaded after this call.
    """
    optim, cuda = recipe.optim, torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(recipe.output_dir),
        max_steps=optim.steps,
        per_device_train_batch_size=optim.at_once(distributed.count()),
        gradient_accumulation_steps=optim.accumulated(distributed.count()),
        learning_rate=optim.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": optim.final_rate},
        warmup_steps=optim.warmup,
        max_grad_norm=optim.max_grad_norm,
        logging_steps=recipe.log_every,
        eval_strategy="steps",
        eval_steps=recipe.eval_every,
        save_steps=recipe.save_every,
        seed=recipe.seed,
        data_seed=recipe.seed,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=list(recipe.report_to),
        dataloader_num_workers=0,
        dataloader_pin_memory=cuda,
        label_names=["labels"],
        # with ZeRO, `build_trainer` adds autocast itself
        bf16=optim.precision == "bfloat16" and not distributed.strategy().startswith("zero"),
        use_cpu=not cuda,
        logging_nan_inf_filter=False,
        # every trained parameter gets a gradient in every pass
        ddp_find_unused_parameters=False,
        accelerator_config={
            "use_configured_state": distributed.count() > 1,  # the one that distributed.start made
            "non_blocking": cuda,  # possible from pinned memory
            # otherwise FSDP would keep the whole gradient in every process until the last accumulated pass
            "gradient_accumulation_kwargs": {"sync_each_batch": distributed.strategy() == "fsdp"},
        },
    )
