"""Every family, on small models with the real processor classes: positions, pixels, hidden states, attention rows,
edits, answers; and planted faults."""

from __future__ import annotations

import dataclasses
import gc
import inspect
import itertools
import json
import shutil
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.tiny import BUILDERS, SIZES, VISION, WORDS, build, randomize
from workbench.capture.attention import attention
from workbench.capture.edit import edit, editing
from workbench.capture.hidden_states import read
from workbench.errors import ConfigError, ModelError
from workbench.mllm import FAMILIES, MLLM, Batch, VisualTokens
from workbench.mllm.family import WHOLE, Family
from workbench.mllm.validate import PAINTED, _target, validate
from workbench.spatial.vfm_patches import covered_pixels

QUESTION = "what is this ?"
THIN = [(400, 40), (40, 400), (223, 301), (56, 56), (1, 90)]
TILED = ("llava_next", "llava_onevision", "internvl", "smolvlm", "idefics3")


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


LOADED: dict[str, MLLM] = {}


@pytest.fixture(params=list(BUILDERS))
def mllm(request: pytest.FixtureRequest, folders: Path) -> MLLM:
    """A model of each family, loaded with its validation."""
    if request.param not in LOADED:
        LOADED[request.param] = MLLM.load(str(build(request.param, folders / request.param)))
    return LOADED[request.param]


