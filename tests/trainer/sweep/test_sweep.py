"""Sweeps: the grid is what it says, the table is right by hand, a failure or a signal loses and leaves nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import stats as scipy_stats

from tests.conftest import ROOT, SMALL, recipe, run, start
from tests.stored_runs import RECORD, store
from trainer.checks import check_vfms
from trainer.recipe import Recipe
from trainer.sweep.comparison import check_comparable, report, write
from trainer.sweep.results import finished, result_of
from trainer.sweep.runner import is_ready, noted_signals
from trainer.sweep.spec import Sweep, check
from workbench.cli import parse
from workbench.errors import ConfigError, RunError, WorkbenchError
from workbench.scoring.answers import Answers, Score
from workbench.stats import mean_interval
from workbench.training_folder import MEAN

LINE = f"{recipe('viral')} --start {{output_dir}}/stage1"
PLAIN = Sweep(variants=(f"baseline: {LINE} --alignment.objective none",), seeds=(0, 1))


def test_a_grid_is_every_combination_and_a_list_is_one_value(tmp_path: Path) -> None:
    sweep = replace(PLAIN, output_dir=tmp_path, over=LINE, grid=("alignment.layer: 2 2,3", "alignment.weight: 0.5 1"))
    names = [setting.name for setting in sweep.settings()]
    assert names == ["baseline", "layer-2_weight-0.5", "layer-2_weight-1", "layer-2+3_weight-0.5", "layer-2+3_weight-1"]
    jobs = list(sweep.runs())
    assert [str(job) for job in jobs[-2:]] == ["layer-2+3_weight-1-s0", "layer-2+3_weight-1-s1"]
    made = parse(Recipe, jobs[-1].arguments[1:], prog="test", recipe=Path(jobs[-1].arguments[0]))
    assert made.alignment.layer == (2, 3)
    assert made.alignment.weight == 1
    assert made.seed == 1
    assert made.start == tmp_path / "stage1"
    vfms = replace(PLAIN, over=LINE, grid=("alignment.vfm: dinov2-small hf:some/model",)).settings()
    assert [setting.name for setting in vfms[1:]] == ["vfm-dinov2-small", "vfm-hf-some-model"]


def test_the_first_stage_is_one_run_and_is_not_compared(tmp_path: Path) -> None:
    sweep = replace(PLAIN, output_dir=tmp_path, first=f"stage1: {recipe('stage1')}")
    assert [str(job) for job in sweep.jobs()] == ["stage1", "baseline-s0", "baseline-s1"]
    assert sweep.jobs()[0].folder == tmp_path / "stage1"
    assert "stage1" not in {job.name for job in sweep.runs()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": ("seed: 0 1",)}, "and seeds in `seeds`"),
        ({"grid": ("alignment.layer",)}, "expected 'section.key: value value"),
        ({"grid": ("alignment.layer: 2",), "over": "", "variants": ()}, "expected `variants`, or `over`"),
        ({"over": LINE}, "without a grid"),
        ({"grid": ("model.dropout: 0", "model.lora.dropout: 0")}, "two keys that end in 'dropout'"),
        ({"grid": ("alignment.layer: 2 2",)}, "two variants are called 'layer-2'"),
        ({"grid": ("optim.weight_decay: 0.05 1 5e-2",)}, "has 0.05 again as 5e-2: expected each value once"),
        (
            {"grid": ("alignment.layr: 2",)},
            "variant 'layr-2': unknown option '--alignment.layr': did you mean '--alignment.layer'",
        ),
        ({"grid": ("alignment.layer: 9",)}, "variant 'layer-9': alignment.layer is 9: expected 1 to 6"),
        ({"against": "basline"}, "did you mean 'baseline'"),
        ({"seeds": (1, 1)}, "none of them twice"),
        ({"variants": (f"baseline: {LINE} {{root}}",)}, "expected {output_dir}, {point} and {seed} alone in braces"),
        ({"variants": ("baseline: --seed 1",)}, "expected a recipe first"),
        ({"variants": (f"baseline: {LINE} --dry_run",)}, "has --dry_run, which trains nothing"),
        ({"variants": (f"baseline: {recipe('baseline')}",)}, "which several runs would train at once"),
    ],
)
def test_a_sweep_that_cannot_be_is_one_sentence_before_training(change: dict[str, object], message: str) -> None:
    given = {"grid": (), "over": ""} | change
    if given["grid"] and "over" not in change:
        given["over"] = LINE
    with pytest.raises(WorkbenchError, match=re.escape(message)):
        check(replace(PLAIN, **given))  # type: ignore[arg-type]


def cv_bench(folder: Path) -> None:
    """One question of the 2D part of CV-Bench, in its file format."""
    folder.mkdir(parents=True)
    Image.new("RGB", (40, 30)).save(folder / "1.png")
    row = {"idx": 1, "task": "Count", "question": "How many?", "choices": ["1", "2"], "answer": "(A)", "prompt": "How?"}
    (folder / "test_2d.jsonl").write_text(json.dumps(row | {"filename": "1.png", "source": "COCO"}))


PAPER = {  # the sweeps of the paper's tables: what each of their trainings changes from the first one of them
    "llava15_7b": ["objective"],
    "llava15_7b_siglip2": ["objective"],
    "qwen25_7b": ["objective"],
    "llava15_13b": ["objective"],
    "vfm": ["objective", *["vfm"] * 4],
    "layer": ["objective", "final_norm", *["layer"] * 7],
    "several": ["objective", "heads", "heads", "layer", "layer"],
    "objective": ["objective", "objective"],
    "residual": ["objective", "residual", "residual"],
    "own_encoder": ["objective", "target", "target"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PAPER)
def test_sweeps_of_the_paper_differ_in_the_alignment_alone_and_start_from_their_stage1(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert {file.stem.removeprefix("paper_") for file in Path("trainer/sweeps").glob("paper_*")} == set(PAPER)
    sweep = parse(Sweep, [], prog="sweep", recipe=Path(f"trainer/sweeps/paper_{name}.yaml"))
    stage1, baseline, *others = sweep.jobs()
    assert [job.start for job in (stage1, baseline, *others)] == [None, *[stage1.folder] * (1 + len(others))]
    first = replace(baseline.recipe(), output_dir=Path())
    assert not first.alignment.aligned
    assert stage1.recipe().model.kind == "assembled"
    for job, key in zip(others, PAPER[name], strict=True):
        recipe = replace(job.recipe(), output_dir=Path())
        assert replace(recipe, alignment=first.alignment) == first
        viral = replace(first.alignment, objective="cosine") if key != "objective" else first.alignment
        assert getattr(recipe.alignment, key) != getattr(viral, key)


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted((ROOT / "trainer" / "sweeps").glob("*.yaml")), ids=lambda f: f.stem)
def test_every_line_of_a_sweep_is_a_recipe(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trainer").symlink_to(ROOT / "trainer")
    cv_bench(tmp_path / "data" / "cv_bench")
    monkeypatch.chdir(tmp_path)
    sweep = parse(Sweep, ["--output_dir", str(tmp_path), "--seeds", "0"], prog="sweep", recipe=file)
    check(sweep)
    for job in sweep.jobs():
        check_vfms(job.recipe().alignment)
    recipes = [repr(replace(job.recipe(), output_dir=tmp_path)) for job in sweep.jobs()]
    assert len(set(recipes)) == len(recipes), "two variants are the same training"


def compared(sweep: Sweep) -> pd.DataFrame:
    return report(sweep, finished(sweep))


@pytest.mark.slow
def test_seeds_without_spread_have_no_interval(tmp_path: Path) -> None:
    """One right answer more with every seed is not a certain difference; 0.1 has a rounding error here."""
    store(tmp_path, {"baseline": [4, 5, 6], "layer-2": [5, 6, 7], "layer-3": [5, 5, 5]})
    sweep = replace(PLAIN, output_dir=tmp_path, seeds=(0, 1, 2), over=LINE, grid=("alignment.layer: 2 3",))
    own = compared(sweep).query("type == @MEAN").set_index("variant")
    assert own.loc["layer-2", "difference"] == pytest.approx(0.1)
    assert own.loc["layer-2", ["d_low", "d_high"]].tolist() == [-np.inf, np.inf]
    # equal seeds are no surer than one of them, of 20 questions
    one = mean_interval([1.0] * 10 + [0.0] * 10, kind="proportion")
    assert own.loc["layer-3", ["low", "high"]].tolist() == pytest.approx([one.low, one.high], abs=0.01)
    assert not own["few"].any()
    assert np.isfinite(own.loc["layer-3", ["d_low", "d_high"]].tolist()).all()


def test_rounding_is_no_difference(tmp_path: Path) -> None:
    """The mean of three types can differ in its last bit with their order, in every seed to the same side."""
    seeds = tuple(range(6))
    store(tmp_path, {"baseline": [5] * 6, "layer-2": [5] * 6})
    sweep = replace(PLAIN, output_dir=tmp_path, seeds=seeds, over=LINE, grid=("alignment.layer: 2",))
    right = {"baseline": (3, 2, 1), "layer-2": (1, 2, 3)}
    answers = {
        name: Answers("same", {kind: Score(n, 10, 0.25) for kind, n in zip("abc", counts, strict=True)})
        for name, counts in right.items()
    }
    runs = [(job, replace(result, last=answers[job.setting.variant])) for job, result in finished(sweep)]
    row = report(sweep, runs).set_index(["type", "variant"]).loc[(MEAN, "layer-2")]
    assert row[["difference", "p", "p_holm"]].tolist() == [0, 1, 1]


def test_a_file_is_no_output_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(WorkbenchError, match=r"output_dir is .*/file, a file: expected a folder"):
        check(replace(PLAIN, output_dir=tmp_path / "file"))


def test_an_accuracy_has_no_interval_beyond_one_and_a_difference_none_cut(tmp_path: Path) -> None:
    store(tmp_path, {"baseline": [4, 9, 10], "layer-2": [10, 10, 9]})
    sweep = replace(PLAIN, output_dir=tmp_path, seeds=(0, 1, 2), over=LINE, grid=("alignment.layer: 2",))
    own = compared(sweep).query("type == @MEAN").set_index("variant")
    assert (own["high"] > own["accuracy"]).all()
    assert (own["high"] <= 1).all()
    assert (own["low"] >= 0).all()
    assert own.loc["layer-2", "d_high"] > 1
    assert own["few"].tolist() == [False, True]  # 2 of 60 answers are wrong


@pytest.mark.slow
def test_runs_whose_names_agree_and_whose_content_does_not_are_not_compared(tmp_path: Path) -> None:
    """Such as a first stage that was trained anew between two runs."""
    store(tmp_path, {"baseline": [4, 5], "layer-2": [5, 6]})
    sweep = replace(PLAIN, output_dir=tmp_path, seeds=(0, 1), over=LINE, grid=("alignment.layer: 2",))
    recipe = RECORD["recipe"] | {"start": "runs/stage1"}

    def record(seed: int, start: str, vfm: str) -> None:
        (tmp_path / f"layer-2-s{seed}" / "training.json").write_text(
            json.dumps(RECORD | {"recipe": recipe, "start_fingerprint": start, "vfm": "x", "vfm_fingerprint": vfm})
        )
        (tmp_path / f"baseline-s{seed}" / "training.json").write_text(
            json.dumps(RECORD | {"recipe": recipe, "start_fingerprint": f"{seed}", "data": "d"})
        )

    record(0, "0", "v")
    record(1, "1", "v")
    assert len(compared(sweep))
    record(1, "0", "v")
    with pytest.raises(
        RunError,
        match=(
            r"baseline-s1 and .*layer-2-s1 name the same start, whose content was 1 and 0: expected the same in all"
            r" runs"
        ),
    ):
        compared(sweep)
    record(1, "1", "w")
    with pytest.raises(RunError, match=r"name the same vfm, whose content was v and w"):
        compared(sweep)
    (tmp_path / "layer-2-s1" / "training.json").write_text("{")
    with pytest.raises(RunError, match=r"training.json is damaged"):
        compared(sweep)


def test_runs_that_were_asked_other_questions_are_not_compared(tmp_path: Path) -> None:
    store(tmp_path, {"baseline": [4, 5], "layer-2": [5, 6]})
    sweep = replace(PLAIN, output_dir=tmp_path, seeds=(0, 1), over=LINE, grid=("alignment.layer: 2",))
    assert len(compared(sweep))
    (tmp_path / "layer-2-s1" / "training.json").write_text(json.dumps(RECORD | {"val": "other"}))
    with pytest.raises(RunError, match=r"baseline-s0 and .*layer-2-s1 were asked different questions"):
        compared(sweep)


def test_what_a_sweep_cannot_compare_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(
        json.dumps([{"id": "a", "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "yes"}]}])
    )
    words = (
        f"trainer/recipes/llava15_7b_baseline.yaml --data.train llava_json:{tmp_path}/c.json --data.val"
        f" llava_json:{tmp_path}/c.json"
    )
    with pytest.raises(ConfigError, match=r"is evaluated on .* by the loss: expected questions with options"):
        check(Sweep(output_dir=tmp_path / "out", variants=(f"baseline: {words}",)))
    untested = f"baseline: {words} --data.val shapes:val --data.test llava_json:{tmp_path}/c.json"
    with pytest.raises(ConfigError, match=r"is evaluated on llava_json:.* by the loss"):  # the test set is compared
        check(Sweep(output_dir=tmp_path / "out", variants=(untested,)))
    check(Sweep(output_dir=tmp_path / "out", variants=(f"baseline: {words} --data.test shapes:test",)))
    with pytest.raises(ConfigError, match=r"two runs of the sweep would be trained in .*baseline-s0"):
        check(replace(PLAIN, output_dir=tmp_path, first="baseline-s0: trainer/recipes/shapes_stage1.yaml"))
    assert next(
        Sweep(output_dir=tmp_path, variants=(f"baseline: {recipe('stage1')} --start=runs/a",)).runs()
    ).start == Path("runs/a")


@pytest.mark.parametrize("inside", ["", "/best", "/checkpoint-400"])
def test_a_run_that_starts_from_a_folder_in_another_run_waits_for_that_run(inside: str, tmp_path: Path) -> None:
    line = f"{recipe('stage1')} --start {{output_dir}}/stage1-s{{seed}}{inside}"
    (job,) = Sweep(output_dir=tmp_path, seeds=(0,), variants=(f"baseline: {line}",)).runs()
    assert job.start == tmp_path / "stage1-s0"
    (tmp_path / "stage1-s0" / "best").mkdir(parents=True)
    (tmp_path / "stage1-s0" / "best" / "model.safetensors").write_text("")
    assert not is_ready(job)
    (tmp_path / "stage1-s0" / "training.json").write_text("{}")
    assert is_ready(job)
    for place, folder in ((tmp_path / "a" / "b", tmp_path / "a" / "b"), ("~/m", Path.home() / "m")):
        line = f"baseline: {recipe('stage1')} --start {place}"
        assert next(Sweep(output_dir=tmp_path, seeds=(0,), variants=(line,)).runs()).start == folder
    (other,) = Sweep(
        output_dir=tmp_path / "b", seeds=(0,), variants=(f"baseline: {recipe('stage1')} --start {tmp_path}/m",)
    ).runs()
    assert not is_ready(other)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.safetensors").write_text("")
    assert is_ready(other)


def test_runs_with_other_global_batches_are_not_compared(tmp_path: Path) -> None:
    """The recipe does not say how many processes there are, each of which has its own batch."""
    store(tmp_path, {"baseline": [4, 5], "layer-2": [5, 6]})
    sweep = replace(PLAIN, output_dir=tmp_path, seeds=(0, 1), over=LINE, grid=("alignment.layer: 2",))
    for job in sweep.runs():
        file = job.folder / "training.json"
        file.write_text(
            json.dumps(json.loads(file.read_text()) | {"global_batch": 32 if job.name == "baseline" else 8})
        )
    with pytest.raises(RunError, match=r"was trained on 32 images a step and .*layer-2-s0 on 8, since their numbers"):
        compared(sweep)
    for job in sweep.runs():  # a recipe that asks for more images a step
        file = job.folder / "training.json"
        record = json.loads(file.read_text())
        record["recipe"]["optim"]["accumulation"] = 4 if job.name == "baseline" else 1
        file.write_text(json.dumps(record))
    check_comparable([(job, result_of(sweep, job)) for job in sweep.runs()])


@pytest.mark.slow
def test_the_table_is_right_by_hand_and_stored(tmp_path: Path) -> None:
    """Three seeds of three variants with known answers: intervals of means and of differences, sign flips and Holm
    computed here from scratch."""
    right = {"baseline": [4, 5, 6], "layer-2": [6, 8, 7], "layer-3": [5, 5, 9]}
    store(tmp_path, right)
    sweep = replace(PLAIN, output_dir=tmp_path, seeds=(0, 1, 2), over=LINE, grid=("alignment.layer: 2 3 4",))
    table = compared(sweep)
    own = table[table["type"] == MEAN].set_index("variant")
    assert list(own.index) == ["baseline", "layer-2", "layer-3"]
    assert (own["n"] == 20).all()
    assert (own["chance"] == 0.5).all()
    assert (own["seeds"] == "0 1 2").all()
    t = scipy_stats.t.ppf(0.975, 2) / np.sqrt(3)
    p = {}
    for variant, values in right.items():
        values = np.array(values) / 10
        p_mean, low, high = own.loc[variant, ["accuracy", "low", "high"]]
        for end in (low, high):  # as far from the mean as Student allows, where the spread goes with p (1 - p)
            allowed = t * values.std(ddof=1) * np.sqrt(end * (1 - end) / (p_mean * (1 - p_mean)))
            assert abs(end - p_mean) == pytest.approx(allowed)
            assert p_mean == pytest.approx(values.mean())
        if variant != "baseline":
            d = values - np.array(right["baseline"]) / 10
            assert own.loc[variant, ["difference", "d_low", "d_high"]].tolist() == pytest.approx(
                [d.mean() + side * t * d.std(ddof=1) for side in (0, -1, 1)]
            )
            flips = [abs(np.dot(d, [a, b, c])) for a in (1, -1) for b in (1, -1) for c in (1, -1)]
            p[variant] = np.mean([flip >= abs(d.sum()) - 1e-9 for flip in flips])
            assert own.loc[variant, "p"] == pytest.approx(p[variant])
    low, high = sorted(p, key=lambda name: p[name])
    assert own.loc[low, "p_holm"] == pytest.approx(min(1, 2 * p[low]))
    assert own.loc[high, "p_holm"] == pytest.approx(min(1, max(2 * p[low], p[high])))
    assert np.isnan(own.loc["baseline", "difference"])
    assert np.isnan(own.loc["baseline", "p_holm"])
    page = write(sweep, finished(sweep), table, "mine").read_text()
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "sweep-mine.parquet"), table)
    # chance, the only line with a name
    assert "n = 20 questions a run" in page
    assert "over seeds 0, 1, 2" in page
    assert '"showlegend":true' in page
    assert "layer-2" in page
    assert "at least 0.25" in page
    assert not re.search(r"<(script|link)[^>]+(src|href)=\"http", page)


def test_a_single_seed_has_no_interval_and_is_drawn(tmp_path: Path) -> None:
    from workbench.figures import sweep_points

    row = {
        "variant": "baseline",
        "accuracy": 0.5,
        "low": -np.inf,
        "high": np.inf,
        "seeds": "0",
        "n": 8,
        "chance": 0.4,
        "against": "baseline",
    }
    table = pd.DataFrame([row | dict.fromkeys(("pairs", "difference", "d_low", "d_high", "p_holm"), np.nan)])
    drawn = sweep_points(table).to_json()
    assert "Infinity" not in drawn
    assert '"baseline"' in drawn


@pytest.mark.slow
def test_a_failed_run_is_named_and_loses_no_other(tmp_path: Path) -> None:
    flags = " ".join(SMALL).replace("--optim.steps 12", "--optim.steps 2")
    sweep = tmp_path / "mine.yaml"
    sweep.write_text(
        f"output_dir: {tmp_path / 'out'}\nseeds: [0]\nvariants:\n  - 'broken: {recipe('stage1')} {flags} --data.val"
        f" shapes:nope'\n  - 'after: {recipe('stage1')} --start {{output_dir}}/broken-s0 {flags}'\n  - 'baseline:"
        f" {recipe('stage1')} {flags}'\n"
    )
    done = run("trainer.sweep", str(sweep), code=2)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: 2 runs are missing (broken-s0: ")
    assert "nope" in last
    assert "after-s0: not started, since the run in" in last
    assert "baseline" in done.stdout
    assert (tmp_path / "out" / "baseline-s0" / "training.json").exists()
    assert (tmp_path / "out" / "sweep-mine.parquet").exists()
    assert not (tmp_path / "out" / "broken-s0").exists()


@pytest.mark.slow
def test_sigterm_stops_the_trainings(tmp_path: Path) -> None:
    sweep = tmp_path / "mine.yaml"
    sweep.write_text(
        f"output_dir: {tmp_path / 'out'}\nseeds: [0]\nvariants:\n  - 'baseline: {recipe('stage1')} {' '.join(SMALL)}"
        " --optim.steps 90000'\n"
    )
    process = start("trainer.sweep", str(sweep))
    while "step 2/" not in process.err:
        assert process.poll() is None, process.err
        time.sleep(0.05)
    children = [int(word) for word in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    process.send_signal(signal.SIGTERM)

    assert children
    assert process.wait() == 143
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline, "a training outlived its sweep"
        time.sleep(0.05)


def test_signals_are_noted_and_ignored_ones_stay_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with noted_signals() as caught:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if number != signal.SIGINT or signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
                    os.kill(os.getpid(), number)
        assert [n for n in caught if n != signal.SIGINT] == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_bad_sweep_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("gird: [1]\n")
    with pytest.raises(ConfigError, match="unknown key 'gird'"):
        parse(Sweep, [], prog="sweep", recipe=tmp_path / "x.yaml")
