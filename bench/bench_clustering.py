"""Features to labels: pyfold's Ward + Hartigan against SciPy's Ward and faiss' k-means, and the Gram matrix against torch.mm.

Run by hand: ``pytest bench/bench_clustering.py [--scale small] [--niter 10]``. Every contender starts from the same fp32 rows
and ends with labels; inertia is then computed for all of them by one fp64 function that belongs to none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from conftest import Report
from pytest_benchmark.fixture import BenchmarkFixture
from rows import make_rows
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from torch import Tensor

import pyfold
from pyfold import ops


@dataclass(frozen=True)
class Sizes:
    """N points, D features, K clusters; k-means iterations at most; side of the roofline's squares; rounds of Gram cases."""

    n: int
    d: int
    n_clusters: int
    niter: int
    square: int
    rounds: int


SIZES = {
    "full": Sizes(n=11008, d=12288, n_clusters=5504, niter=10, square=8192, rounds=3),
    "small": Sizes(n=1024, d=1152, n_clusters=512, niter=10, square=2048, rounds=10),
}
Seconds = dict[str, float]


@dataclass(frozen=True)
class Run:
    """One contender on one kind of rows: seconds in all and by piece, non-empty clusters, inertia, and ``Σ ‖x_i‖²``."""

    seconds: float
    pieces: Seconds
    clusters: int
    inertia: float
    energy: float


@contextmanager
def lap(seconds: Seconds, name: str) -> Iterator[None]:
    """Add the time spent inside to ``seconds[name]``."""
    start = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


@pytest.fixture(scope="module")
def sizes(report: Report, request: pytest.FixtureRequest) -> Sizes:
    niter = request.config.getoption("--niter")
    report.sizes = replace(report.sizes, niter=niter) if niter else report.sizes
    return report.sizes


@pytest.fixture(scope="module", params=("fitted", "gaussian", "planted"))
def rows(request: pytest.FixtureRequest, sizes: Sizes) -> tuple[str, Tensor]:
    """Kind and rows; module scope, so one kind is in memory at a time."""
    return request.param, make_rows(request.param, sizes.n, sizes.d, sizes.n_clusters)


@pytest.fixture(scope="module")
def runs(report: Report) -> Iterator[dict[tuple[str, str], Run]]:
    """(kind, contender) -> what it did. Becomes two tables once all have run."""
    table, pieces = report.tables.setdefault("features to labels", []), report.tables.setdefault("pieces, seconds", [])
    done: dict[tuple[str, str], Run] = {}
    yield done
    for (kind, contender), run in done.items():
        ours, faiss_run = done.get((kind, "pyfold")), done.get((kind, "faiss"))
        table.append(
            {
                "rows": kind,
                "contender": contender,
                "clusters": run.clusters,
                "seconds": run.seconds,
                "x pyfold's time": run.seconds / ours.seconds if ours else None,
                "Lloyd iterations": run.seconds / faiss_run.pieces["one iteration"] if faiss_run else None,
                "inertia/energy": run.inertia / run.energy,
                "x pyfold's inertia": run.inertia / ours.inertia if ours else None,
            }
        )
        pieces.append({"rows": kind, "contender": contender, **run.pieces})
    report.notes += [
        "x pyfold's: above 1, pyfold is faster, or its partition tighter. Lloyd iterations: seconds / one iteration of faiss.",
        "pyfold's rest: finite check, cut, its own two inertias. SciPy: x @ xᵀ (numpy, ssyrk), distances in place, squareform,",
        "Ward's linkage, rest: fcluster. faiss: one random start, niter iterations or until the objective stands still, rest:",
        "the assignment.",
    ]


def inertia(x: Tensor, labels: Tensor, n_clusters: int) -> float:
    """Within-cluster sum of squares in fp64 from the rows, 512 columns at a time."""
    counts = torch.bincount(labels, minlength=n_clusters).clamp_min(1).double()
    total = 0.0
    for block in x.split(512, dim=1):
        columns = block.double()
        sums = torch.zeros(n_clusters, block.shape[1], dtype=torch.float64).index_add_(0, labels, columns)
        total += float(columns.sub_((sums / counts[:, None])[labels]).square_().sum())
    return total


