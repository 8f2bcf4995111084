"""Features to labels, seconds: pyfold's Ward + Hartigan against SciPy's Ward, and counted in Lloyd iterations of faiss.

Run by hand: ``pytest bench/bench_clustering.py [--scale small]``. faiss only makes a few iterations here; its full runs, and
everyone's inertia, are in ``bench_inertia.py``, the Gram matrix alone in ``bench_gram.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from conftest import Problem, Report
from contenders import Seconds, by_faiss, by_pyfold, by_scipy
from pytest_benchmark.fixture import BenchmarkFixture


@dataclass(frozen=True)
class Sizes:
    """N points, D features, the K; iterations of faiss and rounds of pyfold, of which the best counts."""

    n: int
    d: int
    n_clusters: tuple[int, ...]
    niter: int
    rounds: int


SIZES = {
    "full": Sizes(n=11008, d=12288, n_clusters=(5504, 8806), niter=3, rounds=2),
    "small": Sizes(n=1024, d=1152, n_clusters=(512, 819), niter=3, rounds=2),
}
CONTENDERS = ("pyfold", "pyfold bf16", "scipy", "faiss")
Runs = dict[tuple[str, int], dict[str, Seconds]]  # (rows, K) -> contender -> seconds of its pieces, and "in all"
ASKED = {"pyfold": "< 2", "pyfold bf16": "< 1"}  # Lloyd iterations, on the fitted rows


@pytest.fixture(scope="module")
def runs(report: Report) -> Iterator[Runs]:
    """Becomes two tables once all have run."""
    table, pieces = report.tables.setdefault("features to labels", []), report.tables.setdefault("pieces, seconds", [])
    done: Runs = {}
    yield done
    for (kind, n_clusters), seconds in done.items():
        iteration = seconds["faiss"]["one iteration"] if "faiss" in seconds else None
        for contender, laps in seconds.items():
            case = {"rows": kind, "K": n_clusters, "contender": contender}
            pieces.append(case | {name: lap for name, lap in laps.items() if name != "in all"})
            if contender == "faiss":
                table.append(case | {"contender": "faiss, one iteration", "seconds": iteration})
                continue
            table.append(
                case
                | {
                    "seconds": laps["in all"],
                    "x pyfold's time": laps["in all"] / seconds["pyfold"]["in all"] if "pyfold" in seconds else None,
                    "Lloyd iterations": laps["in all"] / iteration if iteration else None,
                    "asked": ASKED.get(contender) if kind == "fitted" else None,
                }
            )
    report.notes += [
        "Lloyd iterations: seconds / the best iteration of faiss on the fp32 rows, of those after the first. bf16: the same",
        "rows rounded. pyfold's rest: finite check, cut, its own two inertias. SciPy: x @ xᵀ (numpy, ssyrk), distances in",
        "place, squareform, Ward's linkage, rest: fcluster.",
    ]


@pytest.mark.parametrize("contender", CONTENDERS)
def test_features_to_labels(
    benchmark: BenchmarkFixture,
    problem: Problem,
    runs: Runs,
    report: Report,
    contender: str,
) -> None:
    x = problem.x.bfloat16() if contender == "pyfold bf16" else problem.x
    tries: list[Seconds] = []

    def contend() -> None:
        tries.append({})
        if contender == "scipy":
            by_scipy(x, problem.n_clusters, tries[-1])
        elif contender == "faiss":
            by_faiss(x, problem.n_clusters, tries[-1], report.sizes.niter)
        else:
            by_pyfold(x, problem.n_clusters, tries[-1])

    benchmark.pedantic(contend, rounds=report.sizes.rounds if "pyfold" in contender else 1)
    seconds = benchmark.stats.stats.data
    best = seconds.index(min(seconds))
    runs.setdefault((problem.kind, problem.n_clusters), {})[contender] = tries[best] | {"in all": seconds[best]}
