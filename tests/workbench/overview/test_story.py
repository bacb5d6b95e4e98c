"""Numbers and sentences about two models, by hand; exchanging the models turns all of them round."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from tests.conftest import ROOT
from tests.workbench.overview.folders import cknna, patching, train
from workbench import figures
from workbench.figures.caption import chance_words
from workbench.intervals import mean_test
from workbench.overview.answers import answered, image_numbers
from workbench.overview.charts import curves_of
from workbench.overview.differences import Pair, by_layer, pairs_of, runs_of, strip
from workbench.overview.measures import MEASURES, scores
from workbench.overview.models import Models, read_models
from workbench.overview.stored import Stored, read_stored
from workbench.overview.story import tell
from workbench.training_folder import MEAN

QUESTIONS = 80


def right(colour: float, count: float) -> list[bool]:
    """Answers of which these shares of the two types are right; the right ones come first."""
    shares = (colour, count)
    return [i // 2 < shares[i % 2] * QUESTIONS / 2 for i in range(QUESTIONS)]


def read(root: Path) -> tuple[Models, Stored]:
    stored = read_stored(root)
    return read_models(root, stored.runs), stored


def one_pair(root: Path) -> tuple[Pair, Stored]:
    models, stored = read(root)
    first, *others = models.default()
    (pair,) = pairs_of(models, first, others)
    return pair, stored


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A baseline, and a VIRAL with more colors right, better aligned in layers 1 and 2, and worse in layer 0."""
    train(tmp_path, "baseline", right=right(0.5, 0.5))
    train(tmp_path, "viral", right=right(0.9, 0.5), aligned=True, layer=[1])
    noise = np.random.default_rng(0).normal(0, 0.01, 30)
    for name, shift in (("baseline", np.zeros(3)), ("viral", np.array([-0.1, 0.1, 0.2]))):
        cknna(tmp_path, name, {layer: 0.5 + shift[layer] + noise * (1 + shift[layer]) for layer in range(3)})
    return tmp_path


def test_every_number_is_right_by_hand(two: Path) -> None:
    pair, stored = one_pair(two)
    story = tell(pair, stored)
    table = answered(pair).by_type.set_index("category")
    assert table.loc["colour", ["first", "second", "score"]].tolist() == pytest.approx([0.5, 0.9, 0.4])
    assert table.loc["count", "score"] == 0
    assert table.loc[MEAN, ["first", "second", "score", "chance"]].tolist() == pytest.approx([0.5, 0.7, 0.2, 0.25])
    assert story.cards[1].value == "50.0 → 70.0"
    assert story.cards[1].change.startswith("+20.0 points [")
    d = answered(pair).disagreement
    assert (d.only_first, d.only_second, d.questions) == (0, 16, 80)
    assert d.share.estimate == pytest.approx(0.2)
    assert d.chance == pytest.approx(0.5)  # colour .5 * .1 + .5 * .9, count .5 * .5 + .5 * .5
    assert d.other_seed is None
    assert story.cards[2].value == "16 of 80"
    assert story.cards[2].change.endswith("] over 40 images")
    assert story.alignment is not None
    assert story.alignment.layer == 1  # the aligned one
    assert story.cards[0].title == "CKNNA with dinov2-small at layer 1"
    assert "chance 0.140" in story.cards[0].chance
    change = story.alignment.changes.set_index("layer")["score"]
    assert change.tolist() == pytest.approx([-0.1, 0.1, 0.2], abs=0.01)


def test_the_finding_follows_from_the_intervals(two: Path) -> None:
    pair, stored = one_pair(two)
    story = tell(pair, stored)
    assert story.finding == (
        "viral is more aligned with dinov2-small in layers 1 and 2 and less aligned with dinov2-small in layer 0 than"
        " baseline. viral is more accurate, clearly so in colour."
    )
    assert story.caveat.startswith("One training each: nothing here says how another seed")
    assert story.title == "Does aligning visual tokens with a vision foundation model help?"
    assert "viral also learns to make its visual tokens resemble" in story.compared


def test_exchanged_models_turn_the_sentence_round(two: Path) -> None:
    pair, stored = one_pair(two)
    there, back = tell(pair, stored), tell(pair.exchanged(), stored)
    assert back.finding == (
        "baseline is more aligned with dinov2-small in layer 0 and less aligned with dinov2-small in layers 1 and 2"
        " than viral. baseline is less accurate, clearly so in colour."
    )
    for forth, turned in zip(there.cards, back.cards, strict=True):
        if "→" in forth.value:
            assert turned.value.split(" → ") == forth.value.split(" → ")[::-1]
    forth, turned = answered(pair), answered(pair.exchanged())
    for key, other in (("score", "score"), ("low", "high"), ("high", "low")):
        assert forth.by_type[key].tolist() == pytest.approx((-turned.by_type[other]).tolist())
    assert (turned.disagreement.only_first, turned.disagreement.only_second) == (16, 0)


