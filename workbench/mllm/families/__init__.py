"""Model families, one file each or one for several with the same layout; importing this package registers them all."""

from workbench.mllm.families import gemma3, internvl, llava, llava_next, llava_onevision, paligemma, qwen_vl, smolvlm  # noqa: F401  (each registers itself)