def picture(seed: int, size: tuple[int, int] = (90, 60)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def mixed(mllm: MLLM, side: str = "left") -> Batch:
    """Different sizes and question lengths, padded on one side; not every processor asks its tokenizer for the side, so
    it is passed on."""
    questions = [QUESTION, "what color is the dog ?", "yes"]
    pictures = tuple((image,) for image in (picture(0), picture(1, (40, 120)), picture(2, (64, 64))))
    batch = mllm.process(pictures, [mllm.prompt(question) for question in questions], questions, padding_side=side)
    assert bool(batch.inputs["attention_mask"][:, -1].all()) == (side == "left")
    return batch


def test_grids_and_boxes_fill_the_image(mllm: MLLM) -> None:
    for size in THIN:
        if size == (1, 90) and mllm.family.name.startswith(("qwen", "llava_next", "llava_onevision")):
            continue  # below
        batch = mllm.encode([picture(0, size)], [QUESTION])
        (parts,) = mllm.visual_tokens(batch)
        special = int((batch.inputs["input_ids"] == mllm.config.image_token_id).sum()) - sum(
            len(part.index) for part in parts
        )
        assert special == sum(part.grid[0] for part in parts[1:] if part.grid) * ("llava_" in mllm.family.name)
        for part in parts:
            assert part.grid is not None
            assert part.grid[0] * part.grid[1] == len(part.index)
            left, top, right, bottom = part.box
            assert left < right
            assert top < bottom


@pytest.mark.parametrize("size", [(400, 40), (40, 400), (223, 301), (120, 120)])
def test_painting_a_cell_moves_its_token_in_thin_and_square_images(mllm: MLLM, size: tuple[int, int]) -> None:
    validate(mllm, size)


def test_read_equals_transformers(mllm: MLLM) -> None:
    for side in ("left", "right"):
        batch = mixed(mllm, side)
        with torch.inference_mode():
            theirs = mllm.model(**batch.inputs, output_hidden_states=True).hidden_states
        assert len(theirs) == mllm.n_layers + 1
        for tokens in ("visual", "all"):
            for row, ours in enumerate(read(mllm, batch, tokens=tokens)):  # type: ignore[arg-type]
                expected = (
                    torch.cat([p.index for p in mllm.visual_tokens(batch)[row]]) if tokens == "visual" else ours.tokens
                )
                assert torch.equal(ours.tokens, expected)
                for layer in range(mllm.n_layers):
                    if layer and layer <= mllm.family.injected_blocks(mllm.config) and tokens == "visual":
                        continue  # transformers records these after encoder features were added
                    assert torch.allclose(ours.values[layer], theirs[layer][row, ours.tokens], atol=1e-6), (
                        layer,
                        tokens,
                    )
                with torch.inference_mode():
                    assert torch.allclose(mllm.decoder.norm(ours.values[-1]), theirs[-1][row, ours.tokens], atol=1e-4)
        for row, ours in enumerate(read(mllm, batch, layers=[mllm.n_layers, 0], final_norm=True)):
            assert torch.allclose(ours.values[0], theirs[-1][row, ours.tokens], atol=1e-6)
            assert torch.allclose(ours.values[1], theirs[0][row, ours.tokens], atol=1e-6)


def test_batches_paddings_and_companions_change_nothing(mllm: MLLM) -> None:
    batch = mixed(mllm)
    together = read(mllm, batch)
    for row in range(len(batch)):
        alone = read(mllm, mllm.encode([batch.images[row]], [batch.prompts[row]]))[0]
        assert torch.allclose(together[row].values, alone.values, atol=2e-4)


def test_several_images_and_none(mllm: MLLM) -> None:
    two = mllm.encode([[picture(0), picture(1, (40, 120))], [picture(2)]], [QUESTION, "yes"])
    found = mllm.visual_tokens(two)
    assert {part.image for part in found[0]} == {0, 1}
    assert {part.image for part in found[1]} == {0}
    for before, after in zip(found[0], found[0][1:], strict=False):
        assert before.index.max() < after.index.min()
    hidden = read(mllm, two, layers=[0])
    if mllm.family.name != "llava_onevision":  # there a second image changes how the first is cut
        first = read(mllm, mllm.encode([picture(0)], [QUESTION]), layers=[0])[0].values
        assert torch.allclose(hidden[0].values[:, : first.shape[1]], first, atol=1e-5)
    if mllm.family.name == "paligemma":
        with pytest.raises(ModelError, match="its processor cannot take a prompt without an image here"):
            mllm.encode([[]], [QUESTION])
        return
    text = mllm.encode([[]], [QUESTION])
    assert mllm.visual_tokens(text) == [[]]
    assert read(mllm, text)[0].values.shape[1] == 0
    assert len(mllm.generate(text, max_new_tokens=2)) == 1
    both = mllm.encode([[], [picture(2)]], ["yes", "yes"])
    assert mllm.visual_tokens(both)[0] == []
    assert torch.allclose(read(mllm, both, layers=[0])[1].values, hidden[1].values, atol=1e-5)


def test_attention_rows_equal_eager(mllm: MLLM) -> None:
    for side in ("left", "right"):
        batch = mixed(mllm, side)
        mask = batch.inputs["attention_mask"].bool()
        kept = [row.nonzero().flatten() for row in mask]
        rows = [[int(own[-1]), int(own[len(own) // 2]), int(own[-3])] for own in kept]
        before = mllm.config.get_text_config()._attn_implementation
        mllm.model.set_attn_implementation("eager")
        with torch.inference_mode():
            theirs = mllm.model(**batch.inputs, output_attentions=True).attentions
        mllm.model.set_attn_implementation(before)
        for block, ours in enumerate(attention(mllm, batch, rows=rows)):
            assert torch.allclose(ours.sum(-1), torch.ones(ours.shape[:-1]), atol=1e-5)
            for sample, own in enumerate(rows):
                expected = theirs[block][sample][:, own]
                assert (ours[sample] - expected).abs().max() < 1e-5, (side, block, sample)
    few = (
        list(attention(mllm, batch, rows=[[-1]] * 3, layers=[3])) if batch.inputs["attention_mask"][:, -1].all() else []
    )
    assert all(part.shape[2] == 1 for part in few)


def test_edits_are_what_they_say(mllm: MLLM) -> None:
    """Nothing changed is nothing changed; another image's features, at the tower or at any layer, are that image."""
    one, other = (mllm.encode([picture(seed)], [QUESTION]) for seed in (0, 1))
    with torch.inference_mode():
        plain, swapped = (mllm.model(**batch.inputs).logits[:, -1:].float() for batch in (one, other))
    clean = mllm.family.injected_blocks(mllm.config) + 1 if mllm.family.injected_blocks(mllm.config) else 0
    for layer in range(clean, mllm.n_layers + 1):
        assert torch.allclose(edit(mllm, one, at=layer, fn=lambda v, _: v), plain, atol=1e-5)
    with torch.inference_mode():
        # the wrapped model still runs as before
        assert torch.allclose(mllm.model(**one.inputs).logits[:, -1:].float(), plain, atol=1e-6)
    if clean:
        with pytest.raises(
            ModelError,
            match=r"qwen3_vl adds encoder features to the outputs of its first 2 blocks.*expected a layer from 3 to 4",
        ):
            edit(mllm, one, at="encoder", fn=lambda v, _: v)
        return
    target = read(mllm, other, encoder=True)[0]
    assert target.encoder_features is not None
    assert torch.allclose(edit(mllm, one, at="encoder", fn=lambda v, _: target.encoder_features), swapped, atol=1e-4)
    assert torch.allclose(edit(mllm, one, at="projector", fn=lambda v, _: target.values[0]), swapped, atol=1e-4)
    shuffled = edit(mllm, one, at="projector", fn=lambda v, _: v.flip(0))
    assert (shuffled - plain).abs().max() > 1e-4
    with pytest.raises(ModelError, match="an edit returned visual tokens of shape"):
        edit(mllm, one, at=1, fn=lambda v, _: v[:1])


@pytest.mark.parametrize("side", ["left", "right"])
def test_edits_give_the_last_tokens_on_either_side_of_the_padding(mllm: MLLM, side: str) -> None:
    """Logits of the last tokens of prompts of different lengths, as of each prompt alone."""
    batch = mixed(mllm, side)
    lengths = batch.inputs["attention_mask"].sum(1)
    assert len(lengths.unique()) > 1
    layer, keep = mllm.n_layers - 1, 3
    together = edit(mllm, batch, at=layer, fn=lambda v, _: v.flip(0), keep=keep)
    for row in range(len(batch)):
        one = mllm.encode([batch.images[row]], [batch.prompts[row]])
        assert torch.allclose(
            together[row], edit(mllm, one, at=layer, fn=lambda v, _: v.flip(0), keep=keep)[0], atol=1e-3
        )
        with torch.inference_mode():
            plain = mllm.model(**one.inputs).logits[0, -keep:].float()
        assert torch.allclose(edit(mllm, one, at=layer, fn=lambda v, _: v, keep=keep)[0], plain, atol=1e-4)
    assert torch.allclose(edit(mllm, batch, at=layer, fn=lambda v, _: v.flip(0)), together[:, -1:], atol=1e-4)
    for number in (0, int(lengths.min()) + 1):
        with pytest.raises(
            ConfigError,
            match=rf"keep is {number}: expected 1 to {int(lengths.min())}, the number of tokens of the shortest prompt",
        ):
            edit(mllm, batch, at=layer, fn=lambda v, _: v, keep=number)


def test_edits_from_two_threads_do_not_mix(mllm: MLLM) -> None:
    """Traces of one model must not overlap; the lock of the model sees to it."""
    layer = mllm.n_layers - 1
    batches = [mllm.encode([picture(seed)], [QUESTION]) for seed in range(4)]
    alone = [edit(mllm, batch, at=layer, fn=lambda v, _: v.flip(0)) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda batch: edit(mllm, batch, at=layer, fn=lambda v, _: v.flip(0)), batches))
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def test_a_continued_prompt_scores_what_decoding_step_by_step_scores(mllm: MLLM) -> None:
    """An independent oracle: transformers' own cached decoding, one token after another."""
    batch = mllm.encode([picture(0)], [QUESTION])
    with torch.inference_mode():
        # a placeholder in the answer is no answer
        special = [i for token, i in mllm.processor.tokenizer.get_vocab().items() if token not in WORDS]
        wanted = {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": special}
        steps = mllm.model.generate(**batch.inputs, **wanted, output_logits=True, return_dict_in_generate=True)
    ids = steps.sequences[0, batch.inputs["input_ids"].shape[1] :].tolist()
    expected = torch.stack(
        [logits[0].float().log_softmax(-1)[token] for logits, token in zip(steps.logits, ids, strict=True)]
    )
    batch = mllm.continued(batch, [ids])
    with torch.inference_mode():
        logprobs = mllm.model(**batch.inputs).logits[0, -len(ids) - 1 : -1].float().log_softmax(-1)
    assert torch.allclose(logprobs.gather(1, torch.tensor([ids]).T)[:, 0], expected, atol=1e-4)


# --- planted faults: each is caught, and named ----------------------------------------------------


def with_family(mllm: MLLM, change: Any) -> MLLM:
    """The same model under a family whose answer is changed."""
    right = mllm.family.visual_tokens

    def wrong(*given: Any) -> list[list[VisualTokens]]:
        return [change(sample) for sample in right(*given)]

    family: Family = dataclasses.replace(mllm.family, visual_tokens=wrong)
    return MLLM(mllm.model, mllm.processor, family, mllm.name)


def _each(change: Any) -> Any:
    return lambda sample: [change(part) for part in sample]


def _columns_first(part: VisualTokens) -> VisualTokens:
    rows, columns = part.grid or (1, 1)
    order = (
        torch.arange(rows * columns).view(rows, columns).T.flatten()
        if rows == columns
        else torch.arange(rows * columns).view(columns, rows).T.flatten()
    )
    return dataclasses.replace(part, index=part.index[order], rows=None if part.rows is None else part.rows[order])


FAULTS: dict[str, tuple[Any, str]] = {
    "one position late": (
        _each(lambda p: dataclasses.replace(p, index=p.index + 1)),
        "is wrong about positions.*off by \\+1|leaves out",
    ),
    "one position early": (
        _each(lambda p: dataclasses.replace(p, index=p.index - 1)),
        "is wrong about positions.*off by -1",
    ),
    "columns before rows": (
        _each(_columns_first),
        "painting token .*(rows and columns look exchanged|most at token|grid looks like)",
    ),
    "a token twice": (
        _each(lambda p: dataclasses.replace(p, index=torch.cat([p.index[:1], p.index[:-1]]))),
        "gives some visual tokens of sample 0 twice",
    ),
    "a grid too large": (
        _each(lambda p: dataclasses.replace(p, grid=(p.grid[0] + 1, p.grid[1]))),
        "gives a grid ",
    ),
    "no tokens": (lambda sample: [], "finds no visual tokens"),
    "one column off": (
        _each(lambda p: dataclasses.replace(p, index=p.index.roll(1), rows=None if p.rows is None else p.rows.roll(1))),
        "painting token|looks shifted",
    ),
    "upside down": (
        _each(lambda p: dataclasses.replace(p, index=p.index.flip(0), rows=None if p.rows is None else p.rows.flip(0))),
        "painting token",
    ),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_wrong_family_is_caught(mllm: MLLM, fault: str) -> None:
    change, message = FAULTS[fault]
    with pytest.raises(ModelError, match=message):
        validate(with_family(mllm, change))


def test_a_grid_with_its_sides_exchanged_is_caught(mllm: MLLM) -> None:
    if all(
        part.grid and part.grid[0] == part.grid[1]
        for part in mllm.visual_tokens(mllm.encode([picture(0, (400, 300))], [QUESTION]))[0]
    ):
        pytest.skip("square rasters")
    with pytest.raises(ModelError, match=r"the grid looks like \(|most at token|rows and columns look exchanged"):
        validate(with_family(mllm, _each(lambda p: dataclasses.replace(p, grid=p.grid[::-1]))))


def test_exchanged_tiles_are_caught(mllm: MLLM) -> None:
    def exchange(sample: list[VisualTokens]) -> list[VisualTokens]:
        first, second = sample[0], sample[1]
        return [dataclasses.replace(first, box=second.box), dataclasses.replace(second, box=first.box), *sample[2:]]

    if mllm.name.split("/")[-1] not in ("internvl", "smolvlm", "idefics3"):
        pytest.skip("no tiles")
    with pytest.raises(ModelError, match="grids 0 and 1 look exchanged"):
        validate(with_family(mllm, exchange))


@pytest.mark.parametrize("side", [8, 9, 12, 13, 16, 24])
def test_no_two_tiles_are_painted_alike(side: int) -> None:
    """Rasters painted at the same cells three times over could be exchanged unseen."""
    parts = [VisualTokens(torch.arange(side * side), (side, side), WHOLE) for _ in range(13)]
    painted = [[_target(part, number, attempt) for attempt in range(PAINTED)] for number, part in enumerate(parts)]
    assert all(
        sum(a == b for a, b in zip(one, other, strict=True)) < PAINTED
        for one, other in itertools.combinations(painted, 2)
    )


def test_a_fine_raster_that_is_one_column_off_is_caught(tmp_path: Path) -> None:
    """LLaVA-1.5's own 24 x 24 tokens, where a painted cell is close to its neighbours."""
    torch.manual_seed(0)
    _, processor = BUILDERS["llava"]()
    processor.image_processor = tf.CLIPImageProcessor(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
    )
    vision = tf.CLIPVisionConfig(**VISION, image_size=336, patch_size=14)
    config = tf.LlavaConfig(
        vision_config=vision,
        text_config=tf.LlamaConfig(**SIZES, vocab_size=40),
        image_token_index=processor.image_token_id,
    )
    model = MLLM(randomize(tf.LlavaForConditionalGeneration(config)), processor, FAMILIES.get("llava"), "fine")
    validate(model)
    with pytest.raises(ModelError, match=r"painting token|looks shifted"):
        validate(with_family(model, FAULTS["one column off"][0]))
    moved = _each(lambda p: dataclasses.replace(p, box=(p.box[0] + 1 / 24, p.box[1], p.box[2] + 1 / 24, p.box[3])))
    with pytest.raises(ModelError, match=r"painting token|looks shifted"):
        validate(with_family(model, moved))


def test_values_that_are_not_finite_are_named(mllm: MLLM) -> None:
    handle = mllm.decoder.layers[-1].register_forward_hook(lambda _, __, output: output * float("inf"))
    try:
        with pytest.raises(ModelError, match=r"computes values that are not finite in torch\.float32"):
            validate(mllm)
    finally:
        handle.remove()


# --- prompts and pixels ---------------------------------------------------------------------------


def test_a_prompt_begins_once(mllm: MLLM) -> None:
    """A template that writes BOS and a tokenizer that adds it give one together, as transformers' own path does."""
    batch = mllm.encode([picture(0)], [QUESTION])
    ids = batch.inputs["input_ids"][0]
    wanted = mllm.family.name == "gemma3" or mllm.name.endswith(("idefics3", "smolvlm", "llava_siglip"))
    assert int((ids == mllm.processor.tokenizer.bos_token_id).sum()) == wanted or mllm.family.name == "paligemma"
    if mllm.processor.chat_template is not None and not mllm.name.endswith("llava_siglip"):
        content = [{"type": "image", "image": picture(0)}, {"type": "text", "text": QUESTION}]
        theirs = mllm.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        assert torch.equal(ids, theirs["input_ids"][0])


def test_a_template_that_only_the_tokenizer_has_is_used(folders: Path, tmp_path: Path) -> None:
    source = folders / "llava" if (folders / "llava").exists() else build("llava", folders / "llava")
    shutil.copytree(source, tmp_path / "old")
    template = (tmp_path / "old" / "chat_template.jinja").read_text()
    (tmp_path / "old" / "chat_template.jinja").unlink()
    file = tmp_path / "old" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
    old, new = MLLM.load(str(tmp_path / "old")), MLLM.load(str(source))
    assert old.prompt(QUESTION) == new.prompt(QUESTION)
    assert "Assistant" in old.prompt(QUESTION)


def test_pixels_that_belong_to_no_patch_belong_to_no_token(folders: Path) -> None:
    """66 pixels in patches of 14: the last ten are never seen, and no cell claims them."""
    siglip = MLLM.load(str(build("llava_siglip", folders / "siglip")))
    batch = siglip.encode([picture(0, (66, 66))], [QUESTION])
    (part,) = siglip.visual_tokens(batch)[0]
    assert part.grid == (4, 4)
    assert part.box == pytest.approx((0, 0, 56 / 66, 56 / 66))
    edge = picture(0, (66, 66))
    edge.paste((255, 0, 0), (57, 0, 66, 66))
    assert torch.equal(
        read(siglip, batch, layers=[0])[0].values, read(siglip, siglip.encode([edge], [QUESTION]), layers=[0])[0].values
    )
    onevision = MLLM.load(str(build("llava_onevision", folders / "onevision")))
    batch = onevision.encode([picture(0, (60, 120))], [QUESTION])
    fine = onevision.visual_tokens(batch)[0][1]
    assert fine.grid == (8, 4)
    assert fine.token_box(0, 0) == pytest.approx((0, 0, 14 / 60, 14 / 120))
    # the second tile begins at pixel 60, not at 56
    assert fine.token_box(4, 3) == pytest.approx((42 / 60, 60 / 120, 56 / 60, 74 / 120))
    assert fine.box == pytest.approx((0, 0, 56 / 60, 116 / 120))


@pytest.mark.parametrize("size", [(80, 40), (37, 91), (56, 56)])
def test_a_vfm_is_shown_the_bars_that_a_padded_image_gets(size: tuple[int, int], folders: Path) -> None:
    """The covered pixels, which are a square and need no bars, become the very numbers that the tower is given; black
    bars would not."""
    padded = MLLM.load(str(build("llava_padded", folders / "padded")))
    shown = picture(0, size)
    batch = padded.encode([shown], [QUESTION])
    (raster,) = padded.visual_tokens(batch)[0]
    covered = covered_pixels(shown, raster)
    assert torch.equal(padded.encode([covered], [QUESTION]).inputs["pixel_values"], batch.inputs["pixel_values"])
    black = covered_pixels(shown, dataclasses.replace(raster, fill=(0, 0, 0)))
    assert torch.equal(padded.encode([black], [QUESTION]).inputs["pixel_values"], batch.inputs["pixel_values"]) == (
        size[0] == size[1]
    )


def test_an_image_so_thin_that_all_of_it_is_dropped_has_no_raster(folders: Path) -> None:
    following = MLLM.load(str(build("llava_next", folders / "next")))
    (parts,) = following.visual_tokens(following.encode([picture(0, (15, 706))], [QUESTION]))
    assert [part.grid for part in parts] == [(4, 4)]


def test_edits_leave_samples_without_images_alone(mllm: MLLM) -> None:
    if mllm.family.name == "paligemma":
        pytest.skip("it takes no prompt without an image")
    both = mllm.encode([[], [picture(0)]], ["yes", QUESTION])
    with torch.inference_mode():
        plain = mllm.model(**both.inputs).logits[:, -1:].float()
    changed = edit(mllm, both, at=mllm.n_layers - 1, fn=lambda v, _: v.flip(0))
    assert torch.allclose(changed[0], plain[0], atol=1e-5)
    assert (changed[1] - plain[1]).abs().max() > 1e-4
    with pytest.raises(ModelError, match="no sample of the batch has an image"):
        edit(mllm, mllm.encode([[]], ["yes"]), at=mllm.n_layers, fn=lambda v, _: v)


@pytest.mark.slow
def test_an_edited_model_can_be_forgotten(tmp_path: Path) -> None:
    model = MLLM.load(str(build("llava", tmp_path / "llava")))
    edit(model, model.encode([picture(0)], [QUESTION]), at=1, fn=lambda v, _: v)
    gone = weakref.ref(model.model)
    del model
    gc.collect()
    assert gone() is None


# --- bad input ------------------------------------------------------------------------------------


def test_placeholders_come_from_images_only(mllm: MLLM) -> None:
    for place in (
        mllm.processor.image_token,
        mllm.processor.tokenizer.convert_ids_to_tokens(mllm.config.image_token_id),
    ):
        with pytest.raises(ModelError, match="this model's image placeholder"):
            mllm.encode([picture(0)], [f"what is {place} this ?"])
    with pytest.raises(ModelError, match=r"the option contains .* this model's image placeholder"):
        mllm.answer_ids(f"a {place} cat")
    with pytest.raises(ModelError, match="2 entries of images for 1 prompts"):
        mllm.encode([picture(0)] * 2, [QUESTION])


def test_a_line_of_pixels_is_refused_or_known(mllm: MLLM) -> None:
    """1 x 10,000 pixels: either one sentence, or tokens whose grid is right."""
    try:
        batch = mllm.encode([picture(0, (1, 10_000))], [QUESTION])
    except ModelError as error:
        assert "cannot take images of 1 x 10000 px" in str(error)
        return
    assert mllm.visual_tokens(batch)[0]


def test_modes_of_pictures_are_read_alike(mllm: MLLM) -> None:
    grey = picture(0).convert("L")
    for mode in ("L", "CMYK", "P"):
        batch = mllm.encode([grey.convert(mode)], [QUESTION])
        assert torch.isfinite(read(mllm, batch, layers=[0])[0].values).all()


def test_rows_that_cannot_be_read_are_one_sentence(mllm: MLLM) -> None:
    batch = mixed(mllm)
    length = batch.inputs["input_ids"].shape[1]
    for outside in (length, -length - 1, 10_000):
        with pytest.raises(
            ConfigError, match=rf"row -?\d+ is outside the sequence: expected {-length} to {length - 1}"
        ):
            attention(mllm, batch, rows=[[outside]] * 3)
    padded = int(batch.inputs["attention_mask"].sum(1).argmin())
    rows = [[-1], [-1], [-1]]
    rows[padded] = [0]
    with pytest.raises(ConfigError, match="is padding"):
        attention(mllm, batch, rows=rows)
    with pytest.raises(ConfigError, match="layer 0 does not exist"):
        attention(mllm, batch, rows=[[-1]] * 3, layers=[0])
    with pytest.raises(ConfigError, match="site 'connector' does not exist"):
        edit(mllm, batch, at="connector", fn=lambda v, _: v)  # type: ignore[arg-type]


def broken(folders: Path, tmp_path: Path, change: Any) -> str:
    """A copy of the LLaVA folder with other tensors."""
    source = folders / "llava"
    if not source.exists():
        build("llava", source)
    target = tmp_path / "broken"
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return str(target)


CHECKPOINTS: dict[str, tuple[Any, str]] = {
    "missing": (
        lambda t: t.pop("multi_modal_projector.linear_1.weight"),
        "the checkpoint lacks 1 tensors, first .*linear_1.weight",
    ),
    "extra": (
        lambda t: t.update({"adapter.weight": torch.zeros(2)}),
        "the model has no place for 1 tensors, first .*adapter.weight",
    ),
    "mis-shaped": (
        lambda t: t.update({"multi_modal_projector.linear_1.bias": torch.zeros(2)}),
        "has other shapes|could not be loaded .*shape|mismatch",
    ),
}


@pytest.mark.parametrize("fault", list(CHECKPOINTS))
def test_a_checkpoint_that_does_not_fit_is_refused(folders: Path, tmp_path: Path, fault: str) -> None:
    change, message = CHECKPOINTS[fault]
    with pytest.raises(ModelError, match=message):
        MLLM.load(broken(folders, tmp_path, change))


def test_foreign_code_and_imageless_models_are_refused(folders: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text(
        '{"model_type": "strange", "architectures": ["Strange"], "auto_map": {"AutoConfig": "code.StrangeConfig"}}'
    )
    (foreign / "code.py").write_text("raise SystemExit('this must not run')")
    with pytest.raises(ModelError, match="brings code of its own: set trust_remote_code"):
        MLLM.load(str(foreign))
    (foreign / "config.json").write_text(
        '{"model_type": "mllama", "architectures": ["MllamaForConditionalGeneration"]}'
    )
    with pytest.raises(ModelError, match=r"MllamaForConditionalGeneration cannot be probed: .* cross-attention"):
        MLLM.load(str(foreign))
    (foreign / "config.json").write_text('{"model_type": "blip-2", "architectures": ["Blip2ForConditionalGeneration"]}')
    with pytest.raises(ModelError, match="Q-Former"):
        MLLM.load(str(foreign))


def test_every_argument_is_one_that_the_forward_pass_knows(mllm: MLLM) -> None:
    """transformers ignores an unknown argument in silence; one of pixels would leave a blind model."""
    beside = {"collect_rows", "return_dict"}  # the first reaches our attention function, a decorator takes the second
    parts = (mllm.model, mllm.model.model, mllm.decoder)
    known = [set(inspect.signature(type(part).forward).parameters) for part in parts]
    passed: set[str] = set()
    hooks = [
        part.register_forward_pre_hook(lambda _, __, arguments: passed.update(arguments), with_kwargs=True)
        for part in (mllm.model, mllm.decoder)
    ]
    batch = mixed(mllm)
    read(mllm, batch)
    attention(mllm, batch, rows=[[-1]] * 3)
    edit(mllm, batch, at=mllm.n_layers, fn=lambda values, _: values)
    mllm.generate(batch, max_new_tokens=2)
    for hook in hooks:
        hook.remove()
    assert {"input_ids", "pixel_values"} <= passed
    assert passed - beside <= set.union(*known)


def test_a_capped_paligemma_is_capped_or_refused(tmp_path: Path) -> None:
    """PaliGemma 2 was trained with capped logits; transformers before 5.23 leaves out the cap."""
    folder = build("paligemma", tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["final_logit_softcapping"] = 0.1
    (folder / "config.json").write_text(json.dumps(config))
    try:
        mllm = MLLM.load(str(folder))
    except ModelError as error:
        assert "caps its logits at 0.1, which transformers" in str(error)
        return
    with torch.inference_mode():
        logits = mllm.model(**mllm.encode([picture(0)], [QUESTION]).inputs).logits
    assert logits.abs().max() <= 0.1


def test_capped_attention_is_refused(folders: Path) -> None:
    """Soft-capped scores cannot be had from sdpa, so they are refused and not approximated."""
    model = (
        MLLM.load(str(folders / "gemma3"))
        if (folders / "gemma3").exists()
        else MLLM.load(str(build("gemma3", folders / "gemma3")))
    )
    model.config.get_text_config().attn_logit_softcapping = 50.0
    with pytest.raises(ModelError, match=r"caps its attention scores \(attn_logit_softcapping 50.0\)"):
        attention(model, mixed(model), rows=[[-1]] * 3)


def test_an_interpolated_raster_has_no_encoder_rows(folders: Path) -> None:
    """OneVision shrinks a raster of too many tiles; such a token is no row of the tower's output, and nothing pretends
    that it is."""
    model = MLLM.load(
        str(
            folders / "llava_onevision"
            if (folders / "llava_onevision").exists()
            else build("llava_onevision", folders / "llava_onevision")
        )
    )
    batch = model.encode([picture(0, (400, 300))], [QUESTION])
    assert model.visual_tokens(batch)[0][1].rows is not None
    assert (model.visual_tokens(batch)[0][1].rows == -1).all()
    with pytest.raises(ModelError, match="its tokens mix several encoder features"):
        read(model, batch, encoder=True)
    with pytest.raises(ModelError, match="its tokens mix several encoder features"):
        edit(model, batch, at="encoder", fn=lambda v, _: v)
    assert edit(model, batch, at=1, fn=lambda v, _: v).shape[0] == 1


def test_an_answer_ends_where_the_model_ends_it(folders: Path) -> None:
    """In a batch, an answer that ends early is filled up; and a model may end answers with a token that its tokenizer
    takes for a word."""
    model = MLLM.load(str(build("llava", folders / "ends")))
    images, questions = [picture(number) for number in range(8)], [QUESTION, "what color"] * 4
    batch = model.encode(images, questions)
    lengths = [len(answer) for answer in model.generate_ids(batch, max_new_tokens=12)]
    assert min(lengths) < max(lengths) == 12
    answers = model.generate(batch, max_new_tokens=12)
    settings, word = model.model.generation_config, model.processor.tokenizer.convert_tokens_to_ids("dog")
    settings.pad_token_id = word
    assert model.generate(batch, max_new_tokens=12) == answers
    settings.eos_token_id = [settings.eos_token_id, word]
    ended = model.generate(batch, max_new_tokens=12)
    assert ended == [answer.partition("dog")[0].strip() for answer in answers] != answers
    settings.eos_token_id, settings.pad_token_id, settings.stop_strings = settings.eos_token_id[0], 0, ["dog"]
    model.processor.tokenizer.add_tokens(["abcdef"])  # transformers encodes it to learn how tokens are put together
    stopped = model.generate(batch, max_new_tokens=12)
    assert stopped == ["".join(answer.partition("dog")[:2]).strip() for answer in answers] != answers
    assert all(0 not in ids for ids in model.generate_ids(batch, max_new_tokens=12))


@pytest.mark.parametrize(
    "setting",
    [
        {"use_cache": False},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 4},
        {"return_dict_in_generate": True},
        {"prompt_lookup_num_tokens": 3},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"dola_layers": "low"},
        {"token_healing": True},
        {"max_time": 0.0},
    ],
    ids=str,
)
def test_settings_of_generation_change_no_greedy_answer(setting: dict[str, object], folders: Path) -> None:
    """Without a cache the image would be read again at each token, unchanged; with beams, a batch has other rows."""
    model = MLLM.load(str(build("llava", folders / "settings")))
    batch = model.encode([picture(number) for number in range(4)], [QUESTION, "what color"] * 2)

    def answers() -> list[str]:
        with editing(model, batch, at=2, fn=lambda tokens, sample: tokens.roll(sample, 0) * (3 - 2 * sample)):
            return model.generate(batch, max_new_tokens=8)

    plain, edited = model.generate(batch, max_new_tokens=8), answers()
    assert plain != edited
    for name, value in setting.items():
        setattr(model.model.generation_config, name, value)
    assert model.generate(batch, max_new_tokens=8) == plain
    assert answers() == edited
