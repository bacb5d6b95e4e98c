"""What Streamlit looks for in all installed packages at every start, half a second each, is looked for once."""

from __future__ import annotations

from functools import cache

from streamlit.components.v2 import manifest_scanner

manifest_scanner.scan_component_manifests = cache(manifest_scanner.scan_component_manifests)
