"""Time and memory of reading layers and attention rows, compared with plain and eager forward passes in one run.

python -m benchmarks.capture            # 2916 visual tokens, about 2 minutes on 2 cores
python -m benchmarks.capture --small    # a check that it works, in seconds
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from workbench.capture.attention import attention
from workbench.capture.hidden_states import read
from workbench.mllm import FAMILIES, MLLM, Batch

ROUNDS = 7


def model(side: int) -> MLLM:
    """Build a LLaVA with random weights, side x side visual tokens, and a language model of 4 blocks with 8 heads."""
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<image>": 1, "what": 2, "?": 3}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", extra_special_tokens={"image_token": "<image>"}
    )
    pixels = {"height": 14 * side, "width": 14 * side}
    processor = LlavaProcessor(
        CLIPImageProcessor(size=pixels, do_center_crop=False),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=1,
        image_size=14 * side,
        patch_size=14,
    )
    text = LlamaConfig(
        vocab_size=4,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    torch.manual_seed(0)
    llava = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=1))
    return MLLM(llava, processor, FAMILIES.get("llava"), "benchmark")


def runs(mllm: MLLM, batch: Batch) -> dict[str, Callable[[], object]]:
    """Return what is compared, by name; each is one forward pass of the whole model."""

    def plain() -> object:
        with torch.inference_mode():
            return mllm.model(**batch.inputs, use_cache=False, logits_to_keep=1)

    def eager() -> object:
        mllm.model.set_attn_implementation({"text_config": "eager"})
        try:
            return plain()
        finally:
            mllm.model.set_attn_implementation({"text_config": "sdpa"})

    return {
        "plain forward (sdpa)": plain,
        "read, all layers, visual tokens": lambda: read(mllm, batch),
        "attention, one row a block": lambda: list(attention(mllm, batch, rows=[[-1]])),
        "attention, 16 rows a block": lambda: list(attention(mllm, batch, rows=[list(range(-16, 0))])),
        "eager forward, S x S attention": eager,
    }


def memory(side: int, name: str) -> None:
    """Print the peak memory of one run in MiB beyond that of a plain forward pass; meant for a separate process."""
    mllm = model(side)
    batch = mllm.encode([Image.new("RGB", (300, 300), "gray")], ["what ?" * 8])
    actions = runs(mllm, batch)
    actions["plain forward (sdpa)"]()
    print(_peak(actions[name]) - _peak(actions["plain forward (sdpa)"]))


def _peak(run: Callable[[], object]) -> float:
    """Return how far resident memory rises during a run, in MiB (Linux only)."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present value
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _resident(field: str) -> float:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) / 1024


def main(argv: list[str]) -> None:
    """Print times as ratios to the plain forward pass, and extra memory as shares of that of eager attention."""
    side = 12 if "--small" in argv else 54
    if "--memory" in argv:
        memory(side, argv[argv.index("--memory") + 1])
        return
    mllm = model(side)
    batch = mllm.encode([Image.new("RGB", (300, 300), "gray")], ["what ?" * 8])
    actions = runs(mllm, batch)
    times: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(ROUNDS + 1):  # in turns, so that a busy moment affects all of them
        for name, run in actions.items():
            start = time.perf_counter()
            run()
            if turn:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    extra = dict.fromkeys(actions, float("nan"))
    measured = [*actions] if side == 54 else [*actions][-1:]  # each in a process of its own; small: only the last
    for name in measured:
        command = [sys.executable, "-m", "benchmarks.capture", "--memory", name, *(["--small"] if side == 12 else [])]
        extra[name] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    plain, eager = statistics.median(times["plain forward (sdpa)"]), extra["eager forward, S x S attention"]
    setting = f"4 blocks, 8 heads, float32, {torch.get_num_threads()} threads, median of {ROUNDS}"
    print(f"{side * side} visual tokens, S = {batch.inputs['input_ids'].shape[1]}, {setting}")
    for name in actions:
        seconds, share = statistics.median(times[name]), f"{extra[name] / eager:6.1%}" if eager > 0 else "   n/a"
        print(f"{name:34} {seconds:7.3f} s  x{seconds / plain:5.2f}  extra memory {extra[name]:7.1f} MiB  {share}")


if __name__ == "__main__":
    main(sys.argv[1:])
