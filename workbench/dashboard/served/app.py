"""The server that `viral app` runs, the same as app.py of a checkout."""

import streamlit as st

from workbench.dashboard import server

app = st.App(server.SCRIPT, lifespan=server.running, middleware=server.MIDDLEWARE)
