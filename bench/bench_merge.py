"""Merging one LLaMA-7B FFN (N = 11008, H = 4096) against plain copies that move the same number of bytes.

Run by hand: ``pytest bench/bench_merge.py [--scale small]``. A merge of N units into K reads N H and writes K H elements; a
copy of (N + K) / 2 x H elements reads and writes as many. Both are measured into memory already touched (the copy is then the
roofline), and allocating their result on each call, where page faults take most of the time.
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
CONTENDERS = ("merge", "copy", "allocating merge", "allocating copy")
MATRICES = {"gate+up": (2, 0), "down": (0, 1), "gate+up+down": (2, 1)}  # how many by rows, by columns
ASKED = ">= 0.8"  # of the whole layer in fp16
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
        merge, copy, allocating_merge, allocating_copy = (speed[contender] for contender in CONTENDERS)
        table.append(
            {
                "matrices": matrices,
                "dtype": dtype,
                "K": n_clusters,
                "merge GB/s": merge,
                "copy GB/s": copy,
                "merge / copy": merge / copy,
                "asked": ASKED if (matrices, dtype) == ("gate+up+down", "float16") else None,
                "allocating merge GB/s": allocating_merge,
                "allocating copy GB/s": allocating_copy,
                "allocating merge / copy": allocating_merge / allocating_copy,
            }
        )
    report.notes.append(
        "Above 1, merging is faster than copying the same bytes. Allocating: page faults of a fresh result included."
    )


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("kept", [0, 1], ids=["fold20", "fold50"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("matrices", MATRICES)
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
    by_rows, by_columns = MATRICES[matrices]
    moved = (by_rows + by_columns) * (sizes.n + n_clusters) * sizes.hidden * DTYPES[dtype].itemsize

    def weights(n: int) -> list[Tensor]:
        shapes = by_rows * [(n, sizes.hidden)] + by_columns * [(sizes.hidden, n)]
        return [torch.randn(shape, generator=generator).to(DTYPES[dtype]) for shape in shapes]

    if "merge" in contender:
        merges = by_rows * [ops.merge_rows] + by_columns * [ops.merge_columns]
        sources = weights(sizes.n)
        results = [merge(source, labels, n_clusters) for merge, source in zip(merges, sources, strict=True)]

        def action() -> None:
            for merge, source, result in zip(merges, sources, results, strict=True):
                merge(source, labels, n_clusters, out=None if "allocating" in contender else result)

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
