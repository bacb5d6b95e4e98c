"""The script that draws the pages, once for each click.

It is alone with app.py in its folder because streamlit puts the script's folder first on the import path.
"""

from workbench.dashboard import shell

shell.show()
