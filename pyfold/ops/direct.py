"""Lloyd's two halves on the points themselves, for N >> D: nearest centroid, and mean of each cluster.

One problem, or a list of problems of any sizes, which the backends solve together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from pyfold.ops import checks, registry


@overload
def assign(x: Tensor, centroids: Tensor, *, backend: str = ...) -> tuple[Tensor, Tensor]: ...
@overload
def assign(x: Sequence[Tensor], centroids: Sequence[Tensor], *, backend: str = ...) -> list[tuple[Tensor, Tensor]]: ...
def assign(
    x: Tensor | Sequence[Tensor], centroids: Tensor | Sequence[Tensor], *, backend: str = "auto"
) -> tuple[Tensor, Tensor] | list[tuple[Tensor, Tensor]]:
    """Nearest centroid of every point: ``argmin_c ‖x_i − c‖²``.

    Parameters
    ----------
    x : Tensor, (N, D); or a list of such
        float32, float16 or bfloat16; contiguous rows.
    centroids : Tensor, (K, D), float32, contiguous; one for each problem

    Returns
    -------
    labels : Tensor, (N,), int64
        The centroid chosen is the nearest up to fp32 rounding of the inner products; among equals the lowest index.
    distances : Tensor, (N,), float32
        Squared distance to it, at least 0.
    """
    xs, single = checks.problems("x", x)
    means = checks.per_problem("centroids", centroids, len(xs), single)
    for points, mean in zip(xs, means, strict=True):
        checks.matrix("x", points)
        checks.same_device("centroids", mean, points)
        shape = tuple(mean.shape)
        if mean.dtype != torch.float32 or mean.dim() != 2 or not mean.numel() or shape[1] != points.shape[1]:
            raise ValueError(f"centroids: expected float32 of shape (K, {points.shape[1]}), got {mean.dtype} of {shape}")
        if not mean.is_contiguous():
            raise ValueError(f"centroids: expected a contiguous matrix, got strides {mean.stride()}")
    nearest = registry.call("assign", backend, xs[0].device)(xs, means)
    return nearest[0] if single else nearest


@overload
def update(x: Tensor, labels: Tensor, n_clusters: int, *, weights: Tensor | None = ..., backend: str = ...) -> Tensor: ...
@overload
def update(
    x: Sequence[Tensor],
    labels: Sequence[Tensor],
    n_clusters: int | Sequence[int],
    *,
    weights: Sequence[Tensor] | None = ...,
    backend: str = ...,
) -> list[Tensor]: ...
def update(
    x: Tensor | Sequence[Tensor],
    labels: Tensor | Sequence[Tensor],
    n_clusters: int | Sequence[int],
    *,
    weights: Tensor | Sequence[Tensor] | None = None,
    backend: str = "auto",
) -> Tensor | list[Tensor]:
    """Weighted mean of the points of each cluster, in fp32.

    Parameters
    ----------
    x : Tensor, (N, D); or a list of such
        float32, float16 or bfloat16; contiguous rows.
    labels : Tensor, (N,), int64
        In [0, K), every cluster non-empty.
    n_clusters : int, or one for each problem
    weights : Tensor, (N,), float64, optional

    Returns
    -------
    Tensor, (K, D), float32; a list for a list
    """
    xs, single = checks.problems("x", x)
    counts = checks.per_problem("n_clusters", n_clusters, len(xs), single)
    given = checks.per_problem("labels", labels, len(xs), single)
    for i, (points, k) in enumerate(zip(xs, counts, strict=True)):
        checks.matrix("x", points)
        given[i] = checks.labels(given[i], len(points), k, points)
    ws = checks.per_problem("weights", weights, len(xs), single)
    scaled = [None if w is None else checks.weights(w, points)[1] for w, points in zip(ws, xs, strict=True)]
    means = registry.call("update", backend, xs[0].device)(xs, given, counts, scaled)
    return means[0] if single else means
