"""The entry point of the dashboard: `streamlit run app.py -- --runs runs`."""

from workbench.dashboard import shell

shell.show()
