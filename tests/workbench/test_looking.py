"""A look at one image and question, against transformers itself and the analyses; changes by what they must and must
not do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny import build
from workbench import load_data, load_vfm, run_analysis
from workbench.capture.attention import attention
from workbench.capture.edit import edit
from workbench.capture.hidden_states import read
from workbench.changing import Change, ask_again, changed_tokens, inside, paint
from workbench.data import Sample
from workbench.errors import ConfigError
from workbench.looking import Look, aligned_with, look, vfm_patches
from workbench.mllm import MLLM, VisualTokens
from workbench.mllm.family import WHOLE
from workbench.spatial.grids import sum_onto_grid, whole_image

QUESTION, OPTIONS = "what is this ?", ("red cat", "blue dog")


@pytest.fixture(scope="module")
def mllm(tmp_path_factory: pytest.TempPathFactory) -> MLLM:
    return speaking(MLLM.load(str(build("llava", tmp_path_factory.mktemp("model") / "llava")), validate=False))


def speaking(mllm: MLLM) -> MLLM:
    """A model whose answers are words, though it has learned none."""
    not_words = {*mllm.processor.tokenizer.all_special_ids, mllm.config.image_token_id}
    mllm.model.generation_config.suppress_tokens = sorted(not_words)
    return mllm


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def seen(mllm: MLLM, image: Image.Image) -> Look:
    return look(mllm, image, QUESTION, options=OPTIONS, max_new_tokens=3)


@pytest.fixture(scope="module")
def sample(image: Image.Image) -> Sample:
    return Sample("q", "i", lambda: image, QUESTION, "red cat", OPTIONS)


def test_answer_and_probabilities_are_those_of_generate(mllm: MLLM, image: Image.Image, seen: Look) -> None:
    batch = mllm.encode([image], [QUESTION])
    with torch.inference_mode():
        out = mllm.model.generate(
            **batch.inputs, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    ids = out.sequences[0, batch.inputs["input_ids"].shape[1] :]
    assert seen.answer == mllm.generate(batch, max_new_tokens=3)[0]
    assert seen.cut
    assert len(seen.tokens) == 3
    assert "".join(token.text for token in seen.tokens).strip() == seen.answer
    for token, chosen, logits in zip(seen.tokens, ids, out.logits, strict=True):
        chances = logits[0].float().softmax(-1)
        assert token.probability == pytest.approx(float(chances[chosen]), rel=1e-4)
        best = chances.topk(5)
        assert [p for _, p in token.likely] == pytest.approx(best.values.tolist(), rel=1e-4)
        assert token.likely[0][0] == mllm.processor.tokenizer.decode([int(best.indices[0])]).strip()


def test_attention_is_what_transformers_returns(mllm: MLLM, image: Image.Image, seen: Look) -> None:
    batch = mllm.encode([image], [QUESTION])
    answer = mllm.generate_ids(batch, max_new_tokens=3)
    whole, end = mllm.continued(batch, answer), batch.inputs["input_ids"].shape[1]
    mllm.model.set_attn_implementation("eager")
    with torch.inference_mode():
        theirs = mllm.model(**whole.inputs, output_attentions=True).attentions
    mllm.model.set_attn_implementation("sdpa")
    index = mllm.visual_tokens(batch)[0][0].index
    for row, position in enumerate(range(end - 1, end + 3)):
        expected = torch.stack([block[0, :, position, index] for block in theirs])
        assert torch.allclose(seen.attention[row], expected, atol=1e-6)
        assert torch.allclose(seen.mass[row], expected.sum(-1), atol=1e-6)
        assert float(seen.uniform[row]) == pytest.approx(16 / (position + 1))
    assert seen.attention.shape == (4, 4, 4, 16)


def test_hidden_states_and_words(mllm: MLLM, image: Image.Image, seen: Look) -> None:
    batch = mllm.encode([image], [QUESTION])
    values = read(mllm, batch)[0].values
    assert seen.hidden.shape == (5, 16, 32)
    assert torch.allclose(seen.hidden.float(), values, rtol=1e-3, atol=1e-4)
    with torch.inference_mode():
        logits = mllm.model(**batch.inputs).logits[0].float()
    own = logits[mllm.visual_tokens(batch)[0][0].index].softmax(-1).topk(5)
    words = seen.words
    assert words is not None
    assert words.vocabulary == logits.shape[-1]
    assert torch.equal(words.ids[-1].long(), own.indices)  # at the last layer, the lens is the model's own output
    assert torch.allclose(words.probabilities[-1], own.values, atol=1e-5)
    named = {mllm.processor.tokenizer.convert_ids_to_tokens(token): token for token in words.texts}
    assert words.special == {token for name, token in named.items() if name.startswith("<")}


def test_options_share_the_probability(mllm: MLLM, sample: Sample, seen: Look) -> None:
    logprobs = []
    for option in OPTIONS:  # the whole text, token by token
        ids = mllm.answer_ids(option)
        batch = mllm.continued(mllm.encode([sample.image], [QUESTION]), [ids])
        with torch.inference_mode():
            logits = mllm.model(**batch.inputs).logits[0].float().log_softmax(-1)
        logprobs.append(sum(float(logits[number - len(ids) - 1, token]) for number, token in enumerate(ids)))
    expected = torch.tensor(logprobs).softmax(0)
    assert list(seen.options) == list(OPTIONS)
    assert list(seen.options.values()) == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava_next", "llava_onevision", "paligemma", "qwen2_5_vl", "smolvlm"])
def test_other_families(name: str, tmp_path: Path, image: Image.Image) -> None:
    """Tiles, prompts that see themselves whole, merged patches: the same as `capture` gives."""
    mllm = speaking(MLLM.load(str(build(name, tmp_path / name)), validate=False))
    seen = look(mllm, image, QUESTION, max_new_tokens=2)
    batch = mllm.encode([image], [QUESTION])
    (parts,), end = mllm.visual_tokens(batch), batch.inputs["input_ids"].shape[1]
    inside_whole, place = whole_image(parts)
    assert seen.grid == place.grid
    assert torch.allclose(seen.hidden.float(), read(mllm, batch)[0].values[:, inside_whole], rtol=1e-3, atol=1e-3)
    answer = mllm.generate_ids(batch, max_new_tokens=2)
    rows = attention(mllm, mllm.continued(batch, answer), rows=[list(range(end - 1, end + len(answer[0])))])
    keys = torch.cat([part.index for part in parts])
    for block, row in enumerate(rows):
        on_image = row[0][..., keys].float().transpose(0, 1)
        assert torch.allclose(seen.mass[:, block], on_image.sum(-1), atol=1e-5)
        placed = torch.from_numpy(sum_onto_grid(on_image.numpy(), parts, place)).flatten(-2).float()
        assert torch.allclose(seen.attention[:, block], placed, atol=1e-5)


def test_alignment_is_that_of_the_analysis(tmp_path: Path) -> None:
    folder = build("llava", tmp_path / "llava")
    run = run_analysis("cknna", folder, vfm=["efficientnet-lite0"], null=100, limit=2, data="shapes:val")
    mllm, vfm = MLLM.load(str(folder), validate=False), load_vfm("efficientnet-lite0")
    table = run.tables["per_image"]
    scene = load_data("shapes:val", limit=2).scenes[1][0]
    seen = look(mllm, scene.image, QUESTION)
    aligned = aligned_with(seen, vfm_patches(vfm, scene.image, seen.place))
    assert not isinstance(aligned, str)
    theirs = table[table["image_id"] == scene.image_id].sort_values("layer")
    column = "score" if "score" in theirs else "cknna"
    assert list(aligned.scores) == pytest.approx(theirs[column].tolist(), abs=2e-3)  # hidden states are in float16
    assert len(aligned.chance) == 5
    assert max(map(abs, aligned.chance)) < 0.9


def test_a_vfm_sees_the_part_of_a_turned_photo_that_the_model_sees(mllm: MLLM) -> None:
    """A phone stores a photo as its sensor lies, with a tag that says how to turn it."""
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 90, 3), dtype=np.uint8))
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[274] = 6  # turn it by 90 degrees clockwise to see it upright
    vfm = load_vfm("efficientnet-lite0")
    patches = []
    for photo in (upright, turned):
        (place,) = mllm.visual_tokens(mllm.encode([photo], [QUESTION]))[0]
        assert place.box[0] > 0.2  # the center of a wide image
        patches.append(vfm_patches(vfm, photo, place))
    assert torch.equal(*patches)


def test_an_image_with_too_few_patches_has_no_alignment(seen: Look) -> None:
    few = replace(seen, hidden=seen.hidden[:, :5], attention=seen.attention[..., :5], words=None)
    assert aligned_with(few, torch.randn(5, 8)) == "5 visual tokens, expected at least 11 with k 10"


# --- changes --------------------------------------------------------------------------------------


def test_a_change_is_the_edit_of_the_same_tokens(mllm: MLLM, sample: Sample, seen: Look) -> None:
    region = (0.0, 0.0, 0.5, 0.5)
    reply = ask_again(mllm, sample, Change("mean", region, at=1))
    batch = mllm.encode([sample.image], [sample.question])
    chosen = inside(mllm.visual_tokens(batch)[0], region)
    assert reply.tokens == int(chosen.sum()) > 0

    def by_hand(values: torch.Tensor, _: int) -> torch.Tensor:
        new = values.clone()
        new[chosen] = values[~chosen].mean(0)
        return new

    sums = []
    for option in OPTIONS:
        ids = mllm.answer_ids(option)
        logits = edit(mllm, mllm.continued(batch, [ids]), at=1, fn=by_hand, keep=len(ids) + 1)[0].log_softmax(-1)
        sums.append(sum(float(logits[number, token]) for number, token in enumerate(ids)))
    assert list(reply.options.values()) == pytest.approx(torch.tensor(sums).softmax(0).tolist(), abs=1e-4)
    assert reply.options != seen.options


def test_what_nothing_reads_changes_nothing(mllm: MLLM, sample: Sample, seen: Look) -> None:
    for kind in ("mean", "permute"):
        reply = ask_again(mllm, sample, Change(kind, at=mllm.n_layers), max_new_tokens=3)
        assert reply.answer == seen.answer
        assert list(reply.options.values()) == pytest.approx(list(seen.options.values()), abs=1e-5)
        deeper = ask_again(mllm, sample, Change(kind, at="encoder"))
        assert list(deeper.options.values()) != pytest.approx(list(seen.options.values()), abs=1e-5)


def test_changed_tokens() -> None:
    values, chosen = torch.arange(12.0).view(6, 2), torch.tensor([True, False, True, True, False, False])
    mean = changed_tokens(values, chosen, Change("mean"))
    assert torch.equal(mean[~chosen], values[~chosen])
    assert (mean[chosen] == values[[1, 4, 5]].mean(0)).all()
    everything = changed_tokens(values, torch.ones(6, dtype=torch.bool), Change("mean"))
    assert (everything == values.mean(0)).all()
    permuted = changed_tokens(values, chosen, Change("permute", seed=1))
    assert torch.equal(permuted[~chosen], values[~chosen])
    assert sorted(permuted[chosen].tolist()) == values[chosen].tolist()
    whole = [changed_tokens(values, torch.ones(6, dtype=torch.bool), Change("permute", seed=s)) for s in (0, 0, 1)]
    assert torch.equal(whole[0], whole[1])
    assert not torch.equal(whole[0], whole[2])


def test_paint_changes_the_region_alone(mllm: MLLM, sample: Sample, image: Image.Image) -> None:
    before, after = np.asarray(image), np.asarray(paint(image, (0.5, 0.0, 1.0, 0.25)))
    assert (after[:15, 45:] == before[15:].mean((0, 1)).round() * 0 + after[0, 50]).all()
    outside = np.ones((60, 90), dtype=bool)
    outside[:15, 45:] = False
    assert (after[outside] == before[outside]).all()
    assert after[0, 50].tolist() == before[outside].mean(0).round().tolist()
    reply = ask_again(mllm, sample, Change("paint", (0.5, 0.0, 1.0, 0.25)))
    again = look(mllm, Image.fromarray(after), QUESTION, options=OPTIONS)
    assert (reply.answer, reply.options) == (again.answer, pytest.approx(again.options, abs=1e-6))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (Change("mean", (0.01, 0.01, 0.02, 0.02)), "has no visual token"),
        (Change("paint", (0.0, 0.0, 1.0, 1.0)), "has all pixels of the image"),
        (Change("paint", (0.0, 0.0, 0.001, 1.0)), "has no pixel of the image"),
        (Change("permute", at=77), "layer 77 does not exist"),
    ],
)
def test_changes_that_cannot_be(mllm: MLLM, sample: Sample, change: Change, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ask_again(mllm, sample, change)


def test_a_region_has_the_patches_whose_center_is_in_it() -> None:
    parts = [VisualTokens(torch.arange(2), None, WHOLE), VisualTokens(torch.arange(16), (4, 4), WHOLE)]
    assert inside(parts, (0.0, 0.0, 0.5, 0.5)).nonzero().flatten().tolist() == [2, 3, 6, 7]
    assert inside(parts, WHOLE).tolist() == [False] * 2 + [True] * 16
