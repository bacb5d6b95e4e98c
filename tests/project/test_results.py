"""Published tables are those of the stored results beside them."""

from __future__ import annotations

import pandas as pd

from tests.conftest import ROOT

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
        assert f"{(ledger['verdict'] == verdict).sum()} " in page.split(words)[0][-20:], verdict


def test_the_values_by_seed_give_the_values_of_the_claims() -> None:
    """The mean over seeds of the difference of two trainings, for the claims that have nothing else."""
    ledger = pd.read_parquet(LEDGER / "claims.parquet").set_index("id")
    numbers = pd.read_parquet(LEDGER / "numbers.parquet")
    by_seed = numbers[numbers["id"] == "accuracy-300"].pivot(index="seed", columns="training", values="value")
    change = by_seed["viral-300"] - by_seed["baseline-300"]
    assert abs(change.mean() - ledger.loc["accuracy-300", "ours"]) < 1e-9
    assert len(change) == 6
