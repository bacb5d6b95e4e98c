"""Attention from generated tokens and from words, on one object or two: transformers' own attention as an oracle,
planted maps, and the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from analyses.attention import ANALYSIS, MEASURES, Config
from analyses.attention import run as run_attention
from analyses.attention.measuring import batches, image_maps, image_rows
from analyses.attention.positions import with_positions, word_ends
from analyses.attention.questions import SINGLE_MEASURES, Question
from tests.conftest import refused, run
from tests.tiny import BUILDERS, build
from workbench import runs
from workbench.analysis.chunks import Chunk
from workbench.analysis.declaration import Context
from workbench.data import Dataset, Object, Sample, load_data, named_objects
from workbench.errors import DataError, UnknownNameError
from workbench.metrics.attention import entropies, pointing, renormalized
from workbench.mllm import MLLM, Batch, VisualTokens
from workbench.spatial.grids import canvas, object_coverage, sum_onto_grid, union_coverage

QUESTIONS = ("what is this ?", "is the red dog left of the red cat ?")


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("attention_positions")


@pytest.fixture(scope="module")
def mllm(runs_folder: Path) -> MLLM:
    return MLLM.load(str(runs_folder / "viral"), validate=False)


def tiny(name: str, folders: Path) -> MLLM:
    return MLLM.load(str(folders / name if (folders / name).exists() else build(name, folders / name)), validate=False)


def noise_image(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (60, 90, 3), dtype=np.uint8))


def asked(questions: Sequence[str] = QUESTIONS) -> list[Question]:
    images = [noise_image(number) for number in range(len(questions))]
    return [
        Question(Sample(f"s{number}", f"i{number}", lambda image=image: image, question), ())  # type: ignore[misc]
        for number, (image, question) in enumerate(zip(images, questions, strict=True))
    ]


def context(mllm: MLLM, questions: Sequence[Question]) -> Context:
    return Context(mllm, Dataset("test", [question.sample for question in questions], "f"), batch_size=8)


# --- transformers' attentions as an oracle ----------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", list(BUILDERS))
def test_rows_of_generated_tokens_equal_those_of_generate(name: str, tiny_folders: Path) -> None:
    """The query is the generated token itself: `generate` computes its row in the step after it was chosen."""
    mllm, questions = tiny(name, tiny_folders), asked()
    not_words = {*mllm.processor.tokenizer.all_special_ids, mllm.config.image_token_id}
    mllm.model.generation_config.suppress_tokens = sorted(not_words)  # both answers are three words
    config, here = Config(localise=False, positions="generated", max_new_tokens=3), context(mllm, questions)
    placed, left_out = with_positions(config, here, questions)
    assert left_out == []
    assert [question.offsets for question in placed] == [(0, 1, 2)] * 2
    ((_, batch, positions),) = batches(here, Chunk(placed, 0, 8))
    length = batch.inputs["input_ids"].shape[1]
    layers = list(range(1, mllm.n_layers + 1))
    rows = image_rows(here, batch, positions, layers, [torch.arange(length)] * 2)
    prompts = mllm.encode([q.sample.image for q in questions], [q.sample.question for q in questions])
    mllm.model.set_attn_implementation("eager")
    with torch.inference_mode():
        output = mllm.model.generate(
            **prompts.inputs, max_new_tokens=4, do_sample=False, output_attentions=True, return_dict_in_generate=True
        )
    prompt = prompts.inputs["input_ids"].shape[1]
    assert output.sequences[:, prompt : prompt + 3].tolist() == [list(question.answer) for question in placed]
    for step in (1, 2, 3):
        for layer, theirs in zip(layers, output.attentions[step], strict=True):
            for number in (0, 1):
                keys = int(prompts.inputs["attention_mask"][number].sum()) + step
                ours = rows[number][layers.index(layer), :, step - 1, :keys]
                last = min(keys, theirs.shape[-1])  # a sliding window caches the last keys only
                assert (ours[:, -last:] - theirs[number, :, 0, -last:]).abs().max() < 1e-5, (name, step, layer)


@pytest.mark.parametrize("name", list(BUILDERS))
def test_a_word_is_found_in_the_question_and_sees_as_many_keys_as_said(name: str, tiny_folders: Path) -> None:
    mllm, questions = tiny(name, tiny_folders), asked()
    here = context(mllm, questions)
    placed, left_out = with_positions(Config(localise=False, positions="Red", max_new_tokens=1), here, questions)
    (wanted,) = [question for question in placed if question.sample.id == "s1"]
    assert len(wanted.offsets) == 2
    assert (wanted.answer, wanted.words) == ((), ("Red", " Red"))
    ((_, batch, positions),) = batches(here, Chunk([wanted], 0, 8))
    ids = batch.inputs["input_ids"][0, positions[0]].tolist()
    assert ids == mllm.processor.tokenizer.convert_tokens_to_ids(["red", "red"])
    every = torch.arange(batch.inputs["input_ids"].shape[1])
    (rows,) = image_rows(here, batch, positions, list(range(1, mllm.n_layers + 1)), [every])
    keys = (rows > 0).sum(-1).amax((0, 1))  # a layer with a sliding window sees fewer
    (maps,) = image_maps(here, batch, positions, [1], [wanted])
    (parts,) = mllm.visual_tokens(batch)
    assert maps.uniform_mass == pytest.approx(sum(len(part.index) for part in parts) / keys.numpy())
    if len(placed) == 1:
        assert left_out == ["1 of 2 questions, with no such word (Red), first s0"]


def test_words_of_the_template_are_no_words_of_the_question(tiny_folders: Path) -> None:
    mllm, questions = tiny("llava", tiny_folders), asked(("is a cat left ?", "is a dog left ?"))
    assert "Assistant" in mllm.prompt(QUESTIONS[0])
    with pytest.raises(UnknownNameError, match="unknown position 'assistant': expected one of"):
        with_positions(
            Config(localise=False, positions="assistant", max_new_tokens=1), context(mllm, questions), questions
        )


# --- words -------------------------------------------------------------------------------------------


def test_the_last_token_of_every_whole_word() -> None:
    texts = ["", " the", " the tri", " the triangle", " the triangle,", " the triangle, THE"]
    assert word_ends(texts, "triangle") == [3]
    assert word_ends(texts, "the") == [1, 5]
    assert word_ends(texts, "tri") == []
    assert word_ends(texts, "the  triangle") == [3]
    assert word_ends([], "the") == []


def test_texts_grow_token_by_token(mllm: MLLM) -> None:
    ids = mllm.processor.tokenizer("is red left", add_special_tokens=False)["input_ids"]
    assert mllm.texts_of(ids) == ["is", "is red", "is red left"]


# --- two objects -------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["shapes:val", "photos:val"])
def test_relations_name_two_objects_in_the_order_of_the_answer(spec: str) -> None:
    """The answer, which comes from the places of the objects, says which one was named first."""
    relations = 0
    for sample in load_data(spec, limit=60):
        objects = named_objects(sample, 2)
        assert (len(objects) == 2) == sample.category.startswith("relation"), sample.question
        if objects:
            axis, low = (0, "left") if sample.category == "relation_x" else (1, "above")
            first, second = ((obj.box[axis] + obj.box[axis + 2]) / 2 for obj in objects)
            assert (first < second) == (sample.answer == low)
            relations += 1
    assert relations > 100


def test_named_objects_are_unambiguous_or_stated() -> None:
    objects = tuple(Object(name, (0, 0, 1, 1)) for name in ("red star", "blue star", "blue circle", "old dog"))

    def names(question: str, count: int = 2, **fields: Any) -> list[str]:
        sample = Sample("s", "i", lambda: noise_image(0), question, objects=objects, **fields)
        return [obj.name for obj in named_objects(sample, count)]

    assert names("is red left of circle ?") == ["red star", "blue circle"]
    assert names("is the dog above the red star ?") == ["old dog", "red star"]
    assert names("is blue star left of circle ?") == ["blue star", "blue circle"]
    assert names("is star left of circle ?") == []  # two stars
    assert names("is red left of red star ?") == []  # the same one
    assert names("is red left of dog and circle ?") == []  # three
    assert names("is red left ?", 1) == ["red star"]
    assert names("is this beside that ?", asked=objects[1:3]) == ["blue star", "blue circle"]
    assert names("is red left ?", 1, asked=objects[1:3]) == []


def test_the_union_of_objects_counts_no_area_twice() -> None:
    part, rng = VisualTokens(torch.arange(20), (4, 5), (-0.1, 0.0, 1.1, 1.0)), np.random.default_rng(0)
    y, x = (np.arange(1200) + 0.5) / 1200, -0.1 + 1.2 * (np.arange(1200) + 0.5) / 1200
    for _ in range(5):
        corners = np.sort(rng.random((2, 2, 2)), axis=1)
        boxes = [(*low, *high) for low, high in corners.tolist()]
        pixels = np.any([((x > b[0]) & (x < b[2]))[None] & ((y > b[1]) & (y < b[3]))[:, None] for b in boxes], axis=0)
        expected = pixels.reshape(4, 300, 5, 240).mean((1, 3))
        assert union_coverage([Object("", box) for box in boxes], part) == pytest.approx(expected, abs=0.01)
        masks = [rng.random((30, 30)) < 0.3 for _ in boxes]
        both = Object("", boxes[0], masks[0] | masks[1])
        with_masks = [Object("", box, mask) for box, mask in zip(boxes, masks, strict=True)]
        assert union_coverage(with_masks, part) == pytest.approx(object_coverage(both, part))
    assert union_coverage([Object("", (0.5, 0.5, 0.5, 0.9)), Object("", (0.2, 0.1, 0.2, 0.3))], part).sum() == 0


def test_heads_that_look_at_one_object_or_at_both(mllm: MLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two answer tokens, head 1 of layer 2 looks at the first object and then at the second, head 2 at the first."""
    config = Config(limit=12, questions=2, null=10, compare=0, positions="generated", objects=2)
    data = load_data("shapes:val", limit=12)
    in_order = iter([s for scene in data.scenes for s in [s for s in scene if named_objects(s, 2)][:2]])
    left, right = (mllm.answer_ids(word)[0] for word in ("left", "right"))

    def two_tokens(batch: Batch, *, max_new_tokens: int) -> list[list[int]]:
        return [[left, right]] * len(batch)

    def rows(_: MLLM, batch: Batch, *, rows: list[list[int]], layers: list[int]) -> Iterator[torch.Tensor]:
        rng, length = np.random.default_rng(0), batch.inputs["input_ids"].shape[1]
        samples = [next(in_order) for _ in range(len(batch))]
        assert rows == [[real - 2, real - 1] for real in batch.inputs["attention_mask"].sum(1).tolist()]
        for layer in layers:
            values = rng.random((len(batch), 4, 2, length)) ** 4
            for number, (sample, parts) in enumerate(zip(samples, mllm.visual_tokens(batch), strict=True)):
                if layer == 2:
                    first, second = (
                        50 * object_coverage(obj, canvas(parts)).ravel() for obj in named_objects(sample, 2)
                    )
                    for head, token, area in ((1, 0, first), (1, 1, second), (2, 0, first), (2, 1, first)):
                        values[number, head, token, parts[0].index] += area
            yield torch.from_numpy(values / values.sum(-1, keepdims=True)).float()

    monkeypatch.setattr(mllm, "generate_ids", two_tokens)
    monkeypatch.setattr("analyses.attention.measuring.attention", rows)
    result = run_attention(config, Context(mllm, data, batch_size=8))
    assert result.record["measures"] == [*MEASURES, *SINGLE_MEASURES]
    scores = result.tables["scores"].set_index(["layer", "head", "measure"])["score"]
    assert scores[2, 1, "pointing"] == scores[2, 2, "pointing"] == 1
    assert [scores[2, 1, f"pointing_{number}"] for number in (1, 2)] == pytest.approx([0.5, 0.5], abs=0.05)
    assert [scores[2, 2, f"pointing_{number}"] for number in (1, 2)] == pytest.approx([1, 0], abs=0.05)
    assert set(result.tables["heads"]["head"][:2]) == {1, 2}
    samples = result.tables["samples"]
    assert (samples["read"] == "left right").all()
    assert (samples["chance_pointing"] >= samples[["chance_pointing_1", "chance_pointing_2"]].max(axis=1)).all()
    assert samples["asked"].str.contains(", ").all()
    examples = result.tables["examples"]
    assert examples.loc[:, "asked_left":"second_bottom"].notna().all(axis=None)
    assert result.tensors["words_0"].shape == (2, 3, 8, 8)
    drawn = ANALYSIS.figures({"viral": stored("viral", result)})
    words = [figure for title, figure in drawn.items() if title.startswith("Attention from each word")]
    assert len(words) == 3
    heat = [trace for trace in words[0].data if trace.type == "heatmap"]
    assert len(heat) == 2 * 3  # words, layers
    assert [trace.meta for trace in heat if trace.visible] == [2, 2]
    assert {trace.zmax for trace in heat if trace.meta == 2} == {float(result.tensors["words_0"][:, 1].max())}
    assert [trace.type for trace in words[0].data].count("scatter") == 2 * 2  # words, objects
    assert [a.text.split("<br>")[0] for a in words[0].layout.annotations] == ["viral · left", "viral · right"]


