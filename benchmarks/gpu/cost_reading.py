"""Cost of analyses at the geometry of LLaVA-1.5-7B in bfloat16: reading, permuted tokens, greedy answers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu import models
from benchmarks.gpu.harness import Bench
from workbench.capture.attention import attention
from workbench.capture.hidden_states import read
from workbench.mllm import MLLM
from workbench.scoring.questions import random_order, survey
from workbench.scoring.quiz import Quiz

READ_GOAL, ROWS_GOAL = 1.10, 0.05
ROUNDS = 7
IMAGES = 5  # in one prompt: 2880 visual tokens of LLaVA-1.5


def model(bench: Bench) -> MLLM:
    """Return the model for the measurements."""
    return models.llava(bench.device, torch.float32 if bench.toy else torch.bfloat16, toy=bench.toy)


def seconds(bench: Bench, action: Callable[[], object]) -> float:
    """Return the time of one call in seconds, including the work of the GPU."""
    if bench.device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    action()
    if bench.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def extra_memory(action: Callable[[], object]) -> float:
    """Return how far the GPU memory rises during a call, in GB."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    action()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


# --- reading --------------------------------------------------------------------------------------


def capture(bench: Bench) -> None:
    """Measure reading all layers and attention rows, compared with a plain forward pass and eager attention."""
    with bench.guard("capture"):
        mllm = model(bench)
        batch = mllm.encode([[models.image(n, 336) for n in range(IMAGES)]], [models.text(12, 0)])

        def plain() -> object:
            with torch.inference_mode():
                return mllm.model(**batch.inputs, use_cache=False, logits_to_keep=1)

        def eager() -> object:
            mllm.model.set_attn_implementation({"text_config": "eager"})
            try:
                return plain()
            finally:
                mllm.model.set_attn_implementation({"text_config": "sdpa"})

        runs: dict[str, Callable[[], object]] = {
            "plain forward": plain,
            "all layers, visual tokens": lambda: read(mllm, batch),
            "attention, one row of each block": lambda: list(attention(mllm, batch, rows=[[-1]])),
            "attention, 16 rows of each block": lambda: list(attention(mllm, batch, rows=[list(range(-16, 0))])),
            "eager forward": eager,
        }
        times: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range((1 if bench.toy else ROUNDS) + 1):  # in turns, so that a disturbance affects all of them
            for name, action in runs.items():
                taken = seconds(bench, action)
                if turn:
                    times[name].append(taken)
        memory = {name: extra_memory(action) for name, action in runs.items()} if bench.device == "cuda" else {}
        size = f"S {batch.inputs['input_ids'].shape[1]}"
        for name in runs:
            ratio = statistics.median(times[name]) / statistics.median(times["plain forward"])
            figures = {"ms": statistics.median(times[name]) * 1000, "ratio": ratio}
            goal = name.startswith("all layers") and not bench.toy
            tolerance, passed = (f"ratio <= {READ_GOAL}", ratio <= READ_GOAL) if goal else (None, None)
            if memory:
                figures["extra GB"] = memory[name]
                if name.startswith("attention"):
                    share = (memory[name] - memory["plain forward"]) / max(
                        memory["eager forward"] - memory["plain forward"], 1e-9
                    )
                    figures["share of eager's"] = share
                    tolerance, passed = (
                        (f"share <= {ROWS_GOAL:.0%}", share <= ROWS_GOAL) if not bench.toy else (None, None)
                    )
            bench.add(name, figures, setting=size, tolerance=tolerance, passed=passed)


# --- permutation ----------------------------------------------------------------------------------


def permutation(bench: Bench) -> None:
    """Time 100 questions about 100 images with permuted tokens, and extrapolate to the whole analysis."""
    with bench.guard("permutation"):
        mllm, size = model(bench), 4 if bench.toy else 20
        scenes = models.questions(8 if bench.toy else 100, side=336)
        chunks = [scenes[start : start + size] for start in range(0, len(scenes), size)]
        features: list[list[Tensor]] = []
        taken = seconds(bench, lambda: features.extend(survey(mllm, chunk, size, encoder=True)[1] for chunk in chunks))
        bench.add("reading what the projector receives", {"s": taken, "images": len(scenes)}, setting=f"batch {size}")
        quizzes: list[Quiz] = []
        taken = seconds(
            bench,
            lambda: quizzes.extend(
                Quiz(mllm, chunk, size, features=read) for chunk, read in zip(chunks, features, strict=True)
            ),
        )
        bench.add("encoding the questions", {"s": taken}, setting=f"batch {size}")
        order = partial(_permuted, tokens=mllm.config.image_seq_length)
        each = []
        for site in ("encoder", 0, mllm.n_layers // 2, mllm.n_layers):
            if not bench.time_for("questions, permuted", 1 if bench.toy else 15, f"at {site}"):
                return
            taken = seconds(bench, lambda site=site: [quiz.logprobs(site, order) for quiz in quizzes])  # type: ignore[misc]
            each.append(taken)
            bench.add(
                "100 questions, permuted" if not bench.toy else "8 questions, permuted",
                {"s": taken},
                setting=f"at {site}",
            )
        conditions = 9 + 3 * (mllm.n_layers + 2)
        figures = {"conditions": conditions, "minutes": statistics.mean(each) * conditions / 60}
        bench.add("the whole analysis, from these", figures, setting="every layer, 2 draws")


def _permuted(values: Tensor, image: int, *, tokens: int) -> Tensor:
    return values[random_order(tokens, image=image, draw=0, seed=0).to(values.device)]


# --- answers --------------------------------------------------------------------------------------


def answers(bench: Bench) -> None:
    """Measure the tokens per second of greedy answers, one by one and in batches."""
    with bench.guard("answers"):
        mllm, length = model(bench), 4 if bench.toy else 32
        first = 0.0
        for size in (1, 4) if bench.toy else (1, 8, 32):
            with bench.guard("greedy answers", setting=f"batch {size}"):
                shown = [models.image(n, 336) for n in range(size)]
                batch = mllm.encode(shown, [models.text(6 + n % 3, n) for n in range(size)])
                mllm.generate(batch, max_new_tokens=2)
                taken = min(seconds(bench, partial(mllm.generate, batch, max_new_tokens=length)) for _ in range(2))
                rate = size * length / taken
                first = first or rate
                bench.add(
                    "greedy answers", {"tokens/s": rate, "times one by one": rate / first}, setting=f"batch {size}"
                )