def test_no_difference_is_called_one(tmp_path: Path) -> None:
    train(tmp_path, "baseline", right=right(0.5, 0.5))
    train(tmp_path, "viral", right=[*right(0.5, 0.5)[:-1], True], aligned=True)
    pair, stored = one_pair(tmp_path)
    assert tell(pair, stored).finding == ("These questions do not show which of baseline and viral is more accurate.")
    words = f"python -m analyses.cknna --model {tmp_path}/baseline {tmp_path}/viral --output_dir {tmp_path}"
    assert tell(pair, stored).cards[0].missing == words


def test_of_several_types_one_is_named_only_after_correction(tmp_path: Path) -> None:
    """Among eight types without any effect, the interval of one leaves 0 out every third time."""
    train(tmp_path, "baseline", right=right(0.5, 0.5))
    train(tmp_path, "viral", right=right(0.625, 0.5), aligned=True)
    pair, stored = one_pair(tmp_path)
    answers = answered(pair)
    colour = answers.by_type.set_index("category").loc["colour"]
    assert colour["low"] > 0
    p = mean_test([1.0] * 5 + [0.0] * 35, kind="difference")
    assert answers.p_holm == pytest.approx({"colour": 2 * p, "count": 1.0})
    assert 0.025 < p < 0.05
    assert tell(pair, stored).finding == "viral is more accurate."


def test_no_difference_is_taken_over_different_numbers_of_visual_tokens(tmp_path: Path) -> None:
    """CKNNA by chance depends on the number of tokens: with fewer of them, equal models would seem to differ."""
    for name, aligned, tokens in (("baseline", False, 64), ("viral", True, 256)):
        train(tmp_path, name, right=right(0.5, 0.5), aligned=aligned)
        cknna(tmp_path, name, {layer: np.linspace(0.2, 0.3, 8) + aligned / 2 for layer in range(3)}, tokens=tokens)
    pair, stored = one_pair(tmp_path)
    runs, story = runs_of(stored, "cknna", pair.keys), tell(pair, stored)
    assert set(runs) == {"baseline", "viral"}
    assert by_layer(MEASURES["cknna"], pair, runs).empty
    assert strip(pair, stored, MEASURES).empty
    assert image_numbers(MEASURES["cknna"], pair, list(runs.values())).empty
    assert "aligned with" not in story.finding
    assert story.left_out == (
        "The CKNNA of baseline and of viral is over different numbers of visual tokens, on which its chance level"
        " depends, or with other weights of the VFM: no difference is taken.",
    )
    cknna(tmp_path, "viral", {layer: np.linspace(0.2, 0.3, 8) for layer in range(3)}, created="2026-02-02")
    story = tell(*one_pair(tmp_path))
    assert story.left_out == ()
    assert story.alignment is not None
    assert story.alignment.changes["score"].tolist() == pytest.approx([0, 0, 0])


def test_a_training_that_still_runs_is_not_said_to_have_other_data(tmp_path: Path) -> None:
    train(tmp_path, "baseline", right=right(0.5, 0.5))
    train(tmp_path, "viral", right=(), aligned=True, finished=False)
    pair, stored = one_pair(tmp_path)
    story = tell(pair, stored)
    assert "content of their training data" not in story.compared
    assert story.left_out == (
        "the answers of baseline and viral cannot be compared (viral: it is still being trained, and stores its answers"
        " at the end)",
    )
    record = json.loads((tmp_path / "baseline" / "training.json").read_text())
    train(tmp_path / "other", "viral", right=right(0.5, 0.5), aligned=True)
    shutil.rmtree(tmp_path / "viral")
    shutil.move(tmp_path / "other" / "viral", tmp_path / "viral")
    (tmp_path / "viral" / "training.json").write_text(
        json.dumps(json.loads((tmp_path / "viral" / "training.json").read_text()) | {"data": record["data"] + "x"})
    )
    assert "the content of their training data differs" in tell(*one_pair(tmp_path)).compared