def test_relations_of_gqa_have_the_objects_that_their_table_states(tiny_folders: Path, tmp_path: Path) -> None:
    """The names in the table need not be words of the question."""
    rows = []
    for number in range(4):
        noise_image(number).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.png").rename(tmp_path / f"{number}.jpg")
        row = {"question_id": f"0{number}", "img_id": str(number), "question": "is the cat left of the red dog ?"}
        row |= {"answer": "left", "true option": "left", "false option": "right", "image_w": "90", "image_h": "60"}
        row |= dict(zip([f"object1 {part}" for part in ("name", *"xywh")], ("pet", "0", "0", "30", "20"), strict=True))
        row |= dict(
            zip([f"object2 {part}" for part in ("name", *"xywh")], ("wolf", "60", "30", "30", "30"), strict=True)
        )
        rows.append(row)
    pd.DataFrame(rows).to_csv(tmp_path / "gqa.csv", index=False)
    data, mllm = load_data(f"gqa_relation:{tmp_path / 'gqa.csv'}"), tiny("llava", tiny_folders)
    config = Config(objects=2, positions="left", null=10, compare=2)
    result = run_attention(config, Context(mllm, data, batch_size=3))
    samples, scores = result.tables["samples"], result.tables["scores"]
    assert (samples["asked"] == "pet, wolf").all()
    assert (samples["read"] == "left").all()
    assert scores.loc[scores["measure"] == "pointing", "score"].between(0, 1).all()
    # no patch of the cropped image touches both objects
    assert (samples["chance_pointing"] == samples["chance_pointing_1"] + samples["chance_pointing_2"]).all()
    with pytest.raises(DataError, match=r"names exactly one object of its image: choose other data, --objects 2 \(4 "):
        run_attention(Config(null=10), Context(mllm, data, batch_size=3))


