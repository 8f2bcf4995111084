"""Whose partition is tightest: pyfold, SciPy's Ward and three k-means, all run to their ends, labels judged by one function.

Run by hand: ``pytest bench/bench_inertia.py [--scale small]``; full scale takes half an hour, nearly all of it the peers'. The
labels of every contender are judged twice, on the fp32 rows and on those rounded to bf16; only pyfold's second run clustered
the latter, no peer takes them. Seconds are for orientation: ``bench_clustering.py`` times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import pytest
from conftest import Problem, Report
from contenders import Seconds, by_faiss, by_fastkmeans, by_pyfold, by_scikit_learn, by_scipy, energy, inertia
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """N points, D features, the K; k-means iterations at most."""

    n: int
    d: int
    n_clusters: tuple[int, ...]
    niter: int


SIZES = {
    "full": Sizes(n=11008, d=12288, n_clusters=(5504, 8806), niter=25),
    "small": Sizes(n=1024, d=1152, n_clusters=(512, 819), niter=25),
}
CONTENDERS = ("pyfold", "pyfold bf16", "scipy", "faiss", "scikit-learn", "fastkmeans")


@dataclass(frozen=True)
class Run:
    """One contender's end: its seconds, iterations, non-empty clusters, and inertia on the fp32 and the bf16 rows."""

    seconds: float
    iterations: float | None
    clusters: int
    inertia: float
    inertia_bf16: float
    energy: float


Runs = dict[tuple[str, int], dict[str, Run]]  # (rows, K) -> contender -> what it did


@pytest.fixture(scope="module")
def runs(report: Report) -> Iterator[Runs]:
    """Becomes a table once all have run."""
    table = report.tables.setdefault("features to labels, run out", [])
    done: Runs = {}
    yield done
    for (kind, n_clusters), contenders in done.items():
        ours, ours_bf16 = contenders.get("pyfold"), contenders.get("pyfold bf16")
        for contender, run in contenders.items():
            is_peer = "pyfold" not in contender
            table.append(
                {
                    "rows": kind,
                    "K": n_clusters,
                    "contender": contender,
                    "clusters": run.clusters,
                    "iterations": run.iterations,
                    "seconds": run.seconds,
                    "inertia/energy": run.inertia / run.energy,
                    "x pyfold's": run.inertia / ours.inertia if ours else None,
                    "on bf16 rows, x pyfold bf16's": run.inertia_bf16 / ours_bf16.inertia_bf16 if ours_bf16 else None,
                    "asked": "> 1" if is_peer and kind == "fitted" else None,
                }
            )
    report.notes += [
        "x pyfold's: inertia over pyfold's; above 1, pyfold's partition is tighter. bf16: the same rows rounded.",
        f"faiss, scikit-learn, fastkmeans: one random start, {report.sizes.niter} iterations or until nothing moves.",
    ]


@pytest.mark.parametrize("contender", CONTENDERS)
def test_inertia(benchmark: BenchmarkFixture, problem: Problem, runs: Runs, report: Report, contender: str) -> None:
    niter = report.sizes.niter
    contend: Callable[[Tensor, int, Seconds], Tensor] = {
        "pyfold": by_pyfold,
        "pyfold bf16": by_pyfold,
        "scipy": by_scipy,
        "faiss": partial(by_faiss, niter=niter),
        "scikit-learn": partial(by_scikit_learn, niter=niter),
        "fastkmeans": partial(by_fastkmeans, niter=niter),
    }[contender]
    rounded = problem.x.bfloat16()
    pieces: Seconds = {}
    given = rounded if contender == "pyfold bf16" else problem.x
    labels = benchmark.pedantic(contend, args=(given, problem.n_clusters, pieces), rounds=1)
    runs.setdefault((problem.kind, problem.n_clusters), {})[contender] = Run(
        seconds=benchmark.stats.stats.min,
        iterations=pieces.get("iterations run"),
        clusters=len(labels.unique()),
        inertia=inertia(problem.x, labels, problem.n_clusters),
        inertia_bf16=inertia(rounded, labels, problem.n_clusters),
        energy=energy(problem.x),
    )
