"""Claims: the newest stored ledger as a table, and each claim with the numbers behind it."""

from __future__ import annotations

from functools import partial

import streamlit as st

from workbench.claims.shown import EXPLAINED, TITLE, count_verdicts, display_table
from workbench.claims.verdicts import VERDICTS
from workbench.dashboard.site import Site, choice, choices, plain
from workbench.runs import load

EMPTY = (
    "No ledger is stored yet. Try `python -m analyses.claims --runs docs/results/data_efficiency`, which judges the"
    " published runs."
)


def page(site: Site) -> None:
    """Draw the table of claims, and one claim in full."""
    st.caption(TITLE)
    if site.stored.ledger is None:
        st.info(EMPTY)
        return
    run = load(site.stored.ledger)
    table, numbers = run.tables["claims"], run.tables["numbers"]
    st.write(f"{count_verdicts(table)}. {EXPLAINED}")
    present = [name for name in VERDICTS if name in set(table["verdict"])]
    wanted = choices("verdict", present, present, "Verdicts")
    displayed = display_table(table[table["verdict"].isin(wanted)])
    st.dataframe(
        displayed,
        hide_index=True,
        width="stretch",
        key="claims",
        on_select=partial(_pick, displayed["id"].tolist()),
        selection_mode="single-row",
    )
    st.download_button("Table as CSV", run.tables["claims"].to_csv(index=False), "claims.csv", "text/csv")
    if len(table):  # one that the verdicts leave out can be opened too
        every = list(display_table(table)["id"])
        name = choice("claim", every, next(iter(displayed["id"]), every[0]), "One claim", listed=True)
        row = table.set_index("id").loc[name]
        st.markdown(f"{plain(row['claim'])} **{row['verdict']}**: {plain(row['reason'])}")
        evidence = numbers[numbers["id"] == name]
        if len(evidence):
            by_seed = evidence.pivot_table(index="seed", columns="training", values="value").reset_index()
            st.dataframe(by_seed, hide_index=True, width="stretch")
            st.caption(
                f"n = {evidence['n'].min()}; {row['expect']} than {row['null']:g} is what the claim says; rule"
                f" {row['rule']}, runs of commits {row['commits']}."
            )
        if row["commands"]:
            st.code(row["commands"], language="bash")
    record = run.record
    st.caption(
        f"Stored {record['created'][:16]} from {record['model']}, commit"
        f" {record['git'][:8]}{' (dirty)' if record['dirty'] else ''}."
    )


def _pick(ids: list[str]) -> None:
    """Show the claim of the row that was clicked."""
    rows = st.session_state["claims"]["selection"]["rows"]
    if rows and rows[0] < len(ids):
        st.session_state["claim"] = ids[rows[0]]
