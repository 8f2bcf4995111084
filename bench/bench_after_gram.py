"""From the Gram matrix to labels: seconds of Ward + Hartigan, and peak memory with the Gram matrix included.

Run by hand: ``pytest bench/bench_after_gram.py [--scale small]``. Every case is a process of its own, for the kernel keeps one
high-water mark per process (VmHWM): it is reset when the rows are there, and read when the labels are; what the process held
before is taken off. LLaMA-70B's N = 28672 with D = 2048 instead of 3 x 8192: no step after the Gram matrix knows D.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from conftest import Report
from contenders import Seconds, ops_timed
from rows import KINDS, make_rows

import pyfold


@dataclass(frozen=True)
class Case:
    """N points, D features, K clusters; what is asked: seconds after the Gram matrix, memory in units of 4 N² bytes."""

    n: int
    d: int
    n_clusters: int
    seconds: float | None = None
    memory: float | None = None


@dataclass(frozen=True)
class Sizes:
    """One layer's case for each of the test's ids."""

    cases: tuple[Case, ...]


SIZES = {
    "full": Sizes((Case(11008, 12288, 5504, 3.0), Case(11008, 12288, 8806, 3.0), Case(28672, 2048, 14336, 25.0, 2.0))),
    "small": Sizes((Case(1024, 1152, 512), Case(1024, 1152, 819), Case(2688, 192, 1344))),
}
LAYERS = ("7B-fold50", "7B-fold20", "70B-fold50")


@pytest.fixture(scope="module")
def notes(report: Report) -> Iterator[None]:
    yield
    report.notes += [
        "Ward + Hartigan: all of cluster() but the Gram matrix. Memory: peak resident bytes of the whole call over 4 N²,",
        "the size of the Gram matrix, which they include; rows and all that was there before do not count.",
        "Passes over G: the same seconds, in reads of G at the speed of a plain copy, the roofline of anything that reads it.",
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", range(len(LAYERS)), ids=LAYERS)
@pytest.mark.usefixtures("notes")
def test_after_gram(report: Report, layer: int, kind: str) -> None:
    case = report.sizes.cases[layer]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        seconds, peak, copy = fresh.submit(measure, kind, case.n, case.d, case.n_clusters).result()
    gram = seconds.pop("gram")
    after, matrix = sum(seconds.values()), 4 * case.n**2
    report.tables.setdefault("after the Gram matrix", []).append(
        {
            "rows": kind,
            "N": case.n,
            "K": case.n_clusters,
            "D": case.d,
            "gram s": gram,
            "ward s": seconds["ward"],
            "hartigan s": seconds["hartigan"],
            "rest s": seconds["rest"],
            "Ward + Hartigan s": after,
            "asked s": f"< {case.seconds:g}" if case.seconds and kind == "fitted" else None,
            "passes over G": after * copy / matrix,
            "memory / 4 N²": peak / matrix,
            "asked": f"< {case.memory:g}" if case.memory and kind == "fitted" else None,
        }
    )


def measure(kind: str, n: int, d: int, n_clusters: int) -> tuple[Seconds, int, float]:
    """In a process of its own: seconds of the pieces of a clustering, its peak bytes, and bytes per second of a plain copy."""
    x = make_rows(kind, n, d, n_clusters)
    seconds: Seconds = {}
    pyfold.cluster(x[:64], n_clusters=32)  # threads and code are there before the mark is reset
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS:")
    with ops_timed(seconds):
        pyfold.cluster(x, n_clusters=n_clusters)
    return seconds, _resident("VmHWM:") - before, _copy_speed()


def _copy_speed() -> float:
    """Bytes read plus bytes written per second, by torch's copy into memory already touched."""
    source = torch.ones(64 << 20)
    target = source.clone()
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2 * 4 * source.numel() / best


def _resident(name: str) -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith(name)) * 1024
