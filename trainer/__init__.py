"""Train multimodal LLMs with and without visual representation alignment."""
