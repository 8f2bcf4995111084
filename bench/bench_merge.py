"""Merging one LLaMA-7B FFN (N = 11008, H = 4096) against plain copies that move the same number of bytes.

Run by hand: ``pytest bench/bench_merge.py [--scale small]``. A merge of N units into K reads N H and writes K H elements; a
copy of (N + K) / 2 x H elements reads and writes as many. ``ops.merge_*`` allocate their result on each call and are measured
as users get them: against a copy between buffers already touched (the roofline), and against one that allocates as they do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from conftest import Report
from pytest_benchmark.fixture import BenchmarkFixture
from rows import make_labels
from torch import Tensor

from pyfold import ops


@dataclass(frozen=True)
class Sizes:
    """N intermediate units, H hidden; the fractions K / N that are kept; rounds, of which the best counts."""

    n: int
    hidden: int
    keep: tuple[float, ...]
    rounds: int


SIZES = {
    "full": Sizes(n=11008, hidden=4096, keep=(0.8, 0.5), rounds=15),
    "small": Sizes(n=1376, hidden=512, keep=(0.8, 0.5), rounds=5),
}
CONTENDERS = ("merge", "copy", "allocating copy")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@pytest.fixture(scope="module")
def sizes(report: Report) -> Sizes:
    return report.sizes


@pytest.fixture(scope="module")
def measured(report: Report) -> Iterator[dict[tuple[str, str, int], dict[str, float]]]:
    """(matrices, dtype, K) -> contender -> GB/s. Becomes a table."""
    table = report.tables.setdefault("bytes read + bytes written", [])
    runs: dict[tuple[str, str, int], dict[str, float]] = {}
    yield runs
    for (matrices, dtype, n_clusters), speed in runs.items():
        merge, copy, allocating = (speed.get(contender) for contender in CONTENDERS)
        table.append(
            {
                "matrices": matrices,
                "dtype": dtype,
                "K": n_clusters,
                "merge GB/s": merge,
                "copy GB/s": copy,
                "allocating copy GB/s": allocating,
                "merge / copy": merge / copy if merge and copy else None,
                "merge / allocating copy": merge / allocating if merge and allocating else None,
            }
        )
    report.notes.append(
        "Above 1, merging is faster than copying. Merges allocate their result on each call, page faults included."
    )


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("kept", [0, 1], ids=["fold20", "fold50"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("matrices", ["gate+up", "down"])
def test_merge(
    benchmark: BenchmarkFixture,
    measured: dict[tuple[str, str, int], dict[str, float]],
    sizes: Sizes,
    matrices: str,
    dtype: str,
    kept: int,
    contender: str,
) -> None:
    n_clusters = int(sizes.keep[kept] * sizes.n)
    generator = torch.Generator().manual_seed(0)
    labels = make_labels(sizes.n, n_clusters, generator)
    count = 2 if matrices == "gate+up" else 1
    moved = count * (sizes.n + n_clusters) * sizes.hidden * DTYPES[dtype].itemsize

    def weights(n: int) -> list[Tensor]:
        shape = (n, sizes.hidden) if matrices == "gate+up" else (sizes.hidden, n)
        return [torch.randn(shape, generator=generator).to(DTYPES[dtype]) for _ in range(count)]

    if contender == "merge":
        merge = ops.merge_rows if matrices == "gate+up" else ops.merge_columns
        sources = weights(sizes.n)

        def action() -> None:
            for source in sources:
                merge(source, labels, n_clusters)

    else:
        sources = weights((sizes.n + n_clusters) // 2)
        targets = [source.clone() for source in sources]

        def action() -> None:
            for source, target in zip(sources, targets, strict=True):
                if contender == "copy":
                    target.copy_(source)
                else:
                    source.clone()

    benchmark.pedantic(action, rounds=sizes.rounds, warmup_rounds=2)
    speed = measured.setdefault((matrices, dtype, n_clusters), {})
    speed[contender] = moved / benchmark.stats.stats.min / 1e9
