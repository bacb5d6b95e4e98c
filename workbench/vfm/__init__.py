"""Vision foundation models behind one call; importing this package fills the catalogue."""

from workbench.vfm.base import CATALOGUE, VFM, PatchFeatures, VFMEntry
from workbench.vfm.find import OWN, find_vfm, find_vfms, load_vfm, vfm_label

__all__ = ["CATALOGUE", "OWN", "VFM", "PatchFeatures", "VFMEntry", "find_vfm", "find_vfms", "load_vfm", "vfm_label"]
