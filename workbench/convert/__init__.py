"""Convert checkpoints of the original LLaVA-1.5 and VIRAL code to transformers folders.

python -m workbench.convert OFFICIAL_DIR OUT
"""
