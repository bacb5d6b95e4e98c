"""Multimodal language models: loading, encoding, model families; importing this package registers every family."""

import workbench.mllm.families  # noqa: F401  (each family registers itself)
from workbench.mllm.base import MLLM
from workbench.mllm.family import FAMILIES, Batch, Family, VisualTokens

__all__ = ["FAMILIES", "MLLM", "Batch", "Family", "VisualTokens", "load_mllm"]

load_mllm = MLLM.load
"""The same as `MLLM.load`, named like `load_vfm` and `load_data`."""
