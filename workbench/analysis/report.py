"""Several analyses as one page of HTML that needs nothing else: no network when it is opened, and no button that
uploads."""

from __future__ import annotations

import base64
import inspect
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib import import_module
from pathlib import Path

import pandas as pd

from workbench.analysis.declaration import Analysis
from workbench.claims.shown import EXPLAINED, TITLE, count_verdicts, display_table
from workbench.figures import Figure, html_figure, javascript
from workbench.files import atomic_file
from workbench.runs import Run

LONG = 16  # rows of a table that is shown unfolded

# The browser itself refuses every request: scripts and styles are the page's own, pictures are inside it. (plotly
# compiles WebGL charts, hence unsafe-eval.)
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:;"
    " worker-src blob:; base-uri 'none'; form-action 'none'"
)
STYLE = """
:root {
  color-scheme: light dark;
  --text: #1d2129; --quiet: #5f6672; --line: #d9dce1; --back: #ffffff; --raised: #f5f6f8;
  --link: #0065a3; --warn: #8f4300
}
@media (prefers-color-scheme: dark) {
  :root {
    --text: #e4e6ea; --quiet: #9aa1ac; --line: #363b44; --back: #14171c; --raised: #1d2127;
    --link: #6cb6ea; --warn: #f0a66b
  }
}
* { box-sizing: border-box }
body {
  margin: 0 auto; padding: 2rem 1.5rem 5rem; max-width: 76rem; background: var(--back); color: var(--text);
  font: 15px/1.55 system-ui, sans-serif
}
h1 { font-size: 1.9rem; margin: 0 0 .4rem }
h2 { font-size: 1.4rem; margin: 3.2rem 0 .3rem; padding-top: .9rem; border-top: 1px solid var(--line) }
h3 { font-size: 1.02rem; margin: 1.8rem 0 .2rem }
a { color: var(--link) }
p { max-width: 52rem }
code, pre { font: 13px/1.5 ui-monospace, monospace }
pre { background: var(--raised); padding: .7rem .9rem; overflow-x: auto; border-radius: 6px }
details { margin: .6rem 0 }
summary { cursor: pointer; color: var(--quiet) }
nav ul { padding-left: 1.2rem; margin: .3rem 0 }
.quiet { color: var(--quiet) } .warn { color: var(--warn) }
.scroll { overflow: auto; max-height: 32rem; border: 1px solid var(--line); border-radius: 6px }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
th { position: sticky; top: 0; background: var(--raised) }
.claims th, .claims td { text-align: left; white-space: normal; min-width: 7rem; vertical-align: top }
.left table { width: 100% } .left th { width: 7rem }
.left th, .left td { text-align: left; white-space: normal; overflow-wrap: anywhere; position: static }
"""


@dataclass(frozen=True)
class Section:
    """What is said of one analysis.

    Attributes:
        models: labels of those that it could be run on; none where it was skipped.
        notes: why the others, or all, were left out.
        commands: the command line of each run.
        figures: {title: figure}.
        table: the summary.
    """

    analysis: Analysis
    models: Sequence[str] = ()
    notes: Sequence[str] = ()
    commands: Sequence[Sequence[str]] = ()
    figures: Mapping[str, Figure] = field(default_factory=dict)
    table: pd.DataFrame = field(default_factory=pd.DataFrame)


def write(
    target: Path, title: str, facts: Mapping[str, str], sections: Sequence[Section], ledger: Run | None = None
) -> None:
    """Write the report; on any failure `target` is as it was before."""
    with atomic_file(target) as partial:
        partial.write_text(page(title, facts, sections, ledger), encoding="utf-8")


def page(title: str, facts: Mapping[str, str], sections: Sequence[Section], ledger: Run | None = None) -> str:
    """The whole page; `facts` are shown as a table under the title, the stored claims ledger, if there is one, before
    the analyses."""
    names = [section.analysis.name for section in sections]
    contents = "".join(
        f'<li><a href="#{escape(s.analysis.name)}">{escape(s.analysis.title)}</a>{_state(s)}</li>' for s in sections
    )
    body = "".join(_section(section, names) for section in sections)
    if ledger is not None:
        contents = f'<li><a href="#claims">{escape(TITLE)}</a></li>{contents}'
        body = _ledger(ledger) + body
    return _document(title, facts, f"<nav><h3>Contents</h3><ul>{contents}</ul></nav>\n{body}")


