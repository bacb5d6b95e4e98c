"""Vision foundation models behind one call; importing this package fills the catalogue."""

from workbench.vfm import hf_models, timm_models  # noqa: F401  (they register their entries)
from workbench.vfm.base import CATALOGUE, VFM, PatchFeatures, load_vfm

__all__ = ["CATALOGUE", "VFM", "PatchFeatures", "load_vfm"]
