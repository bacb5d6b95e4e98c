"""What the server does besides drawing pages: it prints its address, takes tokens, and ends its jobs."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import parse_qsl, urlencode

import streamlit as st
from starlette.middleware import Middleware
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from workbench.dashboard import access
from workbench.dashboard.jobs import jobs

SCRIPT = Path(__file__).with_name("served") / "pages.py"


@asynccontextmanager
async def running(_: st.App) -> AsyncIterator[None]:
    """Print the address when the server starts; stop its jobs when it ends."""
    file, started = access.token_file(), jobs()
    sys.stdout.write(f"Dashboard: {access.address()}\n")
    sys.stdout.flush()
    try:
        yield
    finally:
        started.end_all()
        file.unlink(missing_ok=True)


class TokenToCookie:
    """Turns the token of an address into a cookie, and sends the browser to the address without it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer requests with a token; leave all others to Streamlit."""
        query = parse_qsl(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True)
        word = dict(query).get("token")
        if scope["type"] != "http" or word is None:
            await self.app(scope, receive, send)
            return
        rest = urlencode([(key, value) for key, value in query if key != "token"])
        answer = RedirectResponse(f"?{rest}", status_code=303)  # relative, so that it leads to no other host
        if access.is_token(word):
            answer.set_cookie(access.cookie_name(), word, httponly=True, samesite="strict")
        await answer(scope, receive, send)


MIDDLEWARE = [Middleware(TokenToCookie)]
