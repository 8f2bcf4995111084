"""k-means where folding does not lead: many points in few dimensions against faiss and superkmeans; many small problems at once
against scikit-learn.

Run by hand: ``pytest bench/bench_kmeans.py [--scale small]``. Many points: everyone trains on all of them, ``niter`` passes
with no early stop, and is judged by its centroids: inertia is the sum of squared distances of all points to the nearest. The
same rows of x are the random start of pyfold and faiss; superkmeans takes no start and draws its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from conftest import Report
from contenders import EVERY_POINT, inertia
from pytest_benchmark.fixture import BenchmarkFixture
from rows import KINDS, POINT_KINDS, make_points, make_rows
from sklearn.cluster import KMeans
from superkmeans import SuperKMeans
from torch import Tensor

import pyfold


@dataclass(frozen=True)
class Sizes:
    """Points: N, D, K, Lloyd passes. Small problems: how many, their N, D, K. Side of the roofline's squares; rounds."""

    n: int
    d: int
    n_clusters: int
    niter: int
    batch: int
    batch_n: int
    batch_d: int
    batch_clusters: int
    square: int
    rounds: int


SIZES = {
    "full": Sizes(200_000, 128, 1024, 25, batch=64, batch_n=512, batch_d=576, batch_clusters=256, square=8192, rounds=2),
    "small": Sizes(16_000, 128, 256, 25, batch=4, batch_n=512, batch_d=576, batch_clusters=256, square=2048, rounds=1),
}
TOLERANCE = 0.005  # of inertia, within which two results count as equal


@dataclass(frozen=True)
class Run:
    seconds: float
    inertia: float
    passes: int | None = None


Ended = tuple[Tensor, int | None]  # centroids, passes made


@pytest.fixture(scope="module")
def roofline(report: Report) -> float:
    """FLOP/s of torch.mm of large square fp32 matrices."""
    side = report.sizes.square
    square = torch.randn(side, side, generator=torch.Generator().manual_seed(0))
    torch.mm(square, square)
    best = float("inf")
    for _ in range(2):
        start = time.perf_counter()
        torch.mm(square, square)
        best = min(best, time.perf_counter() - start)
    report.notes.append(f"Roofline: torch.mm of square fp32 matrices, side {side}: {2e-9 * side**3 / best:.1f} GFLOP/s.")
    return 2.0 * side**3 / best


def objective(x: Tensor, centroids: Tensor) -> float:
    """``Σ min_c ‖x_i − c‖²``: the nearest in fp32, its distance in fp64."""
    total, half_norms = 0.0, centroids.square().sum(1) / 2
    for block in x.split(8192):
        nearest = torch.addmm(half_norms, block, centroids.T, alpha=-1).argmin(1)
        total += float((block.double() - centroids[nearest].double()).square().sum())
    return total


def by_pyfold(x: Tensor, start: Tensor | str, sizes: Sizes) -> Ended:
    result = pyfold.kmeans(x, sizes.n_clusters, init=start, refine="lloyd", max_iter=sizes.niter, tol=0.0)
    return result.centroids, result.n_iter


def by_faiss(x: Tensor, start: Tensor, sizes: Sizes) -> Ended:
    kmeans = faiss.Kmeans(sizes.d, sizes.n_clusters, niter=sizes.niter, max_points_per_centroid=EVERY_POINT)
    kmeans.train(x.numpy(), init_centroids=start.numpy())
    return torch.from_numpy(kmeans.centroids), len(kmeans.iteration_stats)


def by_superkmeans(x: Tensor, sizes: Sizes, **options: Any) -> Ended:
    kmeans = SuperKMeans(sizes.n_clusters, sizes.d, iters=sizes.niter, **options)
    centroids = torch.from_numpy(np.asarray(kmeans.train(x.numpy())))
    return centroids, None if kmeans.hierarchical_ else len(kmeans.iteration_stats)


EXHAUSTIVE = {
    "hierarchical": False,
    "sampling_fraction": 1.0,
    "max_points_per_cluster": EVERY_POINT,
    "early_termination": False,
}
CONTENDERS = ("pyfold random", "pyfold k-means++", "faiss", "superkmeans", "superkmeans, its defaults")


@pytest.fixture(scope="module", params=POINT_KINDS)
def points(request: pytest.FixtureRequest, report: Report) -> tuple[str, Tensor]:
    return request.param, make_points(request.param, report.sizes.n, report.sizes.d, report.sizes.n_clusters)


