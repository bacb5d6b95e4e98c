"""Published tables are those of the stored results beside them."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest

from tests.conftest import ROOT
from trainer.sweep.comparison import report
from trainer.sweep.results import finished
from trainer.sweep.spec import Sweep
from workbench.cli import parse
from workbench.training_folder import BEST_ROW, MEAN

LEDGER = ROOT / "docs" / "results" / "ledger"
JUDGED = ("reproduced", "contradicted", "not shown")


def table_of(ledger: pd.DataFrame) -> str:
    """The judged claims of a stored ledger as a Markdown table."""
    lines = ["| claim | value and 95 % interval | of | p, corrected | verdict |", "|---|---|---|---|---|"]
    for row in ledger[ledger["verdict"].isin(JUDGED)].to_dict("records"):
        value = f"{row['ours']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
        corrected = f"{row['p_holm']:.2g}" if row["p_holm"] >= 0.001 else "< .001"
        verdict = "**reproduced**" if row["verdict"] == "reproduced" else row["verdict"]
        lines.append(f"| `{row['id']}`: {row['claim']} | {value} | {row['trainings']} | {corrected} | {verdict} |")
    return "\n".join(lines)


def test_the_page_of_the_ledger_has_its_stored_numbers() -> None:
    ledger = pd.read_parquet(LEDGER / "claims.parquet")
    page = (ROOT / "docs" / "results" / "ledger.md").read_text()
    assert table_of(ledger) in page
    for verdict, words in (("reproduced", "are reproduced"), ("not shown", "not shown"), ("no runs yet", "have no")):
        count = (ledger["verdict"] == verdict).sum()
        assert (words in page) == (count > 0), verdict
        assert count == 0 or f"{count} " in page.split(words)[0][-20:], verdict


def test_the_values_by_seed_give_the_values_of_the_claims() -> None:
    """The mean over seeds of the difference of two trainings, for the claims that have nothing else."""
    ledger = pd.read_parquet(LEDGER / "claims.parquet").set_index("id")
    numbers = pd.read_parquet(LEDGER / "numbers.parquet")
    by_seed = numbers[numbers["id"] == "accuracy-300"].pivot(index="seed", columns="training", values="value")
    change = by_seed["viral-300"] - by_seed["baseline-300"]
    assert abs(change.mean() - ledger.loc["accuracy-300", "ours"]) < 1e-9
    assert len(change) == 6


# --- scarce supervision ---------------------------------------------------------------------------

PAGES = [ROOT / "docs" / "results" / name for name in ("data_efficiency.md", "smol.md")]
REPORT = r"\(`python -m trainer\.sweep (\S+) --report --exported (\S+?)(?: .*?)?`"
ACCURACY, DIFFERENCE = ("accuracy", "low", "high"), ("difference", "d_low", "d_high")
VARIANTS = {
    "baseline": "baseline",
    "VIRAL": "viral",
    "shuffled targets (control)": "shuffled",
    "centered targets": "centered",
    "relation objective": "relation",
    "the model's own encoder as the target": "encoder",
    "DINOv2 as the target": "dinov2",
    "**rival:** baseline with weight decay 5": "decay",
    "**rival:** baseline with dropout .1": "dropout",
    "**rival:** baseline with 3000 steps": "longer",
    "**rival:** baseline that sees EfficientNet-Lite0 as a second encoder": "two_encoders",
    "VIRAL with weight decay 5": "viral_decay",
    "baseline, best checkpoint": f"baseline{BEST_ROW}",
    "baseline, best checkpoint (stopped early)": f"baseline{BEST_ROW}",
    "VIRAL, best checkpoint": f"viral{BEST_ROW}",
    "baseline in two stages": "baseline_two_stages",
    "VIRAL in two stages": "viral_two_stages",
    "least-aligned heads": "heads",
    "predict the encoder's features from the last layer": "predict_last",
    "predict them from layer 3": "predict_middle",
    "predict those of hidden tokens, last layer": "predict_masked",
    "aligned layer 3 (VIRAL)": "viral",
    "weight .5 (VIRAL)": "viral",
    "EfficientNet-Lite0 (VIRAL)": "viral",
    "DINOv2": "dinov2",
    "both": "both",
    **{f"aligned layer {layer}": f"layer-{layer}" for layer in (1, 2, 4, 5, 6)},
    **{f"weight {weight}": f"weight-{weight.replace('.', '0.')}" for weight in (".1", ".25", "1", "2")},
}


def printed(row: pd.Series, names: tuple[str, str, str], sign: str = "") -> str:
    """A score with its interval as the page prints it."""
    score, low, high = (f"{row[name]:{sign}.3f}".replace("0.", ".", 1) for name in names)
    return f"{score} [{low}, {high}]"


def mean_rows(sweep: str, exported: str, *options: str) -> pd.DataFrame:
    """The report of a sweep from its exported runs: the mean of question types."""
    spec = parse(Sweep, ["--report", "--exported", exported, *options], prog="", description="", recipe=ROOT / sweep)
    table = report(spec, finished(spec))
    return table[table["type"] == MEAN]


@pytest.mark.parametrize(
    ("page", "sweep", "exported"),
    sorted({(page, *found) for page in PAGES for found in re.findall(REPORT, page.read_text())}),
)
def test_tables_of_a_sweep_are_those_of_its_exported_runs(page: Path, sweep: str, exported: str) -> None:
    """The table above the command that makes it: every accuracy and every difference."""
    mean = mean_rows(sweep, exported)
    above, _, table = page.read_text().split(f"(`python -m trainer.sweep {sweep} ")[0].rpartition("\n|---")
    lines = [line for line in table.splitlines()[1:] if line.startswith("|")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    to_viral = (
        mean_rows(sweep, exported, "--against", "viral") if "difference to VIRAL" in above.splitlines()[-1] else None
    )
    for label, accuracy, difference, *more in rows:
        if label.isdigit():
            pair = mean[mean["limit_train"] == int(label)].set_index("variant")
            assert [accuracy, difference] == [printed(pair.loc[name], ACCURACY) for name in ("baseline", "viral")]
            shuffled = [printed(pair.loc["shuffled"], ACCURACY), printed(pair.loc["shuffled"], DIFFERENCE, "+")]
            assert more == [printed(pair.loc["viral"], DIFFERENCE, "+"), *shuffled]
        else:
            of = mean[mean["variant"].isin([VARIANTS[label], f"{VARIANTS[label]}_limit_train-300"])]
            row = (of[of["limit_train"] == 300] if "limit_train" in of else of).squeeze()
            assert accuracy == printed(row, ACCURACY), label
            assert difference == ("" if label == "baseline" else printed(row, DIFFERENCE, "+")), label
            if to_viral is not None:
                against = to_viral[to_viral["variant"] == VARIANTS[label]].squeeze()
                assert more == ["" if label == "VIRAL" else printed(against, DIFFERENCE, "+")], label
    assert len(rows) >= 3


# --- a pretrained language model ------------------------------------------------------------------


def test_the_runs_with_a_pretrained_language_model_are_those_exported() -> None:
    """The page has one row for each exported run, with its accuracy."""
    exported = ROOT / "docs" / "results" / "scarce_smol"
    spec = parse(
        Sweep,
        ["--report", "--exported", str(exported)],
        prog="",
        description="",
        recipe=ROOT / "trainer" / "sweeps" / "scarce_smol.yaml",
    )
    runs = finished(spec)
    rows = re.findall(r"^\| `([a-z]+-s\d+)` \| (\.\d+) ", (ROOT / "docs" / "results" / "smol.md").read_text(), re.M)
    types = {str(job): [score.right / score.n for score in result.last.types.values()] for job, result in runs}
    assert dict(rows) == {name: f"{sum(each) / len(each):.3f}".lstrip("0") for name, each in types.items()}
    assert {result.environment["git"][:7] for _, result in runs} == {"ec1dba7"}
    assert len({result.last.asked for _, result in runs}) == 1