def figure_page(target: Path, title: str, facts: Mapping[str, str], figure: Figure, table: pd.DataFrame) -> None:
    """Write one figure and its table as such a page; on any failure `target` is as it was before."""
    with atomic_file(target) as partial:
        partial.write_text(
            _document(title, facts, html_figure(figure, "figure") + _table(table, title.lower().replace(" ", "-"))),
            encoding="utf-8",
        )


def _document(title: str, facts: Mapping[str, str], body: str) -> str:
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts.items())
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{escape(title)}</title>\n<link rel="icon" href="data:,">\n'
        f"<style>{STYLE}</style>\n<script>{javascript()}</script>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f'<div class="scroll left"><table>{rows}</table></div>\n{body}</body>\n</html>\n'
    )


def _state(section: Section) -> str:
    return "" if section.models else ' <span class="quiet">(skipped)</span>'


def _ledger(ledger: Run) -> str:
    """The claims and their verdicts."""
    table, record = ledger.tables["claims"], ledger.record
    said = f"{count_verdicts(table)}. {EXPLAINED}"
    where = f"Stored {record['created'][:16]} from {record['model']}: {shlex.join(record['argv'])}"
    parts = [
        f'<section><h2 id="claims">{escape(TITLE)}</h2>',
        f"<p>{escape(said)}</p>",
        f'<p class="quiet">{escape(where)}</p>',
    ]
    return "\n".join([*parts, f'<div class="claims">{_table(display_table(table), "claims")}</div>']) + "</section>\n"


def _section(section: Section, names: Sequence[str]) -> str:
    name = section.analysis.name
    question, *rest = opening(section.analysis)
    parts = [f'<section><h2 id="{escape(name)}">{escape(section.analysis.title)}</h2>\n<p>{escape(question)}</p>']
    if rest:
        said = "".join(
            f"<pre>{escape(inspect.cleandoc(text))}</pre>" if text.startswith("    ") else f"<p>{escape(text)}</p>"
            for text in rest
        )
        parts.append(f"<details><summary>What the numbers are, and what they are not</summary>{said}</details>")
    parts += [f'<p class="warn">{escape(note)}</p>' for note in section.notes]
    if section.models:
        for number, (title, figure) in enumerate(section.figures.items()):
            parts.append(f"<h3>{escape(title)}</h3>\n{html_figure(figure, f'figure-{names.index(name)}-{number}')}")
        parts.append(_table(section.table, name))
        commands = "\n".join(shlex.join(words) for words in section.commands)
        parts.append(f"<details><summary>Commands</summary><pre>{escape(commands)}</pre></details>")
    return "\n".join(parts) + "</section>\n"


def opening(analysis: Analysis) -> list[str]:
    """The paragraphs of an analysis' docstring without its example command; the first is the question that it
    answers."""
    text = inspect.getdoc(import_module(analysis.run.__module__)) or analysis.title
    paragraphs = [part.strip("\n") for part in re.split(r"\n\s*\n", text)]
    return [
        part if part.startswith("    ") else " ".join(part.split())
        for part in paragraphs
        if not part.strip().startswith("python -m")
    ]


def _table(table: pd.DataFrame, name: str) -> str:
    """The summary, folded where it is long, and the same as CSV inside the page."""
    shown = table.to_html(index=False, escape=True, border=0, float_format="{:.3f}".format, na_rep="")
    data = base64.b64encode(table.to_csv(index=False).encode()).decode()
    opened = " open" if len(table) <= LONG else ""
    link = f'<a download="{escape(name)}.csv" href="data:text/csv;base64,{data}">CSV</a>'
    return (
        f"<details{opened}><summary>Table, {len(table)} rows</summary><div"
        f' class="scroll">{shown}</div></details>\n<p>{link}</p>'
    )