@pytest.fixture(scope="module")
def runs(report: Report, roofline: float) -> Iterator[dict[str, dict[str, Run]]]:
    """Kind of points -> contender -> what it did. Becomes a table."""
    sizes = report.sizes
    table = report.tables.setdefault(f"N = {sizes.n}, D = {sizes.d}, K = {sizes.n_clusters}, {sizes.niter} passes", [])
    done: dict[str, dict[str, Run]] = {}
    yield done
    flops = 2.0 * sizes.n * sizes.n_clusters * sizes.d
    for kind, contenders in done.items():
        ours = contenders.get("pyfold random")
        for contender, run in contenders.items():
            ratio = run.inertia / ours.inertia if ours else None
            is_peer = "pyfold" not in contender
            table.append(
                {
                    "points": kind,
                    "contender": contender,
                    "passes": run.passes,
                    "seconds": run.seconds,
                    "x pyfold random's time": run.seconds / ours.seconds if ours else None,
                    "x its inertia": ratio,
                    "equal": ("yes" if abs(ratio - 1) <= TOLERANCE else "no") if ratio else None,
                    "asked": "time >= 1 where equal" if is_peer else None,
                    "2 N K D passes / roofline": flops * run.passes / run.seconds / roofline
                    if run.passes and not contender.endswith("defaults")
                    else None,
                }
            )
    report.notes += [
        "x its inertia: below 1, tighter than pyfold's from random rows. superkmeans skips distances that cannot win; with its",
        "defaults it also trains on a sample, so its FLOPs are not known, and stops early.",
    ]


@pytest.mark.parametrize("contender", CONTENDERS)
def test_points(
    benchmark: BenchmarkFixture, points: tuple[str, Tensor], runs: dict[str, dict[str, Run]], report: Report, contender: str
) -> None:
    kind, x = points
    sizes = report.sizes
    start = x[torch.randperm(sizes.n, generator=torch.Generator().manual_seed(1))[: sizes.n_clusters]]
    contend: Callable[[], Ended] = {
        "pyfold random": lambda: by_pyfold(x, start, sizes),
        "pyfold k-means++": lambda: by_pyfold(x, "k-means++", sizes),
        "faiss": lambda: by_faiss(x, start, sizes),
        "superkmeans": lambda: by_superkmeans(x, sizes, **EXHAUSTIVE),
        "superkmeans, its defaults": lambda: by_superkmeans(x, sizes),
    }[contender]
    centroids, passes = benchmark.pedantic(contend, rounds=sizes.rounds)
    runs.setdefault(kind, {})[contender] = Run(benchmark.stats.stats.min, objective(x, centroids), passes)


@pytest.fixture(scope="module")
def batches(report: Report, roofline: float) -> Iterator[dict[str, dict[str, Run]]]:
    """Kind of rows -> contender -> what it did with all problems. Becomes a table."""
    sizes = report.sizes
    shape = f"{sizes.batch} problems {sizes.batch_n} x {sizes.batch_d}, K = {sizes.batch_clusters}"
    table = report.tables.setdefault(shape, [])
    done: dict[str, dict[str, Run]] = {}
    yield done
    gram = sizes.batch * sizes.batch_n * (sizes.batch_n + 1.0) * sizes.batch_d / roofline
    for kind, contenders in done.items():
        ours = contenders.get("pyfold")
        for contender, run in contenders.items():
            table.append(
                {
                    "rows": kind,
                    "contender": contender,
                    "seconds": run.seconds,
                    "x pyfold's time": run.seconds / ours.seconds if ours else None,
                    "x pyfold's inertia": run.inertia / ours.inertia if ours else None,
                    "asked": "time >= 20, inertia > 1" if contender == "scikit-learn" and kind == "fitted" else None,
                    "Gram at roofline / seconds": gram / run.seconds,
                }
            )


@pytest.mark.parametrize("contender", ["pyfold", "scikit-learn"])
@pytest.mark.parametrize("kind", KINDS)
def test_batch(
    benchmark: BenchmarkFixture, batches: dict[str, dict[str, Run]], report: Report, kind: str, contender: str
) -> None:
    sizes, k = report.sizes, report.sizes.batch_clusters
    problems = [make_rows(kind, sizes.batch_n, sizes.batch_d, k, seed) for seed in range(sizes.batch)]

    def contend() -> list[Tensor]:
        if contender == "pyfold":
            return [result.labels for result in pyfold.kmeans(problems, k)]
        return [torch.from_numpy(KMeans(k, n_init=1, random_state=0).fit(x.numpy()).labels_.astype(np.int64)) for x in problems]

    labels = benchmark.pedantic(contend, rounds=sizes.rounds, warmup_rounds=1)
    total = sum(inertia(x, found, k) for x, found in zip(problems, labels, strict=True))
    batches.setdefault(kind, {})[contender] = Run(benchmark.stats.stats.min, total)
