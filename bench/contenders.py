"""Rows (N, D) and K in, labels (N,) out: pyfold and its peers, each called as its users would, all pieces timed; and one judge.

Every peer's k-means starts from rows drawn at random and may make ``niter`` iterations: at K = N / 2 k-means++ alone would take
scikit-learn minutes. Inertia is computed from rows and labels by one fp64 function that belongs to no contender.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from fastkmeans import FastKMeans
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from sklearn.cluster import KMeans
from torch import Tensor

import pyfold
from pyfold import ops

Seconds = dict[str, float]
EVERY_POINT = 10**9  # faiss, fastkmeans and superkmeans otherwise train on a sample of so many points per cluster


@contextmanager
def lap(seconds: Seconds, name: str) -> Iterator[None]:
    """Add the time spent inside to ``seconds[name]``."""
    start = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


@contextmanager
def ops_timed(seconds: Seconds) -> Iterator[None]:
    """Inside, ``seconds`` gets the time of Gram matrix, Ward and Hartigan apart, and "rest" what remains."""

    def timed(op: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with lap(seconds, op.__name__):
                return op(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for op in (ops.gram, ops.ward, ops.hartigan):
            patch.setattr(ops, op.__name__, timed(op))
        start = time.perf_counter()
        yield
    seconds["rest"] = time.perf_counter() - start - sum(seconds.values())


def inertia(x: Tensor, labels: Tensor, n_clusters: int) -> float:
    """Within-cluster sum of squares in fp64 from the rows, 512 columns at a time."""
    counts = torch.bincount(labels, minlength=n_clusters).clamp_min(1).double()
    total = 0.0
    for block in x.split(512, dim=1):
        columns = block.double()
        sums = torch.zeros(n_clusters, block.shape[1], dtype=torch.float64).index_add_(0, labels, columns)
        total += float(columns.sub_((sums / counts[:, None])[labels]).square_().sum())
    return total


def energy(x: Tensor) -> float:
    """``Σ ‖x_i‖²``, the scale to read an inertia against."""
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2


def by_pyfold(x: Tensor, n_clusters: int, seconds: Seconds) -> Tensor:
    with ops_timed(seconds):
        return pyfold.cluster(x, n_clusters=n_clusters).labels


def by_scipy(x: Tensor, n_clusters: int, seconds: Seconds) -> Tensor:
    points = x.numpy()
    with lap(seconds, "gram"):
        distances = points @ points.T
    with lap(seconds, "distances"):
        norms = distances.diagonal().copy()
        distances *= -2
        distances += norms[:, None]
        distances += norms
        np.sqrt(np.maximum(distances, 0, out=distances), out=distances)
        np.fill_diagonal(distances, 0)
        condensed = squareform(distances, checks=False)
    with lap(seconds, "ward"):
        joins = linkage(condensed, "ward")
    with lap(seconds, "rest"):
        return torch.from_numpy(fcluster(joins, n_clusters, "maxclust").astype(np.int64) - 1)


def by_faiss(x: Tensor, n_clusters: int, seconds: Seconds, niter: int) -> Tensor:
    kmeans = faiss.Kmeans(x.shape[1], n_clusters, niter=niter, min_points_per_centroid=1, max_points_per_centroid=EVERY_POINT)
    with lap(seconds, "train"):
        kmeans.train(x.numpy())
    with lap(seconds, "labels"):
        labels = torch.from_numpy(kmeans.index.search(x.numpy(), 1)[1][:, 0])
    # faiss' clock runs on over the iterations; the first is left out, it pays for first touches.
    clock = [stats["time"] for stats in kmeans.iteration_stats]
    seconds["iterations run"] = len(clock)
    seconds["one iteration"] = min(after - before for before, after in pairwise(clock))
    return labels


def by_scikit_learn(x: Tensor, n_clusters: int, seconds: Seconds, niter: int) -> Tensor:
    kmeans = KMeans(n_clusters, init="random", n_init=1, max_iter=niter, random_state=0)
    with lap(seconds, "train"):
        kmeans.fit(x.numpy())
    seconds["iterations run"] = kmeans.n_iter_
    return torch.from_numpy(kmeans.labels_.astype(np.int64))


def by_fastkmeans(x: Tensor, n_clusters: int, seconds: Seconds, niter: int) -> Tensor:
    kmeans = FastKMeans(x.shape[1], n_clusters, niter=niter, gpu=False, max_points_per_centroid=EVERY_POINT)
    with lap(seconds, "train"):
        kmeans.train(x.numpy())
    with lap(seconds, "labels"):
        return torch.from_numpy(kmeans.predict(x.numpy()))
