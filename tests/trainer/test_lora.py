"""LoRA on small models whose two factors are both drawn at random: a fresh one has B = 0, which hides every fault of
scale, order and merging."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from tests.students import noise_image
from tests.tiny import build, randomize
from trainer.build.lora import add_lora, lora_layers, merge_lora, merged_state
from trainer.model_config import LoraConfig
from workbench.mllm import MLLM

CONFIG = LoraConfig(rank=2, alpha=3.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "smolvlm"])
def test_merged_weights_compute_what_the_adapters_compute(name: str, tmp_path: Path) -> None:
    """W + alpha / rank B A, in plain tensors and in place, against the adapted model's own forward pass and against the
    formula in float64."""
    folder = build(name, tmp_path / name)
    mllm = MLLM.load(str(folder), validate=False)
    batch = mllm.encode([noise_image(0)], ["what is this ?"])
    with torch.inference_mode():
        before = mllm.model(**batch.inputs).logits
    old = {key: value.double().clone() for key, value in mllm.model.state_dict().items()}
    add_lora(mllm.model, CONFIG)
    with torch.inference_mode():
        # B is 0: a run begins with the model itself
        assert torch.allclose(mllm.model(**batch.inputs).logits, before, atol=1e-5)
    layers, state = lora_layers(mllm.model), mllm.model.state_dict()
    assert len(layers) == mllm.n_layers * len(CONFIG.targets)
    assert all(layer.lora_A["default"].out_features == 2 for layer in layers.values())
    for number, layer in enumerate(layers.values()):
        randomize(layer.lora_A, number), randomize(layer.lora_B, number)
    with torch.inference_mode():
        adapted = mllm.model(**batch.inputs).logits
    assert (adapted - before).abs().max() > 0.1
    merged = merged_state(mllm.model, mllm.model.state_dict())
    assert merged.keys() == old.keys()
    for key, value in merged.items():
        layer = layers.get(key.removesuffix(".weight"))
        added = (
            0.0
            if layer is None or not key.endswith(".weight")
            else 3 / 2 * layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
        )
        torch.testing.assert_close(value.double(), old[key] + added, atol=1e-5, rtol=1e-5)
    plain = AutoModelForImageTextToText.from_pretrained(folder)
    plain.load_state_dict(merged)
    in_place = copy.deepcopy(mllm.model)
    merge_lora(in_place)
    assert not lora_layers(in_place)
    assert in_place.state_dict().keys() == old.keys()
    assert state.keys() == mllm.model.state_dict().keys()
    with torch.inference_mode():
        for model in (plain.eval(), in_place.eval()):
            torch.testing.assert_close(model(**batch.inputs).logits, adapted, atol=1e-3, rtol=1e-3)
