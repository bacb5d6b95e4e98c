"""Faults that can be planted in a file, and how one is written into it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SILENT = ("log", "logger", "warnings", "print", "progress", "tqdm")


@dataclass(frozen=True)
class Fault:
    """One replacement in a file: the bytes from `start` to `end` become `new`."""

    file: str
    line: int
    kind: str
    start: int
    end: int
    new: str


COMPARED = {
    "<": "<=",
    "<=": "<",
    ">": ">=",
    ">=": ">",
    "==": "!=",
    "!=": "==",
    "in": "not in",
    "not in": "in",
    "is": "is not",
    "is not": "is",
}
COMPUTED = {"+": "-", "-": "+", "*": "/", "/": "*", "//": "*", "**": "*", "&": "|", "|": "&"}
PAIRS = [
    "mean sum",
    "max min",
    "argmax argmin",
    "any all",
    "floor ceil",
    "amax amin",
    "maximum minimum",
    "std var",
    "zeros ones",
    "append extend",
    "abs exp",
]
CALLED = {a: b for pair in PAIRS for a, b in (pair.split(), reversed(pair.split()))}
TEXTS = ast.Constant | ast.JoinedStr


def faults_in(text: str, file: str) -> list[Fault]:
    """Return all faults that can be planted in a file, in the order of its lines."""
    tree, faults = ast.parse(text), []
    starts = [0]
    for line in text.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    raw = text.encode()

    def at(node: ast.AST, end: bool = False) -> int:
        row, column = (node.end_lineno, node.end_col_offset) if end else (node.lineno, node.col_offset)  # type: ignore[attr-defined]
        return starts[row - 1] + column

    def source(node: ast.AST) -> str:
        return raw[at(node) : at(node, end=True)].decode()

    for node in _numeric(tree):
        for kind, start, end, new in _replacements(node, at, source, raw):
            faults.append(Fault(file, raw[:start].count(b"\n") + 1, kind, start, end, new))
    return sorted(set(faults), key=lambda fault: (fault.start, fault.kind, fault.new))


def _numeric(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes that can change a number.

    Annotations, messages, errors, log lines, decorators and imports are left out.
    """
    if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr | ast.Import | ast.ImportFrom):
        return
    call = node.value if isinstance(node, ast.Expr) else node
    if isinstance(call, ast.Call) and any(name in ast.unparse(call.func).split(".") for name in SILENT):
        return
    yield node
    skipped = {"annotation", "returns", "decorator_list", "type_params"}
    for name, value in ast.iter_fields(node):
        if name not in skipped:
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from _numeric(child)


def _replacements(node: ast.AST, at, source, raw: bytes) -> Iterator[tuple[str, int, int, str]]:  # type: ignore[no-untyped-def]
    """Yield (kind, start, end, new text) for one node."""

    def between(kind: str, left: ast.AST, right: ast.AST, table: dict[str, str]) -> Iterator[tuple[str, int, int, str]]:
        start, end = at(left, end=True), at(right)
        text = raw[start:end].decode()
        operator = re.search(r"not in|is not|\bin\b|\bis\b|[<>=!]=|\*\*|//|[-+*/<>&|]", text)
        if operator and operator.group() in table:
            yield kind, start + operator.start(), start + operator.end(), table[operator.group()]

    if isinstance(node, ast.Compare):
        for left, right in zip([node.left, *node.comparators], node.comparators, strict=False):
            yield from between("comparison", left, right, COMPARED)
    elif (
        isinstance(node, ast.BinOp)
        and not isinstance(node.left, TEXTS | ast.List | ast.Tuple)
        and not isinstance(node.right, ast.JoinedStr | ast.List)
    ):
        yield from between("operator", node.left, node.right, COMPUTED)
    elif isinstance(node, ast.BoolOp):
        old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        start, end = at(node.values[0], end=True), at(node.values[1])
        word = re.search(rf"\b{old}\b", raw[start:end].decode())
        if word:
            yield "and / or", start + word.start(), start + word.end(), new
    elif isinstance(node, ast.UnaryOp) and not isinstance(node.operand, ast.Constant):
        yield "negation dropped", at(node), at(node, end=True), f"({source(node.operand)})"
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float, bool):
        value: Any = node.value
        changed: list[float]
        if isinstance(value, bool):
            changed = [not value]
        elif isinstance(value, int):
            changed = [value + 1, value - 1]
        else:
            changed = [value * 2 or 0.5]
        yield from (
            ("constant", at(node), at(node, end=True), repr(new) if repr(new)[0] != "-" else f"({new!r})")
            for new in changed
        )
    elif isinstance(node, ast.IfExp):
        yield (
            "branches exchanged",
            at(node),
            at(node, end=True),
            f"({source(node.orelse)} if {source(node.test)} else {source(node.body)})",
        )
    elif isinstance(node, ast.If | ast.While):
        yield "condition negated", at(node.test), at(node.test, end=True), f"not ({source(node.test)})"
    elif isinstance(node, ast.AugAssign) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        yield "statement dropped", at(node), at(node, end=True), "pass"
    if isinstance(node, ast.Call):
        plain = [part for part in node.args if not isinstance(part, ast.Starred)]
        if len(plain) == len(node.args) > 1 and ast.dump(plain[0]) != ast.dump(plain[1]):
            first, second = node.args[:2]
            yield "arguments exchanged", at(first), at(second, end=True), f"{source(second)}, {source(first)}"
        name = ""
        if isinstance(node.func, ast.Attribute):
            name = node.func.attr
        elif isinstance(node.func, ast.Name):
            name = node.func.id
        if name in CALLED:
            end = at(node.func, end=True)
            yield "another function", end - len(name), end, CALLED[name]
        for keyword in node.keywords:
            if keyword.arg in ("dim", "axis"):
                new = "0" if source(keyword.value) in ("1", "-1") else "-1"
                yield "another dim", at(keyword.value), at(keyword.value, end=True), new


def is_valid(fault: Fault, root: Path) -> bool:
    """Return whether the file is still valid Python with the fault in it."""
    raw = (root / fault.file).read_bytes()
    try:
        ast.parse(raw[: fault.start] + fault.new.encode() + raw[fault.end :])
    except SyntaxError:
        return False
    return True


def plant(fault: Fault, folder: Path) -> str:
    """Write a fault into the copy in `folder` and return the line without and with it, one per line."""
    file = folder / fault.file
    old = file.read_bytes()
    new = old[: fault.start] + fault.new.encode() + old[fault.end :]
    file.write_bytes(new)
    before, after = (text.decode().splitlines()[fault.line - 1].strip() for text in (old, new))
    return f"{before}\n{after}"
