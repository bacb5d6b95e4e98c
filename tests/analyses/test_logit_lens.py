"""The logit lens: equal to the model's own logits in every family, planted words, where its null lies, words and
tokens, and the real command line."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from analyses.logit_lens import ANALYSIS
from analyses.logit_lens import run as look
from analyses.logit_lens.drawing import differences
from analyses.logit_lens.scores import _chance, _measured
from analyses.logit_lens.words import Config
from tests.analyses.test_permutation import model, picture
from tests.conftest import refused, run
from tests.tiny import BUILDERS
from workbench import runs
from workbench.analysis.declaration import Context, Result
from workbench.capture.hidden_states import Activations, read
from workbench.data import Dataset, Object, Sample
from workbench.errors import ConfigError, DataError, ModelError
from workbench.lens import first_tokens, lens_of
from workbench.mllm import MLLM
from workbench.mllm.load import CAPS_PALIGEMMA
from workbench.runs import Run

LEFT, RIGHT = (0.0, 0.0, 0.5, 0.5), (0.5, 0.5, 1.0, 1.0)
NAMES = ("red cat", "blue dog", "red dog", "blue cat")
FEW = Config(null=20, maps=0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def scenes(images: int = 8) -> Dataset:
    """Pictures of noise, each with one object in a quarter; a fourth of the images for each name."""
    objects = [(Object(NAMES[n % 4], (LEFT, RIGHT)[n // 4 % 2]),) for n in range(images)]
    return Dataset(
        "planted",
        [Sample(str(n), str(n), lambda n=n: picture(n), objects=own) for n, own in enumerate(objects)],
        "planted",
    )


def planted(mllm: MLLM, monkeypatch: pytest.MonkeyPatch, say: dict[int, tuple[int, ...]]) -> None:
    """Let the tokens on each image's object be rows of the output embedding: those of the words in `say`, by layer (0:
    class, 1: colour of its object)."""
    head = mllm.model.get_output_embeddings().weight.detach()
    words, _ = first_tokens(mllm, ["red", "blue", "cat", "dog"])
    start = [0]

    def fake(own: MLLM, batch: Any, *, layers: list[int]) -> list[Activations]:
        found = []
        for row, real in enumerate(read(own, batch, layers=layers)):
            number = start[0] + row
            colour, kind = NAMES[number % 4].split()
            values = torch.randn(real.values.shape, generator=torch.Generator().manual_seed(number))
            cells = [0, 1, 4, 5] if number // 4 % 2 == 0 else [10, 11, 14, 15]
            for layer, spoken in say.items():
                values[layers.index(layer), cells] = (
                    20 * sum(head[words[(kind, colour)[i]]] for i in spoken) / len(spoken)
                )
            found.append(dataclasses.replace(real, values=values))
        start[0] += len(batch)
        return found

    monkeypatch.setattr("analyses.logit_lens.reading.read", fake)


@pytest.mark.parametrize("name", list(BUILDERS))
def test_at_the_last_layer_the_lens_is_the_models_own_output(name: str, folders: Path) -> None:
    """In every family, at every visual position; before the last block it is not."""
    mllm = model(name, folders)
    batch = mllm.encode([picture(0, (90, 60))], ["what is this ?"])
    states = read(mllm, batch, layers=[mllm.n_layers - 1, mllm.n_layers])[0]
    with torch.inference_mode():
        own = mllm.model(**batch.inputs).logits[0, states.tokens.to(mllm.device)].float()
    lens = lens_of(mllm, batch)
    assert torch.allclose(lens(states.values[1]), own, atol=1e-4)
    assert not torch.allclose(lens(states.values[0]), own, atol=1e-2)


def test_caps_are_those_that_the_model_applies_and_other_heads_are_refused(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PaliGemma caps its logits where the configuration says so; Gemma 3 reads the same setting and does not."""
    for name, applied in (("paligemma", CAPS_PALIGEMMA), ("gemma3", False)):
        mllm = model(name, folders)
        mllm.config.get_text_config().final_logit_softcapping = 0.5
        assert (lens_of(mllm, mllm.encode([picture(0)], ["what is this ?"])).cap is not None) == applied
    mllm = model("llava", folders)
    batch = mllm.encode([picture(0)], ["what is this ?"])
    whole = mllm.model.forward
    monkeypatch.setattr(
        mllm.model,
        "forward",
        lambda **inputs: (lambda out: (setattr(out, "logits", out.logits * 2), out)[1])(whole(**inputs)),
    )
    with pytest.raises(ModelError, match="do not give its own logits"):
        lens_of(mllm, batch)
    mllm.decoder.norm_elsewhere = mllm.decoder.norm
    del mllm.decoder.norm
    with pytest.raises(ModelError, match="has no final norm"):
        lens_of(mllm, batch)


