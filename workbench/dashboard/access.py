"""Who may start jobs: those who opened the server's address with its token, which it prints when it starts.

Everybody who is logged in to a machine can reach a server on its 127.0.0.1. The pages show all of them what is stored;
but jobs run with the rights of the user who started the server, so that starting and stopping them needs the token. As
in notebooks, the token of an address becomes a cookie and is taken out of the address, whose copies do not have it.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from functools import cache
from pathlib import Path

import streamlit as st

TOKEN = "VIRAL_TOKEN"  # the environment variable with the token; without it, each server makes one
LOCAL = ("127.0.0.1", "localhost", "::1")


@cache
def token() -> str:
    """Return the token of this server."""
    return os.environ.get(TOKEN) or secrets.token_urlsafe(24)


def address() -> str:
    """Return the address of this server, with its token if jobs may be started at all."""
    host = st.get_option("server.address") or "localhost"
    base = st.get_option("server.baseUrlPath").strip("/")
    where = f"http://{f'[{host}]' if ':' in host else host}:{st.get_option('server.port')}/{base}{'/' * bool(base)}"
    return with_token(where, token()) if is_local() else where


def with_token(where: str, word: str) -> str:
    """Return an address with a token."""
    return f"{where}?token={word}"


@cache
def token_file() -> Path:
    """Write the address with the token into a file that this user alone can read, and return its path."""
    descriptor, name = tempfile.mkstemp(prefix="viral-dashboard-", suffix=".txt")
    with os.fdopen(descriptor, "w") as file:
        file.write(f"{address()}\n")
    return Path(name)


def is_local() -> bool:
    """Return whether no other machine can reach the server."""
    return st.get_option("server.address") in LOCAL


def may_start() -> bool:
    """Return whether this session may start and stop jobs."""
    return is_local() and is_token(st.context.cookies.get(cookie_name(), ""))


def is_token(word: str) -> bool:
    """Return whether a word is the token, in a time that does not tell how much of it is right."""
    return secrets.compare_digest(word.encode(), token().encode())


def cookie_name() -> str:
    """Return the name of this server's cookie; a browser sends those of all servers of a host to each of them."""
    return f"viral-{st.get_option('server.port')}"


def why_not() -> str:
    """Return why this session may start nothing, and what to do."""
    if not is_local():
        return (
            "This page starts jobs only if the dashboard is served to this machine alone (`--server.address"
            " 127.0.0.1`). Copy the command and run it in a terminal."
        )
    return (
        "To start and stop jobs on this page, open the address with the token that the dashboard printed when it"
        f" started; it is also in `{token_file()}`, which only the user who started it can read. Or copy the command"
        " and run it in a terminal."
    )
