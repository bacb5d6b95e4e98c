"""One user of the dashboard, without a browser: what Streamlit's page sends and receives, over the same web socket."""

from __future__ import annotations

import io
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import pandas as pd
import pyarrow as pa
from streamlit.proto.BackMsg_pb2 import BackMsg
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg
from websockets.sync.client import ClientConnection, connect

PATIENCE = 120.0  # seconds until a page counts as hung
TEXTS = {"markdown": "body", "heading": "body", "alert": "body", "text": "body", "code": "code_text"}


@dataclass
class Shown:
    """A page as it was received.

    Attributes:
        seconds: from the request until the script's end.
        received: bytes of all messages.
        elements: protobuf messages of its elements, in the order of arrival.
    """

    seconds: float = 0.0
    received: int = 0
    elements: list[Any] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All text, without the backslashes that keep Markdown from being read in it."""
        parts = [(each, each.WhichOneof("type")) for each in self.elements]
        return "\n".join(getattr(getattr(e, kind), TEXTS[kind]) for e, kind in parts if kind in TEXTS).replace("\\", "")

    @property
    def tables(self) -> list[pd.DataFrame]:
        """All tables."""
        data = [each.dataframe.arrow_data.data for each in self.elements if each.WhichOneof("type") == "dataframe"]
        return [pa.ipc.open_stream(io.BytesIO(content)).read_pandas() for content in data]

    @property
    def errors(self) -> list[str]:
        """Exceptions, and alerts of the kind error."""
        raised = [each.exception.message for each in self.elements if each.WhichOneof("type") == "exception"]
        alerts = [each.alert for each in self.elements if each.WhichOneof("type") == "alert"]
        return raised + [alert.body for alert in alerts if alert.format == alert.ERROR]

    def widget(self, key: str) -> str:
        """Return the identity of the widget with a key of the program.

        Raises:
            LookupError: the page has no such widget.
        """
        for each in self.elements:
            part = getattr(each, each.WhichOneof("type") or "", None)
            name = getattr(part, "id", "")
            if isinstance(name, str) and name.endswith(f"-{key}"):
                return name
        raise LookupError(f"the page has no widget {key}")


class Session:
    """A session of the dashboard at 127.0.0.1:`port`."""

    def __init__(self, port: int) -> None:
        address = f"ws://127.0.0.1:{port}/_stcore/stream"
        self.socket: ClientConnection = connect(address, max_size=None, subprotocols=["streamlit"])  # type: ignore[list-item]
        self.hashes: dict[str, str] = {}
        self.page, self.query, self.shown = "", "", Shown()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.socket.close()

    def open(self, page: str, query: str = "") -> Shown:
        """Show a page, as a followed link does.

        Args:
            page: the path of its address.
            query: the parameters of its address.

        Raises:
            TimeoutError: the page was not drawn within PATIENCE.
        """
        self.page, self.query = page, query
        return self._ask({})

    def click(self, **values: str | int | bool) -> Shown:
        """Change widgets of the page, {key of the program: value}.

        Raises:
            LookupError: the page has no such widget.
            TimeoutError: the page was not drawn within PATIENCE.
        """
        return self._ask({self.shown.widget(key): value for key, value in values.items()})

    def _ask(self, widgets: dict[str, str | int | bool]) -> Shown:
        message = BackMsg()
        state = message.rerun_script
        state.query_string = self.query
        if self.page in self.hashes:
            state.page_script_hash = self.hashes[self.page]
        else:
            state.page_name = self.page
        for name, value in widgets.items():
            changed = state.widget_states.widgets.add(id=name)
            if isinstance(value, str):
                changed.string_array_value.data.append(value)
            elif isinstance(value, bool):
                changed.bool_value = value
            else:
                changed.int_value = value
        began = time.perf_counter()
        self.socket.send(message.SerializeToString())
        self.shown = self._receive(began)
        return self.shown

    def _receive(self, began: float) -> Shown:
        shown = Shown()
        while True:
            content = self.socket.recv(timeout=PATIENCE)
            assert isinstance(content, bytes)
            shown.received += len(content)
            message = ForwardMsg.FromString(content)
            kind = message.WhichOneof("type")
            if kind == "new_session":
                shown.elements.clear()  # it starts again: st.rerun, or a first value of a widget
            elif kind == "navigation":
                self.hashes = {p.url_pathname: p.page_script_hash for p in message.navigation.app_pages}
            elif kind == "page_info_changed":
                self.query = message.page_info_changed.query_string
            elif kind == "delta" and message.delta.WhichOneof("type") == "new_element":
                shown.elements.append(message.delta.new_element)
            elif kind == "script_finished" and message.script_finished != ForwardMsg.FINISHED_EARLY_FOR_RERUN:
                shown.seconds = time.perf_counter() - began
                return shown
