"""What `viral app` serves; alone in its folder, since streamlit puts that first on the path. A checkout's app.py is the
same."""

from workbench.dashboard import shell

shell.show()