def test_seeds_are_paired_and_their_interval_is_students(tmp_path: Path) -> None:
    gains = {0: 0.1, 1: 0.2, 2: 0.15}
    for seed, gain in gains.items():
        train(tmp_path, f"baseline-s{seed}", right=right(0.5, 0.5 + seed / 20), seed=seed)
        train(tmp_path, f"viral-s{seed}", right=right(0.5 + 2 * gain, 0.5 + seed / 20), seed=seed, aligned=True)
        cknna(tmp_path, f"baseline-s{seed}", {0: [0.4, 0.5]})
        cknna(tmp_path, f"viral-s{seed}", {0: [0.4 + gain, 0.5 + gain]})
    train(tmp_path, "viral-s9", right=right(0.1, 0.1), seed=9, aligned=True)  # without a partner
    pair, stored = one_pair(tmp_path)
    assert pair.over == "seeds"
    assert pair.names == ("baseline", "viral")
    assert pair.keys == [f"{name}-s{seed}" for name in ("baseline", "viral") for seed in gains]
    row = answered(pair).by_type.set_index("category").loc[MEAN]
    t = stats.t.interval(0.95, 2, np.mean(list(gains.values())), stats.sem(list(gains.values())))
    assert row["score"] == pytest.approx(0.15)
    layers = by_layer(MEASURES["cknna"], pair, runs_of(stored, "cknna", pair.keys))
    assert layers[["score", "low", "high"]].iloc[0].tolist() == pytest.approx([0.15, *t])
    assert (layers["n"].iloc[0], layers["over"].iloc[0]) == (3, "seeds")
    assert layers["p_holm"].tolist() == pytest.approx([stats.ttest_1samp(list(gains.values()), 0).pvalue])
    assert "Intervals are over 3 seeds" in tell(pair, stored).caveat
    assert "each with seeds 0, 1, 2" in tell(pair, stored).compared
    assert tell(pair, stored).cards[2].change.endswith("] over 3 seeds")
    d = answered(pair).disagreement
    assert d.only_second == pytest.approx(np.mean([80 * gain for gain in gains.values()]))
    assert d.other_seed == pytest.approx(np.mean([2, 4, 2]) / 80)  # counts differ by 1/20 of 40 per seed


def test_the_caveat_counts_the_seeds_behind_each_number(tmp_path: Path) -> None:
    """Here three seeds are chosen; one of VIRAL's has finished, and of two CKNNA is stored."""
    rng = np.random.default_rng(0)
    for seed in range(3):
        train(tmp_path, f"baseline-s{seed}", right=right(0.5, 0.5), seed=seed)
        train(tmp_path, f"viral-s{seed}", right=right(0.9, 0.5), seed=seed, aligned=True, finished=seed == 0)
    pair, stored = one_pair(tmp_path)
    assert len(pair.shared) == 3
    assert "over 40 images" in tell(pair, stored).cards[1].change
    assert tell(pair, stored).caveat == "One training each: nothing here says how another seed would come out."
    for seed in range(2):
        for name in ("baseline", "viral"):
            cknna(tmp_path, f"{name}-s{seed}", {0: rng.uniform(0.4, 0.5, 8)})
    story = tell(*one_pair(tmp_path))
    assert "over 2 seeds" in story.cards[0].change
    assert story.caveat == (
        "Accuracy compares one training each: nothing here says how another seed would come out. Intervals for CKNNA"
        " are over 2 seeds, trained with both recipes; 2 seeds are few, so the intervals are wide."
    )
    shutil.rmtree(tmp_path / "viral-s0")
    for folder in tmp_path.glob("cknna-*"):
        shutil.rmtree(folder)
    assert tell(*one_pair(tmp_path)).caveat == ""


def test_models_that_were_asked_other_questions_are_named(two: Path) -> None:
    folder = train(two, "other", right=right(0.5, 0.5), aligned=True, weight=3.0)
    record = json.loads((folder / "training.json").read_text())
    (folder / "training.json").write_text(json.dumps(record | {"test": "another"}))
    models, stored = read(two)
    (pair,) = pairs_of(models, "baseline", ["other"])
    story = tell(pair, stored)
    assert story.answered is None
    assert "other was asked 80 questions" in story.left_out[0]
    assert story.cards[1].value == "not known"


def test_drops_over_other_questions_have_no_difference(two: Path) -> None:
    """One model's tokenizer does not tell some options apart, so these questions are left out there alone."""
    for name, wrong in (("baseline", 3), ("viral", 5)):
        patching(two, name, "third", wrong=wrong)
    pair, stored = one_pair(two)
    assert by_layer(MEASURES["patching"], pair, runs_of(stored, "patching", pair.keys))["score"].tolist() == [0.2] * 2
    file = two / "patching-viral-third" / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"left_out": ["2 questions whose options are alike"]}))
    pair, stored = one_pair(two)
    assert by_layer(MEASURES["patching"], pair, runs_of(stored, "patching", pair.keys)).empty


