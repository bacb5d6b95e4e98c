"""What was compared and what came out, in three numbers and a few sentences that follow from them by rule."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd

from workbench.errors import RunError
from workbench.overview.answers import Answered, answered
from workbench.overview.differences import Pair, by_layer, comparable, runs_of
from workbench.overview.measures import MEASURES, images_words, scores
from workbench.overview.models import Model
from workbench.overview.stored import Stored
from workbench.summary import Trained, what_was_compared
from workbench.training_folder import MEAN

PageName = Literal["layers", "models", "examples"]
CKNNA = MEASURES["cknna"]
FEW_SEEDS = 5
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Card:
    """One of the three numbers of the first page.

    Attributes:
        title: what the number is.
        value: the number of both models, or one number.
        change: the difference with its interval, and what the interval is over; "" if there is none.
        chance: the chance level in words.
        page: the page that shows more.
        missing: what to do to get the number, if it is not stored.
    """

    title: str
    value: str
    change: str = ""
    chance: str = ""
    page: PageName = "models"
    missing: str = ""


@dataclass(frozen=True)
class Alignment:
    """CKNNA of both groups by layer, and their difference.

    Attributes:
        vfm: the vision foundation model that tokens are compared with.
        layer: the layer of the card: the aligned one, else the last.
        curves: columns name, at, score, low, high, over, chance.
        changes: second minus first, as `by_layer` returns it.
        keys: the compared models: those with a stored run whose counterpart has one too.
        over: how many images of which data each score is over.
    """

    vfm: str
    layer: int
    curves: pd.DataFrame
    changes: pd.DataFrame
    keys: tuple[str, ...] = ()
    over: str = ""


@dataclass(frozen=True)
class Story:
    """Everything that the first page says about a pair.

    Attributes:
        compared: the sentence about the two recipes.
        finding: the sentences about the numbers, by rule.
        caveat: what the numbers do not show, "" if there are none.
        left_out: sentences about what could not be compared.
    """

    pair: Pair
    title: str
    compared: str
    cards: tuple[Card, Card, Card]
    finding: str
    caveat: str
    alignment: Alignment | None
    answered: Answered | None
    left_out: tuple[str, ...] = ()


def tell(pair: Pair, stored: Stored, layer: int | None = None) -> Story:
    """Return the story of a pair.

    Args:
        layer: the layer of the alignment card; by default the aligned one, else the last.
    """
    left_out: list[str] = []
    try:
        answers: Answered | None = answered(pair)
    except RunError as error:
        answers, left_out = None, [str(error)]
    if answers is not None:
        left_out += answers.left_out
    alignment = alignment_of(pair, stored, layer)
    left_out += _not_comparable(pair, stored)
    cards = (_alignment_card(pair, alignment), _accuracy_card(pair, answers), _disagreement_card(pair, answers))
    return Story(
        pair,
        _title(pair),
        compared(pair),
        cards,
        finding(pair, alignment, answers),
        caveat(alignment, answers),
        alignment,
        answers,
        tuple(left_out),
    )


def _title(pair: Pair) -> str:
    aligned = {group[0].aligned for group in (pair.first, pair.second)}
    if len(aligned) == 2:
        return "Does aligning visual tokens with a vision foundation model help?"
    return f"How do {pair.names[0]} and {pair.names[1]} differ?"


def compared(pair: Pair) -> str:
    """Return the sentence about what the two recipes share and how they differ."""
    a, b = pair.shared[0]
    if not a.recipe or not b.recipe:
        return " ".join(_unknown(model) for model in (a, b) if not model.recipe)
    first, second = (
        Trained(name, model.record or {"recipe": model.recipe}, pd.DataFrame())
        for name, model in zip(pair.names, (a, b), strict=True)
    )
    return what_was_compared(first, second, [model.seed for model, _ in pair.shared if model.seed is not None])


def _unknown(model: Model) -> str:
    """Return why it is not known how a model was trained."""
    elsewhere = model.state == "elsewhere"
    why = "its training folder is not in this runs folder" if elsewhere else "its record or recipe cannot be read"
    return f"How {model.key} was trained is not known here: {why}."


# --- the numbers ----------------------------------------------------------------------------------


def alignment_of(pair: Pair, stored: Stored, layer: int | None = None) -> Alignment | None:
    """Return the stored CKNNA of a pair; None if it is not stored of both.

    Of several vision foundation models, the one that a model is aligned with is taken.
    """
    runs = runs_of(stored, CKNNA.analysis, pair.keys)
    changes = by_layer(CKNNA, pair, runs) if runs else pd.DataFrame()
    if changes.empty:
        return None
    aligned = [*pair.shared[0][1].vfms, *pair.shared[0][0].vfms]
    present = list(dict.fromkeys(changes["series"]))
    vfm = next((name for name in aligned if name in present), present[0])
    changes = changes[changes["series"] == vfm]
    layers = list(changes["layer"])
    wanted = [*([] if layer is None else [layer]), *pair.shared[0][1].layers, *pair.shared[0][0].layers]
    chosen = next((each for each in wanted if each in layers), layers[-1])
    both = [(a.model, b.model) for a, b in comparable(CKNNA, pair, runs)]
    table = scores(CKNNA, list(runs.values()))
    table = table[table["series"] == vfm]
    parts = []
    for side, name in enumerate(pair.names):
        keys = [models[side] for models in both]
        of_group = table[table["model"].isin(keys)].groupby("layer")
        mean = of_group[["score", "low", "high"]].mean().assign(chance=of_group["null_q95"].max()).reset_index()
        over = images_words(table["n_images"]) if len(keys) == 1 else f"mean of {len(keys)} seeds"
        parts.append(mean.rename(columns={"layer": "at"}).assign(name=name, over=over))
    keys = [key for side in (0, 1) for key in dict.fromkeys(models[side] for models in both)]
    over = f"{images_words(table['n_images'])} of {runs[keys[0]].record.get('data')}"
    return Alignment(vfm, int(chosen), pd.concat(parts, ignore_index=True), changes, tuple(keys), over)


def _not_comparable(pair: Pair, stored: Stored) -> list[str]:
    """Return a sentence about models whose CKNNA is not comparable, if there are any."""
    runs = runs_of(stored, CKNNA.analysis, pair.keys)
    both = {a.key: b.key for a, b in pair.shared if a.key in runs and b.key in runs}
    for a, _ in comparable(CKNNA, pair, runs):
        del both[a.model]
    return [
        f"The CKNNA of {first} and of {second} is over different numbers of visual tokens, on which its chance level"
        " depends, or with other weights of the VFM: no difference is taken."
        for first, second in list(both.items())[:1]
    ]


def _alignment_card(pair: Pair, alignment: Alignment | None) -> Card:
    if alignment is None:
        return Card("Alignment (CKNNA)", "not measured yet", page="layers", missing=_measuring(pair))
    at = alignment.curves[alignment.curves["at"] == alignment.layer].set_index("name")
    change = alignment.changes.set_index("layer").loc[alignment.layer]
    return Card(
        f"CKNNA with {alignment.vfm} at layer {alignment.layer}",
        _arrow(at.loc[pair.names[0], "score"], at.loc[pair.names[1], "score"], "{:.3f}"),
        f"{change['score']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}] over {change['n']:.0f} {change['over']}",
        f"chance {at['chance'].max():.3f} (95th percentile)",
        "layers",
    )


def _measuring(pair: Pair) -> str:
    """Return the command that measures CKNNA and stores it in the folder of the models."""
    words, first = ["python", "-m", "analyses.cknna", "--model"], pair.first[0]
    folders = {model.key: str(model.folder or model.key) for models in pair.shared for model in models}
    words += [folders[key] for key in pair.keys]
    if first.folder is not None:
        words += ["--output_dir", str(first.folder.parents[len(Path(first.key).parts) - 1])]
    return shlex.join(words)


def _accuracy_card(pair: Pair, answers: Answered | None) -> Card:
    if answers is None:
        return Card("Accuracy", "not known", missing="a finished training stores its answers")
    row = answers.by_type.set_index("category").loc[MEAN]
    points = "{:+.1f} points [{:+.1f}, {:+.1f}]".format(*(100 * row[key] for key in ("score", "low", "high")))
    return Card(
        f"Accuracy on {answers.pair.first[0].test_data}, %",
        _arrow(100 * row["first"], 100 * row["second"], "{:.1f}"),
        f"{points} over {row['n']:.0f} {row['over']}",
        f"chance {100 * row['chance']:.1f}",
        "models",
    )


def _disagreement_card(pair: Pair, answers: Answered | None) -> Card:
    if answers is None:
        return Card("They disagree on", "not known", page="examples", missing="a finished training stores its answers")
    d = answers.disagreement
    share = [100 * value for value in (d.share.estimate, d.share.low, d.share.high)]
    chance = f"{100 * d.chance:.0f} % if independent"
    if d.other_seed is not None:
        chance += f"; two seeds of {pair.names[0]}: {100 * d.other_seed:.0f} %"
    return Card(
        "They disagree on",
        f"{d.only_first + d.only_second:,.0f} of {d.questions:,}",
        f"{d.only_second:,.0f} only {pair.names[1]} right, {d.only_first:,.0f} only {pair.names[0]}; "
        f"{share[0]:.1f} % [{share[1]:.1f}, {share[2]:.1f}] over {d.share.n} {d.over}",
        chance,
        "examples",
    )


def _arrow(first: float, second: float, form: str) -> str:
    return f"{form.format(first)} → {form.format(second)}"


# --- the finding ----------------------------------------------------------------------------------


def finding(pair: Pair, alignment: Alignment | None, answers: Answered | None) -> str:
    """Return what follows from the intervals, in at most two sentences: about alignment, and about accuracy.

    The difference in accuracy counts as one if its 95 % interval leaves 0 out; that of a question type or layer if
    Holm's p over all of them is below .05.
    """
    sentences = []
    if alignment is not None:
        sentences.append(_alignment_sentence(pair, alignment))
    if answers is not None:
        sentences.append(_accuracy_sentence(pair, answers))
    return " ".join(sentences) or "Nothing is stored yet that these models can be compared by."


def _alignment_sentence(pair: Pair, alignment: Alignment) -> str:
    changes = alignment.changes
    clear = changes[changes["p_holm"] < SIGNIFICANT]
    higher, lower = (
        sorted(int(layer) for layer in clear["layer"][clear[side] * sign > 0])
        for side, sign in (("low", 1), ("high", -1))
    )
    first, second = pair.names
    if not higher and not lower:
        return f"In no layer is {second} clearly more or less aligned with {alignment.vfm} than {first}."
    count = len(changes)
    parts = [
        f"{word} aligned with {alignment.vfm} {_layers(layers, count)}"
        for word, layers in (("more", higher), ("less", lower))
        if layers
    ]
    return f"{second} is {' and '.join(parts)} than {first}."


def _layers(layers: Sequence[int], count: int) -> str:
    """Return layers in words, with neighbors joined: "in layers 1 to 3 and 6"."""
    if len(layers) == count and count > 1:
        return "in every layer"
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    words = [f"{run[0]} to {run[-1]}" if len(run) > 2 else " and ".join(map(str, run)) for run in runs]
    return f"in layer{'s' if len(layers) > 1 else ''} {_listed(words)}"


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _accuracy_sentence(pair: Pair, answers: Answered) -> str:
    mean = answers.by_type[answers.by_type["category"] == MEAN].iloc[0]
    types = answers.by_type[answers.by_type["category"] != MEAN].sort_values("score")
    first, second = pair.names
    clear = types[types["category"].map(answers.p_holm) < SIGNIFICANT]
    better = list(clear["category"][clear["score"] > 0])[::-1]
    worse = list(clear["category"][clear["score"] < 0])
    if mean["low"] <= 0 <= mean["high"]:
        text = f"These questions do not show which of {first} and {second} is more accurate"
        both = [(word, names) for word, names in (("more", better), ("less", worse)) if names]
        rest = "; ".join(f"{second} is {word} accurate in {_listed(names)}" for word, names in both)
        return f"{text}{f' on average; {rest}' if rest else ''}."
    ahead = mean["low"] > 0
    named, against = (better, worse) if ahead else (worse, better)
    text = f"{second} is {'more' if ahead else 'less'} accurate"
    if named and len(named) == len(types) > 1:
        text += " in every question type"
    elif named:
        text += f", clearly so in {_listed(named)}"
    if against:
        text += f", but {'less' if ahead else 'more'} accurate in {_listed(against)}"
    return f"{text}."


def caveat(alignment: Alignment | None, answers: Answered | None) -> str:
    """Return what the intervals do not cover, "" if there are no numbers."""
    counts: dict[str, int] = {}
    if answers is not None:
        counts["Accuracy"] = len(answers.pair.shared)
    if alignment is not None:
        row = alignment.changes.iloc[0]
        counts["CKNNA"] = int(row["n"]) if row["over"] == "seeds" else 1
    if len(set(counts.values())) < 2:
        return _caveat(counts.popitem()[1]) if counts else ""
    return " ".join(_caveat(count, name) for name, count in counts.items())


def _caveat(count: int, of: str = "") -> str:
    """Return what intervals over so many seeds do not cover; `of` names the numbers, if others have other seeds."""
    if count == 1:
        each = f"{of} compares one training each" if of else "One training each"
        return f"{each}: nothing here says how another seed would come out."
    few = f"; {count} seeds are few, so the intervals are wide" if count < FEW_SEEDS else ""
    return f"Intervals{of and f' for {of}'} are over {count} seeds, trained with both recipes{few}."
