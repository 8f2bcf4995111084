"""Distances from differences of points, for what fp32 inner products cannot see.

‖a‖² + ‖b‖² − 2 a·b is wrong by about 1e-7 of the squared norms. Where points lie in tight groups far from the origin, and no
one origin is near to all groups, that is more than the distances within a group: only Σ (a − b)² tells its clusters apart.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pyfold import ops

_NOISE = 1e-6  # of the squared norms: distances below drown
_CLOSE = 1e-3  # distances above are right to 1e-4
_ELEMENTS = 2**20  # of scratch at a time


def total(values: Tensor) -> float:
    """Sum in fp64, the same bits on any number of threads, which torch's own sum on a CPU is not."""
    if values.device.type == "cpu":
        return float(np.sum(values.numpy(), dtype=np.float64))
    return float(values.sum(dtype=torch.float64))


def row_sums(values: Tensor) -> Tensor:
    """(N,) sum of each row, the same bits on any number of threads: torch splits a single row between them."""
    return torch.from_numpy(values.numpy().sum(1)) if values.device.type == "cpu" else values.sum(1)


def squared_distances(points: Tensor, labels: Tensor, centroids: Tensor) -> Tensor:
    """(N,) each point to the centroid of its label, in the wider dtype of both: exactly 0 where they are equal."""
    dtype = torch.promote_types(points.dtype, centroids.dtype)
    distances = torch.empty(len(labels), dtype=dtype, device=points.device)
    rows = max(1, _ELEMENTS // points.shape[1])
    for out, some, label in zip(distances.split(rows), points.split(rows), labels.split(rows), strict=True):
        out.copy_(row_sums((some - centroids[label]).square_()))
    return distances


def assign(x: Tensor, centroids: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """As :func:`pyfold.ops.assign`, and right for points whose distances drown too."""
    return settle(x, centroids, *ops.assign(x, centroids, backend=backend))


def settle(x: Tensor, centroids: Tensor, labels: Tensor, distances: Tensor) -> tuple[Tensor, Tensor]:
    """What ``ops.assign`` found, decided again by differences for the points that it could not decide."""
    norms = row_sums(centroids.square())
    rows = (distances < _NOISE * norms[labels]).nonzero().flatten()
    chunks = rows.split(max(1, _ELEMENTS // x.shape[1]))
    own = torch.cat([squared_distances(x[some].float(), labels[some], centroids) for some in chunks])
    rows, own = rows[own > 0], own[own > 0]
    if len(rows):
        # A point at less than half the distance from its centroid to any other is in its place: d(c, c') > 2 d(x, c).
        used, place = labels[rows].unique(return_inverse=True)
        gaps = torch.cat([_to_others(centroids, some) for some in used.split(max(1, _ELEMENTS // len(centroids)))])
        rows = rows[4 * own >= gaps[place]]
    labels, distances = labels.clone(), distances.clone()
    for some in rows.split(max(1, _ELEMENTS // len(centroids))):
        least = _pairs(x[some].float(), centroids).min(1)
        labels[some], distances[some] = least.indices, least.values
    return labels, distances


def drowned(inertia: float, energy: float, free: float) -> bool:
    """Whether a partition of such an inertia was chosen by distances that drown; not if its clusters are duplicates.

    ``energy`` is Σ w ‖y‖², ``free`` the share of the points that are not all of a cluster, (N − K) / N.
    """
    return 1e-14 * energy < inertia < _NOISE * energy * free


def sharpened(gram: Tensor, y: Tensor) -> Tensor:
    """G_ij := −‖y_i − y_j‖² / 2, in place: the same distances G_ii + G_jj − 2 G_ij, the small ones right too.

    Ward, Lloyd and Hartigan ask for nothing else of G.
    """
    norms = gram.diagonal().double()
    rows = max(1, _ELEMENTS // len(gram))
    for block, norm, points in zip(gram.split(rows), norms.split(rows), y.split(rows), strict=True):
        squares = norm[:, None] + norms - 2 * block.double()
        close = (squares < _CLOSE * torch.maximum(norm[:, None], norms)).nonzero()
        for pairs in close.split(max(1, _ELEMENTS // y.shape[1])):
            i, j = pairs.unbind(1)
            squares[i, j] = row_sums((points[i].float() - y[j].float()).square_()).double()
        block.copy_(squares.mul_(-0.5))
    return gram


def _to_others(centroids: Tensor, some: Tensor) -> Tensor:
    """Squared distance of some centroids to the nearest other."""
    return _pairs(centroids[some], centroids).scatter_(1, some[:, None], torch.inf).min(1).values


def _pairs(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square_()
