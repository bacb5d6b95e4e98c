"""Attention knockout and object ablation: planted truth on small models of every family, and the real command line."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from analyses.knockout import AGAINST, ANALYSIS, OBJECT, RANDOM, Config, _scores, asked_objects, touched_tokens
from analyses.knockout import run as knock
from tests.analyses.test_permutation import bag_of_tokens, model, picture, planted
from tests.conftest import run
from tests.tiny import BUILDERS
from workbench import runs
from workbench.analysis.declaration import Context
from workbench.capture.knockout import knockout
from workbench.data import Dataset, Object, Sample
from workbench.errors import ConfigError, DataError
from workbench.mllm import MLLM
from workbench.mllm.family import VisualTokens
from workbench.scoring.quiz import Quiz
from workbench.spatial.grids import object_coverage
from workbench.training_folder import MEAN

RED_DOG, BLUE_DOG = Object("red dog", (0.0, 0.0, 0.5, 0.5)), Object("blue dog", (0.5, 0.5, 1.0, 1.0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def with_objects(images: int = 4, different: bool = True) -> Dataset:
    """The planted questions with two objects in each picture; the first and the third question name some."""
    return Dataset(
        "planted",
        [
            dataclasses.replace(s, objects=(RED_DOG, BLUE_DOG), load=(lambda n=int(s.image_id) * different: picture(n)))
            for s in planted(images)
        ],
        f"planted {different}",
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", list(BUILDERS))
def test_knocking_out_all_blocks_removes_the_image(name: str, folders: Path) -> None:
    """In every family: another image of the same size gives the same logits; with one block left it does not."""
    mllm = model(name, folders)
    batches = [
        mllm.encode([picture(n, (90, 60)), picture(n + 5, (90, 60))], ["what is this ?", "what color is the dog ?"])
        for n in (0, 1)
    ]
    every = range(1, mllm.n_layers + 1)
    first, second = (knockout(mllm, batch, blocks=every) for batch in batches)
    assert torch.allclose(first, second, atol=1e-5)
    first, second = (knockout(mllm, batch, blocks=every[:-1]) for batch in batches)
    assert (first - second).abs().max() > 1e-4
    with pytest.raises(ConfigError, match=r"layer 0 does not exist in .*: expected 1 to 4"):
        knockout(mllm, batches[0], blocks=[0])


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", list(BUILDERS))
def test_padding_on_either_side_changes_no_logit(name: str, side: str, folders: Path) -> None:
    """Questions of different lengths in one batch: the last token of each, not the padding after it."""
    mllm = model(name, folders)
    questions = ["what is this ?", "yes", "what color is the dog ?"]
    batch = mllm.process(*_texts(mllm, questions), padding_side=side)
    lengths = batch.inputs["attention_mask"].sum(1).tolist()
    assert len(set(lengths)) == 3
    assert bool(batch.inputs["attention_mask"][:, -1].all()) == (side == "left")
    alone = [mllm.encode([picture(row, (90, 60))], [question]) for row, question in enumerate(questions)]
    for blocks in ([2], [1, 2, 3, 4]):
        expected = torch.cat([knockout(mllm, one, blocks=blocks) for one in alone])
        assert torch.allclose(knockout(mllm, batch, blocks=blocks), expected, atol=1e-3), blocks


def _texts(mllm: MLLM, questions: list[str]) -> tuple[Any, list[str], list[str]]:
    pictures = tuple((picture(row, (90, 60)),) for row in range(len(questions)))
    return pictures, [mllm.prompt(question) for question in questions], questions


@pytest.mark.slow
def test_a_quiz_padded_on_the_right_gives_the_same_answers(folders: Path) -> None:
    for name in ("llava", "llava_next"):  # with and without a shared prefix
        mllm, numbers = model(name, folders), {}
        for side in ("left", "right"):
            mllm.processor.tokenizer.padding_side = side
            quiz = Quiz(mllm, planted().scenes, batch_size=5)
            assert (quiz._prefixes is not None) == (name == "llava")
            changes = (
                quiz.logprobs(),
                quiz._summed(quiz._from_whole_prompts(None, None)),
                quiz.logprobs(1, lambda values, _: values.flip(0)),
                quiz.knocked_out([1, 2]),
            )
            numbers[side] = [change.nan_to_num(neginf=0) for change in changes]
        assert all(torch.allclose(left, right, atol=1e-4) for left, right in zip(*numbers.values(), strict=True))


def test_without_positions_knockout_equals_a_prompt_without_image(folders: Path) -> None:
    """An independent oracle: one block that knows no positions cannot tell tokens that nobody looks at from tokens that
    are not there."""
    mllm = bag_of_tokens(folders)
    knocked = knockout(mllm, mllm.encode([picture(0)], ["what is this ?"]), blocks=[1])[:, -1]
    with torch.inference_mode():
        alone = mllm.model(**mllm.encode([[]], ["what is this ?"]).inputs).logits[:, -1].float()
    assert torch.allclose(knocked, alone, atol=1e-4)


@pytest.mark.slow
def test_the_shared_prefix_knocks_out_the_same(folders: Path) -> None:
    quiz = Quiz(model("llava", folders), planted().scenes, batch_size=5)
    assert quiz._prefixes is not None
    for blocks in ([1], [2, 3], [1, 2, 3, 4]):
        whole = quiz._summed(quiz._from_whole_prompts(None, None, blocks)).log_softmax(-1)
        assert torch.allclose(quiz.knocked_out(blocks), whole, atol=1e-4)
        assert (quiz.knocked_out(blocks) - quiz.logprobs()).nan_to_num().abs().max() > 1e-4
    assert quiz.mllm.config.get_text_config()._attn_implementation == "sdpa"


def test_tokens_of_named_objects_by_hand() -> None:
    def asks(question: str) -> list[str]:
        return [
            o.name for o in asked_objects(Sample("0", "0", lambda: picture(0), question, objects=(RED_DOG, BLUE_DOG)))
        ]

    assert asks("any red dog ?") == ["red dog"]
    assert asks("is red left of blue?") == ["red dog", "blue dog"]
    assert asks("how many dog ?") == ["red dog", "blue dog"]
    assert asks("is a cat here ?") == []
    raster = [VisualTokens(torch.arange(16), (4, 4), (0.0, 0.0, 1.0, 1.0))]
    assert touched_tokens(raster, [RED_DOG]) == [0, 1, 4, 5]
    assert touched_tokens(raster, [RED_DOG, BLUE_DOG]) == [0, 1, 4, 5, 10, 11, 14, 15]
    mask = np.zeros((80, 80), dtype=bool)
    mask[20:40, 39:41] = True  # rows of the second token row, columns on both sides of the middle
    assert touched_tokens(raster, [Object("thin", (0, 0, 1, 1), mask)]) == [5, 6]
    assert touched_tokens([VisualTokens(torch.arange(4), (2, 2), (-0.5, 0.0, 1.5, 1.0))], [RED_DOG]) == [0]


def test_a_pixel_on_the_border_of_two_patches_touches_both() -> None:
    """The same tokens that the object covers a share of, where patches have no whole number of pixels."""
    rows = VisualTokens(torch.arange(3), (3, 1), (0.0, 0.0, 1.0, 1.0))  # edges at 3.33 and 6.67 of 10 pixels
    for pixel, expected in ((2, [0]), (3, [0, 1]), (6, [1, 2]), (7, [2])):
        for turned in (False, True):
            mask = np.zeros((10, 10), dtype=bool)
            mask[pixel] = True
            item = Object("line", (0, 0, 1, 1), mask.T if turned else mask)
            part = dataclasses.replace(rows, grid=(1, 3)) if turned else rows
            assert touched_tokens([part], [item]) == expected
            assert object_coverage(item, part).ravel().nonzero()[0].tolist() == expected


def test_the_interval_of_a_negative_difference_in_kl_contains_it() -> None:
    """Where random tokens change the answers more than the object does, `object - random` is below 0."""
    common = {"id": [f"q{n}" for n in range(8)], "image_id": [f"i{n}" for n in range(8)], "category": "colour"}
    common |= {"chance": 0.5, "site": "encoder", "first": 0, "last": 0, "draw": 0}
    answers = pd.DataFrame(common | {"correct_before": True, "correct_after": True})
    object_kl, random_kl = np.linspace(0.1, 0.2, 8), np.linspace(0.5, 0.8, 8)
    samples = pd.concat([answers.assign(kind=OBJECT, kl=object_kl), answers.assign(kind=RANDOM, kl=random_kl)])
    rows = _scores(samples, Config()).set_index(["kind", "category"])
    row, gap = rows.loc[AGAINST, MEAN], object_kl - random_kl
    half = stats.t.ppf(0.975, 7) * stats.sem(gap)  # evenly spread values have no skewness
    assert row[["kl", "kl_low", "kl_high"]].tolist() == pytest.approx(
        [gap.mean(), gap.mean() - half, gap.mean() + half]
    )
    assert rows.loc[OBJECT, MEAN]["kl_low"] >= 0


@pytest.mark.slow
def test_taking_away_what_every_image_has_changes_nothing(folders: Path) -> None:
    """If all images are one, each token already is the mean at its place; if they differ, it is not."""
    mllm, config = model("llava", folders), Config(width=(1, 4), draws=2, questions=0)
    same = knock(config, Context(mllm, with_objects(different=False), 3)).tables["scores"]
    taken = same[same["site"] == "encoder"]
    assert set(taken["kind"]) == {OBJECT, RANDOM, AGAINST}
    assert (taken["kl"].abs() < 1e-6).all()
    assert (taken["accuracy_drop"] == 0).all()
    result = knock(config, Context(mllm, with_objects(), 3))
    other, samples = result.tables["scores"], result.tables["samples"]
    assert (other[other["kind"].isin([OBJECT, RANDOM])]["kl"] > 1e-7).all()
    assert set(other["site"]) == {"encoder", "blocks 1-1", "blocks 2-2", "blocks 3-3", "blocks 4-4", "blocks 1-4"}
    assert not samples[samples["site"] == "encoder"]["id"].str.endswith("-1").any()
    assert other[other["kind"] == "knockout"]["n"].max() == 12
    row, mean = (other[(other["kind"] == kind) & (other["category"] == MEAN)].iloc[0] for kind in (AGAINST, RANDOM))
    assert row["accuracy_before"] == pytest.approx(mean["accuracy_after"])
    assert row["accuracy_drop"] == pytest.approx(row["accuracy_before"] - row["accuracy_after"])


def test_what_cannot_be_knocked_out_is_refused_or_noted(folders: Path) -> None:
    llava, qwen = model("llava", folders), model("qwen3_vl", folders)
    with pytest.raises(ConfigError, match="width is 5: expected 1 to 4"):
        knock(Config(width=(5,)), Context(llava, with_objects(), 4))
    with pytest.raises(ConfigError, match="layer 9 does not exist"):
        knock(Config(layers=(9,)), Context(llava, with_objects(), 4))
    with pytest.raises(
        DataError,
        match="no question of planted names an object of its image: expected a data set with objects, or --no-objects",
    ):
        knock(Config(width=(1,)), Context(llava, planted(), 4))
    result = knock(Config(width=(2,), layers=(3,)), Context(qwen, with_objects(2), 4))
    assert "adds encoder features" in result.record["skipped"]["objects"]
    assert set(result.tables["scores"]["site"]) == {
        "blocks 3-4",
        "blocks 1-4",
    }
    partly = knock(Config(width=(1, 3), layers=(3,)), Context(qwen, with_objects(2), 4))
    assert set(partly.tables["scores"]["site"]) == {"blocks 3-3", "blocks 1-4"}
    assert partly.left_out == [f"blocks 3-5: {qwen.name} has 4"]
    with pytest.raises(ConfigError, match=r"no window is left \(blocks 3-5: .* has 4\): expected smaller layers"):
        knock(Config(width=(3,), layers=(3,)), Context(qwen, with_objects(2), 4))
    assert not knock(Config(width=(3,)), Context(qwen, with_objects(2), 4)).left_out  # windows as far as they go


@pytest.mark.slow
def test_the_command_compares_the_pair(runs_folder: Path, tmp_path: Path) -> None:
    models = [str(runs_folder / "baseline"), str(runs_folder / "viral")]
    done = run(
        "analyses.knockout",
        "--model",
        *models,
        "--limit",
        "3",
        "--layers",
        "2",
        "--width",
        "1",
        "--output_dir",
        str(tmp_path),
    )
    found = {stored.label: stored for stored in map(runs.load, runs.index(tmp_path)["folder"])}
    assert set(found) == {"baseline", "viral"}
    assert "knockout-" in done.stdout
    assert AGAINST in done.stdout
    scores = found["viral"].tables["scores"]
    assert set(scores["site"]) == {"blocks 2-2", "blocks 1-3", "encoder"}
    assert scores.drop(columns=["p"]).notna().all(axis=None)
    figures = ANALYSIS.figures(found)
    assert len(figures) == 4
    assert all("error_y" in trace.to_plotly_json() for figure in list(figures.values())[2:] for trace in figure.data)
    failed = run("analyses.knockout", "--model", models[0], "--widht", "1", code=2)
    assert "did you mean '--width'" in failed.stderr
    assert "Traceback" not in failed.stderr