def by_pyfold(x: Tensor, sizes: Sizes, seconds: Seconds) -> Tensor:
    def timed(op: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with lap(seconds, op.__name__):
                return op(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for op in (ops.gram, ops.ward, ops.hartigan):
            patch.setattr(ops, op.__name__, timed(op))
        start = time.perf_counter()
        labels = pyfold.cluster(x, n_clusters=sizes.n_clusters).labels
    seconds["rest"] = time.perf_counter() - start - sum(seconds.values())
    return labels


def by_scipy(x: Tensor, sizes: Sizes, seconds: Seconds) -> Tensor:
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
        return torch.from_numpy(fcluster(joins, sizes.n_clusters, "maxclust").astype(np.int64) - 1)


def by_faiss(x: Tensor, sizes: Sizes, seconds: Seconds) -> Tensor:
    kmeans = faiss.Kmeans(sizes.d, sizes.n_clusters, niter=sizes.niter, min_points_per_centroid=1)
    with lap(seconds, "train"):
        kmeans.train(x.numpy())
    with lap(seconds, "rest"):
        labels = torch.from_numpy(kmeans.index.search(x.numpy(), 1)[1][:, 0])
    # faiss' clock runs on over the iterations; the first is left out, it pays for first touches.
    clock = [stats["time"] for stats in kmeans.iteration_stats]
    seconds["iterations run"] = len(clock)
    seconds["one iteration"] = (clock[-1] - clock[0]) / (len(clock) - 1)
    return labels


@pytest.mark.parametrize("contender", ["pyfold", "scipy", "faiss"])
def test_features_to_labels(
    benchmark: BenchmarkFixture, rows: tuple[str, Tensor], runs: dict[tuple[str, str], Run], sizes: Sizes, contender: str
) -> None:
    kind, x = rows
    contend = {"pyfold": by_pyfold, "scipy": by_scipy, "faiss": by_faiss}[contender]
    pieces: Seconds = {}
    labels = benchmark.pedantic(contend, args=(x, sizes, pieces), rounds=1)
    runs[kind, contender] = Run(
        seconds=benchmark.stats.stats.min,
        pieces=pieces,
        clusters=len(labels.unique()),
        inertia=inertia(x, labels, sizes.n_clusters),
        energy=float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2,
    )


@pytest.fixture(scope="module")
def products(report: Report, sizes: Sizes) -> Iterator[dict[str, float]]:
    """Contender -> seconds of the Gram matrix, and the roofline's. Becomes a table."""
    table = report.tables.setdefault("Gram matrix alone, fp32", [])
    best: dict[str, float] = {}
    yield best
    full = 2.0 * sizes.n**2 * sizes.d
    roof = 2.0 * sizes.square**3 / best.pop("roofline") / 1e9 if "roofline" in best else None
    for contender, seconds in best.items():
        # torch.mm computes the whole product; the others one triangle, diagonal included, and mirror it.
        done = full if contender == "torch.mm" else sizes.n * (sizes.n + 1.0) * sizes.d
        table.append(
            {
                "contender": contender,
                "seconds": seconds,
                "x pyfold's time": seconds / best["pyfold"] if "pyfold" in best else None,
                "GFLOP/s of 2 N² D": full / seconds / 1e9,
                "GFLOP/s done": done / seconds / 1e9,
                "done / roofline": done / seconds / 1e9 / roof if roof else None,
            }
        )
    if roof:
        report.notes.append(f"Roofline: torch.mm of square fp32 matrices, side {sizes.square}, best round: {roof:.1f} GFLOP/s.")


@pytest.mark.parametrize("contender", ["pyfold", "torch.mm", "numpy ssyrk", "roofline"])
def test_gram(benchmark: BenchmarkFixture, products: dict[str, float], sizes: Sizes, contender: str) -> None:
    shape = (sizes.square, sizes.square) if contender == "roofline" else (sizes.n, sizes.d)
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    points = x.numpy()
    product: Callable[[], Any] = {
        "pyfold": lambda: ops.gram(x),
        "torch.mm": lambda: torch.mm(x, x.T),
        "numpy ssyrk": lambda: points @ points.T,
        "roofline": lambda: torch.mm(x, x),
    }[contender]
    benchmark.pedantic(product, rounds=sizes.rounds, warmup_rounds=1)
    products[contender] = benchmark.stats.stats.min
