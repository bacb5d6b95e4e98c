"""Visual positions, hidden states and answers, against transformers' own outputs; and wrong families that must not
pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.tiny import randomize
from workbench.capture.hidden_states import read
from workbench.data import Sample, load_data
from workbench.errors import ConfigError, ModelError, UnknownNameError, WeightsError
from workbench.mllm import FAMILIES, MLLM, VisualTokens
from workbench.mllm.validate import validate


@pytest.fixture(scope="module")
def mllm(runs_folder: Path) -> MLLM:
    """The trained model with other weights: after twelve steps its norms are still nearly 1, which hides one that is
    applied twice."""
    trained = MLLM.load(str(runs_folder / "viral"))
    return MLLM(randomize(trained.model), trained.processor, trained.family, trained.name)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return [scene[0] for scene in load_data("shapes:val", limit=4).scenes] + load_data("shapes:val", limit=4).samples[
        1:3
    ]


def encode(mllm: MLLM, samples: list[Sample]):
    return mllm.encode([s.image for s in samples], [s.question for s in samples])


@pytest.mark.slow
def test_read_equals_transformers_and_stops_before_the_final_norm(mllm: MLLM, samples: list[Sample]) -> None:
    batch = encode(mllm, samples)
    ours = read(mllm, batch)
    with torch.inference_mode():
        theirs = mllm.model(**batch.inputs, output_hidden_states=True).hidden_states
    assert len(theirs) == mllm.n_layers + 1
    for row, activations in enumerate(ours):
        assert activations.layers == tuple(range(mllm.n_layers + 1))
        assert len(activations.tokens) == 64
        for layer in range(mllm.n_layers):
            assert torch.equal(activations.values[layer], theirs[layer][row, activations.tokens])
        last = theirs[-1][row, activations.tokens]
        assert not torch.allclose(activations.values[-1], last, atol=1e-2)
        with torch.inference_mode():
            assert torch.allclose(mllm.decoder.norm(activations.values[-1]), last, atol=1e-5)


@pytest.mark.slow
def test_padding_and_layer_choice_change_nothing(mllm: MLLM, samples: list[Sample]) -> None:
    together = read(mllm, encode(mllm, samples), layers=[2, 0])
    for row, sample in enumerate(samples):
        alone = read(mllm, encode(mllm, [sample]))[0]
        assert together[row].layers == (2, 0)
        assert torch.allclose(together[row].values[0], alone.values[2], atol=1e-4, rtol=1e-4)
        assert torch.allclose(together[row].values[1], alone.values[0], atol=1e-4, rtol=1e-4)


def test_layer_zero_is_the_projectors_output_and_text_stays(mllm: MLLM, samples: list[Sample]) -> None:
    batch = encode(mllm, samples[:1])
    with torch.inference_mode():
        projected = mllm.model.get_image_features(pixel_values=batch.inputs["pixel_values"]).pooler_output[0]
    assert torch.allclose(read(mllm, batch, layers=[0])[0].values[0], projected, atol=1e-6)
    everything = read(mllm, batch, tokens="all", layers=[0])[0]
    assert len(everything.tokens) == int(batch.inputs["attention_mask"].sum())


def _moved(change: Callable[[VisualTokens], VisualTokens]) -> Callable[..., list[list[VisualTokens]]]:
    right = FAMILIES.get("llava").visual_tokens
    return lambda *given: [[change(part) for part in sample] for sample in right(*given)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: dataclasses.replace(t, index=t.index + 1), r"is wrong about positions: .* off by \+1"),
        (lambda t: dataclasses.replace(t, index=t.index - 1), "is wrong about positions: .* off by -1"),
        (lambda t: dataclasses.replace(t, index=t.index.view(t.grid).T.flatten()), "rows and columns look exchanged"),
        (lambda t: dataclasses.replace(t, index=t.index[:-8], grid=(7, 8)), "leaves out 8 visual tokens"),
        (lambda t: dataclasses.replace(t, grid=(8, 9)), r"gives a grid \(8, 9\) for 64 visual tokens"),
    ],
)
def test_a_wrong_family_does_not_pass(mllm: MLLM, change: Callable[[VisualTokens], VisualTokens], message: str) -> None:
    wrong = MLLM(mllm.model, mllm.processor, dataclasses.replace(mllm.family, visual_tokens=_moved(change)), mllm.name)
    with pytest.raises(ModelError, match=message):
        validate(wrong)


@pytest.mark.slow
def test_a_projector_that_transposes_the_picture_does_not_pass(mllm: MLLM) -> None:
    """Positions are right and the raster is not: only painting a cell can tell."""
    projector = mllm.model.model.multi_modal_projector
    handle = projector.register_forward_hook(lambda _, __, out: out.unflatten(1, (8, 8)).transpose(1, 2).flatten(1, 2))
    try:
        with pytest.raises(
            ModelError,
            match=r"painting token .* more at the projector's output .rows and columns look exchanged",
        ):
            validate(mllm)
    finally:
        handle.remove()


def test_a_model_blind_to_the_image_does_not_pass(mllm: MLLM) -> None:
    handle = mllm.model.model.multi_modal_projector.register_forward_hook(lambda _, __, out: torch.zeros_like(out))
    try:
        with pytest.raises(ModelError, match="left a visual token unchanged"):
            validate(mllm)
    finally:
        handle.remove()


def test_bad_models_are_one_sentence(tmp_path: Path, mllm: MLLM, samples: list[Sample]) -> None:
    with pytest.raises(WeightsError, match="holds no model"):
        MLLM.load(str(tmp_path))
    with pytest.raises(ModelError, match="'no/such-model' is neither a folder nor a hub id within reach"):
        MLLM.load("no/such-model")
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(
        UnknownNameError,
        match=r"unknown model architecture 'LlamaForCausalLM': .* LlavaForCond.* one file in workbench/mllm",
    ):
        MLLM.load(str(tmp_path))
    with pytest.raises(ConfigError, match=r"layer 4 does not exist in .*: expected 0 to 3"):
        read(mllm, encode(mllm, samples[:1]), layers=[4])
    with pytest.raises(ModelError, match="2 entries of images for 1 prompts"):
        mllm.encode([samples[0].image] * 2, ["what"])
