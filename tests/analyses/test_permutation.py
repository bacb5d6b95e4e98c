"""Permutation of visual tokens: planted truth on small models, the shared prefix against whole prompts, and the real
command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from analyses.permutation import ANALYSIS, Config
from analyses.permutation import run as permute
from analyses.permutation.interventions import Images, _other_images, permute_part
from tests.conftest import refused, run
from tests.tiny import build
from workbench import runs
from workbench.analysis.declaration import Context
from workbench.benchmarks.scorers import scorers_of
from workbench.data import Dataset, Sample
from workbench.errors import DataError, UnknownNameError
from workbench.mllm import MLLM
from workbench.scoring.questions import questions_of
from workbench.scoring.quiz import Quiz, kl_divergence
from workbench.scoring.tables import change_by_type, counts_by_type
from workbench.training_folder import MEAN


def picture(seed: int, size: tuple[int, int] = (60, 60)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def planted(images: int = 4, size: tuple[int, int] = (60, 60)) -> Dataset:
    """Pictures of noise with three questions each, whose answers are arbitrary."""
    samples = []
    for number in range(images):
        picked = [
            ("is this red ?", ("yes", "no"), "colour"),
            ("is the cat left ?", ("left", "right", "one"), "side"),
            ("a dog ?", ("yes", "no"), "colour"),
        ]
        for part, (question, options, category) in enumerate(picked):
            answer = options[(number + part) % len(options)]
            samples.append(
                Sample(
                    f"{number}-{part}",
                    str(number),
                    lambda n=number: picture(n, size),
                    question,
                    answer,
                    options,
                    category,
                )
            )
    return Dataset("planted", samples, "planted")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def model(name: str, folders: Path) -> MLLM:
    folder = folders / name
    return MLLM.load(str(folder if folder.exists() else build(name, folder)))


def bag_of_tokens(folders: Path) -> MLLM:
    """One block without positions: its last token sees the visual tokens as a set."""
    mllm = model("llava", folders)
    decoder: Any = mllm.decoder
    decoder.layers = decoder.layers[:1]
    mllm.config.get_text_config().num_hidden_layers = 1

    def nowhere(hidden: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angle = torch.zeros(*position_ids.shape, decoder.config.hidden_size // decoder.config.num_attention_heads)
        return angle.cos(), angle.sin()

    decoder.rotary_emb.forward = nowhere
    return mllm


def scored(mllm: MLLM, config: Config, data: Dataset) -> tuple[pd.DataFrame, dict[str, Any]]:
    result = permute(config, Context(mllm, data, batch_size=3))
    return result.tables["scores"], result.record


# --- planted truth --------------------------------------------------------------------------------


@pytest.mark.slow
def test_permuting_a_bag_of_tokens_changes_nothing(folders: Path) -> None:
    table, _ = scored(bag_of_tokens(folders), Config(questions=0), planted())
    order = table[
        table["kind"].isin(["permute", "block shuffle", "transpose", "identity"]) & (table["part"] == "whole")
    ]
    assert set(order["site"]) == {"encoder", "0", "1"}
    assert (order["accuracy_drop"] == 0).all()
    assert (order["kl"] < 1e-6).all()
    for kind in ("other image", "mean token"):  # what the bag holds does matter
        assert (table[(table["kind"] == kind) & (table["site"] == "encoder")]["kl"] > 1e-5).any(), kind
    # another bag: features meet the positional part of other places
    assert (table[(table["part"] == "features")]["kl"] > 1e-7).any()


@pytest.mark.slow
def test_identity_is_exactly_nothing_and_order_is_something(folders: Path) -> None:
    table, record = scored(model("llava", folders), Config(questions=0, permutations=2), planted())
    identity = table[table["kind"] == "identity"]
    assert len(identity) == 3
    assert (identity[["accuracy_drop", "kl", "kl_low", "kl_high"]] == 0).all(axis=None)
    assert (identity["p"] == 1).all()
    # four images that did not change leave room for a drop
    assert (identity["low"] < 0).all()
    assert (identity["high"] > 0).all()
    assert identity["few"].all()
    assert (table[(table["kind"] == "permute") & (table["site"] != "4")]["kl"] > 1e-6).all()
    assert (table[table["site"] == "4"]["kl"] < 1e-9).all()  # after the last block nothing reads the visual tokens
    assert record["skipped"] == {}
    assert 0 < record["positional_share"] < 1
    both = table[table["kind"].eq("permute") & table["part"].eq("whole") & table["category"].eq(MEAN)].set_index(
        "site"
    )["kl"]
    assert both["encoder"] == pytest.approx(both["0"], abs=1e-5)  # this connector treats every token alike
    assert (table["n_images"] == 4).all()
    assert set(table.groupby("category")["n"].first().to_dict().items()) == {
        ("colour", 8),
        ("side", 4),
        (MEAN, 12),
    }
    chance = table.groupby("category")["chance"].first()
    assert chance["colour"] == 0.5
    assert chance["side"] == pytest.approx(1 / 3)
    assert chance[MEAN] == pytest.approx((1 / 2 + 1 / 3) / 2)


@pytest.mark.slow
def test_batches_change_no_number(folders: Path) -> None:
    mllm, data = model("llava", folders), planted()
    first, second = (
        permute(Config(permutations=1, layers=(1, 3)), Context(mllm, data, batch_size=size)).tables["scores"]
        for size in (1, 4)
    )
    numbers = first.select_dtypes("number").columns
    assert np.allclose(first[numbers], second[numbers], atol=1e-4)


def test_a_change_that_writes_into_its_tokens_does_not_leak(folders: Path) -> None:
    quiz = Quiz(model("llava", folders), planted().scenes, batch_size=5)
    before = quiz.logprobs()
    for place in ("encoder", 0, 2):
        assert not torch.equal(quiz.logprobs(place, lambda values, _: values.zero_()), before)  # type: ignore[arg-type]
        assert torch.equal(quiz.logprobs(place, lambda values, _: values), before)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "skipped"),
    [
        ("qwen3_vl", {"site encoder": "adds encoder features", "site 0": "adds", "site 1": "adds", "site 2": "adds"}),
        ("llava_next", {"transpose": "not square"}),
    ],
)
def test_other_families_are_asked_whole_and_what_cannot_be_is_noted(
    folders: Path, name: str, skipped: dict[str, str]
) -> None:
    config = Config(permutations=1, questions=1, block=1, layers=() if name == "qwen3_vl" else (1,))
    table, record = scored(model(name, folders), config, planted(2, (120, 60)))
    assert record["skipped"].keys() == skipped.keys()
    assert all(text in record["skipped"][key] for key, text in skipped.items())
    assert set(table["site"]) == ({"3", "4"} if name == "qwen3_vl" else {"encoder", "1"})
    assert (table[table["kind"] == "identity"]["kl"] == 0).all()
    assert (table[(table["kind"] == "permute") & (table["site"] != "4")]["kl"] > 0).any()


def test_generated_answers_are_counted_as_the_paper_does(folders: Path) -> None:
    """The right answers before are those of what the model generates on its own; counts follow from the rows."""
    mllm, data = model("llava", folders), planted(3)
    config = Config(answers="generated", permutations=2, layers=(1,), questions=0, max_new_tokens=3)
    result = permute(config, Context(mllm, data, batch_size=2))
    samples, counts = result.tables["samples"], result.tables["counts"]
    greedy = {s.id: mllm.generate(mllm.encode([s.image], [s.question]), max_new_tokens=3)[0] for s in data}
    assert (samples["answer_before"] == samples["id"].map(greedy)).all()
    identity = samples[samples["kind"] == "identity"]
    assert (identity["answer_after"] == identity["answer_before"]).all()
    changed = samples[(samples["kind"] == "mean token") & (samples["site"] == "encoder")]
    assert (changed["answer_after"] != changed["answer_before"]).any()
    right = [scorers_of("", s)["own"](s, greedy[s.id]).correct for s in data]
    for _, rows in samples.groupby(["site", "kind", "part", "draw"]):
        assert rows["correct_before"].tolist() == right
    row = counts[(counts["kind"] == "permute") & (counts["site"] == "encoder") & (counts["part"] == "whole")]
    assert set(row["category"]) == {"colour", "side", "all questions"}
    assert set(row["answers"]) == {"generated"}
    whole = row[row["category"] == "all questions"].iloc[0]
    assert (whole["right_before"], whole["n"], whole["n_images"]) == (sum(right), 9, 3)
    with pytest.raises(UnknownNameError, match=r"scorer .*own.*"):
        permute(Config(answers="generated", scorer="owm"), Context(mllm, data, batch_size=2))


def test_counts_by_hand() -> None:
    rows = [
        {"id": f"q{i}", "image_id": f"i{i // 2}", "category": "a", "correct_before": i < 8, "correct_after": after}
        for i in range(10)
        for after in (i < 6, i < 4)  # two draws
    ]
    (row,) = counts_by_type(pd.DataFrame(rows), seed=0)
    assert (row["right_before"], row["right_after"], row["n"], row["n_images"]) == (8, 5, 10, 5)
    assert row["drop_percent"] == pytest.approx(100 * 3 / 8)
    assert row["low"] < row["drop_percent"] < row["high"]
    unchanged = pd.DataFrame(rows).assign(correct_after=lambda table: table["correct_before"])
    (row,) = counts_by_type(unchanged, seed=0)
    assert row["low"] < row["drop_percent"] == 0 < row["high"], "five images without a change leave a drop open"
    assert row["few"]
    nothing_right = pd.DataFrame(rows).assign(correct_before=False, correct_after=False)
    assert np.isnan(counts_by_type(nothing_right, seed=0)[0]["drop_percent"])


# --- the parts ------------------------------------------------------------------------------------


def test_parts_add_up_and_orders_keep_what_they_promise() -> None:
    images = Images(Config(block=2, seed=3), [((4, 4),), ((4, 4), (2, 2))], [])
    values, mean, order = torch.randn(16, 5), torch.randn(16, 5), images.permuted(0, 1)
    both = permute_part(permute_part(values, mean, order, features=True), mean, order, features=False)
    assert torch.allclose(both, values[order], atol=1e-5)
    assert sorted(images.permuted(1, 0).tolist()) == list(range(20))
    assert not torch.equal(images.permuted(0, 0), images.permuted(0, 1))
    grid = torch.arange(16).reshape(4, 4)
    assert torch.equal(images.transposed(0).reshape(4, 4), grid.T)
    assert torch.equal(images.transposed(1)[16:], torch.tensor([16, 18, 17, 19]))
    blocks = images.shuffled_blocks(0, 0).reshape(2, 2, 2, 2).permute(0, 2, 1, 3).reshape(4, 4)
    assert sorted(blocks.tolist()) == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    others = _other_images(9, 0)
    assert sorted(others) == list(range(9))
    assert all(other != own for own, other in enumerate(others))


def test_scores_by_hand() -> None:
    before, after = torch.tensor([[0.5, 0.5, 0.0]]).log(), torch.tensor([[0.75, 0.25, 0.0]]).log()
    assert kl_divergence(before, after).item() == pytest.approx(0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25))
    rows = [(f"q{i}", f"i{i % 3}", "a" if i < 6 else "b", 0.5, True, i >= 3, 0.1 * i) for i in range(9)]
    columns = ["id", "image_id", "category", "chance", "correct_before", "correct_after", "kl"]
    table = pd.DataFrame(change_by_type(pd.DataFrame(rows, columns=columns), seed=0)).set_index("category")
    assert table.loc["a", "accuracy_drop"] == 0.5
    assert table.loc["b", "accuracy_drop"] == 0
    assert table.loc[MEAN, "accuracy_drop"] == pytest.approx(0.25)
    assert table.loc["a", "kl"] == pytest.approx(0.25)
    assert table.loc[MEAN, "kl"] == pytest.approx((0.25 + 0.7) / 2)
    assert (table["low"] <= table["accuracy_drop"]).all()
    assert (table["accuracy_drop"] <= table["high"]).all()
    assert table.loc[MEAN, "n"] == 9
    assert table.loc["a", "n_images"] == 3


# --- bad input ------------------------------------------------------------------------------------


def test_questions_that_cannot_be_scored_are_refused(folders: Path) -> None:
    mllm = model("llava", folders)
    with pytest.raises(DataError, match="1 image with questions: expected at least 2"):
        scored(mllm, Config(), planted(1))
    with pytest.raises(DataError, match="none of 1 images has a question with options"):
        questions_of([[Sample("0", "0", lambda: picture(0))]])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layers", "9"], "layer 9 does not exist"),
        (["--types", "count", "relatoin_x"], "did you mean 'relation_x'"),
        (["--permutations", "0"], "permutations is 0: expected at least 1"),
        (["--permutatoins", "1"], "unknown option '--permutatoins': did you mean '--permutations'"),
        (["--block", "3"], "block is 3 for a patch grid of 8 x 8 tokens: expected a divisor of both"),
        (["--data", "folder:PHOTOS"], "has a question with options and an answer"),
    ],
)
def test_bad_input_is_one_sentence(runs_folder: Path, tmp_path: Path, words: list[str], message: str) -> None:
    (tmp_path / "photos").mkdir()
    picture(0).save(tmp_path / "photos" / "noise.png")
    given = [word.replace("PHOTOS", str(tmp_path / "photos")) for word in words]
    assert message in refused(
        "analyses.permutation",
        "--model",
        str(runs_folder / "viral"),
        "--limit",
        "2",
        "--output_dir",
        str(tmp_path / "out"),
        *given,
    )
    assert list((tmp_path / "out").glob("[!.]*")) == []


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_compares_the_pair(runs_folder: Path, tmp_path: Path) -> None:
    models = [str(runs_folder / "baseline"), str(runs_folder / "viral")]
    words = [
        "analyses.permutation",
        "--model",
        *models,
        "--limit",
        "3",
        "--permutations",
        "1",
        "--layers",
        "0",
        "2",
        "--output_dir",
        str(tmp_path),
    ]
    done = run(*words)
    found = {stored.label: stored for stored in map(runs.load, runs.index(tmp_path)["folder"])}
    assert set(found) == {"baseline", "viral"}
    assert "permutation-" in done.stdout
    assert MEAN in done.stdout
    stored = found["viral"]
    scores, samples = stored.tables["scores"], stored.tables["samples"]
    assert set(scores["site"]) == {"encoder", "0", "2"}
    assert set(scores["part"]) == {"whole", "features", "positions"}
    assert scores.drop(columns=["p"]).notna().all(axis=None)
    assert (scores["seed"] == 0).all()
    assert (scores["n_images"] <= 3).all()
    assert np.allclose(scores["accuracy_drop"], scores["accuracy_before"] - scores["accuracy_after"])
    one = samples[(samples["site"] == "encoder") & (samples["kind"] == "transpose") & (samples["category"] == "exist")]
    row = scores[
        (scores["site"] == "encoder") & (scores["kind"] == "transpose") & (scores["category"] == "exist")
    ].iloc[0]
    assert row["accuracy_after"] == one["correct_after"].mean()
    assert row["kl"] == pytest.approx(one["kl"].mean())
    assert row["n"] == len(one)
    figures = ANALYSIS.figures({label: found[label] for label in ("baseline", "viral")})
    assert len(figures) == 6
    assert all("error_y" in trace.to_plotly_json() for title in list(figures)[2:] for trace in figures[title].data)
    (changed,) = (figure for title, figure in figures.items() if "difference" in title)
    mine, other = (found[name].tables["scores"].query("part == 'whole'") for name in ("viral", "baseline"))
    for (kind,), sites in mine[mine["kind"].isin(["permute", "mean token"])].groupby(["kind"]):
        (line,) = (trace for trace in changed.data if trace.name == f"viral · {kind}" and trace.mode)
        assert list(line.x) == [-1, 0, 2]
        for layer, difference in zip(line.x, line.y, strict=True):
            site = "encoder" if layer == -1 else str(layer)
            lost = [
                t[(t["site"] == site) & (t["kind"] == kind) & (t["category"] == MEAN)]["accuracy_drop"].item()
                for t in (sites, other)
            ]
            assert difference == pytest.approx(lost[0] - lost[1])
    by_layer = figures["Accuracy drop by layer, mean of types"]
    assert sum(trace.fill == "toself" for trace in by_layer.data) == 4
    levels = {}
    for name in ("baseline", "viral"):
        lost = found[name].tables["scores"].query("category == 'mean of types' and part == 'whole'")
        # a drop: chance itself would be another scale
        levels[f"{name}: answers at chance"] = (lost["accuracy_before"] - lost["chance"]).mean()
    if np.ptp([*levels.values()]) < 0.0005:
        levels = {"answers at chance": next(iter(levels.values()))}
    drawn = {trace.name: trace.y[0] for trace in by_layer.data if "at chance" in (trace.name or "")}
    assert drawn == pytest.approx(levels)
    assert by_layer.layout.shapes[0].y0 == 0
