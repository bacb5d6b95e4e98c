"""The records of results: what `run.json` of an analysis and `training.json` of a training hold.

Both are read and written here alone. A record is versioned by what wrote it: an analysis's `version` is part of the
key of its runs, and the recipe of a training is brought up to date by `stored_recipe`. Keys that are not declared here
belong to one analysis, or to one kind of training; they are kept as they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired

from typing_extensions import TypedDict

from workbench.errors import RunError, one_line

if TYPE_CHECKING:
    from pydantic import TypeAdapter


class Environment(TypedDict):
    """What a result depends on besides its configuration; see `runs.environment`."""

    argv: NotRequired[list[str]]
    git: NotRequired[str]  # commit of the checkout that ran; "" for an installed package
    dirty: NotRequired[bool | None]  # whether the checkout had uncommitted changes
    packages: NotRequired[dict[str, str]]
    platform: NotRequired[str]
    created: NotRequired[str]  # UTC, ISO 8601


class RunRecord(Environment):
    """`run.json`: an analysis of one model on one data set, or the claims ledger, which has neither."""

    analysis: str
    label: str
    config: dict[str, Any]
    data_fingerprint: NotRequired[str]
    version: NotRequired[int]
    model: NotRequired[str]
    revision: NotRequired[str | None]
    commit: NotRequired[str | None]  # of the model on the hub
    model_fingerprint: NotRequired[str]
    trained: NotRequired[str]  # when its training was finished, "" if its folder has none
    data: NotRequired[str]
    left_out: NotRequired[list[str]]  # one sentence each
    seed: NotRequired[int]
    device: NotRequired[str]
    processes: NotRequired[int]
    seconds: NotRequired[float]
    key: NotRequired[str]
    tables: NotRequired[list[str]]


class TrainingRecord(Environment):
    """`training.json`: one finished training."""

    recipe: dict[str, Any]
    origins: NotRequired[list[dict[str, Any]]]  # of the parts that the model was made from
    seconds: NotRequired[float]
    steps_per_second: NotRequired[float]
    processes: NotRequired[int]
    strategy: NotRequired[str]
    global_batch: NotRequired[int]
    items: NotRequired[int]  # trained on: images or conversations
    data: NotRequired[str]  # fingerprints of the data sets
    val: NotRequired[str]
    test: NotRequired[str]
    left_out: NotRequired[list[str]]
    vfm: NotRequired[str | list[str]]
    best: NotRequired[dict[str, float]]  # step and validation score
    warnings: NotRequired[list[str]]
    cknna: NotRequired[dict[str, Any] | None]


def read_run_record(file: Path) -> RunRecord:
    """Read a `run.json`.

    Raises:
        RunError: it is missing, damaged, or not the record of an analysis, or a table is named outside its folder.
    """
    record: RunRecord = _checked(file, RunRecord)
    for name in record.get("tables", ()):
        if Path(name).name != name:
            raise RunError(f"{file} names the table '{name}': expected the name of a file in its folder")
    return record


def read_training_record(file: Path) -> TrainingRecord:
    """Read a `training.json`.

    Raises:
        RunError: it is missing, damaged, or not the record of a training.
    """
    record: TrainingRecord = _checked(file, TrainingRecord)
    return record


def write_record(file: Path, record: Mapping[str, Any]) -> None:
    """Write a record; what JSON does not know, such as a path, is written as text."""
    file.write_text(json.dumps(record, indent=2, default=str))


def _checked(file: Path, schema: type) -> Any:
    """Read `file` and check the declared keys by their types; other keys may be there."""
    from pydantic import ValidationError

    try:
        content = json.loads(file.read_text())
        _adapter(schema).validate_python(content, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "its content"
        reason = f"{where}: {one_line(first['msg'], 100)}"
        raise RunError(f"{file} is damaged ({reason}): expected a {_name(schema)}") from error
    except (OSError, ValueError) as error:
        raise RunError(f"{file} is damaged ({one_line(error)}): expected a {_name(schema)}") from error
    return content


def _name(schema: type) -> str:
    return "record of an analysis" if schema is RunRecord else "record of a finished training"


@cache
def _adapter(schema: type) -> TypeAdapter[Any]:
    from pydantic import ConfigDict, TypeAdapter

    schema.__pydantic_config__ = ConfigDict(extra="allow", protected_namespaces=())  # type: ignore[attr-defined]
    return TypeAdapter(schema)
