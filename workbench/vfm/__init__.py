"""Vision foundation models behind one call; importing this package fills the catalogue."""

from workbench.vfm.base import CATALOGUE, VFM, PatchFeatures, VFMEntry
from workbench.vfm.find import find_vfm, load_vfm
from workbench.vfm.patches import layers_under, patches_under

__all__ = ["CATALOGUE", "VFM", "PatchFeatures", "VFMEntry", "find_vfm", "layers_under", "load_vfm", "patches_under"]
