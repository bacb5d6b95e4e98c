"""Call transformers and the hub's client: their errors about a user's files become one sentence, their logs are silent.

All calls into them that read a user's files go through `call`.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from workbench.errors import WorkbenchError

T = TypeVar("T")
NOISY = ("huggingface_hub", "transformers")


def call(action: Callable[[], T], failed: Callable[[Exception], WorkbenchError]) -> T:
    """Return what `action`, one call into transformers or the hub's client, returns; or raise `failed(exception)`.

    For files that they cannot use, they raise OSError, ValueError, KeyError, TypeError, AttributeError, ImportError,
    RuntimeError, SafetensorError, StrictDataclassError and others, so all exceptions are caught. `action` must call
    only their functions, never ours, so that a bug of ours keeps its traceback.

    Args:
        failed: turns the exception into the error to raise.
    """
    with quiet():
        try:
            return action()
        except (WorkbenchError, MemoryError):
            raise
        except Exception as error:
            raise failed(error) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what transformers and the hub's client log, such as each attempt to reach a hub."""
    loggers = [logging.getLogger(name) for name in NOISY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def hub_options(name: object, revision: str | None = None) -> dict[str, Any]:
    """Return the options of from_pretrained for a hub id at `revision`, none for a folder.

    If no hub can be reached, they are such that only the local cache is used: an attempt to download would fail after
    half a minute.
    """
    if Path(str(name)).is_dir():
        return {}
    return ({} if revision is None else {"revision": revision}) | ({} if _hub_answers() else {"local_files_only": True})


@lru_cache(maxsize=1)
def _hub_answers() -> bool:
    """Return whether the hub answers within 5 seconds; asked once per process."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    with quiet():
        try:
            get_session().head(constants.ENDPOINT, timeout=5)
        except Exception:  # noqa: BLE001  # offline mode, no network, unknown host and so on each raise another type
            return False
    return True
