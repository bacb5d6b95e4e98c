"""One model: what it is, how its training went, what it answers right, and everything that is stored about it."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import streamlit as st

from workbench.dashboard.folders import below_root
from workbench.dashboard.site import NOBODY, Site, complain, plain
from workbench.errors import one_line
from workbench.overview import table as tables
from workbench.overview.models import Model
from workbench.training_folder import alignment_words, checkpoints

ONE = "one"  # in the address: the model whose page is shown
MEASURES = {"accuracy/mean": "accuracy", "val_lm_loss": "loss"}  # of the validation split
FILES = (("Recipe", "recipe.yaml", "yaml"), ("Model card", "README.md", "markdown"))


def opened(site: Site) -> Model | None:
    """Return the model that the address opens, None if it names none that is here."""
    named = st.query_params.get(ONE)
    was_open, st.session_state["one-open"] = st.session_state.get("one-open"), named is not None
    if named is None:
        if was_open:  # tell the browser, which still has it in its address
            st.query_params[ONE] = ""
            del st.query_params[ONE]
        return None
    if named in site.models.by_key:
        st.query_params[ONE] = named  # the browser drops it when the table's widgets, bound to the address, go
        return site.models.by_key[named]
    complain(ONE, named, "the table of all models")
    del st.query_params[ONE]
    return None


def heading(site: Site, model: Model) -> None:
    """Draw its name, its accuracy in a sentence, and the ways to the other pages."""
    st.title(plain(model.key))
    st.markdown(plain(_sentence(model)))
    with st.container(horizontal=True):
        site.link("models", "← All models")
        if model.key != site.baseline:
            site.link("home", f"Compare it with {plain(site.baseline)} →", m=[model.key], **{"with": None})
        if model.state == "finished":
            site.link("explorer", "Ask it about an image →", left=model.key, right=NOBODY)


def _sentence(model: Model) -> str:
    scored, settings = tables.accuracy_of(model), model.recipe.get("alignment")
    state = tables.state_words(model, tables.log_of(model))
    parts = [f"Alignment: {alignment_words(settings)}."] if settings else []
    if scored:
        parts.insert(
            0,
            f"Accuracy {scored['accuracy']:.3f} [{scored['low']:.3f}, {scored['high']:.3f}] on {model.test_data}, mean"
            f" of question types, 95 % over images; chance {scored['chance']:.3f}.",
        )
    if model.state != "finished":
        parts.insert(0, f"{state[0].upper()}{state[1:]}.")
    return " ".join(parts)


def details(site: Site, model: Model) -> None:
    """Draw its checkpoints, its stored analyses, its recipe and its card."""
    if model.folder is not None:
        _facts(model)
        _checkpoints(model, model.folder)
    _analyses(site, model)
    for title, name, language in FILES:
        file = None if model.folder is None else below_root(model.folder / name)
        if file is not None and file.exists():
            with st.expander(title):
                try:
                    st.code(file.read_text(encoding="utf-8", errors="replace"), language=language)
                except OSError as error:
                    st.warning(plain(f"{name} cannot be read ({one_line(error)})."))


def _facts(model: Model) -> None:
    record = model.record
    facts = {
        "folder": str(model.folder),
        "variant": model.variant,
        "seed": model.seed,
        "steps": model.recipe.get("optim", {}).get("steps"),
        "seconds of training": round(record["seconds"]) if "seconds" in record else None,
        "steps per second": round(record["steps_per_second"], 2) if "steps_per_second" in record else None,
        "commit": record.get("git", "")[:8] + (" (dirty)" if record.get("dirty") else ""),
    }
    st.markdown("  \n".join(f"**{name}**: {plain(value)}" for name, value in facts.items() if value not in (None, "")))


def _checkpoints(model: Model, folder: Path) -> None:
    """Draw a table of the checkpoints with what was measured on the validation split at their steps."""
    steps = [checkpoint.step for checkpoint in checkpoints(folder)]
    if not steps:
        return
    log = tables.log_of(model)
    rows = pd.DataFrame({"step": steps})
    for column, title in MEASURES.items():
        if column in log:
            measured = log.dropna(subset=[column]).drop_duplicates("step").set_index("step")[column]
            rows[f"{title}, validation"] = rows["step"].map(measured)
    rows["folder"] = [f"checkpoint-{step}" for step in steps]
    st.subheader("Checkpoints")
    numbers = {name: st.column_config.NumberColumn(format="%.3f") for name in rows.columns[1:-1]}
    st.dataframe(rows, hide_index=True, width="stretch", column_config=numbers)


def _analyses(site: Site, model: Model) -> None:
    rows = [
        {"analysis": run.analysis, "data": run.record.get("data", ""), "limit": run.record["config"].get("limit")}
        | {"created": run.created[:16], "trained anew since": run.stale, "key": run.key}
        for run in site.stored.runs
        if run.model == model.key
    ]
    st.subheader("Stored analyses")
    if not rows:
        st.caption("None. Evidence can start them.")
        return
    table = pd.DataFrame(rows)
    st.dataframe(
        table if table["trained anew since"].any() else table.drop(columns="trained anew since"),
        hide_index=True,
        width="stretch",
    )