def test_a_model_whose_weights_are_gone_still_tells(two: Path) -> None:
    """Only tables are read: there is no weight file in these folders."""
    assert not list(two.rglob("*.safetensors"))
    pair, stored = one_pair(two)
    assert "more accurate" in tell(pair, stored).finding


def test_the_strip_is_the_difference_in_standard_errors(two: Path) -> None:
    pair, stored = one_pair(two)
    table = strip(pair, stored, MEASURES).set_index("layer")
    assert set(table["measure"]) == {"cknna"}
    noise = np.random.default_rng(0).normal(0, 0.01, 30)
    changes = 0.1 + noise * 0.1
    assert table.loc[1, "z"] == pytest.approx(changes.mean() / (changes.std(ddof=1) / np.sqrt(30)))
    assert table.loc[1, "score"] == pytest.approx(changes.mean())


@pytest.mark.parametrize(("without", "left"), [((), {3}), (("viral-s0",), {2}), (("viral-s0", "baseline-s1"), set())])
def test_seeds_without_a_measure_take_no_part_in_its_difference(
    tmp_path: Path, without: tuple[str, ...], left: set[int]
) -> None:
    """As where one analysis ran without a part, such as knockout --no-objects: that part has no rows."""
    for seed in range(3):
        for name, shift in (("baseline", 0.0), ("viral", 0.1)):
            aligned = name == "viral"
            model = f"{name}-s{seed}"
            train(tmp_path, model, right=right(0.5, 0.5), seed=seed, aligned=aligned)
            folder = cknna(tmp_path, model, {layer: 0.5 + shift + 0.01 * seed * np.ones(4) for layer in range(2)})
            if model in without:
                pd.read_parquet(folder / "scores.parquet").iloc[:0].to_parquet(folder / "scores.parquet")
    pair, stored = one_pair(tmp_path)
    assert set(strip(pair, stored, MEASURES)["n"]) == left
    measure = MEASURES["cknna"]
    assert set(by_layer(measure, pair, runs_of(stored, measure.analysis, pair.keys))["n"]) == left


def test_layers_over_seeds_are_corrected_for_their_number(tmp_path: Path) -> None:
    """Of twelve layers, one whose own interval just leaves 0 out is what chance gives."""
    for seed, gain in enumerate((0.1, 0.2, 0.15)):
        for name, aligned in (("baseline", False), ("viral", True)):
            train(tmp_path, f"{name}-s{seed}", right=right(0.5, 0.5), seed=seed, aligned=aligned)
            noise = 0.01 * (seed - 1)
            layers = {layer: [0.4 + aligned * (gain if layer == 5 else noise)] * 2 for layer in range(12)}
            cknna(tmp_path, f"{name}-s{seed}", layers)
    pair, stored = one_pair(tmp_path)
    table = by_layer(MEASURES["cknna"], pair, runs_of(stored, "cknna", pair.keys)).set_index("layer")
    assert table.loc[5, "low"] > 0
    assert table.loc[5, "p_holm"] == pytest.approx(12 * stats.ttest_1samp([0.1, 0.2, 0.15], 0).pvalue)
    assert "In no layer" in tell(pair, stored).finding


def test_seeds_that_agree_to_the_last_digit_show_no_difference(tmp_path: Path) -> None:
    """As accuracy drops of few questions may: without spread between seeds, nothing says how another one comes out."""
    for seed in range(2):
        for name, shift in (("baseline", 0.0), ("viral", 0.1)):
            train(tmp_path, f"{name}-s{seed}", right=right(0.5, 0.5), seed=seed, aligned=name == "viral")
            values = {layer: (0.5 + layer * shift + 0.01 * seed) * np.ones(4) for layer in range(2)}
            cknna(tmp_path, f"{name}-s{seed}", values)
    pair, stored = one_pair(tmp_path)
    table = strip(pair, stored, MEASURES).set_index("layer")
    assert table.loc[0, ["score", "low", "high", "z"]].tolist() == [0, 0, 0, 0]  # the same in both recipes
    assert table.loc[1, "score"] == pytest.approx(0.1)
    assert table.loc[1, ["low", "high"]].tolist() == [-np.inf, np.inf]
    assert np.isnan(table.loc[1, "z"])
    assert "In no layer" in tell(pair, stored).finding


