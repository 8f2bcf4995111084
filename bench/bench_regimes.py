"""Which regime k-means takes, and which would have been faster: the same seeds and Lloyd passes over G and on the points.

Run by hand: ``pytest bench/bench_regimes.py [--scale small]``. Both start from k-means++ and may make ``max_iter`` passes; the
prediction takes ``regime.ITERATIONS`` for granted, a run stops where nothing changes. A pick that costs more than 1.2 x the
other is marked; its seconds against the predicted ones say which of ``regime.RATES`` is wrong.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
from conftest import Report
from pytest_benchmark.fixture import BenchmarkFixture
from rows import make_rows

import pyfold
from pyfold.clustering import regime

LIMIT = 1.2


@dataclass(frozen=True)
class Sizes:
    """Every N, D, K as divided by ``divisor``; Lloyd passes at most."""

    divisor: int
    max_iter: int


SIZES = {"full": Sizes(divisor=1, max_iter=20), "small": Sizes(divisor=8, max_iter=20)}
# From folding (N about D, K about N / 2) to general k-means (N >> D), and what lies between.
SHAPES = [
    (512, 576, 256),
    (1536, 1728, 768),
    (1536, 1728, 1228),
    (4096, 4096, 2048),
    (4096, 512, 64),
    (4096, 64, 1024),
    (2048, 8192, 16),
    (8192, 1024, 512),
    (8192, 128, 64),
    (10000, 768, 4000),
    (12000, 3072, 100),
    (16384, 32, 2000),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_regime(report: Report, benchmark: BenchmarkFixture, shape: tuple[int, int, int]) -> None:
    n, d, k = (max(2, size // report.sizes.divisor) for size in shape)
    x = make_rows("fitted", n, d, k)
    options: dict[str, Any] = {"init": "k-means++", "refine": "lloyd", "max_iter": report.sizes.max_iter, "tol": 0.0}
    explained = pyfold.explain(x, k, **{name: value for name, value in options.items() if name != "tol"})
    assert explained.refused is not None
    predicted = {way.regime: way for way in (explained.taken, explained.refused)}
    seconds, inertia = {}, {}
    for name, way in predicted.items():
        result, seconds[name] = _forced(way, lambda: pyfold.kmeans(x, k, **options))
        assert result.regime == name
        inertia[name] = result.inertia
    benchmark.pedantic(lambda: pyfold.kmeans(x, k, **options), rounds=1)
    ratio = seconds[explained.taken.regime] / min(seconds.values())
    report.tables.setdefault("Lloyd from k-means++, seconds", []).append(
        {
            "N": n,
            "D": d,
            "K": k,
            "picked": explained.taken.regime,
            "gram": seconds["gram"],
            "predicted gram": predicted["gram"].seconds,
            "direct": seconds["direct"],
            "predicted direct": predicted["direct"].seconds,
            "inertia gram/direct": inertia["gram"] / inertia["direct"],
            "picked/better": ratio,
            "": "SLOWER" if ratio > LIMIT else "",
        }
    )


def _forced(way: regime.Estimate, run: Callable[[], Any]) -> tuple[Any, float]:
    """One regime whatever the model says, twice; the better time."""
    times = []
    with mock.patch.object(regime, "choose", return_value=(way, None, "")):
        for _ in range(2):
            start = time.perf_counter()
            result = run()
            times.append(time.perf_counter() - start)
    return result, min(times)
