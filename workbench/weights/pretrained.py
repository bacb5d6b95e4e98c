"""One door to transformers and the hub: whatever they raise about a user's files becomes one sentence, and they are
quiet meanwhile."""

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
    """Run one call into transformers or the hub's client, and raise what `failed` makes of an exception.

    About files that they cannot use they raise OSError, ValueError, KeyError, TypeError, AttributeError, ImportError,
    RuntimeError, SafetensorError, StrictDataclassError ... Only their functions are called through here, never ours, so
    that a fault of our own keeps its traceback.
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
    """Keep what the hub's client and transformers log, such as each try to reach a hub, from the terminal."""
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
    """Options of from_pretrained for a hub id at `revision`, or a folder, which has none: where no hub is within reach,
    nothing is asked of it, which would take half a minute to fail."""
    if Path(str(name)).is_dir():
        return {}
    return ({} if revision is None else {"revision": revision}) | ({} if _hub_answers() else {"local_files_only": True})


@lru_cache(maxsize=1)
def _hub_answers() -> bool:
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    with quiet():
        try:
            get_session().head(constants.ENDPOINT, timeout=5)
        except Exception:  # offline mode, no network, no such host, ... each with a type of the client's own
            return False
    return True
