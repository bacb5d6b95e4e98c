"""The models of page Explorer: loaded once, asked one after another, and what they said remembered."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import streamlit as st
from PIL import Image

from workbench.changing import Change, Reply, ask_again
from workbench.dashboard.folders import below_root
from workbench.dashboard.site import Site
from workbench.data import Sample
from workbench.errors import ModelError
from workbench.looking import Look, look
from workbench.mllm import MLLM
from workbench.vfm import VFM, load_vfm

LOADED = 4  # models in memory
BYTES = 1 << 30  # of remembered looks
ANSWER, LONGEST = 64, 128  # tokens at which an answer is cut, unless the model says another number; and at most


class Turns:
    """Lets one session after another in, in the order in which they came."""

    def __init__(self) -> None:
        self._changed, self._tickets = threading.Condition(), list[object]()

    @contextmanager
    def turn(self, waiting: Callable[[int], None]) -> Iterator[None]:
        """Wait until it is this session's turn; `waiting` is called with the number of those before it, each second."""
        ticket = object()
        with self._changed:
            self._tickets.append(ticket)
        try:
            with self._changed:
                while before := self._tickets.index(ticket):
                    waiting(before)
                    self._changed.wait(1)
            yield
        finally:  # also where the page is left while it waits
            with self._changed:
                self._tickets.remove(ticket)
                self._changed.notify_all()


class Looks:
    """Remembers looks up to a number of bytes, and forgets first what was used longest ago."""

    def __init__(self, limit: int = BYTES) -> None:
        self.limit, self._of, self._lock = limit, OrderedDict[Hashable, Look](), threading.Lock()

    def get(self, key: Hashable) -> Look | None:
        """Return a remembered look, or None."""
        with self._lock:
            if key in self._of:
                self._of.move_to_end(key)
            return self._of.get(key)

    def add(self, key: Hashable, seen: Look) -> None:
        """Remember a look; the newest one is remembered whatever its size."""
        with self._lock:
            self._of[key] = seen
            while len(self._of) > 1 and sum(one.nbytes for one in self._of.values()) > self.limit:
                self._of.popitem(last=False)


@dataclass
class Engine:
    """One loaded model with those who wait for it."""

    mllm: MLLM
    turns: Turns = field(default_factory=Turns)


@st.cache_resource(show_spinner=False)
def _looks() -> Looks:
    return Looks()


@st.cache_resource(max_entries=LOADED, show_spinner="Loading the model")
def _engine(folder: str, stamps: tuple[int, ...]) -> Engine:
    return Engine(MLLM.load(folder))


@st.cache_resource(max_entries=2, show_spinner="Loading the vision foundation model")
def vfm_named(name: str) -> VFM:
    """Return a VFM, loaded once."""
    return load_vfm(name)


def engine_of(site: Site, key: str) -> Engine:
    """Return a model of the runs folder, loaded once.

    Raises:
        ModelError: its weights are gone or damaged.
    """
    try:
        return _engine(str(below_root(key)), site.models.by_key[key].stamps)
    except (OSError, ValueError) as error:  # what transformers raises for a file that vanished meanwhile
        raise ModelError(f"{key} cannot be loaded ({error}): expected config.json and its weights") from error


def seen_by(engine: Engine, image: Image.Image, pixels: bytes, sample: Sample) -> Look:
    """Return what a model does with an image and a question, computed once for all sessions.

    Args:
        engine: the model.
        image: upright and in RGB.
        pixels: `image_hash` of it.
        sample: the question.
    """
    key = (engine.mllm.fingerprint, pixels, sample.question, sample.options)
    if (known := _looks().get(key)) is not None:
        return known
    place = st.empty()
    with engine.turns.turn(lambda before: _waiting(place, before)):
        seen = _looks().get(key)
        if seen is None:
            place.caption("The model is answering.")
            seen = look(
                engine.mllm, image, sample.question, options=sample.options, max_new_tokens=_longest(engine.mllm)
            )
            _looks().add(key, seen)
    place.empty()
    return seen


def asked_again(engine: Engine, sample: Sample, change: Change) -> Reply:
    """Return the answer after a change, when it is this session's turn."""
    place = st.empty()
    with engine.turns.turn(lambda before: _waiting(place, before)):
        reply = ask_again(engine.mllm, sample, change, max_new_tokens=_longest(engine.mllm))
    place.empty()
    return reply


def _longest(mllm: MLLM) -> int:
    """Return the number of tokens at which an answer of a model is cut."""
    settings = getattr(mllm.model, "generation_config", None)
    return min(LONGEST, getattr(settings, "max_new_tokens", None) or ANSWER)


def _waiting(place: st.delta_generator.DeltaGenerator, before: int) -> None:
    place.caption(f"This model is answering others: {before} {'is' if before == 1 else 'are'} before you.")
