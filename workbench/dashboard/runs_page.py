"""The Runs page: training curves of several models over one another, sweeps, and the list of stored analyses.

Models that are still being trained are shown too. The page computes no number: curves, intervals and chance levels are
those in the logs.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import streamlit as st

from workbench import figures, runs, summary
from workbench.dashboard import live
from workbench.dashboard.folders import below_root, default_models, files_below, runs_root, trained_models
from workbench.errors import RunError, one_line
from workbench.training_folder import (
    LOG_FILE,
    MEAN,
    RECORD_FILE,
    alignment_words,
    cknna_log,
    evaluated_on,
    score_log,
    training_recipe,
    training_record,
    training_steps,
)

EMPTY = "Nothing is stored in {} yet. Train a model with `python -m trainer shapes_viral`, or run `viral demo`."


def page() -> None:
    """Draw the training curves of the chosen models, the sweeps and the stored analyses."""
    st.title("Runs")
    live.watch()
    demo_runs = live.demo()
    models = trained_models()
    if not models and demo_runs:
        st.info("The first curves will be here within about two minutes.")
    elif not models:
        st.info(EMPTY.format(f"`{runs_root()}`"))
    else:
        _training(models)
    _sweeps()
    _stored(demo_runs)


def _training(models: list[str]) -> None:
    st.subheader("Training")
    chosen = st.multiselect(
        "Models", models, default=live.follow("models", default_models(models)), key="models", bind="query-params"
    )
    logs = _logs(chosen)
    _summary(list(logs))
    measures = list(
        dict.fromkeys(
            c
            for log in logs.values()
            for c in log.columns
            if c.endswith("_loss") or c.startswith(("accuracy/", "alignment_"))
        )
    )
    if not measures:
        return
    # shown first: the training loss, and the measures that have an interval
    scores = ["accuracy/mean", *(["val_lm_loss"] if any("val_lm_loss_low" in log for log in logs.values()) else [])]
    first = [m for m in ("lm_loss", *scores) if m in measures] or measures[:1]
    shown = st.multiselect("Curves", measures, default=live.follow("curves", first), key="curves", bind="query-params")
    for column, measure in zip(st.columns(max(1, min(2, len(shown)))) * len(shown), shown, strict=False):
        column.plotly_chart(_curve(logs, measure), width="stretch", config=figures.EXPORT, key=f"curve-{measure}")
    if any(map(_validated, shown)):
        st.caption(
            "Bands: 95 % intervals over the images, or conversations, of the validation split; n counts questions, or"
            " answer tokens. The loss of training batches has no interval, nor has the validation loss where accuracy"
            " is measured."
        )
    _alignment_curves(list(logs))
    _warnings(logs)
    tables = {name: pd.read_parquet(file) for name in logs if (file := below_root(name) / "accuracy.parquet").exists()}
    # a model that was trained on conversations may have a validation loss instead of accuracies
    tables = {name: table for name, table in tables.items() if "accuracy" in table}
    if tables:
        st.subheader("Accuracy by question type")
        st.plotly_chart(figures.accuracy_by_type(tables), width="stretch", config=figures.EXPORT, key="accuracy")
        evaluated = dict.fromkeys(
            evaluated_on(recipe) for name in tables if (recipe := training_recipe(below_root(name)))
        )
        st.caption(
            f"On {', '.join(evaluated)}; 95 % intervals over images. One seed per model: comparing two models takes"
            " several seeds."
        )
    st.dataframe(
        pd.DataFrame([_training_row(name, log) for name, log in logs.items()]), hide_index=True, width="stretch"
    )


def _logs(names: list[str]) -> dict[str, pd.DataFrame]:
    """Return the training logs that can be read, and warn of each that cannot."""
    logs = {}
    for name in names:
        try:
            logs[name] = pd.read_parquet(below_root(name) / LOG_FILE)
        except (OSError, ValueError) as error:
            st.warning(
                f"The log of {name} cannot be read ({one_line(error)}): expected what `python -m trainer` writes there."
            )
    return logs


def _summary(chosen: list[str]) -> None:
    """If two finished models are chosen, draw what was compared and what the comparison gave."""
    if len(chosen) != 2 or not all((below_root(name) / RECORD_FILE).exists() for name in chosen):
        return
    try:
        first, second = (summary.Trained.read(name, below_root(name)) for name in chosen)
        result = summary.what_came_out(first, second, summary.outcome(first, second))
        st.info(f"{summary.what_was_compared(first, second)}\n\n{result}")
    except RunError as error:
        st.caption(f"Not compared: {error}.")


def _validated(measure: str) -> bool:
    return measure.startswith(("accuracy/", "val_"))


def _curve(logs: dict[str, pd.DataFrame], measure: str) -> go.Figure:
    """Return a chart of losses of batches, or of a measure on the validation split with its interval and chance."""
    if not _validated(measure):
        return figures.training_curves(logs, measure)
    table = pd.concat(
        [score_log(log, measure).assign(model=name) for name, log in logs.items() if measure in log], ignore_index=True
    )
    # the chance level of a loss, ln |V|, is far above its whole curve: it is written in the label, not drawn
    accuracy = measure.startswith("accuracy/")
    labels = [
        f"n = {n:.0f}" if accuracy else f"n = {n:.0f}, chance {chance:.2f}"
        for n, chance in zip(table["n"], table["chance"], strict=True)
    ]
    table["over"] = np.where(table["n"].notna(), labels, "no interval stored")
    table = table.rename(columns={"chance": "null_q95"})
    figure = figures.step_curves(
        table, y=measure, null="chance" if accuracy and table["null_q95"].notna().any() else ""
    )
    return figure.update_layout(height=360, margin={"t": 36})  # as in the chart beside it


def _alignment_curves(chosen: list[str]) -> None:
    """Draw the CKNNA that was measured during training, with its chance level."""
    parts = [cknna_log(below_root(name)).assign(model=name) for name in chosen]
    table = pd.concat([part for part in parts if len(part)], ignore_index=True) if any(map(len, parts)) else None
    if table is None:
        return
    st.subheader("CKNNA of the aligned layer")
    table["over"] = table["n_images"].map("{:.0f} images".format)
    null = "chance (95 % of the null, the highest of the models)"
    st.plotly_chart(
        figures.step_curves(table, panel="of", y="CKNNA", null=null),
        width="stretch",
        config=figures.EXPORT,
        key="cknna-curves",
    )
    curves = table[["model", "of", "n", "k", "n_images"]].drop_duplicates().itertuples(index=False)
    sizes = "; ".join(
        f"{curve.model}, {curve.of}: n = {curve.n:.0f} tokens, k = {curve.k:.0f}, {curve.n_images:.0f} images"
        for curve in curves
    )
    st.caption(
        f"Within images, on the first validation images; 95 % intervals over images. {sizes}. Curves with a different n"
        " or k have a different chance level."
    )


def _warnings(logs: dict[str, pd.DataFrame]) -> None:
    for name, log in logs.items():
        if "warning" in log:
            for row in log.dropna(subset=["warning"]).itertuples():
                st.warning(f"{name}, step {row.step}: {row.warning}")


def _sweeps() -> None:
    """Draw the tables that `python -m trainer.sweep` stored."""
    root = runs_root()
    files = {str(file.relative_to(root).with_suffix("")): file for file in files_below(root, "sweep-*.parquet")}
    if not files:
        return
    st.subheader("Sweeps")
    left, right = st.columns(2)
    name = left.selectbox("Sweep", list(files), key="sweep", bind="query-params")
    table = pd.read_parquet(files[name])
    kinds = list(dict.fromkeys(table["type"]))
    kind = right.selectbox("Question type", kinds, index=kinds.index(MEAN) if MEAN in kinds else 0, key="sweep-type")
    of_type = table[table["type"] == kind]
    st.plotly_chart(figures.sweep_figure(of_type), width="stretch", config=figures.EXPORT, key="sweep-points")
    st.caption(
        "95 % intervals over seeds; differences are paired by seed, with Holm's correction over the variants. A variant"
        " with one seed has no interval."
    )
    st.dataframe(of_type.drop(columns=["type", "against"]), hide_index=True, width="stretch")


def _training_row(name: str, log: pd.DataFrame) -> dict[str, object]:
    if not (below_root(name) / RECORD_FILE).exists():
        steps, last = training_steps(below_root(name)), log["step"].max()
        return {"model": name, "state": f"at step {last:.0f}" + (f" of {steps}" if steps else "")}
    record = training_record(below_root(name))
    recipe = record["recipe"]
    return {
        "model": name,
        "state": "finished",
        "alignment": alignment_words(recipe["alignment"]),
        "seed": recipe["seed"],
        "steps": recipe["optim"]["steps"],
        "seconds": round(record["seconds"]),
        "steps/s": round(record["steps_per_second"], 2),
        "git": record["git"][:8] + (" (dirty)" if record["dirty"] else ""),
    }


def _stored(demo_runs: bool) -> None:
    st.subheader("Analyses")
    table = runs.index(runs_root())
    if table.empty:
        hint = "No analysis is stored yet. Try `python -m analyses.cknna --model runs/baseline runs/viral`."
        st.info("The analyses come after the trainings." if demo_runs else hint)
        return
    shown = table.assign(
        options=[", ".join(f"{k}={v}" for k, v in c.items() if k not in ("data", "seed")) for c in table["config"]]
    )
    shown["created"] = shown["created"].str.slice(0, 16)
    st.dataframe(
        shown[["analysis", "label", "data", "created", "seconds", "key", "options"]], hide_index=True, width="stretch"
    )
