"""Metrics on representations."""

from workbench.metrics.alignment import METRICS, Metric, alignment_matrix, cka, cknna, mutual_knn, rsa, svcca
from workbench.metrics.neighbors import Neighbors, nearest_neighbors

__all__ = [
    "METRICS",
    "Metric",
    "Neighbors",
    "alignment_matrix",
    "cka",
    "cknna",
    "mutual_knn",
    "nearest_neighbors",
    "rsa",
    "svcca",
]
