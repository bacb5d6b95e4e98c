"""Scores over checkpoints: planted curves, censoring, seeds, agreement with the other analyses on one checkpoint,
resuming, and the real command line."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from analyses.dynamics import ANALYSIS
from analyses.dynamics.comparison import compared, curves, differences, groups, losses, to_reach
from analyses.dynamics.evaluation import Evaluation, TrainingPoint
from analyses.dynamics.options import ACCURACY, BENCHMARK, CKNNA, DROP, MEAN_OF_BENCHMARKS, Config
from analyses.dynamics.resampling import reached_over_images
from analyses.dynamics.summaries import summary
from analyses.dynamics.training import beside
from tests.conftest import refused, run
from tests.tiny import build
from workbench import runs
from workbench.analysis.declaration import Context
from workbench.analysis.exported import caption_of
from workbench.data import load_data
from workbench.errors import ConfigError, DataError, RunError
from workbench.figures import step_differences
from workbench.hashing import fingerprint, saved_tensors
from workbench.mllm import MLLM
from workbench.runs import Run
from workbench.scoring.tables import accuracy_by_type
from workbench.stats import first_reached, mean_interval, t_interval
from workbench.training_folder import MEAN, checkpoints

STEPS = (0, 200, 400, 600, 800, 1000)


def stored(
    label: str,
    scores: list[float],
    *,
    steps: tuple[int, ...] = STEPS,
    measure: str = ACCURACY,
    of: str = MEAN,
    limit: int = 9,
) -> Run:
    """A run with one planted curve."""
    rows = [
        {**{"measure": measure, "of": of, "step": step, "score": score, "low": score - 0.01, "high": score + 0.01}}
        | {"null_mean": 0.4, "null_q95": 0.4, "n": 90, "n_images": 9, "seed": 0}
        for step, score in zip(steps, scores, strict=True)
    ]
    log = pd.DataFrame({"step": steps, "lm_loss": 1.0, "alignment_loss": np.nan if "base" in label else -0.5})
    record: dict[str, Any] = {"label": label, "data_fingerprint": "d", "config": {"limit": limit}}
    return Run(label, record, {"scores": pd.DataFrame(rows), "log": log})


SLOW = [0.5, 0.55, 0.6, 0.65, 0.7, 0.75]
FAST = [0.5, 0.6, 0.7, 0.8, 0.85, 0.9]  # at 500 steps where SLOW ends


def found(**scores: list[float]) -> dict[str, Run]:
    return {name.replace("_", "-"): stored(name.replace("_", "-"), own) for name, own in scores.items()}


# --- planted truth --------------------------------------------------------------------------------


def test_a_run_that_is_there_at_half_the_steps() -> None:
    table = compared(found(base_s0=SLOW, viral_s0=FAST, base_s1=SLOW, viral_s1=FAST)).set_index("model")
    fast = table.loc["viral"]
    assert fast["step"] == pytest.approx(500)
    assert fast["other_step"] == 1000
    assert fast["seeds"] == 2
    assert fast["difference"] == pytest.approx(-500)
    assert (fast["low"], fast["high"]) == (-np.inf, np.inf)  # two seeds that agree to the step say nothing of a third


def test_never_there_is_words_and_no_number() -> None:
    table = compared(
        found(base_s0=SLOW, viral_s0=FAST, base_s1=[0.5, 0.7, 0.8, 0.9, 0.9, 0.95], viral_s1=FAST)
    ).set_index("model")
    slow = table.loc["base"]
    assert np.isnan([slow["step"], slow["difference"], slow["low"], slow["high"]]).all()
    assert slow["reached"] == "seed 0: not within 1000 steps"
    row = to_reach(found(base_s0=SLOW, viral_s0=FAST)).set_index("model").loc["base"]
    assert np.isnan(row["step"])
    assert row["reached"] == "not within 1000 steps"
    assert row["other_step"] == 1000


def test_identical_runs_differ_by_nothing() -> None:
    same = [0.5, 0.6, 0.6, 0.8, 0.8, 0.8]
    table = compared(found(base_s0=same, viral_s0=same, base_s1=FAST, viral_s1=FAST))
    assert len(table) == 2
    assert (table[["difference", "low", "high"]] == 0).all(axis=None)
    assert (table["step"] == (600 + 1000) / 2).all()


def test_a_difference_that_all_seeds_have_has_no_interval_and_is_said_in_words() -> None:
    reach = compared(found(base_s0=SLOW, viral_s0=FAST, base_s1=SLOW, viral_s1=FAST)).set_index("model")
    assert reach.loc["viral", ["difference", "low", "high"]].tolist() == [-500, -np.inf, np.inf]
    words = [text for trace in step_differences(reach.reset_index()).data for text in trace.text or ()]
    assert "-500 steps in all 2 seeds" in words


def test_differences_are_paired_by_seed() -> None:
    later = [0.5, 0.5, 0.6, 0.7, 0.8, 0.9]
    table = compared(found(base_s0=SLOW, viral_s0=FAST, base_s1=SLOW, viral_s1=later, viral_s2=FAST)).set_index("model")
    expected = t_interval([500 - 1000, 700 - 1000])  # by hand; seed 2 has no partner
    assert table.loc["viral", ["difference", "low", "high"]].tolist() == pytest.approx(
        [expected.estimate, expected.low, expected.high]
    )
    one = compared(found(baseline=SLOW, viral=FAST)).set_index("model").loc["viral"]
    # one pair says nothing of other seeds
    assert one["difference"] == pytest.approx(-500)
    assert one["low"] == -np.inf
    assert one["high"] == np.inf


def test_first_reached_by_hand() -> None:
    # the first time counts, not the last
    assert first_reached([0, 10, 20], [0.0, 0.5, 0.4], 0.45).step == pytest.approx(9)
    assert first_reached([0, 10], [0.3, 0.1], 0.2).step == 0
    assert first_reached([200, 400], [0.3, 0.4], 0.2) == first_reached([200, 400], [0.3, 0.4], 0.3)
    early = first_reached([200, 400], [0.3, 0.4], 0.2)
    assert early.step is None
    assert early.text == "before the first evaluation at step 200"
    assert first_reached([0, 10], [0.1, 0.2], 0.2 + 1e-9).step is None
    with pytest.raises(DataError, match="expected increasing steps with one score"):
        first_reached([0, 10, 10], [0, 1, 2], 1)


def test_seeds_are_recognised_by_name_where_they_were_asked_the_same() -> None:
    plain = found(base_s0=SLOW, base_s1=SLOW, viral=FAST)
    assert {name: list(seeds) for name, seeds in groups(plain).items()} == {"base": ["0", "1"], "viral": [""]}
    assert list(groups(plain | found(base=SLOW))) == ["base-s0", "base-s1", "viral", "base"]
    other = plain | {"base-s1": stored("base-s1", SLOW, limit=8)}
    assert list(groups(other)) == ["base-s0", "base-s1", "viral"]
    assert to_reach({"a": stored("a", SLOW), "b": stored("b", FAST, limit=8)}).empty


def test_curves_over_seeds_have_students_interval_and_over_images_their_own() -> None:
    table = curves(found(base_s0=SLOW, base_s1=FAST, viral=FAST))
    base, viral = (table[table["model"] == name].set_index("step") for name in ("base", "viral"))
    expected = t_interval([0.75, 0.9], bounds=(0, 1), trials=40)
    assert base.loc[1000, ["score", "low", "high"]].tolist() == pytest.approx(
        [expected.estimate, expected.low, expected.high]
    )
    assert base["over"].eq("2 seeds").all()
    assert viral["over"].eq("9 images").all()
    assert viral.loc[1000, "low"] == pytest.approx(0.89)
    short = {"base-s0": stored("base-s0", SLOW), "base-s1": stored("base-s1", FAST[:4], steps=STEPS[:4])}
    assert curves(short)["step"].tolist() == list(STEPS[:4])  # a mean of fewer seeds is not shown among means of all
    logged = losses(found(base_s0=SLOW, base_s1=FAST, viral=FAST))
    assert set(logged["of"]) == {"language model", "alignment"}
    assert set(logged[logged["of"] == "alignment"]["model"]) == {"viral"}


def test_differences_of_scores_are_paired_by_seed_and_need_two() -> None:
    shifted = [score + 0.1 for score in SLOW]
    table = differences(
        found(base_s0=SLOW, base_s1=FAST, viral_s0=shifted, viral_s1=[score + 0.3 for score in FAST])
    ).set_index("step")
    expected = t_interval([0.1, 0.3])  # although the seeds themselves are far apart
    assert table.loc[600, ["score", "low", "high"]].tolist() == pytest.approx(
        [expected.estimate, expected.low, expected.high]
    )
    assert table["model"].eq("viral - base").all()
    assert differences(found(base=SLOW, viral=FAST)).empty


def test_a_larger_drop_is_not_a_score_to_reach() -> None:
    both = {"a": stored("a", SLOW, measure=DROP), "b": stored("b", FAST, measure=DROP)}
    assert to_reach(both).empty
    assert "others_final" not in summary(both)


def test_figures_say_what_is_not_known_and_give_no_difference_without_an_interval() -> None:
    sooner = [0.5, 0.625, 0.75, 0.8, 0.85, 0.9]  # where SLOW ends at 400 steps
    figures = ANALYSIS.figures(found(base_s0=SLOW, viral_s0=FAST, base_s1=SLOW, viral_s1=sooner))
    figure = figures["Steps to the other model's final score"]
    known = [trace for trace in figure.data if trace.mode == "markers" and trace.x]
    words = [text for trace in figure.data if trace.mode == "text" for text in trace.text or ()]
    assert len(known) == 1
    assert known[0].x[0] == pytest.approx(-550)
    assert known[0].error_x.array is not None
    assert words == ["not within 1000 steps, all 2 seeds"]
    made = ANALYSIS.figures(found(base_s0=SLOW, viral_s0=FAST, base_s1=SLOW, viral_s1=FAST))
    assert "Steps to the other model's final score" not in ANALYSIS.figures(found(baseline=SLOW, viral=FAST))
    bands = [trace for trace in made["Accuracy over training, mean of types"].data if trace.fill == "toself"]
    assert len(bands) == 2  # both seeds are the same here, and no surer than one
    assert (
        sum(
            trace.fill == "toself"
            for trace in ANALYSIS.figures(found(a=SLOW, b=FAST))["Accuracy over training, mean of types"].data
        )
        == 2
    )


def test_accuracy_of_the_mean_of_types_stays_between_0_and_1() -> None:
    rows = [{"image_id": i % 7, "category": "a" if i % 5 else "b", "chance": 0.5, "correct": i != 3} for i in range(40)]
    table = pd.DataFrame(accuracy_by_type(pd.DataFrame(rows), seed=0)).set_index("category")
    assert table.loc[MEAN, "accuracy"] == pytest.approx((31 / 32 + 1) / 2)
    assert table.loc["a", "accuracy"] == pytest.approx(31 / 32)
    assert (table["high"] <= 1).all()
    assert (table["low"] <= table["accuracy"]).all()
    assert table.loc[MEAN, "n_images"] == 7
    # 7 images' room
    assert table.loc["b", "accuracy"] == 1
    assert 1 - table.loc["b", "low"] == pytest.approx(scipy_stats.beta.ppf(0.975, 1, 7), abs=0.06)
    assert table["few"].all()  # one wrong answer
    two = mean_interval([1.0, 0.0], kind="proportion", strata=["a", "b"], groups=[0, 0])
    assert two.estimate == 0.5
    assert (two.low, two.high) == (0, 1)


# --- benchmarks ---------------------------------------------------------------------------------


def asked(label: str, curve: list[float], *, images: int = 40, spread: float = 0.0) -> Run:
    """A run with a planted curve of one benchmark: each image has the score of the curve, or one around it."""
    one = stored(label, curve, measure=BENCHMARK, of="pope, accuracy")
    noise = spread * np.random.default_rng(0).standard_normal((len(STEPS), images))
    noise -= noise.mean(axis=1, keepdims=True)
    units = [
        {"data": 0, "step": step, "stratum": "", "cluster": f"i{image}", "value": score + noise[at, image]}
        for at, (step, score) in enumerate(zip(STEPS, curve, strict=True))
        for image in range(images)
    ]
    weights = [{"of": "pope, accuracy", "data": 0, "weight": 1.0, "step": step} for step in STEPS]
    one.record["config"]["seed"] = 0
    tables = {"benchmark_units": pd.DataFrame(units), "benchmark_weights": pd.DataFrame(weights)}
    return Run(label, one.record, one.tables | tables)


def test_steps_to_a_benchmarks_final_score_have_an_interval_over_images() -> None:
    exact = {"base": asked("base", SLOW), "viral": asked("viral", FAST)}
    table = summary(exact).set_index("model")
    fast, slow = table.loc["viral"], table.loc["base"]
    assert fast[["reached_at", "reached_low", "reached_high"]].tolist() == pytest.approx([500, 500, 500])
    assert fast[["share", "share_low", "share_high"]].tolist() == pytest.approx([0.5, 0.5, 0.5])
    assert fast["resamples_reached"] == 1
    assert np.isnan(slow["reached_at"])
    assert slow["reached"] == "not within 1000 steps"
    assert (slow["reached_low"], slow["reached_high"], slow["resamples_reached"]) == (np.inf, np.inf, 0)
    noisy = {"base": asked("base", SLOW, spread=0.2), "viral": asked("viral", FAST, spread=0.2)}
    fast = summary(noisy).set_index("model").loc["viral"]
    assert fast["reached_at"] == pytest.approx(500)
    assert 0 <= fast["reached_low"] < 450
    assert 550 < fast["reached_high"] <= 1000


def test_the_level_is_that_of_the_same_images() -> None:
    """Both models gain on images that are easier for both: a level of other images would be missed half of the time."""
    same = [0.5, 0.5, 0.5, 0.5, 0.5, 0.7]
    easier = np.linspace(-0.3, 0.3, 40)
    runs_of = {}
    for label, curve in (("base", same), ("viral", [*same[:-1], 0.7001])):
        one = asked(label, curve)
        units = one.tables["benchmark_units"]
        one.tables["benchmark_units"] = units.assign(
            value=units["value"] + easier[units["cluster"].str[1:].astype(int)]
        )
        runs_of[label] = one
    fast = reached_over_images(runs_of).set_index("model").loc["viral"]
    assert fast["resamples_reached"] == 1
    assert 990 < fast["reached_low"] <= fast["reached_high"] <= 1000


def test_steps_over_images_are_averaged_over_the_seeds_of_both() -> None:
    later = [0.5, 0.5, 0.6, 0.7, 0.8, 0.9]  # at 700 steps where SLOW ends
    both = {
        "base-s0": asked("base-s0", SLOW),
        "viral-s0": asked("viral-s0", FAST),
        "base-s1": asked("base-s1", SLOW),
        "viral-s1": asked("viral-s1", later),
        "viral-s2": asked("viral-s2", FAST),
    }
    row = reached_over_images(both).set_index("model").loc["viral"]
    assert (row["reached_low"], row["reached_high"]) == pytest.approx((600, 600))
    assert reached_over_images({"base": stored("base", SLOW), "viral": stored("viral", FAST)}).empty
    # a first evaluation that is above the level was reached at some step before
    late = {name: asked(name, curve) for name, curve in (("a", SLOW), ("b", [0.8] * 6))}
    for one in late.values():
        for name in ("benchmark_units", "benchmark_weights", "scores"):
            one.tables[name] = one.tables[name][one.tables[name]["step"] > 0]
    row = reached_over_images(late).set_index("model").loc["b"]
    assert (row["reached_low"], row["reached_high"]) == (0, 200)


def test_resamples_without_a_question_are_skipped_and_counted() -> None:
    """Two data sets of one image each: half of the resamples have one of them twice, and the other one not at all."""
    runs_of = {"base": asked("base", SLOW, images=1), "viral": asked("viral", FAST, images=1)}
    for one in runs_of.values():
        units, weights = one.tables["benchmark_units"], one.tables["benchmark_weights"]
        other = units.assign(data=1, cluster="j")
        one.tables["benchmark_units"] = pd.concat([units, other], ignore_index=True)
        one.tables["benchmark_weights"] = pd.concat(
            [weights.assign(data=data, weight=0.5) for data in (0, 1)], ignore_index=True
        )
    row = reached_over_images(runs_of).set_index("model").loc["viral"]
    assert (row["reached_low"], row["reached_high"]) == pytest.approx((500, 500))
    assert 400 < row["resamples_skipped"] < 600
    for one in runs_of.values():
        units = one.tables["benchmark_units"]
        one.tables["benchmark_units"] = units.assign(value=np.nan)
    row = reached_over_images(runs_of).set_index("model").loc["viral"]
    assert row[["reached_low", "reached_high", "resamples_reached"]].isna().all()
    assert row["resamples_skipped"] == 1000


def test_a_benchmark_is_loaded_once_for_all_models(tmp_path: Path) -> None:
    file = tmp_path / "coco_pope_random.json"
    load_data("shapes:val", limit=1)[0].image.save(tmp_path / "0.png")
    file.write_text(json.dumps({"question_id": 0, "image": "0.png", "text": "Is there a cat?", "label": "no"}))
    config = Config(benchmarks=(f"pope:{tmp_path}",), only_benchmarks=True)
    identity = ANALYSIS.uses(config)
    assert list(identity) == [f"benchmark pope:{tmp_path}"]
    file.unlink()  # what is loaded again now is missed
    assert ANALYSIS.uses(config) == identity
    assert len(config.benchmark_data[f"pope:{tmp_path}"]) == 1


def test_benchmarks_asked_in_another_way_are_not_compared() -> None:
    one, other = asked("base", SLOW), asked("viral", FAST)
    other.record["benchmarks"] = [{"data": "pope:X", "prompt": "plain"}]
    assert reached_over_images({"base": one, "viral": other}).empty
    assert "others_final" not in summary({"base": one, "viral": other})


def test_the_figure_has_the_final_score_of_the_first_model_as_a_line() -> None:
    figure = ANALYSIS.figures({"base": asked("base", SLOW), "viral": asked("viral", FAST)})["Benchmarks over training"]
    (line,) = [trace for trace in figure.data if trace.name == "final score of base"]
    assert list(line.y) == [0.75, 0.75]
    assert line.line.dash == "dash"
    assert list(line.x) == [0, 1000]
    assert "chance" in {trace.name for trace in figure.data}


# --- the command ----------------------------------------------------------------------------------

FEW = ["--limit", "3", "--permutations", "1", "--null", "10", "--k", "5"]
TARGETS = ["--vfm", "dinov2-small", "own"]


@pytest.fixture(scope="module")
def output(runs_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dynamics")
    run(
        "analyses.dynamics",
        "--model",
        str(runs_folder / "baseline"),
        str(runs_folder / "viral"),
        *FEW,
        *TARGETS,
        "--output_dir",
        str(root),
    )
    return root


@pytest.mark.slow
def test_the_command_follows_a_real_pair_of_trainings(runs_folder: Path, output: Path) -> None:
    by_label = {own.label: own for own in map(runs.load, runs.index(output)["folder"])}
    scores = by_label["viral"].tables["scores"]
    assert sorted(scores["step"].unique()) == [0, 6, 12]
    assert set(scores["measure"]) == {ACCURACY, CKNNA, DROP}
    assert set(scores[scores["measure"] == CKNNA]["of"]) == {
        f"layer {layer}, {target}" for layer in (1, 2, 3) for target in ("dinov2-small", "own encoder")
    }
    assert scores.notna().all(axis=None)
    assert (scores["low"] <= scores["score"]).all()
    assert (scores["score"] <= scores["high"]).all()
    start = [
        own.tables["scores"].query("step == 0").drop(columns="step").reset_index(drop=True) for own in by_label.values()
    ]
    common = [table[table["measure"] == ACCURACY] for table in start]
    pd.testing.assert_frame_equal(*common)  # both started from one model
    log = by_label["viral"].tables["log"]
    assert log["step"].tolist() == [2, 4, 6, 8, 10, 12]
    assert log["alignment_loss"].notna().all()
    assert by_label["baseline"].tables["log"]["alignment_loss"].isna().all()
    assert by_label["viral"].record["alignment"]["layer"] == [2]
    assert by_label["viral"].record["skipped"] == {}
    assert by_label["viral"].record["prompt"] == "plain"  # type: ignore[typeddict-item]
    assert {"reached", "difference"} <= set(summary(by_label).columns)
    assert len(ANALYSIS.figures(by_label)) >= 5


@pytest.mark.slow
def test_the_end_agrees_with_the_other_analyses(runs_folder: Path, output: Path, tmp_path: Path) -> None:
    """The same images and questions give the same CKNNA and the same drop as the analyses that look at one model."""
    model = ["--model", str(runs_folder / "viral"), "--limit", "3", "--output_dir", str(tmp_path)]
    run("analyses.cknna", *model, "--k", "5", "--null", "10", "--layers", "1", "3", *TARGETS)
    run("analyses.permutation", *model, "--permutations", "1", "--layers", "0")
    one = {own.record["analysis"]: own.tables["scores"] for own in map(runs.load, runs.index(tmp_path)["folder"])}
    own = (
        next(o for o in map(runs.load, runs.index(output)["folder"]) if o.label == "viral")
        .tables["scores"]
        .query("step == 12")
        .set_index(["measure", "of"])
    )
    for row in one["cknna"].itertuples():
        assert own.loc[(CKNNA, f"layer {row.layer}, {row.target}"), ["score", "low", "high"]].tolist() == pytest.approx(
            [row.score, row.low, row.high], abs=1e-5
        )
    moved = one["permutation"].query("site == 'encoder' and kind == 'permute' and part == 'whole'")
    for row in moved.itertuples():
        assert own.loc[(DROP, row.category), "score"] == pytest.approx(row.accuracy_drop)
        assert own.loc[(ACCURACY, row.category), "score"] == pytest.approx(row.accuracy_before)


@pytest.mark.slow
def test_an_interrupted_analysis_goes_on_where_it_stopped(
    runs_folder: Path, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its chunks are there, so no checkpoint is loaded and no question is asked; another limit is another question."""
    from workbench.analysis.declaration import Where
    from workbench.analysis.execution import CHUNKS, execute

    shutil.copytree(output / CHUNKS, tmp_path / CHUNKS)
    monkeypatch.setattr("analyses.dynamics.evaluation.Quiz", lambda *_, **__: pytest.fail("asked again"))
    monkeypatch.setattr("analyses.dynamics.evaluation.read_by_grid", lambda *_: pytest.fail("read again"))
    config = Config(limit=3, permutations=1, null=10, k=5, vfm=("dinov2-small", "own"))
    again = execute(ANALYSIS, config, Where((str(runs_folder / "viral"),), tmp_path), [])
    stored_run = next(own for own in map(runs.load, runs.index(output)["folder"]) if own.label == "viral")
    pd.testing.assert_frame_equal(again["viral"].tables["scores"], stored_run.tables["scores"])
    with pytest.raises(pytest.fail.Exception, match="asked again"):
        execute(
            ANALYSIS,
            Config(limit=2, permutations=1, null=10, k=5, vfm=("dinov2-small", "own")),
            Where((str(runs_folder / "viral"),), tmp_path),
            [],
        )