def test_tokens_that_are_rows_of_the_unembedding_have_rank_one(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer 1 says the class, layer 2 the colour, layer 0 is noise; the null knows how often another image has the same
    word."""
    mllm = model("llava", folders)
    head = mllm.model.get_output_embeddings().weight.detach()
    planted(mllm, monkeypatch, {1: (0,), 2: (1,)})
    tables = look(dataclasses.replace(FEW, layers=(0, 1, 2), null=200), Context(mllm, scenes(24), 5)).tables
    scores = tables["scores"].set_index(["cells", "kind", "measure", "layer"])
    for kind, layer, other in (("class", 1, 2), ("colour", 2, 1)):
        for measure in ("first", "candidate_rank", "reciprocal_rank"):
            row = scores.loc[("object", kind, measure, layer)]
            assert row["score"] == row["high"] == 1
            assert 0.8 < row["low"] < 0.9
            assert row["p"] < 0.01
            assert row["n_images"] == 24
            assert row["n"] == 96
        null = scores.loc[("object", kind, "first", layer), "null_mean"]
        assert null == pytest.approx(11 / 23, abs=0.03)  # of 23 other images 11 have the same word
        assert scores.loc[("object", kind, "candidate_rank", layer), "null_mean"] == pytest.approx(
            (11 + 12 / 2) / 23, abs=0.03
        )
        ids = list(first_tokens(mllm, [name.split()[kind == "class"] for name in NAMES])[0].values())
        # by hand
        said = (head @ mllm.decoder.norm(20 * head[ids]).detach().T).softmax(0)[ids, range(len(ids))].mean().item()
        assert scores.loc[("object", kind, "probability", layer), "score"] == pytest.approx(said, abs=1e-3)
        assert scores.loc[("object", kind, "probability", layer), "null_q95"] < said - 0.2
        # noise, cells of no object, the other word
        for own, at in (("object", 0), ("background", layer), ("object", other)):
            row = scores.loc[(own, kind, "first", at)]
            assert row["p"] > 0.01 and row["score"] < 0.85, (own, kind, at)
    means = tables["per_image"].groupby(["cells", "kind", "measure", "layer"])[["value", "null"]].mean()
    assert np.allclose(means["value"], scores.loc[means.index, "score"])
    assert np.allclose(means["null"], scores.loc[means.index, "null_mean"])


def test_a_word_that_every_image_says_is_worth_nothing(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lens that says "red" everywhere is right on half of the images, and so is its null."""
    mllm = model("llava", folders)
    red = mllm.model.get_output_embeddings().weight.detach()[first_tokens(mllm, ["red"])[0]["red"]]

    def fake(own: MLLM, batch: Any, *, layers: list[int]) -> list[Activations]:
        return [dataclasses.replace(a, values=20 * red.expand_as(a.values)) for a in read(own, batch, layers=layers)]

    monkeypatch.setattr("analyses.logit_lens.reading.read", fake)
    scores = (
        look(dataclasses.replace(FEW, layers=(1,), null=100), Context(mllm, scenes(24), 8))
        .tables["scores"]
        .set_index(["cells", "kind", "measure"])
    )
    row = scores.loc[("object", "colour", "first")]
    assert row["score"] == pytest.approx(0.5)
    assert row["null_mean"] == pytest.approx(0.5, abs=0.02)
    assert row["p"] > 0.2


def test_scores_by_hand_and_chance_levels() -> None:
    logp = np.log(np.array([[[0.5, 0.2, 0.2, 0.1]]]))
    first, candidate, vocabulary, probability = _measured(logp, np.array([[[1.0, 4.5, 4.5, 9.0]]]))
    assert first[0, 0].tolist() == [1, 0, 0, 0]
    assert candidate[0, 0] == pytest.approx([1, 1 / 2.5, 1 / 2.5, 1 / 4])
    assert vocabulary[0, 0] == pytest.approx([1, 1 / 4.5, 1 / 4.5, 1 / 9])
    assert probability[0, 0] == pytest.approx([0.5, 0.2, 0.2, 0.1])
    alike = _measured(np.zeros((1, 1, 4)), np.ones((1, 1, 4)))
    assert alike[0, 0, 0].tolist() == [0.25] * 4
    assert alike[1, 0, 0] == pytest.approx([1 / 2.5] * 4)
    random = np.random.default_rng(0).normal(size=(20000, 1, 4))
    means = _measured(random, np.ones_like(random)).mean(axis=(1, 2))[:2, 0]
    assert means == pytest.approx([_chance(4, 9)["first"], _chance(4, 9)["candidate_rank"]], abs=0.01)


def test_words_are_first_tokens_with_their_space(folders: Path) -> None:
    """A byte-level tokenizer writes "red" and " red" differently; words that begin alike, or are not there, are left
    out and named."""
    mllm = model("llava", folders)
    assert first_tokens(mllm, ["red", "cat"])[0] == {
        word: mllm.processor.tokenizer.convert_tokens_to_ids(word) for word in ("red", "cat")
    }
    _, left_out = first_tokens(mllm, ["red", "zebra"])
    assert left_out == {"zebra": "not in the vocabulary"}
    pieces = ["a", "r", "e", "d", "re", "ed", "red", "Ġ", "Ġr", "Ġre", "Ġred", "p", "u", "l", "s", "Ġp", "Ġpu", "ur"]
    merges = [("r", "e"), ("re", "d"), ("Ġ", "r"), ("Ġ", "re"), ("Ġ", "red"), ("Ġre", "d"), ("Ġ", "p"), ("Ġp", "u")]
    core = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    mllm.processor.tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    words, left_out = first_tokens(mllm, ["red", "purple", "purse"])
    assert words == {"red": pieces.index("Ġred")}
    assert set(left_out) == {"purple", "purse"}
    assert "begins with the same token as another (Ġpu)" in left_out["purse"]
    with pytest.raises(DataError, match="none of 2 words has a token of its own"):
        first_tokens(mllm, ["purple", "purse"])


@pytest.mark.slow
def test_batches_change_no_number_and_tiles_are_scored(folders: Path) -> None:
    for name in ("llava", "internvl"):
        mllm = model(name, folders)
        tables = [
            look(dataclasses.replace(FEW, layers=(2,), maps=1), Context(mllm, scenes(), size)).tables for size in (3, 8)
        ]
        numbers = tables[0]["scores"].select_dtypes("number").columns
        assert np.allclose(tables[0]["scores"][numbers], tables[1]["scores"][numbers], atol=1e-4)
        first = tables[0]["maps"].query("rank == 1")
        assert len(first) == {"llava": 16, "internvl": first["token"].nunique()}[name]
        assert (tables[0]["maps"]["probability"] <= 1).all()


def test_what_cannot_be_scored_is_refused(folders: Path) -> None:
    mllm = model("llava", folders)
    bare = Dataset("photos", [dataclasses.replace(s, objects=()) for s in scenes()], "photos")
    with pytest.raises(
        DataError, match="has no objects: expected one with objects, such as shapes:val, or --no-scores"
    ):
        look(FEW, Context(mllm, bare, 4))
    result = look(dataclasses.replace(FEW, scores=False, maps=2), Context(mllm, bare, 4))
    assert set(result.tables) == {"maps"}
    assert result.tables["maps"]["number"].nunique() == 2
    assert (result.tables["maps"]["truth"] == "").all()
    found = {"plain": Run("k", {"seed": 0}, result.tables, result.tensors)}
    assert set(ANALYSIS.summary(found).columns) == {"model", "layer", "word", "cells"}
    assert len(ANALYSIS.figures(found)) == 2
    tiny = Object("red cat", (0.0, 0.0, 0.05, 0.05))
    with pytest.raises(
        DataError, match=r"0 of 8 images have a patch covered to 0\.5 by an object with a class: expected at least 2"
    ):
        look(
            FEW,
            Context(
                mllm,
                Dataset(
                    "t", [dataclasses.replace(s, objects=(tiny, Object("blue dog", tiny.box))) for s in scenes()], "t"
                ),
                4,
            ),
        )
    with pytest.raises(DataError, match="expected at least 2 classes or 2 colors to compare"):
        look(
            FEW,
            Context(
                mllm,
                Dataset("one", [dataclasses.replace(s, objects=(Object("red cat", LEFT),)) for s in scenes()], "one"),
                4,
            ),
        )
    with pytest.raises(ConfigError, match="layer 9 does not exist"):
        look(dataclasses.replace(FEW, layers=(9,)), Context(mllm, scenes(), 4))


def test_models_are_compared_image_by_image(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mllm, found = model("llava", folders), {}
    for label, say in (("noise", {}), ("speaks", {1: (0,)})):
        planted(mllm, monkeypatch, say)
        result: Result = look(dataclasses.replace(FEW, layers=(0, 1)), Context(mllm, scenes(16), 8))
        found[label] = Run(label, {"seed": 0, "label": label}, result.tables, result.tensors)
    table = differences(found).set_index(["cells", "kind", "measure", "layer"])
    own, same = table.loc[("object", "class", "first", 1)], table.loc[("object", "class", "first", 0)]
    scores = [run.tables["scores"].set_index(["cells", "kind", "measure", "layer"])["score"] for run in found.values()]
    assert own["score"] == pytest.approx((scores[1] - scores[0])[("object", "class", "first", 1)])
    assert own["low"] > 0
    assert own["p_holm"] < 0.01
    assert same["score"] == same["low"] == same["high"] == 0
    assert same["p_holm"] == 1
    assert own["n_images"] == 16
    assert own["p_holm"] == pytest.approx(2 * own["p"])  # Holm over the two layers


@pytest.mark.slow
def test_the_command_compares_the_pair(runs_folder: Path, tmp_path: Path) -> None:
    models = [str(runs_folder / "baseline"), str(runs_folder / "viral")]
    done = run(
        "analyses.logit_lens",
        "--model",
        *models,
        "--limit",
        "12",
        "--null",
        "10",
        "--maps",
        "1",
        "--output_dir",
        str(tmp_path),
    )
    found = {stored.label: stored for stored in map(runs.load, runs.index(tmp_path)["folder"])}
    assert set(found) == {"baseline", "viral"}
    assert "logit_lens-" in done.stdout
    assert "reciprocal_rank" in done.stdout
    stored = found["viral"]
    scores = stored.tables["scores"]
    assert scores.notna().all(axis=None)
    assert (scores["low"] <= scores["score"]).all()
    assert (scores["score"] <= scores["high"]).all()
    assert set(scores["layer"]) == {0, 1, 2, 3}
    assert (scores["seed"] == 0).all()
    assert stored.record["words"]["red"] == "red"
    assert not stored.record["words_left_out"]
    figures = ANALYSIS.figures(found)
    words = figures["Words over image 0"]
    assert len(words.layout.sliders[0].steps) == 4
    assert sum(trace.visible for trace in words.data if trace.type == "scatter" and trace.mode == "text") == 2
    for step in words.layout.sliders[0].steps:  # each step shows both pictures and one layer of both models
        assert sum(step.args[0]["visible"]) == 4
    # two models, objects and background, null
    assert sum(trace.fill == "toself" for trace in figures["colour: right word first of its kind"].data) == 5
    assert (
        sum(
            trace.fill == "toself"
            for trace in figures["colour: right word first of its kind, difference on objects"].data
        )
        == 1
    )


def test_models_that_chose_among_other_words_are_not_compared() -> None:
    """Of four words a guess is right more often than of eight."""
    per_image = {"cells": "object", "kind": "class", "measure": "first", "layer": 1}
    values = pd.DataFrame(per_image | {"image_id": ["i0", "i1", "i2"], "value": [0.1, 0.5, 0.6]})

    def stored(label: str, words: tuple[str, ...]) -> runs.Run:
        record: Any = {"label": label, "seed": 0, "words": dict.fromkeys(words, "token")}
        return runs.Run(label, record, {"per_image": values.assign(value=values["value"] + len(words) / 10)})

    found = {
        name: stored(name, words) for name, words in (("a", ("x", "y")), ("b", ("y", "x")), ("c", ("x", "y", "z")))
    }
    assert differences(found)["model"].tolist() == ["b"]
    assert differences({"a": found["a"], "c": found["c"]}).empty


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layers", "9"], "layer 9 does not exist"),
        (["--covr", "1"], "unknown option '--covr': did you mean '--cover'"),
        (["--cover", "0"], "cover is 0.0: expected above 0 and at most 1"),
        (["--maps", "0", "--no-scores"], "maps is 0 without scores"),
        (["--data", "folder:PHOTOS"], "has no objects: expected one with objects"),
        (["--limit", "1"], "2 words with a token of their own: expected at least 2 classes or 2 colors"),
        (["--limit", "2", "--cover", "1"], "1 of 2 images have a patch covered to 1"),
    ],
)
def test_bad_input_is_one_sentence(runs_folder: Path, tmp_path: Path, words: list[str], message: str) -> None:
    (tmp_path / "photos").mkdir()
    picture(0).save(tmp_path / "photos" / "noise.png")
    given = [word.replace("PHOTOS", str(tmp_path / "photos")) for word in words]
    assert message in refused(
        "analyses.logit_lens",
        "--model",
        str(runs_folder / "viral"),
        "--limit",
        "4",
        "--output_dir",
        str(tmp_path / "out"),
        *given,
    )
    assert list((tmp_path / "out").glob("[!.]*")) == []