def stored(label: str, result: Any, **config: Any) -> runs.Run:
    record = {"label": label, "seed": 0, "config": config, **result.record}
    return runs.Run(label, record, result.tables, result.tensors)


# --- the command line --------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_stores_generated_tokens_as_transformers_attends(runs_folder: Path, tmp_path: Path) -> None:
    words = "--limit 12 --null 10 --questions 2 --compare 2 --positions generated --max_new_tokens 2 --objects 2"
    words += f" --types relation_x relation_y --data shapes:val --output_dir {tmp_path}"
    models = [str(runs_folder / name) for name in ("baseline", "viral")]
    done = run("analyses.attention", "--model", *models, *words.split())
    assert "component entropy / ln(patches)" in done.stdout
    assert "pointing accuracy" in done.stdout
    results = {one.label: one for one in map(runs.load, tmp_path.glob("[!.]*"))}
    drawn = ANALYSIS.figures(results)
    entropy = drawn["Spatial entropy: by head"]
    (menu,) = entropy.layout.updatemenus
    assert len(menu.buttons) == 4
    assert menu.buttons[0].label == entropy.layout.coloraxis.colorbar.title.text == MEASURES["component_entropy"]
    for number, button in enumerate(menu.buttons):
        visible, layout = button.args[0]["visible"], button.args[1]
        assert visible == [at // 2 == number for at in range(8)]
        shown = [trace for trace, is_shown in zip(entropy.data, visible, strict=True) if is_shown]
        assert min(np.nanmin(trace.z) for trace in shown) == layout["coloraxis.cmin"]
        assert all("chance" in layout[f"annotations[{at}].text"] for at in (0, 1))
    one = results["viral"]
    assert one.record["config"]["positions"] == "generated"
    assert set(one.tables["methods"]["method"]) >= {"rollout", "gradient x attention"}
    mllm = MLLM.load(str(runs_folder / "viral"), validate=False)
    samples = {sample.id: sample for sample in load_data("shapes:val", limit=12)}
    row = one.tables["samples"].iloc[3]
    sample = samples[row["sample_id"]]
    assert sample.category.startswith("relation")
    batch = mllm.encode([sample.image], [sample.question])
    mllm.model.set_attn_implementation("eager")
    with torch.inference_mode():
        output = mllm.model.generate(
            **batch.inputs, max_new_tokens=3, do_sample=False, output_attentions=True, return_dict_in_generate=True
        )
    new = output.sequences[0, batch.inputs["input_ids"].shape[1] :].tolist()[:2]
    ends = [number for number, token in enumerate(new) if token == mllm.processor.tokenizer.eos_token_id]
    count = min([*ends, 2])
    assert row["read"] == mllm.processor.tokenizer.decode(new[:count])
    (parts,) = mllm.visual_tokens(batch)
    maps = np.stack(
        [
            np.stack([block[0, :, 0, parts[0].index].numpy() for block in output.attentions[step]])
            for step in range(1, count + 1)
        ]
    )
    maps = renormalized(sum_onto_grid(maps, parts, canvas(parts)))  # (token, layer, head, h, w)
    index = {name: number for number, name in enumerate(one.record["measures"])}
    values = one.tensors["values"][3].numpy()
    assert values[..., index["entropy_shannon"]] == pytest.approx(entropies(maps).shannon.mean(0), abs=1e-5)
    expected = np.nanmean(entropies(maps).component, 0)
    assert values[..., index["entropy_raw"]] == pytest.approx(expected, abs=1e-4, nan_ok=True)
    inside = union_coverage(named_objects(sample, 2), canvas(parts))
    assert values[..., index["pointing"]] == pytest.approx(pointing(maps, inside).mean(0), abs=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--positions generatd", "unknown position 'generatd': expected one of"),
        ("--types relation", "unknown question type 'relation': expected one of"),
        ("--types relation_x", "--objects 2 ("),
        ("--objects 2 --types colour", "names exactly two objects of its image: choose other data, --objects 1 ("),
        ("--objects 3", "objects is 3: expected"),
    ],
)
def test_bad_input_is_one_sentence(runs_folder: Path, tmp_path: Path, words: str, message: str) -> None:
    options = ["--model", str(runs_folder / "viral"), "--output_dir", str(tmp_path / "out"), "--limit", "8"]
    assert message in refused("analyses.attention", *options, *words.split())
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").glob("[!.]*")) == []


