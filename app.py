"""The entry point of the dashboard: `streamlit run app.py -- --runs runs`."""

import streamlit as st

from workbench.dashboard import server

app = st.App(server.SCRIPT, lifespan=server.running, middleware=server.MIDDLEWARE)
