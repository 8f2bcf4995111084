"""Points to clusters: ``cluster`` (Ward, then Hartigan, features or Gram matrix in), ``kmeans`` and ``KMeans`` (every start,
refinement and regime, lists of problems), ``explain`` (what a call would take, before it is made)."""

from pyfold.clustering.partition import canonical, labels_of
from pyfold.clustering.ward import Clustering, cluster, cluster_each

__all__ = ["Clustering", "canonical", "cluster", "cluster_each", "labels_of"]
