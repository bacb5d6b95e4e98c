"""Checkpoints of the original LLaVA-1.5 and VIRAL code, as plain transformers folders: `python -m workbench.convert
OFFICIAL_DIR OUT`."""
