"""The script that `viral app` serves, the same as app.py of a checkout.

It is alone in its folder because streamlit puts the script's folder first on the import path.
"""

from workbench.dashboard import shell

shell.show()
