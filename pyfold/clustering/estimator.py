"""``KMeans``: k-means behind scikit-learn's estimator contract. The only module that needs scikit-learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

try:
    from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, ClusterMixin, TransformerMixin
    from sklearn.utils import check_random_state
    from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
except ImportError as error:
    raise ImportError(f"pyfold.KMeans needs scikit-learn >= 1.6 ({error}); run pip install 'pyfold[sklearn]'") from None

from pyfold.clustering.differences import squared_distances, total
from pyfold.clustering.kmeans import kmeans, nearest
from pyfold.clustering.problems import tensor_of
from pyfold.ops import checks


class KMeans(ClassNamePrefixFeaturesOutMixin, TransformerMixin, ClusterMixin, BaseEstimator):  # type: ignore[misc]
    """k-means clustering; parameters as :func:`pyfold.kmeans`'s.

    Parameters
    ----------
    n_clusters : int
    init : "k-means++", None, "ward", "random" or ndarray (K, D)
        "k-means++", scikit-learn's default, is this one's too. None, the default of ``pyfold.kmeans``, is Ward's method where
        the Gram matrix fits the memory: for K a large share of N; time O(N² (D + 1)) and 4 N² bytes.
    refine : "auto", "hartigan", "lloyd" or None
    n_init : int or "auto"
        "auto": 1.
    max_iter : int
    tol : float
    random_state : int, RandomState or None
        0 by default: the same fit on every run.
    backend : str

    Attributes
    ----------
    labels_ : ndarray, (N,), int64
        Of the points fitted: the nearest of the centers, as ``predict`` gives.
    cluster_centers_ : ndarray, (K, D)
        Weighted means of the clusters that the fit ended with, in the dtype of the points.
    inertia_ : float
        Of these labels and centers.
    n_iter_ : int
    init_, refine_, regime_, backend_ : str
        What was taken.
    """

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        init: Any = "k-means++",
        refine: str | None = "auto",
        n_init: Any = 1,
        max_iter: int = 300,
        tol: float = 1e-4,
        random_state: Any = 0,
        backend: str = "auto",
    ) -> None:
        self.n_clusters = n_clusters
        self.init = init
        self.refine = refine
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state
        self.backend = backend

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> KMeans:
        """Cluster ``X`` (N, D), float64 or float32. ``sample_weight`` (N,) is at least 0, what is
        positive within a factor of 1e6."""
        X = validate_data(self, X, dtype=[np.float64, np.float32], order="C")
        checks.count(self.n_clusters, len(X), f"samples, n_samples={len(X)}")
        weights = None if sample_weight is None else _weights(sample_weight, X)
        result: Any = kmeans(
            X,
            self.n_clusters,
            init=self.init,
            refine=self.refine,
            n_init=1 if self.n_init == "auto" else self.n_init,
            max_iter=self.max_iter,
            tol=self.tol,
            weights=weights,
            seed=int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max)),
            backend=self.backend,
        )
        self.cluster_centers_ = result.centroids
        labels, distances = self._nearest(tensor_of("X", X))
        self.labels_, self.inertia_ = labels.numpy(), _sum(distances, weights)
        self.n_iter_ = result.n_iter
        self.init_, self.refine_, self.regime_, self.backend_ = result.init, result.refine, result.regime, result.backend
        self._n_features_out = self.n_clusters
        return self

    def fit_predict(self, X: Any, y: Any = None, sample_weight: Any = None) -> Any:
        """``fit(X).labels_``."""
        return self.fit(X, sample_weight=sample_weight).labels_

    def predict(self, X: Any) -> Any:
        """Index of the nearest center of each point."""
        return self._nearest(self._points(X))[0].numpy()

    def transform(self, X: Any) -> Any:
        """(N, K) Euclidean distances to the centers, in the dtype of ``X``."""
        points = self._points(X)
        return torch.cdist(points, self._centers(points.dtype), compute_mode="donot_use_mm_for_euclid_dist").numpy()

    def fit_transform(self, X: Any, y: Any = None, sample_weight: Any = None) -> Any:
        """``fit(X).transform(X)``."""
        return self.fit(X, sample_weight=sample_weight).transform(X)

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Minus the inertia of ``X`` with the nearest centers."""
        points = self._points(X)
        weights = None if sample_weight is None else _weights(sample_weight, points.numpy())
        return -_sum(self._nearest(points)[1], weights)

    def _points(self, X: Any) -> Tensor:
        check_is_fitted(self)
        return tensor_of("X", validate_data(self, X, reset=False, dtype=[np.float64, np.float32], order="C"))

    def _centers(self, dtype: torch.dtype) -> Tensor:
        return tensor_of("cluster_centers_", self.cluster_centers_).to(dtype)

    def _nearest(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Labels and fp64 squared distances."""
        centers = self._centers(torch.float64)
        labels = nearest(points, centers, self.backend)
        return labels, squared_distances(points, labels, centers)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


def _sum(distances: Tensor, weights: Any) -> float:
    return total(distances if weights is None else distances * torch.from_numpy(weights))


def _weights(sample_weight: Any, X: Any) -> Any:
    return _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
