"""Text that `make docs` inserts into pages: files of the root, notebooks, and references made from the code.

A page contains a mark such as `<!-- from: recipe -->`. The text is generated while the site is built, so that it cannot
differ from the code.
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
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, get_type_hints

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
MARK = re.compile(r"<!-- from: (\S+) -->")


def on_page_markdown(markdown: str, **_: object) -> str:
    """Replace the marks of a page; mkdocs calls this for each page before it renders it."""
    return MARK.sub(lambda mark: text_for(mark[1]), markdown)


def text_for(source: str) -> str:
    """Return the text for a mark: `recipe`, `analyses`, `api`, a notebook, or a Markdown file of the root."""
    makers: dict[str, Callable[[], str]] = {"recipe": recipe_keys, "analyses": analysis_options, "api": api}
    if source in makers:
        return makers[source]()
    return notebook(source) if source.endswith(".ipynb") else root_page(source)


def root_page(name: str) -> str:
    """Return a Markdown file of the root, with its links rewritten as seen from docs/."""
    return re.sub(r"\[([^\]]+)\]\(([^)#:]+)(#[^)]*)?\)", _link_from_docs, (ROOT / name).read_text())


def _link_from_docs(link: re.Match[str]) -> str:
    """Rewrite a link of a page in the root as seen from docs/; a link to a file outside the site becomes plain text."""
    text, target, anchor = link[1], link[2].removeprefix("docs/"), link[3] or ""
    page = target if (ROOT / "docs" / target).exists() else target.lower()
    return f"[{text}]({page}{anchor})" if (ROOT / "docs" / page).exists() else text


def notebook(name: str) -> str:
    """Return the cells of a notebook as Markdown, with code cells as Python blocks."""
    cells = json.loads((ROOT / name).read_text())["cells"]
    return "\n\n".join(_cell(cell["cell_type"], "".join(cell["source"])) for cell in cells)


def _cell(kind: str, source: str) -> str:
    return source if kind == "markdown" else f"```python\n{source}\n```"


def field_texts(cls: type) -> dict[str, str]:
    """Return the docstring below each field of a dataclass and its bases, in one line each."""
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
                documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                texts[node.target.id] = " ".join(str(after.value.value).split()) if documented else ""
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
    """Yield (key, kind, default, text) of every field of a dataclass that is not a dataclass itself."""
    hints, texts = get_type_hints(cls, include_extras=True), field_texts(cls)
    for field in dataclasses.fields(cls):
        if not dataclasses.is_dataclass(hints[field.name]):
            yield prefix + field.name, _kind(hints[field.name]), _value(_default(field)), texts.get(field.name, "")


def _table(rows_of_table: Iterable[tuple[str, str, str, str]]) -> str:
    lines = ["| key | values | default | what it is |", "|---|---|---|---|"]
    for key, kind, default, text in rows_of_table:
        escaped = text.replace("|", "\\|")
        lines.append(f"| `{key}` | {kind} | `{default}` | {escaped} |")
    return "\n".join(lines)


def recipe_keys() -> str:
    """Return tables of all recipe keys, section by section, as trainer.recipe declares them."""
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
    """Return tables of the analyses' options: the common ones, then those of each analysis."""
    from workbench.analysis.declaration import DataOptions, Where

    common = [(f"--{key}", *rest) for cls in (Where, DataOptions) for key, *rest in rows(cls)]
    parts = [f"## Options of every analysis\n\n{_table(common)}"]  # type: ignore[arg-type]
    shared = {field.name for field in dataclasses.fields(DataOptions)}
    for name in _analyses():
        module = __import__(f"analyses.{name}", fromlist=["ANALYSIS"])
        options = [(f"--{key}", *rest) for key, *rest in rows(module.ANALYSIS.config) if key not in shared]
        text = inspect.cleandoc(module.__doc__ or "")
        table = _table(options) if options else ""  # type: ignore[arg-type]
        parts.append(f"## `analyses.{name}`\n\n```text\n{text}\n```\n\n{table}")
    return "\n\n".join(parts)


def _analyses() -> list[str]:
    from workbench.analysis.discover import analysis_files

    return sorted(analysis_files())


EXTRA = [
    "trainer.api.train",
    "trainer.api.read_recipe",
    "trainer.api.Training",
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
]  # public names that cannot be imported directly from `workbench`


def api() -> str:
    """Return mkdocstrings directives for the public names, grouped by the module that defines them."""
    import workbench

    exported = {getattr(workbench, name) for name in workbench.__all__ if name != "load_mllm"}  # it is MLLM.load
    paths = {f"{value.__module__}.{value.__qualname__}" for value in exported if hasattr(value, "__qualname__")}
    modules: dict[str, list[str]] = defaultdict(list)
    for path in sorted(paths | set(EXTRA)):
        modules[path.rpartition(".")[0]].append(path)
    sections = []
    for module, names in sorted(modules.items()):
        directives = "\n\n".join(f"::: {path}" for path in names)
        sections.append(f"## `{module}`\n\n{directives}")
    return "\n\n".join(sections)
