"""A package of somebody else's that adds one thing of each kind; tests/workbench/test_plugins.py installs it, and
docs/howto/plugins.md shows parts of it."""
