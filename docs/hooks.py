"""What `make docs` fills in: pages that are files of the repository's root, and the references that are made from the
code.

A page says `<!-- from: recipe -->`, and the text is made while the site is built, so that it cannot differ from the
code.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import sys
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_type_hints

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
MARK = re.compile(r"<!-- from: (\S+) -->")


def on_page_markdown(markdown: str, **_: object) -> str:
    """Called by mkdocs for each page before it is rendered."""
    return MARK.sub(lambda mark: made(mark[1]), markdown)


def made(source: str) -> str:
    """The text for a mark: `recipe`, `analyses`, `api`, a notebook, or a Markdown file of the repository's root."""
    makers: dict[str, Callable[[], str]] = {"recipe": recipe_keys, "analyses": analysis_options, "api": api}
    if source in makers:
        return makers[source]()
    return notebook(source) if source.endswith(".ipynb") else root_page(source)


def root_page(name: str) -> str:
    """A Markdown file of the root, with its links as they are from docs/."""
    return re.sub(r"\[([^\]]+)\]\(([^)#:]+)(#[^)]*)?\)", _link_from_docs, (ROOT / name).read_text())


def _link_from_docs(link: re.Match[str]) -> str:
    """A link of a page in the root, from docs/; one to a file that the site lacks is its text alone."""
    text, target, anchor = link[1], link[2].removeprefix("docs/"), link[3] or ""
    page = target if (ROOT / "docs" / target).exists() else target.lower()
    return f"[{text}]({page}{anchor})" if (ROOT / "docs" / page).exists() else text


def notebook(name: str) -> str:
    """The cells of a notebook, texts as they are and code as code."""
    cells = json.loads((ROOT / name).read_text())["cells"]
    return "\n\n".join(_cell(cell["cell_type"], "".join(cell["source"])) for cell in cells)


def _cell(kind: str, source: str) -> str:
    return source if kind == "markdown" else f"```python\n{source}\n```"


def field_texts(cls: type) -> dict[str, str]:
    """The text that stands below each field of a dataclass, its bases included, in one line."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        try:
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        except OSError:
            continue
        assert isinstance(tree, ast.ClassDef)
        for node, after in zip(tree.body, [*tree.body[1:], ast.Pass()], strict=True):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                text = (
                    after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
                )
                texts[node.target.id] = " ".join(str(text).split())
    return texts


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _kind(hint: Any) -> str:
    name = hint.__name__ if isinstance(hint, type) and not getattr(hint, "__args__", ()) else str(hint)
    name = re.sub(r"\b(?:typing|pathlib|collections\.abc)\.", "", name)
    name = re.sub(r"Annotated\[([^,\]]+),.*\]$", r"\1", name)
    name = re.sub(r"tuple\[(.*), \.\.\.\]", r"list of \1", name)
    name = re.sub(r"Literal\[(.*?)\]", lambda choices: choices[1].replace("'", "").replace(", ", " / "), name)
    return name.replace("NoneType", "None").replace(" | None", ", or null").replace("|", "\\|")


def _value(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "(none)"
    return str(value).lower() if isinstance(value, bool) else str(value)


def rows(cls: type, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """(key, kind, default, text) of every plain field of a dataclass."""
    hints, texts = get_type_hints(cls, include_extras=True), field_texts(cls)
    for field in dataclasses.fields(cls):
        if not dataclasses.is_dataclass(hints[field.name]):
            yield prefix + field.name, _kind(hints[field.name]), _value(_default(field)), texts.get(field.name, "")


def _table(found: Iterator[tuple[str, str, str, str]]) -> str:
    lines = ["| key | values | default | what it is |", "|---|---|---|---|"]
    return "\n".join(
        [
            *lines,
            *(
                f"| `{key}` | {kind} | `{default}` | {text.replace('|', chr(92) + '|')} |"
                for key, kind, default, text in found
            ),
        ]
    )


def recipe_keys() -> str:
    """Every key of a recipe, section by section, as trainer.recipe declares it."""
    from trainer.recipe import Recipe

    return "\n\n".join(_sections(Recipe, ""))


def _sections(cls: type, prefix: str) -> Iterator[str]:
    title = f"`{prefix.rstrip('.')}:`" if prefix else "Top level"
    yield f"## {title}\n\n{' '.join((cls.__doc__ or '').split())}\n\n{_table(rows(cls, prefix))}"
    for field in dataclasses.fields(cls):
        hint = get_type_hints(cls)[field.name]
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            yield from _sections(hint, f"{prefix}{field.name}.")


def analysis_options() -> str:
    """Options of every analysis: those that all have, then each one's own, with its module's text."""
    from workbench.analysis.declaration import DataOptions, Where

    parts = [
        "## Options of every"
        f" analysis\n\n{_table((f'--{key}', *rest) for cls in (Where, DataOptions) for key, *rest in rows(cls))}"
    ]  # type: ignore[misc]
    shared = {field.name for field in dataclasses.fields(DataOptions)}
    for name in _analyses():
        module = __import__(f"analyses.{name}", fromlist=["ANALYSIS"])
        own = [(f"--{key}", *rest) for key, *rest in rows(module.ANALYSIS.config) if key not in shared]
        text = inspect.cleandoc(module.__doc__ or "")
        parts.append(f"## `analyses.{name}`\n\n```text\n{text}\n```\n\n{_table(iter(own)) if own else ''}")  # type: ignore[arg-type]
    return "\n\n".join(parts)


def _analyses() -> list[str]:
    from workbench.analysis.discover import analysis_files

    return sorted(analysis_files())


EXTRA = [
    "trainer.run.train",
    "trainer.recipe.Recipe",
    "trainer.alignment.attach_alignment",
    "trainer.alignment.Alignment",
    "workbench.runs.Run",
    "workbench.runs.load",
    "workbench.runs.index",
    "workbench.analysis.api.Comparison",
    "workbench.analysis.declaration.Analysis",
    "workbench.analysis.declaration.Context",
    "workbench.analysis.chunks.Chunk",
    "workbench.analysis.chunks.Part",
    "workbench.data.base.Sample",
    "workbench.data.base.Dataset",
    "workbench.mllm.family.VisualTokens",
    "workbench.mllm.family.Family",
    "workbench.vfm.base.VFM",
    "workbench.capture.hidden_states.Activations",
    "workbench.capture.knockout.knockout",
]  # public names that `from workbench import` does not give


def api() -> str:
    """mkdocstrings' directives for the public names, by the module that defines them."""
    import workbench

    names = {getattr(workbench, name) for name in workbench.__all__}
    where = {f"{value.__module__}.{value.__qualname__}" for value in names if hasattr(value, "__qualname__")} | set(
        EXTRA
    )
    modules: dict[str, list[str]] = defaultdict(list)
    for path in sorted(where):
        modules[path.rpartition(".")[0]].append(path)
    return "\n\n".join(
        f"## `{module}`\n\n" + "\n\n".join(f"::: {path}" for path in paths) for module, paths in sorted(modules.items())
    )
