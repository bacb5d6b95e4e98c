"""Multimodal language models, one file per family; importing this package registers them all."""

from workbench.mllm import gemma3, internvl, llava, llava_next, llava_onevision, paligemma, qwen_vl, smolvlm  # noqa: F401  (each registers itself)
from workbench.mllm.base import MLLM
from workbench.mllm.family import FAMILIES, Batch, Family, VisualTokens

__all__ = ["FAMILIES", "MLLM", "Batch", "Family", "VisualTokens"]
