"""Check the shapes in the annotations of the product while the tests run.

`install` must be called before the product is imported. Annotations without a shape are left to mypy.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import isclass
from pathlib import Path
from typing import Any, get_args

from beartype import beartype
from jaxtyping import AbstractArray, install_import_hook

ROOT = Path(__file__).parent.parent


def install() -> None:
    """Check the functions of every module that uses jaxtyping."""
    files = (file for package in ("workbench", "analyses", "trainer") for file in (ROOT / package).rglob("*.py"))
    shaped = [file.relative_to(ROOT).with_suffix("") for file in files if "from jaxtyping" in file.read_text()]
    install_import_hook([".".join(name.parts).removesuffix(".__init__") for name in shaped], "tests.shapes.checked")


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with checks of the arguments and results whose annotation has a shape.

    A module that is run as a command is left alone: beartype looks classes up by name once, and a second command of the
    same process defines them anew under the same name, `__main__.Ablation`.
    """
    if function.__module__ == "__main__":
        return function
    shapes = {name: hint for name, hint in function.__annotations__.items() if has_shape(hint)}
    function.__annotations__ = shapes
    return beartype(function) if shapes else function


def has_shape(hint: Any) -> bool:
    return (isclass(hint) and issubclass(hint, AbstractArray)) or any(has_shape(part) for part in get_args(hint))
