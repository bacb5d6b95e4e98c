"""Dry run: what a recipe would train, and how large everything is, without training."""