def test_answers_without_a_token_are_counted(mllm: MLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = asked(("is red left ?",) * 5)
    left, end, image = mllm.answer_ids("left")[0], mllm.processor.tokenizer.eos_token_id, mllm.config.image_token_id
    answers = [[left], [], [end], [image], [left, end, left]]
    monkeypatch.setattr(mllm, "generate_ids", lambda batch, max_new_tokens: answers)
    config = Config(localise=False, positions="generated")
    placed, left_out = with_positions(config, context(mllm, questions), questions)
    assert [(question.offsets, question.words) for question in placed] == [
        ((0,), ("left",)),
        ((0, 2), ("left", " left")),
    ]
    assert left_out == [
        "2 of 5 questions, with an empty answer (generated), first s1",
        "1 of 5 questions, with the image placeholder in the answer (generated), first s3",
    ]
    monkeypatch.setattr(mllm, "generate_ids", lambda batch, max_new_tokens: [[]] * 5)
    with pytest.raises(
        DataError, match="no attention can be read at generated: 5 of 5 questions, with an empty answer"
    ):
        with_positions(config, context(mllm, questions), questions)


def test_options_that_are_new_leave_the_keys_of_stored_runs(mllm: MLLM) -> None:
    from workbench.analysis.execution import recorded_options

    assert not set(Config.ADDED) & set(recorded_options(Config()))
    assert set(recorded_options(Config())) | set(Config.ADDED) == {field.name for field in dataclasses.fields(Config)}
    assert recorded_options(Config(objects=2, types=("a",)))["types"] == ["a"]