def test_a_checkpoint_is_loaded_as_the_finished_model_is(tmp_path: Path) -> None:
    """And the model that the training started from is known again, whatever data type it is evaluated in."""
    folder = build("llava", tmp_path / "llava")
    trained = fingerprint(saved_tensors(MLLM.load(str(folder)).model))
    for dtype in ("float32", "bfloat16"):
        finished = MLLM.load(str(folder), dtype=dtype)
        evaluation = Evaluation(Config(), Context(finished, load_data("shapes:val", limit=2), 2), [], [])
        assert TrainingPoint(evaluation, 0, folder).mllm.fingerprint == finished.fingerprint
        assert TrainingPoint(evaluation, 0, folder).has_fingerprint(trained)
        assert not TrainingPoint(evaluation, 0, folder).has_fingerprint("of another model")
    if find_spec("bitsandbytes") is None:
        finished.load_in = "4bit"  # as if it had been loaded so
        with pytest.raises(ConfigError, match="load_in is 4bit, which needs bitsandbytes"):
            _ = TrainingPoint(evaluation, 0, folder).mllm


def test_other_checkpoints_are_another_question(runs_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(runs_folder / "viral", tmp_path / "viral")
    before = beside(Config(), str(folder))
    shutil.rmtree(folder / "checkpoint-6")
    with pytest.raises(RunError, match="has no checkpoints from before its last step"):
        beside(Config(), str(folder))
    shutil.copytree(folder / "checkpoint-12", folder / "checkpoint-6")
    assert beside(Config(), str(folder)) != before
    (folder / "checkpoint-6" / "trainer_state.json").unlink()
    assert [checkpoint.step for checkpoint in checkpoints(folder)] == [12]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "BARE"], "bare is not the folder of a finished training: expected a training.json"),
        (["--model", "NOLOG"], "nolog has no training log: expected a training.parquet"),
        (["--model", "some/hub-id"], "'some/hub-id' is not a folder"),
        (["--model", "VIRAL", "--layers", "9"], "layer 9 does not exist"),
        (["--model", "VIRAL", "--only_benchmarks"], "only_benchmarks is set, but no benchmark is named"),
        (["--model", "VIRAL", "--benchmarks", "mme:a", "mme:a"], "benchmarks names mme:a more than once"),
        (["--model", "VIRAL", "--benchmarks", "mme:nowhere"], "nowhere"),
        (["--model", "VIRAL", "--vfm", "dinov2-smal"], "did you mean 'dinov2-small'"),
        (["--model", "VIRAL", "--premutations", "2"], "unknown option '--premutations': did you mean '--permutations'"),
    ],
)
def test_bad_input_is_one_sentence(runs_folder: Path, tmp_path: Path, words: list[str], message: str) -> None:
    shutil.copytree(
        runs_folder / "viral", tmp_path / "bare", ignore=shutil.ignore_patterns("checkpoint-*", "training.json")
    )
    shutil.copytree(runs_folder / "viral", tmp_path / "nolog", ignore=shutil.ignore_patterns("training.parquet"))
    names = {"BARE": str(tmp_path / "bare"), "NOLOG": str(tmp_path / "nolog"), "VIRAL": str(runs_folder / "viral")}
    assert message in refused(
        "analyses.dynamics", *(names.get(word, word) for word in words), *FEW, "--output_dir", str(tmp_path / "out")
    )
    assert list((tmp_path / "out").glob("[!.]*")) == []


