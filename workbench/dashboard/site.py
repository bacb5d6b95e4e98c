"""What all pages share: the models of the runs folder, the chosen ones, their colors, and links that keep all of it.

Everything that is chosen is in the address, under keys that are names of folders and hashes, so that a copied address
shows the same page: `b` the baseline, `m` the other models, `with` the variant that is compared with the baseline, `l`
the layer. What an address names and the folder does not have is said in one sentence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import streamlit as st
from streamlit.navigation.page import StreamlitPage

from workbench.dashboard.folders import runs_root
from workbench.data.base import content_hash
from workbench.files import leads_outside, parquet_columns
from workbench.overview.charts import colors_of
from workbench.overview.differences import Pair, pairs_of
from workbench.overview.models import Models, files_below, read_models, unusable_of, with_variants
from workbench.overview.stored import NOT_FOLLOWED, Stored, read_stored

T = TypeVar("T")


@dataclass
class Site:
    """The runs folder as it is now, and what is chosen of it.

    Attributes:
        colors: {key of a model, or variant: color}, for all of the folder.
        baseline: key of the pinned model, "" in an empty folder.
        others: keys of the models that are compared with it.
        pairs: the baseline's group with each other group.
        pair: the one of them that Home, Layers and Examples show; None with fewer than two models.
        pages: {name: page}, for links.
    """

    root: Path
    stored: Stored
    models: Models
    colors: Mapping[str, str]
    baseline: str = ""
    others: Sequence[str] = ()
    pairs: Sequence[Pair] = ()
    pair: Pair | None = None
    pages: dict[str, StreamlitPage] = field(default_factory=dict)

    @cached_property
    def looks(self) -> str:
        """Hash of the colors and variants of all models, on which the look of a figure depends."""
        return content_hash(*sorted(self.colors.items()), *((m.key, m.variant) for m in self.models.by_key.values()))

    @property
    def chosen(self) -> list[str]:
        """The keys of all chosen models, the baseline first."""
        return [self.baseline, *self.others] if self.baseline else []

    def words_of_models(self, keys: Sequence[str]) -> list[str]:
        """Return the models as a command line names them: by folder, or as analyses did if it is elsewhere."""
        named = {run.model: str(run.record.get("model") or run.model) for run in reversed(self.stored.runs)}
        folders = {key: self.models.by_key[key].folder for key in keys if key in self.models.by_key}
        return [str(folders.get(key) or named.get(key, key)) for key in keys]

    def address(self, **more: Any) -> dict[str, Any]:
        """Return the parameters of an address that keeps what is chosen, and `more`."""
        shared = {"b": self.baseline, "m": list(self.others)}
        if len(self.pairs) > 1 and self.pair is not None:
            shared["with"] = _option(self.pair)
        return {key: value for key, value in (shared | more).items() if value not in ("", [], None)}

    def link(self, page: str, label: str, **more: Any) -> None:
        """Draw a link to a page that keeps what is chosen."""
        st.page_link(self.pages[page], label=label, query_params=self.address(**more))


def read_site() -> Site:
    """Read the runs folder; unchanged files are not read again."""
    root = runs_root()
    stored = read_stored(root)
    models = read_models(root, stored.runs)
    return Site(root, with_variants(stored, models), models, colors_of(models))


def sweeps(root: Path) -> dict[str, str]:
    """Return {name of a sweep's table: why the file cannot be used}, first those that can be used ("")."""
    reasons = {}
    for file in files_below(root, "sweep-*.parquet"):
        name, why = file.relative_to(root).with_suffix("").as_posix(), ""
        if leads_outside(file, root):
            why = NOT_FOLLOWED
        elif parquet_columns(file) is None:
            why = "is damaged: expected the table of a sweep"
        reasons[name] = why
    return dict(sorted(reasons.items(), key=lambda item: item[1] != ""))


def unusable(site: Site) -> list[dict[str, str]]:
    """Return name and reason of each model, analysis and sweep that cannot be used."""
    rows = [(each.name, each.why) for each in unusable_of(site.models, site.stored)]
    rows += [(name, f"{name}.parquet {why}") for name, why in sweeps(site.root).items() if why]
    return [{"name": name, "why": why} for name, why in rows]


# --- what is chosen -------------------------------------------------------------------------------


def choose_models(site: Site) -> None:
    """Draw the choice of models above the page, and fill in what is chosen."""
    keys = list(site.models.by_key)
    if not keys:
        return
    default = site.models.default()
    read_address("b", keys, [default[0]])
    read_address("m", keys, default[1:], several=True)
    row = st.container(horizontal=True, vertical_alignment="bottom", key="chosen-models")
    with row.popover(_words(site)):
        st.selectbox("Baseline, from which the others are subtracted", keys, key="b")
        st.multiselect("Compared with it", keys, key="m")
        st.caption(
            "Models that differ in their seed alone are one group: numbers are then means over seeds, and intervals of"
            " differences are over seeds."
        )
    site.baseline = st.session_state["b"]
    site.others = [key for key in st.session_state["m"] if key != site.baseline]
    write_address("b", [site.baseline])
    write_address("m", st.session_state["m"] or [NOTHING])
    site.pairs = pairs_of(site.models, site.baseline, site.others) if site.others else []
    if site.pairs:
        pairs = {_option(pair): pair for pair in site.pairs}
        chosen = first = next(iter(pairs))
        if len(pairs) > 1:
            of_model = {model.key: option for option, pair in pairs.items() for model in pair.second}
            if (link := st.query_params.get("with")) in of_model and link not in pairs:  # made before a second seed
                st.query_params["with"] = of_model[link]
            with row:
                label = f"shown against {pairs[first].names[0]}"
                words = {option: f"shown: {pair.names[1]}" for option, pair in pairs.items()}.__getitem__
                chosen = choice("with", list(pairs), first, label, label_visibility="collapsed", format_func=words)
        site.pair = pairs[chosen]


def _words(site: Site) -> str:
    """Return the chosen models in a few words, for the button that opens their choice."""
    chosen = [key for key in (st.session_state.get("b"), *st.session_state.get("m", ())) if key]
    groups: dict[str, list[str]] = {}
    for key in dict.fromkeys(chosen):
        if key in site.models.by_key:
            groups.setdefault(site.models.by_key[key].variant, []).append(key)
    named = []
    for name, keys in groups.items():
        seeds = {site.models.by_key[key].seed for key in keys}
        unit = "seeds" if len(seeds) == len(keys) else "models"
        named.append(keys[0] if len(keys) == 1 else f"{name} ({len(keys)} {unit})")
    return plain(" vs ".join(named) if len(named) <= 4 else f"{named[0]} vs {len(named) - 1} others")


def _option(pair: Pair) -> str:
    """Return what the address calls a pair: its second variant, or its second model where all are of one variant."""
    second = pair.second[0]
    return second.key if second.variant == pair.first[0].variant else second.variant


WIDEST = 30  # letters of a button that fit on a phone
NOTHING = ""  # how the address says that all of several options were taken out


def choice(key: str, options: Sequence[str], default: str, label: str, *, listed: bool = False, **more: Any) -> str:
    """Draw a choice of one of a few options, which is in the address as `key`; many make a list to open (`listed`)."""
    read_address(key, options, [default], label, words=more.get("format_func", str))
    if not listed and len(options) <= 6 and sum(lengths := list(map(len, options))) < 90 and max(lengths) <= WIDEST:
        words = more.pop("format_func", str)  # the buttons of this widget read Markdown, names must not
        st.segmented_control(
            label, options, key=key, required=True, format_func=lambda each: plain(words(each)), **more
        )
    else:
        st.selectbox(label, options, key=key, **more)
    chosen = str(st.session_state[key])
    write_address(key, [chosen], shown=chosen != default)
    return chosen


def choices(key: str, options: Sequence[str], default: Sequence[str], label: str, **more: Any) -> list[str]:
    """Draw a choice of several options, which is in the address as `key`."""
    empty = "everything" if "placeholder" in more else "nothing"  # filters have a placeholder
    read_address(key, options, default, label, several=True, empty=empty)
    st.multiselect(label, options, key=key, **more)
    chosen = [str(name) for name in st.session_state[key]]
    write_address(key, chosen or [NOTHING], shown=chosen != list(default))
    return chosen


def read_address(
    key: str,
    options: Sequence[str],
    default: Sequence[str],
    label: str = "",
    *,
    several: bool = False,
    words: Callable[[str], object] = str,
    empty: str = "nothing",
) -> None:
    """Set the widget `key` before it is drawn: to what a new address names, else to the user's choice.

    The default holds until the user chooses, and follows the folder while a demo adds models to it. (Streamlit's own
    binding of widgets to the address loses what a link to another page names, and is silent about what is not there.)

    Args:
        key: of the widget and in the address.
        options: what can be chosen.
        default: chosen at first.
        label: of the widget, for what cannot be chosen.
        several: whether more than one option can be chosen.
        words: what an option is called on the page.
        empty: what is shown if nothing is chosen.
    """
    state, named = st.session_state, st.query_params.get_all(key)
    value: list[str] | None = state.get(f"{key}-address")  # Streamlit forgets widgets when the page changes
    if key in state:
        value = list(state[key]) if several else [state[key]]
    if named and named != state.get(f"{key}-address"):  # opened, followed, or gone back to
        value = [name for name in named if name in options]
        gone = [name for name in named if name not in options and name != NOTHING]
        if gone or not several:
            value = value or list(default)
        if gone:
            complain(key, ", ".join(gone), ", ".join(str(words(each)) for each in value) or empty, label=label)
    elif value is None or value == state.get(f"{key}-default"):
        value = list(default)
    value = [name for name in dict.fromkeys(value) if name in options]
    state[key] = value if several else (value or list(default))[0]
    state[f"{key}-default"] = list(default)


def write_address(key: str, values: Sequence[str], *, shown: bool = True) -> None:
    """Write a choice into the address, so that a copy of it shows the same; what is not `shown` is taken out of it."""
    if shown and st.query_params.get_all(key) != list(values):
        st.query_params[key] = list(values)
    elif not shown and key in st.query_params:
        del st.query_params[key]
    st.session_state[f"{key}-address"] = list(values)


NOBODY = "(none)"  # no model on the right of Explorer
IN_THE_FOLDER = {
    "b": "the baseline",
    "m": "the model",
    "left": "the model",
    "right": "the model",
    "on": "the model",
    "one": "the model",
    "row": "the model",
    "run": "the run",
}
ELSEWHERE = {
    "l": "layer",
    "q": "question",
    "i": "image",
    "v": "VFM",
    "with": "the comparison with",
    "claim": "the claim",
    "patch": "patch",
    "point": "token",
}


def complain(key: str, named: object, shown: object, what: str = "", label: str = "") -> None:
    """Remember that the address names something that is not here (or `what`); `complaints` says so once."""
    if not what and key in IN_THE_FOLDER:
        what = f"{IN_THE_FOLDER[key]} {named}, which is not in this folder"
    elif not what:
        what = f"{ELSEWHERE[key]} {named}" if key in ELSEWHERE else f"{named} under “{label}”"
        what += ", which is not here"
    sentence = f"The link names {what}; shown is {shown}."
    st.session_state.setdefault("complaints", {})[key] = (sentence, named)


def complaints() -> None:
    """Draw what the address names and the folder does not have, until the user has read it."""
    pending: dict[str, tuple[str, object]] = st.session_state.get("complaints", {})
    for key, (sentence, _) in list(pending.items()):
        line = st.container(horizontal=True, vertical_alignment="center")
        line.warning(plain(sentence))
        if line.button("Dismiss", key=f"dismiss-{key}"):
            del pending[key]
            st.rerun()


def whole_number(text: str) -> int | None:
    """Return the number that an address names, from 0; None if the text is none."""
    return int(text) if re.fullmatch("[0-9]{1,9}", text) else None


def plain(text: object) -> str:
    """Return a text that Markdown shows as it is: names of models and questions may contain markup."""
    return "".join(f"\\{letter}" if letter in "\\`*_{}[]()<>#+!|$~:" else letter for letter in str(text))


def cached(function: Callable[..., T]) -> Callable[..., T]:
    """Cache what a function returns for all sessions, without copies; nobody may change it.

    Arguments whose name begins with an underscore are not part of the key.
    """
    return st.cache_resource(max_entries=48, show_spinner=False)(function)  # type: ignore[no-any-return]


@st.cache_resource(max_entries=300, show_spinner=False)
def _once(key: tuple[object, ...], _make: Callable[[], Any]) -> Any:
    return _make()


def once(key: tuple[object, ...], make: Callable[[], T]) -> T:
    """Return what `make` returns, made once for all sessions; `key` has all that it depends on.

    Nobody may change it, nor copy a figure by `go.Figure(figure)`, which changes it for a moment. A figure takes longer
    to make than all else on a page.
    """
    result: T = _once(key, make)
    return result
