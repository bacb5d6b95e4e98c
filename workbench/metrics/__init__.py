"""Metrics on representations."""

from workbench.metrics.alignment import METRICS, alignment_matrix, cknna
from workbench.metrics.neighbors import Neighbors, nearest_neighbors

__all__ = ["METRICS", "Neighbors", "alignment_matrix", "cknna", "nearest_neighbors"]