def test_the_strip_counts_the_images_of_each_layer(tmp_path: Path) -> None:
    """An image without a value in one layer counts in the others, as in the chart of the measure."""
    for name, aligned in (("baseline", False), ("viral", True)):
        train(tmp_path, name, right=right(0.5, 0.5), aligned=aligned)
        values = np.linspace(0, 1, 12) ** (1 + aligned)
        cknna(tmp_path, name, {0: values, 1: np.where(np.arange(12) < 9, values, np.nan)})
    pair, stored = one_pair(tmp_path)
    measure, columns = MEASURES["cknna"], ["layer", "score", "low", "high", "n"]
    chart = by_layer(measure, pair, runs_of(stored, measure.analysis, pair.keys))
    assert chart["n"].tolist() == [12, 9]
    quick = strip(pair, stored, MEASURES)
    assert quick[columns].to_numpy(float) == pytest.approx(chart[columns].to_numpy(float))
    assert quick["z"].tolist() == pytest.approx((chart["score"] / chart["error"]).tolist())


def test_a_dotted_line_says_that_it_is_a_quantile(two: Path) -> None:
    """Of CKNNA it is the 95th percentile of the null, .14 here, not chance, .1; a drop has neither."""
    pair, stored = one_pair(two)
    cknna_runs = list(runs_of(stored, "cknna", pair.keys).values())
    curves = curves_of(scores(MEASURES["cknna"], cknna_runs))
    assert figures.level_words(curves) == "chance (95th percentile)"
    drawn = figures.layer_curves_named(curves, y="CKNNA")
    assert chance_words(drawn) == "chance (95th percentile): 0.140"
    mean = curves.assign(level=figures.CHANCE)
    assert chance_words(figures.layer_curves_named(mean, y="CKNNA")).startswith("chance: ")
    assert figures.level_words(curves.assign(chance=np.nan)) == ""


def test_all_of_this_is_known_without_torch(two: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from workbench.overview.models import read_models; from"
        " workbench.overview.stored import read_stored; from workbench.overview.differences import pairs_of; from"
        " workbench.overview.story import tell; root = Path(sys.argv[1]); stored = read_stored(root); models ="
        " read_models(root, stored.runs); pair = pairs_of(models, *models.default()[:1], models.default()[1:])[0];"
        " print(tell(pair, stored).finding); assert 'torch' not in sys.modules, 'torch'"
    )
    done = subprocess.run([sys.executable, "-c", code, str(two)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "more aligned" in done.stdout


def test_the_heads_of_a_layer_are_averaged_image_by_image(two: Path) -> None:
    """The mean of images is the score; its interval is that of the mean over heads, not a mean of intervals."""
    rng = np.random.default_rng(1)
    images = [f"image{i:03}" for i in range(30)]
    drawn = {name: rng.uniform(0.1, 0.9, (2, 3, 30)) for name in ("baseline", "viral")}  # layer, head, image
    for name, values in drawn.items():
        folder = two / f"heads-{name}"
        folder.mkdir()
        place = [{"vfm": "dinov2-small", "layer": layer, "head": head} for layer in (1, 2) for head in range(3)]
        flat = values.reshape(6, 30)
        parts = [pd.DataFrame(each | {"image_id": images, "value": v}) for each, v in zip(place, flat, strict=True)]
        pd.concat(parts).to_parquet(folder / "per_image.parquet", index=False)
        rows = [each | {"score": v.mean(), "chance": 0.16, "n": 64} for each, v in zip(place, flat, strict=True)]
        pd.DataFrame(rows).to_parquet(folder / "scores.parquet", index=False)
        record = {"analysis": "heads", "label": name, "model": f"/x/{name}", "config": {}, "key": name}
        record |= {"tables": ["per_image", "scores"], "created": "2026-02-01"}
        (folder / "run.json").write_text(json.dumps(record))
    pair, stored = one_pair(two)
    runs = runs_of(stored, "heads", pair.keys)
    table = scores(MEASURES["heads"], [runs["viral"]]).set_index("layer")
    of_image = drawn["viral"].mean(1)
    assert table["score"].tolist() == pytest.approx(of_image.mean(1))
    assert table["chance"].tolist() == [0.16, 0.16]
    assert (table["high"] - table["low"]).tolist() == pytest.approx(2 * 2.05 * of_image.std(1, ddof=1) / 30**0.5, 0.1)
    changes = by_layer(MEASURES["heads"], pair, runs).set_index("layer")["score"]
    assert changes.tolist() == pytest.approx((drawn["viral"] - drawn["baseline"]).mean((1, 2)))
