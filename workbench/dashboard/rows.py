"""Tables whose rows can be chosen; the address names the chosen ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import streamlit as st

from workbench.dashboard.site import complain, write_address
from workbench.data.base import content_hash


def chosen_rows(table: pd.DataFrame, names: Sequence[str], key: str, every: Sequence[str], **more: Any) -> list[str]:
    """Draw a table, and return the names of the rows that are chosen.

    A table with other rows is another widget: Streamlit keeps the numbers of chosen rows, which would be of others.

    Args:
        table: what is drawn.
        names: of its rows.
        key: in the address.
        every: also the names of rows that filters left out.
        more: options of `st.dataframe`.
    """
    before: list[str] = st.session_state.get(f"{key}-address", [])
    named = st.query_params.get_all(key) or before
    if (gone := [name for name in named if name not in every]) and named != before:
        complain(key, ", ".join(gone), "the table")
    rows = [place for place, name in enumerate(names) if name in named]
    event = st.dataframe(
        table,
        hide_index=True,
        width="stretch",
        key=f"{key}-{content_hash(*names)}",
        on_select="rerun",
        selection_mode="multi-row",
        selection_default={"selection": {"rows": rows}},
        **more,
    )
    chosen = [names[row] for row in event["selection"]["rows"]]
    write_address(key, chosen, shown=bool(chosen))
    return chosen
