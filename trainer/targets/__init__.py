"""Alignment targets: features of frozen networks, computed once and stored on disk, or at every step."""
