"""Points, or their Gram matrix, to a partition: Ward, then Hartigan's refinement to a fixed point. Deterministic, no seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyfold import ops
from pyfold.clustering.partition import canonical, labels_of
from pyfold.clustering.problems import check_finite, tensor_of, weights_of
from pyfold.ops import checks


@dataclass(frozen=True)
class Clustering:
    """A partition of N points into K clusters.

    Attributes
    ----------
    labels : Tensor, (N,), int64
        Cluster of each point. Clusters are numbered in the order of their first member.
    n_clusters : int
        K.
    inertia : float
        Within-cluster sum of squared distances, after refinement.
    ward_inertia : float
        The same for Ward's cut, before refinement.
    total_inertia : float
        ``Σ w_i ‖x_i‖²``, the scale to read an inertia against.
    n_moves : int
        Points that the refinement moved.
    backend : str
        Backend and SIMD level that computed it.
    """

    labels: Tensor
    n_clusters: int
    inertia: float
    ward_inertia: float
    total_inertia: float
    n_moves: int
    backend: str


def cluster(
    x: Tensor | np.ndarray[Any, Any] | None = None,
    *,
    n_clusters: int,
    gram: Tensor | ops.GramFile | None = None,
    weights: Tensor | np.ndarray[Any, Any] | None = None,
    overwrite_gram: bool = False,
    backend: str = "auto",
) -> Clustering:
    """Partition points by Ward's method and refine it by Hartigan's.

    Parameters
    ----------
    x : Tensor or ndarray, (N, D), optional
        Features; float32, float16, bfloat16, or float64 (rounded to float32).
    n_clusters : int
        K, 1 <= K <= N.
    gram : Tensor, (N, N), float32, or ops.GramFile, optional
        Instead of ``x``: any symmetric positive semidefinite matrix of inner products. In a file it may be larger than memory,
        and is only read; the result is the same, bit for bit.
    weights : Tensor or ndarray, (N,), optional
        Positive point weights; ones by default.
    overwrite_gram : bool
        Let the call use ``gram`` as scratch instead of a copy (4 N² bytes less); its contents are the same afterwards.
    backend : str
        ``auto``, or a name from :func:`pyfold.ops.backends`; ``cpu`` for a matrix in a file.

    Returns
    -------
    Clustering

    Raises
    ------
    TypeError, ValueError
        If not exactly one of ``x`` and ``gram`` is given, or for a wrong dtype, shape, value, or K.

    Notes
    -----
    Ward (1963), greedy on the inertia; Hartigan (1975), one point at a time, best move first. Neither depends on the order
    of the points except where costs tie exactly. Memory 4 N² bytes beside ``x``, time O(N² D) for the Gram matrix.
    Distances come from fp32 inner products: where the points' mean is large beside their spread, subtract it first.
    """
    if (x is None) == (gram is None):
        raise TypeError("cluster: give either x= (features) or gram= (their inner products)")
    if x is not None:
        x = tensor_of("x", x)
        check_finite(x)
        checks.count(n_clusters, len(x))
        gram = ops.gram(x.float() if x.dtype == torch.float64 else x, backend=backend)
    assert gram is not None
    weights = None if weights is None else weights_of(weights, gram)
    _check_values(gram)
    if x is None and not overwrite_gram and isinstance(gram, Tensor):
        gram = gram.clone()
    backend = ops.resolve(backend, gram.device)
    joins = ops.ward(gram, n_clusters, weights=weights, backend=backend)
    cut = labels_of(joins, gram.shape[0])
    labels, gains = ops.hartigan(gram, cut, n_clusters, weights=weights, backend=backend)
    return _clustering(gram, cut, labels, n_clusters, len(gains), weights, backend)


def cluster_each(xs: Sequence[Tensor], n_clusters: Sequence[int], *, backend: str = "auto") -> list[Clustering]:
    """``cluster`` of many problems as one ragged batch: features (N_i, D_i) and K_i of each."""
    if not xs:
        return []
    for x, k in zip(xs, n_clusters, strict=True):
        check_finite(x)
        checks.count(k, len(x))
    backend = ops.resolve(backend, xs[0].device)
    grams = ops.gram(list(xs), backend=backend)
    for gram in grams:
        _check_values(gram)
    joins = ops.ward(grams, list(n_clusters), backend=backend)
    cuts = [labels_of(one, len(x)) for one, x in zip(joins, xs, strict=True)]
    refined = ops.hartigan(grams, cuts, list(n_clusters), backend=backend)
    return [
        _clustering(gram, cut, labels, k, len(gains), None, backend)
        for gram, cut, (labels, gains), k in zip(grams, cuts, refined, n_clusters, strict=True)
    ]


def _clustering(
    gram: Tensor | ops.GramFile,
    cut: Tensor,
    labels: Tensor,
    n_clusters: int,
    n_moves: int,
    weights: Tensor | None,
    backend: str,
) -> Clustering:
    """``cut``: Ward's labels; ``labels`` after refinement."""
    labels = canonical(labels)
    w = torch.ones((), dtype=torch.float64) if weights is None else weights
    return Clustering(
        labels=labels,
        n_clusters=n_clusters,
        inertia=ops.inertia(gram, labels, n_clusters, weights),
        ward_inertia=ops.inertia(gram, cut, n_clusters, weights),
        total_inertia=float((w * gram.diagonal().double()).sum()),
        n_moves=n_moves,
        backend=backend,
    )


def _check_values(gram: Tensor | ops.GramFile) -> None:
    if isinstance(gram, ops.GramFile):
        gram.check_complete()
    diagonal = gram.diagonal()
    if not bool((diagonal >= 0).all()) or not bool((diagonal < ops.LARGEST_SQUARED_NORM).all()):
        raise ValueError(
            f"gram: expected squared norms in [0, {ops.LARGEST_SQUARED_NORM:g}) on the diagonal, got "
            f"{float(diagonal.min()):g} to {float(diagonal.max()):g}; scale the features"
        )
    if not (gram.finite if isinstance(gram, ops.GramFile) else ops.first_nonfinite(gram) is None):
        raise ValueError("gram: expected finite values off the diagonal too")