# --- the command with benchmarks ------------------------------------------------------------------


@pytest.mark.slow
def test_benchmarks_at_every_checkpoint_end_as_the_benchmark_analysis_does(runs_folder: Path, tmp_path: Path) -> None:
    """The last point of each curve has the score that `analyses.benchmark` gives to the finished model."""
    folder, rows = tmp_path / "pope", []
    folder.mkdir()
    for number, scene in enumerate(load_data("shapes:val", limit=3).scenes):
        scene[0].image.save(folder / f"{number}.png")
        for sample in scene:
            if sample.category == "exist":
                rows.append({"question_id": len(rows), "image": f"{number}.png"})
                rows[-1] |= {"text": sample.question, "label": sample.answer}
    for split in ("random", "popular"):
        (folder / f"coco_pope_{split}.json").write_text("\n".join(map(json.dumps, rows)))
    models = [str(runs_folder / name) for name in ("baseline", "viral")]
    shared = ["--output_dir", str(tmp_path), "--prompt", "plain", "--max_new_tokens", "3", "--model", *models]
    specs = [f"pope:{folder}", "shapes:test"]
    words = ["--benchmarks", *specs, "--benchmark_limit", "3", "--only_benchmarks", "--limit", "2"]
    done = run("analyses.dynamics", *shared, *words)
    assert "mean of benchmarks" in done.stdout
    found = {one.label: one for one in map(runs.load, runs.index(tmp_path)["folder"])}
    table = found["viral"].tables["scores"]
    assert sorted(table["step"].unique()) == [0, 6, 12]
    assert set(table["measure"]) == {BENCHMARK}
    assert list(dict.fromkeys(table["of"])) == [
        "pope, random and popular",
        "shapes:test, accuracy",
        "mean of benchmarks",
    ]
    assert table.notna().all(axis=None)
    last = table[table["step"] == 12].set_index("of")
    parts = last.drop(MEAN_OF_BENCHMARKS)
    for column in ("score", "null_mean"):
        assert last.loc[MEAN_OF_BENCHMARKS, column] == pytest.approx(parts[column].mean())
    assert [record["prompt"] for record in found["viral"].record["benchmarks"]] == ["plain", "plain"]
    assert "unknown copy" in found["viral"].record["benchmarks"][0]["labels"]
    for spec, of in zip(specs, parts.index, strict=True):
        run("analyses.benchmark", *shared[:-2], models[1], "--data", spec, "--limit", "3", "--blind", "off")
        measured = map(runs.load, runs.index(tmp_path)["folder"])
        final = next(one for one in measured if one.record["data"] == spec).tables["scores"]
        place = ("paper: random and popular", MEAN) if spec.startswith("pope") else ("accuracy", "all questions")
        row = final[final["scorer"] == "own"].set_index(["measure", "category"]).loc[place]
        assert last.loc[of, ["score", "low", "high", "null_mean"]].tolist() == pytest.approx(
            [row["score"], row["low"], row["high"], row["chance"]]
        )
        assert last.loc[of, "n"] == row["n"]
    drawn = ANALYSIS.figures(found)
    captions = {title: caption_of(title, figure, found).n for title, figure in drawn.items()}
    assert captions["Benchmarks over training"] == f"3 to 6 images of pope:{folder}, shapes:test"
    assert captions["Training losses"] == ""
    said = refused("analyses.dynamics", *shared, *words, "--scorer", "official")
    assert "scorer is official, which shapes:test with greedy answers does not have: expected own" in said
